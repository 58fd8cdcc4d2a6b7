"""The compiled kernel computes the reference's step, on every type, layout, alignment and number of threads."""

import ctypes
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import DECAYS, bucket_of, change, mostly_long, within
from cpu_parity import (
    BF16,
    BOUND,
    COVERING,
    EVERY,
    F16,
    F32,
    F64,
    SIZES,
    TYPES,
    copied,
    rules,
    stepped,
    tensors,
    worst,
)
from runs import Run
from torch import Tensor

from rmsprop import RMSprop
from rmsprop.kernels import cpu, native, pick
from rmsprop.spec import Hyper, Rule
from rmsprop.tensors.bucket import Bucket

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

PLAIN, FULL = Rule(), Rule(centered=True, momentum=True, nesterov=True, bias_correction=True)
HYPER = Hyper(lr=0.03, alpha=0.9, eps=1e-3)
FULL_HYPER = Hyper(lr=0.03, alpha=0.9, eps=1e-3, momentum=0.8, weight_decay=0.05)
BOTH = pytest.mark.parametrize(("rule", "hyper"), [(PLAIN, HYPER), (FULL, FULL_HYPER)], ids=["plain", "full"])


def same(a: Bucket, b: Bucket) -> bool:
    """Whether two buckets hold the same bits (NaN equal to NaN)."""
    pairs = zip((x for v in a.lists() for x in v), (x for v in b.lists() for x in v), strict=True)
    return all(torch.equal(x, y) or torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in pairs)


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, (F32, F64, BF16)[(i + i // 6) % 3]) for i, case in enumerate(DECAYS)], ids=str
)
def test_the_rarer_modes_of_weight_decay(case, dtype: torch.dtype) -> None:
    """ "corrected" is taken, with a plan and without, with a float and a tensor lr; "l1" is refused in words."""
    if case.rule.weight_decay_mode == "l1":
        with pytest.raises(RuntimeError, match="do not have the sign of p"):
            Run(case, dtype, backend="cpu")
        return
    for lr in (0.01, torch.tensor(0.01, dtype=F64)):
        run = Run(case, dtype, backend="cpu", lr=lr)
        for found in run.steps():
            within(found)
        assert run.optimizer._stepper.plan is not None


@pytest.mark.parametrize(
    "types",
    mostly_long(TYPES, lambda i, _: i % 3 == 0),
    ids=lambda t: f"{t[0]}-{t[1]}".replace("torch.", ""),
)
def test_one_step_is_the_references(types: tuple) -> None:
    """Every element of every result, for every size, is within the frozen bound of the reference."""
    for rule, hyper in COVERING:
        error = stepped(rule, hyper, tensors(rule, types, SIZES, seed=1))
        assert error <= BOUND[types], (rule, hyper)


@pytest.mark.long
@pytest.mark.parametrize("types", TYPES, ids=lambda t: f"{t[0]}-{t[1]}".replace("torch.", ""))
def test_one_step_of_every_rule_is_the_references(types: tuple) -> None:
    """Every rule, dealt out over the types."""
    for rule, hyper in EVERY[TYPES.index(types) % 7 :: 7]:
        error = stepped(rule, hyper, tensors(rule, types, SIZES, seed=2))
        assert error <= BOUND[types], (rule, hyper)


@pytest.mark.parametrize("state", [F32, F64])
def test_a_run_with_moving_numbers_is_the_references(state: torch.dtype) -> None:
    """Over 30 steps in which every number moves, each step is the reference's, given the state it began with."""
    bucket = tensors(FULL, (state, state), SIZES, seed=2)
    rng = np.random.default_rng(3)
    for t in range(30):
        hyper = Hyper(0.01 * (1 + math.sin(t)), 0.9 + 0.003 * t, 10.0 ** -(t % 8), 0.5 + 0.01 * t, 0.002 * t)
        for g in bucket.grad:
            g.copy_(torch.from_numpy(rng.normal(size=tuple(g.shape))))
        before = copied(bucket)
        cpu.step(FULL, hyper, bucket)
        # v − m² loses digits as the averages settle: with 30 steps of noise at most 4 bits
        assert worst(FULL, hyper, before, bucket) <= 16 * BOUND[state, state]


def laid_out(bucket: Bucket, place) -> Bucket:
    """The same values, each tensor put in memory by `place`."""
    lists = bucket.lists()
    return bucket_of(*([place(x) for x in values] for values in lists[:5]), [x.clone() for x in lists[5]])


def shifted(x: Tensor, by: int) -> Tensor:
    """The tensor, beginning `by` bytes after an aligned address."""
    memory = bytearray(x.nbytes + 64 + by)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % 64 + by
    y = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=start).view(x.shape)
    return y.copy_(x)


@pytest.mark.parametrize("by", [1, 2, 4, 6, 8, 12, 28, 60])
@pytest.mark.parametrize("types", TYPES, ids=lambda t: f"{t[0]}-{t[1]}".replace("torch.", ""))
def test_alignment_does_not_matter(types: tuple, by: int) -> None:
    """Tensors that begin anywhere, even between two elements' natural places, step to the same bits."""
    sizes = tuple(size for size in SIZES if size)
    bucket = tensors(FULL, types, sizes, seed=4)
    moved = laid_out(bucket, lambda x: shifted(x, by))
    cpu.step(FULL, FULL_HYPER, bucket)
    cpu.step(FULL, FULL_HYPER, moved)
    assert same(bucket, moved)


LAYOUTS = {
    "channels_last": lambda x: x.view(2, 5, 10, 10).to(memory_format=torch.channels_last),
    "transposed": lambda x: x.view(20, 50).t().contiguous().t(),
    "permuted": lambda x: x.view(4, 5, 50).permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "ones": lambda x: x.view(1, 1000, 1).as_strided((1, 1000, 1), (7, 1, 3)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@BOTH
def test_dense_layouts_are_taken(rule: Rule, hyper: Hyper, layout: str) -> None:
    """A dense layout that parameter, gradient and state share steps as the contiguous one does."""
    flat = tensors(rule, (F32, F32), (1000,), seed=5)
    shaped = laid_out(flat, lambda x: LAYOUTS[layout](x.clone()))
    assert cpu.refuse(rule, shaped) is None
    expected = laid_out(flat, lambda x: x.clone())
    cpu.step(rule, hyper, expected)
    cpu.step(rule, hyper, shaped)
    for x, y in zip(expected.param, shaped.param, strict=True):
        assert torch.equal(LAYOUTS[layout](x.clone()), y)


@BOTH
def test_a_scalar_and_a_matrix_step_like_vectors(rule: Rule, hyper: Hyper) -> None:
    """Shape does not matter: zero dimensions, or a matrix."""
    flat = tensors(rule, (F32, F32), (1, 6), seed=6)
    shaped = laid_out(flat, lambda x: x.clone().view(() if x.numel() == 1 else (2, 3)))
    cpu.step(rule, hyper, flat)
    cpu.step(rule, hyper, shaped)
    assert all(torch.equal(x, y.view(x.shape)) for x, y in zip(flat.param, shaped.param, strict=True))


@pytest.mark.parametrize("types", TYPES, ids=lambda t: f"{t[0]}-{t[1]}".replace("torch.", ""))
def test_threads_do_not_matter(types: tuple) -> None:
    """1, 2 and 7 threads give the same bits, and so does no torch_parallel_for at all."""
    sizes = (5, 100_003, 1, 0, 70_001, 64)
    made = [tensors(FULL, types, sizes, seed=7) for _ in range(3)]
    before = torch.get_num_threads()
    try:
        for bucket, threads in zip(made, (1, 2, 7), strict=True):
            torch.set_num_threads(threads)
            cpu.step(FULL, FULL_HYPER, bucket)
    finally:
        torch.set_num_threads(before)
    assert same(made[0], made[1])
    assert same(made[0], made[2])


def test_without_torchs_threads_one_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch_parallel_for is absent, the step is the same."""
    a, b = (tensors(PLAIN, (F32, F32), (100_003,), seed=8) for _ in range(2))
    cpu.step(PLAIN, HYPER, a)
    loaded = native.load()
    assert not isinstance(loaded, str)
    alone = replace(loaded, parallel_for=None)
    monkeypatch.setattr(native, "load", lambda: alone)
    cpu.step(PLAIN, HYPER, b)
    assert same(a, b)


NAMES = ("param", "square_avg", "grad_avg", "momentum_buffer")


@pytest.mark.parametrize("types", TYPES, ids=lambda t: f"{t[0]}-{t[1]}".replace("torch.", ""))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_propagates(types: tuple, value: float) -> None:
    """A NaN or infinite gradient comes out where the reference has it, and nowhere else."""
    for switches in (("outside", False, (0, 0, 0)), ("floor", True, (1, 1, 1)), ("inside", True, (1, 0, 0))):
        for rule, hyper in rules(*switches):
            bucket = tensors(rule, types, (40,), seed=9)
            bucket.grad[0][[0, 17, 39]] = value
            assert stepped(rule, hyper, bucket) <= BOUND[types]


@pytest.mark.parametrize("types", TYPES, ids=lambda t: f"{t[0]}-{t[1]}".replace("torch.", ""))
@pytest.mark.parametrize("eps_mode", ["outside", "inside", "both", "floor"])
def test_nothing_over_nothing_is_nothing(types: tuple, eps_mode: str) -> None:
    """[7] With ε = 0 and a gradient that was always 0 the step is 0, and a gradient over zero is infinite."""
    rule, hyper = Rule(eps_mode=eps_mode), Hyper(lr=0.1, alpha=0.9, eps=0.0)
    bucket = tensors(rule, types, (33,), seed=10)
    bucket.slots["square_avg"][0].zero_()
    bucket.grad[0].zero_()
    kept = bucket.param[0].clone()
    cpu.step(rule, hyper, bucket)
    assert torch.equal(bucket.param[0], kept)


def test_a_variance_rounded_below_zero_is_zero() -> None:
    """[5] v − m² by cancellation below zero counts as zero: torch's own gives NaN there."""
    param = torch.zeros(4096)
    grad = 1000 + torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 1e-3
    bucket = bucket_of([param], [grad], [torch.zeros(4096)], [torch.zeros(4096)], [], [torch.tensor(0.0)])
    for _ in range(50):
        cpu.step(Rule(centered=True), Hyper(lr=1e-6, alpha=0.9, eps=1e-8), bucket)
    assert torch.isfinite(param).all()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_half_number_is_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    """All 65536 patterns, and float32 numbers around every rounding boundary, convert as torch's own do."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype)
    rule, hyper = Rule(), Hyper(lr=1.0, alpha=0.0, eps=1.0)
    # g = 0 and v = 0: p moves by 0 and is read and rounded once
    bucket = bucket_of(
        [every.clone()], [torch.zeros_like(every)], [torch.zeros(1 << 16)], [], [], [torch.tensor(0.0)]
    )
    cpu.step(rule, hyper, bucket)
    assert torch.equal(bucket.param[0].nan_to_num(nan=7.0), every.nan_to_num(nan=7.0))
    assert torch.equal(bucket.param[0].isnan(), every.isnan())
    # p = 0 and u = g/1 = g: p becomes −g, rounded from a float32 that lies between two halves
    wide = torch.randint(-(1 << 31), (1 << 31) - 1, (200_000,), generator=torch.Generator().manual_seed(1))
    edge = (every.float().view(torch.int32)[:, None] + torch.arange(-2, 3, dtype=torch.int32)).flatten()
    middle = (
        every.float().view(torch.int32)[:, None] + (0x8000 if dtype == BF16 else 0x1000) + torch.arange(-1, 2)
    ).flatten()
    for pattern in (wide, edge, middle):
        x = pattern.to(torch.int32).view(F32)
        x = x[x.isfinite()]
        half = torch.zeros(len(x), dtype=dtype)
        # weight decay with momentum 0.5·b: the buffer brings any float32 to the parameter
        bucket = bucket_of(
            [half], [torch.zeros_like(half)], [torch.zeros(len(x))], [], [-2 * x.double()], [torch.tensor(0.0)]
        )
        bucket.slots["square_avg"][0] = bucket.slots["square_avg"][0].double()
        cpu.step(Rule(momentum=True), Hyper(lr=1.0, alpha=0.0, eps=1.0, momentum=0.5), bucket)
        want = (-(0.5 * (-2 * x.double()).float())).to(dtype)
        assert torch.equal(half.nan_to_num(nan=7.0, posinf=8.0), want.nan_to_num(nan=7.0, posinf=8.0))


@BOTH
def test_scaled_gradients_are_unscaled_in_the_same_pass(rule: Rule, hyper: Hyper) -> None:
    """inv_scale and a clip coefficient multiply the gradient, which stays as it was."""
    plain, scaled = tensors(rule, (F32, F32), SIZES, seed=11), tensors(rule, (F32, F32), SIZES, seed=11)
    for g, h in zip(plain.grad, scaled.grad, strict=True):
        g.mul_(0.5)
        h.mul_(1024)
    kept = copied(scaled)
    cpu.step(rule, hyper, plain)
    cpu.advance(rule, hyper, scaled, inv_scale=1 / 1024, clip=0.5)
    assert all(torch.equal(x, y) for x, y in zip(plain.param, scaled.param, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(kept.grad, scaled.grad, strict=True))


@pytest.mark.parametrize("found_inf", [1.0, 2.0, -1.0, math.nan, math.inf])
def test_found_inf_skips_everything(found_inf: float) -> None:
    """Anything but 0, such as a sum over two devices, leaves parameters, state and the count as they were."""
    bucket = tensors(FULL, (F32, F32), SIZES, seed=12)
    kept, version = copied(bucket), bucket.param[-1]._version
    cpu.advance(FULL, FULL_HYPER, bucket, found_inf=found_inf)
    assert same(kept, bucket)
    assert bucket.param[-1]._version == version


def test_autograd_sees_that_parameters_were_written() -> None:
    """A backward pass through values from before the step raises, as after any in-place operator."""
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = RMSprop([w], backend="cpu")
    for _ in range(3):
        w.grad = torch.ones(3)
        loss = (w * w).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_many_elements_are_split_without_overflow() -> None:
    """The pieces of any range are the elements of that range once, in order, beyond 2^31 elements."""
    loaded = native.load()
    assert not isinstance(loaded, str)
    sizes = [(1 << 31) + 7, 0, 5, -1, (1 << 33), 1, 3 * (1 << 40)]
    halves = (sizes[:4], sizes[4:])
    works = (native.Work * 2)()
    held = []
    for work, half in zip(works, halves, strict=True):
        size, end = (ctypes.c_int64 * len(half))(*half), (ctypes.c_int64 * len(half))()
        held += [size, end]
        work.count, work.size, work.end = len(half), ctypes.addressof(size), ctypes.addressof(end)
    whole = [(w, i, 0, n) for w, half in enumerate(halves) for i, n in enumerate(half) if n > 0]
    total = sum(n for *_, n in whole)
    rows = (ctypes.c_int64 * 64)()
    for cuts in (
        [],
        [1 << 31],
        [(1 << 31) + 7],
        [3, (1 << 31) + 9, 1 << 34, total - 1],
        [total // 7 * k for k in range(1, 7)],
    ):
        joined: list[tuple[int, int, int, int]] = []
        for begin, end in zip([0, *cuts], [*cuts, total], strict=True):
            count = loaded.pieces(works, 2, begin, end, rows, 16)
            assert count <= 16
            pieces = [tuple(rows[4 * k : 4 * k + 4]) for k in range(count)]
            assert sum(last - first for _, _, first, last in pieces) == end - begin
            for piece in pieces:
                if joined and joined[-1][:2] == piece[:2]:
                    assert joined[-1][3] == piece[2]
                    piece = (*piece[:2], joined.pop()[2], piece[3])
                joined.append(piece)
        assert joined == whole


def refusal(**changes: object) -> str:
    """What the kernel says to a bucket of two tensors with these lists or flags changed."""
    bucket = tensors(FULL, (F32, F32), (4, 6), seed=13)
    for name, value in changes.items():
        change(bucket, name, value)
    return cpu.refuse(FULL, bucket) or ""


def test_refusals_say_why() -> None:
    """What the kernel does not take it refuses in words, and never guesses."""
    four, six = torch.zeros(4), torch.zeros(6)
    wide = torch.zeros(4, 8)
    cases = {
        "complex64": {"param": [four.cfloat(), six.cfloat()]},
        "int32": {"param": [four.int(), six.int()]},
        "on meta": {"param": [four.to("meta"), six.to("meta")]},
        "sparse": {"grad": [four.to_sparse(), six]},
        "not torch.float32 as their parameters": {"grad": [four.double(), six]},
        "subclass": {"param": [torch.nn.Buffer(four).as_subclass(type("Odd", (Tensor,), {})), six]},
        "state is torch.float16": {"square_avg": [four.half(), six.half()]},
        "of different dtypes": {"square_avg": [four.double(), six.double()]},
        "step counters": {"step": [torch.tensor(1), torch.tensor(1)]},
        "another shape": {"grad": [four.view(2, 2), six]},
        "gaps": {"param": [wide[:, 0], six]},
        "shares elements": {"param": [torch.zeros(1).expand(4), six]},
        "overlap": {"param": [wide.view(-1)[:4], wide.view(-1)[2:8]]},
        "not all plain tensors": {"grad": [torch._neg_view(four), six]},
        "no memory": {"grad": [torch._efficientzerotensor(4), six]},
        "foreach=False": {"foreach": False},
        "foreach=True": {"foreach": True},
        "fused=False": {"fused": False},
        "differentiable": {"differentiable": True},
    }
    for words, changes in cases.items():
        assert words in refusal(**changes), words
    assert refusal() == ""


def test_fused_with_foreach_false_is_the_kernel() -> None:
    """fused=True, foreach=False is what torch takes, and torchtitan gives, for the native kernel."""
    w = torch.nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    optimizer = RMSprop([w], lr=0.01, fused=True, foreach=False)
    optimizer.step()
    optimizer.step()  # with a plan
    assert "cpu: steps them" in optimizer.explain()
    assert torch.all(w < 0.9)


def test_layouts_that_differ_are_refused_and_stepped_right() -> None:
    """torch's fused kernels read a transposed gradient in the wrong order; here eager takes it."""
    start, grad = torch.randn(3, 5), torch.randn(5, 3).t()
    stepped = []
    for g in (grad, grad.contiguous()):
        w = torch.nn.Parameter(start.clone())
        w.grad = g
        optimizer = RMSprop([w])
        for _ in range(3):
            optimizer.step()
        stepped.append(w.detach())
    assert torch.allclose(*stepped, rtol=1e-5, atol=1e-6)
    w = torch.nn.Parameter(start.clone())
    w.grad = grad
    with pytest.raises(RuntimeError, match="cpu refuses: parameter 0 has strides"):
        RMSprop([w], backend="cpu").step()


def test_half_precision_moves_every_element() -> None:
    """torch ≤ 2.13's fused SGD left full vectors of bfloat16 unchanged."""
    for dtype in (BF16, F16):
        w = torch.nn.Parameter(torch.ones(100, dtype=dtype))
        w.grad = torch.ones_like(w)
        RMSprop([w], lr=0.1, backend="cpu").step()
        assert (w != 1).all()


def test_fused_true_takes_a_native_kernel_or_says_why_not() -> None:
    """fused=True is honoured by the compiled kernel, and refused in words where it cannot be."""
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = RMSprop([w], fused=True)
    w.grad = torch.ones(3)
    optimizer.step()
    assert (w != 1).all()
    z = torch.nn.Parameter(torch.ones(3, dtype=torch.cfloat))
    z.grad = torch.ones_like(z)
    with pytest.raises(RuntimeError, match=r"complex64.*eager refuses: fused=True"):
        RMSprop([z], fused=True)
    with pytest.raises(RuntimeError, match=r"'cpu'.*complex64"):
        RMSprop([z], backend="cpu")
    with pytest.raises(ValueError, match="leave one out"):
        RMSprop([w], fused=True, foreach=True)


def test_auto_takes_the_kernel() -> None:
    """A plain float32 bucket on the CPU goes to the compiled kernel."""
    assert pick("auto", PLAIN, tensors(PLAIN, (F32, F32), (4,), seed=14)).name == "cpu"


def test_a_parameter_may_be_its_own_gradient() -> None:
    """p.grad = p, element for element, is a step with g = p."""
    a, b = torch.nn.Parameter(torch.randn(100)), torch.nn.Parameter(torch.zeros(100))
    b.data.copy_(a.data)
    a.grad, b.grad = a.data, b.data.clone()
    optimizers = RMSprop([a], backend="cpu"), RMSprop([b], backend="cpu")
    for _ in range(3):
        b.grad = b.data.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(a, b)
