"""The nine lines as one compiled function over all tensors of a bucket: csrc/rmsprop.cpp, csrc/lines.h."""

import ctypes
from ctypes import c_double, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rmsprop.kernels import native
from rmsprop.kernels.base import Backend
from rmsprop.spec import EPS_MODES, SLOTS, Hyper, Rule
from rmsprop.tensors.bucket import Bucket, dense, kind


def refuse(rule: Rule, bucket: Bucket) -> str | None:
    """Dense, real, separate tensors on the CPU, each with its gradient and slots in one layout."""
    asked = refuse_call(bucket) or refuse_rule(rule) or native.missing()
    if asked is None and plain(bucket) and bucket.param[0].is_cpu:
        return _refuse_rounding(bucket)  # one look in C found no other reason, which would be put in words below
    asked = asked or _refuse_kind(bucket) or refuse_slots(rule, bucket)
    return asked or _refuse_rounding(bucket) or refuse_memory(bucket)


def step(rule: Rule, hyper: Hyper, bucket: Bucket) -> None:
    """Advance every tensor in the bucket by one RMSprop step, in place.

    Equation: spec.py, lines [1]-[9].
    Shapes:   param[i], grad[i] and each slot share one shape.
    Mutates:  bucket.param and the slots. Never bucket.grad.
    """
    scale = 1.0 if bucket.grad_scale is None else bucket.grad_scale.item()
    found_inf = 0.0 if bucket.found_inf is None else bucket.found_inf.item()
    advance(rule, hyper, bucket, inv_scale=1 / scale, found_inf=found_inf)


def advance(
    rule: Rule, hyper: Hyper, bucket: Bucket, *, inv_scale: float = 1.0, clip: float = 1.0, found_inf: float = 0.0
) -> None:
    """`step`, with what a gradient scaler and a clipped norm bring, in the same pass.

    Args:
        inv_scale: gradients are multiplied by it first: 1 / loss scale.
        clip: and by this, such as min(1, max_norm / norm).
        found_inf: if it is not 0 (it may be a sum over devices) nothing is written and no step is counted.
    Mutates: bucket.param and the slots. Never bucket.grad.
    """
    loaded = native.load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    if not bucket.param:
        return
    work = Lists(rule, bucket)
    work.numbers(hyper, inv_scale * clip)
    if found_inf == 0:
        count_writes(bucket.param)  # before: a signal after the write would leave one that autograd does not know of
    code = loaded.step(ctypes.byref(work.work), 1, float(found_inf), loaded.parallel_for, native.GRAIN)
    if code != 0:
        raise RuntimeError(f"torch_parallel_for failed with code {code}: the step is incomplete")


CPU = Backend("cpu", refuse, step)


class Lists:
    """A bucket as the kernel takes it: arrays of addresses and sizes, kept alive with their `work`."""

    def __init__(self, rule: Rule, bucket: Bucket) -> None:
        count = len(bucket.param)
        self.rule = rule
        self.size = (c_int64 * count)(*map(Tensor.numel, bucket.param))
        self.address = {
            name: (c_void_p * count)(*map(Tensor.data_ptr, values))
            for name, values in zip(("param", "grad", *SLOTS), bucket.lists(), strict=True)
            if values
        }
        self.end = (c_int64 * count)()
        self.correction = (c_double * count)()
        self.random_key = (c_uint64 * count)(*bucket.random_keys)
        self.key = (c_uint32 * (2 * count))()
        self.work = native.Work(
            param_type=native.TYPES[bucket.param[0].dtype],
            state_type=native.TYPES[bucket.square_avg[0].dtype],
            step_type=native.TYPES[bucket.step[0].dtype],
            eps_mode=EPS_MODES.index(rule.eps_mode),
            centered=rule.centered,
            has_momentum=rule.momentum,
            nesterov=rule.nesterov,
            lr_in_buffer=rule.lr_in_buffer,
            decoupled=rule.weight_decay_mode in ("decoupled", "corrected"),
            bias_correction=rule.bias_correction,
            maximize=rule.maximize,
            stochastic=bool(bucket.random_keys),
            count=count,
            size=ctypes.addressof(self.size),
            end=ctypes.addressof(self.end),
            correction=ctypes.addressof(self.correction),
            random_key=ctypes.addressof(self.random_key),
            key=ctypes.addressof(self.key),
            **{name: ctypes.addressof(values) for name, values in self.address.items()},
        )

    def numbers(self, hyper: Hyper, scale: float = 1.0) -> None:
        """Write today's numbers; a tensor lr is read here."""
        work = self.work
        work.lr, work.alpha, work.eps = float(hyper.lr), hyper.alpha, hyper.eps
        work.momentum, work.weight_decay, work.scale = hyper.momentum, float(hyper.shrinkage(self.rule)), scale
        work.cap = hyper.cap


def count_writes(params: list[Tensor]) -> None:
    """Tell autograd that the parameters were written, as an operator of torch would.

    Without it a backward pass through values from before the step would be silently wrong.
    """
    torch.autograd.graph.increment_version([p for p in params if not p.is_inference()])


def refuse_call(bucket: Bucket) -> str | None:
    """Reasons that lie in how the step was asked for."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing, and cannot look into a compiled library"
    if bucket.fused is False:
        return "fused=False asks for no native kernel"
    if bucket.foreach is not None and not (bucket.fused and bucket.foreach is False):  # torchtitan says both
        return f"foreach={bucket.foreach} asks for torch's own operators; leave it None"
    if bucket.differentiable:
        return "differentiable=True needs a step that autograd records, and a compiled one is opaque to it"
    if in_mode():
        return "a TorchDispatchMode is active, and would not see a compiled step"
    return None


def refuse_rule(rule: Rule) -> str | None:
    """Reasons that lie in the rule."""
    if rule.weight_decay_mode == "l1":
        return 'weight_decay_mode="l1" is for torch\'s own operators: the compiled kernels have no sign of p'
    return None


def plain(bucket: Bucket) -> bool:
    """Whether all of a bucket's tensors are plain, of dtypes that kernels take, each parameter's in one dense layout,
    and apart in memory; False also where that cannot be seen from C.
    """
    loaded = native.load()
    if isinstance(loaded, str) or not bucket.square_avg or not bucket.grad:
        return False
    host = native.host(bucket.param[0].device)
    dtypes: list[Any] = [getattr(x[0], "dtype", None) for x in (bucket.param, bucket.square_avg, bucket.step)]
    if host is None or any(dtype not in native.TYPES for dtype in dtypes):
        return False
    if dtypes[1] not in (torch.float32, torch.float64, dtypes[0]) or dtypes[2] not in (torch.float32, torch.float64):
        return False
    lists = (c_void_p * native.TENSORS)(*(id(values) if values else None for values in bucket.lists()))
    found = (c_int32 * 4)(*kinds(loaded, bucket))
    types = (c_int32 * 3)(*(native.TYPES[dtype] for dtype in dtypes))
    spans = (c_int64 * (12 * len(bucket.param)))()
    return bool(loaded.plain(ctypes.addressof(host), lists, len(bucket.param), found, types, spans))


def kinds(loaded: native.Native, bucket: Bucket) -> list[int]:
    """torch's codes of the dtypes of a bucket's parameters, state and steps, and the index of their device or -1."""
    codes = [loaded.dtype_codes[values[0].dtype] for values in (bucket.param, bucket.square_avg, bucket.step)]
    index = bucket.param[0].device.index
    return [*codes, -1 if index is None else index]


def in_mode() -> bool:
    """Whether some TorchDispatchMode watches every operator."""
    return bool(torch._C._len_torch_dispatch_stack())


def _refuse_kind(bucket: Bucket) -> str | None:
    """Reasons that lie in what the parameters are."""
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
    names = ("parameters", "gradients", *SLOTS[:3], "steps", "remainders")
    for name, values in zip(names, bucket.lists(), strict=True):
        for x in values:
            if x.layout != torch.strided:
                return f"the {name} are {x.layout}, and it takes dense tensors"
            if x.is_neg() or not x.is_cpu or (type(x) is not Tensor and type(x) is not torch.nn.Parameter):
                return f"the {name} are not all plain tensors in CPU memory"
    if any(g.dtype != dtype for g in bucket.grad):
        return f"some gradients are not {dtype} as their parameters are"
    return None


def _refuse_rounding(bucket: Bucket) -> str | None:
    """Reasons that lie in how half precision is to be rounded."""
    if not bucket.compensation and bucket.rounding == "nearest":
        return None
    if bucket.square_avg and bucket.square_avg[0].dtype not in (torch.float32, bucket.param[0].dtype):
        return f"the state is {bucket.square_avg[0].dtype}, beside which it rounds to nearest only"
    if any(c.dtype != p.dtype for p, c in zip(bucket.param, bucket.compensation, strict=False)):
        return "some remainders of compensation=True are not of their parameter's dtype"
    return None


def refuse_slots(rule: Rule, bucket: Bucket) -> str | None:
    """Reasons that lie in the state."""
    if not bucket.square_avg:
        return None
    dtype = bucket.square_avg[0].dtype
    param = bucket.param[0].dtype
    if dtype not in (torch.float32, torch.float64, param):
        return f"the state is {dtype}, and beside {param} parameters it takes float32, float64 or {param}"
    kept = [bucket.square_avg]
    kept += [bucket.grad_avg] if rule.centered else []
    kept += [bucket.momentum_buffer] if rule.momentum else []
    if any(x.dtype != dtype for x in chain(*kept)):
        return "the state tensors are of different dtypes"
    first = bucket.step[0].dtype
    if first not in (torch.float32, torch.float64) or any(t.dtype != first or t.numel() != 1 for t in bucket.step):
        return "the step counters are not all float32, or all float64, tensors of one element"
    return None


def refuse_memory(bucket: Bucket) -> str | None:
    """Reasons that lie in how tensors lie in memory."""
    written = []
    for i, p in enumerate(bucket.param):
        shape, strides = p.shape, p.stride()
        if not p.is_contiguous() and not dense(shape, strides):
            return f"parameter {i} of the bucket has gaps or shares elements (strides {strides})"
        for values in bucket.tensors()[1:]:
            if not values:
                continue
            x = values[i]
            if x.shape != shape:
                return f"a gradient or state tensor of parameter {i} has another shape"
            if x.stride() != strides and not _same_layout(shape, strides, x.stride()):
                return f"parameter {i} has strides {strides}, and a gradient or state tensor of it {x.stride()}"
        for values in (bucket.param, *bucket.tensors()[2:]):
            if values and p.numel():
                begin = values[i].data_ptr()
                written.append((begin, begin + p.numel() * values[i].element_size(), True))
    read = [
        (g.data_ptr(), g.data_ptr() + g.nbytes, False)
        for p, g in zip(bucket.param, bucket.grad, strict=False)
        if g.numel() and g.data_ptr() != p.data_ptr()  # a parameter may be its own gradient
    ]
    if any(begin == 0 for begin, _, _ in written + read):
        return "a tensor has no memory of its own"
    if _overlap(written + read):
        return "tensors overlap in memory, and a fused step would read what it has written"
    return None


def _same_layout(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether the strides agree wherever they matter."""
    return 0 in shape or all(x == y for size, x, y in zip(shape, a, b, strict=True) if size != 1)


def _overlap(spans: list[tuple[int, int, bool]]) -> bool:
    """Whether some written span [begin, end) shares memory with another span."""
    reach, reach_written = 0, 0
    for begin, end, is_written in sorted(spans):
        if begin < (reach if is_written else reach_written):
            return True
        reach = max(reach, end)
        if is_written:
            reach_written = max(reach_written, end)
    return False
