"""Conversion of a parameter's optimizer state between dialects: slot names, units and signs.

In torch's terms v is `square_avg`, m is `grad_avg`, and b is `momentum_buffer`. v and m mean the same in every
dialect, up to bias correction. b is in units of the step where it includes the learning rate, and it is negative in
some frameworks.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rmsprop import dialects
from rmsprop.conversion import adam
from rmsprop.conversion.owner import find_owner
from rmsprop.conversion.record import ConversionReport
from rmsprop.dialects import Dialect

Slots = Mapping[str, Any]
Settings = Mapping[str, Any]


class Converted(NamedTuple):
    """The result of `convert`: the state in the target's names and units, and a report."""

    state: dict[str, Any]
    report: ConversionReport


@dataclass(frozen=True)
class Side:
    """One end of a conversion.

    Attributes:
        row: the dialect.
        settings: its settings under our names.
        given: the names of the settings that the user gave.
    """

    row: Dialect
    settings: Settings
    given: frozenset[str] = frozenset()

    @property
    def c(self) -> float:
        """The power, 0 or 1, of the 1 − alphaᵗ by which a step divides the stored averages."""
        return float(self.settings["bias_correction"] and not self.row.keeps_corrected)


def convert(
    state: Mapping[str, Any],
    source: str | Settings,
    target: str | Settings,
    lr: float | Mapping[str, float] | None = None,
    *,
    step: int | None = None,
) -> Converted:
    """Convert optimizer state to another framework's names, order, units and signs.

    Args:
        state: {slot: array} for one parameter, or {parameter: {slot: array}}, under the source's slot names
            (`DIALECTS[name].states`), and "ema" for an average of the weights. The arrays are NumPy arrays or torch
            tensors; they are not changed or shared.
        source: a dialect's name, "adam" or "adamw"; or a mapping of its arguments with the key "dialect":
            {"dialect": "timm", "lr_in_momentum": False}.
        target: a dialect's name or such a mapping. Momentum and centering default to what the state has.
        lr: the learning rate of the next step, or one for each parameter; needed where the units of momentum change.
        step: the number of steps taken, where the state has no counter and the target needs one.
    Returns: the state, as arrays of the type and dtype given, or of float32 for that of state_dtype="float8", and a
        report.
    Raises: ValueError or TypeError for what is missing or does not fit.

    >>> import numpy as np
    >>> state, report = convert({"rms": np.ones(2), "momentum": np.full(2, 0.5)}, "tensorflow1", "torch", lr=0.25)
    >>> state["momentum_buffer"]
    array([2., 2.])
    >>> print(report.assumed[0])
    step is set to 0: tensorflow1 counts none
    """
    report = ConversionReport()
    if state and all(isinstance(value, Mapping) for value in state.values()):
        converted = {
            name: _one(slots, source, target, _rate(lr, name), step, report) for name, slots in state.items()
        }
        return Converted(converted, report)
    return Converted(_one(state, source, target, _rate(lr, None), step, report), report)


def _row_and_arguments(given: str | Settings) -> tuple[Dialect, dict[str, Any]]:
    """Return the dialect that an argument of `convert` names, and its other settings."""
    arguments = {"dialect": given} if isinstance(given, str) else dict(given)
    row = find_owner(arguments.pop("dialect", "torch")).row
    assert row is not None
    return row, arguments


def _side(row: Dialect, arguments: Settings, keeps: set[str], target: bool = False) -> Side:
    """Return a dialect with the arguments given, and for the other settings what the slots imply."""
    read = dialects.read_arguments(row, arguments)
    defaults = row.defaults()
    implied_by_slots = {
        "centered": "grad_avg" in keeps or (target and defaults["centered"]),
        "momentum": ("momentum_buffer" in keeps or (target and defaults["momentum"] != 0)) * 0.9,
    }
    implied_by_slots |= {"ema": 0.0} if "ema" in keeps else {}  # the state alone does not need its decay
    known = {**implied_by_slots, **read}
    settings = row.complete(known, known)
    if "momentum" not in read and settings["centered"]:  # mxnet's centered operator always has momentum
        implied = row.complete({"centered": True}, {"centered"})["momentum"]
        settings = {**settings, "momentum": settings["momentum"] or (implied if target else 0.0)}
    return Side(row, settings, frozenset(read))


def _rate(lr: float | Mapping[str, float] | None, name: str | None) -> float | None:
    """Return the validated learning rate of one parameter's next step."""
    if isinstance(lr, Mapping):
        if name is None or name not in lr:
            raise ValueError(f"lr= has no rate for parameter {name!r}, only for {', '.join(map(repr, lr))}")
        lr = lr[name]
    if lr is None:
        return None
    value = lr.item() if hasattr(lr, "item") else lr
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < np.inf:
        raise ValueError(f"lr={value!r} is not a learning rate; give that of the next step, such as lr=1e-3")
    return float(value)


def _one(
    slots: Slots,
    source: str | Settings,
    target: str | Settings,
    lr: float | None,
    step: int | None,
    report: ConversionReport,
) -> dict[str, Any]:
    """Return the converted state of one parameter."""
    start, arguments = _row_and_arguments(source)
    states = {**start.states, "ema": "ema"}
    unknown = [name for name in slots if name not in states]
    if unknown:
        raise ValueError(
            f"{start.name} has no state {', '.join(map(repr, unknown[:5]))}; its state is {', '.join(start.states)}"
        )
    state = _numbers({states[name]: value for name, value in slots.items() if value is not None}, start)
    begin, end = _side(start, arguments, set(state)), _side(*_row_and_arguments(target), set(state), target=True)
    return between(state, begin, end, lr, step, report)


def _numbers(state: Slots, start: Dialect) -> Slots:
    """Return the state, in float32 if its `square_avg` holds the codes of float8.

    Raises: ValueError for codes of another quantization than ours, which has torch's names.
    """
    v = state.get("square_avg")
    if v is None or str(v.dtype).removeprefix("torch.") != "uint8":
        return state
    theirs = next(name for name, ours in start.states.items() if ours == "square_avg")
    if start.name == "bitsandbytes":
        raise ValueError(
            "state1 is uint8, codes whose numbers depend on qmap1 and absmax1; give the numbers, or convert the "
            "checkpoint file with `rmsprop convert`, which reads these tables"
        )
    if theirs != "square_avg":
        raise ValueError(
            f"{theirs} is uint8, but {start.name} keeps numbers there; only rmsprop's state_dtype='float8' keeps "
            "codes; give the numbers"
        )
    from rmsprop.state.precision import decoded, to_full_precision

    return to_full_precision(state) if hasattr(v, "detach") else {**state, "square_avg": decoded(np.asarray(v))}


def between(
    state: Slots, start: Side, end: Side, lr: float | None, step: int | None, report: ConversionReport
) -> dict[str, Any]:
    """Return state in the target's names and units.

    Args:
        state: the state under our names, in the source's units.
    """
    if "square_avg" not in state:
        theirs = next(name for name, ours in start.row.states.items() if ours == "square_avg")
        raise ValueError(f"the state of {start.row.name} lacks {theirs!r}, the average of squared gradients")
    state = {name: value for name, value in state.items() if name != "step" or value is not None}
    count = _count(state.get("step"), step)
    if "exp_avg" in state:
        state = adam.moments(state, start.settings, end.settings, count, lr, report)
    averaged = "ema" in state and end.settings.get("ema") is not None
    if averaged and count is None and end.settings.get("ema_warmup") is not None:
        raise ValueError(
            f"ema_warmup={end.settings['ema_warmup']!r} depends on the number of steps, which {start.row.name} does "
            "not count; leave it out, since the average of a long run is past its warm-up"
        )
    names = end.row.states if "ema" in end.row.states.values() else {**end.row.states, "ema": "ema"}
    out: dict[str, Any] = {}
    for theirs, ours in names.items():
        if ours == "step":
            if count is None and start.c:
                raise ValueError(
                    f"the state of {start.row.name} lacks 'step', which its bias correction needs; give step=..."
                )
            first = int(averaged)  # a first step would replace the average by the weights
            out[theirs] = _like_count(state, first if count is None else count)
            if count is None:
                report.assumed.append(f"step is set to {first}: {start.row.name} does not count steps")
        elif ours == "square_avg":
            out[theirs] = _average(state[ours], start, end, count, report)
        elif ours == "grad_avg" and end.settings["centered"]:
            if ours in state:
                out[theirs] = _average(state[ours], start, end, count, report)
            else:
                out[theirs] = _times(state["square_avg"], 0.0)
                report.approximate.append(
                    f"{theirs} starts at 0, since {start.row.name} was not centered: for about "
                    f"{1 / max(1 - float(end.settings['alpha']), 1e-12):.0f} steps the variance is too large, at "
                    "first by the square of the mean gradient"
                )
        elif ours == "momentum_buffer" and end.settings["momentum"] != 0:
            out[theirs] = _velocity(state, start, end, lr, report, theirs)
        elif ours == "ema" and averaged:
            out[theirs] = _copy(state[ours])
            report.exact.append("ema: unchanged, the average of the weights")
    _report_dropped(state, out, start, end, report)
    report.exact = list(dict.fromkeys(report.exact))
    report.approximate = list(dict.fromkeys(report.approximate))
    report.assumed = list(dict.fromkeys(report.assumed))
    return out


def _report_dropped(state: Slots, out: Slots, start: Side, end: Side, report: ConversionReport) -> None:
    """Report the slots that the target does not keep."""
    kept = {end.row.states.get(name, name) for name in out}
    names = {ours: theirs for theirs, ours in start.row.states.items()}
    if "grad_avg" in state and "grad_avg" not in kept:
        report.dropped.append(f"{names['grad_avg']}: the target is not centered and does not use it")
    if "momentum_buffer" in state and "momentum_buffer" not in kept and _any(state["momentum_buffer"]):
        report.dropped.append(f"{names['momentum_buffer']}: the target has no momentum, so the velocity is lost")
    if "step" in state and "step" not in kept:
        report.dropped.append(f"{names['step']}: {end.row.name} does not count steps")
    report.dropped = list(dict.fromkeys(report.dropped))


def _average(value: Any, start: Side, end: Side, count: int | None, report: ConversionReport) -> Any:
    """Return v or m, multiplied or divided by 1 − alphaᵗ where only one side corrects its bias."""
    power = end.c - start.c
    corrected = bool(start.settings["bias_correction"]), bool(end.settings["bias_correction"])
    if power == 0 and corrected[0] == corrected[1]:
        names = "v and m" if start.settings["centered"] else "v"
        report.exact.append(f"{names}: unchanged, since both keep the same averages")
        return _times(value, 1.0)
    if not count:
        raise ValueError(
            f"{start.row.name} and {end.row.name} differ by bias correction, 1 − alphaᵗ: give step=..., the number "
            "of steps taken, at least 1"
        )
    alpha = float(start.settings["alpha"])
    if "alpha" not in start.given:
        report.assumed.append(f"alpha is {alpha:g}, {start.row.name}'s default, in 1 − alphaᵗ")
    factor = -math.expm1(count * math.log(alpha)) if alpha > 0 else 1.0
    change = {1: "multiplied by", -1: "divided by", 0: "not changed by"}[int(power)]
    sentence = f"averages are {change} 1 − alphaᵗ = {factor:.6g}"
    if corrected[0] == corrected[1]:
        report.exact.append(f"{sentence}, as {end.row.name} keeps them")
    else:
        report.approximate.append(
            f"{sentence}, so that the roots agree at the switch; only one side corrects the bias, so the weight of "
            f"the newest gradient differs by {(1 - alpha) * (1 / factor - 1):.2g} at the first step, and by less at "
            "each later one"
        )
    return {1: _times, -1: _over, 0: _times}[int(power)](value, factor if power else 1.0)


def _velocity(state: Slots, start: Side, end: Side, lr: float | None, report: ConversionReport, theirs: str) -> Any:
    """Return b with the target's sign, with or without the learning rate in it."""
    if "momentum_buffer" not in state:
        report.exact.append(f"{theirs} starts at 0: {start.row.name} had no momentum")
        return _times(state["square_avg"], 0.0)
    value = state["momentum_buffer"]
    sign = float(start.row.buffer_sign * end.row.buffer_sign)
    inside = bool(start.settings["lr_in_buffer"]), bool(end.settings["lr_in_buffer"])
    flipped = "" if sign > 0 else ", with its sign flipped"
    if inside[0] == inside[1]:
        report.exact.append(f"momentum: unchanged{flipped}")
        return _times(value, sign)
    if lr is None:
        raise TypeError(
            f"momentum of {start.row.name} is in other units than momentum of {end.row.name}, which "
            f"{'includes' if inside[1] else 'does not include'} the learning rate: give lr=..., the learning rate of "
            "the next step"
        )
    if lr == 0 and not inside[1]:
        raise ValueError(
            f"lr=0 cannot be divided out of {start.row.name}'s momentum, which no longer holds the velocity; give "
            "the learning rate of the next step that moves the parameters"
        )
    if lr == 0 and _any(value):
        report.approximate.append(
            f"momentum: times lr = 0, so the velocity is lost when the rate rises again; {start.row.name} kept it"
        )
    report.exact.append(
        f"momentum: {'times' if inside[1] else 'divided by'} lr{flipped}; to half a unit in the last place, and "
        "exactly if lr is a power of two"
    )
    scope = ["on new gradients only", "on the old momentum too"]
    report.approximate.append(
        f"a later change of the learning rate acts {scope[not inside[1]]} in {end.row.name}, and {scope[inside[1]]} "
        f"in {start.row.name}; the runs agree until then"
    )
    return _times(value, sign * lr) if inside[1] else _over(value, sign * lr)


def _count(kept: Any, given: int | None) -> int | None:
    """Return the number of steps taken; None if neither the state nor the user gives it."""
    value = given if given is not None else kept
    if value is None:
        return None
    number = float(np.asarray(value).reshape(-1)[0])
    if not 0 <= number < 2.0**53 or number != int(number):
        raise ValueError(f"step={number!r} is not a number of steps")
    return int(number)


def _like_count(state: Slots, count: int) -> Any:
    """Return the count as a tensor or an array, like the rest of the state."""
    value = state["square_avg"]
    if not hasattr(value, "detach"):
        return np.asarray(count, dtype=np.int64)
    import torch

    # float32, which torch uses, cannot hold every integer beyond 2²⁴
    dtype = torch.float64 if count > 2**24 else torch.float32
    return torch.tensor(float(count), dtype=dtype, device="cpu")


def _any(value: Any) -> bool:
    return bool((value != 0).any())


def _times(value: Any, factor: float) -> Any:
    """Return a multiplied copy, rounded once."""
    return _rounded(value, lambda wide: wide * factor) if factor != 1.0 else _copy(value)


def _over(value: Any, divisor: float) -> Any:
    return _rounded(value, lambda wide: wide / divisor)


def _copy(value: Any) -> Any:
    return value.detach().clone() if hasattr(value, "detach") else np.array(value)


def _rounded(value: Any, compute: Any) -> Any:
    if hasattr(value, "detach"):
        import torch

        wide = torch.complex128 if value.is_complex() else torch.float64
        return compute(value.detach().to(wide)).to(value.dtype)
    array = np.asarray(value)
    wide_dtype = np.complex128 if np.iscomplexobj(array) else np.float64
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(compute(array.astype(wide_dtype))).astype(array.dtype)
