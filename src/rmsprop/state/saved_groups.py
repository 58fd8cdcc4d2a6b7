"""What a state dict makes of an optimizer's groups: its numbers or the present ones, and what differs."""

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
_WORDS = frozenset(word for row in DIALECTS.values() for word in row.arguments)


@dataclass(frozen=True)
class ChangedSetting:
    """A setting of a group that the state dict has otherwise than the optimizer had."""

    group: int
    name: str
    here: Any
    saved: Any

    def __str__(self) -> str:
        return f"{self.name}={show(self.here)} here, {show(self.saved)} there"


@dataclass
class MergedGroups:
    """The groups as they are to be.

    Attributes:
        groups: the new groups, around the present parameters.
        left_open: by present and saved group, the switches that the saved one does not name.
        differences: where saved and present settings differ.
        surprises: those of them that replace what was asked for at construction.
        notes: sentences that the user is to read.
    """

    groups: list[Group] = field(default_factory=list)
    left_open: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    differences: list[ChangedSetting] = field(default_factory=list)
    surprises: list[ChangedSetting] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def merge_saved(
    groups: Sequence[Group], saved: Sequence[Mapping[str, Any]], match: Match, explicit: frozenset[str], keep: bool
) -> MergedGroups:
    """Each present group with the saved settings of where its parameters come from, or, to `keep`, with its own.

    A switch that the saved group lacks (torch saves none of ours) stays as constructed, and a note says so where it
    matters. Names of parameters, and groups that nothing of the state dict belongs to, stay as they are.

    Args:
        explicit: the settings that were given at construction.
    Raises: ValueError, TypeError: a saved setting that does not work, several that disagree, or another rule.
    """
    found = MergedGroups()
    for i, group in enumerate(groups):
        sources = match.sources(i)
        if not group["params"] and i < len(saved) and not saved[i]["params"]:
            sources = [i]
        if not sources:
            found.groups.append(group)
            continue
        kept = [_in_our_words(i, group, saved[j]) for j in sources]
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


def _in_our_words(i: int, group: Group, kept: Mapping[str, Any]) -> Mapping[str, Any]:
    """The saved group with the words of the present group's dialect, such as timm's lr_in_momentum, as ours.

    Raises: ValueError if they are the words of a dialect that the group does not have.
    """
    row = find_dialect(group["dialect"])
    known = {*settings.TORCH_GROUP, *row.arguments, *row.limits, "params"}
    for other in DIALECTS.values() if kept.keys() & _WORDS - known else ():
        strange = [word for word in other.arguments if word in kept and word not in known]
        if strange and "square_avg" in other.states:
            raise ValueError(
                f"loaded state dict is of {other.title}: its group {i} holds {', '.join(strange)}, which this "
                f"optimizer, of dialect={row.name!r}, does not know; build it with dialect={other.name!r}, or turn "
                "the checkpoint into this dialect's with `rmsprop convert`"
            )
    words = {word: value for word, value in kept.items() if word in row.arguments or word in row.limits}
    words = {word: value for word, value in words.items() if word not in settings.TORCH_GROUP}
    handed_over = is_anothers(row, kept) or is_wrappers(kept, ())  # torch's class saved it: SAM's rho is no decay
    if not words or "dialect" in kept or handed_over:
        return kept
    rest = {name: value for name, value in kept.items() if name not in words}
    fixed = {name: value for name, value in row.defaults().items() if name in SWITCHES}  # its class has no words for
    return {**fixed, **rest, **read_arguments(row, words)}


def _load_group(group: Group, kept: Mapping[str, Any]) -> Group:
    """The saved group's settings around the present group's parameters and their names."""
    own = {name: value for name, value in kept.items() if name not in ("params", "param_names")}
    notes = {name: value if is_plain(value) else deepcopy(value) for name, value in own.items()}
    merged = {name: notes.get(name, group[name]) for name in settings.TORCH_GROUP}
    named = {"param_names": group["param_names"]} if "param_names" in group else {}
    return {**notes, **settings.check_saved(merged), **named, "params": group["params"]}


def _check_rule(i: int, group: Group, new: Group, kept: Mapping[str, Any]) -> None:
    """Refuse to keep a rule under which the saved state was not gathered. square_avg_init is of fresh state only."""
    other = [name for name in SWITCHES if name in kept and name != "square_avg_init" and new[name] != group[name]]
    if other:
        here, there = (", ".join(f"{name}={own[name]!r}" for name in other) for own in (group, new))
        raise ValueError(
            f"hparams='keep' keeps {here} of group {i}, and the loaded state was gathered under {there}; build the "
            f"optimizer with {there}, or turn the checkpoint into this rule's with `rmsprop convert`"
        )


def _check_agreement(i: int, sources: list[int], loaded: list[Group]) -> None:
    """Refuse several saved groups that say different things of one present group."""
    if len(loaded) == 1:
        return
    first = loaded[0]
    disputed = [name for name in settings.TORCH_GROUP if any(not _same(first[name], own[name]) for own in loaded)]
    if disputed:
        said = "; ".join(f"{name}: {', '.join(show(own[name]) for own in loaded)}" for name in disputed)
        there = ", ".join(map(str, sources))
        raise ValueError(
            f"group {i} here holds parameters of groups {there} of the loaded state dict, whose "
            f"settings differ ({said}); give hparams='keep' to go on with this optimizer's, or group the parameters "
            "as they were"
        )


def _without_disputed(loaded: list[Group], group: Group) -> Group:
    """The first of several saved groups; a trainer's notes on which they disagree are the present group's."""
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
    """The switches that the saved group does not name and that are not torch's here."""
    return [name for name in SWITCHES if name not in kept and new[name] != settings.TORCH_GROUP[name]]


def _note_what_was_left_open(new: Group, kept: Mapping[str, Any], notes: list[str]) -> None:
    names = _left_open(new, kept)
    if names:
        kept_so = ", ".join(f"{name}={new[name]!r}" for name in names)
        notes.append(
            f"the loaded state dict names no {', '.join(names)}: a class without them, such as torch's, saved it; "
            f"this run goes on with {kept_so} as constructed, and with its eps={new['eps']:g}"
        )


def _was_explicit(difference: ChangedSetting, group: Group, explicit: frozenset[str]) -> bool:
    """Whether the present value was given, or is not what the group's dialect has by default."""
    name = difference.name
    default = {**settings.TORCH_GROUP, **find_dialect(group["dialect"]).defaults()}[name]
    return (name in explicit and name != "maximize") or not _same(group[name], default)


def _is_scheduled(difference: ChangedSetting, group: Group, kept: list[Mapping[str, Any]]) -> bool:
    """Whether a schedule that began at the present value has moved it."""
    if difference.name == "lr" and all("initial_lr" in own for own in kept):
        return all(_same(own["initial_lr"], group.get("initial_lr", group["lr"])) for own in kept)
    return difference.name == "momentum" and all("max_momentum" in own for own in kept)


def _same(a: Any, b: Any) -> bool:
    """Whether two settings say the same; a tensor says its number, to its own precision."""
    if a is b:
        return True
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)
    sizes = [x.numel() if isinstance(x, Tensor) else 1 for x in (a, b)]
    if sizes != [1, 1] or not all(isinstance(x, Tensor | float | int) for x in (a, b)):
        return a is b
    return math.isclose(float(a), float(b), rel_tol=0.0 if isinstance(a, type(b)) else 1e-6)


def show(value: Any) -> str:
    """A setting as one would type it; a tensor as its number."""
    return f"tensor({value.item():g})" if isinstance(value, Tensor) and value.numel() == 1 else repr(value)
