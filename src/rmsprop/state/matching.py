"""Pairs the parameters of a state dict with an optimizer's: by name where both sides have names, else by order."""

import operator
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

from rmsprop.printing import shown
from rmsprop.spec import SLOTS

Group = Mapping[str, Any]

_SLOTS = frozenset(SLOTS) - {"compensation"}
MATCHES = ("name", "order")
# Parts of a name that wrappers add: DataParallel, torch.compile, FSDP, activation checkpoints.
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


class Pair(NamedTuple):
    """A parameter and its place in the state dict.

    Attributes:
        param: the parameter, and `group` the index of its group here.
        key: what the saved state calls it, and `saved` the index of its group there.
        name: its name, or where none was looked at its key.
    """

    param: Tensor
    group: int
    key: Any
    saved: int
    name: str
    named: bool = True

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"parameter {shown(self.name)}" if self.named else f"parameter {shown(self.key, 60).strip(chr(39))}"


@dataclass(frozen=True)
class Match:
    """Every pair that was found, and the names that have no partner.

    Attributes:
        by: "name" or "order".
        missing: names here that the state dict lacks.
        unexpected: names of the state dict that are not here.
        names: by group, the saved names that an optimizer without names takes over, as torch does.
    """

    by: str
    pairs: list[Pair]
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    names: list[list[str]] | None = None

    def sources(self, group: int) -> list[int]:
        """The saved groups that a present group's parameters come from, in order of appearance."""
        return list(dict.fromkeys(pair.saved for pair in self.pairs if pair.group == group))


def match(
    groups: Sequence[Group], saved: Sequence[Group], rename: Mapping[str, str] | None, by: str | None = None
) -> Match:
    """Pair the present groups' parameters with the saved groups'.

    Keys that are names, as torch's distributed checkpoints have them, are paired by name; by order only where torch
    itself has put them into this optimizer's order, or where names or shapes leave one way.

    Args:
        rename: saved name -> name here; a saved name that ends with a dot stands for all that begin with it.
        by: "name" or "order", the user's decision; None decides by what is there.
    Raises: ValueError where names are ambiguous or lacking, and, without names, where groups or their sizes differ.
    """
    ours = _names(groups)
    keyed = _keyed(ours, saved)
    theirs = _saved_names(saved, keyed)
    taken = theirs if ours is None and not keyed else None
    if by == "order":
        if rename:
            raise ValueError(f"rename={dict(rename)!r:.80} pairs by name, and match='order' does not; leave one out")
        return _by_order(groups, saved, taken)
    if ours is None or theirs is None:
        if rename or by:
            side = "this optimizer" if ours is None else "the loaded state dict"
            asked = f"rename={dict(rename)!r:.80}" if rename else f"match={by!r}"
            raise ValueError(
                f"{asked} needs names on both sides, and {side} has none: build it with model.named_parameters()"
            )
        found = _by_order(groups, saved, taken)
        doubt = _names_on_one_side(found) if keyed else _sorted_numbers(saved)
        if doubt and not _is_in_order(found) and not _is_from_torch():
            raise ValueError(doubt)
        return found
    theirs = _renamed(theirs, rename or {})
    if keyed and not rename and by is None and not _alike(ours, theirs):
        short = [[[bare(name) for name in own] for own in names] for names in (ours, theirs)]
        if short[0] == short[1] or _is_from_torch():
            return _by_order(groups, saved)
        if _alike(*short):
            back = dict(zip((name for _, name in _flat(short[0])), (name for _, name in _flat(ours)), strict=True))
            theirs = [[back[name] for name in own] for own in short[1]]
    return _by_name(groups, ours, saved, theirs)


def _alike(ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]]) -> bool:
    """Whether both sides have the same names, each once."""
    here, there = [name for _, name in _flat(ours)], [name for _, name in _flat(theirs)]
    return len(here) == len(there) == len(set(here)) and set(here) == set(there)


def bare(name: str) -> str:
    """A name without what wrappers of the model add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _keyed(ours: list[list[str]] | None, saved: Sequence[Group]) -> bool:
    """Whether the saved groups list names, and not numbers that became strings."""
    keys = [key for group in saved for key in group["params"]]
    return is_named(keys, [] if ours is None else [name for _, name in _flat(ours)])


def is_named(keys: Sequence[Any], names: Iterable[Any]) -> bool:
    """Whether keys are names: strings, and not all digits, unless these are the names of the model."""
    if not keys or not all(isinstance(key, str) for key in keys):
        return False
    return not all(key.isdecimal() for key in keys) or set(keys) == set(names)


def _is_in_order(found: Match) -> bool:
    """Whether shapes leave no other way than this order."""
    shapes = [None if is_lazy(pair.param) else tuple(pair.param.shape) for pair in found.pairs]
    return len(set(shapes)) == len(shapes)


def _is_from_torch() -> bool:
    """Whether torch's set_optimizer_state_dict calls, which lists the names in this optimizer's own order."""
    frame = sys._getframe()
    while frame.f_back:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            return True
    return False


def _names_on_one_side(found: Match) -> str:
    names = ", ".join(shown(pair.key, 40) for pair in found.pairs[:2])
    return (
        f"loaded state dict names its parameters ({names}, ...), this optimizer has no names, and parameters of one "
        "shape cannot be told apart: build it with model.named_parameters(), or give match='order' if its groups "
        "hold the same parameters in the same order"
    )


def _sorted_numbers(saved: Sequence[Group]) -> str | None:
    """The sentence for numbers that were sorted as text, 10 before 2: it is not the order that the optimizer had."""
    for i, group in enumerate(saved):
        if all(map(operator.is_, map(type, group["params"]), repeat(int))) and _rises(group["params"]):
            continue
        keys = [str(key) for key in group["params"] if isinstance(key, str) or key in range(2**31)]
        digits = len(keys) == len(group["params"]) and all(key.isdecimal() and len(key) < 11 for key in keys)
        if digits and keys == sorted(keys) and keys != sorted(keys, key=int):
            return (
                f"loaded state dict's group {i} lists its parameters sorted as text ({', '.join(keys[:4])}, ...), "
                "which is not the order that they had: sort them as numbers, or give match='order' to take them as "
                "they are"
            )
    return None


def _rises(numbers: Sequence[int]) -> bool:
    return all(map(operator.lt, numbers, numbers[1:]))


def rekeyed(saved: Sequence[Group], state: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], list[Any]]:
    """The saved state under the keys that its groups list, where numbers became strings on their way through a file.

    Returns: the state, and the keys of those entries that are a parameter's state and belong to none.
    Raises: ValueError where a key is listed or kept twice.
    """
    listed = [key for group in saved for key in group["params"]]
    known = set(listed)
    if len(known) < len(listed):
        raise ValueError("loaded state dict lists a parameter twice in its groups, so its state belongs to two")
    if known.issuperset(state):
        return state, []
    twins = {_other(key): key for key in known}
    found: dict[Any, Any] = {}
    for key, entry in state.items():
        own = key if key in known or type(key) not in (int, str) else twins.get(key, key)
        if own in found or (own is not key and own in state):
            raise ValueError(
                f"loaded state dict keeps the state of parameter {own!r:.40} twice, as {own!r:.40} and {key!r:.40}"
            )
        found[own] = entry
    lost = [
        key
        for key, entry in found.items()
        if key not in known and isinstance(entry, Mapping) and _SLOTS & entry.keys()
    ]
    return found, lost


def _other(key: Any) -> Any:
    """A number as a string, or back."""
    if isinstance(key, str):
        return int(key) if key.isdecimal() and key.isascii() and len(key) < 20 else key
    return str(key) if -(2**63) <= key < 2**63 else key


def _names(groups: Sequence[Group]) -> list[list[str]] | None:
    """Each group's parameter names; None if a group with parameters has none."""
    if any("param_names" not in group for group in groups if group["params"]):
        return None
    return [list(group.get("param_names", ())) for group in groups]


def _saved_names(saved: Sequence[Group], keyed: bool) -> list[list[str]] | None:
    """The same of a state dict, where torch's distributed checkpoints put the names in the place of the numbers."""
    keys = [list(group["params"]) for group in saved]
    for i, (group, own) in enumerate(zip(saved, keys, strict=True)):
        names = group.get("param_names", [str(key) for key in own])
        if (
            not isinstance(names, list | tuple)
            or len(names) != len(own)
            or not all(isinstance(n, str) for n in names)
        ):
            raise ValueError(
                f"loaded state dict's group {i} has {len(own)} parameters and the param_names {shown(names)}; "
                "it takes one string for each, or none at all"
            )
    return keys if keyed else _names(saved)


def _flat(names: Sequence[Sequence[str]]) -> Iterator[tuple[int, str]]:
    return ((i, name) for i, own in enumerate(names) for name in own)


def _renamed(names: list[list[str]], rename: Mapping[str, str]) -> list[list[str]]:
    """The saved names as they are here.

    Raises: ValueError for a rename that meets no name.
    """
    if not all(isinstance(name, str) for pair in rename.items() for name in pair):
        raise TypeError(f"rename={dict(rename)!r:.80} takes a saved name and a name here for each, both strings")
    unused = set(rename)

    def _new(name: str) -> str:
        prefixes = [old for old in rename if old.endswith(".") and name.startswith(old)]
        rule = name if name in rename else max(prefixes, key=len, default=None)
        if rule is None:
            return name
        unused.discard(rule)
        return rename[rule] + name[len(rule) :]

    found = [[_new(name) for name in own] for own in names]
    if unused:
        there = _listed(name for _, name in _flat(names))
        raise ValueError(f"rename names {_listed(sorted(unused))}, which the loaded state dict lacks; it has {there}")
    return found


def _by_name(
    groups: Sequence[Group], ours: list[list[str]], saved: Sequence[Group], theirs: list[list[str]]
) -> Match:
    for side, names in (("this optimizer", ours), ("the loaded state dict", theirs)):
        flat = [name for _, name in _flat(names)]
        twice = sorted({name for name in flat if flat.count(name) > 1}) if len(set(flat)) < len(flat) else []
        if twice:
            raise ValueError(f"{side} has more than one parameter named {_listed(twice)}; names must differ")
    saved_at = {
        name: (key, i)
        for i, (group, own) in enumerate(zip(saved, theirs, strict=True))
        for key, name in zip(group["params"], own, strict=True)
    }
    pairs = [
        Pair(param, i, *saved_at[name], name)
        for i, (group, own) in enumerate(zip(groups, ours, strict=True))
        for param, name in zip(group["params"], own, strict=True)
        if name in saved_at
    ]
    here = {name for _, name in _flat(ours)}
    missing = [name for _, name in _flat(ours) if name not in saved_at]
    return Match("name", pairs, missing, [name for name in saved_at if name not in here])


def _by_order(groups: Sequence[Group], saved: Sequence[Group], names: list[list[str]] | None = None) -> Match:
    if len(groups) != len(saved):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: it has {len(saved)}, "
            f"this optimizer has {len(groups)}"
        )
    pairs = []
    for i, (group, kept) in enumerate(zip(groups, saved, strict=True)):
        sizes = len(group["params"]), len(kept["params"])
        if sizes[0] != sizes[1]:
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"group {i} has {sizes[1]} parameters there and {sizes[0]} here; names on both sides, as of "
                "model.named_parameters(), would match them"
            )
        keys = zip(group["params"], kept["params"], strict=True)
        pairs += [Pair(p, i, key, i, str(key), False) for p, key in keys]
    return Match("order", pairs, names=names)


def hint(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """The rename that would pair the names that have no partner, if it is a prefix; else how to give one."""
    here, there = sorted(missing), sorted(unexpected)
    for longer, shorter in ((there, here), (here, there)):
        prefix = longer[0].removesuffix(shorter[0]) if longer and shorter else ""
        if prefix and [prefix + name for name in shorter] == longer:
            rename = {prefix: ""} if longer is there else {name: prefix + name for name in unexpected}
            return f"rename={rename!r}"
    return "rename={name there: name here}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(shown, names))
