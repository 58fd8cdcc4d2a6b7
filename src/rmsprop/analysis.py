"""What the nine lines imply without a run: the denominator and its cap, step lengths, memory, and what ε changes."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from rmsprop.spec import EPS_MODES, Hyper, Rule

Settings = Mapping[str, Any]
Ranges = tuple[tuple[float | None, float | None], ...]

LOWEST, HIGHEST = -8, 4
"""Powers of ten between which √v is sampled, relative to where the larger ε takes over."""


def denominator(mode: str, eps: float, w: Any = None, *, root: Any = None) -> Any:
    """Return [6] d, of the variance w as a float, a NumPy array or a tensor, or of its root as a float.

    A float's root is the safer of the two where its square may leave float64's range.

    Raises: ValueError for a mode that line [6] does not have.
    """
    if mode not in EPS_MODES:
        raise ValueError(f"eps_mode {mode!r} is unknown; line [6] has {', '.join(EPS_MODES)}")
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


def cap(mode: str, eps: float) -> float:
    """Return d for v → 0: the largest 1/d is its inverse."""
    return float(denominator(mode, eps, root=0.0))


def matched_eps(mode: str, eps: float, other: str) -> float:
    """Return the ε that gives another mode the same largest 1/d, at v → 0, in six digits."""
    most = cap(mode, eps)
    root = 2 * most / (1 + math.sqrt(1 + 4 * most))  # of x + x² = most
    found = {"outside": most, "floor": most, "inside": most * most, "both": root * root}
    return float(f"{found[other]:.6g}")


# Where ε multiplies a gradient by at most this, it is there to keep steps short, and lr alone says little of them.
GUARDED = 100.0


def number(lr: Any) -> float:
    """A learning rate as a float, of a tensor too."""
    return float(lr.item() if hasattr(lr, "item") else lr)


def most(rule: Rule, hyper: Hyper) -> float:
    """The largest number that [6] and [7] can multiply a gradient by: the inverse of ε, or of its root.

    Units: lr times this is the largest learning rate that any element can get. Infinite for ε = 0.
    """
    floor = cap(rule.eps_mode, float(hyper.eps))
    return 1 / floor if floor else math.inf


def first_step(rule: Rule, hyper: Hyper) -> float:
    """The length of the first step of an element whose gradient is large beside ε and v₀, in units of lr.

    1/√(1−α) from v₀ = 0; with bias correction 1; centered, 1/√(α·(1−α)). Infinite where the first variance is 0,
    which leaves ε alone in the denominator: centered with bias correction.
    """
    rest = 1 - float(hyper.alpha)
    own = 1.0 if rule.bias_correction else rest  # [2], [4]: what of g² is in the average after one step
    share = own - own * own if rule.centered else own  # [5]
    ahead = 1 + float(hyper.momentum) if rule.momentum and rule.nesterov else 1.0  # [8]
    return min(ahead * min(1 / math.sqrt(share) if share > 0 else math.inf, hyper.cap), hyper.cap)


def steady_step(rule: Rule, hyper: Hyper) -> float:
    """The length of a step once the gradient has long been the same, in units of lr: 1/(1−μ)."""
    return min(1 / (1 - float(hyper.momentum)) if rule.momentum else 1.0, hyper.cap)


_FORESEEN = 100_000  # steps: alpha and momentum of 0.9999999 would take hours


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
    """The longest step of a run whose gradient never changes, in units of lr, and when it comes, from v₀ = 0.

    The long first steps add up in the momentum buffer before they fade. None for a centered rule, whose variance
    vanishes in such a run, and where it comes later than one would count.
    """
    if rule.centered:
        return None
    momentum = float(hyper.momentum) if rule.momentum else 0.0
    return _longest(float(hyper.alpha), momentum, rule.nesterov and rule.momentum, rule.bias_correction, hyper.cap)


def warm_up(rule: Rule, hyper: Hyper, gradient: float) -> float:
    """How many steps until what is left of v₀, αᵗ·v₀, is below the square of a gradient of that size."""
    if rule.square_avg_init <= gradient * gradient or gradient <= 0:
        return 0.0 if gradient > 0 else math.inf
    return math.log(gradient * gradient / rule.square_avg_init) / math.log(hyper.alpha) if hyper.alpha else 1.0


def memory(alpha: float) -> float:
    """How many steps an average remembers: 1/(1−α)."""
    return 1 / (1 - alpha)


def steps_stuck(alpha: float, times: float) -> float:
    """How many steps √v takes to fall to the given fraction of itself, when no gradient comes in."""
    return 2 * math.log(times) / -math.log(alpha) if alpha and times > 1 else 0.0


def roots(*settings: Settings, per_decade: int = 40) -> list[float]:
    """Values of √v around the largest ε of these settings, evenly on a logarithmic axis."""
    middle = max(cap(s["eps_mode"], s["eps"]) for s in settings) or 1.0
    return [middle * 10 ** (k / per_decade) for k in range(LOWEST * per_decade, HIGHEST * per_decade + 1)]


def step_size(settings: Settings, root: float) -> float:
    """What a steady gradient as large as √v moves a parameter by, per step, momentum included, in units of lr."""
    move = root / denominator(settings["eps_mode"], settings["eps"], root=root)
    return float(move / (1 - settings["momentum"]))


def ratio(meant: Settings, said: Settings, root: float) -> float:
    """The step under one ε over the step under the other."""
    one = denominator(meant["eps_mode"], meant["eps"], root=root)
    return float(one / denominator(said["eps_mode"], said["eps"], root=root))


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
    v = decayed * settings["square_avg_init"] + (1 - decayed) * g * g
    v = v / (1 - decayed) if settings["bias_correction"] else v
    return float(g / denominator(settings["eps_mode"], settings["eps"], v))


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
