"""Detects gradients that are never reset: the next backward pass adds to the gradient that a step used."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rmsprop.printing import printable

CANDIDATES = 8  # the number of smallest parameters, from which one with a gradient is watched
SAMPLE = 1 << 14


class Leftover:
    """Watches one parameter's gradient from a step of an optimizer to the next.

    Intended accumulation begins with a reset gradient: at least one of the passes between two steps finds no
    gradient, or zeros. The gradient is only read.
    """

    def __init__(self) -> None:
        self.watched = self.kept = 0
        self.name: tuple[int, str] | None = None
        self._param: Tensor | None = None
        self._handles: list[Any] = []

    @property
    def found(self) -> tuple[int, str] | None:
        """The index of a group and the name of a parameter whose gradient was never reset, or None."""
        return self.name if self.watched and self.kept == self.watched else None

    def begin(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Start watching, after a step."""
        self.stop()
        found = _smallest(groups)
        if found is None:
            return
        self.name, p = found
        self._param, self._passes, self._reset = p, 0, False
        self._left, self._place = _sample(p), p.grad.data_ptr()  # type: ignore[union-attr]
        hooks: Any = p  # torch does not annotate these two
        self._handles = [hooks.register_hook(self._before), hooks.register_post_accumulate_grad_hook(self._after)]
        self._seen_reset = False

    def end(self) -> None:
        """Stop watching, after the next step, and count the result."""
        p = self._param
        if p is not None and self._passes and p.grad is not None:
            self.watched += 1
            self.kept += not self._reset and p.grad.data_ptr() == self._place
        self.stop()

    def stop(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._param, self._handles = None, []

    def _before(self, _gradient: Tensor) -> None:
        """Record, before a gradient is added, whether the old one was reset."""
        p = self._param
        self._seen_reset = True
        if p is None or p.grad is None or _is_busy():
            return
        held = p.grad.detach()
        changed = self._passes == 0 and not torch.equal(_sample(p), self._left)
        self._seen_reset = changed or not bool(held.count_nonzero())

    def _after(self, _param: Tensor) -> None:
        """Count a pass after its gradient was added; `backward` calls this, `torch.autograd.grad` does not."""
        self._passes += 1
        self._reset |= self._seen_reset


def _is_busy() -> bool:
    """Return whether reading a value would break a graph that is compiled or captured."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _smallest(groups: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, str], Tensor] | None:
    """Return a small parameter with a gradient other than 0, with its group and name."""
    plain = [
        ((i, (group.get("param_names") or {}), j), p)
        for i, group in enumerate(groups)
        for j, p in enumerate(group["params"])
        if type(p) in (Tensor, torch.nn.Parameter) and p.requires_grad and p.is_leaf and p.grad is not None
        if p.grad.layout == torch.strided
    ]
    for (i, known, j), p in sorted(plain, key=lambda x: x[1].numel())[:CANDIDATES]:
        if bool(p.grad.count_nonzero()):
            return (i, printable(str(known[j])) if known else f"group{i}.param{j}"), p
    return None


def _sample(p: Tensor) -> Tensor:
    grad = p.grad
    assert grad is not None
    return grad.detach().reshape(-1)[:SAMPLE].clone()
