"""Record what Keras computed before it became a part of TensorFlow: RMSprop of Keras 1.2.2 and of Keras 2.2.4.

    pip install tensorflow-cpu==2.21.0 six pyyaml scipy h5py
    pip install --no-deps --target KERAS1 keras==1.2.2
    pip install --no-deps --target KERAS2 keras==2.2.4 keras_applications==1.0.8 keras_preprocessing==1.1.2
    python tests/golden/make_keras1.py KERAS1 KERAS2

Both are as published, on their TensorFlow backends; the TensorFlow 1 that they import is tensorflow.compat.v1 of a
TensorFlow 2, what Python 3.10 took out of `collections` is put back, and the session runs the optimizer's updates
without Keras's own wrapper around it. Each run's note says which Keras it is.

Both clip the *global* norm where they are given clipnorm, and clip by value after that. Keras 1.2.2 has epsilon 1e-8,
Keras 2.2.4 has 1e-7. Every run is compared with the rule in NumPy's float64 before it is written.
"""

import collections
import collections.abc
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Mapping
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["KERAS_BACKEND"] = "tensorflow"

import inputs
import numpy as np
import tensorflow

Arrays = dict[str, np.ndarray]


def import_keras(folder: str) -> Any:
    """The Keras in a folder, whichever was imported before it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "keras"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    keras = importlib.import_module("keras")
    importlib.import_module("keras.optimizers")
    sys.path.remove(folder)
    assert keras.__file__.startswith(os.path.abspath(folder)), keras.__file__
    return keras


def run(keras: Any, dtype: str, words: Mapping[str, Any]) -> list[Arrays]:
    backend = keras.backend
    backend.clear_session()
    backend.set_floatx(dtype)
    variables = [backend.variable(value, name=name) for name, value in inputs.parameters().items()]
    fed = [backend.placeholder(shape=shape) for shape in inputs.SHAPES.values()]
    loss = sum(backend.sum(p * g) for p, g in zip(variables, fed, strict=True))
    optimizer = keras.optimizers.RMSprop(**words)
    if keras.__version__.startswith("1."):
        updates = optimizer.get_updates(variables, {}, loss)
    else:
        updates = optimizer.get_updates(loss=loss, params=variables)
    made = []
    for step, rate in zip(inputs.gradients(), inputs.LRS, strict=True):
        backend.set_value(optimizer.lr, rate)
        backend.get_session().run(updates, dict(zip(fed, step.values(), strict=True)))
        made.append({name: backend.get_value(p) for name, p in zip(inputs.SHAPES, variables, strict=True)})
    return made


def expected(
    rho: float, epsilon: float, clipnorm: float | None = None, clipvalue: float | None = None
) -> list[Arrays]:
    """The rule in float64."""
    p = inputs.parameters()
    a = {name: np.zeros(shape) for name, shape in inputs.SHAPES.items()}
    made = []
    for step, lr in zip(inputs.gradients(), inputs.LRS, strict=True):
        norm = np.sqrt(sum((g * g).sum() for g in step.values()))
        for name, g in step.items():
            if clipnorm is not None and norm >= clipnorm:
                g = g * clipnorm / norm
            if clipvalue is not None:
                g = np.clip(g, -clipvalue, clipvalue)
            a[name] = rho * a[name] + (1 - rho) * g * g
            p[name] = p[name] - lr * g / (np.sqrt(a[name]) + epsilon)
        made.append(dict(p))
    return made


def main() -> None:
    for name in ("Iterable", "Mapping", "Sequence"):
        setattr(collections, name, getattr(collections.abc, name))
    tensorflow.compat.v1.disable_v2_behavior()
    sys.modules["tensorflow"] = tensorflow.compat.v1
    versions = {"tensorflow-cpu": importlib.metadata.version("tensorflow-cpu"), "numpy": np.__version__}
    kerases = [import_keras(folder) for folder in sys.argv[1:]]
    versions["keras"] = " and ".join(keras.__version__ for keras in kerases)
    recording = inputs.Recording("keras1", versions, "python tests/golden/make_keras1.py KERAS1 KERAS2")
    start = inputs.parameters()
    for keras, usual in zip(kerases, (1e-8, 1e-7), strict=True):
        clips: tuple[dict[str, float], ...]
        clips = {"clipnorm": 1400.0}, {"clipvalue": 1.0}, {"clipnorm": 700.0, "clipvalue": 1.0}, {"clipnorm": 0.125}
        cases = [("float32", {"rho": 0.9, "epsilon": epsilon}) for epsilon in (usual, 2.0**-10)]
        cases += [("float32", {"rho": 0.9, "epsilon": usual} | clip) for clip in clips]
        cases += [("float64", {"rho": rho, "epsilon": usual}) for rho in (0.875, 0.9)]
        cases += [("float64", {"rho": 0.875, "epsilon": 2.0**-20} | clip) for clip in clips]
        for dtype, words in cases:
            made, wanted = run(keras, dtype, words), expected(**words)
            off = max(
                float((np.abs(got[n] - want[n]) / np.maximum(np.abs(want[n]), np.abs(start[n]))).max())
                for got, want in zip(made, wanted, strict=True)
                for n in start
            )
            print(f"{off:8.1e} {dtype} {keras.__version__} {words}")
            assert off <= (1e-12 if dtype == "float64" else 1e-5)
            note = f"Keras {keras.__version__}"
            if "clipnorm" in words:
                note += "; its clipnorm is of the global norm" + ", before clipvalue" * ("clipvalue" in words)
            recording.add("keras1", dtype, words, made, lr_word="lr", note=note)
    recording.write()


if __name__ == "__main__":
    main()
