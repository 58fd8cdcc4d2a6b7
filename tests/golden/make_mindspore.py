"""Record what MindSpore computes.

    pip install mindspore==2.10.0 "numpy<2"
    python tests/golden/make_mindspore.py

It writes, beside itself, mindspore.npz: mindspore.nn.RMSProp, and mindspore_experimental.npz:
mindspore.experimental.optim.RMSprop, both on the CPU. Every run is compared, before it is written, with the rule in
NumPy's float64. Where MindSpore does not compute its own rule, or computes it less exactly, a run has an rtol and a
note:

* nn.RMSProp, uncentered: lanes of eight elements add epsilon to the root; only the elements left over have it inside,
  as documented. Which are left over changes during a run, as the operator tries numbers of threads, five steps each,
  and keeps the fastest. Runs with an epsilon that shows have each parameter cut into pieces of at most seven
  elements, too few for a lane: the rule as documented. Two have the parameters whole; another recording of them may
  differ. The operator takes no float64.
* nn.RMSProp, centered: float64 parameters are stepped in float32, so no float64 run is recorded.
* experimental.optim.RMSprop: the root of float64 parameters' square average is that of its float32 rounding, and
  settings are float32.
"""

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import inputs
import mindspore as ms
import numpy as np
from mindspore.experimental import optim

VERSIONS = {name: importlib.metadata.version(name) for name in ("mindspore", "numpy")}
COMMAND = "python tests/golden/make_mindspore.py"
PIECE = 7
PIECES = (
    "Each parameter in pieces of at most 7 elements: the CPU operator's loop over single elements steps them all."
)
WHOLE = (
    "Each parameter whole. Lanes of eight elements of the CPU operator add epsilon to the root; the elements left "
    "over have it inside, as documented. Which they are changes during the run, with the number of threads."
)
SINGLE = "The root is that of the square average rounded to float32, and the settings are float32."
NN: tuple[dict[str, Any], ...] = (
    {},
    {"momentum": 0.9},
    {"centered": True},
    {"centered": True, "momentum": 0.9},
    {"weight_decay": 0.01},
    {"weight_decay": 0.01, "centered": True, "momentum": 0.9},
    {"decay": 0.875, "epsilon": 2.0**-4},
    {"decay": 0.875, "epsilon": 2.0**-4, "momentum": 0.75},
    {"decay": 0.875, "epsilon": 2.0**-4, "momentum": 0.75, "weight_decay": 0.0625},
    {"decay": 0.875, "epsilon": 2.0**-4, "centered": True},
    {"decay": 0.875, "epsilon": 2.0**-4, "centered": True, "momentum": 0.75, "weight_decay": 0.0625},
)
NN_WHOLE = ((NN[6], 2e-3), (NN[7], 4e-3))  # with their rtol
EXPERIMENTAL: tuple[dict[str, Any], ...] = (
    {},
    {"momentum": 0.9},
    {"centered": True},
    {"centered": True, "momentum": 0.9},
    {"weight_decay": 0.01},
    {"weight_decay": 0.01, "centered": True, "momentum": 0.9},
    {"maximize": True, "momentum": 0.9, "weight_decay": 0.01},
    {"alpha": 0.875, "eps": 2.0**-4},
    {"alpha": 0.875, "eps": 2.0**-4, "momentum": 0.75},
    {"alpha": 0.875, "eps": 2.0**-20, "centered": True, "momentum": 0.75, "weight_decay": 0.0625},
)
Arrays = dict[str, np.ndarray]


def cut(arrays: Mapping[str, np.ndarray], size: int) -> list[np.ndarray]:
    """The arrays, flat, in pieces of at most `size` elements, in their order."""
    flat = [value.reshape(-1) for value in arrays.values()]
    return [value[at : at + size] for value in flat for at in range(0, value.size, size)]


def joined(pieces: Sequence[np.ndarray]) -> Arrays:
    """What was cut, whole again."""
    flat = np.concatenate([piece.reshape(-1) for piece in pieces])
    made, at = {}, 0
    for name, shape in inputs.SHAPES.items():
        made[name] = flat[at : at + np.prod(shape)].reshape(shape)
        at += made[name].size
    return made


def given(arrays: Mapping[str, np.ndarray], dtype: str, pieces: bool) -> list[Any]:
    """The arrays as MindSpore takes them."""
    parts = cut(arrays, PIECE) if pieces else list(arrays.values())
    return [ms.Tensor(part.astype(dtype)) for part in parts]


def nn(dtype: str, words: Mapping[str, Any], pieces: bool) -> list[Arrays]:
    """The parameters after each step of mindspore.nn.RMSProp."""
    start = given(inputs.parameters(), dtype, pieces)
    params = [ms.Parameter(part, name=f"p{i}") for i, part in enumerate(start)]
    optimizer = ms.nn.RMSProp(params, learning_rate=list(inputs.LRS), **words)
    made = []
    for gradients in inputs.gradients():
        optimizer(tuple(given(gradients, dtype, pieces)))
        made.append(joined([param.asnumpy() for param in params]))
    return made


def experimental(dtype: str, words: Mapping[str, Any]) -> list[Arrays]:
    """The parameters after each step of mindspore.experimental.optim.RMSprop."""
    start = given(inputs.parameters(), dtype, False)
    params = [ms.Parameter(part, name=f"p{i}") for i, part in enumerate(start)]
    optimizer = optim.RMSprop(params, lr=inputs.LRS[0], **words)
    made = []
    for gradients, lr in zip(inputs.gradients(), inputs.LRS, strict=True):
        ms.ops.assign(optimizer.param_groups[0]["lr"], ms.Tensor(lr, ms.float32))
        optimizer(tuple(given(gradients, dtype, False)))
        made.append(joined([param.asnumpy() for param in params]))
    return made


def nn_expected(
    decay: float = 0.9,
    epsilon: float = 1e-10,
    momentum: float = 0.0,
    centered: bool = False,
    weight_decay: float = 0.0,
    lanes: Sequence[Arrays] = (),
) -> list[Arrays]:
    """nn.RMSProp's rule in NumPy's float64.

    With lanes=recorded, each element at each step has epsilon inside the root or outside, whichever lies nearer to
    what was recorded.
    """
    params = inputs.parameters()
    v = {name: np.ones_like(value) for name, value in params.items()}
    m, b = ({name: np.zeros_like(value) for name, value in params.items()} for _ in range(2))
    made = []
    for gradients, lr in zip(inputs.gradients(), inputs.LRS, strict=True):
        for name, g in gradients.items():
            g = g + weight_decay * params[name]
            v[name] = decay * v[name] + (1 - decay) * g * g
            m[name] = decay * m[name] + (1 - decay) * g
            variance = v[name] - m[name] ** 2 if centered else v[name]
            assert (variance > 0).all()
            kept = b[name]
            b[name] = momentum * kept + lr * g / np.sqrt(variance + epsilon)
            if lanes:
                outside = momentum * kept + lr * g / (np.sqrt(variance) + epsilon)
                step = params[name] - lanes[len(made)][name]
                b[name] = np.where(np.abs(outside - step) < np.abs(b[name] - step), outside, b[name])
            params[name] = params[name] - b[name]
        made.append(dict(params))
    return made


def experimental_expected(
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> list[Arrays]:
    """experimental.optim.RMSprop's rule in NumPy's float64."""
    params = inputs.parameters()
    v, m, b = ({name: np.zeros_like(value) for name, value in params.items()} for _ in range(3))
    made = []
    for gradients, lr in zip(inputs.gradients(), inputs.LRS, strict=True):
        for name, g in gradients.items():
            g = (-g if maximize else g) + weight_decay * params[name]
            v[name] = alpha * v[name] + (1 - alpha) * g * g
            m[name] = alpha * m[name] + (1 - alpha) * g
            variance = v[name] - m[name] ** 2 if centered else v[name]
            b[name] = momentum * b[name] + g / (np.sqrt(variance) + eps)
            params[name] = params[name] - lr * b[name]
        made.append(dict(params))
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
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")
    recording = inputs.Recording("mindspore", VERSIONS, COMMAND)
    for words in NN:
        pieces = "epsilon" in words and "centered" not in words
        params = nn("float32", words, pieces)
        off = difference(params, nn_expected(**words))
        print(f"float32 {words}{' pieces' if pieces else ''}: {off:.1e}")
        assert off <= 1e-5
        recording.add("mindspore", "float32", words, params, lr_word="learning_rate", note=PIECES if pieces else "")
    for words, rtol in NN_WHOLE:
        params = nn("float32", words, False)
        as_run, off = difference(params, nn_expected(**words, lanes=params)), difference(params, nn_expected(**words))
        print(f"float32 {words} whole: {off:.1e}, from one of the two at each step {as_run:.1e}")
        assert as_run <= 1e-5 < off <= rtol
        recording.add("mindspore", "float32", words, params, lr_word="learning_rate", note=WHOLE, rtol=rtol)
    recording.write()

    recording = inputs.Recording("mindspore_experimental", VERSIONS, COMMAND)
    for dtype in ("float32", "float64"):
        for words in EXPERIMENTAL:
            params = experimental(dtype, words)
            off = difference(params, experimental_expected(**words))
            print(f"{dtype} {words}: {off:.1e}")
            assert off <= (1e-5 if dtype == "float32" else 1e-6)
            more = {"note": SINGLE, "rtol": 1e-6} if dtype == "float64" else {}
            recording.add("mindspore_experimental", dtype, words, params, lr_word="lr", **more)
    recording.write()


if __name__ == "__main__":
    main()
