"""Saves a training run to one file atomically, and loads it without running code from the file.

    from rmsprop import checkpoint
    checkpoint.save("run.safetensors", model=model, optimizer=optimizer, scheduler=scheduler, step=step)
    step = checkpoint.load("run.safetensors", model=model, optimizer=optimizer, scheduler=scheduler)["step"]

The file is a safetensors file. Its header has the version of this format, everything but tensors as JSON
(packing.py), and checksums of both.
"""

import importlib
import json
import os
import random
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from rmsprop.checkpoint.packing import Packed, unpack
from rmsprop.files import RUN_KEY, write_whole
from rmsprop.optimizer import RMSprop
from rmsprop.printing import printable, shown, with_article
from rmsprop.printing import version as package_version
from rmsprop.tensors.forked import serial_after_fork

__all__ = ["VERSION", "load", "save"]

VERSION = 1
_HEADER = 100_000_000  # safetensors' own limit on the bytes of a header
_LARGEST = 32_000_000  # bytes of JSON: safetensors allows headers of 100 MB, in which quotes are escaped


@serial_after_fork
def save(path: str | bytes | os.PathLike[str], *, rng: bool = False, **parts: Any) -> Path:
    """Write a run's parts to one file, atomically.

    The old file stays in place until the new one is on the disk, so a process that is killed while it saves, or a
    machine that loses power, leaves one of the two.

    Args:
        rng: also save the states of the random generators of torch, on all devices, of NumPy and of Python.
        parts: objects under names of your choice. An object with a `state_dict()` (model, optimizer, scheduler,
            GradScaler) is saved as that, and a random generator as its state. Anything else must be tensors, numbers,
            strings, None, or lists, tuples, sets and dicts of them.
    Returns: the path.
    Raises: TypeError or ValueError with the place of a value of another kind, before anything is written; OSError
        with the path, such as for a full disk.
    """
    save_file = _safetensors("torch").save_file
    states = {name: _state(part) for name, part in parts.items()}
    packed = Packed(states | ({"rng": _rng_state()} if rng else {}))
    text = json.dumps(packed.tree, allow_nan=False)
    if len(text) > _LARGEST:
        raise ValueError(
            f"the parts hold {len(text) / 1e6:.0f} MB of numbers and strings outside tensors, and a checkpoint takes "
            f"{_LARGEST / 1e6:.0f} MB; put long lists into tensors"
        )
    notes = {"format": "pt", RUN_KEY: str(VERSION), "rmsprop": package_version(), "tree": text}
    notes["crc32"] = str(zlib.crc32(text.encode("ascii")))
    return write_whole(path, lambda part: save_file(packed.tensors, part, metadata=notes), sync=True)


@serial_after_fork
def load(path: str | bytes | os.PathLike[str], *, rng: bool = False, **objects: Any) -> dict[str, Any]:
    """Read a run's parts from one file, and load them into the objects with the parts' names.

    The load is atomic: if an object refuses its part, it and the objects before it get their old states back. Until
    then host memory holds a copy of these states, except for this package's optimizer, which validates everything
    before it changes anything and is loaded last.

    Args:
        rng: also restore the random generators that were saved with rng=True, on the devices that exist here.
        objects: objects with a `load_state_dict`, or random generators; the other parts are only returned.
    Returns: every part, as it was saved, with tensors on the CPU.
    Raises: ValueError in one sentence, before anything is changed, for a file that is damaged, truncated, of a newer
        format or of another kind, or that lacks a requested part; the objects' own errors for a state that does not
        fit them.
    """
    path = Path(os.fsdecode(path))
    parts = read(path)
    wanted = [*objects, "rng"] if rng else list(objects)
    missing = [name for name in wanted if name not in parts]
    if missing:
        present = ", ".join(printable(str(name)[:80]) for name in list(parts)[:20]) or "nothing"
        raise ValueError(f"{path} does not hold {' or '.join(missing)}; it holds {present}")
    for name, part in objects.items():
        if not callable(getattr(part, "load_state_dict", None)) and _generator(part) is None:
            raise TypeError(
                f"{name} is {with_article(type(part).__name__)}, which has no load_state_dict; omit it, and take "
                "it from the dict that load returns"
            )
    waiting = sorted(objects.items(), key=lambda item: isinstance(item[1], RMSprop))
    before: list[tuple[Any, Any]] = []
    generators = _rng_state() if rng else None
    try:
        for i, (name, part) in enumerate(waiting, 1):
            state = _state(part)
            if state is not part and (i < len(waiting) or rng or not isinstance(part, RMSprop)):
                before.append((part, _copied(state)))
            _load(part, parts[name])
        if rng:
            _set_rng_state(parts["rng"], path)
    except BaseException:
        for part, state in reversed(before):
            with suppress(Exception):  # if an object refuses its own state too, the first error is raised
                _put_back(part, state)
        if generators is not None:
            _set_rng_state(generators, path)
        raise
    return parts


def is_checkpoint(path: Path) -> bool:
    """Return whether the header of a file says that this module wrote it, whole or damaged since."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if size <= _HEADER else b""
    return f'"{RUN_KEY}"'.encode() in header


def read(path: Path, shapes: bool = False) -> dict[str, Any]:
    """Return the parts in a file.

    Args:
        shapes: return tensors on the meta device, and read the header alone.
    Raises: ValueError in one sentence.
    """
    safetensors = _safetensors()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a checkpoint is one file")
    with path.open("rb") as opened:  # raises FileNotFoundError
        return _parts(path, opened, safetensors, shapes)


def _parts(path: Path, opened: BinaryIO, safetensors: Any, shapes: bool) -> dict[str, Any]:
    """Return the parts in an open file. safetensors opens by name, and a path may get another file."""
    size = os.fstat(opened.fileno()).st_size
    own = Path(f"/dev/fd/{opened.fileno()}")
    try:
        framework = "np" if shapes else "pt"  # torch's mapping of a file needs as much memory as the file
        with safetensors.safe_open(str(own if own.exists() else path), framework=framework) as file:
            notes = file.metadata() or {}
            text = _tree(path, notes)
            get = None if shapes else lambda name: file.get_tensor(name).clone()
            found = unpack(json.loads(text), get)
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        if isinstance(error, _OtherFileError):
            raise
        raise ValueError(
            f"{path} ({size} bytes) is not a complete checkpoint: it is damaged, truncated, or another kind of file "
            f"({printable(str(error).strip()[:300]) or type(error).__name__})"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} is not a complete checkpoint: it is damaged (it holds {with_article(type(found).__name__)})"
        )
    return found


class _OtherFileError(ValueError):
    """A complete file of another kind."""


def _tree(path: Path, notes: Mapping[str, str]) -> str:
    """Return the JSON in a file's metadata, validated."""
    version = notes.get(RUN_KEY)
    if version is None:
        raise _OtherFileError(
            f"{path} is a safetensors file, but not a checkpoint of rmsprop: its metadata has no {RUN_KEY}; "
            "safetensors.torch.load_file reads its tensors"
        )
    if not version.isdecimal() or int(version) > VERSION:
        raise _OtherFileError(
            f"{path} is a checkpoint of format {printable(version[:20])}, written by rmsprop "
            f"{printable(notes.get('rmsprop', '')[:20])}, and this rmsprop {package_version()} reads up to format "
            f"{VERSION}; install a newer one"
        )
    text = notes.get("tree", "")
    if str(zlib.crc32(text.encode("utf-8", "surrogatepass"))) != notes.get("crc32"):
        raise ValueError("the header's checksum does not match")
    return text


def _safetensors(module: str = "") -> Any:
    try:
        return importlib.import_module(f"safetensors.{module}" if module else "safetensors")
    except ImportError as error:
        raise ImportError(f"checkpoints need safetensors ({error}): pip install 'rmsprop[checkpoint]'") from error


def _state(part: Any) -> Any:
    """Return what is saved of a part."""
    if callable(getattr(part, "state_dict", None)) and not isinstance(part, type):
        return part.state_dict()
    generator = _generator(part)
    return part if generator is None else generator[0]()


def _load(part: Any, state: Any) -> None:
    """Load a part's state into it."""
    generator = _generator(part)
    if generator is None:
        part.load_state_dict(state)
    else:
        generator[1](state)


def _put_back(part: Any, state: Any) -> None:
    """Restore a part's old state, and remove attributes that a load added to it, as to a scheduler."""
    _load(part, state)
    if isinstance(state, Mapping):
        for key in _state(part).keys() - state.keys():
            vars(part).pop(key, None)


def _copied(value: Any) -> Any:
    """Return a copy of a state that later changes of its part do not reach."""
    if isinstance(value, Tensor):
        if is_lazy(value):
            return value
        plain = type(value) in (Tensor, torch.nn.Parameter)
        return value.detach().to("cpu", copy=True) if plain else value.detach().clone()
    if type(value) in (dict, OrderedDict):
        made = type(value)((key, _copied(item)) for key, item in value.items())
        if hasattr(value, "_metadata"):
            made._metadata = value._metadata
        return made
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    with suppress(Exception):  # a load does not write to values that cannot be copied
        return deepcopy(value)
    return value


def _generator(part: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """Return functions that read and set a random generator's state, or None for anything else."""
    if isinstance(part, torch.Generator):
        return part.get_state, part.set_state
    if isinstance(part, random.Random):
        return part.getstate, part.setstate
    if isinstance(part, np.random.RandomState):
        return part.get_state, part.set_state
    if isinstance(part, np.random.Generator):
        bits = part.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return None


def _rng_state() -> dict[str, Any]:
    """Return the states of the global generators."""
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def _set_rng_state(state: Any, path: Path) -> None:
    """Restore the states of the global generators. Raises: ValueError for anything else."""
    try:
        torch.set_rng_state(state["torch"])
        np.random.set_state(state["numpy"])
        random.setstate(state["python"])
        if torch.cuda.is_available():
            for device, own in enumerate(state.get("cuda", ())[: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(own, device)
        if torch.backends.mps.is_available() and "mps" in state:
            torch.mps.set_rng_state(state["mps"])
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"the rng part of {path} is not a state of the random generators ({shown(str(error))})"
        ) from error
