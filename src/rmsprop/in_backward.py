"""Step in backward: a parameter moves as soon as its gradient is complete, and the gradient is freed there and then.

The gradients of a whole model then never lie in memory together. The loop stays what it was: `backward()` moves the
parameters, and `step()` what is left, and begins the next iteration.
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

# Bytes of gradients on a CPU that may wait for one another: small parameters then share a call, which looks at all of
# the optimizer's tensors to see whether they are where they were.
TOGETHER = 1 << 20

_WHOLE = {
    "clip_global_norm": "needs the norm over all gradients before any parameter moves, and here each is freed as "
    "soon as its parameter has moved; clip_norm and clip_value look at one tensor",
    "differentiable": "keeps the graph of the step, and here the step is part of the backward pass that frees it",
}
_SCALER = (
    "GradScaler unscales gradients and looks for infinite ones before the step, and here each parameter has moved in "
    "backward() by then: train in bfloat16, which needs no scaler"
)


def step_in_backward(model: nn.Module, params: ParamsT | None = None, **settings: Any) -> "StepInBackward":
    """An RMSprop that moves each parameter of the model during `backward()`, and frees its gradient at once.

    Args:
        model: the module that is trained: before it is wrapped or compiled, and after `fully_shard`.
        params: what RMSprop takes, such as groups with settings of their own; None: all named parameters.
        settings: RMSprop's.
    Returns: the optimizer. It works for as long as it is kept.
    Raises: ValueError or TypeError, before anything is changed, for what needs all gradients at once, and for a model
        whose gradients are not complete when autograd has added them up.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = step_in_backward(model, lr=0.01)
    >>> model(torch.ones(4, 2)).sum().backward()  # moves the parameters
    >>> optimizer.step()  # after each backward pass, as ever
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
    """What happened since the last step().

    Attributes:
        moved: ids of parameters that moved, or wait for it.
        waiting: parameters that wait, because their gradients are small.
        bytes: of the gradients that wait.
        end: of the backward pass, which then moves what waits; autograd drops it with the pass, failed or not.
    """

    moved: set[int] = field(default_factory=set)
    waiting: list[Tensor] = field(default_factory=list)
    bytes: int = 0
    end: Callable[[], "_End | None"] = lambda: None


class StepInBackward(RMSprop):
    """RMSprop, its steps taken in `backward()`. See `step_in_backward`; checkpoints are RMSprop's, both ways.

    `step()` moves what still has a gradient, such as a parameter that the last of several accumulated passes did not
    reach, frees it, and begins the next iteration. A second gradient for a parameter that has moved is an error.
    """

    _accumulating = False
    _removed = False
    _handles: Any  # the hook of each parameter that has one, which is referred to weakly
    _watches: list[Any]
    _now: _Iteration
    _lock: Any  # autograd has a thread for each device

    def __init__(self, params: ParamsT, *args: Any, **settings: Any) -> None:
        if settings.get("amp_in_step"):
            raise ValueError(f"amp_in_step=True does not go with a step in backward: {_SCALER}")
        if settings.get("nonfinite", "propagate") != "propagate":
            raise ValueError(
                f"nonfinite={settings['nonfinite']!r} looks at all gradients before any parameter moves, and here "
                "each is freed as soon as its parameter has moved; look at the loss before backward()"
            )
        self._begin()
        try:
            super().__init__(params, *args, **settings)
        except Exception:
            self.remove()
            raise
        self._step_supports_amp_scaling = True  # GradScaler then comes to step(), which says why it cannot

    def _begin(self) -> None:
        """What a new optimizer and a copy start with, and loading a state leaves as it is."""
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

        Raises: as RMSprop's; ValueError for settings that need all gradients at once, or a parameter that another
            optimizer steps in backward.
        """
        super().add_param_group(param_group)
        try:
            _refuse_whole(self.param_groups[-1])
            self._attach()
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any], tensors: list[Any]) -> None:
        """Check a group as RMSprop does, without what amp_in_step asks for: the flag only brings GradScaler here."""
        flag, self._step_supports_amp_scaling = self._step_supports_amp_scaling, False
        try:
            super()._check_group(group, tensors)
        finally:
            self._step_supports_amp_scaling = flag

    def _attach(self) -> None:
        """Give every parameter that can have one its hook; a frozen one at the first step() after its thaw."""
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
        """See before each forward pass that nobody wrapped the model in what completes gradients later."""
        self._watches.append(model.register_forward_pre_hook(_BeforeForward(self)))

    def _complete(self, param: Tensor) -> None:
        """Autograd has added up a parameter's gradient."""
        with self._lock:
            if self._accumulating:
                return
            now = self._now
            if now.waiting and now.end() is None:  # the pass before has failed, and they have not moved
                self._take_back(now.waiting)
            if id(param) in now.moved:
                raise RuntimeError(
                    f"parameter {self._name(param)} has moved, and now gets another gradient: call step() after each "
                    "backward pass; put all but the last of several passes into `with optimizer.accumulate():`; and "
                    "with torch.utils.checkpoint take use_reentrant=False where layers share parameters"
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
        """The backward pass is over."""
        with self._lock:
            self._flush()

    def _take_back(self, waiting: list[Tensor]) -> None:
        """Let parameters wait no more that have not moved; their gradients stay, as of any pass that failed."""
        now = self._now
        now.moved.difference_update(map(id, waiting))
        now.waiting, now.bytes = [], 0

    def _flush(self) -> None:
        """Move the parameters that wait, and free their gradients."""
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
        """Take parameters out that are in no group any more, and their hooks off: the gradient is their owner's."""
        own = set(map(id, self._params()))
        for p in [p for p in due if id(p) not in own]:
            self._handles.pop(p).remove()
        due[:] = [p for p in due if id(p) in own]

    @_disable_dynamo  # hooks and locks are no part of a graph
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move what still has a gradient, free it, and begin the next iteration.

        To be called after each backward pass, or with a closure that makes one.

        Returns: the closure's loss, or None.
        Raises: RuntimeError under GradScaler, and inside `accumulate()`.
        """
        if scaling(self) is not None and not self._removed:
            drop_scaling(self)
            raise RuntimeError(_SCALER)
        if self._accumulating:
            raise RuntimeError("step() inside accumulate(): the block is for all passes but the last; leave it first")
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
        """Inside it gradients add up and nothing moves: for all passes of an iteration but the last.

        Args:
            more: whether another pass follows; False: the block changes nothing.
        """
        before, self._accumulating = self._accumulating, self._accumulating or more
        try:
            yield
        finally:
            self._accumulating = before

    def remove(self) -> None:
        """Take the hooks off the model. The optimizer is an ordinary RMSprop from then on."""
        for handle in (*self._handles.values(), *self._watches):
            handle.remove()
        self._handles, self._watches, self._removed = WeakIdKeyDictionary(), [], True
        self._step_supports_amp_scaling = False

    def explain(self) -> str:
        """As RMSprop's, with a line that says when the steps are taken."""
        when = "" if self._removed else "\nEach parameter moves in backward(), and its gradient is freed there"
        return super().explain() + when

    def _name(self, param: Tensor) -> str:
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if p is param:
                    return parameter_name(group, j, i)
        return "of no group"


class _Link:
    """A hook that knows its optimizer for as long as that lives; in a copy or a pickle of the model it is idle."""

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
        # what runs the forward pass, if it is DistributedDataParallel
        if self.owner() is not None and nn.parallel.DistributedDataParallel._active_ddp_module is not None:
            _refuse_wrapper("DistributedDataParallel")


def _waits(param: Tensor) -> int:
    """The bytes for which a gradient counts; where it is to be used at once, on its own stream, that is the limit."""
    g = param.grad
    plain = type(param) in (Tensor, nn.Parameter) and param.is_cpu
    return g.nbytes if plain and g is not None and g.layout == torch.strided else TOGETHER


def _refuse_whole(group: Mapping[str, Any]) -> None:
    """Raise for settings of a group that need all gradients at once."""
    for name, why in _WHOLE.items():
        if group[name]:
            raise ValueError(f"{name}={group[name]!r} does not go with a step in backward: it {why}")


def _refuse_wrapper(name: str) -> None:
    """Raise for a class of wrapper under which a gradient is not complete when autograd has added it up."""
    if name == "DistributedDataParallel":
        raise ValueError(
            "DistributedDataParallel averages gradients over processes after autograd has added them up, and a step "
            "in backward would take them before that, another in every process; take "
            "torch.distributed.fsdp.fully_shard, or an ordinary RMSprop"
        )
    if name == "FullyShardedDataParallel":
        raise ValueError(
            "FullyShardedDataParallel replaces the parameters and reduces their gradients itself; take "
            "torch.distributed.fsdp.fully_shard, whose parameters can be stepped in backward"
        )
