"""Bounds of the parameters and averages of the weights in the Triton kernel, under Triton's interpreter."""

from dataclasses import replace
from itertools import product
from types import ModuleType

import pytest
import torch
from cases import as64, mostly_long, spacing
from cpu_parity import BF16, COVERING, F16, F32, F64, TYPES, tensors
from halves import rounded_as
from interpreted import BLOCK, interpreted_fixtures, mistake_tests
from narrowed import again, identical
from torch import Tensor, nn

from rmsprop import RMSprop, reference
from rmsprop.kernels import cpu, native, triton
from rmsprop.kernels.triton_plan import DevicePlan
from rmsprop.spec import Averaging, Hyper, Rule
from rmsprop.step import Stepper
from rmsprop.tensors.bucket import Bucket

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

SIZES = (0, 9, 2 * BLOCK + 3)
WALL = 0.7
FULL = Rule(centered=True, momentum=True, nesterov=True, bias_correction=True)
HYPER = Hyper(0.03, 0.9, 1e-3, 0.8, 0.05)
KINDS = (
    Averaging(0.9),
    Averaging(0.99, "tensorflow", 2),
    Averaging(0.3, "timm"),
    Averaging(0.9, None, 20),  # which copies at the tenth step
    Averaging(0.9, None, 0, 3),  # which leaves the tenth out
)
HOWS = {"nearest": (False, False), "stochastic": (True, False), "compensated": (False, True), "both": (True, True)}


module, _in_place = interpreted_fixtures()


def averaged(rule: Rule, types: tuple[torch.dtype, torch.dtype], how: str = "nearest", seed: int = 3) -> Bucket:
    """A bucket with averages near and far from the weights, which is rounded like that."""
    stochastic, compensated = HOWS[how]
    draw = torch.Generator().manual_seed(seed)
    bucket = tensors(rule, types, SIZES, seed)
    bucket = rounded_as(bucket, stochastic=stochastic, compensated=compensated, generator=draw)
    bucket.slots["ema"] = [
        (p.double() * (1 + torch.randn(p.shape, generator=draw, dtype=F64) / 8)).to(types[1]) for p in bucket.param
    ]
    return bucket


def both(rule: Rule, hyper: Hyper, before: Bucket) -> tuple[Bucket, Bucket]:
    """The step of this kernel, and of the CPU kernel."""
    here, there = again(before), again(before)
    triton.step(rule, hyper, here)
    cpu.step(rule, hyper, there)
    return here, there


@pytest.mark.parametrize("k", range(len(TYPES)), ids=[f"{p}-{s}".replace("torch.", "") for p, s in TYPES])
def test_the_bits_are_the_cpu_kernels(k: int) -> None:
    """Rules dealt out over the dtypes and kinds of averages; the average is the reference's."""
    types = TYPES[k]
    for i, (rule, hyper) in enumerate(COVERING[k % 5 :: 5]):
        kind = KINDS[(i + k) % len(KINDS)]
        before = averaged(rule, types)
        hyper = replace(hyper, clip_weights=WALL if i % 3 else None, average=kind)
        here, there = both(rule, hyper, before)
        assert identical(here, there), (rule, hyper)
        for p, e, old in zip(here.param, here.slots["ema"], before.slots["ema"], strict=True):
            expected = reference.average(kind.decay_at(10), as64(p), as64(old))
            unit = spacing(abs(as64(old)) + abs(as64(p)), F32 if types[0] != F64 and types[1] == F64 else types[1])
            assert (abs(as64(e) - expected) <= 1.5 * unit).all(), (rule, kind)
            assert hyper.clip_weights is None or (p.abs() <= torch.tensor(WALL, dtype=p.dtype)).all()


@pytest.mark.parametrize("how", list(HOWS)[1:])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_what_is_averaged_is_what_the_step_stored(dtype: torch.dtype, how: str) -> None:
    """Bounded random bits and remainders are the CPU kernel's; NaN and infinity too."""
    for i, hyper in enumerate((replace(HYPER, max_update=1.5), HYPER)):
        before = averaged(FULL, (dtype, (F32, dtype)[i]), how)
        for value, g, e in zip((float("nan"), float("inf")), before.grad[1:], before.slots["ema"][1:], strict=True):
            g[0], e[1] = value, value
        here, there = both(FULL, replace(hyper, clip_weights=WALL, average=KINDS[i]), before)
        assert identical(here, there)
        assert all((p.nan_to_num().abs() <= torch.tensor(WALL, dtype=dtype)).all() for p in here.param)


COUNTED = (*KINDS, Averaging(0.9999, "tensorflow", 11, 2))


@pytest.mark.parametrize(
    ("types", "clock", "kind"),
    mostly_long(
        product([(F32, F32), (F64, F64), (BF16, F32)], [F32, F64], COUNTED), lambda i, _: i % 7 == 0, unpack=True
    ),
)
def test_a_device_that_counts_averages_the_same(
    types: tuple, clock: torch.dtype, kind: Averaging, module: ModuleType
) -> None:
    """capturable=True: every block of a tensor reads the count of one launch before. found_inf skips all."""
    hyper = replace(HYPER, momentum=0.0, clip_weights=WALL, average=kind)
    here = averaged(Rule(), types)
    there = again(here)
    there.capturable = True
    there.slots["step"] = [t.to(clock) for t in there.slots["step"]]
    module.count_steps.grids.clear()
    for _ in range(4):
        triton.step(Rule(), hyper, here)
        triton.step(Rule(), hyper, there)
    assert len(module.count_steps.grids) == 4
    there.slots["step"] = [t.to(F32) for t in there.slots["step"]]
    if kind.warmup != "timm" or types[0] != F64:
        assert identical(here, there), kind
    for a, b in zip(here.slots["ema"], there.slots["ema"], strict=True):
        assert torch.allclose(a, b, rtol=1e-14, atol=1e-15), kind
    there.found_inf = torch.tensor(1.0)
    kept = again(there)
    triton.step(Rule(), hyper, there)
    assert identical(there, kept)


def trained(backend: str, **settings: object) -> tuple[list[Tensor], RMSprop]:
    """A run in which lr moves, gradients move in memory and one is missing; parameters and state at its end."""
    start = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=start)) for n in (5, BLOCK + 1, 3)]
    params.append(nn.Parameter(torch.randn(4, generator=start).to(BF16)))
    words = dict(ema=0.9, ema_warmup="tensorflow", ema_interval=2, ema_start=2, clip_weights=WALL, momentum=0.9)
    optimizer = RMSprop(params, backend=backend, **{**words, **settings})
    for t in range(8):
        optimizer.param_groups[0]["lr"] = 0.01 * (t + 1)
        for p in params:
            p.grad = torch.randn(p.shape, generator=start).to(p.dtype)
        if t == 3:
            params[1].grad = None
        optimizer.step()
    return [p.detach() for p in params] + [x for p in params for x in optimizer.state[p].values()], optimizer


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("planned", [True, False])
def test_a_run_is_the_cpu_kernels(capturable: bool, planned: bool, monkeypatch) -> None:
    """With and without a plan, counting here or there, bit for bit."""
    long_way = []
    taken = Stepper._take
    monkeypatch.setattr(Stepper, "_take", lambda *args: long_way.append(1) or taken(*args))
    if not planned:
        monkeypatch.setattr(Stepper, "_make_plan", lambda *_: None)
    expected, _ = trained("cpu")
    long_way.clear()
    got, optimizer = trained("triton", capturable=capturable)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert isinstance(optimizer._stepper.plan, DevicePlan) is planned
    assert len(long_way) == (1 if planned else 8)


def test_averages_and_bounds_move_with_a_schedule() -> None:
    """clip_weights and the decay may be moved in mid-run, as on the CPU."""

    def run(backend: str) -> list[Tensor]:
        p = nn.Parameter(torch.linspace(-1, 1, BLOCK + 3))
        optimizer = RMSprop([p], lr=0.1, ema=0.5, backend=backend)
        for wall, decay in ((None, 0.5), (0.8, 0.5), (0.5, 0.9), (None, 0.9)):
            optimizer.param_groups[0].update(clip_weights=wall, ema=decay)
            p.grad = p.detach() * 3
            optimizer.step()
        return [p.detach(), optimizer.state[p]["ema"]]

    assert all(map(torch.equal, run("triton"), run("cpu")))


MISTAKES = [
    ("parameters not bounded", "p = _within(p, wall.to(arithmetic))", "p = p"),
    ("bits not bounded", "_within(x, wall.to(arithmetic))", "x"),
    ("bounded before the remainder", "rest = (p -", "rest = (_within(p, wall.to(arithmetic)) -"),
    (
        "the share as the decay",
        "tl.where(share > 0.5, -(1 - share), share)",
        "tl.where(share > 0.5, -share, 1 - share)",
    ),
    ("from the farther", "near = tl.where(share > 0.5, p, e)", "near = tl.where(share > 0.5, e, p)"),
    ("infinity is NaN", "tl.where(apart - apart == 0, near, plain)", "near"),
    ("every step averages", "if share >= 0:", "if share >= -1:"),
    ("the average of what is not stored", "_widen(_as(near, param), param, arithmetic), share", "p, share"),
    ("the copy at the start forgotten", "tl.where(since <= 0, 1.0, ", "tl.where(since < 0, 1.0, "),
    ("the interval forgotten", "since == k * interval", "since >= k * interval"),
    ("TensorFlow's for timm's", "(1 + n) / (10 + n)", "1 - tl.exp(tl.log(n) * (-2 / 3))"),
    ("counted while it is read", " or stochastic or narrowed or averaged)", " or stochastic)"),
]


CASES = (
    ((BF16, F32), "both"),
    ((F16, F16), "stochastic"),
    ((F32, F32), "nearest"),
    ((BF16, BF16), "nearest"),
)


def _check() -> None:
    """Assert that steps beside the CPU kernel, and of a device that counts, are right."""
    for types, how in CASES:
        for kind in (KINDS[0], KINDS[4]):
            before = averaged(Rule(), types, how)
            before.slots["ema"][1][0] = float("inf")
            assert identical(*both(Rule(), replace(HYPER, clip_weights=0.7003, average=kind), before))
    for kind in (KINDS[2], COUNTED[-1]):
        test_a_device_that_counts_averages_the_same((F32, F32), F32, kind, triton.load())


test_the_kernel_as_it_stands_is_not_caught, test_each_mistake_is_caught = mistake_tests(
    MISTAKES, _check, quick=lambda i, _: i in (0, 8, 11), errors=(AssertionError, RuntimeError)
)
