"""Reads and writes `.safetensors` files with parameters by name.

Files written by this package also hold settings, state under the names `optimizer.SLOT.PARAMETER`, and averages of
buffers as `optimizer.ema_buffers.BUFFER`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from rmsprop.conversion.formats.pytorch.load import Arrays
from rmsprop.conversion.owner import find_owner
from rmsprop.conversion.record import Checkpoint, Unreadable
from rmsprop.conversion.turning import recorded
from rmsprop.files import RUN_KEY
from rmsprop.printing import shown

PREFIX, KEY, BUFFERS = "optimizer.", "rmsprop", "ema_buffers"


def sniff(path: Path) -> bool:
    """Return whether the file begins with the length of a JSON header and the header's opening brace."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
        return len(head) == 9 and head[8:] == b"{" and 0 < int.from_bytes(head[:8], "little") < path.stat().st_size
    except OSError:
        return False


def _library() -> Any:
    try:
        import safetensors
    except ModuleNotFoundError:
        raise Unreadable(
            "a .safetensors file needs the package safetensors: pip install 'rmsprop[convert]'"
        ) from None
    return safetensors


def tensors(path: Path) -> dict[str, Any]:
    """Return every tensor of a file, in its order. Raises: Unreadable with one sentence."""
    return _read(path)[0]


def read(path: Path) -> Checkpoint:
    """Read parameters, and the optimizer's state if this package wrote it. Raises: Unreadable with one sentence."""
    stored, metadata = _read(path)
    arrays = Arrays(path)
    made = Checkpoint(notes=arrays.notes)
    for key, value in stored.items():
        _put(made, key, arrays.array(value, key), metadata is not None)
    if metadata is not None:
        _describe(made, metadata, path)
    return made


def outline(path: Path) -> dict[str, Any]:
    """Return the model, with tensors on the meta device, from the header alone. Raises: Unreadable."""
    stored, metadata = _read(path, _meta)
    return {"model": {key: x for key, x in stored.items() if metadata is None or not key.startswith(PREFIX)}}


def _meta(file: Any, key: str) -> Any:
    """Return a tensor of the header's shape and dtype, on the meta device. Raises: ValueError."""
    import torch

    held = file.get_slice(key)
    dtype = _dtypes().get(held.get_dtype())
    if dtype is None:
        raise ValueError(f"{shown(key)} has the unknown dtype {shown(held.get_dtype())}")
    return torch.empty(held.get_shape(), dtype=dtype, device="meta")


@cache
def _dtypes() -> dict[str, Any]:
    """Return torch's dtypes by the names in a header."""
    import torch

    return {
        "BOOL": torch.bool,
        **{f"F{n}": getattr(torch, f"float{n}") for n in (16, 32, 64)},
        **{f"I{n}": getattr(torch, f"int{n}") for n in (8, 16, 32, 64)},
        **{f"U{n}": getattr(torch, f"uint{n}") for n in (8, 16, 32, 64)},
        "BF16": torch.bfloat16,
        "C64": torch.complex64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
    }


def _read(path: Path, get: Callable[[Any, str], Any] | None = None) -> tuple[dict[str, Any], str | None]:
    """Return every tensor of a file, and this package's metadata in it.

    Args:
        get: returns a tensor of an open file by its name. None: with its numbers.
    """
    library = _library()
    try:
        framework = "pt" if get is None else "np"  # torch's mapping of a file needs as much memory as the file
        with library.safe_open(path, framework=framework, device="cpu") as file:
            keys = file.offset_keys() if hasattr(file, "offset_keys") else file.keys()
            read = file.get_tensor if get is None else partial(get, file)
            metadata = file.metadata() or {}
            if RUN_KEY in metadata:
                raise Unreadable(
                    f"{path.name} is a whole run, saved by rmsprop.checkpoint; save the part to read alone, such as "
                    f"torch.save(rmsprop.checkpoint.load({path.name!r})['optimizer'], 'optimizer.pt')"
                )
            return {key: read(key) for key in keys}, metadata.get(KEY)
    except (MemoryError, RecursionError, Unreadable):
        raise
    except Exception as error:  # the library's own, OSError, and torch's for an unknown dtype
        raise Unreadable(f"{path.name} is not a valid safetensors file: {shown(str(error), 120)}") from error


def _put(made: Checkpoint, key: str, value: Any, ours: bool) -> None:
    parts = key.removeprefix(PREFIX).split(".", 1)
    if ours and key.startswith(f"{PREFIX}{BUFFERS}."):
        made.averages[parts[1]] = value
    elif ours and key.startswith(PREFIX) and len(parts) == 2:
        made.slots.setdefault(parts[1], {})[parts[0]] = value
    else:
        made.params[key] = value


def _describe(made: Checkpoint, metadata: str, path: Path) -> None:
    """Fill a checkpoint from the metadata: source, step count, settings and order.

    Mutates: made.
    Raises: Unreadable.
    """
    try:
        values = json.loads(metadata)
        made.owner = find_owner(str(values["source"])) if values["source"] else made.owner
        made.step = None if values["step"] is None else int(values["step"])
        made.hyper = dict(values["hyper"])
        made.groups = [([str(name) for name in names], dict(hyper)) for names, hyper in values["groups"]]
        made.kinds = {str(name): str(kind) for name, kind in values["kinds"].items()}
        made.turned = recorded(values.get("turned", {}))
        made.numbers = [names for names, _ in made.groups] if values.get("numbered") is True else []
        order = {name: i for i, name in enumerate(map(str, values["order"]))}
        unknown = {name for names, _ in made.groups for name in names} - set(order)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise Unreadable(f"{path.name} has metadata that this package did not write: {shown(str(error))}") from error
    if unknown:
        raise Unreadable(f"{path.name} has a group with {shown(min(unknown))}, which it does not contain")
    made.params = dict(sorted(made.params.items(), key=lambda item: order.get(item[0], len(order))))
    made.slots = dict(sorted(made.slots.items(), key=lambda item: order.get(item[0], len(order))))


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write parameters, state and settings. Raises: Unreadable if the package safetensors is missing."""
    _library()
    from safetensors.numpy import save

    tensors = {name: np.asarray(value, order="C") for name, value in checkpoint.params.items()}
    for name, slots in checkpoint.slots.items():
        tensors |= {f"{PREFIX}{slot}.{name}": np.array(value) for slot, value in slots.items()}
    tensors |= {f"{PREFIX}{BUFFERS}.{name}": np.array(value) for name, value in checkpoint.averages.items()}
    listed = [name for names, _ in checkpoint.groups for name in names]  # possibly without state or value
    about = {
        "source": checkpoint.owner.name,
        "step": checkpoint.step,
        "hyper": checkpoint.hyper,
        "groups": checkpoint.groups,
        "kinds": checkpoint.kinds,
        "turned": checkpoint.turned,
        "order": list(dict.fromkeys([*checkpoint.params, *checkpoint.slots, *listed])),
        "numbered": bool(checkpoint.numbers),
    }
    path.write_bytes(save(tensors, {KEY: json.dumps(about)}))
