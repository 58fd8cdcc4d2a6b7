"""Parameter-group settings: read from the caller's words, checked, and turned into a Rule and a Hyper."""

import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from numbers import Real
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from rmsprop import dialects, recipes
from rmsprop.dialects import Dialect
from rmsprop.printing import MOST, printable, shown
from rmsprop.settings import group_keys
from rmsprop.spec import (
    CLIPS,
    ROUNDINGS,
    SPARSE_MODES,
    Hyper,
    Rule,
    check_flag,
    check_number,
    check_seed,
    check_switch,
    is_plain,
    plain,
)
from rmsprop.tensors import params
from rmsprop.tensors.bucket import is_half

# Settings that say how a step runs, not what it computes. "fused" is torch's name: False asks for no native
# kernel, None leaves the choice to the backend.
EXECUTION = ("capturable", "foreach", "fused", "differentiable")

# Settings beside the dialects': none of their frameworks has them. How half precision is kept, and a bound of steps.
CARE: Mapping[str, Any] = {"rounding": "nearest", "compensation": False, "seed": 0, "max_update": None}

SPARSE = (None, *SPARSE_MODES)
_OPTIONAL = (
    *CLIPS,
    "reference_lr",
    "max_update",
    "sparse",
    "foreach",
    "fused",
)  # None is "off", or "chosen"
CLIP_ORDER = ("clip_after_decay", "clip_value_last")

# What a group means when it does not say: torch's rule. Pickles and state dicts of torch lack our switches.
TORCH_GROUP: Mapping[str, Any] = {
    **dialects.DIALECTS["torch"].defaults(),
    **CARE,
    "dialect": "torch",
    "maximize": False,
    "capturable": False,
    "foreach": None,
    "fused": None,
    "differentiable": False,
}


# All settings of a group except its numbers: they must stay the same for a cached plan to be valid.
SETTINGS = itemgetter(*(name for name in TORCH_GROUP if name not in dialects.HYPERS))

_UNSET: list[float] = []


def unset(shown: float) -> float:
    """A default in RMSprop's signature: torch's number, as an object of its own that tells "not given" from "given".

    A plain float, since what reads signatures checks its type and writes it as YAML (LightningCLI).
    """
    own = float(str(shown))
    _UNSET.append(own)
    return own


def is_unset(value: Any) -> bool:
    """Whether a value is one of the signature's own defaults; a number that merely equals one was given."""
    return any(value is own for own in _UNSET)


def resolve_settings(dialect: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """All settings of a group under our names: the dialect's defaults, overridden by what was given.

    Returns: the settings, and the names of those that were asked for. lr is None where the dialect has no default
        and none was given: each group is then to bring its own.
    Raises:
        ValueError, TypeError: a name or value that does not work, with what would.
    """
    row = dialects.find_dialect(dialect)
    execution = {name: value for name, value in given.items() if name in EXECUTION or name in CARE}
    apart = (*EXECUTION, *CARE, "recipe")
    words = _checked(
        dialects.read_arguments(row, {name: value for name, value in given.items() if name not in apart})
    )
    followed = given.get("recipe")
    if followed is not None:
        words = recipes.follow(followed, row.name, words)
    group = {**TORCH_GROUP, **row.complete(words, words), "dialect": row.name, **execution}
    if group["lr"] is None and "lr" not in words:
        return {**check_new({**group, "lr": 0.0}), "lr": None}, frozenset(words)
    group = check_new(group)
    if followed is not None:
        group["recipe"] = recipes.note(followed, group)
    return group, frozenset(words)


def own_group(
    given: dict[str, Any], defaults: dict[str, Any], asked: frozenset[str], typed: Collection[str] = ()
) -> dict[str, Any]:
    """A group as torch's base class takes it, with the settings it was given under our names, checked.

    Args:
        given: the group, in the dialect's or torch's words; keys that are no settings are carried along.
        defaults: the optimizer's settings.
        asked: which of them were asked for, and do not merely follow from the dialect.
        typed: the names that the constructor was given, in its words.
    Raises:
        ValueError, TypeError: a name or value that does not work, with what would.
    """
    if "params" not in given:
        names = ", ".join(printable(key[:MOST]) if isinstance(key, str) else shown(key) for key in given)
        raise ValueError(f"a parameter group has no params; it holds {names[:MOST] or 'nothing'}")
    row = dialects.find_dialect(given.get("dialect", defaults["dialect"]))
    keys = group_keys.split(row, given, TORCH_GROUP, typed)
    apart = (*EXECUTION, *CARE, "dialect")
    under_ours, words = ({k: v for k, v in part.items() if k not in apart} for part in (keys.plain, keys.arguments))
    execution = {name: given[name] for name in apart[:-1] if name in given and name not in keys.left}
    rest = dict(keys.carried)
    followed = rest.pop("recipe", None)
    same = row.name == defaults["dialect"] and followed is None
    base = defaults if same else {**defaults, **row.defaults(), "dialect": row.name}
    kept = asked if same else frozenset()
    read = _checked(under_ours | dialects.read_arguments(row, words))
    if followed is not None:
        read = recipes.follow(followed, row.name, read)
    followed = followed or defaults.get("recipe")
    settings = {**base, **row.complete({**base, **read}, kept | read.keys()), **execution}
    if settings["reference_lr"] is not None and "reference_lr" not in read and base["lr"] is not None:
        settings["reference_lr"] = base["reference_lr"] or float(base["lr"])  # timm's: one for all groups
    if settings["lr"] is None and "lr" not in read:
        raise TypeError(
            f"dialect={row.name!r} has no default learning rate, as {row.call or row.title} has none; "
            f"give {row.argument('lr')}=..., such as 1e-3"
        )
    group = {**rest, **check_new(settings)}
    if followed is not None:
        group["recipe"] = recipes.note(followed, group)
    group["params"] = params.listed(group["params"])
    _check_complex(row, group["params"])
    for name, value in keys.left.items():
        if value and name != "fused":  # which kernel steps is a choice, not a number
            warnings.warn(
                f"{name}={shown(value)} in a group that another optimizer made is not taken over, as torch's RMSprop "
                f"takes none: give {name}= to RMSprop if it is meant",
                stacklevel=to_caller(),
            )
    return group


def _checked(read: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under our names; objects among them are checked before anything follows from them."""
    return {name: value if is_plain(value) else check_setting(name, value) for name, value in read.items()}


def _check_complex(row: Dialect, params: Any) -> None:
    """Refuse complex parameters where the dialect's square is not torch's, re² and im² apart."""
    if not row.complex:
        return
    tensors = [params] if isinstance(params, Tensor) else [p[1] if isinstance(p, tuple) else p for p in params]
    if any(isinstance(p, Tensor) and p.is_complex() for p in tensors):
        raise ValueError(
            f"dialect={row.name!r} takes no complex parameters: {row.complex}, and here they are pairs of "
            "independent "
            "reals; take dialect='torch', which has that meaning"
        )


def check_new(group: Mapping[str, Any]) -> dict[str, Any]:
    """As `check`, for a group that begins: a schedule may later take it to where it could not have begun."""
    checked = check(group)
    if checked["nesterov"] and checked["momentum"] == 0:
        raise ValueError("nesterov=True looks ahead along the momentum, which is 0; give momentum > 0, such as 0.9")
    return checked


def check_saved(group: Mapping[str, Any]) -> dict[str, Any]:
    """As `check`, for a group of a run that has begun: a schedule may have taken its lr below 0."""
    lr = plain(group["lr"])
    below = isinstance(lr, Real) and not isinstance(lr, bool) and lr < 0
    if isinstance(lr, Tensor) and lr.numel() == 1 and lr.is_floating_point() and not lr.is_meta:
        below = bool(lr < 0)
    if not below:
        return check(group)
    return {**check({**group, "lr": -lr}), "lr": lr if isinstance(lr, Tensor) else float(lr)}


def check(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a group in plain Python types (a tensor lr stays one).

    Raises:
        ValueError, TypeError: a value that does not work, or two that do not go together.
    """
    values = [group[name] for name in TORCH_GROUP]
    if all(map(is_plain, values)):
        return dict(_check_plain(tuple(values), tuple(map(type, values))))
    return _check_together({name: check_setting(name, group[name]) for name in TORCH_GROUP})


# An optimizer is checked at construction, its groups too, at a load and at the first step, mostly alike.
@lru_cache(maxsize=64)
def _check_plain(values: tuple[Any, ...], kinds: tuple[type, ...]) -> dict[str, Any]:  # noqa: ARG001  # 1 is not True
    return _check_together({name: check_setting(name, v) for name, v in zip(TORCH_GROUP, values, strict=True)})


def _check_together(checked: dict[str, Any]) -> dict[str, Any]:
    """The settings, if they go together. Raises: ValueError."""
    if checked["weight_decay_mode"] == "corrected" and not checked["reference_lr"]:
        raise ValueError(
            'weight_decay_mode="corrected" divides by the learning rate at construction, which is 0; give '
            "reference_lr=..., the highest of the schedule"
        )
    for name in ("foreach", "differentiable"):
        if checked["fused"] and checked[name]:
            raise ValueError(
                f"fused=True asks for a native kernel, and {name}=True for torch's own operators; leave one out"
            )
    if checked["differentiable"] and (checked["rounding"] != "nearest" or checked["compensation"]):
        raise ValueError(
            "differentiable=True records the step for autograd, and rounding='stochastic' and compensation=True have "
            "no derivative; leave them out, or keep the parameters in float32"
        )
    if checked["foreach"] and checked["differentiable"]:
        raise ValueError(
            "foreach=True keeps no autograd graph, so it does not go with differentiable=True; "
            "leave foreach as None or False"
        )
    return checked


def check_setting(name: str, value: Any) -> Any:
    """One setting of a group in its plain Python type, whatever the others are.

    Raises: ValueError, TypeError: a value that does not work.
    """
    if name == "dialect":
        return dialects.find_dialect(value).name
    if name == "lr":
        return check_lr(value)
    if name in dialects.HYPERS:
        return check_number(name, value)
    if name in dialects.SWITCHES:
        return check_switch(name, value)
    if name == "seed":
        return check_seed(value)
    if name == "rounding":
        if not isinstance(value, str) or value not in ROUNDINGS:
            raise ValueError(f"Invalid rounding: {shown(value)}; choose one of {', '.join(map(repr, ROUNDINGS))}")
        return value
    if value is None and name in _OPTIONAL:
        return None
    if name in (*CLIPS, "reference_lr", "max_update"):
        return check_number(name, value)
    if name == "sparse":
        if not isinstance(value, str) or value not in SPARSE:
            raise ValueError(
                f"Invalid sparse: {shown(value)}; it takes 'lazy' (rows that have a gradient step, others keep "
                "their averages), 'dense' (averages decay everywhere) or None (sparse gradients are refused)"
            )
        return value
    return check_flag(name, value)


_LOST = object()  # a setting that an edit removed; not None, which is one of their values


def check_edited(group: dict[str, Any], checked: dict[int, tuple[Any, ...]]) -> None:
    """As `check`, for a group that may have been edited since `checked` says so, by its id.

    A schedule may take lr below 0, where a run cannot begin; a tensor's number stays on its device.

    Mutates: checked; in the group, scalars of NumPy become Python's.
    Raises: ValueError, TypeError: a value that does not work, or two that do not go together.
    """
    values = [group.get(name, _LOST) for name in TORCH_GROUP]
    if not all(map(is_plain, values)):
        for name, value in zip(TORCH_GROUP, values, strict=True):
            if name in group and not is_plain(value):
                group[name] = plain(value)
        values = [group.get(name, _LOST) for name in TORCH_GROUP]
    comparable = all(is_plain(x) or isinstance(x, Tensor) for x in values)
    # of a tensor all that is checked: another tensor, or group, may have its id tomorrow
    today = tuple([(x.numel(), x.dtype, x.is_meta) if isinstance(x, Tensor) else x for x in values])
    if comparable and checked.get(id(group)) == today:
        return
    lost = [name for name in TORCH_GROUP if name not in group]
    if lost:
        raise ValueError(f"a parameter group has lost its {', '.join(lost)}; a group keeps all of its settings")
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() == 1 and lr.is_floating_point() and not lr.is_meta:
        lr = 0.0
    elif isinstance(lr, Real) and not isinstance(lr, bool) and lr < 0:
        lr = -lr
    for name, value in check({**group, "lr": lr}).items():
        if type(group[name]) is int and type(value) is float and abs(value) >= 2**63:
            group[name] = value  # what no 64-bit integer holds
    checked[id(group)] = today


def to_caller() -> int:
    """The stacklevel at which a warning names the line that called this package, through torch's wrappers."""
    level, frame = 0, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("rmsprop", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def check_half(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to round as asked where no parameter is of half precision: it would be accepted and ignored.

    Raises: ValueError.
    """
    asked = {
        name: group[name] for group in groups for name in ("rounding", "compensation") if group[name] != CARE[name]
    }
    params = [p for group in groups for p in group["params"]]
    if asked and params and not any(is_lazy(p) or is_half(p.dtype) for p in params):
        said = " and ".join(f"{name}={value!r}" for name, value in asked.items())
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in params}))
        raise ValueError(
            f"{said} says how parameters of half precision are rounded, and these are {dtypes}; leave it out, or "
            "build the optimizer after model.to(torch.bfloat16)"
        )


def check_lr(lr: Any) -> float | Tensor:
    """A learning rate: a float, or a tensor with one element whose value is in range.

    Raises:
        ValueError, TypeError: anything else.
    """
    if not isinstance(lr, Tensor):
        return check_number("lr", lr)
    if lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}; lr takes one number for all")
    if lr.is_floating_point() and not lr.is_meta:
        check_number("lr", lr.item())
        return lr
    raise TypeError(f"Invalid learning rate: a {lr.dtype} tensor; lr takes a float or a floating-point tensor")


def read(group: Mapping[str, Any]) -> tuple[Rule, Hyper]:
    """What a group computes today: its rule, and its numbers."""
    make = Rule if torch.compiler.is_compiling() else _rule
    rule = make(
        group["eps_mode"],
        group["square_avg_init"],
        group["centered"],
        group["momentum"] != 0,
        group["nesterov"],
        group["lr_in_buffer"],
        group["weight_decay_mode"],
        group["bias_correction"],
        group["maximize"],
    )
    numbers = group["lr"], group["alpha"], group["eps"], group["momentum"], group["weight_decay"]
    return rule, Hyper(*numbers, group["reference_lr"], group["max_update"])


# Checking a rule's nine fields takes 5 µs, as long as the rest of a small network's loop.
@lru_cache(maxsize=256)
def _rule(*switches: Any) -> Rule:
    """The rule, with switches of NumPy as Python's."""
    return Rule(*(check_switch(name, value) for name, value in zip(Rule.__dataclass_fields__, switches, strict=True)))


def changed(before: Rule, now: Rule) -> str | None:
    """The sentence for a rule that changed during a run, or None if it did not.

    Raising momentum from 0 or flipping maximize is no such change: the state keeps its meaning.
    """
    for name in dialects.SWITCHES:
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            return (
                f"{name} changed from {old!r} to {new!r} during the run, and the state was gathered under the old "
                f"rule; set it back, or build a new RMSprop({name}={new!r})"
            )
    return None
