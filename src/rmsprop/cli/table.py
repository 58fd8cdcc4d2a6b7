"""Printing of lines, and of tables that are never truncated, however narrow the terminal.

Control characters in foreign text, such as a parameter's name, are escaped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from rmsprop.printing import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Column, Table

# The minimum width of a column whose words may be broken (overflow="fold").
FOLDED = 10


def say(*lines: str) -> None:
    """Print each text as one line."""
    typer.echo("\n".join(map(printable, lines)))


def show(table: Table, console: Console | None = None) -> None:
    """Print a table without truncating it.

    Outside a terminal, the table is as wide as it needs to be. In a terminal that is too narrow, cells are wrapped
    between words. If even the longest words do not fit side by side, each row is printed as lines of `heading: cell`.

    Mutates: the table, and the console's width if it is not a terminal.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = console or Console()
    for column in table.columns:
        column._cells[:] = [printable(cell) if isinstance(cell, str) else cell for cell in column._cells]
    natural = Measurement.get(console, console.options.update(max_width=1 << 16), table).maximum
    if not console.is_terminal:
        console.width = max(natural, console.width)
    elif natural > console.width:
        _narrow(table, console.width)
        if sum(column.width or 0 for column in table.columns) + len(table.columns) - 1 > console.width:
            _print_rows(table, console)
            return
    console.print(table)


def _texts(column: Column) -> list[str]:
    """Return the column's texts, heading first."""
    return [str(column.header), *map(str, column.cells)]


def _narrow(table: Table, room: int) -> None:
    """Drop the borders, and give each column its longest word and the tightest ones the remaining width."""
    from rich.cells import cell_len

    table.box, table.pad_edge, table.padding = None, False, (0, 1, 0, 0)
    natural = [max(map(cell_len, _texts(column))) for column in table.columns]
    widths = [max(cell_len(x) for text in _texts(column) for x in [*text.split(), ""]) for column in table.columns]
    widths = [min(w, FOLDED) if c.overflow == "fold" else w for w, c in zip(widths, table.columns, strict=True)]
    for _ in range(room - sum(widths) - len(widths) + 1):
        missing = [most - width for most, width in zip(natural, widths, strict=True)]
        widths[missing.index(max(missing))] += max(missing) > 0
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width


def _print_rows(table: Table, console: Console) -> None:
    """Print each row as lines of `heading: cell`."""
    if table.title:
        console.print(table.title)
    heads, *rows = zip(*map(_texts, table.columns), strict=True)
    for first, *rest in rows:
        console.print(first, style="bold")
        for head, cell in zip(heads[1:], rest, strict=True):
            console.print(f"  {head}: {cell}")
    if table.caption:
        console.print(table.caption)
