"""[9] for parameters of half precision in torch's operators: random bits, rounding, and what it leaves over.

The same bits as reference.bits and reference.round_stochastically, in whole numbers, on every device and inside
torch.compile.
"""

from typing import Any

import torch
from torch import Tensor

from rmsprop.tensors.bucket import dense

_WORD = 0xFFFFFFFF

# float16 ends at 2⁻²⁴, above the remainders of small parameters: it keeps them times this, which is exact.
SCALE = {torch.float16: 2048.0, torch.bfloat16: 1.0}


def word(
    random_key: int, step: Tensor, shape: torch.Size, device: torch.device, strides: tuple[int, ...] | None = None
) -> Tensor:
    """The random word, 0 to 2³² − 1, of each element. Shapes: `step` has one element; the result `shape`, int64.

    Elements count in the order of memory, as for the compiled kernels; where memory has gaps, in that of the shape.
    """
    first, second = keys(random_key, step.detach().to(device, torch.int64).reshape(()))
    count = 1
    for size in shape:
        count *= size
    index = torch.arange(count, dtype=torch.int64, device=device)
    index = index.as_strided(shape, strides) if strides and dense(shape, strides) else index.reshape(shape)
    words: Tensor = _mix((index * 0x9E3779B1 & _WORD) ^ first, second)
    return words


def keys(random_key: int, t: Any) -> tuple[Any, Any]:
    """What the words of step t follow from: two numbers, or two tensors where t is one."""
    first = _mix(((random_key & _WORD) + t * 0x9E3779B9) & _WORD, t >> 32)
    return first, _mix((random_key >> 32) ^ first, 0)


def _mix(x: Any, key: Any) -> Any:
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & _WORD
    x = x ^ (x >> 15)
    x = (x + key) & _WORD
    x = x * 0x846CA68B & _WORD
    return x ^ (x >> 16)


def stochastically(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """x, of float32, as one of its two neighbours in that dtype, up with the probability of the part dropped."""
    signed = x.view(torch.int32).to(torch.int64)
    size = signed & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        kept = (size + (random & 0xFFFF)) & ~0xFFFF
        rounded = kept.to(torch.int32).view(torch.float32)
    else:
        exponent = size >> 23
        fraction = (size & 0x7FFFFF) | 0x800000
        dropped = (126 - exponent).clamp(14, 31)  # of a number below float16's normal ones
        units = (fraction + (random & ((1 << dropped) - 1))) >> dropped
        tiny = torch.where((exponent == 0) | (exponent < 95), 0, units).to(torch.float32) * 2.0**-24
        near = ((size + (random & 0x1FFF)) & ~0x1FFF).to(torch.int32).view(torch.float32)
        rounded = torch.where(exponent < 113, tiny, near)
    return torch.where(x.isfinite(), rounded.copysign(x), x).to(dtype)


def write(into: Tensor, x: Tensor, rest: Tensor | None, random: Tensor | None) -> None:
    """Write x, of float32, into a parameter of half precision, and what that leaves over into `rest`.

    Args:
        random: words for rounding stochastically: of the remainder where one is kept, else of the parameter. None:
            to nearest.
    Mutates: into, rest.
    """
    if rest is None:
        into.copy_(x if random is None else stochastically(x, random, into.dtype))
        return
    near = x.to(into.dtype)
    left = (x - near.to(x.dtype)) * SCALE[into.dtype]
    left = torch.where(left.isfinite(), left, 0.0)  # beside an infinite or NaN parameter
    rest.copy_(left if random is None else stochastically(left, random, into.dtype))
    into.copy_(near)


def whole(param: Tensor, rest: Tensor) -> Tensor:
    """The parameter with what its rounding left over, in float32."""
    return param.to(torch.float32) + rest.to(torch.float32) / SCALE[param.dtype]
