"""Implements `nonfinite=`: propagates, skips or raises on NaN and infinity in gradients.

"propagate" checks nothing. "raise" and "skip" scan every gradient before anything is written, and one that is not
finite stops the step of all groups. On a GPU, "skip" decides and counts on the device, and the host reads only counts
that have already arrived. Processes that hold shards of one gradient agree, so that all of them stop or none.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from rmsprop.printing import shown, with_article
from rmsprop.spec import NONFINITE, Nonfinite
from rmsprop.tensors import shards
from rmsprop.tensors.bucket import STEPPED, resolved
from rmsprop.tensors.names import names, parameter_name

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Skipped:
    """The steps that nonfinite="skip" has skipped.

    Attributes:
        total: number of skipped steps.
        in_a_row: number of steps skipped since the last one that was taken.
        parameter: first parameter, in the order of the groups, whose gradient was not finite at the last skip.
    """

    total: int = 0
    in_a_row: int = 0
    parameter: str | None = None

    @property
    def last(self) -> bool:
        """True if the last step was skipped. A schedule may then wait."""
        return self.in_a_row > 0


class Guard:
    """Scans gradients before a step, and counts the steps that it stops.

    Args:
        mode: "skip" or "raise".
        limit: number of skips in a row that raises. None: no limit.
    """

    def __init__(self, mode: Nonfinite, limit: int | None) -> None:
        self.mode, self.limit = mode, limit
        self._total = self._row = 0
        self._parameter: str | None = None
        self._counts: _Counts | None = None

    def check(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> None:
        """Refuse FSDP1's shards, and a device whose steps the host counts, since the host does not see skips.

        Raises: ValueError.
        """
        if any(getattr(p, "_fsdp_flattened", False) for p in params):
            raise ValueError(
                f"nonfinite={self.mode!r} cannot see the other shards of FullyShardedDataParallel (FSDP1), so "
                "processes would diverge: shard with fully_shard (FSDP2), whose processes agree"
            )
        on = next((p.device for p in params if isinstance(p, Tensor) and p.device.type not in ("cpu", "meta")), None)
        if self.mode == "skip" and on is not None and not group["capturable"]:
            raise ValueError(
                f"nonfinite='skip' decides and counts steps on {on}, where the gradients are: give capturable=True"
            )

    def describe(self, groups: Groups) -> str:
        """Return a line on what the guard does, and how many steps it has skipped."""
        if self.mode == "raise":
            return "nonfinite='raise': a gradient that holds NaN or infinity raises before anything is written"
        skipped = self.skipped(groups)
        so_far = f"{skipped.total} so far" + (f", the last because of {skipped.parameter}" if skipped.total else "")
        limit = "" if self.limit is None else f", {self.limit} in a row raise"
        return f"nonfinite='skip': a step with NaN or infinity in a gradient is skipped: {so_far}{limit}"

    def skipped(self, groups: Groups) -> Skipped:
        """Return the counts. Waits for the device if they are on one."""
        if self._counts is not None:
            self._note(groups, self._counts.read())
        return Skipped(self._total, self._row, self._parameter)

    @_disable_dynamo  # it branches on values and counts
    def scan(self, groups: Groups) -> Tensor | bool:
        """Return whether to skip the step because a gradient is not finite. On a device it is a tensor, 0 for no.

        Raises: RuntimeError under "raise", and for one skip too many in a row. Nothing is written.
        """
        grads, indices = gradients(groups)
        processes = shards.groups(p for group in groups for p in group["params"])
        if not grads and not processes:
            self.restart()
            return False
        # a process without gradients decides on the kind of device that the others use
        alone = torch.device(processes[0][1]) if processes else torch.device("cpu")
        home = next((g.device for g in grads if not g.is_cpu), grads[0].device if grads else alone)
        bad = unfinite(grads, home)
        if processes:
            bad, indices = _agreed(bad, indices, sum(len(group["params"]) for group in groups), processes)
        if self.mode == "skip" and not _on_host(home):
            return self._count_there(groups, bad, indices)
        if not bad.any():
            self.passed()
            return False
        self.stop(groups, indices[int(bad.to(torch.int8).argmax())])
        return True

    def passed(self) -> None:
        """Note a step that is taken."""
        self._row = 0

    def restart(self) -> None:
        """Reset the number of skips in a row, after a step without gradients or a load."""
        self._row = 0
        if self._counts is not None:
            self._counts.restart()

    def stop(self, groups: Groups, index: int) -> None:
        """Note a step that is skipped because of the parameter at this index.

        Raises: RuntimeError under "raise", and for one skip too many in a row.
        """
        if self.mode == "raise":
            raise RuntimeError(
                f"the gradient of {parameter(groups, index)} holds NaN or infinity, and nonfinite='raise' stops such "
                "a step before anything is written; give nonfinite='skip' to skip it"
            )
        self._note(groups, (self._total + 1, self._row + 1, index))
        self._check()

    def _note(self, groups: Groups, counts: tuple[int, int, int]) -> None:
        self._total, self._row, index = counts
        if index >= 0:
            self._parameter = parameter(groups, index)

    def _check(self) -> None:
        if self.limit is not None and self._row >= self.limit:
            raise RuntimeError(
                f"{self._row} steps in a row were skipped, and nonfinite_limit={self.limit} stops there: the "
                f"gradient of {self._parameter} held NaN or infinity at the last one; check the loss, lower lr, or "
                "load an earlier checkpoint"
            )

    def _count_there(self, groups: Groups, bad: Tensor, indices: Sequence[int]) -> Tensor:
        if self._counts is None:
            if _capturing(bad.device):
                raise RuntimeError(
                    "a CUDA graph is being captured, but nonfinite='skip' has nowhere to count yet: take an "
                    "optimizer step before the capture (warm-up)"
                )
            self._counts = _Counts(bad.device)
        arrived = self._counts.arrived()
        if arrived is not None:
            self._note(groups, arrived)
            self._check()
        return self._counts.count(bad, indices, sum(len(group["params"]) for group in groups))


def make_guard(mode: Any, limit: Any) -> Guard | None:
    """Return the guard for `nonfinite=`. None for "propagate". Raises: ValueError, TypeError."""
    if not isinstance(mode, str) or mode not in NONFINITE:
        raise ValueError(f"Invalid nonfinite: {shown(mode)}; choose one of {', '.join(map(repr, NONFINITE))}")
    works = "nonfinite_limit takes an integer >= 1, the number of skips in a row, such as 100, or None for no limit"
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
        raise TypeError(f"Invalid nonfinite_limit: {shown(limit)} is {with_article(type(limit).__name__)}; {works}")
    if limit is not None and limit < 1:
        raise ValueError(f"Invalid nonfinite_limit: {shown(limit)}; {works}")
    return None if mode == "propagate" else Guard(mode, limit)


def renew_guard(kept: Guard | None) -> Guard | None:
    """Return a new guard of the same kind, for a pickle or a copy."""
    return None if kept is None else Guard(kept.mode, kept.limit)


def _agreed(bad: Tensor, indices: Sequence[int], parameters: int, groups: Iterable[Any]) -> tuple[Tensor, list[int]]:
    """Return for each parameter whether its gradient is not finite on any of the processes. Processes communicate."""
    flags = flags_by_index(bad, indices, parameters).to(torch.uint8)
    for group, kind in groups:
        there = flags.to(kind)
        torch.distributed.all_reduce(there, torch.distributed.ReduceOp.MAX, group=group)
        flags = there.to(flags.device, non_blocking=True)
    return flags != 0, list(range(parameters))


def flags_by_index(bad: Tensor, indices: Sequence[int], parameters: int) -> Tensor:
    """Return a flag for each parameter, from the flags of those at these indices. Nothing is sent to a device."""
    flags = [torch.zeros((), dtype=torch.bool, device=bad.device)] * parameters
    for i, flag in zip(indices, bad.unbind(), strict=True):
        flags[i] = flag
    return torch.stack(flags)


def unfinite(gradients: Sequence[Tensor], home: torch.device) -> Tensor:
    """Return for each gradient whether it holds NaN or infinity: its largest magnitude is then not finite.

    No temporary is as large as a gradient.

    Shapes: [len(gradients)], bool, on the device `home`.
    """
    kinds: dict[Any, list[int]] = {}
    for i, g in enumerate(gradients):
        if g.numel():
            kinds.setdefault((g.device, g.dtype), []).append(i)
    flags = [torch.zeros((), dtype=torch.bool, device=home)] * len(gradients)
    with torch.no_grad():
        for chosen in kinds.values():
            real = [torch.view_as_real(resolved(g)) if g.is_complex() else g for g in (gradients[i] for i in chosen)]
            norms = torch.stack(torch._foreach_norm(real, math.inf))
            found = norms.isfinite().logical_not_().to(home, non_blocking=True)
            if len(chosen) == len(gradients):
                return found
            for i, flag in zip(chosen, found.unbind(), strict=True):
                flags[i] = flag
        return torch.stack(flags) if flags else torch.zeros(0, dtype=torch.bool, device=home)


def first_unfinite(groups: Groups) -> int:
    """Return the index of the first parameter whose gradient holds NaN or infinity. At least one must."""
    grads, indices = gradients(groups)
    return indices[int(unfinite(grads, grads[0].device).to(torch.int8).argmax())]


def parameter(groups: Groups, index: int) -> str:
    """Return the name in messages of a parameter, by its index among all parameters."""
    for i, group in enumerate(groups):
        if index < len(group["params"]):
            name = parameter_name(group, index, i)
            return name if names(group) else f"parameter {name}"
        index -= len(group["params"])
    return "a parameter"


def _holds(grad: Tensor | None) -> bool:
    """Return whether a gradient exists, has data, and is of a kind that a step accepts."""
    if grad is None or grad.is_meta or grad.dtype not in STEPPED:
        return False
    return grad.layout == torch.strided or grad.is_sparse


def gradients(groups: Groups) -> tuple[list[Tensor], list[int]]:
    """Return the gradients as dense tensors (for sparse ones their values), and the indices of their parameters."""
    grads = [(i, p.grad) for i, p in enumerate(p for group in groups for p in group["params"]) if p.grad is not None]
    local = [(i, shards.shard(g)) for i, g in grads]
    local = [(i, g) for i, g in local if _holds(g)]
    return [_values(g) for _, g in local], [i for i, _ in local]


def _values(grad: Tensor) -> Tensor:
    """Return a dense gradient, or the values of a sparse one, with duplicates summed as in the step."""
    return grad.coalesce().values() if grad.is_sparse else grad


class _Counts:
    """Counts on a device: all skips, skips in a row, and the index of the parameter at fault."""

    def __init__(self, home: torch.device) -> None:
        self._home = home
        self._there = torch.tensor([0, 0, -1], dtype=torch.int64, device=home)
        self._here = _buffer(home)
        self._sent: Any = None  # the event after the copy in flight

    def count(self, bad: Tensor, indices: Sequence[int], parameters: int) -> Tensor:
        """Count a step in place, so that a captured graph counts at every replay.

        Args:
            bad: for each gradient whether it is not finite.
            indices: the indices of the gradients' parameters.
            parameters: the number of all parameters.
        Returns: 1 to skip the step, else 0, in float32.
        """
        bad = bad.to(self._home, non_blocking=True)
        if len(indices) < parameters:  # argmax below is to be a parameter's index; `indices` are not on the device
            bad = flags_by_index(bad, indices, parameters)
        found = bad.any()
        total, row, index = self._there.unbind()
        total.add_(found)
        row.add_(1).mul_(found)
        index.copy_(torch.where(found, bad.to(torch.int8).argmax(), index))
        self._send()
        return found.to(torch.float32)

    def restart(self) -> None:
        """Reset the number of skips in a row, on the device's stream. Mutates: the counts."""
        self._there[1:2].zero_()

    def _send(self) -> None:
        """Start a copy of the counts to the host, without waiting for it."""
        if self._sent is not None or _capturing(self._home):
            return
        self._here.copy_(self._there, non_blocking=True)
        self._sent = _mark(self._home)

    def arrived(self) -> tuple[int, int, int] | None:
        """Return the counts of an earlier step, once. None while the copy is in flight."""
        if self._sent is None or _capturing(self._home) or not self._sent.query():
            return None
        self._sent = None
        return _three(self._here)

    def read(self) -> tuple[int, int, int]:
        """Return the counts of the last step. Waits for the device."""
        return _three(self._there)


def _three(counts: Tensor) -> tuple[int, int, int]:
    total, row, index = counts.tolist()
    return total, row, index


def _on_host(device: torch.device) -> bool:
    """Return whether reading a flag of the device needs no wait."""
    return device.type == "cpu"


def _buffer(device: torch.device) -> Tensor:
    """Return the host's buffer for a non-blocking copy of the counts."""
    return torch.empty(3, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")


class _Past:
    """The event after a copy that is complete."""

    def query(self) -> bool:
        """Return True, as a recorded event does once the device has reached it."""
        return True


def _mark(device: torch.device) -> Any:
    """Record an event on the device's current stream."""
    if device.type != "cuda":
        return _Past()
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
