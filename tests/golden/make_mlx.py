"""Record what MLX computes.

    pip install "mlx[cpu]==0.32.4" numpy
    python tests/golden/make_mlx.py

It writes mlx.npz beside itself: mlx.optimizers.RMSprop on the CPU. MLX has neither momentum nor centering nor weight
decay. Every run is compared, before it is written, with the rule in NumPy's float64. alpha and eps are Python's
floats there; the learning rate is a float32 array: it must be a number that float32 holds exactly, as inputs.LRS are.
"""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import inputs
import mlx.core as mx
import mlx.optimizers
import numpy as np

VERSIONS = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-cpu", "numpy")}
DTYPES = {"float32": mx.float32, "float64": mx.float64}
WORDS: tuple[dict[str, Any], ...] = (
    {},
    {"alpha": 0.9},
    {"alpha": 0.9, "eps": 1e-3},
    {"alpha": 0.875, "eps": 2.0**-20},
)
Arrays = dict[str, np.ndarray]


def recorded(dtype: str, words: Mapping[str, Any]) -> list[Arrays]:
    """The parameters after each step in MLX."""
    optimizer = mlx.optimizers.RMSprop(inputs.LRS[0], **words)
    params = {name: mx.array(value, DTYPES[dtype]) for name, value in inputs.parameters().items()}
    made = []
    for gradients, lr in zip(inputs.gradients(), inputs.LRS, strict=True):
        optimizer.learning_rate = lr
        params = optimizer.apply_gradients({n: mx.array(g, DTYPES[dtype]) for n, g in gradients.items()}, params)
        mx.eval(params, optimizer.state)
        assert all(value.dtype == DTYPES[dtype] for value in params.values())
        made.append({name: np.array(value) for name, value in params.items()})
    return made


def expected(alpha: float = 0.99, eps: float = 1e-8) -> list[Arrays]:
    """The rule in NumPy's float64."""
    params = inputs.parameters()
    v = {name: np.zeros_like(value) for name, value in params.items()}
    made = []
    for gradients, lr in zip(inputs.gradients(), inputs.LRS, strict=True):
        for name, g in gradients.items():
            v[name] = alpha * v[name] + (1 - alpha) * g * g
            params[name] = params[name] - lr * g / (np.sqrt(v[name]) + eps)
        made.append(dict(params))
    return made


def difference(made: list[Arrays], wanted: list[Arrays]) -> float:
    """The largest difference, relative to the parameter then or at the start, whichever is larger."""
    start = inputs.parameters()
    return max(
        float(np.max(np.abs(one[name] - two[name]) / np.maximum(np.abs(two[name]), np.abs(start[name]))))
        for one, two in zip(made, wanted, strict=True)
        for name in start
    )


def main() -> None:
    mx.set_default_device(mx.cpu)
    recording = inputs.Recording("mlx", VERSIONS, "python tests/golden/make_mlx.py")
    for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-12)):
        for words in WORDS:
            params = recorded(dtype, words)
            off = difference(params, expected(**words))
            print(f"{dtype} {words}: {off:.1e}")
            assert off <= tolerance
            recording.add("mlx", dtype, words, params, lr_word="learning_rate")
    recording.write()


if __name__ == "__main__":
    main()
