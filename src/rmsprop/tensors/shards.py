"""Steps DTensor parameters, of FSDP2, tensor and expert parallelism, by their local shards.

RMSprop is element-wise, so each process steps its own shard and nothing is sent. A step replaces each DTensor by its
shard, a plain tensor in the same memory. The state stays a DTensor of the parameter's global shape, mesh and
placements, as distributed checkpoints need it.

Processes communicate only for norms, and for a gradient that is not summed over the processes yet (Partial, as of
layer norms under SequenceParallel). torch.distributed is not imported unless a DTensor exists.
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

from rmsprop.printing import with_article
from rmsprop.tensors.bucket import Bucket

_PLAIN = (Tensor, torch.nn.Parameter)
_KINDS = {*_PLAIN}


def is_dtensor(tensor: object) -> bool:
    """Return whether a value is a DTensor, without importing torch.distributed.tensor."""
    if type(tensor) in _PLAIN:
        return False
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def shard(tensor: Any) -> Any:
    """Return this process's shard of a DTensor, in the same memory. Any other value is returned as is."""
    if not is_dtensor(tensor):
        return tensor
    local = tensor._local_tensor  # to_local() makes a new view each time
    return local.wait() if type(local) not in _PLAIN and hasattr(local, "wait") else local  # AsyncCollectiveTensor


def shard_of_gradient(param: Tensor) -> Tensor | None:
    """Return this process's shard of the parameter's gradient. None if it is only known by communication."""
    grad = param.grad
    return None if grad is None or _differ(param, grad) else shard(grad)


def same_placements(a: Any, b: Any) -> bool:
    """Return whether two DTensors have the same mesh and placements."""
    return a._spec is b._spec or bool(a.device_mesh == b.device_mesh and a.placements == b.placements)


def localized(bucket: Bucket) -> Bucket:
    """Return the bucket with each DTensor replaced by its shard, so that a mixed group becomes plain tensors.

    A gradient with other placements than its parameter is redistributed first, as torch's own operators do, for which
    processes communicate. DTensors stay if autograd records the step or a compiler traces it.

    Mutates: the bucket's lists. Never the tensors.
    Raises: RuntimeError if parameter, gradient and state do not have the same placements.
    """
    if "torch.distributed.tensor" not in sys.modules or bucket.differentiable or torch.compiler.is_compiling():
        return bucket
    if {*map(type, chain(*bucket.tensors()))} <= _KINDS:
        return bucket
    whole: dict[int, Tensor] = {}
    for i, p in enumerate(bucket.param):
        if is_lazy(p):  # without a shape it has no gradient and no state
            continue
        _check(bucket, i, p)
        if not is_dtensor(p):
            continue
        bucket.param[i] = shard(p)
        whole[id(bucket.param[i])] = p
        if bucket.grad:
            bucket.grad[i] = shard_like(p, bucket.grad[i])
        for values in bucket.shaped().values():
            if values:
                values[i] = shard(values[i])
    bucket.whole = whole
    return bucket


def _differ(a: Any, b: Any) -> bool:
    """Return whether two tensors differ in being a DTensor, or in mesh or placements."""
    return is_dtensor(a) != is_dtensor(b) or (is_dtensor(a) and not same_placements(a, b))


def shard_like(param: Any, x: Any) -> Tensor:
    """Return this process's shard of a DTensor, redistributed to the parameter's placements if they differ."""
    own: Tensor = shard(x if same_placements(x, param) else x.redistribute(param.device_mesh, param.placements))
    return own


def _check(bucket: Bucket, i: int, param: Any) -> None:
    """Refuse a parameter that cannot be stepped shard by shard."""
    shape = tuple(param.shape)
    if is_dtensor(param) and any(placement.is_partial() for placement in param.placements):
        raise RuntimeError(
            f"the parameter of shape {shape} is a DTensor of placements {param.placements}: each process holds one "
            "term of a sum, and stepping the terms does not step the sum; redistribute it to Replicate or Shard"
        )
    for name, values in {"gradient": bucket.grad, **bucket.shaped()}.items():
        if not values:
            continue
        x: Any = values[i]
        if is_dtensor(x) != is_dtensor(param):
            kinds = ["a DTensor" if is_dtensor(y) else with_article(type(y).__name__) for y in (x, param)]
            raise RuntimeError(
                f"the {name} of the parameter of shape {shape} is {kinds[0]} and the parameter {kinds[1]}; "
                + _advice(name)
            )
        if name != "gradient" and is_dtensor(x) and not same_placements(x, param):
            raise RuntimeError(
                f"the {name} of the parameter of shape {shape} has placements {x.placements} on {x.device_mesh} and "
                f"the parameter {param.placements} on {param.device_mesh}; {_advice(name)}"
            )


def _advice(name: str) -> str:
    if name == "gradient":
        return "give it a gradient of its own type, such as backward() makes"
    return "load the state again, or delete it from optimizer.state to start fresh"


def written(bucket: Bucket) -> None:
    """Increment autograd's version counters of the DTensors whose shards were stepped.

    Otherwise a backward pass through values from before the step would be silently wrong.
    """
    if bucket.whole:
        torch.autograd.graph.increment_version([p for p in bucket.whole.values() if not p.is_inference()])


def norm(g: Tensor) -> Tensor:
    """Return ‖g‖ in float64. Where squares could overflow float64, g is divided by its largest magnitude first."""
    if g.numel() and (g.dtype in (torch.float64, torch.complex128) or g.device.type == "mps"):
        unit = torch.linalg.vector_norm(g.detach(), math.inf)
        unit = torch.where((unit > 0) & unit.isfinite(), unit, 1.0)
        if g.device.type != "mps":
            unit = unit / (2 * torch.frexp(unit).mantissa)  # a power of two: nothing is rounded
        relative: Tensor = torch.linalg.vector_norm(g / unit)
        return relative * unit
    wide: Tensor = torch.linalg.vector_norm(g, dtype=torch.complex128 if g.is_complex() else torch.float64)
    return wide


def of_fsdp1(p: Tensor) -> bool:
    """Return whether a parameter holds shards of FullyShardedDataParallel, whose other shards nothing names."""
    return bool(getattr(p, "_fsdp_flattened", False))


def norms(bucket: Bucket) -> list[Tensor]:
    """Return ‖g‖ of every gradient, over the shards of all processes.

    Processes communicate once for all gradients with the same mesh and sharded axes. The sum is in float64.

    Returns: norms in float64, where the square of a float32 gradient cannot overflow or vanish; on MPS in float32.
    Raises: RuntimeError for a shard of FSDP1, whose process group is unknown here.
    """
    found = [norm(g) for g in bucket.grad]
    alike: dict[Any, list[int]] = {}
    for i, p in enumerate(bucket.param):
        if of_fsdp1(p):
            raise RuntimeError(
                "clip_norm and clip_global_norm cannot see the other shards of FullyShardedDataParallel (FSDP1): "
                "call model.clip_grad_norm_(...) before step() instead, or shard with fully_shard (FSDP2), whose "
                "norms are taken over all processes"
            )
        owner: Any = bucket.whole.get(id(p))
        axes = () if owner is None else tuple(k for k, x in enumerate(owner.placements) if not x.is_replicate())
        if axes:
            alike.setdefault((owner.device_mesh, axes), []).append(i)
    for (mesh, axes), indices in alike.items():
        squares = torch.stack([found[i] for i in indices]).to(mesh.device_type, torch.float64).square()
        for axis in axes:
            torch.distributed.all_reduce(squares, group=mesh.get_group(axis))
        for i, whole in zip(indices, squares.sqrt(), strict=True):
            found[i] = whole.to(found[i].device, found[i].dtype)
    return found


def groups(params: Iterable[Any]) -> list[tuple[Any, str]]:
    """Return the process groups, one for each mesh axis, that share one of these parameters.

    Returns: pairs of a group and the type of device that it communicates on.
    """
    meshes = dict.fromkeys(p.device_mesh for p in params if is_dtensor(p))
    return [(mesh.get_group(axis), mesh.device_type) for mesh in meshes for axis in range(mesh.ndim)]


def part_for(param: Any, value: Any) -> Tensor:
    """Return this process's shard of a value under the parameter's placements; it may share the value's memory.

    Args:
        value: a DTensor, or a full plain tensor that is equal on every process. Processes communicate only for a
            DTensor with other placements.
    """
    if is_dtensor(value):
        return shard_like(param, value)
    if not is_dtensor(param):
        return value  # type: ignore[no-any-return]
    from torch.distributed.tensor import distribute_tensor

    value = value.to(param.device_mesh.device_type)
    own: Tensor = shard(distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None))
    return own


class DTensorWatch:
    """Checks that the DTensors of a plan have the placements that they had when the plan was made.

    It owns none of them: parameters come from the current groups, and slots are referred to weakly. Processes do not
    communicate: a gradient with other placements than its parameter needs the full step.

    Attributes:
        slots: the index of the parameter and the name of every slot that is a DTensor.
    """

    def __init__(self, params: Sequence[Tensor], state: Mapping[Any, Mapping[str, Any]]) -> None:
        self._indices = [i for i, p in enumerate(params) if is_dtensor(p)]
        self.any = bool(self._indices)
        own: list[Any] = [params[i] for i in self._indices]
        self._specs = [p._spec for p in own]
        self._known: list[Any] = self._specs  # of the gradients, which mostly share their parameter's
        entries = [(i, state.get(p, {})) for i, p in zip(self._indices, own, strict=True)]
        kept = [(i, name, x) for i, entry in entries for name, x in entry.items() if is_dtensor(x)]
        self.slots = [(i, name) for i, name, _ in kept]
        self._refs = [weakref.ref(x) for *_, x in kept]
        self._slot_specs = [x._spec for *_, x in kept]

    def stepped(self, bucket: Bucket) -> Bucket:
        """Return the bucket with shards. It stays unchanged if a tensor's placements differ from its parameter's."""
        if not self.any:
            return bucket
        mismatched = [
            x for values in bucket.tensors()[1:] for p, x in zip(bucket.param, values, strict=False) if _differ(p, x)
        ]
        return bucket if mismatched else localized(bucket)

    def current(self, params: list[Any], grads: list[Any]) -> tuple[list[Any], list[Any], list[Any]] | None:
        """Return the parameters with each DTensor replaced by its shard, the DTensor slots, and the slots' shards.

        Args:
            params: the parameters of every group in order.
            grads: their gradients, or None. Mutates: DTensors are replaced by their shards.
        Returns: None if a tensor or its placements changed.
        """
        own = list(map(params.__getitem__, self._indices))
        given = list(map(grads.__getitem__, self._indices))
        slots = [ref() for ref in self._refs]
        try:
            if not _same(map(_SPEC, own), self._specs) or not _same(map(_SPEC, slots), self._slot_specs):
                return None
            stepped = list(params)
            for i, p in zip(self._indices, own, strict=True):
                stepped[i] = p._local_tensor
            parts = list(map(_SHARD, slots))
        except AttributeError:  # a DTensor was replaced by something else
            return None
        specs = list(map(_kind, given))
        if not _same(specs, self._known):
            for param, grad in zip(own, given, strict=True):
                if grad is not None and not (is_dtensor(grad) and same_placements(grad, param)):
                    return None
            self._known = specs
        for i, grad in zip(self._indices, given, strict=True):
            grads[i] = None if grad is None else grad._local_tensor
        return stepped, slots, parts


def _kind(grad: Any) -> Any:
    """Return the DTensorSpec of a gradient, or the type of any other value."""
    return getattr(grad, "_spec", None) or type(grad)


_SHARD = attrgetter("_local_tensor")
_SPEC = attrgetter("_spec")


def _same(found: Iterable[Any], known: Iterable[Any]) -> bool:
    """Return whether both hold the same objects, in order."""
    return all(map(is_, found, known))
