"""`rmsprop translate`: translate settings of one framework's RMSprop to another's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmsprop.cli.arguments import read_dialect, read_settings

if TYPE_CHECKING:
    from rich.console import Console

    from rmsprop.translation import Translation
    from rmsprop.translation.findings import Difference


def translate(
    source: Annotated[str, typer.Option("--from", help="The dialect of the given settings.")],
    target: Annotated[str, typer.Option("--to", help="The dialect to translate to.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="NAME=VALUE under the source's names, such as decay=0.9.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write a PNG of step lengths over √v: original, translated, and with ε unchanged."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Translate settings of one framework's RMSprop to another's, with the size of every difference.

    A translation is exact if both make the same steps up to rounding, under any schedule.

    For names and defaults, see rmsprop dialects NAME.

    Examples:

    rmsprop translate --from tensorflow1 --to torch lr=.045 momentum=.9 epsilon=1

    rmsprop translate --from torch --to optax lr=1e-3 eps=1e-5 --plot eps.png

    rmsprop translate --from keras2 --to timm learning_rate=0.01 --json
    """
    from rmsprop.translation import translate as _translate

    try:
        translation = _translate(read_dialect(source), read_dialect(target), **read_settings(settings or []))
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if plot is not None:
        _draw(translation, plot)
    if as_json:
        _print_json(translation)
    else:
        _print(translation)
        if plot is not None:
            typer.echo(f"wrote {plot}")


def _draw(translation: Translation, path: Path) -> None:
    from rmsprop.files import write_whole
    from rmsprop.style import to_png
    from rmsprop.translation.figure import draw

    picture = to_png(draw(translation))
    try:
        write_whole(path, lambda part: part.write_bytes(picture))
    except OSError as error:
        raise typer.BadParameter(f"--plot {str(path)!r} cannot be written: {error.strerror}.") from error


def _print_json(translation: Translation) -> None:
    import json
    from dataclasses import asdict

    typer.echo(json.dumps(asdict(translation), ensure_ascii=False, indent=2, allow_nan=False))


def _print(translation: Translation) -> None:
    """Print the call, each difference with its size, then notes and the target's traps."""
    from rich.console import Console

    from rmsprop.dialects import find_dialect

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(f"{translation.call}\n", soft_wrap=True)
    console.print(_verdict(translation), style="bold green" if translation.exact else "bold yellow")
    for number, finding in enumerate(translation.findings, 1):
        _print_finding(console, number, finding)
    if not translation.exact:
        console.print("\nFor exact steps in PyTorch, after `from rmsprop import RMSprop`:")
        console.print(f"  {translation.rmsprop_call}", soft_wrap=True)
    traps = find_dialect(translation.target).traps if translation.target != translation.source else ()
    for heading, lines in (("Notes:", translation.notes), (f"Traps of {translation.target}:", traps)):
        if lines:
            console.print(f"\n{heading}")
        for line in lines:
            console.print(f"- {line}")


def _verdict(translation: Translation) -> str:
    if translation.exact:
        return "Exact: the same steps, for real parameters and dense gradients."
    if {finding.kind for finding in translation.findings} == {"lr_in_buffer"}:
        return "Not exact: the same steps only while the learning rate is constant."
    count = len(translation.findings)
    return f"Not exact: {count} difference{'s' if count > 1 else ''}."


def _print_finding(console: Console, number: int, finding: Difference) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console.print(f"\n{number}. {finding.what}", style="bold")
    console.print(finding.size)
    if finding.rows:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in finding.columns:
            table.add_column(column, justify="right")
        for row in finding.rows:
            table.add_row(*(f"{number:.3g}" if number != int(number) else f"{number:g}" for number in row))
        console.print(table)
    console.print(f"→ {finding.advice}")
