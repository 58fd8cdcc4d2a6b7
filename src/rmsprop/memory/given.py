"""Reads what `estimate` is given: a module, parameters, groups or a checkpoint, as tensors that take no memory."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rmsprop import checkpoint
from rmsprop.conversion.outline import Outline, outline_of, read_outline
from rmsprop.conversion.record import Unreadable
from rmsprop.printing import shown, with_article
from rmsprop.tensors import params, shards

Named = tuple[str, Tensor]


@dataclass(frozen=True)
class Origin:
    """The facts of a parameter that its stand-in on the meta device does not have.

    Attributes:
        bytes: what it holds now; 0 for a second parameter in the memory of another.
        device: the type of its device, "meta" if it has none yet.
        family: torch.Tensor, or the subclass that its class is.
        sparse: whether its gradient is a sparse tensor.
        of_mesh: whether it is this process's shard of a DTensor.
    """

    name: str
    bytes: int
    device: str
    family: type
    sparse: bool
    of_mesh: bool

    @property
    def place(self) -> str:
        """The type of the device that it is counted on: a CPU for one that has none yet."""
        return "cpu" if self.device == "meta" else self.device


@dataclass
class Given:
    """Parameters by group, as the optimizer takes them, and the buffers beside them.

    Attributes:
        groups: settings with `params`, pairs of a name and a parameter, or parameters alone.
        buffers: tensors of the model that no optimizer moves.
        sparse: ids of parameters whose gradients are sparse.
        notes: what was assumed, in sentences.
        filled: whether every group has all settings, since an optimizer made it.
    """

    groups: list[dict[str, Any]]
    buffers: list[Tensor] = field(default_factory=list)
    sparse: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    filled: bool = False

    def stand_ins(self, dtype: torch.dtype | None) -> tuple[list[dict[str, Any]], dict[int, Origin]]:
        """Return the groups with every parameter replaced by one on the meta device, and the origins by their ids.

        Args:
            dtype: of all floating-point parameters, as after `model.to(dtype)`. None: their own.
        """
        made: dict[int, nn.Parameter] = {}
        origins: dict[int, Origin] = {}
        places: set[Any] = set()
        groups = []
        for group in self.groups:
            listed: list[Any] = []
            for i, entry in enumerate(group["params"]):
                name, p = entry if isinstance(entry, tuple) else (str(i), entry)
                if id(p) not in made:
                    own = made[id(p)] = _stand_in(name, p, dtype)
                    origins[id(own)] = self._origin(name, p, own, places)
                listed.append((name, made[id(p)]) if isinstance(entry, tuple) else made[id(p)])
            groups.append({**group, "params": listed})
        return groups, origins

    def _origin(self, name: str, p: Tensor, own: Tensor, places: set[Any]) -> Origin:
        local = shards.shard(p)
        plain = type(local) in (Tensor, nn.Parameter, FakeTensor)
        size = own.nbytes if plain else held_bytes(local)
        if plain and local.numel() and own.dtype == local.dtype:
            place = (local.untyped_storage()._cdata, local.storage_offset(), local.shape, local.stride())
            size = 0 if place in places else size
            places.add(place)
        family = Tensor if plain else type(local)
        sparse = id(p) in self.sparse or (p.grad is not None and p.grad.is_sparse)
        return Origin(name, size, local.device.type, family, sparse, shards.is_dtensor(p))

    def buffer_bytes(self, dtype: torch.dtype | None) -> int:
        """Return the bytes of the buffers, each once."""
        wide = None if dtype is None else dtype.itemsize
        return sum(
            held_bytes(x) if wide is None or not _converts(x) else shards.shard(x).numel() * wide
            for x in self.buffers
        )


def read(model: Any, place: str | None = None) -> Given:
    """Return what `model` holds.

    Args:
        model: a module, a path of a checkpoint, an iterable of parameters or of groups, or an optimizer.
        place: the path of the model in a file that holds several.
    Raises: TypeError or ValueError in one sentence.
    """
    if isinstance(model, str | bytes | os.PathLike):
        return _from_outline(_outline(Path(os.fsdecode(model)), place))
    if place is not None:
        raise ValueError(
            f"parameters={shown(place)} selects a model in a checkpoint file, but model is not a path; leave it out"
        )
    if isinstance(model, nn.Module):
        named = list(model.named_parameters())
        if not named:
            raise ValueError(f"the model ({type(model).__name__}) has no parameters, so there is nothing to estimate")
        made = Given([{"params": named}], list(model.buffers()))
        for layer in model.modules():
            if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
                made.sparse.add(id(layer.weight))
    elif isinstance(model, torch.optim.Optimizer):
        made = Given(list(_groups(model.param_groups)), filled=True)
    else:
        made = Given(list(_groups(params.not_empty(model))))
    if not any(group["params"] for group in made.groups):
        raise ValueError("model holds no parameters; give a module, or a list that is not empty")
    for group in made.groups:
        for i, entry in enumerate(group["params"]):
            name, p = entry if isinstance(entry, tuple) else (str(i), entry)
            if is_lazy(p):
                raise ValueError(
                    f"parameter {name} is of a lazy layer and has no shape yet: run a forward pass of the model "
                    "first, or give the layer its sizes"
                )
    return made


def held_bytes(x: Tensor) -> int:
    """Return the bytes that a tensor holds in this process: of a wrapper, such as a quantized one, its parts'."""
    local = shards.shard(x)
    if type(local) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(local):
        names, _ = local.__tensor_flatten__()
        return sum(held_bytes(getattr(local, name)) for name in names)
    return int(local.numel() * local.element_size())


def _converts(x: Tensor) -> bool:
    """Return whether `model.to(dtype)` converts a tensor, as far as an optimizer could step it."""
    plain = type(shards.shard(x)) in (Tensor, nn.Parameter, FakeTensor)
    return plain and x.is_floating_point() and x.dtype.itemsize > 1


def _stand_in(name: str, p: Tensor, dtype: torch.dtype | None) -> nn.Parameter:
    """Return a parameter on the meta device with this process's shape and strides. Raises: ValueError."""
    local = shards.shard(p)
    if local.layout != torch.strided:
        raise ValueError(f"parameter {name} is of layout {local.layout}, and RMSprop steps dense parameters only")
    own = dtype if dtype is not None and _converts(p) else local.dtype
    made = torch.empty_strided(tuple(local.shape), local.stride(), dtype=own, device="meta")
    return nn.Parameter(made, requires_grad=p.requires_grad)


def _groups(given: Any) -> Iterator[dict[str, Any]]:
    """Yield the groups of an iterable of groups, or of parameters, as one. Raises: TypeError or ValueError."""
    if isinstance(given, Tensor):
        raise TypeError("model is a tensor; give a list of parameters, such as [tensor], or a module")
    entries = list(given)
    if not any(isinstance(entry, Mapping) for entry in entries):
        entries = [{"params": entries}]
    for i, group in enumerate(entries):
        if not isinstance(group, Mapping):
            kind = with_article(type(group).__name__)
            raise TypeError(f"entry {i} of model is {kind} among groups; put it into a group of its own")
        if "params" not in group:
            raise ValueError(f"group {i} of model has no params; it holds {shown(list(group))}")
        own = group["params"]
        own = [own] if isinstance(own, Tensor) else own
        if isinstance(own, set) or not isinstance(own, Iterable):
            raise TypeError(f"params of group {i} is {with_article(type(own).__name__)}; it takes a list of tensors")
        listed = params.listed(own)
        named = group.get("param_names")
        if isinstance(named, list) and len(named) == len(listed) and not any(isinstance(p, tuple) for p in listed):
            listed = list(zip(named, listed, strict=True))
        yield {**{k: v for k, v in group.items() if k != "param_names"}, "params": listed}


def _outline(path: Path, place: str | None) -> Outline:
    """Return the outline of a checkpoint. Raises: Unreadable or ValueError."""
    if not (path.is_file() and checkpoint.is_checkpoint(path)):
        return read_outline(path, place)
    try:
        return outline_of(checkpoint.read(path, shapes=True), path, place)
    except ImportError as error:
        raise Unreadable(str(error)) from None


def _from_outline(found: Outline) -> Given:
    named = []
    for name, x in found.trained.items():
        held = torch.empty_strided(tuple(x.shape), x.stride(), dtype=x.dtype, device="meta")
        if not (x.is_floating_point() or x.is_complex()):
            raise Unreadable(
                f"{shown(name)} is trained by the file's optimizer and is {x.dtype}, which has no gradient"
            )
        named.append((name, nn.Parameter(held)))
    if not named:
        raise Unreadable("the file's model has no floating-point parameters, so there is nothing to estimate")
    others = [torch.empty(tuple(x.shape), dtype=x.dtype, device="meta") for x in found.others.values()]
    return Given([{"params": named}], others, notes=list(found.notes))
