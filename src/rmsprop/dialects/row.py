"""What a row of the table of dialects holds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from rmsprop.printing import shown
from rmsprop.spec import CLIPS, Hyper, Rule

HYPERS = tuple(f.name for f in fields(Hyper) if f.name not in ("reference_lr", "max_update"))
SWITCHES = tuple(f.name for f in fields(Rule) if f.name not in ("momentum", "maximize"))


@dataclass(frozen=True)
class Value:
    """A word whose values are not ours.

    Attributes:
        read: the framework's value -> ours; or a mapping of several of our settings.
        write: our value -> the framework's.
    """

    read: Callable[[Any], Any]
    write: Callable[[Any], Any] = lambda value: value


ANYTHING = object()  # a label, such as the optimizer's name: no value of it has an effect


@dataclass(frozen=True)
class Limit:
    """A word that works with few values only.

    Attributes:
        neutral: the value, or a tuple of those, with which the word may as well be left out.
        reason: why no other works, and what to write instead.
        unless: a setting of ours that lifts the limit where it is on.
    """

    neutral: Any
    reason: str
    unless: str = ""


@dataclass(frozen=True)
class When:
    """What the framework makes of a setting: where `setting` is on, `then` are the defaults."""

    setting: str
    then: Mapping[str, Any]


@dataclass(frozen=True)
class Own:
    """What the framework's own optimizer can be told; our row may accept more than that.

    Attributes:
        takes: settings of ours, beside lr, alpha and eps, that are arguments of it.
        fixed: of lr, alpha and eps, what nobody can move there.
        composed: settings that other parts of the framework do -> how that is written, in the order of wrapping:
            around {call} or with {words}, or as one more word; settings stand in braces. The keys
            "momentum nesterov" and "weight_decay l1" are for both at once.
        text: how its call is written, with {words} or settings by name; "" where it is call(words).
        pair: how a word and its value are joined.
        between: what stands between two words.
        truth: how it writes False and True.
        least_eps: the smallest ε that it takes.
    """

    takes: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    composed: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    pair: str = "{}={}"
    between: str = ", "
    truth: tuple[str, str] = ("False", "True")
    least_eps: float = 0.0


@dataclass(frozen=True)
class Dialect:
    """One framework version's RMSprop.

    Attributes:
        name: what `dialect=` takes.
        title: the framework, in words.
        rule: its switches. `momentum` in it is ignored: the number decides.
        hyper: its default numbers; None for a learning rate that it asks for.
        source: where the formula and the defaults were read.
        arguments: its argument names -> ours, where they differ from torch's.
        values: of its words, and of torch's under it, those whose values are not ours.
        refused: names that cannot be taken under this dialect -> the reason and what to write instead.
        limits: names that can be taken with few values only.
        exclusive: names of which one at most may be given.
        requires: flags that the framework reads only where another flag is on, which they say more of.
        when: what some settings imply.
        settings: further defaults that differ from torch's: `sparse`, `clip_after_decay`, `clip_value_last`.
        v_init_is_eps: whether v starts at ε.
        states: its state names -> ours, in its order.
        buffer_sign: -1 where its momentum buffer holds the step itself, which goes downhill.
        keeps_corrected: whether its averages are kept divided by 1 − alphaᵗ.
        complex: why complex parameters are refused: the framework squares them in another way.
        call: how its optimizer is made there.
        own: what that optimizer can be told.
        example: settings in its words, for the docs.
        traps: what surprises those who come from it, or go to it.
    """

    name: str
    title: str
    rule: Rule
    hyper: Hyper
    source: str
    arguments: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Value] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, Limit] = field(default_factory=dict)
    exclusive: tuple[str, ...] = ()
    requires: Mapping[str, str] = field(default_factory=dict)
    when: tuple[When, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    v_init_is_eps: bool = False
    states: Mapping[str, str] = field(default_factory=dict)
    buffer_sign: int = 1
    keeps_corrected: bool = False
    complex: str = ""
    call: str = ""
    own: Own = field(default_factory=Own)
    example: str = ""
    traps: tuple[str, ...] = ()

    def defaults(self) -> dict[str, Any]:
        """Every number, switch and further setting of the dialect, under our names."""
        return self.complete({}, ())

    def complete(self, given: Mapping[str, Any], explicit: Any) -> dict[str, Any]:
        """The dialect's defaults overridden by what was given, and what follows from both.

        Args:
            given: settings under our names.
            explicit: which of them were asked for: what follows from other settings does not replace these.
        """
        own = {name: getattr(self.hyper, name) for name in HYPERS}
        own |= {name: getattr(self.rule, name) for name in SWITCHES}
        own |= {**UNCLIPPED, **self.settings}
        full = {**own, **given}
        implied = {name for condition in self.when for name in condition.then} - set(explicit)
        full |= {name: own[name] for name in implied}
        for condition in self.when:
            if full[condition.setting]:
                full |= {name: value for name, value in condition.then.items() if name in implied}
        if self.v_init_is_eps and "square_avg_init" not in explicit:
            full["square_avg_init"] = full["eps"]
        if "reference_lr" not in explicit:
            corrected = full["weight_decay_mode"] == "corrected" and full["lr"] is not None
            full["reference_lr"] = float(full["lr"]) if corrected else None
        return full

    def argument(self, ours: str) -> str:
        """What the framework calls a setting of ours: its first name for it, or torch's."""
        return next((theirs for theirs, name in self.arguments.items() if name == ours), ours)


# What torch does beyond the nine lines: nothing.
UNCLIPPED: Mapping[str, Any] = {
    **dict.fromkeys(CLIPS),
    "clip_after_decay": False,
    "clip_value_last": False,
    "sparse": None,
    "reference_lr": None,
}


NEGATIVE_IS_OFF = Value(lambda bound: None if bound is None or bound < 0 else bound)
NONE_IS_OFF = Value(lambda bound: None if bound is None or bound <= 0 else bound)


def optional(default: float) -> Value:
    """None stands for a default, as in momentum=None."""
    return Value(lambda value: default if value is None else value)


def when_true(yes: Any, no: Any) -> Value:
    """A flag of the framework that chooses between two values of a switch of ours."""

    def _read(value: Any) -> Any:
        if not isinstance(value, bool):
            raise TypeError(f"{shown(value)} is neither True nor False")
        return yes if value else no

    return Value(_read, lambda value: value == yes)
