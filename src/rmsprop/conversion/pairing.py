"""Pairs numbered optimizer state with the names of a model's parameters, where the shapes allow only one way.

torch numbers the parameters of its groups consecutively. Each group is assumed to list its parameters in the model's
order. Shapes, or the map's [rename], decide which group of several holds a parameter.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rmsprop.conversion.record import Checkpoint, ConversionReport

MATCHES = ("order", "number")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_MAX_STEPS = 50_000  # of the search, after which the pairing counts as ambiguous

Shapes = Mapping[Any, tuple[int, ...]]


def ways(
    groups: Sequence[Sequence[Any]], shapes: Shapes, model: Shapes, fixed: Mapping[Any, str] | None = None
) -> list[dict[Any, str]]:
    """Return the ways to pair each number of the groups with a name of the model, at most two.

    Args:
        groups: the numbers of each group, in the group's order.
        shapes: number -> shape, for numbers with state. A number without a shape fits every name.
        model: name -> shape, in the model's order. Names may remain that belong to no group.
        fixed: number -> name, as the user decided.
    """
    fixed = fixed or {}
    owner = {name: key for key, name in fixed.items()}
    spare = len(model) - sum(map(len, groups))
    if spare < 0 or not owner.keys() <= model.keys():
        return []
    # Dynamic programming over the model's names. A key counts the numbers that each group has used; its value holds
    # up to two partial pairings with these counts, as linked lists of (path, number, name).
    front: dict[tuple[int, ...], list[Any]] = {(0,) * len(groups): [None]}
    steps = 0
    for at, (name, shape) in enumerate(model.items()):
        reached: dict[tuple[int, ...], list[Any]] = {}
        for used, paths in front.items():
            steps += len(groups) if len(front) > 1 else 0
            if steps > _MAX_STEPS:
                return [{}, {}]
            if at - sum(used) < spare and name not in owner:
                _add(reached, used, paths)
            for i, group in enumerate(groups):
                key = group[used[i]] if used[i] < len(group) else None
                fits = key is not None and shapes.get(key, shape) == shape
                if fits and fixed.get(key, name) == name and owner.get(name, key) == key:
                    after = (*used[:i], used[i] + 1, *used[i + 1 :])
                    _add(reached, after, [(path, key, name) for path in paths])
        front = reached
    return [_unrolled(path) for path in front.get(tuple(map(len, groups)), [])]


def _add(reached: dict[tuple[int, ...], list[Any]], place: tuple[int, ...], paths: list[Any]) -> None:
    reached[place] = (reached.get(place, []) + paths)[:2]


def _unrolled(path: Any) -> dict[Any, str]:
    pairs = {}
    while path is not None:
        path, key, name = path
        pairs[key] = name
    return pairs


def by_order(groups: Sequence[Sequence[Any]], shapes: Shapes, model: Shapes) -> dict[Any, str]:
    """Pair the nth number with the model's nth parameter, as --match order requests.

    Raises: ValueError where counts or shapes differ.
    """
    keys = [key for group in groups for key in group]
    if len(keys) != len(model):
        raise ValueError(
            f"--match order pairs {len(keys)} numbers with {len(model)} parameters of the model; name them in a "
            "map.toml's [rename]"
        )
    for key, (name, shape) in zip(keys, model.items(), strict=True):
        if shapes.get(key, shape) != shape:
            raise ValueError(
                f"--match order pairs the state of parameter {key}, of shape {shapes[key]}, with {name}, of shape "
                f"{shape}"
            )
    return dict(zip(keys, model, strict=True))


def ambiguous(groups: Sequence[Sequence[Any]], two: Sequence[Mapping[Any, str]]) -> str:
    """Return the message for numbers that fit more than one name.

    Args:
        two: two of the possible pairings.
    """
    first, second = two
    key = next((key for group in groups for key in group if first.get(key) != second.get(key)), None)
    example = "" if key is None else f" (parameter {key} could be {first[key]!r} or {second[key]!r})"
    sizes = ", ".join(str(len(group)) for group in groups)
    return (
        f"the file numbers its parameters in {len(groups)} groups ({sizes}) and does not name them, and their "
        f"shapes fit the model in more than one way{example}: give the names that you know, by number, in the "
        "[rename] table of a map.toml; or add --match order if the numbers follow the model's order, or --match "
        "number to keep the numbers and load them into an optimizer with the same groups"
    )


def with_names(
    checkpoint: Checkpoint,
    model: Shapes,
    renames: Mapping[str, str],
    match: str | None,
    report: ConversionReport,
    required: bool,
) -> tuple[Checkpoint, Mapping[str, str]]:
    """Return a checkpoint with the model's names in place of numbers, if there is exactly one way to pair them.

    Args:
        model: name -> shape; empty if no file names the parameters, which then keep their numbers.
        renames: the map's [rename] table. It fixes the names of the numbers in it.
        match: the user's choice, "order" or "number", or None.
        required: raise if no pairing fits, instead of keeping the numbers.
    Returns: the checkpoint, and the rest of `renames`.
    Raises: ValueError where more than one pairing fits, or none fits and one is required.
    """
    if not model or match == "number":
        return checkpoint, renames
    shapes = {key: next((x.shape for x in slots.values() if x.ndim), ()) for key, slots in checkpoint.slots.items()}
    numbers = {key for group in checkpoint.numbers for key in group}
    fixed = {key: name for key, name in renames.items() if key in numbers}
    if match == "order":
        pairs = by_order(checkpoint.numbers, shapes, model)
    else:
        pairings = ways(checkpoint.numbers, shapes, model, fixed)
        if len(pairings) > 1:
            raise ValueError(ambiguous(checkpoint.numbers, pairings))
        if not pairings:
            fault = (
                f"the shapes of {len(numbers)} numbered parameters do not fit the model's {len(model)} in its order"
            )
            if required or fixed:
                raise ValueError(f"{fault}; name them in a map.toml's [rename], by number")
            report.assumed.append(f"numbers of parameters are kept: {fault}")
            return checkpoint, renames
        pairs = pairings[0]
    if len(checkpoint.numbers) > 1 or len(pairs) < len(model):
        how = "in the model's order, by --match order" if match else "in the only way that fits their shapes"
        report.assumed.append(f"the file's numbers are paired with the model's names {how}: --dry-run lists them")
    new = dataclasses.replace(
        checkpoint,
        slots={name: checkpoint.slots[key] for key, name in pairs.items() if key in checkpoint.slots},
        groups=[([pairs[key] for key in names], hyper) for names, hyper in checkpoint.groups],
        numbers=[],
    )
    return new, {key: name for key, name in renames.items() if key not in fixed}


def without_buffers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes without the buffers of normalization layers."""
    return {name: shape for name, shape in shapes.items() if name.rsplit(".", 1)[-1] not in BUFFERS}


def sorted_as_text(names: Sequence[str]) -> bool:
    """Return whether names are sorted as text, 10 before 2, so that their order is not a model's."""
    parts = [re.split(r"[/.]", name) for name in names]
    return parts == sorted(parts) and parts != sorted(parts, key=_natural)


def _natural(parts: list[str]) -> list[list[Any]]:
    """Return a sort key that puts 2 before 10."""
    cut = [re.split(r"([0-9]+)", part) for part in parts]
    return [[(len(x.lstrip("0")), x) if i % 2 else x for i, x in enumerate(own)] for own in cut]


def check_order(names: Sequence[str], shapes: Sequence[tuple[int, ...]], there: Sequence[tuple[int, ...]]) -> None:
    """Refuse to pair by order if the file sorts its names as text and their natural order fits the model as well.

    Args:
        names, shapes: the file's parameters, in its order.
        there: the model's shapes, in its order.
    Raises: ValueError.
    """
    if not sorted_as_text(names):
        return
    natural = sorted(range(len(names)), key=lambda i: _natural(re.split(r"[/.]", names[i])))
    if list(there) == [shapes[i] for i in natural]:
        first = next(at for at, i in enumerate(natural) if at != i)
        raise ValueError(
            f"the file sorts its names as text ({names[first]} before {names[natural[first]]}), none of them is "
            "the model's, and the shapes fit both orders: name them in a map.toml's [rename], or add --match order "
            "to pair them in the file's order"
        )
