"""What does not change between the steps of an optimizer on a GPU, kept, and dropped the moment that it does.

The look whether all tensors are where they were is the CPU plan's, in C: here it writes today's addresses straight
into the tables that the kernel reads.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmsprop.bucket import Bucket
from rmsprop.guard import Guard
from rmsprop.kernels import cpu, native, triton
from rmsprop.kernels.plan import Due, Plan, Scaling, Settings
from rmsprop.spec import Hyper, Rule

_NAMES = ("param", "grad", "square_avg", "grad_avg", "momentum_buffer", "step", "compensation", "size")
_MOVED = 0  # Again, in csrc/plan.h


class _Lists:
    """A bucket as both kernels take it: native.Work's arrays are the columns of a triton.Table."""

    def __init__(self, rule: Rule, bucket: Bucket) -> None:
        self.table = triton.table_of(bucket)  # that of the step before is on the device already
        self.first = bucket.param[0]
        self.launched = triton.Work(rule, bucket)
        if bucket.capturable and self.table.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            self.table.prepare()
        own = cpu.Lists(rule, bucket)
        self._own = own  # its scratch arrays
        columns = self.table.columns
        for name, column in zip(_NAMES, columns, strict=False):
            if name == "size" or name in own.address:
                setattr(own.work, name, column.ctypes.data)
        own.work.correction = columns[triton.CORRECTION].ctypes.data
        if self.launched.clock is None:
            own.work.key = columns[triton.RANDOM].ctypes.data
        self.work = own.work
        self.size = columns[triton.SIZE]
        # the same counters, of tensors without elements: the CPU kernel then counts steps and does nothing else
        self.counted = native.Work.from_buffer_copy(own.work)
        self._no_elements = np.zeros(len(self.size), np.int64)
        self.counted.size = self._no_elements.ctypes.data

    def count(self, loaded: native.Native, alpha: float) -> None:
        """Count the steps on the host, and work out [4] 1 − αᵗ and the keys, for tensors that have a gradient."""
        np.minimum(self.size, 0, out=self._no_elements)
        self.counted.alpha = alpha
        loaded.step(ctypes.byref(self.counted), 1, 0.0, None, 0)


class DevicePlan(Plan):
    """Where all tensors of an optimizer are on its GPUs, and how they are stepped."""

    def _can(self, scaling: Scaling | None, guard: Guard | None, due: Due) -> bool:
        """Whether such a step is one for a plan: the long way has a table for each set of tensors that are due.

        Where steps are counted on the host, it also says what that does not go with. The look in C tells a GPU from a
        CPU, but not from another GPU.
        """
        lists = self._held[0]
        if due is not None or any(own.first.device != own.table.device for own in lists):
            return False
        on_host = any(own.launched.clock is None for own in lists)
        decided_there = scaling is not None or (guard is not None and guard.mode == "skip")
        return not (on_host and (decided_there or _capturing(lists)))

    def _write(self, known: Any, hyper: Hyper) -> None:
        """Nothing: the numbers go with the launch."""

    def _run(
        self,
        gradients: list[Tensor | None],
        groups: list[dict[str, Any]],
        scaling: Scaling | None,
        guard: Guard | None,
        _due: Due,
    ) -> bool:
        """`again`, of these gradients, once all that Python knows is as it was; without waiting for a device."""
        if self._loaded.again(self._address, id(gradients), self._active) == _MOVED:
            return False
        grad_scale, found_inf = scaling or (None, None)
        if guard is not None and scaling is None:
            bad = guard.look(groups)
            if bad is True:
                return True
            found_inf = bad if isinstance(bad, Tensor) else None
        hypers = [known.hyper for known in self._known for _ in known.works]
        for lists, hyper in zip(self._held[0], hypers, strict=True):
            if lists.launched.clock is None:
                lists.count(self._loaded, hyper.alpha)
            lists.launched.launch(hyper, lists.table, grad_scale, found_inf)
        self._count_writes(None)
        return True

    def _look(self) -> tuple[native.Host | None, int]:
        host = self._loaded.host
        if host is not None and torch.cuda.is_available():
            host = native.Host.from_buffer_copy(host)
            host.cpu = native.device_code("cuda")
        return host, -1

    def _refuse(self, rule: Rule, bucket: Bucket) -> str | None:
        return triton.refuse(rule, bucket)

    def _lists(self, rule: Rule, bucket: Bucket) -> _Lists:
        return _Lists(rule, bucket)


def _capturing(lists: list[_Lists]) -> bool:
    return lists[0].first.is_cuda and torch.cuda.is_current_stream_capturing()


def build(
    used: str, backend: str, groups: list[tuple[dict[str, Any], Rule]], state: Any, settings: Settings
) -> Plan | None:
    """A plan for all groups; None where one native kernel does not take all of them, or the look in C is missing.

    Args:
        used: the backend that took the step before.
        backend: the one that was asked for.
        settings: what of a group, but params and numbers, must stay as it is.
    """
    kinds = {"cpu": Plan, "triton": DevicePlan}
    loaded = native.load()
    if used not in kinds or isinstance(loaded, str) or loaded.again is None:
        return None
    plan = kinds[used](loaded, backend, groups, state, settings)
    return plan if plan.takes else None
