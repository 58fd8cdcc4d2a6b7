"""What every reader needs: one sentence for every strange file, and arrays whose size is known before they are made."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..record import Unreadable

# In TensorFlow's, Keras' and flax' layouts. What no rule knows is left as it is, and --map can say otherwise.
_KERNELS = ("kernel", "weights", "w", "recurrent_kernel", "pointwise_kernel", "pointwise_weights")
_DEPTHWISE = ("depthwise_kernel", "depthwise_weights")


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
        raise Unreadable(f"{error.filename or path} does not exist") from error
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise Unreadable(
            f"{path} is no {what} that can be read ({said}): is it whole? copy or save it again"
        ) from error


def count(shape: Sequence[int], path: Path, name: str) -> int:
    """How many elements a shape has. Raises: Unreadable, for what is no shape."""
    if len(shape) > 32 or any(size < 0 for size in shape):
        raise Unreadable(f"{path} gives {name!r} the shape {tuple(shape)[:33]}, which no array has")
    return math.prod(shape)


def array(raw: bytes | memoryview, dtype: str, shape: Sequence[int], path: Path, name: str) -> np.ndarray:
    """A little-endian array of its raw bytes; bfloat16 becomes float32, which holds every value of it.

    Args:
        dtype: NumPy's name of it, or "bfloat16".
    Raises: Unreadable, when the bytes are not as many as the shape says.
    """
    kind = np.dtype("<u2") if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<")
    needed = count(shape, path, name) * kind.itemsize
    if needed != len(raw):
        raise Unreadable(
            f"{path} declares {name!r} as {dtype} of shape {tuple(shape)}, {needed} bytes, and holds {len(raw)}"
        )
    flat = np.frombuffer(raw, kind)
    if dtype == "bfloat16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.astype(kind.newbyteorder("=") if dtype != "bfloat16" else np.float32).reshape(shape)


def layout(name: str, value: np.ndarray) -> str:
    """The layout hint of a parameter that is known by its name and its rank alone, in TensorFlow's family."""
    leaf = name.rsplit("/", 1)[-1].rsplit(".", 1)[-1].lower()
    if leaf in _DEPTHWISE and value.ndim == 4:
        return "depthwise"
    if leaf not in _KERNELS or "embedding" in name.lower():
        return "keep"
    if value.ndim in (4, 5) or (value.ndim == 3 and "conv" in name.lower()):
        return "conv"
    return "dense" if value.ndim == 2 else "keep"
