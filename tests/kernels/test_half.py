"""Half precision that learns: stochastic rounding and remainders, the same bits on every backend, and resumed."""

import copy
import functools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from cpu_parity import BF16, COVERING, F16, F32, copied, tensors
from halves import KINDS, SEED, check_written, compiled, rounded_as, twin
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import DOCS
from torch import Tensor, nn

from rmsprop import RMSprop, checkpoint, reference
from rmsprop.kernels import CPU, native, rounding
from rmsprop.kernels.eager import EAGER
from rmsprop.spec import Hyper, Rule, random_key

SIZES = (0, 1, 7, 33, 1000)


@compiled
@pytest.mark.parametrize(("stochastic", "compensated"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_compiled_kernel_rounds_every_rules_step_as_the_reference(dtype, stochastic, compensated):
    """Every rule's float32 result becomes half precision with the reference's bits, in vectors and in tails."""
    generator = torch.Generator().manual_seed(1)
    for rule, hyper in COVERING:
        bucket = tensors(rule, (dtype, F32), SIZES, 3)
        bucket = rounded_as(bucket, stochastic=stochastic, compensated=compensated, generator=generator)
        before, wide = copied(bucket), twin(bucket)
        CPU.step(rule, hyper, wide)
        CPU.step(rule, hyper, bucket)
        check_written(bucket, wide, before)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_plain_torch_rounds_with_the_references_bits(dtype):
    """kernels/rounding.py, on which eager and torch.compile rest, has the reference's words and its rounding."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5000, generator=generator) * torch.logspace(-12, 6, 5000)
    x[:6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45])
    words = rounding.random_bits(random_key(SEED, 4), torch.tensor(17.0), x.shape, x.device)
    wanted = reference.bits(SEED, 4, 17, 5000)
    assert np.array_equal(wanted, words.numpy())
    rounded = reference.round_stochastically(x.numpy(), wanted, KINDS[dtype])
    got = rounding.stochastically(x, words, dtype).double().numpy()
    assert np.array_equal(rounded, got, equal_nan=True)
    real = ~np.isnan(rounded)
    assert np.array_equal(np.signbit(rounded)[real], np.signbit(got)[real])


@compiled
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_backends_draw_the_same_bits(dtype):
    """Where float32 arithmetic is exact, plain torch and the compiled kernel end in the same bits, remainders too."""
    rule, hyper = Rule(), Hyper(lr=2.0**-13, alpha=0.0, eps=0.0)  # u is ±1
    for compensated in (False, True):
        bucket = tensors(rule, (dtype, F32), SIZES, 7)
        bucket = rounded_as(
            bucket, stochastic=True, compensated=compensated, generator=torch.Generator().manual_seed(3)
        )
        for p, g in zip(bucket.param, bucket.grad, strict=True):
            p.clamp_(-1, 1)
            g.copy_(torch.where(g >= 0, 0.5, -0.5))
        for c in bucket.slots["compensation"]:
            c.mul_(0)
        one, other = bucket, copied(bucket)
        other.rounding, other.random_keys = bucket.rounding, bucket.random_keys
        for _ in range(3):
            CPU.step(rule, hyper, one)
            EAGER.step(rule, hyper, other)
        for a, b in zip(one.lists(), other.lists(), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@compiled
@pytest.mark.parametrize("compensated", [False, True], ids=["", "compensated"])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, compensated):
    """Bits belong to elements, not to threads: one, two and three of them write the same parameter."""
    generator = torch.Generator().manual_seed(4)
    bucket = tensors(Rule(), (dtype, F32), (200_003,), 9)
    bucket = rounded_as(bucket, stochastic=True, compensated=compensated, generator=generator)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            own = copied(bucket)
            own.rounding, own.random_keys = bucket.rounding, bucket.random_keys
            CPU.step(Rule(), Hyper(1e-3, 0.9, 1e-8), own)
            found.append(own)
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(found[0].param[0], other.param[0])


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def check_neighbor(x, word, dtype):
    """Assert that a number becomes one of its two neighbors in the narrow dtype, and itself where it is one."""
    got = float(reference.round_stochastically(np.float32([x]), np.uint32([word]), KINDS[dtype])[0])
    near = torch.tensor(x, dtype=torch.float32).to(dtype)
    if float(near) == x:
        assert got == x
        return
    step = torch.nextafter(near, torch.tensor(torch.inf if x > float(near) else -torch.inf).to(dtype))
    assert got in (float(near), float(step))


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.long)])
def test_the_reference_rounds_to_a_neighbour(count):
    """Any number, by any random bits."""
    search = given(floats, st.integers(0, 2**32 - 1), st.sampled_from([BF16, F16]))
    settings(max_examples=count, deadline=None)(search(check_neighbor))()


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("x", [1.0003, -3.14159, 1e-5, 3e-8, -6.1e-5])
def test_rounding_is_unbiased(dtype, x):
    """The mean over many words is the number itself, within four standard deviations."""
    count = 1 << 18
    rounded = reference.round_stochastically(
        np.full(count, x, np.float32), reference.bits(0, 0, 1, count), KINDS[dtype]
    )
    spread = np.ptp(rounded)
    assert abs(rounded.mean() - np.float32(x)) <= 4 * 0.5 * spread / np.sqrt(count)


def test_words_are_spread():
    """Every bit is 1 half of the time; neighbours, steps, places and seeds have nothing to do with each other."""
    count = 1 << 16
    words = [reference.bits(*key, count) for key in ((0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 1))]
    for k in range(32):
        assert abs((words[0] >> np.uint32(k) & 1).mean() - 0.5) < 4 * 0.5 / np.sqrt(count)
    pairs = [(words[0][:-1], words[0][1:]), *((words[0], other) for other in words[1:])]
    for a, b in pairs:
        assert abs(np.corrcoef(a.astype(float), b.astype(float))[0, 1]) < 4 / np.sqrt(count)


BACKENDS = [pytest.param("cpu", marks=compiled), "eager"]


@functools.cache
def _learned_by_torch(dtype: torch.dtype) -> float:
    return _learned(lambda p: torch.optim.RMSprop(p, lr=1e-4), dtype)


def _learned(optimizer_of, dtype: torch.dtype) -> float:
    weight = nn.Parameter(torch.ones(2048, dtype=dtype))
    optimizer = optimizer_of([weight])
    for _ in range(1000):
        weight.grad = torch.full_like(weight, 0.5)
        optimizer.step()
    return float(weight.detach().double().mean())


@pytest.mark.parametrize(
    ("words", "backend"),
    [
        pytest.param({"rounding": "stochastic"}, "cpu", marks=compiled),
        pytest.param({"rounding": "stochastic"}, "eager", marks=pytest.mark.long),
        pytest.param({"compensation": True}, "cpu", marks=[compiled, pytest.mark.long]),
        ({"compensation": True}, "eager"),
    ],
    ids=str,
)
def test_bfloat16_learns_as_float32_does(backend, words):
    """A thousand steps below half a unit: torch's bfloat16 stays at 1, ours ends within 1 % of float32 (T14)."""
    exact, stuck = map(_learned_by_torch, (torch.float32, BF16))
    ours = _learned(lambda p: RMSprop(p, lr=1e-4, backend=backend, **words), BF16)
    assert stuck == 1.0
    assert abs(1 - exact) > 0.1
    assert ours == pytest.approx(exact, rel=0.01)
    assert (1 - ours) == pytest.approx(1 - exact, rel=0.02)


def model(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((9, 7), (11,))]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], begin: int, end: int) -> None:
    for t in range(begin, end):
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + t)
        optimizer.step()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compensation", [False, True], ids=["", "compensated"])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_a_resumed_run_is_the_run(tmp_path, backend, compensation, dtype):
    """Seed, count and remainders are in the state dict and the checkpoint: the run's rest is the same bitwise."""
    words = dict(rounding="stochastic", compensation=compensation, seed=3, momentum=0.9, backend=backend)
    whole = model(dtype)
    straight = RMSprop(whole, **words)
    train(straight, whole, 0, 4)
    kept = [p.detach().clone() for p in whole]
    state = copy.deepcopy(straight.state_dict())
    checkpoint.save(tmp_path / "run", optimizer=straight)
    train(straight, whole, 4, 9)
    for load in (lambda o: o.load_state_dict(state), lambda o: checkpoint.load(tmp_path / "run", optimizer=o)):
        resumed = [nn.Parameter(p.clone()) for p in kept]
        optimizer = RMSprop(
            resumed, backend=backend, rounding="stochastic", compensation=compensation, seed=3, momentum=0.9
        )
        load(optimizer)
        train(optimizer, resumed, 4, 9)
        assert same(whole, resumed)
    assert ("compensation" in straight.state[whole[0]]) is compensation


def test_runs_repeat_and_seeds_differ():
    """The same seed is the same run; another seed, or another place in the optimizer, rounds otherwise."""

    def run(seed: int, params: list[nn.Parameter]) -> list[nn.Parameter]:
        train(RMSprop(params, rounding="stochastic", seed=seed), params, 0, 5)
        return params

    assert same(run(1, model(BF16)), run(1, model(BF16)))
    assert not same(run(1, model(BF16)), run(2, model(BF16)))
    twins = [nn.Parameter(torch.full((64,), 1.0, dtype=BF16)) for _ in range(2)]
    optimizer = RMSprop(twins, lr=1e-3, rounding="stochastic")
    for p in twins:
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    assert not torch.equal(*twins)


def test_a_groups_parameters_keep_their_places_whoever_has_a_gradient():
    """A parameter's bits follow from its place among all parameters, with or without gradients before it."""
    both, one = model(BF16), model(BF16)
    optimizers = [RMSprop(params, rounding="stochastic") for params in (both, one)]
    for p in both:
        p.grad = torch.ones_like(p)
    one[1].grad = torch.ones_like(one[1])
    for optimizer in optimizers:
        optimizer.step()
        optimizer.step()
    assert torch.equal(both[1], one[1])
    groups = model(BF16)
    apart = RMSprop([{"params": groups[:1]}, {"params": groups[1:], "seed": 0}], rounding="stochastic")
    for p in groups:
        p.grad = torch.ones_like(p)
    apart.step()
    apart.step()
    assert same(both, groups)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wider_parameters_of_a_group_are_not_rounded(backend):
    """Beside bfloat16 weights a float32 norm steps as it would alone, and has no remainder."""
    half, norm = model(BF16)[0], model(F32)[1]
    alone = nn.Parameter(norm.detach().clone())
    mixed = RMSprop(
        [half, norm], rounding="stochastic", compensation=True, backend="auto" if backend == "cpu" else backend
    )
    plain = RMSprop([alone], backend=backend)
    for p in (half, norm, alone):
        p.grad = torch.ones_like(p)
    for _ in range(3):
        mixed.step()
        plain.step()
    assert torch.equal(norm, alone)
    assert "compensation" not in mixed.state[norm]
    assert mixed.state[half]["compensation"].dtype == BF16


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (dict(rounding="stochastic"), "rounding='stochastic' applies to half-precision parameters only"),
        (dict(compensation=True), "compensation=True applies to half-precision parameters only"),
        (dict(rounding="up"), "Invalid rounding: 'up'; choose one of 'nearest', 'stochastic'"),
        (dict(compensation="yes"), "Invalid compensation: 'yes'"),
        (dict(seed=-1), "Invalid seed: -1"),
        (dict(seed=2**63), "Invalid seed"),
        (dict(seed=0.5), "Invalid seed: 0.5 is a float"),
        (dict(seed=True), "Invalid seed: True is a bool"),
        (dict(rounding="stochastic", differentiable=True), "have no derivative"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused(words, sentence):
    """No parameter of half precision, an unknown word, or autograd: one sentence, at construction."""
    with pytest.raises((ValueError, TypeError), match=sentence.replace("(", r"\(")):
        RMSprop(model(F32), **words)


def test_a_remainder_is_not_forgotten_in_silence():
    """compensation switched off in mid-run is refused: the remainder is a part of the parameter's value."""
    params = model(BF16)
    optimizer = RMSprop(params, compensation=True)
    train(optimizer, params, 0, 2)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["compensation"] = False
    with pytest.raises(RuntimeError, match="compensation is False in the group of parameter 0"):
        train(optimizer, params, 2, 3)
    assert same(before, params)


def test_remainders_of_another_dtype_begin_afresh():
    """A bfloat16 run goes on in float16: averages are taken over, remainders in other units are not."""
    params = model(BF16)
    optimizer = RMSprop(params, compensation=True)
    train(optimizer, params, 0, 2)
    others = [nn.Parameter(p.detach().to(F16)) for p in params]
    other = RMSprop(others, compensation=True)
    with pytest.warns(UserWarning, match=r"Kahan remainder \(compensation\) of 2 parameters"):
        other.load_state_dict(optimizer.state_dict())
    assert "compensation" not in other.state[others[0]]
    train(other, others, 2, 3)
    assert other.state[others[0]]["compensation"].dtype == F16


def test_sparse_rows_keep_their_remainders():
    """Lazy rows of a bfloat16 embedding carry remainders of their own, and others stay."""
    weight = nn.Parameter(torch.ones(10, 4, dtype=BF16))
    optimizer = RMSprop([weight], lr=1e-3, sparse="lazy", compensation=True)
    for _ in range(3):
        weight.grad = torch.sparse_coo_tensor([[2, 7]], torch.ones(2, 4, dtype=BF16), (10, 4), check_invariants=True)
        optimizer.step()
    kept = optimizer.state[weight]["compensation"]
    assert kept[[2, 7]].ne(0).any()
    assert kept[[0, 1, 3, 4, 5, 6, 8, 9]].eq(0).all()


@pytest.mark.long
def test_a_compiled_step_rounds_alike():
    """Inside torch.compile the parameter gets the same bits as outside, where float32 arithmetic is exact."""
    torch._dynamo.reset()
    runs = []
    for compile_it in (False, True):
        weight = nn.Parameter(torch.full((65,), 1.0, dtype=BF16))
        optimizer = RMSprop(
            [weight], lr=2.0**-11, alpha=0.0, eps=0.0, rounding="stochastic", compensation=True, backend="eager"
        )
        step = torch.compile(optimizer.step, backend="eager") if compile_it else optimizer.step
        for _ in range(3):
            weight.grad = torch.full_like(weight, 0.5)
            step()
        runs.append((weight.detach(), optimizer.state[weight]["compensation"]))
    assert same(list(runs[0]), list(runs[1]))


def test_the_words_say_what_rounding_does():
    """explain() and repr() name the rounding and count the remainder's bytes."""
    optimizer = RMSprop(model(BF16), rounding="stochastic", compensation=True, seed=9)
    text = optimizer.explain()
    assert "`compensation` keeps what rounding drops in [9]" in text
    assert "rounded stochastically (seed 9)" in text
    assert "state (square_avg, compensation): 6 bytes per element" in text
    assert "rounding='stochastic'" in repr(optimizer)


def test_remainders_beside_infinity_are_zero():
    """A parameter that overflows is infinite, and its remainder 0, not NaN."""
    for backend in ("auto", "eager"):
        weight = nn.Parameter(torch.tensor([60000.0, 1.0], dtype=F16))
        optimizer = RMSprop([weight], lr=1e4, compensation=True, backend=backend)
        weight.grad = torch.tensor([-1.0, 0.0], dtype=F16)
        optimizer.step()
        assert weight[0] == torch.inf
        assert torch.equal(optimizer.state[weight]["compensation"], torch.zeros(2, dtype=F16))


def test_state_of_float64_is_stepped_by_plain_torch():
    """The compiled kernel refuses to round beside float64 state, in words; eager does it."""
    if native.missing():
        pytest.skip(str(native.missing()))
    bucket = tensors(Rule(), (BF16, torch.float64), (5,), 1)
    bucket = rounded_as(bucket, stochastic=True, compensated=False, generator=torch.Generator())
    assert "the state is torch.float64, for which it only rounds to nearest" in str(CPU.refuse(Rule(), bucket))
    EAGER.step(Rule(), replace(Hyper(1e-3, 0.9, 1e-8)), bucket)


def test_the_page_of_robust_runs(capsys):
    """docs/robust.md: its Python prints what stands beside it."""
    page = (DOCS / "robust.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    space = {}
    for block in blocks:
        exec(compile(block, "robust.md", "exec"), space)
        shown = re.findall(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE)
        assert shown == capsys.readouterr().out.splitlines()
    assert len(blocks) == 4
