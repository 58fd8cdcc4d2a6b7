"""What every framework's golden vectors share: parameters, gradients and learning rates, and how a run is recorded.

The numbers are exact in float32, so float32 and float64 runs see the same ones. This file imports NumPy only: it runs
beside whichever framework is recorded (`make_*.py`, each in an environment of its own).
"""

import datetime
import json
import platform
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
STEPS = 25
SHAPES = {"w": (5, 4), "b": (11,)}

# The factor on the base rate at each step: it warms up, holds, and halves.
FACTORS = (0.25, 0.5, 0.75) + (1.0,) * 12 + (0.5,) * 10
assert len(FACTORS) == STEPS
BASE_LR = 2.0**-7
LRS = tuple(BASE_LR * factor for factor in FACTORS)


def parameters() -> dict[str, np.ndarray]:
    """The parameters before the first step, in float64: away from 0, so that relative errors mean something."""
    draw = np.random.default_rng(20261123)
    made = {}
    for name, shape in SHAPES.items():
        size = draw.uniform(1.0, 2.0, shape) * draw.choice((-1.0, 1.0), shape)
        made[name] = size.astype(np.float32).astype(np.float64)
    return made


def gradients() -> list[dict[str, np.ndarray]]:
    """The gradients of every step, in float64, of sizes 1e-3 to 10 with signs that change.

    The last three elements of each tensor are always exactly 0, about 1e-12, and about 1e3; one element in ten is 0
    at a step.
    """
    draw = np.random.default_rng(7)
    scale = {name: 10.0 ** draw.uniform(-3.0, 1.0, shape) for name, shape in SHAPES.items()}
    steps = []
    for _ in range(STEPS):
        step = {}
        for name, shape in SHAPES.items():
            g = draw.standard_normal(shape) * scale[name]
            g[draw.random(shape) < 0.1] = 0.0
            last = g.reshape(-1)
            last[-3] = 0.0
            last[-2] = 1e-12 * draw.uniform(0.5, 1.5) * draw.choice((-1.0, 1.0))
            last[-1] = 1e3 * draw.uniform(0.5, 1.5) * draw.choice((-1.0, 1.0))
            step[name] = g.astype(np.float32).astype(np.float64)
        steps.append(step)
    return steps


class Recording:
    """The runs of one framework, gathered and then written as `<framework>.npz` with their provenance inside."""

    def __init__(self, framework: str, versions: Mapping[str, str], command: str) -> None:
        self.framework = framework
        self.cases: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.provenance = {
            "framework": framework,
            "versions": dict(versions),
            "command": command,
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "machine": platform.machine(),
        }

    def add(
        self,
        dialect: str,
        dtype: str,
        words: Mapping[str, Any],
        params: Sequence[Mapping[str, np.ndarray]],
        *,
        lr_word: str,
        note: str = "",
        lrs: Sequence[float] = LRS,
        rtol: float | None = None,
    ) -> None:
        """Record one run.

        Args:
            dialect: what RMSprop(dialect=...) calls it.
            dtype: "float32" or "float64".
            words: the constructor's arguments in the framework's own words, all but the learning rate: JSON values.
            params: the parameters after each of the 25 steps.
            lr_word: the framework's name of the learning rate.
            note: what is special about the run.
            rtol: where the framework itself computes less exactly than the tests ask: its size, the reason in note.
        """
        assert len(params) == len(lrs) == STEPS
        key = f"{len(self.cases):03d}"
        self.cases.append(
            {"key": key, "dialect": dialect, "dtype": dtype, "words": dict(words), "lr_word": lr_word, "note": note}
            | ({"rtol": rtol} if rtol is not None else {})
            | ({"lrs": list(lrs)} if tuple(lrs) != LRS else {})
        )
        for name in SHAPES:
            run = np.stack([np.asarray(step[name], dtype=dtype) for step in params])
            assert run.shape == (STEPS, *SHAPES[name]), (dialect, words, name)
            assert np.isfinite(run).all(), (dialect, words, name)
            self.arrays[f"{key}/{name}"] = run

    def write(self) -> Path:
        """Write the file beside this one. Returns: its path."""
        path = HERE / f"{self.framework}.npz"
        described = json.dumps({"provenance": self.provenance, "cases": self.cases}, indent=1)
        np.savez_compressed(path, description=np.array(described), **self.arrays)
        with zipfile.ZipFile(path) as made:
            assert made.testzip() is None
        print(f"{path.name}: {len(self.cases)} runs, {path.stat().st_size} bytes")
        return path
