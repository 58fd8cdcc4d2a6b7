"""How long RMSprop's steps are, from its rule and numbers alone, in units of the learning rate."""

import math
from functools import lru_cache
from typing import Any

from rmsprop.spec import Hyper, Rule

# Where ε multiplies a gradient by at most this, it is there to keep steps short, and lr alone says little of them.
GUARDED = 100.0


def number(lr: Any) -> float:
    """A learning rate as a float, of a tensor too."""
    return float(lr.item() if hasattr(lr, "item") else lr)


def most(rule: Rule, hyper: Hyper) -> float:
    """The largest number that [6] and [7] can multiply a gradient by: the inverse of ε, or of its root.

    Units: lr times this is the largest learning rate that any element can get. Infinite for ε = 0.
    """
    eps = float(hyper.eps)
    floor = {"inside": math.sqrt(eps), "both": math.sqrt(eps) + eps}.get(rule.eps_mode, eps)
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
    if rule.v_init <= gradient * gradient or gradient <= 0:
        return 0.0 if gradient > 0 else math.inf
    return math.log(gradient * gradient / rule.v_init) / math.log(hyper.alpha) if hyper.alpha else 1.0


def memory(alpha: float) -> float:
    """How many steps an average remembers: 1/(1−α)."""
    return 1 / (1 - alpha)


def thaw(alpha: float, times: float) -> float:
    """How many steps √v takes to fall to the given fraction of itself, when no gradient comes in."""
    return 2 * math.log(times) / -math.log(alpha) if alpha and times > 1 else 0.0
