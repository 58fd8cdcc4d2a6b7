"""Runs a training script unchanged and lints its RMSprop optimizers before and during the run.

The script runs in this process as Python would run it: as `__main__`, with its own arguments, and with its own
directory first on the path. Meanwhile `torch.optim.RMSprop` is this package's class, so its optimizers can be linted.
The script has all its usual effects, so do not check a script that you would not run.
"""

import collections
import functools
import inspect
import os
import re
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
from rmsprop.diagnose.usage import counted
from rmsprop.inspection.leftover import Leftover
from rmsprop.optimizer import RMSprop

WATCHED = 4  # gradients are watched after each earlier step, and after powers of ten, until the next step
KEPT = 8  # the last optimizers to step are kept alive, so that they can be linted at the end
OURS = frozenset(inspect.signature(RMSprop).parameters) - frozenset(inspect.signature(torch.optim.RMSprop).parameters)


class Enough(BaseException):
    """Raised after the last permitted step. It is not an Exception, so that the script's own handlers let it pass."""


@dataclass
class Sighting:
    """A finding, and the numbers of steps after which it was seen; 0 is before the first step.

    Attributes:
        finding: the first one seen, or the first of the worst severity.
        steps: the entries of Watched.linted at which it was seen.
    """

    finding: Finding
    steps: list[int] = field(default_factory=list)


@dataclass
class Watched:
    """One optimizer of the script.

    Attributes:
        made: the place of its construction, as file:line.
        steps: the number of steps it has taken.
        linted: the numbers of steps after which it was linted.
        sightings: the findings, by group, name and first word of the advice.
    """

    made: str
    dialect: str
    explained: str = ""
    steps: int = 0
    linted: list[int] = field(default_factory=list)
    sightings: dict[tuple[int, str, str], Sighting] = field(default_factory=dict)
    leftover: Leftover = field(default_factory=Leftover)
    momenta: list[bool] = field(default_factory=list)  # whether each group had momentum at the last step

    def run_lint(self, optimizer: RMSprop, run: int | None = None) -> None:
        """Lint the optimizer now, and record the findings."""
        self.dialect = ", ".join(dict.fromkeys(str(group["dialect"]) for group in optimizer.param_groups))
        self.explained = optimizer.explain()
        if self.steps not in self.linted:
            self.linted.append(self.steps)
        history = replace(lint.history(optimizer), kept=self.leftover.found)
        for finding in lint.lint(optimizer._plain_groups(), optimizer.state, run, history):
            key = finding.group, finding.name, finding.change.partition(" ")[0]
            sighting = self.sightings.setdefault(key, Sighting(finding))
            if SEVERITIES.index(finding.severity) < SEVERITIES.index(sighting.finding.severity):
                sighting.finding = finding
            if self.steps not in sighting.steps:
                sighting.steps.append(self.steps)

    def found(self) -> list[Sighting]:
        """Return the sightings, worst first."""
        return sorted(self.sightings.values(), key=lambda seen: SEVERITIES.index(seen.finding.severity))

    def advised(self) -> set[str]:
        """Return the names of the arguments that the findings advise to set."""
        return {name for seen in self.sightings.values() for name in re.findall(r"\b(\w+)=", seen.finding.change)}


@dataclass
class ScriptReport:
    """The result of a script's run.

    Attributes:
        exit: the exit code: the script's own, 1 after an exception, 0 if it was stopped.
        ended: a phrase that describes its end.
    """

    script: str
    exit: int = 0
    ended: str = "ran to its end"
    optimizers: list[Watched] = field(default_factory=list)

    def passes(self) -> bool:
        """Return whether an optimizer was linted, and none has an error or a warning."""
        severities = {seen.finding.severity for one in self.optimizers for seen in one.found()}
        return bool(self.optimizers) and not severities & {"error", "warning"}

    def record(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "script": self.script,
            "exit": self.exit,
            "ended": self.ended,
            "optimizers": [
                {
                    "made": one.made,
                    "dialect": one.dialect,
                    "steps": one.steps,
                    "asked": one.linted,
                    "explained": one.explained,
                    "findings": [{**asdict(seen.finding), "steps": seen.steps} for seen in one.found()],
                }
                for one in self.optimizers
            ],
        }

    def __str__(self) -> str:
        lines = [f"rmsprop check: {self.script} {self.ended}"]
        if not self.optimizers:
            lines.append("It created no RMSprop, neither torch.optim's nor this package's.")
        for one in self.optimizers:
            found = one.found()
            lines.append(
                f"{one.made}: RMSprop, dialect {one.dialect}, {counted(one.steps, 'step')}, "
                f"{counted(len(found), 'finding')}"
            )
            for seen in found:
                finding, when = seen.finding, ", ".join(map(str, seen.steps))
                lines.append(f"  {finding.severity} {finding.name}, group {finding.group}, after step {when}")
                lines += [f"    seen: {finding.seen}", f"    change: {finding.change}"]
        names = {name for one in self.optimizers if one.dialect == "torch" for name in one.advised()}
        advised = names & OURS
        if advised:
            lines.append(
                f"torch.optim.RMSprop does not take {', '.join(f'{name}=' for name in sorted(advised))}. "
                "rmsprop's does, and replaces it: from rmsprop import RMSprop."
            )
        return "\n".join(lines)


class StepWatch:
    """Lints every RMSprop constructed while it is on, at powers of ten of its steps and at the end.

    Args:
        limit: the number of steps of all optimizers together after which `Enough` is raised; None for no limit.
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
        """Replace torch.optim.RMSprop and watch every construction and step; restore everything afterward."""
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
        """Lint all held optimizers a last time. `run`: whether the script reached its own end."""
        for optimizer, watched in self._held.values():
            watched.leftover.stop()
            watched.run_lint(optimizer, watched.steps if run else None)

    def _add(self, optimizer: RMSprop) -> None:
        if os.getpid() != self._process:
            return
        with self._lock:
            watched = Watched(_caller(), str(optimizer.defaults["dialect"]))
            self.watched.append(watched)
            self._held[id(optimizer)] = optimizer, watched
            if len(self._held) > KEPT:
                old, about = self._held.popitem(last=False)[1]
                about.run_lint(old)

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        held = self._held.get(id(optimizer))
        if held is None or not self._can_lint():
            return
        momenta = [group["momentum"] != 0 for group in optimizer.param_groups]
        if held[1].steps == 0 or momenta != held[1].momenta:
            held[1].momenta = momenta
            held[1].run_lint(held[0])

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
            if (_power_of_ten(held[1].steps) or last) and self._can_lint():
                held[1].run_lint(held[0])
            if (held[1].steps < WATCHED or _power_of_ten(held[1].steps)) and self._can_lint():
                held[1].leftover.begin(optimizer.param_groups)
        if last:
            raise Enough

    def _can_lint(self) -> bool:
        """Return whether values can be read: not in a forked child, and not while a graph is captured or compiled."""
        if os.getpid() != self._process or torch.compiler.is_compiling():
            return False
        return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def check(script: Path, arguments: Sequence[str] = (), limit: int | None = None) -> ScriptReport:
    """Run a script as `python SCRIPT ARGUMENTS` would, lint its RMSprop, and return the findings.

    Args:
        limit: stop after this many optimizer steps.
    Mutates: whatever the script mutates; sys.argv, sys.path and torch.optim are restored.
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
                report.ended = f"was stopped after {counted(watch.taken, 'step')}, as requested"
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
    """Return the exit code; like Python, print a string to stderr and return 1 for it."""
    if code is None or isinstance(code, int):
        return int(code or 0)
    print(code, file=sys.stderr)
    return 1


def _print_traceback(error: Exception) -> None:
    """Print the traceback as Python does, without the frames that run the script."""
    frames = error.__traceback__
    while frames is not None and _file(frames.tb_frame) in (__file__, runpy.__file__, "<frozen runpy>"):
        frames = frames.tb_next
    traceback.print_exception(type(error), error, frames)


def _file(frame: Any) -> str:
    return str(frame.f_code.co_filename)


def _caller() -> str:
    """Return the nearest line that is neither in torch nor in this package, as file:line."""
    inside = (str(Path(__file__).parent) + os.sep, str(Path(torch.__file__).parent) + os.sep)
    frame = sys._getframe(1)
    while frame.f_back is not None and _file(frame).startswith(inside):
        frame = frame.f_back
    return f"{Path(_file(frame)).name}:{frame.f_lineno}"


def _power_of_ten(count: int) -> bool:
    return count > 0 and set(str(count)[1:]) <= {"0"} and str(count)[0] == "1"
