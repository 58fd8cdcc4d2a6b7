"""`rmsprop dialects`: what each framework means by RMSprop, from the rows."""

from typing import Annotated

import typer

from rmsprop.dialects import DIALECTS, HYPERS, Dialect, find

_PLACES = {"outside": "√v + ε", "inside": "√(v + ε)", "both": "√(v + ε) + ε", "floor": "max(√v, ε)"}


def dialects(name: Annotated[str | None, typer.Argument(help="One dialect, in full. Default: all.")] = None) -> None:
    """List the dialects that `RMSprop(dialect=...)` takes, or show one in full.

    Examples:

    rmsprop dialects

    rmsprop dialects textbook
    """
    if name is None:
        _table()
        return
    try:
        row = find(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(describe(row))


def _table() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "dialect", "framework", "denominator", "v starts at", "lr", "decay", "ε", title="RMSprop's dialects"
    )
    for row in DIALECTS.values():
        numbers = (f"{x:g}" for x in (row.rule.v_init, row.hyper.lr, row.hyper.alpha, row.hyper.eps))
        table.add_row(row.name, row.title, _PLACES[row.rule.eps_mode], *numbers)
    Console().print(table)


def describe(row: Dialect) -> str:
    """A dialect in full: its equation, its words with their defaults, and its source."""
    names = {ours: theirs for theirs, ours in row.words.items()}
    shown = [f"{names.get(ours, ours)}={getattr(row.hyper, ours):g}" for ours in HYPERS]
    lines = [f"{row.name}: {row.title}", "", *(f"    {line}" for line in row.rule.equation()), ""]
    lines.append(f"    RMSprop(params, dialect={row.name!r}, {', '.join(shown)})")
    lines += [f"    Its words: {theirs} is {ours} in torch" for theirs, ours in row.words.items()]
    lines += [f"    Refused: {word}, since {reason}" for word, reason in row.refused.items()]
    lines.append(f"    Source: {row.source}")
    return "\n".join(lines)
