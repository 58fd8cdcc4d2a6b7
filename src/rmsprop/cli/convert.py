"""`rmsprop convert`: a checkpoint from one framework to another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmsprop.cli.arguments import read_settings
from rmsprop.cli.table import say

if TYPE_CHECKING:
    from rmsprop.conversion.file import Conversion


def convert(
    source_file: Annotated[Path, typer.Argument(metavar="IN", help="The checkpoint; it is never changed.")],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The file to write; its name says the format.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", help="Whose checkpoint it is: a dialect, adam or adamw. Default: what it says."),
    ] = None,
    target: Annotated[
        str,
        typer.Option("--to", help="rmsprop (this package, in the source's dialect), torch, timm, sb3, or a dialect."),
    ] = "rmsprop",
    model: Annotated[
        Path | None, typer.Option(help="A file with the target's parameter names and shapes, such as a state dict.")
    ] = None,
    map_file: Annotated[
        Path | None, typer.Option("--map", help="A .toml with [rename] and [transpose], by the file's names.")
    ] = None,
    layout: Annotated[
        str, typer.Option(help="torch: kernels and names as torch has them; keep: as in the file.")
    ] = "torch",
    match: Annotated[
        str | None,
        typer.Option(
            help="order: parameters without names follow the model's order; number: keep their numbers. Default: "
            "refuse where there is more than one way."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting in the source's words: lr=.01 of torch's, learning_rate=.01 of Keras'. May be repeated.",
        ),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="Which optimizer, if IN holds several: its place, such as optimizers[0].")
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(help="Which model goes with it, if IN holds several: its place, such as policy_net.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="A .json file for the report and the mapping.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the whole mapping, and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Convert a checkpoint: names, layouts, units, signs and order, with a report of what was exact and what was not.

    A .pt holds {"model": ..., "optimizer": ...}, for torch.load(weights_only=True). No code in IN is ever run.

    Examples:

    rmsprop convert model.keras model.pt --model net.pt

    rmsprop convert state.npz state.pt --set learning_rate=0.01 --set decay=0.9 --set eps=1e-8 --set momentum=0.9

    rmsprop convert timm.pth plain.pt --to torch --report report.json

    rmsprop convert adam.pt start.pt --dry-run

    rmsprop convert gan.pt generator.pt --optimizer optimizer_g --parameters generator
    """
    from rmsprop.conversion.file import prepare, write, writer
    from rmsprop.conversion.layout import read_map
    from rmsprop.conversion.pairing import MATCHES

    if layout not in ("torch", "keep"):
        raise typer.BadParameter(f"--layout takes torch or keep; got {layout!r}")
    if match not in (None, *MATCHES):
        raise typer.BadParameter(f"--match takes {' or '.join(MATCHES)}; got {match!r:.80}")
    if out is None and not dry_run:
        raise typer.BadParameter("OUT is missing: name the file to write, or add --dry-run to look first")
    for other in (source_file, out):
        if report is not None and other is not None and report.resolve() == other.resolve():
            raise typer.BadParameter(f"--report {report} is a checkpoint's file; name another one")
    try:
        plan = prepare(
            source_file,
            target,
            source=source,
            given=read_settings(settings or [], "--set"),
            model=model,
            chart=None if map_file is None else read_map(map_file),
            layout=layout,
            out=None if out is None else writer(out),
            optimizer=optimizer,
            parameters=parameters,
            match=match,
        )
        if dry_run:
            say(*map(str, plan.moves))
        elif out is not None:
            write(plan, out, force=force, also_not=source_file)
        _tell(plan, None if dry_run else out, report)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error
    except (MemoryError, RecursionError) as error:
        raise typer.BadParameter(f"{source_file} asks for more memory than there is; it may be damaged") from error
    except OSError as error:
        raise typer.BadParameter(f"{error.filename or out} cannot be read or written: {error.strerror}") from error


def _tell(plan: Conversion, out: Path | None, report: Path | None) -> None:
    """Print the report, and write it where asked."""
    import dataclasses
    import json

    from rmsprop.files import write_whole

    say(f"{plan.source} -> {plan.target}, {len(plan.checkpoint.slots)} parameters with state")
    if str(plan.report):
        typer.echo(str(plan.report))  # its sentences are printable
    if report is not None:
        said = {
            "source": plan.source,
            "target": plan.target,
            **dataclasses.asdict(plan.report),
            "parameters": [dataclasses.asdict(move) for move in plan.moves],
        }
        text = json.dumps(said, indent=1) + "\n"
        write_whole(report, lambda part: part.write_text(text, encoding="utf-8"))
        say(f"wrote {report}")
    if out is not None:
        say(f"wrote {out}")
