"""The state of a group's parameters: made where it is missing, and gathered with their gradients."""

from collections.abc import Mapping
from typing import Any

import torch

from rmsprop.bucket import Bucket, fresh_slot, is_half
from rmsprop.loading import step_tensor
from rmsprop.settings import read
from rmsprop.sparse import refused
from rmsprop.spec import stream


def fill(group: Mapping[str, Any], state: Any, into: Bucket, first: int = 0) -> bool:
    """Fill the bucket's lists with the parameters that have a gradient, their gradients and their slots.

    A slot is made when it is missing, one by one: trainers put some there, and momentum may begin in mid-run.

    Args:
        first: the place of the group's first parameter among all of the optimizer.
    Mutates: the bucket's lists; state, where a slot is missing.
    Returns: whether a parameter is complex.
    Raises: RuntimeError for a sparse gradient that the group does not take.
    """
    has_complex = False
    for i, p in enumerate(group["params"]):
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided and (group["sparse"] is None or not p.grad.is_sparse):
            raise RuntimeError(refused(group, i, p.grad.layout))
        has_complex |= p.is_complex()
        own = make(group, state[p], p)
        if "compensation" in own and not group["compensation"]:
            raise RuntimeError(
                f"compensation is False in the group of parameter {i}, whose state holds what rounding left over, "
                "a part of its value; set it back to True, or delete `compensation` from its state to go on without"
            )
        into.param.append(p)
        into.grad.append(p.grad)
        into.square_avg.append(own["square_avg"])
        into.step.append(own["step"])
        if group["momentum"] != 0:
            into.momentum_buffer.append(own["momentum_buffer"])
        if group["centered"]:
            into.grad_avg.append(own["grad_avg"])
        if group["compensation"]:
            into.compensation.append(own.get("compensation", p))  # Bucket.split drops what stands for nothing
        if group["rounding"] == "stochastic":
            into.streams.append(stream(group["seed"], first + i))
    return has_complex


def make(group: Mapping[str, Any], own: dict[str, Any], p: torch.Tensor) -> dict[str, Any]:
    """Make the slots of a parameter that are missing. Mutates: `own`, its state. Returns: it."""
    if "step" not in own:
        own["step"] = step_tensor(0.0, p, group)
    if "square_avg" not in own:
        own["square_avg"] = fresh_slot(p, group["v_init"])
    if group["momentum"] != 0 and "momentum_buffer" not in own:
        own["momentum_buffer"] = fresh_slot(p, 0.0)
    if group["centered"] and "grad_avg" not in own:
        own["grad_avg"] = fresh_slot(p, 0.0)
    if group["compensation"] and is_half(p.dtype) and "compensation" not in own:
        own["compensation"] = torch.zeros_like(p, memory_format=torch.preserve_format).detach()
    return own


def kept(group: Mapping[str, Any], p: torch.Tensor) -> tuple[str, ...]:
    """The state keys that the group keeps for a parameter."""
    half = ("compensation",) if group["compensation"] and is_half(p.dtype) else ()
    return (*read(group)[0].slots(), *half)
