"""The state of a group's parameters: made where it is missing, and gathered with their gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rmsprop.bucket import STEPPED, Bucket, fresh_slot, kept
from rmsprop.settings import read
from rmsprop.sparse import called, refused
from rmsprop.spec import stream


def _unfit(group: Mapping[str, Any], i: int, p: Tensor) -> str:
    """The sentence for a parameter that has a gradient and cannot step."""
    kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in STEPPED))
    return (
        f"RMSprop steps dense parameters of {kinds}: parameter {called(group, i)} is {p.dtype} of layout {p.layout} "
        "and has a gradient; freeze it, or keep it in another dtype and layout"
    )


Made = list[tuple[Tensor, str, Tensor | None]]  # slots by parameter and name, and what they replaced


def unmake(state: Any, made: Made) -> None:
    """Take back the slots that were made for a step that was refused. Mutates: state."""
    for p, name, before in made:
        if before is not None:
            state[p][name] = before
            continue
        state[p].pop(name, None)
        if not state[p]:
            del state[p]


def fill(group: Mapping[str, Any], state: Any, into: Bucket, first: int, made: Made) -> bool:
    """Fill the bucket's lists with the parameters that have a gradient, their gradients and their slots.

    A slot is made when it is missing, one by one: trainers put some there, and momentum may begin in mid-run.

    Args:
        first: the place of the group's first parameter among all of the optimizer.
    Mutates: the bucket's lists; state, where a slot is missing, and `made`, which says where.
    Returns: whether a parameter is complex.
    Raises: RuntimeError for a parameter that cannot step, or a sparse gradient that the group does not take.
    """
    has_complex = False
    rule, _ = read(group)
    for i, p in enumerate(group["params"]):
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided and (group["sparse"] is None or not p.grad.is_sparse):
            raise RuntimeError(refused(group, i, p.grad.layout))
        if p.dtype not in STEPPED or p.layout != torch.strided:
            raise RuntimeError(_unfit(group, i, p))
        has_complex |= p.is_complex()
        own = make(group, state[p], p, kept(rule, group, p), made)
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


def make(
    group: Mapping[str, Any], own: dict[str, Any], p: Tensor, names: tuple[str, ...], made: Made
) -> dict[str, Any]:
    """Make those slots of a parameter that are missing, and a counter that goes on of one that would stop.

    Slots made in inference mode are usual tensors, which can be written after it.

    Mutates: `own`, its state, and `made`. Returns: `own`.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return make(group, own, p, names, made)
    for name in names:
        if name not in own:
            own[name] = _fresh(name, group, p)
            made.append((p, name, None))
    step = own["step"]
    if isinstance(step, Tensor) and stops(step):
        own["step"] = step.to(torch.float64)
        made.append((p, "step", step))
    return own


def _fresh(name: str, group: Mapping[str, Any], p: Tensor) -> Tensor:
    """A slot as it begins."""
    if name == "step":
        return step_tensor(0.0, p, group)
    if name == "compensation":
        return torch.zeros_like(p, memory_format=torch.preserve_format).detach()
    return fresh_slot(p, group["v_init"] if name == "square_avg" else 0.0)


def step_tensor(count: float, param: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A step counter: no dimensions, on the CPU, or with capturable on the parameter's device.

    float64, where torch's default is float32: that stops at 2²⁴, where adding 1 changes nothing, and with it stop
    random bits and bias correction. Only MPS has no float64.
    """
    device = param.device if group["capturable"] else torch.device("cpu")
    return torch.tensor(count, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def stops(step: Tensor) -> bool:
    """Whether a counter is to be replaced by one of float64, which does not stop.

    One in shared memory stays, since other processes count in it, and one on MPS, which has no float64.
    """
    if step.dtype not in (torch.float32, torch.bfloat16, torch.float16) or step.device.type == "mps":
        return False
    return not (step.is_cpu and step.is_shared())  # type: ignore[no-untyped-call]
