"""`rmsprop bench`: time a step on this machine, beside torch's optimizers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from rmsprop.cli.arguments import read_list, read_names

# The defaults of --cases, --variants, and --threads on a CPU. The options default to None, so that --device cuda can
# refuse the ones that it would ignore.
CASES, VARIANTS, THREADS = "rl,a2c,nature,mobilenet,500x16,500x1024", "plain", "1,all"


def bench(
    device: Annotated[str, typer.Option(help="Device to measure: cpu or cuda.")] = "cpu",
    cases: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated list of rl, a2c, nature, mobilenet, resnet50, vit, 500x16, 500x1024, one, and, on "
            "cuda, 256M. Default on cuda: mobilenet,resnet50,vit,256M,rl.",
            show_default=CASES,
        ),
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated list of plain and full (centered, with momentum). CPU only.", show_default=VARIANTS
        ),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(help="Comma-separated numbers of threads; all is one per core. CPU only.", show_default=THREADS),
    ] = None,
    busy: Annotated[
        bool, typer.Option("--busy", help="Measure again with another busy process on each core. CPU only.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for each optimizer in each case.")] = 0.5,
    out: Annotated[Path | None, typer.Option(help="JSON file for all times, the machine, and the versions.")] = None,
) -> None:
    """Time optimizer steps of this package's RMSprop, torch's RMSprop, and torch's fused SGD and Adam.

    On a CPU, all optimizers take turns in one process. The table shows median times, the ratio of torch's best
    RMSprop (for-loop or foreach) to this package's, and memory traffic. --out also records the 10th, 90th, and 99th
    percentiles.

    On an NVIDIA GPU, this package's RMSprop is the Triton kernel, called and replayed in a CUDA graph, with state in
    float32, bfloat16 and float8, and with bfloat16 parameters beside float8 state ("3 bytes"). torch's foreach is
    also captured in a graph and compiled, and bitsandbytes is measured if it is installed. The table shows wall time
    with synchronization, time on the device's stream, traffic at 20 bytes per element and as a share of the device's
    copy rate, the launches, kernels, copies, and waits of one step, and the bytes per parameter that it allocates.

    Examples:

    rmsprop bench

    rmsprop bench --cases rl,mobilenet --variants plain,full --threads 1 --busy

    rmsprop bench --cases one --seconds 2 --out times.json

    rmsprop bench --device cuda --cases rl,256M
    """
    if device == "cuda":
        for option, given in (("--variants", variants), ("--threads", threads), ("--busy", busy or None)):
            if given is not None:
                raise typer.BadParameter(
                    f"{option} needs --device cpu; --device cuda takes --cases, --seconds, and --out"
                )
        _on_cuda(cases, seconds, out)
    elif device == "cpu":
        cases = CASES if cases is None else cases
        variants = VARIANTS if variants is None else variants
        _on_cpu(cases, variants, THREADS if threads is None else threads, busy, seconds, out)
    else:
        raise typer.BadParameter(f"--device takes cpu or cuda; got {device!r}")


def _on_cpu(cases: str, variants: str, threads: str, busy: bool, seconds: float, out: Path | None) -> None:
    """Measure every optimizer on the CPU, and print the table."""
    from rich.console import Console
    from rich.table import Table

    from rmsprop.bench import cpu as timing
    from rmsprop.cli.table import show

    chosen = _names("--cases", cases, timing.CASES)
    kinds = _names("--variants", variants, timing.TRAFFIC)
    about = timing.machine()
    cores = about["cores"] or 1
    try:
        counts = sorted({cores if word == "all" else int(word) for word in read_list("--threads", threads)})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1:
        raise typer.BadParameter(f"--threads takes numbers from 1, or all, such as 1,all; got {threads!r}")
    console = Console()
    console.print(f"{about['cpu']}, {cores} cores · torch {about['torch']} · rmsprop {about['rmsprop']}")
    table = Table(title="median step", caption="ratio: torch's best RMSprop over rmsprop")
    optimizers = (timing.OURS, *timing.TORCH, *timing.YARDSTICKS)
    for name in ("case", "tensors", "elements", "threads", *optimizers):
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
                *(_time(result.times[name].median) for name in optimizers),
                f"{result.ratio():.1f}",
                f"{result.gigabytes():.1f}",
            )
    show(table, console)
    if out is not None:
        timing.write(results, about, out)
        console.print(f"wrote {out}", highlight=False)


def _on_cuda(cases: str | None, seconds: float, out: Path | None) -> None:
    """Measure every optimizer on the current NVIDIA GPU, and print the table."""
    from rich.console import Console
    from rich.table import Table

    from rmsprop.bench import cuda as timing
    from rmsprop.cli.table import show

    chosen = list(timing.DEFAULT) if cases is None else _names("--cases", cases, timing.CASES)
    reason = timing.missing()
    if reason is not None:
        raise typer.BadParameter(f"--device cuda: {reason}")
    console = Console()
    rate = timing.copy_rate()
    about = timing.machine(rate)
    console.print(timing.headline(about), highlight=False)
    results = {}
    with console.status("measuring") as status:
        for result in timing.run(chosen, seconds, rate):
            results[result.case, result.contestant] = result
            status.update(f"measured {result.contestant} on {result.case}")
    table = Table(title="one step of float32 parameters", caption="GB/s: at 20 bytes per element")
    for name in ("case", "optimizer", *(head for head, _ in timing.COLUMNS.values())):
        table.add_column(name, justify="left" if name in ("case", "optimizer") else "right")
    for result in results.values():
        table.add_row(result.case, result.contestant, *timing.cells(result))
    show(table, console)
    for line in timing.failures(results.values()):
        console.print(line, highlight=False, markup=False)
    if out is not None:
        timing.write(results.values(), about, out)
        console.print(f"wrote {out}", highlight=False)


def _short(count: int) -> str:
    """Format a count to three digits, in thousands or millions."""
    return next((f"{count / size:.3g}{unit}" for size, unit in ((1e6, "M"), (1e3, "k")) if count >= size), f"{count}")


def _time(microseconds: float) -> str:
    """Format a time to three digits, or whole milliseconds, without spaces."""
    if microseconds < 999.5:
        return f"{microseconds:.3g}µs"
    return f"{microseconds / 1e3:.3g}ms" if microseconds < 99_950 else f"{microseconds / 1e3:,.0f}ms"


def _names(option: str, text: str, choices: Collection[str]) -> list[str]:
    """Read a comma list of names. Raises: typer.BadParameter if it is empty or a name is not a choice."""
    try:
        return read_names(option, text, choices)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
