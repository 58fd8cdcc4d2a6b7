"""Layouts: how the axes of a parameter turn from TensorFlow's, Keras' and flax' layout to torch's, and back.

A kind says how an array lies there. "conv" is HWIO, "depthwise" is HWIM, "dense" is (in, out), "gru" is (in, out) of
a GRU, whose gates stand in the order z, r, h where torch has r, z, n, and "gates" is its bias; "keep" lies as in
torch. A number may follow: "dense:64" is the kernel of a layer that reads a flattened image of 64 channels, whose
rows are in the order (height, width, channel) where torch has (channel, height, width), or a vector of such features.
"dense:1" is one that does not, "depthwise:2" has two filters for each channel, and "gates:2" is two biases in a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rmsprop.conversion.record import Array

KINDS = ("conv", "depthwise", "dense", "gru", "gates", "keep")
Shape = tuple[int, ...]


def split(kind: str) -> tuple[str, int]:
    """A kind and its number, 0 if it has none. Raises: ValueError for what is not a kind."""
    base, colon, number = kind.partition(":")
    if base not in KINDS or (colon and not (number.isdecimal() and len(number) < 10 and int(number))):
        raise ValueError(
            f"{kind!r} is not a kind of layout; there are {', '.join(KINDS)}, and dense:64 for 64 channels"
        )
    return base, int(number) if colon else 0


def is_kind(kind: object) -> bool:
    """Whether a text from a file is a kind."""
    try:
        return isinstance(kind, str) and bool(split(kind))
    except ValueError:
        return False


def recorded(value: object) -> dict[str, str | list[int]]:
    """What a file says its arrays have been turned by; empty for what is not such a record."""
    if not isinstance(value, dict):
        return {}
    sound = all(isinstance(name, str) and (is_kind(how) or is_axes(how)) for name, how in value.items())
    return dict(value) if sound else {}


def is_axes(value: object) -> bool:
    """Whether it is a permutation of axes."""
    if not isinstance(value, list) or len(value) > 32 or not all(type(axis) is int for axis in value):
        return False
    return sorted(value) == list(range(len(value)))


def turn(value: Array, kind: str, axes: Sequence[int] | None = None) -> Array:
    """An array from the source's layout to torch's; `axes` stand over the kind."""
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
    """The inverse of `turn`: from torch's layout to TensorFlow's. `channels`: a depthwise kernel's inputs."""
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
    """The shape that `turn` or `turn_back` gives, without turning anything."""
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
    """Whether an array of that shape, in the source's layout, can turn so."""
    base, number = split(kind)
    if base == "dense" and number > 1:
        return len(shape) in (1, 2) and shape[0] % number == 0
    return base not in ("gru", "gates") or (bool(shape) and shape[-1] % (3 * max(number, 1)) == 0)


def _rows(value: Array, first: int, second: int) -> Array:
    """The rows of a matrix, or a vector's elements, as (second, first) where they were (first, second)."""
    turned: Array = value.reshape(first, second, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)
    return turned


def _gates(value: Array, parts: int) -> Array:
    """An array whose last axis holds a GRU's gates, the first two swapped; its own inverse."""
    gates = value.reshape(*value.shape[:-1], max(parts, 1), 3, value.shape[-1] // (3 * max(parts, 1)))
    return np.ascontiguousarray(gates[..., [1, 0, 2], :].reshape(value.shape))
