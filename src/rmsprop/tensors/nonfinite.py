"""`nonfinite=`: what a step does about NaN and infinity in gradients, decided before anything is written.

"propagate" looks at nothing. "raise" and "skip" look at every gradient first, and one that is not finite stops the
step of all groups. "skip" on a device decides and counts there: the host reads only counts that have arrived anyway.
Processes that hold shards of one gradient agree: all of them stop, or none.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from rmsprop.printing import shown
from rmsprop.spec import NONFINITE, Nonfinite
from rmsprop.tensors import shards
from rmsprop.tensors.bucket import STEPPED, resolved
from rmsprop.tensors.names import names, parameter_name

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Skipped:
    """What nonfinite="skip" left out so far.

    Attributes:
        total: steps in all.
        in_a_row: steps since the last one that was taken.
        parameter: the first parameter, in the order of the groups, whose gradient was not finite at the last skip.
    """

    total: int = 0
    in_a_row: int = 0
    parameter: str | None = None

    @property
    def last(self) -> bool:
        """Whether the last step was left out: a schedule may then wait."""
        return self.in_a_row > 0


class Guard:
    """Looks at gradients before a step, and counts the steps that it stops.

    Args:
        mode: "skip" or "raise".
        limit: the number of skips in a row that is an error; None: no number is.
    """

    def __init__(self, mode: Nonfinite, limit: int | None) -> None:
        self.mode, self.limit = mode, limit
        self._total = self._row = 0
        self._parameter: str | None = None
        self._counts: _Counts | None = None

    def check(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> None:
        """Refuse a device whose steps are counted on the host, where nobody knows of a skip, and FSDP1's shards.

        Raises: ValueError.
        """
        if any(getattr(p, "_fsdp_flattened", False) for p in params):
            raise ValueError(
                f"nonfinite={self.mode!r} cannot see the other shards of FullyShardedDataParallel (FSDP1), and "
                "processes would part: shard with fully_shard (FSDP2), whose processes agree"
            )
        on = next((p.device for p in params if isinstance(p, Tensor) and p.device.type not in ("cpu", "meta")), None)
        if self.mode == "skip" and on is not None and not group["capturable"]:
            raise ValueError(
                f"nonfinite='skip' decides, and counts steps, on {on} where the gradients are: give capturable=True"
            )

    def describe(self, groups: Groups) -> str:
        """What the guard does, and what it did so far, in a line."""
        if self.mode == "raise":
            return "nonfinite='raise': a gradient that holds NaN or infinity raises before anything is written"
        seen = self.skipped(groups)
        so_far = f"{seen.total} so far" + (f", the last because of {seen.parameter}" if seen.total else "")
        limit = "" if self.limit is None else f", {self.limit} in a row raise"
        return f"nonfinite='skip': a step with NaN or infinity in a gradient is left out whole: {so_far}{limit}"

    def skipped(self, groups: Groups) -> Skipped:
        """The counts; where they are on a device, this waits for it."""
        if self._counts is not None:
            self._note(groups, self._counts.read())
        return Skipped(self._total, self._row, self._parameter)

    @_disable_dynamo  # what it decides depends on numbers, and it counts
    def look(self, groups: Groups) -> Tensor | bool:
        """Whether a gradient is not finite, and the step is not to be taken; as a tensor that is not 0 on a device.

        Raises: RuntimeError under "raise", and where it is one skip too many in a row. Nothing was written.
        """
        todays, places = gradients(groups)
        together = shards.groups(p for group in groups for p in group["params"])
        if not todays and not together:
            self.restart()
            return False
        # a process without gradients decides where the others do
        alone = torch.device(together[0][1]) if together else torch.device("cpu")
        home = next((g.device for g in todays if not g.is_cpu), todays[0].device if todays else alone)
        bad = unfinite(todays, home)
        if together:
            bad, places = _agreed(bad, places, sum(len(group["params"]) for group in groups), together)
        if self.mode == "skip" and not _on_host(home):
            return self._count_there(groups, bad, places)
        if not bad.any():
            self.passed()
            return False
        self.stop(groups, places[int(bad.to(torch.int8).argmax())])
        return True

    def passed(self) -> None:
        """Note a step that is taken."""
        self._row = 0

    def restart(self) -> None:
        """Begin a new row of skips: nothing was left out, or a state was loaded."""
        self._row = 0
        if self._counts is not None:
            self._counts.restart()

    def stop(self, groups: Groups, place: int) -> None:
        """Note a step that is not, because of the parameter at that place.

        Raises: RuntimeError under "raise", and where it is one too many in a row.
        """
        if self.mode == "raise":
            raise RuntimeError(
                f"the gradient of {parameter(groups, place)} holds NaN or infinity, and nonfinite='raise' stops such "
                "a step before anything is written; nonfinite='skip' leaves it out and goes on"
            )
        self._note(groups, (self._total + 1, self._row + 1, place))
        self._check()

    def _note(self, groups: Groups, counts: tuple[int, int, int]) -> None:
        self._total, self._row, place = counts
        if place >= 0:
            self._parameter = parameter(groups, place)

    def _check(self) -> None:
        if self.limit is not None and self._row >= self.limit:
            raise RuntimeError(
                f"{self._row} steps in a row were skipped, and nonfinite_limit={self.limit} stops there: the "
                f"gradient of {self._parameter} held NaN or infinity at the last; look at the loss, lower lr, or go "
                "back to a checkpoint"
            )

    def _count_there(self, groups: Groups, bad: Tensor, places: Sequence[int]) -> Tensor:
        if self._counts is None:
            if _capturing(bad.device):
                raise RuntimeError(
                    "a CUDA graph is being captured, and nonfinite='skip' has nowhere to count yet: take an "
                    "optimizer step before the capture (warm-up)"
                )
            self._counts = _Counts(bad.device)
        arrived = self._counts.arrived()
        if arrived is not None:
            self._note(groups, arrived)
            self._check()
        return self._counts.count(bad, places, sum(len(group["params"]) for group in groups))


def make_guard(mode: Any, limit: Any) -> Guard | None:
    """The guard that `nonfinite=` asks for; None for "propagate". Raises: ValueError, TypeError."""
    if not isinstance(mode, str) or mode not in NONFINITE:
        raise ValueError(f"Invalid nonfinite: {shown(mode)}; choose one of {', '.join(map(repr, NONFINITE))}")
    works = "nonfinite_limit takes a whole number >= 1 of skips in a row, such as 100, or None for no limit"
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
        raise TypeError(f"Invalid nonfinite_limit: {shown(limit)} is a {type(limit).__name__}; {works}")
    if limit is not None and limit < 1:
        raise ValueError(f"Invalid nonfinite_limit: {shown(limit)}; {works}")
    return None if mode == "propagate" else Guard(mode, limit)


def renew_guard(kept: Guard | None) -> Guard | None:
    """A guard of the same kind that has skipped nothing, for a pickle or a copy."""
    return None if kept is None else Guard(kept.mode, kept.limit)


def _agreed(bad: Tensor, places: Sequence[int], parameters: int, groups: Iterable[Any]) -> tuple[Tensor, list[int]]:
    """Of each parameter whether its gradient is not finite on one of the processes. Processes talk."""
    flags = spread_out(bad, places, parameters).to(torch.uint8)
    for group, kind in groups:
        there = flags.to(kind)
        torch.distributed.all_reduce(there, torch.distributed.ReduceOp.MAX, group=group)
        flags = there.to(flags.device, non_blocking=True)
    return flags != 0, list(range(parameters))


def spread_out(bad: Tensor, places: Sequence[int], parameters: int) -> Tensor:
    """A flag for each parameter, from one for each of those at these places; nothing is sent to a device."""
    flags = [torch.zeros((), dtype=torch.bool, device=bad.device)] * parameters
    for i, flag in zip(places, bad.unbind(), strict=True):
        flags[i] = flag
    return torch.stack(flags)


def unfinite(gradients: Sequence[Tensor], home: torch.device) -> Tensor:
    """Of each gradient whether it holds NaN or infinity. Shapes: [len(gradients)], bool, on the device `home`.

    The largest magnitude is not finite then; no temporary is as large as a gradient.
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
    """The place of the first parameter whose gradient holds NaN or infinity; one of them does."""
    todays, places = gradients(groups)
    return places[int(unfinite(todays, todays[0].device).to(torch.int8).argmax())]


def parameter(groups: Groups, place: int) -> str:
    """A parameter as a sentence calls it, by its place among all of them."""
    for i, group in enumerate(groups):
        if place < len(group["params"]):
            name = parameter_name(group, place, i)
            return name if names(group) else f"parameter {name}"
        place -= len(group["params"])
    return "a parameter"


def _holds(grad: Tensor | None) -> bool:
    """Whether there is a gradient that a step may take, and it holds numbers."""
    if grad is None or grad.is_meta or grad.dtype not in STEPPED:
        return False
    return grad.layout == torch.strided or grad.is_sparse


def gradients(groups: Groups) -> tuple[list[Tensor], list[int]]:
    """Today's gradients as dense tensors (of sparse ones their values), and the places of their parameters."""
    found = [(i, p.grad) for i, p in enumerate(p for group in groups for p in group["params"]) if p.grad is not None]
    held = [(i, shards.shard(g)) for i, g in found]
    held = [(i, g) for i, g in held if _holds(g)]
    return [_numbers(g) for _, g in held], [i for i, _ in held]


def _numbers(grad: Tensor) -> Tensor:
    """What of a gradient a step takes, dense: of a sparse one its values, duplicates summed as the step sums them."""
    return grad.coalesce().values() if grad.is_sparse else grad


class _Counts:
    """Skips in all, skips in a row, and the place of the parameter at fault, on a device."""

    def __init__(self, home: torch.device) -> None:
        self._home = home
        self._there = torch.tensor([0, 0, -1], dtype=torch.int64, device=home)
        self._here = _buffer(home)
        self._sent: Any = None  # the event behind the copy that is on its way

    def count(self, bad: Tensor, places: Sequence[int], parameters: int) -> Tensor:
        """Count a step, in place: a captured graph counts at every replay. Returns: 1 to skip it, else 0, float32.

        Args:
            bad: of each gradient whether it is not finite.
            places: whose gradients they are, among so many parameters.
        """
        bad = bad.to(self._home, non_blocking=True)
        if len(places) < parameters:  # a position is to be a place: none is sent there
            bad = spread_out(bad, places, parameters)
        found = bad.any()
        total, row, place = self._there.unbind()
        total.add_(found)
        row.add_(1).mul_(found)
        place.copy_(torch.where(found, bad.to(torch.int8).argmax(), place))
        self._send()
        return found.to(torch.float32)

    def restart(self) -> None:
        """Begin a new row, in the device's own order. Mutates: the counts."""
        self._there[1:2].zero_()

    def _send(self) -> None:
        """Copy the counts to the host without waiting for them."""
        if self._sent is not None or _capturing(self._home):
            return
        self._here.copy_(self._there, non_blocking=True)
        self._sent = _mark(self._home)

    def arrived(self) -> tuple[int, int, int] | None:
        """The counts of some step before this one, once; None while they are on their way."""
        if self._sent is None or _capturing(self._home) or not self._sent.query():
            return None
        self._sent = None
        return _three(self._here)

    def read(self) -> tuple[int, int, int]:
        """The counts of the last step. Waits for the device."""
        return _three(self._there)


def _three(counts: Tensor) -> tuple[int, int, int]:
    total, row, place = counts.tolist()
    return total, row, place


def _on_host(device: torch.device) -> bool:
    """Whether to read a flag of that device is to wait for nothing."""
    return device.type == "cpu"


def _buffer(device: torch.device) -> Tensor:
    """The host's side of a copy of the counts, for which nobody waits."""
    return torch.empty(3, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")


class _Past:
    """The event behind a copy that was waited for."""

    def query(self) -> bool:
        """Whether the device has come so far."""
        return True


def _mark(device: torch.device) -> Any:
    """The event behind what was asked of a device so far, on its current stream."""
    if device.type != "cuda":
        return _Past()
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
