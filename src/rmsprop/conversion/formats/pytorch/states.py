"""Finds the optimizers and models in a trainer's checkpoint by their structure, whatever their keys.

An optimizer's state dict is a mapping with `param_groups` and `state`, or torch's flattened form of one. A model is a
mapping of names to tensors, at least one of which is floating point. A path is written as `trainer.optimizers[0]`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmsprop.conversion.formats.pytorch.pickle import Opaque
from rmsprop.conversion.record import Unreadable
from rmsprop.printing import printable, shown

Shape = tuple[int, ...]
_DEPTH = 8
_NODES = 100_000
_LONGEST = 120  # characters of a path in a message
_DEEP = (list, tuple, dict)  # types that a hostile file can make endless to compare
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
# Words of a path that mark a copy of the trained model.
_COPIES = {"ema", "target", "teacher", "best", "swa", "average", "averaged", "avg", "shadow", "old", "backup"}
_OPTIMIZER_WORDS = {
    "optimizer",
    "optimizers",
    "optim",
    "optims",
    "optimiser",
    "opt",
    "state",
    "states",
    "dict",
    "last",
}
_PARTITIONED = ("zero_stage", "single_partition_of_fp32_groups", "fp32_flat_groups")  # DeepSpeed's ZeRO
MODELS = ("model", "state_dict", "model_state_dict", "policy", "net", "network", "module")


@dataclass
class Found:
    """The optimizers and models of a file by path, in the file's order."""

    optimizers: dict[str, Mapping[Any, Any]] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    partition: str | None = None


def survey(whole: Any) -> Found:
    """Return the optimizers and models in nested mappings, lists and tuples.

    The search is breadth-first with a bounded depth and number of nodes. It visits no node twice, and does not
    descend into an optimizer or a model.
    """
    found, seen = Found(), set[int]()
    waiting = deque[tuple[str, Any, int]]([("", whole, 0)])
    while waiting and len(seen) < _NODES:
        place, value, depth = waiting.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping) and any(key in value for key in _PARTITIONED):
            found.partition = place
        flat = _unflattened(value) if isinstance(value, Mapping) else None
        if flat is not None or _is_optimizer(value):
            found.optimizers[place] = value if flat is None else flat
        elif _is_model(value):
            found.models[place] = dict(value)
        elif depth < _DEPTH:
            waiting += [(inner, item, depth + 1) for inner, item in _items(place, value)]
    if not found.models and isinstance(whole, Mapping) and not _is_optimizer(whole):
        found.models |= _mixed(whole, found)
    return found


def optimizer(found: Found, path: Path, chosen: str | None) -> tuple[str, Mapping[Any, Any]] | None:
    """Return the chosen optimizer, or the only one, with its path.

    Raises: Unreadable if there are several and none is chosen; ValueError if the file does not contain the choice.
    """
    optimizers = found.optimizers
    if chosen is not None:
        if chosen not in optimizers:
            listed = listing(optimizers, describe) if optimizers else "none"
            raise ValueError(f"--optimizer {shown(chosen)} is not in {path.name}; its optimizers are {listed}")
        return chosen, optimizers[chosen]
    if len(optimizers) > 1:
        example = next(iter(optimizers))
        raise Unreadable(
            f"{path.name} holds {len(optimizers)} optimizers: {listing(optimizers, describe)}; choose one, such as "
            f"with --optimizer {_quoted(example)}"
        )
    return next(iter(optimizers.items()), None)


def model(
    found: Found,
    path: Path,
    chosen: str | None,
    place: str | None,
    names: Sequence[Any],
    sizes: Sequence[Shape | None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the chosen model, or the one that the optimizer trains, or the only one; and its trained parameters.

    Args:
        place: the optimizer's path, or None without an optimizer.
        names: the keys or names of the optimizer's parameters.
        sizes: the shapes of the optimizer's parameters, None where unknown.
    Raises: Unreadable if several models fit equally well; ValueError if the file does not contain the choice.
    """
    models = found.models
    if chosen is not None and chosen not in models:
        listed = listing(models, _count) if models else "none"
        raise ValueError(f"--parameters {shown(chosen)} is not in {path.name}; its models are {listed}")
    if not models:
        return {}, {}

    def _fits(own: Mapping[str, Any]) -> int:
        return _fit(own, names, sizes) if place is not None else 0

    left = {chosen: models[chosen]} if chosen is not None else models
    if len(left) > 1:
        exact = {name: own for name, own in left.items() if any(_fits(part) > 1 for part in _parts(own).values())}
        within = {name: own for name, own in left.items() if _fits(own)}
        tiers = (_best(left, _fits), _best(_together(left), _fits), exact, within, left)
        left = _narrowed(next(tier for tier in tiers if tier), place)
    if len(left) > 1:
        raise Unreadable(
            f"{path.name} holds {len(models)} models: {listing(models, _count)}; choose one, such as with "
            f"--parameters {_quoted(next(iter(models)))}"
        )
    (own,) = left.values()
    parts = {} if _fits(own) > 1 else _narrowed(_best(_parts(own), _fits), place)
    return own, learned(next(iter(parts.values())) if len(parts) == 1 else own)


def learned(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's parameters: its tensors without buffers and without second names of a tied tensor."""
    again = tied(params)
    return {
        name: value
        for name, value in params.items()
        if name.rsplit(".", 1)[-1] not in _BUFFERS and _is_learnable(value) and name not in again
    }


def tied(params: Mapping[str, Any]) -> dict[str, str]:
    """Map each further name of a tied tensor to its first name, as with an embedding and an output layer."""
    first: dict[tuple[Any, ...], str] = {}
    again = {}
    for name, value in params.items():
        if _is_learnable(value) and value.numel():
            storage = value.untyped_storage()._cdata  # also on the meta device, where all addresses are 0
            own = (storage, value.storage_offset(), tuple(value.shape), value.stride())
            if first.setdefault(own, name) != name:
                again[name] = first[own]
    return again


def describe(state_dict: Mapping[Any, Any]) -> str:
    """Return a short description of an optimizer by the names of its slots, such as "RMSprop, 12 parameters"."""
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    entries = [entry for entry in state.values() if isinstance(entry, Mapping)] if isinstance(state, Mapping) else []
    slots = {str(name)[:40] for entry in entries[:1000] for name in list(entry)[:20]}
    rows = groups if isinstance(groups, (list, tuple)) else []
    sizes = [len(row["params"]) for row in rows if isinstance(row, Mapping) and isinstance(row.get("params"), list)]
    known = {"square_avg": "RMSprop", "exp_avg_sq": "Adam", "state1": "bitsandbytes", "momentum_buffer": "SGD"}
    kind = next((name for slot, name in known.items() if slot in slots), "no state" if not slots else "another kind")
    return f"{kind}, {sum(sizes)} parameters"


def listing(held: Mapping[str, Any], about: Any) -> str:
    """Return the first eight paths as text, each with the description that `about` returns for its value."""
    rows = [f"{_quoted(place)} ({about(value)})" for place, value in list(held.items())[:8]]
    return ", ".join(rows) + (", ..." if len(held) > 8 else "")


def _quoted(place: str) -> str:
    """Return a path in quotes, as it is passed to --optimizer. Its characters are printable already."""
    return f"'{place}'" if len(place) <= _LONGEST else shown(place)


def _items(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(item, (Mapping, list, tuple)):
                name = printable(str(key))
                yield (f"{place}.{name}" if place else name), item
    elif isinstance(value, (list, tuple)):
        for at, item in enumerate(value[:_NODES]):
            if isinstance(item, (Mapping, list, tuple)):
                yield f"{place}[{at}]", item


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and "param_groups" in value


def opaque(whole: Any) -> dict[str, Opaque]:
    """Return the top-level entries that only running code could load, by key."""
    items = (
        whole.items() if isinstance(whole, Mapping) else enumerate(whole) if isinstance(whole, list | tuple) else ()
    )
    return {str(key): value for key, value in items if isinstance(value, Opaque)}


def _is_learnable(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _is_model(value: Any) -> bool:
    """Return whether a value maps names to tensors, one of them a floating-point array.

    A module's extra state may be among them.
    """
    import torch

    if not isinstance(value, Mapping) or not value or not all(isinstance(name, str) for name in value):
        return False
    kept = [own for name, own in value.items() if not name.endswith("_extra_state") and own is not None]
    if not kept or not all(isinstance(own, torch.Tensor) for own in kept):
        return False
    return any(own.ndim > 0 and _is_learnable(own) for own in kept)


def _mixed(whole: Mapping[Any, Any], found: Found) -> dict[str, dict[str, Any]]:
    """Return the top-level tensors of a file that has other entries too, such as a net.state_dict() with an epoch."""
    import torch

    tensors = {name: own for name, own in whole.items() if isinstance(name, str) and isinstance(own, torch.Tensor)}
    if not _is_model(tensors):
        return {}
    found.left_out = [str(name) for name in whole if name not in tensors and name not in found.optimizers]
    return {"": tensors}


def _unflattened(value: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Convert torch's flattened form to a state dict, or return None for any other mapping.

    The flattened keys are `state.NAME.SLOT` and `param_groups.NAME.SETTING`.
    """
    keys = [key for key in value if isinstance(key, str)]
    if len(keys) < len(value) or not any(key.startswith("param_groups.") for key in keys):
        return None
    if not all(key.startswith(("state.", "param_groups.")) and key.count(".") >= 2 for key in keys):
        return None
    state: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for key, item in value.items():
        kind, _, rest = key.partition(".")
        name, _, word = rest.rpartition(".")
        (state if kind == "state" else settings).setdefault(name, {})[word] = item
    groups: list[dict[str, Any]] = []
    for name, own in settings.items():
        same = next((group for group in groups if _same(group, own)), None)
        if same is None:
            same = {**own, "params": []}
            groups.append(same)
        same["params"].append(name)
    return {"state": state, "param_groups": groups}


def _same(group: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    return group.keys() - {"params"} == own.keys() and all(
        type(group[word]) is type(item)
        and bool(shown(group[word], 1000) == shown(item, 1000) if isinstance(item, _DEEP) else group[word] == item)
        for word, item in own.items()
    )


def _parts(own: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a model's submodules, such as an actor-critic's actor. Parameters keep their full names."""
    made: dict[str, dict[str, Any]] = {}
    for name, value in own.items():
        first, dot, _ = name.partition(".")
        if dot:
            made.setdefault(first, {})[name] = value
    return made


def _together(held: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Combine all models except copies into one, for an optimizer of several networks. Paths prefix the names."""
    own = _not_copies(held)
    if len(own) < 2:
        return {}
    return {" + ".join(own): {f"{place}.{name}": value for place, m in own.items() for name, value in m.items()}}


def _fit(own: Mapping[str, Any], names: Sequence[Any], sizes: Sequence[Shape | None]) -> int:
    """Return the quality of a match: 3 for equal names, 2 for equal shapes, 1 with further shapes, 0 for none."""
    if names and all(isinstance(name, str) and name in own for name in names):
        return 3
    left = [tuple(value.shape) for value in learned(own).values()]
    exact = len(left) == len(sizes)
    if len(left) < len(sizes):
        return 0
    for size in sizes:
        if size is None:
            continue
        if size not in left:
            return 0
        left.remove(size)
    return 2 if exact else 1


def _best(held: Mapping[str, dict[str, Any]], fits: Callable[[Mapping[str, Any]], int]) -> dict[str, dict[str, Any]]:
    """Return the models with the best fit, if that fit is exact."""
    marks = {place: fits(own) for place, own in held.items()}
    most = max([*marks.values(), 2])
    return {place: own for place, own in held.items() if marks[place] == most}


def _narrowed(held: dict[str, dict[str, Any]], place: str | None) -> dict[str, dict[str, Any]]:
    """Narrow the models to those that are not copies, then to names like the optimizer's, then to usual names."""
    for narrower in (_not_copies, lambda left: _alike(left, place or ""), _usual):
        if len(held) > 1:
            held = narrower(held) or held
    return held


def _words(place: str) -> set[str]:
    """Return the words of a path, however they are joined: netG, policy_net, critic1."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+", place)}


def _not_copies(held: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {place: own for place, own in held.items() if not _words(place) & _COPIES}


def _alike(held: Mapping[str, dict[str, Any]], place: str) -> dict[str, dict[str, Any]]:
    """Return the models whose paths share the most words with the optimizer's; g matches generator."""
    wanted = _words(place) - _OPTIMIZER_WORDS
    marks = {
        name: sum(any(a.startswith(b) or b.startswith(a) for b in _words(name)) for a in wanted) for name in held
    }
    most = max([*marks.values(), 1])
    return {name: own for name, own in held.items() if marks[name] == most}


def _usual(held: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the first model in the order of MODELS."""
    first = next((name for name in MODELS if name in held), None)
    return {} if first is None else {first: held[first]}


def _count(own: Mapping[str, Any]) -> str:
    return f"{len(own)} tensors"
