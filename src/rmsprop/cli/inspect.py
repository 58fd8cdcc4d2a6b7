"""The command `rmsprop inspect`, which shows the state of a run from its optimizer checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmsprop.cli.arguments import read_dialect, read_settings
from rmsprop.cli.checkpoints import Optimizer, Parameters, Settings, Source, usage_errors
from rmsprop.cli.table import say

if TYPE_CHECKING:
    from rmsprop.inspection.checkpoint import Inspection


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint, of any format that convert reads.")],
    source: Source = None,
    settings: Settings = None,
    optimizer: Optimizer = None,
    parameters: Parameters = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of the table.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write an HTML page, which needs no network.")] = None,
) -> None:
    """Show each parameter's effective learning rate, and its elements that ε rules, that are stuck, or that are NaN.

    Settings that the file lacks are the dialect's defaults; the output lists them, and --set overrides them. The
    command runs no code in the checkpoint and does not change it.

    Examples:

    rmsprop inspect checkpoint.pt

    rmsprop inspect model.keras --set learning_rate=0.001 --html model.html

    rmsprop inspect state.npz --from optax --json
    """
    from rmsprop.files import write_whole
    from rmsprop.inspection.checkpoint import inspect as read

    with usage_errors(checkpoint, html):
        found = read(
            checkpoint,
            source and read_dialect(source),
            read_settings(settings or [], "--set"),
            optimizer=optimizer,
            parameters=parameters,
        )
        if html is not None:
            from rmsprop.inspection.page import page

            text = page(found)
            write_whole(html, lambda part: part.write_text(text, encoding="utf-8"))
    if as_json:
        typer.echo(json.dumps(found.record(), allow_nan=False))
        return
    _print(found)
    if html is not None:
        say(f"wrote {html}")


def _print(found: Inspection) -> None:
    from rich.markup import escape
    from rich.table import Table

    from rmsprop.cli.table import show
    from rmsprop.inspection.page import HEADINGS, cells, sentences

    say(*sentences(found))
    table = Table(*HEADINGS)
    table.columns[0].overflow = "fold"  # a name has no spaces to break at
    for row in found.rows:
        table.add_row(*map(escape, cells(row)))
    show(table)
