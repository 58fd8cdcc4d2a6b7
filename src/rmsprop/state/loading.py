"""Taking over a state dict: checked whole before anything is changed.

torch's base class pairs parameters by order whatever their names, casts every state tensor to the parameter's dtype
(float32 averages of a bfloat16 model lose 16 bits, pytorch#43706), and puts new tensors in the place of those that a
CUDA graph or another process reads (pytorch#147288); this does none of the three.
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
from rmsprop.state import other_optimizers
from rmsprop.state.entries import misfits
from rmsprop.state.matching import MATCHES, Match, hint, match, rekeyed
from rmsprop.state.placing import Writes, can_continue, place_lr, place_state
from rmsprop.state.saved_groups import HPARAMS, ChangedSetting, Group, MergedGroups, merge_saved, show
from rmsprop.state.slots import step_tensor, stops
from rmsprop.tensors.forked import serial_after_fork


@dataclass(frozen=True)
class LoadReport:
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
    differences: tuple[ChangedSetting, ...]
    kept: bool

    def __str__(self) -> str:
        lines = [f"state of {len(self.loaded)} parameters loaded, matched by {self.matched}"]
        for name in ("stateless", "missing", "unexpected", "reshaped"):
            found = getattr(self, name)
            lines += [f"{name} ({len(found)}): {'; '.join(found)}"] if found else []
        now = "this optimizer's is kept" if self.kept else "the loaded one is taken"
        lines += [f"group {d.group}: {d}: {now}" for d in self.differences]
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
    """Make an RMSprop go on from a state dict. See RMSprop.load_state_dict.

    Mutates: the optimizer, only after everything was checked. See placing.py for which tensors stay the same.
    Raises: ValueError, TypeError: it is no RMSprop's, does not fit, or holds a setting that does not work.
    """
    if torch.is_inference_mode_enabled():  # state made here is to be written after it
        with torch.inference_mode(False), torch.no_grad():
            return load(optimizer, state_dict, strict, rename, hparams, by)
    if not isinstance(hparams, str | None) or hparams not in (None, *HPARAMS):
        raise ValueError(
            f"Invalid hparams: {shown(hparams)}; it takes 'load' (the saved numbers), 'keep' (these) or None"
        )
    if not isinstance(by, str | None) or by not in (None, *MATCHES):
        raise ValueError(
            f"Invalid match: {shown(by)}; it takes 'name', 'order' or None, which decides by what is there"
        )
    state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    other_optimizers.check_shape(state_dict)
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    state, lost = rekeyed(saved, state_dict["state"])
    other_optimizers.check_owner(groups, saved, state)
    other_optimizers.check_values(saved)
    matched = match(groups, saved, rename, by)
    merged = merge_saved(groups, saved, matched, optimizer._explicit, hparams == "keep")
    _check_steps(optimizer, groups, merged.groups)
    reshaped = misfits(matched, merged, state)
    ownerless = [f"state under the key {shown(key, 40)}" for key in lost]
    if strict and (matched.missing or matched.unexpected or reshaped or lost):
        raise ValueError(_does_not_fit(matched, [x for found in reshaped.values() for x in found], ownerless))
    said = (*merged.notes, *_lost_remainders(matched, merged, state), *_surprise(optimizer, merged, hparams))
    for sentence in said:
        warnings.warn(sentence, stacklevel=settings.to_caller())
    writes = Writes()
    if hparams != "keep":
        place_lr(groups, merged.groups, writes)
    known = {*lost, *(key for group in saved for key in group["params"])}
    held = place_state(optimizer.state, matched, merged, state, known, reshaped, writes)
    writes.carry_out()
    optimizer.__setstate__({"state": held, "param_groups": merged.groups})
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
    """The sentence that lists everything for which a strict load is refused."""
    lines = ["loaded state dict does not fit this optimizer:"]
    for words, found in (
        ("missing from it", [*map(shown, matched.missing)]),
        ("unexpected in it", [*map(shown, matched.unexpected)]),
        ("of another shape or kind", reshaped),
        ("of no parameter that its groups list", ownerless),
    ):
        lines += [f"  {words} ({len(found)}): {'; '.join(found)}"] if found else []
    renaming = f"{hint(matched.missing, matched.unexpected)} where names changed, or " if matched.unexpected else ""
    return "\n".join([*lines, f"give {renaming}strict=False to load what fits and leave the rest as it is"])


def _surprise(optimizer: Any, merged: MergedGroups, hparams: str | None) -> list[str]:
    """The sentence for numbers of the constructor that a load replaces, unless that was said to be meant."""
    if hparams is not None:
        return []
    replaced = merged.surprises
    if any(isinstance(entry, Mapping) and float(entry.get("step", 0)) for entry in optimizer.state.values()):
        # it has stepped, and may go back to a checkpoint's numbers, but not in silence to another rule
        rule = [d for d in merged.differences if d.name in ("dialect", *SWITCHES)]
        replaced = [*rule, *(d for d in replaced if d not in rule)] if rule else []
    if all(d.name == "lr" for d in replaced):  # a learning rate alone is what every schedule moves
        return []
    said = ", ".join(
        f"{d.name}={show(d.here)} by {show(d.saved)}" + (f" in group {d.group}" if len(merged.groups) > 1 else "")
        for d in replaced
    )
    return [
        f"the loaded state dict replaces {said}, as torch's would: give hparams='keep' to go on with what this "
        "optimizer was built with, or hparams='load' if the saved numbers are meant"
    ]


def _check_steps(optimizer: Any, groups: list[Group], new: list[Group]) -> None:
    """Refuse settings with which no step of this optimizer would run, as its construction does.

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
                "go on with this optimizer's settings"
            ) from error


def _lost_remainders(matched: Match, merged: MergedGroups, state: Mapping[Any, Any]) -> list[str]:
    """The sentence for remainders that are left out, if there are any."""
    lost = 0
    for pair in matched.pairs:
        rest = (state.get(pair.key) or {}).get("compensation")
        lost += isinstance(rest, Tensor) and not can_continue(rest, pair.param, merged.groups[pair.group])
    if not lost:
        return []
    return [
        f"the loaded state dict holds what the rounding of {lost} parameters left over (compensation), which is "
        "left out here: it goes on where compensation=True and parameters are of the same dtype, and is less than "
        "a unit in the last place of each"
    ]


def check_listed(groups: list[Group], state: Any) -> None:
    """Refuse to pack the state of a parameter that its group lists no more, which torch's base class fails on.

    Raises: ValueError.
    """
    listed = {id(p) for group in groups for p in group["params"]}
    lost = [key for key in state if isinstance(key, Tensor) and id(key) not in listed]
    if lost:
        raise ValueError(
            f"state_dict() found the state of {len(lost)} parameters that no group lists any more, the first of "
            f"shape {tuple(lost[0].shape)}: give it to what replaced it, optimizer.state[new] = "
            "optimizer.state.pop(old), or drop it, del optimizer.state[old]"
        )


def complete(groups: list[Group], state: Any) -> None:
    """Fill what pickles and state dicts of torch, or of old versions, lack: our settings, and steps as tensors."""
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
    """Whether an entry of a parameter's state has no count as a tensor, or one that stops."""
    if not (type(own) is dict or isinstance(own, Mapping)) or not own:  # what belongs to no parameter may be anything
        return False
    step = own.get("step")
    return not isinstance(step, Tensor) or stops(step)
