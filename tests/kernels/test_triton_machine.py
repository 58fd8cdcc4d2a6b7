"""The Triton kernel as it is compiled for a GPU, run: every instruction of its PTX on the CPU (ptx_machine.py).

Its bits are the CPU kernel's, through the launches, tables and plans that a GPU would get.
"""

import re
from copy import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import mostly_long
from cpu_parity import BF16, BOUND, EVERY, F16, F32, F64, TYPES, copied, tensors, worst
from halves import check_written, rounded_as, twin
from narrowed import again, identical
from ptx_machine import COMPILER, kept, machine, translate
from stand_in import KERNELS, gpu_fixtures, stepped
from torch import Tensor, nn

from rmsprop import RMSprop
from rmsprop.kernels import cpu, native, triton
from rmsprop.kernels.triton_plan import DevicePlan
from rmsprop.spec import Averaging, Hyper, Rule
from rmsprop.tensors.bucket import Bucket

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here to build what stands for a GPU"),
    pytest.mark.skipif(native.missing() is not None, reason=str(native.missing())),
]

SIZES = (0, 1, 1000, triton.BLOCK, 2 * triton.BLOCK + 5)
FULL = Rule(centered=True, momentum=True, nesterov=True, bias_correction=True)
FULL_HYPER = Hyper(lr=0.03, alpha=0.9, eps=1e-3, momentum=0.8, weight_decay=0.05)
AVERAGES = (Averaging(0.9, "tensorflow", 2, 2), Averaging(0.9, "timm"), Averaging(0.9))
ALL_TYPES = pytest.mark.parametrize("types", TYPES, ids=lambda t: f"{t[0]}-{t[1]}".replace("torch.", ""))


h100, gpu = gpu_fixtures()


def cpus(rule: Rule, hyper: Hyper, before: Bucket) -> Bucket:
    other = again(before)
    cpu.step(rule, hyper, other)
    return other


# a kernel is compiled for each: one in `make test`
@pytest.mark.parametrize(
    ("types", "capturable"),
    mostly_long(product(TYPES, (False, True)), lambda i, _: i == 19, unpack=True),
    ids=str,
)
def test_one_step_is_the_references_and_the_cpu_kernels(types: tuple, capturable: bool, gpu) -> None:
    """Rules dealt out over the dtypes, tails and no elements: within the frozen bound, and the CPU kernel's bits."""
    begin = TYPES.index(types) + len(TYPES) * capturable
    for rule, hyper in EVERY[begin :: len(EVERY) // 2]:
        before = tensors(rule, types, SIZES, seed=1)
        before.capturable = capturable
        here = stepped(gpu, rule, hyper, before)
        assert worst(rule, hyper, before, here) <= BOUND[types], (rule, hyper)
        before.capturable = False
        assert identical(here, cpus(rule, hyper, before)), (rule, hyper)


@pytest.mark.long
@pytest.mark.parametrize(
    ("rule", "types"), [(Rule(), (F32, F32)), *product([FULL], [(BF16, F32), (F32, F32), (F16, F16)])], ids=str
)
def test_an_a100_computes_the_same(rule: Rule, types: tuple, gpu) -> None:
    """The code for sm_80 has other instructions, and the same bits; NaN and infinity come out where they belong."""
    before = tensors(rule, types, (1, 5000, 3), seed=4)
    hyper = replace(FULL_HYPER, momentum=FULL_HYPER.momentum * rule.momentum)
    for g, value in zip(before.grad, (float("nan"), float("inf"), -float("inf")), strict=True):
        g[0] = value
    here = stepped(gpu, rule, hyper, before)
    with machine(KERNELS.advance, KERNELS.count_steps, capability=80):
        assert identical(stepped(gpu, rule, hyper, before), here)
    assert identical(cpus(rule, hyper, before), here)


@pytest.mark.parametrize(
    ("how", "types", "capturable"),
    mostly_long(
        product([(True, True), (True, False), (False, True)], [(BF16, F32), (F16, F16)], [False, True]),
        lambda i, _: i == 2,
        unpack=True,
    ),
    ids=str,
)
def test_half_precision_is_rounded_with_the_references_bits(types: tuple, how: tuple, capturable: bool, gpu) -> None:
    """Of the kernel's own float32 step, spikes bounded; and the CPU kernel's bits."""
    rule, hyper = Rule(momentum=True, centered=True), Hyper(0.03, 0.9, 1e-3, 0.8, max_update=1.5)
    before = tensors(rule, types, SIZES, seed=1)
    for g in before.grad:
        g[::3] *= 40
    draw = torch.Generator().manual_seed(1)
    before = rounded_as(before, stochastic=how[0], compensated=how[1], generator=draw)
    before.capturable = capturable
    here, wide = stepped(gpu, rule, hyper, before), stepped(gpu, rule, hyper, twin(before))
    check_written(here, wide, before)
    assert identical(here, cpus(rule, hyper, before))


@pytest.mark.long
@pytest.mark.parametrize("rule", [Rule(momentum=True), Rule(centered=True, bias_correction=True)], ids=str)
def test_a_bounded_step_is_the_cpu_kernels(rule: Rule, gpu) -> None:
    """max_update with spikes and averages that have not begun."""
    hyper = Hyper(0.03, 0.9, 1e-3, 0.8 if rule.momentum else 0.0, max_update=1.5)
    before = tensors(rule, (F32, F32), SIZES, seed=2)
    for g, v in zip(before.grad, before.slots["square_avg"], strict=True):
        g[::3] *= 40
        v[::7] = 0
    assert identical(stepped(gpu, rule, hyper, before), cpus(rule, hyper, before))


@pytest.mark.parametrize(
    ("types", "capturable", "average"),
    mostly_long(
        product([(F32, F32), (BF16, F32), (BF16, BF16), (F64, F64)], [False, True], AVERAGES),
        lambda i, _: i == 9,
        unpack=True,
    ),
    ids=str,
)
def test_bounded_parameters_and_their_average_are_the_cpu_kernels(
    types: tuple, capturable: bool, average: Averaging, gpu
) -> None:
    """clip_weights and [10], whichever side counts; an average that is not aligned ends in the same bits."""
    rule, hyper = Rule(momentum=True), Hyper(0.03, 0.9, 1e-3, 0.8, clip_weights=0.7, average=average)
    before = tensors(rule, types, SIZES, seed=3)
    before.slots["ema"] = [(p * 1.25).to(types[1]) for p in before.param]
    before.capturable = capturable
    here = stepped(gpu, rule, hyper, before)
    moved = again(before)
    memory = [torch.ones(n + 8, dtype=types[1]) for n in SIZES]
    moved.slots["ema"] = [x[1:-7].copy_(e) for x, e in zip(memory, before.slots["ema"], strict=True)]
    triton.step(rule, hyper, moved)
    before.capturable = False
    expected = cpus(rule, hyper, before)
    assert identical(here, expected)
    assert identical(moved, expected)
    assert all(x[0] == 1 and (x[-7:] == 1).all() for x in memory)


@pytest.mark.long
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("types", [(F32, F32), (BF16, F32), (F64, F64)], ids=str)
def test_clipped_elements_are_the_cpu_kernels(types: tuple, last: bool, gpu) -> None:
    """clip_value before or after a norm's place, with [1] before it; gradients stay as they are."""
    runs = []
    for backend in ("triton", "cpu"):
        params = [nn.Parameter(p.detach().to(types[0])) for p in network()]
        words = dict(clip_value=0.3, clip_after_decay=True, clip_value_last=last, weight_decay=0.1, momentum=0.9)
        optimizer = RMSprop(params, lr=0.01, backend=backend, **words)
        for t in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(types[0])
            optimizer.step()
        runs.append(held(params, optimizer))
    assert same(*runs)
    assert gpu.ran == ["advance"] * 3


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("rest", mostly_long([1.0, 0.25], lambda _, rest: rest == 1))
def test_factors_join_the_scale(rest: float) -> None:
    """Those of a power of two give the bits of gradients that were scaled by it."""
    before, hyper = tensors(Rule(), (F32, F32), SIZES, seed=8), Hyper(0.03, 0.9, 1e-3)
    factors = torch.tensor([[2.0 ** -(i + 1), rest] for i in range(len(SIZES))], dtype=F64)
    scaled = copied(before)
    for g, both in zip(scaled.grad, factors, strict=True):
        g *= float(both.prod())
    table = triton.table_of(before)
    triton.count(Rule(), hyper, before, table)
    triton.Work(Rule(), before).launch(hyper, table, bounds=triton.Bounds(factors, clips=True))
    expected = cpus(Rule(), hyper, scaled)
    scaled.grad[:] = before.grad
    assert identical(before, replace(expected, grad=before.grad))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", mostly_long([F32, F64, BF16, F16], lambda i, _: i == 1), ids=str)
@pytest.mark.parametrize("capability", mostly_long([80, 90], lambda _, value: value == 90))
def test_norms_compile(dtype: torch.dtype, capability: int) -> None:
    """Sums cross threads, which run one after the other here: so they are compiled, and not run."""
    params = [nn.Parameter(p.detach().to(dtype)) for p in network()]
    words = dict(clip_norm=1.0, clip_global_norm=1.0, clip_after_decay=True, weight_decay=0.1, capturable=True)
    optimizer = RMSprop(params, lr=0.01, backend="triton", amp_in_step=True, **words)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    for p in params:
        p.grad = torch.ones_like(p)
    kernels_ = (getattr(KERNELS, name) for name in KERNELS.__all__)
    with machine(*kernels_, capability=capability) as launcher, kept(launcher) as launches:
        for _ in range(3):
            optimizer.step()
    assert isinstance(optimizer._stepper.plan, DevicePlan)
    assert [launch.kernel.name for launch in launches] == ["squares", "norms", "bound", "advance"] * 3
    assert launches[4:8] == launches[8:]  # those of a plan skip Triton's search from the second on
    assert not [launch for launch in launches if ".local" in launch.kernel.ptx]
    assert "ld.global.v" in launches[0].kernel.ptx
    assert "shared" not in launches[-1].kernel.ptx


@pytest.mark.parametrize("which", ["param", "grad", "square_avg"])
@pytest.mark.parametrize(
    "types", mostly_long([(F32, F32), (BF16, F32)], lambda i, _: i == 0), ids=["float32", "bfloat16"]
)
@pytest.mark.usefixtures("gpu")
def test_alignment_does_not_matter(which: str, types: tuple) -> None:
    """Wherever a tensor begins, the bits are the same, and no access of 16 bytes is made to another address."""
    before = tensors(Rule(), types, (triton.BLOCK + 9,), seed=5)
    expected = cpus(Rule(), Hyper(0.03, 0.9, 1e-3), before)
    for shift in range(1, 8):
        bucket = copied(before)
        values = bucket.slots[which] if which in bucket.slots else getattr(bucket, which)
        x = values[0]
        memory = torch.zeros(x.numel() + 8, dtype=x.dtype)
        moved = memory[shift : shift + x.numel()].copy_(x)
        values[0] = moved
        triton.step(Rule(), Hyper(0.03, 0.9, 1e-3), bucket)
        assert identical(bucket, expected)
        assert not memory[:shift].any()
        assert not memory[shift + x.numel() :].any()


def network() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=draw)) for n in (5, 9000, 1, triton.BLOCK)]


def train(params: list[nn.Parameter], optimizer: RMSprop, steps: int) -> None:
    """Steps in which lr moves, gradients move in memory, and one is missing."""
    for t in range(steps):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(0.01 / (t + 1))
            else:
                group["lr"] = 0.01 / (t + 1)
        draw = torch.Generator().manual_seed(100 + t)
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=draw)
            p.grad = None if t == 2 and i == 1 else g
        optimizer.step()


def held(params: list[nn.Parameter], optimizer: RMSprop) -> list[Tensor]:
    return [p.detach() for p in params] + [x for p in params for x in optimizer.state[p].values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("capturable", "bias_correction"),
    mostly_long(product([False, True], [False, True]), lambda _, case: all(case), unpack=True),
)
def test_a_run_is_the_cpu_kernels_at_a_launch_a_step(capturable: bool, bias_correction: bool, gpu) -> None:
    """By a plan, whichever side counts; a second launch counts where [4] asks the device for the step."""
    words = dict(momentum=0.9, centered=True, bias_correction=bias_correction, capturable=capturable)
    runs = []
    for backend in ("triton", "cpu"):
        params = network()
        lr = torch.tensor(0.01, dtype=F64) if capturable else 0.01
        optimizer = RMSprop(params, lr=lr, backend=backend, **words)
        train(params, optimizer, 6)
        runs.append(held(params, optimizer))
        if backend == "triton":
            assert isinstance(optimizer._stepper.plan, DevicePlan)
    assert same(*runs)
    assert gpu.ran == (["count_steps", "advance"] if capturable and bias_correction else ["advance"]) * 6


@pytest.mark.parametrize(
    "words",
    mostly_long([{}, {"bias_correction": True, "centered": True}, {"rounding": "stochastic"}], lambda i, _: i == 1),
)
def test_a_launch_repeated_is_a_step(words: dict, gpu) -> None:
    """What a graph replays, launches with the arguments of one step: with lr moved in its tensor, the eager run."""
    made = dict(lr=torch.tensor(0.01, dtype=F64), momentum=0.9, capturable=True, backend="triton", **words)
    eager, params = network(), network()
    if "rounding" in words:
        eager, params = ([nn.Parameter(p.detach().to(BF16)) for p in own] for own in (eager, params))
    expected, optimizer = RMSprop(eager, **made), RMSprop(params, **made)
    for own, one in ((eager, expected), (params, optimizer)):
        for p in own:
            p.grad = torch.ones_like(p)
        one.step()
    with kept(gpu) as graph:
        optimizer.step()
    assert [launch.kernel.name for launch in graph][-1] == "advance"
    for t in range(1, 6):
        for own, one in ((eager, expected), (params, optimizer)):
            draw = torch.Generator().manual_seed(t)
            for p in own:
                p.grad.copy_(torch.randn(p.shape, generator=draw))
            one.param_groups[0]["lr"].fill_(0.01 / t)
        expected.step()
        for launch in graph:
            launch.run()
        assert same(held(eager, expected), held(params, optimizer)), t
    assert all(float(optimizer.state[p]["step"]) == 6 for p in params)


@pytest.mark.long
@pytest.mark.parametrize("rule", [Rule(), replace(FULL, bias_correction=False), FULL], ids=str)
def test_scaled_gradients_and_overflows(rule: Rule, gpu) -> None:
    """A loss scale on the device is divided out; where found_inf is not 0, nothing is written and no step counted."""
    hyper = replace(FULL_HYPER, momentum=FULL_HYPER.momentum * rule.momentum)
    before = tensors(rule, (F32, F32), (7, 5000), seed=6)
    before.capturable = True
    expected = stepped(gpu, rule, hyper, before)
    scaled = again(before)
    for g in scaled.grad:
        g *= 1024
    scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    skipped = again(scaled)
    skipped.grad_scale, skipped.found_inf = scaled.grad_scale, torch.tensor(2.0)
    untouched = again(skipped)
    triton.step(rule, hyper, scaled)
    triton.step(rule, hyper, skipped)
    for g in scaled.grad:
        g /= 1024
    assert identical(scaled, expected)
    assert identical(skipped, untouched)


MISTAKES = (
    ("div.rn.f32", "mul.rn.f32"),
    ("sqrt.rn.f32", "abs.f32"),
    ("fma.rn.f32", "mad.rn.f32"),  # two roundings
    ("cvt.rn.f32.f64", "cvt.rn.f32.f32"),  # the lower half of a number
    ("add.rn.f32", "sub.rn.f32"),
    ("st.global.v4.b32", "ld.global.v4.b32"),
)


@pytest.mark.parametrize(("right", "wrong"), mostly_long([("", ""), *MISTAKES], lambda i, _: i < 2, unpack=True))
def test_each_mistake_of_a_compiler_is_caught(right: str, wrong: str, gpu) -> None:
    """Another instruction in the place of one gives other bits than the CPU kernel's; none gives the same."""
    before = tensors(Rule(), (F32, F32), (triton.BLOCK + 5,), seed=7)
    hyper = Hyper(0.03, 0.9, 1e-3)
    bucket = copied(before)
    with kept(gpu) as launches:
        triton.step(Rule(), hyper, bucket)
    (launch,) = launches
    kernel = copy(launch.kernel)
    assert right in kernel.ptx
    if right:
        kernel.ptx = kernel.ptx.replace(right, wrong)
        if right.startswith("st"):
            kernel.ptx = re.sub(r"(ld\.global\.v4\.b32) (\[[^]]*\]), (\{[^}]*\})", r"\1 \3, \2", kernel.ptx)
    replace(launch, kernel=kernel).run()
    assert identical(bucket, cpus(Rule(), hyper, before)) is (not right)


def test_an_unknown_instruction_is_an_error() -> None:
    """Nothing is skipped for want of a meaning."""
    ptx = ".entry f(\n.param .u64 f_param_0\n)\n{\n\tlg2.approx.f32 %r1, %r2;\n\tret;\n}\n"
    with pytest.raises(NotImplementedError, match=r"lg2\.approx\.f32 %r1, %r2"):
        translate(ptx)
