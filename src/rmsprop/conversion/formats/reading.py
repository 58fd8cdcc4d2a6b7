"""What every reader needs: one sentence for every strange file, and arrays measured before they are made."""

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
    """Whatever goes wrong inside becomes one sentence about the file.

    A parser of a hostile file can fail in any way that Python knows; none of them may reach the user as a traceback.
    Raises: Unreadable.
    """
    try:
        yield
    except Unreadable:
        raise
    except FileNotFoundError as error:
        raise Unreadable(f"{Path(error.filename or path).name} does not exist") from error
    except Exception as error:
        said = shown(str(error) or type(error).__name__, 100)
        raise Unreadable(f"{path.name} is no {what} that can be read: is it whole? ({said})") from error


def count(shape: Sequence[int], path: Path, name: str) -> int:
    """How many elements a shape has. Raises: Unreadable, for what is no shape."""
    if len(shape) > 32 or any(size < 0 for size in shape):
        raise Unreadable(f"{path.name} gives {shown(name)} the shape {tuple(shape)[:8]}, which no array has")
    return math.prod(shape)


def array(raw: bytes | memoryview, dtype: str, shape: Sequence[int], path: Path, name: str) -> Array:
    """A little-endian array of its raw bytes; bfloat16 becomes float32, which holds every value of it.

    Args:
        dtype: NumPy's name of it, or "bfloat16".
    Raises: Unreadable, when the bytes are not as many as the shape says.
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
    """The layout hint of a parameter that is known by its name and its rank alone, in TensorFlow's family."""
    return by_name(name, value.shape)


def decimal(value: float) -> float:
    """A number that has been through float32, as it was written: 0.9 for 0.8999999761581421."""
    single = np.float32(value)
    return float(str(single)) if float(single) == value else float(value)


def to_write(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint without the counts of steps that stand among a converted state's slots: files count once."""
    slots = {
        name: {slot: value for slot, value in kept.items() if slot not in _COUNTS}
        for name, kept in checkpoint.slots.items()
    }
    return dataclasses.replace(checkpoint, slots=slots)
