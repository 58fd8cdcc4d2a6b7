"""Puts the averages of the weights, line [10], into a model: for an evaluation, or for good. Averages buffers too."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rmsprop.printing import shown
from rmsprop.spec import Averaging
from rmsprop.tensors.averaging import average
from rmsprop.tensors.bucket import Bucket, arithmetic_dtype

KEY = "ema_buffers"  # of a state dict

_SAVE = "save after the block, or save model.state_dict() alone for the averaged model"


class BufferAverages:
    """Averages of a model's buffers, such as BatchNorm's running statistics, with the decay of the weights' average.

    Integer buffers, such as num_batches_tracked, are copied.

    Attributes:
        averages: the averages by the buffers' names in the model.
    """

    def __init__(self, optimizer: Any, model: nn.Module, saved: Mapping[str, Tensor] | None) -> None:
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._owners = {
            f"{prefix}.{key}" if prefix else key: (module, key)
            for prefix, module in model.named_modules()
            for key, buffer in module.named_buffers(recurse=False)
            if key not in module._non_persistent_buffers_set
        }
        current = self.current()
        saved = {} if saved is None else saved
        _check_buffers(current, saved)
        with torch.no_grad():
            self.averages = {
                name: saved.get(name, x).detach().to(device=x.device, dtype=_dtype(x), copy=True)
                for name, x in current.items()
            }
        self.count_from(optimizer)

    def count_from(self, optimizer: Any) -> None:
        """Begin to count updates from the optimizer's present state, which a load may have replaced.

        A step moves the sum of its counts, whichever parameters have a gradient, and a skipped one does not.
        """
        steps = _steps(optimizer)
        self._sum = None if steps is None else steps.sum()
        self._count = None if steps is None else steps.max()

    def current(self) -> dict[str, Tensor]:
        """Return the model's buffers by name. Modules may have replaced the tensors."""
        found = {name: module._buffers[key] for name, (module, key) in self._owners.items()}
        return {name: x for name, x in found.items() if x is not None}

    def name_of(self, p: Tensor) -> str | None:
        """Return the name of a parameter in the model."""
        return self._names.get(id(p))

    @torch.no_grad()
    def update(self, optimizer: Any) -> None:
        """Advance the averages after a step, unless it was skipped."""
        group = next((group for group in optimizer.param_groups if group["ema"] is not None), None)
        steps = _steps(optimizer)
        if group is None or steps is None:
            return
        total = steps.sum()
        last = torch.zeros_like(total) if self._sum is None else self._sum.to(total.device)
        skipped = total == last
        if skipped.is_cpu and bool(skipped):
            return
        count = torch.zeros_like(total) if self._count is None else self._count.to(total.device)
        self._sum, self._count = total, count + (~skipped).to(count.dtype)
        skips = None if skipped.is_cpu else skipped
        averaged = []
        for name, x in self.current().items():
            own = self.averages.get(name)
            if own is None or own.shape != x.shape:  # a module has made or resized it
                self.averages[name] = x.detach().to(_dtype(x), copy=True)
            elif x.is_floating_point() or x.is_complex():
                averaged.append((x, own))
            else:
                own.copy_(x if skips is None else torch.where(skips.to(x.device), own, x))
        if averaged:
            buffers, own_averages = map(list, zip(*averaged, strict=True))
            slots = {"ema": own_averages, "step": [self._count] * len(averaged)}
            bucket = Bucket(buffers, slots=slots, capturable=group["capturable"], found_inf=skips)
            average(Averaging.of(group), bucket)


def _dtype(x: Tensor) -> torch.dtype:
    return arithmetic_dtype(x.dtype)


def _check_buffers(current: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Refuse saved averages of other buffers."""
    for name, x in saved.items():
        if name not in current or current[name].shape != x.shape:
            here = f"of shape {tuple(current[name].shape)}" if name in current else "missing"
            raise ValueError(
                f"the loaded average of the buffer {shown(name, 80)} has shape {tuple(x.shape)}, and the buffer is "
                f"{here} in this model; give average_buffers the model that was saved"
            )


def _steps(optimizer: Any) -> Tensor | None:
    """Return the step counts of all parameters in a tensor. None if none has stepped."""
    entries = [optimizer.state.get(p) for group in optimizer.param_groups for p in group["params"]]
    found = [entry["step"] for entry in entries if entry and isinstance(entry.get("step"), Tensor)]
    return torch.stack([t.detach().reshape(()).to(found[0]) for t in found]) if found else None


def _averages(optimizer: Any, call: str) -> list[tuple[Tensor, Tensor]]:
    """Return every parameter that has an average, with it. One that has not stepped has none, and needs none."""
    groups = [group for group in optimizer.param_groups if group["ema"] is not None]
    if not groups:
        raise ValueError(f"{call} needs an average of the weights: give ema=..., such as ema=0.9999, to RMSprop")
    entries = [(p, (optimizer.state.get(p) or {}).get("ema")) for group in groups for p in group["params"]]
    return [(p, e) for p, e in entries if isinstance(e, Tensor)]


def refuse_swapped(optimizer: Any, call: str, advice: str = _SAVE) -> None:
    """Raise RuntimeError inside `averaged`, where the parameters hold the averages."""
    if optimizer._stepper.swapped:
        raise RuntimeError(
            f"{call} inside averaged(): the parameters hold the averages there, and training would go on from them; "
            + advice
        )


def average_buffers(optimizer: Any, model: nn.Module) -> None:
    """Average the buffers of a model at each step. See RMSprop.average_buffers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"average_buffers takes a torch.nn.Module, but got {shown(model)}")
    refuse_swapped(optimizer, "average_buffers()", "leave the block first")
    _averages(optimizer, "average_buffers()")
    stepper = optimizer._stepper
    saved = stepper.loaded_buffers if stepper.buffers is None else stepper.buffers.averages
    buffers = BufferAverages(optimizer, model, saved)
    if stepper.buffers is None:
        optimizer.register_step_post_hook(_advance_buffers)
    stepper.buffers, stepper.loaded_buffers = buffers, None


def _advance_buffers(optimizer: Any, *_: Any) -> None:
    """Advance the averages of the buffers after a step: a hook, so that optimizers without them pay nothing."""
    if optimizer._stepper.buffers is not None:
        optimizer._stepper.buffers.update(optimizer)


def saved_buffers(optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """Return the entry of a state dict with the averages of buffers. Empty if there are none."""
    stepper = optimizer._stepper
    held = stepper.loaded_buffers if stepper.buffers is None else stepper.buffers.averages
    return {} if held is None else {KEY: dict(held)}


def check_buffers(optimizer: Any, state_dict: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Return copies of the averages of buffers in a state dict. None without them.

    Raises: ValueError for other values, and for other buffers than those of the registered model.
    """
    saved = state_dict.get(KEY)
    if saved is None:
        return None
    tensors = isinstance(saved, Mapping) and all(
        isinstance(name, str) and type(x) is Tensor and not x.is_meta for name, x in saved.items()
    )
    if not tensors:
        raise ValueError(f"loaded state dict's {KEY} is {shown(saved)}; it takes the averages of buffers by name")
    if optimizer._stepper.buffers is not None:
        _check_buffers(optimizer._stepper.buffers.current(), saved)
    return {name: x.detach().clone() for name, x in saved.items()}


def load_buffers(optimizer: Any, loaded: dict[str, Tensor] | None) -> None:
    """Replace the averages of buffers by loaded ones, or keep them until `average_buffers` names the model."""
    stepper = optimizer._stepper
    if stepper.buffers is None:
        stepper.loaded_buffers = stepper.loaded_buffers if loaded is None else loaded
        return
    stepper.buffers.count_from(optimizer)
    for name, x in (loaded or {}).items():
        own = stepper.buffers.averages[name]
        stepper.buffers.averages[name] = x.to(device=own.device, dtype=own.dtype)


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """Let the parameters hold the averages inside the block. See RMSprop.averaged."""
    refuse_swapped(optimizer, "averaged()", "leave the outer block first")
    pairs = _averages(optimizer, "averaged()")
    stepper = optimizer._stepper
    if stepper.shared:
        raise ValueError(
            "averaged() would give the averages to the other processes that train these shared parameters: use "
            "average_into(copy.deepcopy(model))"
        )
    if stepper.buffers is not None:
        current = stepper.buffers.current()
        pairs += [(x, stepper.buffers.averages[name]) for name, x in current.items()]
    with torch.no_grad():
        weights = [x.detach().clone() for x, _ in pairs]
    stepper.drop_plan()
    stepper.swapped = True
    try:
        _copy(pairs)
        yield
    finally:
        _copy(zip((x for x, _ in pairs), weights, strict=True))
        stepper.swapped = False


def average_into(optimizer: Any, model: nn.Module | None) -> None:
    """Write the averages into a model for good. See RMSprop.average_into."""
    refuse_swapped(optimizer, "average_into()", "leave the block first")
    pairs = _averages(optimizer, "average_into()")
    buffers = optimizer._stepper.buffers
    if model is None:
        _copy(pairs)
        own = {id(p) for p, _ in pairs}
        _copy([] if buffers is None else [(x, buffers.averages[name]) for name, x in buffers.current().items()])
    else:
        if not isinstance(model, nn.Module):
            raise TypeError(f"average_into takes a torch.nn.Module or None, but got {shown(model)}")
        found = _matched(optimizer, model, pairs)
        own = {id(p) for p, _ in found}
        theirs = dict(model.named_buffers())
        known = {} if buffers is None else buffers.averages
        into = [(theirs[name], x) for name, x in known.items() if name in theirs]
        for x, value in into:
            _check_shape("buffer", x, value)
        _copy([*found, *into])
    with torch.no_grad():
        for p, entry in optimizer.state.items():
            if id(p) in own and isinstance(entry.get("compensation"), Tensor):
                entry["compensation"].zero_()  # it was the remainder of other weights


def _matched(optimizer: Any, model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return the model's parameters with their averages: the optimizer's own, or those of a copy, by name or order.

    Raises: ValueError for a model with other parameters.
    """
    theirs = dict(model.named_parameters())
    own = {id(p) for p in theirs.values()}
    mine = [(p, e) for p, e in pairs if id(p) in own]
    if mine:
        return mine
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    buffers = optimizer._stepper.buffers
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    if len(names) != len(listed):
        found = [None if buffers is None else buffers.name_of(p) for p in listed]
        names = [name for name in found if name is not None]
    if len(names) == len(listed):
        missing = [name for name in names if name not in theirs]
        if missing:
            raise ValueError(_other(f"no parameter {shown(missing[0], 80)}"))
        targets = [theirs[name] for name in names]
    else:
        targets = list(theirs.values())
        if len(targets) != len(listed):
            raise ValueError(_other(f"{len(targets)} parameters where the optimizer has {len(listed)}"))
    target = {id(p): x for p, x in zip(listed, targets, strict=True)}
    for p, x in zip(listed, targets, strict=True):
        _check_shape("parameter", x, p)
    averages = {id(p): e for p, e in pairs}
    return [(target[id(p)], averages.get(id(p), p)) for p in listed]


def _check_shape(kind: str, theirs: Tensor, ours: Tensor) -> None:
    if theirs.shape != ours.shape:
        raise ValueError(
            _other(f"a {kind} of shape {tuple(theirs.shape)} where the optimizer has {tuple(ours.shape)}")
        )


def _other(what: str) -> str:
    return (
        f"average_into was given a model with {what}: give the model that is trained, or a copy of it, and build the "
        "optimizer with model.named_parameters() if the order differs"
    )


@torch.no_grad()
def _copy(pairs: Any) -> None:
    for into, value in pairs:
        into.copy_(value)
