"""The nine lines in plain torch: any device, any dtype, complex, differentiable, inside torch.compile."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rmsprop.bucket import Bucket, arithmetic_dtype, kind
from rmsprop.kernels.base import Backend
from rmsprop.spec import Hyper, Rule

Lists = list[Tensor]
Scales = Sequence[float | Tensor]

# Elements that foreach may hold at once on a CPU: its temporaries (the size of the parameters) stay in a core's
# cache. Beyond it one tensor at a time is faster (bench/eager.py).
_CPU_CHUNK = 1 << 15

# Devices on which torch itself prefers foreach over a loop.
_FOREACH_DEVICES = ("cuda", "xpu")


def refuse(_rule: Rule, bucket: Bucket) -> str | None:
    """Eager takes every dense tensor, unless a native kernel was asked for."""
    if bucket.fused:
        return "fused=True asks for a native kernel, and this is plain torch; leave fused as None"
    if bucket.foreach and bucket.differentiable:
        return "foreach=True keeps no autograd graph; with differentiable=True leave foreach as None or False"
    return None


def step(rule: Rule, hyper: Hyper, bucket: Bucket) -> None:
    """Advance every tensor in the bucket by one RMSprop step, in place.

    Equation: spec.py, lines [1]-[9].
    Shapes:   param[i], grad[i] and each slot share one shape.
    Mutates:  bucket.param and the slots. Never bucket.grad.
    """
    for part in _parts(bucket):
        recorded = part.differentiable or (torch.compiler.is_compiling() and not _together(bucket))
        advance = _advance_recorded if recorded else _advance
        advance(rule, hyper, part.as_real())


EAGER = Backend("eager", refuse, step)


def _together(bucket: Bucket) -> bool:
    """Whether the whole bucket goes through foreach at once: as asked, or as torch would on that device."""
    if bucket.foreach is not None or bucket.differentiable:
        return bool(bucket.foreach)
    return bucket.param[0].device.type in _FOREACH_DEVICES and kind(bucket.param[0])[2] is Tensor


def _parts(bucket: Bucket) -> Iterator[Bucket]:
    """The bucket in pieces that are best advanced together."""
    count = len(bucket.param)
    if count == 0:
        return
    if _together(bucket):
        yield bucket
        return
    device, _, family = kind(bucket.param[0])
    chunked = bucket.foreach is None and device.type == "cpu" and family is Tensor and not bucket.differentiable
    if not chunked or torch.compiler.is_compiling():
        for i in range(count):
            yield bucket.part(i, i + 1)
        return
    begin = held = 0
    for i, param in enumerate(bucket.param):
        size = param.numel()
        if i > begin and held + size > _CPU_CHUNK:
            yield bucket.part(begin, i)
            begin, held = i, 0
        held += size
    yield bucket.part(begin, count)


def _advance(rule: Rule, hyper: Hyper, part: Bucket) -> None:
    """The nine lines over lists, in place, with as few temporaries as torch's own."""
    dtype = arithmetic_dtype(part.param[0].dtype)
    p, g, v, m, b = (_widened(values, dtype) for values in part.tensors())
    alpha, eps, mu, wd = hyper.alpha, hyper.eps, hyper.momentum, hyper.weight_decay
    on_device = part.capturable or torch.compiler.is_compiling()
    lr = _learning_rate(hyper.lr, on_device)
    _count(part.step)
    # [1] decay: into new lists, since the gradients are the user's
    if rule.maximize:
        g = list(torch._foreach_neg(g))
    if wd != 0:
        if rule.weight_decay_mode == "l2":
            g = list(torch._foreach_add(g, p, alpha=wd))
        else:
            torch._foreach_mul_(p, 1 - lr * wd)
    # [2] second moment
    torch._foreach_mul_(v, alpha)
    torch._foreach_addcmul_(v, g, g, value=1 - alpha)
    # [3] first moment
    if rule.centered:
        torch._foreach_lerp_(m, g, 1 - alpha)
    # [4] bias
    vh, mh = v, m
    if rule.bias_correction:
        c = _corrections(part.step, alpha, dtype, on_device)
        vh = _divided(v, c)
        mh = _divided(m, c) if rule.centered else m
    # [5] variance
    w = vh
    if rule.centered:
        w = list(torch._foreach_addcmul(vh, mh, mh, value=-1.0))
        torch._foreach_clamp_min_(w, 0)  # the difference may round below zero
    # [6] denominator
    if rule.eps_mode in ("inside", "both"):
        d = list(torch._foreach_add(w, eps))
        torch._foreach_sqrt_(d)
    else:
        d = list(torch._foreach_sqrt(w))
    if rule.eps_mode == "floor":
        torch._foreach_clamp_min_(d, eps)
    elif rule.eps_mode != "inside":
        torch._foreach_add_(d, eps)
    # [7] direction: g/d, formed where it is used
    if _vanishes(eps, dtype):
        for gi, di in zip(g, d, strict=True):
            di.masked_fill_((gi == 0) & (di == 0), 1)  # 0/0 is 0
    if isinstance(lr, Tensor):
        _move_by_tensor(rule, lr, mu, p, g, d, b)
    elif not rule.momentum:
        # [9] parameter
        torch._foreach_addcdiv_(p, g, d, value=-lr)
    elif rule.lr_in_buffer:
        # [8] momentum
        torch._foreach_mul_(b, mu)
        torch._foreach_addcdiv_(b, g, d, value=lr)
        if rule.nesterov:
            torch._foreach_addcdiv_(p, g, d, value=-lr)
        # [9] parameter
        torch._foreach_add_(p, b, alpha=-mu if rule.nesterov else -1)
    else:
        # [8] momentum
        torch._foreach_mul_(b, mu)
        torch._foreach_addcdiv_(b, g, d)
        if rule.nesterov:
            torch._foreach_addcdiv_(p, g, d, value=-lr)
        # [9] parameter
        torch._foreach_add_(p, b, alpha=-lr * mu if rule.nesterov else -lr)
    for kept, worked in ((part.param, p), (part.square_avg, v), (part.grad_avg, m), (part.momentum_buffer, b)):
        _narrow(kept, worked)


def _move_by_tensor(rule: Rule, lr: Tensor, mu: float, p: Lists, g: Lists, d: Lists, b: Lists) -> None:
    """[7]-[9] with a learning rate that stays on the device: no scalar argument can hold it."""
    u = list(torch._foreach_div(g, d))
    if rule.momentum:
        # [8] momentum
        if rule.lr_in_buffer:
            torch._foreach_mul_(u, lr)
        torch._foreach_mul_(b, mu)
        torch._foreach_add_(b, u)
        if rule.nesterov:
            torch._foreach_add_(u, b, alpha=mu)
        else:
            u = b
    # [9] parameter
    if rule.momentum and rule.lr_in_buffer:
        torch._foreach_sub_(p, u)
    else:
        torch._foreach_sub_(p, torch._foreach_mul(u, lr))


def _advance_recorded(rule: Rule, hyper: Hyper, part: Bucket) -> None:
    """The nine lines out of place, for autograd, which needs the values unedited, and for a compiler, which fuses them."""
    dtype = arithmetic_dtype(part.param[0].dtype)
    p, g, v = (x[0].to(dtype) for x in (part.param, part.grad, part.square_avg))
    alpha, eps, mu, wd = hyper.alpha, hyper.eps, hyper.momentum, hyper.weight_decay
    lr = hyper.lr.reshape(()) if isinstance(hyper.lr, Tensor) else hyper.lr
    _count(part.step)
    # [1] decay
    if rule.maximize:
        g = -g
    if wd != 0:
        if rule.weight_decay_mode == "l2":
            g = g + wd * p
        else:
            p = p * (1 - lr * wd)
    # [2] second moment
    v = alpha * v + (1 - alpha) * g * g
    part.square_avg[0].copy_(v)
    # [3] first moment
    m = v
    if rule.centered:
        m = alpha * part.grad_avg[0].to(dtype) + (1 - alpha) * g
        part.grad_avg[0].copy_(m)
    # [4] bias
    on_device = part.capturable or torch.compiler.is_compiling()
    c = _corrections(part.step, alpha, dtype, on_device)[0] if rule.bias_correction else 1.0
    # [5] variance
    w = (v / c - (m / c) ** 2).clamp(min=0) if rule.centered else v / c
    # [6] denominator: the derivative of the root is infinite at 0, and taken as 0 there
    x = w + eps if rule.eps_mode in ("inside", "both") else w
    d = torch.where(x == 0, 0.0, torch.where(x == 0, 1.0, x).sqrt())
    if rule.eps_mode == "floor":
        d = d.clamp(min=eps)
    elif rule.eps_mode != "inside":
        d = d + eps
    # [7] direction
    u = g / torch.where((g == 0) & (d == 0), 1.0, d)
    if rule.momentum:
        # [8] momentum
        if rule.lr_in_buffer:
            u = lr * u
        b = mu * part.momentum_buffer[0].to(dtype) + u
        part.momentum_buffer[0].copy_(b)
        u = u + mu * b if rule.nesterov else b
    # [9] parameter
    part.param[0].copy_(p - u if rule.momentum and rule.lr_in_buffer else p - lr * u)


def _learning_rate(lr: float | Tensor, on_device: bool) -> float | Tensor:
    """A float, unless the step must not read it back from the device."""
    if not isinstance(lr, Tensor):
        return lr
    return lr.reshape(()) if on_device else float(lr)


def _count(steps: Lists) -> None:
    """step ← step + 1."""
    if steps[0].is_cpu and not torch.compiler.is_compiling():
        # one shared tensor: foreach would wrap the number 1 anew for each of them
        torch._foreach_add_(steps, torch.tensor(1.0), alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)


def _corrections(steps: Lists, alpha: float, dtype: torch.dtype, on_device: bool) -> Scales:
    """[4] 1 − αᵗ for each tensor: in Python double, or on the device through expm1, exact near t = 0."""
    if not on_device:
        return [1 - alpha ** t.item() for t in steps]
    if alpha == 0:
        return [1.0] * len(steps)
    log = math.log(alpha)
    return [-torch.expm1(t.to(dtype) * log) for t in steps]


def _divided(values: Lists, by: Scales) -> Lists:
    """values[i] / by[i], as new tensors."""
    return [x / c for x, c in zip(values, by, strict=True)]


def _vanishes(eps: float, dtype: torch.dtype) -> bool:
    """Whether ε is 0 in the arithmetic's dtype, so that a denominator can be 0."""
    if eps > 1e-37:  # a normal number in every dtype
        return False
    return eps == 0 or dtype == torch.float32


def _widened(values: Lists, dtype: torch.dtype) -> Lists:
    """The list itself where all have the arithmetic's dtype already, else a list of copies that do."""
    if all(x.dtype == dtype for x in values):
        return values
    return [x.to(dtype) for x in values]


def _narrow(kept: Lists, worked: Lists) -> None:
    """Write the results back, rounded once to the dtype they are kept in."""
    if worked is not kept:
        for x, y in zip(kept, worked, strict=True):
            if y is not x:
                x.copy_(y)
