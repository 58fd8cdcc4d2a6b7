"""What does not change between the steps of an optimizer on the CPU, kept, and dropped the moment that it does.

For small networks Python is the whole cost of a step: this reduces it to one list of gradients and one call.
"""

import ctypes
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from rmsprop import shards
from rmsprop.bucket import Bucket, kept, wanted
from rmsprop.guard import Guard, first_unfinite
from rmsprop.kernels import cpu, native
from rmsprop.spec import Hyper, Rule, stream

_SLOTS = ("step", "square_avg", "grad_avg", "momentum_buffer", "compensation")
NUMBERS = itemgetter("lr", "alpha", "eps", "momentum", "weight_decay")  # as Work begins, in csrc/rmsprop.h
_PACK = struct.Struct("=5d").pack_into
GRADIENTS = attrgetter("grad")
_MOVED, _SAME, _STEPPED = 0, 1, 2  # Again, in csrc/plan.h

Scaling = tuple[Tensor | None, Tensor | None]  # the loss scale, and found_inf
Due = list[Tensor] | None
Settings = Callable[[Mapping[str, Any]], tuple[Any, ...]]


@dataclass
class _Known:
    """A group as it was: its settings but the numbers, its rule, and its tensors' works."""

    params: list[Tensor]
    settings: tuple[Any, ...]
    momentum: bool
    rule: Rule
    works: list[native.Work]
    numbers: tuple[Any, ...] = ()  # those of the last step
    hyper: Any = None  # the same as a Hyper, with those that are settings here


def usual(lr: Any, alpha: float, eps: float, momentum: float, decay: float) -> bool:
    """Whether a step may run with these; a schedule may take lr below 0, and a tensor is not read."""
    return (
        0 <= alpha < 1
        and 0 <= eps < math.inf
        and 0 <= momentum < 1
        and 0 <= decay < math.inf
        and (isinstance(lr, Tensor) or lr - lr == 0)
    )


class Plan:
    """Where all tensors of an optimizer are, and how they are stepped.

    It holds a reference to every object whose identity it relies on, so none can be mistaken for another. It holds
    no gradient: those are looked at in full at every step.
    """

    def __init__(
        self,
        loaded: native.Native,
        backend: str,
        groups: list[tuple[dict[str, Any], Rule]],
        state: Any,
        settings: Settings,
    ) -> None:
        self._loaded, self._backend, self._state, self._settings = loaded, backend, state, settings
        self._host, self._grain = self._look()
        self._params = [p for group, _ in groups for p in group["params"]]
        self._place = {id(p): i for i, p in enumerate(self._params)}
        self._items = list(state.items())
        self._busy = False
        self._guard: Guard | None = None  # what the plan's `guarded` says
        self._active = c_int64()
        self._held: list[Any] = []  # arrays that the structures below point into
        self._shards = shards.Watch(self._params, state)
        parts = [(i, rule, self._shards.stepped(bucket), places) for i, rule, bucket, places in _parts(groups, state)]
        self.takes = bool(parts) and all(self._refuse(rule, bucket) is None for _, rule, bucket, _ in parts)
        if not self.takes:
            return
        self._stepped = [p for _, _, bucket, _ in parts for p in bucket.param]
        self._places = [place for *_, places in parts for place in places]
        owners = [self._params[place] for place in self._places]
        # of a DTensor both: autograd may have kept the parameter or its shard
        self._written = [(p, (p,) if p is x else (p, x)) for p, x in zip(owners, self._stepped, strict=True)]
        self._versioned = [x for _, written in self._written for x in written if not x.is_inference()]
        # only a tensor of one element can be in the dense layout and still be a lazily negated view
        self._singles = [p for p, x in zip(owners, self._stepped, strict=True) if x.numel() == 1]
        lists = [self._lists(rule, bucket) for _, rule, bucket, _ in parts]
        self._held.append(lists)
        works = (native.Work * len(lists))(*(held.work for held in lists))
        for work, (i, *_) in zip(works, parts, strict=True):
            work.scale, work.cap = 1.0, math.inf if (cap := groups[i][0]["max_update"]) is None else cap
        self._works = works
        self._known = []
        for i, (group, rule) in enumerate(groups):
            own = [work for work, (owner, *_) in zip(works, parts, strict=True) if owner == i]
            self._known.append(_Known(group["params"], settings(group), rule.momentum, rule, own))
        self._plan = self._fill(parts, groups)
        self._address = ctypes.addressof(self._plan)
        self._works_address = ctypes.addressof(works)

    def again(
        self,
        backend: str,
        groups: list[dict[str, Any]],
        state: Any,
        scaling: Scaling | None = None,
        guard: Guard | None = None,
        due: Due = None,
    ) -> bool:
        """Step once more if everything is where it was.

        Args:
            scaling: what a gradient scaler brings.
            guard: what stops a step whose gradients are not finite.
            due: the parameters that step, of those that have a gradient; None: all.
        Returns: False, with nothing written, if anything moved: then the plan is to be dropped.
        Mutates: parameters and state. Never gradients.
        """
        if self._busy or backend != self._backend or state is not self._state or len(groups) != len(self._known):
            return False
        if cpu.in_mode() or not self._can(scaling, guard, due):
            return False
        for group, known in zip(groups, self._known, strict=True):
            if group["params"] is not known.params:
                return False
            numbers = NUMBERS(group)
            try:
                if self._settings(group) != known.settings:
                    return False
                if type(numbers[0]) is not float or numbers != known.numbers:  # a tensor may hold another today
                    if (numbers[3] != 0) is not known.momentum or not usual(*numbers):
                        return False
                    known.hyper = Hyper(*(*numbers, group["reference_lr"], group["max_update"]))
                    self._write(known, known.hyper)
                    known.numbers = numbers
            except (struct.error, ArithmeticError, TypeError, ValueError, RuntimeError):
                return False  # what is no number or no switch: the long way says which
        if self._singles and self._negated():
            return False
        self._busy = True
        try:
            gradients = list(map(GRADIENTS, self._params)) if due is None else self._due(due)
            if self._shards.any and self._shards.gradients(gradients) is None:
                return False
            return self._run(gradients, groups, scaling, guard, due)
        finally:
            self._busy = False

    def _can(self, scaling: Scaling | None, _guard: Guard | None, _due: Due) -> bool:
        """Whether such a step is one for a plan: a gradient scaler's goes the long way."""
        return scaling is None

    def _write(self, known: _Known, hyper: Hyper) -> None:
        """Write today's numbers into the works; a tensor lr is read here. Raises: struct.error, TypeError."""
        known.numbers = ()
        numbers = (hyper.lr, hyper.alpha, hyper.eps, hyper.momentum, hyper.shrinkage(known.rule))
        for work in known.works:
            _PACK(work, 0, *numbers)

    @property
    def spread(self) -> bool:
        """Whether some of the parameters are spread over processes."""
        return self._shards.any

    def _negated(self) -> bool:
        """Whether a gradient is a lazily negated view."""
        return any(p.grad is not None and shards.shard(p.grad).is_neg() for p in self._singles)

    def _due(self, due: list[Tensor]) -> list[Tensor | None]:
        """The gradient of every parameter that is due, in the order of the groups, and None for the others."""
        gradients: list[Tensor | None] = [None] * len(self._params)
        for p in due:
            gradients[self._place[id(p)]] = p.grad
        return gradients

    def _look(self) -> tuple[native.Host | None, int]:
        """What rmsprop_again asks of torch, and above how many elements it leaves the step to its caller."""
        return self._loaded.host, native.GRAIN

    def _refuse(self, rule: Rule, bucket: Bucket) -> str | None:
        return cpu.refuse(rule, bucket)

    def _lists(self, rule: Rule, bucket: Bucket) -> Any:
        """The bucket's addresses and sizes, where rmsprop_again is to note them, with their `work` and `size`."""
        return cpu.Lists(rule, bucket)

    def _run(
        self,
        gradients: list[Tensor | None],
        groups: list[dict[str, Any]],
        _scaling: Scaling | None,
        guard: Guard | None,
        due: Due,
    ) -> bool:
        """`again`, of these gradients, once all that Python knows is as it was."""
        if guard is not self._guard:
            self._guard, self._plan.guarded = guard, guard is not None
        code = self._loaded.again(self._address, id(gradients), self._active)
        if code == _MOVED:
            return False
        if code == _STEPPED and guard is None:
            self._count_writes(due)
            return True
        works, parallel_for = (self._works_address, len(self._works)), self._loaded.parallel_for
        if guard is not None:
            bad = self._plan.unfinite
            if code == _SAME:
                bad = self._loaded.unfinite(*works, parallel_for, native.GRAIN)
            if bad < -1:
                raise RuntimeError("torch_parallel_for failed, and no gradient was looked at: nothing was changed")
            if bad >= 0:
                mixed = len(self._works) > len(groups)  # in the works' order, the first need not be the groups' first
                guard.stop(groups, first_unfinite(groups) if mixed else self._places[bad])
                return True
            guard.passed()
        if code == _SAME:
            failed = self._loaded.step(*works, 0.0, parallel_for, native.GRAIN)
            if failed:
                raise RuntimeError(f"torch_parallel_for failed with code {failed}: the step is incomplete")
        self._count_writes(due)
        return True

    def _count_writes(self, due: Due) -> None:
        """Tell autograd which parameters were written: all of them, as a rule."""
        if due is not None:
            ids = {id(p) for p in due if p.grad is not None}
            cpu.count_writes([x for p, written in self._written if id(p) in ids for x in written])
        elif self._active.value == len(self._stepped):
            torch.autograd.graph.increment_version(self._versioned)
        else:
            cpu.count_writes([x for p, written in self._written if p.grad is not None for x in written])

    def _fill(self, parts: list["_Part"], groups: list[tuple[dict[str, Any], Rule]]) -> native.Plan:
        """The plan as csrc/plan.h has it."""
        state = dict(self._items)
        rows = [self._rows(bucket, self._shards.entries(state)) for _, _, bucket, _ in parts]
        dtypes = [
            self._loaded.dtype_codes[values[0].dtype]
            for _, _, bucket, _ in parts
            for values in (bucket.param, bucket.square_avg, bucket.step)
        ]
        placed = {place for *_, places in parts for place in places}
        idle = [i for i in range(len(self._params)) if i not in placed]
        kept = [
            native.Group(id(group["params"]), len(group["params"]), self._array(c_void_p, map(id, group["params"])))
            for group, _ in groups
        ]
        return native.Plan(
            host=ctypes.addressof(self._host) if self._host else None,
            state=id(self._state),
            items=len(self._items),
            keys=self._array(c_void_p, (id(key) for key, _ in self._items)),
            values=self._array(c_void_p, (id(value) for _, value in self._items)),
            groups=len(kept),
            group=self._array(native.Group, kept),
            slot_names=(c_void_p * len(_SLOTS))(*map(id, _SLOTS)),
            works=len(self._works),
            work=ctypes.addressof(self._works),
            rows=self._array(c_void_p, rows),
            dtypes=self._array(c_int32, dtypes),
            places=self._array(c_void_p, [self._array(c_int64, places) for *_, places in parts]),
            elements=sum(p.numel() for p in self._stepped),
            grain=self._grain,
            idle=len(idle),
            idle_places=self._array(c_int64, idle),
        )

    def _rows(self, bucket: Bucket, state: Mapping[Any, Any]) -> int:
        """The address of the bucket's rows."""
        rows = []
        for i, p in enumerate(bucket.param):
            kept = (bucket.step, bucket.square_avg, bucket.grad_avg, bucket.momentum_buffer, bucket.compensation)
            slots = [values[i] if values else None for values in kept]
            self._held.append(slots)
            rows.append(
                native.Row(
                    param=id(p),
                    entry=id(state[p]),
                    slot=(c_void_p * len(_SLOTS))(*(None if x is None else id(x) for x in slots)),
                    dim=p.dim(),
                    shape=self._array(c_int64, (*p.shape, *p.stride())),
                    size=p.numel(),
                )
            )
        return self._array(native.Row, rows)

    def _array(self, kind: Any, values: Any) -> int:
        """The address of a C array, kept as long as the plan."""
        items = list(values)
        array = (kind * len(items))(*items)
        self._held.append(array)
        return ctypes.addressof(array)


_Part = tuple[int, Rule, Bucket, list[int]]


def _parts(groups: list[tuple[dict[str, Any], Rule]], state: Any) -> Iterator[_Part]:
    """The parameters that have state, with or without a gradient today, as buckets of one kind.

    Yields: the group's index, its rule, the bucket, and the parameters' places among all parameters.
    """
    place = 0
    for i, (group, rule) in enumerate(groups):
        found: dict[Any, tuple[Bucket, list[int]]] = {}
        for p in group["params"]:
            entry = state.get(p)
            slots = kept(rule, group, p)
            if entry and all(isinstance(entry.get(slot), Tensor) for slot in slots):
                key = (p.device, p.dtype, entry["square_avg"].dtype, entry["step"].dtype)
                if key not in found:
                    found[key] = wanted(group, []), []
                bucket, places = found[key]
                bucket.param.append(p)
                bucket.grad.append(p if p.grad is None else p.grad)  # a parameter may stand for its own gradient
                for slot in slots:
                    getattr(bucket, slot).append(entry[slot])
                if group["rounding"] == "stochastic":
                    bucket.streams.append(stream(group["seed"], place))
                places.append(place)
            place += 1
        for bucket, places in found.values():
            yield i, rule, bucket.of_its_width(), places


def scaling(optimizer: Any) -> Scaling | None:
    """What torch.amp.GradScaler set for this step: the scale that gradients still carry, and found_inf."""
    found_inf = getattr(optimizer, "found_inf", None)
    return None if found_inf is None else (getattr(optimizer, "grad_scale", None), found_inf)
