"""The eager backend with state of fewer bytes: the float32 step of every rule, kept in the reference's bits."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from cases import CASES, DECAYS, EAGER_BUDGET, SCHEDULE, TABLE, Case, as64, errors, mostly_long, state64, within
from narrowed import STATES
from runs import Run

from rmsprop import RMSprop, reference
from rmsprop.kernels import eager
from rmsprop.settings import read
from rmsprop.spec import NARROWED
from rmsprop.state.slots import fill
from rmsprop.tensors.bucket import bucket_for, dense, slot_dtype
from rmsprop.tensors.float8 import converted, from_float8, to_float8, widened

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = 11


def rounded(x, words, slot, dtype):
    """What the reference keeps of float32 numbers: codes, or numbers of bfloat16, with the slot's own random bits."""
    own = reference.state_bits(words, slot)
    if dtype == torch.uint8:
        return reference.to_float8(x, own)
    return reference.round_stochastically(x, own, "bfloat16")


class Twins:
    """A run with state of fewer bytes, and one that begins each step from its numbers and keeps float32.

    The second shows what is to be rounded: the same operators compute it, from the same numbers.
    """

    def __init__(self, case, dtype, state_dtype, **options):
        self.run = Run(case, dtype, backend="eager", state_dtype=state_dtype, seed=SEED, **options)
        self.params = [torch.nn.Parameter(p.detach().clone()) for p in self.run.params]
        self.twin = RMSprop(self.params, **{**case.settings(), "backend": "eager", "seed": SEED, **options})
        self.state_dtype = state_dtype
        for p in self.run.params:
            entry = self.run.optimizer.state[p]
            for name in entry.keys() & set(NARROWED):
                entry[name] = converted(entry[name], slot_dtype(name, p.dtype, state_dtype))

    def advance(self, lr):
        """Take one step of both; return the numbers from which the second began: parameters, and their state."""
        for p, q in zip(self.run.params, self.params, strict=True):
            q.data.copy_(p.data)
            p.grad = q.grad = self.run.gradient(p)
            self.twin.state[q] = {
                name: widened(x, torch.float32).clone() if name in NARROWED else x.clone()
                for name, x in self.run.optimizer.state[p].items()
            }
        before = [(as64(q), state64(self.twin.state[q])) for q in self.params]
        for optimizer in (self.run.optimizer, self.twin):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        return before

    def step(self, lr):
        """Take one step of both; return the errors of the float32 step, per slot."""
        before, worst = self.advance(lr), {}
        case = Case(self.run.case.rule, replace(self.run.case.hyper, lr=lr))
        for q, old in zip(self.params, before, strict=True):
            for name, error in errors(case, old, as64(q.grad), (q, self.twin.state[q])).items():
                worst[name] = max(worst.get(name, 0.0), error)
        return worst

    def check(self):
        """Assert that parameters are the float32 step's, and slots its averages in the reference's rounding."""
        for i, (p, q) in enumerate(zip(self.run.params, self.params, strict=True)):
            assert torch.equal(p, q), "the step is computed from the averages before they are rounded"
            kept, exact = self.run.optimizer.state[p], self.twin.state[q]
            words = reference.bits(SEED, i, int(kept["step"]), p.numel())
            order = _order(p)
            for name in kept.keys() & set(NARROWED):
                dtype = slot_dtype(name, p.dtype, self.state_dtype)
                assert kept[name].dtype == dtype
                found = kept[name].numpy().reshape(-1) if dtype == torch.uint8 else as64(kept[name]).reshape(-1)
                wanted = rounded(exact[name].numpy().reshape(-1), words[order], name, dtype)
                assert np.array_equal(found, wanted, equal_nan=dtype != torch.uint8), name


def _order(p):
    """The place in memory of each element, in the order of the indices; of a view with holes, its index."""
    if not dense(p.shape, p.stride()):
        return np.arange(p.numel())
    whole = torch.arange(p.numel())
    return whole.as_strided(p.shape, p.stride()).reshape(-1).numpy() if p.numel() else whole.numpy()


def check_rounding(case, state_dtype, dtype, rates):
    """Assert that each step is within the bounds, and that the state keeps the reference's rounding of it."""
    twins = Twins(case, dtype, state_dtype)
    for lr in rates:
        within(twins.step(lr), EAGER_BUDGET)
        twins.check()


@pytest.mark.parametrize(
    ("case", "state_dtype", "dtype"),
    mostly_long(
        [(case, s, d) for case, (s, d) in product([*CASES, *DECAYS], product(STATES, DTYPES))],
        lambda i, _: i % 13 == 0,
        unpack=True,
    ),
    ids=str,
)
def test_every_rule_keeps_the_references_rounding_of_its_float32_averages(case, state_dtype, dtype):
    """Bit for bit; and the float32 averages lie within the frozen bounds of the reference.

    Codes are compared with the rounding of what the backend computed, not of the reference's float64: within the
    bounds the two may round to neighbors.
    """
    check_rounding(case, state_dtype, dtype, SCHEDULE)


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "state_dtype", "dtype"),
    [(case, STATES[i % 2], DTYPES[i // 2 % 3]) for i, case in enumerate(TABLE)],
    ids=str,
)
def test_every_combination_keeps_the_references_rounding(case, state_dtype, dtype):
    """The same of every combination of switches, each in one precision, for fewer steps."""
    check_rounding(case, state_dtype, dtype, (*SCHEDULE[1:3], 0.0))


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"foreach": False}, {"capturable": True}, {"max_update": 2.0}]
)
@pytest.mark.parametrize("state_dtype", STATES)
def test_each_way_of_running_a_step_keeps_the_same_bits(state_dtype, options):
    """All at once, one by one, with lr on the device, and with a bound on the step."""
    for case in CASES[::17]:
        twins = Twins(case, torch.float32, state_dtype, **options)
        for lr in SCHEDULE[:4]:
            if "max_update" in options:
                twins.advance(lr)  # the reference's cases have no bound
            else:
                within(twins.step(lr), EAGER_BUDGET)
            twins.check()


@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("state_dtype", STATES)
def test_rounding_and_compensation_combine_with_it(state_dtype, dtype, compensation):
    """Half-precision parameters under stochastic rounding have the bits that they have with float32 state."""
    for case in CASES[::19]:
        twins = Twins(case, dtype, state_dtype, rounding="stochastic", compensation=compensation)
        for lr in (0.004, 0.01):
            twins.advance(lr)
            twins.check()
            if compensation:
                for p, q in zip(twins.run.params, twins.params, strict=True):
                    assert torch.equal(
                        twins.run.optimizer.state[p]["compensation"], twins.twin.state[q]["compensation"]
                    )


@pytest.mark.parametrize("state_dtype", STATES)
def test_nan_and_infinity_are_kept_where_they_came(state_dtype):
    """A gradient of NaN or infinity, or one whose square overflows, stands in the state as in float32's."""
    p = torch.nn.Parameter(torch.zeros(6))
    optimizer = RMSprop([p], state_dtype=state_dtype, momentum=0.9, centered=True, backend="eager")
    p.grad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 1.0, 0.0])
    optimizer.step()
    state = {name: widened(x, torch.float32) for name, x in optimizer.state[p].items()}
    assert state["square_avg"].isnan().tolist() == [True, False, False, False, False, False]
    assert state["square_avg"].isinf().tolist() == [False, True, True, True, False, False]
    assert state["grad_avg"].isnan().tolist() == [True, False, False, False, False, False]
    assert state["grad_avg"][1:3].tolist() == [torch.inf, -torch.inf]


def test_an_average_beyond_the_range_of_float8_decays_again():
    """A gradient of 1e6 leaves the largest number, which falls as alpha says, and not an infinity."""
    p = torch.nn.Parameter(torch.zeros(2000))
    optimizer = RMSprop([p], alpha=0.5, state_dtype="float8", backend="eager")
    p.grad = torch.full((2000,), 1e6)
    optimizer.step()
    assert set(optimizer.state[p]["square_avg"].tolist()) == {253}
    p.grad = torch.zeros(2000)
    optimizer.step()
    mean = float(from_float8(optimizer.state[p]["square_avg"]).mean())
    assert abs(mean / (0.5 * 1.25 * 2.0**13) - 1) < 0.01


@pytest.mark.parametrize(("state_dtype", "alpha"), [("bfloat16", 0.999), ("float8", 0.99), ("float8", 0.9)])
def test_the_average_follows_its_gradients_where_nearest_rounding_would_not(state_dtype, alpha):
    """The mean over elements is the exact average, to five standard errors; to nearest it would stay where it is.

    The spread of an element is at most the relative distance of two codes times √(steps): measured 0.17 and 0.004.
    """
    p = torch.nn.Parameter(torch.zeros(4000))
    optimizer = RMSprop([p], lr=0.0, alpha=alpha, state_dtype=state_dtype, square_avg_init=1.0, backend="eager")
    steps = 60
    for _ in range(steps):
        p.grad = torch.full((4000,), 2.0)
        optimizer.step()
    v = widened(optimizer.state[p]["square_avg"], torch.float32).double()
    exact = alpha**steps + (1 - alpha**steps) * 4.0
    assert abs(float(v.mean()) - exact) < 5 * float(v.std()) / 4000**0.5 + 1e-5
    stuck = to_float8 if state_dtype == "float8" else torch.Tensor.bfloat16
    one = torch.ones(1)
    first = alpha * one + (1 - alpha) * 4
    if alpha > 0.95:
        assert torch.equal(widened(stuck(first), torch.float32), one)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("state_dtype", STATES)
def test_a_step_that_is_skipped_on_the_device_writes_nothing(state_dtype, capturable):
    """found_inf that is not read back, as under a captured graph: slots are kept, or written, as a whole."""
    for skip in (True, False):
        p = torch.nn.Parameter(torch.ones(50))
        optimizer = RMSprop([p], momentum=0.9, state_dtype=state_dtype, backend="eager", capturable=capturable)
        p.grad = torch.randn(50)
        optimizer.step()
        (group,) = optimizer.param_groups
        bucket = bucket_for(group, [])
        fill(group, optimizer.state, bucket, 0, [])
        before = {name: x.clone() for name, x in optimizer.state[p].items()}
        bucket.found_inf = torch.tensor(float(skip))
        with torch.no_grad():
            eager._advance_unless(*read(group), bucket)
        same = {name: torch.equal(x, before[name]) for name, x in optimizer.state[p].items()}
        assert all(same.values()) is skip
        assert any(same.values()) is skip
