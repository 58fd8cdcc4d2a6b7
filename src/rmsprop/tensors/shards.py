"""Parameters that are spread over processes: torch's DTensor, of FSDP2, tensor and expert parallelism.

RMSprop is element-wise: each process steps the part that it holds, its shard, and nothing is sent. So where tensors
are worked on, a DTensor is replaced by its shard, a plain tensor in the same memory. The state itself stays DTensor,
of the parameter's global shape, mesh and placements, as distributed checkpoints need it.

Two things need more than the shard: a gradient that is not summed over the processes yet (Partial, as layer norms
have it under SequenceParallel), and norms. torch.distributed is imported only where a DTensor was met.
"""

import math
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from rmsprop.spec import SLOTS
from rmsprop.tensors.bucket import Bucket

_PLAIN = (Tensor, torch.nn.Parameter)
_KINDS = {*_PLAIN}
_SLOTS = tuple(slot for slot in SLOTS if slot != "step")  # of a parameter's shape


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor. There is none before torch.distributed.tensor was imported."""
    if type(tensor) in _PLAIN:
        return False
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def shard(tensor: Any) -> Any:
    """This process's part of a DTensor, in the same memory; anything else itself."""
    if not is_dtensor(tensor):
        return tensor
    held = tensor._local_tensor  # to_local() makes a new view each time
    return held.wait() if type(held) not in _PLAIN and hasattr(held, "wait") else held  # AsyncCollectiveTensor


def shard_of_gradient(param: Tensor) -> Tensor | None:
    """This process's part of the parameter's gradient, where it can be told without asking another."""
    grad = param.grad
    return None if grad is None or _differ(param, grad) else shard(grad)


def same_placements(a: Any, b: Any) -> bool:
    """Whether two DTensors have the same mesh and placements."""
    return a._spec is b._spec or bool(a.device_mesh == b.device_mesh and a.placements == b.placements)


def localized(bucket: Bucket) -> Bucket:
    """The bucket with the shard in the place of every DTensor: a mixed group is one bucket of plain tensors.

    A gradient of other placements than its parameter's is brought into them first, as torch's own operators would:
    there processes talk. Where autograd records the step, or a compiler traces it, DTensors stay as they are.

    Mutates: the bucket's lists. Never the tensors.
    Raises: RuntimeError where parameter, gradient and state are not spread alike.
    """
    if "torch.distributed.tensor" not in sys.modules or bucket.differentiable or torch.compiler.is_compiling():
        return bucket
    if {*map(type, chain(*bucket.tensors()))} <= _KINDS:
        return bucket
    whole: dict[int, Tensor] = {}
    for i, p in enumerate(bucket.param):
        if is_lazy(p):  # it has no shape yet, and so no gradient and no state
            continue
        _check(bucket, i, p)
        if not is_dtensor(p):
            continue
        bucket.param[i] = shard(p)
        whole[id(bucket.param[i])] = p
        if bucket.grad:
            bucket.grad[i] = spread_as(p, bucket.grad[i])
        for values in bucket.tensors()[2:]:
            if values:
                values[i] = shard(values[i])
    bucket.whole = whole
    return bucket


def _differ(a: Any, b: Any) -> bool:
    """Whether one of two tensors is a DTensor and the other is not one that is spread alike."""
    return is_dtensor(a) != is_dtensor(b) or (is_dtensor(a) and not same_placements(a, b))


def spread_as(param: Any, x: Any) -> Tensor:
    """This process's part of a DTensor when it is spread as the parameter is. Processes talk where it is not."""
    own: Tensor = shard(x if same_placements(x, param) else x.redistribute(param.device_mesh, param.placements))
    return own


def _check(bucket: Bucket, i: int, param: Any) -> None:
    """Raise where a parameter cannot be stepped shard by shard."""
    shape = tuple(param.shape)
    if is_dtensor(param) and any(placement.is_partial() for placement in param.placements):
        raise RuntimeError(
            f"the parameter of shape {shape} is a DTensor of placements {param.placements}: each process holds a "
            "term of a sum, and a step of the terms is no step of the sum; redistribute it to Replicate or Shard"
        )
    for name, values in zip(("gradient", *_SLOTS), bucket.tensors()[1:], strict=True):
        if not values:
            continue
        x: Any = values[i]
        if is_dtensor(x) != is_dtensor(param):
            kinds = ["a DTensor" if is_dtensor(y) else f"a {type(y).__name__}" for y in (x, param)]
            raise RuntimeError(
                f"the {name} of the parameter of shape {shape} is {kinds[0]} and the parameter {kinds[1]}; "
                + _alike(name)
            )
        if name != "gradient" and is_dtensor(x) and not same_placements(x, param):
            raise RuntimeError(
                f"the {name} of the parameter of shape {shape} is spread as {x.placements} over {x.device_mesh} and "
                f"the parameter as {param.placements} over {param.device_mesh}; {_alike(name)}"
            )


def _alike(name: str) -> str:
    if name == "gradient":
        return "give it a gradient of its own kind, such as backward() makes"
    return "load the state again, or delete it from optimizer.state to begin afresh"


def written(bucket: Bucket) -> None:
    """Tell autograd that the DTensors were written whose shards a backend has stepped.

    Without it a backward pass through values from before the step would be silently wrong.
    """
    if bucket.whole:
        torch.autograd.graph.increment_version([p for p in bucket.whole.values() if not p.is_inference()])


def norm(g: Tensor) -> Tensor:
    """‖g‖ in float64, of any numbers: those whose squares float64 does not hold are divided by the largest first."""
    if g.numel() and (g.dtype in (torch.float64, torch.complex128) or g.device.type == "mps"):
        unit = torch.linalg.vector_norm(g.detach(), math.inf)
        unit = torch.where((unit > 0) & unit.isfinite(), unit, 1.0)
        if g.device.type != "mps":
            unit = unit / (2 * torch.frexp(unit).mantissa)  # a power of two: nothing is rounded
        relative: Tensor = torch.linalg.vector_norm(g / unit)
        return relative * unit
    found: Tensor = torch.linalg.vector_norm(g, dtype=torch.complex128 if g.is_complex() else torch.float64)
    return found


def norms(bucket: Bucket) -> list[Tensor]:
    """‖g‖ of every gradient, over all of its elements, wherever they are.

    Processes talk once for all gradients that are sharded alike; the sum is in float64.

    Returns: each in float64, in which no square of a float32 gradient overflows or vanishes (MPS has no float64).
    Raises: RuntimeError for a shard of FSDP1, whose other processes are not known here.
    """
    found = [norm(g) for g in bucket.grad]
    alike: dict[Any, list[int]] = {}
    for i, p in enumerate(bucket.param):
        if getattr(p, "_fsdp_flattened", False):
            raise RuntimeError(
                "clip_norm and clip_global_norm cannot see the other shards of FullyShardedDataParallel (FSDP1): "
                "call model.clip_grad_norm_(...) before step() instead, or shard with fully_shard (FSDP2), whose "
                "norms are taken over all processes"
            )
        owner: Any = bucket.whole.get(id(p))
        axes = () if owner is None else tuple(k for k, x in enumerate(owner.placements) if not x.is_replicate())
        if axes:
            alike.setdefault((owner.device_mesh, axes), []).append(i)
    for (mesh, axes), places in alike.items():
        squares = torch.stack([found[i] for i in places]).to(mesh.device_type, torch.float64).square()
        for axis in axes:
            torch.distributed.all_reduce(squares, group=mesh.get_group(axis))
        for i, whole in zip(places, squares.sqrt(), strict=True):
            found[i] = whole.to(found[i].device, found[i].dtype)
    return found


def groups(params: Iterable[Any]) -> list[tuple[Any, str]]:
    """The groups of processes, one for each axis of a mesh, that hold shards of one of these parameters together.

    Returns: each with the kind of device on which its processes talk.
    """
    meshes = dict.fromkeys(p.device_mesh for p in params if is_dtensor(p))
    return [(mesh.get_group(axis), mesh.device_type) for mesh in meshes for axis in range(mesh.ndim)]


def part_for(param: Any, value: Any) -> Tensor:
    """What this process holds of the value when it is spread as the parameter is; perhaps in the value's memory.

    Args:
        value: a DTensor, or a plain tensor that holds all of it, alike on every process. Processes talk only for a
            DTensor that is spread in another way.
    """
    if is_dtensor(value):
        return spread_as(param, value)
    if not is_dtensor(param):
        return value  # type: ignore[no-any-return]
    from torch.distributed.tensor import distribute_tensor

    value = value.to(param.device_mesh.device_type)
    own: Tensor = shard(distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None))
    return own


class DTensorWatch:
    """The DTensors among a plan's tensors: whether they are spread as they were when the plan was made.

    It owns none of them: parameters are those of today's groups, and slots are referred to weakly. No process waits
    for another: a gradient that is not spread as its parameter is sends the step the full way.

    Attributes:
        slots: the place and the name of every slot that is a DTensor.
    """

    def __init__(self, params: Sequence[Tensor], state: Mapping[Any, Mapping[str, Any]]) -> None:
        self._places = [i for i, p in enumerate(params) if is_dtensor(p)]
        self.any = bool(self._places)
        own: list[Any] = [params[i] for i in self._places]
        self._specs = [p._spec for p in own]
        self._known: list[Any] = self._specs  # of the gradients: most share the parameter's
        entries = [(i, state.get(p, {})) for i, p in zip(self._places, own, strict=True)]
        kept = [(i, name, x) for i, entry in entries for name, x in entry.items() if is_dtensor(x)]
        self.slots = [(i, name) for i, name, _ in kept]
        self._refs = [weakref.ref(x) for *_, x in kept]
        self._slot_specs = [x._spec for *_, x in kept]

    def stepped(self, bucket: Bucket) -> Bucket:
        """The bucket as it is stepped, with shards; as it is where something is not spread as its parameter is."""
        if not self.any:
            return bucket
        beside = [
            x for values in bucket.tensors()[1:] for p, x in zip(bucket.param, values, strict=False) if _differ(p, x)
        ]
        return bucket if beside else localized(bucket)

    def today(self, params: list[Any], grads: list[Any]) -> tuple[list[Any], list[Any], list[Any]] | None:
        """The parameters with the shard in the place of every DTensor, the slots, and the shards of these.

        Args:
            params: of every group in order.
            grads: of each its gradient, or None. Mutates: shards come in the place of DTensors.
        Returns: None where something moved.
        """
        own = list(map(params.__getitem__, self._places))
        given = list(map(grads.__getitem__, self._places))
        slots = [ref() for ref in self._refs]
        try:
            if not _same(map(_SPEC, own), self._specs) or not _same(map(_SPEC, slots), self._slot_specs):
                return None
            stepped = list(params)
            for i, p in zip(self._places, own, strict=True):
                stepped[i] = p._local_tensor
            parts = list(map(_SHARD, slots))
        except AttributeError:  # something else in the place of a DTensor
            return None
        specs = list(map(_kind, given))
        if not _same(specs, self._known):
            for param, grad in zip(own, given, strict=True):
                if grad is not None and not (is_dtensor(grad) and same_placements(grad, param)):
                    return None
            self._known = specs
        for i, grad in zip(self._places, given, strict=True):
            grads[i] = None if grad is None else grad._local_tensor
        return stepped, slots, parts


def _kind(grad: Any) -> Any:
    """The object that says how a gradient is spread; of any other the type, and of None that of None."""
    return getattr(grad, "_spec", None) or type(grad)


_SHARD = attrgetter("_local_tensor")
_SPEC = attrgetter("_spec")


def _same(found: Iterable[Any], known: Iterable[Any]) -> bool:
    """Whether they are the same objects, one by one."""
    return all(map(is_, found, known))
