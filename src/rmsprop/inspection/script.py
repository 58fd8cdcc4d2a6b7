"""A training script, run as it is, with its RMSprop watched: what lint finds before and during the run.

The script runs in this process as Python would run it: as `__main__`, with its own arguments, its own directory first
on the path. `torch.optim.RMSprop` is this package's class while it runs, so its optimizers can be asked. It is code:
it does whatever it does when it runs without being checked, so check no script that you would not run.
"""

import collections
import functools
import os
import runpy
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from rmsprop.diagnose import lint
from rmsprop.diagnose.lint import SEVERITIES, Finding
from rmsprop.inspection.leftover import Leftover
from rmsprop.optimizer import RMSprop

WATCHED = 4  # after each step before it, and after powers of ten, gradients are watched until the next
KEPT = 8  # optimizers are held back from being freed, so that they can be asked at the end; of many, the last


class Enough(BaseException):
    """The script has taken the steps it was given. No Exception, so that a script's own handlers let it pass."""


@dataclass
class Sighting:
    """A finding, and after how many steps it was seen: 0 is before the first.

    Attributes:
        finding: as it was first seen, or worse later.
        steps: when it was seen, among the moments of Watched.asked.
    """

    finding: Finding
    steps: list[int] = field(default_factory=list)


@dataclass
class Watched:
    """One optimizer of the script.

    Attributes:
        made: where it was constructed, as file:line.
        steps: how many it has taken.
        asked: after how many steps it was asked what it finds.
        sightings: what was found, by group and name.
    """

    made: str
    dialect: str
    explained: str = ""
    steps: int = 0
    asked: list[int] = field(default_factory=list)
    sightings: dict[tuple[int, str, str], Sighting] = field(default_factory=dict)
    leftover: Leftover = field(default_factory=Leftover)
    momenta: list[bool] = field(default_factory=list)  # whether each group had momentum at the last step

    def ask(self, optimizer: RMSprop, run: int | None = None) -> None:
        """Lint it now, and note what is found."""
        self.dialect = ", ".join(dict.fromkeys(str(group["dialect"]) for group in optimizer.param_groups))
        self.explained = optimizer.explain()
        if self.steps not in self.asked:
            self.asked.append(self.steps)
        history = replace(lint.history(optimizer), kept=self.leftover.found)
        for finding in lint.lint(optimizer._plain_groups(), optimizer.state, run, history):
            key = finding.group, finding.name, finding.change.partition(" ")[0]
            sighting = self.sightings.setdefault(key, Sighting(finding))
            if SEVERITIES.index(finding.severity) < SEVERITIES.index(sighting.finding.severity):
                sighting.finding = finding
            if self.steps not in sighting.steps:
                sighting.steps.append(self.steps)

    def found(self) -> list[Sighting]:
        """The sightings, the worst first."""
        return sorted(self.sightings.values(), key=lambda seen: SEVERITIES.index(seen.finding.severity))


@dataclass
class ScriptReport:
    """What a script's run gave.

    Attributes:
        exit: what the process exits with: the script's code, 1 for an exception, 0 if it was stopped.
        ended: how it ended, in words.
    """

    script: str
    exit: int = 0
    ended: str = "ran to its end"
    optimizers: list[Watched] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {
            "script": self.script,
            "exit": self.exit,
            "ended": self.ended,
            "optimizers": [
                {
                    "made": one.made,
                    "dialect": one.dialect,
                    "steps": one.steps,
                    "asked": one.asked,
                    "explained": one.explained,
                    "findings": [{**asdict(seen.finding), "steps": seen.steps} for seen in one.found()],
                }
                for one in self.optimizers
            ],
        }

    def __str__(self) -> str:
        lines = [f"rmsprop check: {self.script} {self.ended}"]
        if not self.optimizers:
            lines.append("It made no RMSprop: neither torch.optim's nor this package's.")
        for one in self.optimizers:
            found = one.found()
            lines.append(
                f"{one.made}: RMSprop, dialect {one.dialect}, {one.steps} steps, "
                f"{len(found)} finding{'s' * (len(found) != 1)}"
            )
            for seen in found:
                finding, when = seen.finding, ", ".join(map(str, seen.steps))
                lines.append(f"  {finding.severity} {finding.name}, group {finding.group}, after step {when}")
                lines += [f"    seen: {finding.seen}", f"    change: {finding.change}"]
        return "\n".join(lines)


class StepWatch:
    """Every RMSprop that is made while it is on, asked at powers of ten of its steps, and at the end.

    Args:
        limit: how many steps, of all optimizers together, until `Enough` is raised; None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.taken = 0
        self.watched: list[Watched] = []
        self._held: collections.OrderedDict[int, tuple[RMSprop, Watched]] = collections.OrderedDict()
        self._process = os.getpid()
        self._lock = threading.RLock()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Stand in for torch.optim.RMSprop, and see every construction and step; afterwards all is as it was."""
        torchs, made = torch.optim.RMSprop, RMSprop.__init__
        places: list[Any] = [torch.optim, import_module("torch.optim.rmsprop")]

        @functools.wraps(made)
        def _made(optimizer: RMSprop, *args: Any, **kwargs: Any) -> None:
            made(optimizer, *args, **kwargs)
            self._add(optimizer)

        hooks = [register_optimizer_step_pre_hook(self._before), register_optimizer_step_post_hook(self._after)]
        try:
            for place in places:
                place.RMSprop = RMSprop
            setattr(RMSprop, "__init__", _made)  # noqa: B010
            yield
        finally:
            setattr(RMSprop, "__init__", made)  # noqa: B010
            for place in places:
                place.RMSprop = torchs
            for hook in hooks:
                hook.remove()

    def finish(self, run: bool) -> None:
        """Ask all that are held a last time. `run`: whether the script came to its own end."""
        for optimizer, watched in self._held.values():
            watched.leftover.stop()
            watched.ask(optimizer, watched.steps if run else None)

    def _add(self, optimizer: RMSprop) -> None:
        if os.getpid() != self._process:
            return
        with self._lock:
            watched = Watched(_caller(), str(optimizer.defaults["dialect"]))
            self.watched.append(watched)
            self._held[id(optimizer)] = optimizer, watched
            if len(self._held) > KEPT:
                old, about = self._held.popitem(last=False)[1]
                about.ask(old)

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        held = self._held.get(id(optimizer))
        if held is None or not self._can_ask():
            return
        momenta = [group["momentum"] != 0 for group in optimizer.param_groups]
        if held[1].steps == 0 or momenta != held[1].momenta:
            held[1].momenta = momenta
            held[1].ask(held[0])

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        held = self._held.get(id(optimizer))
        if held is None or os.getpid() != self._process:
            return
        with self._lock:
            held[1].leftover.end()
            self._held.move_to_end(id(optimizer))
            held[1].steps += 1
            self.taken += 1
            last = self.limit is not None and self.taken >= self.limit
            if (_power_of_ten(held[1].steps) or last) and self._can_ask():
                held[1].ask(held[0])
            if (held[1].steps < WATCHED or _power_of_ten(held[1].steps)) and self._can_ask():
                held[1].leftover.begin(optimizer.param_groups)
        if last:
            raise Enough

    def _can_ask(self) -> bool:
        """Not in a forked child, nor while a graph is captured or compiled: reading would wait for the device."""
        if os.getpid() != self._process or torch.compiler.is_compiling():
            return False
        return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def check(script: Path, arguments: Sequence[str] = (), limit: int | None = None) -> ScriptReport:
    """Run a script as `python SCRIPT ARGUMENTS` would, watch its RMSprop, and say what was found.

    Args:
        limit: stop after that many optimizer steps.
    Mutates: whatever the script does; sys.argv, sys.path and torch.optim are put back.
    """
    report, watch = ScriptReport(str(script)), StepWatch(limit)
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        with watch.on():
            try:
                runpy.run_path(str(script), run_name="__main__")
            except Enough:
                report.ended = f"was stopped after {watch.taken} steps, as asked"
            except SystemExit as stop:
                report.exit = _exit_code(stop.code)
                report.ended = f"exited with {report.exit}"
            except KeyboardInterrupt:
                report.exit, report.ended = 130, "was interrupted"
            except Exception as error:
                _print_traceback(error)
                report.exit, report.ended = 1, f"raised {type(error).__name__}"
    finally:
        sys.argv = argv
        sys.path[:] = path
    watch.finish(run=report.ended.startswith(("ran", "exited")))
    report.optimizers = watch.watched
    return report


def _exit_code(code: Any) -> int:
    """What the process would exit with: a text is printed, and counts as 1, as in Python itself."""
    if code is None or isinstance(code, int):
        return int(code or 0)
    print(code, file=sys.stderr)
    return 1


def _print_traceback(error: Exception) -> None:
    """The traceback as Python prints it, without the frames that run the script."""
    frames = error.__traceback__
    while frames is not None and _file(frames.tb_frame) in (__file__, runpy.__file__, "<frozen runpy>"):
        frames = frames.tb_next
    traceback.print_exception(type(error), error, frames)


def _file(frame: Any) -> str:
    return str(frame.f_code.co_filename)


def _caller() -> str:
    """Where the optimizer was made: the nearest line that is neither torch's nor this package's."""
    inside = (str(Path(__file__).parent) + os.sep, str(Path(torch.__file__).parent) + os.sep)
    frame = sys._getframe(1)
    while frame.f_back is not None and _file(frame).startswith(inside):
        frame = frame.f_back
    return f"{Path(_file(frame)).name}:{frame.f_lineno}"


def _power_of_ten(count: int) -> bool:
    return count > 0 and set(str(count)[1:]) <= {"0"} and str(count)[0] == "1"
