"""Reads MXNet's arrays from mx.nd.save files and .npz files. Its .states files are pickles, and are refused.

A parameter is NAME, or arg:NAME in a Module's file. Its states are NAME.n, and with centering NAME.g and NAME.delta
(MXNet 1), or NAME.var, NAME.mean and NAME.mom (MXNet 2). Source: src/ndarray/ndarray.cc, NDArray::Save and Load.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rmsprop.conversion.formats.reading import array, count, strange, to_write
from rmsprop.conversion.owner import find_owner
from rmsprop.conversion.record import Array, Checkpoint, Unreadable
from rmsprop.printing import shown

MAGIC = 0x112
V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
SLOTS = {"mxnet1": ({"n"}, {"n", "g", "delta"}), "mxnet2": ({"var"}, {"mean", "var", "mom"})}
_ORDER = ("n", "g", "delta", "mean", "var", "mom")
_DTYPES = ("float32", "float64", "float16", "uint8", "int32", "int8", "int64", "bool", "int16", "uint16", "uint32")
_ADVICE = (
    "is a pickle, which can run code when it is loaded; load it in MXNet and save its arrays by name, "
    "mx.nd.save('state.nd', {'conv_weight': ..., 'conv_weight.n': updater.states[0][0], ...})"
)


def has_state(keys: list[str]) -> bool:
    """Return whether the names are those of parameters with states."""
    ends = {key.rpartition(".")[2] for key in keys if "." in key}
    return any(any(kept <= ends for kept in kinds) for kinds in SLOTS.values())


def sniff(path: Path) -> bool:
    """Return whether the file has mx.nd.save's magic number, or is a pickle named as MXNet's states."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError:
        return False
    return head == MAGIC.to_bytes(8, "little") or (head[:1] == b"\x80" and path.name.endswith(".states"))


def read(path: Path) -> Checkpoint:
    """Read parameters and states of mx.nd.save. Raises: Unreadable, also for pickles."""
    with strange(path, "an mx.nd.save file"):
        raw = path.read_bytes()
        if raw[:1] == b"\x80":
            raise Unreadable(f"{path.name} {_ADVICE}")
        return from_arrays(path, _load(path, raw))


def from_arrays(path: Path, arrays: Mapping[str, Array]) -> Checkpoint:
    """Build a checkpoint from named arrays. Raises: Unreadable."""
    made = Checkpoint()
    slots: dict[str, dict[str, Array]] = {}
    for key, value in arrays.items():
        owner, _, slot = key.rpartition(".")
        if owner and slot in _ORDER and (owner in arrays or f"arg:{owner}" in arrays or has_state(list(arrays))):
            slots.setdefault(owner.removeprefix("arg:"), {})[slot] = value
        else:
            made.params[key.removeprefix("arg:").removeprefix("aux:")] = value
    kinds = {frozenset(kept) for kept in slots.values()}
    if not kinds:
        made.notes.append("The file holds no state of an optimizer.")
        return made
    name = next((name for name, known in SLOTS.items() if len(kinds) == 1 and next(iter(kinds)) in known), "")
    if not name:
        kept = ", ".join(sorted({slot for kind in kinds for slot in kind}))
        raise Unreadable(
            f"{path.name} holds the states {shown(kept)}, which differ between parameters or are not RMSProp's"
        )
    made.owner = find_owner(name)
    made.hyper["centered"] = len(next(iter(kinds))) == 3
    for name in made.params or slots:
        if name in slots:
            made.slots[name] = {slot: slots[name][slot] for slot in _ORDER if slot in slots[name]}
    for name, own in slots.items():
        shapes = {value.shape for value in own.values()}
        shapes |= {made.params[name].shape} if name in made.params else set()
        if len(shapes) > 1 or name not in made.slots:
            raise Unreadable(f"{path.name} has a state of {shown(name)} that does not fit its parameter")
    made.kinds = dict.fromkeys(made.params or made.slots, "keep")
    return made


def to_arrays(checkpoint: Checkpoint) -> dict[str, Array]:
    """Parameters and states under one name each."""
    checkpoint = to_write(checkpoint)
    made = dict(checkpoint.params)
    for name, slots in checkpoint.slots.items():
        made |= {f"{name}.{slot}": slots[slot] for slot in _ORDER if slot in slots}
    return made


def _load(path: Path, raw: bytes) -> dict[str, Array]:
    """Return the arrays of an mx.nd.save file."""
    at = 0

    def _take(form: str) -> tuple[int, ...]:
        nonlocal at
        at += struct.calcsize(f"<{form}")
        if at > len(raw):
            raise Unreadable(f"{path.name} is cut short at {len(raw)} bytes")
        return struct.unpack_from(f"<{form}", raw, at - struct.calcsize(f"<{form}"))

    magic, _, total = _take("3Q")
    if magic != MAGIC or total > len(raw):
        raise Unreadable(f"{path.name} is not an mx.nd.save file, or its beginning is damaged")
    values = []
    for number in range(total):
        (version,) = _take("I")
        name = f"array {number}"
        if version in (V2, V3):
            (storage,) = _take("i")
            if storage not in (0, -1):
                raise Unreadable(f"{path.name} holds {name} as a sparse array; save it by tostype('default')")
        if version in (V1, V2, V3):
            (rank,) = _take("i")
            shape = _take(f"{rank}q") if 0 <= rank <= 32 else None
        else:
            shape = _take(f"{version}I") if version <= 32 else None
        if shape is None or (not shape and version != V3):
            raise Unreadable(f"{path.name} holds {name} without a shape: it is empty, or damaged")
        _take("2i")
        (kind,) = _take("i")
        if not 0 <= kind < len(_DTYPES):
            raise Unreadable(f"{path.name} holds {name} as MXNet type {kind}, which is not supported")
        size = count(shape, path, name) * np.dtype(_DTYPES[kind]).itemsize
        values.append(array(memoryview(raw)[at : at + size], _DTYPES[kind], shape, path, name))
        at += size
    (named,) = _take("Q")
    if named not in (0, total):
        raise Unreadable(f"{path.name} has {total} arrays and {named} names: it is damaged")
    names = []
    for _ in range(named):
        (length,) = _take("Q")
        if at + length > len(raw):
            raise Unreadable(f"{path.name} is cut short at {len(raw)} bytes")
        names.append(raw[at : at + length].decode())
        at += length
    if len(set(names)) != len(names):
        raise Unreadable(f"{path.name} has two arrays with the same name")
    return dict(zip(names or map(str, range(total)), values, strict=True))
