"""What a command prints: lines, and tables of which nothing is cut off, however narrow the terminal.

Foreign text, such as a parameter's name, comes through here: a terminal would obey its control characters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from rmsprop.printing import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Column, Table

# The least width of a column whose words may be broken: overflow="fold".
FOLDED = 10


def say(*lines: str) -> None:
    """Print each text as one line."""
    typer.echo("\n".join(map(printable, lines)))


def show(table: Table, console: Console | None = None) -> None:
    """Print a table whole.

    Where there is no terminal it is as wide as it needs. In a terminal that is too narrow, cells are wrapped between
    words; where their longest words do not fit beside each other, each row becomes lines of `heading: cell`.

    Mutates: the table, and the console's width where it is no terminal.
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
            _stand(table, console)
            return
    console.print(table)


def _words(column: Column) -> list[str]:
    """The column's texts, heading first."""
    return [str(column.header), *map(str, column.cells)]


def _narrow(table: Table, room: int) -> None:
    """Give every column its longest word, and what is left to those that miss most; no lines between them."""
    from rich.cells import cell_len

    table.box, table.pad_edge, table.padding = None, False, (0, 1, 0, 0)
    wanted = [max(map(cell_len, _words(column))) for column in table.columns]
    widths = [max(cell_len(x) for text in _words(column) for x in [*text.split(), ""]) for column in table.columns]
    widths = [min(w, FOLDED) if c.overflow == "fold" else w for w, c in zip(widths, table.columns, strict=True)]
    for _ in range(room - sum(widths) - len(widths) + 1):
        missing = [most - width for most, width in zip(wanted, widths, strict=True)]
        widths[missing.index(max(missing))] += max(missing) > 0
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width


def _stand(table: Table, console: Console) -> None:
    """Print each row as lines."""
    if table.title:
        console.print(table.title)
    heads, *rows = zip(*map(_words, table.columns), strict=True)
    for first, *rest in rows:
        console.print(first, style="bold")
        for head, cell in zip(heads[1:], rest, strict=True):
            console.print(f"  {head}: {cell}")
    if table.caption:
        console.print(table.caption)
