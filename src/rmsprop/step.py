"""Takes one step of an RMSprop, and caches what the next step needs.

`Stepper.take` is the full step: gather, guard, clip, pick a backend, run, write back. `Stepper.again` repeats it by a
cached plan (kernels/plan.py), as long as the plan is valid.
"""

import functools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.weak import WeakIdKeyDictionary

from rmsprop import kernels, settings
from rmsprop.kernels import refusals
from rmsprop.kernels.plan import Due, Plan, Scaling
from rmsprop.spec import Hyper, Rule
from rmsprop.state import shared_memory, slots
from rmsprop.state.averages import BufferAverages, refuse_swapped
from rmsprop.tensors import clipping, shards
from rmsprop.tensors.bucket import Bucket, bucket_for, is_random
from rmsprop.tensors.forked import serial_after_fork
from rmsprop.tensors.nonfinite import Guard
from rmsprop.tensors.params import are_lists, check_groups
from rmsprop.tensors.sparse import parts

Group = dict[str, Any]
Assigned = tuple[list[clipping.Work], list[kernels.Backend]]


# torch 2.13 renamed this method. The old name still works, with a warning.
CAPTURE_CHECK = next(
    name
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    if hasattr(Optimizer, name)
)


def profile_only_if_needed(func: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `step` in `Optimizer.profile_hook_step`, which costs 5 µs, but enter it only for a profiler or hooks."""
    profiled = Optimizer.profile_hook_step(func)

    @functools.wraps(func)
    def _wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            profiler._is_profiler_enabled
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        ):
            return profiled(self, *args, **kwargs)
        return func(self, *args, **kwargs)

    return _wrapper


class Stepper:
    """The caches of an RMSprop between two steps.

    The optimizer is an argument of each method, which reads only its public attributes and torch's own names.

    Attributes:
        guard: scans for gradients that are not finite, or None.
        plan: repeats the last step, or None.
        idle: number of consecutive steps without any gradient up to the last one; `lint` reports it.
        shared: whether the state is in shared memory.
        rules: the rule of each group, keyed weakly by its first parameter.
        checked: the settings of each group that were validated last, by the id of the group.
        norm: the last norm that clip_global_norm bounded, before it did. A plan that clips has a later one.
        swapped: whether the parameters hold the averages of the weights, inside `averaged`.
        buffers: the averages of a model's buffers.
        loaded_buffers: loaded averages of buffers whose model is not known yet.
        made: slots that the present step has made, which are removed if it raises.
    """

    def __init__(self, init_group: Callable[..., bool], guard: Guard | None, shared: bool = False) -> None:
        self._init_group = init_group
        self.plan: Plan | None = None
        self.guard, self.shared, self.idle = guard, shared, 0
        self.norm: Tensor | float | None = None
        self.swapped = False
        self.buffers: BufferAverages | None = None
        self.loaded_buffers: Mapping[str, Tensor] | None = None
        self.forget()

    def forget(self) -> None:
        """Clear all caches that depend on the groups and the state."""
        self.drop_plan()
        self.rules: MutableMapping[Tensor, Rule] = WeakIdKeyDictionary()
        self.checked: dict[int, Any] = {}
        self.made: slots.Made = []

    @property
    def grad_norm(self) -> Tensor | float | None:
        """The norm that clip_global_norm bounded in the last step, before it did. None if no step took one."""
        return self.norm if self.plan is None or self.plan.norm is None else self.plan.norm

    def again(self, optimizer: Any, due: Due = None) -> bool:
        """Step by the cached plan. Return False, with nothing changed, if there is no valid plan.

        Args:
            due: the parameters that step, of those that have a gradient. None: all.
        """
        plan = self.plan
        if torch.compiler.is_compiling() or plan is None:
            return False
        if self.guard is not None and plan.has_dtensors:
            return False  # processes decide together in the full step; plans may not be valid on all of them
        if not plan.leaves:
            return plan.again(
                optimizer.backend, optimizer.param_groups, optimizer.state, scaling(optimizer), self.guard, due
            )
        alone = due is None and scaling(optimizer) is None
        left = self._prepare_left(optimizer, plan) if alone else None
        if left is None or not plan.again(optimizer.backend, optimizer.param_groups, optimizer.state):
            return False
        _step(*left)
        return True

    @serial_after_fork
    def take(self, optimizer: Any, due: Due = None, bad: Tensor | bool | None = None) -> None:
        """Advance every parameter that has a gradient by one step, in place, and make a plan for the next step.

        Args:
            due: the parameters that step, of those that have a gradient. None: all.
            bad: the guard's result, if it has already run.
        Mutates: parameters, state and the plan. Never gradients.
        Raises: RuntimeError, before any parameter moves. TypeError or ValueError for edited groups that are invalid.
        """
        try:
            self._take(optimizer, due, bad)
        except (AttributeError, LookupError, TypeError):
            check_groups(optimizer.param_groups)
            raise

    def _take(self, optimizer: Any, due: Due, bad: Tensor | bool | None) -> None:
        if self.swapped:
            refuse_swapped(optimizer, "step()", "train after the block")
        groups = optimizer.param_groups
        compiling = torch.compiler.is_compiling()
        if not compiling and not are_lists(groups):
            check_groups(groups)
        if not optimizer.state and not compiling:
            for group in groups:
                settings.check_edited(group, self.checked)
        if not optimizer.state and due is None and not compiling and only_makes_state(groups):
            self._make_state(optimizer)
            return
        if len(self.checked) > len(groups):
            self.checked.clear()  # groups were removed
        scaled = scaling(optimizer)
        if bad is None:
            bad = self.guard.scan(groups) if self.guard is not None and scaled is None else False
        if bad is True:
            return
        if bad is False and self.guard is not None and scaled is None and self._replay_together(optimizer):
            return
        scale, found_inf = (None, bad) if isinstance(bad, Tensor) else scaled or (None, None)
        works: list[clipping.Work] = []
        returns: list[Callable[[], None] | None] = []
        if not compiling:  # a compiler would guard on the list
            self.made.clear()
        first = 0
        try:
            filled = []
            for group in groups:
                filled.append((group, *self.read(group), self._fill(optimizer, group, due, first)))
                first += len(group["params"])
            if not compiling:
                for _, rule, _, buckets in filled:
                    _check_whole(rule, buckets)
                _check([(group, bucket) for group, *_, buckets in filled for bucket in buckets])
            for group, rule, hyper, buckets in filled:
                for bucket in buckets:
                    bucket.grad_scale, bucket.found_inf = scale, found_inf
                    for part, write_back in parts(group, hyper, bucket):
                        works.append((group, rule, hyper, part))
                        returns.append(write_back)
            whole = not any(returns)
            if whole:
                works, backends = _assigned(optimizer.backend, works)
                returns = [None] * len(works)
            else:
                backends = [kernels.pick(optimizer.backend, rule, bucket) for _, rule, _, bucket in works]
            clipped = any(clipping.clips(group) for group in groups)
            in_kernel = clipped and whole and kernels.clips(backends, works)
            norm: Tensor | float | None = None
            if clipped and not in_kernel:
                works, norm = clipping.clip(works)
                backends = [kernels.pick(optimizer.backend, rule, bucket) for _, rule, _, bucket in works]
        except BaseException:
            if not compiling:
                slots.unmake(optimizer.state, self.made)
                self.made.clear()
            raise
        if in_kernel:
            norm = kernels.clip_and_step(backends, works)
        else:
            _step(works, backends, returns)
        if not compiling:
            self.drop_plan()
            self.norm = self.norm if norm is None else norm
            self.idle = 0 if works else self.idle + 1
            made_state, whole = bool(self.made), whole and (in_kernel or not clipped)
            self.made.clear()  # it owns parameters
            # In backward, every call of the first iteration makes state, and a plan would serve no other.
            useful = due is None or (not made_state and all(backend.name == "cpu" for backend in backends))
            rules = [(group, rule) for group, rule, *_ in filled]
            self.plan = self._make_plan(optimizer, backends, works, rules) if whole and useful else None

    def drop_plan(self) -> None:
        """Forget the plan, but not the norm of its last step."""
        self.norm, self.plan = self.grad_norm, None

    def _make_state(self, optimizer: Any) -> None:
        """Make all state without taking a step."""
        try:
            groups = optimizer.param_groups
            _check([(group, bucket) for group in groups for bucket in self._fill(optimizer, group, None, 0)])
        except BaseException:
            slots.unmake(optimizer.state, self.made)
            raise
        finally:
            self.made.clear()

    def _make_plan(
        self,
        optimizer: Any,
        backends: list[kernels.Backend],
        works: list[clipping.Work],
        rules: list[tuple[Group, Rule]],
    ) -> Plan | None:
        """Return a plan of the step that was taken, if one native kernel took all of it, or all but a few tensors."""
        names = {backend.name for backend in backends}
        if type(optimizer)._init_group is not self._init_group or not names:
            return None
        others = [work for work, backend in zip(works, backends, strict=True) if backend.name != "cpu"]
        left: list[Tensor] = []
        if len(names) > 1:
            works = [work for work, backend in zip(works, backends, strict=True) if backend.name == "cpu"]
            if not works or not self._may_leave(optimizer, works, others):
                return None
            left = [p for *_, bucket in others for p in bucket.param]
        stepped = [(group, bucket) for group, _, _, bucket in works]
        used = "cpu" if left else backends[0].name
        plan = kernels.plan_of(used, optimizer.backend, rules, optimizer.state, settings.SETTINGS, stepped, left)
        # A plan compares settings with those that it has read. They may be newer than the rules, by another thread.
        return plan if all(self.read(group)[0] == rule for group, rule in rules) else None

    def _may_leave(self, optimizer: Any, works: list[clipping.Work], others: list[clipping.Work]) -> bool:
        """Return whether a plan of `works` may leave the tensors of `others` to the full step.

        Guards, scalers and norms decide about all tensors together, random bits depend on a tensor's index, and
        tensors of one storage step in the order of the groups.
        """
        return (
            self.guard is None
            and scaling(optimizer) is None
            and not any(clipping.clips(group) or is_random(group) for group in optimizer.param_groups)
            and not any(bucket.whole for *_, bucket in works)
            and all(kernels.separate(bucket, other) for *_, bucket in works for *_, other in others)
        )

    def _prepare_left(self, optimizer: Any, plan: Plan) -> Assigned | None:
        """Return the works of the tensors that a plan leaves, with their backends. None: the full step takes them."""
        found = plan.left(optimizer.param_groups)
        works: list[clipping.Work] = []
        try:
            for group, params in found or ():
                own = {**group, "params": params}
                rule, hyper = settings.read(group)
                for bucket in self._fill(optimizer, own, None, 0):
                    _check([(own, bucket)])
                    works.append((own, rule, hyper, bucket))
            works, backends = _assigned(optimizer.backend, works)
            mended = any(backend.name == "cpu" for backend in backends)
            sparse = any(g.is_sparse for *_, bucket in works for g in bucket.grad)
            return None if found is None or self.made or mended or sparse else (works, backends)
        except Exception:  # the full step raises it, with the parameter's own name
            return None
        finally:
            slots.unmake(optimizer.state, self.made)
            self.made.clear()

    def _replay_together(self, optimizer: Any) -> bool:
        """Step by the cached plan after processes have agreed to. Return whether the plan was valid."""
        if torch.compiler.is_compiling() or self.plan is None or not self.plan.has_dtensors:
            return False
        return bool(self.plan.again(optimizer.backend, optimizer.param_groups, optimizer.state))

    def read(self, group: Group) -> tuple[Rule, Hyper]:
        """Return the group's rule and numbers.

        Mutates: rules and checked.
        Raises: RuntimeError if the rule changed during the run. ValueError or TypeError for invalid edited settings.
        """
        if torch.compiler.is_compiling():
            return settings.read(group)
        settings.check_edited(group, self.checked)
        rule, hyper = settings.read(group)
        first = next(iter(group["params"]), None)
        if first is None:
            return rule, hyper
        known = self.rules.get(first)
        message = None if known is None or known == rule else settings.changed(known, rule)
        if message is not None:
            raise RuntimeError(message)
        if known != rule:
            self.rules[first] = rule
        return rule, hyper

    def _fill(self, optimizer: Any, group: Group, due: Due, first: int) -> list[Bucket]:
        """Return the group's parameters that have a gradient, with their state, as buckets.

        Args:
            first: the index of the group's first parameter among all parameters of the optimizer.
        """
        bucket = bucket_for(group, [])
        if self.shared:
            shared_memory.refuse_new(group, optimizer.state)
        more = group["ema"] is not None or group["compensation"] or is_random(group)
        state = bucket.slots
        optimizer._init_group(
            group,
            bucket.param,
            bucket.grad,
            state["square_avg"],
            state["momentum_buffer"],
            state["grad_avg"],
            state["step"],
            *((state["compensation"], state["ema"], bucket.random_keys, first) if more else ()),
        )
        if due is not None:
            ids = set(map(id, due))
            bucket = bucket.chosen([i for i, p in enumerate(bucket.param) if id(p) in ids])
        return list(shards.localized(bucket).split())


def _assigned(name: str, works: list[clipping.Work]) -> Assigned:
    """Return the works with their backends; of a bucket in parts, a work for each."""
    found = [
        (backend, (group, rule, hyper, part))
        for group, rule, hyper, bucket in works
        for backend, part in kernels.assign(name, rule, bucket)
    ]
    return [work for _, work in found], [backend for backend, _ in found]


def _step(
    works: list[clipping.Work],
    backends: list[kernels.Backend],
    returns: Sequence[Callable[[], None] | None] | None = None,
) -> None:
    """Step every work by its backend. Mutates: parameters and state.

    Args:
        returns: functions that write a work's results back, or None where the step writes in place.
    """
    for (_, rule, hyper, bucket), backend, write_back in zip(
        works, backends, returns or [None] * len(works), strict=True
    ):
        with torch.set_grad_enabled(bucket.differentiable):  # of this group, not of the constructor's defaults
            backend.step(rule, hyper, bucket)
            shards.written(bucket)
            if write_back is not None:
                write_back()


def _check_whole(rule: Rule, buckets: list[Bucket]) -> None:
    """Raise RuntimeError if a slot that the rule needs is missing, or is there for some parameters alone."""
    for bucket in buckets:
        count = len(bucket.param)
        whole = all(len(values) in (0, count) for values in bucket.lists())
        if not whole or (count and not all(bucket.slots[name] for name in rule.slots())):
            raise RuntimeError(
                "step() found state of other settings than the group has: did another thread change the group during "
                "the step? No parameter was changed; change groups between steps, and step again."
            )


def _check(filled: list[tuple[Group, Bucket]]) -> None:
    """Raise RuntimeError for edited state of any group that cannot step."""
    odd = [part for part in filled if part[1].differentiable or not refusals.plain(part[1])]
    for group, bucket in odd:
        slots.check(group, bucket)
    slots.check_apart(filled, plain=not odd)


def only_makes_state(groups: list[Group]) -> bool:
    """Return whether a first step only makes state, as torch's distributed checkpoints take it.

    Its lr and all gradients are 0. A real step would move no parameter, but count a step and decay averages that
    start at 1, so that reading a state dict would change the run. Of DTensor gradients only this process's shards are
    read, since one process alone may read a state dict.
    """
    for group in groups:
        lr = group["lr"]
        if isinstance(lr, Tensor) and (lr.numel() != 1 or lr.is_meta or (group["capturable"] and not lr.is_cpu)):
            return False  # lr has no value, or reading it would wait for the device
        if lr != 0:
            return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(grads) and all(
        g.layout == torch.strided and not g.is_meta and not shards.shard(g).any() for g in grads
    )


def scaling(optimizer: Any) -> Scaling | None:
    """Return the loss scale of the gradients and found_inf, if torch.amp.GradScaler has set them."""
    found_inf = getattr(optimizer, "found_inf", None)
    return None if found_inf is None else (getattr(optimizer, "grad_scale", None), found_inf)


def drop_scaling(optimizer: Any) -> None:
    """Remove the attributes that torch.amp.GradScaler set for a step that raises.

    GradScaler removes them only after a step that returns. Otherwise every later gradient would be unscaled again, or
    every later step skipped.
    """
    for name in ("grad_scale", "found_inf"):
        optimizer.__dict__.pop(name, None)
