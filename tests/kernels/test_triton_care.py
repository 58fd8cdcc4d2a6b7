"""Random bits, remainders and bounded steps in the Triton kernel, on CPU tensors under Triton's interpreter."""

from dataclasses import replace
from itertools import product
from types import ModuleType

import pytest
import torch
from cases import bucket_of, mostly_long
from cpu_parity import BF16, BOUND, COVERING, EVERY, F16, F32, TYPES, copied, tensors, worst
from halves import KINDS, SCALE, SEED, check_written, rounded_as, twin
from interpreted import BLOCK, interpreted_fixtures, interpreter, kernel_module, mistake_tests
from narrowed import again, identical
from torch import Tensor, nn

from rmsprop import RMSprop, kernels, reference
from rmsprop.kernels import cpu, native, triton
from rmsprop.kernels.triton_plan import DevicePlan
from rmsprop.spec import Hyper, Rule, random_key
from rmsprop.step import Stepper
from rmsprop.tensors.bucket import Bucket

SIZES = (0, 9, BLOCK + 3)
HALVES = tuple(types for types in TYPES if types[0] in KINDS)
HOWS = {"stochastic": (True, False), "compensated": (False, True), "both": (True, True)}
FULL = Rule(centered=True, momentum=True, nesterov=True, bias_correction=True)
FULL_HYPER = Hyper(0.03, 0.9, 1e-3, 0.8, 0.05, max_update=1.5)
NEEDS_NATIVE = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
HOW = pytest.mark.parametrize("how", HOWS)
NVIDIAS = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(F32)  # the NaN that its GPUs compute
DTYPE = pytest.mark.parametrize("dtype", KINDS, ids=KINDS.get)
HALF = pytest.mark.parametrize("types", HALVES, ids=lambda t: f"{t[0]}-{t[1]}".replace("torch.", ""))


module, _in_place = interpreted_fixtures()


def careful(rule: Rule, types: tuple, how: str, sizes: tuple[int, ...] = SIZES, seed: int = 3) -> Bucket:
    """A bucket to be rounded like that, with spikes among its gradients and averages that have not begun."""
    stochastic, compensated = HOWS.get(how, (False, False))
    bucket = tensors(rule, types, sizes, seed)
    for g, v in zip(bucket.grad, bucket.slots["square_avg"], strict=True):
        g[::3] *= 40
        v[::7] = 0
    for m in bucket.slots["grad_avg"]:
        m[::7] = 0
    draw = torch.Generator().manual_seed(seed)
    return rounded_as(bucket, stochastic=stochastic, compensated=compensated, generator=draw)


def check_rounded(rule: Rule, hyper: Hyper, types: tuple, how: str) -> None:
    """Assert that the kernel's own float32 step in half precision is the reference's rounding, every bit."""
    bucket = careful(rule, types, how)
    before, wide = copied(bucket), twin(bucket)
    assert kernels.BACKENDS[0].refuse(rule, bucket) is None
    triton.step(rule, hyper, wide)
    triton.step(rule, hyper, bucket)
    check_written(bucket, wide, before)


@pytest.mark.parametrize(
    ("types", "how"), mostly_long(product(HALVES, HOWS), lambda i, _: i % 4 == 0, unpack=True), ids=str
)
def test_a_step_is_rounded_with_the_references_bits(types: tuple, how: str) -> None:
    """Rules dealt out over dtypes and ways to round."""
    begin = 3 * HALVES.index(types) + list(HOWS).index(how)
    for i, (rule, hyper) in enumerate(COVERING[begin % 9 :: 9]):
        check_rounded(rule, replace(hyper, max_update=1.5 if i % 2 else None), types, how)


@pytest.mark.parametrize("k", mostly_long(range(len(TYPES)), lambda i, _: i % 3 == 0), ids=map(str, TYPES))
def test_a_bounded_step_is_the_references(k: int) -> None:
    """max_update with spikes and fresh averages, rules dealt out over the dtypes: within the frozen bound."""
    for rule, hyper in COVERING[k % 5 :: 5]:
        bucket = careful(rule, TYPES[k], "nearest")
        before = copied(bucket)
        triton.step(rule, replace(hyper, max_update=1.5), bucket)
        assert worst(rule, replace(hyper, max_update=1.5), before, bucket) <= BOUND[TYPES[k]], rule


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("types", "how"),
    mostly_long(
        [((F32, F32), "nearest"), *product([(BF16, F32), (F16, F16)], ["nearest", *HOWS])],
        lambda i, _: i in (0, 4, 6),
        unpack=True,
    ),
    ids=str,
)
def test_the_bits_are_the_cpu_kernels(types: tuple, how: str) -> None:
    """Every size up to a block and beyond, NaN and infinities and what overflows among them: both kernels agree."""
    here = careful(FULL, types, how, (*range(1, BLOCK + 2, 4), 3 * BLOCK + 5))
    for value, g in zip((float("nan"), float("inf"), -float("inf"), 6e4), here.grad, strict=False):
        g[0] = value
    here.param[4][0], here.slots["momentum_buffer"][4][0] = 6.5e4, -4e6  # beyond float16
    there = again(here)
    triton.step(FULL, FULL_HYPER, here)
    cpu.step(FULL, FULL_HYPER, there)
    assert identical(here, there)


@pytest.mark.long
@HOW
@HALF
def test_a_step_of_any_rule_is_rounded_with_the_references_bits(types: tuple, how: str) -> None:
    """The same of many more rules."""
    begin = 3 * HALVES.index(types) + list(HOWS).index(how)
    for i, (rule, hyper) in enumerate(EVERY[begin::53]):
        check_rounded(rule, replace(hyper, max_update=1.5 if i % 2 else None), types, how)


@pytest.mark.parametrize("compensated", [False, True], ids=["parameter", "remainder"])
@DTYPE
def test_every_number_is_rounded_to_a_neighbour(dtype: torch.dtype, compensated: bool) -> None:
    """Each half pattern and what lies between, subnormals, overflow, infinities and NaN: the reference's rounding."""
    with interpreter(kernel_module(), block=1 << 18):
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
        between = every.view(torch.int32) + (0x5A5A if dtype == BF16 else 0x0B4B)
        tiny = torch.randn(4096) * 2.0 ** torch.linspace(-60, -14, 4096)
        wide = torch.cat([every, between.view(F32), tiny, torch.tensor([65519.9, 65520.0, 3e38, -0.0])])
        wide[wide.isnan()] = NVIDIAS  # NumPy warns of the signalling ones
        # g = −0 leaves u = −0: the parameter becomes −lr·b, and zeros keep their signs
        p, zero = -torch.zeros(len(wide), dtype=dtype), -torch.zeros(len(wide), dtype=dtype)
        bucket = bucket_of([p], [zero], [torch.ones_like(wide)], [], [wide.clone()], [torch.tensor(6.0)])
        bucket.rounding, bucket.random_keys = "stochastic", [random_key(SEED, 2)]
        if compensated:
            bucket.slots["compensation"] = [zero.clone()]
        triton.step(Rule(momentum=True), Hyper(lr=-1.0, alpha=0.5, eps=1.0, momentum=1.0), bucket)
        words = reference.bits(SEED, 2, 7, len(wide))
        if compensated:
            near = wide.to(dtype)
            assert torch.equal(p.nan_to_num(9), near.nan_to_num(9))
            wide = (wide - near.float()) * SCALE[dtype]
            wide, p = torch.where(wide.isfinite(), wide, 0.0), bucket.slots["compensation"][0]
        expected = torch.from_numpy(reference.round_stochastically(wide.numpy(), words, KINDS[dtype]))
        got = p.double()
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(9), expected.nan_to_num(9))
        assert torch.equal(got.signbit()[~got.isnan()], expected.signbit()[~got.isnan()])


@pytest.mark.parametrize("which", ["param", "compensation"])
def test_alignment_does_not_matter(which: str) -> None:
    """A parameter or remainder that begins between two addresses divisible by 16 ends in the same bits."""
    aligned = careful(FULL, (BF16, F32), "both", (2 * BLOCK + 3,))
    moved = again(aligned)
    memory = torch.empty(2 * BLOCK + 4, dtype=BF16)
    shifted = memory[1:] if memory.data_ptr() % 16 == 0 else memory[:-1]
    assert shifted.data_ptr() % 16 != 0
    tensors_of = moved.param if which == "param" else moved.slots[which]
    tensors_of[0] = shifted.copy_(tensors_of[0])
    triton.step(FULL, FULL_HYPER, aligned)
    triton.step(FULL, FULL_HYPER, moved)
    assert identical(aligned, moved)


@pytest.mark.parametrize(
    ("dtype", "how"), mostly_long(product(KINDS, HOWS), lambda i, _: i in (0, 4), unpack=True), ids=str
)
def test_a_device_that_counts_draws_the_same_bits(dtype: torch.dtype, how: str, module: ModuleType) -> None:
    """capturable=True: every block of a tensor reads the count of one launch before, and the keys are the host's."""
    here = careful(Rule(), (dtype, F32), how, (4 * BLOCK + 3, 7))
    there = again(here)
    there.capturable = True
    hyper = Hyper(torch.tensor(0.03, dtype=torch.float64), 0.9, 1e-3, max_update=2.0)
    module.count_steps.grids.clear()
    for _ in range(3):
        triton.step(Rule(), replace(hyper, lr=0.03), here)
        triton.step(Rule(), hyper, there)
    assert identical(here, there)
    assert float(there.slots["step"][0]) == 12
    assert len(module.count_steps.grids) == (3 if HOWS[how][0] else 0)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("count", mostly_long([2**24, 2**32 + 8, 2**40 + 1], lambda i, _: i == 1))
def test_random_bits_follow_the_whole_count(count: int, on_device: bool) -> None:
    """The words of step t are the reference's where t is no float32 and no 32-bit number, wherever it is counted."""
    bucket = careful(Rule(), (BF16, F32), "stochastic", (4 * BLOCK + 3, 7))
    bucket.slots["step"] = [torch.tensor(float(count), dtype=torch.float64) for _ in bucket.slots["step"]]
    bucket.capturable = on_device
    before, wide = copied(bucket), twin(bucket)
    triton.step(Rule(), FULL_HYPER, wide)
    triton.step(Rule(), FULL_HYPER, bucket)
    check_written(bucket, wide, before)


@NEEDS_NATIVE
@pytest.mark.parametrize("compensated", [False, True], ids=["", "compensated"])
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "contiguous"])
def test_bits_belong_to_places_in_memory(layout: str, compensated: bool) -> None:
    """Whatever the order of the dimensions, all backends draw an element's bits alike, first steps and later ones."""

    def run(backend: str) -> list[Tensor]:
        x = torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(0)).clamp(-1, 1).to(BF16)
        x = {"transposed": x.mT, "channels_last": x.to(memory_format=torch.channels_last)}.get(layout, x)
        p = nn.Parameter(x)
        words = dict(lr=2.0**-13, alpha=0.0, eps=0.0, compensation=compensated)  # u is ±1: nothing else is rounded
        optimizer = RMSprop([p], rounding="stochastic", backend=backend, **words)
        for t in range(3):
            p.grad = torch.full_like(p, 0.5 - t % 2)
            optimizer.step()
        return [p.detach(), *([optimizer.state[p]["compensation"]] if compensated else [])]

    for other in ("eager", "triton"):
        assert all(torch.equal(a, b) for a, b in zip(run("cpu"), run(other), strict=True)), other


def trained(backend: str, **settings: object) -> tuple[list[Tensor], RMSprop]:
    """A run in which lr moves, gradients move in memory and one is missing; parameters and state at its end."""
    start = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(n, generator=start).to(d)) for n, d in ((5, BF16), (BLOCK + 1, BF16), (3, F16))
    ]
    params.append(nn.Parameter(torch.randn(4, generator=start)))
    words = dict(rounding="stochastic", compensation=True, seed=7, max_update=2.0, momentum=0.9)
    optimizer = RMSprop(params, backend=backend, **{**words, **settings})
    for t in range(5):
        optimizer.param_groups[0]["lr"] = 0.01 * (t + 1)
        for p in params:
            p.grad = (torch.randn(p.shape, generator=start) * (1e3 if t == 2 else 1)).to(p.dtype)
        if t == 3:
            params[1].grad = None
        optimizer.step()
    return [p.detach() for p in params] + [x for p in params for x in optimizer.state[p].values()], optimizer


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("capturable", "planned"),
    mostly_long(product([False, True], [False, True]), lambda _, case: case[0] == case[1], unpack=True),
)
def test_a_run_is_the_cpu_kernels(capturable: bool, planned: bool, monkeypatch) -> None:
    """With and without a plan, counting here or there, bit for bit: parameters, remainders, averages and counters."""
    if not planned:
        monkeypatch.setattr(Stepper, "_make_plan", lambda *_: None)
    expected, _ = trained("cpu")
    got, optimizer = trained("triton", capturable=capturable)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert isinstance(optimizer._stepper.plan, DevicePlan) is planned
    other, _ = trained("triton", capturable=capturable, seed=8)
    assert not all(torch.equal(a, b) for a, b in zip(got, other, strict=True))


@NEEDS_NATIVE
def test_the_bound_moves_with_a_schedule() -> None:
    """max_update may be moved, lifted and set in mid-run, as on the CPU."""

    def run(backend: str) -> Tensor:
        p = nn.Parameter(torch.linspace(-1, 1, BLOCK + 3))
        optimizer = RMSprop([p], lr=0.1, backend=backend)
        for cap in (None, 2.0, 0.5, None):
            optimizer.param_groups[0]["max_update"] = cap
            p.grad = p.detach() * 3
            optimizer.step()
        return p.detach()

    assert torch.equal(run("triton"), run("cpu"))


@NEEDS_NATIVE
@pytest.mark.parametrize("capturable", [False, True])
def test_the_plan_takes_over_the_table_that_was_sent(capturable: bool) -> None:
    """The first planned step sends nothing where the device counts: the step before it sent the same table."""
    p = nn.Parameter(torch.ones(40, dtype=BF16))
    optimizer = RMSprop([p], backend="triton", capturable=capturable, rounding="stochastic", compensation=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    table = optimizer._stepper.plan._lists_held[0].table
    assert (table.sendings, len(triton._tables)) == (1, 0)
    for _ in range(3):
        optimizer.step()
    assert table.sendings == (1 if capturable else 4)  # the keys of a step that the host counts are in the table


def test_a_remainder_of_another_dtype_is_refused() -> None:
    """It is kept in the parameter's dtype; another one, as a loaded state may bring, is refused in words."""
    bucket = careful(Rule(), (BF16, F32), "both", (5,))
    bucket.slots["compensation"] = [c.float() for c in bucket.slots["compensation"]]
    assert "some remainders of compensation=True are not torch.bfloat16" in str(triton.refuse_tensors(Rule(), bucket))


MISTAKES = [
    ("a spike enters whole", "v = tl.where(spike, 2 * before, v)", "v = v"),
    ("a spike enters the mean whole", "tl.where(spike, tl.where(g < 0, -largest, largest), g)", "g"),
    ("the sign of a spike lost", "tl.where(g < 0, -largest, largest)", "largest"),
    ("fresh averages bounded", "& (before > 0)", ""),
    ("an infinite gradient is a spike", '& (tl.abs(g) < float("inf"))', ""),
    ("the direction not bounded", "u = _within(u, tl.cast(cap, arithmetic))", "u = u"),
    (
        "the step not bounded",
        "u = _within(u, tl.cast(cap * tl.abs(lr) if lr_in_buffer else cap, arithmetic))",
        "u = u",
    ),
    ("bounded from above only", "return tl.where(x < -bound, -bound, x)", "return x"),
    ("the bound without lr", "cap * tl.abs(lr) if lr_in_buffer else cap", "cap"),
    ("the block's own words", "offset.to(tl.uint32) + at.to(tl.uint32)", "at.to(tl.uint32)"),
    ("keys exchanged", "* 0x9E3779B1 ^ first, second)", "* 0x9E3779B1 ^ second, first)"),
    ("random sign", "u = signed & 0x7FFFFFFF", "u = signed"),
    (
        "NaN as a number",
        "tl.where(x != x, 0x7FC00000, signed + (random & 0xFFFF))",
        "signed + (random & 0xFFFF)",
    ),
    ("subnormals as normal ones", "tl.where(exponent < 113, ", "tl.where(exponent < 0, "),
    ("infinity for the largest", "tl.minimum(normal, 0x7C00)", "normal"),
    ("remainder not added", "* (1 / scale_of_rest)", "* 0"),
    ("remainder of the other sign", "(p - _widen(near, param, arithmetic))", "(_widen(near, param, arithmetic) - p)"),
    ("float16's remainder not scaled", "2048.0 if param == tl.float16", "1.0 if param == tl.float16"),
    ("NaN as a remainder", 'tl.where(tl.abs(rest) < float("inf"), rest, 0.0)', "rest"),
    ("remainder rounded to nearest", "_at_random(rest, random, param) if stochastic else", ""),
    (
        "counted while it is read",
        "not (bias_correction or stochastic or narrowed or averaged)",
        "not bias_correction",
    ),
    ("the step forgotten", "low + t.to(tl.uint32) * 0x9E3779B9", "low"),
]


def _check() -> None:
    """Assert that a handful of steps are the CPU kernel's and the reference's."""
    for how in ("nearest", "both", "stochastic"):
        for types in ((BF16, F32), (F16, F32)):
            for rule in (FULL, Rule(momentum=True, lr_in_buffer=True)):
                here = careful(rule, types, how, (9, 2 * BLOCK + 3))
                here.grad[0][1] = float("inf")
                here.slots["momentum_buffer"][0][2] = NVIDIAS
                here.param[1][:9], here.slots["momentum_buffer"][1][:9] = 1e-6, 0.0
                here.param[1][9], here.slots["momentum_buffer"][1][9] = 6.5e4, -1e10
                here.grad[1][:9] = 0.0
                there = again(here)
                cap = None if how == "stochastic" else 1.5  # without a bound the tenth overflows
                hyper = replace(FULL_HYPER, weight_decay=0.0, max_update=cap)
                triton.step(rule, hyper, here)
                cpu.step(rule, hyper, there)
                assert identical(here, there)
    test_a_device_that_counts_draws_the_same_bits(BF16, "stochastic", triton.load())


test_the_kernel_as_it_stands_is_not_caught, test_each_mistake_is_caught = map(
    NEEDS_NATIVE, mistake_tests(MISTAKES, _check, quick=lambda i, _: i % 7 == 5)
)
