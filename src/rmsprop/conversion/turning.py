"""Converts arrays from the layout of TensorFlow, Keras and Flax to torch's, and back.

A kind names the layout of an array in its framework:

- "conv" is HWIO, "depthwise" is HWIM, and "dense" is (in, out).
- "gru" is (in, out) for a GRU, with gates in the order z, r, h instead of torch's r, z, n. "gates" is its bias.
- "keep" is torch's layout.

A number may follow:

- "dense:64" is the kernel of a layer that reads a flattened image with 64 channels, or a vector of such features. Its
  rows are in the order (height, width, channel) instead of torch's (channel, height, width). "dense:1" is the kernel
  of a layer that reads anything else.
- "depthwise:2" has two filters for each channel.
- "gates:2" is two biases in one array.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rmsprop.conversion.record import Array

KINDS = ("conv", "depthwise", "dense", "gru", "gates", "keep")
Shape = tuple[int, ...]


def split(kind: str) -> tuple[str, int]:
    """Split a kind into its name and its number, 0 if it has none. Raises: ValueError if it is not a kind."""
    base, colon, number = kind.partition(":")
    if base not in KINDS or (colon and not (number.isdecimal() and len(number) < 10 and int(number))):
        raise ValueError(
            f"{kind!r} is not a kind of layout; use one of {', '.join(KINDS)}, or dense:64 for 64 channels"
        )
    return base, int(number) if colon else 0


def is_kind(kind: object) -> bool:
    """Return whether a value from a file is a kind."""
    try:
        return isinstance(kind, str) and bool(split(kind))
    except ValueError:
        return False


def recorded(value: object) -> dict[str, str | list[int]]:
    """Validate a file's record of how its arrays were converted. Returns: the record, empty if it is not valid."""
    if not isinstance(value, dict):
        return {}
    sound = all(isinstance(name, str) and (is_kind(how) or is_axes(how)) for name, how in value.items())
    return dict(value) if sound else {}


def is_axes(value: object) -> bool:
    """Return whether a value is a permutation of axes."""
    if not isinstance(value, list) or len(value) > 32 or not all(type(axis) is int for axis in value):
        return False
    return sorted(value) == list(range(len(value)))


def turn(value: Array, kind: str, axes: Sequence[int] | None = None) -> Array:
    """Convert an array to torch's layout; `axes` override the kind."""
    if axes is not None:
        return np.ascontiguousarray(value.transpose(axes))
    base, number = split(kind)
    if base == "dense" and value.ndim in (1, 2):
        if number > 1:
            value = _rows(value, len(value) // number, number)
        return np.ascontiguousarray(value.T)
    if base == "conv" and value.ndim >= 3:
        return np.ascontiguousarray(value.transpose(value.ndim - 1, value.ndim - 2, *range(value.ndim - 2)))
    if base == "depthwise" and value.ndim >= 3:
        *size, channels, multiplier = value.shape
        turned = value.transpose(value.ndim - 2, value.ndim - 1, *range(value.ndim - 2))
        return np.ascontiguousarray(turned).reshape(channels * multiplier, 1, *size)
    if base == "gru" and value.ndim == 2:
        return np.ascontiguousarray(_gates(value, 1).T)
    return _gates(value, number) if base == "gates" else value


def turn_back(value: Array, kind: str, channels: int = 0) -> Array:
    """Convert an array from torch's layout to TensorFlow's: the inverse of `turn`.

    Args:
        channels: the number of input channels of a depthwise kernel.
    """
    base, number = split(kind)
    if base == "dense" and value.ndim in (1, 2):
        value = value.T
        return np.ascontiguousarray(_rows(value, number, len(value) // number) if number > 1 else value)
    if base == "conv" and value.ndim >= 3:
        return np.ascontiguousarray(value.transpose(*range(2, value.ndim), 1, 0))
    if base == "depthwise" and value.ndim >= 3:
        filters, _, *size = value.shape
        channels = channels or filters // max(number, 1)
        split_up = value.reshape(channels, filters // channels, *size)
        return np.ascontiguousarray(split_up.transpose(*range(2, value.ndim), 0, 1))
    if base == "gru" and value.ndim == 2:
        return _gates(value.T, 1)
    return _gates(value, number) if base == "gates" else value


def turned_shape(shape: Shape, kind: str, axes: Sequence[int] | None = None, back: bool = False) -> Shape:
    """Return the shape that `turn`, or `turn_back` if `back`, gives an array of that shape."""
    if axes is not None:
        return tuple(shape[axis] for axis in axes)
    base, number = split(kind)
    if base == "conv" and len(shape) >= 3:
        return (*shape[2:], shape[1], shape[0]) if back else (shape[-1], shape[-2], *shape[:-2])
    if base == "depthwise" and len(shape) >= 3:
        many = max(number, 1)
        return (*shape[2:], shape[0] // many, many) if back else (shape[-2] * shape[-1], 1, *shape[:-2])
    return tuple(shape[::-1] if base in ("dense", "gru") and len(shape) == 2 else shape)


def fits(shape: Shape, kind: str) -> bool:
    """Return whether an array of that shape, in the source's layout, can have that kind."""
    base, number = split(kind)
    if base == "dense" and number > 1:
        return len(shape) in (1, 2) and shape[0] % number == 0
    return base not in ("gru", "gates") or (bool(shape) and shape[-1] % (3 * max(number, 1)) == 0)


def _rows(value: Array, first: int, second: int) -> Array:
    """Reorder the rows of a matrix, or the elements of a vector, from (first, second) to (second, first)."""
    swapped: Array = value.reshape(first, second, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)
    return swapped


def _gates(value: Array, parts: int) -> Array:
    """Swap the first two of a GRU's gates on the last axis. It is its own inverse."""
    gates = value.reshape(*value.shape[:-1], max(parts, 1), 3, value.shape[-1] // (3 * max(parts, 1)))
    return np.ascontiguousarray(gates[..., [1, 0, 2], :].reshape(value.shape))
