"""What does not change between the steps of an optimizer on a GPU, kept, and dropped the moment that it does.

The look whether all tensors are where they were is the CPU plan's, in C: here it writes today's addresses straight
into the tables that the kernel reads.
"""

import ctypes
from typing import Any

import numpy as np
import torch

from rmsprop.bucket import Bucket
from rmsprop.guard import Guard
from rmsprop.kernels import cpu, native, triton
from rmsprop.kernels.plan import GRADIENTS, NUMBERS, Due, Plan, Scaling, Settings, usual
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

    def again(
        self,
        backend: str,
        groups: list[dict[str, Any]],
        state: Any,
        scaling: Scaling | None = None,
        guard: Guard | None = None,
        due: Due = None,
    ) -> bool:
        """Step once more if everything is where it was, without waiting for a device.

        Args:
            due: as in Plan; the long way has a table for each set of tensors that step together.
        Returns: False, with nothing written, if anything moved that a table does not follow.
        Mutates: parameters and state. Never gradients.
        """
        if self._busy or backend != self._backend or state is not self._state or len(groups) != len(self._known):
            return False
        if cpu.in_mode() or due is not None:
            return False
        if any(lists.launched.clock is None for lists in self._held[0]) and (
            scaling is not None
            or (guard is not None and guard.mode == "skip")
            or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        ):
            return False  # steps counted on the host: the long way says what that does not go with
        hypers = []
        for group, known in zip(groups, self._known, strict=True):
            if group["params"] is not known.params:
                return False
            hyper = Hyper(*(*NUMBERS(group), group["max_lr"], group["max_update"]))
            try:
                same = (hyper.momentum != 0) is known.momentum and self._settings(group) == known.settings
                if not same or not usual(*NUMBERS(group)):
                    return False
            except (ArithmeticError, TypeError, ValueError, RuntimeError):
                return False  # what is no number or no switch: the long way says which
            hypers += [hyper] * len(known.works)
        if self._negated():
            return False
        if any(lists.first.device != lists.table.device for lists in self._held[0]):
            return False  # the look in C tells a GPU from a CPU, but not from another GPU
        self._busy = True
        try:
            gradients = list(map(GRADIENTS, self._params))
            if self._shards.gradients(gradients) is None:
                return False
            if self._loaded.again(self._address, id(gradients), self._active) == _MOVED:
                return False
            grad_scale, found_inf = scaling or (None, None)
            if guard is not None and scaling is None:
                bad = guard.look(groups)
                if bad is True:
                    return True
                found_inf = bad if isinstance(bad, torch.Tensor) else None
            for lists, hyper in zip(self._held[0], hypers, strict=True):
                if lists.launched.clock is None:
                    lists.count(self._loaded, hyper.alpha)
                lists.launched.launch(hyper, lists.table, grad_scale, found_inf)
            self._count_writes(None)
        finally:
            self._busy = False
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
