"""Reads the effective learning rate of every element from an RMSprop's state, and records it over a run.

RMSprop divides every element's gradient by its own denominator d ([6] in spec.py), so an element moves as if it
had a learning rate of its own, lr/d. Reading it between steps changes no parameter, gradient, state or random number.
`torch.optim.RMSprop` is read in the same way.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rmsprop.analysis import denominator
from rmsprop.tensors import shards
from rmsprop.tensors.float8 import widened
from rmsprop.tensors.forked import serial_after_fork
from rmsprop.tensors.names import names


@serial_after_fork
def effective_lr(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the effective learning rate lr/d of every element, by parameter name.

    Equation: spec.py, lines [4]-[6], from the state after the last step and the current lr. Momentum is
              excluded: a steady gradient moves an element 1/(1-momentum) times further.
    Shapes:   as the parameter; a complex parameter has a last axis of 2, the real and the imaginary part.
    Units:    parameter per gradient. Infinite where d is 0 (eps = 0 and no gradient so far): there the step is
              0/0, which is 0.
    Returns:  float32 (float64 for float64 state), on the state's device; of a DTensor this process's shard.
              Names come from `param_names` if the optimizer was given named parameters, else they are
              "group0.param3". A parameter that has not stepped yet is skipped.
    Raises:   TypeError if the optimizer is not an RMSprop; ValueError for an eps_mode that [6] does not have.
    """
    return {name: rate for name, _, rate in _rates(optimizer)}


@dataclass(frozen=True)
class LayerRecord:
    """The spread of the effective learning rate over the elements of one parameter, after one step.

    Attributes:
        step: the number of steps that this parameter has taken.
        name: as in `effective_lr`.
        median, low, high: the 50 %, 10 % and 90 % quantile over the elements, in parameter per gradient.
        elements: the number of values behind the quantiles.
    """

    step: int
    name: str
    median: float
    low: float
    high: float
    elements: int


class Recorder:
    """Keeps one `LayerRecord` per parameter for every `every`-th step: call `record()` after each `step()`.

    It records the first call, then every `every`-th after it. It keeps only numbers, never tensors.

    Raises: ValueError if `every` is below 1.
    """

    def __init__(self, optimizer: Optimizer, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every={every}: give a number of steps, 1 or more")
        self.optimizer = optimizer
        self.every = every
        self.rows: list[LayerRecord] = []
        self._calls = 0

    @serial_after_fork
    def record(self) -> None:
        """Record the optimizer's state, on every `every`-th call. Mutates `rows` only."""
        due = self._calls % self.every == 0
        self._calls += 1
        if not due:
            return
        for name, step, rate in _rates(self.optimizer):
            if rate.numel():
                low, median, high = _quantiles(rate, (0.1, 0.5, 0.9))
                self.rows.append(LayerRecord(step, name, median, low, high, rate.numel()))


@torch.no_grad()
def _rates(optimizer: Optimizer) -> Iterator[tuple[str, int, Tensor]]:
    for i, group in enumerate(optimizer.param_groups):
        if "alpha" not in group or "centered" not in group:
            raise TypeError(
                f"{type(optimizer).__name__} is not an RMSprop: its parameter group {i} has no alpha or no centered, "
                "which the effective learning rate needs"
            )
        called = names(group) or [f"group{i}.param{j}" for j in range(len(group["params"]))]
        for name, param in zip(called, group["params"], strict=True):
            state = optimizer.state.get(param)  # .get, because indexing would make an empty entry
            if not state or "square_avg" not in state:
                continue
            step = int(state["step"])
            if step == 0 and group.get("bias_correction"):
                continue  # [4] is 0/0 before the first step
            yield name, step, _rate(group, state, step)


def _rate(group: dict[str, Any], state: dict[str, Any], step: int) -> Tensor:
    lr, alpha, eps = float(group["lr"]), float(group["alpha"]), float(group["eps"])
    # [4] bias
    c = 1 - alpha**step if group.get("bias_correction") else 1.0
    # [5] variance; rounding can put v - m² below zero, where the limit is 0
    w = _real(state["square_avg"]) / c
    if group["centered"]:
        w = (w - (_real(state["grad_avg"]) / c).square()).clamp(min=0)
    # [6] denominator
    mode = group.get("eps_mode", "outside")  # torch.optim.RMSprop has no such entry and adds eps outside
    d: Tensor = denominator(mode, eps, w)
    return lr / d


def _real(tensor: Tensor) -> Tensor:
    """Return the numbers as float32 or wider, complex ones as pairs, since RMSprop treats the parts separately."""
    tensor = shards.shard(tensor.detach())
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor if tensor.dtype == torch.float64 else widened(tensor, torch.float32)


def _quantiles(values: Tensor, at: tuple[float, ...]) -> list[float]:
    """Return quantiles with linear interpolation; torch.quantile stops at 16 M elements and turns inf into NaN."""
    ordered = values.flatten().sort().values
    if ordered[-1].isnan():  # NaN sorts last
        return [math.nan] * len(at)
    found = []
    for q in at:
        place = q * (ordered.numel() - 1)
        below = int(place)
        left = float(ordered[below])
        right = float(ordered[min(below + 1, ordered.numel() - 1)])
        part = place - below
        found.append(left if part == 0 or left == right else left + part * (right - left))
    return found
