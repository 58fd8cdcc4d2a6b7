"""Settings of published results by name: a dialect, its numbers, and the circumstances in prose.

    RMSprop.recipe("efficientnet", model.parameters(), lr=0.048)
    A2C("MlpPolicy", env, policy_kwargs=dict(optimizer_class=RMSprop, optimizer_kwargs=recipe("a2c-sb2")))

A recipe fixes its dialect, the dialect's switches and the presence of momentum; other values raise an error. Its
numbers may be changed. The parameter group records the changes under "recipe", such as "efficientnet; lr=0.048
instead of 0.016". To add a recipe, add one row.
"""

import difflib
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from rmsprop import dialects
from rmsprop.dialects import HYPERS, SWITCHES
from rmsprop.printing import MOST, shown
from rmsprop.recipes import games, others, vision
from rmsprop.recipes.row import TEXTS, Recipe
from rmsprop.spec import AVERAGING, CLIPS, check_number, check_switch

__all__ = [
    "RECIPES",
    "TEXTS",
    "Recipe",
    "averaging",
    "call",
    "complete",
    "find_recipe",
    "follow",
    "note",
    "recipe",
    "warn",
]

RECIPES: Mapping[str, Recipe] = {row.name: row for module in (games, vision, others) for row in module.ROWS}

# Names that users may try and that no recipe's name contains -> the recipes that they may mean.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "atari": ("dqn-nature", "a3c", "impala"),
    "baselines": ("a2c-baselines", "acer"),
    "coma": ("pymarl",),
    "dopamine": ("dqn-dopamine-tf", "dqn-dopamine-jax"),
    "edgetpu": ("timm-efficientnet-es",),
    "googlenet": ("inception-v2", "inception-v3"),
    "graves2013": ("graves-handwriting",),
    "karpathy": ("char-rnn",),
    "monobeast": ("torchbeast",),
    "nature": ("dqn-nature",),
    "qmix": ("pymarl",),
    "sb2": ("a2c-sb2",),
    "scalable-agent": ("impala-code",),
    "stable-baselines3": ("a2c-sb3", "a2c-sb2"),
    "vdn": ("pymarl",),
    "wasserstein-gan": ("wgan",),
}

# Settings of execution, which do not change the rule; recipes leave them open.
_RUNNING = (
    *("capturable", "foreach", "fused", "differentiable", "backend", "amp_in_step", "maximize"),
    *("rounding", "compensation", "seed", "state_dtype", "max_update", "nonfinite", "nonfinite_limit"),
    *AVERAGING,
)

# Settings that may be changed. Changes of the learning rate, which depends on the batch size, and of clipping, which
# recipes leave to the user, are recorded without a warning.
_CHANGEABLE = (*HYPERS, *CLIPS, "clip_after_decay", "sparse")
_UNWARNED = ("lr", *CLIPS, "clip_after_decay")


def find_recipe(name: Any) -> Recipe:
    """Return the recipe of that name.

    Raises:
        ValueError: the name is unknown; the message lists similar names, or all names.
    """
    if isinstance(name, str) and name in RECIPES:
        return RECIPES[name]
    short = isinstance(name, str) and len(name) <= MOST
    key = name.strip().lower().replace("_", "-").replace(" ", "-") if short else ""
    meant: tuple[str, ...] = (key,) if key in RECIPES else _ALIASES.get(key, ())
    if key and not meant:
        similar = tuple(known for known in RECIPES if key in known or known in key)
        meant = similar or tuple(difflib.get_close_matches(key, RECIPES, n=1))
    if meant:
        raise ValueError(f"Unknown recipe: {shown(name)}; did you mean {' or '.join(map(repr, meant))}?")
    raise ValueError(f"Unknown recipe: {shown(name)}; choose one of {', '.join(map(repr, RECIPES))}")


def recipe(name: str, **changes: Any) -> dict[str, Any]:
    """Return a recipe as keyword arguments of `RMSprop`, for libraries that construct the optimizer themselves.

    The result omits the learning rate unless it is changed, so that libraries can pass their own; without one,
    `RMSprop` uses the recipe's. All values can be pickled and written as JSON. This function does not import torch.

    Args:
        name: see `rmsprop recipes`.
        changes: numbers to change, under the names of the recipe's dialect or torch, and settings of execution.
    Raises:
        ValueError, TypeError: a name or value that does not work, or a value that the recipe fixes otherwise.

    >>> recipe("a2c-sb2")
    {'recipe': 'a2c-sb2', 'dialect': 'sb3', 'alpha': 0.99, 'eps': 1e-05}
    """
    row = find_recipe(name)
    dialect = dialects.find_dialect(row.dialect)
    _check_dialect(row, changes.get("dialect", row.dialect))
    running = {word: value for word, value in changes.items() if word in _RUNNING}
    unset = {word for word, value in changes.items() if value is None and word in (*SWITCHES, "sparse")}
    arguments = {word: value for word, value in changes.items() if word not in {"dialect", *running, *unset}}
    given = {name: _check(name, value) for name, value in dialects.read_arguments(dialect, arguments).items()}
    settings = {**_meaning(row), **given}
    note(row.name, {**dialect.complete(settings, settings), "dialect": dialect.name})
    if "lr" not in given:
        del settings["lr"]
    written = dialects.write_arguments(dialect, settings)
    average = {} if running.get("ema", 0) is None else row.averaging
    return {"recipe": row.name, "dialect": dialect.name, **written, **average, **running}


def follow(name: Any, dialect: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given settings completed by the recipe's, under our names.

    Raises:
        ValueError: the recipe is unknown or has another dialect.
    """
    row = find_recipe(_name_of(name))
    _check_dialect(row, dialect)
    return {**_meaning(row), **given}


def averaging(name: Any) -> dict[str, Any]:
    """Return the settings of a recipe's average of the weights."""
    return {**AVERAGING, **find_recipe(_name_of(name)).averaging}


def _meaning(row: Recipe) -> dict[str, Any]:
    """Return the recipe's settings under our names."""
    return dialects.read_arguments(dialects.find_dialect(row.dialect), row.settings)


def _name_of(noted: Any) -> Any:
    """Return the recipe's name in a result of `note`."""
    return noted.partition(";")[0] if isinstance(noted, str) else noted


def note(name: Any, settings: Mapping[str, Any]) -> str:
    """Return a parameter group's record of its recipe: the name and the changes.

    Args:
        settings: all settings of the group, under our names.
    Raises:
        ValueError: a setting that the recipe fixes has another value; the message has what would work.
    """
    row = find_recipe(_name_of(name))
    _check_dialect(row, settings["dialect"])
    meant = complete(row)
    for fixed in SWITCHES:
        if settings[fixed] != meant[fixed]:
            raise ValueError(_broken(row, fixed, settings[fixed], meant[fixed]))
    if bool(settings["momentum"]) != bool(meant["momentum"]):
        raise ValueError(_broken(row, "momentum", settings["momentum"], meant["momentum"]))
    bound = settings.get("max_update")
    bounds = [] if bound is None else [f"max_update={bound!r}"]
    average = averaging(row.name)
    own = {name: settings.get(name, value) for name, value in average.items()}
    averages = _changed(own, average, average if own["ema"] is not None else [n for n in average if n == "ema"])
    return "; ".join([row.name, *_changed(settings, meant, _CHANGEABLE), *averages, *bounds])


def warn(settings: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn once about changed numbers that affect the recipe's result.

    A number is not changed if some group has the recipe's value, since timm and transformers give weight decay to the
    groups that need it, and 0 or nothing to the constructor.

    Args:
        settings: the optimizer's settings under our names, including "recipe" if it follows one.
        groups: the parameter groups.
    """
    if "recipe" not in settings:
        return
    row = find_recipe(_name_of(settings["recipe"]))
    meant = complete(row)
    warned = [name for name in _CHANGEABLE if name not in _UNWARNED]
    changed = _changed(settings, meant, [w for w in warned if all(_differs(own[w], meant[w]) for own in groups)])
    if not changed:
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("rmsprop."):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"recipe {row.name!r} runs with {', '.join(changed)}: the published result was trained without this change",
        stacklevel=level,
    )


def call(row: Recipe, **changes: Any) -> str:
    """Return the constructor call equivalent to a recipe, with changes under our names."""
    dialect = dialects.find_dialect(row.dialect)
    kept = {word: value for word, value in row.settings.items() if dialect.arguments.get(word, word) not in changes}
    arguments = {"dialect": row.dialect, **kept, **dialects.write_arguments(dialect, changes), **row.averaging}
    return f"RMSprop(params, {', '.join(f'{name}={value!r}' for name, value in arguments.items())})"


def complete(row: Recipe) -> dict[str, Any]:
    """Return every setting of a recipe, including its dialect's defaults, under our names."""
    given = _meaning(row)
    return dialects.find_dialect(row.dialect).complete(given, given)


def _changed(settings: Mapping[str, Any], meant: Mapping[str, Any], names: Any) -> list[str]:
    pairs = ((name, settings[name], meant[name]) for name in names)
    return [f"{name}={_show(now)} instead of {_show(then)}" for name, now, then in pairs if _differs(now, then)]


def _differs(now: Any, then: Any) -> bool:
    return type(now).__name__ == "Tensor" or bool(now != then)


def _show(value: Any) -> str:
    return "a tensor" if type(value).__name__ == "Tensor" else repr(value)


def _check(name: str, value: Any) -> Any:
    """Return the value of a setting in its plain type. Raises: TypeError, ValueError if it does not work."""
    if name in SWITCHES:
        return check_switch(name, value)
    if (name in HYPERS and type(value).__name__ != "Tensor") or (name in CLIPS and value is not None):
        return check_number(name, value)
    return value


def _check_dialect(row: Recipe, dialect: Any) -> None:
    if dialect != row.dialect:
        raise ValueError(
            f"the recipe {row.name!r} fixes dialect={row.dialect!r}, and got {shown(dialect)}, under which its "
            f"numbers have a different meaning; write RMSprop.recipe({row.name!r}, params), or RMSprop(params, "
            f"**recipe({row.name!r})), or RMSprop(params, dialect={shown(dialect)}, ...) without a recipe"
        )


def _broken(row: Recipe, name: str, now: Any, then: Any) -> str:
    return (
        f"the recipe {row.name!r} fixes {name}={then!r}, and got {now!r}: {row.fixes}; to use another value without "
        f"the recipe, write {call(row, **{name: now})}"
    )
