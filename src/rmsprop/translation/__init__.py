"""Translate settings of one framework's RMSprop to another's, exactly or as closely as possible.

    translate("tensorflow1", "torch", lr=0.045, decay=0.9, momentum=0.9, epsilon=1.0)

A translation is exact if both settings make the same steps in real arithmetic from fresh state, for real parameters
and dense gradients, under any gradients and any learning-rate schedule. It uses only the arguments that the target
framework's own optimizer has (`Dialect.own`), since our dialect accepts more. Exactness is checked on the target's
arguments, as its dialect reads them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rmsprop.analysis import matched_eps
from rmsprop.dialects import HYPERS, SWITCHES, Dialect, find_dialect, read_arguments, write_arguments
from rmsprop.spec import CLIPS, SPARSE_MODES, check_flag, check_number, check_switch
from rmsprop.translation.findings import Difference, findings

_ALWAYS = ("lr", "alpha", "eps", "centered", "momentum", "maximize", "weight_decay")
_DEPENDENT = ("eps_mode", "nesterov", "lr_in_buffer", "reference_lr", "clip_after_decay", "clip_value_last")
SMALLEST = 1.1754943508222875e-38
"""The smallest normal number of float32."""

_BOUNDS = ("clip_value", "clip_norm", "clip_global_norm")  # on gradients
_ORDER = (  # a setting comes after those that it depends on
    "centered",
    "momentum",
    "nesterov",
    "lr_in_buffer",
    "eps_mode",
    "square_avg_init",
    "bias_correction",
    "maximize",
    *CLIPS,
    "clip_after_decay",
    "clip_value_last",
    "weight_decay_mode",
    "weight_decay",
    "reference_lr",
)


@dataclass(frozen=True)
class Translation:
    """The translation of settings from one dialect to another framework.

    Attributes:
        source, target: the dialects' names.
        call: code that constructs the target's own optimizer.
        arguments: the arguments in that call, without settings that other parts of the framework implement.
        exact: whether both make the same steps.
        findings: the differences, empty if exact.
        notes: remarks that are not differences between steps, such as the source's implicit settings.
        rmsprop_call: code that constructs this package's RMSprop with the given settings, which is always exact.
        source_settings: the source's settings under our names.
        target_settings: the settings of `call` under our names.
    """

    source: str
    target: str
    call: str
    arguments: Mapping[str, Any]
    exact: bool
    findings: tuple[Difference, ...]
    notes: tuple[str, ...]
    rmsprop_call: str
    source_settings: Mapping[str, Any]
    target_settings: Mapping[str, Any]


def translate(source: str, target: str, /, **settings: Any) -> Translation:
    """Translate settings of the source dialect, under its own or torch's names, to the target framework.

    Numbers are unchanged, except for ε if the target places it differently; then the new ε gives the same 1/d at
    v → 0. A weight decay of a kind that the target lacks is left out, and its finding describes the workaround.

    Raises:
        ValueError, TypeError: a dialect, name or value that does not work; the message has what would.

    >>> translation = translate("tensorflow1", "timm", learning_rate=0.048, momentum=0.9, epsilon=1e-3)
    >>> translation.exact, translation.call
    (True, 'timm.optim.RMSpropTF(params, lr=0.048, alpha=0.9, eps=0.001, momentum=0.9)')
    """
    here, there = find_dialect(source), find_dialect(target)
    original = _resolve(here, settings)
    expression = _express(there, original)
    translated = expression.resolved()
    effects = effective(original), effective(translated)
    differing = _differing(*effects)
    # A setting with an effect on one side only is covered by the setting that gives it the effect.
    reported = {name for name in differing if name not in _DEPENDENT or all(name in effect for effect in effects)}
    listed = _listed(settings)
    return Translation(
        source=here.name,
        target=there.name,
        call=expression.call(),
        arguments=expression.arguments(),
        exact=not differing,
        findings=findings(here, original, there, translated, reported),
        notes=tuple(_notes(here, settings, original, there, translated)),
        rmsprop_call=f'RMSprop(params, dialect="{here.name}"{listed and ", "}{listed})',
        source_settings=original,
        target_settings=translated,
    )


def effective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that have an effect, under our names: if they are equal, so are the steps."""
    kept = {
        name: settings[name] for name in ("lr", "alpha", "eps", "centered", "momentum", "maximize", "weight_decay")
    }
    kept |= {name: settings[name] for name in CLIPS if settings[name] is not None}
    clips = any(name in kept for name in _BOUNDS)
    mode = settings["weight_decay_mode"]
    conditions = {
        "eps_mode": settings["eps"] != 0,
        "nesterov": settings["momentum"] != 0,
        "lr_in_buffer": settings["momentum"] != 0,
        "square_avg_init": settings["alpha"] != 0,
        "bias_correction": settings["alpha"] != 0,
        "weight_decay_mode": settings["weight_decay"] != 0,
        "reference_lr": settings["weight_decay"] != 0 and mode == "corrected",
        "clip_after_decay": settings["weight_decay"] != 0 and mode in ("l2", "l1") and clips,
        "clip_value_last": "clip_value" in kept and ("clip_norm" in kept or "clip_global_norm" in kept),
    }
    return kept | {name: settings[name] for name, matters in conditions.items() if matters}


def _close(one: Any, other: Any) -> bool:
    """Return whether two values are equal up to the rounding of a conversion such as 1/ε."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-15)
    return bool(one == other)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """Return the names with different values and those that only one side has."""
    return {
        name for name in {*one, *other} if name not in one or name not in other or not _close(one[name], other[name])
    }


def _resolve(row: Dialect, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings under our names, validated, given the dialect's arguments."""
    read = {name: _checked(name, value) for name, value in read_arguments(row, given).items()}
    full = row.complete(read, read)
    if full["lr"] is None:
        raise TypeError(
            f"dialect={row.name!r} has no default learning rate, since {row.call or row.title} requires one; "
            f"give {row.argument('lr')}=..., such as 1e-3"
        )
    full = {name: _checked(name, value) for name, value in {"maximize": False, **full}.items()}
    if full["eps"] and not 1e-120 <= full["eps"] <= 1e120:
        raise ValueError(f"Invalid epsilon value: {full['eps']:g}; translation takes 0 or 1e-120 to 1e120")
    if full["nesterov"] and not full["momentum"]:
        raise ValueError("nesterov=True requires momentum, which is 0; give momentum > 0, such as 0.9")
    if full["weight_decay_mode"] == "corrected" and not full["reference_lr"]:
        raise ValueError(
            'weight_decay_mode="corrected" divides by the learning rate, which is 0; give reference_lr=...'
        )
    return full


def _checked(name: str, value: Any) -> Any:
    """Return a setting of ours in its plain type. Raises: TypeError, ValueError if the value does not work."""
    if name in HYPERS:
        return check_number(name, value)
    if name in (*CLIPS, "reference_lr", "ema"):
        return None if value is None else check_number(name, value)
    if name in (*SWITCHES, "maximize"):
        return check_switch(name, value)
    if name == "sparse":
        if value not in (None, *SPARSE_MODES):
            raise ValueError(f"Invalid sparse: {value!r}; it takes 'lazy', 'dense' or None")
        return value
    return check_flag(name, value)


class _Expression:
    """Settings expressed in a framework's own arguments, one setting at a time."""

    def __init__(self, row: Dialect, original: Mapping[str, Any]) -> None:
        self.row, self.original = row, original
        self.settings = {name: original[name] for name in ("lr", "alpha", "eps") if name not in row.own.fixed}
        self.parts: dict[str, str] = {}  # a setting that another part implements -> its key in Own.composed
        if "eps" in self.settings:
            self.settings["eps"] = max(original["eps"], row.own.least_eps)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the optimizer itself."""
        own = {name: value for name, value in self.settings.items() if name not in self.parts}
        return write_arguments(self.row, own)

    def resolved(self) -> dict[str, Any]:
        """Return all settings that the arguments result in, as the dialect reads them."""
        read = read_arguments(self.row, self.arguments()) | {name: self.settings[name] for name in self.parts}
        return {"maximize": False, **self.row.complete(read, read)}

    def try_to_add(self, name: str, value: Any) -> None:
        """Add a setting if the framework has an argument for it that is compatible with all others."""
        settings, parts = dict(self.settings), dict(self.parts)
        key = self._part(name)
        if key is None and name not in self.row.own.takes:
            return
        self.settings[name] = value
        if key is not None:
            self.parts[name] = key
        try:
            resolved = self.resolved()
        except (TypeError, ValueError):
            resolved = {}
        names = [argument.partition("=")[0] for argument in self._extra_arguments()]
        works = resolved and all(_close(resolved[n], v) for n, v in self.settings.items())
        if not works or len({*names, *self.arguments()}) < len(names) + len(self.arguments()):
            self.settings, self.parts = settings, parts

    def _part(self, name: str) -> str | None:
        """Return the key in Own.composed of the part that implements a setting, or None."""
        composed = self.row.own.composed
        pairs = {
            "momentum nesterov": name in ("momentum", "nesterov") and self.original["nesterov"],
            "weight_decay l1": name.startswith("weight_decay") and self.original["weight_decay_mode"] == "l1",
        }
        pair = next((key for key, needed in pairs.items() if needed and key in composed), None)
        return pair or (name if name in composed and name not in self.row.own.takes else None)

    def _templates(self) -> list[str]:
        used = set(self.parts.values())
        return [template for key, template in self.row.own.composed.items() if key in used]

    def _extra_arguments(self) -> list[str]:
        return [text for text in self._templates() if "{call}" not in text and "{arguments}" not in text]

    def call(self) -> str:
        """Return the code that constructs the optimizer."""
        row, own = self.row, self.row.own
        numbers = {name: self._shown(value) for name, value in self.resolved().items()}
        arguments = [own.pair.format(name, self._shown(value)) for name, value in self.arguments().items()]
        joined = own.between.join([*arguments, *(text.format(**numbers) for text in self._extra_arguments())])
        default = f'RMSprop(params, dialect="{row.name}", {{arguments}})'
        default = f"{row.call}({{arguments}})" if row.call else default
        text = (own.text or default).format(arguments=joined, **numbers)
        for template in self._templates():
            if "{call}" in template or "{arguments}" in template:
                text = template.format(call=text, arguments=joined, **numbers)
        return text

    def _shown(self, value: Any) -> str:
        return self.row.own.truth[value] if isinstance(value, bool) else repr(value)


def _express(row: Dialect, original: Mapping[str, Any]) -> _Expression:
    """Return the closest expression of the settings: first the switches, then what depends on them."""
    expression = _Expression(row, original)
    wanted = effective(original)
    for name in _ORDER:
        resolved = expression.resolved()
        if name not in wanted or _close(resolved[name], wanted[name]):
            continue
        modes = resolved["weight_decay_mode"], wanted.get("weight_decay_mode", "")
        if name == "weight_decay" and not _decays_alike(*modes):
            continue
        expression.try_to_add(name, wanted[name])
    if original.get("ema") is not None and "ema" in row.own.takes:
        expression.settings["ema"] = original["ema"]
    mode = expression.resolved()["eps_mode"]
    if "eps" in expression.settings and "eps_mode" in wanted and mode != wanted["eps_mode"]:
        matched = matched_eps(wanted["eps_mode"], wanted["eps"], mode)
        expression.settings["eps"] = max(matched, row.own.least_eps)
    return expression


def _decays_alike(there: str, here: str) -> bool:
    """Return whether one number has nearly the same effect under both kinds of weight decay."""
    return there == here or {there, here} == {"decoupled", "corrected"}


def _notes(
    here: Dialect,
    given: Mapping[str, Any],
    original: Mapping[str, Any],
    there: Dialect,
    translated: Mapping[str, Any],
) -> list[str]:
    """Return remarks on implicit settings, and on what the findings do not cover."""
    read, relevant, plain = read_arguments(here, given), effective(original), {"maximize": False, **here.defaults()}
    numbers: tuple[str, ...] = ("lr", "alpha", "eps", "momentum")
    implicit = {name: original[name] for name in numbers if name not in read and name in relevant}
    implied = {
        name: condition.setting for condition in here.when for name in condition.then if original[condition.setting]
    }
    notes = []
    defaults = {n: value for n, value in implicit.items() if value == plain[n] and (value or n != "momentum")}
    if defaults:
        notes.append(f"Not given, so {here.name}'s defaults apply: {_listed(write_arguments(here, defaults))}.")
    notes += [
        f"In {here.name}, {_listed(write_arguments(here, {setting: original[setting]}))} implies "
        f"{_listed({name: original[name]})}."
        for name, setting in implied.items()
        if name in relevant and name not in read and original[name] != plain[name]
    ]
    notes += [
        f"{name}={value!r} becomes {original['eps']:g} in {here.name}."
        for name, value in given.items()
        if here.arguments.get(name, name) == "eps" and not value and original["eps"]
    ]
    known = {"lr", "alpha", "eps", *here.own.takes, *" ".join(here.own.composed).split()} - set(here.own.fixed)
    known |= {"weight_decay_mode"} if "weight_decay l1" in here.own.composed else set()
    beyond = {n: original[n] for n in read if n in relevant and n not in known and not _close(original[n], plain[n])}
    if beyond:
        notes.append(
            f"{here.title.split(',')[0]} itself has no argument for {_listed(beyond)}; the translation is of what "
            f"this package computes under dialect={here.name!r}."
        )
    if original.get("ema") is not None and "ema" not in there.own.takes:
        argument = _listed(write_arguments(here, {"ema": original["ema"]}))
        notes.append(
            f"{there.name} has no argument for {argument}, the average of the weights, which does not change the "
            "steps."
        )
    if 0 < translated["eps"] < SMALLEST:
        notes.append(f"{translated['eps']:g} is below the range of float32, where it is 0 or nearly 0.")
    if original["sparse"] and original["sparse"] != translated["sparse"]:
        notes.append(
            f"Sparse gradients are {original['sparse']} in {here.name} and {translated['sparse'] or 'refused'} in "
            f"{there.name}; everything else here is about dense gradients."
        )
    return notes


def _listed(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
