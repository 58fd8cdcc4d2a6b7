"""Reasons to refuse a bucket, and version counting for autograd, shared by both native kernels."""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from rmsprop.kernels import native
from rmsprop.spec import Rule
from rmsprop.tensors.bucket import Bucket, dense, slot_dtype


def refuse_call(bucket: Bucket) -> str | None:
    """Return a reason to refuse the execution settings of a step."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing, and cannot trace a compiled library"
    if bucket.fused is False:
        return "fused=False excludes native kernels"
    if bucket.foreach is not None and not (bucket.fused and bucket.foreach is False):  # torchtitan sets both
        return f"foreach={bucket.foreach} asks for torch's own operators; leave it None"
    if bucket.differentiable:
        return "differentiable=True needs a step that autograd records, and a compiled one is opaque to it"
    if in_mode():
        return "a TorchDispatchMode is active, which a compiled step would bypass"
    return None


def refuse_rule(rule: Rule) -> str | None:
    """Return a reason to refuse the rule."""
    if rule.weight_decay_mode == "l1":
        return 'weight_decay_mode="l1" needs torch\'s own operators: the compiled kernels do not have the sign of p'
    return None


def in_mode() -> bool:
    """Return whether a TorchDispatchMode is active."""
    return bool(torch._C._len_torch_dispatch_stack())


def plain(bucket: Bucket) -> bool:
    """Return whether C accepts all tensors of a bucket; False also if C cannot read them.

    It accepts plain tensors of supported dtypes that do not overlap. All tensors of one parameter share one dense
    layout.
    """
    loaded = native.load()
    if isinstance(loaded, str) or not bucket.slots["square_avg"] or not bucket.grad:
        return False
    host, dtypes = native.host(bucket.param[0].device), types(bucket)
    if host is None or dtypes[0] not in native.TYPES or _refuse_types(bucket, dtypes) is not None:
        return False
    lists = (c_void_p * native.TENSORS)(*(id(values) if values else None for values in bucket.lists()))
    found = (c_int32 * (len(dtypes) + 1))(*kinds(loaded, bucket))
    codes = (c_int32 * len(dtypes))(*(native.SLOT_TYPES[dtype] for dtype in dtypes))
    spans = (c_int64 * (2 * (native.TENSORS - 1) * len(bucket.param)))()
    return bool(loaded.plain(ctypes.addressof(host), lists, len(bucket.param), found, codes, spans))


def types(bucket: Bucket) -> list[Any]:
    """Return the dtypes of a bucket's first tensors, by `Typed` in csrc/plan.h; the usual one for a missing slot."""

    def _first(values: list[Tensor], missing: Any = None) -> Any:
        return getattr(values[0], "dtype", None) if values else missing

    slots, full = bucket.slots, bucket.state_dtype == "float32"
    square, others = _first(slots["square_avg"]), slots["grad_avg"] or slots["momentum_buffer"]
    other = _first(others, square if full else torch.bfloat16)
    ema = _first(slots["ema"], square if full else torch.float32)
    return [_first(bucket.param), square, other, _first(slots["step"]), ema]


def kinds(loaded: native.Native, bucket: Bucket) -> list[int]:
    """Return torch's codes of a bucket's `types`, and the index of their device or -1."""
    index = bucket.param[0].device.index
    return [*(loaded.dtype_codes[dtype] for dtype in types(bucket)), -1 if index is None else index]


def refuse_slots(rule: Rule, bucket: Bucket) -> str | None:
    """Return a reason to refuse the state."""
    if not bucket.slots["square_avg"]:
        return None
    dtypes = types(bucket)
    reason = _refuse_types(bucket, dtypes)
    if reason is not None:
        return reason
    _, square, other, step, ema = dtypes
    wanted = {"square_avg": square, "grad_avg": other, "momentum_buffer": other, "ema": ema}
    if any(x.dtype != wanted[name] for name in (*rule.slots(), "ema") if name != "step" for x in bucket.slots[name]):
        return "the state tensors are of different dtypes"
    if any(t.dtype != step or t.numel() != 1 for t in bucket.slots["step"]):
        return _STEPS
    return None


_STEPS = "the step counters are not all float32, or all float64, tensors of one element"


def _refuse_types(bucket: Bucket, dtypes: list[Any]) -> str | None:
    """Return a reason to refuse the dtypes of a bucket's state, which are its `types`."""
    param, square, other, step, ema = dtypes
    if bucket.state_dtype != "float32":
        wanted = [slot_dtype(name, param, bucket.state_dtype) for name in ("square_avg", "grad_avg", "ema")]
        if [square, other, ema] != wanted:
            return f"the state is not in the dtypes of state_dtype={bucket.state_dtype!r}: square_avg in {wanted[0]}"
    elif square not in (torch.float32, torch.float64, param):
        return f"the state is {square}, and for {param} parameters it takes float32, float64 or {param}"
    elif (other, ema) != (square, square):
        return "the state tensors are of different dtypes"
    return None if step in (torch.float32, torch.float64) else _STEPS


def refuse_memory(bucket: Bucket) -> str | None:
    """Return a reason to refuse the tensors' layouts and memory."""
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
                return f"parameter {i} has strides {strides}, but a gradient or state tensor of it has {x.stride()}"
        for values in (bucket.param, *bucket.shaped().values()):
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
        return "tensors overlap in memory, so a fused step would read what it has written"
    return None


def _same_layout(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Return whether strides agree in all dimensions of size other than 1."""
    return 0 in shape or all(x == y for size, x, y in zip(shape, a, b, strict=True) if size != 1)


def _overlap(spans: list[tuple[int, int, bool]]) -> bool:
    """Return whether a written span [begin, end) shares memory with another span."""
    reach, reach_written = 0, 0
    for begin, end, is_written in sorted(spans):
        if begin < (reach if is_written else reach_written):
            return True
        reach = max(reach, end)
        if is_written:
            reach_written = max(reach_written, end)
    return False


def count_writes(params: list[Tensor]) -> None:
    """Increment autograd's version counters of the parameters, as torch's operators do.

    Otherwise a backward pass through values from before the step would be silently wrong.
    """
    torch.autograd.graph.increment_version([p for p in params if not p.is_inference()])
