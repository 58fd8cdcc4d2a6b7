"""Places loaded state and learning rates in the optimizer, in new tensors or in its present ones.

A present tensor is written in place only if a captured graph (capturable=True) or another process (shared memory)
reads it. Otherwise it is replaced, as in torch, since an earlier state dict may refer to it. State dicts hold copies
of the tensors that a load writes in place.
"""

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from rmsprop.spec import AVERAGES, plain
from rmsprop.state.entries import PLAIN, SHAPED
from rmsprop.state.matching import Match, Pair
from rmsprop.state.precision import Conversion, Losses, to_full_precision
from rmsprop.state.saved_groups import Group, MergedGroups
from rmsprop.state.slots import step_tensor
from rmsprop.tensors import shards
from rmsprop.tensors.bucket import fresh_slot, slot_dtype


class Writes:
    """Deferred in-place writes, carried out after everything that can fail."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []

    def into(self, target: Tensor, source: Tensor) -> Tensor:
        """Schedule a write of the source into the target. Returns: the target."""
        self._copies.append((target, source))
        return target

    def carry_out(self) -> None:
        """Carry out the writes. Sources that share memory with a target are copied first."""
        if not self._copies:
            return
        written = {_memory(target) for target, _ in self._copies}
        ready = [
            (target, source.clone() if source is not target and _memory(source) in written else source)
            for target, source in self._copies
        ]
        with torch.no_grad():
            for target, source in ready:
                if source is not target:
                    target.copy_(source)


def _memory(tensor: Tensor) -> int:
    return int(shards.shard(tensor).untyped_storage().data_ptr())


def place_lr(groups: list[Group], new: list[Group], writes: Writes) -> None:
    """Write a loaded tensor lr into the present one, where a captured graph and other groups read it."""
    for group, loaded in zip(groups, new, strict=True):
        here, there = group["lr"], loaded["lr"]
        if loaded is group or not isinstance(here, Tensor) or not isinstance(there, Tensor):
            continue
        sharing = [new[i]["lr"] for i, other in enumerate(groups) if other["lr"] is here]
        alike = all(isinstance(lr, Tensor) and (lr is here or float(lr) == float(there)) for lr in sharing)
        if alike and here.dtype == there.dtype and not here.requires_grad and not here.is_inference():
            loaded["lr"] = writes.into(here, there.detach().reshape(here.shape))


def place_state(
    present: Any,
    matched: Match,
    merged: MergedGroups,
    state: Mapping[Any, Any],
    known: set[Any],
    reshaped: Mapping[Tensor, Any],
    writes: Writes,
    losses: Losses,
) -> Any:
    """Return the new state, keyed by the present parameters, on their devices, each slot in its own dtype.

    Args:
        known: the keys of the saved state that belong to parameters. Entries of other keys are kept, as in torch.
        reshaped: the parameters whose saved state does not fit. They keep their present state, as do missing ones.
    Raises: ValueError for state that cannot be copied.
    """
    skipped = set(map(id, reshaped))
    taken = {id(pair.param) for pair in matched.pairs} - skipped  # ids: a tensor's hash is slow
    before = {id(key): entry for key, entry in present.items()}
    held = type(present)(dict) if isinstance(present, defaultdict) else type(present)()
    for key, entry in present.items():
        if isinstance(key, Tensor) and id(key) not in taken:
            held[key] = _left(key, entry, merged.groups)
    with torch.inference_mode(False), torch.no_grad():
        for pair in matched.pairs:
            entry = state.get(pair.key)
            if entry is None or id(pair.param) in skipped:
                continue
            own = before.get(id(pair.param), {})
            try:
                held[pair.param] = _placed(pair, entry, own, merged.groups[pair.group], writes, losses)
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = str(error).partition("\n")[0]
                raise ValueError(f"the state of {pair.label} cannot be copied: {reason:.200}") from error
    if not known.issuperset(state):
        held.update({key: entry for key, entry in state.items() if key not in known})
    return held


def _left(param: Tensor, entry: Any, groups: list[Group]) -> Any:
    """Return the entry that a parameter keeps, without slots that its group's new settings cannot use."""
    if not isinstance(entry, Mapping) or not {"compensation", "ema"} & entry.keys():
        return entry
    group = next((group for group in groups if any(p is param for p in group["params"])), None)
    if group is None or all(continues(name, value, param, group) for name, value in entry.items()):
        return entry
    return {name: value for name, value in entry.items() if continues(name, value, param, group)}


def _placed(
    pair: Pair, entry: Mapping[str, Any], own: Mapping[str, Any], group: Group, writes: Writes, losses: Losses
) -> Any:
    """Return one parameter's saved entry, placed in the optimizer.

    Args:
        own: the parameter's present entry.
    """
    param = pair.param
    usual = not group["capturable"] and type(param) in PLAIN and param.is_contiguous()
    made = {}
    for name, value in entry.items():
        if not continues(name, value, param, group):
            continue
        dtype = slot_dtype(name, param.dtype, group["state_dtype"]) if name in AVERAGES else param.dtype
        as_kept = Conversion(name, dtype, group["state_dtype"], losses)
        if name in own and _is_read_elsewhere(own[name], group):
            made[name] = _written(name, value, own[name], param, group, writes, as_kept)
        elif name == "step":
            kept = (
                usual and type(value) is Tensor and value.dtype == torch.float64 and value.is_cpu and not value.dim()
            )
            made[name] = value.clone() if kept else step_tensor(float(value), param, group)
        elif (
            usual
            and type(value) is Tensor
            and value.dtype == dtype
            and name in SHAPED
            and value.device == param.device
            and value.is_contiguous()
        ):
            made[name] = value.clone()
        else:
            made[name] = _new(name, value, param, writes, as_kept)
    return made


def _is_read_elsewhere(present: Any, group: Group) -> bool:
    """Return whether a captured graph or another process may read a tensor in place."""
    if group["capturable"]:
        return isinstance(present, Tensor)
    # On a GPU, torch reports all tensors as shared.
    return type(present) in PLAIN and present.is_cpu and present.untyped_storage().is_shared()


def _written(
    name: str, value: Any, present: Tensor, param: Tensor, group: Group, writes: Writes, as_kept: Conversion
) -> Any:
    """Schedule a write of a saved value into the present tensor if it fits, and return the tensor, else a new one."""
    if name == "step":
        count = step_tensor(float(value), param, group)
        return writes.into(present, count) if _takes(present, count, count.dtype) else count
    dtype = as_kept.dtype if name in AVERAGES else getattr(value, "dtype", None)
    if name in SHAPED and shards.is_dtensor(param):
        fits = shards.is_dtensor(present) and present.dtype == dtype and shards.same_placements(present, param)
        if not fits or present.is_inference():
            return _new(name, value, param, writes, as_kept)
        writes.into(shards.shard(present), as_kept(shards.part_for(param, value.detach())))
        return present
    if isinstance(value, Tensor) and present.device == param.device and _takes(present, value, dtype):
        value = value.detach()
        return writes.into(present, (as_kept(value) if name in AVERAGES else value).to(param.device))
    return _new(name, value, param, writes, as_kept)


def _new(name: str, value: Any, param: Tensor, writes: Writes, as_kept: Conversion) -> Any:
    """Return a copy of a saved value in a new tensor of the parameter's layout."""
    if not isinstance(value, Tensor):
        return deepcopy(value)
    value = value.detach()
    if name not in SHAPED:
        return value.to(device=param.device, copy=True)
    fresh = fresh_slot(param, 0.0, as_kept.dtype) if name in AVERAGES else torch.zeros_like(param)
    if shards.is_dtensor(param):
        writes.into(shards.shard(fresh), as_kept(shards.part_for(param, value)))
        return fresh.detach()
    value = as_kept(value)
    if type(value) in PLAIN and type(param) in PLAIN:
        return fresh.detach().copy_(value)
    return value.to(device=param.device, copy=True)


def _takes(present: Tensor, value: Tensor, dtype: torch.dtype | None) -> bool:
    """Return whether a value can be written into the present tensor."""
    if present.dtype != dtype or present.shape != value.shape or present.layout != torch.strided:
        return False
    if present.requires_grad or present.is_inference() or present.is_meta:
        return False
    if any(stride == 0 and size > 1 for size, stride in zip(present.shape, present.stride(), strict=True)):
        return False  # elements that share memory
    if type(present) in PLAIN or type(value) in PLAIN:
        return type(present) in PLAIN and type(value) in PLAIN
    own, other = (getattr(x, "_spec", None) for x in (present, value))  # a DTensor's mesh and placements
    return type(present) is type(value) and own is not None and own == other


def continues(name: str, value: Any, param: Tensor, group: Group) -> bool:
    """Return whether a slot stays valid under a group's settings.

    If not, it is dropped. A Kahan remainder is below a unit in the last place. An average of the weights that no step
    advances would grow stale.
    """
    if name == "ema":
        return group["ema"] is not None
    if name != "compensation":
        return True
    return bool(group["compensation"]) and isinstance(value, Tensor) and value.dtype == param.dtype


def exported(packed: dict[str, Any], full_precision: bool) -> dict[str, Any]:
    """Return a state dict that no later load writes into: lr tensors and state read elsewhere are copied.

    NumPy numbers in groups become Python's, since torch.load(weights_only=True) does not read NumPy's.

    Args:
        full_precision: whether to return state of fewer bytes in the dtype of the arithmetic, in copies.
    Mutates: packed.
    """
    state = packed.get("state", {})
    for group in packed.get("param_groups", ()):
        if full_precision:
            group["state_dtype"] = "float32"
            for key in group["params"]:
                if key in state:
                    state[key] = to_full_precision(state[key])
        for name, value in group.items():
            pair = type(value) in (list, tuple) and name != "params"
            group[name] = type(value)(map(plain, value)) if pair else plain(value)
        if isinstance(group.get("lr"), Tensor):
            group["lr"] = group["lr"].detach().clone()
        for key in group["params"]:
            entry = state.get(key)
            if entry and any(_is_read_elsewhere(value, group) for value in entry.values()):
                state[key] = {
                    name: value.detach().clone() if _is_read_elsewhere(value, group) else value
                    for name, value in entry.items()
                }
    return packed
