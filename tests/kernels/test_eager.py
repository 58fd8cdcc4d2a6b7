"""The eager backend against the reference: every rule, dtype, shape and layout, at every step of a schedule."""

from itertools import product

import pytest
import torch
from cases import CASES, DECAYS, DTYPES, EAGER_BUDGET, TABLE, mostly_long, within
from runs import Run

OPTIONS = ({}, {"capturable": True}, {"differentiable": True})
CAPTURED = [case for case in CASES if not case.rule.maximize]
FRESH = [case for case in CASES if not (case.rule.centered and case.rule.bias_correction)]  # its first variance is 0


# each rule in one dtype in `make test`
@pytest.mark.parametrize(
    ("case", "dtype"),
    mostly_long(product(CASES, DTYPES), lambda i, _: i % 4 == i // 4 % 4, unpack=True),
    ids=str,
)
def test_every_rule_is_the_reference_to_the_last_places(case, dtype):
    """Each step of each rule lies within the frozen budget, for every element, while lr changes."""
    for found in Run(case, dtype, backend="eager").steps():
        within(found, EAGER_BUDGET)


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "dtype"), [(case, DTYPES[(i + i // 4) % 4]) for i, case in enumerate(TABLE)], ids=str
)
def test_every_combination_is_the_reference_to_the_last_places(case, dtype):
    """The same of every combination of switches, each in one dtype."""
    test_every_rule_is_the_reference_to_the_last_places(case, dtype)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(
    ("case", "dtype"),
    mostly_long(
        [(case, (torch.float32, torch.bfloat16)[i % 2]) for i, case in enumerate(CASES)],
        lambda i, _: i % 3 == 0,
        unpack=True,
    ),
    ids=str,
)
def test_all_at_once_and_one_by_one_obey_the_same_budget(case, dtype, foreach):
    """foreach=True and foreach=False compute the same rule."""
    for found in Run(case, dtype, backend="eager", foreach=foreach).steps():
        within(found)


@pytest.mark.parametrize("case", CAPTURED, ids=str)
def test_a_tensor_lr_that_stays_on_the_device_obeys_the_same_budget(case):
    """capturable=True with a tensor lr reads nothing back, and computes the same rule."""
    run = Run(case, torch.float64, backend="eager", capturable=True, lr=torch.tensor(0.01, dtype=torch.float64))
    group = run.optimizer.param_groups[0]
    for lr in (0.004, 0.01, 0.05):
        group["lr"].fill_(lr)
        for param in run.params:
            param.grad = run.gradient(param)
        within(run.judged(lr))


@pytest.mark.parametrize("case", mostly_long(CASES, lambda i, _: i % 4 == 0), ids=str)
def test_a_recorded_step_obeys_the_same_budget(case):
    """differentiable=True computes the same rule out of place."""
    run = Run(case, torch.float64, backend="eager", differentiable=True)
    with torch.no_grad():
        for param in run.params:
            param.requires_grad_(False)
        for found in run.steps():
            within(found)


@pytest.mark.parametrize(
    ("case", "options"),
    mostly_long(
        [(case, OPTIONS[(i + i // 6) % 3]) for i, case in enumerate(DECAYS)], lambda i, _: i % 4 == 0, unpack=True
    ),
    ids=str,
)
def test_the_rarer_modes_of_weight_decay_obey_the_same_budget(case, options):
    """ "corrected" and "l1", in every way that a step is taken, with a float and a tensor lr."""
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        run = Run(case, torch.float64, backend="eager", **{**options, "lr": lr})
        with torch.no_grad():
            for param in run.params:
                param.requires_grad_(not options.get("differentiable"))
            for found in run.steps():
                within(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FRESH, ids=str)
def test_a_fresh_start_is_the_references(case, dtype):
    """The first steps from no state: v from square_avg_init, the rest from 0, counted from 1."""
    for found in Run(case, dtype, fresh=True, backend="eager").steps((0.01, 0.02)):
        within(found)
