"""Bounds the parameters after [9], and averages them by [10], in torch's operators."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rmsprop.spec import Averaging, Hyper
from rmsprop.tensors.bucket import Bucket, arithmetic_dtype


def finish(hyper: Hyper, bucket: Bucket) -> None:
    """Bound the parameters by clip_weights after [9], and advance [10].

    Mutates: bucket.param and the slot `ema`.
    """
    if hyper.clip_weights is not None:
        for p in bucket.param:
            p.clamp_(-hyper.clip_weights, hyper.clip_weights)
    average(hyper.average, bucket)


@torch.no_grad()
def average(averaging: Averaging | None, bucket: Bucket) -> None:
    """Advance the averages of a bucket after [9], from the parameters as they are stored and with counted steps.

    Mutates: the slot `ema`, unless found_inf shows that the step was skipped.
    """
    if averaging is None or not bucket.slots["ema"]:
        return
    bucket = bucket.as_real()
    alike: dict[float, tuple[list[Tensor], list[Tensor]]] = {}  # averages and parameters with one share
    for p, e, share in zip(bucket.param, bucket.slots["ema"], _shares(averaging, bucket), strict=True):
        dtype = arithmetic_dtype(p.dtype)
        if share is None:
            continue
        if isinstance(share, float) and e.dtype == p.dtype == dtype and bucket.found_inf is None:
            averages, params = alike.setdefault(share, ([], []))
            averages.append(e)
            params.append(p.detach())
            continue
        new = torch.lerp(e.to(dtype), p.detach().to(dtype), share if isinstance(share, float) else share.to(dtype))
        if isinstance(share, Tensor):
            new = torch.where(share == 0, e, new)
        if bucket.found_inf is not None:
            new = torch.where(bucket.found_inf.to(p.device) == 0, new, e)
        e.copy_(new)
    for share, (averages, params) in alike.items():
        # torch's lerp takes the nearer of the two: a share of 1 copies, and equal weights stay equal
        torch._foreach_lerp_(averages, params, share)


def _shares(averaging: Averaging, bucket: Bucket) -> Sequence[float | Tensor | None]:
    """Return 1 − d for each tensor: a number, or None in a step without an average; on the device, a tensor or 0."""
    steps = bucket.slots["step"]
    if bucket.capturable or torch.compiler.is_compiling() or not steps[0].is_cpu:
        return [_share_on_device(averaging, t.to(p.device)) for p, t in zip(bucket.param, steps, strict=True)]
    decays = [averaging.decay_at(int(t.item())) for t in steps]
    return [None if decay is None else 1 - decay for decay in decays]


def _share_on_device(averaging: Averaging, t: Any) -> Tensor:
    """Return 1 − d as a tensor, without reading the step count back. See Averaging.decay_at."""
    since = t - averaging.start
    k = (since / averaging.interval).floor()
    if averaging.warmup == "tensorflow":
        decay = ((1 + k) / (10 + k)).clamp(max=averaging.decay)
    elif averaging.warmup == "timm":
        decay = (1 - k.clamp(min=1) ** (-2 / 3)).clamp(max=averaging.decay)
    else:
        decay = (k > 1).to(t.dtype) * averaging.decay
    share = torch.where(since <= 0, 1.0, 1 - decay)
    return torch.where((since > 0) & (since != k * averaging.interval), 0.0, share)
