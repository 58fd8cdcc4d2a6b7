"""Identifies the optimizer that trained a Stable-Baselines3 policy, by the JSON description in its zip."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rmsprop.conversion.formats import archives
from rmsprop.conversion.record import Unreadable

_MOST = 1 << 26  # bytes of the description, which holds a policy's arguments and no tensors
# The framework whose rule each class computes.
SOURCES = {"RMSpropTFLike": "sb3", "RMSpropTF": "timm", "RMSprop": "torch", "Adam": "adam", "AdamW": "adamw"}
_HOMES = ("torch.optim.", "timm.optim.", "stable_baselines3.common.sb2_compat.")


def optimizer_class(path: Path) -> str:
    """Return the optimizer class in policy_kwargs, such as torch.optim.rmsprop.RMSprop, or "" without one.

    The description has each value as text next to its pickle, which is never loaded.
    Raises: Unreadable for a description that is not JSON.
    """
    with archives.opened(path) as archive:
        if "data" not in archive.namelist():
            return ""
        if archive.getinfo("data").file_size > _MOST:
            raise Unreadable(f"{path.name} holds a description of more than {_MOST} bytes, which no model has")
        try:
            description = json.loads(archive.read("data"))
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"{path.name} holds a description (data) that is not JSON: it is damaged") from error
    kwargs = description.get("policy_kwargs") if isinstance(description, dict) else None
    named = kwargs.get("optimizer_class") if isinstance(kwargs, dict) else None
    match = re.fullmatch(r"<class '([\w.<>]{1,200})'>", named) if isinstance(named, str) else None
    return match[1] if match else ""


def source(name: str) -> str:
    """Return the framework whose rule a class computes, or "" for an unknown class."""
    return SOURCES.get(name.rpartition(".")[2], "") if name.startswith(_HOMES) else ""
