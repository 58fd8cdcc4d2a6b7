"""The equation in NumPy float64, against which every backend is tested. Nothing in production imports it.

Three steps computed by hand, for the textbook rule (eps inside, no momentum) with lr = 1, alpha = 1/2,
eps = 1, from p = 1, with gradients 2, 0, −4:

    t   g   v ← v/2 + g²/2      d ← √(v + 1)   u ← g/d    p ← p − u
    1   2   0/2 + 4/2   = 2     √3             2/√3       1 − 2/√3              = −0.1547005383792517
    2   0   2/2 + 0/2   = 1     √2             0          1 − 2/√3              = −0.1547005383792517
    3  −4   1/2 + 16/2  = 17/2  √(19/2)        −4/√9.5    1 − 2/√3 + 4/√9.5     =  1.1430708306668487

>>> from rmsprop.spec import Hyper, Rule
>>> rule, hyper = Rule(eps_mode="inside"), Hyper(lr=1.0, alpha=0.5, eps=1.0)
>>> p = np.array([1.0])
>>> state = start(rule, p)
>>> for g in (2.0, 0.0, -4.0):
...     p, state = step(rule, hyper, p, np.array([g]), state)
...     print(f"{p[0]:.12f}  v = {state['square_avg'][0]}")
-0.154700538379  v = 2.0
-0.154700538379  v = 1.0
1.143070830667  v = 8.5
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rmsprop.spec import Hyper, Rule, random_key

Array = NDArray[np.float64]
State = dict[str, Any]


def start(rule: Rule, p: Array) -> State:
    """Return the state before the first step: exactly the slots of the rule.

    Shapes: every slot but `step` has the shape of p.
    """
    fresh = {"step": 0, "square_avg": np.full(p.shape, rule.square_avg_init, dtype=np.float64)}
    return {slot: fresh.get(slot, np.zeros(p.shape)) for slot in rule.slots()}


def step(rule: Rule, hyper: Hyper, p: Array, g: Array, state: State) -> tuple[Array, State]:
    """Compute one step of the equation and return the new parameter and state, without changing the arguments.

    Equation: spec.py, lines [1]-[10].
    Shapes:   p, g and each slot share one shape. Complex numbers are pairs of independent reals: pass a view.
    The slot `ema` is optional; the average starts at p.
    """
    lr, alpha, eps, momentum, wd = (
        float(x) for x in (hyper.lr, hyper.alpha, hyper.eps, hyper.momentum, hyper.weight_decay)
    )
    p, g, v = (np.asarray(x, dtype=np.float64) for x in (p, g, state["square_avg"]))
    t, before = int(state["step"]) + 1, p
    new: State = {"step": t}
    with np.errstate(all="ignore"):  # NaN and inf in gradients propagate
        # [1] decay
        if rule.maximize:
            g = -g
        if wd != 0:
            if rule.weight_decay_mode == "l2":
                g = g + wd * p
            elif rule.weight_decay_mode == "l1":
                g = g + wd * np.sign(p)
            elif rule.weight_decay_mode == "decoupled":
                p = p - lr * wd * p
            else:
                p = p - (lr * lr / hyper.reference_lr if hyper.reference_lr else lr) * wd * p
        # [2] second moment: under max_update it at most doubles
        most = 2 * v
        v = alpha * v + (1 - alpha) * g * g
        spike = (v > most) & (most > 0) & np.isfinite(g) if hyper.max_update is not None else np.zeros_like(g, bool)
        new["square_avg"] = v = np.where(spike, most, v)
        # [3] first moment: of a spike, the part that doubles v
        if rule.centered:
            entering = np.where(spike, np.copysign(hyper.carried() * np.sqrt(most / 2), g), g)
            m = alpha * np.asarray(state["grad_avg"], dtype=np.float64) + (1 - alpha) * entering
            new["grad_avg"] = m
        # [4] bias
        c = 1 - alpha**t if rule.bias_correction else 1.0
        # [5] variance
        w = np.maximum(v / c - (m / c) ** 2, 0) if rule.centered else v / c
        # [6] denominator
        if rule.eps_mode == "outside":
            d = np.sqrt(w) + eps
        elif rule.eps_mode == "inside":
            d = np.sqrt(w + eps)
        elif rule.eps_mode == "both":
            d = np.sqrt(w + eps) + eps
        else:
            d = np.maximum(np.sqrt(w), eps)
        # [7] direction
        u = np.clip(np.where((g == 0) & (d == 0), 0.0, g / d), -hyper.cap, hyper.cap)
        if rule.momentum:
            # [8] momentum
            if rule.lr_in_buffer:
                u = lr * u
            b = momentum * np.asarray(state["momentum_buffer"], dtype=np.float64) + u
            new["momentum_buffer"] = b
            u = u + momentum * b if rule.nesterov else b
            if hyper.max_update is not None:
                cap = hyper.cap * abs(lr) if rule.lr_in_buffer else hyper.cap
                u = np.clip(u, -cap, cap)
        # [9] parameter
        p = p - (u if rule.momentum and rule.lr_in_buffer else lr * u)
        if hyper.clip_weights is not None:
            p = np.clip(p, -hyper.clip_weights, hyper.clip_weights)
        # [10] average
        if hyper.average is not None:
            e = np.asarray(state.get("ema", before), dtype=np.float64)
            new["ema"] = average(hyper.average.decay_at(t), p, e)
    return p, new


def average(decay: float | None, p: Array, e: Array) -> Array:
    """Return the average of the weights after a step, from the parameter as it is stored. See spec.py Averaging."""
    return e if decay is None else decay * e + (1 - decay) * p


# [9] for half-precision parameters: random bits and rounding in integer arithmetic, so that every backend has the
# same bits. Kinds: "bfloat16", "float16".

RandomBits = NDArray[np.uint32]


def bits(seed: int, place: int, t: int, count: int) -> RandomBits:
    """Return the 32 random bits of each of `count` elements of the parameter at index `place`, in its step t.

    Source: the finalizer `lowbias32` of C. Wellons, with a second key added between its two multiplications.
    """
    key = random_key(seed, place)
    first = _mix(np.uint32((key + t * 0x9E3779B9) & 0xFFFFFFFF), np.uint32(t >> 32))
    second = _mix(np.uint32((key >> 32) ^ int(first)), np.uint32(0))
    index = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B1)
    random: RandomBits = _mix(index.astype(np.uint32) ^ first, second)
    return random


def _mix(x: Any, key: np.uint32) -> Any:
    with np.errstate(over="ignore"):
        x = x ^ (x >> np.uint32(16))
        x = x * np.uint32(0x7FEB352D)
        x = x ^ (x >> np.uint32(15))
        x = x + key
        x = x * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))


def round_stochastically(x: NDArray[np.float32], random: RandomBits, kind: str) -> Array:
    """Return x rounded stochastically to one of its two neighbors in half precision.

    The probability of rounding up is the dropped fraction. The bits that do not fit are added to as many random bits,
    and the carry decides. NaN and infinity are unchanged; a number below 2⁻³² of float16's smallest becomes 0.
    """
    pattern = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    sign, size = pattern & np.uint64(0x80000000), pattern & np.uint64(0x7FFFFFFF)
    exponent = (size >> np.uint64(23)).astype(np.int64)
    fraction = np.where(exponent > 0, size & np.uint64(0x7FFFFF) | np.uint64(0x800000), 0).astype(np.uint64)
    # dropped bits: the spacing of float16's subnormal numbers is 2⁻²⁴
    dropped = 16 if kind == "bfloat16" else np.maximum(13, 126 - exponent)
    small = (kind == "float16") & (exponent < 113)
    dropped = np.asarray(np.minimum(dropped, 40), np.uint64)
    mask = (np.uint64(1) << dropped) - np.uint64(1)
    source = np.where(small, fraction, size)
    kept = (source + (random.astype(np.uint64) & mask)) >> dropped << dropped
    kept = np.where(dropped > 31, np.uint64(0), kept)
    with np.errstate(over="ignore"):
        near = (kept | sign).astype(np.uint32).view(np.float32).astype(np.float64)
        tiny = np.ldexp(kept.astype(np.float64), exponent - 150) * np.where(sign > 0, -1.0, 1.0)
    rounded = np.where(small, tiny, near)
    rounded = np.where((kind == "float16") & (np.abs(rounded) > 65504), np.copysign(np.inf, rounded), rounded)
    return np.where(np.isfinite(x), rounded, np.asarray(x, np.float64))


# State in fewer bytes. bfloat16 is rounded as above. float8, for `square_avg` alone, has 6 bits of exponent, 2 of
# fraction and no sign: 0, then steps of 2⁻⁵¹ up to 2⁻⁴⁹, then four codes to the octave up to 1.25·2¹³ (253), infinity
# (254) and NaN (255). A number above the range is kept as the largest, so that it can decay again.

_SMALLEST_NORMAL = np.float32(2.0**-49)


def state_bits(random: RandomBits, slot: str) -> RandomBits:
    """Return the random bits of a slot of the state, from those of the parameter; rounding takes the lowest.

    The parameter's own rounding takes the lowest bits of `random`, so that the two do not go together.
    """
    with np.errstate(over="ignore"):
        if slot != "square_avg":
            random = (random ^ (random >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
            random = random ^ (random >> np.uint32(12))
        if slot != "grad_avg":
            random = random >> np.uint32(16) | random << np.uint32(16)
    return random


def to_float8(v: NDArray[np.float32], random: RandomBits) -> NDArray[np.uint8]:
    """Return the codes of v, rounded stochastically to one of two neighbors by the lowest 21 random bits.

    The probability of rounding up is the dropped fraction, to 2⁻²¹ of a code's width. Random bits of 2²⁰ round to
    nearest. A number below zero, whose root is NaN, is NaN.
    """
    v = np.asarray(v, np.float32)
    small = v < _SMALLEST_NORMAL
    with np.errstate(invalid="ignore"):
        pattern = np.where(small, v + _SMALLEST_NORMAL, v).view(np.uint32).astype(np.int64)
    code = (pattern + (random & np.uint32(0x1FFFFF)).astype(np.int64) >> 21) - np.where(small, 312, 308)
    code = np.where(v == np.inf, 254, np.minimum(code, 253))
    return np.where(v >= 0, code, 255).astype(np.uint8)


def from_float8(codes: NDArray[np.uint8]) -> Array:
    """Return the numbers that the codes stand for."""
    c = codes.astype(np.float64)
    octave, quarter = np.floor(c / 4), c % 4
    number = np.where(c < 4, np.ldexp(quarter, -51), np.ldexp(4 + quarter, (octave - 52).astype(np.int64)))
    return np.where(c == 255, np.nan, np.where(c == 254, np.inf, number))
