"""The judge is judged: by hand, by a lecture, by a book's printed digits and by a counterexample."""

import doctest
import math

import numpy as np
import pytest
from cases import CASES, mostly_long

from rmsprop import reference
from rmsprop.spec import Hyper, Rule

TEXTBOOK = Rule(eps_mode="inside")


def one(rule, hyper, p, g, **state):
    """One step on a single number: the new parameter and state."""
    full = {
        **reference.start(rule, np.array([p])),
        **{k: v if k == "step" else np.array([v]) for k, v in state.items()},
    }
    new_p, new = reference.step(rule, hyper, np.array([p]), np.array([g]), full)
    return float(new_p[0]), new


def test_three_steps_worked_by_hand():
    """The table in the docstring is what the code computes, to the last digit shown and to 1e-15."""
    assert doctest.testmod(reference).failed == 0
    hyper, p = Hyper(lr=1.0, alpha=0.5, eps=1.0), np.array([1.0])
    state = reference.start(TEXTBOOK, p)
    expected = (1 - 2 / math.sqrt(3), 1 - 2 / math.sqrt(3), 1 - 2 / math.sqrt(3) + 4 / math.sqrt(9.5))
    for g, value in zip((2.0, 0.0, -4.0), expected, strict=True):
        p, state = reference.step(TEXTBOOK, hyper, p, np.array([g]), state)
        assert p[0] == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize(
    ("eps_mode", "denominator"),
    [("outside", 2.5), ("inside", math.sqrt(4.5)), ("both", math.sqrt(4.5) + 0.5), ("floor", 2.0)],
)
def test_each_place_of_eps(eps_mode, denominator):
    """[6] from v = 4 and eps = 1/2, and the floor where eps is larger than the root."""
    p, _ = one(Rule(eps_mode=eps_mode), Hyper(lr=1.0, alpha=0.0, eps=0.5), 10.0, 2.0)
    assert p == pytest.approx(10 - 2 / denominator, abs=1e-15)
    if eps_mode == "floor":
        p, _ = one(Rule(eps_mode="floor"), Hyper(lr=1.0, alpha=0.0, eps=8.0), 10.0, 2.0)
        assert p == 10 - 2 / 8


def test_momentum_with_lr_outside_and_inside_the_buffer():
    """[8], [9]: an lr that halves acts on the whole buffer outside, and on new directions only inside."""
    outside, inside = Rule(momentum=True), Rule(momentum=True, lr_in_buffer=True)
    hyper = Hyper(lr=0.5, alpha=0.0, eps=0.0, momentum=0.5)
    p, new = one(outside, hyper, 0.0, 3.0, momentum_buffer=4.0)
    assert (p, new["momentum_buffer"][0]) == (-1.5, 3.0)
    p, new = one(inside, hyper, 0.0, 3.0, momentum_buffer=4.0)
    assert (p, new["momentum_buffer"][0]) == (-2.5, 2.5)


def test_nesterov_looks_one_momentum_step_ahead():
    """[8]: u ← u + μ·b with the new b."""
    hyper = Hyper(lr=0.5, alpha=0.0, eps=0.0, momentum=0.5)
    p, new = one(Rule(momentum=True, nesterov=True), hyper, 0.0, 3.0, momentum_buffer=4.0)
    assert (p, new["momentum_buffer"][0]) == (-0.5 * (1 + 0.5 * 3), 3.0)
    p, new = one(Rule(momentum=True, nesterov=True, lr_in_buffer=True), hyper, 0.0, 3.0, momentum_buffer=4.0)
    assert (p, new["momentum_buffer"][0]) == (-(0.5 + 0.5 * 2.5), 2.5)


def test_weight_decay_in_the_gradient_and_beside_it():
    """[1]: l2 enters the averages; decoupled shrinks p by lr·wd and leaves them alone."""
    hyper = Hyper(lr=0.5, alpha=0.5, eps=0.0, weight_decay=0.25)
    p, new = one(Rule(), hyper, 4.0, 1.0)
    assert new["square_avg"][0] == 0.5 * 2.0**2
    assert p == pytest.approx(4 - 0.5 * 2 / math.sqrt(2), abs=1e-15)
    p, new = one(Rule(weight_decay_mode="decoupled"), hyper, 4.0, 1.0)
    assert new["square_avg"][0] == 0.5
    assert p == pytest.approx(4 * (1 - 0.125) - 0.5 * math.sqrt(2), abs=1e-15)


def test_maximize_negates_the_gradient_before_the_decay():
    """[1]: ascent, while l2 still pulls to 0."""
    hyper = Hyper(lr=0.5, alpha=0.0, eps=0.0, weight_decay=0.25)
    assert one(Rule(maximize=True), hyper, 4.0, -3.0)[0] == 4.0 - 0.5
    assert one(Rule(maximize=True), hyper, -4.0, 3.0)[0] == -4.0 + 0.5


def test_bias_correction_makes_the_first_step_as_long_as_lr():
    """[4]: at t = 1 the corrected average is g², so |step| = lr, against lr/√(1−α) without."""
    hyper = Hyper(lr=0.1, alpha=0.99, eps=0.0)
    assert one(Rule(bias_correction=True), hyper, 0.0, 7.0)[0] == pytest.approx(-0.1, rel=1e-14)
    assert one(Rule(), hyper, 0.0, 7.0)[0] == pytest.approx(-1.0, rel=1e-13)
    _, new = one(Rule(bias_correction=True), hyper, 0.0, 7.0)
    assert new["square_avg"][0] == pytest.approx(0.49), "the state stays uncorrected"


def test_centering_subtracts_the_squared_mean_and_never_goes_below_zero():
    """[3], [5]: the variance, clamped at 0 where v < m²."""
    hyper = Hyper(lr=1.0, alpha=0.5, eps=1.0)
    p, new = one(Rule(centered=True, eps_mode="inside"), hyper, 0.0, 2.0, square_avg=6.0, grad_avg=0.0)
    assert (new["square_avg"][0], new["grad_avg"][0]) == (5.0, 1.0)
    assert p == pytest.approx(-2 / math.sqrt(5.0), abs=1e-15)
    p, _ = one(Rule(centered=True), hyper, 0.0, 2.0, square_avg=0.0, grad_avg=6.0)
    assert p == -2.0


@pytest.mark.parametrize("eps_mode", ["outside", "inside", "both", "floor"])
def test_zero_by_zero_is_a_zero_step_and_nan_and_inf_pass(eps_mode):
    """[7]: 0/0 is 0; a NaN or inf gradient is the user's fact."""
    hyper = Hyper(lr=0.1, alpha=0.9, eps=0.0)
    assert one(Rule(eps_mode=eps_mode), hyper, 3.0, 0.0)[0] == 3.0
    assert math.isnan(one(Rule(eps_mode=eps_mode), hyper, 3.0, math.nan)[0])
    assert math.isnan(one(Rule(eps_mode=eps_mode), hyper, 3.0, math.inf)[0])
    assert math.isnan(one(Rule(eps_mode=eps_mode, centered=True), hyper, 3.0, math.nan, grad_avg=1.0)[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_state_is_exactly_the_slots(case):
    """A step keeps what `slots()` names, and edits nothing that it was given."""
    p, g = np.array([1.0, -2.0]), np.array([0.5, 0.0])
    state = reference.start(case.rule, p)
    assert set(state) == set(case.rule.slots())
    assert state["square_avg"][0] == case.rule.square_avg_init
    _, new = reference.step(case.rule, case.hyper, p, g, state)
    assert set(new) == set(case.rule.slots())
    assert (p == [1.0, -2.0]).all()
    assert (g == [0.5, 0.0]).all()
    assert all(np.all(state[slot] == reference.start(case.rule, p)[slot]) for slot in state)


def walk(rule, hyper, gradients):
    """The parameter after a sequence of gradients, from 0."""
    p = np.zeros(1)
    state = reference.start(rule, p)
    for g in gradients:
        p, state = reference.step(rule, hyper, p, np.array([g]), state)
    return p[0]


def test_lecture_example_the_weight_stays_where_it_is():
    """T1: nine gradients of +.1 and one of −.9 move the weight ≤ 1.5 lr per cycle; sign steps move it 8 lr."""
    cycle = [0.1] * 9 + [-0.9]
    for alpha, per_cycle, when_warm in ((0.9, 0.81, 0.68), (0.99, 0.51, 0.07)):
        hyper = Hyper(lr=1.0, alpha=alpha, eps=0.0)
        begin, end = (walk(TEXTBOOK, hyper, cycle * n) for n in (400, 500))
        assert abs(walk(TEXTBOOK, hyper, cycle * 100)) / 100 == pytest.approx(per_cycle, abs=0.005)
        assert abs(end - begin) / 100 == pytest.approx(when_warm, abs=0.005)
    signs = Hyper(lr=1.0, alpha=0.0, eps=0.0)  # alpha 0 divides each gradient by its own size
    assert walk(TEXTBOOK, signs, cycle * 100) == pytest.approx(-800, abs=1e-9)


def test_d2l_ravine_prints_the_books_digits():
    """T2: f = .1·x₁² + 2·x₂², 20 steps from (−5, −2): −0.010599 and 0.000000 with eps inside, −0.010598 outside."""
    ends = {}
    for eps_mode in ("inside", "outside"):
        rule, hyper = Rule(eps_mode=eps_mode), Hyper(lr=0.4, alpha=0.9, eps=1e-6)
        p = np.array([-5.0, -2.0])
        state = reference.start(rule, p)
        for _ in range(20):
            p, state = reference.step(rule, hyper, p, np.array([0.2, 4.0]) * p, state)
        ends[eps_mode] = [f"{abs(x):.6f}" if abs(x) < 5e-7 else f"{x:.6f}" for x in p]
    assert ends == {"inside": ["-0.010599", "0.000000"], "outside": ["-0.010598", "0.000000"]}


@pytest.mark.parametrize(
    ("alpha", "end"),
    mostly_long(
        [(0.1, 1.0), (0.3, 1.0), (0.5, -0.27), (0.7, -1.0), (0.9, -1.0), (0.99, -1.0)],
        lambda i, _: i in (0, 4),
        unpack=True,
    ),
)
def test_too_small_an_alpha_goes_to_the_worst_point(alpha, end):
    """T6: 3x every third step, else −x, on [−1, 1] (Reddi et al.): alpha ≤ .3 ends at +1, the worst, ≥ .7 at −1."""
    x = np.zeros(1)
    state = reference.start(TEXTBOOK, x)
    for t in range(1, 6001):
        gradient = np.array([3.0 if t % 3 == 1 else -1.0])
        hyper = Hyper(lr=0.1 / math.sqrt(t), alpha=alpha, eps=1e-8)
        x, state = reference.step(TEXTBOOK, hyper, x, gradient, state)
        x = np.clip(x, -1, 1)
    assert x[0] == pytest.approx(end, abs=0.05)
