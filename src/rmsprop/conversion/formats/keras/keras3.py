"""Reads Keras 3's .keras archives and .weights.h5 files, and tf_keras' files of the same formats.

A .keras is a zip of config.json, which has the optimizer's settings, and model.weights.h5. In the latter, a layer is
a group named after its class, and its variables are vars/0, vars/1, .... The optimizer's variables are
optimizer/vars/0 (iteration), 1 (learning_rate; not in tf_keras), then all averages of weights (use_ema), all
velocities, all momenta and all average gradients, in the order of model.trainable_variables. write.py writes these
files.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmsprop.conversion.formats import archives, hdf5
from rmsprop.conversion.formats.keras.owners import Item, Shape, Unordered, Variable, assign, variables
from rmsprop.conversion.formats.reading import decimal, layout, strange
from rmsprop.conversion.layers import TABLES, Layer, Layers, hint, kind_name, known
from rmsprop.conversion.owner import find_owner
from rmsprop.conversion.record import Array, Checkpoint, Unreadable
from rmsprop.printing import shown

WEIGHTS = "model.weights.h5"
KINDS = ("average", "velocity", "momentum", "average_gradient")
SETTINGS = (
    *("learning_rate", "rho", "momentum", "epsilon", "centered"),
    *("weight_decay", "clipnorm", "clipvalue", "global_clipnorm"),
)
# Groups whose members are in list order, and the order of the sublayers' variables in some layers.
_LISTS = ("layers", "_layer_checkpoint_dependencies", "cells")
_PARTS = (
    ("query_dense", "key_dense", "value_dense", "output_dense"),
    ("forward_layer", "backward_layer"),
)
_WRAPPED = ("cell", "layer", "forward_layer", "backward_layer")
_NOT_THE_MODEL = ("optimizer", "metrics", "seed_generator", "_dropout_layer", "_softmax", "quantizers")
_BESIDE = (
    "save the whole model with model.save('model.h5'), which names every state after its variable, and convert that"
)


def sniff_archive(path: Path) -> bool:
    """Return whether the file is a zip with Keras' weights."""
    return WEIGHTS in archives.names(path)


def sniff_weights(path: Path) -> bool:
    """Return whether the file is HDF5 with numbered variables, without the layer lists of older Keras."""
    if not hdf5.is_hdf5(path):
        return False
    names = hdf5.top(path)
    if names & {"model_weights", "layer_names", "layer_names0"}:
        return False
    return (
        bool(names & {"layers", "optimizer", "vars", "_layer_checkpoint_dependencies"}) or ".weights.h5" in path.name
    )


def read(path: Path, given: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read the model's variables and the optimizer's states.

    Args:
        given: the user's settings; momentum, centered and use_ema determine which states a .weights.h5 holds.
    Raises: Unreadable.
    """
    given = dict(given or {})
    with strange(path, "a Keras file"):
        if archives.is_zip(path):
            members = archives.members(path, ("config.json", WEIGHTS))
            settings = json.loads(members["config.json"])
            raw = members[WEIGHTS]
            return _understand(path, hdf5.read(path, io.BytesIO(raw), len(raw)), settings, given)
        with path.open("rb") as file:
            return _understand(path, hdf5.read(path, file, path.stat().st_size), None, given)


def tree(root: hdf5.Group, config: Any = None) -> tuple[list[Item], dict[str, tuple[hdf5.Dataset, str, str]]]:
    """Return the model's variables, in order as far as the file gives it.

    Returns: the variables, and each one's dataset, path and layout hint by name.
    """
    found: dict[str, tuple[hdf5.Dataset, str, str]] = {}
    return _Tree(_layers(config), Layers(config), found).group(root, "", "", "", Layer("", {}), True), found


def optimizer(root: hdf5.Group) -> list[hdf5.Dataset]:
    """Return the optimizer's variables in its order, or [] without an optimizer."""
    group = root.group("optimizer/vars")
    if group is None:
        return []
    return [group.datasets[str(index)] for index in range(len(group.datasets)) if str(index) in group.datasets]


def _understand(path: Path, root: hdf5.Group, settings: Any, given: dict[str, Any]) -> Checkpoint:
    items, found = tree(root, (settings or {}).get("config"))
    made = Checkpoint(find_owner("keras3"))
    made.params = {variable.name: found[variable.name][0].read() for variable in variables(items)}
    made.kinds = {name: found[name][2] for name in made.params}
    kinds = _settings(path, settings, made) if settings else []
    stored = optimizer(root)
    if not stored:
        made.notes.append("The file holds no state of an optimizer.")
        return made
    made.step = int(stored[0].read())
    rest = stored[1:]
    if rest and rest[0].shape == ():
        made.hyper["learning_rate"] = decimal(float(rest[0].read()))
        rest = rest[1:]
    kinds, names = fit(path, made, items, rest, kinds, {**made.hyper, **given})
    values = [dataset.read() for dataset in rest]
    if not settings:
        _check_velocity(path, made, kinds, values, len(names))
    if kinds[-1] == "":
        velocity, second = values[-2 * len(names) : -len(names)], values[-len(names) :]
        kinds[-1] = _second(path, velocity, second, given, made)
    for index, name in enumerate(names):
        states = zip(kinds, values[index :: len(names)], strict=True)
        made.slots[name] = {kind: state for kind, state in states if kind in KINDS}
    return made


def _settings(path: Path, settings: Any, made: Checkpoint) -> list[str]:
    """Copy the optimizer's settings to the checkpoint. Returns: the kinds of state that it has, in its order."""
    compiled = (settings.get("compile_config") or {}).get("optimizer") or {}
    if not compiled:
        made.notes.append("The model was saved without its optimizer's settings.")
        return []
    kind = compiled.get("class_name", "") if isinstance(compiled, dict) else str(compiled)
    if str(kind).split(">")[-1].lower() != "rmsprop":
        raise Unreadable(f"{path.name} holds the state of the optimizer {shown(kind)}, not of RMSprop")
    config = compiled.get("config", {}) if isinstance(compiled, dict) else {}
    take_settings(config, made)
    kept = ["average"] * bool(config.get("use_ema"))
    if config.get("gradient_accumulation_steps"):
        kept = [*["unknown"] * len(kept), "unknown"]  # older versions interleave the two
        made.notes.append("The accumulated gradients, and averaged weights beside them, are left out.")
    kept += ["velocity"] + ["momentum"] * bool(config.get("momentum", 0.0) > 0)
    return kept + ["average_gradient"] * bool(config.get("centered"))


def take_settings(config: Mapping[str, Any], made: Checkpoint) -> None:
    """Copy the settings of an optimizer's get_config that have an effect to the checkpoint."""
    for name in SETTINGS:
        value = config.get(name)
        if isinstance(value, (bool, int, float)):
            made.hyper[name] = decimal(value) if isinstance(value, float) else value
        elif value is not None:
            kind = value.get("class_name", "an object") if isinstance(value, dict) else type(value).__name__
            made.notes.append(f"{name} was {kind}, not a number: pass the current value with --set {name}=...")
    decay, every = config.get("ema_momentum", 0.99), config.get("ema_overwrite_frequency")
    if config.get("use_ema") and isinstance(decay, (int, float)):
        made.hyper["ema"] = decimal(decay)
        if every:
            made.notes.append(
                f"ema_overwrite_frequency={shown(every)} replaced the weights by their averages once per that many "
                "steps; call optimizer.average_into() as often"
            )


def fit(
    path: Path,
    made: Checkpoint,
    items: list[Item],
    rest: list[hdf5.Dataset],
    kinds: list[str],
    given: Mapping[str, Any],
) -> tuple[list[str], list[str]]:
    """Match an optimizer's states with the model's variables.

    Returns: the kinds of state, "" for one that the file does not name, and the variables' names.
    Raises: Unreadable if no assignment, or more than one, fits.
    """
    shapes = [dataset.shape for dataset in rest]
    found = []
    for guess in [kinds] if kinds else _kinds(given):
        each, left = divmod(len(shapes), len(guess))
        if left or any(shapes[i] != shapes[i % each] for i in range(len(shapes))):
            continue
        way = assign(items, shapes[:each])
        if way is not None:
            found.append((way[1], guess, way[0], way[2]))
    if not found:
        advice = _BESIDE if kinds else f"for a run with use_ema, pass --set use_ema=true; otherwise {_BESIDE}"
        raise Unreadable(
            f"{path.name} holds {len(shapes)} states of an optimizer, which do not fit its {len(made.params)} "
            f"variables; {advice}"
        )
    attempt, guess, names, only = min(found, key=lambda way: way[0])
    if not only or sum(way[0] == attempt for way in found) > 1:
        raise Unreadable(
            f"{path.name} does not say which variables its optimizer's states belong to, and their shapes match in "
            f"more than one way; {_BESIDE}"
        )
    return list(guess), names


def _check_velocity(path: Path, made: Checkpoint, kinds: list[str], values: Sequence[Array], each: int) -> None:
    """Refuse states whose first kind is not an average of squares. Raises: Unreadable.

    Averaged weights (use_ema) and accumulated gradients come first, and a .weights.h5 does not name them.
    """
    at = kinds.index("velocity") * each
    first = values[at : at + each]
    with np.errstate(invalid="ignore"):
        odd = any(bool((v < 0).any()) for v in first)
    still = len(values) > each and bool(made.step) and not any(bool(v.any()) for v in first)
    if odd or (still and any(bool(v.any()) for v in values)):
        raise Unreadable(
            f"{path.name} has no averages of squares where its optimizer stores them; it may store averaged weights, "
            "accumulated gradients, or momentum with frozen layers; for the first, pass --set use_ema=true, for the "
            f"last, --set momentum=... --set centered=...; otherwise {_BESIDE}"
        )


def _kinds(given: Mapping[str, Any]) -> list[list[str]]:
    """Return the possible lists of kinds of state."""
    first = ["average"] * bool(given.get("use_ema") or given.get("ema") is not None) + ["velocity"]
    if "momentum" in given and "centered" in given:
        return [first + ["momentum"] * bool(given["momentum"]) + ["average_gradient"] * bool(given["centered"])]
    return [[*first, "momentum", "average_gradient"], [*first, ""], first]


def _second(
    path: Path,
    velocity: Sequence[Array],
    second: Sequence[Array],
    given: Mapping[str, Any],
    made: Checkpoint,
) -> str:
    """Identify the second kind of state by the user's settings, or by values that an average gradient cannot have."""
    if "centered" in given or "momentum" in given:
        centered = given["centered"] if "centered" in given else not given["momentum"]
        return "average_gradient" if centered else "momentum"
    # The square of an average never exceeds the average of squares.
    with np.errstate(all="ignore"):
        above = any(np.any(np.square(m) > v * 1.001 + 1e-30) for v, m in zip(velocity, second, strict=True))
    if above:
        made.notes.append(
            "The file does not name its second kind of state; an average gradient cannot have these values, so it "
            "is read as momentum."
        )
        return "momentum"
    raise Unreadable(
        f"{path.name} does not name its second kind of state, momentum or average_gradient: "
        "pass --set momentum=... or --set centered=true"
    )


@dataclasses.dataclass
class _Tree:
    """Walks the groups of layers.

    Attributes:
        configs: every object's settings by name.
        found: the variables found, filled during the walk.
        again: how many times each name occurred.
    """

    configs: Mapping[str, Mapping[str, Any]]
    graph: Layers
    found: dict[str, tuple[hdf5.Dataset, str, str]]
    again: dict[str, int] = dataclasses.field(default_factory=dict)

    def group(
        self, group: hdf5.Group, path: str, prefix: str, base: str, owner: Layer, trainable: bool
    ) -> list[Item]:
        """Return a layer's own variables, followed by its sublayers'.

        Args:
            base: the layer's class, or its name within its owner.
            owner: the layer that contains it.
        """
        own = group.groups.get("vars", hdf5.Group(0))
        name = str(own.attrs.get("name", "")) or path.rsplit("/", 1)[-1]
        here = f"{prefix}/{name}" if prefix and name else prefix or name
        here = "" if not path else here
        config = self.configs.get(name, {})
        trainable = trainable and config.get("trainable") is not False
        layer = self._layer(name, base, owner)
        rows = self.graph.rows(name) if name in self.graph.found else layer.rows
        layer = dataclasses.replace(layer, rows=rows)
        items: list[Item] = []
        stored = [own.datasets[str(i)] for i in range(len(own.datasets)) if str(i) in own.datasets]
        leaves = _leaves(base, [dataset.shape for dataset in stored], config, layer.kind)
        for index, (leaf, moving) in enumerate(leaves):
            full = f"{here}/{leaf}" if here else leaf
            again = self.again[full] = self.again.get(full, -1) + 1
            full += "_" * again if again < 10 else f"_{again}"
            while full in self.found:
                full += "_"
            dataset = stored[index]
            axes = hint(layer.kind, leaf, dataset.shape, layer.config, rows)
            axes = axes or layout(f"{base}/{leaf}", np.empty((0,) * len(dataset.shape)))
            self.found[full] = dataset, f"{path}/vars/{index}".lstrip("/"), axes
            items.append(Variable(full, dataset.shape, trainable and not moving))

        def _part(child: str, group: hdf5.Group, base: str) -> list[Item]:
            return self.group(group, f"{path}/{child}".lstrip("/"), here, base, layer, trainable)

        parts: dict[str, list[tuple[Item, ...]]] = {}
        for child, below in group.groups.items():
            if child in _NOT_THE_MODEL or child == "vars":
                continue
            if child in _LISTS:
                parts[child] = [
                    tuple(_part(f"{child}/{one}", layer, _class(one))) for one, layer in below.groups.items()
                ]
            else:
                parts[child] = [tuple(_part(child, below, f"{base}/{child}" if child == "cell" else child))]
        parts = {child: made for child, made in parts.items() if any(made)}
        for known_parts in _PARTS:
            if parts.keys() <= set(known_parts):
                parts = {child: parts[child] for child in known_parts if child in parts}
                break
        else:
            if len(parts) > 1:
                return [*items, Unordered(tuple(map(tuple, parts.values())))]
        return items + [item for made in parts.values() for layer in made for item in layer]

    def _layer(self, name: str, base: str, owner: Layer) -> Layer:
        """Identify a layer by the configuration, its group's class or its default name, or else by its owner."""
        configured = self.graph.found.get(name)
        if configured is not None and known(configured.kind):
            return configured
        for guess in (base.rsplit("/", 1)[-1], name):
            if known(kind_name(guess)):
                return Layer(kind_name(guess), configured.config if configured else {}, rows=owner.rows)
        return owner if base.rsplit("/", 1)[-1] in _WRAPPED else Layer("", {})


def _class(name: str) -> str:
    """Return a layer's class without its number: dense for dense_12."""
    base, _, number = name.rpartition("_")
    return base if base and number.isdecimal() else name


def _leaves(base: str, shapes: list[Shape], config: Mapping[str, Any], kind: str) -> list[tuple[str, bool]]:
    """Return the names of a layer's variables, each with whether the layer, not the optimizer, updates it."""
    flat = all(len(shape) == 1 for shape in shapes)
    if "batch_normalization" in base or (len(shapes) == 4 and flat and len(set(shapes)) == 1):
        scaled = ["gamma"] * (config.get("scale") is not False) + ["beta"] * (config.get("center") is not False)
        scaled = scaled if len(scaled) == len(shapes) - 2 else [str(i) for i in range(len(shapes) - 2)]
        return [(leaf, False) for leaf in scaled] + [("moving_mean", True), ("moving_variance", True)][: len(shapes)]
    names: Sequence[str]
    if base.endswith("cell"):
        names = ("kernel", "recurrent_kernel", "bias")
    elif kind.startswith("separableconv"):
        names = ("depthwise_kernel", "pointwise_kernel", "bias")
    elif kind in TABLES:
        names = ("embeddings",)
    elif flat and len(shapes) == 2:
        names = ("gamma", "beta")
    elif len(shapes) in (1, 2) and len(shapes[0]) > 1:
        names = ("kernel", "bias")
    else:
        names = ()
    names = names if len(names) >= len(shapes) else [str(index) for index in range(len(shapes))]
    return [(leaf, False) for leaf in names[: len(shapes)]]


def _layers(config: Any) -> dict[str, Mapping[str, Any]]:
    """Return every layer's settings by name, including those of nested models."""
    found: dict[str, Mapping[str, Any]] = {}
    pending = [config]
    for _ in range(100_000):
        if not pending:
            break
        here = pending.pop()
        if isinstance(here, dict):
            inside = here.get("config")
            if isinstance(inside, dict) and isinstance(inside.get("name"), str):
                found[inside["name"]] = inside
            pending.extend(value for value in here.values() if isinstance(value, (dict, list)))
        elif isinstance(here, list):
            pending.extend(value for value in here if isinstance(value, (dict, list)))
    return found
