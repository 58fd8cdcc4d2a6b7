"""optax' states: flattened into an .npz, or as flax' msgpack, with the parameters beside or not.

optax has no file format; people save the tree of {"params", "opt_state"}. A place in it is written as a path of
words: opt_state/0/nu/conv/kernel, or as jax.tree_util.keystr has it, ['opt_state'][0].nu['conv']['kernel']. What
counts is the words nu, mu, trace and count, wherever a chain, a mask or inject_hyperparams has put them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rmsprop.conversion.formats import archives
from rmsprop.conversion.formats.reading import array, count, decimal, layout, strange, to_write
from rmsprop.conversion.record import Array, Checkpoint, Unreadable
from rmsprop.printing import printable, shown

SLOTS = ("nu", "mu", "trace")
Words = tuple[str, ...]
_STATES = ("opt_state", "optimizer", "opt")
_KEY = re.compile(r"\['((?:[^'\\]|\\.)*)'\]|\[\"((?:[^\"\\]|\\.)*)\"\]|\[(?:<flat index )?(\d+)>?\]|\.(\w+)")
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # flax' extensions of msgpack
_DEPTH = 200
_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt")


def words(key: str) -> Words:
    """The words of a key: of a path with slashes or dots, or as keystr writes it."""
    if key[:1] in ("[", "."):
        found, at = [], 0
        while match := _KEY.match(key, at):
            found.append(next(part for part in match.groups() if part is not None))
            at = match.end()
        if at == len(key):
            return tuple(found)
    return tuple(key.split("/" if "/" in key else "."))


def has_state(keys: list[str]) -> bool:
    """Whether an .npz' keys are those of an optax state."""
    return any("nu" in words(key) for key in keys)


def from_arrays(path: Path, arrays: Mapping[str, Array], optimizer: str | None = None) -> Checkpoint:
    """A checkpoint of an .npz' arrays. Raises: Unreadable."""
    return understand(path, {words(key): value for key, value in arrays.items()}, optimizer)


def understand(path: Path, tree: Mapping[Words, Array], optimizer: str | None = None) -> Checkpoint:
    """A checkpoint of a flattened tree.

    Args:
        optimizer: the place of the state wanted, where the tree holds those of several networks.
    Raises: Unreadable, also for several without a choice, or a choice that is not there.
    """
    made = Checkpoint("optax")
    tree = _one(path, tree, optimizer, made)
    root = _root(path, tree)
    state = {place[len(root) :]: value for place, value in tree.items() if place[: len(root)] == root}
    rest = {place: value for place, value in tree.items() if place[: len(root)] != root}
    for place, value in rest.items():
        if place == ("step",) and value.shape == ():
            made.step = int(value)
        elif value.shape or len(place) > 1:
            name = "/".join(place[1:] if len(place) > 1 else place)
            taken = place[0] != "params" and ("params", *place[1:]) in rest  # by the parameters that are trained
            made.params["/".join(place) if taken else name] = value
    counts: dict[Words, int] = {}
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
    _settle(path, made, state, counts)
    if left:
        made.notes.append(f"{len(left)} arrays of the state are left out, such as {shown(left[0])}.")
    made.kinds = {name: layout(name, value) for name, value in made.params.items()}
    return made


def _one(path: Path, tree: Mapping[Words, Array], chosen: str | None, made: Checkpoint) -> Mapping[Words, Array]:
    """The part of a tree with one optimizer's state and its parameters, that part's own place left out.

    Raises: Unreadable.
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


def _state_at(place: Words) -> int | None:
    """Which word of a place in a state names the state."""
    return next((i for i, word in enumerate(place[: place.index("nu")]) if word in _STATES), None)


def _root(path: Path, tree: Mapping[Words, Array]) -> Words:
    """Where the optimizer's state hangs in the tree: what all of it has in common, a chain's places left out."""
    places = [place[: place.index("nu")] for place in tree if "nu" in place]
    if not places:
        raise Unreadable(f"{path.name} holds no nu, which optax' RMSprop keeps: it is the state of another optimizer")
    root = places[0]
    for place in places[1:]:
        root = root[: next((i for i, (a, b) in enumerate(zip(root, place, strict=False)) if a != b), len(place))]
    named = next((i for i, word in enumerate(root) if word in _STATES), None)
    if named is not None:
        return root[: named + 1]
    while root and root[-1].isdigit():
        root = root[:-1]
    return root if len(root) < 2 else root[:1]


def _settle(path: Path, made: Checkpoint, state: Mapping[Words, Array], counts: Mapping[Words, int]) -> None:
    """What the state's shape says of the settings; the order of parameters and of slots."""
    known = made.params or made.slots
    for name, slots in made.slots.items():
        shapes = {value.shape for value in slots.values()}
        if name in made.params:
            shapes.add(made.params[name].shape)
        if len(shapes) != 1 or "nu" not in slots or (made.params and name not in made.params):
            raise Unreadable(f"{path.name} has a state of {shown(name)} that does not fit its parameter")
    made.slots = {n: {s: made.slots[n][s] for s in SLOTS if s in made.slots[n]} for n in known if n in made.slots}
    beside = {place[: place.index("nu")] for place in state if "nu" in place}
    own = {count for place, count in counts.items() if place in beside}
    centered = any("mu" in slots for slots in made.slots.values())
    told = own or set(counts.values())
    if told - {-1}:
        made.step = max(told)
        if len(told) > 1:
            made.notes.append(
                f"The file counts the steps as {', '.join(map(str, sorted(told)))}; {made.step} is taken."
            )
    if centered and own:
        for name, slots in made.slots.items():
            with np.errstate(all="ignore"):
                above = np.any(np.square(slots["mu"]) > slots["nu"] * 1.001 + 1e-30)
            if above:
                raise Unreadable(
                    f"{path.name} has the state of Adam: in {shown(name)} the square of mu is above nu, which no "
                    "centered RMSprop's is"
                )
        made.notes.append(
            "Adam's state has the same names as that of a centered, bias-corrected RMSprop; it is taken "
            "for the latter, as its numbers allow."
        )
    made.hyper |= {"centered": centered, "bias_correction": bool(own)}
    if not any("trace" in slots for slots in made.slots.values()):
        made.hyper["momentum"] = 0.0


def to_tree(checkpoint: Checkpoint) -> dict[Words, Array]:
    """The tree of {"params", "opt_state"} of optax.rmsprop(...) with a constant learning rate."""
    state: dict[Words, Array] = {}
    if checkpoint.hyper.get("bias_correction"):
        if checkpoint.step is None:
            raise Unreadable("bias_correction needs the count of steps, which the source does not hold")
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


def filled(path: Path, tree: Mapping[Words, Array], checkpoint: Checkpoint) -> dict[Words, Array]:
    """A template's tree with the checkpoint's values in its places. Raises: Unreadable, if something has no place."""
    root = _root(path, tree)
    made, used = {}, set()
    for place, stood in tree.items():
        value = stood
        if place[: len(root)] != root:
            name = "/".join(place[1:] if len(place) > 1 else place)
            value = checkpoint.params.get(name, stood)
            used.add(("", name))
            if place == ("step",) and checkpoint.step is not None:
                value = np.array(checkpoint.step)
        else:
            at = next((i for i, word in enumerate(place) if i >= len(root) and word in (*SLOTS, "count")), None)
            if at is not None and place[at] == "count":
                if checkpoint.step is None:
                    raise Unreadable(f"{path.name} counts steps, and the source does not")
                value = np.array(checkpoint.step)
            elif at is not None:
                name = "/".join(place[at + 1 :])
                if place[at] not in checkpoint.slots.get(name, {}):
                    raise Unreadable(
                        f"{path.name} keeps {place[at]} of {shown(name)}, which the source does not have"
                    )
                value = checkpoint.slots[name][place[at]]
                used.add((place[at], name))
        if value.shape != stood.shape:
            raise Unreadable(f"{path.name} has {shown('/'.join(place))} of shape {stood.shape}, not {value.shape}")
        made[place] = value.astype(stood.dtype)
    wanted = {("", name) for name in checkpoint.params}
    wanted |= {(slot, name) for name, slots in checkpoint.slots.items() for slot in slots}
    lost = sorted(wanted - used)
    if lost:
        raise Unreadable(f"{path.name} has no place for {shown(' '.join(lost[0]).strip())}")
    return made


# --- flax' msgpack --------------------------------------------------------------------------------


def sniff(path: Path) -> bool:
    """Orbax' folder, or a map of msgpack with one of a tree's words near its beginning."""
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
    """A tree in flax' msgpack. Raises: Unreadable, also for Orbax' folders and a choice that is not in it."""
    refuse_parameters(path, parameters)
    if path.is_dir():
        raise Unreadable(
            f"{path.name} is a folder of Orbax, which only its own libraries read: load it there and save it by "
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
    """Refuse a choice of the model: the parameters are those beside the state. Raises: Unreadable."""
    if parameters is not None:
        raise Unreadable(
            f"--parameters {shown(parameters)} chooses among what a file of torch.save holds; in {path.name} the "
            "parameters are those beside the state, which --optimizer chooses"
        )


def write(path: Path, checkpoint: Checkpoint, template: Path | None = None) -> None:
    """Write a tree as flax.serialization.to_bytes does.

    Args:
        template: a file of the same tree; without one it is {"params", "opt_state"} of a constant learning rate.
    """
    msgpack = _library()
    checkpoint = to_write(checkpoint)
    if template is None:
        tree = to_tree(checkpoint)
        nested: dict[str, Any] = {"params": {}, "opt_state": {"0": {}, "1": {}, "2": {}}}
    else:
        with strange(template, "a flax msgpack file"):
            held = _unpack(template)
            tree = filled(template, _flat(template, held), checkpoint)
            nested = _emptied(held)
    for place, value in tree.items():
        here = nested
        for word in place[:-1]:
            here = here.setdefault(word, {})
        here[place[-1]] = value if place != ("step",) else int(value)

    def _pack(value: Any) -> Any:
        said = msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True)
        return msgpack.ExtType(_ARRAY, said)

    path.write_bytes(msgpack.packb(nested, default=_pack, strict_types=True))


def _library() -> Any:
    try:
        import msgpack
    except ModuleNotFoundError:
        raise Unreadable("flax' files need the package msgpack: pip install 'rmsprop[convert]'") from None
    return msgpack


def _unpack(path: Path) -> Any:
    """The nested maps, arrays still packed. Nothing is larger than the file."""
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


def _flat(path: Path, tree: Any) -> dict[Words, Array]:
    """The arrays by their places."""
    found: dict[Words, Array] = {}
    pending: list[tuple[Words, Any]] = [((), tree)]
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


def _array(path: Path, place: Words, packed: Any) -> Array:
    name = "/".join(place)
    if packed.code not in (_ARRAY, _SCALAR):
        raise Unreadable(
            f"{path.name} holds {shown(name)} as an extension {packed.code} of msgpack, which is no array"
        )
    shape, dtype, raw = _library().unpackb(packed.data, raw=False, max_array_len=64, max_bin_len=len(packed.data))
    if dtype != "bfloat16" and np.dtype(dtype).kind not in "biufc":
        raise Unreadable(f"{path.name} holds {shown(name)} as {shown(dtype)}, which is no number")
    if not all(isinstance(size, int) for size in shape):
        raise Unreadable(f"{path.name} gives {shown(name)} a shape of no numbers")
    return array(raw, dtype, shape, path, name)


def _chunked(path: Path, place: Words, value: dict[str, Any]) -> Array:
    """An array of more than a gigabyte, which flax cuts into pieces."""
    pieces = [_array(path, place, value["chunks"][str(i)]) for i in range(len(value["chunks"]))]
    shape = tuple(int(value["shape"][str(i)]) for i in range(len(value["shape"])))
    whole = np.concatenate([piece.reshape(-1) for piece in pieces])
    if count(shape, path, "/".join(place)) != whole.size:
        raise Unreadable(f"{path.name} has {shown('/'.join(place))} in pieces that do not make up its shape")
    return whole.reshape(shape)


def _emptied(tree: Any) -> Any:
    """The maps of a tree without its arrays: an empty map stands for optax' EmptyState."""
    if not isinstance(tree, dict) or tree.get("__msgpack_chunked_array__") is True:
        return tree
    return {word: _emptied(value) for word, value in tree.items()}


def save(path: Path, checkpoint: Checkpoint, template: Path | None = None) -> None:
    """Write an .npz with keys like opt_state/0/nu/conv/kernel, or those of a template."""
    checkpoint = to_write(checkpoint)
    if template is None:
        archives.save(path, {"/".join(place): value for place, value in to_tree(checkpoint).items()})
        return
    held = archives.arrays(template)
    tree = filled(template, {words(key): value for key, value in held.items()}, checkpoint)
    archives.save(path, {key: tree[words(key)] for key in held})
