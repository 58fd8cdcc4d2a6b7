"""The formats of the averages that bench/state_training.py compares, and their step on simulated gradients.

Those that the package has are its own. The others are rounded here, after each step of float32 state.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Rounds float32 numbers to those of a format by random numbers in [0, 1): up with a probability equal to the fraction
# that is dropped. 0.5 in place of a random number rounds to nearest.
Rounding = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Format:
    """A format: arguments of the optimizer, and the roundings of the slots that are simulated."""

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    square_avg: Rounding | None = None
    momentum: Rounding | None = None
    random: bool = True


def minifloat(
    v: Tensor, u: Any, fraction: int, lowest: int | None, octaves: int, *, subnormal: bool = True
) -> Tensor:
    """Round to a float without sign of `fraction` bits in each of `octaves` octaves from 2^lowest.

    Args:
        lowest: None: as the tensor's largest number needs.
        subnormal: fill the range below 2^lowest evenly, as far as the fraction goes; else 0 is next.
    """
    if lowest is None:
        lowest = math.floor(math.log2(max(v.max().item(), 1e-30))) - octaves + 1
    exponent = torch.frexp(v)[1] - 1
    small = exponent < lowest
    width = (exponent.clamp(min=lowest) - fraction + 127 << 23).view(torch.float32)  # a power of 2
    if not subnormal:
        width = torch.where(small, 2.0**lowest, width)
    largest = (2 - 2.0**-fraction) * 2.0 ** (lowest + octaves - 1)
    return (torch.floor(v / width + u) * width).clamp(max=largest)


def logarithmic(v: Tensor, u: Any, per_octave: int, lowest: int, codes: int) -> Tensor:
    """Round to 0 or one of `codes` powers of 2 from 2^lowest, `per_octave` to the octave."""
    k = torch.floor(per_octave * torch.log2(v.clamp(min=2.0**lowest)))
    low, high = torch.exp2(k / per_octave), torch.exp2((k + 1) / per_octave)
    rounded = torch.where((v - low) / (high - low) > u, high, low).clamp(
        max=2.0 ** (lowest + (codes - 1) / per_octave)
    )
    return torch.where(v < 2.0**lowest, torch.where(v / 2.0**lowest > u, 2.0**lowest, 0.0), rounded)


def signed(x: Tensor, u: Any, fraction: int, octaves: int) -> Tensor:
    """Round to a float with a sign, whose range ends at the tensor's largest number."""
    return minifloat(x.abs(), u, fraction, None, octaves).copysign(x)


def to_bfloat16(v: Tensor, _: Any) -> Tensor:
    """Round to nearest bfloat16."""
    return v.bfloat16().float()


SIX_TWO = partial(minifloat, fraction=2, lowest=-49, octaves=63)

FORMATS: Mapping[str, Format] = {
    "float32": Format("float32", {"state_dtype": "float32"}),
    "bfloat16": Format("bfloat16", {"state_dtype": "bfloat16"}),
    "float8": Format("float8: 6 + 2 bits, 2⁻⁵¹ to 2¹³", {"state_dtype": "float8"}),
    "6+2": Format("6 + 2 bits, 2⁻⁵¹ to 2¹³, as float8", square_avg=SIX_TWO),
    "6+2 high": Format(
        "6 + 2 bits, 2⁻⁴³ to 2²¹", square_avg=partial(minifloat, fraction=2, lowest=-43, octaves=64, subnormal=False)
    ),
    "5+3": Format("5 + 3 bits, range by tensor", square_avg=partial(minifloat, fraction=3, lowest=None, octaves=32)),
    "log": Format(
        "10 codes per octave of √v, 2⁻⁴³ to 2⁸", square_avg=partial(logarithmic, per_octave=5, lowest=-43, codes=255)
    ),
    "4+1": Format("4 + 1 bits, range by tensor", square_avg=partial(minifloat, fraction=1, lowest=None, octaves=16)),
    "6+2 nearest": Format("6 + 2 bits, to nearest", square_avg=SIX_TWO, random=False),
    "bfloat16 nearest": Format("bfloat16, to nearest", square_avg=to_bfloat16, random=False),
    "momentum 5+2": Format(
        "6 + 2 bits, momentum ± 5 + 2 bits", square_avg=SIX_TWO, momentum=partial(signed, fraction=2, octaves=32)
    ),
    "momentum 4+3": Format(
        "6 + 2 bits, momentum ± 4 + 3 bits", square_avg=SIX_TWO, momentum=partial(signed, fraction=3, octaves=16)
    ),
}


def rounded(kept: Format, slot: str, x: Tensor, draw: torch.Generator) -> Tensor:
    """Return a slot's numbers as a simulated format keeps them."""
    rounding: Rounding | None = getattr(kept, slot)
    if rounding is None:
        return x
    return rounding(x, torch.rand(x.shape, generator=draw) if kept.random else 0.5)


def simulate(kept: Format, alpha: float, spread: float, size: float = 1.0) -> dict[str, float]:
    """Return the steps that a format takes on gradients of either sign and lognormal size, with one spike of 1000.

    The spike comes after 3/(1 − alpha) steps, and what is measured begins 14/(1 − alpha) steps later.

    Args:
        spread: standard deviation of the logarithm of the gradient's size.
        size: root mean square of the gradients, in units of g.
    Returns: of the steps g/(√v + 1e-8), the root mean square and the largest; of √v over its value in float32, the
        standard deviation; and the share of v = 0. "exact" ones are of float32.
    """
    draw = torch.Generator().manual_seed(0)
    count, memory = 2048, round(1 / (1 - alpha))
    v, exact = torch.zeros(count), torch.zeros(count)
    squares: dict[str, float] = {"rms": 0.0, "exact_rms": 0.0}
    longest = {"longest": 0.0, "exact_longest": 0.0}
    ratios, zeros, steps = 0.0, 0.0, min(20 * memory, 1000)
    for t in range(17 * memory + steps):
        g = torch.exp(spread * torch.randn(count, generator=draw) - spread**2) * size
        g = 1000 * g if t == 3 * memory else g
        v, exact = (torch.lerp(x, g * g, 1 - alpha) for x in (v, exact))
        if t >= 17 * memory:
            for name, x in (("", v), ("exact_", exact)):
                u = g / (x.sqrt() + 1e-8)
                squares[f"{name}rms"] += u.square().mean().item() / steps
                longest[f"{name}longest"] = max(longest[f"{name}longest"], u.max().item())
        v = rounded(kept, "square_avg", v, draw)
        if t >= 17 * memory:
            ratios += (v / exact).sqrt().var().item() / steps
            zeros += (v == 0).double().mean().item() / steps
    return {name: x**0.5 for name, x in squares.items()} | longest | {"spread": ratios**0.5, "zeros": zeros}


def decay(kept: Format, alpha: float, steps: int) -> dict[str, float]:
    """Return what a format makes of v = 1 after `steps` steps without gradients, as where v starts at 1.

    Returns: of √v over its value in float32, the standard deviation of the logarithm; and the mean factor by which
        steps g/√v are longer than in float32. Elements whose v is 0 are left out.
    """
    draw = torch.Generator().manual_seed(0)
    v = torch.ones(1 << 14)
    for _ in range(steps):
        v = rounded(kept, "square_avg", alpha * v, draw)
    ratio = (v[v > 0] / alpha**steps).sqrt()
    return {"spread": ratio.log().std().item(), "longer": (1 / ratio).mean().item()}
