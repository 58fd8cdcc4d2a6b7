"""Reads a checkpoint of TensorFlow 1's Saver, or an object-based checkpoint of TensorFlow 2.

TensorFlow 1 names a variable's slots in the order of their creation: conv/kernel/RMSProp is rms, and without
centering, conv/kernel/RMSProp_1 is momentum. With centering, _1 is mg and _2 is momentum. The file has no settings.
conv/kernel/ExponentialMovingAverage is the average of conv/kernel, trained or not.
TensorFlow 2 names everything by its path from the root object, and also lists the variables' names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmsprop.conversion.formats.keras.owners import LEGACY, NEWER, Owners
from rmsprop.conversion.formats.reading import decimal, layout, strange
from rmsprop.conversion.formats.tensorflow import bundle
from rmsprop.conversion.formats.tensorflow.bundle import Bundle, fields, text
from rmsprop.conversion.formats.tensorflow.sstable import MAGIC
from rmsprop.conversion.owner import find_owner
from rmsprop.conversion.record import Array, Checkpoint, Unreadable
from rmsprop.printing import shown

GRAPH, VALUE = "_CHECKPOINTABLE_OBJECT_GRAPH", "/.ATTRIBUTES/VARIABLE_VALUE"
_SCOPES = 100
STEPS = ("iter", "_iterations", "iterations", "iteration")
_SLOT = re.compile(r"(.+)/\.OPTIMIZER_SLOT/(.+)/([^/]+)", re.DOTALL)
_OTHERS = ("Adam", "Momentum", "Adagrad", "Adadelta", "Ftrl", "ExponentialMovingAverage_1")
_AVERAGE = "ExponentialMovingAverage"


def sniff(path: Path) -> bool:
    """Return whether the path is a bundle's prefix or one of its files."""
    try:
        index = bundle.index_of(path)
        with index.open("rb") as file:
            file.seek(-8, 2)
            return file.read(8) == MAGIC.to_bytes(8, "little")
    except (OSError, ValueError):
        return False


def read(path: Path) -> Checkpoint:
    """Read the variables and the optimizer's slots. Raises: Unreadable."""
    with strange(bundle.index_of(path), "a TensorFlow checkpoint"):
        held = Bundle(bundle.prefix(path))
        if any(name.endswith(VALUE) for name in held.entries):
            return _objects(held)
        return _saver(held)


def _saver(held: Bundle) -> Checkpoint:
    """Read a checkpoint of TensorFlow 1's Saver."""
    made = Checkpoint(find_owner("tensorflow1"))
    numbers = {name: entry for name, entry in held.entries.items() if entry[0] != bundle.STRING}
    stem = _stem(held, list(numbers))
    slots: dict[str, dict[str, str]] = {}
    averages: dict[str, str] = {}
    dropped = []
    for name in numbers:
        owner, _, last = name.rpartition("/")
        match = re.fullmatch(rf"{re.escape(stem)}(?:_([12]))?", last) if stem else None
        for _ in range(_SCOPES):
            if not (match or last == _AVERAGE) or not owner or owner in numbers:
                break
            owner = owner.partition("/")[2]  # slots created in a variable scope have its name as prefix
        if match and owner:
            slots.setdefault(owner, {})[match[1] or "0"] = name
        elif last == _AVERAGE and owner:
            averages[owner] = name
        elif last == _AVERAGE or (last.startswith(f"{_AVERAGE}_") and owner in numbers):
            dropped.append(name)
        elif name == "global_step":
            made.step = int(held.tensor(name))
        else:
            made.params[name] = held.tensor(name)
    centered = any("2" in ages for ages in slots.values())
    names = {"0": "rms", "1": "mg", "2": "momentum"} if centered else {"0": "rms", "1": "momentum"}
    for owner, ages in slots.items():
        if len(ages) != len(names):
            raise Unreadable(
                f"{held.path.name} holds {len(ages)} slots of {shown(owner)} and {len(names)} of others: two "
                "optimizers, or a damaged checkpoint"
            )
        made.slots[owner] = {names[age]: _alike(held, name, made.params[owner]) for age, name in sorted(ages.items())}
    dropped += [name for owner, name in averages.items() if owner not in made.params]
    made.averages = {owner: held.tensor(name) for owner, name in averages.items() if owner in made.params}
    if slots:
        made.hyper["centered"] = centered
    else:
        made.notes.append("The file holds no state of an optimizer.")
    if dropped:
        made.notes.append(f"{len(dropped)} averaged weights are left out ({shown(dropped[0])}).")
    made.kinds = {name: layout(name, value) for name, value in made.params.items()}
    return made


def _stem(held: Bundle, names: list[str]) -> str:
    """Return the optimizer's name, or "" without an optimizer: RMSProp, unless the user named it otherwise."""
    last = {name.rpartition("/")[2] for name in names}
    found = {name.removesuffix("_1").removesuffix("_2") for name in last if "rms" in name.lower()}
    stems = {stem for stem in found if any(f"{name}/{stem}" in held.entries for name in names)}
    if "RMSProp" in stems:
        return "RMSProp"
    if len(stems) > 1:
        raise Unreadable(f"{held.path.name} holds the slots of two optimizers, {shown(', '.join(sorted(stems)))}")
    others = {name.rsplit("/", 1)[-1] for name in names} & set(_OTHERS)
    if others and not stems:
        raise Unreadable(f"{held.path.name} holds the slots of {shown(', '.join(sorted(others)))}, not of RMSProp")
    return stems.pop() if stems else ""


def _alike(held: Bundle, name: str, value: Array) -> Array:
    state = held.tensor(name)
    if state.shape != value.shape:
        raise Unreadable(
            f"{held.path.name} holds {shown(name)} of shape {state.shape[:8]}, but its variable has {value.shape[:8]}"
        )
    return state


def graph(held: Bundle) -> dict[str, str]:
    """Return the variables' names by key, in the order of objects, or {} if the file does not list them."""
    if GRAPH not in held.entries:
        return {}
    found: dict[str, str] = {}
    for tag, node in fields(held.string(GRAPH)):
        for kind, attribute in fields(node) if tag == 1 and isinstance(node, bytes) else ():
            if kind == 2 and isinstance(attribute, bytes):
                parts = dict(fields(attribute))
                key, full = text(parts.get(3, b"")), text(parts.get(2, b""))
                if key.endswith(VALUE):
                    found[key.removesuffix(VALUE)] = full
    return found


def places(held: Bundle) -> tuple[dict[str, str], dict[str, dict[str, str]], dict[str, str]]:
    """Return the keys of everything in an object-based checkpoint.

    Returns: the variables' keys by name, their slots' keys, and the keys of the optimizer's own numbers.
    """
    keys = {name.removesuffix(VALUE) for name in held.entries if name.endswith(VALUE)}
    names = {key: full for key, full in graph(held).items() if key in keys}
    ordered = [*names, *(key for key in sorted(keys) if key not in names)]
    own: dict[str, str] = {}
    slots: dict[str, dict[str, str]] = {}
    rest, states = [], []
    roots = {match[2] for key in keys if (match := _SLOT.fullmatch(key))}
    roots |= {key.rpartition("/")[0] for key in keys if key.rpartition("/")[2] in STEPS}
    if len(roots) > 1:
        raise Unreadable(
            f"{held.path.name} holds {len(roots)} optimizers ({shown(', '.join(sorted(roots)))}); save one"
        )
    root = f"{roots.pop()}/" if roots else "\0"
    for key in ordered:
        match = _SLOT.fullmatch(key)
        if match:
            slots.setdefault(match[1], {})[match[3]] = key
        elif key.startswith(f"{root}_variables/"):
            states.append(key)
        elif key.startswith(root) and not key.startswith(f"{root}_trainable_variables/"):
            own[key.removeprefix(root)] = key
        elif key != "save_counter":
            rest.append(key)
    full = [names.get(key, "").removesuffix(":0") for key in rest]
    named = full if all(full) and len(set(full)) == len(full) else rest
    variables = dict(zip(named, rest, strict=True))
    by_key = {key: name for name, key in variables.items()}
    found = {by_key[owner]: kept for owner, kept in slots.items() if owner in by_key}
    owners = Owners(full)
    back = dict(zip(full, named, strict=True))
    for key in states:
        owner = owners.of(names.get(key, "").removesuffix(":0"))
        if owner is None:
            raise Unreadable(
                f"{held.path.name} does not say which variable {shown(key)} ({shown(names.get(key, ''))}) belongs "
                "to; save the model in HDF5 (model.save('model.h5')) and convert that"
            )
        found.setdefault(back[owner[1]], {})[owner[0]] = key
    return variables, found, own


def _objects(held: Bundle) -> Checkpoint:
    """Read an object-based checkpoint of TensorFlow 2."""
    variables, slots, own = places(held)
    made = Checkpoint()
    # Objects are listed breadth first, but states in the order of model.trainable_variables, which is kept.
    states = iter([name for name in slots if name in variables])
    named = [next(states) if name in slots else name for name in variables]
    variables = {name: variables[name] for name in named}
    made.params = {name: held.tensor(key + VALUE) for name, key in variables.items() if _number(held, key)}
    for name in list(made.params):
        owner = name.removesuffix(f"/{_AVERAGE}")
        if owner != name and owner in made.params:
            made.averages[owner] = made.params.pop(name)
    made.kinds = {name: layout(name, value) for name, value in made.params.items()}
    kinds = {kind for kept in slots.values() for kind in kept}
    if not kinds:
        made.notes.append("The file holds no state of an optimizer.")
    elif not kinds <= set(LEGACY) | set(NEWER) or kinds <= {"momentum", "average"}:
        raise Unreadable(
            f"{held.path.name} holds the state of another optimizer, which keeps {shown(', '.join(sorted(kinds)))}"
        )
    if kinds:
        made.owner = find_owner("keras2" if "rms" in kinds else "keras3")
    order = LEGACY if "rms" in kinds else NEWER
    for name in made.params:
        kept = slots.get(name, {})
        if kept:
            made.slots[name] = {
                kind: _alike(held, kept[kind] + VALUE, made.params[name]) for kind in order if kind in kept
            }
    numbers = {name: held.tensor(key + VALUE) for name, key in own.items() if _number(held, key)}
    _numbers(made, numbers, kinds)
    return made


def _numbers(made: Checkpoint, numbers: Mapping[str, Array], kinds: set[str]) -> None:
    """Copy the optimizer's numbers to the checkpoint: its step count and the settings stored as variables."""
    hyper: dict[str, Any] = {}
    for name, value in numbers.items():
        word = name.lstrip("_")
        if name in STEPS and value.shape == ():
            made.step = int(value)
        elif word in ("learning_rate", "rho", "momentum", "decay") and value.shape == ():
            hyper[word] = decimal(float(value))
    if hyper.get("decay") == 0:
        del hyper["decay"]
    if kinds:
        hyper["centered"] = bool(kinds & {"mg", "average_gradient"})
        if "momentum" not in kinds:
            hyper["momentum"] = 0.0
    made.hyper = {
        word: hyper[word] for word in ("learning_rate", "rho", "momentum", "decay", "centered") if word in hyper
    }


def _number(held: Bundle, key: str) -> bool:
    return held.entries[key + VALUE][0] != bundle.STRING
