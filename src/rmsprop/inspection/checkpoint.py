"""Inspects an optimizer checkpoint: effective learning rates, stuck elements, and NaN, per parameter.

Any checkpoint that `rmsprop convert` reads can be inspected, without running code in it or changing it. The
computation takes no more memory than a few copies of the largest tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rmsprop.analysis import denominator, steps_stuck
from rmsprop.conversion.file import read_checkpoint, refuse_stateless
from rmsprop.conversion.record import Array, Checkpoint, ConversionReport
from rmsprop.conversion.settings import has_momentum, resolve_settings
from rmsprop.dialects import HYPERS, SWITCHES, Dialect
from rmsprop.spec import Hyper, Rule, check_number, check_switch

STUCK = 100.0  # an element is stuck where √w is that many times the median of its tensor

Settings = dict[str, Any]
TINY = 1e-37  # below it float32 rounds αᵗ·v₀ coarsely


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter. Shares are of its elements, which are the real and imaginary parts of a complex parameter.

    Attributes:
        step: the number of steps it has taken, or None if the file has no step count.
        fresh: αᵗ, the fraction of v's initial value that is left.
        lr_low, lr_median, lr_high: the 10 %, 50 % and 90 % quantile of the effective learning rate lr/d, in parameter
            per gradient; infinite where d is 0.
        untouched: the share that never had a gradient: its average is where it began; None where the average began
            above 0 and the file counts no steps, so that where it would be by now is not known. The shares below are
            then of all elements.
        below_eps: the share, of all others, where ε exceeds the root in [6], or w itself where ε stands inside.
        stuck: the share, of those others, whose √w is more than STUCK times their median: after a spike of the
            gradient they move STUCK times less than the rest. A spike that met all elements alike does not show.
        steps_stuck: how many steps until the last of them is no longer stuck, if no gradient comes in.
        nonfinite: how many NaN and infinite elements the state holds; of the parameter itself, nonfinite_params.
        bytes: what the state takes, as it is read.
    """

    name: str
    group: int
    shape: tuple[int, ...]
    elements: int
    step: int | None
    fresh: float | None
    lr_low: float
    lr_median: float
    lr_high: float
    untouched: float | None
    below_eps: float
    stuck: float
    steps_stuck: float
    nonfinite: int
    nonfinite_params: int
    slots: tuple[str, ...]
    dtype: str
    bytes: int


@dataclasses.dataclass
class Inspection:
    """A checkpoint's table, and the assumptions behind it.

    Attributes:
        settings: of each group: its numbers and switches under our names.
        assumed: sentences about settings that the file lacks, and the reader's notes.
    """

    file: str
    source: str
    title: str
    settings: list[Settings]
    equations: list[list[str]]
    assumed: list[str]
    rows: list[Row]

    def record(self) -> dict[str, Any]:
        """Return plain data for JSON, with infinite and undefined numbers as None."""
        return {**_plain(dataclasses.asdict(self)), "totals": _plain(self.totals())}

    def totals(self) -> dict[str, Any]:
        """Return sums and shares over all parameters."""
        elements = sum(row.elements for row in self.rows)
        touched = sum(row.elements * (1 - (row.untouched or 0.0)) for row in self.rows)
        known = all(row.untouched is not None for row in self.rows)
        return {
            "parameters": len(self.rows),
            "elements": elements,
            "bytes": sum(row.bytes for row in self.rows),
            "steps": max((row.step for row in self.rows if row.step is not None), default=None),
            "untouched": None if not known else 1 - touched / elements if elements else 0.0,
            "below_eps": self._share("below_eps", touched),
            "stuck": self._share("stuck", touched),
            "nonfinite": sum(row.nonfinite for row in self.rows),
            "nonfinite_params": sum(row.nonfinite_params for row in self.rows),
        }

    def _share(self, name: str, touched: float) -> float:
        weights = ((row.elements * (1 - (row.untouched or 0.0)), getattr(row, name)) for row in self.rows)
        return float(sum(weight * value for weight, value in weights) / touched) if touched else 0.0


def inspect(
    path: Path,
    source: str | None = None,
    given: Mapping[str, Any] | None = None,
    *,
    optimizer: str | None = None,
    parameters: str | None = None,
) -> Inspection:
    """Read a checkpoint of any format and return what its state means.

    Args:
        source: the framework, if the file does not name it: a dialect, adam or adamw.
        given: settings under the source's argument names, which override the file's. The dialect's defaults are last.
        optimizer, parameters: the places of an optimizer and a model in a file that holds several.
    Raises: Unreadable, ValueError or TypeError, in one sentence.
    """
    given = dict(given or {})
    held = read_checkpoint(path, source, given, optimizer=optimizer, parameters=parameters)
    refuse_stateless(held, path, "inspect")
    row = held.row
    assumed = list(held.notes)
    groups = []
    for names, hyper in held.all_groups:
        slots = {name: held.slots[name] for name in names if name in held.slots}
        own = dataclasses.replace(held, groups=[], hyper=hyper, slots=slots)
        unsaid = (
            not held.owner.ours and "momentum" not in _said(row, hyper, given) and has_momentum(map(own.state, names))
        )
        if not held.owner.ours:
            own.hyper = _complete(row, hyper, given, assumed)
        if unsaid:  # no number here depends on it
            own.hyper[row.argument("momentum")] = row.hyper.momentum or 0.9
        decay = own.hyper.get("decay")
        if "decay" in row.limits and decay and held.step is None and "decay" not in given:
            own.hyper = {word: value for word, value in own.hyper.items() if word != "decay"}
            assumed.append(
                f"decay={decay:g} divides {row.argument('lr')} by 1 + decay·t, and the file has no step count t, "
                f"so rates are those of the start; set the current rate with --set {row.argument('lr')}=..."
            )
        report = ConversionReport()
        ((_, settings),) = resolve_settings(own, given, report)
        assumed += report.approximate
        settings |= {name: check_number(name, settings[name]) for name in HYPERS}
        settings |= {name: check_switch(name, settings[name]) for name in SWITCHES}
        if unsaid:
            settings["momentum"] = None
        groups.append((names, settings))
    rows = list(_rows(held, row, groups, assumed))
    return Inspection(
        file=path.name,
        source=row.name,
        title=row.title,
        settings=[_shown(settings) for _, settings in groups],
        equations=[_equation(settings) for _, settings in groups],
        assumed=list(dict.fromkeys(assumed)),
        rows=rows,
    )


def _complete(row: Dialect, hyper: Settings, given: Mapping[str, Any], assumed: list[str]) -> Settings:
    """Return a group's settings, with the dialect's defaults for those that neither the file nor the user sets."""
    full = dict(hyper)
    said = _said(row, hyper, given)
    for name in ("lr", "alpha", "eps"):
        if name in said:
            continue
        value, word = getattr(row.hyper, name), row.argument(name)
        full = {known: other for known, other in full.items() if row.arguments.get(known, known) != name}
        if value is None:
            full[word] = 1.0
            assumed.append(
                f"{word} is in neither the file nor the dialect, so rates are in units of it; "
                f"set it with --set {word}=0.001"
            )
        else:
            full[word] = value
            assumed.append(
                f"{word}={value:g}, the default of {row.name}, since the file has no value; override it "
                f"with --set {word}=..."
            )
    return full


def _said(row: Dialect, hyper: Settings, given: Mapping[str, Any]) -> set[str]:
    """Return our names of the settings that the file or the user sets."""
    return {row.arguments.get(word, word) for word, value in {**hyper, **given}.items() if value is not None}


def _shown(settings: Settings) -> Settings:
    names = (
        "dialect",
        "lr",
        "alpha",
        "eps",
        "eps_mode",
        "momentum",
        "centered",
        "bias_correction",
        "square_avg_init",
    )
    return {name: settings[name] for name in names}


def _equation(settings: Settings) -> list[str]:
    """Return lines [2] to [6], on which the table rests, with the group's numbers."""
    names = ("eps_mode", "square_avg_init", "centered", "bias_correction")
    rule = Rule(**{name: settings[name] for name in names})
    lines = rule.equation(Hyper(settings["lr"], settings["alpha"], settings["eps"]))
    return [line for line in lines if line[1] in "23456"]


def _rows(
    held: Checkpoint, row: Dialect, groups: list[tuple[list[str], Settings]], assumed: list[str]
) -> Iterator[Row]:
    for i, (names, settings) in enumerate(groups):
        for name in names:
            if name in held.slots:
                yield _row(name, i, held.state(name), held, row, settings, assumed)


def _row(
    name: str,
    group: int,
    slots: Mapping[str, Array],
    held: Checkpoint,
    row: Dialect,
    settings: Settings,
    assumed: list[str],
) -> Row:
    """Return the numbers of one parameter."""
    v = slots["square_avg"]
    alpha = float(settings["alpha"])
    t = int(slots["step"].reshape(-1)[0]) if "step" in slots else held.step
    fresh = None if t is None else alpha**t
    arrays = {slot: value for slot, value in slots.items() if slot != "step" and slot != "exp_avg"}
    kept = [value for slot, value in slots.items() if slot != "step"]
    mean = None if "grad_avg" not in slots else _real(slots["grad_avg"])
    c = 1.0
    if settings["bias_correction"] and not row.keeps_corrected:
        if fresh is None:
            assumed.append("the file has no step count, so averages are used without bias correction")
        c = 1.0 if fresh is None else 1 - fresh
    if fresh is None and settings["square_avg_init"]:
        assumed.append("the file has no step count, so elements that never had a gradient cannot be counted")
    flat = _real(v)
    low, median, high, shares = _measure(flat, mean if settings["centered"] else None, c, fresh, settings)
    param = held.params.get(name)
    return Row(
        name=name,
        group=group,
        shape=tuple(v.shape),
        elements=flat.size,
        step=t,
        fresh=fresh,
        lr_low=low,
        lr_median=median,
        lr_high=high,
        **shares,
        nonfinite=sum(int((~np.isfinite(value)).sum()) for value in kept),
        nonfinite_params=0 if param is None else int((~np.isfinite(param)).sum()),
        slots=tuple(arrays),
        dtype=", ".join(dict.fromkeys(str(value.dtype) for value in kept)),
        bytes=sum(value.nbytes for value in kept),
    )


def _real(value: Array) -> Array:
    """Return all numbers as a flat float64 array, complex ones as pairs."""
    value = np.ascontiguousarray(value).reshape(-1)
    return (value.view(value.real.dtype) if np.iscomplexobj(value) else value).astype(np.float64)


def _measure(
    v: Array, m: Array | None, c: float, fresh: float | None, settings: Settings
) -> tuple[float, float, float, dict[str, Any]]:
    """Return the quantiles of lr/d, and the shares. Equation: spec.py, [4]-[6]."""
    if not v.size:
        return math.nan, math.nan, math.nan, {"untouched": 0.0, "below_eps": 0.0, "stuck": 0.0, "steps_stuck": 0.0}
    start = float(settings["square_avg_init"])
    left = start if fresh is None else start * fresh
    eps, mode = float(settings["eps"]), settings["eps_mode"]
    with np.errstate(all="ignore"):
        known = not start or fresh is not None
        untouched = np.zeros(v.shape, bool) if not known else v <= left * (1 + 1e-4) + TINY if start else v == 0
        w = v / c  # [4]
        if m is not None:
            w = np.maximum(w - (m / c) ** 2, 0)  # [5]
        root = np.sqrt(w)
        rate = float(settings["lr"]) / denominator(mode, eps, w)
        own = ~untouched & np.isfinite(root)
        count = int((~untouched).sum())
        below = own & ((w if mode in ("inside", "both") else root) < eps)
        middle = float(np.median(root[own])) if own.any() else 0.0
        stuck = own & (root > STUCK * middle) if middle > 0 else np.zeros_like(own)
    most = float(root[stuck].max()) / middle / STUCK if stuck.any() else 1.0
    shares = {
        "untouched": float(untouched.mean()) if known else None,
        "below_eps": float(below.sum()) / count if count else 0.0,
        "stuck": float(stuck.sum()) / count if count else 0.0,
        "steps_stuck": steps_stuck(float(settings["alpha"]), most),
    }
    low, median, high = _quantiles(rate, (0.1, 0.5, 0.9))
    return low, median, high, shares


def _quantiles(values: Array, at: tuple[float, ...]) -> list[float]:
    """Return quantiles of the values that are not NaN, with linear interpolation that keeps infinity."""
    ordered = np.sort(values[~np.isnan(values)])
    if not ordered.size:
        return [math.nan] * len(at)
    found = []
    for q in at:
        place = q * (ordered.size - 1)
        left, right = float(ordered[int(place)]), float(ordered[min(int(place) + 1, ordered.size - 1)])
        part = place - int(place)
        found.append(left if part == 0 or left == right else left + part * (right - left))
    return found


def _plain(value: Any) -> Any:
    """Return nested data as JSON can hold it."""
    if isinstance(value, dict):
        return {name: _plain(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
