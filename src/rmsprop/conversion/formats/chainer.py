"""Reads Chainer's .npz files of an optimizer or a model, and the trainer's snapshots, which have both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rmsprop.conversion.owner import find_owner
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
    name = next((name for name, slots in SLOTS.items() if kinds == {frozenset(slots)}), "")
    if not name:
        kept = ", ".join(sorted({slot for slots in kinds for slot in slots}))
        raise Unreadable(
            f"{path.name} holds the state of another optimizer, which keeps {shown(kept) if kept else 'none'}"
        )
    if "t" in states and states["t"].shape == ():
        made.step = int(states["t"])
    made.owner, order = find_owner(name), SLOTS[name]
    for name, slots in made.slots.items():
        shapes = {value.shape for value in slots.values()}
        shapes |= {made.params[name].shape} if name in made.params else set()
        if len(shapes) > 1 or (made.params and name not in made.params):
            raise Unreadable(f"{path.name} has a state of {shown(name)} that does not fit its parameter")
    names = [name for name in made.params or made.slots if name in made.slots]
    made.slots = {name: {slot: made.slots[name][slot] for slot in order} for name in names}
    made.kinds = dict.fromkeys(made.params or made.slots, "keep")
    return made
