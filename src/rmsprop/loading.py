"""Taking over a state dict: checked whole before anything is changed, and written in place where it fits.

torch's base class pairs parameters by order whatever their names, casts every state tensor to the parameter's dtype
(float32 averages of a bfloat16 model lose 16 bits, pytorch#43706), and puts new tensors in the place of those that a
CUDA graph or another process reads (pytorch#147288); this does none of the three.
"""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmsprop import foreign, settings, shards
from rmsprop.bucket import arithmetic_dtype, fresh_slot
from rmsprop.dialects import SWITCHES
from rmsprop.groups import HPARAMS, Difference, Group, Settled, settle, show
from rmsprop.matching import MATCHES, Match, Pair, hint, match, rekeyed
from rmsprop.spec import plain as plain_value

_SLOTS = ("square_avg", "grad_avg", "momentum_buffer")
_SHAPED = (*_SLOTS, "compensation")
_PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Report:
    """What loading a state dict did; `print(report)` shows it.

    Attributes:
        matched: "name" or "order".
        loaded: parameters whose state came from the state dict.
        stateless: parameters that it knows and has no state of: they had never stepped, and begin afresh.
        missing: parameters here that it lacks (strict=False: they keep the state that they had).
        unexpected: parameters of it that are not here, and state of it that no group of it lists.
        reshaped: what of it does not fit its parameter (strict=False: it keeps the state that it had).
        differences: settings that differ, as the optimizer had them and as the state dict has them.
        kept: whether the optimizer's settings stayed.
    """

    matched: str
    loaded: tuple[str, ...]
    stateless: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]
    differences: tuple[Difference, ...]
    kept: bool

    def __str__(self) -> str:
        lines = [f"state of {len(self.loaded)} parameters loaded, matched by {self.matched}"]
        for name in ("stateless", "missing", "unexpected", "reshaped"):
            found = getattr(self, name)
            lines += [f"{name} ({len(found)}): {'; '.join(found)}"] if found else []
        now = "this optimizer's is kept" if self.kept else "the loaded one is taken"
        lines += [f"group {d.group}: {d}: {now}" for d in self.differences]
        return "\n".join(lines)


def load(
    optimizer: Any,
    state_dict: Any,
    strict: bool,
    rename: Mapping[str, str] | None,
    hparams: str | None,
    by: str | None = None,
) -> Report:
    """Make an RMSprop go on from a state dict. See RMSprop.load_state_dict.

    Mutates: the optimizer, only after everything was checked. Tensors of its state that fit stay the same tensors.
    Raises: ValueError, TypeError: it is no RMSprop's, does not fit, or holds a setting that does not work.
    """
    if torch.is_inference_mode_enabled():  # state made here is to be written after it
        with torch.inference_mode(False), torch.no_grad():
            return load(optimizer, state_dict, strict, rename, hparams)
    if hparams is not None and hparams not in HPARAMS:
        raise ValueError(f"Invalid hparams: {hparams!r}; it takes 'load' (the saved numbers), 'keep' (these) or None")
    if by is not None and by not in MATCHES:
        raise ValueError(
            f"Invalid match: {by!r:.80}; it takes 'name', 'order' or None, which decides by what is there"
        )
    state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    foreign.check_shape(state_dict)
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    state, lost = rekeyed(saved, state_dict["state"])
    foreign.check_owner(groups, saved, state)
    matched = match(groups, saved, rename, by)
    settled = settle(groups, saved, matched, optimizer._asked, hparams == "keep")
    reshaped = _misfits(matched, settled, state)
    ownerless = [f"state under the key {key!r:.40}" for key in lost]
    if strict and (matched.missing or matched.unexpected or reshaped or lost):
        raise ValueError(_does_not_fit(matched, [x for found in reshaped.values() for x in found], ownerless))
    said = (*settled.notes, *_lost_remainders(matched, settled, state), *_surprise(optimizer, settled, hparams))
    for sentence in said:
        warnings.warn(sentence, stacklevel=settings.to_caller())
    writes = _Writes()
    if hparams != "keep":
        _place_lr(groups, settled.groups, writes)
    known = {*lost, *(key for group in saved for key in group["params"])}
    held = _place_state(optimizer.state, matched, settled, state, known, reshaped, writes)
    writes.carry_out()
    optimizer.__setstate__({"state": held, "param_groups": settled.groups})
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)
    fit = [pair for pair in matched.pairs if pair.label not in reshaped]
    return Report(
        matched.by,
        tuple(pair.name for pair in fit if state.get(pair.key)),
        tuple(pair.name for pair in fit if not state.get(pair.key)),
        tuple(matched.missing),
        (*matched.unexpected, *ownerless),
        tuple(x for found in reshaped.values() for x in found),
        tuple(settled.differences),
        hparams == "keep",
    )


def _does_not_fit(matched: Match, reshaped: list[str], ownerless: list[str]) -> str:
    """The sentence that lists everything for which a strict load is refused."""
    lines = ["loaded state dict does not fit this optimizer:"]
    for words, found in (
        ("missing from it", [repr(name) for name in matched.missing]),
        ("unexpected in it", [repr(name) for name in matched.unexpected]),
        ("of another shape or kind", reshaped),
        ("of no parameter that its groups list", ownerless),
    ):
        lines += [f"  {words} ({len(found)}): {'; '.join(found)}"] if found else []
    renaming = f"{hint(matched.missing, matched.unexpected)} where names changed, or " if matched.unexpected else ""
    return "\n".join([*lines, f"give {renaming}strict=False to load what fits and leave the rest as it is"])


def _surprise(optimizer: Any, settled: Settled, hparams: str | None) -> list[str]:
    """The sentence for numbers of the constructor that a load replaces, unless that was said to be meant."""
    if hparams is not None:
        return []
    replaced = settled.surprises
    scheduled: tuple[str, ...] = ("lr",)  # a learning rate alone is what every schedule moves
    if any(isinstance(entry, Mapping) and "square_avg" in entry for entry in optimizer.state.values()):
        scheduled = ("lr", "momentum", "weight_decay")  # it has stepped, and may go back to before they moved
        rule = [d for d in settled.differences if d.name in ("dialect", *SWITCHES) and d not in replaced]
        replaced = [*rule, *replaced]
    if all(d.name in scheduled for d in replaced):
        return []
    said = ", ".join(
        f"{d.name}={show(d.here)} by {show(d.saved)}" + (f" in group {d.group}" if len(settled.groups) > 1 else "")
        for d in replaced
    )
    return [
        f"the loaded state dict replaces {said}, as torch's would: give hparams='keep' to go on with what this "
        "optimizer was built with, or hparams='load' if the saved numbers are meant"
    ]


def _misfits(matched: Match, settled: Settled, state: Mapping[Any, Any]) -> dict[str, list[str]]:
    """By parameter, what of its saved state does not fit it.

    Raises: ValueError where the momentum buffer is in other units.
    """
    found = {}
    for pair in matched.pairs:
        entry = state.get(pair.key)
        if not entry:
            continue
        wrong = _check_entry(pair, entry, settled.groups[pair.group])
        if wrong:
            found[pair.label] = wrong
        if "momentum_buffer" in entry and "lr_in_buffer" in settled.left_open[pair.group, pair.saved]:
            raise ValueError(
                f"loaded state dict holds the momentum_buffer of {pair.label} without the learning rate in it, as "
                "torch keeps it, and this optimizer has lr_in_buffer=True; build it with lr_in_buffer=False"
            )
    return found


def _check_entry(pair: Pair, entry: Mapping[str, Any], group: Group) -> list[str]:
    param, label = pair.param, pair.label
    needed = ["step"] + (["grad_avg"] if group["centered"] else [])
    lacking = [name for name in needed if name not in entry]
    wrong = (
        [f"the state of {label} holds {', '.join(map(str, entry))} and lacks {', '.join(lacking)}"] if lacking else []
    )
    count = entry.get("step", 0)
    if not _is_count(count):
        wrong.append(f"step of {label} is {count!r:.60}; it takes one finite count >= 0")
    strange = [name for name, value in entry.items() if name not in _SHAPED and getattr(value, "is_meta", False)]
    wrong += [f"{name} of {label} is on the device meta, where tensors hold no numbers" for name in strange]
    for name in _SHAPED:
        value = entry.get(name)
        if value is None and name not in entry:
            continue
        if not isinstance(value, Tensor):
            shown = f"a {type(value).__name__}"
        elif value.shape != param.shape:
            shown = f"shape {tuple(value.shape)}"
        elif value.layout != torch.strided or value.is_meta or not (value.is_floating_point() or value.is_complex()):
            shown = f"{value.dtype} of layout {value.layout} on {value.device}"
        elif value.is_complex() != param.is_complex():
            shown = str(value.dtype)
        elif shards.is_spread(value) and not shards.is_spread(param):
            wrong.append(
                f"{name} of {label} is spread over processes (DTensor) and the parameter is not: take the state with "
                "StateDictOptions(full_state_dict=True)"
            )
            continue
        else:
            continue
        like = f"shape {tuple(param.shape)}" if shown.startswith(("shape", "a ")) else str(param.dtype)
        wrong.append(f"{name} of {label} has {shown}, the parameter has {like}")
    return wrong


def _is_count(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and not value.is_meta and _is_count(value.item())
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**63


class _Writes:
    """Copies into tensors that stay where they are, made when all that can fail is over."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []

    def into(self, target: Tensor, source: Tensor) -> Tensor:
        """Note that the source is to be written into the target. Returns: the target."""
        self._copies.append((target, source))
        return target

    def carry_out(self) -> None:
        """Write; sources that lie in what is written, as in a state dict of this optimizer, are copied before."""
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


def _place_lr(groups: list[Group], new: list[Group], writes: _Writes) -> None:
    """Write a loaded tensor lr into the present one: a captured graph and other groups read it there."""
    for group, loaded in zip(groups, new, strict=True):
        here, there = group["lr"], loaded["lr"]
        if loaded is group or not isinstance(here, Tensor) or not isinstance(there, Tensor):
            continue
        sharing = [new[i]["lr"] for i, other in enumerate(groups) if other["lr"] is here]
        alike = all(isinstance(lr, Tensor) and (lr is here or float(lr) == float(there)) for lr in sharing)
        if alike and here.dtype == there.dtype and not here.requires_grad and not here.is_inference():
            loaded["lr"] = writes.into(here, there.detach().reshape(here.shape))


def _place_state(
    present: Any,
    matched: Match,
    settled: Settled,
    state: Mapping[Any, Any],
    known: set[Any],
    reshaped: Mapping[str, Any],
    writes: _Writes,
) -> Any:
    """The state keyed by the present parameters, on their devices, each slot in its own dtype."""
    taken = {pair.param for pair in matched.pairs if pair.label not in reshaped}
    held = type(present)(dict)
    held.update({key: entry for key, entry in present.items() if isinstance(key, Tensor) and key not in taken})
    for pair in matched.pairs:
        entry = state.get(pair.key)
        if entry is None or pair.param not in taken:
            continue
        own, group = present.get(pair.param, {}), settled.groups[pair.group]
        held[pair.param] = {
            name: _place(name, value, own.get(name), pair.param, group, writes)
            for name, value in entry.items()
            if name != "compensation" or _goes_on(value, pair.param, group)
        }
    held.update({key: entry for key, entry in state.items() if key not in known})  # no parameter's: kept, as in torch
    return held


def _lost_remainders(matched: Match, settled: Settled, state: Mapping[Any, Any]) -> list[str]:
    """The sentence for remainders that are left out, if there are any."""
    held = [(pair, state.get(pair.key) or {}) for pair in matched.pairs]
    rests = [(pair, entry["compensation"]) for pair, entry in held if isinstance(entry.get("compensation"), Tensor)]
    lost = [pair for pair, rest in rests if not _goes_on(rest, pair.param, settled.groups[pair.group])]
    if not lost:
        return []
    return [
        f"the loaded state dict holds what the rounding of {len(lost)} parameters left over (compensation), which is "
        "left out here: it goes on where compensation=True and parameters are of the same dtype, and is less than "
        "a unit in the last place of each"
    ]


def _goes_on(rest: Tensor, param: Tensor, group: Group) -> bool:
    """Whether what rounding left over means the same here; else it goes: it is below a unit in the last place."""
    return bool(group["compensation"]) and rest.dtype == param.dtype


def _place(name: str, value: Any, present: Any, param: Tensor, group: Group, writes: _Writes) -> Any:
    """One saved value where this optimizer keeps it: the present tensor if it fits, else a new one."""
    if name == "step":
        count = step_tensor(float(value), param, group)
        fits = isinstance(present, Tensor) and _takes(present, count, count.dtype)
        return writes.into(present, count) if fits else count
    if not isinstance(value, Tensor):
        return deepcopy(value)
    value = value.detach()
    dtype = arithmetic_dtype(param.dtype) if name in _SLOTS else value.dtype
    if name in _SHAPED and shards.is_spread(param):
        fits = shards.is_spread(present) and present.dtype == dtype and shards.spread_alike(present, param)
        fresh = fresh_slot(param, 0.0) if name in _SLOTS else torch.zeros_like(param).detach()
        slot = present if fits and not present.is_inference() else fresh
        writes.into(shards.shard(slot), shards.part_for(param, value))
        return slot
    if isinstance(present, Tensor) and present.device == param.device and _takes(present, value, dtype):
        return writes.into(present, value)
    if name in _SHAPED and type(value) in _PLAIN and type(param) in _PLAIN:
        fresh = fresh_slot(param, 0.0) if name in _SLOTS else torch.zeros_like(param)
        return fresh.detach().copy_(value)  # in the parameter's own layout, whatever the file's
    return value.to(device=param.device, dtype=dtype, copy=True)


def _takes(present: Tensor, value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a value can be written into the tensor that is there, which then stays the same tensor."""
    if present.dtype != dtype or present.shape != value.shape or present.layout != torch.strided:
        return False
    if present.requires_grad or present.is_inference() or present.is_meta:
        return False
    if any(stride == 0 and size > 1 for size, stride in zip(present.shape, present.stride(), strict=True)):
        return False  # elements that share memory
    if type(present) in _PLAIN or type(value) in _PLAIN:
        return type(present) in _PLAIN and type(value) in _PLAIN
    own, other = (getattr(x, "_spec", None) for x in (present, value))  # a DTensor's mesh and placements
    return type(present) is type(value) and own is not None and own == other


def plain(packed: dict[str, Any]) -> dict[str, Any]:
    """A state dict whose groups hold plain numbers: a schedule's NumPy number needs full unpickling."""
    for group in packed["param_groups"]:
        for name, value in group.items():
            pair = type(value) in (list, tuple) and name != "params"
            group[name] = type(value)(map(plain_value, value)) if pair else plain_value(value)
    return packed


def complete(groups: list[Group], state: Any) -> None:
    """Fill what pickles and state dicts of torch, or of old versions, lack: our settings, and steps as tensors."""
    for group in groups:
        for name, value in settings.TORCH_GROUP.items():
            group.setdefault(name, value)
        for p in group["params"]:
            own = state.get(p)
            if own and (not isinstance(own.get("step"), Tensor) or stops(own["step"])):
                own["step"] = step_tensor(float(own.get("step", 0)), p, group)


def step_tensor(count: float, param: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A step counter: no dimensions, on the CPU, or with capturable on the parameter's device.

    float64, where torch's default is float32: that stops at 2²⁴, where adding 1 changes nothing, and with it stop
    random bits and bias correction. Only MPS has no float64.
    """
    device = param.device if group["capturable"] else torch.device("cpu")
    return torch.tensor(count, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def stops(step: Tensor) -> bool:
    """Whether a counter is to be replaced by one of float64, which does not stop.

    One in shared memory stays, since other processes count in it, and one on MPS, which has no float64.
    """
    if step.dtype not in (torch.float32, torch.bfloat16, torch.float16) or step.device.type == "mps":
        return False
    return not (step.is_cpu and step.is_shared())  # type: ignore[no-untyped-call]


def only_makes_state(groups: list[Group]) -> bool:
    """Whether a first step is the one by which torch's distributed checkpoints make state: lr 0, all gradients 0.

    It would move nothing, but count a step and let averages decay that start at 1: a getter would change the run. Of
    distributed gradients this process's shards are looked at: a getter may be called by one process alone.
    """
    for group in groups:
        lr = group["lr"]
        if isinstance(lr, Tensor) and (lr.numel() != 1 or lr.is_meta or (group["capturable"] and not lr.is_cpu)):
            return False  # nothing may be read back, or is there
        if lr != 0:
            return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(grads) and all(
        g.layout == torch.strided and not g.is_meta and not shards.shard(g).any() for g in grads
    )
