"""Finds the variables that an optimizer's states belong to, by name or by order and shape.

Keras saves a model's variables by their position in the model, and the optimizer's states as a list: one of each kind
for every trainable variable, in the order of model.trainable_variables. The file usually has the order of the layers,
but not which of them were frozen. The shapes of the states determine that. An ambiguous assignment is rejected.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

_LONGEST, _DEEPEST = 4096, 100  # maximum length of a name, and maximum number of scopes before it
NEWER = ("average", "velocity", "momentum", "average_gradient")
LEGACY = ("rms", "momentum", "mg")


class Owners:
    """Maps states to variables by name.

    The names are RMSprop/velocity/conv/kernel (tf_keras), rm_sprop/conv_kernel_velocity (Keras 3) and
    RMSprop/conv/kernel/rms (legacy, within any scopes).
    """

    def __init__(self, variables: Iterable[str]) -> None:
        listed = list(variables)
        self.variables = set(listed)
        self.twice = {name for name, times in Counter(listed).items() if times > 1}
        self.flat: dict[str, str] = {}
        for name in listed:
            flat = name.replace("/", "_")
            if flat in self.flat and self.flat[flat] != name:
                self.twice |= {name, self.flat[flat]}
            self.flat[flat] = name

    def of(self, state: str) -> tuple[str, str] | None:
        """Return the slot and the variable of a state, or None unless its name identifies exactly one variable."""
        if len(state) > _LONGEST:
            return None
        found = self._newer(state) or self._keras3(state) or self._legacy(state)
        return found if found and found[1] not in self.twice else None

    def _newer(self, state: str) -> tuple[str, str] | None:
        for match in re.finditer(r"(?:^|/)(average|velocity|momentum|average_gradient)/", state):
            if state[match.end() :] in self.variables:
                return match[1], state[match.end() :]
        return None

    def _keras3(self, state: str) -> tuple[str, str] | None:
        name = state.rpartition("/")[2]
        for slot in NEWER:
            flat = name.removesuffix(f"_{slot}")
            if flat != name and flat in self.flat:
                return slot, self.flat[flat]
        return None

    def _legacy(self, state: str) -> tuple[str, str] | None:
        name, _, slot = state.rpartition("/")
        if slot not in LEGACY:
            return None
        for _ in range(_DEEPEST):
            if not name or name in self.variables:
                break
            name = name.partition("/")[2]
        else:
            return None
        return (slot, name) if name else None


Shape = tuple[int, ...]
_STEPS = 200_000


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable of the model.

    Attributes: trainable: False if the file marks the variable as frozen; a frozen one may lack the mark.
    """

    name: str
    shape: Shape
    trainable: bool


@dataclasses.dataclass(frozen=True)
class Unordered:
    """Parts of a model whose relative order the file does not contain.

    Attributes: parts: sequences of layers, each in order; a layer's items stay together.
    """

    parts: tuple[tuple[tuple[Item, ...], ...], ...]


Item = Variable | Unordered


def variables(items: Sequence[Item]) -> list[Variable]:
    """Return all variables, in the given order."""
    found: list[Variable] = []
    for item in items:
        if isinstance(item, Variable):
            found.append(item)
        else:
            for layer in itertools.chain(*item.parts):
                found.extend(variables(layer))
    return found


def assign(items: Sequence[Item], shapes: Sequence[Shape]) -> tuple[list[str], int, bool] | None:
    """Return the names of the variables that states of these shapes belong to.

    The first attempt uses all trainable variables. The second allows some of them to be frozen. The third allows any
    variable to be frozen or trainable.
    Returns: the names, the number of the attempt, and whether the assignment is unique; None if nothing fits.
    """
    for attempt, (frozen, thawed) in enumerate(((False, False), (True, False), (True, True))):
        found = _search(tuple(items), tuple(shapes), frozen, thawed)
        if found:
            return found[0], attempt, len(found) == 1
    return None


def _search(items: tuple[Item, ...], shapes: tuple[Shape, ...], frozen: bool, thawed: bool) -> list[list[str]]:
    """Return the first two assignments of a depth-first search.

    The stack holds linked lists with shared tails: the remaining items and the names so far.
    """
    known = variables(items)
    spare = Counter(variable.shape for variable in known if thawed or variable.trainable)
    spare.subtract(shapes)
    found: list[list[str]] = []
    pending: list[tuple[Any, Any, int]] = [(_link(items, None), None, 0)]
    steps = 0
    while steps < _STEPS:
        if not pending or len(found) == 2:
            return found
        steps += 1
        left, names, at = pending.pop()
        if left is None:
            if at == len(shapes):
                way = _unlink(names)
                if way not in found:
                    found.append(way)
            continue
        item, rest = left
        if isinstance(item, Unordered):
            parts = [part for part in item.parts if part]
            steps += len(parts) ** 2
            for index in reversed(range(len(parts))):
                others = (*parts[:index], parts[index][1:], *parts[index + 1 :])
                after = (Unordered(others), rest) if any(others) else rest
                pending.append((_link(parts[index][0], after), names, at))
            if not parts:
                pending.append((rest, names, at))
            continue
        may_match = thawed or item.trainable
        if not may_match or (frozen and spare[item.shape] > 0):
            pending.append((rest, names, at))
        if may_match and at < len(shapes) and item.shape == shapes[at]:
            pending.append((rest, (item.name, names), at + 1))
    return found if not found else [found[0], found[0]]  # out of steps: returned twice, since it may not be unique


def _link(items: Sequence[Item], rest: Any) -> Any:
    for item in reversed(items):
        rest = (item, rest)
    return rest


def _unlink(names: Any) -> list[str]:
    found = []
    while names is not None:
        name, names = names
        found.append(name)
    return found[::-1]
