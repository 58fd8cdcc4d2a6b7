"""The compiled kernel keeps averages in fewer bytes, with the reference's rounding of its own float32 averages."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from allocated import peak
from cases import mostly_long
from cpu_parity import BF16, BOUND, COVERING, F16, F32, F64, SIZES, copied, spiked, tensors, worst
from halves import rounded_as
from narrowed import STATES, again, check_narrowed, identical, in_float32, narrowed
from torch import Tensor

from rmsprop import RMSprop
from rmsprop.kernels import CPU, cpu, native
from rmsprop.kernels.eager import EAGER
from rmsprop.spec import NARROWED, Averaging, Hyper, Rule, StateDtype
from rmsprop.tensors.bucket import Bucket

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

FULL = Rule(centered=True, momentum=True, nesterov=True, bias_correction=True)
FULL_HYPER = Hyper(0.03, 0.9, 1e-3, 0.8, 0.05)
# dtype of the parameter, stochastic, compensated
WAYS = [(F32, False, False), *((dtype, *way) for dtype in (BF16, F16) for way in product((False, True), repeat=2))]
STATE = pytest.mark.parametrize("state_dtype", STATES)
FIFTH = pytest.mark.parametrize("fifth", mostly_long(range(5), lambda i, _: i == 0))
WAY = pytest.mark.parametrize(("dtype", "stochastic", "compensated"), WAYS)


def made(rule: Rule, state_dtype: StateDtype, dtype: torch.dtype, *way: bool, sizes: tuple = SIZES) -> Bucket:
    """A bucket in the middle of a run, to be rounded this way, whose averages cover every octave of float8."""
    generator = torch.Generator().manual_seed(6)
    bucket = tensors(rule, (dtype, F32), sizes, 3)
    for i, (g, v) in enumerate(zip(bucket.grad, bucket.slots["square_avg"], strict=True)):
        octaves = torch.randint(-54, 14, v.shape, generator=generator) if i % 2 else torch.zeros(v.shape)
        v.mul_(torch.exp2(octaves))
        g.mul_(torch.exp2(octaves / 2).to(dtype))
    if dtype != F32:
        bucket = rounded_as(bucket, stochastic=way[0], compensated=way[1], generator=generator)
    return narrowed(bucket, state_dtype)


def check_step(rule: Rule, hyper: Hyper, bucket: Bucket) -> None:
    """Assert that a step rounds the averages of the same step in float32 state, and changes nothing else in it."""
    before, wide = again(bucket), in_float32(bucket)
    cpu.step(rule, hyper, wide)
    cpu.step(rule, hyper, bucket)
    check_narrowed(bucket, wide, before)


@WAY
@STATE
@FIFTH
def test_the_state_is_the_references_rounding_of_every_rules_averages(
    fifth: int, state_dtype: StateDtype, dtype: torch.dtype, stochastic: bool, compensated: bool
) -> None:
    """Every rule, in vectors and in tails: the codes bit for bit, and the parameter of the unrounded averages."""
    for rule, hyper in COVERING[fifth::5]:
        check_step(rule, hyper, made(rule, state_dtype, dtype, stochastic, compensated))


@STATE
def test_the_averages_before_rounding_are_the_references(state_dtype: StateDtype) -> None:
    """The step whose averages are rounded is within the frozen bound of the reference, from the narrowed state on."""
    for rule, hyper in COVERING:
        wide = in_float32(narrowed(tensors(rule, (F32, F32), SIZES, 4), state_dtype))
        before = copied(wide)
        cpu.step(rule, hyper, wide)
        assert worst(rule, hyper, before, wide) <= BOUND[F32, F32], (rule, hyper)


@WAY
@STATE
@FIFTH
def test_clipped_and_averaged_steps_round_alike(
    fifth: int, state_dtype: StateDtype, dtype: torch.dtype, stochastic: bool, compensated: bool
) -> None:
    """max_update, clip_weights, every clipping of gradients, a loss scale, and the average of the weights on top."""
    group = {"clip_value": 0.9, "clip_norm": 3.0, "clip_global_norm": 2.0, "clip_value_last": False}
    rows = [*product((None, 1.5), (None, 0.75), (False, True), (False, True))]
    for max_update, walls, clip, on in rows[fifth::5]:
        rule = replace(FULL, centered=on, momentum=on, nesterov=on)
        average = Averaging(0.9, "tensorflow") if on else None
        momentum = 0.8 if on else 0.0
        hyper = Hyper(0.03, 0.9, 1e-3, momentum, 0.05, max_update=max_update, clip_weights=walls, average=average)
        spikes = spiked(rule, (dtype, F32), 1)
        if dtype != F32:
            generator = torch.Generator().manual_seed(6)
            spikes = rounded_as(spikes, stochastic=stochastic, compensated=compensated, generator=generator)
        bucket = narrowed(spikes, state_dtype)
        bucket.grad_scale = torch.tensor(4.0)
        if on:
            bucket.slots["ema"] = [p.float() * 0.7 for p in bucket.param]
        before, wide = again(bucket), in_float32(bucket)
        for own in (wide, bucket):
            if clip:
                cpu.clip_and_step([({**group, "clip_after_decay": not on}, rule, hyper, own)])
            else:
                cpu.step(rule, hyper, own)
        check_narrowed(bucket, wide, before)


SPECIAL = (0.0, -0.0, 1.0, 1e-30, 1e-12, 3e4, 1e19, 3e38, torch.inf, -torch.inf, torch.nan)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@STATE
def test_special_numbers_are_kept_as_the_reference_keeps_them(state_dtype: StateDtype, dtype: torch.dtype) -> None:
    """NaN, infinities, zeros, numbers outside the byte's range and every code, in vectors and in tails."""
    grad = torch.tensor(SPECIAL).repeat(256 // len(SPECIAL) + 1)[:256]
    lists = [grad, grad.flip(0), grad.roll(3)]
    for rule in (Rule(), Rule(centered=True, momentum=True)):
        hyper = Hyper(0.03, 0.9, 1e-3, 0.8 if rule.momentum else 0.0)
        bucket = narrowed(tensors(rule, (dtype, F32), (256, 256, 256), 3), state_dtype)
        bucket.grad = [g.to(dtype) for g in lists]
        for name in NARROWED:
            for k, x in enumerate(bucket.slots[name]):
                codes = torch.arange(256, dtype=torch.uint8).roll(k)
                x.copy_(codes if x.dtype == torch.uint8 else torch.tensor(SPECIAL).repeat(24)[k : 256 + k].abs())
        check_step(rule, hyper, bucket)


@STATE
def test_flushed_subnormals_change_no_code(state_dtype: StateDtype) -> None:
    """torch.set_flush_denormal changes nothing but what float32 itself cannot hold."""
    bucket = made(FULL, state_dtype, F32, False, False)
    plain, flushed = again(bucket), again(bucket)
    cpu.step(FULL, FULL_HYPER, plain)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        cpu.step(FULL, FULL_HYPER, flushed)
    finally:
        torch.set_flush_denormal(False)
    assert identical(plain, flushed)


@pytest.mark.parametrize("dtype", [F32, BF16])
@STATE
def test_the_number_of_threads_changes_no_bit(state_dtype: StateDtype, dtype: torch.dtype) -> None:
    """Bits belong to elements: one, two and three threads write the same codes."""
    bucket = made(FULL, state_dtype, dtype, True, False, sizes=(200_003,))
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            own = again(bucket)
            cpu.step(FULL, FULL_HYPER, own)
            found.append(own)
    finally:
        torch.set_num_threads(threads)
    assert identical(found[0], found[1])
    assert identical(found[0], found[2])


@pytest.mark.parametrize("by", [1, 3, 17, 63])
@STATE
def test_alignment_does_not_matter(state_dtype: StateDtype, by: int) -> None:
    """Codes that begin at any byte, and numbers at any even one, step to the same bits."""
    bucket = made(FULL, state_dtype, BF16, True, True)
    shifted = again(bucket)
    for name in NARROWED:
        for k, x in enumerate(shifted.slots[name]):
            shifted.slots[name][k] = torch.zeros(x.numel() + by, dtype=x.dtype)[by:].view(x.shape).copy_(x)
    cpu.step(FULL, FULL_HYPER, bucket)
    cpu.step(FULL, FULL_HYPER, shifted)
    assert identical(bucket, shifted)


@pytest.mark.parametrize(("dtype", "stochastic"), [(F32, False), (BF16, False), (BF16, True), (F16, True)])
@STATE
def test_the_compiled_kernel_and_torch_write_the_same_bytes(
    state_dtype: StateDtype, dtype: torch.dtype, stochastic: bool
) -> None:
    """Where float32 arithmetic is exact, three steps end in the same bits on both backends."""
    bucket = tensors(Rule(), (dtype, F32), SIZES, 7)
    if stochastic:
        bucket = rounded_as(bucket, stochastic=True, compensated=False, generator=torch.Generator().manual_seed(1))
    bucket = narrowed(bucket, state_dtype)
    for p, g in zip(bucket.param, bucket.grad, strict=True):
        p.clamp_(-1, 1)
        g.copy_(torch.where(g >= 0, 0.3, -0.7))
    one, other = bucket, again(bucket)
    hyper = Hyper(lr=2.0**-13, alpha=0.0, eps=0.0)  # u is ±1
    for _ in range(3):
        CPU.step(Rule(), hyper, one)
        EAGER.step(Rule(), hyper, other)
    assert identical(one, other)


def edited(bucket: Bucket, slot: str, dtype: torch.dtype) -> Bucket:
    """The bucket with one slot in another dtype."""
    made = again(bucket)
    made.slots[slot] = [x.to(dtype) for x in made.slots[slot]]
    return made


@pytest.mark.parametrize("plain", [True, False])
@STATE
def test_a_state_of_another_dtype_is_refused(
    state_dtype: StateDtype, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each slot in any other dtype, one tensor alone too, and bytes where the setting does not ask for them."""
    if not plain:
        monkeypatch.setattr("rmsprop.kernels.cpu.plain", lambda _: False)
    bucket = made(FULL, state_dtype, BF16, True, False)
    bucket.slots["ema"] = [p.float() for p in bucket.param]
    assert cpu.refuse(FULL, bucket) is None
    for slot in (*NARROWED, "ema"):
        own = bucket.slots[slot][0].dtype
        for dtype in {F32, F64, BF16, F16, torch.uint8, torch.int8} - {own}:
            assert cpu.refuse(FULL, edited(bucket, slot, dtype)) is not None, (slot, dtype)
        single = again(bucket)
        single.slots[slot][-1] = single.slots[slot][-1].to(F64)
        assert cpu.refuse(FULL, single) is not None, slot
    unasked = replace(again(bucket), state_dtype="float32")
    if state_dtype == "float8":
        assert "uint8" in str(cpu.refuse(FULL, unasked))
    assert "state" in str(cpu.refuse(FULL, replace(again(bucket), state_dtype=STATES[state_dtype == "bfloat16"])))


# --- the optimizer, its plan ------------------------------------------------------------------------


def trained(steps: int, planned: bool, **settings: object) -> tuple[RMSprop, list[Tensor]]:
    """An optimizer on three parameters after some steps, with its plan or without."""
    generator = torch.Generator().manual_seed(2)
    dtype = settings.pop("dtype", F32)
    params = [torch.randn(n, generator=generator).to(dtype).requires_grad_() for n in (5, 33, 40_000)]
    optimizer = RMSprop(params, backend="cpu", **settings)
    for t in range(steps):
        for k, p in enumerate(params):
            p.grad = None if (t, k) == (3, 1) else torch.randn(p.shape, generator=generator).to(p.dtype)
        if not planned:
            optimizer._stepper.plan = None
        optimizer.step()
    return optimizer, params


SETTINGS = [
    {},
    {"momentum": 0.9, "centered": True, "ema": 0.9},
    {"max_update": 1.5, "clip_weights": 0.5, "clip_global_norm": 1.0, "nonfinite": "skip"},
    {"dtype": BF16, "rounding": "stochastic", "compensation": True, "ema": 0.9},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "plain")
@STATE
def test_a_planned_run_is_the_full_steps(state_dtype: StateDtype, settings: dict) -> None:
    """The plan is made, kept and used, and every byte is that of steps without one."""
    fast, ours = trained(6, True, state_dtype=state_dtype, **settings)
    slow, theirs = trained(6, False, state_dtype=state_dtype, **settings)
    plan = fast._stepper.plan
    for optimizer, params in ((fast, ours), (slow, theirs)):
        if optimizer is slow:
            optimizer._stepper.plan = None
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert plan is not None
    assert fast._stepper.plan is plan
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        for name, x in fast.state[p].items():
            assert x.dtype == slow.state[q][name].dtype
            assert torch.equal(x, slow.state[q][name]), name


@pytest.mark.parametrize("slot", NARROWED)
@STATE
def test_a_plan_sees_a_slot_of_another_dtype(state_dtype: StateDtype, slot: str) -> None:
    """A slot that is replaced by one of another dtype is refused in words, and nothing is written."""
    for size in (5, 50_000):
        p = torch.randn(size).requires_grad_()
        optimizer = RMSprop([p], momentum=0.9, centered=True, state_dtype=state_dtype)
        p.grad = torch.ones(size)
        for _ in range(3):
            optimizer.step()
        assert optimizer._stepper.plan is not None
        for dtype in {F32, F16, BF16, torch.uint8, torch.int8} - {optimizer.state[p][slot].dtype}:
            kept, before = optimizer.state[p][slot], p.detach().clone()
            optimizer.state[p][slot] = kept.to(dtype)
            with pytest.raises(RuntimeError, match=slot):
                optimizer.step()
            assert torch.equal(p, before)
            optimizer.state[p][slot] = kept
        optimizer.step()


@STATE
def test_a_plan_sees_bytes_that_overlap(state_dtype: StateDtype) -> None:
    """A state that begins within another's last byte, or within the parameter, is not stepped in one pass."""
    bucket = made(Rule(momentum=True), state_dtype, F32, False, False, sizes=(64, 64))
    x = bucket.slots["square_avg"][0]
    both = torch.zeros(2 * x.numel() - 1, dtype=x.dtype)
    bucket.slots["square_avg"] = [both[:64], both[63:]]
    assert "overlap" in str(cpu.refuse(Rule(momentum=True), bucket))
    apart = torch.zeros(2 * x.numel(), dtype=x.dtype)
    bucket.slots["square_avg"] = [apart[:64], apart[64:]]
    assert cpu.refuse(Rule(momentum=True), bucket) is None


@STATE
def test_a_step_allocates_nothing_that_grows(state_dtype: StateDtype) -> None:
    """Memory that a step allocates does not grow with the parameters."""
    w = torch.nn.Parameter(torch.zeros(1 << 20))
    w.grad = torch.ones(1 << 20)
    optimizer = RMSprop([w], backend="cpu", momentum=0.9, centered=True, state_dtype=state_dtype)
    optimizer.step()
    optimizer.step()
    assert peak(optimizer.step) < 4096


def test_the_seed_of_the_state_is_the_settings() -> None:
    """Another seed gives other codes; the parameter's first step does not depend on it."""
    runs = [trained(1, True, state_dtype="float8", seed=seed) for seed in (0, 0, 1)]
    codes = [optimizer.state[params[2]]["square_avg"] for optimizer, params in runs]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[2][1], strict=True))
