"""The numbers of a launch of the Triton kernel that bound gradients, and those that average the weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rmsprop.spec import Hyper, Rule
from rmsprop.tensors.clipping import clips


@dataclass(frozen=True)
class Bounds:
    """The clipping of a group's gradients (tensors/clipping.py), as a launch takes it.

    Attributes:
        coefficients: two factors of each gradient on the device, or None without norms: triton_norms.py.
        value: clip_value before the factors.
        last: clip_value after them.
        after_decay: whether [1] comes before clipping.
        clips: whether the group clips at all.
    """

    coefficients: Tensor | None = None
    value: float = math.inf
    last: float = math.inf
    after_decay: bool = False
    clips: bool = False

    @classmethod
    def of(cls, group: Mapping[str, Any], coefficients: Tensor | None) -> "Bounds":
        """Return those of a group, whose factors are in these coefficients."""
        if not clips(group):
            return NONE
        value = math.inf if group["clip_value"] is None else float(group["clip_value"])
        first, last = (math.inf, value) if group["clip_value_last"] else (value, math.inf)
        return cls(coefficients, first, last, bool(group["clip_after_decay"]), clips=True)

    def early(self, rule: Rule, hyper: Hyper) -> float:
        """Return the weight decay of [1] that comes before clipping."""
        return hyper.weight_decay if self.after_decay and rule.weight_decay_mode == "l2" else 0.0

    def kind(self, rule: Rule, capped: bool) -> str | None:
        """Return how a launch clips. As in the CPU kernel, a factor joins the scale if nothing comes between."""
        if not self.clips:
            return None
        between = capped or min(self.value, self.last) < math.inf
        return "whole" if between or (self.after_decay and rule.weight_decay_mode == "l2") else "scaled"


NONE = Bounds()


def averaging(hyper: Hyper) -> tuple[float, float, float]:
    """Return the numbers of [10]. No counter on a device reaches 2⁵³."""
    if hyper.average is None:
        return 0.0, 0.0, 1.0
    return hyper.average.decay, float(min(hyper.average.start, 2**53)), float(min(hyper.average.interval, 2**53))
