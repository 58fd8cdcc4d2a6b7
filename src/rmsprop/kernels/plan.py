"""Caches what stays the same between the steps of an optimizer on the CPU, and validates it at every step.

For small networks, Python is the whole cost of a step. A plan reduces it to one list of gradients and one call.
"""

import ctypes
import math
import struct
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_double, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from rmsprop.kernels import cpu, native, refusals
from rmsprop.kernels.parts import Part, Stepped, parts_of, whole_groups
from rmsprop.spec import SLOTS, Averaging, Hyper, Rule, plain
from rmsprop.tensors import clipping, shards
from rmsprop.tensors.bucket import Bucket
from rmsprop.tensors.nonfinite import Guard, first_unfinite

_NAMES = ("", "", *SLOTS)  # in the order of Bucket.lists(); the parameter and its gradient are not in the state
NUMBERS = itemgetter("lr", "alpha", "eps", "momentum", "weight_decay")  # the first fields of Work in csrc/rmsprop.h
_FLOATS = {float}
_PACK = struct.Struct("=5d").pack_into
_PARAMS = itemgetter("params")
GRADIENTS = attrgetter("grad")
_MOVED, _SAME, _STEPPED = 0, 1, 2  # Again, in csrc/plan.h
_STATES = (defaultdict, dict)  # subclasses may override access to items

Scaling = tuple[Tensor | None, Tensor | None]  # the loss scale, and found_inf
Due = list[Tensor] | None
Settings = Callable[[Mapping[str, Any]], tuple[Any, ...]]


@dataclass
class _Known:
    """A group in the last step: the number of parameters, the settings without numbers, the rule and the works."""

    count: int
    settings: tuple[Any, ...]
    momentum: bool
    rule: Rule
    works: list[native.Work]
    numbers: tuple[Any, ...] = ()  # of the last step; empty for a tensor lr, whose value may change
    hyper: Any = None  # the numbers as a Hyper


def usual(lr: Any, alpha: float, eps: float, momentum: float, decay: float) -> bool:
    """Return whether a step may run with these numbers. Schedules may set lr below 0. A tensor lr is not read."""
    if not all(type(x) is float or _is_number(x) for x in (alpha, eps, momentum, decay)):
        return False
    if isinstance(lr, Tensor):
        lr_fits = lr.numel() == 1 and lr.is_floating_point() and not lr.is_meta
    else:
        lr_fits = (type(lr) is float or _is_number(lr)) and lr - lr == 0
    return lr_fits and 0 <= alpha < 1 and 0 <= eps < math.inf and 0 <= momentum < 1 and 0 <= decay < math.inf


def _is_number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


class Plan:
    """The locations of all tensors of an optimizer, and how they are stepped.

    A plan owns no tensor, and trusts no id without comparing the object. Each step looks up every object in the
    groups and the state, as the full step does, and validates it (csrc/plan.cpp). Objects that the user drops are
    thus freed, and an object that replaces another is stepped only if the full step would do the same:

    | the full step reads                                   | the plan                                             |
    |-------------------------------------------------------|------------------------------------------------------|
    | the backend, dispatch modes, a scaler, due parameters | reads them, or leaves the step to the full step      |
    | every setting of every group, missing ones too        | compares all with those it was made for              |
    | types and ranges of lr, alpha, eps, momentum, decay   | `usual`, if one differs from the last step's         |
    | the lists of parameters                               | exact lists with the same number of parameters       |
    | state entries, their names, missing or foreign slots  | exact dicts, with the same keys and number of names  |
    | type, device, dtype, layout, lazy views, subclasses   | exact types and one set of dispatch keys             |
    | shapes and strides, elements that share memory        | the same, and density                                |
    | overlap of written memory and gradients               | the same, over all groups, if an address changes     |
    | a gradient of another layout                          | a copy, where the last step made one                 |
    | tensors that the kernel refuses                       | leaves them to the caller, who finds them in `left`  |
    | a first gradient, or none                             | no gradient for a parameter without state            |
    | DTensors                                              | the same specs, and the current shards               |
    | NaN and infinity under nonfinite=, norms and bounds   | the same, in C                                       |
    """

    def __init__(
        self,
        loaded: native.Native,
        backend: str,
        groups: list[tuple[dict[str, Any], Rule]],
        state: Any,
        settings: Settings,
        stepped: Stepped = (),
        left: Sequence[Tensor] = (),
    ) -> None:
        self._loaded, self._backend, self._settings = loaded, backend, settings
        self._lock = threading.Lock()  # held during a step that leaves C, in which other threads may run
        self._scale = 1.0  # of the works
        self._spread_ids: tuple[list[int], ...] = ()  # of the DTensor slots and shards that the plan holds
        self._guard: Guard | None = None  # the guard of the plan's `guarded`
        self._held: list[Any] = []  # keeps arrays alive that the structures below point to
        self._stepping: list[Tensor] = []  # keeps slots alive during a step in which other threads may drop them
        params = [p for group, _ in groups for p in group["params"]]
        self._index = {id(p): i for i, p in enumerate(params)}  # a hint: the parameter at the index is compared
        self._shards = shards.DTensorWatch(params, state)
        self._left = [self._index[id(p)] for p in left]
        self.leaves = bool(left)  # some parameters to another backend, which `left` finds
        self._left_weakly = [weakref.ref(p) for p in left]
        parts = whole_groups(groups, stepped)
        if not parts:
            found = parts_of(groups, state, set(map(id, left)))
            parts = [(i, rule, self._shards.stepped(bucket), indices) for i, rule, bucket, indices in found]
            parts = parts if all(self._refuse(rule, bucket) is None for _, rule, bucket, _ in parts) else []
        self.takes = bool(parts) and type(state) in _STATES
        if not self.takes:
            return
        known = [settings(group) for group, _ in groups]  # first: what changes from here on is seen by the next step
        self._host = native.host(parts[0][2].param[0].device)
        lists = [self._lists(rule, bucket) for _, rule, bucket, _ in parts]
        self._lists_held = lists
        for held, (i, *_) in zip(lists, parts, strict=True):
            group = groups[i][0]
            held.work.scale = 1.0
            held.bounds(group["max_update"], group["clip_weights"], Averaging.of(group))
            if clipping.clips(group):
                held.clips(group)
        works = (native.Work * len(lists))(*(held.work for held in lists))
        self._works = works
        self._known = []
        for i, (group, rule) in enumerate(groups):
            own = [work for work, (owner, *_) in zip(works, parts, strict=True) if owner == i]
            self._known.append(_Known(len(group["params"]), known[i], rule.momentum, rule, own))
        filled = self._fill(parts, params, list(state.items()))
        self.takes = filled is not None
        if filled is None:
            return
        self._plan = filled
        self._copied = [] if self._shards.any else _copied(parts, params)
        self._replaces = bool(self._left or self._copied)
        self._together = any(groups[i][0]["clip_global_norm"] is not None for i, *_ in parts)
        self._plan.norm = -1.0  # none yet
        self._serial = self._plan.elements <= self._plan.serial_limit  # rmsprop_again takes whole steps
        self._address = ctypes.addressof(self._plan)
        self._works_address = ctypes.addressof(works)
        self.takes = bool(loaded.apart(self._address))

    def again(
        self,
        backend: str,
        groups: list[dict[str, Any]],
        state: Any,
        scaling: Scaling | None = None,
        guard: Guard | None = None,
        due: Due = None,
    ) -> bool:
        """Step if the plan is still valid.

        Args:
            scaling: the loss scale and found_inf of a gradient scaler.
            guard: stops a step whose gradients are not finite.
            due: the parameters that step, of those that have a gradient. None: all.
        Returns: False, with nothing written, if anything changed.
        Mutates: parameters and state. Never gradients.
        """
        if backend != self._backend or type(state) not in _STATES:
            return False
        if type(groups) is not list or len(groups) != len(self._known):
            return False
        if refusals.in_mode() or not self._can(scaling, guard, due):
            return False
        alone = self._serial and guard is None  # one call of C, with the GIL
        if not alone and not self._lock.acquire(False):
            return False  # a step by this plan is not finished
        try:
            if not self._same_settings(groups):
                return False
            keys = groups[0]["params"] if len(groups) == 1 else list(chain.from_iterable(map(_PARAMS, groups)))
            if len(groups) == 1 and not alone:
                keys = keys[:]  # another thread may change the user's list
            try:
                gradients = list(map(GRADIENTS, keys)) if due is None else self._due(due, keys)
                if self._replaces:
                    self._replace(keys, gradients)
            except (AttributeError, LookupError):  # not a tensor, a parameter of no group, or a list that changed
                return False
            return self._run(groups, state, keys, gradients, scaling, guard)
        finally:
            if not alone:
                self._stepping.clear()
                self._lock.release()

    def _same_settings(self, groups: list[dict[str, Any]]) -> bool:
        """Return whether the groups have the plan's settings and parameter counts. Numbers may change.

        Mutates: the works, into which changed numbers are written.
        """
        for group, known in zip(groups, self._known, strict=True):
            try:
                params, numbers = group["params"], NUMBERS(group)
                if type(params) is not list or len(params) != known.count:
                    return False
                if self._settings(group) != known.settings:
                    return False
                if type(numbers[0]) is not float or numbers != known.numbers:
                    if not usual(*numbers) or (numbers[3] != 0) is not known.momentum:
                        return False
                    known.numbers = ()
                    if set(map(type, numbers)) != _FLOATS:
                        numbers = tuple(map(plain, numbers))  # NumPy numbers compute differently, and arrays change
                    self._write(known, group, Hyper(*(*numbers, group["reference_lr"])))
                    known.numbers = () if isinstance(numbers[0], Tensor) else numbers
            except (struct.error, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError):
                return False  # a missing or invalid setting: the full step raises
        return True

    def _can(self, scaling: Scaling | None, _guard: Guard | None, _due: Due) -> bool:
        """Return whether a plan can take such a step. The full step skips those whose gradients overflowed."""
        if scaling is None:
            return True
        fits = all(x is None or (type(x) is Tensor and x.is_cpu and x.numel() == 1) for x in scaling)
        return fits and not self._shards.any and (scaling[1] is None or scaling[1].item() == 0)

    def _write(self, known: _Known, _group: Mapping[str, Any], hyper: Hyper) -> None:
        """Write the current numbers into the works. A tensor lr is read here. Raises: struct.error, TypeError."""
        numbers = (hyper.lr, hyper.alpha, hyper.eps, hyper.momentum, hyper.shrinkage(known.rule))
        for work in known.works:
            _PACK(work, 0, *numbers)

    def _unscale(self, scaling: Scaling | None) -> None:
        """Write the factor of the gradients, 1 / loss scale, into the works."""
        scale = 1.0 if scaling is None or scaling[0] is None else 1 / scaling[0].item()
        if scale != self._scale:
            self._scale = scale
            for work in self._works:
                work.scale = scale

    @property
    def norm(self) -> Tensor | float | None:
        """The norm that clip_global_norm bounded in the last step by this plan. None if there was none."""
        return None if not self._together or self._plan.norm < 0 else self._plan.norm

    def left(self, groups: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[Tensor]]] | None:
        """Return the parameters with a gradient that the plan leaves, by group. None if they are no longer there."""
        found: list[tuple[dict[str, Any], list[Tensor]]] = []
        first, todo = 0, dict(zip(self._left, self._left_weakly, strict=True))
        for group in groups:
            params = group["params"]
            end = first + len(params)
            own = [(i, todo.pop(i)()) for i in list(todo) if first <= i < end]
            if any(p is None or params[i - first] is not p for i, p in own):
                return None
            here = [p for _, p in own if p is not None and p.grad is not None]
            found += [(group, here)] if here else []
            first = end
        return None if todo else found

    @property
    def has_dtensors(self) -> bool:
        """True if some of the parameters are DTensors."""
        return self._shards.any

    def _replace(self, keys: list[Any], gradients: list[Tensor | None]) -> None:
        """Take out the gradients of parameters that the plan leaves, and copy those of another layout."""
        for i in self._left:
            gradients[i] = None
        for i in self._copied:
            grad = gradients[i]
            if grad is not None:
                gradients[i] = cpu.laid_out(keys[i], grad)

    def _due(self, due: list[Tensor], params: list[Any]) -> list[Tensor | None]:
        """Return the gradient of every parameter that is due, in the order of the groups, and None for the others."""
        gradients: list[Tensor | None] = [None] * len(params)
        for p in due:
            index = self._index.get(id(p), -1)
            if index < 0 or params[index] is not p:
                raise AttributeError
            gradients[index] = p.grad
        return gradients

    def _serial_limit(self) -> int:
        """Return the number of elements above which rmsprop_again leaves the step to its caller."""
        return -1 if self._shards.any or not self._host or not self._host.bump else native.GRAIN

    def _refuse(self, rule: Rule, bucket: Bucket) -> str | None:
        return cpu.refuse(rule, bucket)

    def _lists(self, rule: Rule, bucket: Bucket) -> Any:
        """Return the arrays of addresses and sizes that rmsprop_again updates, with their `work` and `size`."""
        return cpu.Lists(rule, bucket)

    def _validate(
        self, state: Any, keys: list[Any], gradients: list[Tensor | None]
    ) -> tuple[int, list[Any], list[Tensor | None]]:
        """Validate everything in C, which also steps small works.

        Returns: an Again, the tensors that step, and their gradients.
        """
        params = keys
        if self._shards.any:
            found = self._shards.current(keys, gradients)
            if found is None:
                return _MOVED, params, gradients
            params, *spread = found
            ids = tuple([*map(id, values)] for values in spread)
            if ids != self._spread_ids:
                self._spread_ids = ids
                for (index, name), slot, part in zip(self._shards.slots, *ids, strict=True):
                    at = index * native.TENSORS + _NAMES.index(name)
                    self._spread[0][at], self._spread[1][at] = slot, part
        return self._loaded.again(self._address, id(params), id(keys), id(gradients), id(state)), params, gradients

    def _run(
        self,
        groups: list[dict[str, Any]],
        state: Any,
        keys: list[Any],
        gradients: list[Tensor | None],
        scaling: Scaling | None,
        guard: Guard | None,
    ) -> bool:
        """Step with these gradients if C finds the plan valid, after `again` has compared the settings."""
        if scaling is not None or self._scale != 1.0:
            self._unscale(scaling)
            guard = guard if scaling is None else None  # the scaler has looked at the gradients
        if guard is not self._guard:
            self._guard, self._plan.guarded = guard, guard is not None
        code, params, gradients = self._validate(state, keys, gradients)
        if code == _MOVED:
            return False
        if code == _STEPPED and guard is None:
            return True
        works, parallel_for = (self._works_address, len(self._works)), self._loaded.parallel_for
        norm, unclear = c_double(self._plan.norm), 1
        if self._plan.normed and code == _SAME:
            unclear = self._loaded.norms(*works, ctypes.byref(norm), parallel_for, native.GRAIN)
            if unclear < 0:
                raise RuntimeError("no memory or threads for the norms of the gradients: no parameter was changed")
        if guard is not None:
            bad = self._plan.unfinite
            if code == _SAME:
                bad = self._loaded.unfinite(*works, parallel_for, native.GRAIN) if unclear else -1
            if bad < -1:
                raise RuntimeError("torch_parallel_for failed before the gradients were scanned: nothing was changed")
            if bad >= 0:
                guard.stop(groups, self._indices[bad] if self._in_order else first_unfinite(groups))
                return True
            guard.passed()
        if code == _SAME:
            self._plan.norm = norm.value
            self._count_writes(keys, params, gradients)
            failed = self._loaded.step(*works, 0.0, parallel_for, native.GRAIN)
            if failed:
                raise RuntimeError(f"torch_parallel_for failed with code {failed}: the step is incomplete")
        return True

    def _count_writes(self, keys: list[Any], params: list[Any], gradients: list[Tensor | None]) -> None:
        """Increment autograd's version counters of the parameters that are about to be written.

        They are incremented first, since a signal could interrupt between the write and its count.
        """
        if self._plan.active == len(keys) and not self._plan.inferred and not self._shards.any:
            torch.autograd.graph.increment_version(keys)
            return
        written = [x for x, g in zip(params, gradients, strict=True) if g is not None]
        if self._shards.any:  # autograd may have saved the parameter or its shard
            triples = zip(keys, params, gradients, strict=True)
            written += [key for key, x, g in triples if g is not None and key is not x]
        refusals.count_writes(written)

    def _fill(self, parts: list[Part], params: list[Tensor], entries: list[tuple[Any, Any]]) -> native.Plan | None:
        """Return the plan in the form of csrc/plan.h. None if another thread has removed a parameter's entry."""
        kinds = [kind for _, _, bucket, _ in parts for kind in refusals.kinds(self._loaded, bucket)]
        self._indices = [index for *_, indices in parts for index in indices]
        self._in_order = self._indices == sorted(self._indices)  # not where a group holds several kinds
        placed = set(self._indices)
        idle = [i for i in range(len(params)) if i not in placed]
        items = [self._index.get(id(key), -1) for key, _ in entries]
        while items and items[-1] not in placed:
            items.pop()
        items = [index if index in placed else -1 for index in items]
        if not placed <= set(items):
            return None
        sizes = [len(entry) if index >= 0 else 0 for index, (_, entry) in zip(items, entries, strict=False)]
        spans = (c_int64 * (2 * (native.TENSORS - 1) * len(self._indices)))()
        self._held.append(spans)
        names = [c_void_p(id(name)).value if name else None for name in _NAMES]
        plan = native.Plan(
            host=ctypes.addressof(self._host) if self._host else None,
            params=len(params),
            items=len(items),
            item=self._array(c_int64, items),
            entry_size=self._array(c_int64, sizes),
            entry=self._array(c_void_p, [None] * len(params)),
            slot_names=(c_void_p * native.TENSORS)(*names),
            works=len(self._works),
            work=ctypes.addressof(self._works),
            kinds=self._array(c_int32, kinds),
            place=self._array(c_void_p, [self._array(c_int64, indices) for *_, indices in parts]),
            elements=sum(p.numel() for _, _, bucket, _ in parts for p in bucket.param),
            serial_limit=self._serial_limit(),
            normed=any(work.coefficient for work in self._works),
            idle=len(idle),
            idle_place=self._array(c_int64, idle),
            span=ctypes.addressof(spans),
            stepping=id(self._stepping),
        )
        if self._shards.any:
            self._spread = [(c_void_p * (native.TENSORS * len(params)))() for _ in range(2)]
            plan.spread_slot, plan.spread_shard = map(ctypes.addressof, self._spread)
        return plan

    def _array(self, kind: Any, values: list[Any]) -> int:
        """Return the address of a C array that lives as long as the plan."""
        array = (kind * len(values))(*values)
        self._held.append(array)
        return ctypes.addressof(array)


def _copied(parts: list[Part], params: list[Tensor]) -> list[int]:
    """Return the parameters whose gradients the last step copied into another layout, by their indices."""
    found = [(i, g) for *_, bucket, indices in parts for i, g in zip(indices, bucket.grad, strict=True)]
    return [i for i, g in found if params[i].grad is not None and g is not params[i].grad]
