"""Checks of saved state, a parameter's entry at a time, before anything of it is used: it fits, and can be copied."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from rmsprop.printing import shown
from rmsprop.spec import AVERAGES
from rmsprop.state.matching import Match, Pair
from rmsprop.state.saved_groups import MergedGroups
from rmsprop.state.values import excess
from rmsprop.tensors import shards

SHAPED = (*AVERAGES, "compensation")
PLAIN = (Tensor, torch.nn.Parameter)
_REAL = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def misfits(matched: Match, merged: MergedGroups, state: Mapping[Any, Any]) -> dict[Tensor, list[str]]:
    """By parameter, what of its saved state does not fit it.

    Raises: ValueError where the momentum buffer is in other units.
    """
    found = {}
    left_open = {indices for indices, names in merged.left_open.items() if "lr_in_buffer" in names}
    for pair in matched.pairs:
        entry = state.get(pair.key)
        if not entry:
            continue
        centered = merged.groups[pair.group]["centered"]
        wrong = [] if _fits(pair.param, entry, centered) else _faults(pair, entry, centered)
        if wrong:
            found[pair.param] = wrong
        if left_open and "momentum_buffer" in entry and (pair.group, pair.saved) in left_open:
            raise ValueError(
                f"loaded state dict holds the momentum_buffer of {pair.label} without the learning rate in it, as "
                "torch keeps it, and this optimizer has lr_in_buffer=True; build it with lr_in_buffer=False"
            )
    return found


def _fits(param: Tensor, entry: Mapping[str, Any], centered: bool) -> bool:
    """Whether an entry is of the usual kind and fits: plain tensors of a plain parameter's shape, and a count."""
    if type(param) not in PLAIN or "step" not in entry or (centered and "grad_avg" not in entry):
        return False
    for name, value in entry.items():
        if type(value) not in PLAIN or value.is_nested or not value.is_cpu:
            return False
        if name == "step":
            if value.dim() or value.dtype not in _REAL or not 0 <= value.item() < 2**63:
                return False
        elif name not in SHAPED or value.dtype not in _REAL or value.shape != param.shape or not _is_strided(value):
            return False
    return param.dtype in _REAL


def _is_strided(value: Tensor) -> bool:
    return value.layout == torch.strided


def _faults(pair: Pair, entry: Mapping[str, Any], centered: bool) -> list[str]:
    param, label = pair.param, pair.label
    lacking = [name for name in ("step", "grad_avg") if name not in entry and (name == "step" or centered)]
    names = ", ".join(shown(name, 40).strip("'") for name in list(entry)[:12])
    wrong = [f"the state of {label} holds {names} and lacks {', '.join(lacking)}"] if lacking else []
    if not _is_count(entry.get("step", 0)):
        wrong.append(f"step of {label} is {shown(entry['step'], 60)}; it takes one finite count >= 0")
    for name, value in entry.items():
        if name in SHAPED:
            wrong += _slot_faults(str(name), value, param, label)
        elif getattr(value, "is_meta", False):
            wrong.append(
                f"{shown(name, 40).strip(chr(39))} of {label} is on the device meta, where tensors hold no numbers"
            )
        elif not isinstance(value, Tensor) and (more := excess(value)):
            wrong.append(f"{shown(name, 40).strip(chr(39))} of {label} holds {more}")
    return wrong


def _slot_faults(name: str, value: Any, param: Tensor, label: str) -> list[str]:
    """What is wrong with a slot that has its parameter's shape."""
    if is_lazy(param):
        return [f"{label} has no shape yet: run the model once before its state is loaded"]
    if not isinstance(value, Tensor):
        said = f"a {type(value).__name__}"
    elif value.is_nested or is_lazy(value):
        said = "no shape"
    elif value.shape != param.shape:
        said = f"shape {tuple(value.shape)}"
    elif value.layout != torch.strided or value.is_meta or not (value.is_floating_point() or value.is_complex()):
        said = f"{value.dtype} of layout {value.layout} on {value.device}"
    elif value.is_complex() != param.is_complex() or not _copies(value):
        said = str(value.dtype)
    elif shards.is_dtensor(value) and not shards.is_dtensor(param):
        return [
            f"{name} of {label} is spread over processes (DTensor) and the parameter is not: take the state with "
            "StateDictOptions(full_state_dict=True)"
        ]
    else:
        return []
    like = f"shape {tuple(param.shape)}" if said.startswith(("shape", "a ", "no ")) else str(param.dtype)
    return [f"{name} of {label} has {said}, the parameter has {like}"]


def _copies(value: Tensor) -> bool:
    """Whether torch can turn numbers of a tensor's dtype into another: it cannot for float4 and bits."""
    if value.dtype in _REAL or type(value) not in PLAIN:
        return True
    wide = torch.complex64 if value.is_complex() else torch.float32
    try:
        torch.empty(1, dtype=value.dtype, device=value.device).to(wide)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _is_count(value: Any) -> bool:
    if isinstance(value, Tensor):
        if (
            value.is_nested
            or value.is_meta
            or value.is_complex()
            or value.layout != torch.strided
            or value.numel() != 1
        ):
            return False
        try:
            return _is_count(value.item())
        except (RuntimeError, NotImplementedError):  # of a dtype that is no number's
            return False
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**63
