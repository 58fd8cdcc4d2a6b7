"""Facts about a parameter group that checks rest on: its settings, its readings, and its optimizer's history."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from rmsprop import analysis
from rmsprop.diagnose.readings import DECADES, Reading, peak_lr
from rmsprop.spec import Hyper, Nonfinite, Rule
from rmsprop.tensors.bucket import arithmetic_dtype

FEW = 0.1  # of all elements


@dataclass(frozen=True)
class Detour:
    """A parameter whose memory layout, or that of its gradient or state, costs something on the CPU.

    Attributes:
        name: of the parameter.
        reason: the compiled kernel's.
        copied: whether a copy of the gradient is enough. Otherwise torch operations step the parameter.
    """

    name: str
    reason: str
    copied: bool = False


@dataclass(frozen=True)
class History:
    """An optimizer's history, which groups, gradients and state do not show.

    Attributes:
        backend, nonfinite: its settings of these names.
        idle: the number of last steps in which no parameter had a gradient.
        begun: the momentum that each group began with, and whether others had stepped by then; empty if not known.
        kept: the index of a group, and the name of a parameter in it, whose gradients are never zeroed, or None.
    """

    backend: str = "auto"
    nonfinite: Nonfinite = "propagate"
    idle: int = 0
    begun: Sequence[tuple[float, bool]] = ()
    kept: tuple[int, str] | None = None


@dataclass(frozen=True)
class Facts:
    """A parameter group with everything that checks use.

    Attributes:
        index: the group's.
        unreachable: whether no parameter of the optimizer can have a gradient.
        detours: the parameters whose memory layout costs the compiled kernel something.
        oldest: the largest number of steps that any parameter of the optimizer has taken.
        run: the number of steps in the whole run, if the caller passes it.
    """

    group: Mapping[str, Any]
    rule: Rule
    hyper: Hyper
    tensors: Sequence[Reading]
    oldest: int
    run: int | None
    index: int = 0
    history: History = History()
    unreachable: bool = False
    detours: Sequence[Detour] = ()

    @cached_property
    def lr(self) -> float:
        """The size of the current learning rate, which a schedule may take below 0."""
        return abs(analysis.number(self.hyper.lr))

    @property
    def descends(self) -> bool:
        """Return whether the current learning rate is 0 or above."""
        return analysis.number(self.hyper.lr) >= 0

    @cached_property
    def peak(self) -> float:
        """The size of the largest learning rate that the group is known to take."""
        return peak_lr(self.group, self.lr)

    @property
    def begun(self) -> float | None:
        """The momentum that the group began with, or None if it is not known."""
        return self.history.begun[self.index][0] if self.index < len(self.history.begun) else None

    @property
    def late(self) -> bool:
        """Return whether the group was added to a run in progress."""
        return self.index < len(self.history.begun) and self.history.begun[self.index][1]

    @cached_property
    def matrices(self) -> list[Reading]:
        """The weights: tensors of two or more axes. Biases start at 0, so every step is long beside them."""
        return [x for x in self.tensors if len(x.shape) > 1 and x.sums["param_squares"] > 0]

    @cached_property
    def weight(self) -> float:
        """The root mean square of all weights; 0 if there are none."""
        elements = sum(x.elements for x in self.matrices)
        return math.sqrt(sum(x.sums["param_squares"] for x in self.matrices) / elements) if elements else 0.0

    @cached_property
    def eps_limited(self) -> bool:
        """Return whether a large ε keeps the steps short."""
        return analysis.most(self.rule, self.hyper) <= analysis.GUARDED

    @cached_property
    def calm_lr(self) -> float:
        """A learning rate, at most the current one, whose first and steady steps are a tenth of the weights."""
        first, steady = analysis.first_step(self.rule, self.hyper), analysis.steady_step(self.rule, self.hyper)
        longest = max(steady, 1.0 if math.isinf(first) else first)
        return min(self.lr, 0.09 * self.weight / longest if self.weight else math.inf)

    def keeps(self, lr: float) -> bool:
        """Return whether half precision keeps steps of this size."""
        return lr >= 1.5 * self.weight * max((self.unit(x) for x in self.matrices), default=0.0)

    def unit(self, x: Reading) -> float:
        """Return the spacing of half-precision numbers around 1; 0 where steps are kept more precisely."""
        kept = self.group.get("rounding") == "stochastic" or self.group.get("compensation")
        return 0.0 if kept or arithmetic_dtype(x.dtype) == x.dtype else torch.finfo(x.dtype).eps

    @cached_property
    def fitting_eps(self) -> float:
        """The largest power of ten below a tenth of nearly every √v (of v, where ε stands inside)."""
        decades = [sum(x.decades[k] for x in self.tensors if x.decades) for k in range(DECADES)]
        smaller = sum(decades)
        for k, count in enumerate(decades):
            smaller -= count
            if smaller <= FEW * sum(decades):
                return float(f"1e-{k + (4 if self.rule.eps_mode in ('inside', 'both') else 2)}")
        return 1.0

    def total(self, name: str) -> float:
        """Return one of the sums of `Reading`, over all tensors."""
        return sum(x.sums[name] for x in self.tensors)

    def share(self, part: str, whole: str) -> float:
        """Return one sum over the tensors as a share of another."""
        total = self.total(whole)
        return self.total(part) / total if total else 0.0

    def worst(self, part: str, whole: str) -> str:
        """Return the name of the tensor with the largest share."""
        return max((x for x in self.tensors if x.sums[whole]), key=lambda x: x.sums[part] / x.sums[whole]).name
