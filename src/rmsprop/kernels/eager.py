"""Computes the nine lines in plain torch: any device, any dtype, complex, differentiable, inside torch.compile."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmsprop.kernels import rounding
from rmsprop.kernels.base import Backend
from rmsprop.spec import NARROWED, Hyper, Rule
from rmsprop.tensors.averaging import finish
from rmsprop.tensors.bucket import Bucket, arithmetic_dtype, kind
from rmsprop.tensors.float8 import widened

Lists = list[Tensor]

# Elements per foreach call on a CPU: its temporaries, as large as the parameters, then stay within a megabyte.
_CPU_CHUNK = 1 << 18

_LARGEST = torch.finfo(torch.float32).max

# Devices on which torch itself prefers foreach over a loop.
_FOREACH_DEVICES = ("cuda", "xpu")


def refuse(_rule: Rule, bucket: Bucket) -> str | None:
    """Refuse only contradictory settings; eager steps every dense tensor."""
    if bucket.fused and not torch.compiler.is_compiling():  # a compiler fuses the operators itself
        return "fused=True requires a native kernel, and this is plain torch; leave fused as None"
    if bucket.foreach and bucket.differentiable:
        return "foreach=True keeps no autograd graph; with differentiable=True leave foreach as None or False"
    if bucket.differentiable and bucket.grad and not torch.compiler.is_compiling():
        leaf = next((i for i, p in enumerate(bucket.param) if p.is_leaf and p.requires_grad), None)
        if leaf is not None:
            return (
                f"differentiable=True writes parameter {leaf} of the bucket in place, but it is a leaf that requires "
                "grad, which autograd does not allow; give its clone()"
            )
    return None


def step(rule: Rule, hyper: Hyper, bucket: Bucket) -> None:
    """Advance every tensor in the bucket by one RMSprop step, in place.

    Equation: spec.py, lines [1]-[10].
    Shapes:   param[i], grad[i] and each slot share one shape.
    Mutates:  bucket.param and the slots. Never bucket.grad.
    """
    if not bucket.param:
        return
    found_inf, compiling = bucket.found_inf, torch.compiler.is_compiling()
    # reading found_inf would break a compiler's graph and recompile it at every step
    stays = found_inf is not None and (compiling or (bucket.capturable and not found_inf.is_cpu))
    if bucket.found_inf is not None and not stays and bucket.found_inf.item() != 0:
        return
    if bucket.grad_scale is not None:
        bucket = replace(bucket, grad=_unscaled(bucket), grad_scale=None)
    if stays:
        _advance_unless(rule, hyper, bucket)
        return
    place = bucket.param[0].device.type, kind(bucket.param[0])[2]
    recorded = bucket.differentiable or (torch.compiler.is_compiling() and not _together(bucket, *place))
    advance = _advance_recorded if recorded else _advance
    _count(bucket.slots["step"])
    for part in parts(bucket, *place):
        advance(rule, hyper, part.as_real())


def _advance_unless(rule: Rule, hyper: Hyper, bucket: Bucket) -> None:
    """Take a step that is skipped if found_inf on the device is not 0.

    The step is taken on copies, which then replace the originals or not: one tensor at a time, to limit their memory.
    """
    assert bucket.found_inf is not None
    skip = bucket.found_inf.to(bucket.param[0].device, non_blocking=True) != 0
    for i in range(len(bucket.param)):
        own = replace(bucket.part(i, i + 1), found_inf=None)
        tried = own.copy()
        step(rule, hyper, tried)
        for old, new in zip(own.lists(), tried.lists(), strict=True):
            if old and old is not own.grad:
                old[0].copy_(torch.where(skip, old[0], new[0]))


EAGER = Backend("eager", refuse, step)


def _unscaled(bucket: Bucket) -> Lists:
    """Return the gradients divided by the loss scale, in new tensors."""
    assert bucket.grad_scale is not None
    scale = bucket.grad_scale.to(bucket.param[0].device, non_blocking=True)
    return [g.to(arithmetic_dtype(g.dtype)) / scale for g in bucket.grad]


def _together(bucket: Bucket, device: str, family: type) -> bool:
    """Return whether foreach steps the whole bucket at once: as requested, or as torch does on the device."""
    if bucket.foreach is not None or bucket.differentiable:
        return bool(bucket.foreach)
    return device in _FOREACH_DEVICES and family is Tensor


def parts(bucket: Bucket, device: str, family: type) -> Iterator[Bucket]:
    """Yield the bucket in parts that step one after the other, each at once.

    Args:
        device, family: the device's type and the tensors' type, which tensors on the meta device may stand for.
    """
    if _together(bucket, device, family):
        yield bucket
        return
    count = len(bucket.param)
    chunked = bucket.foreach is None and device == "cpu" and family is Tensor and not bucket.differentiable
    if not chunked or torch.compiler.is_compiling():
        for i in range(count):
            yield bucket.part(i, i + 1)
        return
    begin = held = 0
    for i, size in enumerate([param.numel() for param in bucket.param]):
        if i > begin and held + size > _CPU_CHUNK:
            yield bucket.part(begin, i)
            begin, held = i, 0
        held += size
    yield bucket if begin == 0 else bucket.part(begin, count)


class Ops(NamedTuple):
    """The operations of a step, for lists of tensors or for one tensor, so that one body serves both."""

    neg: Any
    add: Any
    add_: Any
    mul: Any
    mul_: Any
    sign: Any
    sub_: Any
    div: Any
    sqrt: Any
    sqrt_: Any
    lerp_: Any
    clamp_min_: Any
    addcmul: Any
    addcmul_: Any
    addcdiv_: Any


_LISTS = Ops(*(getattr(torch, f"_foreach_{name}") for name in Ops._fields))
_ONE = Ops(*(getattr(Tensor, name) for name in Ops._fields))


def _advance(rule: Rule, hyper: Hyper, part: Bucket) -> None:
    """Compute the nine lines in place, with as few temporaries as torch's own optimizer."""
    dtype = arithmetic_dtype(part.param[0].dtype)
    averages = [part.slots[name] for name in NARROWED]
    wide = [_widened(values, dtype) for values in (part.param, part.grad, *averages)]
    if part.slots["compensation"]:
        wide[0] = [rounding.whole(p, c) for p, c in zip(part.param, part.slots["compensation"], strict=True)]
    one = len(part.param) == 1
    do = _ONE if one else _LISTS
    p, g, v, m, b = ((values[0] if one and values else values) for values in wide)
    alpha, eps, mu = hyper.alpha, _held(hyper.eps, dtype), hyper.momentum
    lr = _held(_learning_rate(hyper.lr, part.capturable or torch.compiler.is_compiling()), dtype)
    wd = _held(replace(hyper, lr=lr).shrinkage(rule), dtype)
    # [1] decay: out of place, since the gradients are the user's
    if rule.maximize:
        g = do.neg(g)
    if hyper.weight_decay != 0:
        if rule.weight_decay_mode == "l2":
            g = do.add(g, p, alpha=wd)
        elif rule.weight_decay_mode == "l1":
            g = do.add(g, do.sign(p), alpha=wd)
        else:
            do.mul_(p, _held(1 - lr * wd, dtype))
    # [2] second moment
    spikes = None if hyper.max_update is None else _Spikes(v, one)
    do.mul_(v, alpha)
    do.addcmul_(v, g, g, value=1 - alpha)
    entering = g if spikes is None else spikes.bound(hyper, v, g, rule.centered)
    # [3] first moment
    if rule.centered:
        do.lerp_(m, entering, 1 - alpha)
    # [4] bias
    vh, mh = v, m
    if rule.bias_correction:
        c = _corrections(part, alpha, dtype)
        vh = do.div(v, c[0] if one else c)
        mh = do.div(m, c[0] if one else c) if rule.centered else m
    # [5] variance
    w = vh
    if rule.centered:
        w = do.addcmul(vh, mh, mh, value=-1)
        do.clamp_min_(w, 0)  # the difference may round below zero
    # [6] denominator
    if rule.eps_mode in ("inside", "both"):
        d = do.add(w, eps)
        do.sqrt_(d)
    elif w is v:
        d = do.sqrt(w)
    else:
        do.sqrt_(w)
        d = w
    if rule.eps_mode == "floor":
        do.clamp_min_(d, eps)
    elif rule.eps_mode != "inside":
        do.add_(d, eps)
    # [7] direction: g/d, formed where it is used
    if _vanishes(eps, dtype):
        for gi, di in zip((g,) if one else g, (d,) if one else d, strict=True):
            di.masked_fill_((gi == 0) & (di == 0), 1)  # 0/0 is 0
    if isinstance(lr, Tensor) or spikes is not None:
        _move_by_tensor(do, rule, lr, hyper.max_update, mu, p, g, d, b)
    elif not rule.momentum:
        # [9] parameter
        do.addcdiv_(p, g, d, value=-lr)
    else:
        # [8] momentum
        in_buffer, out = (lr, 1.0) if rule.lr_in_buffer else (1.0, lr)
        do.mul_(b, mu)
        do.addcdiv_(b, g, d, value=in_buffer)
        # [9] parameter
        if rule.nesterov:
            do.addcdiv_(p, g, d, value=-lr)
            do.add_(p, b, alpha=-out * mu)
        else:
            do.add_(p, b, alpha=-out)
    _store(part, wide[0], wide[2:], hyper)


class _Spikes:
    """The bound of [2] and [3] under max_update: v at most doubles where it is not 0."""

    def __init__(self, v: Any, one: bool) -> None:
        self.one, self.most = one, [x * 2 for x in ((v,) if one else v)]

    def bound(self, hyper: Hyper, v: Any, g: Any, centered: bool) -> Any:
        """Bound v. Mutates: v. Returns: the gradients that enter [3]."""
        entering = []
        for most, x, grad in zip(self.most, (v,) if self.one else v, (g,) if self.one else g, strict=True):
            spike = (x > most) & (most > 0) & grad.isfinite()
            x.copy_(torch.where(spike, most, x))
            if centered:
                largest = (hyper.carried() * (most / 2).sqrt()).copysign(grad)
                entering.append(torch.where(spike, largest, grad))
        return entering[0] if self.one and centered else entering or g


def _move_by_tensor(
    do: Ops, rule: Rule, lr: float | Tensor, cap: float | None, mu: float, p: Any, g: Any, d: Any, b: Any
) -> None:
    """Compute [7]-[9] with an explicit direction, for a tensor lr or a bounded step."""
    u = do.div(g, d)
    if cap is not None:
        u = _within(cap, u)
    if rule.momentum:
        # [8] momentum
        if rule.lr_in_buffer:
            do.mul_(u, lr)
        do.mul_(b, mu)
        do.add_(b, u)
        if rule.nesterov:
            do.add_(u, b, alpha=mu)
        else:
            u = b
        if cap is not None:
            u = _within(cap * lr if rule.lr_in_buffer else cap, u)
    # [9] parameter
    do.sub_(p, u if rule.momentum and rule.lr_in_buffer else do.mul(u, lr))


def _within(bound: Any, u: Any) -> Any:
    """Return u with each element bounded to ±bound, a number or a tensor of one, of any sign. NaN stays."""
    bound = abs(bound)  # a schedule may take lr below 0
    return u.clamp(-bound, bound) if isinstance(u, Tensor) else [x.clamp(-bound, bound) for x in u]


def _store(part: Bucket, params: Lists, averages: Sequence[Lists], hyper: Hyper) -> None:
    """Write the results back, each rounded once to its storage dtype as the bucket asks, and advance [10].

    Args:
        averages: the new values of the slots of NARROWED; an empty list where the rule keeps none.
    """
    kept, remainders = [part.slots[name] for name in NARROWED], part.slots["compensation"]
    narrowed = part.state_dtype != "float32"
    if not narrowed:
        for into, worked in zip(kept, averages, strict=True):
            _narrow(into, worked)
    if part.rounding == "nearest" and not remainders and not narrowed:
        _narrow(part.param, params)
    else:
        for i, (p, x) in enumerate(zip(part.param, params, strict=True)):  # one tensor's random bits at a time
            random = rounding.bits_of(part, i) if part.random_keys else None
            if narrowed:
                assert random is not None
                for name, own, worked in zip(NARROWED, kept, averages, strict=True):
                    if own:
                        rounding.write_state(own[i], worked[i], random, name)
            if x is not p:
                drawn = random if part.rounding == "stochastic" else None
                rounding.write(p, x, remainders[i] if remainders else None, drawn)
    # [10] average
    finish(hyper, part)


def _advance_recorded(rule: Rule, hyper: Hyper, part: Bucket) -> None:
    """Compute the nine lines out of place, since autograd needs the values and a compiler fuses the operators."""
    dtype = arithmetic_dtype(part.param[0].dtype)
    g, v = part.grad[0].to(dtype), widened(part.slots["square_avg"][0], dtype)
    p = part.param[0].to(dtype, copy=True)  # overwritten below, but the derivative with respect to lr may need it
    if part.slots["compensation"]:
        p = rounding.whole(part.param[0], part.slots["compensation"][0])
    alpha, eps, mu = hyper.alpha, hyper.eps, hyper.momentum
    lr = hyper.lr.reshape(()) if isinstance(hyper.lr, Tensor) else hyper.lr
    wd = replace(hyper, lr=lr).shrinkage(rule)
    # [1] decay
    if rule.maximize:
        g = -g
    if hyper.weight_decay != 0:
        if rule.weight_decay_mode == "l2":
            g = g + wd * p
        elif rule.weight_decay_mode == "l1":
            g = g + wd * p.sign()
        else:
            p = p * (1 - lr * wd)
    # [2] second moment
    before, entering, cap = v, g, hyper.max_update
    v = alpha * v + (1 - alpha) * g * g
    if cap is not None:
        spike = (v > 2 * before) & (before > 0) & g.isfinite()
        v = torch.where(spike, 2 * before, v)
        root = torch.where(spike, before, 1.0).sqrt()
        entering = torch.where(spike, (hyper.carried() * root).copysign(g), g)
    # [3] first moment
    m = b = v
    if rule.centered:
        m = alpha * part.slots["grad_avg"][0].to(dtype) + (1 - alpha) * entering
    # [4] bias
    c = _corrections(part, alpha, dtype)[0] if rule.bias_correction else 1.0
    # [5] variance
    w = (v / c - (m / c) ** 2).clamp(min=0) if rule.centered else v / c
    # [6] denominator: the derivative of the root, infinite at 0, is taken as 0 there
    x = w + eps if rule.eps_mode in ("inside", "both") else w
    d = torch.where(x == 0, 0.0, torch.where(x == 0, 1.0, x).sqrt())
    if rule.eps_mode == "floor":
        d = d.clamp(min=eps)
    elif rule.eps_mode != "inside":
        d = d + eps
    # [7] direction
    u = g / torch.where((g == 0) & (d == 0), 1.0, d)
    u = u if cap is None else u.clamp(-cap, cap)
    if rule.momentum:
        # [8] momentum
        if rule.lr_in_buffer:
            u = lr * u
        b = mu * part.slots["momentum_buffer"][0].to(dtype) + u
        u = u + mu * b if rule.nesterov else b
        if cap is not None:
            u = _within(cap * lr if rule.lr_in_buffer else cap, u)
    # [9] parameter
    moved = p - u if rule.momentum and rule.lr_in_buffer else p - lr * u
    _store(part, [moved], [[v], [m] if rule.centered else [], [b] if rule.momentum else []], hyper)


def _learning_rate(lr: float | Tensor, on_device: bool) -> float | Tensor:
    """Return the learning rate as a float, or as a tensor if the step must not read it back from the device."""
    if not isinstance(lr, Tensor):
        return lr
    return lr.reshape(()) if on_device else lr.item()


def _count(steps: Lists) -> None:
    """Increment the step counters in place."""
    if steps[0].is_cpu and not torch.compiler.is_compiling():
        # one shared tensor, since foreach would wrap the number 1 for each counter
        torch._foreach_add_(steps, torch.tensor(1.0, dtype=steps[0].dtype, device="cpu"), alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)


def _corrections(part: Bucket, alpha: float, dtype: torch.dtype) -> Sequence[float | Tensor]:
    """Return 1 − αᵗ of [4] for each tensor: in Python double, or on the device by expm1, exact near t = 0."""
    steps, compiling = part.slots["step"], torch.compiler.is_compiling()
    if not (part.capturable or compiling):
        return [1 - alpha ** t.item() for t in steps]
    if alpha == 0:
        return [1.0] * len(steps)
    device = part.param[0].device
    # a compiler would specialize its graph to the value of math.log
    log: Any = steps[0].new_full((), alpha).to(device).log() if compiling else math.log(alpha)
    return [-torch.expm1(t.to(device, dtype) * log) for t in steps]


def _held(number: Any, dtype: torch.dtype) -> Any:
    """Return a number, or infinity if the arithmetic's dtype overflows, which torch refuses to round."""
    if dtype != torch.float32 or isinstance(number, Tensor) or -_LARGEST <= number <= _LARGEST:
        return number
    return math.copysign(math.inf, number) if number == number else number


def _vanishes(eps: float, dtype: torch.dtype) -> bool:
    """Return whether ε may be 0 in the arithmetic's dtype, so that a denominator can be 0."""
    if eps > 1e-37:  # a normal number in every dtype
        return False
    return eps == 0 or dtype == torch.float32


def _widened(values: Lists, dtype: torch.dtype) -> Lists:
    """Return the list itself if all tensors have the arithmetic's dtype, else copies in it."""
    if all(x.dtype == dtype for x in values):
        return values
    return [widened(x, dtype) for x in values]


def _narrow(kept: Lists, worked: Lists) -> None:
    """Write the results back, rounded once to their storage dtype."""
    if worked is not kept:
        for x, y in zip(kept, worked, strict=True):
            if y is not x:
                x.copy_(y)
