"""Reads the settings of a parameter group, validates them, and returns them as a Rule and a Hyper."""

import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
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
    AVERAGING,
    CARE,
    CLIPS,
    EMA_WARMUPS,
    ROUNDINGS,
    SPARSE_MODES,
    STATE_DTYPES,
    Averaging,
    Hyper,
    Rule,
    check_flag,
    check_integer,
    check_number,
    check_switch,
    is_plain,
    plain,
)
from rmsprop.tensors import params
from rmsprop.tensors.bucket import is_half, is_narrowable

# Settings of how a step runs, not of what it computes. "fused" is torch's name: False excludes native kernels, None
# leaves the choice to the backend.
EXECUTION = ("capturable", "foreach", "fused", "differentiable")

# Settings whose default is the dialect's, besides the numbers.
RULE = (
    *("centered", "eps_mode", "square_avg_init", "lr_in_buffer", "nesterov", "bias_correction", "weight_decay_mode"),
    *("reference_lr", "sparse", *CLIPS, "clip_after_decay"),
)

SPARSE = (None, *SPARSE_MODES)
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "rounding": ROUNDINGS,
    "state_dtype": STATE_DTYPES,
    "ema_warmup": EMA_WARMUPS,
}
_OPTIONAL = (
    *CLIPS,
    "reference_lr",
    "max_update",
    "ema",
    "ema_warmup",
    "sparse",
    "foreach",
    "fused",
)  # None: off, or chosen
CLIP_ORDER = ("clip_after_decay", "clip_value_last")

# Defaults of settings that a group lacks: torch's rule. Pickles and state dicts of torch lack our switches.
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


# Settings that no dialect has an argument for. Keras has use_ema for ema.
_APART = (*EXECUTION, *(name for name in CARE if name != "ema"))

# All settings of a group except lr, alpha, eps, momentum and weight_decay. A plan holds while they stay the same.
SETTINGS = itemgetter(*(name for name in TORCH_GROUP if name not in dialects.HYPERS))

_UNSET: list[float] = []


def unset(shown: float) -> float:
    """Return a default for RMSprop's signature: a distinct object, recognized by identity as "not given".

    It is a plain float, since tools that read signatures check its type and write it as YAML (LightningCLI).
    """
    own = float(str(shown))
    _UNSET.append(own)
    return own


def is_unset(value: Any) -> bool:
    """Return whether a value is one of the signature's default objects. An equal number counts as given."""
    return any(value is own for own in _UNSET)


def resolve_settings(dialect: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """Return all settings of a group under our names: the dialect's defaults, overridden by the given ones.

    Returns: the settings, and the names of those that were given. lr is None if the dialect has no default and none
        was given: each group must then have its own.
    Raises: ValueError or TypeError for an invalid name or value, with what would work.
    """
    row = dialects.find_dialect(dialect)
    execution = {name: value for name, value in given.items() if name in _APART}
    apart = (*_APART, "recipe", *(("ema",) if given.get("ema") is None else ()))
    explicit = _checked(
        dialects.read_arguments(row, {name: value for name, value in given.items() if name not in apart})
    )
    followed = given.get("recipe")
    if followed is not None:
        explicit = recipes.follow(followed, row.name, explicit)
    group = {**TORCH_GROUP, **row.complete(explicit, explicit), "dialect": row.name, **execution}
    if group["lr"] is None and "lr" not in explicit:
        return {**check_new({**group, "lr": 0.0}), "lr": None}, frozenset(explicit)
    group = check_new(group)
    if followed is not None:
        group["recipe"] = recipes.note(followed, group)
    return group, frozenset(explicit)


def own_group(
    given: dict[str, Any], defaults: dict[str, Any], explicit: frozenset[str], given_names: Collection[str] = ()
) -> dict[str, Any]:
    """Return a group for torch's base class, with validated settings under our names.

    Args:
        given: the group, under the dialect's or torch's names. Keys that are not settings are carried along.
        defaults: the optimizer's settings.
        explicit: the names of the defaults that were given, rather than follow from the dialect.
        given_names: the arguments that the constructor was given, under the names that the caller used.
    Raises: ValueError or TypeError for an invalid name or value, with what would work.
    """
    if "params" not in given:
        names = ", ".join(printable(key[:MOST]) if isinstance(key, str) else shown(key) for key in given)
        raise ValueError(f"a parameter group has no params; it holds {names[:MOST] or 'nothing'}")
    row = dialects.find_dialect(given.get("dialect", defaults["dialect"]))
    keys = group_keys.split(row, given, TORCH_GROUP, given_names)
    apart = (*_APART, "dialect")
    ours, arguments = ({k: v for k, v in part.items() if k not in apart} for part in (keys.plain, keys.arguments))
    execution = {name: given[name] for name in _APART if name in given and name not in keys.left}
    rest = dict(keys.carried)
    followed = rest.pop("recipe", None)
    same = row.name == defaults["dialect"] and followed is None
    base = defaults if same else {**defaults, **row.defaults(), "dialect": row.name}
    kept = explicit if same else frozenset()
    read = _checked(ours | dialects.read_arguments(row, arguments))
    if followed is not None:
        read = {**recipes.averaging(followed), **recipes.follow(followed, row.name, read)}
    followed = followed or defaults.get("recipe")
    settings = {**base, **row.complete({**base, **read}, kept | read.keys()), **execution}
    if settings["reference_lr"] is not None and "reference_lr" not in read and base["lr"] is not None:
        settings["reference_lr"] = base["reference_lr"] or float(base["lr"])  # as in timm: one for all groups
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
        if value and name != "fused":  # the choice of a kernel does not change the numbers
            warnings.warn(
                f"{name}={shown(value)} in a group that another optimizer made is not taken over, since torch's "
                f"RMSprop does not have it: give {name}= to RMSprop to use it",
                stacklevel=to_caller(),
            )
    return group


def _checked(read: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, validating objects and huge integers before other settings are derived from them."""
    usual = {
        name: is_plain(value) and not (type(value) is int and abs(value) >= 2**63) for name, value in read.items()
    }
    return {name: value if usual[name] else check_setting(name, value) for name, value in read.items()}


def _check_complex(row: Dialect, params: Any) -> None:
    """Refuse complex parameters if the dialect does not square real and imaginary parts separately, as torch does."""
    if not row.complex:
        return
    tensors = [params] if isinstance(params, Tensor) else [p[1] if isinstance(p, tuple) else p for p in params]
    if any(isinstance(p, Tensor) and p.is_complex() for p in tensors):
        raise ValueError(
            f"dialect={row.name!r} takes no complex parameters: {row.complex}, but this package steps them as pairs "
            "of independent reals; give dialect='torch', which does the same"
        )


def check_new(group: Mapping[str, Any]) -> dict[str, Any]:
    """Validate the settings of a new group, as `check` does. Schedules may later set values that are refused here."""
    checked = check(group)
    if checked["nesterov"] and checked["momentum"] == 0:
        raise ValueError("nesterov=True needs momentum, which is 0; give momentum > 0, such as 0.9")
    return checked


def check_saved(group: Mapping[str, Any]) -> dict[str, Any]:
    """Validate the settings of a saved group, as `check` does. A schedule may have set its lr below 0."""
    lr = plain(group["lr"])
    below = isinstance(lr, Real) and not isinstance(lr, bool) and lr < 0
    if isinstance(lr, Tensor) and lr.numel() == 1 and lr.is_floating_point() and not lr.is_meta:
        below = bool(lr < 0)
    if not below:
        return check(group)
    return {**check({**group, "lr": -lr}), "lr": lr if isinstance(lr, Tensor) else float(lr)}


def check(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the validated settings of a group in plain Python types. A tensor lr stays a tensor.

    Raises: ValueError or TypeError for an invalid value, or two that cannot be combined.
    """
    values = [group[name] for name in TORCH_GROUP]
    if all(map(is_plain, values)):
        return dict(_check_plain(tuple(values), tuple(map(type, values))))
    return _check_together({name: check_setting(name, group[name]) for name in TORCH_GROUP})


# The same settings are validated at construction, for each group, at a load and at the first step.
@lru_cache(maxsize=64)
def _check_plain(values: tuple[Any, ...], kinds: tuple[type, ...]) -> dict[str, Any]:  # noqa: ARG001  # 1 is not True
    return _check_together({name: check_setting(name, v) for name, v in zip(TORCH_GROUP, values, strict=True)})


def _check_together(checked: dict[str, Any]) -> dict[str, Any]:
    """Return the settings if they can be combined. Raises: ValueError."""
    if checked["weight_decay_mode"] == "corrected" and not checked["reference_lr"]:
        raise ValueError(
            'weight_decay_mode="corrected" divides by the learning rate at construction, which is 0; give '
            "reference_lr=..., the highest of the schedule"
        )
    for name in ("foreach", "differentiable"):
        if checked["fused"] and checked[name]:
            raise ValueError(
                f"fused=True requires a native kernel, and {name}=True torch's own operators; leave one out"
            )
    if checked["differentiable"] and (checked["rounding"] != "nearest" or checked["compensation"]):
        raise ValueError(
            "differentiable=True records the step for autograd, but rounding='stochastic' and compensation=True have "
            "no derivative; leave them out, or keep the parameters in float32"
        )
    if checked["differentiable"] and checked["state_dtype"] != "float32":
        raise ValueError(
            f"differentiable=True records the step for autograd, but state_dtype={checked['state_dtype']!r} rounds "
            "averages, which has no derivative; leave it as 'float32'"
        )
    if checked["foreach"] and checked["differentiable"]:
        raise ValueError(
            "foreach=True keeps no autograd graph, so it cannot be combined with differentiable=True; "
            "leave foreach as None or False"
        )
    return checked


def check_setting(name: str, value: Any) -> Any:
    """Return one validated setting in its plain Python type.

    Raises: ValueError or TypeError for an invalid value.
    """
    if name == "dialect":
        return dialects.find_dialect(value).name
    if name == "lr":
        return check_lr(value)
    if name in dialects.HYPERS:
        return check_number(name, value)
    if name in dialects.SWITCHES:
        return check_switch(name, value)
    if name in ("seed", "ema_start", "ema_interval"):
        return check_integer(name, value, least=int(name == "ema_interval"))
    if value is None and name in _OPTIONAL:
        return None
    if name in _CHOICES:
        if not isinstance(value, str) or value not in _CHOICES[name]:
            other = ", or None" if name in _OPTIONAL else ""
            listed = ", ".join(map(repr, _CHOICES[name]))
            raise ValueError(f"Invalid {name}: {shown(value)}; choose one of {listed}{other}")
        return value
    if name in (*CLIPS, "reference_lr", "max_update", "ema"):
        return check_number(name, value)
    if name == "sparse":
        if not isinstance(value, str) or value not in SPARSE:
            raise ValueError(
                f"Invalid sparse: {shown(value)}; it takes 'lazy' (only rows with a gradient step), 'dense' "
                "(averages decay everywhere) or None (sparse gradients are refused)"
            )
        return value
    return check_flag(name, value)


_LOST = object()  # a setting that an edit removed; None is a value


def check_edited(group: dict[str, Any], checked: dict[int, tuple[Any, ...]]) -> None:
    """Validate a group that may have been edited, as `check` does, unless it equals its cached settings.

    A schedule may set lr below 0. The value of a tensor is not read.

    Args:
        checked: the settings validated last, by the id of the group.
    Mutates: checked. In the group, NumPy scalars become Python's.
    Raises: ValueError or TypeError for an invalid value, or two that cannot be combined.
    """
    values = [group.get(name, _LOST) for name in TORCH_GROUP]
    if not all(map(is_plain, values)):
        for name, value in zip(TORCH_GROUP, values, strict=True):
            if name in group and not is_plain(value):
                group[name] = plain(value)
        values = [group.get(name, _LOST) for name in TORCH_GROUP]
    comparable = all(is_plain(x) or isinstance(x, Tensor) for x in values)
    # properties of a tensor, not its id, which another tensor may get later
    current = tuple([(x.numel(), x.dtype, x.is_meta) if isinstance(x, Tensor) else x for x in values])
    if comparable and checked.get(id(group)) == current:
        return
    lost = [name for name in TORCH_GROUP if name not in group]
    if lost:
        raise ValueError(f"a parameter group has lost its {', '.join(lost)}; a group must keep all of its settings")
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() == 1 and lr.is_floating_point() and not lr.is_meta:
        lr = 0.0
    elif isinstance(lr, Real) and not isinstance(lr, bool) and lr < 0:
        lr = -lr
    for name, value in check({**group, "lr": lr}).items():
        if type(group[name]) is int and type(value) is float and abs(value) >= 2**63:
            group[name] = value  # too large for a 64-bit integer
    checked[id(group)] = current


def to_caller() -> int:
    """Return the stacklevel of the caller outside of this package and torch, for `warnings.warn`."""
    level, frame = 0, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("rmsprop", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def check_effect(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse settings without effect: of an average without one, and of a precision that no parameter has.

    Raises: ValueError.
    """
    companions = [name for name in AVERAGING if name != "ema"]
    idle = {name: group[name] for group in groups for name in companions if group[name] != CARE[name]}
    if idle and all(group["ema"] is None for group in groups):
        arguments = " and ".join(f"{name}={value!r}" for name, value in idle.items())
        raise ValueError(f"{arguments} needs an average of the weights: give ema=0.9999 too, or leave it out")
    params = [p for group in groups for p in group["params"]]
    for names, applies, kind, advice in _PRECISIONS:
        idle = {name: group[name] for group in groups for name in names if group[name] != CARE[name]}
        # one such parameter is enough: groups of one kind of layer each often share their settings
        if idle and params and not any(is_lazy(p) or applies(p.dtype) for p in params):
            arguments = " and ".join(f"{name}={value!r}" for name, value in idle.items())
            dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in params}))
            raise ValueError(
                f"{arguments} applies to {kind} parameters only, and these are {dtypes}{advice.format(dtypes)}"
            )


_PRECISIONS: tuple[tuple[tuple[str, ...], Callable[[torch.dtype], bool], str, str], ...] = (
    (
        ("rounding", "compensation"),
        is_half,
        "half-precision",
        "; leave it out, or build the optimizer after model.to(torch.bfloat16)",
    ),
    (
        ("state_dtype",),
        is_narrowable,
        "float32, bfloat16 and float16",
        ", whose averages stay {}; leave it out",
    ),
)


def check_lr(lr: Any) -> float | Tensor:
    """Return a validated learning rate: a float, or a tensor with one element.

    Raises: ValueError or TypeError for anything else.
    """
    if not isinstance(lr, Tensor):
        return check_number("lr", lr)
    if lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}; lr takes one number")
    if lr.is_floating_point() and not lr.is_meta:
        check_number("lr", lr.item())
        return lr
    raise TypeError(f"Invalid learning rate: a {lr.dtype} tensor; lr takes a float or a floating-point tensor")


def read(group: Mapping[str, Any]) -> tuple[Rule, Hyper]:
    """Return a group's current rule and numbers."""
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
    return rule, Hyper(
        *numbers, group["reference_lr"], group["max_update"], group["clip_weights"], Averaging.of(group)
    )


# Validating a rule's nine fields takes 5 µs, as long as the rest of a small network's loop.
@lru_cache(maxsize=256)
def _rule(*switches: Any) -> Rule:
    """Return the rule, with NumPy switches converted to Python's."""
    return Rule(*(check_switch(name, value) for name, value in zip(Rule.__dataclass_fields__, switches, strict=True)))


def changed(before: Rule, now: Rule) -> str | None:
    """Return the message for a rule that changed during a run. None if it did not.

    Raising momentum from 0 and flipping maximize are allowed, since the state keeps its meaning.
    """
    for name in dialects.SWITCHES:
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            return (
                f"{name} changed from {old!r} to {new!r} during the run, but the state was made under the old rule; "
                f"set it back, or build a new RMSprop({name}={new!r})"
            )
    return None
