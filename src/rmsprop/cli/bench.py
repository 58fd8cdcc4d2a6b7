"""`rmsprop bench`: how long a step takes here, beside torch's optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    cases: Annotated[
        str, typer.Option(help="Comma list from rl, a2c, nature, mobilenet, resnet50, 500x16, 500x1024, one.")
    ] = "rl,a2c,nature,mobilenet,500x16,500x1024",
    variants: Annotated[
        str, typer.Option(help="Comma list from plain, full (with momentum and centered).")
    ] = "plain",
    threads: Annotated[str, typer.Option(help="Comma list of numbers of threads; all: one per core.")] = "1,all",
    busy: Annotated[bool, typer.Option("--busy", help="Again with a busy neighbour on each core.")] = False,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for each contestant in each case.")] = 0.5,
    out: Annotated[Path | None, typer.Option(help="A JSON file for all times, the machine and versions.")] = None,
) -> None:
    """Time whole optimizer steps: ours, torch's RMSprop (for-loop and foreach), torch's fused SGD and Adam.

    All take turns in one process. The table shows medians, torch's best RMSprop over ours, and memory traffic.

    Examples:

    rmsprop bench

    rmsprop bench --cases rl,mobilenet --variants plain,full --threads 1 --busy

    rmsprop bench --cases one --seconds 2 --out times.json
    """
    from rich.console import Console
    from rich.table import Table

    from rmsprop import bench as timing

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
    table = Table(title="median step, µs (10th to 90th percentile)", caption="ratio: torch's best RMSprop over ours")
    for name in (
        "case",
        "tensors",
        "elements",
        "threads",
        "cores",
        *(timing.OURS, *timing.TORCH, *timing.YARDSTICKS),
    ):
        table.add_column(name, justify="left" if name == "case" else "right")
    for name in ("ratio", "GB/s"):
        table.add_column(name, justify="right", style="bold")
    results = []
    loads = [False, True] if busy else [False]
    with console.status("measuring") as status:
        for result in timing.run(chosen, kinds, counts, loads, seconds):
            results.append(result)
            status.update(f"measured {result.case}, {result.variant}, {result.threads} threads")
            times = [result.times[name] for name in (timing.OURS, *timing.TORCH, *timing.YARDSTICKS)]
            table.add_row(
                result.case if result.variant == "plain" else f"{result.case}, {result.variant}",
                f"{result.tensors}",
                f"{result.elements:,}",
                f"{result.threads}",
                "busy" if result.busy else "idle",
                *(f"{t.median:,.1f} ({t.p10:,.1f}-{t.p90:,.1f})" for t in times),
                f"{result.ratio():.1f}",
                f"{result.gigabytes():.1f}",
            )
    console.print(table)
    for what, reached, needed, met in timing.verdicts(results):
        console.print(f"{'met   ' if met else 'missed'} {what}: {reached:.2f}, bar {needed:.2f}", highlight=False)
    if out is not None:
        timing.write(results, about, out)
        console.print(f"wrote {out}", highlight=False)


def _chosen(option: str, words: str, known: list[str]) -> list[str]:
    """The words of a comma list, each of them known."""
    chosen = [word.strip() for word in words.split(",")]
    for word in chosen:
        if word not in known:
            raise typer.BadParameter(f"{option}: unknown {word!r}; choose from {', '.join(known)}")
    return chosen
