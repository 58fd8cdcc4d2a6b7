"""What every recorded checkpoint shares: a small net's parameters, 30 gradients, and where the run is to end.

A framework steps 20 times, saves its own checkpoint, and steps 10 more: the test reads the checkpoint, goes on with
the same 10 gradients, and compares. Layouts here are torch's; `to_tensorflow` turns them round. NumPy only.
"""

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SAVED_AT, STEPS = 20, 30
SHAPES = {
    "conv.weight": (4, 2, 3, 3),  # OIHW
    "conv.bias": (4,),
    "fc.weight": (5, 6),  # out, in
    "fc.bias": (5,),
}
TABLE = {"table.weight": (80, 64)}  # for 8-bit states, which start at 4096 elements
LR = 2.0**-7
LRS = (LR,) * 25 + (LR / 2,) * 5  # it halves after the checkpoint


def shapes(table: bool = False) -> dict[str, tuple[int, ...]]:
    """The parameters' names and shapes, in the model's order."""
    return {**SHAPES, **TABLE} if table else dict(SHAPES)


def parameters(table: bool = False) -> dict[str, np.ndarray]:
    """The parameters before the first step, float32, in torch's layouts."""
    draw = np.random.default_rng(41)
    return {
        name: (draw.uniform(1.0, 2.0, shape) * draw.choice((-1.0, 1.0), shape)).astype(np.float32)
        for name, shape in shapes(table).items()
    }


def gradients(table: bool = False) -> list[dict[str, np.ndarray]]:
    """The gradients of all steps, float32, in torch's layouts."""
    draw = np.random.default_rng(42)
    scale = {name: 10.0 ** draw.uniform(-2.0, 0.5, shape) for name, shape in shapes(table).items()}
    return [
        {
            name: (draw.standard_normal(shape) * scale[name]).astype(np.float32)
            for name, shape in shapes(table).items()
        }
        for _ in range(STEPS)
    ]


def to_tensorflow(name: str, value: np.ndarray) -> np.ndarray:
    """A parameter or gradient in TensorFlow's layout: HWIO kernels, dense kernels as (in, out)."""
    if value.ndim == 4:
        return np.ascontiguousarray(value.transpose(2, 3, 1, 0))
    return np.ascontiguousarray(value.T) if value.ndim == 2 and name == "fc.weight" else value


def to_torch(name: str, value: np.ndarray) -> np.ndarray:
    """The same, back."""
    if value.ndim == 4:
        return np.ascontiguousarray(value.transpose(3, 2, 0, 1))
    return np.ascontiguousarray(value.T) if value.ndim == 2 and name == "fc.weight" else value


def record(
    name: str,
    checkpoint: str,
    dialect: str,
    words: Mapping[str, Any],
    saved: Mapping[str, np.ndarray],
    final: Mapping[str, np.ndarray],
    versions: Mapping[str, str],
    command: str,
    note: str = "",
) -> Path:
    """Write `<name>.npz` beside the checkpoint: where the run stood at the save and where it ended, torch's layouts.

    Args:
        checkpoint: the checkpoint's file name in this folder (for a TensorFlow bundle its prefix).
        dialect: what RMSprop(dialect=...) calls the framework's optimizer.
        words: all of the optimizer's settings in the framework's own words, the learning rate (LR) among them.
        saved, final: the parameters after 20 and after 30 steps.
    """
    description = {
        "checkpoint": checkpoint,
        "dialect": dialect,
        "words": dict(words),
        "note": note,
        "versions": dict(versions),
        "command": command,
        "date": datetime.date.today().isoformat(),
    }
    arrays = {f"saved/{key}": np.asarray(value) for key, value in saved.items()}
    arrays |= {f"final/{key}": np.asarray(value) for key, value in final.items()}
    path = HERE / f"{name}.npz"
    np.savez_compressed(path, description=np.array(json.dumps(description, indent=1)), **arrays)
    return path
