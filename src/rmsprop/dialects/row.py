"""The definition of a dialect: the fields of a row."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from rmsprop.printing import shown
from rmsprop.spec import CLIPS, Hyper, Rule

HYPERS = tuple(f.name for f in fields(Hyper) if f.default is MISSING or f.name in ("momentum", "weight_decay"))
SWITCHES = tuple(f.name for f in fields(Rule) if f.name not in ("momentum", "maximize"))


@dataclass(frozen=True)
class Value:
    """An argument whose values differ from ours.

    Attributes:
        read: the framework's value -> ours, or a mapping of several of our settings.
        write: our value -> the framework's.
    """

    read: Callable[[Any], Any]
    write: Callable[[Any], Any] = lambda value: value


ANYTHING = object()  # for a label, such as the optimizer's name: no value has an effect


@dataclass(frozen=True)
class Limit:
    """An argument that works with certain values only.

    Attributes:
        neutral: the value, or a tuple of values, with which the argument has no effect.
        reason: the reason why no other value works, and what to give instead.
        unless: a setting of ours that lifts the limit when it is on.
    """

    neutral: Any
    reason: str
    unless: str = ""


@dataclass(frozen=True)
class When:
    """Defaults that depend on a setting: when `setting` is on, `then` are the defaults."""

    setting: str
    then: Mapping[str, Any]


@dataclass(frozen=True)
class Own:
    """The arguments of the framework's own optimizer; our dialect may accept more.

    Attributes:
        takes: settings of ours, besides lr, alpha and eps, that the optimizer has arguments for.
        fixed: those of lr, alpha and eps that cannot be set.
        composed: settings that other parts of the framework implement -> the code for each, in the order of wrapping.
            A template wraps {call}, uses the {arguments} or is one more argument; settings stand in braces. The keys
            "momentum nesterov" and "weight_decay l1" stand for both settings at once.
        text: the template of its call, with {arguments} or settings by name; "" means call(arguments).
        pair: the template of an argument with its value.
        between: the separator of two arguments.
        truth: the literals of False and True.
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
        name: the value of `dialect=`.
        title: the framework's full name.
        rule: its switches. `momentum` in it is ignored; the number decides.
        hyper: its default numbers; the learning rate is None if the framework requires one.
        source: the work, or the file and version, that defines the formula and the defaults.
        arguments: its argument names -> ours, where they differ from torch's.
        values: converters for the arguments whose values differ from ours.
        refused: ambiguous names -> the reason, and what to give instead.
        limits: arguments that work with certain values only.
        exclusive: arguments of which at most one may be given.
        requires: flags -> the flag without which the framework ignores them.
        idle: arguments -> the flag without which they have no effect, in the framework and here.
        when: defaults that depend on other settings.
        settings: further defaults that differ from torch's: `sparse`, `clip_after_decay`, `clip_value_last`.
        v_init_is_eps: whether v starts at ε.
        states: its state names -> ours, in its order. Required by the tests, as call, example and traps are.
        buffer_sign: -1 if its momentum buffer has the sign of the step, which goes downhill.
        keeps_corrected: whether its state holds the averages divided by 1 − alphaᵗ.
        complex: the reason why complex parameters are refused: the framework squares them differently.
        call: the name of its optimizer.
        own: the arguments of that optimizer.
        example: settings under its argument names, for the docs.
        traps: pitfalls for users who come from it or go to it.
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
    idle: Mapping[str, str] = field(default_factory=dict)
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
        """Return every number, switch and further setting of the dialect, under our names."""
        return self.complete({}, ())

    def complete(self, given: Mapping[str, Any], explicit: Any) -> dict[str, Any]:
        """Return the dialect's defaults, overridden by given settings, with all that follows from both.

        Args:
            given: settings under our names.
            explicit: the names of those that the user gave; settings that follow from others do not replace them.
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
        """Return the framework's first argument name for a setting of ours, or torch's."""
        return next((theirs for theirs, name in self.arguments.items() if name == ours), ours)


# Defaults of what torch does beyond the nine lines: nothing.
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
    """Return a converter under which None stands for a default, as in momentum=None."""
    return Value(lambda value: default if value is None else value)


def when_true(yes: Any, no: Any) -> Value:
    """Return a converter for a flag that selects one of two values of a switch of ours."""

    def _read(value: Any) -> Any:
        if not isinstance(value, bool):
            raise TypeError(f"{shown(value)} is neither True nor False")
        return yes if value else no

    return Value(_read, lambda value: value == yes)
