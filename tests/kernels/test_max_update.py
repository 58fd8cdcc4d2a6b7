"""max_update: no step is longer than it says, and a spike does not freeze an element."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cpu_parity import BOUND, COVERING, EVERY, F32, F64, TYPES, copied, rules, spiked, tensors, worst
from torch import nn

from rmsprop import RMSprop, functional, reference
from rmsprop.kernels import CPU, native
from rmsprop.kernels.eager import EAGER
from rmsprop.spec import Hyper, Rule

compiled = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
BACKENDS = [pytest.param(CPU, marks=compiled), EAGER]
SIZES = (0, 1, 7, 33, 200)

# As BOUND, in units in the last place at the largest term; plain torch in float64: measured 4.0.
EAGER_BOUND = 4.5


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("table", [COVERING, pytest.param(EVERY, marks=pytest.mark.long)], ids=["covering", "every"])
def test_a_capped_step_is_the_references(backend, table):
    """Rules under max_update, with spikes and fresh averages among their elements: every result, everywhere."""
    for i, (rule, hyper) in enumerate(table):
        types = TYPES[i % len(TYPES)]
        hyper = replace(hyper, max_update=1.5)
        bucket = spiked(rule, types, i)
        before = copied(bucket)
        backend.step(rule, hyper, bucket)
        bound = BOUND[types] if backend is CPU else max(EAGER_BOUND, BOUND[types])
        assert worst(rule, hyper, before, bucket) <= bound
        assert all(torch.equal(a, b) for a, b in zip(before.grad, bucket.grad, strict=True))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_the_comparison_sees_a_cap_that_is_left_out(backend):
    """Were max_update ignored, in [2], [7] or [9], the numbers above would say so."""
    rule, hyper = Rule(momentum=True), Hyper(0.03, 0.9, 1e-3, 0.8, max_update=1.5)
    bucket = spiked(rule, (F64, F64), 1)
    before = copied(bucket)
    backend.step(rule, replace(hyper, max_update=None), bucket)
    assert worst(rule, hyper, before, bucket) > 1e6


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(
    "words",
    [
        {},
        dict(momentum=0.9),
        dict(momentum=0.9, nesterov=True),
        dict(momentum=0.9, lr_in_buffer=True),
        dict(centered=True),
        dict(bias_correction=True),
        dict(eps_mode="inside"),
        dict(centered=True, momentum=0.9, dialect="tensorflow1"),
    ],
    ids=str,
)
def test_no_step_is_longer_than_asked(backend, words):
    """Whatever gradients and learning rate are, an element moves by at most max_update·lr; v at most doubles."""
    torch.manual_seed(1)
    weight = nn.Parameter(torch.zeros(400, dtype=F64))
    optimizer = RMSprop([weight], lr=0.1, max_update=2.0, backend=backend, **words)
    for t in range(40):
        lr = optimizer.param_groups[0]["lr"] = 0.1 / (1 + t % 5)
        weight.grad = torch.randn(400, dtype=F64) * 10.0 ** torch.randint(-3, 6, (400,))
        before = weight.detach().clone()
        v = optimizer.state[weight]["square_avg"].clone() if t else torch.zeros(400, dtype=F64)
        optimizer.step()
        assert (weight.detach() - before).abs().max() <= 2.0 * lr * (1 + 1e-12)
        grown = optimizer.state[weight]["square_avg"] > 2 * v * (1 + 1e-12)
        assert not (grown & (v > 0)).any()


def test_a_spike_does_not_freeze():
    """D14: after a gradient of a million the weight goes on, instead of waiting for the average to forget it."""

    def moved(optimizer_of) -> float:
        weight = nn.Parameter(torch.zeros(1))
        optimizer = optimizer_of([weight])
        for t in range(1200):
            weight.grad = torch.full((1,), 1e6 if t == 200 else 1.0)
            optimizer.step()
            if t == 200:
                start = weight.item()
        return abs(weight.item() - start)

    assert moved(lambda p: torch.optim.RMSprop(p, lr=0.01)) < 0.01
    assert moved(lambda p: RMSprop(p, lr=0.01, max_update=3)) > 9


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_propagates(backend, value):
    """An infinite or NaN gradient is no spike: it reaches state and parameter, as without a cap."""
    bucket = tensors(Rule(), (F32, F32), (9,), 1)
    bucket.grad[0][4] = value
    backend.step(Rule(), Hyper(1e-3, 0.9, 1e-8, max_update=2.0), bucket)
    assert not bucket.slots["square_avg"][0][4].isfinite()
    assert bucket.param[0][4].isnan()
    assert bucket.param[0][:4].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_a_gradient_whose_square_overflows_is_a_spike(backend):
    """1e30 is finite, its square in float32 is not: v doubles, and the step is the longest."""
    bucket = tensors(Rule(), (F32, F32), (9,), 1)
    bucket.grad[0][4] = 1e30
    before = copied(bucket)
    backend.step(Rule(), Hyper(1e-3, 0.9, 1e-8, max_update=2.0), bucket)
    assert bucket.slots["square_avg"][0][4] == 2 * before.slots["square_avg"][0][4]
    assert bucket.param[0][4] == before.param[0][4] - torch.tensor(1e-3) * 2


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_a_cap_that_nothing_reaches_changes_nothing(backend):
    """A cap beyond every step, and gradients that double no average: the step is the plain one to rounding."""
    for rule, hyper in rules("outside", True, (1, 1, 0)):
        before = tensors(rule, (F32, F32), SIZES, 4)
        for g, v in zip(before.grad, before.slots["square_avg"], strict=True):
            g.clamp_(-1, 1)
            v.clamp_(min=1)
        bucket = copied(before)
        backend.step(rule, replace(hyper, max_update=1e30), bucket)
        assert worst(rule, hyper, before, bucket) <= BOUND[F32, F32]


def test_schedules_may_move_it():
    """The cap is today's at every step, of planned steps too; None lifts it."""
    weight = nn.Parameter(torch.zeros(3))
    optimizer = RMSprop([weight], lr=1.0, alpha=0.0, eps=0.0, max_update=0.5)
    for cap in (0.5, 0.5, 0.5, 0.25, 0.25, None, 0.125):
        optimizer.param_groups[0]["max_update"] = cap
        before = weight.detach().clone()
        weight.grad = torch.ones(3)
        optimizer.step()
        assert torch.equal(before - weight.detach(), torch.full((3,), 1.0 if cap is None else cap))


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1.0, ValueError), (math.inf, ValueError), ("3", TypeError), (True, TypeError)],
)
def test_other_caps_are_refused(value, error):
    """0, negative, infinite or no number: the sentence says what max_update takes."""
    with pytest.raises(error, match="max_update takes a finite number > 0"):
        RMSprop([nn.Parameter(torch.zeros(2))], max_update=value)


def test_it_is_said_and_saved():
    """The equation shows the bounds, a checkpoint carries the number, and lint reckons with it."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = RMSprop([weight], max_update=3.0, momentum=0.9, centered=True)
    text = optimizer.explain()
    for part in ("min(0.99·v + 0.01·g², 2·v)", "min(max(g/d, −3), 3)", "by at most 3·0.01", "the first step is 3·lr"):
        assert part in text
    assert optimizer.state_dict()["param_groups"][0]["max_update"] == 3.0
    other = RMSprop([weight], max_update=5.0)
    other.load_state_dict(optimizer.state_dict(), hparams="load")
    assert other.param_groups[0]["max_update"] == 3.0


def test_the_functional_form_has_it():
    """functional.rmsprop takes max_update and equals the reference."""
    p, g, v, t = torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64) * 50, torch.ones(4, dtype=F64), torch.tensor(5.0)
    wanted, state = reference.step(
        Rule(), Hyper(0.1, 0.9, 1e-8, max_update=1.2), p.numpy(), g.numpy(), {"step": 5, "square_avg": v.numpy()}
    )
    numbers = dict(lr=0.1, alpha=0.9, eps=1e-8, weight_decay=0.0, momentum=0.0, max_update=1.2)
    functional.rmsprop([p], [g], [v], [], [], [t], centered=False, **numbers)
    assert np.allclose(wanted, p.numpy(), rtol=1e-14, atol=0)
    assert np.allclose(state["square_avg"], v.numpy(), rtol=1e-14, atol=0)


def test_a_differentiable_step_has_a_finite_derivative():
    """Autograd through a capped, centered step from averages that are 0, 1 and spiked gives no NaN."""
    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
    start = torch.ones(3, dtype=F64, requires_grad=True)
    weight = start.clone()
    optimizer = RMSprop([weight], lr=lr, max_update=2.0, centered=True, differentiable=True)
    for scale in (0.0, 1.0, 1e4):
        weight.grad = (weight * torch.tensor([0.0, 1.0, 3.0], dtype=F64) * scale).clone()
        optimizer.step()
    weight.sum().backward()
    assert lr.grad.isfinite()
    assert start.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("lr_in_buffer", [False, True])
def test_a_learning_rate_below_0_has_the_bound_of_its_size(backend, lr_in_buffer):
    """A linear schedule that ran on past its end: the bound is on both sides of 0."""
    rule, hyper = Rule(momentum=True, lr_in_buffer=lr_in_buffer), Hyper(-0.03, 0.9, 1e-3, 0.8, max_update=1.5)
    bucket = spiked(rule, (F64, F64), 1)
    before = copied(bucket)
    backend.step(rule, hyper, bucket)
    assert worst(rule, hyper, before, bucket) <= EAGER_BOUND
    moves = torch.cat([(a - b).flatten() for a, b in zip(before.param, bucket.param, strict=True)])
    assert 0.9 * 0.045 < moves.abs().max() <= 0.045 * (1 + 1e-9)
    assert moves.min() < 0 < moves.max()
