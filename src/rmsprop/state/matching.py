"""Pairs saved parameters with this optimizer's, by name where both sides have names, else by order."""

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
    """A parameter and its counterpart in the state dict.

    Attributes:
        param: the parameter.
        group: the index of its group in the optimizer.
        key: its key in the saved state.
        saved: the index of its group in the state dict.
        name: its name, or its key if `named` is False.
    """

    param: Tensor
    group: int
    key: Any
    saved: int
    name: str
    named: bool = True

    @property
    def label(self) -> str:
        """The parameter's name in messages."""
        return f"parameter {shown(self.name)}" if self.named else f"parameter {shown(self.key, 60).strip(chr(39))}"


@dataclass(frozen=True)
class Match:
    """The pairs, and the names without a counterpart.

    Attributes:
        by: "name" or "order".
        missing: the optimizer's names that the state dict lacks.
        unexpected: names of the state dict that the optimizer lacks.
        names: for each group, the saved names that an optimizer without names adopts, as torch does.
    """

    by: str
    pairs: list[Pair]
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    names: list[list[str]] | None = None

    def sources(self, group: int) -> list[int]:
        """Return the indices of the saved groups that a group's parameters come from, in order of appearance."""
        return list(dict.fromkeys(pair.saved for pair in self.pairs if pair.group == group))


def match(
    groups: Sequence[Group], saved: Sequence[Group], rename: Mapping[str, str] | None, by: str | None = None
) -> Match:
    """Pair the parameters of the optimizer's groups with those of the saved groups.

    Keys that are names, as in torch's distributed checkpoints, are paired by name. They are paired by order only if
    torch itself sorted them into this optimizer's order, or if names or shapes allow only one order.

    Args:
        rename: saved name -> name here. A saved name that ends with a dot is a prefix.
        by: "name" or "order", as the user chose. None: by name where both sides have names.
    Raises: ValueError if names are ambiguous or missing, or, without names, if groups or their sizes differ.
    """
    ours = _names(groups)
    keyed = _keyed(ours, saved)
    theirs = _saved_names(saved, keyed)
    taken = theirs if ours is None and not keyed else None
    if by == "order":
        if rename:
            raise ValueError(f"rename={dict(rename)!r:.80} pairs by name, but match='order' does not; leave one out")
        return _by_order(groups, saved, taken)
    if ours is None or theirs is None:
        if rename or by:
            side = "this optimizer" if ours is None else "the loaded state dict"
            argument = f"rename={dict(rename)!r:.80}" if rename else f"match={by!r}"
            raise ValueError(
                f"{argument} needs names on both sides, and {side} has none: build it with model.named_parameters()"
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
    """Return whether both sides have the same names, each once."""
    here, there = [name for _, name in _flat(ours)], [name for _, name in _flat(theirs)]
    return len(here) == len(there) == len(set(here)) and set(here) == set(there)


def bare(name: str) -> str:
    """Return a name without the parts that wrappers of the model add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _keyed(ours: list[list[str]] | None, saved: Sequence[Group]) -> bool:
    """Return whether the saved groups list names, rather than numbers that were saved as strings."""
    keys = [key for group in saved for key in group["params"]]
    return is_named(keys, [] if ours is None else [name for _, name in _flat(ours)])


def is_named(keys: Sequence[Any], names: Iterable[Any]) -> bool:
    """Return whether keys are names: strings that are not all digits, unless the model's own names are."""
    if not keys or not all(isinstance(key, str) for key in keys):
        return False
    return not all(key.isdecimal() for key in keys) or set(keys) == set(names)


def _is_in_order(found: Match) -> bool:
    """Return whether all shapes differ, so that they confirm the order."""
    shapes = [None if is_lazy(pair.param) else tuple(pair.param.shape) for pair in found.pairs]
    return len(set(shapes)) == len(shapes)


def _is_from_torch() -> bool:
    """Return whether the caller is torch's set_optimizer_state_dict, which lists names in this optimizer's order."""
    frame = sys._getframe()
    while frame.f_back:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            return True
    return False


def _names_on_one_side(found: Match) -> str:
    names = ", ".join(shown(pair.key, 40) for pair in found.pairs[:2])
    return (
        f"loaded state dict names its parameters ({names}, ...), but this optimizer has no names, and parameters of "
        "one shape cannot be told apart: build it with model.named_parameters(), or give match='order' if its groups "
        "hold the same parameters in the same order"
    )


def _sorted_numbers(saved: Sequence[Group]) -> str | None:
    """Return the message for parameter numbers that were sorted as text, 10 before 2. None if they were not."""
    for i, group in enumerate(saved):
        if all(map(operator.is_, map(type, group["params"]), repeat(int))) and _rises(group["params"]):
            continue
        keys = [str(key) for key in group["params"] if isinstance(key, str) or key in range(2**31)]
        digits = len(keys) == len(group["params"]) and all(key.isdecimal() and len(key) < 11 for key in keys)
        if digits and keys == sorted(keys) and keys != sorted(keys, key=int):
            return (
                f"loaded state dict's group {i} lists its parameters sorted as text ({', '.join(keys[:4])}, ...), "
                "which is not their original order: sort them as numbers, or give match='order' to take them as they "
                "are"
            )
    return None


def _rises(numbers: Sequence[int]) -> bool:
    return all(map(operator.lt, numbers, numbers[1:]))


def rekeyed(saved: Sequence[Group], state: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], list[Any]]:
    """Return the saved state under the keys that its groups list, also where a file turned numbers into strings.

    Returns: the state, and the keys of state entries that no group lists.
    Raises: ValueError if a key is listed twice or has two entries.
    """
    listed = [key for group in saved for key in group["params"]]
    known = set(listed)
    if len(known) < len(listed):
        raise ValueError("loaded state dict lists a parameter twice in its groups, so its state has two owners")
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
    """Return a number key as a string, or a string of digits as a number."""
    if isinstance(key, str):
        return int(key) if key.isdecimal() and key.isascii() and len(key) < 20 else key
    return str(key) if -(2**63) <= key < 2**63 else key


def _names(groups: Sequence[Group]) -> list[list[str]] | None:
    """Return each group's parameter names. None if a group with parameters has none."""
    if any("param_names" not in group for group in groups if group["params"]):
        return None
    return [list(group.get("param_names", ())) for group in groups]


def _saved_names(saved: Sequence[Group], keyed: bool) -> list[list[str]] | None:
    """Return each saved group's parameter names, which torch's distributed checkpoints use as keys."""
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
                "param_names takes one string for each parameter, or is left out"
            )
    return keys if keyed else _names(saved)


def _flat(names: Sequence[Sequence[str]]) -> Iterator[tuple[int, str]]:
    return ((i, name) for i, own in enumerate(names) for name in own)


def _renamed(names: list[list[str]], rename: Mapping[str, str]) -> list[list[str]]:
    """Return the saved names after `rename`.

    Raises: ValueError for a rename that matches no name.
    """
    if not all(isinstance(name, str) for pair in rename.items() for name in pair):
        raise TypeError(f"rename={dict(rename)!r:.80} must map saved names to names here, all strings")
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
    """Return the `rename` that pairs the unmatched names if they differ by a prefix, else its form."""
    here, there = sorted(missing), sorted(unexpected)
    for longer, shorter in ((there, here), (here, there)):
        prefix = longer[0].removesuffix(shorter[0]) if longer and shorter else ""
        if prefix and [prefix + name for name in shorter] == longer:
            rename = {prefix: ""} if longer is there else {name: prefix + name for name in unexpected}
            return f"rename={rename!r}"
    return "rename={name there: name here}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(shown, names))
