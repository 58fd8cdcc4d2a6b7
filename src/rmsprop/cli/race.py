"""`rmsprop race`: run the optimizers side by side on a two-dimensional loss, and draw their paths."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmsprop.cli.arguments import read_names, read_number, read_rates

if TYPE_CHECKING:
    from rmsprop.race.landscapes import Landscape, Trajectory

FORMATS = ("png", "gif", "webp", "html")


def race(
    landscape: Annotated[
        str, typer.Argument(help="Name of the landscape, or all. See --list.", show_default=True)
    ] = "ravine",
    condition: Annotated[
        float | None,
        typer.Option(
            help="Condition number of a ravine: the steep curvature over the flat one, 1 or more. Default: 100. "
            "With all, it applies to the ravines."
        ),
    ] = None,
    optimizers: Annotated[
        str, typer.Option(help="Comma-separated list of optimizers, which may include rmsprop-textbook. See --list.")
    ] = "sgd,momentum,adam,rmsprop",
    steps: Annotated[int | None, typer.Option(help="Number of steps. Default: set by the landscape.")] = None,
    lr: Annotated[
        str | None,
        typer.Option(
            help="One learning rate for all, or a list such as sgd=0.01,rmsprop=0.1. Default: set by the landscape."
        ),
    ] = None,
    start: Annotated[
        str | None, typer.Option(metavar="X,Y", help="Starting point, such as -3,1. Default: set by the landscape.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the gradient noise of noisy-ravine.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory to write the files to.", file_okay=False)] = Path(
        "rmsprop-race"
    ),
    formats: Annotated[
        str, typer.Option("--format", help=f"Comma-separated list of {', '.join(FORMATS)}.")
    ] = "png,gif,html",
    show: Annotated[bool, typer.Option("--list", help="List the landscapes and optimizers, and exit.")] = False,
) -> None:
    """Run several optimizers on a two-dimensional loss and draw their paths.

    The optimizers are the classes that train networks: torch's SGD and Adam, and this package's RMSprop.

    The page (html) is live: every setting can be changed in it. It opens at this race, and it fetches nothing.

    Each landscape suggests its learning rates. On some landscapes RMSprop does worse than the others.

    Examples:

    rmsprop race

    rmsprop race ravine --condition 1000 --lr 0.1

    rmsprop race rosenbrock --optimizers momentum,rmsprop --lr rmsprop=0.005

    rmsprop race all --format png --out pictures
    """
    # Imported here so that `rmsprop --help` does not wait for torch.
    from rmsprop.race import landscapes

    if show:
        _list()
        return
    names = list(landscapes.LANDSCAPES) if landscape == "all" else [landscape]
    ravines = landscapes.RAVINES if landscape == "all" else names
    try:
        # All arguments are validated before the first file is written.
        kinds = read_names("--format", formats, FORMATS)
        places = [landscapes.find_landscape(name, condition if name in ravines else None) for name in names]
        if start is not None:
            places = [place.starting_at(*_pair(start)) for place in places]
        rates = None if lr is None else read_rates("--lr", lr)
        entrants = read_names("--optimizers", optimizers, landscapes.OPTIMIZERS)
        races = [(place, landscapes.race(place, entrants, steps, rates, seed)) for place in places]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for place, runs in races:
        _print(place, runs)
        for path in _draw(place, runs, out, kinds, seed):
            typer.echo(f"wrote {path}")


def _pair(text: str) -> tuple[float, float]:
    """Read x,y. Raises: ValueError if there are not two numbers."""
    x, comma, y = text.partition(",")
    if not comma or "," in y:
        raise ValueError(f"--start {text!r}: give two numbers with a comma between them, such as -3,1.")
    return read_number("--start", x), read_number("--start", y)


def _draw(place: Landscape, runs: list[Trajectory], out: Path, formats: list[str], seed: int) -> list[Path]:
    """Write the requested files. Returns: their paths."""
    from rmsprop.race.figures import animation, figure
    from rmsprop.race.page import page

    drawers: dict[str, Any] = {"png": figure, "gif": animation, "webp": animation, "html": partial(page, seed=seed)}
    try:
        return [drawers[kind](place, runs, out / f"{place.name}.{kind}") for kind in dict.fromkeys(formats)]
    except OSError as error:
        raise typer.BadParameter(f"--out {str(out)!r} cannot be written: {error.strerror}.") from error


def _print(place: Landscape, runs: list[Trajectory]) -> None:
    """Print the results of one race as a table."""
    from rich.table import Table

    from rmsprop.cli.table import show

    table = Table(title=place.description, title_justify="left", caption_justify="left")
    table.caption = f"target: a loss of {place.target:.3g}, a thousandth of the starting loss"
    left = [run for run in runs if run.target_at is not None and not run.diverged and run.losses[-1] > place.target]
    if left:
        labels = ", ".join(run.label for run in left)
        table.caption += f"\n{labels}: above the target again at the end; a falling lr lets it settle"
    for heading in ("optimizer", "lr", "first below target", "final loss", "distance to minimum"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for run in runs:
        arrived = "never" if run.target_at is None else f"step {run.target_at}"
        if run.diverged:
            table.add_row(run.label, f"{run.lr:.4g}", f"diverged at step {run.diverged_at}", "-", "-")
        else:
            table.add_row(run.label, f"{run.lr:.4g}", arrived, f"{run.losses[-1]:.3g}", f"{run.distance:.3g}")
    show(table)


def _list() -> None:
    """Print the landscapes and the optimizers."""
    from rich.table import Table

    from rmsprop.cli.table import show
    from rmsprop.race.landscapes import LANDSCAPES, OPTIMIZERS, RAVINES

    places = Table("landscape", "description", "steps", title="Landscapes", title_justify="left")
    for name, place in LANDSCAPES.items():
        places.add_row(name, place.description + (" Takes --condition." if name in RAVINES else ""), str(place.steps))
    racers = Table("optimizer", "label", "other settings", title="Optimizers", title_justify="left")
    for name, racer in OPTIMIZERS.items():
        racers.add_row(name, racer.label, racer.settings)
    show(places)
    show(racers)
