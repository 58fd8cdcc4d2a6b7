"""Clipping of gradients inside the Triton kernel's step, on CPU tensors under Triton's interpreter."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, SCHEDULE, Case, as64, errors, mostly_long, state64, within
from interpreted import BLOCK, interpreted_fixtures, mistake_tests
from test_cpu_clipping import BUDGET, CLIPS, DTYPES, clipped64, within_bounds
from torch import Tensor, nn

from rmsprop import RMSprop, reference
from rmsprop.kernels import native, triton, triton_clipping
from rmsprop.kernels.triton_plan import DevicePlan
from rmsprop.step import Stepper
from rmsprop.tensors import clipping

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

SIZES = ((7,), (9, 3), (3 * BLOCK + 5,), (0,), ())


module, _in_place = interpreted_fixtures()


def run(backend: str, dtype: torch.dtype, clips: dict[str, Any], steps: int = 4, **settings: Any) -> list[Tensor]:
    """Parameters, state and norms of a run in which lr and gradients move."""
    draw = torch.Generator().manual_seed(5)
    params = [nn.Parameter(torch.randn(size, generator=draw, dtype=torch.float64).to(dtype)) for size in SIZES]
    optimizer = RMSprop(params, backend=backend, **{"momentum": 0.9, "weight_decay": 0.1, **settings}, **clips)
    norms = []
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (t + 1)
        for p in params:
            p.grad = (torch.randn(p.shape, generator=draw, dtype=torch.float64) * 10.0 ** (t % 3 - 1)).to(dtype)
        kept = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(map(torch.equal, kept, (p.grad for p in params))), "the step edited a gradient"
        if clips.get("clip_global_norm") is not None:
            norms.append(torch.as_tensor(optimizer.grad_norm, dtype=torch.float64))
    return [p.detach() for p in params] + [x for p in params for x in optimizer.state[p].values()] + norms


@pytest.mark.parametrize(
    ("i", "dtype"),
    mostly_long(itertools.product(range(len(CLIPS)), DTYPES), lambda i, _: i % 9 == 0, unpack=True),
    ids=str,
)
def test_a_clipped_run_is_the_cpu_kernels(i: int, dtype: torch.dtype) -> None:
    """Every pair of bounds and orders, planned: the CPU kernel's bits, which sums a float64 norm in another order."""
    words = [{}, {"centered": True}, {"maximize": True, "max_update": 2.0}, {"weight_decay_mode": "decoupled"}][i % 4]
    same = [run(backend, dtype, CLIPS[i], **words) for backend in ("triton", "cpu")]
    exact = CLIPS[i]["clip_norm"] is None and CLIPS[i]["clip_global_norm"] is None
    for mine, other in zip(*same, strict=True):
        slack = 0.0 if exact or mine.dtype != torch.float64 else 1e-12
        assert torch.allclose(mine, other, rtol=slack, atol=slack / 1e3)


@pytest.mark.parametrize(
    ("i", "dtype"),
    mostly_long(itertools.product(range(len(CASES)), DTYPES), lambda i, _: i % 23 == 0, unpack=True),
    ids=str,
)
def test_a_clipped_step_is_the_references(i: int, dtype: torch.dtype) -> None:
    """Of gradients that float64 NumPy has clipped, dealt over the rules, with lr moving."""
    case, clips = CASES[i], CLIPS[i % len(CLIPS)]
    draw = torch.Generator().manual_seed(i)
    params = [nn.Parameter(torch.randn(size, generator=draw, dtype=torch.float64).to(dtype)) for size in SIZES]
    optimizer = RMSprop(params, backend="triton", **case.settings(), **clips)
    for t, lr in enumerate(SCHEDULE[1:3], 1):
        optimizer.param_groups[0]["lr"] = lr
        for p in params:
            p.grad = (torch.randn(p.shape, generator=draw, dtype=torch.float64) * 10.0 ** (t % 3 - 1)).to(dtype)
            if clips["clip_after_decay"]:
                p.grad = p.grad.abs() * p.detach().sign() * (-1 if case.rule.maximize else 1)
        states = [
            state64(optimizer.state[p]) if optimizer.state[p] else reference.start(case.rule, as64(p)) for p in params
        ]
        before, grads = [as64(p) for p in params], [as64(p.grad) for p in params]
        optimizer.step()
        left, grads, together = clipped64(Case(case.rule, replace(case.hyper, lr=lr)), clips, before, grads)
        for p, p0, g, state in zip(params, before, grads, states, strict=True):
            if not p0.size:
                continue
            expected = reference.step(left.rule, left.hyper, p0, g, state)[0]
            moved = within_bounds(p, expected, clips["clip_weights"])
            found = errors(left, (p0, state), g, (moved, optimizer.state[p]))
            within(found, BUDGET if dtype != torch.float64 else {**BUDGET, "square_avg": 12.0})
        if clips["clip_global_norm"] is not None:
            assert isinstance(optimizer.grad_norm, Tensor)
            assert float(optimizer.grad_norm) == pytest.approx(together, rel=2e-7)


def test_one_norm_of_several_groups_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a plan from the second step on, and without a new gradient; one group is neither counted nor clipped."""
    monkeypatch.setattr(clipping, "clip", None)
    taken: list[int] = []
    take = Stepper._take
    monkeypatch.setattr(Stepper, "_take", lambda *args: taken.append(1) or take(*args))
    kinds = (torch.float64, torch.float32, torch.bfloat16)
    runs = []
    for backend in ("triton", "cpu"):
        params = [nn.Parameter(torch.ones(50, dtype=dtype)) for dtype in kinds for _ in range(2)]
        other = nn.Parameter(torch.ones(3))
        groups = [{"params": params[:3], "clip_norm": 20.0}, {"params": params[3:], "clip_global_norm": 0.7}]
        free = {"params": [other], "clip_global_norm": None, "clip_value": 0.5}
        optimizer = RMSprop([*groups, free], lr=0.01, clip_global_norm=0.5, backend=backend)
        for t in range(4):
            for p in (*params, other):
                p.grad = torch.full_like(p, 3.0 + t)
            if t == 2:
                params[4].grad = None
            optimizer.step()
        norm = optimizer.grad_norm
        runs.append([p.detach() for p in (*params, other)] + [torch.as_tensor(norm, dtype=torch.float64)])
    assert all(torch.allclose(a, b, rtol=1e-14, atol=0) for a, b in zip(*runs, strict=True))
    assert len(taken) == 2, "the first step of either"
    assert float(norm) == pytest.approx(math.sqrt(6 * 50 * 36 - 3 * (50 * 36 - 400)), rel=1e-14)


@pytest.mark.parametrize("planned", [True, False])
def test_a_loss_scale_and_skips(planned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale enters the norm. Where found_inf is not 0, nothing is written, and the last norm stays."""
    if not planned:
        monkeypatch.setattr(Stepper, "_make_plan", lambda *_: None)
    runs = []
    for scale in (1024.0, None):
        params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 2 * BLOCK + 1)]
        words = dict(lr=0.01, clip_global_norm=0.5, clip_norm=0.4, momentum=0.9, capturable=True)
        optimizer = RMSprop(params, backend="triton", amp_in_step=scale is not None, **words)
        for t in range(5):
            if t == 3 and scale is None:
                continue
            for p in params:
                p.grad = torch.cos(p.detach() * (t + 1)) * (scale or 1.0)
            if scale is not None:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(t == 3))
            norm = optimizer.grad_norm
            optimizer.step()
            if t == 3:
                assert torch.equal(optimizer.grad_norm, norm)
        runs.append(
            [p.detach() for p in params] + [optimizer.state[p]["step"] for p in params] + [optimizer.grad_norm]
        )
        assert isinstance(optimizer._stepper.plan, DevicePlan) is planned
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("bound", ["clip_norm", "clip_global_norm"])
@pytest.mark.parametrize("value", [1e-310, 1e-170, 3e170, 4e300, math.inf, math.nan, 0.0])
def test_norms_hold_whatever_a_gradient_holds(value: float, bound: str) -> None:
    """Squares that overflow or vanish, infinity and NaN, as on the CPU."""
    runs = []
    for backend in ("triton", "cpu"):
        params = [nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (BLOCK + 3, 2)]
        optimizer = RMSprop(params, lr=0.01, backend=backend, **{bound: 1e-200 if value < 1e-100 else 0.5})
        for _ in range(2):
            for p in params:
                p.grad = torch.full_like(p, value)
            optimizer.step()
        found = [] if bound == "clip_norm" else [torch.as_tensor(optimizer.grad_norm, dtype=torch.float64)]
        runs.append([p.detach() for p in params] + [optimizer.state[p]["square_avg"] for p in params] + found)
    assert all(torch.allclose(a, b, rtol=1e-13, atol=0, equal_nan=True) for a, b in zip(*runs, strict=True))


def test_a_gradient_that_is_not_finite_raises_before_anything_is_written() -> None:
    """nonfinite="raise" beside norms, planned."""
    params = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = RMSprop(params, lr=0.01, clip_global_norm=0.5, nonfinite="raise", backend="triton")
    for value in (1.0, 1.0, math.inf):
        for p in params:
            p.grad = torch.ones_like(p)
        params[1].grad[-1] = value
        before = [p.detach().clone() for p in params]
        if value == math.inf:
            with pytest.raises(RuntimeError, match="NaN or infinity"):
                optimizer.step()
            assert all(map(torch.equal, params, before))
        else:
            optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(math.sqrt(8))


def test_norms_need_few_numbers() -> None:
    """Three for each block, and three for each tensor."""
    group = {**triton_clipping.UNCLIPPED, "clip_norm": 1.0, "clip_global_norm": 1.0}
    table = triton.Table((10 * BLOCK, 1), torch.device("cpu"))
    held = triton_clipping.Clipping([group], [table])
    made = [*held._sums, held.bounds[0].coefficients, held._together, held.total]
    assert sum(x.numel() for x in made) == 3 * 11 + 3 * 2 + 1


MISTAKES = [
    ("a sum lost", "plain, down, up = plain + a, down + b, up + c", "plain, down, up = a, b, c"),
    ("the scale not in the norm", ".to(tl.float64)\n    offset", ".to(tl.float64) * 2\n    offset"),
    ("a norm for its square", "norm = tl.sqrt(_sum(plain))", "norm = _sum(plain)"),
    ("the tensor's bound not in the global norm", "tl.where(norm > clip_norm, clip_norm, norm)", "norm"),
    ("the first factor lost", "more = tl.where(factor == 1, left, held * left)", "more = left"),
    ("within the bound, scaled", "beyond = (norm > limit) | (norm != norm)", "beyond = norm == norm"),
    ("clip_value ignored", "return _within(g, tl.cast(value, arithmetic))", "return g"),
    (
        "clip_value_last ignored",
        "tl.cast(rest, arithmetic), tl.cast(last, arithmetic))",
        "tl.cast(rest, arithmetic), 1e30)",
    ),
    ("factors of another tensor", "tl.load(coefficients + 2 * owner)", "tl.load(coefficients)"),
    ("[1] before clipping without p", "g = _fused(tl.cast(early, arithmetic), p, g)", "g = g"),
    ("the norm not kept in a skip", "live = live & (tl.load(found_inf) == 0)\n    tl.store(total", "tl.store(total"),
]


def _check() -> None:
    """Assert that a few runs beside the CPU kernel, and one with a loss scale, are right."""
    both = {"clip_norm": 0.9, "clip_global_norm": 1.0}
    for clips in (
        both,
        {"clip_value": 0.4, "clip_after_decay": True, "clip_norm": 0.9},
        {**both, "clip_value": 0.1, "clip_value_last": True},
    ):
        same = [run(backend, torch.float32, clips, steps=2) for backend in ("triton", "cpu")]
        assert all(torch.allclose(a, b, rtol=1e-14, atol=0) for a, b in zip(*same, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        test_a_loss_scale_and_skips(True, patch)


test_the_kernel_as_it_stands_is_not_caught, test_each_mistake_is_caught = mistake_tests(
    MISTAKES, _check, quick=lambda i, _: i in (0, 3, 8)
)
