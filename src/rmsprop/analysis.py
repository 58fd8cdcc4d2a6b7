"""Properties that follow from the nine lines without a run: denominators, step lengths, memory, effects of ε."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from rmsprop.spec import EPS_MODES, Hyper, Rule

Settings = Mapping[str, Any]
Ranges = tuple[tuple[float | None, float | None], ...]

LOWEST, HIGHEST = -8, 4
"""The range of √v to sample, in powers of ten relative to the point where the larger ε dominates."""


def denominator(mode: str, eps: float, w: Any = None, *, root: Any = None) -> Any:
    """Return d of [6], given the variance w (a float, a NumPy array or a tensor) or its root (a float).

    Give the root if its square may overflow or underflow float64.

    Raises: ValueError for an unknown mode.
    """
    if mode not in EPS_MODES:
        raise ValueError(f"eps_mode {mode!r} is unknown; choose one of {', '.join(EPS_MODES)}")
    if mode in ("inside", "both"):
        inner = _sqrt(w + eps) if root is None else math.hypot(root, math.sqrt(eps))
        return inner + eps if mode == "both" else inner
    root = _sqrt(w) if root is None else root
    if mode == "outside":
        return root + eps
    return max(root, eps) if isinstance(root, float) else root.clip(eps)


def _sqrt(w: Any) -> Any:
    if isinstance(w, float):
        return math.sqrt(w)
    return np.sqrt(w) if isinstance(w, np.ndarray) else w.sqrt()


def smallest_d(mode: str, eps: float) -> float:
    """Return d at v → 0, whose inverse is the largest 1/d."""
    return float(denominator(mode, eps, root=0.0))


def matched_eps(mode: str, eps: float, other: str) -> float:
    """Return the ε that gives another mode the same largest 1/d, at v → 0, to six digits."""
    least = smallest_d(mode, eps)
    root = 2 * least / (1 + math.sqrt(1 + 4 * least))  # of x + x² = least
    matched = {"outside": least, "floor": least, "inside": least * least, "both": root * root}
    return float(f"{matched[other]:.6g}")


# If ε limits the factor on a gradient to this or less, ε rather than lr determines the step length.
GUARDED = 100.0


def number(lr: Any) -> float:
    """Return a learning rate, a float or a tensor, as a float."""
    return float(lr.item() if hasattr(lr, "item") else lr)


def most(rule: Rule, hyper: Hyper) -> float:
    """Return the largest factor of [6] and [7] on a gradient: the inverse of ε or of its root.

    Units: lr times this factor is the largest effective learning rate of an element. Infinite for ε = 0.
    """
    floor = smallest_d(rule.eps_mode, float(hyper.eps))
    return 1 / floor if floor else math.inf


def first_step(rule: Rule, hyper: Hyper) -> float:
    """Return the length of the first step of an element with a gradient far above ε and v₀, in units of lr.

    The length is 1/√(1−α) from v₀ = 0, 1 with bias correction, and 1/√(α·(1−α)) if centered. It is infinite if
    centered with bias correction, since the first variance is 0 and only ε remains in the denominator.
    """
    rest = 1 - float(hyper.alpha)
    own = 1.0 if rule.bias_correction else rest  # [2], [4]: weight of g² in the average after one step
    share = own - own * own if rule.centered else own  # [5]
    ahead = 1 + float(hyper.momentum) if rule.momentum and rule.nesterov else 1.0  # [8]
    return min(ahead * min(1 / math.sqrt(share) if share > 0 else math.inf, hyper.cap), hyper.cap)


def steady_step(rule: Rule, hyper: Hyper) -> float:
    """Return the limit of the step length under a constant gradient, in units of lr: 1/(1−μ)."""
    return min(1 / (1 - float(hyper.momentum)) if rule.momentum else 1.0, hyper.cap)


_FORESEEN = 100_000  # steps; for alpha and momentum of 0.9999999 the search would take hours


@lru_cache(maxsize=256)
def _longest(alpha: float, momentum: float, nesterov: bool, corrected: bool, cap: float) -> tuple[float, int] | None:
    buffer, best = 0.0, 0.0
    for t in range(1, _FORESEEN):
        u = 1.0 if corrected else 1 / math.sqrt(-math.expm1(t * math.log(alpha)) if alpha else 1.0)
        u = min(u, cap)
        buffer = momentum * buffer + u
        step = min(u + momentum * buffer if nesterov else buffer, cap)
        if step <= best * (1 + 1e-9):
            return best, t - 1
        best = step
    return None


def longest_step(rule: Rule, hyper: Hyper) -> tuple[float, int] | None:
    """Return the longest step under a constant gradient from v₀ = 0, in units of lr, and its step number.

    The long first steps add up in the momentum buffer before they fade. Return None for a centered rule, whose
    variance vanishes under a constant gradient, and if the longest step comes too late to search for.
    """
    if rule.centered:
        return None
    momentum = float(hyper.momentum) if rule.momentum else 0.0
    return _longest(float(hyper.alpha), momentum, rule.nesterov and rule.momentum, rule.bias_correction, hyper.cap)


def warm_up(rule: Rule, hyper: Hyper, gradient: float) -> float:
    """Return the number of steps until αᵗ·v₀ falls below the square of a gradient of that size."""
    if rule.square_avg_init <= gradient * gradient or gradient <= 0:
        return 0.0 if gradient > 0 else math.inf
    return math.log(gradient * gradient / rule.square_avg_init) / math.log(hyper.alpha) if hyper.alpha else 1.0


def memory(alpha: float) -> float:
    """Return the number of steps that an average spans: 1/(1−α)."""
    return 1 / (1 - alpha)


def steps_stuck(alpha: float, times: float) -> float:
    """Return the number of steps in which √v falls by the factor `times` under zero gradients."""
    return 2 * math.log(times) / -math.log(alpha) if alpha and times > 1 else 0.0


def roots(*settings: Settings, per_decade: int = 40) -> list[float]:
    """Return values of √v around the largest ε of these settings, evenly spaced on a logarithmic axis."""
    middle = max(smallest_d(s["eps_mode"], s["eps"]) for s in settings) or 1.0
    return [middle * 10 ** (k / per_decade) for k in range(LOWEST * per_decade, HIGHEST * per_decade + 1)]


def step_size(settings: Settings, root: float) -> float:
    """Return the step length under a constant gradient as large as √v, including momentum, in units of lr."""
    move = root / denominator(settings["eps_mode"], settings["eps"], root=root)
    return float(move / (1 - settings["momentum"]))


def ratio(one: Settings, other: Settings, root: float) -> float:
    """Return the step under the other ε divided by the step under the first."""
    first, second = (denominator(s["eps_mode"], s["eps"], root=root) for s in (one, other))
    return float(first / second)


def worst(one: Settings, other: Settings) -> tuple[float, float]:
    """Return the ratio farthest from 1 and the √v where it occurs."""
    ratios = [(ratio(one, other, root), root) for root in roots(one, other)]
    return max(ratios, key=lambda pair: abs(math.log(pair[0])))


def agreeing(one: Settings, other: Settings, tolerance: float) -> Ranges:
    """Return the ranges of √v within which the steps agree up to `tolerance`; None is an open end."""
    grid = roots(one, other)
    inside = [abs(ratio(one, other, root) - 1) <= tolerance for root in grid]
    ranges: list[tuple[float | None, float | None]] = []
    begin: float | None = None
    for i, good in enumerate(inside):
        if good and i and not inside[i - 1]:
            begin = _edge(one, other, tolerance, grid[i], grid[i - 1])
        if good and (i + 1 == len(grid) or not inside[i + 1]):
            end = None if i + 1 == len(grid) else _edge(one, other, tolerance, grid[i], grid[i + 1])
            ranges.append((begin, end))
    return tuple(ranges)


def _edge(one: Settings, other: Settings, tolerance: float, good: float, bad: float) -> float:
    """Return the √v between `good` and `bad` where the difference of the steps crosses `tolerance`."""
    for _ in range(40):
        middle = math.sqrt(good * bad)
        if abs(ratio(one, other, middle) - 1) <= tolerance:
            good = middle
        else:
            bad = middle
    return good


def nth_step(settings: Settings, g: float, t: int) -> float:
    """Return the t-th step under a constant gradient, without momentum and centering, in units of lr."""
    decayed = settings["alpha"] ** t
    v = decayed * settings["square_avg_init"] + (1 - decayed) * g * g
    v = v / (1 - decayed) if settings["bias_correction"] else v
    return float(g / denominator(settings["eps_mode"], settings["eps"], v))


def steps_until_alike(one: Settings, other: Settings, g: float, tolerance: float = 0.01) -> int:
    """Return the first step from which two starts agree up to `tolerance`; their ratio approaches 1 monotonically."""

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
