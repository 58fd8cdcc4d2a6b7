"""The numbered equation of RMSprop, with its switches and hyperparameters.

    [1] decay         g ← g + wd·p (l2)   |   p ← p − lr·wd·p (decoupled)      g ← −g first, if maximize
                        | g ← g + wd·sign(p) (l1)   |   p ← p − lr²/reference_lr·wd·p (corrected)
    [2] second moment v ← α·v + (1−α)·g²       max_update: at most twice the old v, where that is positive
    [3] first moment  m ← α·m + (1−α)·g                                        centered only
    [4] bias          v̂, m̂ ← v/(1−αᵗ), m/(1−αᵗ)                                bias_correction only
    [5] variance      w ← v̂   |   max(v̂ − m̂², 0)
    [6] denominator   d ← √w + eps (outside) | √(w + eps) (inside)
                        | √(w + eps) + eps (both) | max(√w, eps) (floor)
    [7] direction     u ← g/d          0/0 is 0        max_update=M: −M ≤ u ≤ M
    [8] momentum      b ← μ·b + u   |   b ← μ·b + lr·u        nesterov: u ← u + μ·b
    [9] parameter     p ← p − lr·u  |   p ← p − u      max_update: the step is at most M·lr
    [10] average      e ← d·e + (1−d)·p        ema only; d is ema, or below it in a warm-up

Every implementation of the equation (`reference.py`, `kernels/*`, `race/engine.js`) carries these numbers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

from rmsprop.printing import shown, with_article

EpsMode = Literal["outside", "inside", "both", "floor"]
"""The place of ε in [6]."""

WeightDecayMode = Literal["l2", "decoupled", "corrected", "l1"]
"""The kinds of weight decay in [1]."""

SparseMode = Literal["lazy", "dense"]
"""Updates for a sparse gradient: only the rows that it names, or every row."""

Rounding = Literal["nearest", "stochastic"]
"""The rounding of a half-precision parameter in [9]."""

StateDtype = Literal["float32", "bfloat16", "float8"]
"""The precisions of the averages between two steps. Float32 stands for the dtype of the arithmetic."""

EmaWarmup = Literal["tensorflow", "timm"]
"""The warm-ups of the decay in [10]."""

Nonfinite = Literal["propagate", "skip", "raise"]
"""Reactions to a NaN or an infinity in a gradient."""

BackendName = Literal["auto", "cpu", "eager", "triton"]
"""The backends by name."""

EPS_MODES: tuple[EpsMode, ...] = get_args(EpsMode)
WEIGHT_DECAY_MODES: tuple[WeightDecayMode, ...] = get_args(WeightDecayMode)
SPARSE_MODES: tuple[SparseMode, ...] = get_args(SparseMode)
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
NONFINITE: tuple[Nonfinite, ...] = get_args(Nonfinite)
EMA_WARMUPS: tuple[EmaWarmup, ...] = get_args(EmaWarmup)
STATE_DTYPES: tuple[StateDtype, ...] = get_args(StateDtype)

SLOTS = ("square_avg", "grad_avg", "momentum_buffer", "step", "compensation", "ema")
"""The names of the state, in torch's spelling and in the order of `Bucket.slots`."""

AVERAGES = tuple(name for name in SLOTS if name not in ("step", "compensation"))
"""The slots that the equation averages, in the dtype of the arithmetic."""

NARROWED = ("square_avg", "grad_avg", "momentum_buffer")
"""The slots that `state_dtype` keeps in fewer bytes. `ema` stays in the dtype of the arithmetic: it is a result."""

GRADIENT_CLIPS = ("clip_value", "clip_norm", "clip_global_norm")
"""The bounds on gradients, which apply before the equation."""

AVERAGING: Mapping[str, Any] = {"ema": None, "ema_warmup": None, "ema_start": 0, "ema_interval": 1}
"""The settings of [10], each with the value that has no effect."""

CARE: Mapping[str, Any] = {
    "rounding": "nearest",
    "compensation": False,
    "seed": 0,
    "state_dtype": "float32",
    "max_update": None,
    **AVERAGING,
}
"""The settings that only this package has, each with the value that has no effect: precision, bounds, averages."""

CLIPS = (*GRADIENT_CLIPS, "clip_weights")
"""The bounds on gradients, and on parameters, which applies after [9]."""


@dataclass(frozen=True)
class Rule:
    """The switches that determine the formula and its state; they do not change during a run.

    Attributes:
        eps_mode: the place of ε in [6]: "outside" or "floor" (ε in units of g), "inside" (ε in units of g²), "both".
        square_avg_init: the initial value of `square_avg`, in units of g² (0 in torch, 1 in TensorFlow 1).
        centered: whether [3] runs and [5] subtracts m̂².
        momentum: whether [8] runs and `momentum_buffer` exists.
        nesterov: whether [8] uses Nesterov momentum.
        lr_in_buffer: whether the learning rate enters in [8] (TensorFlow) rather than in [9] (torch).
        weight_decay_mode: "l2" adds wd·p to the gradient, "l1" wd·sign(p); "decoupled" shrinks p by lr·wd,
            "corrected" by lr²/reference_lr·wd.
        bias_correction: whether [4] runs.
        maximize: whether [1] negates the gradient.

    Raises:
        ValueError, TypeError: a switch has an invalid value; the message has the valid ones.
    """

    eps_mode: EpsMode = "outside"
    square_avg_init: float = 0.0
    centered: bool = False
    momentum: bool = False
    nesterov: bool = False
    lr_in_buffer: bool = False
    weight_decay_mode: WeightDecayMode = "l2"
    bias_correction: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            check_switch(field.name, getattr(self, field.name))

    def slots(self) -> tuple[str, ...]:
        """Return the state keys of each parameter, under torch's names."""
        optional = (("grad_avg", self.centered), ("momentum_buffer", self.momentum))
        return ("step", "square_avg", *(name for name, kept in optional if kept))

    def equation(self, hyper: "Hyper | None" = None) -> tuple[str, ...]:
        """Return the lines of the equation in force, with the numbers of `hyper` or with their names."""
        lr, alpha, rest, eps, mu, wd = "lr", "alpha", "(1−alpha)", "eps", "momentum", "weight_decay"
        if hyper is not None:
            lr = f"{hyper.lr.item() if hasattr(hyper.lr, 'item') else hyper.lr:g}" if hyper.lr is not None else lr
            alpha, rest, eps = f"{hyper.alpha:g}", f"{1 - hyper.alpha:g}", f"{hyper.eps:g}"
            mu, wd = f"{hyper.momentum:g}", f"{hyper.weight_decay:g}"
        lines = ["[1] g ← −g"] if self.maximize else []
        if wd != "0":
            reference = "reference_lr" if hyper is None or hyper.reference_lr is None else f"{hyper.reference_lr:g}"
            decay = {
                "l2": f"g ← g + {wd}·p",
                "l1": f"g ← g + {wd}·sign(p)",
                "decoupled": f"p ← p − {lr}·{wd}·p",
                "corrected": f"p ← p − {lr}²/{reference}·{wd}·p",
            }
            lines.append(f"[1] {decay[self.weight_decay_mode]}")
        start = f"   from v = {self.square_avg_init:g}" if self.square_avg_init else ""
        cap = None if hyper is None or hyper.max_update is None else f"{hyper.max_update:g}"
        grown = f"{alpha}·v + {rest}·g²"
        lines.append(f"[2] v ← {grown if cap is None else f'min({grown}, 2·v)'}{start}")
        if self.centered:
            within = "" if cap is None else f"   where g is at most {hyper.carried():.4g}·√v" if hyper else ""
            lines.append(f"[3] m ← {alpha}·m + {rest}·g{within}")
        v, m = ("v̂", "m̂") if self.bias_correction else ("v", "m")
        if self.bias_correction:
            lines.append(f"[4] v̂ ← v/(1−{alpha}ᵗ)" + (f", m̂ ← m/(1−{alpha}ᵗ)" if self.centered else ""))
        lines.append(f"[5] w ← max({v} − {m}², 0)" if self.centered else f"[5] w ← {v}")
        lines.append("[6] d ← " + _DENOMINATORS[self.eps_mode].replace("eps", eps))
        lines.append("[7] u ← g/d" if cap is None else f"[7] u ← min(max(g/d, −{cap}), {cap})")
        mean = () if hyper is None or hyper.average is None else (str(hyper.average),)
        if not self.momentum:
            return (*lines, f"[9] p ← p − {lr}·u", *mean)
        within = "" if cap is None else f"   by at most {cap}·{lr}"
        new = f"{lr}·u" if self.lr_in_buffer else "u"
        lines.append(f"[8] b ← {mu}·b + {new}")
        move = f"({new} + {mu}·b)" if self.nesterov else "b"
        last = f"[9] p ← p − {move}" if self.lr_in_buffer else f"[9] p ← p − {lr}·{move}"
        return (*lines, last + within, *mean)


_DENOMINATORS = {
    "outside": "√w + eps",
    "inside": "√(w + eps)",
    "both": "√(w + eps) + eps",
    "floor": "max(√w, eps)",
}


@dataclass(frozen=True)
class Averaging:
    """The decay of [10], the average of the weights, from step to step.

    Attributes:
        decay: the largest d.
        warmup: None: the first update copies the weights, as torch's AveragedModel, Keras and timm do. "tensorflow":
            d is at most (1+k)/(10+k) in the k-th update, after tf.train.ExponentialMovingAverage with num_updates.
            "timm": d is at most 1 − k^(−2/3), after ModelEmaV3 with use_warmup.
        start: up to this step the average follows the weights, as d is 0.
        interval: number of steps from one update to the next.
    """

    decay: float
    warmup: EmaWarmup | None = None
    start: int = 0
    interval: int = 1

    def decay_at(self, t: int) -> float | None:
        """Return d at step t, which counts from 1. None if the step does not average."""
        if t <= self.start:
            return 0.0
        k, rest = divmod(t - self.start, self.interval)
        if rest:
            return None
        if self.warmup == "tensorflow":
            return min(self.decay, (1 + k) / (10 + k))
        if self.warmup == "timm":
            return min(self.decay, 1 - math.pow(k, -2 / 3))
        return self.decay if k > 1 else 0.0

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Averaging | None":
        """Return a parameter group's, or None without one."""
        if group["ema"] is None:
            return None
        return cls(*(group[name] for name in AVERAGING))

    def __str__(self) -> str:
        when = f"every {self.interval} steps" if self.interval > 1 else ""
        when += f"{' ' if when else ''}after step {self.start}" if self.start else ""
        if self.warmup is None:
            return f"[10] e ← {self.decay:g}·e + {1 - self.decay:g}·p" + (f"   {when}" if when else "")
        most = "(1+k)/(10+k)" if self.warmup == "tensorflow" else "1 − k^(−2/3)"
        return f"[10] e ← d·e + (1−d)·p   d = min({self.decay:g}, {most}) in update k" + (f", {when}" if when else "")


@dataclass(frozen=True)
class Hyper:
    """The hyperparameters, which schedules may change at every step.

    Units: lr in units of the parameter; alpha and momentum unitless; weight_decay in g per p (l2) or unitless
    (decoupled, corrected); eps in units of g ("outside", "floor") or g² ("inside").

    `lr` is a float or, in the torch backends, a tensor with one element. `reference_lr` applies to "corrected" decay.
    `max_update`, in units of lr, bounds the step of every element in [7] and [9]; with it, v at most doubles in [2].
    `clip_weights` bounds every element of p after [9], in units of p. `average` is the decay of [10], if it runs.
    """

    lr: Any
    alpha: float
    eps: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    reference_lr: float | None = None
    max_update: float | None = None
    clip_weights: float | None = None
    average: Averaging | None = None

    @property
    def cap(self) -> float:
        """M in [7] and [9]: max_update, or infinity without it."""
        return math.inf if self.max_update is None else self.max_update

    def carried(self) -> float:
        """Return the |g|/√v at which v doubles in [2]; under max_update, no larger g enters [3]."""
        return math.sqrt((2 - self.alpha) / (1 - self.alpha))

    def shrinkage(self, rule: Rule) -> Any:
        """Return the factor on lr by which p shrinks in [1]: wd, or lr/reference_lr·wd in "corrected" mode."""
        if rule.weight_decay_mode != "corrected":
            return self.weight_decay
        return self.lr / self.reference_lr * self.weight_decay if self.reference_lr else self.weight_decay


# The description of each number and its valid values, for error messages.
_RANGES = {
    "lr": ("learning rate", "a finite number >= 0, such as 1e-3"),
    "alpha": ("alpha value", "the decay of the averages, 0 <= alpha < 1, such as 0.99"),
    "eps": ("epsilon value", "a finite number >= 0, such as 1e-8"),
    "momentum": ("momentum value", "0 <= momentum < 1, such as 0.9"),
    "weight_decay": ("weight_decay value", "a finite number >= 0, such as 1e-4"),
    "square_avg_init": ("square_avg_init value", "a finite number >= 0: 0 as in torch, 1 as in TensorFlow 1"),
    "reference_lr": ("reference_lr value", "a finite number >= 0, the highest learning rate of the schedule"),
    "max_update": ("max_update", "a finite number > 0, the longest step in units of lr, such as 3, or None"),
    "clip_value": ("clip_value", "a finite number > 0, the largest size of a gradient's element, or None"),
    "clip_norm": ("clip_norm", "a finite number > 0, the largest norm of one tensor's gradient, or None"),
    "clip_global_norm": ("clip_global_norm", "a finite number > 0, the largest norm of all gradients, or None"),
    "clip_weights": ("clip_weights", "a finite number > 0, the largest size of a parameter's element, or None"),
    "ema": ("ema", "the decay of the weights' average, 0 <= ema < 1, such as 0.9999, or None"),
}
_BELOW_ONE, _ABOVE_ZERO = ("alpha", "momentum", "ema"), ("max_update", *CLIPS)
_CHOICES = {"eps_mode": EPS_MODES, "weight_decay_mode": WEIGHT_DECAY_MODES}


_PLAIN = frozenset({bool, int, float, str, type(None)})


def plain(value: Any) -> Any:
    """Return a NumPy scalar, or an array without dimensions, as a Python scalar; anything else unchanged."""
    if type(value) in _PLAIN or not hasattr(value, "item") or getattr(value, "shape", None) != ():
        return value
    if type(value).__module__.partition(".")[0] == "torch" or hasattr(value, "requires_grad"):
        return value
    item = value.item()
    return float(item) if isinstance(item, Real) and type(item) not in _PLAIN else item


def is_plain(value: Any) -> bool:
    """Return whether a value is a built-in number, a string or None."""
    return type(value) in _PLAIN


def check_number(name: str, value: Any) -> float:
    """Return `value` as a Python float, validated for `name`.

    Raises:
        TypeError: the value is not a real number (a string, a bool, None, an array).
        ValueError: the value is outside the range of `name`.
    """
    description, works = _RANGES[name]
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"Invalid {description}: {shown(value)} is {with_article(type(value).__name__)}; {name} takes {works}"
        )
    try:
        number = float(value)
    except OverflowError:  # an int beyond the range of float64
        number = math.inf
    if not 0.0 <= number < (1.0 if name in _BELOW_ONE else math.inf) or (number == 0 and name in _ABOVE_ZERO):
        freezes = ": 0 would make every step, or every parameter, 0" if number == 0 and name in CLIPS else ""
        raise ValueError(f"Invalid {description}: {shown(value)}; {name} takes {works}{freezes}")
    return number


def check_integer(name: str, value: Any, least: int = 0) -> int:
    """Return `value` as an int from `least` to 2⁶³ − 1.

    Raises: TypeError, ValueError: the value is not an integer, or outside that range.
    """
    works = f"{name} takes an integer from {least} to 2**63 - 1, such as {least}"
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"Invalid {name}: {shown(value)} is {with_article(type(value).__name__)}; {works}")
    if not least <= int(value) < 2**63:
        raise ValueError(f"Invalid {name}: {shown(value)}; {works}")
    return int(value)


def random_key(seed: int, place: int) -> int:
    """Return a parameter's 64-bit key; with the step count and an element's index it determines the random bits.

    Args:
        place: the parameter's index among all parameters of the optimizer.
    Source: splitmix64, Steele, Lea and Flood, OOPSLA 2014.
    """
    return _split(_split(seed) + place)


def _split(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


_WORD = 2**64 - 1


def check_flag(name: str, value: Any) -> bool:
    """Return `value` as a bool; 0 and 1 are valid.

    Raises:
        TypeError: any other value, such as the string "False", which would count as true.
    """
    value = plain(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral) and int(value) in (0, 1):
        return bool(value)
    raise TypeError(
        f"Invalid {name}: {shown(value)} is {with_article(type(value).__name__)}; {name} is a switch, True or False"
    )


def check_switch(name: str, value: Any) -> Any:
    """Return the value of a Rule's field in its plain type. Raises: TypeError, ValueError if it is invalid."""
    if name == "square_avg_init":
        return check_number(name, value)
    if name in _CHOICES:
        choices = _CHOICES[name]
        if not isinstance(value, str) or value not in choices:
            error = ValueError if isinstance(value, str) else TypeError
            raise error(f"Invalid {name}: {shown(value)}; choose one of {', '.join(map(repr, choices))}")
        return value
    return check_flag(name, value)
