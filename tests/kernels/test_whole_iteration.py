"""Rule, clipping, guard and average of the weights together: every combination is the reference's, on every backend.

`make test` takes a sample of the rows that hold every pair of rule, clipping, guard and average, and `make test-long`
a larger one. Run as a script, this module steps the whole product and prints the largest errors:
PYTHONPATH=tests/tools python tests/kernels/test_whole_iteration.py cpu eager
"""

import itertools
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import TABLE, Case, as64, covering, errors, spacing, state64
from interpreted import interpreter, kernel_module
from test_cpu_clipping import BUDGET, CLIPS, within_bounds
from torch import nn

from rmsprop import RMSprop, reference
from rmsprop.kernels import native
from rmsprop.spec import AVERAGING, NONFINITE, Averaging

SIZES = ((7,), (3, 2), (40,))
UNCLIPPED = dict.fromkeys(("clip_value", "clip_norm", "clip_global_norm", "clip_weights")) | {
    "clip_after_decay": False,
    "clip_value_last": False,
}
AVERAGES: tuple[dict[str, Any], ...] = (
    {},
    {"ema": 0.9},
    {"ema": 0.8, "ema_interval": 2, "ema_start": 1},
    {"ema": 0.999, "ema_warmup": "tensorflow"},
    {"ema": 0.99, "ema_warmup": "timm"},
)
ALL = (range(len(TABLE)), (UNCLIPPED, *CLIPS), NONFINITE, AVERAGES)

# lr of each step; the third meets a gradient with a NaN.
RATES = (0.01, 0.004, 0.02, 0.01)

# In units in the last place of float32: the bounds of a clipped step. The average is judged from the parameter as
# it is stored, so that it has one rounding of its own, and torch's lerp another.
LARGEST = {**BUDGET, "square_avg": 7.0, "momentum_buffer": 7.0, "param": 6.0, "ema": 1.5}


def clipped(
    case: Case, clips: Mapping[str, Any], params: list[np.ndarray], grads: list[np.ndarray]
) -> tuple[Case, list[np.ndarray]]:
    """Clip in float64, NaN included; return the case without the lines of [1] that came first, and the gradients."""
    if clips["clip_after_decay"] and case.rule.weight_decay_mode == "l2":
        sign = -1 if case.rule.maximize else 1
        grads = [sign * g + case.hyper.weight_decay * p for g, p in zip(grads, params, strict=True)]
        case = Case(replace(case.rule, maximize=False), replace(case.hyper, weight_decay=0.0))
    value, last = clips["clip_value"] or np.inf, clips["clip_value_last"]
    with np.errstate(invalid="ignore"):
        grads = grads if last else [g.clip(-value, value) for g in grads]
        if clips["clip_norm"] is not None:
            grads = [g * (clips["clip_norm"] / np.maximum(np.linalg.norm(g), clips["clip_norm"])) for g in grads]
        if clips["clip_global_norm"] is not None:
            norm = np.sqrt(sum((g * g).sum() for g in grads))
            grads = [g * (clips["clip_global_norm"] / np.maximum(norm, clips["clip_global_norm"])) for g in grads]
        return case, [g.clip(-value, value) for g in grads] if last else grads


def largest_errors(
    backend: str, case: Case, clips: Mapping[str, Any], nonfinite: str, average: Mapping[str, Any], seed: int
) -> dict[str, float]:
    """Run a few steps, and return the largest error of each result, in units in the last place.

    Raises: AssertionError if a gradient is edited, NaN are elsewhere than in the reference, or a stopped step leaves
        a trace.
    """
    draw = np.random.default_rng(seed)
    params = [nn.Parameter(torch.from_numpy(draw.normal(size=size)).float()) for size in SIZES]
    optimizer = RMSprop(params, backend=backend, nonfinite=nonfinite, **case.settings(), **clips, **average)
    averaging = Averaging.of({**AVERAGING, **average})
    found: dict[str, float] = {}
    for t, lr in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = lr
        for p in params:
            g = draw.normal(size=p.shape) * 10.0 ** (t % 3 - 1)
            if clips["clip_after_decay"]:  # a decay that cancels the gradient would multiply its roundings
                g = np.abs(g) * np.sign(as64(p)) * (-1 if case.rule.maximize else 1)
            p.grad = torch.from_numpy(g).float()
        if t == 2:
            params[1].grad[0, 1] = torch.nan
        grads = [p.grad.clone() for p in params]
        before = [as64(p) for p in params]
        states = [
            state64(optimizer.state[p]) if optimizer.state[p] else reference.start(case.rule, x)
            for p, x in zip(params, before, strict=True)
        ]
        stopped = t == 2 and nonfinite != "propagate"
        guarded = (
            pytest.raises(RuntimeError, match="parameter 1") if stopped and nonfinite == "raise" else nullcontext()
        )
        with guarded:
            optimizer.step()
        assert all(torch.equal(p.grad.nan_to_num(), g.nan_to_num()) for p, g in zip(params, grads, strict=True))
        if stopped:
            for p, x, state in zip(params, before, states, strict=True):
                after = state64(optimizer.state[p])
                assert np.array_equal(as64(p), x), "a stopped step moved a parameter"
                assert all(np.array_equal(after[name], state[name]) for name in after), "a stopped step moved state"
            continue
        now, bounded = clipped(
            Case(case.rule, replace(case.hyper, lr=lr)), clips, before, [g.double().numpy() for g in grads]
        )
        for p, x, g, state in zip(params, before, bounded, states, strict=True):
            own = optimizer.state[p]
            old = state.pop("ema", x)
            moved = reference.step(now.rule, now.hyper, x, g, state)[0]
            held = within_bounds(p, moved, clips["clip_weights"])
            errors_now = errors(now, (x, state), g, (held, {k: v for k, v in own.items() if k != "ema"}))
            if averaging is not None:
                wanted = reference.average(averaging.decay_at(int(own["step"])), as64(p), old)
                unit = spacing(np.maximum(np.abs(old), np.abs(as64(p))), torch.float32)
                off = np.abs(as64(own["ema"]) - wanted) / unit
                assert np.array_equal(np.isnan(as64(own["ema"])), np.isnan(wanted))
                errors_now["ema"] = float(np.nanmax(off, initial=0.0))
            found = {name: max(found.get(name, 0.0), error) for name, error in errors_now.items()}
    return found


def check(backend: str, row: tuple[int, Mapping[str, Any], str, Mapping[str, Any]]) -> None:
    """Assert that a run of the product is within the bounds."""
    i, *others = row
    found = largest_errors(backend, TABLE[i], *others, seed=i)
    beyond = {name: error for name, error in found.items() if not error <= LARGEST[name]}
    assert not beyond, f"{TABLE[i]} with {others}: {beyond} units in the last place, allowed {LARGEST}"


COVERED = covering(*ALL)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("part", [0, *(pytest.param(k, marks=pytest.mark.long) for k in range(1, 8))])
def test_the_whole_iteration_is_the_references(backend: str, part: int) -> None:
    """Every element of every result; a step that the guard stops leaves the state and the average alone too."""
    if backend == "cpu" and native.missing() is not None:
        pytest.skip(str(native.missing()))
    for row in COVERED[part::32]:
        check(backend, row)


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.long)])
def test_the_whole_iteration_on_triton(part: int) -> None:
    """The same in the Triton kernel, under its interpreter."""
    if native.missing() is not None:
        pytest.skip(str(native.missing()))
    with interpreter(kernel_module()):
        for row in COVERED[7 * part :: 336 // (1 + 3 * part)]:
            check("triton", row)


def main(backends: list[str]) -> None:
    """Step the whole product and print the largest errors."""
    for backend in backends:
        worst: dict[str, float] = {}
        runs = 0
        for i, *others in itertools.product(*ALL):
            found = largest_errors(backend, TABLE[i], *others, seed=i)
            worst = {name: max(worst.get(name, 0.0), error) for name, error in found.items()} | {
                name: error for name, error in worst.items() if name not in found
            }
            runs += 1
        print(backend, runs, {name: round(error, 3) for name, error in worst.items()}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["cpu", "eager"])
