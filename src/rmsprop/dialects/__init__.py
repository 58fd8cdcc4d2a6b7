"""RMSprop as each framework computes it, one row per dialect, with the framework's own argument names.

A row is the whole definition of the rule. The constructor, the command line, the conversions and the docs read it.
Beside it, conversion/layout.py names the frameworks whose tensors have another layout. To add a dialect, see "Where
to edit" in CONTRIBUTING.md.
"""

import difflib
from collections.abc import Mapping
from numbers import Number
from typing import Any

from rmsprop.dialects import historic, jax, others, papers, pytorch, tensorflow
from rmsprop.dialects.row import ANYTHING, HYPERS, SWITCHES, UNCLIPPED, Dialect
from rmsprop.printing import MOST, printable, shown
from rmsprop.spec import CARE, CLIPS

__all__ = [
    "DIALECTS",
    "FOREIGN",
    "HYPERS",
    "SWITCHES",
    "UNCLIPPED",
    "UNFIT",
    "Dialect",
    "find_dialect",
    "read_arguments",
    "unknown_argument",
    "write_arguments",
]

_ROWS = {row.name: row for module in (papers, tensorflow, jax, pytorch, others, historic) for row in module.ROWS}
DIALECTS: Mapping[str, Dialect] = {"torch": _ROWS["torch"], **_ROWS}

UNFIT = historic.UNFIT

# Names that users may try -> the dialects that they may mean.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "pytorch": ("torch",),
    "libtorch": ("torch",),
    "tf": ("tensorflow1", "keras2", "keras3"),
    "tf1": ("tensorflow1",),
    "tensorflow": ("tensorflow1", "keras2", "keras3"),
    "tensorflow2": ("keras2", "keras3"),
    "keras": ("keras1", "keras2", "keras3"),
    "tf_keras": ("keras3", "keras2"),
    "tf.keras": ("keras2", "keras3"),
    "rmsproptf": ("timm",),
    "rmsproptflike": ("sb3",),
    "stable_baselines3": ("sb3",),
    "bnb": ("bitsandbytes",),
    "mxnet": ("mxnet1", "mxnet2"),
    "hinton": ("hinton2012",),
    "graves": ("graves2013", "chainer_graves"),
    "dqn": ("dqn2015",),
    "a3c": ("a3c2016",),
    "sonnet": ("sonnet2",),
    "pylearn2": ("blocks",),
    "optimisers.jl": ("flux",),
    "nd4j": ("dl4j",),
}

# Argument names of other frameworks -> our names, for error messages only.
FOREIGN: Mapping[str, str] = {
    **{argument: ours for row in reversed(tuple(DIALECTS.values())) for argument, ours in row.arguments.items()},
    "decay": "alpha",
    "gamma": "alpha",
    "beta": "alpha",
    "beta2": "alpha",
    "betas": "alpha",
    "smoothing": "alpha",
    "mu": "momentum",
    "delta": "eps",
    "initial_accumulator": "square_avg_init",
    "initial_accumulator_value": "square_avg_init",
    "decoupled_weight_decay": "weight_decay_mode",
}

_OURS = {*HYPERS, *SWITCHES, *UNCLIPPED, "maximize", "ema"}


def find_dialect(name: Any) -> Dialect:
    """Return the dialect of that name.

    Raises:
        ValueError: the name is unknown; the message lists the dialects, or the reason why this one is not offered.
    """
    if isinstance(name, str) and name in DIALECTS:
        return DIALECTS[name]
    if isinstance(name, str) and name.lower() in UNFIT:
        raise ValueError(f"dialect={name!r} is not offered: {UNFIT[name.lower()]}")
    similar: tuple[str, ...] = ()
    if isinstance(name, str) and len(name) <= MOST:
        similar = _ALIASES.get(name.lower(), ()) or tuple(difflib.get_close_matches(name, DIALECTS, n=1))
    hint = f" (did you mean {' or '.join(map(repr, similar))}?)" if similar else ""
    raise ValueError(f"Unknown dialect: {shown(name)}{hint}; choose one of {', '.join(map(repr, DIALECTS))}")


def read_arguments(dialect: Dialect, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under our names, given arguments under the dialect's or torch's names.

    Raises:
        TypeError: a name is ambiguous in this dialect, belongs to another framework or is unknown, or two names set
            one thing; the message has the right name.
        ValueError: the framework does not take a value, or this package cannot follow it; the message has the reason.
    """
    given = {n: value for n, value in given.items() if n not in dialect.idle or given.get(dialect.idle[n])}
    depends = {**dialect.requires, **dialect.idle}  # an argument -> the flag whose setting it replaces
    exclusive = [argument for argument in dialect.exclusive if given.get(argument) is not None]
    if len(exclusive) > 1:
        got = ", ".join(f"{argument}={shown(given[argument])}" for argument in exclusive)
        raise ValueError(f"dialect={dialect.name!r} takes one of {', '.join(dialect.exclusive)}; got {got}")
    read: dict[str, Any] = {}
    names: dict[str, str] = {}  # a setting of ours -> the argument that set it
    for argument, flag in dialect.requires.items():
        on = [isinstance(given.get(name), bool | Number) and bool(given[name]) for name in (argument, flag)]
        if on == [True, False]:
            raise ValueError(
                f"{argument}={shown(given[argument])} does not work under dialect={dialect.name!r} without "
                f"{flag}=True, since the framework ignores it; give both, or leave it out"
            )
    for argument, value in sorted(given.items(), key=lambda item: item[0] in depends):
        if argument in dialect.refused:
            raise TypeError(
                f"{argument}={shown(value)} is ambiguous under dialect={dialect.name!r}: {dialect.refused[argument]}"
            )
        ours = dialect.arguments.get(argument, argument)
        if ours not in _OURS and argument not in dialect.limits:
            raise TypeError(unknown_argument(dialect, argument, value))
        if argument in dialect.limits and ours not in _OURS:
            continue
        for name, setting in _read_value(dialect, argument, ours, value).items():
            if name in read and depends.get(argument) != names[name]:
                raise TypeError(
                    f"{names[name]}={shown(given[names[name]])} and {argument}={shown(value)} both set {name} under "
                    f"dialect={dialect.name!r}; give one of them"
                )
            read[name], names[name] = setting, argument
    for argument in _check_limits(dialect, given, read):
        read.pop(dialect.arguments.get(argument, argument), None)
    return read


def _read_value(dialect: Dialect, argument: str, ours: str, value: Any) -> Mapping[str, Any]:
    """Return what one argument sets, under our names."""
    if argument not in dialect.values:
        return {ours: value}
    try:
        read = dialect.values[argument].read(value)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"Invalid {argument}: {shown(value)} under dialect={dialect.name!r}: {str(error)[:MOST]}"
        ) from error
    return read if isinstance(read, Mapping) else {ours: read}


def _check_limits(dialect: Dialect, given: Mapping[str, Any], read: Mapping[str, Any]) -> list[str]:
    """Return the arguments that have no effect, among those with limited values.

    Raises: ValueError if one of them has a value that does not work.
    """
    idle = []
    for argument, limit in dialect.limits.items():
        if argument not in given or (limit.unless and read.get(limit.unless)):
            continue
        idle.append(argument)
        if limit.neutral is ANYTHING:
            continue
        neutral = limit.neutral if isinstance(limit.neutral, tuple) else (limit.neutral,)
        if any(_equal(given[argument], value) for value in neutral):
            continue
        raise ValueError(
            f"{argument}={shown(given[argument])} does not work under dialect={dialect.name!r}: {limit.reason}"
        )
    return idle


def _equal(value: Any, neutral: Any) -> bool:
    return (value is None or isinstance(value, str | Number)) and bool(value == neutral)


def write_arguments(dialect: Dialect, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return our settings as the dialect's own arguments: the inverse of `read_arguments`."""
    arguments: dict[str, Any] = {}
    for ours, value in settings.items():
        argument = dialect.argument(ours)
        written = dialect.values[argument].write(value) if argument in dialect.values else value
        arguments.update(written if isinstance(written, Mapping) else {argument: written})
    return arguments


def unknown_argument(dialect: Dialect, argument: str, value: Any) -> str:
    """Return the error message for an unknown argument: the framework that it belongs to, and the right name."""
    ours = FOREIGN.get(argument)
    assignment = f"{printable(argument[:MOST])}={shown(value)}"
    if ours is None:
        known = [*dialect.arguments, *(h for h in HYPERS if h not in dialect.refused), *SWITCHES, *CLIPS, *CARE]
        known.append("maximize")
        near = difflib.get_close_matches(argument[:MOST], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
        return f"RMSprop got an unexpected setting {assignment} under dialect={dialect.name!r}; {hint}"
    if argument == "betas" and isinstance(value, list | tuple) and len(value) == 2:
        second = f"{dialect.argument('alpha')}={shown(value[1], 30)}"
        return (
            f"RMSprop takes no {assignment}, which are Adam's; the second corresponds to RMSprop's decay: write "
            f"{second} here (the first averages gradients, which RMSprop does not do)"
        )
    owners = [row for row in DIALECTS.values() if argument in row.arguments and row is not dialect]
    owners.sort(key=lambda row: row.name != "keras3")  # the most used one comes first
    owner = f"dialect={owners[0].name!r} has that name" if owners else "another framework's RMSprop has that name"
    settings = {row.arguments[argument] for row in owners} or {ours}
    right = " or ".join(f"{dialect.argument(name)}=..." for name in sorted(settings))
    return f"RMSprop takes no {assignment} under dialect={dialect.name!r}: {owner}; write {right} here"
