"""The comparison of trainers' steps accepts correct ones, and catches each setting that did not arrive."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case
from judge import judging

from rmsprop import RMSprop
from rmsprop.spec import Hyper, Rule

GIVEN = Case(Rule(momentum=True), Hyper(1e-3, alpha=0.9, eps=1e-6, momentum=0.5, weight_decay=1e-3))


def _run(expected: Case) -> None:
    net = torch.nn.Linear(20, 10)
    optimizer = RMSprop(net.parameters(), 1e-3, 0.9, 1e-6, 1e-3, 0.5)
    with judging(lambda *_: expected):
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(8, 20)).square().mean().backward()
            optimizer.step()


def test_the_right_settings_pass() -> None:
    """Three steps under the given settings equal the reference's."""
    _run(GIVEN)


@pytest.mark.parametrize(
    "wrong", [{"lr": 1.001e-3}, {"alpha": 0.901}, {"eps": 2e-6}, {"momentum": 0.501}, {"weight_decay": 0.0}], ids=str
)
def test_a_number_that_did_not_arrive_is_caught(wrong: dict[str, float]) -> None:
    """A change of lr, alpha, or momentum by a thousandth, a doubled ε, and a lost weight decay each fail the run."""
    with pytest.raises(AssertionError, match="units in the last place"):
        _run(Case(GIVEN.rule, replace(GIVEN.hyper, **wrong)))


@pytest.mark.parametrize("wrong", [{"eps_mode": "inside"}, {"square_avg_init": 1.0}, {"lr_in_buffer": True}], ids=str)
def test_a_rule_that_did_not_arrive_is_caught(wrong: dict[str, Any]) -> None:
    """Another place of ε, another initial v, and lr in the buffer each fail the run."""
    with pytest.raises(AssertionError, match="units in the last place"):
        _run(Case(replace(GIVEN.rule, **wrong), GIVEN.hyper))


def test_a_run_without_a_step_is_caught() -> None:
    """A trainer that steps another optimizer fails the run."""
    net = torch.nn.Linear(2, 1)
    net(torch.ones(1, 2)).sum().backward()
    with pytest.raises(AssertionError, match="nothing stepped"), judging(lambda *_: GIVEN):
        torch.optim.RMSprop(net.parameters()).step()
