"""`rmsprop race`: the optimizers, side by side, on a landscape one can see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rmsprop.race.landscapes import Landscape, Trajectory

FORMATS = ("png", "gif", "webp", "html")


def race(
    landscape: Annotated[
        str, typer.Argument(help="The landscape's name, or 'all'. See --list.", show_default=True)
    ] = "ravine",
    condition: Annotated[
        float | None,
        typer.Option(help="How many times as steep across as along, 1 or more (ravines only). Default: 100."),
    ] = None,
    optimizers: Annotated[
        str, typer.Option(help="Comma list of entrants; rmsprop-textbook is there too. See --list.")
    ] = "sgd,momentum,adam,rmsprop",
    steps: Annotated[int | None, typer.Option(help="Steps to run. Default: the landscape's own.")] = None,
    lr: Annotated[
        str | None,
        typer.Option(help="One learning rate for all, or a list: sgd=0.01,rmsprop=0.1. Default: the landscape's."),
    ] = None,
    start: Annotated[str | None, typer.Option(metavar="X,Y", help="Start here instead, such as -3,1.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise, which only noisy-ravine has.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory for the files.", file_okay=False)] = Path("rmsprop-race"),
    formats: Annotated[str, typer.Option("--format", help=f"Comma list of {', '.join(FORMATS)}.")] = "png,gif,html",
    show: Annotated[bool, typer.Option("--list", help="List landscapes and optimizers, and stop.")] = False,
) -> None:
    """Race optimizers down a landscape and draw where they went.

    The optimizers are the classes that train networks: torch's SGD and Adam, this package's RMSprop.

    Learning rates are the landscape's suggestions unless given. Where RMSprop does worse, the pictures show it.

    Examples:

    rmsprop race

    rmsprop race ravine --condition 1000 --lr 0.1

    rmsprop race rosenbrock --optimizers momentum,rmsprop --lr rmsprop=0.005 --steps 1000

    rmsprop race all --format png --out pictures
    """
    # Imported here so that `rmsprop --help` need not wait for torch.
    from rmsprop.race import landscapes

    if show:
        _list()
        return
    wanted = _words(formats, "--format")
    for word in wanted:
        if word not in FORMATS:
            raise typer.BadParameter(f"--format {word!r} is unknown; choose from {', '.join(FORMATS)}.")
    names = list(landscapes.LANDSCAPES) if landscape == "all" else [landscape]
    try:
        # Everything is checked before the first file is written.
        places = [landscapes.find_landscape(name, condition) for name in names]
        if start is not None:
            places = [place.starting_at(*_pair(start)) for place in places]
        rates = None if lr is None else _rates(lr)
        races = [
            (place, landscapes.race(place, _words(optimizers, "--optimizers"), steps, rates, seed))
            for place in places
        ]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for place, runs in races:
        _print(place, runs)
        for path in _draw(place, runs, out, wanted):
            typer.echo(f"wrote {path}")


def _words(text: str, option: str) -> list[str]:
    """Split a comma list. Raises: typer.BadParameter if nothing is in it."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise typer.BadParameter(f"{option} {text!r} names nothing; give a comma list.")
    return words


def _number(text: str) -> float:
    """Read a number. Raises: ValueError that says what was given."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number; write it like 0.1.") from None


def _pair(text: str) -> tuple[float, float]:
    """Read x,y. Raises: ValueError if there are not two numbers."""
    x, comma, y = text.partition(",")
    if not comma or "," in y:
        raise ValueError(f"--start {text!r}: give two numbers with a comma between, such as -3,1.")
    return _number(x), _number(y)


def _rates(text: str) -> float | dict[str, float]:
    """Read one learning rate, or a comma list of name=rate. Raises: ValueError if it is neither."""
    if "=" not in text:
        return _number(text)
    rates = {}
    for word in _words(text, "--lr"):
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--lr {text!r}: give one number for all, or name=number for each, not a mixture.")
        rates[name.strip()] = _number(value)
    return rates


def _draw(place: Landscape, runs: list[Trajectory], out: Path, formats: list[str]) -> list[Path]:
    """Write the files asked for. Returns: their paths."""
    from rmsprop.race.figures import animation, figure
    from rmsprop.race.page import page

    drawers = {"png": figure, "gif": animation, "webp": animation, "html": page}
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
    for heading in ("optimizer", "lr", "target", "final loss", "distance to minimum"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for run in runs:
        arrived = "not reached" if run.target_at is None else f"step {run.target_at}"
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

    places = Table("landscape", "what it is", "steps", title="Landscapes", title_justify="left")
    for name, place in LANDSCAPES.items():
        places.add_row(name, place.description + (" Takes --condition." if name in RAVINES else ""), str(place.steps))
    racers = Table("optimizer", "label", "settings besides lr", title="Optimizers", title_justify="left")
    for name, racer in OPTIMIZERS.items():
        racers.add_row(name, racer.label, racer.settings)
    show(places)
    show(racers)
