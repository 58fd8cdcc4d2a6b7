"""The options and the error messages that `rmsprop convert` and `rmsprop inspect` share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    str | None,
    typer.Option(
        "--from", help="The framework that wrote it: a dialect, adam or adamw. Default: as the file identifies it."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A setting under the framework's name for it: lr=.01 for torch, learning_rate=.01 for Keras. May be "
        "repeated.",
    ),
]
Optimizer = Annotated[
    str | None, typer.Option(help="The optimizer to read from a file with several: its path, such as optimizers[0].")
]
Parameters = Annotated[
    str | None, typer.Option(help="The model to read from a file with several: its path, such as policy_net.")
]


@contextmanager
def usage_errors(checkpoint: Path, out: Path | None = None) -> Iterator[None]:
    """Turn what reading or writing a checkpoint raises into the command's one-sentence error.

    Args:
        out: the file written to, for an OSError that does not name its file.
    Raises: typer.BadParameter.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error
    except (MemoryError, RecursionError) as error:
        raise typer.BadParameter(f"{checkpoint} needs more memory than there is; it may be damaged") from error
    except OSError as error:
        raise typer.BadParameter(f"{error.filename or out} cannot be read or written: {error.strerror}") from error
