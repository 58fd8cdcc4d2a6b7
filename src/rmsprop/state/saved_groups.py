"""Merges the groups of a state dict into an optimizer's: saved or present settings, and their differences."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rmsprop import settings
from rmsprop.dialects import DIALECTS, SWITCHES, find_dialect, read_arguments
from rmsprop.settings.group_keys import is_anothers, is_wrappers
from rmsprop.spec import is_plain
from rmsprop.state.matching import Match

Group = dict[str, Any]

HPARAMS = ("load", "keep")
_ARGUMENTS = frozenset(name for row in DIALECTS.values() for name in row.arguments)


@dataclass(frozen=True)
class ChangedSetting:
    """A setting of a group that differs between the optimizer and the state dict."""

    group: int
    name: str
    here: Any
    saved: Any

    def __str__(self) -> str:
        return f"{self.name}={show(self.here)} here, {show(self.saved)} there"


@dataclass
class MergedGroups:
    """The groups after a load.

    Attributes:
        groups: the new groups, with the present parameters.
        left_open: the switches that a saved group lacks, by the indices of the present and the saved group.
        differences: the settings that differ between the optimizer and the state dict.
        surprises: the differences that replace explicit arguments of the constructor.
        notes: warnings for the user.
    """

    groups: list[Group] = field(default_factory=list)
    left_open: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    differences: list[ChangedSetting] = field(default_factory=list)
    surprises: list[ChangedSetting] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def merge_saved(
    groups: Sequence[Group], saved: Sequence[Mapping[str, Any]], match: Match, explicit: frozenset[str], keep: bool
) -> MergedGroups:
    """Return each present group with the settings of the saved groups that its parameters come from.

    A switch that the saved group lacks (torch saves none of ours) stays as constructed, with a note if it matters.
    Names of parameters, and groups without parameters in the state dict, stay as they are.

    Args:
        explicit: the settings that were given at construction.
        keep: whether to keep the present settings instead.
    Raises: ValueError or TypeError for a saved setting that is invalid, saved groups that disagree, or another rule.
    """
    found = MergedGroups()
    for i, group in enumerate(groups):
        sources = match.sources(i)
        if not group["params"] and i < len(saved) and not saved[i]["params"]:
            sources = [i]
        if not sources:
            found.groups.append(group)
            continue
        kept = [_under_our_names(i, group, saved[j]) for j in sources]
        loaded = [_load_group(group, own) for own in kept]
        if keep:
            for new, own in zip(loaded, kept, strict=True):
                _check_rule(i, group, new, own)
        else:
            _check_agreement(i, sources, loaded)
        for j, own in zip(sources, kept, strict=True):
            found.left_open[i, j] = _left_open(loaded[0], own)
        new = group if keep else _without_disputed(loaded, group)
        if match.names is not None:
            new = {**new, "param_names": list(match.names[i])}
        _note_what_was_left_open(new, kept[0], found.notes)
        found.groups.append(new)
        differences = [
            ChangedSetting(i, name, group[name], loaded[0][name])
            for name in settings.TORCH_GROUP
            if not _same(group[name], loaded[0][name])
        ]
        found.differences += differences
        found.surprises += [
            d for d in differences if _was_explicit(d, group, explicit) and not _is_scheduled(d, group, kept)
        ]
    return found


def _under_our_names(i: int, group: Group, kept: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the saved group with arguments of the group's dialect, such as timm's lr_in_momentum, under our names.

    Raises: ValueError for arguments of another dialect.
    """
    row = find_dialect(group["dialect"])
    known = {*settings.TORCH_GROUP, *row.arguments, *row.limits, "params"}
    for other in DIALECTS.values() if kept.keys() & _ARGUMENTS - known else ():
        foreign = [name for name in other.arguments if name in kept and name not in known]
        if foreign and "square_avg" in other.states:
            raise ValueError(
                f"loaded state dict is of {other.title}: its group {i} holds {', '.join(foreign)}, which "
                f"dialect={row.name!r} of this optimizer does not have; build it with dialect={other.name!r}, or "
                "convert the checkpoint to this dialect with `rmsprop convert`"
            )
    arguments = {name: value for name, value in kept.items() if name in row.arguments or name in row.limits}
    arguments = {name: value for name, value in arguments.items() if name not in settings.TORCH_GROUP}
    handed_over = is_anothers(row, kept) or is_wrappers(kept, ())  # saved by torch's class: SAM's rho is not a decay
    if not arguments or "dialect" in kept or handed_over:
        return kept
    rest = {name: value for name, value in kept.items() if name not in arguments}
    fixed = {name: value for name, value in row.defaults().items() if name in SWITCHES}  # not arguments of its class
    return {**fixed, **rest, **read_arguments(row, arguments)}


def _load_group(group: Group, kept: Mapping[str, Any]) -> Group:
    """Return the saved group's settings with the present group's parameters and names."""
    own = {name: value for name, value in kept.items() if name not in ("params", "param_names")}
    notes = {name: value if is_plain(value) else deepcopy(value) for name, value in own.items()}
    merged = {name: notes.get(name, group[name]) for name in settings.TORCH_GROUP}
    settings.check_setting("state_dtype", merged["state_dtype"])
    merged["state_dtype"] = group["state_dtype"]  # a choice of memory: loaded state is converted to it
    named = {"param_names": group["param_names"]} if "param_names" in group else {}
    return {**notes, **settings.check_saved(merged), **named, "params": group["params"]}


def _check_rule(i: int, group: Group, new: Group, kept: Mapping[str, Any]) -> None:
    """Refuse to keep a rule other than the one that made the saved state. square_avg_init is for fresh state only."""
    other = [name for name in SWITCHES if name in kept and name != "square_avg_init" and new[name] != group[name]]
    if other:
        here, there = (", ".join(f"{name}={own[name]!r}" for name in other) for own in (group, new))
        raise ValueError(
            f"hparams='keep' keeps {here} of group {i}, but the loaded state was made under {there}; build the "
            f"optimizer with {there}, or convert the checkpoint to this rule with `rmsprop convert`"
        )


def _check_agreement(i: int, sources: list[int], loaded: list[Group]) -> None:
    """Refuse saved groups whose settings disagree if their parameters are in one group here."""
    if len(loaded) == 1:
        return
    first = loaded[0]
    disputed = [name for name in settings.TORCH_GROUP if any(not _same(first[name], own[name]) for own in loaded)]
    if disputed:
        values = "; ".join(f"{name}: {', '.join(show(own[name]) for own in loaded)}" for name in disputed)
        there = ", ".join(map(str, sources))
        raise ValueError(
            f"group {i} here holds parameters of groups {there} of the loaded state dict, whose "
            f"settings differ ({values}); give hparams='keep' to keep this optimizer's, or group the parameters "
            "as they were"
        )


def _without_disputed(loaded: list[Group], group: Group) -> Group:
    """Return the first saved group. Where the saved groups' notes disagree, it gets the present group's notes."""
    new = dict(loaded[0])
    if len(loaded) == 1:
        return new
    for name in loaded[0].keys() - settings.TORCH_GROUP.keys() - {"params", "param_names"}:
        if any(name not in own or not _same(new[name], own[name]) for own in loaded[1:]):
            del new[name]
            if name in group:
                new[name] = group[name]
    return new


def _left_open(new: Group, kept: Mapping[str, Any]) -> list[str]:
    """Return the switches that the saved group lacks and that differ from torch's here."""
    return [name for name in SWITCHES if name not in kept and new[name] != settings.TORCH_GROUP[name]]


def _note_what_was_left_open(new: Group, kept: Mapping[str, Any], notes: list[str]) -> None:
    names = _left_open(new, kept)
    if names:
        switches = ", ".join(f"{name}={new[name]!r}" for name in names)
        notes.append(
            f"the loaded state dict lacks {', '.join(names)}, since a class without them, such as torch's, saved it; "
            f"this run keeps {switches} as constructed, with eps={new['eps']:g}"
        )


def _was_explicit(difference: ChangedSetting, group: Group, explicit: frozenset[str]) -> bool:
    """Return whether the present value was given at construction, or is not the dialect's default."""
    name = difference.name
    default = {**settings.TORCH_GROUP, **find_dialect(group["dialect"]).defaults()}[name]
    return (name in explicit and name != "maximize") or not _same(group[name], default)


def _is_scheduled(difference: ChangedSetting, group: Group, kept: list[Mapping[str, Any]]) -> bool:
    """Return whether the values differ because a schedule that started at the present one moved it."""
    if difference.name == "lr" and all("initial_lr" in own for own in kept):
        return all(_same(own["initial_lr"], group.get("initial_lr", group["lr"])) for own in kept)
    return difference.name == "momentum" and all("max_momentum" in own for own in kept)


def _same(a: Any, b: Any) -> bool:
    """Return whether two settings are equal. A tensor equals a number to the tensor's precision."""
    if a is b:
        return True
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)
    sizes = [x.numel() if isinstance(x, Tensor) else 1 for x in (a, b)]
    if sizes != [1, 1] or not all(isinstance(x, Tensor | float | int) for x in (a, b)):
        return a is b
    return math.isclose(float(a), float(b), rel_tol=0.0 if isinstance(a, type(b)) else 1e-6)


def show(value: Any) -> str:
    """Return a setting as a Python literal, and a tensor with its number."""
    return f"tensor({value.item():g})" if isinstance(value, Tensor) and value.numel() == 1 else repr(value)
