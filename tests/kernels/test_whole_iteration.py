"""Rule, clipping, guard and average of the weights together: every combination is the reference's, on every backend.

`make test` takes a sample of the rows that hold every pair of rule, clipping, guard and average, and `make test-long`
a larger one. Run as a script, this module steps the whole product, 50,400 runs for each backend, and prints the
largest errors after every 5,000 runs and at the end:
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
from cases import TABLE, Case, as64, errors, mostly_long, spacing, state64
from test_cpu_clipping import BUDGET, CLIPS, clipped64, within_bounds
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
        now, bounded, _ = clipped64(
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


# Every pair of values of every two switches, in as few rows as possible: the product of the two longest switches.
COVERED = [
    (i, clips, NONFINITE[(i + j) % len(NONFINITE)], AVERAGES[(i + j) % len(AVERAGES)])
    for i in range(len(TABLE))
    for j, clips in enumerate((UNCLIPPED, *CLIPS))
]


# The strides are primes, so that a sample mixes the values of every switch.
@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("part", mostly_long(range(0, 97, 4), lambda part, _: part == 0))
def test_the_whole_iteration_is_the_references(backend: str, part: int) -> None:
    """Every element of every result; a step that the guard stops leaves the state and the average alone too."""
    if backend == "cpu" and native.missing() is not None:
        pytest.skip(str(native.missing()))
    for row in COVERED[part::97]:
        check(backend, row)


@pytest.mark.parametrize("stride", mostly_long([683, 83], lambda k, _: k == 0))
def test_the_whole_iteration_on_triton(stride: int) -> None:
    """The same in the Triton kernel, under its interpreter."""
    from interpreted import interpreter, kernel_module

    with interpreter(kernel_module()):
        for row in COVERED[::stride]:
            check("triton", row)


def main(backends: list[str]) -> None:
    """Step the whole product and print the largest errors."""
    for backend in backends:
        worst: dict[str, float] = {}
        for runs, (i, *others) in enumerate(itertools.product(*ALL), 1):
            for name, error in largest_errors(backend, TABLE[i], *others, seed=i).items():
                worst[name] = max(worst.get(name, 0.0), error)
            if runs % 5_000 == 0:
                print(backend, runs, {name: round(error, 3) for name, error in worst.items()}, flush=True)
        print(backend, runs, {name: round(error, 3) for name, error in worst.items()}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["cpu", "eager"])
