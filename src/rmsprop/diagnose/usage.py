"""Checks of how an optimizer is used, beside those of its numbers in checks.py: what it is given, and when."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rmsprop import analysis, kernels
from rmsprop.diagnose.facts import Facts
from rmsprop.diagnose.readings import Reading
from rmsprop.dialects import CLIPS, find_dialect
from rmsprop.printing import printable
from rmsprop.spec import Rule
from rmsprop.tensors import clipping, shards
from rmsprop.tensors.bucket import Bucket, is_half, kept, wanted

_ITS_PLACE = re.compile("parameter 0( of the bucket)?")

Found = Iterator[tuple[str, str, str]]  # severity, what was seen, what to change


def no_gradient(f: Facts) -> Found:
    """Parameters that are given to the optimizer and get no gradient."""
    build = "Build the optimizer from the parameters of the model that the loss comes from, not from copies of them"
    if f.unreachable and f.index == 0:
        yield (
            "warning",
            "every parameter has requires_grad=False and no gradient, as copies by detach() or state_dict() have, so "
            "backward() gives none of them a gradient",
            build,
        )
    elif f.history.idle > 1 and f.index == 0:
        yield (
            "error",
            f"no parameter had a gradient in the last {f.history.idle} steps, and none of them moved",
            f"{build}, and call loss.backward() before step() and zero_grad() after it",
        )
    if not f.oldest or f.unreachable or f.history.idle > 1:
        return
    off = [x for x in f.tensors if not x.requires_grad]
    never = [x for x in f.tensors if x.requires_grad and x.elements and not x.has_state and not x.has_grad]
    zero = [
        x
        for x in f.tensors
        if x.steps and x.elements and not x.sums["touched"] and not x.sums["with_grad"] and x.requires_grad
    ]
    if never and not (f.late and len(never) == len(f.tensors)):
        yield (
            "warning",
            f"{len(never)} parameters had no gradient in {f.oldest} steps: {names(never)}",
            "Look for a part of the network that the loss does not reach, or leave them out",
        )
    if zero and (f.oldest > 1 or len(zero) == len(f.tensors)):  # adapters begin beside a matrix of zeros
        yield (
            "warning",
            f"the gradient of {len(zero)} parameters was 0 in every step: {names(zero)}",
            "Look for a dead part of the network, or a gradient that underflows in half precision",
        )
    if off:
        yield "note", f"{len(off)} parameters have requires_grad=False: {names(off)}", "Leave them out, if for good"


def zero_grad(f: Facts) -> Found:
    """Gradients that a step used, and that the next backward pass added to."""
    if f.history.kept is not None and f.history.kept[0] == f.index:
        yield (
            "warning",
            f"the gradient of {f.history.kept[1]} that a step had used was still there when backward() added to it, "
            "after every step that was looked at: gradients only grow",
            "Call optimizer.zero_grad() after each step()",
        )


def momentum_switched(f: Facts) -> Found:
    """Momentum that was 0 when the group began and is not now, or the other way round."""
    mu, begun = f.hyper.momentum, f.begun
    late = [x for x in f.tensors if x.steps and x.has_state and x.has_buffer is not f.rule.momentum]
    if begun is None or (begun != 0) is f.rule.momentum:
        if not late:
            return
        begun = 0.0 if f.rule.momentum else None
    if f.rule.momentum:
        by = "OneCycleLR and CyclicLR do so" if "base_momentum" in f.group else "a schedule or an assignment did so"
        yield (
            "warning",
            f"momentum was {begun:g} in this group and is {mu:g} now: {by}. A steady step is now "
            f"{analysis.steady_step(f.rule, f.hyper):.3g}·lr, without it 1·lr",
            "Give the schedule cycle_momentum=False, or build the optimizer with that momentum and an lr for it",
        )
    else:
        was = "not 0" if begun is None else f"{begun:g}"
        yield (
            "note",
            f"momentum was {was} in this group and is 0 now: steps are shorter by its factor of 1/(1−momentum), and "
            "momentum_buffer waits in the state: it comes back as it is when momentum does",
            "Keep momentum as it was, or delete momentum_buffer from the state before it is turned on again",
        )


def clip_zero(f: Facts) -> Found:
    """Bounds of 0, which some frameworks read as no bound."""
    for name in CLIPS:
        if f.group.get(name) != 0 or f.group.get(name) is None:
            continue
        word = find_dialect(f.group["dialect"]).argument(name)
        effect = "every parameter is 0 after a step" if name == "clip_weights" else "every gradient is 0 in a step"
        yield (
            "error",
            f"{word}=0 is a bound of 0 here: {effect}",
            f"Leave {word} out, or take None, if no bound is meant, as by 0 in MXNet and Keras 1",
        )


def slow_path(f: Facts) -> Found:
    """Gradients and state whose memory the compiled kernel cannot take."""
    if not f.detours:
        return
    name, reason = f.detours[0]
    more = f" and {len(f.detours) - 1} more" if len(f.detours) > 1 else ""
    yield (
        "note",
        f"the compiled kernel would take this group, and plain torch steps it because of {name}{more} ({reason})",
        "Keep parameter, gradient and state in one dense layout: build the optimizer after "
        "model.to(memory_format=...), and assign gradients as torch.empty_like(p).copy_(g)",
    )


def detours(
    backend: str, rule: Rule, group: Mapping[str, Any], state: Mapping[Any, Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """The parameters that the compiled kernel would take, were it not for how tensors lie in memory.

    Returns: pairs of the parameter's name and the kernel's reason.
    """
    if backend != "auto" or group["fused"] or clipping.asked(group):  # a name raises; clipped gradients are copies
        return []
    found = []
    together: list[Bucket] = []
    for i, p in enumerate(group["params"]):
        if type(p) not in (Tensor, torch.nn.Parameter) or p.grad is None or p.grad.is_sparse:
            continue
        plain = torch.empty(0, dtype=p.dtype, device=p.device)
        if kernels.CPU.refuse(rule, _bucket(rule, group, plain, plain, {})) is not None:
            continue
        own = {name: shards.shard(x) for name, x in (state.get(p) or {}).items()}
        bucket = _bucket(rule, group, p, p.grad, own)
        reason = kernels.CPU.refuse(rule, bucket)
        if reason is not None:
            known = group.get("param_names")
            found.append((printable(str(known[i])) if known else f"parameter {i}", _ITS_PLACE.sub("it", reason)))
        together.append(bucket)
    return found or _together(rule, group, together)


def _together(rule: Rule, group: Mapping[str, Any], buckets: Sequence[Bucket]) -> list[tuple[str, str]]:
    """Why parameters that the kernel takes one by one cannot be stepped in one call."""
    whole = wanted(group, [])
    for bucket in buckets:
        if bucket.square_avg:
            for into, values in zip(whole.lists(), bucket.lists(), strict=True):
                into.extend(values)
    reasons = (kernels.CPU.refuse(rule, part) for part in whole.split()) if whole.param else ()
    return [("its parameters together", reason) for reason in reasons if reason is not None]


def _bucket(rule: Rule, group: Mapping[str, Any], p: Tensor, grad: Tensor, own: Mapping[str, Any]) -> Bucket:
    """A bucket of one parameter, with its gradient and the state that there is of it."""
    bucket = wanted(group, [p])
    bucket.grad = [grad]
    names = kept(rule, group, is_half(p.dtype))
    if all(isinstance(own.get(name), Tensor) for name in names):
        for name in names:
            getattr(bucket, name).append(own[name])
    return bucket.of_its_width()


def names(tensors: Sequence[Reading]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(x.name for x in tensors[:3])
    return shown + (f" and {len(tensors) - 3} more" if len(tensors) > 3 else "")
