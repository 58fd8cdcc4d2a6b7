"""The table of settings on which the live page's engine must equal the reference bit for bit, and its comparison.

A case is a rule, its numbers, a learning rate for each step, a start and a gradient for each step. Numbers that JSON
cannot hold travel as the bytes of float64.
"""

import base64
import json
import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cases import covering

import rmsprop.race
from rmsprop import reference
from rmsprop.spec import EPS_MODES, WEIGHT_DECAY_MODES, Averaging, Hyper, Rule

ENGINE = (Path(rmsprop.race.__file__).parent / "engine.js").read_text(encoding="utf-8")
STEPS = 16
SLOTS = ("square_avg", "grad_avg", "momentum_buffer", "ema")
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, -1e-310, 1e-160, 1e160, 1.7e308)
ALPHAS = (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 0.999999)

_ROWS = covering(
    EPS_MODES,
    (0.0, 1.0, 1e-8),  # square_avg_init
    (False, True),  # centered
    ((False, False, False), (True, False, False), (True, False, True), (True, True, False), (True, True, True)),
    WEIGHT_DECAY_MODES,
    (0.0, 0.02),  # weight_decay
    (None, 0.3),  # reference_lr
    (False, True),  # bias_correction
    (False, True),  # maximize
    (None, 3.0),  # max_update
    (None, 0.5),  # clip_weights
    (None, Averaging(0.9), Averaging(0.99, "tensorflow", 3), Averaging(0.5, None, 2, 3)),
    ("plain", "tiny", "huge", "special"),  # gradients
)


@dataclass(frozen=True)
class EngineCase:
    """One rule with its numbers. Shapes: start (2,), gradients (STEPS, 2)."""

    rule: Rule
    hyper: Hyper
    lrs: tuple[float, ...]
    start: np.ndarray
    gradients: np.ndarray


@cache
def table(count: int) -> list[EngineCase]:
    """Return the first `count` cases, the same each time: drawn numbers in rows that cover all pairs of switches."""
    draw = np.random.default_rng(18)
    return [_case(_ROWS[k % len(_ROWS)], draw) for k in range(count)]


def _case(row: tuple[Any, ...], draw: np.random.Generator) -> EngineCase:
    (mode, v0, centered, moving, decay, wd, top, corrected, up, most, walls, mean, kind) = row
    momentum, nesterov, inside = moving
    rule = Rule(mode, v0, centered, momentum, nesterov, inside, decay, corrected, up)
    lr = float(10.0 ** draw.uniform(-4, 1))
    alpha = float(draw.choice(ALPHAS)) if draw.random() < 0.5 else float(draw.uniform(0, 1))
    eps = float(draw.choice([0.0, 1e-300, 1e-8, 1e-3, 1.0]))
    hyper = Hyper(lr, alpha, eps, float(draw.choice([0.5, 0.9, 0.99])), wd, top, most, walls, mean)
    size = {"plain": 3.0, "tiny": 160.0, "huge": 160.0, "special": 3.0}[kind]
    shift = {"plain": 0.0, "tiny": -160.0, "huge": 150.0, "special": 0.0}[kind]
    with np.errstate(all="ignore"):
        gradients = draw.normal(size=(STEPS, 2)) * 10.0 ** (shift + draw.uniform(-size, size, (STEPS, 2)))
    gradients[draw.random((STEPS, 2)) < 0.1] = 0.0
    start = draw.normal(size=2) * 10.0 ** draw.uniform(-3, 3)
    if draw.random() < 0.2:
        start[0] = gradients[:2, 0] = -0.0
    if kind == "special":
        gradients[draw.integers(4, STEPS), 0] = SPECIAL[draw.integers(len(SPECIAL))]
        gradients[draw.integers(STEPS), 1] = SPECIAL[draw.integers(5, len(SPECIAL))]
    lrs = tuple(lr * factor for factor in draw.choice([0.0, 0.5, 1.0, 1.0, 1.0, 2.0], STEPS))
    return EngineCase(rule, hyper, lrs, start, gradients)


@cache
def expected(count: int) -> np.ndarray:
    """Return p and the slots of each case of the table after each step. Shape: (count, STEPS, 5, 2)."""
    return np.stack([_expected(case) for case in table(count)])


def _expected(case: EngineCase) -> np.ndarray:
    """Return p and the slots after each step, by the reference; NaN for a missing slot."""
    p, state = case.start, reference.start(case.rule, case.start)
    rows = np.full((STEPS, 1 + len(SLOTS), 2), np.nan)
    for t, (lr, g) in enumerate(zip(case.lrs, case.gradients, strict=True)):
        p, state = reference.step(case.rule, Hyper(**{**vars(case.hyper), "lr": lr}), p, g, state)
        rows[t, 0] = p
        for place, slot in enumerate(SLOTS, 1):
            rows[t, place] = state.get(slot, np.nan)
    return rows


@cache
def odd_powers(count: int) -> dict[tuple[float, int], float]:
    """Return the powers of the table that Python's `**`, which is the C library's, does not round correctly."""
    cases = table(count)
    wanted = {(case.hyper.alpha, t) for case in cases if case.rule.bias_correction for t in range(1, STEPS + 1)}
    return {(a, t): a**t for a, t in wanted if a**t != float(Fraction(a) ** t)}


def packed(numbers: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(numbers, dtype=np.float64).tobytes()).decode()


def unpacked(text: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=np.float64).reshape(shape)


UNPACK = """
const unpack = text => new Float64Array(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
const pack = numbers => {
  const bytes = new Uint8Array(Float64Array.from(numbers).buffer);
  let text = "";
  for (let i = 0; i < bytes.length; i += 9000) text += String.fromCharCode(...bytes.subarray(i, i + 9000));
  return btoa(text);
};
"""

_RUN = """(text) => {
  const { cases, odd, slots } = JSON.parse(text), out = [];
  const exact = engine.power;
  engine.power = (alpha, t) => odd[alpha + " " + t] ?? exact(alpha, t);
  for (const { rule, hyper, lrs, start, gradients } of cases) {
    const p = unpack(start), g = unpack(gradients), state = engine.start(rule, hyper, p);
    lrs.forEach((lr, t) => {
      engine.step(rule, { ...hyper, lr }, p, g.subarray(2 * t, 2 * t + 2), state);
      for (const values of [p, ...slots.map(slot => state[slot])]) out.push(...(values ?? [NaN, NaN]));
    });
  }
  engine.power = exact;
  return pack(out);
}"""


def computed(page: Any, count: int, engine: str = ENGINE) -> np.ndarray:
    """Return what the engine computes in a browser's page for the table, in the shape of `expected`."""
    cases = table(count)
    message = json.dumps(
        {
            "cases": [
                {
                    "rule": asdict(case.rule),
                    "hyper": asdict(case.hyper),
                    "lrs": case.lrs,
                    "start": packed(case.start),
                    "gradients": packed(case.gradients),
                }
                for case in cases
            ],
            "odd": {f"{alpha!r} {t}": value for (alpha, t), value in odd_powers(count).items()},
            "slots": SLOTS,
        },
        allow_nan=False,
    )
    run = f"(text) => {{ {engine} {UNPACK} return ({_RUN})(text); }}"
    return unpacked(page.evaluate(run, message), count, STEPS, 1 + len(SLOTS), 2)


def differing(page: Any, count: int, engine: str = ENGINE) -> list[int]:
    """Return the indices of the cases of the table in which any bit differs, where NaN equals NaN."""
    found, wanted = computed(page, count, engine), expected(count)
    same = (found.view(np.int64) == wanted.view(np.int64)) | (np.isnan(found) & np.isnan(wanted))
    return [int(k) for k in np.flatnonzero(~same.reshape(count, -1).all(axis=1))]
