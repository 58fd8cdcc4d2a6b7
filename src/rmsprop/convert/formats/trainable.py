"""Which parameter an optimizer's nameless states belong to.

Keras saves a model's variables by their place in it, and the optimizer's states as a bare list: one of each kind for
every trainable variable, in the order of model.trainable_variables. The order of layers is in the file mostly, what
was frozen is not; the shapes of the states tell. More than one answer is no answer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

Shape = tuple[int, ...]
_STEPS = 200_000


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable of the model. Attributes: trainable: as far as the file tells; what was frozen may say so or not."""

    name: str
    shape: Shape
    trainable: bool


@dataclasses.dataclass(frozen=True)
class Unordered:
    """Parts of a model whose order among each other the file does not tell.

    Attributes: parts: each a row of layers in their order; a layer's items stay together.
    """

    parts: tuple[tuple[tuple[Item, ...], ...], ...]


Item = Variable | Unordered


def variables(items: Sequence[Item]) -> list[Variable]:
    """All variables, in the order given."""
    found: list[Variable] = []
    for item in items:
        if isinstance(item, Variable):
            found.append(item)
        else:
            for layer in itertools.chain(*item.parts):
                found.extend(variables(layer))
    return found


def assign(items: Sequence[Item], shapes: Sequence[Shape]) -> tuple[list[str], int, bool] | None:
    """The names of the variables that states of these shapes belong to.

    First the trainable ones are tried, all of them; then some of them may have been frozen without a word in the
    file; then any variable may have been frozen or not.
    Returns: the names, at which of these attempts they were found, and whether that is the only way; None if nothing
        fits.
    """
    for attempt, (frozen, thawed) in enumerate(((False, False), (True, False), (True, True))):
        found = _search(tuple(items), tuple(shapes), frozen, thawed)
        if found:
            return found[0], attempt, len(found) == 1
    return None


def _search(items: tuple[Item, ...], shapes: tuple[Shape, ...], frozen: bool, thawed: bool) -> list[list[str]]:
    """The first two ways, depth first, on a stack of what is left and the names so far: lists that share tails."""
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
    return found if not found else [found[0], found[0]]  # given up: not known to be the only way


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
