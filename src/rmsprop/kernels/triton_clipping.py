"""Clips gradients inside the Triton kernel's step, without waiting for the device: triton_norms.py."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rmsprop.kernels import triton
from rmsprop.kernels.refusals import count_writes
from rmsprop.kernels.triton_bounds import Bounds
from rmsprop.spec import Hyper
from rmsprop.tensors.clipping import Work

Group = Mapping[str, Any]
Launched = tuple[Hyper, triton.Work, triton.Table]  # of one work


class Clipping:
    """The buffers of a clipped step of several works on one device, and the launches that fill them.

    Attributes:
        total: the norm that clip_global_norm bounded in the last step, before it did. None without one.
    Shapes: sums[w] is [blocks, 3], coefficients[w] is [tensors, 2], shared is [tensors under clip_global_norm].
    """

    def __init__(self, groups: Sequence[Group], tables: Sequence[triton.Table]) -> None:
        device = tables[0].device
        self.key = _key(groups, tables)
        self._groups = [{name: group[name] for name in _READ} for group in groups]
        self._sums: list[Tensor | None] = []
        coefficients: list[Tensor | None] = []
        self._shared: list[Tensor | None] = []
        counts = [
            len(own.sizes) if g["clip_global_norm"] is not None else 0 for g, own in zip(groups, tables, strict=True)
        ]

        made = partial(torch.zeros, dtype=torch.float64, device=device)
        self._together = made(sum(counts))
        # NaN until a step is not skipped
        self.total = torch.full((), math.nan, dtype=torch.float64, device=device) if sum(counts) else None
        begin = 0
        for group, table, count in zip(groups, tables, counts, strict=True):
            normed = group["clip_norm"] is not None or group["clip_global_norm"] is not None
            self._sums.append(made(table.blocks, 3) if normed else None)
            coefficients.append(made(len(table.sizes), 2) if normed else None)
            self._shared.append(self._together[begin : begin + count] if count else None)
            begin += count
        self.bounds = [Bounds.of(group, own) for group, own in zip(groups, coefficients, strict=True)]

    def launch(
        self, works: Sequence[Launched], grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        """Take the norms of all works, and step them. Mutates: parameters, slots and the buffers."""
        device = works[0][1].device
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                return self.launch(works, grad_scale, found_inf)
        grad_scale, found_inf = (
            None if x is None else x.to(device, non_blocking=True) for x in (grad_scale, found_inf)
        )
        self._keep(device)
        theres = [table.on_device(work.capturable) for _, work, table in works]
        for i, (hyper, work, table) in enumerate(works):
            self._take_norms(i, hyper, work, table, theres[i], grad_scale)
        for group, bounds, shared, (_, work, _) in zip(self._groups, self.bounds, self._shared, works, strict=True):
            if shared is not None:
                many = (self._together, self._together.numel(), self.total, found_inf)
                arguments = (work.count, bounds.coefficients, *many, float(group["clip_global_norm"]))
                work.start("bound", {}, 1, arguments, (found_inf,))
        for (hyper, work, table), there, bounds in zip(works, theres, self.bounds, strict=True):
            work.launch(hyper, table, grad_scale, found_inf, bounds, there)
        return None

    def _take_norms(
        self, i: int, hyper: Hyper, work: triton.Work, table: triton.Table, there: Tensor, grad_scale: Tensor | None
    ) -> None:
        """Launch what fills the sums, factors and norms of a work."""
        sums, bounds, shared = self._sums[i], self.bounds[i], self._shared[i]
        if sums is None:
            return
        early = bounds.early(work.rule, hyper)
        start = (there, work.count, sums, grad_scale, early, bounds.value)
        work.start("squares", {"pulled": early != 0}, table.blocks, start, (grad_scale,))
        limit = self._groups[i]["clip_norm"]
        arguments = (
            there,
            work.count,
            sums,
            bounds.coefficients,
            shared,
            math.inf if limit is None else float(limit),
        )
        scaled = work.arithmetic is torch.float64
        work.start("norms", {"scaled": scaled}, work.count, arguments, (shared,))

    def _keep(self, device: torch.device) -> None:
        """Keep the buffers for replays, if a CUDA graph is being captured."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            own = [bounds.coefficients for bounds in self.bounds]
            kept = [x for x in (*self._sums, *own, self._together, self.total) if x is not None]
            triton._REPLAYED.update((id(x), x) for x in kept)


_READ = ("clip_value", "clip_norm", "clip_global_norm", "clip_after_decay", "clip_value_last")
UNCLIPPED: Group = dict.fromkeys(_READ)


def _key(groups: Sequence[Group], tables: Sequence[triton.Table]) -> tuple[Any, ...]:
    return tuple(
        (own.device, own.sizes, own.blocks, *(group[name] for name in _READ))
        for group, own in zip(groups, tables, strict=True)
    )


def clipping_of(groups: Sequence[Group], tables: Sequence[triton.Table]) -> Clipping:
    """Return the buffers of the last step with these tables if they fit, else new ones."""
    held: Clipping | None = tables[0].clipping
    if held is None or held.key != _key(groups, tables):
        held = tables[0].clipping = Clipping(groups, tables)
    return held


def clip_and_step(works: Sequence[Work]) -> Tensor | None:
    """Advance the buckets of all groups by one step whose clipping (tensors/clipping.py) is in the same launches.

    Args:
        works: group, rule, numbers and bucket of each work. All have one loss scale and one found_inf.
    Returns: the norm that clip_global_norm bounds, before it does, on the device. None without one.
    Mutates: parameters and slots. Never gradients.
    """
    works = [work for work in works if work[3].param]
    if not works:
        return None
    launched = []
    for _, rule, hyper, bucket in works:
        table = triton._tables[bucket.param[0]] = triton.table_of(bucket)
        work = triton.Work(rule, bucket)
        if not work.clock:
            triton.count(rule, hyper, bucket, table)
        launched.append((hyper, work, table))
    first = works[0][3]
    clipping = clipping_of([group for group, *_ in works], [table for *_, table in launched])
    clipping.launch(launched, first.grad_scale, first.found_inf)
    for *_, bucket in works:
        count_writes(bucket.param)
    return None if clipping.total is None else clipping.total.clone()
