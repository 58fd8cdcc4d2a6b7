"""Makes missing state of a group's parameters, and gathers parameters, gradients and state into a bucket."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from rmsprop.printing import shown
from rmsprop.settings import read
from rmsprop.spec import NARROWED, random_key
from rmsprop.tensors.bucket import (
    STEPPED,
    Bucket,
    arithmetic_dtype,
    dense,
    fresh_slot,
    is_half,
    is_random,
    keeps,
    resolved,
    slot_dtype,
    state_names,
)
from rmsprop.tensors.names import parameter_name
from rmsprop.tensors.params import shares_elements
from rmsprop.tensors.sparse import refused

_PLAIN = (Tensor, torch.nn.Parameter)


def _unfit(group: Mapping[str, Any], i: int, p: Tensor) -> str:
    """Return the message for a parameter that has a gradient and cannot step."""
    kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in STEPPED))
    return (
        f"RMSprop steps dense parameters of {kinds}: parameter {parameter_name(group, i)} is {p.dtype} of layout "
        f"{p.layout} and has a gradient; freeze it, or keep it in another dtype and layout"
    )


Made = list[tuple[Tensor, str, Any]]  # parameter, slot name, and the value that the new slot replaced or None


def unmake(state: Any, made: Made) -> None:
    """Remove the slots that were made for a step that was then refused. Mutates: state."""
    for p, name, before in made:
        if before is not None:
            state[p][name] = before
            continue
        state[p].pop(name, None)
        if not state[p]:
            del state[p]


def _entry(state: Any, p: Tensor) -> Any:
    """Return the state of a parameter. A dict that the user put in the place of torch's makes none by itself."""
    try:
        return state[p]
    except KeyError:
        state[p] = {}
        return state[p]


def fill(group: Mapping[str, Any], state: Any, into: Bucket, first: int, made: Made) -> bool:
    """Fill the bucket's lists with the parameters that have a gradient, their gradients and their slots.

    Each missing slot is made by itself: trainers may provide some slots, and momentum may begin in mid-run.

    Args:
        first: the index of the group's first parameter among all parameters of the optimizer.
    Mutates: the bucket's lists. Also state and `made`, which lists the new slots.
    Returns: whether a parameter is complex.
    Raises: RuntimeError for a parameter that cannot step, or a sparse gradient that the group does not accept.
    """
    has_complex = False
    rule, _ = read(group)
    names = {half: state_names(rule, group, half) for half in (False, True)}
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
                f"parameter {parameter_name(group, i)} is conjugated lazily, so a step cannot write it as pairs of "
                "reals; give its resolve_conj()"
            )
        has_complex |= p.is_complex()
        own: Any = state[p] if compiling else _entry(state, p)
        if type(own) is not dict and not isinstance(own, Mapping):
            raise RuntimeError(
                f"the state of parameter {parameter_name(group, i)} is {shown(own)}, but it must be a dict of "
                "tensors by name; replace it, or delete it from optimizer.state to start fresh"
            )
        if "step" in own and not compiling:
            _count(group, i, own, p, made)
        make(group, own, p, names[is_half(p.dtype)], made)
        if "compensation" in own and not group["compensation"]:
            raise RuntimeError(
                f"compensation is False in the group of parameter {i}, but the parameter's state holds a Kahan "
                "remainder, which is part of its value; set it back to True, or delete `compensation` from its state"
            )
        into.param.append(p)
        into.grad.append(resolved(grad))
        for name in names[False]:
            into.slots[name].append(own[name])
        if group["compensation"]:
            into.slots["compensation"].append(own.get("compensation", p))  # Bucket.split drops it where p is not half
        if is_random(group):
            into.random_keys.append(random_key(group["seed"], first + i))
    return has_complex


def _count(group: Mapping[str, Any], i: int, own: Any, p: Tensor, made: Made) -> None:
    """Replace a plain count, such as `state[p]["step"] = 0`, by a tensor.

    Mutates: `own` and `made`.
    Raises: RuntimeError for a value that is not a count.
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
            f"step of parameter {parameter_name(group, i)} is {shown(step)}, but it must be a count of steps: a "
            "number >= 0, or a tensor of one, such as torch.tensor(0.0)"
        )
    own["step"] = step_tensor(float(count), p, group)
    made.append((p, "step", step))


def check(group: Mapping[str, Any], bucket: Bucket) -> None:
    """Refuse edited state that cannot step.

    `refusals.plain` accepts plain tensors in C. This function checks all other tensors, and words the message.

    Args:
        bucket: tensors of one kind, with shards in place of DTensors.
    Raises: RuntimeError, which names the parameter.
    """
    for k, p in enumerate(bucket.param):
        own = {name: values[k] for name, values in bucket.slots.items() if values}
        for name, x in own.items():
            fault = _fault(name, x, p, bucket)
            if fault is not None:
                label = _label(group, bucket.whole.get(id(p), p))
                if fault == _OTHER_PRECISION:
                    codes = ", the codes of state_dtype='float8'" if x.dtype == torch.uint8 else ""
                    raise RuntimeError(
                        f"{name} of parameter {label} is {x.dtype}{codes}, but state_dtype={group['state_dtype']!r} "
                        f"of its group keeps it in {slot_dtype(name, p.dtype, bucket.state_dtype)}; set state_dtype "
                        "back, or convert the state: "
                        "optimizer.load_state_dict(optimizer.state_dict(full_precision=True))"
                    )
                expected = f"a dense {_dtype(name, p, bucket)} tensor of shape {tuple(p.shape)} on {p.device}"
                expected = "a tensor of one number" if name == "step" else expected
                raise RuntimeError(
                    f"{name} of parameter {label} is {fault}, but it must be {expected}, in its own memory; replace "
                    "it, or delete it from the parameter's state to start fresh"
                )


_OTHER_PRECISION = "of another state_dtype"


def _fault(name: str, x: Any, p: Tensor, bucket: Bucket) -> str | None:
    """Return why a slot cannot step. None if it can."""
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
        fits = keeps(name, x.dtype, p.dtype, bucket.state_dtype)
        if not fits and name in NARROWED and (bucket.state_dtype != "float32" or x.dtype == torch.uint8):
            return _OTHER_PRECISION
    if not fits:
        return f"of {x.dtype}"
    if x._is_zerotensor() or x.is_neg() or x.is_conj():
        return "a lazy view (of zeros, or negated or conjugated when it is read)"
    if not x.is_contiguous() and not dense(x.shape, x.stride()) and shares_elements(x):
        return f"a view whose elements share memory (strides {x.stride()})"
    if bucket.differentiable and x.requires_grad and x.is_leaf:
        return "a leaf that requires grad, which differentiable=True cannot write"
    return None


def _dtype(name: str, p: Tensor, bucket: Bucket) -> str:
    dtype = p.dtype if name == "compensation" else slot_dtype(name, p.dtype, bucket.state_dtype)
    return str(dtype).removeprefix("torch.")


def _label(group: Mapping[str, Any], p: Tensor) -> str:
    """Return the name of a parameter of the group, or its index."""
    return next((parameter_name(group, i) for i, own in enumerate(group["params"]) if own is p), "of its group")


def check_apart(parts: Sequence[tuple[Mapping[str, Any], Bucket]], plain: bool) -> None:
    """Refuse a slot that shares memory with another slot or a parameter, of any group.

    Args:
        plain: whether each bucket is known to have no tensors that overlap.
    Raises: RuntimeError, which names both tensors.
    """
    if plain and len(parts) > 1:
        written = [x for _, bucket in parts for values in (bucket.param, *bucket.slots.values()) for x in values]
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
        for name, values in {"": bucket.param, **bucket.slots}.items():
            held = [(k, x.data_ptr(), x.nbytes) for k, x in enumerate(values)]
            spans += [(begin, begin + size, i, k, name) for k, begin, size in held if size]
    spans.sort()
    found = []
    for before, after in pairwise(spans):
        (begin, end), next_begin, one, other = before[:2], after[0], before[2:], after[2:]
        if next_begin >= end or not (one[2] or other[2]):  # parameters may be views of one another
            continue
        if begin != next_begin and not all(_is_dense(parts[i][1], k, name) for i, k, name in (one, other)):
            continue  # strided views may interleave without sharing elements
        found.append(tuple(sorted((one, other), key=lambda own: (not own[2], own[:2]))))
    if found:
        slot, its = min(found)
        if slot[2] == its[2] and parts[slot[0]][1].param[slot[1]] is parts[its[0]][1].param[its[1]]:
            twice = _called(parts, *slot[:2], "")
            raise RuntimeError(
                f"{twice} is listed twice in the groups, so one step would move it twice; list it once"
            )
        raise RuntimeError(
            f"{_called(parts, *slot)} shares memory with {_called(parts, *its)}, so one step would write it twice; "
            "give each a tensor of its own (clone), or delete the slot from the state to start it fresh"
        )


def _is_dense(bucket: Bucket, k: int, name: str) -> bool:
    x = (bucket.slots[name] if name else bucket.param)[k]
    return dense(x.shape, x.stride())


def _called(parts: Sequence[tuple[Mapping[str, Any], Bucket]], i: int, k: int, name: str) -> str:
    group, bucket = parts[i]
    p = bucket.param[k]
    owner = f"parameter {_label(group, bucket.whole.get(id(p), p))}"
    return f"{name} of {owner}" if name else owner


def make(group: Mapping[str, Any], own: Any, p: Tensor, names: tuple[str, ...], made: Made) -> Any:
    """Make the missing slots of a parameter, and replace a step counter that would stop.

    Slots made in inference mode are normal tensors, so that later steps can write them.

    Mutates: `own`, the parameter's state, and `made`.
    Returns: `own`.
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
    """Return a slot's initial value."""
    if name == "step":
        return step_tensor(0.0, p, group)
    if name == "compensation":
        return torch.zeros_like(p, memory_format=torch.preserve_format).detach()
    if name == "ema":
        return p.detach().to(arithmetic_dtype(p.dtype), copy=True)
    dtype = slot_dtype(name, p.dtype, group["state_dtype"])
    return fresh_slot(p, group["square_avg_init"] if name == "square_avg" else 0.0, dtype)


def step_tensor(count: float, param: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return a step counter without dimensions, on the CPU, or on the parameter's device if capturable.

    It is float64 (float32 on MPS). torch's float32 counter stops at 2²⁴, where adding 1 changes nothing, and then
    random bits and bias correction stop changing too.
    """
    device = param.device if group["capturable"] else torch.device("cpu")
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if count == 0:  # three times as fast
        return torch.zeros((), dtype=dtype, device=device)
    return torch.tensor(count, dtype=dtype, device=device)


def stops(step: Tensor) -> bool:
    """Return whether a counter would stop, and is to be replaced by one of float64.

    Counters in shared memory stay, since other processes count in them, as do those on MPS, which has no float64.
    """
    if step.dtype not in (torch.float32, torch.bfloat16, torch.float16) or step.device.type == "mps":
        return False
    return not (step.is_cpu and step.is_shared())  # type: ignore[no-untyped-call]
