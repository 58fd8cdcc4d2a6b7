"""`rmsprop demo`: train one small network with four optimizers, and write a table, figures, and a page."""

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
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the split, the initial weights, and the batches.")
    ] = 0,
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

    All start from the same weights and see the same batches of handwritten digits, or of your own table.

    Writes results.json, results.csv, curves.png, effective_lr.png, and index.html, which needs no network.

    Examples:

    rmsprop demo

    rmsprop demo --epochs 5 --optimizers rmsprop,adam --lr 0.001

    rmsprop demo --lr rmsprop=0.01,sgd=0.1 --seed 3 --out run-3

    rmsprop demo --data iris.csv --target species

    rmsprop demo --data pictures.npz --target labels --device cuda
    """
    # Imported here so that `rmsprop --help` does not wait for torch.
    from rmsprop.demo.data import load_digits, load_file
    from rmsprop.demo.training import OPTIMIZERS, Run, Settings, check_device

    try:
        names = _names(optimizers, list(OPTIMIZERS))
        rates = {name: OPTIMIZERS[name].lr for name in names} | _rates(lr, names)
        settings = Settings(epochs, seed, check_device(device))
        if data is None and target is not None:
            raise ValueError("--target names a column of --data FILE; give both or neither.")
        dataset = load_digits(seed) if data is None else load_file(data, target, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _check_writable(out)  # before the training, not after it
    runs = [Run(name, rates[name]) for name in names]
    _train(runs, dataset, settings)
    _print(runs)
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
    """Train each run in turn, with progress bars on a terminal and plain lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from rmsprop.demo.training import one_thread, train

    console = Console()
    every = max(1, settings.epochs // 4)
    name, now = TextColumn("{task.description:<20}"), TextColumn("{task.fields[now]}")
    columns = (name, BarColumn(20), now, TimeElapsedColumn())
    with one_thread(), Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        for run in runs:
            bar = bars.add_task(run.label, total=None, now="")
            for at in train(run, dataset, settings):
                accuracy = "" if at.accuracy is None else f", test accuracy {100 * at.accuracy:.1f} %"
                state = f"epoch {at.epoch}/{settings.epochs}, loss {at.loss:.4f}{accuracy}"
                bars.update(bar, completed=at.step, total=at.steps, now=state)
                if not console.is_terminal and at.epoch_done and at.epoch % every == 0:
                    typer.echo(f"{run.label}: {state}")
            if run.diverged_at is not None:
                ended = f"diverged at step {run.diverged_at}"
                bars.update(bar, total=run.diverged_at, completed=run.diverged_at, now=ended)
                if not console.is_terminal:
                    typer.echo(f"{run.label}: {ended}")


def _print(runs: list[Run]) -> None:
    """Print the results as a table."""
    from rich.console import Console
    from rich.table import Table

    from rmsprop.cli.table import show
    from rmsprop.demo.training import HEADINGS, cells

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for run in runs:
        table.add_row(*cells(run))
    console = Console()
    console.print()
    show(table, console)
    console.print("\nThis is one run from one seed, so small differences do not rank the optimizers.")


def _write(runs: list[Run], dataset: Dataset, settings: Settings, out: Path) -> list[Path]:
    """Write all files. Returns: their paths, the page last."""
    import csv
    import io
    import json
    from functools import partial

    from rmsprop.demo import figures
    from rmsprop.demo.page import page
    from rmsprop.demo.training import results, summary
    from rmsprop.files import write_whole

    pictures = {"Training loss and test accuracy": figures.to_png(figures.curves(runs))}
    files = {
        "results.json": json.dumps(results(runs, dataset, settings), indent=1, allow_nan=False).encode(),
        "results.csv": b"",
        "curves.png": pictures["Training loss and test accuracy"],
    }
    table = io.StringIO()
    writer = csv.DictWriter(table, list(summary(runs[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(summary(run) for run in runs)
    files["results.csv"] = table.getvalue().encode()
    (out / "effective_lr.png").unlink(missing_ok=True)  # an earlier run's figure would appear to belong to this one
    for run in runs:
        if run.layers:
            files["effective_lr.png"] = pictures["Effective learning rates"] = figures.to_png(
                figures.effective_lr(run)
            )
    files["index.html"] = page(runs, dataset, settings, pictures).encode()
    return [write_whole(out / name, partial(Path.write_bytes, data=content)) for name, content in files.items()]
