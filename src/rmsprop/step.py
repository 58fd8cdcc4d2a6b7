"""One step, the long way: where there is no plan, or it does not hold any more."""

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from rmsprop import kernels, settings
from rmsprop.kernels import cpu
from rmsprop.kernels.plan import Scaling
from rmsprop.spec import Hyper, Rule
from rmsprop.state import loading, shared_memory, slots
from rmsprop.tensors import clipping, shards
from rmsprop.tensors.bucket import Bucket, wanted
from rmsprop.tensors.forked import serial_after_fork
from rmsprop.tensors.params import are_lists, check_groups
from rmsprop.tensors.sparse import chosen, parts

Rules = MutableMapping[Tensor, Rule]  # by a group's first parameter, which is referred to weakly


@serial_after_fork
def take(optimizer: Any, bad: Tensor | bool | None = None) -> None:
    """Advance every parameter of an RMSprop that has a gradient by one step, in place, and make a plan for the next.

    Args:
        bad: what the guard found, where it has looked; None: it looks here.
    Mutates: parameters, state and the plan. Never gradients.
    Raises: RuntimeError, before any parameter moves; TypeError, ValueError for groups that were edited into something
        else.
    """
    try:
        _take(optimizer, bad)
    except (AttributeError, LookupError, TypeError):
        check_groups(optimizer.param_groups)
        raise


def _take(optimizer: Any, bad: Tensor | bool | None) -> None:
    groups = optimizer.param_groups
    compiling = torch.compiler.is_compiling()
    if not compiling and not are_lists(groups):
        check_groups(groups)
    if not optimizer.state and not compiling:
        for group in groups:
            settings.check_edited(group, optimizer._checked)
    if not optimizer.state and optimizer._due is None and not compiling and loading.only_makes_state(groups):
        _make_state(optimizer)
        return
    if len(optimizer._checked) > len(groups):
        optimizer._checked.clear()  # groups were removed
    scaled, guard = scaling(optimizer), optimizer._guard
    if bad is None:
        bad = guard.look(groups) if guard is not None and scaled is None else False
    if bad is True:
        return
    if bad is False and guard is not None and scaled is None and _goes_on_together(optimizer):
        return
    scale, found_inf = (None, bad) if isinstance(bad, Tensor) else scaled or (None, None)
    works: list[clipping.Work] = []
    returns: list[Callable[[], None] | None] = []
    if not compiling:  # a compiler would watch the list
        optimizer._made.clear()
    first = 0
    try:
        filled = []
        for group in groups:
            filled.append((group, *optimizer._read(group), _fill(optimizer, group, first)))
            first += len(group["params"])
        if not compiling:
            _check([(group, bucket) for group, *_, buckets in filled for bucket in buckets])
        for group, rule, hyper, buckets in filled:
            for bucket in buckets:
                bucket.grad_scale, bucket.found_inf = scale, found_inf
                for part, write_back in parts(group, bucket):
                    works.append((group, rule, hyper, part))
                    returns.append(write_back)
        clipped = any(clipping.asked(group) for group in groups)
        works = clipping.clip(works) if clipped else works
        backends = [kernels.pick(optimizer.backend, rule, bucket) for _, rule, _, bucket in works]
    except BaseException:
        if not compiling:
            slots.unmake(optimizer.state, optimizer._made)
            optimizer._made.clear()
        raise
    for (settled, rule, hyper, bucket), backend, write_back in zip(works, backends, returns, strict=True):
        with torch.set_grad_enabled(bucket.differentiable):  # the group's wish, not the constructor's
            backend.step(rule, hyper, bucket)
            clipping.clip_weights(settled, bucket)
            shards.written(bucket)
            if write_back is not None:
                write_back()
    if not compiling:
        optimizer._idle = 0 if works else optimizer._idle + 1
        optimizer._made.clear()  # it owns parameters
        whole = not clipped and not any(returns)
        stepped = [(group, bucket) for group, _, _, bucket in works]
        optimizer._plan = optimizer._make_plan(backends, stepped) if whole else None


def _make_state(optimizer: Any) -> None:
    """Make all state, and step nothing."""
    try:
        groups = optimizer.param_groups
        _check([(group, bucket) for group in groups for bucket in _fill(optimizer, group, 0)])
    except BaseException:
        slots.unmake(optimizer.state, optimizer._made)
        raise
    finally:
        optimizer._made.clear()


def _check(parts: list[tuple[dict[str, Any], Bucket]]) -> None:
    """Refuse state that was edited and cannot step, in any group. Raises: RuntimeError."""
    odd = [part for part in parts if part[1].differentiable or not cpu.plain(part[1])]
    for group, bucket in odd:
        slots.check(group, bucket)
    slots.check_apart(parts, plain=not odd)


def _goes_on_together(optimizer: Any) -> bool:
    """Where processes have agreed on this step: whether this one's plan took it."""
    if torch.compiler.is_compiling() or optimizer._plan is None or not optimizer._plan.spread:
        return False
    return bool(optimizer._plan.again(optimizer.backend, optimizer.param_groups, optimizer.state))


def read(rules: Rules, checked: dict[int, Any], group: dict[str, Any]) -> tuple[Rule, Hyper]:
    """The group's rule and numbers; the rule must be the one that the run began with.

    Mutates: rules; checked, by the id of the group.
    Raises: RuntimeError where it is not; ValueError, TypeError for settings that were edited and do not work.
    """
    if torch.compiler.is_compiling():
        return settings.read(group)
    settings.check_edited(group, checked)
    rule, hyper = settings.read(group)
    first = next(iter(group["params"]), None)
    if first is None:
        return rule, hyper
    known = rules.get(first)
    sentence = None if known is None or known == rule else settings.changed(known, rule)
    if sentence is not None:
        raise RuntimeError(sentence)
    if known != rule:
        rules[first] = rule
    return rule, hyper


def _fill(optimizer: Any, group: dict[str, Any], first: int) -> list[Bucket]:
    """The group's parameters that have a gradient, with their state, as buckets. `first`: see slots.fill."""
    bucket = wanted(group, [])
    if optimizer._shared:
        shared_memory.refuse_new(group, optimizer.state)
    half = group["compensation"] or group["rounding"] != "nearest"
    optimizer._init_group(
        group,
        bucket.param,
        bucket.grad,
        bucket.square_avg,
        bucket.momentum_buffer,
        bucket.grad_avg,
        bucket.step,
        *((bucket.compensation, bucket.random_keys, first) if half else ()),
    )
    if optimizer._due is not None:
        due = set(map(id, optimizer._due))
        bucket = chosen(bucket, [i for i, p in enumerate(bucket.param) if id(p) in due])
    return list(shards.localized(bucket).split())


def drop_scaling(optimizer: Any) -> None:
    """Remove what torch.amp.GradScaler set for a step that raises: it does so itself only after one that returns.

    What is left would scale every later gradient once more, or skip every later step.
    """
    for name in ("grad_scale", "found_inf"):
        optimizer.__dict__.pop(name, None)


def scaling(optimizer: Any) -> Scaling | None:
    """What torch.amp.GradScaler set for this step: the scale that gradients still carry, and found_inf."""
    found_inf = getattr(optimizer, "found_inf", None)
    return None if found_inf is None else (getattr(optimizer, "grad_scale", None), found_inf)
