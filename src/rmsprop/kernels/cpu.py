"""Computes the nine lines by one compiled function over all tensors of a bucket: csrc/rmsprop.cpp, csrc/lines.h."""

import ctypes
import math
from collections.abc import Mapping, Sequence
from ctypes import c_double, c_int64, c_uint32, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

from rmsprop.kernels import native
from rmsprop.kernels.base import Backend
from rmsprop.kernels.refusals import count_writes, plain, refuse_call, refuse_memory, refuse_rule, refuse_slots, types
from rmsprop.spec import CLIPS, EMA_WARMUPS, EPS_MODES, GRADIENT_CLIPS, Averaging, Hyper, Rule
from rmsprop.tensors.bucket import Bucket, kind
from rmsprop.tensors.clipping import Work, clips


def refuse(rule: Rule, bucket: Bucket) -> str | None:
    """Refuse all but dense, real, separate tensors on the CPU, each with its gradient and slots in one layout."""
    reason = refuse_call(bucket) or refuse_rule(rule) or native.missing()
    if reason is None and plain(bucket) and bucket.param[0].is_cpu:
        return _refuse_rounding(bucket)  # C has validated the rest; the checks below name the reason otherwise
    reason = reason or _refuse_kind(bucket) or refuse_slots(rule, bucket)
    return reason or _refuse_rounding(bucket) or refuse_memory(bucket)


def step(rule: Rule, hyper: Hyper, bucket: Bucket) -> None:
    """Advance every tensor in the bucket by one RMSprop step, in place.

    Equation: spec.py, lines [1]-[10].
    Shapes:   param[i], grad[i] and each slot share one shape.
    Mutates:  bucket.param and the slots. Never bucket.grad.
    """
    scale = 1.0 if bucket.grad_scale is None else bucket.grad_scale.item()
    found_inf = 0.0 if bucket.found_inf is None else bucket.found_inf.item()
    advance(rule, hyper, bucket, inv_scale=1 / scale, found_inf=found_inf)


def advance(
    rule: Rule, hyper: Hyper, bucket: Bucket, *, inv_scale: float = 1.0, clip: float = 1.0, found_inf: float = 0.0
) -> None:
    """Take a step with gradients that are unscaled and clipped in the same pass.

    Args:
        inv_scale: first factor of the gradients, 1 / loss scale.
        clip: second factor of the gradients, such as min(1, max_norm / norm).
        found_inf: if not 0 (it may be a sum over devices), nothing is written and no step is counted.
    Mutates: bucket.param and the slots. Never bucket.grad.
    """
    loaded = native.load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    if not bucket.param:
        return
    work = Lists(rule, bucket)
    work.numbers(hyper, inv_scale * clip)
    _write(loaded, ctypes.byref(work.work), [bucket], float(found_inf))


def _write(loaded: native.Native, works: Any, buckets: Sequence[Bucket], found_inf: float) -> None:
    """Step the works of these buckets, unless found_inf is not 0."""
    for bucket in buckets if found_inf == 0 else ():
        count_writes(bucket.param)  # first, since a signal could interrupt between the write and its count
    code = loaded.step(works, len(buckets), found_inf, loaded.parallel_for, native.GRAIN)
    if code != 0:
        raise RuntimeError(f"torch_parallel_for failed with code {code}: the step is incomplete")


def takes_kind(rule: Rule, bucket: Bucket) -> bool:
    """Return whether the kernel takes such a step of other tensors of the bucket's kind."""
    device, dtype, family = kind(bucket.param[0])
    usual = device.type == "cpu" and family is Tensor and dtype in native.TYPES
    return usual and refuse_call(bucket) is None and refuse_rule(rule) is None and native.missing() is None


def fits(p: Tensor, grad: Tensor) -> bool:
    """Return whether a gradient has its parameter's layout, or something other than its layout is wrong with it."""
    if grad.layout != torch.strided or type(grad) is not Tensor or (grad.dtype, grad.shape) != (p.dtype, p.shape):
        return True
    return p.stride() == grad.stride() and not grad.is_neg()


def laid_out(p: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient, copied into its parameter's layout if it has another."""
    return grad if fits(p, grad) else torch.empty_like(p, requires_grad=False).copy_(grad.detach())


def clip_and_step(works: Sequence[Work]) -> float | None:
    """Advance the buckets of all groups by one step whose clipping (tensors/clipping.py) is in the same pass.

    Args:
        works: group, rule, numbers and bucket of each work. All have one loss scale and one found_inf.
    Returns: the norm that clip_global_norm bounds, before it does. None without one, or if the step was skipped.
    Mutates: parameters and slots. Never gradients.
    """
    loaded = native.load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    lists = [Lists(rule, bucket) for _, rule, _, bucket in works]
    for held, (group, _, hyper, bucket) in zip(lists, works, strict=True):
        held.numbers(hyper, 1.0 if bucket.grad_scale is None else 1 / bucket.grad_scale.item())
        held.clips(group)
        if bucket.found_inf is not None and bucket.found_inf.item() != 0:
            return None
    array = (native.Work * len(lists))(*(held.work for held in lists))
    norm = c_double(-1.0)
    if loaded.norms(ctypes.byref(array), len(array), ctypes.byref(norm), loaded.parallel_for, native.GRAIN) < 0:
        raise RuntimeError("no memory or threads for the norms of the gradients: no parameter was changed")
    _write(loaded, array, [bucket for *_, bucket in works], 0.0)
    return None if norm.value < 0 else norm.value


CPU = Backend("cpu", refuse, step)

_TYPES = ("param_type", "state_type", "other_type", "step_type", "ema_type")  # in the order of refusals.types


class Lists:
    """A bucket in the kernel's form: arrays of addresses and sizes, kept alive with their `work`."""

    def __init__(self, rule: Rule, bucket: Bucket) -> None:
        count = len(bucket.param)
        self.rule = rule
        self.size = (c_int64 * count)(*map(Tensor.numel, bucket.param))
        self.address = {
            name: (c_void_p * count)(*map(Tensor.data_ptr, values))
            for name, values in {"param": bucket.param, "grad": bucket.grad, **bucket.slots}.items()
            if values
        }
        self.end = (c_int64 * count)()
        self.correction = (c_double * count)()
        self.ema_weight = (c_double * count)()
        self.coefficient = (c_double * (2 * count))()
        self.random_key = (c_uint64 * count)(*bucket.random_keys)
        self.key = (c_uint32 * (2 * count))()
        self.work = native.Work(
            **dict(zip(_TYPES, (native.SLOT_TYPES[dtype] for dtype in types(bucket)), strict=True)),
            eps_mode=EPS_MODES.index(rule.eps_mode),
            centered=rule.centered,
            has_momentum=rule.momentum,
            nesterov=rule.nesterov,
            lr_in_buffer=rule.lr_in_buffer,
            decoupled=rule.weight_decay_mode in ("decoupled", "corrected"),
            bias_correction=rule.bias_correction,
            maximize=rule.maximize,
            stochastic=bucket.rounding == "stochastic",
            narrowed=bucket.state_dtype != "float32",
            **dict.fromkeys(CLIPS, math.inf),
            count=count,
            size=ctypes.addressof(self.size),
            end=ctypes.addressof(self.end),
            correction=ctypes.addressof(self.correction),
            ema_weight=ctypes.addressof(self.ema_weight),
            random_key=ctypes.addressof(self.random_key),
            key=ctypes.addressof(self.key),
            **{name: ctypes.addressof(values) for name, values in self.address.items()},
        )

    def clips(self, group: Mapping[str, Any]) -> None:
        """Write the group's clipping of gradients into `work`."""
        for name in GRADIENT_CLIPS:
            setattr(self.work, name, math.inf if group[name] is None else group[name])
        self.work.clip_after_decay = clips(group) and group["clip_after_decay"]
        self.work.clip_value_last = group["clip_value_last"]
        normed = group["clip_norm"] is not None or group["clip_global_norm"] is not None
        self.work.coefficient = ctypes.addressof(self.coefficient) if normed else None

    def numbers(self, hyper: Hyper, scale: float = 1.0) -> None:
        """Write the numbers of a step into `work`. A tensor lr is read here."""
        work = self.work
        work.lr, work.alpha, work.eps = float(hyper.lr), hyper.alpha, hyper.eps
        work.momentum, work.weight_decay, work.scale = hyper.momentum, float(hyper.shrinkage(self.rule)), scale
        self.bounds(hyper.max_update, hyper.clip_weights, hyper.average)

    def bounds(self, max_update: float | None, clip_weights: float | None, average: Averaging | None) -> None:
        """Write the bounds of a step and of the parameters, and the average of the weights, into `work`."""
        work = self.work
        work.cap = math.inf if max_update is None else max_update
        work.clip_weights = math.inf if clip_weights is None else clip_weights
        if average is not None:
            work.ema_decay, work.ema_start, work.ema_interval = average.decay, average.start, average.interval
            work.ema_warmup = (None, *EMA_WARMUPS).index(average.warmup)


def _refuse_kind(bucket: Bucket) -> str | None:
    """Return a reason to refuse the parameters' device, dtype or type."""
    if not bucket.param:
        return None
    device, dtype, family = kind(bucket.param[0])
    if device.type != "cpu":
        return f"the parameters are on {device}, and it computes on the CPU"
    if family is not Tensor:
        return f"the parameters are {family.__name__}, a subclass of Tensor whose memory means something else"
    if dtype not in native.TYPES:
        real = ", ".join(str(t).removeprefix("torch.") for t in native.TYPES)
        return f"the parameters are {dtype}, and it takes {real}"
    for name, values in {"parameters": bucket.param, "gradients": bucket.grad, **bucket.slots}.items():
        for x in values:
            if x.layout != torch.strided:
                return f"the {name} are {x.layout}, and it takes dense tensors"
            if x.is_neg() or not x.is_cpu or (type(x) is not Tensor and type(x) is not torch.nn.Parameter):
                return f"the {name} are not all plain tensors in CPU memory"
    if any(g.dtype != dtype for g in bucket.grad):
        return f"some gradients are not {dtype} as their parameters are"
    return None


def _refuse_rounding(bucket: Bucket) -> str | None:
    """Return a reason to refuse the rounding of half precision."""
    if not bucket.slots["compensation"] and bucket.rounding == "nearest":
        return None
    state = {x.dtype for x in bucket.slots["square_avg"][:1]}
    if bucket.state_dtype == "float32" and not state <= {torch.float32, bucket.param[0].dtype}:
        return f"the state is {state.pop()}, for which it only rounds to nearest"
    if any(c.dtype != p.dtype for p, c in zip(bucket.param, bucket.slots["compensation"], strict=False)):
        return "some remainders of compensation=True are not of their parameter's dtype"
    return None
