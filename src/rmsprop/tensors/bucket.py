"""Groups tensors that step together into buckets of one device, dtype and type; and the dtype of their arithmetic."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rmsprop.spec import NARROWED, SLOTS, Rounding, Rule, StateDtype
from rmsprop.tensors.float8 import to_float8

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

    Shapes: param[i], grad[i] and element i of each slot share one shape; step[i] has no dimensions.
    Attributes:
        slots: the state by the names and in the order of spec.SLOTS. A slot that the rule does not keep is an empty
            list. `compensation` is the Kahan remainder of half-precision parameters, in their dtype.
        foreach: True: all at once. False: one by one. None: whichever is faster for their sizes.
        capturable: do not read back from the device; step and lr stay tensors.
        differentiable: autograd records the step.
        fused: True: only a native kernel. False: no native kernel. None: chosen.
        grad_scale: loss scale of the gradients, or None if they are unscaled.
        found_inf: not 0 if a gradient overflowed on some device, so that the step is skipped; or None.
        rounding: rounding of half-precision parameters, "nearest" or "stochastic".
        state_dtype: precision of the averages between steps; below "float32" they are rounded stochastically.
        random_keys: for stochastic rounding of parameters or state, the 64 bits of each parameter from which its
            random bits are derived.
        whole: the DTensor of each shard in `param`, by the id of the shard (shards.py).
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
    state_dtype: StateDtype = "float32"
    random_keys: list[int] = field(default_factory=list)
    whole: Mapping[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slots = {name: self.slots.get(name, []) for name in SLOTS}

    def lists(self) -> tuple[list[Tensor], ...]:
        """Return the lists of parameters, gradients and every slot."""
        return (self.param, self.grad, *self.slots.values())

    def shaped(self) -> dict[str, list[Tensor]]:
        """Return the slots that have the parameter's shape, which are all but `step`."""
        return {name: values for name, values in self.slots.items() if name != "step"}

    def tensors(self) -> tuple[list[Tensor], ...]:
        """Return the lists of tensors that have the parameter's shape: parameters, gradients and slots."""
        return (self.param, self.grad, *self.shaped().values())

    def as_real(self) -> "Bucket":
        """Return complex tensors as pairs of reals in the same memory. RMSprop steps the two independently."""
        if not self.param or not self.param[0].is_complex():
            return self
        param, grad, *shaped = [[torch.view_as_real(x) for x in values] for values in self.tensors()]
        return replace(self, param=param, grad=grad, slots=self.slots | dict(zip(self.shaped(), shaped, strict=True)))

    def part(self, begin: int, end: int) -> "Bucket":
        """Return a bucket of the tensors with indices in [begin, end)."""
        return replace(
            self,
            param=self.param[begin:end],
            grad=self.grad[begin:end],
            slots={name: values[begin:end] for name, values in self.slots.items()},
            random_keys=self.random_keys[begin:end],
        )

    def chosen(self, indices: Sequence[int]) -> "Bucket":
        """Return a bucket of the tensors at these indices."""
        chosen = self.part(0, 0)
        for into, values in zip(chosen.lists(), self.lists(), strict=True):
            into.extend(values[i] for i in indices if values)
        chosen.random_keys = [self.random_keys[i] for i in indices if self.random_keys]
        return chosen

    def copy(self) -> "Bucket":
        """Return a bucket of the same gradients and copies of all other tensors."""
        slots = {name: [x.clone() for x in values] for name, values in self.slots.items()}
        return replace(self, param=[p.clone() for p in self.param], slots=slots)

    def split(self) -> Iterator["Bucket"]:
        """Yield buckets of one device, dtype and type each, in order of appearance."""
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
        """Return this bucket of one kind, without the options that its dtype does not have. Mutates: the bucket."""
        dtype = self.param[0].dtype
        if not is_half(dtype):
            self.rounding, self.slots["compensation"] = "nearest", []
        if not is_narrowable(dtype):
            self.state_dtype = "float32"
        if self.rounding == "nearest" and self.state_dtype == "float32":
            self.random_keys = []
        return self


def bucket_for(group: Mapping[str, Any], params: list[Tensor]) -> Bucket:
    """Return a bucket of these parameters, with the group's execution settings."""
    return Bucket(
        list(params),
        foreach=group["foreach"],
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        fused=group["fused"],
        rounding=group["rounding"],
        state_dtype=group["state_dtype"],
    )


def is_random(group: Mapping[str, Any]) -> bool:
    """Return whether a group's settings round stochastically, where its parameters' dtype has it."""
    return bool(group["rounding"] == "stochastic" or group["state_dtype"] != "float32")


def kind(param: Tensor) -> tuple[torch.device, torch.dtype, type]:
    """Return the properties that tensors of one bucket share. Subclasses do not mix with plain tensors."""
    family = torch.Tensor if type(param) is torch.nn.Parameter else type(param)
    return (param.device, param.dtype, family)


def dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether a layout has no gaps and no shared elements, in some order of its dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != expected:
            return 0 in shape
        expected *= size
    return True


def resolved(grad: Tensor) -> Tensor:
    """Return a gradient, copied if it is a lazy conjugate or negative view."""
    return grad.resolve_conj().resolve_neg() if grad.is_conj() or grad.is_neg() else grad


def is_half(dtype: torch.dtype) -> bool:
    """Return whether parameters of a dtype are computed in a wider one."""
    return dtype in _WIDER


def state_names(rule: Rule, group: Mapping[str, Any], half: bool) -> tuple[str, ...]:
    """Return the state keys of a parameter: the rule's slots, `ema`, and `compensation` for half precision."""
    average = ("ema",) if group["ema"] is not None else ()
    remainder = ("compensation",) if group["compensation"] and half else ()
    return (*rule.slots(), *average, *remainder)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic and the state of parameters of a dtype.

    It is float32 for half precision, where g² and ε would underflow, and otherwise the parameter's dtype.
    """
    return _WIDER.get(dtype, dtype)


def is_narrowable(dtype: torch.dtype) -> bool:
    """Return whether `state_dtype` applies to parameters of a dtype: real ones whose arithmetic is float32."""
    return arithmetic_dtype(dtype) == torch.float32


def slot_dtype(name: str, dtype: torch.dtype, state_dtype: StateDtype) -> torch.dtype:
    """Return the dtype of a slot but `step` and `compensation`, of parameters of a dtype: uint8 for float8."""
    if state_dtype == "float32" or name not in NARROWED or not is_narrowable(dtype):
        return arithmetic_dtype(dtype)
    return torch.uint8 if state_dtype == "float8" and name == "square_avg" else torch.bfloat16


def keeps(name: str, kept: torch.dtype, dtype: torch.dtype, state_dtype: StateDtype) -> bool:
    """Return whether a slot but `step` and `compensation` may be of the dtype `kept`, for parameters of a dtype."""
    if state_dtype == "float32" or name not in NARROWED or not is_narrowable(dtype):
        return kept in STEPPED and kept.is_complex == dtype.is_complex
    return kept == slot_dtype(name, dtype, state_dtype)


def fresh_slot(param: Tensor, value: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return a new state tensor of the parameter's shape, layout and device.

    Args:
        dtype: of the slot. None: the arithmetic's.
    """
    dtype = dtype or arithmetic_dtype(param.dtype)
    slot = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    if value != 0 and dtype == torch.uint8:
        slot.fill_(int(to_float8(torch.tensor(value, dtype=torch.float32))))
    elif value != 0:
        real = torch.view_as_real(slot) if slot.is_complex() else slot
        real.fill_(value if value <= torch.finfo(real.dtype).max else math.inf)
    return slot
