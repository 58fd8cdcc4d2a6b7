"""Record what PaddlePaddle computes.

    pip install paddlepaddle==3.3.1 setuptools
    python tests/golden/make_paddle.py

It writes paddle.npz beside itself: paddle.optimizer.RMSProp on the CPU, with dense gradients. In a run's words,
grad_clip is the name and the arguments of one of paddle.nn's ClipGradBy classes. Every run is compared, before it is
written, with the rule in NumPy's float64. Paddle rounds its settings to float32 even where the parameters are
float64: the float64 runs have numbers that float32 holds exactly. Its ClipGradByNorm takes no float64 gradients.
"""

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import inputs
import numpy as np
import paddle

NOTE = "Lanes of eight elements take an approximate root: a step is up to 3 units in the last place off."
VERSIONS = {name: importlib.metadata.version(name) for name in ("paddlepaddle", "numpy")}
Arrays = dict[str, np.ndarray]

# Each of the clips bounds some of the gradients and leaves others.
CLIPS: tuple[dict[str, Any], ...] = (
    {"name": "ClipGradByValue", "max": 0.5, "min": -0.5},
    {"name": "ClipGradByNorm", "clip_norm": 768.0},
    {"name": "ClipGradByGlobalNorm", "clip_norm": 1024.0},
)


def words(dtype: str) -> list[dict[str, Any]]:
    """The arguments of every run."""
    made: list[dict[str, Any]] = []
    for base, mu, coupled in (({"rho": 0.875, "epsilon": 2.0**-20}, 0.75, 0.0625), ({}, 0.9, 0.01)):
        if dtype == "float64" and not base:
            continue
        momentum, decay, centered = {"momentum": mu}, {"weight_decay": coupled}, {"centered": True}
        made += [
            base,
            base | momentum,
            base | centered,
            base | centered | momentum,
            base | {"epsilon": 2.0**-4},
            base | decay,
            base | decay | centered | momentum,
        ]
        for clip in CLIPS:
            if dtype == "float64" and clip["name"] == "ClipGradByNorm":
                continue
            made += [base | {"grad_clip": clip}, base | {"grad_clip": clip} | decay]
        made.append(base | {"grad_clip": CLIPS[2]} | decay | centered | momentum)
    return made


def recorded(dtype: str, words: Mapping[str, Any]) -> list[Arrays]:
    """The parameters after each step in Paddle."""
    params = {}
    for name, value in inputs.parameters().items():
        params[name] = paddle.create_parameter(value.shape, dtype)
        params[name].set_value(value.astype(dtype))
    given = dict(words)
    if clip := dict(given.pop("grad_clip", {})):
        given["grad_clip"] = getattr(paddle.nn, clip.pop("name"))(**clip)
    optimizer = paddle.optimizer.RMSProp(inputs.LRS[0], parameters=list(params.values()), **given)
    made = []
    for gradients, lr in zip(inputs.gradients(), inputs.LRS, strict=True):
        optimizer.set_lr(lr)
        for name, param in params.items():
            param.grad = paddle.to_tensor(gradients[name].astype(dtype))
        optimizer.step()
        optimizer.clear_grad()
        assert all(param.numpy().dtype == dtype for param in params.values())
        made.append({name: param.numpy().copy() for name, param in params.items()})
    return made


def clipped(gradients: Arrays, clip: Mapping[str, Any]) -> Arrays:
    """One step's gradients as the clip leaves them."""
    if clip["name"] == "ClipGradByValue":
        return {name: np.clip(g, -clip["max"], clip["max"]) for name, g in gradients.items()}
    norms = {name: float(np.sqrt(np.sum(g * g))) for name, g in gradients.items()}
    if clip["name"] == "ClipGradByGlobalNorm":
        norms = dict.fromkeys(norms, float(np.sqrt(sum(norm * norm for norm in norms.values()))))
    return {name: g * (clip["clip_norm"] / max(norms[name], clip["clip_norm"])) for name, g in gradients.items()}


def expected(
    rho: float = 0.95,
    epsilon: float = 1e-6,
    momentum: float = 0.0,
    centered: bool = False,
    weight_decay: float = 0.0,
    grad_clip: Mapping[str, Any] | None = None,
) -> list[Arrays]:
    """The rule in NumPy's float64."""
    params = inputs.parameters()
    v, m, b = ({name: np.zeros_like(value) for name, value in params.items()} for _ in range(3))
    made = []
    left = []
    for gradients, lr in zip(inputs.gradients(), inputs.LRS, strict=True):
        if grad_clip is not None:
            given, gradients = gradients, clipped(gradients, grad_clip)
            left += [bool(np.all(given[name] == g)) for name, g in gradients.items()]
        for name, g in gradients.items():
            g = g + weight_decay * params[name]
            v[name] = rho * v[name] + (1 - rho) * g * g
            m[name] = rho * m[name] + (1 - rho) * g
            variance = v[name] - m[name] ** 2 if centered else v[name]
            b[name] = momentum * b[name] + lr * g / np.sqrt(variance + epsilon)
            params[name] = params[name] - b[name]
        made.append(dict(params))
    assert grad_clip is None or not all(left), grad_clip
    assert grad_clip is None or grad_clip["name"] == "ClipGradByValue" or any(left), grad_clip
    return made


def difference(made: Sequence[Arrays], wanted: Sequence[Arrays]) -> float:
    """The largest difference, relative to the parameter then or at the start, whichever is larger."""
    start = inputs.parameters()
    return max(
        float(np.max(np.abs(one[name] - two[name]) / np.maximum(np.abs(two[name]), np.abs(start[name]))))
        for one, two in zip(made, wanted, strict=True)
        for name in start
    )


def main() -> None:
    paddle.set_device("cpu")
    recording = inputs.Recording("paddle", VERSIONS, "python tests/golden/make_paddle.py")
    for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-12)):
        for given in words(dtype):
            params = recorded(dtype, given)
            off = difference(params, expected(**given))
            print(f"{dtype} {given}: {off:.1e}")
            assert off <= tolerance
            recording.add(
                "paddle", dtype, given, params, lr_word="learning_rate", note=NOTE if dtype == "float32" else ""
            )
    recording.write()


if __name__ == "__main__":
    main()
