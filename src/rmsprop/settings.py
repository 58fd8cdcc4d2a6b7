"""Parameter-group settings: read from the caller's words, checked, and turned into a Rule and a Hyper."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from rmsprop import dialects, recipe
from rmsprop.bucket import is_half
from rmsprop.dialects import Dialect
from rmsprop.spec import ROUNDINGS, Hyper, Rule, check_flag, check_number, check_seed, check_switch

# Settings that say how a step runs, not what it computes. "fused" is torch's name: False asks for no native
# kernel, None leaves the choice to the backend.
EXECUTION = ("capturable", "foreach", "fused", "differentiable")

# Settings beside the dialects': none of their frameworks has them. How half precision is kept, and a bound of steps.
CARE: Mapping[str, Any] = {"rounding": "nearest", "compensation": False, "seed": 0, "max_update": None}

SPARSE = (None, "lazy", "dense")
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


def settle(dialect: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """All settings of a group under our names: the dialect's defaults, overridden by what was given.

    Returns: the settings, and the names of those that were asked for. lr is None where the dialect has no default
        and none was given: each group is then to bring its own.
    Raises:
        ValueError, TypeError: a name or value that does not work, with what would.
    """
    row = dialects.find(dialect)
    execution = {name: value for name, value in given.items() if name in EXECUTION or name in CARE}
    apart = (*EXECUTION, *CARE, "recipe")
    words = dialects.read_words(row, {name: value for name, value in given.items() if name not in apart})
    followed = given.get("recipe")
    if followed is not None:
        words = recipe.follow(followed, row.name, words)
    group = {**TORCH_GROUP, **row.complete(words, words), "dialect": row.name, **execution}
    if group["lr"] is None and "lr" not in words:
        return {**check_new({**group, "lr": 0.0}), "lr": None}, frozenset(words)
    group = check_new(group)
    if followed is not None:
        group["recipe"] = recipe.note(followed, group)
    return group, frozenset(words)


def own_group(given: dict[str, Any], defaults: dict[str, Any], asked: frozenset[str]) -> dict[str, Any]:
    """A group as torch's base class takes it, with the settings it was given under our names, checked.

    Args:
        given: the group, in the dialect's or torch's words.
        defaults: the optimizer's settings.
        asked: which of them were asked for, and do not merely follow from the dialect.
    Raises:
        ValueError, TypeError: a name or value that does not work, with what would.
    """
    if "params" not in given:
        raise ValueError(f"a parameter group has no params; it holds {', '.join(map(str, given)) or 'nothing'}")
    dialect = given.get("dialect", defaults["dialect"])
    row = dialects.find(dialect)
    known = {*row.words, *row.refused, *row.limits, *TORCH_GROUP, *dialects.FOREIGN} - {"dialect", "name"}
    words = {name: value for name, value in given.items() if name in known}
    rest = {name: value for name, value in given.items() if name not in known}
    whole = next((name for name in ("nonfinite", "nonfinite_limit") if name in rest), None)
    if whole is not None:
        raise TypeError(
            f"{whole}={rest[whole]!r} in a parameter group: one gradient that is not finite stops the step of all "
            f"groups, so {whole} is an argument of RMSprop, beside params"
        )
    execution = {name: words.pop(name) for name in (*EXECUTION, *CARE) if name in words}
    followed = rest.pop("recipe", None)
    same = dialect == defaults["dialect"] and followed is None
    base = defaults if same else {**defaults, **row.defaults(), "dialect": row.name}
    kept = asked if same else frozenset()
    read = dialects.read_words(row, words)
    if followed is not None:
        read = recipe.follow(followed, row.name, read)
    followed = followed or defaults.get("recipe")
    settings = {**base, **row.complete({**base, **read}, kept | read.keys()), **execution}
    if settings["reference_lr"] is not None and "reference_lr" not in read and base["lr"] is not None:
        settings["reference_lr"] = base["reference_lr"] or float(
            base["lr"]
        )  # timm's: the constructor's, in every group
    if settings["lr"] is None and "lr" not in read:
        raise TypeError(
            f"dialect={row.name!r} has no default learning rate, as {row.call or row.title} has none; "
            f"give {row.word('lr')}=..., such as 1e-3"
        )
    group = {**rest, **check_new(settings)}
    if followed is not None:
        group["recipe"] = recipe.note(followed, group)
    group["params"] = _listed(iterable(group["params"]))
    _check_complex(row, group["params"])
    return group


def iterable(params: Any) -> Any:
    """What was given as params, if it can be gone through. Raises: TypeError."""
    if isinstance(params, Iterable) and not isinstance(params, str | bytes):
        return params
    raise TypeError(
        f"params is {params!r:.60}, a {type(params).__name__}; it takes an iterable of tensors, of pairs of name and "
        "tensor, or of dicts that define groups"
    )


def _listed(params: Any) -> Any:
    """A group's parameters as a list.

    Raises: TypeError for a tuple that is no pair of name and tensor; ValueError for a tensor whose elements share
        memory, which no step can write.
    """
    if isinstance(params, (Tensor, set)):  # the base class has its own word for these two
        return params
    found = list(params)
    for i, given in enumerate(found):
        if isinstance(given, tuple) and len(given) != 2:
            raise TypeError(f"params holds the tuple {given!r:.60}; a named parameter is a pair of name and tensor")
        p = given[1] if isinstance(given, tuple) else given
        if not isinstance(p, Tensor) or is_lazy(p) or p.layout != torch.strided:
            continue
        if _shares(p):
            raise ValueError(
                f"parameter {i} has elements that share memory (shape {tuple(p.shape)}, strides {p.stride()}), and "
                "a step cannot write each of them; give its clone()"
            )
    return found


def _shares(p: Tensor) -> bool:
    """Whether two elements of a tensor are one place in memory."""
    reach = 0
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size > 1 and stride <= reach and p.numel():
            extent = 1 + sum(step * (n - 1) for step, n in zip(p.stride(), p.shape, strict=True))
            if stride == 0 or extent < p.numel():
                return True
            places = torch.zeros((), dtype=torch.int64, device="cpu")
            for n, step in zip(p.shape, p.stride(), strict=True):
                places = places.unsqueeze(-1) + torch.arange(n, device="cpu") * step
            distinct: Tensor = torch.unique(places)
            return distinct.numel() < p.numel()
        reach += stride * max(size - 1, 0)
    return False


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


def check(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a group in plain Python types (a tensor lr stays one).

    Raises:
        ValueError, TypeError: a value that does not work, or two that do not go together.
    """
    checked: dict[str, Any] = {"dialect": dialects.find(group["dialect"]).name}
    checked |= {name: check_number(name, group[name]) for name in dialects.HYPERS if name != "lr"}
    checked["lr"] = check_lr(group["lr"])
    checked |= {name: check_switch(name, group[name]) for name in (*dialects.SWITCHES, "maximize")}
    checked |= {name: check_flag(name, group[name]) for name in ("capturable", "differentiable", *CLIP_ORDER)}
    checked["compensation"] = check_flag("compensation", group["compensation"])
    checked["seed"] = check_seed(group["seed"])
    if not isinstance(group["rounding"], str) or group["rounding"] not in ROUNDINGS:
        raise ValueError(f"Invalid rounding: {group['rounding']!r}; choose one of {', '.join(map(repr, ROUNDINGS))}")
    checked["rounding"] = group["rounding"]
    for name in (*dialects.CLIPS, "reference_lr", "max_update"):
        checked[name] = None if group[name] is None else check_number(name, group[name])
    if group["sparse"] not in SPARSE:
        raise ValueError(
            f"Invalid sparse: {group['sparse']!r}; it takes 'lazy' (rows that have a gradient step, others keep "
            "their "
            "averages), 'dense' (averages decay everywhere) or None (sparse gradients are refused)"
        )
    checked["sparse"] = group["sparse"]
    if checked["weight_decay_mode"] == "corrected" and not checked["reference_lr"]:
        raise ValueError(
            'weight_decay_mode="corrected" divides by the learning rate at construction, which is 0; give '
            "reference_lr=..., the highest of the schedule"
        )
    for name in ("foreach", "fused"):
        checked[name] = None if group[name] is None else check_flag(name, group[name])
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


def check_edited(group: Mapping[str, Any], checked: dict[int, tuple[Any, ...]]) -> None:
    """As `check`, for a group that may have been edited since `checked` says so, by its id.

    A schedule may take lr below 0, where a run cannot begin; a tensor's number stays on its device.

    Mutates: checked.
    Raises: ValueError, TypeError: a value that does not work, or two that do not go together.
    """
    today = tuple([id(x) if isinstance(x, Tensor) else x for x in map(group.get, TORCH_GROUP)])
    if checked.get(id(group)) == today:
        return
    lost = [name for name in TORCH_GROUP if name not in group]
    if lost:
        raise ValueError(f"a parameter group has lost its {', '.join(lost)}; a group keeps all of its settings")
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() == 1 and lr.is_floating_point() and not lr.is_meta:
        lr = 0.0
    elif isinstance(lr, Real) and not isinstance(lr, bool) and lr < 0:
        lr = -lr
    check({**group, "lr": lr})
    checked[id(group)] = today


def check_half(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to round as asked where no parameter is of half precision: it would be accepted and ignored.

    Raises: ValueError.
    """
    asked = {
        name: group[name] for group in groups for name in ("rounding", "compensation") if group[name] != CARE[name]
    }
    params = [p for group in groups for p in group["params"]]
    if asked and params and not any(is_lazy(p) or is_half(p.dtype) for p in params):
        shown = " and ".join(f"{name}={value!r}" for name, value in asked.items())
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in params}))
        raise ValueError(
            f"{shown} says how parameters of half precision are rounded, and these are {dtypes}; leave it out, or "
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
        group["v_init"],
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
