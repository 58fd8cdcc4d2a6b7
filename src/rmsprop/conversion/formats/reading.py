"""Functions that the readers share: one-sentence errors, and arrays whose size is validated before allocation."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rmsprop.conversion.layers import by_name
from rmsprop.conversion.record import Array, Checkpoint, Unreadable
from rmsprop.printing import shown

_COUNTS = ("step", "iteration", "count", "t")


@contextlib.contextmanager
def strange(path: Path, what: str) -> Iterator[None]:
    """Convert any exception in the body to one sentence about the file.

    A parser can fail on a hostile file with any exception, and the user must not see a traceback.
    Raises: Unreadable.
    """
    try:
        yield
    except Unreadable:
        raise
    except FileNotFoundError as error:
        raise Unreadable(f"{Path(error.filename or path).name} does not exist") from error
    except Exception as error:
        reason = shown(str(error) or type(error).__name__, 100)
        raise Unreadable(f"{path.name} cannot be read as {what}; it may be damaged ({reason})") from error


def count(shape: Sequence[int], path: Path, name: str) -> int:
    """Return the number of elements of a shape. Raises: Unreadable for an invalid shape."""
    if len(shape) > 32 or any(size < 0 for size in shape):
        raise Unreadable(f"{path.name} gives {shown(name)} the shape {tuple(shape)[:8]}, which is invalid")
    return math.prod(shape)


def array(raw: bytes | memoryview, dtype: str, shape: Sequence[int], path: Path, name: str) -> Array:
    """Return an array from its little-endian bytes; bfloat16 becomes float32, exactly.

    Args:
        dtype: NumPy's name of the type, or "bfloat16".
    Raises: Unreadable if the number of bytes does not match the shape.
    """
    kind = np.dtype("<u2") if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<")
    needed = count(shape, path, name) * kind.itemsize
    if needed != len(raw):
        raise Unreadable(
            f"{path.name} declares {shown(name)} as {dtype} of shape {tuple(shape)[:8]} and holds {len(raw)} bytes"
        )
    flat = np.frombuffer(raw, kind)
    if dtype == "bfloat16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.astype(kind.newbyteorder("=") if dtype != "bfloat16" else np.float32).reshape(shape)


def layout(name: str, value: Array) -> str:
    """Return the layout hint of a TensorFlow or Keras parameter of which only the name and the rank are known."""
    return by_name(name, value.shape)


def decimal(value: float) -> float:
    """Return the decimal number that float32 rounded, such as 0.9 for 0.8999999761581421."""
    single = np.float32(value)
    return float(str(single)) if float(single) == value else float(value)


def to_write(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint without the step counts among its slots, since a file stores the count once."""
    slots = {
        name: {slot: value for slot, value in kept.items() if slot not in _COUNTS}
        for name, kept in checkpoint.slots.items()
    }
    return dataclasses.replace(checkpoint, slots=slots)
