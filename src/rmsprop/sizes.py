"""How large the differences between two settings of RMSprop are, by arithmetic alone."""

import math
from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Any]
Ranges = tuple[tuple[float | None, float | None], ...]

LOWEST, HIGHEST = -8, 4
"""Powers of ten between which √v is looked at, relative to where the larger ε takes over."""


def denominator(mode: str, eps: float, root: float) -> float:
    """[6] d, of √v."""
    if mode == "outside":
        return root + eps
    if mode == "floor":
        return max(root, eps)
    inside = math.hypot(root, math.sqrt(eps))
    return inside + eps if mode == "both" else inside


def cap(mode: str, eps: float) -> float:
    """d for v → 0: the largest 1/d is its inverse."""
    return denominator(mode, eps, 0.0)


def roots(*settings: Settings, per_decade: int = 40) -> list[float]:
    """Values of √v around the largest ε of these settings, evenly on a logarithmic axis."""
    middle = max(cap(s["eps_mode"], s["eps"]) for s in settings) or 1.0
    return [middle * 10 ** (k / per_decade) for k in range(LOWEST * per_decade, HIGHEST * per_decade + 1)]


def step_size(settings: Settings, root: float) -> float:
    """What a steady gradient as large as √v moves a parameter by, per step, momentum included, in units of lr."""
    move = root / denominator(settings["eps_mode"], settings["eps"], root)
    return float(move / (1 - settings["momentum"]))


def ratio(meant: Settings, said: Settings, root: float) -> float:
    """The step under one ε over the step under the other."""
    one = denominator(meant["eps_mode"], meant["eps"], root)
    return one / denominator(said["eps_mode"], said["eps"], root)


def worst(meant: Settings, said: Settings) -> tuple[float, float]:
    """The ratio that is farthest from 1, and the √v where it is."""
    found = [(ratio(meant, said, root), root) for root in roots(meant, said)]
    return max(found, key=lambda pair: abs(math.log(pair[0])))


def agreeing(meant: Settings, said: Settings, tolerance: float) -> Ranges:
    """The ranges of √v in which the steps differ by no more than that share; None at an end that was not met."""
    grid = roots(meant, said)
    inside = [abs(ratio(meant, said, root) - 1) <= tolerance for root in grid]
    ranges: list[tuple[float | None, float | None]] = []
    begin: float | None = None
    for i, good in enumerate(inside):
        if good and i and not inside[i - 1]:
            begin = _edge(meant, said, tolerance, grid[i], grid[i - 1])
        if good and (i + 1 == len(grid) or not inside[i + 1]):
            end = None if i + 1 == len(grid) else _edge(meant, said, tolerance, grid[i], grid[i + 1])
            ranges.append((begin, end))
    return tuple(ranges)


def _edge(meant: Settings, said: Settings, tolerance: float, good: float, bad: float) -> float:
    """Where the steps begin to differ by more, between a √v where they do not and one where they do."""
    for _ in range(40):
        middle = math.sqrt(good * bad)
        if abs(ratio(meant, said, middle) - 1) <= tolerance:
            good = middle
        else:
            bad = middle
    return good


def nth_step(settings: Settings, g: float, t: int) -> float:
    """The t-th step, in units of lr, of a constant gradient without momentum and centering."""
    decayed = settings["alpha"] ** t
    v = decayed * settings["v_init"] + (1 - decayed) * g * g
    v = v / (1 - decayed) if settings["bias_correction"] else v
    return g / denominator(settings["eps_mode"], settings["eps"], math.sqrt(v))


def steps_until_alike(one: Settings, other: Settings, g: float, tolerance: float = 0.01) -> int:
    """The first step from which on two starts differ by no more than that share: their ratio only ever nears 1."""

    def _alike(t: int) -> bool:
        return abs(nth_step(other, g, t) / nth_step(one, g, t) - 1) <= tolerance

    high = 1
    while not _alike(high):
        high *= 2
    low = high // 2  # not yet alike, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _alike(middle) else (middle, high)
    return high
