"""Checks of how an optimizer is used: its parameters, gradients and memory layouts. checks.py checks numbers."""

import re
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from rmsprop import analysis, kernels
from rmsprop.diagnose.facts import Detour, Facts
from rmsprop.diagnose.readings import Reading
from rmsprop.printing import printable
from rmsprop.spec import Rule
from rmsprop.tensors import shards
from rmsprop.tensors.bucket import Bucket, bucket_for, is_half, state_names

_ITS_PLACE = re.compile("parameter 0( of the bucket)?")

Found = Iterator[tuple[str, str, str]]  # severity, what was seen, what to change


def no_gradient(f: Facts) -> Found:
    """Find parameters of the optimizer that get no gradient."""
    build = "Build the optimizer from the parameters of the model that computes the loss, not from copies of them"
    if f.unreachable and f.index == 0:
        yield (
            "warning",
            "every parameter has requires_grad=False and no gradient, as copies from detach() or state_dict() do, so "
            "backward() computes no gradient for them",
            build,
        )
    elif f.history.idle > 1 and f.index == 0:
        yield (
            "error",
            f"no parameter had a gradient in the last {f.history.idle} steps, so none of them moved",
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
            f"{counted(len(never), 'parameter')} had no gradient in {counted(f.oldest, 'step')}: {names(never)}",
            "Check for a part of the network that the loss does not reach, or leave these parameters out",
        )
    if zero and (f.oldest > 1 or len(zero) == len(f.tensors)):  # adapters begin beside a matrix of zeros
        yield (
            "warning",
            f"{counted(len(zero), 'parameter')} had a gradient of 0 in every step: {names(zero)}",
            "Look for a dead part of the network, or a gradient that underflows in half precision",
        )
    if off:
        frozen = counted(len(off), "parameter has", "parameters have")
        yield "note", f"{frozen} requires_grad=False: {names(off)}", "Leave them out if they stay frozen"


def zero_grad(f: Facts) -> Found:
    """Find gradients that a step used and that the next backward pass added to."""
    if f.history.kept is not None and f.history.kept[0] == f.index:
        yield (
            "warning",
            f"backward() added to the gradient of {f.history.kept[1]} that the step before had used, after every "
            "step that was observed, so gradients accumulate",
            "Call optimizer.zero_grad() after each step()",
        )


def momentum_switched(f: Facts) -> Found:
    """Find momentum that was 0 when the group began and is not now, or the reverse."""
    mu, begun = f.hyper.momentum, f.begun
    late = [x for x in f.tensors if x.steps and x.has_state and x.has_buffer is not f.rule.momentum]
    if begun is None or (begun != 0) is f.rule.momentum:
        if not late:
            return
        begun = 0.0 if f.rule.momentum else None
    if f.rule.momentum:
        by = "OneCycleLR or CyclicLR" if "base_momentum" in f.group else "a schedule or an assignment"
        yield (
            "warning",
            f"momentum was {begun:g} in this group and is {mu:g} now, set by {by}, so a steady step is "
            f"{analysis.steady_step(f.rule, f.hyper):.3g}·lr instead of {min(1.0, f.hyper.cap):g}·lr",
            "Pass cycle_momentum=False to the schedule, or build the optimizer with this momentum and a matching lr",
        )
    else:
        was = "not 0" if begun is None else f"{begun:g}"
        yield (
            "note",
            f"momentum was {was} in this group and is 0 now: steps are shorter by its factor of 1/(1−momentum), and "
            "the next step with momentum continues from the momentum_buffer in the state",
            "Keep momentum as it was, or delete momentum_buffer from the state before momentum is turned on again",
        )


def slow_path(f: Facts) -> Found:
    """Find gradients and state whose memory layout the compiled kernel cannot use."""
    if not f.detours:
        return
    yield (
        "note",
        detour(f.detours),
        "Keep parameter, gradient and state in one dense layout: build the optimizer after "
        "model.to(memory_format=...), and assign gradients as torch.empty_like(p).copy_(g)",
    )


def detour(found: Sequence[Detour]) -> str:
    """Return what the parameters found by `detours` cost, in a sentence."""
    first = found[0]
    more = sum(other.copied == first.copied for other in found) - 1
    named = f"{first.name} and {more} more" if more else first.name
    if first.copied:
        return f"every step copies the gradient of {named} into the layout of its parameter ({first.reason})"
    return f"torch operations step {named} instead of the compiled kernel ({first.reason})"


def detours(
    backend: str, rule: Rule, group: Mapping[str, Any], state: Mapping[Any, Mapping[str, Any]]
) -> list[Detour]:
    """Return the parameters that a memory layout keeps from the compiled kernel, or whose gradients it copies.

    Returns: those that torch operations step come first.
    """
    if backend != "auto" or group["fused"]:  # a name raises
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
            name = printable(str(known[i])) if known else f"parameter {i}"
            bucket = kernels.laid_out(rule, bucket)
            copied = bucket.grad[0] is not p.grad
            found.append(Detour(name, _ITS_PLACE.sub("it", reason), copied))
        together.append(bucket)
    if all(one.copied for one in found):
        found += [Detour("the whole group", reason) for reason in _together(rule, group, together)]
    return sorted(found, key=attrgetter("copied"))


def _together(rule: Rule, group: Mapping[str, Any], buckets: Sequence[Bucket]) -> list[str]:
    """Return why one call of the kernel cannot step parameters that it can step one by one."""
    whole = bucket_for(group, [])
    for bucket in buckets:
        if bucket.slots["square_avg"]:
            for into, values in zip(whole.lists(), bucket.lists(), strict=True):
                into.extend(values)
    reasons = (kernels.CPU.refuse(rule, part) for part in whole.split()) if whole.param else ()
    return [reason for reason in reasons if reason is not None]


def _bucket(rule: Rule, group: Mapping[str, Any], p: Tensor, grad: Tensor, own: Mapping[str, Any]) -> Bucket:
    """Return a bucket of one parameter, with its gradient and its state if that is complete."""
    bucket = bucket_for(group, [p])
    bucket.grad = [grad]
    names = state_names(rule, group, is_half(p.dtype))
    if all(isinstance(own.get(name), Tensor) for name in names):
        for name in names:
            bucket.slots[name].append(own[name])
    return bucket.of_its_width()


def counted(count: float, singular: str, plural: str = "") -> str:
    """Return a count and its noun, such as "1 parameter" and "2 parameters"."""
    return f"{count:.0f} {singular if count == 1 else plural or singular + 's'}"


def names(tensors: Sequence[Reading]) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(x.name for x in tensors[:3])
    return shown + (f" and {len(tensors) - 3} more" if len(tensors) > 3 else "")
