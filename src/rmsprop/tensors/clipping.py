"""Clips gradients before the nine lines, as the optimizers of other frameworks do.

The order is: maximize and weight decay of [1], with `clip_after_decay`; each element (`clip_value`); each tensor's
norm (`clip_norm`); the norm over all groups with `clip_global_norm`; each element, with `clip_value_last`; the step,
which bounds each element of the parameters after [9] (`clip_weights`). The user's gradients are not changed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rmsprop.spec import GRADIENT_CLIPS, Hyper, Rule
from rmsprop.tensors import shards
from rmsprop.tensors.bucket import Bucket, arithmetic_dtype

_SMALLEST = torch.finfo(torch.float32).tiny  # smaller numbers lose digits or are flushed to 0

Group = Mapping[str, Any]
Work = tuple[Group, Rule, Hyper, Bucket]  # of one group


def clips(group: Mapping[str, Any]) -> bool:
    """Return whether the group clips gradients."""
    return any(group[name] is not None for name in GRADIENT_CLIPS)


def describe(group: Mapping[str, Any]) -> list[str]:
    """Return a line for each operation of the group beyond the nine lines."""
    formulas = {
        "clip_value": "g ← min(max(g, −{0:g}), {0:g})",
        "clip_norm": "g ← g·{0:g}/max(‖g‖, {0:g})   each tensor by itself",
        "clip_global_norm": "g ← g·{0:g}/max(‖g‖, {0:g})   over all tensors",
        "clip_weights": "p ← min(max(p, −{0:g}), {0:g})   after [9]",
    }
    lines = [text.format(group[name]) for name, text in formulas.items() if group[name] is not None]
    if clips(group) and group["clip_after_decay"] and group["weight_decay"]:
        lines.insert(0, "clipping comes after [1]")
    if group["sparse"] is not None:
        lines.append(f"sparse gradients: {group['sparse']}")
    return lines


def clip(works: Sequence[Work]) -> tuple[list[Work], Tensor | None]:
    """Return the works with clipped gradients in new tensors. Works of groups without clipping are not changed.

    Returns: the works, and the norm that clip_global_norm bounds, before it does. None without one.
    """
    prepared = [_begin(*work) if clips(work[0]) else work for work in works]
    total = _clip_norms_together([work for work in prepared if work[0]["clip_global_norm"] is not None])
    for group, *_, bucket in prepared:
        if group["clip_value_last"] and group["clip_value"] is not None:
            bucket.grad = _clip_elements(bucket, group["clip_value"])
    return prepared, total


def _begin(group: Mapping[str, Any], rule: Rule, hyper: Hyper, bucket: Bucket) -> Work:
    """Do the clipping that needs no gradients of other tensors."""
    own = replace(bucket, grad=[_widened(g) for g in bucket.grad])
    if own.grad_scale is not None:
        scale = own.grad_scale.to(own.grad[0].device, non_blocking=True)
        own.grad, own.grad_scale = [g / scale for g in own.grad], None
    if group["clip_after_decay"]:
        rule, hyper = _decay(rule, hyper, own)
    if group["clip_value"] is not None and not group["clip_value_last"]:
        own.grad = _clip_elements(own, group["clip_value"])
    if group["clip_norm"] is not None:
        own.grad = [
            _bounded(g, norm, group["clip_norm"]) for g, norm in zip(own.grad, shards.norms(own), strict=True)
        ]
    return group, rule, hyper, own


def _clip_elements(bucket: Bucket, bound: float) -> list[Tensor]:
    """Return the gradients with each element, or part of a complex one, bounded to ±bound."""
    real = [g.clamp(-bound, bound) for g in bucket.as_real().grad]
    return [torch.view_as_complex(g) for g in real] if bucket.param[0].is_complex() else real


def _decay(rule: Rule, hyper: Hyper, own: Bucket) -> tuple[Rule, Hyper]:
    """Apply [1] to the gradients, and return the rule and the numbers without it. Mutates: own.grad."""
    if rule.weight_decay_mode not in ("l2", "l1"):
        return rule, hyper
    sign = -1 if rule.maximize else 1
    wd = hyper.weight_decay
    params = [p.to(g.dtype) for p, g in zip(own.param, own.grad, strict=True)]
    pulls = params if rule.weight_decay_mode == "l2" else [p.sgn() for p in params]
    own.grad = [sign * g + wd * pull if wd else sign * g for g, pull in zip(own.grad, pulls, strict=True)]
    return replace(rule, maximize=False), replace(hyper, weight_decay=0.0)


def _clip_norms_together(works: Sequence[Work]) -> Tensor | None:
    """Bound the norm over all gradients of these works, without reading back from a device. Mutates: bucket.grad.

    Returns: the norm.
    """
    gradients = [g for *_, bucket in works for g in bucket.grad]
    if not gradients:
        return None
    home = gradients[0].device
    wide = torch.float32 if home.type == "mps" else torch.float64
    norms = [norm.to(home, wide) for *_, bucket in works for norm in shards.norms(bucket)]
    total = shards.norm(torch.stack(norms))
    for group, _, _, bucket in works:
        bucket.grad = [_bounded(g, total.to(g.device), group["clip_global_norm"]) for g in bucket.grad]
    return total


def _bounded(g: Tensor, norm: Tensor, bound: float) -> Tensor:
    """Return g·bound/max(norm, bound), which is g if the norm is within the bound."""
    real = g.real.dtype if g.is_complex() else g.dtype
    norm = norm.clamp(min=bound)
    factor = bound / norm
    held = factor.clamp(min=_SMALLEST)
    g = g * held.to(real)
    if g.is_cpu and not torch.compiler.is_compiling() and bool(held == factor):
        return g
    # in two steps below float32's normal numbers, since the factor may underflow even in float64
    return g.mul_(torch.where(held == factor, 1.0, bound / held / norm).to(real))  # a new tensor already


def _widened(g: Tensor) -> Tensor:
    return g.to(arithmetic_dtype(g.dtype))
