"""Settings of one framework's RMSprop in the words of another's: exact, or the nearest with the size of the rest.

    translate("tensorflow1", "torch", lr=0.045, decay=0.9, momentum=0.9, epsilon=1.0)

Two settings are the same if they make the same steps in real arithmetic, from fresh state, for real parameters and
dense gradients, whatever the gradients and however the learning rate moves. What the other framework can say is
`Dialect.own`: our row of it takes more. Whether a translation is exact is read off its own words, as the row reads
them.
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

_BOUNDS = ("clip_value", "clip_norm", "clip_global_norm")  # of gradients
_ORDER = (  # in which settings are tried: what others follow from comes before those
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
    """What settings of one dialect are in another framework.

    Attributes:
        source, target: the dialects' names.
        call: the target's own optimizer with the settings in its own words, to paste.
        arguments: those settings, without the ones that the framework composes of other parts.
        exact: whether it makes the same steps.
        findings: what differs, one record each; none if exact.
        notes: what the source does of its own accord, and other things that are no difference between steps.
        rmsprop_call: this package's RMSprop with the settings as they were given: always exact.
        source_settings: the source's settings under our names.
        target_settings: what `call` amounts to, under our names.
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
    """Say settings of the source dialect, in its own or in torch's words, in the target framework's words.

    Numbers stay as they are, but for ε where it stands elsewhere: then 1/d is made the same for v → 0. A weight decay
    that would mean something else is left out, and its finding says how to have it.

    Raises:
        ValueError, TypeError: a dialect, name or value that does not work, with what would.

    >>> found = translate("tensorflow1", "timm", learning_rate=0.048, momentum=0.9, epsilon=1e-3)
    >>> found.exact, found.call
    (True, 'timm.optim.RMSpropTF(params, lr=0.048, alpha=0.9, eps=0.001, momentum=0.9)')
    """
    here, there = find_dialect(source), find_dialect(target)
    meant = _understand(here, settings)
    spoken = _speak(there, meant)
    said = spoken.heard()
    effects = meaning(meant), meaning(said)
    differing = _differing(*effects)
    # What has an effect on one side only differs through the setting that gives it one.
    named = {name for name in differing if name not in _DEPENDENT or all(name in effect for effect in effects)}
    typed = _typed(settings)
    return Translation(
        source=here.name,
        target=there.name,
        call=spoken.call(),
        arguments=spoken.arguments(),
        exact=not differing,
        findings=findings(here, meant, there, said, named),
        notes=tuple(_notes(here, settings, meant, there, said)),
        rmsprop_call=f'RMSprop(params, dialect="{here.name}"{typed and ", "}{typed})',
        source_settings=meant,
        target_settings=said,
    )


def meaning(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of all settings under our names those that have an effect: equal meanings make equal steps."""
    kept = {
        name: settings[name] for name in ("lr", "alpha", "eps", "centered", "momentum", "maximize", "weight_decay")
    }
    kept |= {name: settings[name] for name in CLIPS if settings[name] is not None}
    clips = any(name in kept for name in _BOUNDS)
    mode = settings["weight_decay_mode"]
    effective = {
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
    return kept | {name: settings[name] for name, matters in effective.items() if matters}


def _close(one: Any, other: Any) -> bool:
    """Equal, up to the rounding of a unit such as 1/ε."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-15)
    return bool(one == other)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """The names whose values differ, or that one of the two lacks."""
    return {
        name for name in {*one, *other} if name not in one or name not in other or not _close(one[name], other[name])
    }


def _understand(row: Dialect, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings under our names, checked, of what is given in the row's words."""
    read = {name: _checked(name, value) for name, value in read_arguments(row, given).items()}
    full = row.complete(read, read)
    if full["lr"] is None:
        raise TypeError(
            f"dialect={row.name!r} has no default learning rate, as {row.call or row.title} has none; "
            f"give {row.argument('lr')}=..., such as 1e-3"
        )
    full = {name: _checked(name, value) for name, value in {"maximize": False, **full}.items()}
    if full["eps"] and not 1e-120 <= full["eps"] <= 1e120:
        raise ValueError(f"Invalid epsilon value: {full['eps']:g}; translation takes 0, or 1e-120 to 1e120")
    if full["nesterov"] and not full["momentum"]:
        raise ValueError("nesterov=True looks ahead along the momentum, which is 0; give momentum > 0, such as 0.9")
    if full["weight_decay_mode"] == "corrected" and not full["reference_lr"]:
        raise ValueError(
            'weight_decay_mode="corrected" divides by the learning rate, which is 0; give reference_lr=...'
        )
    return full


def _checked(name: str, value: Any) -> Any:
    """A setting of ours in its plain type, or the sentence that says what it takes."""
    if name in HYPERS:
        return check_number(name, value)
    if name in (*CLIPS, "reference_lr"):
        return None if value is None else check_number(name, value)
    if name in (*SWITCHES, "maximize"):
        return check_switch(name, value)
    if name == "sparse":
        if value not in (None, *SPARSE_MODES):
            raise ValueError(f"Invalid sparse: {value!r}; it takes 'lazy', 'dense' or None")
        return value
    return check_flag(name, value)


class _Spoken:
    """Settings put into a framework's own words, one after the other, as far as it has any."""

    def __init__(self, row: Dialect, meant: Mapping[str, Any]) -> None:
        self.row, self.meant = row, meant
        self.said = {name: meant[name] for name in ("lr", "alpha", "eps") if name not in row.own.fixed}
        self.parts: dict[str, str] = {}  # settings that are composed -> the key of how
        if "eps" in self.said:
            self.said["eps"] = max(meant["eps"], row.own.least_eps)

    def arguments(self) -> dict[str, Any]:
        """What is said by the optimizer's own arguments."""
        return write_arguments(self.row, {name: value for name, value in self.said.items() if name not in self.parts})

    def heard(self) -> dict[str, Any]:
        """All settings that these words amount to, as the row reads them."""
        read = read_arguments(self.row, self.arguments()) | {name: self.said[name] for name in self.parts}
        return {"maximize": False, **self.row.complete(read, read)}

    def try_to_say(self, name: str, value: Any) -> None:
        """Say one setting more, if there is a word for it and it is understood, beside all that was said."""
        said, parts = dict(self.said), dict(self.parts)
        key = self._part(name)
        if key is None and name not in self.row.own.takes:
            return
        self.said[name] = value
        if key is not None:
            self.parts[name] = key
        try:
            heard = self.heard()
        except (TypeError, ValueError):
            heard = {}
        names = [word.partition("=")[0] for word in self._extra_words()]
        understood = heard and all(_close(heard[n], v) for n, v in self.said.items())
        if not understood or len({*names, *self.arguments()}) < len(names) + len(self.arguments()):
            self.said, self.parts = said, parts

    def _part(self, name: str) -> str | None:
        """How the framework composes a setting, if it does."""
        composed = self.row.own.composed
        both = {
            "momentum nesterov": name in ("momentum", "nesterov") and self.meant["nesterov"],
            "weight_decay l1": name.startswith("weight_decay") and self.meant["weight_decay_mode"] == "l1",
        }
        found = next((key for key, wanted in both.items() if wanted and key in composed), None)
        return found or (name if name in composed and name not in self.row.own.takes else None)

    def _templates(self) -> list[str]:
        used = set(self.parts.values())
        return [template for key, template in self.row.own.composed.items() if key in used]

    def _extra_words(self) -> list[str]:
        return [text for text in self._templates() if "{call}" not in text and "{words}" not in text]

    def call(self) -> str:
        """The code that makes the optimizer."""
        row, own = self.row, self.row.own
        numbers = {name: self._shown(value) for name, value in self.heard().items()}
        words = [own.pair.format(word, self._shown(value)) for word, value in self.arguments().items()]
        joined = own.between.join([*words, *(text.format(**numbers) for text in self._extra_words())])
        alone = f"{row.call}({{words}})" if row.call else f'RMSprop(params, dialect="{row.name}", {{words}})'
        text = (own.text or alone).format(words=joined, **numbers)
        for template in self._templates():
            if "{call}" in template or "{words}" in template:
                text = template.format(call=text, words=joined, **numbers)
        return text

    def _shown(self, value: Any) -> str:
        return self.row.own.truth[value] if isinstance(value, bool) else repr(value)


def _speak(row: Dialect, meant: Mapping[str, Any]) -> _Spoken:
    """The nearest that the framework can say: first the switches, then what depends on them."""
    spoken = _Spoken(row, meant)
    wanted = meaning(meant)
    for name in _ORDER:
        heard = spoken.heard()
        if name not in wanted or _close(heard[name], wanted[name]):
            continue
        if name == "weight_decay" and not _decays_alike(heard["weight_decay_mode"], wanted["weight_decay_mode"]):
            continue
        spoken.try_to_say(name, wanted[name])
    mode = spoken.heard()["eps_mode"]
    if "eps" in spoken.said and "eps_mode" in wanted and mode != wanted["eps_mode"]:
        matched = matched_eps(wanted["eps_mode"], wanted["eps"], mode)
        spoken.said["eps"] = max(matched, row.own.least_eps)
    return spoken


def _decays_alike(there: str, here: str) -> bool:
    """Whether one number means nearly the same as a weight decay of both kinds."""
    return there == here or {there, here} == {"decoupled", "corrected"}


def _notes(
    here: Dialect, given: Mapping[str, Any], meant: Mapping[str, Any], there: Dialect, said: Mapping[str, Any]
) -> list[str]:
    """What nobody typed and counts all the same."""
    read, effective, plain = read_arguments(here, given), meaning(meant), {"maximize": False, **here.defaults()}
    silent = {
        name: meant[name] for name in ("lr", "alpha", "eps", "momentum") if name not in read and name in effective
    }
    followed = {
        name: condition.setting for condition in here.when for name in condition.then if meant[condition.setting]
    }
    notes = []
    own = _typed(
        write_arguments(
            here, {name: v for name, v in silent.items() if v == plain[name] and (v or name != "momentum")}
        )
    )
    if own:
        notes.append(f"Not given, so {here.name}'s own: {own}.")
    notes += [
        f"In {here.name} {_typed(write_arguments(here, {setting: meant[setting]}))} brings "
        f"{_typed({name: meant[name]})}."
        for name, setting in followed.items()
        if name in effective and name not in read and meant[name] != plain[name]
    ]
    notes += [
        f"{word}={value!r} becomes {meant['eps']:g} in {here.name}."
        for word, value in given.items()
        if here.arguments.get(word, word) == "eps" and not value and meant["eps"]
    ]
    known = {"lr", "alpha", "eps", *here.own.takes, *" ".join(here.own.composed).split()} - set(here.own.fixed)
    known |= {"weight_decay_mode"} if "weight_decay l1" in here.own.composed else set()
    beyond = {n: meant[n] for n in read if n in effective and n not in known and not _close(meant[n], plain[n])}
    if beyond:
        notes.append(
            f"{here.title.split(',')[0]} itself cannot be told {_typed(beyond)}; translated is what this package "
            f"computes with it under dialect={here.name!r}."
        )
    if 0 < said["eps"] < SMALLEST:
        notes.append(f"float32 holds no number as small as {said['eps']:g}: there it counts as 0, or nearly so.")
    if meant["sparse"] and meant["sparse"] != said["sparse"]:
        notes.append(
            f"Sparse gradients are {meant['sparse']} in {here.name} and {said['sparse'] or 'refused'} in "
            f"{there.name}; the rest is about dense ones."
        )
    return notes


def _typed(words: Mapping[str, Any]) -> str:
    return ", ".join(f"{word}={value!r}" for word, value in words.items())
