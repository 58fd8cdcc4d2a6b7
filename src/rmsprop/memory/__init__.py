"""Estimates the memory of a training before it runs: weights, gradients, state, and what a step allocates."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from rmsprop.in_backward import StepInBackward
from rmsprop.memory import given, steps
from rmsprop.memory.text import lines
from rmsprop.optimizer import RMSprop
from rmsprop.printing import printable, shown, with_article
from rmsprop.spec import STATE_DTYPES
from rmsprop.tensors.bucket import is_narrowable

__all__ = ["Alternative", "Estimate", "Usage", "estimate"]

_UNITS = {
    "": 1,
    **{p: 1000**i for i, p in enumerate("kmgtp", 1)},
    **{f"{p}i": 1024**i for i, p in enumerate("kmgtp", 1)},
}
_AMOUNT = re.compile(r"\s*(\d+\.?\d*(?:e\+?\d+)?|\.\d+)\s*([kmgtp]i?)?b?\s*", re.IGNORECASE)
_LEAST = {"rounding": "stochastic", "compensation": False, "state_dtype": "float8"}
_NOTHING: Mapping[str, Any] = {}
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Usage:
    """The bytes of a parameter group, or of all groups together.

    Attributes:
        weights: parameters, with frozen ones.
        gradients: all that are in memory together.
        slots: the state by its name: `square_avg`, `grad_avg`, `momentum_buffer`, `step`; another optimizer's in all.
        average: the average of the weights, `ema`.
        remainders: the Kahan remainders, `compensation`.
        step: what a step allocates at its peak, beyond all of these.
        buffers: the model's buffers. They belong to no group.
    """

    weights: int = 0
    gradients: int = 0
    slots: Mapping[str, int] = field(default_factory=dict)
    average: int = 0
    remainders: int = 0
    step: int = 0
    buffers: int = 0

    @property
    def state(self) -> int:
        """All that the optimizer keeps: slots, average and remainders."""
        return sum(self.slots.values()) + self.average + self.remainders

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.weights + self.gradients + self.state + self.step + self.buffers

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "slots": dict(self.slots), "state": self.state, "total": self.total}


@dataclass(frozen=True)
class Alternative:
    """Another way to train the same model.

    Attributes:
        name: what is different, in words.
        settings: what changes in the call.
        usage: its bytes; None if it does not go with the settings.
        reason: why it does not, or "".
    """

    name: str
    settings: Mapping[str, Any]
    usage: Usage | None
    reason: str = ""


@dataclass(frozen=True)
class Estimate:
    """The bytes that training a model takes beside its activations. `str()` has them as text.

    Attributes:
        call: the optimizer, as it was asked for.
        device: the types of the devices that hold the parameters.
        backends: the backends that take the step.
        elements: the number of weights that are trained, in `tensors` tensors.
        frozen: the number of weights that are not.
        groups: the bytes of each parameter group, where `step` is what the group's own step allocates.
        total: the bytes in all, for the settings as given.
        alternatives: the bytes of other settings and of torch's Adam.
        memory: the bytes that there are, if they were given.
        notes: what was assumed, in sentences.
    """

    call: str
    device: str
    backends: tuple[str, ...]
    elements: int
    tensors: int
    frozen: int
    groups: tuple[Usage, ...]
    total: Usage
    alternatives: tuple[Alternative, ...]
    memory: int | None
    notes: tuple[str, ...]

    def fits(self, usage: Usage | None = None) -> bool | None:
        """Return whether the settings as given, or an alternative's usage, fit into `memory`. None without one."""
        return None if self.memory is None else (usage or self.total).total <= self.memory

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        others = [
            {
                "name": other.name,
                "settings": dict(other.settings),
                "usage": None if other.usage is None else other.usage.to_dict(),
                "fits": None if other.usage is None else self.fits(other.usage),
                "reason": other.reason,
            }
            for other in self.alternatives
        ]
        plain = {name: getattr(self, name) for name in ("call", "device", "elements", "tensors", "frozen", "memory")}
        return {
            **plain,
            "backends": list(self.backends),
            "groups": [group.to_dict() for group in self.groups],
            "total": self.total.to_dict(),
            "fits": self.fits(),
            "alternatives": others,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return "\n".join(map(printable, lines(self)))


def estimate(
    model: Any,
    *,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    parameters: str | None = None,
    **settings: Any,
) -> Estimate:
    """Return the bytes that training takes: weights, gradients, state, and what a step allocates at its peak.

    Nothing of the model's size is allocated, and nothing is changed. What a step allocates is measured on a miniature
    of the tensors. Activations, and what libraries and allocators keep for themselves, come on top.

    Args:
        model: a module, also on the meta device; an iterable of parameters or of groups, or an optimizer; or the path
            of a checkpoint, of which safetensors and PyTorch files are read by their headers alone. Of DTensors, this
            process's shards count.
        memory: what there is: bytes, or a text such as "16GB" (10⁹ bytes each) or "16GiB" (2³⁰).
        device: the device that the parameters will be on, such as "cuda". None: their own, or a CPU for those of a
            checkpoint or on the meta device.
        dtype: the dtype that the floating-point parameters will have, such as "bfloat16". None: their own.
        parameters: the path of the model in a checkpoint that holds several.
        settings: the arguments of RMSprop.
    Raises: ValueError, TypeError or RuntimeError in one sentence, as RMSprop does for its arguments.

    >>> model = torch.nn.Linear(1000, 1000, bias=False)
    >>> estimate(model, momentum=0.9, state_dtype="float8").total.slots
    {'square_avg': 1000000, 'momentum_buffer': 2000000, 'step': 8}
    """
    there, kind, limit = _device(device), _dtype(dtype), _amount(memory)
    with ExitStack() as stack:  # the caller's modes and default device are not those of the stand-ins
        stack.enter_context(_disable_current_modes())
        if torch._C._len_torch_function_stack():
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        return _estimate(given.read(model, parameters), there, kind, limit, settings)


def _estimate(
    held: given.Given, device: str | None, dtype: torch.dtype | None, memory: int | None, settings: dict[str, Any]
) -> Estimate:
    built = _Built(held, device, dtype, settings)
    trained = built.trained()
    own = built.origins.values()
    devices = [device or origin.place for origin in own]
    total, backends = built.usage()
    groups = tuple(built.group_usage(i) for i in range(len(built.optimizer.param_groups)))
    said = ", ".join(f"{name}={shown(value)}" for name, value in settings.items())
    return Estimate(
        call=f"RMSprop({said})" + ("" if dtype is None else f" of {_word(dtype)} weights"),
        device=" and ".join(dict.fromkeys(devices)),
        backends=tuple(backends),
        elements=sum(p.numel() for p in trained),
        tensors=len(trained),
        frozen=sum(p.numel() for p in built.params() if not p.requires_grad),
        groups=groups,
        total=total,
        alternatives=tuple(_alternatives(held, device, dtype, settings, built)),
        memory=memory,
        notes=tuple(_notes(held, built, device)),
    )


class _Built:
    """An optimizer of stand-ins with gradients and state, and their origins.

    Args:
        changed: settings of an alternative, of every group.
    """

    def __init__(
        self,
        held: given.Given,
        device: str | None,
        dtype: torch.dtype | None,
        settings: Mapping[str, Any],
        changed: Mapping[str, Any] = _NOTHING,
        make: type[RMSprop] = RMSprop,
    ) -> None:
        groups, self.origins = held.stand_ins(dtype)
        # a group's own settings win, as in RMSprop, unless an optimizer filled them all in
        replaced = {**settings, **changed} if held.filled else changed
        groups = [{k: v for k, v in group.items() if k not in replaced} for group in groups]
        self.optimizer = make(groups, **{**settings, **changed})
        if isinstance(self.optimizer, StepInBackward):
            self.optimizer.remove()
        self.device, self.buffers = device, held.buffer_bytes(dtype)
        self.buckets = steps.make_state(self.optimizer)

    def trained(self) -> list[Tensor]:
        """Return the stand-ins that have a gradient."""
        return [p for p in self.params() if p.requires_grad]

    def params(self) -> list[Tensor]:
        """Return all stand-ins."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def usage(self) -> tuple[Usage, list[str]]:
        """Return the bytes of all groups, and the backends."""
        due, parts = None, [self._held(i) for i in range(len(self.optimizer.param_groups))]
        gradients = sum(part.gradients for part in parts)
        if isinstance(self.optimizer, StepInBackward):
            gradients, due = steps.waiting(self.optimizer, self.origins, self.device)
        peak, backends = steps.step_peak(self.optimizer, self.buckets, self.origins, self.device, due)
        names = dict.fromkeys(name for part in parts for name in part.slots)
        return Usage(
            weights=sum(part.weights for part in parts),
            gradients=gradients,
            slots={name: sum(part.slots.get(name, 0) for part in parts) for name in names},
            average=sum(part.average for part in parts),
            remainders=sum(part.remainders for part in parts),
            step=peak,
            buffers=self.buffers,
        ), backends

    def group_usage(self, index: int) -> Usage:
        """Return the bytes of one group."""
        peak, _ = steps.step_peak(self.optimizer, self.buckets, self.origins, self.device, only=index)
        return replace(self._held(index), step=peak)

    def _held(self, index: int) -> Usage:
        """Return the bytes of one group between two steps."""
        params = self.optimizer.param_groups[index]["params"]
        sums: dict[str, int] = {}
        for p in params:
            for name, x in self.optimizer.state.get(p, {}).items():
                sums[name] = sums.get(name, 0) + x.nbytes
        average, remainders = sums.pop("ema", 0), sums.pop("compensation", 0)
        order = sorted(sums, key=lambda name: name == "step")
        return Usage(
            weights=sum(self.origins[id(p)].bytes for p in params),
            gradients=sum(p.nbytes for p in params if p.requires_grad),
            slots={name: sums[name] for name in order},
            average=average,
            remainders=remainders,
        )


def _alternatives(
    held: given.Given, device: str | None, dtype: torch.dtype | None, settings: dict[str, Any], built: _Built
) -> Iterator[Alternative]:
    """Yield the other ways to train."""
    trained = built.trained()
    own = {group["state_dtype"] for group in built.optimizer.param_groups}
    narrow = any(is_narrowable(p.dtype) for p in trained)
    others = [(f"{name} state", {"state_dtype": name}) for name in STATE_DTYPES if narrow and own != {name}]
    for name, changed in others:
        yield _tried(name, held, device, dtype, settings, changed)
    backward = _tried("in backward", held, device, dtype, settings, {}, StepInBackward)
    yield backward
    if backward.usage is not None:
        for name, changed in others:
            yield _tried(f"{name}, in backward", held, device, dtype, settings, changed, StepInBackward)
        if any(p.is_floating_point() and p.element_size() > 2 for p in trained):
            name = "bfloat16 weights, float8, in backward"
            least = _tried(name, held, device, torch.bfloat16, settings, _LEAST, StepInBackward)
            yield replace(least, settings={**least.settings, "dtype": "bfloat16"})
    yield _adam(built)


def _tried(
    name: str,
    held: given.Given,
    device: str | None,
    dtype: torch.dtype | None,
    settings: Mapping[str, Any],
    changed: Mapping[str, Any],
    make: type[RMSprop] = RMSprop,
) -> Alternative:
    """Return an alternative, or why it does not go with the settings."""
    said = {**changed, "step_in_backward": True} if make is StepInBackward else changed
    try:
        usage, _ = _Built(held, device, dtype, settings, changed, make).usage()
    except (ValueError, TypeError, RuntimeError) as error:
        return Alternative(name, said, None, str(error))
    return Alternative(name, said, usage)


def _adam(built: _Built) -> Alternative:
    """Return the bytes of torch's Adam, which torch runs by foreach on a GPU."""
    name, trained = "torch.optim.Adam", built.trained()
    places = {built.device or built.origins[id(p)].place for p in trained}
    plain = all(built.origins[id(p)].family is Tensor for p in trained)
    foreach = plain and bool(places) and places <= {"cuda", "xpu"}
    state = peak = 0
    if trained:
        state, peak = steps.other_optimizer(
            lambda params: torch.optim.Adam(params, foreach=foreach), trained, foreach
        )
    own = [built._held(i) for i in range(len(built.optimizer.param_groups))]
    usage = Usage(
        weights=sum(part.weights for part in own),
        gradients=sum(part.gradients for part in own),
        slots={"state": state},
        step=peak,
        buffers=built.buffers,
    )
    return Alternative(name, {}, usage)


def _notes(held: given.Given, built: _Built, device: str | None) -> Iterator[str]:
    """Yield what was assumed, and what comes on top."""
    yield from held.notes
    own = list(built.origins.values())
    if device is None and any(origin.device == "meta" for origin in own):
        yield "parameters without memory are counted as on a CPU; device='cuda' counts the step of a GPU"
    if any(origin.of_mesh for origin in own):
        yield "of DTensors, this process's shards are counted; a layer that is gathered for its pass comes on top"
    sparse = [p for p in built.trained() if built.origins[id(p)].sparse]
    if sparse:
        refused = any(group["sparse"] is None for group in built.optimizer.param_groups)
        yield (
            f"{len(sparse)} sparse gradient{'s are' if len(sparse) > 1 else ' is'} counted as dense, the most that "
            + ("it" if len(sparse) == 1 else "they")
            + " can take"
            + ("; the step refuses sparse gradients without sparse='lazy' or sparse='dense'" if refused else "")
        )
    if any(group["differentiable"] for group in built.optimizer.param_groups):
        yield "differentiable=True keeps the graph of the step, which is not counted"
    yield "activations come on top, and so does what the device's libraries and its allocator keep"


def _amount(memory: Any) -> int | None:
    """Return an amount of memory in bytes. Raises: ValueError or TypeError."""
    works = "memory takes bytes, or a text such as '16GB' (10⁹ bytes each) or '16GiB' (2³⁰)"
    if memory is None:
        return None
    if isinstance(memory, bool) or not isinstance(memory, int | float | str):
        raise TypeError(f"Invalid memory: {shown(memory)} is {with_article(type(memory).__name__)}; {works}")
    found = _AMOUNT.fullmatch(memory) if isinstance(memory, str) and len(memory) < 100 else None
    if found is not None and found[0].strip() == found[1]:
        raise ValueError(f"Invalid memory: {shown(memory)} has no unit; write '{found[1]}B', or '{found[1]}GB' (10⁹)")
    if found is not None:
        size = float(found[1]) * _UNITS[(found[2] or "").lower()]
    else:
        size = math.nan if isinstance(memory, str) else memory
    if not 1 <= size < math.inf:
        raise ValueError(f"Invalid memory: {shown(memory)}; {works}")
    return int(size)


def _device(device: Any) -> str | None:
    """Return the type of a device. Raises: ValueError or TypeError."""
    works = "device takes the name of one, such as 'cpu' or 'cuda'"
    if device is None:
        return None
    if not isinstance(device, str | torch.device):
        raise TypeError(f"Invalid device: {shown(device)} is {with_article(type(device).__name__)}; {works}")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"Invalid device: {shown(device)}; {works}") from None
    if kind == "meta":
        raise ValueError(f"Invalid device: {shown(str(device))} has no memory; {works}")
    return kind


def _dtype(dtype: Any) -> torch.dtype | None:
    """Return a dtype of weights. Raises: ValueError or TypeError."""
    works = f"dtype takes one of {', '.join(map(repr, _DTYPES))}"
    if dtype is None:
        return None
    if not isinstance(dtype, str | torch.dtype):
        raise TypeError(f"Invalid dtype: {shown(dtype)} is {with_article(type(dtype).__name__)}; {works}")
    if _word(dtype) not in _DTYPES:
        raise ValueError(f"Invalid dtype: {shown(_word(dtype))}; {works}")
    kind = getattr(torch, _word(dtype))
    assert isinstance(kind, torch.dtype)
    return kind


def _word(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
