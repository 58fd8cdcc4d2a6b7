"""`rmsprop convert`: converts a checkpoint from one framework to another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmsprop.cli.arguments import read_dialect, read_settings
from rmsprop.cli.checkpoints import Optimizer, Parameters, Settings, Source, usage_errors
from rmsprop.cli.table import say

if TYPE_CHECKING:
    from rmsprop.conversion.file import Conversion


def convert(
    source_file: Annotated[Path, typer.Argument(metavar="IN", help="The checkpoint; it is never changed.")],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The file to write; its ending selects the format.")
    ] = None,
    source: Source = None,
    target: Annotated[
        str,
        typer.Option("--to", help="rmsprop (this package, in the source's dialect), torch, timm, sb3, or a dialect."),
    ] = "rmsprop",
    model: Annotated[
        Path | None, typer.Option(help="A file with the target's parameter names and shapes, such as a state dict.")
    ] = None,
    map_file: Annotated[
        Path | None,
        typer.Option("--map", help="A .toml with the tables rename and transpose, by the file's names."),
    ] = None,
    layout: Annotated[str, typer.Option(help="torch: torch's kernels and names; keep: those of the file.")] = "torch",
    match: Annotated[
        str | None,
        typer.Option(
            help="order: parameters without names follow the model's order; number: keep their numbers. Default: "
            "refuse if more than one pairing fits."
        ),
    ] = None,
    settings: Settings = None,
    optimizer: Optimizer = None,
    parameters: Parameters = None,
    report: Annotated[Path | None, typer.Option(help="A .json file to write the report and the mapping to.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the whole mapping and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Convert a checkpoint's names, layouts, units, signs and order, and report what was exact and what was not.

    A .pt holds {"model": ..., "optimizer": ...}, for torch.load(weights_only=True). No code in IN is ever run.
    TensorFlow's checkpoints, MXNet's .params and .nd, and Chainer's .npz are read and not written.

    Examples:

    rmsprop convert model.keras model.pt --model net.pt

    rmsprop convert state.npz state.pt --set learning_rate=0.01 --set decay=0.9

    rmsprop convert timm.pth plain.pt --to torch --report report.json

    rmsprop convert adam.pt start.pt --dry-run

    rmsprop convert gan.pt g.pt --optimizer optimizer_g --parameters generator
    """
    from rmsprop.conversion.file import prepare, write, writer
    from rmsprop.conversion.layout import read_map
    from rmsprop.conversion.pairing import MATCHES

    if layout not in ("torch", "keep"):
        raise typer.BadParameter(f"--layout takes torch or keep; got {layout!r}")
    if match not in (None, *MATCHES):
        raise typer.BadParameter(f"--match takes {' or '.join(MATCHES)}; got {match!r:.80}")
    if out is None and not dry_run:
        raise typer.BadParameter("OUT is missing; name the file to write, or add --dry-run to see the mapping first")
    for other in (source_file, out):
        if report is not None and other is not None and report.resolve() == other.resolve():
            raise typer.BadParameter(f"--report {report} is the input or the output; name another file")
    with usage_errors(source_file, out):
        conversion = prepare(
            source_file,
            read_dialect(target),
            source=source and read_dialect(source),
            given=read_settings(settings or [], "--set"),
            model=model,
            mapping=None if map_file is None else read_map(map_file),
            layout=layout,
            out=None if out is None else writer(out),
            optimizer=optimizer,
            parameters=parameters,
            match=match,
        )
        if dry_run:
            say(*map(str, conversion.moves))
        elif out is not None:
            write(conversion, out, force=force, also_not=source_file)
        _report(conversion, None if dry_run else out, report)


def _report(conversion: Conversion, out: Path | None, report: Path | None) -> None:
    """Print the report, and write it to the file given."""
    import dataclasses
    import json

    from rmsprop.files import write_whole

    say(f"{conversion.source} -> {conversion.target}, {len(conversion.checkpoint.slots)} parameters with state")
    if str(conversion.report):
        typer.echo(str(conversion.report))  # its sentences are printable
    if report is not None:
        record = {
            "source": conversion.source,
            "target": conversion.target,
            **dataclasses.asdict(conversion.report),
            "parameters": [dataclasses.asdict(move) for move in conversion.moves],
        }
        text = json.dumps(record, indent=1) + "\n"
        write_whole(report, lambda part: part.write_text(text, encoding="utf-8"))
        say(f"wrote {report}")
    if out is not None:
        say(f"wrote {out}")
