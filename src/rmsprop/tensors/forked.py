"""Keeps forked children on one thread, since torch's pool stays in the parent and would hang (pytorch#17199)."""

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")

_BORN = os.getpid()


def in_child() -> bool:
    """Return whether this process was forked after the package was imported."""
    return os.getpid() != _BORN


def serial_after_fork(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Wrap a function to run on one thread in a forked child. torch's number of threads is restored afterwards."""

    @functools.wraps(function)
    def _wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling() or not in_child():
            return function(*args, **kwargs)
        threads = torch.get_num_threads()
        if threads == 1:
            return function(*args, **kwargs)
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return _wrapper
