"""Measures what a step allocates, by running its operators on a miniature of the tensors."""

import heapq
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmsprop import kernels, settings
from rmsprop.in_backward import TOGETHER
from rmsprop.kernels import refusals
from rmsprop.kernels.eager import EAGER, parts
from rmsprop.memory.given import Origin
from rmsprop.optimizer import RMSprop
from rmsprop.spec import Hyper, Rule
from rmsprop.state import slots
from rmsprop.tensors import clipping
from rmsprop.tensors.bucket import Bucket, bucket_for, dense

# Elements of the largest tensor of a miniature. A temporary counts from a sixteenth of it, so that scalars do not.
_LARGEST = 1024
_LEAST = _LARGEST // 16
# The most tensors of a miniature. What more would allocate follows on the line through half of them and all.
_MOST = 24
# The parts of a bucket that are measured: what a part allocates grows with its elements.
_PARTS = 3


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the bytes of the storages that operators make in this context, without those of scalars.

    Attributes:
        peak: the largest sum of storages that were alive at one time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._sum = 0  # the sum may still have storages that were freed
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and add the storages of its results that none of its arguments has."""
        del types
        made = func(*args, **(kwargs or {}))
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _counts(x)}
        for x in filter(_counts, tree_leaves(made)):
            storage = x.untyped_storage()
            key = storage._cdata
            known = self._alive.get(key)
            if key in before or (known is not None and _is_alive(known[0])):
                continue
            self._sum += storage.nbytes() - (0 if known is None else known[1])  # a freed one had the same address
            self._alive[key] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        if self._sum > self.peak:
            self.peak = max(self.peak, self.held())
        return made

    def held(self) -> int:
        """Return the bytes of the storages that are alive now."""
        self._alive = {key: own for key, own in self._alive.items() if _is_alive(own[0])}
        self._sum = sum(size for _, size in self._alive.values())
        return self._sum


def _is_alive(storage: StorageWeakRef) -> bool:
    return not storage.expired()  # type: ignore[no-untyped-call]


def _counts(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided and x.numel() >= _LEAST


class Peak(NamedTuple):
    """Bytes that a step allocates: at the most, and during the whole step."""

    most: int
    held: int = 0


class Place(NamedTuple):
    """The type of a device, the class of tensors, and whether their layout has no gaps."""

    device: str
    family: type
    dense: bool


Work = tuple[Mapping[str, Any], Rule, Hyper, Bucket, Place]


def make_state(optimizer: RMSprop) -> list[Bucket]:
    """Give every trainable stand-in a gradient, and make its state. Mutates: the optimizer.

    Returns: the trainable stand-ins of each group.
    Raises: RuntimeError for a parameter that cannot step.
    """
    first, buckets = 0, []
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty_like(p) if p.requires_grad else None
        buckets.append(bucket_for(group, []))
        slots.fill(group, optimizer.state, buckets[-1], first, [])
        first += len(group["params"])
    return buckets


def step_peak(
    optimizer: RMSprop,
    buckets: Sequence[Bucket],
    origins: Mapping[int, Origin],
    device: str | None,
    due: Collection[int] | None = None,
    only: int | None = None,
) -> tuple[int, list[str]]:
    """Return the bytes that a step allocates at its peak, and the names of the backends that take it.

    Args:
        optimizer, buckets: of stand-ins with state, as `make_state` leaves and returns them.
        device: the type of the device that all parameters are on. None: their own, or a CPU.
        due: ids of the parameters that step. None: all.
        only: the index of the one group that steps. None: all.
    Raises: RuntimeError if a requested backend refuses the step.
    """
    works = list(_works(optimizer, buckets, origins, device, due, only))
    names = [_backend(optimizer.backend, work) for work in works]
    clip = Peak(0)
    meshed = any(origin.of_mesh for origin in origins.values())
    if any(clipping.clips(group) for group, *_ in works) and (meshed or set(names) not in ({"cpu"}, {"triton"})):
        clip = _clip_peak(works)
        works = [_clipped(work) for work in works]
        names = [_backend(optimizer.backend, work) for work in works]
    stepped = 0
    for (_, rule, hyper, bucket, place), name in zip(works, names, strict=True):
        divided = parts(bucket, place.device, place.family) if name == "eager" else ()
        for part in heapq.nlargest(_PARTS, divided, key=_elements):
            stepped = max(stepped, _part_peak(rule, hyper, part))
    return max(clip.most, clip.held + stepped), list(dict.fromkeys(names))


def _works(
    optimizer: RMSprop,
    buckets: Sequence[Bucket],
    origins: Mapping[int, Origin],
    device: str | None,
    due: Collection[int] | None,
    only: int | None,
) -> Iterator[Work]:
    """Yield the buckets of a step by kind and place, with their groups, rules and numbers."""
    for number, (group, whole) in enumerate(zip(optimizer.param_groups, buckets, strict=True)):
        rule, hyper = settings.read(group)
        if hyper.average is not None:
            hyper = replace(hyper, average=replace(hyper.average, interval=1))  # a step that averages
        if only is not None and number != only:
            continue
        places: dict[Place, list[int]] = {}
        for i, p in enumerate(whole.param):
            if due is None or id(p) in due:
                origin = origins[id(p)]
                place = Place(device or origin.place, origin.family, dense(tuple(p.shape), p.stride()))
                places.setdefault(place, []).append(i)
        for place, indices in places.items():
            for bucket in whole.chosen(indices).split():
                yield group, rule, hyper, bucket, place


def _backend(name: str, work: Work) -> str:
    """Return the name of the backend that would step a bucket at its place. Raises: RuntimeError if all refuse."""
    _, rule, _, bucket, (device, family, is_dense) = work
    if device == "cpu" and family is Tensor:
        return kernels.pick(name, rule, _miniature(bucket, [4], is_dense)).name
    native = name == "triton" or bool(bucket.fused)
    reason = refusals.refuse_rule(rule) or refusals.refuse_call(bucket) if native else None
    if device == "cpu" and native:
        reason = f"the parameters are {family.__name__}, a subclass of Tensor whose memory means something else"
    if name == "cpu" and device != "cpu":
        reason = f"the parameters are on {device}, and it computes on the CPU"
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot take this step: {reason}")
    return "triton" if native else "eager"


def _miniature(bucket: Bucket, sizes: Sequence[int], is_dense: bool = True) -> Bucket:
    """Return a bucket of tensors on the CPU of these sizes, and of the dtypes of the bucket's first tensor."""

    def _like(x: Tensor, size: int) -> Tensor:
        if is_dense:
            return torch.zeros(size, dtype=x.dtype, device="cpu")
        return torch.zeros(2 * size, dtype=x.dtype, device="cpu").as_strided((2, size // 2), (size // 2 + 1, 1))

    def _several(values: list[Tensor]) -> list[Tensor]:
        return [_like(x, size) for x in values[:1] for size in sizes]

    own = {name: _several(values) for name, values in bucket.shaped().items()}
    own["step"] = [torch.zeros((), dtype=torch.float64, device="cpu") for _ in sizes]
    keys = bucket.random_keys[:1] * len(sizes)
    return replace(
        bucket, param=_several(bucket.param), grad=_several(bucket.grad), slots=own, random_keys=keys, whole={}
    )


def _elements(bucket: Bucket) -> int:
    return sum(p.numel() for p in bucket.param)


def _sizes(bucket: Bucket, largest: int, share: float) -> list[int]:
    """Return the sizes of a miniature: the tensors' own, or those of pieces of a share of all elements."""
    if share == 1 and len(bucket.param) <= _MOST:
        return [max(1, round(p.numel() / largest * _LARGEST)) for p in bucket.param]
    own = max([p.numel() for p in bucket.param], default=0)
    piece = max(_LEAST, round(own / largest * _LARGEST))
    count, rest = divmod(round(share * _elements(bucket) / largest * _LARGEST), piece)
    return [piece] * count + [rest] * (rest > 0)


def _along(run: Callable[[float], Peak], pieces: float, scale: float) -> Peak:
    """Return what `run` measures of a miniature, in bytes of the original.

    The peak is linear in the number of tensors of one size: some temporaries are as large as all, and some as one.

    Args:
        run: measures a miniature that has a share of all elements.
        pieces: the number of tensors of a whole miniature.
        scale: elements of the original for each of the miniature.
    """
    share = min(1.0, _MOST / pieces)
    whole = run(share)
    if share < 1:
        half = run(share / 2)
        rise = (1 - share) / (share / 2)
        whole = Peak(*(round(b + (b - a) * rise) for a, b in zip(half, whole, strict=True)))
    return Peak(*(round(x * scale) for x in whole))


def _part_peak(rule: Rule, hyper: Hyper, part: Bucket) -> int:
    """Return the bytes that torch's operators allocate at the peak of one part's step."""
    largest = max(p.numel() for p in part.param)
    if not largest:
        return 0
    foreach = (len(part.param) > 1 or part.foreach) if not part.differentiable else None

    def _run(share: float) -> Peak:
        small = replace(_miniature(part, _sizes(part, largest, share)), foreach=foreach)
        with torch.no_grad(), Allocations() as seen:
            EAGER.step(rule, hyper, small)
        return Peak(seen.peak)

    return _along(_run, _elements(part) / largest, largest / _LARGEST).most


def _clip_peak(works: Sequence[Work]) -> Peak:
    """Return the bytes that clipping all gradients allocates, and those that the clipped gradients hold."""
    largest = max((p.numel() for *_, bucket, _ in works for p in bucket.param), default=0)
    if not largest:
        return Peak(0)

    def _run(share: float) -> Peak:
        small = [
            (group, rule, hyper, _miniature(bucket, _sizes(bucket, largest, share)))
            for group, rule, hyper, bucket, _ in works
        ]
        with torch.no_grad(), Allocations() as seen:
            clipped = clipping.clip(small)
            held = seen.held()
            del clipped
        return Peak(seen.peak, held)

    pieces = sum(len(_sizes(bucket, largest, 1.0)) for *_, bucket, _ in works)
    return _along(_run, pieces, largest / _LARGEST)


def _clipped(work: Work) -> Work:
    """Return a work with gradients as clipping leaves them."""
    group, rule, hyper, bucket, place = work
    if not clipping.clips(group):
        return work
    ((_, rule, hyper, small),), _ = clipping.clip([(group, rule, hyper, _miniature(bucket, [4]))])
    return group, rule, hyper, replace(bucket, grad=[g.to(small.grad[0].dtype) for g in bucket.grad]), place


def waiting(optimizer: RMSprop, origins: Mapping[int, Origin], device: str | None) -> tuple[int, set[int]]:
    """Return the largest bytes of gradients that a backward pass holds if it steps, and the ids of their parameters.

    A backward pass makes the gradients of the last layers first. On a CPU, small ones wait for one another.
    """
    most, heaviest = 0, set[int]()
    held, ids = 0, set[int]()
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for p in reversed(trained):
        origin = origins[id(p)]
        waits = (device or origin.place) == "cpu" and origin.family is Tensor and not origin.of_mesh
        held, ids = held + p.nbytes, {*ids, id(p)}
        if held > most:
            most, heaviest = held, ids
        if held >= TOGETHER or not waits:
            held, ids = 0, set()
    return most, heaviest


def other_optimizer(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], trained: list[Tensor], together: bool
) -> tuple[int, int]:
    """Return the bytes of the state of another optimizer, and what its step allocates at its peak.

    Args:
        trained: stand-ins with gradients.
        together: whether it steps all at once, or one after the other.
    """
    state = peak = 0
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for p in trained:
        kinds.setdefault(p.dtype, []).append(p)
    for own in kinds.values():
        whole = Bucket(own, own) if together else _neighbors(own)
        largest = max(p.numel() for p in own)

        def _run(share: float, whole: Bucket = whole, largest: int = largest) -> Peak:
            small = _miniature(whole, _sizes(whole, max(largest, 1), share))
            optimizer = make(small.param)
            for p, g in zip(small.param, small.grad, strict=True):
                p.grad = g
            optimizer.step()
            with Allocations() as seen:
                optimizer.step()
            return Peak(seen.peak)

        state += _state_bytes(make, own)
        peak = max(peak, _along(_run, _elements(whole) / max(largest, 1), largest / _LARGEST).most if largest else 0)
    return state, peak


def _neighbors(own: list[Tensor]) -> Bucket:
    """Return the largest tensor with the one before it, whose last temporary a loop over tensors still holds."""
    sizes = [p.numel() for p in own]
    at = max(range(len(own)), key=lambda i: 2 * sizes[i] + (sizes[i - 1] if i else 0))
    return Bucket(own[max(at - 1, 0) : at + 1], own[max(at - 1, 0) : at + 1])


def _state_bytes(make: Callable[[list[Tensor]], torch.optim.Optimizer], own: list[Tensor]) -> int:
    """Return the bytes of the state that another optimizer makes of tensors of one dtype."""
    one = torch.zeros(_LARGEST, dtype=own[0].dtype, device="cpu", requires_grad=True)
    one.grad = torch.zeros_like(one)
    optimizer = make([one])
    optimizer.step()
    kept = [x for x in optimizer.state[one].values() if isinstance(x, Tensor)]
    shaped = sum(x.element_size() for x in kept if x.shape == one.shape)
    return shaped * sum(p.numel() for p in own) + len(own) * sum(x.nbytes for x in kept if x.shape != one.shape)
