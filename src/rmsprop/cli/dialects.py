"""`rmsprop dialects`: list the dialects, or describe one."""

import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Annotated

import typer

from rmsprop.cli.arguments import read_dialect
from rmsprop.dialects import find_dialect
from rmsprop.dialects.describe import Part, describe, overview

WIDTH = 100


def dialects(
    name: Annotated[str | None, typer.Argument(help="The dialect to show in full. Default: list all.")] = None,
) -> None:
    """List the dialects that `RMSprop(dialect=...)` takes, or show one in full.

    Examples:

    rmsprop dialects

    rmsprop dialects textbook
    """
    if name is None:
        typer.echo(show("RMSprop's dialects", overview()))
        return
    try:
        row = find_dialect(read_dialect(name))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(show(f"{row.name}: {row.title}", describe(row)))


def show(title: str, parts: Sequence[Part]) -> str:
    """Return the parts as plain text, at most WIDTH columns wide."""
    lines = _wrapped(title)
    for part in parts:
        lines += ["", part.heading] if part.heading else []
        lines += _wrapped(part.text) if part.text else []
        lines += [text for line in part.code for text in _code(line)]
        lines += _table([part.header, *part.rows]) if part.rows else []
        lines += [line for item in part.items for line in _wrapped(item, "  ", "- ")]
    return "\n".join(line.rstrip() for line in lines)


def _wrapped(text: str, indent: str = "", first: str = "") -> list[str]:
    """Return a paragraph as lines, without the backticks."""
    return textwrap.wrap(text.replace("`", ""), WIDTH, initial_indent=first, subsequent_indent=indent)


def _code(line: str) -> list[str]:
    """Return a line of code, indented; a long call is wrapped between its arguments."""
    deeper = " " * (8 + len(line) - len(line.lstrip()))
    return textwrap.wrap(f"    {line}", WIDTH, subsequent_indent=deeper, break_on_hyphens=False) or [""]


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a table's lines; the widest columns are wrapped until it fits, between words if possible."""
    cells = [[cell.replace("`", "").split("\n") for cell in row] for row in rows]
    columns = list(zip(*cells, strict=True))
    widths = [max(len(line) for cell in column for line in cell) for column in columns]
    words = [max(len(word) for cell in column for line in cell for word in [*line.split(), ""]) for column in columns]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        spare = [width if width > word else 0 for width, word in zip(widths, words, strict=True)]
        widest = spare if any(spare) else widths
        widths[widest.index(max(widest))] -= 1
    for row in cells:
        fitted = [_fitted(cell, width) for cell, width in zip(row, widths, strict=True)]
        for lines in zip_longest(*fitted, fillvalue=""):
            yield "  ".join(f"{line:<{width}}" for line, width in zip(lines, widths, strict=True))


def _fitted(cell: Sequence[str], width: int) -> list[str]:
    """Return a cell's lines, none longer than its column."""
    return [part for line in cell for part in textwrap.wrap(line, width) or [""]]
