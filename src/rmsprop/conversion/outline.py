"""Reads the names, shapes and dtypes of a checkpoint's model, without its numbers wherever the format allows it.

Files and folders of torch.save, torch.distributed.checkpoint and safetensors are read by their headers. Any other
format is read as a whole, and takes the memory that `read_checkpoint` takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rmsprop.conversion.file import recognize
from rmsprop.conversion.formats.pytorch import states
from rmsprop.conversion.record import Unreadable
from rmsprop.printing import shown


@dataclass
class Outline:
    """The tensors of a model by name, on the meta device or without memory of their own.

    Attributes:
        trained: its parameters, a tied one once.
        others: its buffers, and parameters that the file's optimizer does not train.
        notes: what the reader assumed, in sentences.
    """

    trained: dict[str, Any]
    others: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def read_outline(path: Path, parameters: str | None = None) -> Outline:
    """Return the outline of the model in a checkpoint of any format.

    Args:
        parameters: the path of the model in a file that holds several.
    Raises: Unreadable in one sentence; ValueError if the file does not contain the given path.
    """
    row = recognize(path)
    if row.outline is not None:
        return outline_of(row.outline(path), path, parameters)
    if parameters is not None:
        raise ValueError(
            f"parameters={shown(parameters)} selects a model in a torch.save file, but {path.name}, in the format "
            f"{row.name}, has only one; leave it out"
        )
    import torch

    held = row.read(path)
    tensors = {
        name: torch.empty(x.shape, dtype=torch.from_numpy(np.empty(0, x.dtype)).dtype, device="meta")
        for name, x in held.params.items()
        if x.dtype.kind in "biufc"
    }
    return outline_of(tensors, path, None, held.notes)


def outline_of(whole: Any, path: Path, parameters: str | None = None, notes: list[str] | None = None) -> Outline:
    """Return the outline of the model in nested mappings and lists.

    Raises: Unreadable if there is none; ValueError or Unreadable if `parameters` is not there, or needed.
    """
    found, notes = states.survey(whole), list(notes or [])
    one = next(iter(found.optimizers.items())) if len(found.optimizers) == 1 else None
    names, sizes = ([], []) if one is None else _optimizer(one[1])
    own, learned = states.model(found, path, parameters, None if one is None else one[0], names, sizes)
    if not own:
        content = "an optimizer's state and no model" if found.optimizers else "no model's state dict"
        raise Unreadable(f"{path.name} holds {content}; give a file with model.state_dict(), or the model itself")
    trained = learned
    if names and all(isinstance(name, str) and name in own for name in names):
        trained = {name: own[name] for name in names}
    elif names and len(names) != len(learned):
        notes.append(
            f"the file's optimizer has {len(names)} parameters without names and the model {len(learned)}, all of "
            "which are counted as trained"
        )
    again = states.tied(own)
    others = {name: x for name, x in own.items() if name not in trained and name not in again and hasattr(x, "dtype")}
    return Outline(trained, others, notes)


def _optimizer(state_dict: Mapping[Any, Any]) -> tuple[list[Any], list[tuple[int, ...] | None]]:
    """Return the names, or the keys, of an optimizer's parameters, and their shapes where its state has them."""
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    rows = [group for group in groups if isinstance(group, Mapping)] if isinstance(groups, list | tuple) else []
    names: list[Any] = []
    sizes: list[tuple[int, ...] | None] = []
    for group in rows:
        keys = group.get("params")
        keys = list(keys) if isinstance(keys, list | tuple) else []
        named = group.get("param_names")
        names += named if isinstance(named, list) and len(named) == len(keys) else keys
        for key in keys:
            entry = state.get(key) if isinstance(state, Mapping) and isinstance(key, int | str) else None
            shapes = (getattr(x, "shape", ()) for x in (entry.values() if isinstance(entry, Mapping) else ()))
            sizes.append(next((tuple(shape) for shape in shapes if shape), None))
    return names, sizes
