"""The state of a group's parameters: made where it is missing, and gathered with their gradients."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from rmsprop.printing import shown
from rmsprop.settings import read
from rmsprop.spec import SLOTS, random_key
from rmsprop.tensors.bucket import (
    STEPPED,
    Bucket,
    arithmetic_dtype,
    dense,
    fresh_slot,
    is_half,
    kept,
    resolved,
)
from rmsprop.tensors.params import shares_elements
from rmsprop.tensors.sparse import called, refused

_PLAIN = (Tensor, torch.nn.Parameter)


def _unfit(group: Mapping[str, Any], i: int, p: Tensor) -> str:
    """The sentence for a parameter that has a gradient and cannot step."""
    kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in STEPPED))
    return (
        f"RMSprop steps dense parameters of {kinds}: parameter {called(group, i)} is {p.dtype} of layout {p.layout} "
        "and has a gradient; freeze it, or keep it in another dtype and layout"
    )


Made = list[tuple[Tensor, str, Any]]  # slots by parameter and name, and what they replaced or None


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
    names = {half: kept(rule, group, half) for half in (False, True)}
    compiling = torch.compiler.is_compiling()
    for i, p in enumerate(group["params"]):
        grad = p.grad
        if grad is None:
            continue
        if grad.layout != torch.strided and (group["sparse"] is None or not grad.is_sparse):
            raise RuntimeError(refused(group, i, grad.layout))
        if p.dtype not in STEPPED or p.layout != torch.strided:
            raise RuntimeError(_unfit(group, i, p))
        if p.is_conj():
            raise RuntimeError(
                f"parameter {called(group, i)} is conjugated lazily, which no step can write as pairs of reals; give "
                "its resolve_conj()"
            )
        has_complex |= p.is_complex()
        own: Any = state[p]
        if type(own) is not dict and not isinstance(own, Mapping):
            raise RuntimeError(
                f"the state of parameter {called(group, i)} is {shown(own)}, and it must be a dict of tensors by "
                "name; put one there, or delete it from optimizer.state to begin afresh"
            )
        if "step" in own and not compiling:
            _count(group, i, own, p, made)
        make(group, own, p, names[is_half(p.dtype)], made)
        if "compensation" in own and not group["compensation"]:
            raise RuntimeError(
                f"compensation is False in the group of parameter {i}, whose state holds what rounding left over, "
                "a part of its value; set it back to True, or delete `compensation` from its state to go on without"
            )
        into.param.append(p)
        into.grad.append(resolved(grad))
        into.square_avg.append(own["square_avg"])
        into.step.append(own["step"])
        if group["momentum"] != 0:
            into.momentum_buffer.append(own["momentum_buffer"])
        if group["centered"]:
            into.grad_avg.append(own["grad_avg"])
        if group["compensation"]:
            into.compensation.append(own.get("compensation", p))  # Bucket.split drops what stands for nothing
        if group["rounding"] == "stochastic":
            into.random_keys.append(random_key(group["seed"], first + i))
    return has_complex


def _count(group: Mapping[str, Any], i: int, own: Any, p: Tensor, made: Made) -> None:
    """Make a counter of a plain count, such as `state[p]["step"] = 0`. Mutates: `own` and `made`.

    Raises: RuntimeError for what is not a count.
    """
    step = own["step"]
    if isinstance(step, Tensor):
        fits = step.numel() == 1 and step.layout == torch.strided and not step.is_meta and not step.is_complex()
        if fits and (step.is_floating_point() or not step.is_cpu):
            return
        count = step.item() if fits else None
    else:
        count = step
    if isinstance(count, bool) or not isinstance(count, Real) or not 0 <= count < 2**53:
        raise RuntimeError(
            f"step of parameter {called(group, i)} is {shown(step)}, and it must be a count of steps: a number >= 0, "
            "or a tensor of one, such as torch.tensor(0.0)"
        )
    own["step"] = step_tensor(float(count), p, group)
    made.append((p, "step", step))


def check(group: Mapping[str, Any], bucket: Bucket) -> None:
    """Refuse state that was edited and cannot step. bucket: of one kind, with shards in the place of DTensors.

    One look in C passes plain tensors; this puts in words what it found, and checks tensors of other kinds.

    Raises: RuntimeError, which names the parameter.
    """
    for k, p in enumerate(bucket.param):
        own = {name: values[k] for name, values in zip(SLOTS, bucket.slots(), strict=True) if values}
        for name, x in own.items():
            wrong = _wrong(name, x, p, bucket.differentiable)
            if wrong is not None:
                where = _place(group, bucket.whole.get(id(p), p))
                wants = f"a dense {_dtype(name, p)} tensor of shape {tuple(p.shape)} on {p.device}, in its own memory"
                wants = "a tensor of one number in its own memory" if name == "step" else wants
                raise RuntimeError(
                    f"{name} of parameter {where} is {wrong}, and it must be {wants}; put such a tensor there, or "
                    "delete it from the parameter's state to begin afresh"
                )


def _wrong(name: str, x: Any, p: Tensor, recorded: bool) -> str | None:
    """In words, why a slot cannot step; None where it can."""
    if not isinstance(x, Tensor):
        return shown(x)
    if name != "step" and x.shape != p.shape:
        return f"of shape {tuple(x.shape)}"
    elsewhere = x.is_meta and not p.is_meta if name == "step" else x.device != p.device
    if x.layout != torch.strided or elsewhere:
        return f"of layout {x.layout} on {x.device}"
    if name == "step":
        fits = x.is_floating_point()
    elif name == "compensation":
        fits = x.dtype == p.dtype
    else:
        fits = x.dtype in STEPPED and x.is_complex() == p.is_complex()
    if not fits:
        return f"of {x.dtype}"
    if x._is_zerotensor() or x.is_neg() or x.is_conj():
        return "a lazy view, of zeros or of what is negated or conjugated when it is read"
    if not x.is_contiguous() and not dense(x.shape, x.stride()) and shares_elements(x):
        return f"a view whose elements share memory (strides {x.stride()})"
    if recorded and x.requires_grad and x.is_leaf:
        return "a leaf that requires grad, which differentiable=True cannot write"
    return None


def _dtype(name: str, p: Tensor) -> str:
    dtype = p.dtype if name == "compensation" else arithmetic_dtype(p.dtype)
    return str(dtype).removeprefix("torch.")


def _place(group: Mapping[str, Any], p: Tensor) -> str:
    """The name of a parameter of the group, or its place."""
    return next((called(group, i) for i, own in enumerate(group["params"]) if own is p), "of its group")


def check_apart(parts: Sequence[tuple[Mapping[str, Any], Bucket]], plain: bool) -> None:
    """Refuse a slot that shares memory with another slot or a parameter, of any group.

    plain: whether each bucket is known to be apart in itself, and no two of its tensors begin at one address.
    Raises: RuntimeError, which names both.
    """
    if plain and len(parts) > 1:
        written = [x for _, bucket in parts for values in (bucket.param, *bucket.slots()) for x in values]
        begins = [begin for begin in map(Tensor.data_ptr, written) if begin]
        plain = len(set(begins)) == len(begins)
    if plain:
        return
    spans: list[tuple[int, int, int, int, str]] = []
    for i, (_, bucket) in enumerate(parts):
        if (
            bucket.differentiable
            or not bucket.param
            or type(bucket.param[0]) not in _PLAIN
            or bucket.param[0].is_meta
        ):
            continue
        for name, values in zip(("", *SLOTS), (bucket.param, *bucket.slots()), strict=True):
            held = [(k, x.data_ptr(), x.nbytes) for k, x in enumerate(values)]
            spans += [(begin, begin + size, i, k, name) for k, begin, size in held if size]
    spans.sort()
    found = []
    for before, after in pairwise(spans):
        (begin, end), next_begin, one, other = before[:2], after[0], before[2:], after[2:]
        if next_begin >= end or not (one[2] or other[2]):  # parameters may be views of one another
            continue
        if begin != next_begin and not all(_is_dense(parts[i][1], k, name) for i, k, name in (one, other)):
            continue  # they may lie between each other's elements
        found.append(tuple(sorted((one, other), key=lambda own: (not own[2], own[:2]))))
    if found:
        slot, its = min(found)
        if slot[2] == its[2] and parts[slot[0]][1].param[slot[1]] is parts[its[0]][1].param[its[1]]:
            twice = _called(parts, *slot[:2], "")
            raise RuntimeError(
                f"{twice} is listed twice in the groups, and one step would take it twice; list it once"
            )
        raise RuntimeError(
            f"{_called(parts, *slot)} shares memory with {_called(parts, *its)}, and one step would write it twice; "
            "give each a tensor of its own (clone), or delete the slot from the state to begin it afresh"
        )


def _is_dense(bucket: Bucket, k: int, name: str) -> bool:
    x = getattr(bucket, name or "param")[k]
    return dense(x.shape, x.stride())


def _called(parts: Sequence[tuple[Mapping[str, Any], Bucket]], i: int, k: int, name: str) -> str:
    group, bucket = parts[i]
    p = bucket.param[k]
    owner = f"parameter {_place(group, bucket.whole.get(id(p), p))}"
    return f"{name} of {owner}" if name else owner


def make(group: Mapping[str, Any], own: Any, p: Tensor, names: tuple[str, ...], made: Made) -> Any:
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
    return fresh_slot(p, group["square_avg_init"] if name == "square_avg" else 0.0)


def step_tensor(count: float, param: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A step counter: no dimensions, on the CPU, or with capturable on the parameter's device.

    float64, where torch's default is float32: that stops at 2²⁴, where adding 1 changes nothing, and with it stop
    random bits and bias correction. Only MPS has no float64.
    """
    device = param.device if group["capturable"] else torch.device("cpu")
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if count == 0:  # three times as fast
        return torch.zeros((), dtype=dtype, device=device)
    return torch.tensor(count, dtype=dtype, device=device)


def stops(step: Tensor) -> bool:
    """Whether a counter is to be replaced by one of float64, which does not stop.

    One in shared memory stays, since other processes count in it, and one on MPS, which has no float64.
    """
    if step.dtype not in (torch.float32, torch.bfloat16, torch.float16) or step.device.type == "mps":
        return False
    return not (step.is_cpu and step.is_shared())  # type: ignore[no-untyped-call]
