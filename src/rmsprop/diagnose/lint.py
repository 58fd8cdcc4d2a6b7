"""Findings of what looks wrong about an optimizer, from its settings, gradients and state, and what to change.

Every finding states the numbers behind it. lint changes no parameter, gradient, state or random number. checks.py has
the checks and their thresholds, and readings.py reads the tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rmsprop import settings
from rmsprop.diagnose import usage
from rmsprop.diagnose.checks import CHECKS
from rmsprop.diagnose.facts import Facts, History
from rmsprop.diagnose.readings import take_readings
from rmsprop.spec import Nonfinite

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong.

    Attributes:
        name: the kind of finding, a row of the table in docs/explain.md.
        severity: "error" (the run is or will be broken), "warning" (likely a mistake) or "note" (worth knowing).
        group: the parameter group's index.
        seen: the observation, with its numbers.
        change: what to change.
    """

    name: str
    severity: str
    group: int
    seen: str
    change: str

    def __str__(self) -> str:
        return f"{self.severity} {self.name}, group {self.group}: {self.seen}. {self.change}."


def lint(
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Mapping[str, Any]],
    steps: int | None = None,
    history: History | None = None,
) -> list[Finding]:
    """Return what looks wrong about an RMSprop's groups and state, worst first.

    Args:
        steps: the number of steps in the whole run, if known.
        history: how the optimizer was used so far, if known.
    Returns: the findings; an empty list if nothing looks wrong.
    """
    history = history or History()
    readings = take_readings(groups, state)
    tensors_of_all = [x for tensors in readings for x in tensors]
    oldest = max((x.steps for x in tensors_of_all), default=0)
    unreachable = bool(tensors_of_all) and not any(
        x.requires_grad or x.has_grad or x.has_state for x in tensors_of_all
    )
    begun = history.begun if len(history.begun) == len(groups) else ()
    history = replace(history, begun=begun)
    findings = []
    for i, (group, tensors) in enumerate(zip(groups, readings, strict=True)):
        rule, hyper = settings.read(group)
        detours = usage.detours(history.backend, rule, group, state)
        facts = Facts(group, rule, hyper, tensors, oldest, steps, i, history, unreachable, detours)
        for name, check in CHECKS.items():
            findings += [Finding(name, severity, i, seen, change) for severity, seen, change in check(facts)]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def history(optimizer: Any) -> History:
    """Return what an RMSprop recorded about its use."""
    guard = optimizer._stepper.guard
    nonfinite: Nonfinite = "propagate" if guard is None else guard.mode
    return History(optimizer.backend, nonfinite, optimizer._stepper.idle, tuple(optimizer._initial_momentum))
