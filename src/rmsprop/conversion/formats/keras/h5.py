"""Reads models and weights in Keras' older HDF5 layout: tf.keras, tf_keras, Keras 1 and 2, and Keras 3's .h5.

The attribute weight_names of a layer's group, and of optimizer_weights, gives the order.
Settings are in the attribute training_config. Every Keras names a state after its variable, except Keras before
TensorFlow 2, whose training/RMSprop/Variable:0, ... are in the order of the trainable variables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rmsprop.conversion.formats import hdf5
from rmsprop.conversion.formats.hdf5 import Dataset, Group
from rmsprop.conversion.formats.keras.keras3 import sniff_weights, take_settings
from rmsprop.conversion.formats.keras.owners import LEGACY, NEWER, Owners, Variable, assign
from rmsprop.conversion.formats.reading import decimal, layout, strange
from rmsprop.conversion.layers import Layers
from rmsprop.conversion.owner import find_owner
from rmsprop.conversion.record import Checkpoint, Unreadable
from rmsprop.printing import shown

STEPS = ("iter", "iteration", "iterations")
_MOVING = ("moving_mean", "moving_variance", "running_mean", "running_std", "seed_generator_state")


def sniff(path: Path) -> bool:
    """Return whether the file is HDF5, but not Keras 3's weights."""
    return hdf5.is_hdf5(path) and not sniff_weights(path)


def read(path: Path) -> Checkpoint:
    """Read the model's weights and the optimizer's state. Raises: Unreadable."""
    with strange(path, "a Keras HDF5 file"), path.open("rb") as file:
        root = hdf5.read(path, file, path.stat().st_size)
        made = Checkpoint()
        owners: dict[str, str] = {}
        stored = weights(path, root, owners)
        made.params = {name: dataset.read() for name, dataset in stored.items()}
        _set_layouts(root, made, owners)
        _settings(path, root, made)
        states = optimizer(path, root)
        if not states:
            made.notes.append("The file holds no state of an optimizer.")
            return made
        rest = {}
        for name, dataset in states.items():
            leaf = name.rsplit("/", 1)[-1]
            if leaf in STEPS and dataset.shape == ():
                made.step = int(dataset.read())
            elif leaf == "learning_rate" and dataset.shape == ():
                made.hyper["learning_rate"] = decimal(float(dataset.read()))
            else:
                rest[name] = dataset
        _put(path, made, stored, rest)
        return made


def _set_layouts(root: Group, made: Checkpoint, owners: Mapping[str, str]) -> None:
    """Set the layout of each weight from the model's configuration, or else from its name."""
    config = root.attrs.get("model_config")
    graph = Layers(json.loads(config) if isinstance(config, str) else None)
    for name, value in made.params.items():
        made.kinds[name] = graph.hint(name, value.shape, owners[name]) or layout(name, value)
    flipped = root.attrs.get("backend") == "theano"
    if flipped or any(layer.config.get("dim_ordering") == "th" for layer in graph.found.values()):
        made.notes.append(
            "Kernels trained with Theano are flipped in height and width relative to torch's; they are kept flipped."
        )


def weights(path: Path, root: Group, owners: dict[str, str] | None = None) -> dict[str, Dataset]:
    """Return the model's weights by name, without TensorFlow's ":0", in the model's order.

    Args:
        owners: filled with each weight's layer.
    Mutates: owners.
    """
    group = root.groups.get("model_weights", root)
    if "layer_names" not in group.attrs and "layer_names0" not in group.attrs:
        raise Unreadable(f"{path.name} is an HDF5 file, but not from Keras: it lists no layers")
    found: dict[str, Dataset] = {}
    for layer in _names(group, "layer_names"):
        here = group.group(layer)
        if here is None:
            raise Unreadable(f"{path.name} lists the layer {shown(layer)} but does not contain it: it is damaged")
        for name in _names(here, "weight_names"):
            dataset = here.dataset(name)
            if dataset is None:
                raise Unreadable(f"{path.name} lists the weight {shown(name)} but does not contain it: it is damaged")
            full = name.removesuffix(":0")
            full = full if full.startswith(f"{layer}/") or "/" in full else f"{layer}/{full}"
            full = full if full not in found else f"{layer}/{full}"
            found[full] = dataset
            if owners is not None:
                owners[full] = layer
    return found


def optimizer(path: Path, root: Group) -> dict[str, Dataset]:
    """Return the optimizer's weights by name, without ":0", in its order, or {} without an optimizer."""
    group = root.groups.get("optimizer_weights")
    found: dict[str, Dataset] = {}
    for name in _names(group, "weight_names") if group else ():
        dataset = group.dataset(name) if group else None
        if dataset is None:
            raise Unreadable(f"{path.name} lists the state {shown(name)} but does not contain it: it is damaged")
        found[name.removesuffix(":0")] = dataset
    return found


def _names(group: Group, attribute: str) -> list[str]:
    """Return a list of names, which Keras splits over several attributes if it is long."""
    parts = [group.attrs[attribute]] if attribute in group.attrs else []
    while attribute not in group.attrs and f"{attribute}{len(parts)}" in group.attrs:
        parts.append(group.attrs[f"{attribute}{len(parts)}"])
    return [str(name) for part in parts if isinstance(part, list) for name in part]


def _settings(path: Path, root: Group, made: Checkpoint) -> None:
    """Copy the optimizer's settings to the checkpoint."""
    training = root.attrs.get("training_config")
    if not isinstance(training, str):
        made.notes.append("The model was saved without its optimizer's settings.")
        return
    optimizer_config = json.loads(training).get("optimizer_config") or {}
    kind = str(optimizer_config.get("class_name", ""))
    if kind.split(">")[-1].lower() != "rmsprop":
        raise Unreadable(f"{path.name} holds the state of the optimizer {shown(kind)}, not of RMSprop")
    config = optimizer_config.get("config") or {}
    config = {"learning_rate": config.get("lr"), **config}
    take_settings(config, made)
    if config.get("decay"):
        made.hyper["decay"] = decimal(config["decay"])


def _put(path: Path, made: Checkpoint, stored: Mapping[str, Dataset], rest: Mapping[str, Dataset]) -> None:
    """Assign every state to its variable, by name, or by order if the names do not identify it."""
    owners = Owners(stored)
    owned = {name: owners.of(name) for name in rest}
    found: dict[str, dict[str, Dataset]] = {}
    left = [name for name, owner in owned.items() if owner is None]
    for name, owner in owned.items():
        if owner is not None:
            found.setdefault(owner[1], {})[owner[0]] = rest[name]
    if left and found:
        kept = [name for name in left if "average" in name or "accumulator" in name]
        if len(kept) < len(left):
            raise Unreadable(f"{path.name} does not say which variable {shown(left[0])} belongs to")
        made.notes.append("The averaged weights, or the accumulated gradients, are left out.")
    elif left:
        way = assign(
            [Variable(name, d.shape, not name.endswith(_MOVING)) for name, d in stored.items()],
            [rest[name].shape for name in left],
        )
        if way is None or not way[2]:
            raise Unreadable(f"{path.name} does not say which variables its {len(left)} states belong to")
        found = {owner: {"a": rest[name]} for owner, name in zip(way[0], left, strict=True)}
        made.notes.append("The states do not name their variables; they are assigned in the order of the weights.")
    kinds = {kind for kept in found.values() for kind in kept}
    made.owner = find_owner("keras1" if "a" in kinds else "keras2" if "rms" in kinds else "keras3")
    order = ("a",) if "a" in kinds else LEGACY if "rms" in kinds else NEWER
    for name in stored:
        own = found.get(name, {})
        if any(dataset.shape != stored[name].shape for dataset in own.values()) or not own.keys() <= set(order):
            raise Unreadable(f"{path.name} has states of {shown(name)} that do not fit it: it is damaged")
        if own:
            made.slots[name] = {kind: own[kind].read() for kind in order if kind in own}
    if "a" not in kinds:
        made.hyper.setdefault("centered", bool(kinds & {"mg", "average_gradient"}))
        if "momentum" not in kinds:
            made.hyper.setdefault("momentum", 0.0)
    else:
        made.hyper = {word: value for word, value in made.hyper.items() if word not in ("momentum", "centered")}
