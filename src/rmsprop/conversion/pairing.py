"""Names for optimizer state that has only numbers: the model's parameters in its order, where shapes leave one way.

torch numbers the parameters of its groups one after another. A group is taken to list its parameters in the model's
order; the parameters that each of several groups holds are found by shape, or fixed by the map's [rename].
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rmsprop.conversion.record import Checkpoint, ConversionReport

MATCHES = ("order", "number")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_TRIED = 50_000  # steps of the search, after which it counts as ambiguous

Shapes = Mapping[Any, tuple[int, ...]]


def ways(
    groups: Sequence[Sequence[Any]], shapes: Shapes, model: Shapes, fixed: Mapping[Any, str] | None = None
) -> list[dict[Any, str]]:
    """The ways to give each number of the groups a name of the model, two at most.

    Args:
        groups: the numbers of each group, in its order.
        shapes: of the numbers whose state has one; the others fit everything.
        model: name -> shape, in the model's order. Names that are left over belong to no group.
        fixed: number -> name, as the user decided.
    """
    fixed = fixed or {}
    owner = {name: key for key, name in fixed.items()}
    spare = len(model) - sum(map(len, groups))
    if spare < 0 or not owner.keys() <= model.keys():
        return []
    # By the count of numbers that each group has given away: up to two ways to come here, each the last step of one.
    front: dict[tuple[int, ...], list[Any]] = {(0,) * len(groups): [None]}
    tried = 0
    for at, (name, shape) in enumerate(model.items()):
        reached: dict[tuple[int, ...], list[Any]] = {}
        for given, paths in front.items():
            tried += len(groups) if len(front) > 1 else 0
            if tried > _TRIED:
                return [{}, {}]
            if at - sum(given) < spare and name not in owner:
                _add(reached, given, paths)
            for i, group in enumerate(groups):
                key = group[given[i]] if given[i] < len(group) else None
                fits = key is not None and shapes.get(key, shape) == shape
                if fits and fixed.get(key, name) == name and owner.get(name, key) == key:
                    after = (*given[:i], given[i] + 1, *given[i + 1 :])
                    _add(reached, after, [(path, key, name) for path in paths])
        front = reached
    return [_unrolled(path) for path in front.get(tuple(map(len, groups)), [])]


def _add(reached: dict[tuple[int, ...], list[Any]], place: tuple[int, ...], paths: list[Any]) -> None:
    reached[place] = (reached.get(place, []) + paths)[:2]


def _unrolled(path: Any) -> dict[Any, str]:
    found = {}
    while path is not None:
        path, key, name = path
        found[key] = name
    return found


def by_order(groups: Sequence[Sequence[Any]], shapes: Shapes, model: Shapes) -> dict[Any, str]:
    """The number n is the model's nth parameter, as the user decided.

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
    """The sentence for numbers that could have more than one name each."""
    first, second = two
    key = next((key for group in groups for key in group if first.get(key) != second.get(key)), None)
    example = "" if key is None else f" (parameter {key} could be {first[key]!r} or {second[key]!r})"
    sizes = ", ".join(str(len(group)) for group in groups)
    return (
        f"the file numbers its parameters in {len(groups)} groups ({sizes}) and does not name them, and their shapes "
        f"fit the model in more than one way{example}: write the names that you know into a map.toml's [rename], by "
        "number, or add --match order if the numbers follow the model's order, or --match number to keep numbers and "
        "load them into an optimizer with the same groups"
    )


def named(
    held: Checkpoint,
    model: Shapes,
    chart: Mapping[str, str],
    match: str | None,
    report: ConversionReport,
    wanted: bool,
) -> tuple[Checkpoint, Mapping[str, str]]:
    """A checkpoint whose numbers have become names of the model, where that is decided.

    Args:
        model: name -> shape; empty if nothing names parameters, whose numbers then stay.
        chart: the map's [rename], where numbers that it names are fixed.
        match: "order" or "number", the user's decision, or None.
        wanted: refuse where there is no way, as where the user gave the model.
    Returns: the checkpoint, and of the chart what is still to be renamed.
    Raises: ValueError where there is more than one way, or none and one is wanted.
    """
    if not model or match == "number":
        return held, chart
    shapes = {key: next((x.shape for x in slots.values() if x.ndim), ()) for key, slots in held.slots.items()}
    numbers = {key for group in held.numbers for key in group}
    fixed = {key: name for key, name in chart.items() if key in numbers}
    if match == "order":
        found = by_order(held.numbers, shapes, model)
    else:
        several = ways(held.numbers, shapes, model, fixed)
        if len(several) > 1:
            raise ValueError(ambiguous(held.numbers, several))
        if not several:
            none = f"the shapes of {len(numbers)} numbered parameters fit no choice among the model's {len(model)}"
            if wanted or fixed:
                raise ValueError(f"{none} in its order; name them in a map.toml's [rename], by number")
            report.assumed.append(f"numbers of parameters are kept: {none}")
            return held, chart
        found = several[0]
    if len(held.numbers) > 1 or len(found) < len(model):
        how = "the order of --match order" if match else "the one way that shapes leave"
        report.assumed.append(f"the file's numbers are the model's names in {how}: --dry-run lists them")
    new = dataclasses.replace(
        held,
        slots={name: held.slots[key] for key, name in found.items() if key in held.slots},
        groups=[([found[key] for key in names], hyper) for names, hyper in held.groups],
        numbers=[],
    )
    return new, {key: name for key, name in chart.items() if key not in fixed}


def learned(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a model that are no buffers of its normalization layers."""
    return {name: shape for name, shape in shapes.items() if name.rsplit(".", 1)[-1] not in BUFFERS}


def sorted_as_text(names: Sequence[str]) -> bool:
    """Whether names are sorted as text, 10 before 2, and so are not in the order of any model."""
    parts = [re.split(r"[/.]", name) for name in names]
    return parts == sorted(parts) and parts != sorted(parts, key=_natural)


def _natural(parts: list[str]) -> list[list[Any]]:
    """A key that sorts 2 before 10."""
    cut = [re.split(r"([0-9]+)", part) for part in parts]
    return [[(len(x.lstrip("0")), x) if i % 2 else x for i, x in enumerate(own)] for own in cut]


def check_order(names: Sequence[str], shapes: Sequence[tuple[int, ...]], there: Sequence[tuple[int, ...]]) -> None:
    """Refuse to pair by the order of a file that sorts its names as text, where shapes fit their own order too.

    Args:
        names, shapes: of the file's parameters, in its order; `there` the model's shapes, in its order.
    Raises: ValueError.
    """
    if not sorted_as_text(names):
        return
    turned = sorted(range(len(names)), key=lambda i: _natural(re.split(r"[/.]", names[i])))
    if list(there) == [shapes[i] for i in turned]:
        first = next(at for at, i in enumerate(turned) if at != i)
        raise ValueError(
            f"the file sorts its names as text ({names[first]} stands before {names[turned[first]]}), none of them "
            "is the model's, and shapes fit both orders: name them in a map.toml's [rename], or add --match order to "
            "take them as they are sorted"
        )
