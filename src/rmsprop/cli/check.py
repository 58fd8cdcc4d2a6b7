"""The command `rmsprop check`, which shows the backends on this machine or lints a script's RMSprop."""

import json
import platform
import sys
from pathlib import Path
from typing import Annotated

import typer


def check(
    script: Annotated[
        Path | None,
        typer.Argument(help="A training script to run and lint. Default: none, show this machine."),
    ] = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="The script's own arguments, including options.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Stop the script after this many optimizer steps. Before SCRIPT.", min=1)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The findings as one line of JSON, the last of stdout. Before SCRIPT.")
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Exit with 1 if an optimizer has an error or a warning, or if there is none to lint. Before SCRIPT.",
        ),
    ] = False,
) -> None:
    """Show which backends run on this machine, or run a training script and lint its RMSprop.

    Without a script, print versions, devices, and for each kind of tensor the backend that steps it and why. For a
    backend with a missing requirement, print what is missing and how to get it.

    With a script, run it as `python SCRIPT ARGUMENTS` would, unchanged, with this package's class in place of
    torch.optim.RMSprop. Its output and exit code stay its own, and the findings follow on stderr. With --strict, a
    script that succeeds also has to have no error and no warning, as a check in continuous integration. Each
    optimizer is linted before its first step, after steps 1, 10, 100 and so on, and at the end.

    The script really runs, with all its effects: do not check a script that you would not run. Processes that it
    starts are not watched.

    Examples:

    rmsprop check

    rmsprop check train.py --epochs 3

    rmsprop check --steps 100 --json train.py --epochs 3

    rmsprop check --strict --steps 100 train.py
    """
    if script is None:
        if as_json or strict or steps is not None:
            raise typer.BadParameter(
                "--json, --strict and --steps go with a script: rmsprop check --steps 100 train.py"
            )
        _machine()
        return
    if not script.is_file():
        raise typer.BadParameter(f"there is no file {str(script)!r}; rmsprop check takes a Python script")
    from rmsprop.inspection.script import check as run
    from rmsprop.printing import printable

    report = run(script, arguments or [], steps)
    sys.stdout.flush()
    if as_json:
        print(json.dumps(report.record()), flush=True)
    else:
        print("\n".join(map(printable, str(report).split("\n"))), file=sys.stderr, flush=True)
    raise typer.Exit(report.exit or int(strict and not report.passes()))


def _machine() -> None:
    import torch

    from rmsprop.optimizer import RMSprop
    from rmsprop.printing import version

    typer.echo(f"rmsprop {version()}, torch {torch.__version__}, Python {platform.python_version()}")
    typer.echo(f"{torch.get_num_threads()} threads, CPU capability {torch.backends.cpu.get_cpu_capability()}")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64):
            weight = torch.nn.Parameter(torch.zeros(1, dtype=dtype, device=device))
            _, *lines = RMSprop([weight]).explain().splitlines()
            typer.echo(f"{device}, {str(dtype).removeprefix('torch.')}")
            typer.echo("\n".join(f"    {line.strip()}" for line in lines if line.startswith("        ")))
