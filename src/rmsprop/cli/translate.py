"""`rmsprop translate`: settings of one framework's RMSprop in the words of another's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmsprop.cli.arguments import read_settings

if TYPE_CHECKING:
    from rich.console import Console

    from rmsprop.translation import Translation
    from rmsprop.translation.findings import Difference


def translate(
    source: Annotated[str, typer.Option("--from", help="The dialect that the settings are in.")],
    target: Annotated[str, typer.Option("--to", help="The dialect whose words are wanted.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="NAME=VALUE in the source's words, such as decay=0.9.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the steps against √v, as meant, translated and typed unchanged, as a PNG."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say settings of one framework's RMSprop in another's words, with the size of whatever differs.

    Exact is said of the same steps only: the same numbers up to rounding, whatever the schedule.

    Names and defaults: rmsprop dialects NAME.

    Examples:

    rmsprop translate --from tensorflow1 --to torch lr=.045 decay=.9 momentum=.9 epsilon=1.0

    rmsprop translate --from torch --to optax lr=1e-3 eps=1e-5 --plot eps.png

    rmsprop translate --from keras2 --to timm learning_rate=0.01 --json
    """
    from rmsprop.translation import translate as _translate

    try:
        found = _translate(source, target, **read_settings(settings or []))
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if plot is not None:
        _draw(found, plot)
    if as_json:
        _print_json(found)
    else:
        _print(found)
        if plot is not None:
            typer.echo(f"wrote {plot}")


def _draw(found: Translation, path: Path) -> None:
    from rmsprop.demo import figures
    from rmsprop.files import write_whole

    picture = figures.to_png(figures.translation(found))
    try:
        write_whole(path, lambda part: part.write_bytes(picture))
    except OSError as error:
        raise typer.BadParameter(f"--plot {str(path)!r} cannot be written: {error.strerror}.") from error


def _print_json(found: Translation) -> None:
    import json
    from dataclasses import asdict

    typer.echo(json.dumps(asdict(found), ensure_ascii=False, indent=2, allow_nan=False))


def _print(found: Translation) -> None:
    """The call, then each difference with its size, then what to know besides."""
    from rich.console import Console

    from rmsprop.dialects import find_dialect

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(f"{found.call}\n", soft_wrap=True)
    console.print(_verdict(found), style="bold green" if found.exact else "bold yellow")
    for number, finding in enumerate(found.findings, 1):
        _print_finding(console, number, finding)
    if not found.exact:
        console.print("\nThe same steps in PyTorch, exactly, with `from rmsprop import RMSprop`:")
        console.print(f"  {found.rmsprop_call}", soft_wrap=True)
    traps = find_dialect(found.target).traps if found.target != found.source else ()
    for heading, lines in (("Besides:", found.notes), (f"Worth knowing of {found.target}:", traps)):
        if lines:
            console.print(f"\n{heading}")
        for line in lines:
            console.print(f"- {line}")


def _verdict(found: Translation) -> str:
    if found.exact:
        return "Exact: the same steps, for real parameters and dense gradients."
    if {finding.kind for finding in found.findings} == {"lr_in_buffer"}:
        return "Not exact: the same steps only while the learning rate is constant."
    count = len(found.findings)
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
