"""After a fork: torch's threads are the parent's, and a parallel region waits for them for ever (pytorch#17199)."""

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")

_BORN = os.getpid()


def in_child() -> bool:
    """Whether this process was forked after the package was imported."""
    return os.getpid() != _BORN


def serial_after_fork(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let the function run on one thread in a child process; torch's number of threads is afterwards what it was."""

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
