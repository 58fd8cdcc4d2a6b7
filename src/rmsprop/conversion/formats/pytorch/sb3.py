"""Stable-Baselines3's zip: which optimizer trained the policy, by the description that stands in it as JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rmsprop.conversion.formats import archives
from rmsprop.conversion.record import Unreadable

_MOST = 1 << 26  # bytes of the description, which holds a policy's arguments and no tensors
# Classes by their names, and whose rule they are.
SOURCES = {"RMSpropTFLike": "sb3", "RMSpropTF": "timm", "RMSprop": "torch", "Adam": "adam", "AdamW": "adamw"}
_HOMES = ("torch.optim.", "timm.optim.", "stable_baselines3.common.sb2_compat.")


def optimizer_class(path: Path) -> str:
    """Return the class that policy_kwargs name, such as torch.optim.rmsprop.RMSprop; "" if they name none.

    Beside the pickles in the description, which are never loaded, stands the text of each value.
    Raises: Unreadable for a description that is not JSON.
    """
    with archives.opened(path) as held:
        if "data" not in held.namelist():
            return ""
        if held.getinfo("data").file_size > _MOST:
            raise Unreadable(f"{path.name} holds a description of more than {_MOST} bytes, which no model has")
        try:
            said = json.loads(held.read("data"))
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"{path.name} holds a description (data) that is not JSON: it is damaged") from error
    kwargs = said.get("policy_kwargs") if isinstance(said, dict) else None
    named = kwargs.get("optimizer_class") if isinstance(kwargs, dict) else None
    match = re.fullmatch(r"<class '([\w.<>]{1,200})'>", named) if isinstance(named, str) else None
    return match[1] if match else ""


def source(name: str) -> str:
    """Return whose rule a class computes, "" if that is not known."""
    return SOURCES.get(name.rpartition(".")[2], "") if name.startswith(_HOMES) else ""
