"""The engine of the live page equals the reference, and torch's optimizers, in a real browser."""

import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from cases import mostly_long
from engine_table import ENGINE, UNPACK, differing, expected, odd_powers, packed, unpacked

from rmsprop.race.page import CASES

FEW = 320
"""The part of the table that `make test` runs."""


@pytest.fixture(scope="module")
def blank(browser: Any) -> Any:
    """An empty page."""
    return browser.new_page()


@pytest.mark.parametrize("count", [FEW, pytest.param(CASES, marks=pytest.mark.long)])
def test_engine_equals_the_reference_bit_for_bit(blank: Any, count: int) -> None:
    """Every weight and slot after every step has the reference's bits, over every pair of switches and special
    values. The page states the number of settings."""
    assert differing(blank, count) == []


def test_the_table_is_not_idle() -> None:
    """Most parameters stay finite, some do not, and at most one power of the C library's is not rounded correctly."""
    finite = int(np.isfinite(expected(FEW)[:, :, 0]).all(axis=(1, 2)).sum())
    assert 0.7 * FEW < finite < FEW
    assert len(odd_powers(FEW)) <= 1
    for (alpha, t), value in odd_powers(FEW).items():
        assert abs(value - float(Fraction(alpha) ** t)) <= math.ulp(value)


MISTAKES = [
    ("eps outside becomes inside", "d = Math.sqrt(w) + eps", "d = Math.sqrt(w + eps)"),
    ("eps inside becomes outside", "d = Math.sqrt(w + eps);", "d = Math.sqrt(w) + eps;"),
    ("eps left out of the root", "Math.sqrt(w + eps) + eps", "Math.sqrt(w) + eps"),
    ("the floor adds", "Math.max(Math.sqrt(w), eps)", "Math.sqrt(w) + eps"),
    ("lr outside the buffer", "u = lr * u", "u = 1 * u"),
    ("lr twice", "rule.lr_in_buffer ? u : lr * u", "rule.lr_in_buffer ? lr * u : lr * u"),
    ("alpha for 1 - alpha", "(1 - alpha) * grad * grad", "alpha * grad * grad"),
    ("the square first", "(1 - alpha) * grad * grad", "(1 - alpha) * (grad * grad)"),
    ("decay without lr", ": lr * wd", ": wd"),
    ("corrected decay without the square", "((lr * lr) / hyper.reference_lr)", "(lr / hyper.reference_lr)"),
    ("the sign of -0", "(Math.sign(x) + 0)", "Math.sign(x)"),
    ("v starts at 0", "state.square_avg.fill(rule.square_avg_init ?? 0);", ""),
    ("v grows without a bound", "if (spike) v = most", ""),
    ("a spike enters the mean", "spike ? (grad < 0", "false ? (grad < 0"),
    ("not centered", "Math.max(vh - mh * mh, 0)", "vh"),
    ("a negative variance", "Math.max(vh - mh * mh, 0)", "vh - mh * mh"),
    ("bias from the old step", "api.power(alpha, t)", "api.power(alpha, t - 1)"),
    ("0/0 is NaN", "grad === 0 && d === 0 ? 0 : grad / d", "grad / d"),
    ("no Nesterov", "rule.nesterov ? u + mu * b : b", "b"),
    ("descent for ascent", "grad = -grad", "grad = grad"),
    ("weights not bounded", "if (hyper.clip_weights != null)", "if (false)"),
    ("steps not bounded", "if (bounded) u = clip", "if (false) u = clip"),
    ("the average by one step late", "(1 - decay) * x", "(1 - decay) * (x + moved)"),
    ("the average's warm-up", "(1 + k) / (10 + k)", "(1 + k) / (9 + k)"),
]


@pytest.mark.parametrize(
    ("name", "says", "instead"),
    mostly_long(MISTAKES, lambda _, row: row[0].startswith("eps outside"), unpack=True),
)
def test_each_mistake_is_caught(blank: Any, name: str, says: str, instead: str) -> None:
    """An engine with one mistake in its text differs somewhere in the table."""
    assert says in ENGINE, f"{name}: the engine no longer says {says!r}; restate the mistake"
    assert differing(blank, FEW, ENGINE.replace(says, instead))


@pytest.mark.parametrize("count", [200, pytest.param(20_000, marks=pytest.mark.long)])
def test_powers_are_correctly_rounded(blank: Any, count: int) -> None:
    """`power` returns the double that is nearest to alphaᵗ, by rational arithmetic."""
    draw = np.random.default_rng(5)
    alphas = np.concatenate([draw.uniform(0, 1, count // 2), 1 - 10.0 ** draw.uniform(-9, 0, count - count // 2)])
    # powers below 1e-290 are beyond the pairs' digits, and 1 - power is 1
    times = [int(draw.integers(1, max(2, min(3000, -660 / math.log(a) if a > 0 else 2)))) for a in alphas]
    run = f"(text) => {{ {ENGINE} return JSON.parse(text).map(([a, t]) => engine.power(a, t)); }}"
    found = blank.evaluate(run, json.dumps(list(zip(map(float, alphas), times, strict=True))))
    assert found == [float(Fraction(float(a)) ** t) for a, t in zip(alphas, times, strict=True)]


TORCH = """
import base64, sys
import numpy as np
import torch
gradients = np.frombuffer(base64.b64decode(sys.stdin.read()), dtype=np.float64).reshape(RUNS, STEPS, 2)
made = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.013),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.013, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.013),
}
paths = []
for make in made.values():
    for run in gradients:
        p = torch.nn.Parameter(torch.tensor([-4.0, 1.0], dtype=torch.float64))
        optimizer = make([p])
        for g in run:
            p.grad = torch.tensor(g)
            optimizer.step()
            paths.append(p.detach().numpy().copy())
print(base64.b64encode(np.stack(paths).tobytes()).decode())
"""


@pytest.mark.long
def test_other_optimizers_have_torchs_arithmetic(blank: Any) -> None:
    """SGD and momentum have the bits of torch's without fused multiply-adds; Adam is within 4 units of the largest
    number in a sum, since torch's vectorized root may be one unit off."""
    runs, steps = 1000, 25
    draw = np.random.default_rng(2)
    gradients = draw.normal(size=(runs, steps, 2)) * 10.0 ** draw.integers(-3, 4, (runs, steps, 2))
    script = TORCH.replace("RUNS", str(runs)).replace("STEPS", str(steps))
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=packed(gradients),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
    )
    wanted = unpacked(done.stdout, 3, runs, steps, 2)
    run = """(text) => { ENGINE UNPACK
      const g = unpack(text), out = [];
      const lr = 0.013;
      for (const [way, hyper] of [["sgd", { lr }], ["sgd", { lr, momentum: 0.9 }], ["adam", { lr }]])
        for (let k = 0; k < g.length; k += 2 * STEPS) {
          const p = new Float64Array([-4, 1]), state = engine[way].start(hyper, p);
          for (let t = 0; t < STEPS; t++) {
            engine[way].step(hyper, p, g.subarray(k + 2 * t, k + 2 * t + 2), state);
            out.push(...p);
          }
        }
      return pack(out); }"""
    run = run.replace("ENGINE", ENGINE).replace("UNPACK", UNPACK).replace("STEPS", str(steps))
    found = unpacked(blank.evaluate(run, packed(gradients)), 3, runs, steps, 2)
    assert (found[:2].view(np.int64) == wanted[:2].view(np.int64)).all()
    largest = np.maximum.accumulate(abs(wanted[2]), axis=1)
    assert (abs(found[2] - wanted[2]) <= 4 * np.spacing(largest)).all()
