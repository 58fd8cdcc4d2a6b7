"""A dialect in words: what the docs and the terminal show of a row, as parts that either of them can render.

Text, headings and cells are plain, but for backticks around code. Nothing here knows a framework's name.
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
    "lazy": "lazy: only rows that have a gradient step; the others keep their averages and momentum "
    '(`sparse="lazy"`)',
    "dense": "dense: a row without a gradient has the gradient 0, so its averages decay, and its momentum moves it "
    '(`sparse="dense"`)',
    None: 'refused, until `sparse="lazy"` or `sparse="dense"` says what they mean',
}
_MEANINGS = {
    "lr": "learning rate, in units of the parameter",
    "alpha": "decay of the averages, no unit: they remember about 1/(1−alpha) steps",
    "momentum": "share of the last step that is repeated, no unit",
    "centered": "whether the average gradient is kept, and its square subtracted",
    "square_avg_init": "what v starts at, in units of g²",
    "eps_mode": "where ε stands",
    "lr_in_buffer": "whether the learning rate is inside the momentum buffer",
    "weight_decay_mode": "what weight_decay does, line [1]",
    "reference_lr": "the highest learning rate of the schedule, which corrected decay divides by",
    "clip_value": "bound on each element of the gradient, in units of g",
    "clip_norm": "bound on the norm of each tensor's gradient, in units of g",
    "clip_global_norm": "bound on the norm of all gradients together, in units of g",
    "clip_weights": "bound on each element of the parameter after the step, in units of the parameter",
}
_DECAYS = {
    "l2": "adds weight_decay·p to the gradient: in units of g per p",
    "l1": "adds weight_decay·sign(p) to the gradient: in units of g",
    "decoupled": "shrinks p by lr·weight_decay, no unit",
    "corrected": "shrinks p by lr²/reference_lr·weight_decay, no unit",
}


@dataclass(frozen=True)
class Part:
    """A piece of a page: what follows a heading, in this order. What is empty is not shown.

    Attributes:
        heading: empty for what goes on under the heading before.
        text: a paragraph.
        code: lines to show as they are; in Python, if `python`.
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
    """What the dialects compute, how they say it, and what has the name and does not fit."""
    numbers = "denominator", "v\nstarts", "lr", "decay", "ε", "momentum", "decay\nof p", "sparse"
    return (
        Part(
            "What they compute",
            "Inside the root ε is in units of g², outside it in units of g. The learning rate is required where the "
            "framework has no default. Momentum is what the buffer becomes: with μb + u the learning rate is applied "
            "outside it, with μb + lr·u it is kept inside. Decay of p is what `weight_decay` means. A * marks what "
            "changes with another setting: the dialect's own page says how.",
            header=("dialect", *numbers),
            rows=tuple((f"`{row.name}`", *_numbers(row)) for row in DIALECTS.values()),
        ),
        Part(
            "What they call it",
            "First the words for the learning rate, the decay of the average and ε, last those that clip. torch's "
            "words, and ours such as `clip_norm` or `sparse`, are taken under every dialect.",
            header=("dialect", "framework", "its words"),
            rows=tuple((f"`{row.name}`", row.title, ticked(own_arguments(row))) for row in DIALECTS.values()),
        ),
        Part(
            "What has the name and does not fit",
            "These are refused by name, since another rule runs behind it.",
            items=tuple(f"`{name}`: {reason}." for name, reason in UNFIT.items()),
        ),
    )


def _numbers(row: Dialect) -> tuple[str, ...]:
    """What a dialect computes, in a line of the table."""
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
    """What the gradient is divided by; with a * if another setting changes it."""
    return DENOMINATORS[row.rule.eps_mode] + "*" * any("eps_mode" in condition.then for condition in row.when)


def v_start(row: Dialect) -> str:
    """What the average of squares starts at."""
    return "ε" if row.v_init_is_eps else number(row.rule.square_avg_init)


def number(value: Any) -> str:
    """A number as people write it: 1e-8; a learning rate of None is required."""
    if value is None:
        return "required"
    if not 0 < value < 1e-3:
        return f"{value:g}"
    mantissa, _, exponent = f"{value:e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def shown(value: Any) -> str:
    """A value as code."""
    plain = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number(value) if plain else f'"{value}"' if isinstance(value, str) else repr(value)


def own_arguments(row: Dialect) -> list[str]:
    """What the dialect calls the learning rate, the decay and ε, its further words, and those that clip."""
    first = [word for ours in HYPERS[:3] for word in _words_for(row, ours)]
    clips = clip_words(row)
    return [*first, *(word for word in row.arguments if word not in (*first, *clips)), *clips]


def clip_words(row: Dialect) -> list[str]:
    """The framework's own words for clipping."""
    return [word for word in dict.fromkeys([*row.arguments, *row.values]) if row.arguments.get(word, word) in CLIPS]


def _words_for(row: Dialect, ours: str) -> list[str]:
    """The framework's words for a setting of ours; torch's where it has none."""
    return [word for word, name in row.arguments.items() if name == ours] or [ours]


def ticked(words: Iterable[str]) -> str:
    """Words as code, with commas."""
    return ", ".join(f"`{word}`" for word in words)


# --- one dialect ---------------------------------------------------------------------------------


def describe(row: Dialect) -> tuple[Part, ...]:
    """A dialect in full: how to come from it, its equation, words, states, limits and traps, and its source."""
    parts = [*_coming(row), *_equations(row), _words(row), _states(row), _limits(row), _gradients(row)]
    if row.traps:
        parts.append(Part("Traps", items=row.traps))
    return (*parts, Part("Source", f"{row.source}."))


def _coming(row: Dialect) -> Iterator[Part]:
    there = f"{row.call}({row.example})" if row.call[-1:].isalnum() else f"{row.call or row.title}: {row.example}"
    yield Part(
        "Coming from there",
        code=(
            "# There:",
            f"#     {there}",
            "# Here:",
            "from rmsprop import RMSprop",
            "",
            *_call("optimizer = RMSprop(", f'params, dialect="{row.name}"', row.example),
        ),
        python=True,
    )
    plain = DIALECTS["torch"].defaults()
    said = {name: value for name, value in settings(row, example(row)).items() if value != plain[name]}
    words = (f"{name}={shown(value)}" for name, value in said.items())
    yield Part(text="The same in torch's words and ours:", code=_call("RMSprop(", "params", *words), python=True)


def _call(opening: str, *arguments: str) -> tuple[str, ...]:
    """A call as the formatter would write it, on several lines if one is too long."""
    line = f"{opening}{', '.join(arguments)})"
    return (line,) if len(line) <= _LINE else (opening, *(f"    {argument}," for argument in arguments), ")")


def example(row: Dialect) -> dict[str, Any]:
    """The row's example: settings in the framework's words."""
    call = ast.parse(f"dict({row.example})", mode="eval").body
    assert isinstance(call, ast.Call)
    return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}


def settings(row: Dialect, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings under our names, from settings in the dialect's words."""
    read = read_arguments(row, given)
    return row.complete(read, read)


def _equations(row: Dialect) -> Iterator[Part]:
    """The equation with the default numbers, again for each setting that changes the rule, and what others add."""
    base = _equation(row, {})
    yield Part("Its equation, with its defaults", code=base)
    for condition in row.when:
        given = {condition.setting: _MOVING.get(condition.setting, True)}
        yield Part(text=f"With `{_setting(row, given)}` its rule is another:", code=_equation(row, given))
    changes = []
    for given in _variations(row):
        lines = [line for line in _equation(row, given) if line not in base]
        changes.append((f"`{_setting(row, given)}`", "\n".join(f"`{line}`" for line in lines)))
    yield Part(header=("with", "these lines"), rows=tuple(changes))


_MOVING: Mapping[str, Any] = {"momentum": 0.9}


def _moving(row: Dialect) -> dict[str, Any]:
    """Settings that turn the momentum on; none where the framework has none."""
    limit = row.limits.get("momentum")
    if limit is None:
        return {**_MOVING}
    return {limit.unless: True, **_MOVING} if limit.unless else {}


def _variations(row: Dialect) -> Iterator[dict[str, Any]]:
    """Settings that are off by default, and do not change the rest of the rule."""
    elsewhere = {*row.limits, *(condition.setting for condition in row.when)}
    for given in (_MOVING, {"centered": True}):
        (name,) = given
        if name not in elsewhere and not row.defaults()[name]:
            yield {**given}
    yield {"weight_decay": 1e-4}
    if "weight_decay_mode" in row.arguments.values():
        for mode in WEIGHT_DECAY_MODES:
            if mode != row.rule.weight_decay_mode and _says(row, {"weight_decay_mode": mode}):
                yield {"weight_decay": 1e-4, "weight_decay_mode": mode}


def _says(row: Dialect, given: dict[str, Any]) -> bool:
    """Whether the dialect has its own words for these settings of ours."""
    try:
        return read_arguments(row, write_arguments(row, given)) == given
    except ValueError:
        return False


def _setting(row: Dialect, given: Mapping[str, Any]) -> str:
    """Settings of ours as an argument list in the dialect's words."""
    return ", ".join(f"{word}={shown(value)}" for word, value in write_arguments(row, given).items())


def _equation(row: Dialect, given: Mapping[str, Any]) -> tuple[str, ...]:
    """The equation in force, with its numbers."""
    full = row.complete(given, given)
    rule = Rule(**{name: full[name] for name in SWITCHES}, momentum=full["momentum"] != 0)
    return rule.equation(Hyper(**{name: full[name] for name in HYPERS}, reference_lr=full["reference_lr"]))


def _words(row: Dialect) -> Part:
    """Every number and every word of its own: what it is called here, its default, its meaning."""
    spoken = [*HYPERS, "centered", *row.arguments.values(), *(name for name in row.values if name in CLIPS)]
    rows = []
    for ours in dict.fromkeys(spoken):
        if ours in row.limits and not row.limits[ours].unless:
            continue
        for word in _words_for(row, ours):
            default = row.defaults()[ours]
            written = _written(row, word, default)
            same = written in (default, None) or default is None
            here = f"`{ours}`" if same else f"`{ours}={shown(default)}`"
            rows.append((f"`{word}`", here, _default(ours, written), _meaning(row, ours)))
    note = "Where a word is the same as here, the framework may lack it: then it is our addition to its rule."
    return Part("Words", note, header=("word", "here", "default", "meaning and unit"), rows=tuple(rows))


def _written(row: Dialect, word: str, value: Any) -> Any:
    """A value of ours as the framework would write it under that word."""
    said = row.values[word].write(value) if word in row.values and value is not None else value
    return said.get(word) if isinstance(said, Mapping) else said


def _default(ours: str, value: Any) -> str:
    """A default as the table shows it."""
    if value is None:
        return {"lr": "required", "reference_lr": "lr at the start"}.get(ours, "off")
    return shown(value)


def _meaning(row: Dialect, ours: str) -> str:
    """What a setting means, with its unit."""
    if ours == "eps":
        texts = [_eps_meaning(row.rule.eps_mode, row.hyper.eps)]
        for condition in row.when:
            mode = condition.then.get("eps_mode", row.rule.eps_mode)
            if mode != row.rule.eps_mode:
                texts.append(f"with `{condition.setting}` it is {_eps_meaning(mode, row.hyper.eps)}")
        return ";\n".join(texts)
    if ours == "weight_decay":
        return _DECAYS[row.rule.weight_decay_mode]
    if ours == "momentum" and (limit := row.limits.get(ours)):
        return f"{_MEANINGS[ours]}; read with `{limit.unless}=True` only"
    return _MEANINGS[ours]


def _eps_meaning(mode: str, eps: float) -> str:
    """The unit of ε in words, and the size of a gradient at which it begins to count."""
    if eps == 0:
        return "there is none: a gradient of 0 makes a step of 0"
    size = number(float(f"{math.sqrt(eps):.3g}"))
    return {
        "outside": f"added to √v, in units of g: it caps steps where √v is below {number(eps)}",
        "inside": f"added to v inside the root, in units of g²: it caps steps where √v is below √ε = {size}",
        "both": f"added to v, in units of g², and to the root, in units of g: it caps steps where √v is below "
        f"√ε = {size}",
        "floor": f"the least that is divided by, in units of g: it caps steps where √v is below {number(eps)}",
    }[mode]


def _states(row: Dialect) -> Part:
    """The names and the order of its state, and what each is here."""
    moving = row.complete(_moving(row), _moving(row))
    kept = {"grad_avg": "if centered", "momentum_buffer": "with momentum"}
    inside = "the velocity: steps, in units of the parameter, learning rate inside"
    meanings = {
        "step": "how many steps were taken",
        "square_avg": f"v, the average of g², in units of g²; it starts at {v_start(row)}",
        "grad_avg": "m, the average of g, in units of g",
        "momentum_buffer": f"b, {inside}" if moving["lr_in_buffer"] else "b, a sum of g/d, no unit, lr outside",
    }
    if row.buffer_sign < 0:
        meanings["momentum_buffer"] += "; there it holds the negative of ours"
    rows = tuple(
        (str(i), f"`{theirs}`", f"`{ours}`", kept.get(ours, "always"), meanings[ours])
        for i, (theirs, ours) in enumerate(row.states.items(), 1)
    )
    counts = "" if "step" in row.states.values() else "No step count is among them; here `step` counts."
    return Part("Its state, in its order", counts, header=("", "its name", "here", "kept", "what it is"), rows=rows)


def _limits(row: Dialect) -> Part:
    """What is refused, or works with few values, and why."""
    items = [f"`{word}` is refused: {reason}." for word, reason in row.refused.items()]
    alike: dict[str, list[str]] = {}
    for word, limit in row.limits.items():
        alike.setdefault(f"{_works_with(limit)}: {limit.reason}.", []).append(word)
    items += [f"{ticked(words)} {sentence}" for sentence, words in alike.items()]
    if row.exclusive:
        items.append(f"One of {ticked(row.exclusive)} at a time.")
    items += [f"`{word}=True` needs `{flag}=True`, and is refused without." for word, flag in row.requires.items()]
    if row.complex:
        items.append(f"Complex parameters are refused: {row.complex}; here they are pairs of independent reals.")
    else:
        items.append("Complex parameters are pairs of independent reals.")
    return Part("Refused and limited", items=tuple(items))


def _works_with(limit: Limit) -> str:
    if limit.neutral is ANYTHING:
        return "may be anything"
    values = limit.neutral if isinstance(limit.neutral, tuple) else (limit.neutral,)
    if set(values) == {True, False}:
        return "may be True or False, and says nothing"
    works = " or ".join(f"`{value!r}`" for value in values)
    return f"may be {works} only" + (f", unless `{limit.unless}=True`" if limit.unless else "")


def _gradients(row: Dialect) -> Part:
    """In which order it clips, and what a sparse gradient means."""
    full = row.defaults()
    own = clip_words(row)
    items = [f"Its own words that clip: {ticked(own)}." if own else "It has no word of its own that clips."]
    value, *norms, weights = (f"`{row.argument(name)}`" for name in CLIPS)
    order = [*norms, value] if full["clip_value_last"] else [value, *norms]
    decay = "weight decay [1]"
    order = [decay, *order] if full["clip_after_decay"] else [*order, decay]
    items.append(f"Order: {', then '.join([*order, 'the step', weights])}.")
    items.append(f"Sparse gradients are {_SPARSE[full['sparse']]}.")
    for condition in row.when:
        if "sparse" in condition.then:
            items.append(f"With `{condition.setting}` they are {_SPARSE[condition.then['sparse']]}.")
    return Part("Clipping and sparse gradients", items=tuple(items))
