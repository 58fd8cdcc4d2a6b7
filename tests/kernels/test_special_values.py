"""Where torch's answer is NaN by construction ours is the limit; a user's NaN stays the user's."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from cases import CASES, DTYPES, Case, as64, mostly_long, within
from runs import Run
from torch import nn

from rmsprop import RMSprop
from rmsprop.kernels import BACKENDS
from rmsprop.spec import EPS_MODES, Hyper, Rule

NAMES = [backend.name for backend in BACKENDS if backend.name != "triton"]


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(
    ("case", "dtype"),
    mostly_long(product(CASES, DTYPES), lambda i, _: i % 4 == i // 4 % 4, unpack=True),
    ids=str,
)
def test_nan_and_inf_gradients_pass_where_the_reference_lets_them(case, dtype, backend):
    """NaN in, NaN out, at the same elements, and nowhere else."""
    run = Run(case, dtype, backend=backend)
    for value in (float("nan"), float("inf"), -float("inf")):
        for param in run.params:
            param.grad = run.gradient(param)
            if param.numel() > 2:
                param.grad.select(0, 1).fill_(value)
        within(run.judged(case.hyper.lr))


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps_mode", EPS_MODES)
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-45, 1e-60])
def test_zero_gradients_are_zero_steps_for_every_eps(eps_mode, eps, dtype, backend):
    """0/0 is 0: no NaN at eps = 0, nor where the dtype cannot hold eps (torch: NaN in float16)."""
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.0]).to(dtype))
    optimizer = RMSprop([p], eps=eps, eps_mode=eps_mode, momentum=0.9, backend=backend)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert p.tolist() == [1.0, -2.0, 0.0]


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_small_gradients_of_half_precision_take_ordinary_steps(dtype, backend):
    """g² of 1e-4 and less underflows in float16; the step is that of float32 (torch: -inf)."""
    p = nn.Parameter(torch.zeros(3, dtype=dtype))
    p.grad = torch.tensor([1e-4, -1e-5, 1e-6]).to(dtype)
    RMSprop([p], lr=0.01, eps=1e-12, backend=backend).step()
    expected = [-0.1, 0.1, -0.1]
    assert p.detach().float().numpy() == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("relative", mostly_long([1e-3, 3e-4, 1e-4], lambda i, _: i == 0))
def test_a_variance_that_rounds_below_zero_is_zero(relative, backend):
    """Centered, with gradients that hardly vary: finite for 2000 steps (torch: NaN from step 1359)."""
    p = nn.Parameter(torch.zeros(2000))
    optimizer = RMSprop([p], lr=1e-3, centered=True, eps=1e-3, backend=backend)
    for _ in range(2000):
        p.grad = 1 + relative * torch.randn(2000)
        optimizer.step()
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("backend", NAMES)
def test_a_clamped_variance_is_the_references(backend):
    """[5] at v < m²: the denominator is eps, exactly."""
    case = Case(Rule(centered=True), Hyper(lr=0.01, alpha=0.9, eps=0.5))
    run = Run(case, torch.float64, backend=backend)
    for param in run.params:
        state = run.optimizer.state[param]
        state["grad_avg"].fill_(9.0)
        state["square_avg"].fill_(1.0)
        param.grad = torch.full_like(param, 2.0)
    found = run.judged(0.01)
    assert found["param"] <= 2.5


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(s, torch.float64) for s in (1e-100, 1e-30, 1e3, 1e100)]
    + [(s, torch.float32) for s in (1e-16, 1e-3, 1e3, 1e15)],
    ids=str,
)
def test_extreme_gradients_are_the_references_while_squares_fit(scale, dtype, backend):
    """Gradients of any size whose squares are normal numbers in the dtype."""
    for case in CASES[::5]:
        if case.rule.centered:
            continue
        case = Case(case.rule, replace(case.hyper, eps=scale * 1e-3, weight_decay=0.0))
        run = Run(case, dtype, backend=backend)
        for param in run.params:
            run.optimizer.state[param]["square_avg"].mul_(scale * scale)
            param.grad = run.gradient(param) * scale
        within(run.judged(0.01))


def test_inf_stays_in_its_element():
    """One bad element does not spread to its neighbours."""
    p = nn.Parameter(torch.ones(100))
    p.grad = torch.ones(100)
    p.grad[17] = float("nan")
    RMSprop([p], momentum=0.9, centered=True).step()
    bad = np.isnan(as64(p))
    assert bad[17]
    assert bad.sum() == 1
