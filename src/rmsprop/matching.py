"""Which parameter of a state dict is which parameter here: by name where both sides have names, else by order."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Group = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
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
        return f"parameter {self.name!r}" if self.named else f"parameter {self.name}"


@dataclass(frozen=True)
class Match:
    """Every pair that was found, and the names that have no partner.

    Attributes:
        by: "name" or "order".
        missing: names here that the state dict lacks.
        unexpected: names of the state dict that are not here.
    """

    by: str
    pairs: list[Pair]
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def sources(self, group: int) -> list[int]:
        """The saved groups that a present group's parameters come from, in order of appearance."""
        return list(dict.fromkeys(pair.saved for pair in self.pairs if pair.group == group))


def match(groups: Sequence[Group], saved: Sequence[Group], rename: Mapping[str, str] | None) -> Match:
    """Pair the present groups' parameters with the saved groups'.

    Args:
        rename: saved name -> name here; a saved name that ends with a dot stands for all that begin with it.
    Raises: ValueError where names are ambiguous, and, without names, where groups or their sizes differ.
    """
    ours, theirs = _names(groups), _saved_names(saved)
    if ours is not None and theirs is not None:
        theirs = _renamed(theirs, rename or {})
        keyed = any(isinstance(key, str) for group in saved for key in group["params"])
        if not keyed or rename or {name for _, name in _flat(theirs)} == {name for _, name in _flat(ours)}:
            return _by_name(groups, ours, saved, theirs)
    elif rename:
        side = "this optimizer" if ours is None else "the loaded state dict"
        raise ValueError(
            f"rename={dict(rename)!r} needs names on both sides, and {side} has none: build it with "
            "model.named_parameters()"
        )
    return _by_order(groups, saved)


def _names(groups: Sequence[Group]) -> list[list[str]] | None:
    """Each group's parameter names; None if a group with parameters has none."""
    if any("param_names" not in group for group in groups if group["params"]):
        return None
    return [list(group.get("param_names", ())) for group in groups]


def _saved_names(saved: Sequence[Group]) -> list[list[str]] | None:
    """The same of a state dict, where torch's distributed checkpoints put the names in the place of the numbers."""
    keys = [list(group["params"]) for group in saved]
    if any(keys) and all(isinstance(key, str) for own in keys for key in own):
        return keys
    for i, (group, own) in enumerate(zip(saved, keys, strict=True)):
        names = group.get("param_names", [str(key) for key in own])
        if (
            not isinstance(names, list | tuple)
            or len(names) != len(own)
            or not all(isinstance(n, str) for n in names)
        ):
            raise ValueError(
                f"loaded state dict's group {i} has {len(own)} parameters and the param_names {names!r:.80}; "
                "it takes one string for each, or none at all"
            )
    return _names(saved)


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
        there = ", ".join(repr(name) for _, name in _flat(names))
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
    places = {
        name: (key, i)
        for i, (group, own) in enumerate(zip(saved, theirs, strict=True))
        for key, name in zip(group["params"], own, strict=True)
    }
    pairs = [
        Pair(param, i, *places[name], name)
        for i, (group, own) in enumerate(zip(groups, ours, strict=True))
        for param, name in zip(group["params"], own, strict=True)
        if name in places
    ]
    here = {name for _, name in _flat(ours)}
    missing = [name for _, name in _flat(ours) if name not in places]
    return Match("name", pairs, missing, [name for name in places if name not in here])


def _by_order(groups: Sequence[Group], saved: Sequence[Group]) -> Match:
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
    return Match("order", pairs)


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
    return ", ".join(map(repr, names))
