"""What looks wrong about an optimizer, and what to change: findings from its settings, gradients and state.

Every finding states the numbers it rests on. Nothing is changed by looking: no parameter, no gradient, no state, no
random number. The checks and their thresholds: checks.py; how tensors are read: survey.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rmsprop import settings
from rmsprop.checks import CHECKS
from rmsprop.survey import Facts, survey

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong.

    Attributes:
        name: what kind of finding, a word to search for in docs/explain.md.
        severity: "error" (the run is or will be broken), "warning" (likely a mistake) or "note" (know it).
        group: the parameter group's index.
        seen: what was seen, with its numbers.
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
    groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]], steps: int | None = None
) -> list[Finding]:
    """What looks wrong about an RMSprop's groups and state, the worst first.

    Args:
        steps: how many steps the whole run has, if known.
    Returns: findings; an empty list where nothing looks wrong.
    """
    readings = survey(groups, state)
    oldest = max((x.steps for tensors in readings for x in tensors), default=0)
    findings = []
    for i, (group, tensors) in enumerate(zip(groups, readings, strict=True)):
        facts = Facts(group, *settings.read(group), tensors, oldest, steps)
        for name, check in CHECKS.items():
            findings += [Finding(name, severity, i, seen, change) for severity, seen, change in check(facts)]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
