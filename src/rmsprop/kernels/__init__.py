"""The backends, and which of them takes a bucket."""

from rmsprop.kernels.base import Backend
from rmsprop.kernels.cpu import CPU
from rmsprop.kernels.eager import EAGER
from rmsprop.kernels.triton import TRITON
from rmsprop.printing import shown
from rmsprop.spec import Rule
from rmsprop.tensors.bucket import Bucket

__all__ = ["BACKENDS", "CPU", "Backend", "check_backend", "describe", "explain", "pick"]

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
