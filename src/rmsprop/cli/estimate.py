"""The command `rmsprop estimate`, which shows the memory that training a checkpoint's model takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rmsprop.cli.arguments import read_settings
from rmsprop.cli.checkpoints import Parameters, usage_errors
from rmsprop.cli.table import say

OPTIONS = {"memory", "device", "dtype", "parameters"}
"""The arguments of `rmsprop.estimate` that the command takes as options."""


def estimate(
    checkpoint: Annotated[Path, typer.Argument(help="A file or folder with the model's weights.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="NAME=VALUE, arguments of RMSprop, such as momentum=0.9 or state_dtype=float8."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="The memory that there is, such as 16GB (10⁹ bytes) or 16GiB (2³⁰).")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="The device to train on, such as cuda.", show_default="cpu")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="The dtype to train the weights in, such as bfloat16. Default: that of the file."),
    ] = None,
    parameters: Parameters = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the bytes of weights, gradients, state, and a step, beside other settings and Adam, and whether they fit.

    Of a safetensors or PyTorch file only the header is read, and no code in it is run. Activations come on top.

    Examples:

    rmsprop estimate model.safetensors --memory 16GB

    rmsprop estimate model.pt momentum=0.9 state_dtype=bfloat16 --device cuda

    rmsprop estimate llama/ state_dtype=float8 --dtype bfloat16
    """
    from rmsprop.memory import estimate as measure

    with usage_errors(checkpoint):
        given = read_settings(settings or [])
        if "model" in given:
            raise ValueError(f"model={given['model']}: give the checkpoint as the first argument.")
        own = sorted(OPTIONS & given.keys())
        if own:
            raise ValueError(f"{own[0]} is an option of this command: write --{own[0]} {given[own[0]]}.")
        try:
            found = measure(checkpoint, memory=memory, device=device, dtype=dtype, parameters=parameters, **given)
        except RuntimeError as error:  # a backend that was asked for refuses
            raise ValueError(str(error)) from error
    if as_json:
        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False, indent=2, allow_nan=False))
    else:
        say(*str(found).split("\n"))
