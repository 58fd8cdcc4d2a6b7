"""Moves state into shared memory, so that several processes step the same parameters and averages without locks.

Source: Mnih et al., arXiv:1602.01783, "shared RMSProp"; Recht et al., Hogwild, NIPS 2011.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from rmsprop.settings import read
from rmsprop.spec import NARROWED
from rmsprop.state.slots import make
from rmsprop.tensors.bucket import fresh_slot, is_half, keeps, slot_dtype, state_names
from rmsprop.tensors.float8 import converted
from rmsprop.tensors.forked import serial_after_fork
from rmsprop.tensors.names import parameter_name

_TOO_LATE = (
    "a new tensor would be private to this process: share_memory() makes the state that the settings need when it is "
    "called; call it again after such a change, before the other processes start"
)


@serial_after_fork
def share(optimizer: Optimizer) -> None:
    """Make all state of the optimizer, and move it into shared memory. See RMSprop.share_memory.

    Mutates: the state, and a tensor lr. Tensors stay the same objects.
    Raises: ValueError, before anything changes, for parameters that are not in shared memory.
    """
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            if p.requires_grad:
                _refuse(p, parameter_name(group, i))
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            _move(group["lr"])
        for p in group["params"]:
            if p.requires_grad:
                make(group, optimizer.state[p], p, state_names(read(group)[0], group, is_half(p.dtype)), [])
    for tensor in _tensors(optimizer.state):
        _move(tensor)


def shared(optimizer: Optimizer) -> bool:
    """Return whether all of the optimizer's state is in shared memory."""
    return all(tensor.is_shared() for tensor in _tensors(optimizer.state))


def refuse_new(group: Mapping[str, Any], state: Any) -> None:
    """Refuse a step that would make state outside shared memory.

    Raises: RuntimeError, before anything changes.
    """
    rule, _ = read(group)
    for i, p in enumerate(group["params"]):
        lacking = (
            []
            if p.grad is None
            else [slot for slot in state_names(rule, group, is_half(p.dtype)) if slot not in state.get(p, {})]
        )
        if lacking:
            raise RuntimeError(
                f"parameter {parameter_name(group, i)} has no {lacking[0]} in shared memory, and {_TOO_LATE}"
            )


def refuse_other_precision(optimizer: Optimizer) -> None:
    """Refuse a load after state_dtype has changed: the other processes would keep the tensors of the old dtype.

    Raises: RuntimeError, before anything changes.
    """
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            for name, x in optimizer.state.get(p, {}).items():
                if name in NARROWED and not keeps(name, x.dtype, p.dtype, group["state_dtype"]):
                    needed = slot_dtype(name, p.dtype, group["state_dtype"])
                    raise RuntimeError(
                        f"{name} of parameter {parameter_name(group, i)} is {x.dtype} in shared memory, but "
                        f"state_dtype={group['state_dtype']!r} needs {needed}, which other processes would not see; "
                        "set state_dtype back, or build a new optimizer before the processes start"
                    )


def keep(optimizer: Optimizer, before: Mapping[Any, Mapping[str, Any]]) -> None:
    """Write loaded state into the shared tensors of before, and make them the state again.

    Slots that the loaded state lacks start fresh, in place.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            for name, tensor in before.get(p, {}).items():
                own = optimizer.state[p]
                if own.get(name) is not tensor and isinstance(tensor, Tensor):
                    start = torch.zeros_like(tensor)
                    if name == "square_avg":
                        start = fresh_slot(p, group["square_avg_init"], tensor.dtype)
                    tensor.copy_(converted(own.get(name, start), tensor.dtype))
                    own[name] = tensor
            if p.requires_grad:
                make(group, optimizer.state[p], p, state_names(read(group)[0], group, is_half(p.dtype)), [])
    for tensor in _tensors(optimizer.state):
        _move(tensor)


def _move(tensor: Any) -> None:
    """Move a tensor into shared memory, in place. A no-op for shared tensors and tensors on a GPU."""
    tensor.share_memory_()


def _tensors(state: Mapping[Any, Mapping[str, Any]]) -> list[Any]:
    return [value for entry in state.values() for value in entry.values() if isinstance(value, Tensor)]


def _refuse(p: Any, name: str) -> None:
    """Refuse a parameter that is not in shared memory, or whose gradient is."""
    if is_lazy(p):
        raise ValueError(f"parameter {name} has no shape yet: run the model once before share_memory()")
    if not p.is_shared():
        raise ValueError(
            f"parameter {name} is not in shared memory, so each process would step its own copy: call "
            "model.share_memory() first, then optimizer.share_memory()"
        )
    if p.is_cpu and p.grad is not None and p.grad.is_shared():
        raise ValueError(
            f"the gradient of parameter {name} is in shared memory, where model.share_memory() puts it, so "
            "processes would overwrite each other's gradients: call optimizer.zero_grad() first"
        )
