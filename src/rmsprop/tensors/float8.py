"""float8, the byte of `square_avg`: 6 bits of exponent, 2 of fraction, no sign. See reference.py for its codes."""

import torch
from torch import Tensor

SMALLEST_NORMAL = 2.0**-49
NEAREST = 1 << 20
SMALLEST, LARGEST = 2.0**-51, 1.25 * 2.0**13  # of the numbers above 0


def to_float8(v: Tensor, random: Tensor | int = NEAREST) -> Tensor:
    """Return the codes of float32 v in uint8, rounded with the lowest 21 random bits, or to nearest without any."""
    small = v < SMALLEST_NORMAL
    pattern = torch.where(small, v + SMALLEST_NORMAL, v).view(torch.int32)  # of a number below zero: replaced below
    drawn = random & 0x1FFFFF
    drawn = drawn.to(torch.int32) if isinstance(drawn, Tensor) else drawn
    code = (pattern + drawn >> 21) - 308 - 4 * small.to(torch.int32)  # never in 64 bits, to take half the memory
    code = torch.where(v.isinf(), 254, code.clamp(max=253))
    return torch.where(v >= 0, code, 255).to(torch.uint8)


def from_float8(codes: Tensor) -> Tensor:
    """Return the numbers of float8 codes, in float32."""
    c = codes.to(torch.int32)
    small = c < 4
    number = (torch.where(small, c + 312, c + 308) << 21).view(torch.float32) - torch.where(
        small, SMALLEST_NORMAL, 0.0
    )
    return torch.where(c == 255, torch.nan, torch.where(c == 254, torch.inf, number))


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a slot of the state in the arithmetic's dtype: the tensor itself if it has it, else a copy."""
    return from_float8(x).to(dtype) if x.dtype == torch.uint8 else x.to(dtype)


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a slot of the state in another dtype, rounded to nearest. uint8 stands for the codes of float8."""
    if x.dtype == dtype:
        return x
    if dtype == torch.uint8:
        return to_float8(x.to(torch.float32))
    return widened(x, dtype)
