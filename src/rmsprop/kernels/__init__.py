"""Selects the backend that steps a bucket."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor

from rmsprop.kernels import cpu, native, triton_clipping
from rmsprop.kernels.base import Backend
from rmsprop.kernels.cpu import CPU
from rmsprop.kernels.eager import EAGER
from rmsprop.kernels.parts import Stepped
from rmsprop.kernels.plan import Plan, Settings
from rmsprop.kernels.triton import TRITON
from rmsprop.kernels.triton_plan import DevicePlan
from rmsprop.printing import shown
from rmsprop.spec import Rule
from rmsprop.tensors import shards
from rmsprop.tensors.bucket import Bucket
from rmsprop.tensors.clipping import Work

__all__ = [
    "BACKENDS",
    "CPU",
    "Backend",
    "apart",
    "assign",
    "check_backend",
    "clip_and_step",
    "clips",
    "describe",
    "explain",
    "laid_out",
    "pick",
    "plan_of",
    "separate",
]

# In order of preference. Triton is last, and used on request only (backend="triton", fused=True), until bench/gpu.py
# has verified it on a GPU.
BACKENDS: tuple[Backend, ...] = (CPU, EAGER, TRITON)


def check_backend(name: object) -> str:
    """Return `name` if it is "auto" or the name of a backend.

    Raises: ValueError for any other name, with the names that exist.
    """
    names = ("auto", *(backend.name for backend in BACKENDS))
    if isinstance(name, str) and name in names:
        return name
    raise ValueError(f"Unknown backend: {shown(name)}; choose one of {', '.join(map(repr, names))}")


def pick(name: str, rule: Rule, bucket: Bucket) -> Backend:
    """Return the backend of a name, or under "auto" the first that does not refuse.

    Raises: RuntimeError if the named backend, or every backend, refuses, with the reasons.
    """
    reasons = []
    for backend in BACKENDS:
        if name not in ("auto", backend.name):
            continue
        reason = backend.refuse(rule, bucket)
        if reason is None:
            return backend
        reasons.append(f"{backend.name} refuses: {reason}")
    raise RuntimeError(f"backend={name!r} cannot take this step: {'; '.join(reasons)}")


def assign(name: str, rule: Rule, bucket: Bucket) -> list[tuple[Backend, Bucket]]:
    """Return the backend of a bucket, or under "auto" the backends of its parts: a tensor costs no other the kernel.

    Raises: RuntimeError as `pick` does.
    """
    backend = pick(name, rule, bucket)
    if name != "auto" or backend is CPU or not bucket.param or not cpu.takes_kind(rule, bucket):
        return [(backend, bucket)]
    return [(pick(name, rule, part), part) for part in apart(rule, laid_out(rule, bucket))]


def laid_out(rule: Rule, bucket: Bucket) -> Bucket:
    """Return the bucket, with copies of the gradients whose layout alone keeps the CPU kernel from their tensors."""
    grads = list(bucket.grad)
    for i, (p, g) in enumerate(zip(bucket.param, bucket.grad, strict=True)):
        one = bucket.chosen([i])
        if CPU.refuse(rule, one) is not None and not cpu.fits(p, g):
            copied = replace(one, grad=[cpu.laid_out(p, g)])
            grads[i] = copied.grad[0] if CPU.refuse(rule, copied) is None else g
    return replace(bucket, grad=grads)


def apart(rule: Rule, bucket: Bucket) -> list[Bucket]:
    """Return the bucket, or as two: the tensors that the CPU kernel takes, and those that would keep it from them."""
    if not bucket.param or not cpu.takes_kind(rule, bucket) or CPU.refuse(rule, bucket) is None:
        return [bucket]
    alone = [CPU.refuse(rule, bucket.chosen([i])) is not None for i in range(len(bucket.param))]
    if all(alone):
        return [bucket]
    left, taken = (bucket.chosen([i for i, x in enumerate(alone) if x is kind]) for kind in (True, False))
    return [taken, left] if separate(taken, left) and CPU.refuse(rule, taken) is None else [bucket]


def separate(taken: Bucket, left: Bucket) -> bool:
    """Return whether tensors of two buckets are of different storages, as far as all of them have one."""
    try:
        storages = [{x.untyped_storage().data_ptr() for x in chain(*own.lists())} for own in (taken, left)]
    except RuntimeError:  # sparse tensors, and others without memory
        return False
    return not storages[0] & storages[1]


def clips(backends: Sequence[Backend], works: Sequence[Work]) -> bool:
    """Return whether `clip_and_step` can take these works: one native kernel and device, and none is a shard."""
    names = {backend.name for backend in backends}
    if names not in ({"cpu"}, {"triton"}) or len({p.device for *_, bucket in works for p in bucket.param[:1]}) > 1:
        return False
    return not any(bucket.whole or any(map(shards.of_fsdp1, bucket.param)) for *_, bucket in works)


def clip_and_step(backends: Sequence[Backend], works: Sequence[Work]) -> Tensor | float | None:
    """Advance works that `clips` accepts by one step, clipping in the same pass. Return the global norm, or None."""
    taken = cpu.clip_and_step if backends[0].name == "cpu" else triton_clipping.clip_and_step
    return taken(works)


def explain(rule: Rule, bucket: Bucket) -> list[tuple[str, str | None]]:
    """Return every backend's name with its reason to refuse, or None if it would take the bucket."""
    return [(backend.name, backend.refuse(rule, bucket)) for backend in BACKENDS]


def describe(name: str, rule: Rule, bucket: Bucket) -> list[str]:
    """Return a line for each backend: whether it steps the bucket, could step it, or why it refuses.

    Args:
        name: the requested backend, or "auto".
    """
    lines, taken = [], False
    for backend, reason in explain(rule, bucket):
        if reason is not None:
            lines.append(f"{backend}: refuses, {reason}")
        elif taken or name not in ("auto", backend):
            lines.append(f"{backend}: could step them")
        else:
            taken = True
            lines.append(f"{backend}: steps them")
    return lines


def plan_of(
    used: str,
    backend: str,
    groups: list[tuple[dict[str, Any], Rule]],
    state: Any,
    settings: Settings,
    stepped: Stepped,
    left: Sequence[Tensor] = (),
) -> Plan | None:
    """Return a plan for all groups. None if no native kernel takes all of them, or C cannot validate it here.

    Args:
        used: the backend that took the last step.
        backend: the requested backend.
        settings: returns the settings of a group that must stay the same; numbers may change.
        stepped: the groups of the last step with their buckets.
        left: parameters that the plan leaves to another backend.
    """
    kinds = {"cpu": Plan, "triton": DevicePlan}
    loaded = native.load()
    if used not in kinds or isinstance(loaded, str) or loaded.host is None:
        return None
    plan = kinds[used](loaded, backend, groups, state, settings, stepped, left)
    return plan if plan.takes else None
