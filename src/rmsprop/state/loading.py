"""Loads a state dict. All of it is validated before anything changes.

torch's base class differs in three ways. It pairs parameters by order, whatever their names. It casts every state
tensor to the parameter's dtype, so float32 averages of a bfloat16 model lose 16 bits (pytorch#43706). It replaces
tensors that a CUDA graph or another process reads (pytorch#147288).
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmsprop import settings
from rmsprop.dialects import SWITCHES
from rmsprop.printing import shown
from rmsprop.state import averages, other_optimizers, shared_memory
from rmsprop.state.entries import misfits
from rmsprop.state.matching import MATCHES, Match, hint, match, rekeyed
from rmsprop.state.placing import Writes, continues, place_lr, place_state
from rmsprop.state.precision import Losses
from rmsprop.state.saved_groups import HPARAMS, ChangedSetting, Group, MergedGroups, merge_saved, show
from rmsprop.state.slots import step_tensor, stops
from rmsprop.tensors.forked import serial_after_fork


@dataclass(frozen=True)
class LoadReport:
    """The result of loading a state dict. `print(report)` shows it.

    Attributes:
        matched: "name" or "order".
        loaded: parameters whose state was loaded.
        stateless: parameters that the state dict lists without state, because they had not stepped. They start fresh.
        missing: parameters of this optimizer that the state dict lacks. With strict=False they keep their state.
        unexpected: parameters of the state dict that this optimizer lacks, and state that none of its groups lists.
        reshaped: saved state that does not fit its parameter. With strict=False the parameter keeps its state.
        differences: settings that differ between the optimizer and the state dict.
        kept: whether the optimizer's settings were kept.
    """

    matched: str
    loaded: tuple[str, ...]
    stateless: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]
    differences: tuple[ChangedSetting, ...]
    kept: bool

    def __str__(self) -> str:
        lines = [f"state of {len(self.loaded)} parameters loaded, matched by {self.matched}"]
        for name in ("stateless", "missing", "unexpected", "reshaped"):
            entries = getattr(self, name)
            lines += [f"{name} ({len(entries)}): {'; '.join(entries)}"] if entries else []
        outcome = "this optimizer's is kept" if self.kept else "the loaded one is taken"
        lines += [f"group {d.group}: {d}: {outcome}" for d in self.differences]
        return "\n".join(lines)


@serial_after_fork
def load(
    optimizer: Any,
    state_dict: Any,
    strict: bool,
    rename: Mapping[str, str] | None,
    hparams: str | None,
    by: str | None = None,
) -> LoadReport:
    """Load a state dict into an RMSprop. See RMSprop.load_state_dict.

    Mutates: the optimizer, once everything is validated. placing.py documents which tensors stay the same.
    Raises: ValueError or TypeError if the state dict is not an RMSprop's, does not fit, or holds an invalid setting.
    """
    if torch.is_inference_mode_enabled():  # inference tensors could not be stepped outside of it
        with torch.inference_mode(False), torch.no_grad():
            return load(optimizer, state_dict, strict, rename, hparams, by)
    if not isinstance(hparams, str | None) or hparams not in (None, *HPARAMS):
        raise ValueError(
            f"Invalid hparams: {shown(hparams)}; it takes 'load' (saved numbers), 'keep' (this optimizer's) or None"
        )
    if not isinstance(by, str | None) or by not in (None, *MATCHES):
        raise ValueError(
            f"Invalid match: {shown(by)}; it takes 'name', 'order' or None (by name where both sides have names)"
        )
    if optimizer._stepper.shared:
        shared_memory.refuse_other_precision(optimizer)
    state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    averages.refuse_swapped(optimizer, "load_state_dict()", "load after the block")
    other_optimizers.check_shape(state_dict)
    buffers = averages.check_buffers(optimizer, state_dict)
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    state, lost = rekeyed(saved, state_dict["state"])
    other_optimizers.check_owner(groups, saved, state)
    other_optimizers.check_values(saved)
    matched = match(groups, saved, rename, by)
    merged = merge_saved(groups, saved, matched, optimizer._explicit, hparams == "keep")
    _check_steps(optimizer, groups, merged.groups)
    reshaped = misfits(matched, merged, saved, state)
    ownerless = [f"state under the key {shown(key, 40)}" for key in lost]
    if strict and (matched.missing or matched.unexpected or reshaped or lost):
        raise ValueError(_does_not_fit(matched, [x for found in reshaped.values() for x in found], ownerless))
    notes = (*merged.notes, *_lost_slots(matched, merged, state), *_surprise(optimizer, merged, hparams))
    writes = Writes()
    if hparams != "keep":
        place_lr(groups, merged.groups, writes)
    known = {*lost, *(key for group in saved for key in group["params"])}
    losses = Losses()
    held = place_state(optimizer.state, matched, merged, state, known, reshaped, writes, losses)
    for note in (*notes, *losses.notes()):
        warnings.warn(note, stacklevel=settings.to_caller())
    writes.carry_out()
    optimizer.__setstate__({"state": held, "param_groups": merged.groups, "_buffers": buffers})
    if optimizer._stepper.guard is not None:
        optimizer._stepper.guard.restart()
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)
    fit = [pair for pair in matched.pairs if pair.param not in reshaped]
    return LoadReport(
        matched.by,
        tuple(pair.name for pair in fit if state.get(pair.key)),
        tuple(pair.name for pair in fit if not state.get(pair.key)),
        tuple(matched.missing),
        (*matched.unexpected, *ownerless),
        tuple(x for found in reshaped.values() for x in found),
        tuple(merged.differences),
        hparams == "keep",
    )


def _does_not_fit(matched: Match, reshaped: list[str], ownerless: list[str]) -> str:
    """Return the message that lists every reason to refuse a strict load."""
    lines = ["loaded state dict does not fit this optimizer:"]
    for title, entries in (
        ("missing from it", [*map(shown, matched.missing)]),
        ("unexpected in it", [*map(shown, matched.unexpected)]),
        ("of another shape or kind", reshaped),
        ("of no parameter that its groups list", ownerless),
    ):
        lines += [f"  {title} ({len(entries)}): {'; '.join(entries)}"] if entries else []
    renaming = f"{hint(matched.missing, matched.unexpected)} if names changed, or " if matched.unexpected else ""
    return "\n".join([*lines, f"give {renaming}strict=False to load what fits and leave the rest as it is"])


def _surprise(optimizer: Any, merged: MergedGroups, hparams: str | None) -> list[str]:
    """Return the warning for constructor arguments that a load replaces. Nothing if `hparams` was given."""
    if hparams is not None:
        return []
    replaced = merged.surprises
    if any(isinstance(entry, Mapping) and float(entry.get("step", 0)) for entry in optimizer.state.values()):
        # after the first step a load may silently restore a checkpoint's numbers, but not change the rule
        rule = [d for d in merged.differences if d.name in ("dialect", *SWITCHES)]
        replaced = [*rule, *(d for d in replaced if d not in rule)] if rule else []
    if all(d.name == "lr" for d in replaced):  # a learning rate alone is what every schedule moves
        return []
    changes = ", ".join(
        f"{d.name}={show(d.here)} by {show(d.saved)}" + (f" in group {d.group}" if len(merged.groups) > 1 else "")
        for d in replaced
    )
    return [
        f"the loaded state dict replaces {changes}, as torch does: give hparams='keep' to keep the settings that "
        "this optimizer was built with, or hparams='load' to take the saved ones"
    ]


def _check_steps(optimizer: Any, groups: list[Group], new: list[Group]) -> None:
    """Refuse loaded settings that this optimizer's constructor would refuse.

    Raises: ValueError.
    """
    for i, (here, group) in enumerate(zip(groups, new, strict=True)):
        if group is here:
            continue
        try:
            optimizer._check_group(group, group["params"])
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"group {i} of the loaded state dict cannot step in this optimizer: {error}; give hparams='keep' to "
                "keep this optimizer's settings"
            ) from error


_LOST = {
    "compensation": "the Kahan remainder (compensation) of {} parameters, which is dropped: loading it needs "
    "compensation=True and parameters of the same dtype. It is less than a unit in the last place of each element",
    "ema": "the averages of the weights (ema) of {} parameters, which are dropped: loading them needs ema=...",
}


def _lost_slots(matched: Match, merged: MergedGroups, state: Mapping[Any, Any]) -> list[str]:
    """Return the warnings for slots that are dropped, if any are."""
    lost = dict.fromkeys(_LOST, 0)
    for pair in matched.pairs:
        entry = state.get(pair.key) or {}
        for name in _LOST:
            kept = continues(name, entry.get(name), pair.param, merged.groups[pair.group])
            lost[name] += isinstance(entry.get(name), Tensor) and not kept
    return [f"the loaded state dict holds {text.format(lost[name])}" for name, text in _LOST.items() if lost[name]]


def check_listed(groups: list[Group], state: Any) -> None:
    """Refuse to save the state of a parameter that no group lists; torch's base class fails on it.

    Raises: ValueError.
    """
    listed = {id(p) for group in groups for p in group["params"]}
    lost = [key for key in state if isinstance(key, Tensor) and id(key) not in listed]
    if lost:
        raise ValueError(
            f"state_dict() found the state of {len(lost)} parameters that no group lists any more, the first of "
            f"shape {tuple(lost[0].shape)}: move it to the parameter that replaced it, optimizer.state[new] = "
            "optimizer.state.pop(old), or delete it, del optimizer.state[old]"
        )


def complete(groups: list[Group], state: Any) -> None:
    """Fill in what pickles and state dicts of torch or older versions lack: our settings, and steps as tensors."""
    for group in groups:
        for name, value in settings.TORCH_GROUP.items():
            group.setdefault(name, value)
    if any(map(_lacks_count, state.values())):
        for group in groups:
            for p in group["params"]:
                own = state.get(p)
                if _lacks_count(own):
                    own["step"] = step_tensor(float(own.get("step", 0)), p, group)


def _lacks_count(own: Any) -> bool:
    """Return whether a parameter's state entry lacks a tensor `step`, or has one that would stop counting."""
    if not (type(own) is dict or isinstance(own, Mapping)) or not own:  # state of no parameter may be anything
        return False
    step = own.get("step")
    return not isinstance(step, Tensor) or stops(step)
