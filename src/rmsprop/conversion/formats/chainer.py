"""Reads Chainer's .npz files of an optimizer or a model, and the trainer's snapshots, which have both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rmsprop.conversion.formats import archives
from rmsprop.conversion.record import Array, Checkpoint, Unreadable
from rmsprop.printing import shown

SLOTS = {"chainer": ("ms",), "chainer_graves": ("n", "g", "delta")}
_MODEL, _OPTIMIZER = "updater/model:", "updater/optimizer:"


def has_state(keys: list[str]) -> bool:
    """Return whether the keys of an .npz are those of an optimizer, which counts steps t per parameter."""
    return any(key.startswith(_OPTIMIZER) for key in keys) or (
        "t" in keys and any(key.endswith("/t") for key in keys)
    )


def from_arrays(path: Path, arrays: Mapping[str, Array]) -> Checkpoint:
    """Build a checkpoint from the arrays of an .npz. Raises: Unreadable."""
    made = Checkpoint()
    whose = {key.split("/")[1] for key in arrays if key.startswith(_OPTIMIZER)}
    if len(whose) > 1:
        raise Unreadable(
            f"{path.name} holds {len(whose)} optimizers ({shown(', '.join(sorted(whose)))}); save one alone"
        )
    before = f"updater/{whose.pop()}/" if whose else ""
    model = before.replace(_OPTIMIZER, _MODEL)
    if before:
        made.params = {key.removeprefix(model): value for key, value in arrays.items() if key.startswith(model)}
    states = {key.removeprefix(before): value for key, value in arrays.items() if key.startswith(before)}
    for key, value in states.items():
        owner, _, slot = key.rpartition("/")
        if owner and slot not in ("t", "epoch"):
            made.slots.setdefault(owner, {})[slot] = value
    kinds = {frozenset(slots) for slots in made.slots.values()}
    made.source = next((name for name, slots in SLOTS.items() if kinds == {frozenset(slots)}), "")
    if not made.source:
        kept = ", ".join(sorted({slot for slots in kinds for slot in slots}))
        raise Unreadable(
            f"{path.name} holds the state of another optimizer, which keeps {shown(kept) if kept else 'none'}"
        )
    if "t" in states and states["t"].shape == ():
        made.step = int(states["t"])
    order = SLOTS[made.source]
    for name, slots in made.slots.items():
        shapes = {value.shape for value in slots.values()}
        shapes |= {made.params[name].shape} if name in made.params else set()
        if len(shapes) > 1 or (made.params and name not in made.params):
            raise Unreadable(f"{path.name} has a state of {shown(name)} that does not fit its parameter")
    names = [name for name in made.params or made.slots if name in made.slots]
    made.slots = {name: {slot: made.slots[name][slot] for slot in order} for name in names}
    made.kinds = dict.fromkeys(made.params or made.slots, "keep")
    return made


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write an optimizer's .npz, or, where there are parameters too, both under a snapshot's names.

    Of the latter, load_npz(file, model, path="updater/model:main/") takes the model, "updater/optimizer:main/" the
    rest.
    """
    before = f"{_OPTIMIZER}main/" if checkpoint.params else ""
    count = np.array(checkpoint.step or 0, np.int64)
    made: dict[str, Array] = {f"{_MODEL}main/{name}": value for name, value in checkpoint.params.items()}
    made |= {f"{before}t": count, f"{before}epoch": np.array(0, np.int64)}
    made |= {"updater/iteration": count} if before else {}
    for name, slots in checkpoint.slots.items():
        made[f"{before}{name}/t"] = count
        made |= {f"{before}{name}/{slot}": slots[slot] for slot in SLOTS[checkpoint.source]}
    archives.save(path, made)
