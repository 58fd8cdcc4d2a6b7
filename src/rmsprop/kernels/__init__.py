"""The backends, and which of them takes a bucket."""

from typing import Any

from rmsprop.kernels import native
from rmsprop.kernels.base import Backend
from rmsprop.kernels.cpu import CPU
from rmsprop.kernels.eager import EAGER
from rmsprop.kernels.plan import Plan, Settings, Stepped
from rmsprop.kernels.triton import TRITON
from rmsprop.kernels.triton_plan import DevicePlan
from rmsprop.printing import shown
from rmsprop.spec import Rule
from rmsprop.tensors.bucket import Bucket

__all__ = ["BACKENDS", "CPU", "Backend", "check_backend", "describe", "explain", "pick", "plan_of"]

# In the order of preference. Triton stands last, for those who ask for it (backend="triton", fused=True), until a GPU
# has verified it: bench/gpu.py.
BACKENDS: tuple[Backend, ...] = (CPU, EAGER, TRITON)


def check_backend(name: object) -> str:
    """Return `name` if it is "auto" or a backend's.

    Raises:
        ValueError: it is not; the message lists those there are.
    """
    names = ("auto", *(backend.name for backend in BACKENDS))
    if isinstance(name, str) and name in names:
        return name
    raise ValueError(f"Unknown backend: {shown(name)}; choose one of {', '.join(map(repr, names))}")


def pick(name: str, rule: Rule, bucket: Bucket) -> Backend:
    """The backend of that name, or under "auto" the first that does not refuse.

    Raises:
        RuntimeError: the one asked for, or every one, refuses; the message gives the reasons.
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


def explain(rule: Rule, bucket: Bucket) -> list[tuple[str, str | None]]:
    """Every backend's name with its reason to refuse, or None where it would take the bucket."""
    return [(backend.name, backend.refuse(rule, bucket)) for backend in BACKENDS]


def describe(name: str, rule: Rule, bucket: Bucket) -> list[str]:
    """A line for each backend: whether it takes the bucket under that choice, could, or why it cannot."""
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
) -> Plan | None:
    """Return a plan for all groups. None if no native kernel takes all of them, or C cannot validate it here.

    Args:
        used: the backend that took the step before.
        backend: the one that was asked for.
        settings: what of a group, but params and numbers, must stay as it is.
        stepped: the groups, and their buckets, that the step before took.
    """
    kinds = {"cpu": Plan, "triton": DevicePlan}
    loaded = native.load()
    if used not in kinds or isinstance(loaded, str) or loaded.host is None:
        return None
    plan = kinds[used](loaded, backend, groups, state, settings, stepped)
    return plan if plan.takes else None
