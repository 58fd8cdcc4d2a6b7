"""Reads a folder with a model and its optimizer, as Transformers, Accelerate, skorch, PFRL and PyMARL write it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rmsprop.conversion.formats import safetensors_file
from rmsprop.conversion.formats.pytorch.file import understand
from rmsprop.conversion.formats.pytorch.load import load
from rmsprop.conversion.record import Checkpoint, Unreadable
from rmsprop.printing import shown

_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "adapter_model")
_ENDINGS = (".safetensors.index.json", ".bin.index.json", ".safetensors", ".bin")
_MODELS = (*(stem + ending for ending in _ENDINGS for stem in _STEMS), "model.pt", "model.pth", "params.pt")
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer.pth", "opt.th")
_NETWORKS = ("agent.th", "mixer.th")  # PyMARL's, which its opt.th trains together
_INDEX = 1 << 26
_SHARDS = 10_000


def sniff(path: Path) -> bool:
    """Return whether a folder contains a model or an optimizer under one of the known file names."""
    return path.is_dir() and any((path / name).is_file() for name in (*_MODELS, *_OPTIMIZERS))


def read(path: Path, optimizer: str | None = None, parameters: str | None = None) -> Checkpoint:
    """Read the model, from all its shards, and the optimizer. Raises: Unreadable."""
    whole, files = _whole(path, safetensors_file.tensors, load)
    size = sum(file.stat().st_size for file in files)
    sorted_names = any(file.suffix == ".safetensors" for file in files)
    return understand(whole, path, optimizer, parameters, size=size, ordered=not sorted_names)


def outline(path: Path) -> Any:
    """Return the model and the optimizer, with tensors whose numbers have not been read. Raises: Unreadable."""
    return _whole(path, lambda file: safetensors_file.outline(file)["model"], partial(load, checksums=False))[0]


def _whole(
    path: Path, tensors: Callable[[Path], dict[str, Any]], load: Callable[[Path], Any]
) -> tuple[dict[str, Any], list[Path]]:
    """Return the contents of a folder's files, and the files.

    Args:
        tensors, load: read a safetensors file, and one of torch.save.
    """
    model = next((path / name for name in _MODELS if (path / name).is_file()), None)
    state = next((path / name for name in _OPTIMIZERS if (path / name).is_file()), None)
    files = [] if model is None else _shards(model)
    whole: dict[str, Any] = {"model": {}}
    for file in files:
        part = tensors(file) if file.suffix == ".safetensors" else load(file)
        if not isinstance(part, dict) or part.keys() & whole["model"].keys():
            raise Unreadable(
                f"{file.name} holds no part of a model, or repeats a part from another file of {path.name}"
            )
        whole["model"] |= part
    if state is not None and state.suffix == ".th":
        files = [path / name for name in _NETWORKS if (path / name).is_file()]
        whole = {file.stem: load(file) for file in files}
    if state is not None:
        whole["optimizer"] = load(state)
        files = [*files, state]
    return whole, files


def _shards(model: Path) -> list[Path]:
    """Return a model's files: the file itself, or the files that its index names, all in the same folder."""
    if model.suffix != ".json":
        return [model]
    try:
        if model.stat().st_size > _INDEX:
            raise ValueError(f"it is longer than {_INDEX} bytes")
        named = json.loads(model.read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted(set(named))  # shard names are numbered, so a model of .bin files keeps its order
        if not all(isinstance(name, str) and Path(name).name == name for name in files) or len(files) > _SHARDS:
            raise ValueError("it names a file outside its folder, or too many files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unreadable(f"{model.name} is not the index of a sharded model: {shown(str(error), 80)}") from error
    missing = [name for name in files if not (model.parent / name).is_file()]
    if missing:
        raise Unreadable(
            f"{model.name} names {len(files)} files, and {len(missing)} of them cannot be found, such as "
            f"{shown(missing[0])}; copy or download them too"
        )
    return [model.parent / name for name in files]
