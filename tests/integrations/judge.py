"""Comparison of every step of a trainer with the float64 reference, under the settings that must arrive."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import BUDGET, Case, as64, errors, state64, within
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from rmsprop import RMSprop, reference

# A trainer's network has a hundred times the elements of the table of cases, so its largest error is larger: 3.61 for
# momentum_buffer, against 2.96 in the table. A setting that did not arrive gives errors of thousands.
LIMITS = {name: 2 * limit for name, limit in BUDGET.items()}

EXAMPLES = Path(__file__).parents[2] / "examples"


def needs(*modules: str, how: str = "`make integrations` installs what trainers need") -> pytest.MarkDecorator:
    """Return a mark that skips a test if one of the modules is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}: {how}")


def example(name: str) -> ModuleType:
    """Import an example anew as a module; importing it must not run it."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pickle finds its classes here
    spec.loader.exec_module(module)
    return module


@dataclass
class Judge:
    """The record of the compared steps.

    Attributes:
        expected: step, from 1, and group index -> the rule and the hyperparameters that must be in force.
        steps: the number of compared steps.
        worst: the largest error of each slot, in units in the last place.
        norms: the global norm of the gradients of each step.
    """

    expected: Callable[[int, int], Case]
    steps: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    before: dict[Any, Any] = field(default_factory=dict)

    def open(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        """Copy parameters and state before a step."""
        if not isinstance(optimizer, RMSprop):
            return
        self.steps += 1
        for i, group in enumerate(optimizer.param_groups):
            rule = self.expected(self.steps, i).rule
            for p in group["params"]:
                held = optimizer.state.get(p)
                self.before[p] = as64(p), state64(held) if held else reference.start(rule, as64(p))

    def close(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        """Compare a step with the reference. A closure's gradients exist only now, and no step edits them."""
        if not isinstance(optimizer, RMSprop):
            return
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])).item())
        for i, group in enumerate(optimizer.param_groups):
            case = self.expected(self.steps, i)
            for p in group["params"]:
                if p.grad is None:
                    continue
                found = errors(case, self.before[p], as64(p.grad), (p, optimizer.state[p]))
                self.worst = {name: max(self.worst.get(name, 0.0), error) for name, error in found.items()}


@contextmanager
def judging(expected: Callable[[int, int], Case]) -> Iterator[Judge]:
    """Compare the steps of every RMSprop inside the block with the reference.

    Raises: AssertionError at the end if there was none, or one was further off than its budget.
    """
    judge = Judge(expected)
    handles = register_optimizer_step_pre_hook(judge.open), register_optimizer_step_post_hook(judge.close)
    try:
        yield judge
    finally:
        for handle in handles:
            handle.remove()
    assert judge.steps, "nothing stepped"
    within(judge.worst, LIMITS)
