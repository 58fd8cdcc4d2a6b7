"""Taking over a state dict: checked whole before anything is changed, and state kept in its own dtype.

torch's base class casts every state tensor to the parameter's dtype (float32 averages of a bfloat16 model lose
16 bits, pytorch#43706) and may share memory with the dict that was given; this does neither.
"""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rmsprop import settings
from rmsprop.bucket import arithmetic_dtype
from rmsprop.dialects import SWITCHES

Group = dict[str, Any]


def load_groups(groups: list[Group], saved: list[Mapping[str, Any]]) -> list[Group]:
    """The saved groups' settings around the present groups' parameters.

    A switch that the saved group lacks (torch saves none of ours) stays as constructed.

    Raises:
        ValueError, TypeError: group counts or sizes differ, or a saved setting does not work.
    """
    if len(groups) != len(saved):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: it has {len(saved)}, "
            f"this optimizer has {len(groups)}"
        )
    loaded = []
    for i, (group, kept) in enumerate(zip(groups, saved, strict=True)):
        sizes = len(group["params"]), len(kept["params"])
        if sizes[0] != sizes[1]:
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"group {i} has {sizes[1]} parameters there and {sizes[0]} here"
            )
        kept = deepcopy({name: value for name, value in kept.items() if name != "params"})
        merged = {name: kept.get(name, group[name]) for name in settings.TORCH_GROUP}
        new = {**kept, **settings.check(merged), "params": group["params"]}
        if "param_names" in group:
            new.setdefault("param_names", group["param_names"])
        if not any(name in kept for name in SWITCHES if name != "centered"):
            _say_what_torch_left_open(group, new)
        loaded.append(new)
    return loaded


def _say_what_torch_left_open(group: Group, new: Group) -> None:
    """Warn when a state dict without our switches continues under another rule than torch's."""
    differ = [
        f"{name}={group[name]!r}"
        for name in SWITCHES
        if name != "centered" and group[name] != settings.TORCH_GROUP[name]
    ]
    if differ:
        warnings.warn(
            f"the loaded state dict names no {', '.join(d.split('=')[0] for d in differ)}: torch's RMSprop saved "
            f"it; this run goes on with {', '.join(differ)} as constructed, and with its eps={new['eps']:g}",
            stacklevel=5,
        )


def load_state(
    groups: list[Group], saved_groups: list[Mapping[str, Any]], saved: Mapping[Any, Any]
) -> dict[Any, Any]:
    """The saved state, keyed by the present parameters: copies, on their devices, each slot in its own dtype.

    Raises:
        ValueError: an entry is not RMSprop's, or its shape is not the parameter's.
    """
    ids = chain.from_iterable(group["params"] for group in saved_groups)
    owners = ((p, group) for group in groups for p in group["params"])
    places = dict(zip(ids, owners, strict=True))
    state: dict[Any, Any] = {}
    for key, entry in saved.items():
        if key not in places:
            state[key] = entry  # not a parameter's: kept as it is, as torch does
            continue
        param, group = places[key]
        if entry:
            _check_entry(key, entry, param, group)
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
