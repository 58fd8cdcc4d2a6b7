"""Caches what stays the same between the steps of an optimizer on a GPU, and validates it at every step.

The CPU plan's validation in C writes the current addresses directly into the tables that the kernel reads.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmsprop.kernels import cpu, native, triton
from rmsprop.kernels.plan import Due, Plan, Scaling
from rmsprop.kernels.triton_clipping import UNCLIPPED, Clipping, clipping_of
from rmsprop.spec import SLOTS, Averaging, Hyper, Rule
from rmsprop.tensors.bucket import Bucket
from rmsprop.tensors.clipping import clips
from rmsprop.tensors.nonfinite import Guard

_NAMES = ("param", "grad", *(name for name in SLOTS if name != "ema"), "size")
_MOVED = 0  # Again, in csrc/plan.h


class _Lists:
    """A bucket in the form of both kernels: the arrays of native.Work are the columns of a triton.Table."""

    def __init__(self, rule: Rule, bucket: Bucket) -> None:
        self.table = triton.table_of(bucket)  # the last step's table is already on the device
        self.launched = triton.Work(rule, bucket)
        self.group: Mapping[str, Any] = UNCLIPPED
        if bucket.capturable and self.table.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            self.table.prepare()
        own = cpu.Lists(rule, bucket)
        self._own = own  # keeps its scratch arrays alive
        columns = self.table.columns
        for name, column in (*zip(_NAMES, columns, strict=False), ("ema", columns[triton.EMA])):
            if name == "size" or name in own.address:
                setattr(own.work, name, column.ctypes.data)
        own.work.correction = columns[triton.CORRECTION].ctypes.data
        own.work.ema_weight = columns[triton.SHARE].ctypes.data
        if self.launched.clock is None:
            own.work.key = columns[triton.RANDOM].ctypes.data
        self.work = own.work
        self.size = columns[triton.SIZE]
        # the same counters with tensors of no elements, for which the CPU kernel only counts steps
        self.counted = native.Work.from_buffer_copy(own.work)
        self._no_elements = np.zeros(len(self.size), np.int64)
        self.counted.size = self._no_elements.ctypes.data

    def bounds(self, max_update: float | None, clip_weights: float | None, average: Averaging | None) -> None:
        """Write the average of the weights into the counters. The bounds are arguments of the launch."""
        self._own.bounds(max_update, clip_weights, average)
        for name in ("ema_decay", "ema_start", "ema_interval", "ema_warmup"):
            setattr(self.counted, name, getattr(self.work, name))

    def clips(self, group: Mapping[str, Any]) -> None:
        """Note the clipping of gradients, which DevicePlan does for all works together."""
        self.group = group

    def count(self, loaded: native.Native, alpha: float) -> None:
        """Count the steps of tensors with a gradient on the host, and what depends on the counts.

        That is 1 − αᵗ of [4], 1 − d of [10] and the keys of random bits.
        """
        np.minimum(self.size, 0, out=self._no_elements)
        self.counted.alpha = alpha
        loaded.step(ctypes.byref(self.counted), 1, 0.0, None, 0)


class DevicePlan(Plan):
    """The locations of all tensors of an optimizer on its GPUs, and how they are stepped."""

    _clipped = False  # a step by this plan has taken norms

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        lists = self._lists_held if self.takes else []
        self._clipping: Clipping | None = None
        if any(clips(own.group) for own in lists):
            self._clipping = clipping_of([own.group for own in lists], [own.table for own in lists])

    @property
    def norm(self) -> Tensor | float | None:
        """The norm that clip_global_norm bounded in the last step by this plan, on the device. None without one."""
        held = self._clipping
        return None if held is None or held.total is None or not self._clipped else held.total.clone()

    def _can(self, scaling: Scaling | None, guard: Guard | None, due: Due) -> bool:
        """Return whether a plan can take such a step.

        Due parameters need the full step, which has a table for each set of them. Steps counted on the host cannot be
        combined with decisions on the device or with a capture.
        """
        lists = self._lists_held
        if due is not None or len({own.table.device for own in lists}) > 1:
            return False
        on_host = any(own.launched.clock is None for own in lists)
        decided_there = scaling is not None or (guard is not None and guard.mode == "skip")
        return not (on_host and (decided_there or _capturing(lists)))

    def _write(self, known: Any, group: Mapping[str, Any], hyper: Hyper) -> None:
        """Store the numbers, which are arguments of the launch."""
        known.hyper = replace(
            hyper,
            max_update=group["max_update"],
            clip_weights=group["clip_weights"],
            average=Averaging.of(group),
        )

    def _run(
        self,
        groups: list[dict[str, Any]],
        state: Any,
        keys: list[Any],
        gradients: list[Tensor | None],
        scaling: Scaling | None,
        guard: Guard | None,
    ) -> bool:
        """Step with these gradients if C finds the plan valid, without waiting for a device."""
        code, params, gradients = self._validate(state, keys, gradients)
        if code == _MOVED:
            return False
        grad_scale, found_inf = scaling or (None, None)
        if guard is not None and scaling is None:
            bad = guard.scan(groups)
            if bad is True:
                return True
            found_inf = bad if isinstance(bad, Tensor) else None
        hypers = [known.hyper for known in self._known for _ in known.works]
        for known in self._known:
            if not known.numbers:  # lr is a tensor, which the user owns
                known.hyper = None
        self._count_writes(keys, params, gradients)
        works = [(hyper, own.launched, own.table) for own, hyper in zip(self._lists_held, hypers, strict=True)]
        for own, hyper in zip(self._lists_held, hypers, strict=True):
            if own.launched.clock is None:
                own.count(self._loaded, hyper.alpha)
        if self._clipping is not None:
            self._clipped = True
            self._clipping.launch(works, grad_scale, found_inf)
            return True
        for hyper, work, table in works:
            work.launch(hyper, table, grad_scale, found_inf)
        return True

    def _serial_limit(self) -> int:
        return -1

    def _refuse(self, rule: Rule, bucket: Bucket) -> str | None:
        return triton.refuse(rule, bucket)

    def _lists(self, rule: Rule, bucket: Bucket) -> _Lists:
        return _Lists(rule, bucket)


def _capturing(lists: list[_Lists]) -> bool:
    return lists[0].table.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
