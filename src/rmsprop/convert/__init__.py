"""Optimizer state between dialects, and checkpoints between frameworks.

state, report = rmsprop.convert(state, "tensorflow1", "torch", lr=1e-3)     # arrays: convert/state.py
rmsprop convert model.keras out.pt                                          # files: convert/file.py
"""

import sys
from types import ModuleType
from typing import Any

from rmsprop.convert.record import Checkpoint, Format, Report, Unreadable
from rmsprop.convert.state import Converted, convert

__all__ = ["Checkpoint", "Converted", "Format", "Report", "Unreadable", "convert"]


class _Callable(ModuleType):
    """`rmsprop.convert` is this package and what it is for: calling it calls `convert`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Converted:
        return convert(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
