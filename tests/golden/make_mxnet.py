"""Record mxnet1.npz from MXNet 1.x's mx.optimizer.RMSProp on CPU.

    python tests/golden/make_mxnet.py

The class makes float32 states whatever the weights are, which its own operator refuses beside float64 weights: the
float64 runs give the class float64 states instead, and then call its `update` as ever. The operators read every
number as a float32.
"""

import itertools
import warnings
from typing import Any

import inputs
import numpy as np

warnings.filterwarnings("ignore")
import mxnet as mx  # noqa: E402

COMMAND = "python tests/golden/make_mxnet.py"
EXACT = {"gamma1": 0.875, "gamma2": 0.75, "epsilon": 2.0**-20, "wd": 0.0625}
USUAL = {"gamma1": 0.9, "gamma2": 0.9, "epsilon": 1e-8, "wd": 0.01}


def run(dtype: str, words: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """Step 25 times. Returns: the parameters after each step."""
    optimizer = mx.optimizer.RMSProp(learning_rate=inputs.LRS[0], **words)
    params = {name: mx.nd.array(value, dtype=dtype) for name, value in inputs.parameters().items()}
    states = [
        tuple(state.astype(dtype) for state in optimizer.create_state(index, param))
        for index, param in enumerate(params.values())
    ]
    after = []
    for lr, gradients in zip(inputs.LRS, inputs.gradients()):  # noqa: B905 - strict
        optimizer.set_learning_rate(lr)
        for index, (name, param) in enumerate(params.items()):
            optimizer.update(index, param, mx.nd.array(gradients[name], dtype=dtype), states[index])
        after.append({name: param.asnumpy() for name, param in params.items()})
    return after


def main() -> None:
    """Write the file."""
    out = inputs.Recording("mxnet1", {"mxnet": mx.__version__, "numpy": np.__version__}, COMMAND)

    def record(dtype: str, words: dict[str, Any], note: str = "") -> None:
        out.add("mxnet1", dtype, words, run(dtype, words), lr_word="learning_rate", note=note)

    for (dtype, numbers), centered in itertools.product(
        (("float32", EXACT), ("float32", USUAL), ("float64", EXACT)), (False, True)
    ):
        plain = {name: numbers[name] for name in ("gamma1", "epsilon")} | {"centered": centered}
        ignored = "" if centered else "gamma2 is not read unless centered"
        record(dtype, {**plain, "gamma2": numbers["gamma2"]}, ignored)
        if centered:
            record(dtype, {**plain, "gamma2": 0.0})
        full = {**plain, "gamma2": numbers["gamma2"], "wd": numbers["wd"]}
        record(dtype, full)
        record(dtype, {**full, "clip_gradient": 0.25}, "the gradient is clipped after wd * w was added to it")
        record(dtype, {**plain, "gamma2": numbers["gamma2"], "clip_gradient": 4.0})
        record(dtype, {**full, "clip_weights": 1.5}, "weights are clipped to +-1.5 after each step")
        record(dtype, {**full, "rescale_grad": 0.125, "clip_gradient": 0.25, "clip_weights": 1.5}, "all three")
    out.write()


if __name__ == "__main__":
    main()
