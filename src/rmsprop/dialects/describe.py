"""Descriptions of the dialects, as parts that the docs and the terminal render.

Text, headings and cells are plain, except for backticks around code. No framework's name appears here.
"""

import ast
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rmsprop.dialects import DIALECTS, HYPERS, SWITCHES, UNFIT, Dialect, read_arguments, write_arguments
from rmsprop.dialects.row import ANYTHING, Limit
from rmsprop.spec import CLIPS, WEIGHT_DECAY_MODES, Hyper, Rule

DENOMINATORS = {"outside": "√v + ε", "inside": "√(v + ε)", "both": "√(v + ε) + ε", "floor": "max(√v, ε)"}
_LINE = 118
_SPARSE = {
    "lazy": "lazy: only the rows with a gradient are updated; the other rows keep their averages and momentum "
    '(`sparse="lazy"`)',
    "dense": "dense: a row without a gradient counts as having the gradient 0, so its averages decay and its "
    "momentum "
    'moves it (`sparse="dense"`)',
    None: 'refused unless `sparse="lazy"` or `sparse="dense"` is given',
}
_MEANINGS = {
    "lr": "learning rate, in units of the parameter",
    "alpha": "decay of the averages, unitless; they span about 1/(1−alpha) steps",
    "momentum": "share of the last step that is repeated, unitless",
    "centered": "whether to keep the average gradient and subtract its square",
    "square_avg_init": "initial value of v, in units of g²",
    "eps_mode": "place of ε, line [6]",
    "lr_in_buffer": "whether the momentum buffer includes the learning rate",
    "weight_decay_mode": "kind of weight decay, line [1]",
    "reference_lr": "highest learning rate of the schedule, the divisor in corrected weight decay",
    "clip_value": "bound on each element of the gradient, in units of g",
    "clip_norm": "bound on the norm of each tensor's gradient, in units of g",
    "clip_global_norm": "bound on the norm of all gradients together, in units of g",
    "clip_weights": "bound on each element of the parameter after the step, in units of the parameter",
    "ema": "decay of an average of the weights, unitless, line [10]",
}
_DECAYS = {
    "l2": "adds weight_decay·p to the gradient: in units of g per p",
    "l1": "adds weight_decay·sign(p) to the gradient: in units of g",
    "decoupled": "shrinks p by lr·weight_decay, unitless",
    "corrected": "shrinks p by lr²/reference_lr·weight_decay, unitless",
}


@dataclass(frozen=True)
class Part:
    """A section of a page, in the order of its attributes; empty ones are omitted.

    Attributes:
        heading: the heading, empty if the part continues the one before.
        text: a paragraph.
        code: lines of code; Python if `python`.
        header, rows: a table; a cell may have several lines.
        items: a list of sentences.
    """

    heading: str = ""
    text: str = ""
    code: tuple[str, ...] = ()
    python: bool = False
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    items: tuple[str, ...] = ()


# --- all dialects --------------------------------------------------------------------------------


def overview() -> tuple[Part, ...]:
    """Return tables of the rules and the argument names of all dialects, and the names that are not offered."""
    numbers = "denominator", "v\nstarts", "lr", "decay", "ε", "momentum", "decay\nof p", "sparse"
    return (
        Part(
            "Rules",
            "Inside the root, ε is in units of g²; outside it, in units of g. The learning rate is required where "
            "the framework has no default. The momentum column shows the new buffer: μb + u applies the learning "
            "rate outside the buffer, μb + lr·u inside it. The decay column shows the kind of `weight_decay`. A * "
            "marks a value that depends on another setting; see the dialect's own page.",
            header=("dialect", *numbers),
            rows=tuple((f"`{row.name}`", *_numbers(row)) for row in DIALECTS.values()),
        ),
        Part(
            "Argument names",
            "The names for the learning rate, the decay of the average and ε come first, those for clipping last. "
            "Every dialect also takes torch's names and ours, such as `clip_norm` and `sparse`.",
            header=("dialect", "framework", "its arguments"),
            rows=tuple((f"`{row.name}`", row.title, ticked(own_arguments(row))) for row in DIALECTS.values()),
        ),
        Part(
            "Not offered",
            "These optimizers are called RMSprop but compute something else, so their names raise an error.",
            items=tuple(f"`{name}`: {reason}." for name, reason in UNFIT.items()),
        ),
    )


def _numbers(row: Dialect) -> tuple[str, ...]:
    """Return a dialect's line in the table of rules."""
    implied = {name for condition in row.when for name in condition.then}
    moving = row.complete(_moving(row), _moving(row))
    buffer = "μb + lr·u" if moving["lr_in_buffer"] else "μb + u"
    return (
        denominator(row),
        v_start(row),
        *(number(getattr(row.hyper, name)) for name in ("lr", "alpha", "eps")),
        buffer + "*" * bool({"lr_in_buffer", "nesterov"} & implied) if moving["momentum"] else "none",
        row.rule.weight_decay_mode,
        (row.settings.get("sparse") or "refused") + "*" * ("sparse" in implied),
    )


def denominator(row: Dialect) -> str:
    """Return the dialect's denominator, with a * if it depends on another setting."""
    return DENOMINATORS[row.rule.eps_mode] + "*" * any("eps_mode" in condition.then for condition in row.when)


def v_start(row: Dialect) -> str:
    """Return the initial value of the average of squares."""
    return "ε" if row.v_init_is_eps else number(row.rule.square_avg_init)


def number(value: Any) -> str:
    """Return a number in short notation, such as 1e-8, or "required" for None."""
    if value is None:
        return "required"
    if not 0 < value < 1e-3:
        return f"{value:g}"
    mantissa, _, exponent = f"{value:e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def shown(value: Any) -> str:
    """Return a value as Python code."""
    plain = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number(value) if plain else f'"{value}"' if isinstance(value, str) else repr(value)


def own_arguments(row: Dialect) -> list[str]:
    """Return the dialect's arguments: for the learning rate, the decay and ε, then others, then for clipping."""
    first = [argument for ours in HYPERS[:3] for argument in _arguments_for(row, ours)]
    clips = clip_arguments(row)
    return [*first, *(argument for argument in row.arguments if argument not in (*first, *clips)), *clips]


def clip_arguments(row: Dialect) -> list[str]:
    """Return the framework's own arguments for clipping."""
    names = dict.fromkeys([*row.arguments, *row.values])
    return [name for name in names if row.arguments.get(name, name) in CLIPS]


def _arguments_for(row: Dialect, ours: str) -> list[str]:
    """Return the framework's arguments for a setting of ours, or torch's."""
    return [argument for argument, name in row.arguments.items() if name == ours] or [ours]


def ticked(names: Iterable[str]) -> str:
    """Return names in backticks, joined by commas."""
    return ", ".join(f"`{name}`" for name in names)


# --- one dialect ---------------------------------------------------------------------------------


def describe(row: Dialect) -> tuple[Part, ...]:
    """Return a dialect's page: migration, equation, arguments, state, limits, traps and source."""
    parts = [*_migration(row), *_equations(row), _arguments(row), _states(row), _limits(row), _gradients(row)]
    if row.traps:
        parts.append(Part("Traps", items=row.traps))
    return (*parts, Part("Source", f"{row.source}."))


def _migration(row: Dialect) -> Iterator[Part]:
    there = f"{row.call}({row.example})" if row.call[-1:].isalnum() else f"{row.call or row.title}: {row.example}"
    yield Part(
        "Migration",
        code=(
            f"# {there}",
            "# becomes",
            "from rmsprop import RMSprop",
            "",
            *_call("optimizer = RMSprop(", f'params, dialect="{row.name}"', row.example),
        ),
        python=True,
    )
    plain = DIALECTS["torch"].defaults()
    changed = {name: value for name, value in settings(row, example(row)).items() if value != plain[name]}
    arguments = (f"{name}={shown(value)}" for name, value in changed.items())
    yield Part(
        text="The same under torch's names and ours:", code=_call("RMSprop(", "params", *arguments), python=True
    )


def _call(opening: str, *arguments: str) -> tuple[str, ...]:
    """Return a call on one line, or with an argument per line if that is too long."""
    line = f"{opening}{', '.join(arguments)})"
    return (line,) if len(line) <= _LINE else (opening, *(f"    {argument}," for argument in arguments), ")")


def example(row: Dialect) -> dict[str, Any]:
    """Return the settings in the dialect's example, under the framework's argument names."""
    call = ast.parse(f"dict({row.example})", mode="eval").body
    assert isinstance(call, ast.Call)
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}


def settings(row: Dialect, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings under our names, given the dialect's arguments."""
    read = read_arguments(row, given)
    return row.complete(read, read)


def _equations(row: Dialect) -> Iterator[Part]:
    """Yield the equation with the default numbers, then under each setting that changes the rule or adds to it."""
    base = _equation(row, {})
    yield Part("Equation with the default numbers", code=base)
    for condition in row.when:
        given = {condition.setting: _MOVING.get(condition.setting, True)}
        yield Part(text=f"With `{_setting(row, given)}`, the rule changes to:", code=_equation(row, given))
    changes = []
    for given in _variations(row):
        lines = [line for line in _equation(row, given) if line not in base]
        changes.append((f"`{_setting(row, given)}`", "\n".join(f"`{line}`" for line in lines)))
    yield Part(header=("with", "lines"), rows=tuple(changes))


_MOVING: Mapping[str, Any] = {"momentum": 0.9}


def _moving(row: Dialect) -> dict[str, Any]:
    """Return settings that turn momentum on, or none if the framework lacks it."""
    limit = row.limits.get("momentum")
    if limit is None:
        return {**_MOVING}
    return {limit.unless: True, **_MOVING} if limit.unless else {}


def _variations(row: Dialect) -> Iterator[dict[str, Any]]:
    """Yield settings that are off by default and do not change the rest of the rule."""
    elsewhere = {*row.limits, *(condition.setting for condition in row.when)}
    for given in (_MOVING, {"centered": True}):
        (name,) = given
        if name not in elsewhere and not row.defaults()[name]:
            yield {**given}
    yield {"weight_decay": 1e-4}
    if "weight_decay_mode" in row.arguments.values():
        for mode in WEIGHT_DECAY_MODES:
            if mode != row.rule.weight_decay_mode and _has_argument(row, {"weight_decay_mode": mode}):
                yield {"weight_decay": 1e-4, "weight_decay_mode": mode}


def _has_argument(row: Dialect, given: dict[str, Any]) -> bool:
    """Return whether the dialect has arguments for these settings of ours."""
    try:
        return read_arguments(row, write_arguments(row, given)) == given
    except ValueError:
        return False


def _setting(row: Dialect, given: Mapping[str, Any]) -> str:
    """Return our settings as an argument list of the dialect."""
    return ", ".join(f"{argument}={shown(value)}" for argument, value in write_arguments(row, given).items())


def _equation(row: Dialect, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the lines of the equation in force, with their numbers."""
    full = row.complete(given, given)
    rule = Rule(**{name: full[name] for name in SWITCHES}, momentum=full["momentum"] != 0)
    return rule.equation(Hyper(**{name: full[name] for name in HYPERS}, reference_lr=full["reference_lr"]))


def _arguments(row: Dialect) -> Part:
    """Return a table of every argument: its name here, its default and its meaning."""
    listed = [*HYPERS, "centered", *row.arguments.values(), *(name for name in row.values if name in CLIPS)]
    rows = []
    for ours in dict.fromkeys(listed):
        if ours in row.limits and not row.limits[ours].unless:
            continue
        for argument in _arguments_for(row, ours):
            default = row.defaults().get(ours)
            written = _written(row, argument, default)
            same = written in (default, None) or default is None
            here = f"`{ours}`" if same else f"`{ours}={shown(default)}`"
            rows.append((f"`{argument}`", here, _default(ours, written), _meaning(row, ours)))
    note = "A name that is the same here may be our addition, which the framework itself lacks."
    return Part("Arguments", note, header=("argument", "here", "default", "meaning and unit"), rows=tuple(rows))


def _written(row: Dialect, argument: str, value: Any) -> Any:
    """Return a value of ours as the value of that argument of the framework."""
    written = row.values[argument].write(value) if argument in row.values and value is not None else value
    return written.get(argument) if isinstance(written, Mapping) else written


def _default(ours: str, value: Any) -> str:
    """Return a default as a cell of the table."""
    if value is None:
        return {"lr": "required", "reference_lr": "lr at the start"}.get(ours, "off")
    return shown(value)


def _meaning(row: Dialect, ours: str) -> str:
    """Return the meaning of a setting, with its unit."""
    if ours == "eps":
        texts = [_eps_meaning(row.rule.eps_mode, row.hyper.eps)]
        for condition in row.when:
            mode = condition.then.get("eps_mode", row.rule.eps_mode)
            if mode != row.rule.eps_mode:
                texts.append(f"with `{condition.setting}`: {_eps_meaning(mode, row.hyper.eps)}")
        return ";\n".join(texts)
    if ours == "weight_decay":
        return _DECAYS[row.rule.weight_decay_mode]
    if ours == "momentum" and (limit := row.limits.get(ours)):
        return f"{_MEANINGS[ours]}; used only with `{limit.unless}=True`"
    return _MEANINGS[ours]


def _eps_meaning(mode: str, eps: float) -> str:
    """Return the place and unit of ε, and the size of √v below which it caps steps."""
    if eps == 0:
        return "none; a gradient of 0 makes a step of 0"
    size = number(float(f"{math.sqrt(eps):.3g}"))
    return {
        "outside": f"added to √v, in units of g; caps steps where √v is below {number(eps)}",
        "inside": f"added to v inside the root, in units of g²; caps steps where √v is below √ε = {size}",
        "both": f"added to v, in units of g², and to the root, in units of g; caps steps where √v is below "
        f"√ε = {size}",
        "floor": f"lower bound of the denominator, in units of g; caps steps where √v is below {number(eps)}",
    }[mode]


def _states(row: Dialect) -> Part:
    """Return a table of the state's names, in the dialect's order, with their meanings."""
    moving = row.complete(_moving(row), _moving(row))
    kept = {"grad_avg": "if centered", "momentum_buffer": "with momentum", "ema": "if averaged"}
    velocity = "b, the velocity: a sum of steps, in units of the parameter, including the learning rate"
    meanings = {
        "step": "number of steps taken",
        "square_avg": f"v, the average of g², in units of g²; starts at {v_start(row)}",
        "grad_avg": "m, the average of g, in units of g",
        "ema": "e, the average of the weights, in units of the parameter",
        "momentum_buffer": velocity
        if moving["lr_in_buffer"]
        else "b, a sum of g/d, unitless, without the learning rate",
    }
    if row.buffer_sign < 0:
        meanings["momentum_buffer"] += "; the framework stores its negative"
    rows = tuple(
        (str(i), f"`{theirs}`", f"`{ours}`", kept.get(ours, "always"), meanings[ours])
        for i, (theirs, ours) in enumerate(row.states.items(), 1)
    )
    counts = "" if "step" in row.states.values() else "The framework keeps no step count; `step` counts here."
    return Part("State", counts, header=("", "its name", "here", "kept", "meaning"), rows=rows)


def _limits(row: Dialect) -> Part:
    """Return the arguments that are refused or limited to certain values, with the reasons."""
    items = [f"`{argument}` is refused: {reason}." for argument, reason in row.refused.items()]
    alike: dict[str, list[str]] = {}
    for argument, limit in row.limits.items():
        alike.setdefault(f"{_works_with(limit)}: {limit.reason}.", []).append(argument)
    items += [f"{ticked(arguments)} {sentence}" for sentence, arguments in alike.items()]
    if row.exclusive:
        items.append(f"At most one of {ticked(row.exclusive)} may be given.")
    items += [f"`{argument}=True` requires `{flag}=True`." for argument, flag in row.requires.items()]
    items += [f"`{argument}` has no effect without `{flag}=True`." for argument, flag in row.idle.items()]
    if row.complex:
        items.append(f"Complex parameters are refused: {row.complex}; here they are pairs of independent reals.")
    else:
        items.append("Complex parameters are pairs of independent reals.")
    return Part("Refused and limited", items=tuple(items))


def _works_with(limit: Limit) -> str:
    if limit.neutral is ANYTHING:
        return "may have any value"
    values = limit.neutral if isinstance(limit.neutral, tuple) else (limit.neutral,)
    if set(values) == {True, False}:
        return "may be True or False, without effect"
    works = " or ".join(f"`{value!r}`" for value in values)
    return f"must be {works}" + (f", unless `{limit.unless}=True`" if limit.unless else "")


def _gradients(row: Dialect) -> Part:
    """Return the order of clipping and the meaning of sparse gradients."""
    full = row.defaults()
    own = clip_arguments(row)
    items = [f"Its own clipping arguments: {ticked(own)}." if own else "It has no clipping arguments of its own."]
    value, *norms, weights = (f"`{row.argument(name)}`" for name in CLIPS)
    order = [*norms, value] if full["clip_value_last"] else [value, *norms]
    decay = "weight decay [1]"
    order = [decay, *order] if full["clip_after_decay"] else [*order, decay]
    items.append(f"Order: {', then '.join([*order, 'the step', weights])}.")
    items.append(f"Sparse gradients are {_SPARSE[full['sparse']]}.")
    for condition in row.when:
        if "sparse" in condition.then:
            items.append(f"With `{condition.setting}`, they are {_SPARSE[condition.then['sparse']]}.")
    return Part("Clipping and sparse gradients", items=tuple(items))
