"""Validates each parameter's saved state before it is loaded: it must fit the parameter and be copyable."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from rmsprop.printing import shown, with_article
from rmsprop.spec import AVERAGES
from rmsprop.state.matching import Match, Pair
from rmsprop.state.saved_groups import MergedGroups
from rmsprop.state.values import excess
from rmsprop.tensors import shards
from rmsprop.tensors.bucket import is_narrowable

SHAPED = (*AVERAGES, "compensation")
PLAIN = (Tensor, torch.nn.Parameter)
_REAL = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def misfits(
    matched: Match, merged: MergedGroups, saved: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]
) -> dict[Tensor, list[str]]:
    """Return, for each parameter whose saved state does not fit, the reasons.

    Args:
        saved: the saved groups, whose state_dtype determines whether `square_avg` holds codes or numbers.
    Raises: ValueError if the momentum buffer is in other units.
    """
    found = {}
    left_open = {indices for indices, switches in merged.left_open.items() if "lr_in_buffer" in switches}
    for pair in matched.pairs:
        entry = state.get(pair.key)
        if not entry:
            continue
        centered, state_dtype = merged.groups[pair.group]["centered"], saved[pair.saved].get("state_dtype", "float32")
        fits = _fits(pair.param, entry, centered) and state_dtype != "float8"
        faults = [] if fits else _faults(pair, entry, centered, state_dtype)
        if faults:
            found[pair.param] = faults
        if left_open and "momentum_buffer" in entry and (pair.group, pair.saved) in left_open:
            raise ValueError(
                f"loaded state dict holds the momentum_buffer of {pair.label} without the learning rate in it, as "
                "torch does, but this optimizer has lr_in_buffer=True; build it with lr_in_buffer=False"
            )
    return found


def _fits(param: Tensor, entry: Mapping[str, Any], centered: bool) -> bool:
    """Return whether an entry passes the quick check: a count, and plain tensors of a plain parameter's shape."""
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


def _faults(pair: Pair, entry: Mapping[str, Any], centered: bool, state_dtype: str) -> list[str]:
    param, label = pair.param, pair.label
    lacking = [name for name in ("step", "grad_avg") if name not in entry and (name == "step" or centered)]
    names = ", ".join(shown(name, 40).strip("'") for name in list(entry)[:12])
    faults = [f"the state of {label} holds {names} and lacks {', '.join(lacking)}"] if lacking else []
    if not _is_count(entry.get("step", 0)):
        faults.append(f"step of {label} is {shown(entry['step'], 60)}; it takes one finite count >= 0")
    for name, value in entry.items():
        if name in SHAPED:
            faults += _slot_faults(str(name), value, param, label, state_dtype)
        elif getattr(value, "is_meta", False):
            faults.append(
                f"{shown(name, 40).strip(chr(39))} of {label} is on the meta device, where tensors hold no data"
            )
        elif not isinstance(value, Tensor) and (more := excess(value)):
            faults.append(f"{shown(name, 40).strip(chr(39))} of {label} holds {more}")
    return faults


def _slot_faults(name: str, value: Any, param: Tensor, label: str, state_dtype: str) -> list[str]:
    """Return the faults of a slot that must have its parameter's shape."""
    if is_lazy(param):
        return [f"{label} has no shape yet: run the model once before its state is loaded"]
    expected = f"shape {tuple(param.shape)}"
    if not isinstance(value, Tensor):
        actual = with_article(type(value).__name__)
    elif value.is_nested or is_lazy(value):
        actual = "no shape"
    elif value.shape != param.shape:
        actual = f"shape {tuple(value.shape)}"
    elif (other := _other_precision(name, value, param, state_dtype)) is not None:
        return [f"{name} of {label} {other}"]
    elif value.layout != torch.strided or value.is_meta or not _is_number(name, value):
        actual, expected = f"{value.dtype} of layout {value.layout} on {value.device}", str(param.dtype)
    elif value.is_complex() != param.is_complex() or not _copies(value):
        actual, expected = str(value.dtype), str(param.dtype)
    elif shards.is_dtensor(value) and not shards.is_dtensor(param):
        return [
            f"{name} of {label} is a DTensor and the parameter is not: get the state with "
            "StateDictOptions(full_state_dict=True)"
        ]
    else:
        return []
    return [f"{name} of {label} has {actual}, the parameter has {expected}"]


def _other_precision(name: str, value: Tensor, param: Tensor, state_dtype: str) -> str | None:
    """Return why a saved `square_avg` is not of its saved group's state_dtype. None if it may be.

    torch's distributed checkpoints copy into the present tensors and cast: codes then pass for numbers.
    """
    coded = value.dtype == torch.uint8
    numbers = is_narrowable(value.dtype) and is_narrowable(param.dtype)
    if name != "square_avg" or not (coded or numbers) or coded == (state_dtype == "float8"):
        return None
    kept = "uint8, the codes of state_dtype='float8'" if coded else str(value.dtype).removeprefix("torch.")
    return (
        f"is {kept}, but its saved group has state_dtype={state_dtype!r}; load a distributed checkpoint into an "
        "optimizer of that state_dtype, since torch casts it to the present tensors"
    )


def _is_number(name: str, value: Tensor) -> bool:
    """Return whether a slot holds numbers, or the codes of float8."""
    return value.is_floating_point() or value.is_complex() or (name == "square_avg" and value.dtype == torch.uint8)


def _copies(value: Tensor) -> bool:
    """Return whether torch can convert the tensor to another dtype. It cannot convert float4 and the bits dtypes."""
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
        except (RuntimeError, NotImplementedError):  # its dtype is not a number's
            return False
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**63
