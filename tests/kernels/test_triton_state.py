"""State in fewer bytes in the Triton kernel, on CPU tensors under Triton's interpreter."""

from dataclasses import replace
from itertools import product
from types import ModuleType

import numpy as np
import pytest
import torch
from cases import bucket_of, mostly_long
from cpu_parity import BF16, COVERING, EVERY, F16, F32, F64, tensors
from halves import SEED, rounded_as
from interpreted import BLOCK, interpreted_fixtures, interpreter, kernel_module, mistake_tests
from narrowed import STATES, again, check_narrowed, identical, in_float32, narrowed
from torch import Tensor, nn

from rmsprop import RMSprop, reference
from rmsprop.kernels import cpu, native, triton
from rmsprop.kernels.triton_plan import DevicePlan
from rmsprop.spec import Averaging, Hyper, Rule, random_key
from rmsprop.step import Stepper
from rmsprop.tensors.bucket import Bucket

SIZES = (0, 9, 2 * BLOCK + 3)
FULL = Rule(centered=True, momentum=True, nesterov=True, bias_correction=True)
FULL_HYPER = Hyper(0.03, 0.9, 1e-3, 0.8, 0.05, max_update=1.5)
# dtype of the parameters, and how they are rounded: stochastic, compensated
PARAMS = {
    "float32": (F32, False, False),
    "bfloat16": (BF16, False, False),
    "float16": (F16, False, False),
    "bfloat16-stochastic": (BF16, True, False),
    "float16-both": (F16, True, True),
    "bfloat16-compensated": (BF16, False, True),
}
NEEDS_NATIVE = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


module, _in_place = interpreted_fixtures()


def made(rule: Rule, param: str, state_dtype: str, sizes: tuple[int, ...] = SIZES, seed: int = 3) -> Bucket:
    """A bucket with averages over the whole range of float8 and beyond, zero, and not finite."""
    dtype, stochastic, compensated = PARAMS[param]
    bucket = tensors(rule, (dtype, F32), sizes, seed)
    draw = torch.Generator().manual_seed(seed)
    for g, v in zip(bucket.grad, bucket.slots["square_avg"], strict=True):
        scale = torch.exp2(torch.linspace(-30, 8, len(v)))
        g *= scale.to(dtype)
        v *= scale**2
        v[::7] = 0
        g[::5] *= 40
    if len(bucket.grad[-1]) > 8:
        bucket.grad[-1][5], bucket.grad[-1][6] = float("nan"), float("inf")
        bucket.slots["square_avg"][-1][2] = float("inf")
    bucket = rounded_as(bucket, stochastic=stochastic, compensated=compensated, generator=draw)
    return narrowed(bucket, state_dtype)


def check(rule: Rule, hyper: Hyper, before: Bucket) -> Bucket:
    """Step a copy, and judge it by the step of the same numbers in float32 state, and by the CPU kernel's step."""
    here, wide, there = again(before), in_float32(before), replace(again(before), capturable=False)
    triton.step(rule, hyper, here)
    triton.step(rule, hyper, wide)
    check_narrowed(here, wide, before)
    if native.missing() is None:
        cpu.step(rule, hyper, there)
        assert (rule.bias_correction and before.capturable) or identical(here, there)
    return here


@pytest.mark.parametrize(
    ("state_dtype", "param"), mostly_long(product(STATES, PARAMS), lambda i, _: i == 11, unpack=True)
)
def test_state_is_rounded_with_the_references_bits(state_dtype: str, param: str) -> None:
    """Rules dealt out over the kinds of parameters; the step is that of the averages before they are rounded."""
    begin = list(PARAMS).index(param) + 6 * STATES.index(state_dtype)
    for i, (rule, hyper) in enumerate(COVERING[begin % 12 :: 12]):
        hyper = replace(hyper, max_update=1.5 if i % 2 else None, clip_weights=0.7 if i % 3 else None)
        check(rule, hyper, made(rule, param, state_dtype))


@pytest.mark.long
@pytest.mark.parametrize(("state_dtype", "param"), [*product(STATES, PARAMS)])
def test_state_of_any_rule_is_rounded_with_the_references_bits(state_dtype: str, param: str) -> None:
    """The same of many more rules."""
    begin = list(PARAMS).index(param) + 6 * STATES.index(state_dtype)
    for i, (rule, hyper) in enumerate(EVERY[begin::41]):
        check(rule, replace(hyper, max_update=1.5 if i % 2 else None), made(rule, param, state_dtype))


def test_every_code_is_read_and_written() -> None:
    """An average that the step leaves alone keeps its code, and acts as the number that the code stands for."""
    with interpreter(kernel_module(), block=256):
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
        for t in range(4):
            p, g = torch.zeros(256), torch.full((256,), 1e-30)
            bucket = bucket_of([p], [g], [codes.clone()], [], [], [torch.tensor(float(t))])
            bucket.state_dtype, bucket.random_keys = "float8", [random_key(SEED, 0)]
            # alpha is 1 in float32, and g² is 0: p becomes 1/√v
            triton.step(Rule(), Hyper(-1e30, 1 - 2.0**-40, 0.0), bucket)
            assert torch.equal(bucket.slots["square_avg"][0], codes)
            with np.errstate(divide="ignore"):
                expected = 1 / np.sqrt(reference.from_float8(codes.numpy()))
            assert np.allclose(p.numpy(), expected, rtol=1e-6, atol=0, equal_nan=True)


def test_every_average_is_rounded_to_a_neighbor() -> None:
    """Codes and midpoints, numbers close to them, and what is below and above the range: the reference's codes."""
    number = reference.from_float8(np.arange(254, dtype=np.uint8))
    middle = (number[1:] + number[:-1]) / 2
    root = np.sqrt(np.concatenate([number, middle])).astype(np.float32)
    near = [np.nextafter(root, np.float32(way)) for way in (-np.inf, np.inf)]
    special = np.float32([1e-30, 1e-22, 2e-19, 200.0, 1e18, 1e30, np.inf, np.nan])
    g = torch.from_numpy(np.tile(np.concatenate([root, *near, special]), 16))
    with interpreter(kernel_module(), block=1 << 15):
        for rule, alpha in ((Rule(), 0.0), (Rule(momentum=True, centered=True), 0.3)):
            bucket = bucket_of([torch.zeros(len(g))], [g], *([torch.zeros(len(g))] for _ in range(3)))
            bucket.slots["step"] = [torch.tensor(4.0)]
            check(rule, Hyper(1e-3, alpha, 1e-3, 0.9 * rule.momentum), narrowed(bucket, "float8"))


@pytest.mark.parametrize(
    ("state_dtype", "which"),
    mostly_long(product(STATES, ["param", "square_avg", "grad_avg", "ema"]), lambda i, _: i == 5, unpack=True),
)
def test_alignment_does_not_matter(state_dtype: str, which: str) -> None:
    """Wherever a tensor begins, the bits are the same, and nothing is written before it or after it."""
    before = made(FULL, "float32", state_dtype, (2 * BLOCK + 3,))
    before.slots["ema"] = [p * 1.25 for p in before.param]
    hyper = replace(FULL_HYPER, average=Averaging(0.9))
    expected = check(FULL, hyper, before)
    for shift in (1, 2, 4):
        here = again(before)
        values = here.param if which == "param" else here.slots[which]
        memory = torch.ones(values[0].numel() + 8, dtype=values[0].dtype)
        values[0] = memory[shift : shift - 8].copy_(values[0])
        triton.step(FULL, hyper, here)
        assert identical(here, expected)
        assert (memory[:shift] == 1).all()
        assert (memory[shift - 8 :] == 1).all()


@pytest.mark.parametrize(
    ("state_dtype", "param"), mostly_long(product(STATES, PARAMS), lambda i, _: i == 6, unpack=True)
)
def test_a_device_that_counts_draws_the_same_bits(state_dtype: str, param: str, module: ModuleType) -> None:
    """capturable=True: one launch counts before every block draws, wherever the count is; lr is on the device."""
    here = made(Rule(momentum=True), param, state_dtype, (4 * BLOCK + 3, 7))
    there = replace(again(here), capturable=True)
    hyper = Hyper(torch.tensor(0.03, dtype=F64), 0.9, 1e-3, 0.8)
    module.count_steps.grids.clear()
    for _ in range(3):
        triton.step(Rule(momentum=True), replace(hyper, lr=0.03), here)
        triton.step(Rule(momentum=True), hyper, there)
    assert identical(here, there)
    assert float(there.slots["step"][0]) == 12
    assert len(module.count_steps.grids) == 3


@pytest.mark.parametrize("state_dtype", mostly_long(STATES, lambda i, _: i == 1))
def test_a_skipped_step_leaves_the_state(state_dtype: str) -> None:
    """found_inf: no code is drawn again, and no step is counted. A loss scale is divided out."""
    before = replace(made(FULL, "bfloat16-stochastic", state_dtype), capturable=True)
    before.grad = [g.nan_to_num(0, 0, 0) * 2.0**-10 for g in before.grad]
    expected = check(FULL, FULL_HYPER, before)
    scaled = again(before)
    scaled.grad = [g * 1024 for g in before.grad]
    scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(2.0)
    untouched = again(scaled)
    triton.step(FULL, FULL_HYPER, scaled)
    assert identical(scaled, untouched)
    scaled.found_inf = torch.tensor(0.0)
    triton.step(FULL, FULL_HYPER, scaled)
    assert identical(replace(scaled, grad=expected.grad), expected)


def test_an_average_of_the_weights_keeps_the_dtype_of_the_arithmetic() -> None:
    """[10] reads the parameter as it is stored, and its average is not rounded stochastically."""
    for state_dtype, param in zip(STATES, ("bfloat16-stochastic", "float32"), strict=True):
        before = made(FULL, param, state_dtype)
        before.slots["ema"] = [p.float() * 1.25 for p in before.param]
        check(FULL, replace(FULL_HYPER, clip_weights=0.7, average=Averaging(0.9, "timm")), before)


def trained(backend: str, state_dtypes: tuple[str, ...], **settings: object) -> tuple[list[Tensor], RMSprop]:
    """A run of several groups in which lr moves, gradients move in memory and one is missing; all that it leaves."""
    start = torch.Generator().manual_seed(0)
    kinds = ((5, BF16), (BLOCK + 1, F32), (3, F16))
    groups = [
        {
            "params": [nn.Parameter(torch.randn(n, generator=start).to(dtype)) for n, dtype in kinds],
            "state_dtype": state_dtype,
        }
        for state_dtype in state_dtypes
    ]
    optimizer = RMSprop(groups, backend=backend, momentum=0.9, seed=7, **settings)
    params = [p for group in groups for p in group["params"]]
    for t in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (t + 1)
        for p in params:
            p.grad = (torch.randn(p.shape, generator=start) * (1e3 if t == 1 else 1)).to(p.dtype)
        if t == 2:
            params[1].grad = None
        optimizer.step()
    return [p.detach() for p in params] + [x for p in params for x in optimizer.state[p].values()], optimizer


SETTINGS = (
    {"centered": True, "rounding": "stochastic", "compensation": True, "max_update": 2.0},
    {"nesterov": True, "ema": 0.9, "clip_weights": 0.7},
    {"clip_norm": 0.9, "clip_global_norm": 1.2, "rounding": "stochastic"},
)


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("settings", "capturable", "planned"),
    mostly_long(product(SETTINGS, [False, True], [True, False]), lambda i, _: i == 2, unpack=True),
)
def test_a_run_is_the_cpu_kernels(settings: dict, capturable: bool, planned: bool, monkeypatch) -> None:
    """Groups of every precision in one optimizer, by a plan and without, counting here or there: the same bits."""
    if not planned:
        monkeypatch.setattr(Stepper, "_make_plan", lambda *_: None)
    state_dtypes = ("float8", "float32", "bfloat16")
    expected, _ = trained("cpu", state_dtypes, **settings)
    got, optimizer = trained("triton", state_dtypes, capturable=capturable, **settings)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert isinstance(optimizer._stepper.plan, DevicePlan) is planned


def test_a_group_of_one_dtype_is_one_launch(module: ModuleType) -> None:
    """State of fewer bytes costs no launch where the host counts, and one for the count where the device does."""
    for capturable, expected in ((False, [1, 0]), (True, [1, 1])):
        p = nn.Parameter(torch.ones(3 * BLOCK))
        optimizer = RMSprop([p], state_dtype="float8", momentum=0.9, backend="triton", capturable=capturable)
        for _ in range(3):
            p.grad = torch.ones_like(p)
            for kernel in (module.advance, module.count_steps):
                kernel.grids.clear()
            optimizer.step()
            assert [len(kernel.grids) for kernel in (module.advance, module.count_steps)] == expected


def test_state_of_another_dtype_is_refused() -> None:
    """A slot that is not in the bucket's precision is refused in words, not read as another number."""
    bucket = made(FULL, "float32", "float8", (5,))
    bucket.slots["square_avg"] = [v.float() for v in bucket.slots["square_avg"]]
    assert "not in the dtypes of state_dtype='float8'" in str(triton.refuse_tensors(FULL, bucket))
    bucket = made(FULL, "float32", "bfloat16", (5,))
    bucket.slots["momentum_buffer"] = [b.float() for b in bucket.slots["momentum_buffer"]]
    assert "of different dtypes" in str(triton.refuse_tensors(FULL, bucket))


MISTAKES = [
    ("the parameter's bits for square_avg", 'if slot != "grad_avg":', "if False:"),
    ("one word for all slots", 'if slot != "square_avg":', "if False:"),
    ("the buffer's bits for the mean", '"grad_avg", random', '"momentum_buffer", random'),
    (
        "state to nearest",
        "_keep(v_at, offset, at, mask, vector, square, narrowed,",
        "_keep(v_at, offset, at, mask, vector, square, False,",
    ),
    ("fewer random bits", "random & 0x1FFFFF", "random & 0xFFFFF"),
    ("subnormals as zero", "tl.where(small, v + SMALLEST_NORMAL, v)", "tl.where(small, SMALLEST_NORMAL, v)"),
    ("subnormals as normal codes", "tl.where(small, 312 << 21, 308 << 21)", "tl.where(small, 308 << 21, 308 << 21)"),
    ("infinity kept as the largest", 'tl.where(v < float("inf"), code', "tl.where(v == v, code"),
    ("the range overflows to infinity", ">> 21, 253)", ">> 21, 254)"),
    ("NaN as infinity", 'tl.where(v == float("inf"), 254, 255)', "254"),
    ("codes of infinity and NaN read as numbers", "tl.where(c < 254, c << 21", "tl.where(c < 256, c << 21"),
    ("infinity read as NaN", "(c << 22) | 0x40000000", "0x7FC00000"),
    ("codes read an octave off", "* 2.0**77", "* 2.0**78"),
    ("a step of its own", "w = v * unbias if bias_correction else v", "w = tl.where(narrowed, v * 1.1, v)"),
    ("the block's own words", "offset.to(tl.uint32) + at.to(tl.uint32)", "at.to(tl.uint32)"),
    ("counted while it is read", "stochastic or narrowed or averaged)", "stochastic or averaged)"),
    ("keys of no step", "if stochastic or narrowed:\n            first", "if stochastic:\n            first"),
    (
        "the average of weights narrowed",
        "_store(e_at, offset, at, mask, vector, ema, new)",
        "_keep(e_at, offset, at, mask, vector, state, narrowed, 'grad_avg', random, new)",
    ),
]


def _check() -> None:
    """Assert that a handful of steps are right."""
    test_every_code_is_read_and_written()
    for state_dtype, param in (("float8", "float32"), ("bfloat16", "bfloat16-stochastic")):
        before = made(FULL, param, state_dtype, (9, 2 * BLOCK + 3))
        before.slots["ema"] = [p.float() * 1.25 for p in before.param]
        check(FULL, replace(FULL_HYPER, average=Averaging(0.9)), before)
    test_every_average_is_rounded_to_a_neighbor()
    test_a_device_that_counts_draws_the_same_bits("float8", "float32", triton.load())


test_the_kernel_as_it_stands_is_not_caught, test_each_mistake_is_caught = mistake_tests(
    MISTAKES, _check, quick=lambda i, _: i == 8, errors=(AssertionError, RuntimeError)
)
