"""Keras' HDF5 files, written by h5py: a copy of a template with other values, or a .weights.h5 made from names."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rmsprop.conversion.formats import archives, hdf5
from rmsprop.conversion.formats.keras import h5, keras3
from rmsprop.conversion.formats.keras.keras3 import KINDS, WEIGHTS, WORDS
from rmsprop.conversion.formats.keras.owners import Owners, Unordered, variables
from rmsprop.conversion.formats.reading import layout, strange, to_write
from rmsprop.conversion.record import Array, Checkpoint, Unreadable
from rmsprop.printing import shown

_LEAVES = ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")
_BUILT = "save the model there once, after a step of an RMSprop with the same momentum and centered, as the template"


def write_weights(path: Path, checkpoint: Checkpoint, template: Path | None = None) -> None:
    """Write a .weights.h5 of Keras 3.

    Args:
        template: a .weights.h5 or .keras of the same model. Without it, layers are named by class after what their
            parameters look like, which is right for a flat model of common layers.
    Raises: Unreadable, if something has no place.
    """
    checkpoint = to_write(checkpoint)
    if template is None:
        stream = io.BytesIO()
        with _library().File(stream, "w") as file:
            _build(file, checkpoint)
        path.write_bytes(stream.getvalue())
    else:
        path.write_bytes(_weights(template, _member(template), checkpoint))


def write_archive(path: Path, checkpoint: Checkpoint, template: Path | None = None) -> None:
    """Write a .keras: the template's program and the checkpoint's values and settings. Raises: Unreadable."""
    checkpoint = to_write(checkpoint)
    if template is None or not archives.is_zip(template):
        raise Unreadable("a .keras file holds a model's program: give a .keras of the same model as the template")
    members = archives.members(template)
    with strange(template, "a Keras file"):
        settings = json.loads(members["config.json"])
        compiled = (settings.get("compile_config") or {}).get("optimizer")
        if not isinstance(compiled, dict) or compiled.get("class_name") != "RMSprop":
            raise Unreadable(f"{template.name} was not compiled with RMSprop; {_BUILT}")
        _settle(template, compiled["config"], checkpoint)
        members["config.json"] = json.dumps(settings).encode()
        members[WEIGHTS] = _weights(template, members[WEIGHTS], checkpoint, settings.get("config"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, raw in members.items():
            archive.writestr(zipfile.ZipInfo(name), raw)


def write_h5(path: Path, checkpoint: Checkpoint, template: Path | None = None) -> None:
    """Write a whole-model .h5: the template's program, the checkpoint's values and settings. Raises: Unreadable."""
    checkpoint = to_write(checkpoint)
    if template is None:
        raise Unreadable("an .h5 of Keras holds a model's program: give one of the same model as the template")
    raw = template.read_bytes()
    with strange(template, "a Keras HDF5 file"):
        root = hdf5.read(template, io.BytesIO(raw), len(raw))
        stored, states = h5.weights(template, root), h5.optimizer(template, root)
        owners = Owners(stored)
        places: dict[tuple[str, str], hdf5.Dataset] = {}
        for name, dataset in states.items():
            owner = owners.of(name)
            if owner is not None:
                places[owner[1], owner[0]] = dataset
    values = [(_place(stored, name, template), value) for name, value in checkpoint.params.items()]
    wanted = {(name, slot): value for name, kept in checkpoint.slots.items() for slot, value in kept.items()}
    if wanted.keys() != places.keys():
        odd = sorted(wanted.keys() ^ places.keys())[0]
        raise Unreadable(f"{template.name} and the source do not both keep {shown('/'.join(odd))}; {_BUILT}")
    values += [(places[place], value) for place, value in wanted.items()]
    for name, dataset in states.items():
        leaf = name.rsplit("/", 1)[-1]
        if leaf in h5.STEPS and checkpoint.step is not None:
            values.append((dataset, np.array(checkpoint.step)))
        elif leaf == "learning_rate" and "learning_rate" in checkpoint.hyper:
            values.append((dataset, np.array(checkpoint.hyper["learning_rate"])))
    stream = io.BytesIO(_replaced(template, raw, values))
    with strange(template, "a Keras HDF5 file"), _library().File(stream, "r+") as file:
        said = json.loads(root.attrs["training_config"])
        _settle(template, said["optimizer_config"]["config"], checkpoint)
        file.attrs["training_config"] = json.dumps(said)
    path.write_bytes(stream.getvalue())


def _library() -> Any:
    try:
        import h5py
    except ModuleNotFoundError:
        raise Unreadable("Keras' files are written by the package h5py: pip install 'rmsprop[convert]'") from None
    return h5py


def _member(template: Path) -> bytes:
    """The weights of a .weights.h5 or of a .keras."""
    return archives.members(template, (WEIGHTS,))[WEIGHTS] if archives.is_zip(template) else template.read_bytes()


def _settle(template: Path, config: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Put the checkpoint's settings into an optimizer's configuration."""
    for word in (*WORDS, "decay"):
        if word in checkpoint.hyper and (word in config or checkpoint.hyper[word]):
            config[word] = checkpoint.hyper[word]
    beside = [word for word in ("use_ema", "gradient_accumulation_steps") if config.get(word)]
    if beside:
        raise Unreadable(
            f"{template.name} was compiled with {beside[0]}, whose averages or sums the source does not hold; "
            f"compile it without, and {_BUILT}"
        )
    if config.get("decay") and not checkpoint.hyper.get("decay"):
        config["decay"] = 0.0  # the learning rate is that of the next step already
    kinds = {kind for kept in checkpoint.slots.values() for kind in kept}
    kept = bool(config.get("momentum")), bool(config.get("centered"))
    held = "momentum" in kinds, bool(kinds & {"average_gradient", "mg"})
    if kept != held:
        raise Unreadable(
            f"{template.name} has momentum={config.get('momentum')} and centered={config.get('centered')}, and the "
            f"state is of {shown(', '.join(sorted(kinds)))}; give momentum and centered among the settings"
        )


def _place(places: Mapping[str, hdf5.Dataset], name: str, template: Path) -> hdf5.Dataset:
    if name not in places:
        raise Unreadable(f"{template.name} has no {shown(name)}: it has {shown(', '.join(places), 200)}")
    return places[name]


def _replaced(template: Path, raw: bytes, values: list[tuple[hdf5.Dataset, Array]]) -> bytes:
    """A file's bytes with other numbers in its datasets."""
    made = bytearray(raw)
    for dataset, value in values:
        if dataset.shape != value.shape or dataset.dtype == "bfloat16" or dataset.inline is not None:
            raise Unreadable(
                f"{template.name} has {shown(dataset.name)} of shape {dataset.shape} and type {dataset.dtype}, and "
                f"the source {value.shape} of {value.dtype}, which does not fit"
            )
        kind = np.dtype(dataset.order + np.dtype(dataset.dtype).str[1:])
        made[dataset.address : dataset.address + dataset.size] = value.astype(kind).tobytes()
    return bytes(made)


def _weights(template: Path, raw: bytes, checkpoint: Checkpoint, config: Any = None) -> bytes:
    """A weights file with other numbers, and the optimizer's variables anew.

    Args:
        config: the model's, where the template has it: it names variables and says what is frozen.
    """
    with strange(template, "a Keras file"):
        root = hdf5.read(template, io.BytesIO(raw), len(raw))
        items, found = keras3.tree(root, config)
        stood = keras3.optimizer(root)
        tail = [dataset for dataset in stood[1:] if dataset.shape or dataset is not stood[1]]
        if tail:
            _, names = keras3.fit(template, Checkpoint(params=dict.fromkeys(found, np.empty(0))), items, tail, [], {})
        elif any(isinstance(item, Unordered) for item in items):
            raise Unreadable(f"{template.name} does not say in which order its variables train; {_BUILT}")
        else:
            names = [variable.name for variable in variables(items) if variable.trainable]
    places = {name: dataset for name, (dataset, _, _) in found.items()}
    values = [(_place(places, name, template), value) for name, value in checkpoint.params.items()]
    if set(names) != set(checkpoint.slots):
        odd = sorted(set(names) ^ set(checkpoint.slots))[0]
        raise Unreadable(f"{template.name} and the source do not both keep a state of {shown(odd)}")
    for name, kept in checkpoint.slots.items():
        if any(value.shape != places[name].shape for value in kept.values()):
            raise Unreadable(f"{template.name} has {shown(name)} of shape {places[name].shape}, unlike the state")
    rate = checkpoint.hyper.get("learning_rate")
    with_rate = not stood or len(tail) < len(stood) - 1
    if stood:
        step = int(stood[0].read()) if checkpoint.step is None else checkpoint.step
        rate = float(stood[1].read()) if rate is None and with_rate else rate
    else:
        step = checkpoint.step or 0
    stream = io.BytesIO(_replaced(template, raw, values))
    with strange(template, "a Keras file"), _library().File(stream, "r+") as file:
        if "optimizer/vars" in file:
            group = file["optimizer/vars"]
            for name in list(group):
                del group[name]
        else:
            group = file.create_group("optimizer/vars")
            group.attrs["name"] = "rmsprop"
        _optimizer(group, checkpoint, names, step, rate, with_rate)
    return stream.getvalue()


def _optimizer(group: Any, checkpoint: Checkpoint, names: list[str], step: int, rate: Any, with_rate: bool) -> None:
    """The optimizer's variables in Keras' order."""
    kinds = {kind for kept in checkpoint.slots.values() for kind in kept}
    if not kinds <= set(KINDS):
        raise Unreadable(f"Keras 3 keeps {', '.join(KINDS)}; the source has {shown(', '.join(sorted(kinds)))}")
    if with_rate and rate is None:
        raise Unreadable("a .weights.h5 holds the learning rate: give it, --set learning_rate=...")
    values: list[Array] = [np.array(step, np.int64)]
    values += [np.array(rate, np.float32)] if with_rate else []
    for kind in KINDS:
        if kind in kinds:
            values += [checkpoint.slots[name][kind] for name in names]
    for index, value in enumerate(values):
        group[str(index)] = value


def _build(file: Any, checkpoint: Checkpoint) -> None:
    """A file without a template."""
    layers: dict[str, list[str]] = {}
    for name in checkpoint.params:
        layers.setdefault(name.rpartition("/")[0], []).append(name)
    for names in layers.values():
        names.sort(key=lambda name: _LEAVES.index(leaf) if (leaf := name.rpartition("/")[2]) in _LEAVES else 99)
    forms = {tuple(checkpoint.params[name].shape for name in names): layer for layer, names in layers.items()}
    if len(forms) < len(layers):
        raise Unreadable(
            "two layers have parameters of the same shapes, so Keras could not notice if their order were wrong: "
            "give a .weights.h5 of the same model as the template"
        )
    used: dict[str, int] = {}
    for layer, names in layers.items():
        kind = _class(layer, names, checkpoint)
        number = used.get(kind, 0)
        used[kind] = number + 1
        group = file.create_group(f"layers/{kind}{f'_{number}' if number else ''}/vars")
        group.attrs["name"] = layer
        for index, name in enumerate(names):
            group[str(index)] = checkpoint.params[name]
    if checkpoint.slots:
        group = file.create_group("optimizer/vars")
        group.attrs["name"] = "rmsprop"
        names = [name for layer in layers.values() for name in layer if name in checkpoint.slots]
        rate = checkpoint.hyper.get("learning_rate")
        _optimizer(group, checkpoint, names, checkpoint.step or 0, rate, True)


def _class(layer: str, names: list[str], checkpoint: Checkpoint) -> str:
    """What Keras calls the class of a layer with these parameters."""
    leaves = [name.rpartition("/")[2] for name in names]
    first = checkpoint.params[names[0]]
    kind = checkpoint.kinds.get(names[0], layout(names[0], first))
    if layer and "/" not in layer:
        if leaves in (["kernel"], ["kernel", "bias"]):
            if kind == "dense" and first.ndim == 2:
                return "dense"
            if kind == "depthwise" and first.ndim == 4:
                return "depthwise_conv2d"
            if kind == "conv" and first.ndim in (3, 4, 5):
                return f"conv{first.ndim - 2}d"
        if leaves == ["embeddings"]:
            return "embedding"
        if leaves[-2:] == ["moving_mean", "moving_variance"] and leaves[:-2] in (
            ["gamma", "beta"],
            ["beta"],
            ["gamma"],
        ):
            return "batch_normalization"
        if leaves == ["gamma", "beta"]:
            return "layer_normalization"
    raise Unreadable(
        f"what kind of layer {shown(layer or names[0])} is cannot be told from {shown(', '.join(leaves))}: give a "
        ".weights.h5 of the same model as the template"
    )
