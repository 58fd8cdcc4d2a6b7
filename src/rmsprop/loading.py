"""Taking over a state dict: checked whole before anything is changed, and state kept in its own dtype.

torch's base class casts every state tensor to the parameter's dtype (float32 averages of a bfloat16 model lose
16 bits, pytorch#43706) and may share memory with the dict that was given; this does neither.
"""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from rmsprop import settings
from rmsprop.bucket import arithmetic_dtype
from rmsprop.dialects import DIALECTS, SWITCHES, find, read_words

Group = dict[str, Any]


def load(groups: list[Group], state_dict: Mapping[str, Any]) -> tuple[list[Group], dict[Any, Any]]:
    """What a state dict makes of the present groups: new groups, and state keyed by their parameters.

    Groups and parameters are matched by order. The saved settings replace the present ones; a switch that the
    saved group lacks (torch saves none of ours) stays as constructed, and a warning says so where it matters.

    Raises:
        ValueError, TypeError: it is no RMSprop's, does not fit, or holds a setting that does not work.
    """
    saved = state_dict.get("param_groups")
    if not isinstance(saved, list) or "state" not in state_dict:
        raise ValueError(
            "loaded state dict is no state dict of an optimizer: it has no list of param_groups and no state; "
            "give what optimizer.state_dict() returned"
        )
    if len(groups) != len(saved):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: it has {len(saved)}, "
            f"this optimizer has {len(groups)}"
        )
    saved = [_in_our_words(i, group, kept) for i, (group, kept) in enumerate(zip(groups, saved, strict=True))]
    loaded = [_load_group(i, group, kept) for i, (group, kept) in enumerate(zip(groups, saved, strict=True))]
    state = _load_state(loaded, saved, state_dict["state"])
    for new, kept in zip(loaded, saved, strict=True):
        _say_what_was_left_open(new, kept)
    return loaded, state


def _in_our_words(i: int, group: Group, kept: Mapping[str, Any]) -> Mapping[str, Any]:
    """The saved group with the words of the present group's dialect, such as timm's lr_in_momentum, as ours.

    Raises: ValueError if they are the words of a dialect that the group does not have.
    """
    row = find(group["dialect"])
    known = {*settings.TORCH_GROUP, *row.words, *row.limits, "params"}
    for other in DIALECTS.values():
        strange = [word for word in other.words if word in kept and word not in known]
        if strange and "square_avg" in other.states:
            raise ValueError(
                f"loaded state dict is of {other.title}: its group {i} holds {', '.join(strange)}, which this "
                "optimizer, "
                f"of dialect={row.name!r}, does not know; build it with dialect={other.name!r}, or turn the "
                "checkpoint "
                "into this dialect's with `rmsprop convert`"
            )
    words = {word: value for word, value in kept.items() if word in row.words or word in row.limits}
    words = {word: value for word, value in words.items() if word not in settings.TORCH_GROUP}
    if not words or "dialect" in kept:
        return kept
    rest = {name: value for name, value in kept.items() if name not in words}
    fixed = {name: value for name, value in row.defaults().items() if name in SWITCHES}  # its class has no words for
    return {**fixed, **rest, **read_words(row, words)}


def _load_group(i: int, group: Group, kept: Mapping[str, Any]) -> Group:
    """The saved group's settings around the present group's parameters."""
    sizes = len(group["params"]), len(kept["params"])
    if sizes[0] != sizes[1]:
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
            f"group {i} has {sizes[1]} parameters there and {sizes[0]} here"
        )
    notes = deepcopy({name: value for name, value in kept.items() if name != "params"})
    merged = {name: notes.get(name, group[name]) for name in settings.TORCH_GROUP}
    new = {**notes, **settings.check(merged), "params": group["params"]}
    if "param_names" in group:
        new.setdefault("param_names", group["param_names"])
    return new


def _left_open(new: Group, kept: Mapping[str, Any]) -> list[str]:
    """The switches that the saved group does not name and that are not torch's here."""
    return [name for name in SWITCHES if name not in kept and new[name] != settings.TORCH_GROUP[name]]


def _say_what_was_left_open(new: Group, kept: Mapping[str, Any]) -> None:
    names = _left_open(new, kept)
    if names:
        kept_so = ", ".join(f"{name}={new[name]!r}" for name in names)
        warnings.warn(
            f"the loaded state dict names no {', '.join(names)}: a class without them, such as torch's, saved it; "
            f"this run goes on with {kept_so} as constructed, and with its eps={new['eps']:g}",
            stacklevel=5,
        )


def _load_state(groups: list[Group], saved_groups: list[Mapping[str, Any]], saved: Any) -> dict[Any, Any]:
    """The saved state keyed by the present parameters: copies, on their devices, each slot in its own dtype."""
    places: dict[Any, tuple[Tensor, Group, bool]] = {}
    for group, kept in zip(groups, saved_groups, strict=True):
        open_units = "lr_in_buffer" in _left_open(group, kept)
        places |= {key: (p, group, open_units) for key, p in zip(kept["params"], group["params"], strict=True)}
    state: dict[Any, Any] = {}
    for key, entry in saved.items():
        if key not in places:
            state[key] = entry  # not a parameter's: kept as it is, as torch does
            continue
        param, group, open_units = places[key]
        if entry:
            _check_entry(key, entry, param, group)
        if open_units and "momentum_buffer" in entry:
            raise ValueError(
                f"loaded state dict holds the momentum_buffer of parameter {key} without the learning rate in it, as "
                "torch keeps it, and this optimizer has lr_in_buffer=True; build it with lr_in_buffer=False"
            )
        state[param] = {name: _adopt(name, value, param, group) for name, value in entry.items()}
    return state


def _check_entry(key: Any, entry: Mapping[str, Any], param: Tensor, group: Group) -> None:
    needed = ["step", "square_avg"] + (["grad_avg"] if group["centered"] else [])
    missing = [name for name in needed if name not in entry]
    if missing:
        raise ValueError(
            f"loaded state dict is not an RMSprop's: the state of parameter {key} holds "
            f"{', '.join(map(str, entry))} and lacks {', '.join(missing)}"
        )
    for name in ("square_avg", "grad_avg", "momentum_buffer"):
        value = entry.get(name)
        if value is not None and (not isinstance(value, Tensor) or value.shape != param.shape):
            shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"loaded state dict does not fit: {name} of parameter {key} has {shown}, "
                f"the parameter has shape {tuple(param.shape)}"
            )


def _adopt(name: str, value: Any, param: Tensor, group: Group) -> Any:
    """A copy of one saved value where this optimizer keeps it."""
    if name == "step":
        return step_tensor(float(value), param, group)
    if not isinstance(value, Tensor):
        return deepcopy(value)
    if not (value.is_floating_point() or value.is_complex()):
        return value.to(device=param.device, copy=True)
    return value.detach().to(device=param.device, dtype=arithmetic_dtype(param.dtype), copy=True)


def step_tensor(count: float, param: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A step counter as torch keeps it: no dimensions, on the CPU, or with capturable on the parameter's device."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.tensor(count, dtype=dtype, device=param.device if group["capturable"] else "cpu")
