"""`rmsprop demo`: train one small network with four optimizers and several seeds, and write a table and a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmsprop.cli.arguments import read_names, read_rates

if TYPE_CHECKING:
    from rmsprop.demo.data import Dataset
    from rmsprop.demo.training import Run, Settings


def demo(
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the training rows, the same for all optimizers.")
    ] = 20,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**32 - 1, help="Seed of the split, and first seed of the initial weights and the batches."
        ),
    ] = 0,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Number of seeds to train each optimizer with.")] = 3,
    device: Annotated[str, typer.Option(help="Device to train on: cpu, cuda, cuda:1, or mps.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Directory to write the files to.")] = Path("rmsprop-demo"),
    optimizers: Annotated[
        str, typer.Option(help="Comma-separated list of sgd, momentum, rmsprop, adam.")
    ] = "sgd,momentum,rmsprop,adam",
    lr: Annotated[
        str | None,
        typer.Option(
            help="One learning rate for all, or a list such as sgd=0.3,rmsprop=0.003. Default: tuned for each."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Train on your own .csv (.tsv, .txt) or .npz file instead of the digits. An .npz holds the "
            "features of all rows as array X, and one label per row."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Label column of a .csv (required), or label array of an .npz (default: y).")
    ] = None,
) -> None:
    """Train a small network with SGD, SGD + momentum, RMSprop, and Adam, and compare them.

    For each seed, all start from the same weights and see the same batches of handwritten digits, or of your own
    table. The results are medians over the seeds with their ranges, so that small differences are seen to be none.

    Writes results.json, results.csv, curves.svg, effective_lr.svg, and index.html, which needs no network.

    Examples:

    rmsprop demo

    rmsprop demo --epochs 5 --optimizers rmsprop,adam --lr 0.001

    rmsprop demo --lr rmsprop=0.01,sgd=0.1 --seeds 10 --out ten-seeds

    rmsprop demo --data iris.csv --target species

    rmsprop demo --data pictures.npz --target labels --device cuda
    """
    # Imported here so that `rmsprop --help` does not wait for torch.
    from rmsprop.demo.data import load_digits, load_file
    from rmsprop.demo.training import OPTIMIZERS, Run, Settings, check_device

    try:
        names = _names(optimizers, list(OPTIMIZERS))
        rates = {name: OPTIMIZERS[name].lr for name in names} | _rates(lr, names)
        settings = Settings(epochs, seed, check_device(device), seeds)
        if data is None and target is not None:
            raise ValueError("--target names a column of --data FILE; give both or neither.")
        dataset = load_digits(seed) if data is None else load_file(data, target, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _check_writable(out)  # before the training, not after it
    runs = [Run(name, rates[name], one) for name in names for one in settings.all_seeds]
    _train(runs, dataset, settings)
    _print(runs, settings)
    for path in _write(runs, dataset, settings, out):
        typer.echo(f"wrote {path}")


def _names(text: str, known: list[str]) -> list[str]:
    """Read the comma list of optimizers. Raises: ValueError for an unknown or a repeated name, or an empty list."""
    names = read_names("--optimizers", text, known)
    if len(set(names)) < len(names):
        raise ValueError(f"--optimizers {text!r} names one twice; name each once.")
    return names


def _rates(text: str | None, names: list[str]) -> dict[str, float]:
    """Return the given learning rates by optimizer. Raises: ValueError for a rate or a name that does not fit."""
    if text is None:
        return {}
    given = read_rates("--lr", text)
    rates = given if isinstance(given, dict) else dict.fromkeys(names, given)
    for name, rate in rates.items():
        if name not in names:
            raise ValueError(f"--lr: {name!r} is not among the optimizers of this run: {', '.join(names)}.")
        if not 0 < rate <= 1e6:  # float32 overflows inside torch's Adam not far above
            raise ValueError(f"--lr: {rate:g} is not a positive number up to 1e6; write it like 0.001.")
    return rates


def _check_writable(out: Path) -> None:
    from tempfile import TemporaryFile

    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise typer.BadParameter(f"--out {str(out)!r} cannot be written: {error.strerror}.") from error


def _train(runs: list[Run], dataset: Dataset, settings: Settings) -> None:
    """Train all runs, with a progress bar per optimizer on a terminal and plain lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from rmsprop.bench.cpu import cores
    from rmsprop.demo.processes import train_all
    from rmsprop.demo.training import by_optimizer

    console = Console()
    every = settings.epochs if settings.seeds > 1 else max(1, settings.epochs // 4)
    name, now = TextColumn("{task.description:<20}"), TextColumn("{task.fields[now]}")
    columns = (name, BarColumn(20), now, TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        total = settings.epochs * settings.seeds
        by_name = {
            each[0].optimizer: bars.add_task(each[0].label, total=total, now="")
            for each in by_optimizer(runs).values()
        }
        for i, at in train_all(runs, dataset, settings, cores()):
            run = runs[i]
            seed = f"seed {run.seed}, " * (settings.seeds > 1)
            accuracy = "" if at.accuracy is None else f", test accuracy {100 * at.accuracy:.1f} %"
            state = f"{seed}epoch {at.epoch}/{settings.epochs}, loss {at.loss:.4f}{accuracy}"
            bars.update(by_name[run.optimizer], advance=1, now=state)
            if not console.is_terminal and at.epoch % every == 0:
                typer.echo(f"{run.label}: {state}")
        for run in runs:
            if run.diverged_at is not None:
                seed = f"seed {run.seed} " * (settings.seeds > 1)
                ended = f"{seed}diverged at step {run.diverged_at}"
                bars.update(by_name[run.optimizer], completed=total, now=ended)
                if not console.is_terminal:
                    typer.echo(f"{run.label}: {ended}")


def _print(runs: list[Run], settings: Settings) -> None:
    """Print the results as a table."""
    from rich.console import Console
    from rich.table import Table

    from rmsprop.cli.table import show
    from rmsprop.demo.training import HEADINGS, by_optimizer, cells

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for each in by_optimizer(runs).values():
        table.add_row(*cells(each))
    console = Console()
    console.print()
    show(table, console)
    if settings.seeds > 1:
        said = f"Medians of {settings.seeds} seeds, with ranges. Ranges that overlap do not rank the optimizers."
    else:
        said = "This is one run from one seed, so small differences do not rank the optimizers."
    console.print(f"\n{said}")


def _write(runs: list[Run], dataset: Dataset, settings: Settings, out: Path) -> list[Path]:
    """Write all files. Returns: their paths, the page last."""
    import csv
    import io
    import json
    from functools import partial

    from rmsprop.chart import picture
    from rmsprop.demo.figures import accuracy_chart, loss_chart, rate_charts
    from rmsprop.demo.page import page
    from rmsprop.demo.training import by_optimizer, results, summary
    from rmsprop.files import write_whole

    groups = by_optimizer(runs)
    curves = [loss_chart(groups), accuracy_chart(groups)]
    files = {
        "results.json": json.dumps(results(runs, dataset, settings), indent=1, allow_nan=False),
        "results.csv": "",
        "curves.svg": picture(curves, "Training loss and test accuracy of each optimizer"),
    }
    table = io.StringIO()
    rows = [summary(each) for each in groups.values()]
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files["results.csv"] = table.getvalue()
    (out / "effective_lr.svg").unlink(missing_ok=True)  # an earlier run's figure would appear to belong to this one
    for run in runs:
        if run.layers:
            charts = rate_charts(run)
            for name, chart in charts.items():
                chart.heading = (name, "strong")
            alt = "RMSprop's effective learning rates, one panel per parameter"
            files["effective_lr.svg"] = picture(list(charts.values()), alt, min(3, len(charts)))
    files["index.html"] = page(runs, dataset, settings)
    return [
        write_whole(out / name, partial(Path.write_text, data=text, encoding="utf-8")) for name, text in files.items()
    ]
