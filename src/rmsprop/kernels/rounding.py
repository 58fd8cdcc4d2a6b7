"""Rounds [9] for half-precision parameters in torch's operators: random bits, rounding, and the Kahan remainder.

The bits are those of reference.bits and reference.round_stochastically, on every device and inside torch.compile.
"""

from typing import Any

import torch
from torch import Tensor

from rmsprop.tensors.bucket import Bucket, dense
from rmsprop.tensors.float8 import to_float8

_WORD = 0xFFFFFFFF

# Exact scale of stored remainders: the smallest float16, 2⁻²⁴, is above the remainders of small parameters.
SCALE = {torch.float16: 2048.0, torch.bfloat16: 1.0}


def bits_of(bucket: Bucket, i: int) -> Tensor:
    """Return the random bits of the elements of parameter i of a bucket with random keys."""
    p = bucket.param[i]
    return random_bits(bucket.random_keys[i], bucket.slots["step"][i], p.shape, p.device, p.stride())


def random_bits(
    random_key: int, step: Tensor, shape: torch.Size, device: torch.device, strides: tuple[int, ...] | None = None
) -> Tensor:
    """Return 32 random bits for each element.

    Elements are numbered in memory order, as in the compiled kernels, or in index order if the layout has gaps.

    Shapes: `step` has one element. The result has `shape`, in int64.
    """
    first, second = keys(random_key, step.detach().to(device, torch.int64).reshape(()))
    count = 1
    for size in shape:
        count *= size
    index = torch.arange(count, dtype=torch.int64, device=device)
    index = index.as_strided(shape, strides) if strides and dense(shape, strides) else index.reshape(shape)
    random: Tensor = _mix((index * 0x9E3779B1 & _WORD) ^ first, second)
    return random


def keys(random_key: int, t: Any) -> tuple[Any, Any]:
    """Return the two keys of the random bits of step t: numbers, or tensors if t is a tensor."""
    first = _mix(((random_key & _WORD) + t * 0x9E3779B9) & _WORD, t >> 32)
    return first, _mix((random_key >> 32) ^ first, 0)


def _mix(x: Any, key: Any) -> Any:
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & _WORD
    x = x ^ (x >> 15)
    x = (x + key) & _WORD
    x = x * 0x846CA68B & _WORD
    return x ^ (x >> 16)


def state_bits(random: Tensor, slot: str) -> Tensor:
    """Return the random bits of a slot of the state from those of the parameter, as reference.state_bits."""
    if slot != "square_avg":
        random = (random ^ (random >> 15)) * 0x2C1B3C6D & _WORD
        random = random ^ (random >> 12)
    return random if slot == "grad_avg" else random >> 16 | (random << 16 & _WORD)


def stochastically(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 x to one of its two neighbors in a dtype, up with a probability equal to the dropped fraction."""
    signed = x.view(torch.int32).to(torch.int64)
    size = signed & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        kept = (size + (random & 0xFFFF)) & ~0xFFFF
        rounded = kept.to(torch.int32).view(torch.float32)
    else:
        exponent = size >> 23
        fraction = (size & 0x7FFFFF) | 0x800000
        dropped = (126 - exponent).clamp(14, 31)  # bits, for numbers below float16's normal range
        units = (fraction + (random & ((1 << dropped) - 1))) >> dropped
        tiny = torch.where((exponent == 0) | (exponent < 95), 0, units).to(torch.float32) * 2.0**-24
        near = ((size + (random & 0x1FFF)) & ~0x1FFF).to(torch.int32).view(torch.float32)
        rounded = torch.where(exponent < 113, tiny, near)
    return torch.where(x.isfinite(), rounded.copysign(x), x).to(dtype)


def write(into: Tensor, x: Tensor, rest: Tensor | None, random: Tensor | None) -> None:
    """Write float32 x into a half-precision parameter, and the remainder into `rest`.

    Args:
        random: bits for stochastic rounding of the remainder, or of the parameter if `rest` is None. None: round to
            nearest.
    Mutates: into, rest.
    """
    if rest is None:
        into.copy_(x if random is None else stochastically(x, random, into.dtype))
        return
    near = x.to(into.dtype)
    remainder = (x - near.to(x.dtype)) * SCALE[into.dtype]
    remainder = torch.where(remainder.isfinite(), remainder, 0.0)  # the parameter may be infinite or NaN
    rest.copy_(remainder if random is None else stochastically(remainder, random, into.dtype))
    into.copy_(near)


def whole(param: Tensor, rest: Tensor) -> Tensor:
    """Return the sum of a parameter and its Kahan remainder, in float32."""
    return param.to(torch.float32) + rest.to(torch.float32) / SCALE[param.dtype]


def write_state(into: Tensor, x: Tensor, random: Tensor, slot: str) -> None:
    """Write the float32 average x into a slot of fewer bytes, rounded stochastically. Mutates: into."""
    own = state_bits(random, slot)
    into.copy_(to_float8(x, own) if into.dtype == torch.uint8 else stochastically(x, own, into.dtype))
