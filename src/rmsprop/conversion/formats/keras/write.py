"""Writes Keras' HDF5 files with h5py: a copy of a template with other values, or a .weights.h5 built from names."""

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
from rmsprop.conversion.formats.keras.keras3 import KINDS, SETTINGS, WEIGHTS
from rmsprop.conversion.formats.keras.owners import Owners, Unordered, variables
from rmsprop.conversion.formats.reading import layout, strange, to_write
from rmsprop.conversion.record import Array, Checkpoint, Unreadable
from rmsprop.printing import shown

_LEAVES = ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")
_BUILT = (
    "as the template, save the model in Keras after one step of an RMSprop with the same momentum, centered and "
    "use_ema"
)


def write_weights(path: Path, checkpoint: Checkpoint, template: Path | None = None) -> None:
    """Write a .weights.h5 of Keras 3.

    Args:
        template: a .weights.h5 or .keras of the same model. Without it, each layer's class is inferred from its
            parameters, which is correct for a flat model of common layers.
    Raises: Unreadable if something does not fit.
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
    """Write a .keras: the template's architecture with the checkpoint's values and settings. Raises: Unreadable."""
    checkpoint = to_write(checkpoint)
    if template is None or not archives.is_zip(template):
        raise Unreadable("a .keras file contains the architecture: pass a .keras of the same model as the template")
    members = archives.members(template)
    with strange(template, "a Keras file"):
        settings = json.loads(members["config.json"])
        compiled = (settings.get("compile_config") or {}).get("optimizer")
        if not isinstance(compiled, dict) or compiled.get("class_name") != "RMSprop":
            raise Unreadable(f"{template.name} was not compiled with RMSprop; {_BUILT}")
        _set_config(template, compiled["config"], checkpoint)
        members["config.json"] = json.dumps(settings).encode()
        members[WEIGHTS] = _weights(template, members[WEIGHTS], checkpoint, settings.get("config"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, raw in members.items():
            archive.writestr(zipfile.ZipInfo(name), raw)


def write_h5(path: Path, checkpoint: Checkpoint, template: Path | None = None) -> None:
    """Write a .h5: the template's architecture with the checkpoint's values and settings. Raises: Unreadable."""
    checkpoint = to_write(checkpoint)
    if template is None:
        raise Unreadable("a Keras .h5 contains the architecture: pass a .h5 of the same model as the template")
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
        raise Unreadable(f"{template.name} and the source do not both have {shown('/'.join(odd))}; {_BUILT}")
    values += [(places[place], value) for place, value in wanted.items()]
    for name, dataset in states.items():
        leaf = name.rsplit("/", 1)[-1]
        if leaf in h5.STEPS and checkpoint.step is not None:
            values.append((dataset, np.array(checkpoint.step)))
        elif leaf == "learning_rate" and "learning_rate" in checkpoint.hyper:
            values.append((dataset, np.array(checkpoint.hyper["learning_rate"])))
    stream = io.BytesIO(_replaced(template, raw, values))
    with strange(template, "a Keras HDF5 file"), _library().File(stream, "r+") as file:
        training = json.loads(root.attrs["training_config"])
        _set_config(template, training["optimizer_config"]["config"], checkpoint)
        file.attrs["training_config"] = json.dumps(training)
    path.write_bytes(stream.getvalue())


def _library() -> Any:
    try:
        import h5py
    except ModuleNotFoundError:
        raise Unreadable("writing Keras files needs the package h5py: pip install 'rmsprop[convert]'") from None
    return h5py


def _member(template: Path) -> bytes:
    """Return the bytes of the weights in a .weights.h5 or a .keras."""
    return archives.members(template, (WEIGHTS,))[WEIGHTS] if archives.is_zip(template) else template.read_bytes()


def _set_config(template: Path, config: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Copy the checkpoint's settings to an optimizer's configuration.

    Mutates: config.
    Raises: Unreadable for a template with other kinds of state.
    """
    for name in (*SETTINGS, "decay", "ema_momentum"):
        if name in checkpoint.hyper and (name in config or checkpoint.hyper[name]):
            config[name] = checkpoint.hyper[name]
    if config.get("gradient_accumulation_steps"):
        raise Unreadable(
            f"{template.name} was compiled with gradient_accumulation_steps, whose sums the source lacks; compile it "
            f"without gradient_accumulation_steps; {_BUILT}"
        )
    if config.get("decay") and not checkpoint.hyper.get("decay"):
        config["decay"] = 0.0  # the learning rate is already that of the next step
    kinds = {kind for kept in checkpoint.slots.values() for kind in kept}
    kept = bool(config.get("momentum")), bool(config.get("centered"))
    held = "momentum" in kinds, bool(kinds & {"average_gradient", "mg"})
    if kept != held:
        raise Unreadable(
            f"{template.name} has momentum={config.get('momentum')} and centered={config.get('centered')}, but the "
            f"state has {shown(', '.join(sorted(kinds)))}; pass momentum and centered as settings"
        )
    if bool(config.get("use_ema")) != ("average" in kinds):
        advice = "compile it with use_ema=True, or leave them out with --set ema=none"
        raise Unreadable(
            f"{template.name} was compiled with use_ema=True, and the source has no averages of its weights; compile "
            f"it without use_ema; {_BUILT}"
            if config.get("use_ema")
            else f"{template.name} was compiled without use_ema, and the source has averages of its weights; {advice}"
        )


def _place(places: Mapping[str, hdf5.Dataset], name: str, template: Path) -> hdf5.Dataset:
    if name not in places:
        raise Unreadable(f"{template.name} has no {shown(name)}: it has {shown(', '.join(places), 200)}")
    return places[name]


def _replaced(template: Path, raw: bytes, values: list[tuple[hdf5.Dataset, Array]]) -> bytes:
    """Return a file's bytes with other values in its datasets."""
    made = bytearray(raw)
    for dataset, value in values:
        if dataset.shape != value.shape or dataset.dtype == "bfloat16" or dataset.inline is not None:
            raise Unreadable(
                f"{template.name} has {shown(dataset.name)} of shape {dataset.shape} and type {dataset.dtype}, which "
                f"does not fit the source's shape {value.shape} and type {value.dtype}"
            )
        kind = np.dtype(dataset.order + np.dtype(dataset.dtype).str[1:])
        made[dataset.address : dataset.address + dataset.size] = value.astype(kind).tobytes()
    return bytes(made)


def _weights(template: Path, raw: bytes, checkpoint: Checkpoint, config: Any = None) -> bytes:
    """Return a weights file with other values and new optimizer variables.

    Args:
        config: the model's configuration, if the template has it. It names variables and marks frozen ones.
    """
    with strange(template, "a Keras file"):
        root = hdf5.read(template, io.BytesIO(raw), len(raw))
        items, found = keras3.tree(root, config)
        old = keras3.optimizer(root)
        tail = [dataset for dataset in old[1:] if dataset.shape or dataset is not old[1]]
        if tail:
            averaged = {"use_ema": any("average" in kept for kept in checkpoint.slots.values())}
            model = Checkpoint(params=dict.fromkeys(found, np.empty(0)))
            _, names = keras3.fit(template, model, items, tail, [], averaged)
        elif any(isinstance(item, Unordered) for item in items):
            raise Unreadable(f"{template.name} does not give the order of its trainable variables; {_BUILT}")
        else:
            names = [variable.name for variable in variables(items) if variable.trainable]
    places = {name: dataset for name, (dataset, _, _) in found.items()}
    values = [(_place(places, name, template), value) for name, value in checkpoint.params.items()]
    if set(names) != set(checkpoint.slots):
        odd = sorted(set(names) ^ set(checkpoint.slots))[0]
        raise Unreadable(f"{template.name} and the source do not both have a state of {shown(odd)}")
    for name, kept in checkpoint.slots.items():
        if any(value.shape != places[name].shape for value in kept.values()):
            raise Unreadable(f"{template.name} has {shown(name)} of shape {places[name].shape}, unlike the state")
    rate = checkpoint.hyper.get("learning_rate")
    with_rate = not old or len(tail) < len(old) - 1
    if old:
        step = int(old[0].read()) if checkpoint.step is None else checkpoint.step
        rate = float(old[1].read()) if rate is None and with_rate else rate
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
    """Write the optimizer's variables in Keras' order."""
    kinds = {kind for kept in checkpoint.slots.values() for kind in kept}
    if not kinds <= set(KINDS):
        raise Unreadable(
            f"Keras 3 has the states {', '.join(KINDS)}; the source has {shown(', '.join(sorted(kinds)))}"
        )
    if with_rate and rate is None:
        raise Unreadable("a .weights.h5 holds the learning rate: pass it with --set learning_rate=...")
    values: list[Array] = [np.array(step, np.int64)]
    values += [np.array(rate, np.float32)] if with_rate else []
    for kind in KINDS:
        if kind in kinds:
            values += [checkpoint.slots[name][kind] for name in names]
    for index, value in enumerate(values):
        group[str(index)] = value


def _build(file: Any, checkpoint: Checkpoint) -> None:
    """Write a file without a template."""
    layers: dict[str, list[str]] = {}
    for name in checkpoint.params:
        layers.setdefault(name.rpartition("/")[0], []).append(name)
    for names in layers.values():
        names.sort(key=lambda name: _LEAVES.index(leaf) if (leaf := name.rpartition("/")[2]) in _LEAVES else 99)
    forms = {tuple(checkpoint.params[name].shape for name in names): layer for layer, names in layers.items()}
    if len(forms) < len(layers):
        raise Unreadable(
            "two layers have parameters of the same shapes, so Keras could not detect a wrong order: pass a "
            ".weights.h5 of the same model as the template"
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
    """Return Keras' name for the class of a layer with these parameters."""
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
        f"the kind of layer {shown(layer or names[0])} cannot be inferred from {shown(', '.join(leaves))}: pass a "
        ".weights.h5 of the same model as the template"
    )
