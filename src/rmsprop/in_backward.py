"""Steps each parameter during `backward()`, as soon as its gradient is complete, and then frees the gradient.

The gradients of a whole model are thus never in memory together. The training loop stays the same: `backward()` moves
the parameters, and `step()` moves any that are left and begins the next iteration.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import ParamsT
from torch.utils.weak import WeakIdKeyDictionary

from rmsprop.optimizer import RMSprop
from rmsprop.step import drop_scaling, scaling
from rmsprop.tensors.names import parameter_name

# Bytes of gradients on a CPU that may wait for one another. Small parameters then share one call, which validates all
# of the optimizer's tensors.
TOGETHER = 1 << 20

_WHOLE = {
    "clip_global_norm": "needs the norm over all gradients before any parameter moves, but here each gradient is "
    "freed as soon as its parameter has moved; clip_norm and clip_value work, since they need one tensor only",
    "differentiable": "keeps the graph of the step, but here the step is part of the backward pass that frees it",
}
_SCALER = (
    "GradScaler unscales gradients and checks them for infinity before the step, but here each parameter has already "
    "moved in backward(): train in bfloat16, which needs no scaler"
)


def step_in_backward(model: nn.Module, params: ParamsT | None = None, **settings: Any) -> "StepInBackward":
    """Return an RMSprop that moves each parameter during `backward()`, and frees its gradient at once.

    Args:
        model: the module to train, before it is wrapped or compiled, and after `fully_shard`.
        params: as for RMSprop, such as groups with their own settings. None: all named parameters.
        settings: as for RMSprop.
    Returns: the optimizer. The model steps only as long as a reference to it exists.
    Raises: ValueError or TypeError, before anything changes, for settings that need all gradients at once, and for a
        model whose gradients are not complete when autograd has accumulated them.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = step_in_backward(model, lr=0.01)
    >>> model(torch.ones(4, 2)).sum().backward()  # moves the parameters
    >>> optimizer.step()  # after each backward pass, as usual
    >>> model.weight.grad is None
    True
    """
    for module in model.modules():
        _refuse_wrapper(type(module).__name__)
    optimizer = StepInBackward(model.named_parameters() if params is None else params, **settings)
    optimizer._watch(model)
    return optimizer


@dataclass
class _Iteration:
    """The progress since the last step().

    Attributes:
        moved: ids of the parameters that have moved or wait to move.
        waiting: parameters that wait to move, because their gradients are small.
        bytes: size of the gradients that wait.
        end: a weak reference to the callback at the end of the backward pass, which moves the waiting parameters.
            Autograd drops the callback after the pass, also if the pass fails.
    """

    moved: set[int] = field(default_factory=set)
    waiting: list[Tensor] = field(default_factory=list)
    bytes: int = 0
    end: Callable[[], "_End | None"] = lambda: None


class StepInBackward(RMSprop):
    """RMSprop that steps in `backward()`. See `step_in_backward`. Its checkpoints are interchangeable with RMSprop's.

    `step()` moves parameters that still have a gradient, such as those that the last of several accumulated passes
    did not reach. It then frees these gradients and begins the next iteration. A second gradient for a parameter that
    has moved is an error.
    """

    _accumulating = False
    _removed = False
    _handles: Any  # the hook of each parameter that has one, which is referred to weakly
    _watches: list[Any]
    _now: _Iteration
    _lock: Any  # autograd has a thread for each device

    def __init__(self, params: ParamsT, *args: Any, **settings: Any) -> None:
        if settings.get("amp_in_step"):
            raise ValueError(f"amp_in_step=True cannot be combined with a step in backward: {_SCALER}")
        if settings.get("nonfinite", "propagate") != "propagate":
            raise ValueError(
                f"nonfinite={settings['nonfinite']!r} scans all gradients before any parameter moves, but here each "
                "is freed as soon as its parameter has moved; check the loss before backward()"
            )
        self._begin()
        try:
            super().__init__(params, *args, **settings)
        except Exception:
            self.remove()
            raise
        self._step_supports_amp_scaling = True  # GradScaler then calls step(), which raises with the reason

    def _begin(self) -> None:
        """Set up the attributes of a new optimizer or a copy. Loading a state leaves them as they are."""
        if "_lock" not in self.__dict__:
            self._handles, self._watches = WeakIdKeyDictionary(), []
            self._now, self._lock = _Iteration(), threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_removed": self._removed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()
        self._attach()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, and step its parameters in backward too.

        Raises: as RMSprop.add_param_group. ValueError for settings that need all gradients at once, or a parameter
            that another optimizer steps in backward.
        """
        super().add_param_group(param_group)
        try:
            _refuse_whole(self.param_groups[-1])
            self._attach()
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any], tensors: list[Any]) -> None:
        """Check a group as RMSprop does, without the requirements of amp_in_step, which is set only for `step`."""
        flag, self._step_supports_amp_scaling = self._step_supports_amp_scaling, False
        try:
            super()._check_group(group, tensors)
        finally:
            self._step_supports_amp_scaling = flag

    def _attach(self) -> None:
        """Register a hook on every trainable parameter. A frozen one gets it at a step() after it is unfrozen."""
        if self._removed:
            return
        free = [p for p in self._params() if p not in self._handles and p.requires_grad and not is_lazy(p)]
        for p in free:
            others = (p._post_accumulate_grad_hooks or {}).values()
            if any(isinstance(hook, _WhenComplete) and hook.owner() is not None for hook in others):
                raise ValueError(
                    f"parameter {self._name(p)} is stepped in backward by another optimizer: call its remove() first"
                )
        for p in free:
            register: Any = p.register_post_accumulate_grad_hook
            self._handles[p] = register(_WhenComplete(self))

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _watch(self, model: nn.Module) -> None:
        """Check before each forward pass that the model is not wrapped in a class that completes gradients later."""
        self._watches.append(model.register_forward_pre_hook(_BeforeForward(self)))

    def _complete(self, param: Tensor) -> None:
        """Move a parameter whose gradient autograd has accumulated, or let it wait for others."""
        with self._lock:
            if self._accumulating:
                return
            now = self._now
            if now.waiting and now.end() is None:  # the previous pass failed before they moved
                self._take_back(now.waiting)
            if id(param) in now.moved:
                raise RuntimeError(
                    f"parameter {self._name(param)} has moved, but now gets another gradient: call step() after each "
                    "backward pass; put all but the last of several passes into `with optimizer.accumulate():`; and "
                    "with torch.utils.checkpoint give use_reentrant=False if layers share parameters"
                )
            now.moved.add(id(param))
            now.waiting.append(param)
            now.bytes += _waits(param)
            if now.bytes >= TOGETHER:
                self._flush()
            elif now.end() is None:
                end = _End(self)
                now.end = weakref.ref(end)
                torch.autograd.Variable._execution_engine.queue_callback(end)

    def _finish(self) -> None:
        """Move the waiting parameters at the end of the backward pass."""
        with self._lock:
            self._flush()

    def _take_back(self, waiting: list[Tensor]) -> None:
        """Stop waiting for parameters that have not moved. Their gradients stay, as after any failed pass."""
        now = self._now
        now.moved.difference_update(map(id, waiting))
        now.waiting, now.bytes = [], 0

    def _flush(self) -> None:
        """Move the waiting parameters, and free their gradients."""
        now = self._now
        waiting, now.waiting, now.bytes = now.waiting, [], 0
        if waiting:
            try:
                self._advance(waiting)
            except BaseException:
                self._take_back(waiting)
                raise
        for p in waiting:
            p.grad = None

    def _advance(self, due: list[Tensor] | None) -> None:
        """Step these parameters, or all that have a gradient."""
        if not self._removed:
            for group in self.param_groups:
                _refuse_whole(group)
        if not self._stepper.again(self, due):
            if due is not None:
                self._leave_out(due)
            self._step(None, due)

    def _leave_out(self, due: list[Tensor]) -> None:
        """Remove parameters that are in no group any more from `due`, and their hooks. Their gradients stay."""
        own = set(map(id, self._params()))
        for p in [p for p in due if id(p) not in own]:
            self._handles.pop(p).remove()
        due[:] = [p for p in due if id(p) in own]

    @_disable_dynamo  # hooks and locks cannot be traced
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move parameters that still have a gradient, free these gradients, and begin the next iteration.

        Call it after each backward pass, or with a closure that runs one.

        Returns: the closure's loss, or None.
        Raises: RuntimeError under GradScaler, and inside `accumulate()`.
        """
        if scaling(self) is not None and not self._removed:
            drop_scaling(self)
            raise RuntimeError(_SCALER)
        if self._accumulating:
            raise RuntimeError("step() was called inside accumulate(), which is for all passes but the last")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._lock:
            left = [p for p in self._params() if p.grad is not None]
            if left:
                self._advance(None)
            if not self._removed:
                for p in left:
                    p.grad = None
                self._now = _Iteration()
                self._attach()
        return loss

    @contextmanager
    def accumulate(self, more: bool = True) -> Iterator[None]:
        """Accumulate gradients inside this context, without moving: for all passes of an iteration but the last.

        Args:
            more: whether another pass follows. False: the context has no effect.
        """
        before, self._accumulating = self._accumulating, self._accumulating or more
        try:
            yield
        finally:
            self._accumulating = before

    def remove(self) -> None:
        """Remove the hooks from the model. The optimizer is an ordinary RMSprop from then on."""
        for handle in (*self._handles.values(), *self._watches):
            handle.remove()
        self._handles, self._watches, self._removed = WeakIdKeyDictionary(), [], True
        self._step_supports_amp_scaling = False

    def explain(self) -> str:
        """Return RMSprop's explanation, with a line on when the steps are taken."""
        when = "" if self._removed else "\nEach parameter moves in backward(), and its gradient is freed there"
        return super().explain() + when

    def _name(self, param: Tensor) -> str:
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if p is param:
                    return parameter_name(group, j, i)
        return "of no group"


class _Link:
    """A hook with a weak reference to its optimizer. In a copy or a pickle of the model, the hook is a no-op."""

    def __init__(self, optimizer: StepInBackward | None = None) -> None:
        self.owner: Callable[[], StepInBackward | None] = lambda: None
        if optimizer is not None:
            self.owner = weakref.ref(optimizer)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class _End(_Link):
    def __call__(self) -> None:
        optimizer = self.owner()
        if optimizer is not None:
            optimizer._finish()


class _WhenComplete(_Link):
    def __call__(self, param: Tensor) -> None:
        optimizer = self.owner()
        if optimizer is not None:
            optimizer._complete(param)


class _BeforeForward(_Link):
    def __call__(self, _module: nn.Module, _args: Any) -> None:
        # the DistributedDataParallel module that runs the forward pass, if any
        if self.owner() is not None and nn.parallel.DistributedDataParallel._active_ddp_module is not None:
            _refuse_wrapper("DistributedDataParallel")


def _waits(param: Tensor) -> int:
    """Return the bytes that a gradient counts toward TOGETHER, which is all of them if it must not wait."""
    g = param.grad
    plain = type(param) in (Tensor, nn.Parameter) and param.is_cpu
    return g.nbytes if plain and g is not None and g.layout == torch.strided else TOGETHER


def _refuse_whole(group: Mapping[str, Any]) -> None:
    """Raise for settings of a group that need all gradients at once."""
    for name, why in _WHOLE.items():
        if group[name]:
            raise ValueError(f"{name}={group[name]!r} cannot be combined with a step in backward: it {why}")


def _refuse_wrapper(name: str) -> None:
    """Raise for a class of wrapper under which a gradient is not complete when autograd has accumulated it."""
    if name == "DistributedDataParallel":
        raise ValueError(
            "DistributedDataParallel averages gradients over processes after autograd has accumulated them, but a "
            "step in backward would use them before that, so that processes would diverge; use "
            "torch.distributed.fsdp.fully_shard, or an ordinary RMSprop"
        )
    if name == "FullyShardedDataParallel":
        raise ValueError(
            "FullyShardedDataParallel replaces the parameters and reduces their gradients itself; use "
            "torch.distributed.fsdp.fully_shard, whose parameters can be stepped in backward"
        )
