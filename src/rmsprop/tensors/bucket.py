"""Tensors that step together: one device, one dtype, one kind; and the dtype that they are computed in."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rmsprop.spec import SLOTS, Rounding, Rule

_WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}

# Dtypes of parameters that can have a gradient, and so can step.
STEPPED = frozenset({torch.float32, torch.float64, torch.complex64, torch.complex128, *_WIDER})


@dataclass
class Bucket:
    """Parameters of one device, dtype and tensor type, with their gradients and state, in one order.

    Shapes: param[i], grad[i] and each slot's [i] share one shape; step[i] has no dimensions.
    Attributes:
        slots: the state by the names and in the order of spec.SLOTS. A slot that the rule does not keep is an empty
            list. `compensation` is what rounding dropped from half-precision parameters, in their dtype.
        foreach: True: all at once. False: one by one. None: whichever is faster for their sizes.
        capturable: nothing may be read back from the device; step and lr stay tensors.
        differentiable: autograd records the step.
        fused: True: only a native kernel. False: no native kernel. None: chosen.
        grad_scale: the loss scale that the gradients still carry, or None.
        found_inf: the step is skipped if it is not 0, since a gradient overflowed on some device; or None.
        rounding: how half-precision parameters are rounded, "nearest" or "stochastic".
        random_keys: for stochastic rounding, 64 bits of each parameter that its random bits are derived from.
        whole: by id of a shard in `param`, the DTensor that it is a part of (shards.py).
    """

    param: list[Tensor] = field(default_factory=list)
    grad: list[Tensor] = field(default_factory=list)
    slots: dict[str, list[Tensor]] = field(default_factory=dict)
    foreach: bool | None = None
    capturable: bool = False
    differentiable: bool = False
    fused: bool | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    rounding: Rounding = "nearest"
    random_keys: list[int] = field(default_factory=list)
    whole: Mapping[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slots = {name: self.slots.get(name, []) for name in SLOTS}

    def lists(self) -> tuple[list[Tensor], ...]:
        """Its lists: parameters, gradients and every slot."""
        return (self.param, self.grad, *self.slots.values())

    def shaped(self) -> dict[str, list[Tensor]]:
        """Its slots of a parameter's shape, which are all but `step`."""
        return {name: values for name, values in self.slots.items() if name != "step"}

    def tensors(self) -> tuple[list[Tensor], ...]:
        """Its lists of tensors of a parameter's shape, parameters and gradients first."""
        return (self.param, self.grad, *self.shaped().values())

    def as_real(self) -> "Bucket":
        """Return complex tensors as pairs of reals in the same memory. RMSprop treats the two as independent."""
        if not self.param or not self.param[0].is_complex():
            return self
        param, grad, *shaped = [[torch.view_as_real(x) for x in values] for values in self.tensors()]
        return replace(self, param=param, grad=grad, slots=self.slots | dict(zip(self.shaped(), shaped, strict=True)))

    def part(self, begin: int, end: int) -> "Bucket":
        """Return the tensors from `begin` up to `end` as a bucket of their own."""
        return replace(
            self,
            param=self.param[begin:end],
            grad=self.grad[begin:end],
            slots={name: values[begin:end] for name, values in self.slots.items()},
            random_keys=self.random_keys[begin:end],
        )

    def chosen(self, indices: Sequence[int]) -> "Bucket":
        """Return the tensors at these indices as a bucket of their own."""
        chosen = self.part(0, 0)
        for into, values in zip(chosen.lists(), self.lists(), strict=True):
            into.extend(values[i] for i in indices if values)
        chosen.random_keys = [self.random_keys[i] for i in indices if self.random_keys]
        return chosen

    def copy(self) -> "Bucket":
        """Return the same gradients with copies of all else."""
        slots = {name: [x.clone() for x in values] for name, values in self.slots.items()}
        return replace(self, param=[p.clone() for p in self.param], slots=slots)

    def split(self) -> Iterator["Bucket"]:
        """The same tensors as buckets that each hold one device, dtype and type, in order of appearance."""
        first = kind(self.param[0]) if self.param else None
        if all(kind(p) == first for p in self.param):
            if self.param:
                yield self.of_its_width()
            return
        parts: dict[tuple[torch.device, torch.dtype, type], Bucket] = {}
        for i, p in enumerate(self.param):
            own = parts.setdefault(kind(p), self.part(0, 0))
            for into, values in zip(own.lists(), self.lists(), strict=True):
                into.extend(values[i : i + 1])
            own.random_keys.extend(self.random_keys[i : i + 1])
        for own in parts.values():
            yield own.of_its_width()

    def of_its_width(self) -> "Bucket":
        """This bucket of one kind; only half precision is rounded otherwise than to nearest."""
        if not is_half(self.param[0].dtype):
            self.rounding, self.random_keys, self.slots["compensation"] = "nearest", [], []
        return self


def wanted(group: Mapping[str, Any], params: list[Tensor]) -> Bucket:
    """A bucket of these parameters, with the group's wishes about how to step."""
    return Bucket(
        list(params),
        foreach=group["foreach"],
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        fused=group["fused"],
        rounding=group["rounding"],
    )


def kind(param: Tensor) -> tuple[torch.device, torch.dtype, type]:
    """What tensors must share to be in one bucket. Subclasses do not mix with plain tensors."""
    family = torch.Tensor if type(param) is torch.nn.Parameter else type(param)
    return (param.device, param.dtype, family)


def dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether every element has its own place, without gaps, in some order of the dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != expected:
            return 0 in shape
        expected *= size
    return True


def resolved(grad: Tensor) -> Tensor:
    """A gradient as its memory holds it: a copy where autograd left it conjugated or negated lazily."""
    return grad.resolve_conj().resolve_neg() if grad.is_conj() or grad.is_neg() else grad


def is_half(dtype: torch.dtype) -> bool:
    """Whether a parameter of that dtype is computed in a wider one, and may be rounded as the group asks."""
    return dtype in _WIDER


def kept(rule: Rule, group: Mapping[str, Any], half: bool) -> tuple[str, ...]:
    """The state keys that a group keeps for a parameter: the rule's, and of half precision the remainder."""
    rest = ("compensation",) if group["compensation"] and half else ()
    return (*rule.slots(), *rest)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the nine lines are computed, and the state is kept, for a parameter of that dtype.

    float32 for half precision (g² underflows there, and so does ε), else the parameter's own.
    """
    return _WIDER.get(dtype, dtype)


def fresh_slot(param: Tensor, value: float) -> Tensor:
    """A fresh state tensor: the parameter's shape, layout and device, in the arithmetic's dtype."""
    slot = torch.zeros_like(param, dtype=arithmetic_dtype(param.dtype), memory_format=torch.preserve_format)
    if value != 0:
        real = torch.view_as_real(slot) if slot.is_complex() else slot
        real.fill_(value if value <= torch.finfo(real.dtype).max else math.inf)
    return slot
