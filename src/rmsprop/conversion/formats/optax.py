"""Reads and writes optax states, as a flattened .npz or flax msgpack, with or without the parameters.

optax has no file format, so users save the tree of {"params", "opt_state"}. A path in it is written with slashes,
opt_state/0/nu/conv/kernel, or as by jax.tree_util.keystr, ['opt_state'][0].nu['conv']['kernel']. The reader matches
the names nu, mu, trace and count wherever a chain, a mask or inject_hyperparams places them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rmsprop.conversion.formats import archives
from rmsprop.conversion.formats.reading import array, count, decimal, layout, strange, to_write
from rmsprop.conversion.owner import find_owner
from rmsprop.conversion.record import Array, Checkpoint, Unreadable
from rmsprop.printing import printable, shown

SLOTS = ("nu", "mu", "trace")
Place = tuple[str, ...]
_STATES = ("opt_state", "optimizer", "opt")
_KEY = re.compile(r"\['((?:[^'\\]|\\.)*)'\]|\[\"((?:[^\"\\]|\\.)*)\"\]|\[(?:<flat index )?(\d+)>?\]|\.(\w+)")
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # flax's extension types of msgpack
_DEPTH = 200
_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt")


def split_key(key: str) -> Place:
    """Split a key into its path. The key has slashes or dots, or the form of keystr."""
    if key[:1] in ("[", "."):
        parts, at = [], 0
        while match := _KEY.match(key, at):
            parts.append(next(part for part in match.groups() if part is not None))
            at = match.end()
        if at == len(key):
            return tuple(parts)
    return tuple(key.split("/" if "/" in key else "."))


def has_state(keys: list[str]) -> bool:
    """Return whether the keys of an .npz are those of an optax state."""
    return any("nu" in split_key(key) for key in keys)


def from_arrays(path: Path, arrays: Mapping[str, Array], optimizer: str | None = None) -> Checkpoint:
    """Build a checkpoint from the arrays of an .npz. Raises: Unreadable."""
    return understand(path, {split_key(key): value for key, value in arrays.items()}, optimizer)


def understand(path: Path, tree: Mapping[Place, Array], optimizer: str | None = None) -> Checkpoint:
    """Build a checkpoint from a flattened tree.

    Args:
        optimizer: the path of the state to read, if the tree has those of several networks.
    Raises: Unreadable, also for several states without a choice; ValueError for a choice that the tree lacks.
    """
    made = Checkpoint(find_owner("optax"))
    tree = _one(path, tree, optimizer, made)
    root = _root(path, tree)
    state = {place[len(root) :]: value for place, value in tree.items() if place[: len(root)] == root}
    rest = {place: value for place, value in tree.items() if place[: len(root)] != root}
    for place, value in rest.items():
        if place == ("step",) and value.shape == ():
            made.step = int(value)
        elif value.shape or len(place) > 1:
            name = "/".join(place[1:] if len(place) > 1 else place)
            taken = place[0] != "params" and ("params", *place[1:]) in rest  # the name belongs to a trained parameter
            made.params["/".join(place) if taken else name] = value
    counts: dict[Place, int] = {}
    left: list[str] = []
    for place, value in state.items():
        at = next((i for i, word in enumerate(place) if word in (*SLOTS, "count", "hyperparams")), None)
        if at is None:
            left.append("/".join(place))
        elif place[at] == "count":
            counts[place[:at]] = int(value) if value.shape == () and value.dtype.kind in "iu" else -1
        elif place[at] == "hyperparams":
            if value.shape == () and len(place) == at + 2:
                made.hyper[place[-1]] = decimal(float(value))
        else:
            slots = made.slots.setdefault("/".join(place[at + 1 :]), {})
            if place[at] in slots:
                raise Unreadable(f"{path.name} holds {place[at]} of {shown('/'.join(place[at + 1 :]))} twice")
            slots[place[at]] = value
    _finish(path, made, state, counts)
    if left:
        made.notes.append(f"{len(left)} arrays of the state are left out, such as {shown(left[0])}.")
    made.kinds = {name: layout(name, value) for name, value in made.params.items()}
    return made


def _one(path: Path, tree: Mapping[Place, Array], chosen: str | None, made: Checkpoint) -> Mapping[Place, Array]:
    """Return the subtree with one optimizer's state and its parameters, with paths relative to that subtree.

    Raises: Unreadable; ValueError for a choice that the tree lacks.
    """
    states = dict.fromkeys(
        place[: at + 1] for place in tree if "nu" in place and (at := _state_at(place)) is not None
    )
    listed = ", ".join(shown(printable("/".join(place))) for place in list(states)[:8])
    if chosen is not None:
        wanted = [place for place in states if printable("/".join(place)) == chosen]
        if not wanted:
            raise ValueError(
                f"--optimizer {shown(chosen)} is not in {path.name}; its optimizers are {listed or 'unnamed'}"
            )
        states = dict.fromkeys(wanted)
    if len(states) > 1:
        raise Unreadable(
            f"{path.name} holds {len(states)} optimizers: {listed}; choose one, such as with --optimizer "
            f"{shown(printable('/'.join(next(iter(states)))))}"
        )
    prefix = next(iter(states), ("",))[:-1]
    own = {place[len(prefix) :]: value for place, value in tree.items() if place[: len(prefix)] == prefix}
    if len(own) < len(tree):
        made.notes.append(f"{len(tree) - len(own)} arrays outside of {shown('/'.join(prefix))} are left out.")
    return own


def _state_at(place: Place) -> int | None:
    """Return the index of the part of a path that names the state, or None."""
    return next((i for i, word in enumerate(place[: place.index("nu")]) if word in _STATES), None)


def _root(path: Path, tree: Mapping[Place, Array]) -> Place:
    """Return the path of the optimizer's state: the common prefix of its parts, without indices into a chain."""
    places = [place[: place.index("nu")] for place in tree if "nu" in place]
    if not places:
        raise Unreadable(f"{path.name} holds no nu, which optax's RMSprop has: it is the state of another optimizer")
    root = places[0]
    for place in places[1:]:
        root = root[: next((i for i, (a, b) in enumerate(zip(root, place, strict=False)) if a != b), len(place))]
    named = next((i for i, word in enumerate(root) if word in _STATES), None)
    if named is not None:
        return root[: named + 1]
    while root and root[-1].isdigit():
        root = root[:-1]
    return root if len(root) < 2 else root[:1]


def _finish(path: Path, made: Checkpoint, state: Mapping[Place, Array], counts: Mapping[Place, int]) -> None:
    """Infer settings from the structure of the state, and put parameters and slots in order.

    Mutates: made.
    Raises: Unreadable.
    """
    known = made.params or made.slots
    for name, slots in made.slots.items():
        shapes = {value.shape for value in slots.values()}
        if name in made.params:
            shapes.add(made.params[name].shape)
        if len(shapes) != 1 or "nu" not in slots or (made.params and name not in made.params):
            raise Unreadable(f"{path.name} has a state of {shown(name)} that does not fit its parameter")
    made.slots = {n: {s: made.slots[n][s] for s in SLOTS if s in made.slots[n]} for n in known if n in made.slots}
    roots = {place[: place.index("nu")] for place in state if "nu" in place}
    own = {count for place, count in counts.items() if place in roots}
    centered = any("mu" in slots for slots in made.slots.values())
    steps = own or set(counts.values())
    if steps - {-1}:
        made.step = max(steps)
        if len(steps) > 1:
            made.notes.append(
                f"The file has the step counts {', '.join(map(str, sorted(steps)))}; {made.step} is used."
            )
    if centered and own:
        for name, slots in made.slots.items():
            with np.errstate(all="ignore"):
                above = np.any(np.square(slots["mu"]) > slots["nu"] * 1.001 + 1e-30)
            if above:
                raise Unreadable(
                    f"{path.name} has the state of Adam: in {shown(name)} the square of mu exceeds nu, which cannot "
                    "happen in a centered RMSprop"
                )
        made.notes.append(
            "Adam's state has the same names as that of a centered, bias-corrected RMSprop; it is read as the "
            "latter, since its values allow that."
        )
    made.hyper |= {"centered": centered, "bias_correction": bool(own)}
    if not any("trace" in slots for slots in made.slots.values()):
        made.hyper["momentum"] = 0.0


def to_tree(checkpoint: Checkpoint) -> dict[Place, Array]:
    """Return the tree of {"params", "opt_state"} of optax.rmsprop(...) with a constant learning rate."""
    state: dict[Place, Array] = {}
    if checkpoint.hyper.get("bias_correction"):
        if checkpoint.step is None:
            raise Unreadable("bias_correction needs the step count, which the source does not have")
        state["opt_state", "0", "count"] = np.array(checkpoint.step, np.int32)
    for slot in ("mu", "nu"):
        for name, slots in checkpoint.slots.items():
            if slot in slots:
                place = ("opt_state", "0", slot, *name.split("/"))
                state[place] = slots[slot]
    for name, slots in checkpoint.slots.items():
        if "trace" in slots:
            place = ("opt_state", "2", "trace", *name.split("/"))
            state[place] = slots["trace"]
    return state | {("params", *name.split("/")): value for name, value in checkpoint.params.items()}


def filled(path: Path, tree: Mapping[Place, Array], checkpoint: Checkpoint) -> dict[Place, Array]:
    """Return a template's tree filled with the checkpoint's values. Raises: Unreadable if something does not fit."""
    root = _root(path, tree)
    made, used = {}, set()
    for place, old in tree.items():
        value = old
        if place[: len(root)] != root:
            name = "/".join(place[1:] if len(place) > 1 else place)
            value = checkpoint.params.get(name, old)
            used.add(("", name))
            if place == ("step",) and checkpoint.step is not None:
                value = np.array(checkpoint.step)
        else:
            at = next((i for i, word in enumerate(place) if i >= len(root) and word in (*SLOTS, "count")), None)
            if at is not None and place[at] == "count":
                if checkpoint.step is None:
                    raise Unreadable(f"{path.name} has a step count, but the source does not")
                value = np.array(checkpoint.step)
            elif at is not None:
                name = "/".join(place[at + 1 :])
                if place[at] not in checkpoint.slots.get(name, {}):
                    raise Unreadable(f"{path.name} has {place[at]} of {shown(name)}, which the source does not have")
                value = checkpoint.slots[name][place[at]]
                used.add((place[at], name))
        if value.shape != old.shape:
            raise Unreadable(f"{path.name} has {shown('/'.join(place))} of shape {old.shape}, not {value.shape}")
        made[place] = value.astype(old.dtype)
    wanted = {("", name) for name in checkpoint.params}
    wanted |= {(slot, name) for name, slots in checkpoint.slots.items() for slot in slots}
    lost = sorted(wanted - used)
    if lost:
        raise Unreadable(f"{path.name} has no place for {shown(' '.join(lost[0]).strip())}")
    return made


# --- flax' msgpack --------------------------------------------------------------------------------


def sniff(path: Path) -> bool:
    """Return whether the path is an Orbax folder, or a msgpack map with a typical key near its beginning."""
    try:
        if path.is_dir():
            return any((path / name).exists() for name in _ORBAX)
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    if not head or not (0x80 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
        return False
    return any(bytes([0xA0 + len(word)]) + word in head for word in (b"params", b"opt_state", b"0", b"nu", b"step"))


def read(path: Path, optimizer: str | None = None, parameters: str | None = None) -> Checkpoint:
    """Read a tree in flax msgpack. Raises: Unreadable, also for Orbax folders; ValueError for a missing choice."""
    refuse_parameters(path, parameters)
    if path.is_dir():
        raise Unreadable(
            f"{path.name} is an Orbax folder, which only Orbax can read: load it there and save it with "
            "pathlib.Path('state.msgpack').write_bytes(flax.serialization.to_bytes(tree))"
        )
    with strange(path, "a flax msgpack file"):
        tree = _flat(path, _unpack(path))
        if not any("nu" in place for place in tree):
            made = Checkpoint()
            made.params = {
                "/".join(p[1:] if p[0] == "params" else p): value for p, value in tree.items() if value.shape
            }
            made.kinds = {name: layout(name, value) for name, value in made.params.items()}
            made.notes.append("The file holds no state of an optimizer.")
            return made
        return understand(path, tree, optimizer)


def refuse_parameters(path: Path, parameters: str | None) -> None:
    """Refuse a choice of the model, since the parameters are those next to the state. Raises: Unreadable."""
    if parameters is not None:
        raise Unreadable(
            f"--parameters {shown(parameters)} applies only to torch.save files; in {path.name} the parameters are "
            "those next to the state, which --optimizer chooses"
        )


def write(path: Path, checkpoint: Checkpoint, template: Path | None = None) -> None:
    """Write a tree as flax.serialization.to_bytes does.

    Args:
        template: a file of the same tree. Without it, the tree is {"params", "opt_state"} for a constant lr.
    """
    msgpack = _library()
    checkpoint = to_write(checkpoint)
    if template is None:
        tree = to_tree(checkpoint)
        nested: dict[str, Any] = {"params": {}, "opt_state": {"0": {}, "1": {}, "2": {}}}
    else:
        with strange(template, "a flax msgpack file"):
            packed = _unpack(template)
            tree = filled(template, _flat(template, packed), checkpoint)
            nested = _emptied(packed)
    for place, value in tree.items():
        here = nested
        for word in place[:-1]:
            here = here.setdefault(word, {})
        here[place[-1]] = value if place != ("step",) else int(value)

    def _pack(value: Any) -> Any:
        content = msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True)
        return msgpack.ExtType(_ARRAY, content)

    path.write_bytes(msgpack.packb(nested, default=_pack, strict_types=True))


def _library() -> Any:
    try:
        import msgpack
    except ModuleNotFoundError:
        raise Unreadable("flax files need the package msgpack: pip install 'rmsprop[convert]'") from None
    return msgpack


def _unpack(path: Path) -> Any:
    """Return the nested maps with arrays still packed. No part may be larger than the file."""
    msgpack = _library()
    raw = path.read_bytes()
    most = len(raw)
    return msgpack.unpackb(
        raw,
        ext_hook=msgpack.ExtType,
        raw=False,
        max_str_len=1 << 16,
        max_bin_len=most,
        max_array_len=1 << 16,
        max_map_len=1 << 20,
        max_ext_len=most,
    )


def _flat(path: Path, tree: Any) -> dict[Place, Array]:
    """Return the arrays by path."""
    found: dict[Place, Array] = {}
    pending: list[tuple[Place, Any]] = [((), tree)]
    while pending:
        place, value = pending.pop()
        if isinstance(value, dict):
            if len(place) > _DEPTH:
                raise Unreadable(f"{path.name} is nested too deeply to be a tree of parameters")
            if value.get("__msgpack_chunked_array__") is True:
                found[place] = _chunked(path, place, value)
            else:
                pending.extend(((*place, str(word)), value[word]) for word in reversed(list(value)))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[place] = np.array(value)
        elif value is not None and not isinstance(value, (str, bytes, bool, list)):
            found[place] = _array(path, place, value)
    return found


def _array(path: Path, place: Place, packed: Any) -> Array:
    name = "/".join(place)
    if packed.code not in (_ARRAY, _SCALAR):
        raise Unreadable(f"{path.name} holds {shown(name)} as msgpack extension {packed.code}, which is not an array")
    shape, dtype, raw = _library().unpackb(packed.data, raw=False, max_array_len=64, max_bin_len=len(packed.data))
    if dtype != "bfloat16" and np.dtype(dtype).kind not in "biufc":
        raise Unreadable(f"{path.name} holds {shown(name)} as {shown(dtype)}, which is not a numeric type")
    if not all(isinstance(size, int) for size in shape):
        raise Unreadable(f"{path.name} gives {shown(name)} a shape that is not of integers")
    return array(raw, dtype, shape, path, name)


def _chunked(path: Path, place: Place, value: dict[str, Any]) -> Array:
    """Return an array of more than a gigabyte, which flax stores in pieces."""
    pieces = [_array(path, place, value["chunks"][str(i)]) for i in range(len(value["chunks"]))]
    shape = tuple(int(value["shape"][str(i)]) for i in range(len(value["shape"])))
    whole = np.concatenate([piece.reshape(-1) for piece in pieces])
    if count(shape, path, "/".join(place)) != whole.size:
        raise Unreadable(f"{path.name} has {shown('/'.join(place))} in pieces that do not make up its shape")
    return whole.reshape(shape)


def _emptied(tree: Any) -> Any:
    """Return the maps of a tree without its arrays. An empty map represents optax's EmptyState."""
    if not isinstance(tree, dict) or tree.get("__msgpack_chunked_array__") is True:
        return tree
    return {word: _emptied(value) for word, value in tree.items()}


def save(path: Path, checkpoint: Checkpoint, template: Path | None = None) -> None:
    """Write an .npz with keys like opt_state/0/nu/conv/kernel, or those of a template."""
    checkpoint = to_write(checkpoint)
    if template is None:
        archives.save(path, {"/".join(place): value for place, value in to_tree(checkpoint).items()})
        return
    old = archives.arrays(template)
    tree = filled(template, {split_key(key): value for key, value in old.items()}, checkpoint)
    archives.save(path, {key: tree[split_key(key)] for key in old})
