"""`rmsprop bench`: how long a step takes here, beside torch's optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# What stands for --cases, --variants and --threads on a CPU. An option that was not given is None, so that one of
# them that was given with --device cuda can be told.
CASES, VARIANTS, THREADS = "rl,a2c,nature,mobilenet,500x16,500x1024", "plain", "1,all"


def bench(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    cases: Annotated[
        str | None,
        typer.Option(
            help="Comma list from rl, a2c, nature, mobilenet, resnet50, vit, 500x16, 500x1024, one; on cuda also "
            "256M, and by default mobilenet, resnet50, vit, 256M, rl.",
            show_default=CASES,
        ),
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(
            help="Comma list from plain, full (with momentum and centered). Only on cpu.", show_default=VARIANTS
        ),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(help="Comma list of numbers of threads; all: one per core. Only on cpu.", show_default=THREADS),
    ] = None,
    busy: Annotated[
        bool, typer.Option("--busy", help="Again with a busy neighbour on each core. Only on cpu.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for each contestant in each case.")] = 0.5,
    out: Annotated[Path | None, typer.Option(help="A JSON file for all figures, the machine and versions.")] = None,
) -> None:
    """Time whole optimizer steps: ours, torch's RMSprop (for-loop and foreach), torch's fused SGD and Adam.

    On a CPU all take turns in one process. The table shows medians, torch's best RMSprop over ours, and memory
    traffic; --out keeps the 10th, 90th and 99th percentiles too.

    On an NVIDIA GPU ours is the Triton kernel, called and replayed in a graph; foreach captured in a graph and
    compiled, and bitsandbytes where installed, are there too. The table shows wall time with synchronisation, time on
    the device's stream, traffic at 20 bytes for each element and as a part of the device's copy rate, what one step
    launches, runs, copies and waits for, and the bytes per parameter that it holds besides what was there.

    Examples:

    rmsprop bench

    rmsprop bench --cases rl,mobilenet --variants plain,full --threads 1 --busy

    rmsprop bench --cases one --seconds 2 --out times.json

    rmsprop bench --device cuda --cases rl,256M
    """
    if device == "cuda":
        for option, given in (("--variants", variants), ("--threads", threads), ("--busy", busy or None)):
            if given is not None:
                raise typer.BadParameter(f"{option} is of --device cpu; cuda takes --cases, --seconds and --out")
        _on_cuda(cases, seconds, out)
    elif device == "cpu":
        cases = CASES if cases is None else cases
        variants = VARIANTS if variants is None else variants
        _on_cpu(cases, variants, THREADS if threads is None else threads, busy, seconds, out)
    else:
        raise typer.BadParameter(f"--device takes cpu or cuda; got {device!r}")


def _on_cpu(cases: str, variants: str, threads: str, busy: bool, seconds: float, out: Path | None) -> None:
    """Measure everyone on the CPU; print the table and the bars."""
    from rich.console import Console
    from rich.table import Table

    from rmsprop.bench import cpu as timing
    from rmsprop.cli.table import show

    chosen = _chosen("--cases", cases, list(timing.CASES))
    kinds = _chosen("--variants", variants, list(timing.TRAFFIC))
    about = timing.machine()
    cores = about["cores"] or 1
    try:
        counts = sorted({cores if word == "all" else int(word) for word in threads.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1:
        raise typer.BadParameter(f"--threads takes numbers from 1, or all, such as 1,all; got {threads!r}")
    console = Console()
    console.print(f"{about['cpu']}, {cores} cores · torch {about['torch']} · rmsprop {about['rmsprop']}")
    table = Table(title="median step", caption="ratio: torch's best RMSprop over ours")
    whose = (timing.OURS, *timing.TORCH, *timing.YARDSTICKS)
    for name in ("case", "tensors", "elements", "threads", *whose):
        table.add_column(name, justify="left" if name == "case" else "right")
    for name in ("ratio", "GB/s"):
        table.add_column(name, justify="right", style="bold")
    results = []
    loads = [False, True] if busy else [False]
    with console.status("measuring") as status:
        for result in timing.run(chosen, kinds, counts, loads, seconds):
            results.append(result)
            status.update(f"measured {result.case}, {result.variant}, {result.threads} threads")
            table.add_row(
                result.case if result.variant == "plain" else f"{result.case}, {result.variant}",
                f"{result.tensors}",
                _short(result.elements),
                f"{result.threads}{', busy' if result.busy else ''}",
                *(_time(result.times[name].median) for name in whose),
                f"{result.ratio():.1f}",
                f"{result.gigabytes():.1f}",
            )
    show(table, console)
    for what, reached, needed, met in timing.verdicts(results):
        console.print(f"{'met   ' if met else 'missed'} {what}: {reached:.2f}, bar {needed:.2f}", highlight=False)
    if out is not None:
        timing.write(results, about, out)
        console.print(f"wrote {out}", highlight=False)


def _on_cuda(cases: str | None, seconds: float, out: Path | None) -> None:
    """Measure everyone on the current NVIDIA GPU; print the table and the bars."""
    from rich.console import Console
    from rich.table import Table

    from rmsprop.bench import cuda as timing
    from rmsprop.cli.table import show

    chosen = list(timing.DEFAULT) if cases is None else _chosen("--cases", cases, list(timing.CASES))
    reason = timing.missing()
    if reason is not None:
        raise typer.BadParameter(f"--device cuda: {reason}")
    console = Console()
    rate = timing.copy_rate()
    about = timing.machine(rate)
    console.print(timing.headline(about), highlight=False)
    found = {}
    with console.status("measuring") as status:
        for result in timing.run(chosen, seconds, rate):
            found[result.case, result.contestant] = result
            status.update(f"measured {result.contestant} on {result.case}")
    table = Table(title="one step of float32 parameters", caption="GB/s: at 20 bytes for each element")
    for name in ("case", "who", *(head for head, _ in timing.COLUMNS.values())):
        table.add_column(name, justify="left" if name in ("case", "who") else "right")
    for result in found.values():
        table.add_row(result.case, result.contestant, *timing.cells(result))
    show(table, console)
    for line in timing.remarks(found.values()):
        console.print(line, highlight=False, markup=False)
    if out is not None:
        timing.write(found.values(), about, out)
        console.print(f"wrote {out}", highlight=False)


def _short(count: int) -> str:
    """A count to three digits, in thousands or millions."""
    return next((f"{count / size:.3g}{unit}" for size, unit in ((1e6, "M"), (1e3, "k")) if count >= size), f"{count}")


def _time(microseconds: float) -> str:
    """A time to three digits or whole milliseconds, in one word."""
    if microseconds < 999.5:
        return f"{microseconds:.3g}µs"
    return f"{microseconds / 1e3:.3g}ms" if microseconds < 99_950 else f"{microseconds / 1e3:,.0f}ms"


def _chosen(option: str, words: str, known: list[str]) -> list[str]:
    """The words of a comma list, each of them known."""
    chosen = [word.strip() for word in words.split(",")]
    for word in chosen:
        if word not in known:
            raise typer.BadParameter(f"{option}: unknown {word!r}; choose from {', '.join(known)}")
    return chosen
