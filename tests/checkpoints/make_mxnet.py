"""Record checkpoints of MXNet 1.x's mx.optimizer.RMSProp on CPU.

    python tests/checkpoints/make_mxnet.py

Parameters are float32 in torch's layouts (Convolution OIHW, FullyConnected out, in); the updater's indices 0, 1, 2, 3
are conv_weight, conv_bias, fc_weight, fc_bias. For each of mxnet_rmsprop and mxnet_rmsprop_centered:

*.states      what Updater.get_states(dump_optimizer=False), and so Module.save_optimizer_states, write: a pickle of
              {0: (n,), 1: (n,), ...}, when centered {0: (n, g, delta), ...}. An element is mxnet.ndarray.ndarray's
              NDArray(None) with the state {"handle": bytearray}, which is one array in MXNet's format, as in
              *.params. There is no rate and no counter in it.
*.trainer.states
              what gluon's Trainer.save_states writes, get_states(dump_optimizer=True): a pickle of the pair of that
              dictionary and the optimizer, a mxnet.optimizer.optimizer.RMSProp with its attributes: "gamma1",
              "gamma2", "centered", "epsilon", "clip_weights", "lr", "wd", "rescale_grad", "clip_gradient",
              "num_update", "_all_index_update_counts" {0: {0: 20, 1: 20, ...}} and others.
*.params      mx.nd.save of {"arg:conv_weight", "arg:conv_bias", "arg:fc_weight", "arg:fc_bias"}, as Module and
              mx.model.save_checkpoint write it; gluon's save_parameters has no "arg:". Little-endian: uint64 0x112,
              uint64 0, uint64 number of arrays; each array: uint32 0xF993FAC9 (V2), int32 storage type 0 (dense),
              uint32 ndim, ndim int64 sizes, int32 device type 1 (cpu), int32 device number 0, int32 dtype 0
              (float32), raw data in C order; then uint64 number of names; each name: uint64 length, bytes.
*.nd          mx.nd.save of the same and the states: "conv_weight", ..., "conv_weight.n", ..., and when centered
              "conv_weight.g", "conv_weight.delta", ...
*.states.npz  NumPy's file of the same names and arrays.
"""

import pickle
import struct
import warnings
from typing import Any

import inputs
import numpy as np

warnings.filterwarnings("ignore")
import mxnet as mx  # noqa: E402

COMMAND = "python tests/checkpoints/make_mxnet.py"
NAMES = {name: name.replace(".", "_") for name in inputs.SHAPES}
VERSIONS = {"mxnet": mx.__version__, "numpy": np.__version__}


def make(name: str, words: dict[str, Any]) -> None:
    """Step, save, go on, record."""
    params = {key: mx.nd.array(value, dtype="float32") for key, value in inputs.parameters().items()}
    optimizer = mx.optimizer.RMSProp(learning_rate=inputs.LR, **words)
    updater = mx.optimizer.get_updater(optimizer)
    saved = {}
    for at, gradients in enumerate(inputs.gradients()):
        optimizer.set_learning_rate(inputs.LRS[at])
        for index, (key, param) in enumerate(params.items()):
            updater(index, mx.nd.array(gradients[key], dtype="float32"), param)
        if at + 1 == inputs.SAVED_AT:
            saved = {key: param.asnumpy() for key, param in params.items()}
            save(name, params, updater)
    final = {key: param.asnumpy() for key, param in params.items()}
    all_words = {"learning_rate": inputs.LR, **words}
    note = "the parameters are in the .params beside it; all together in .nd and .states.npz"
    inputs.record(name, f"{name}.states", "mxnet1", all_words, saved, final, VERSIONS, COMMAND, note)


def save(name: str, params: dict[str, Any], updater: Any) -> None:
    """Write the five files."""
    (inputs.HERE / f"{name}.states").write_bytes(updater.get_states(dump_optimizer=False))
    (inputs.HERE / f"{name}.trainer.states").write_bytes(updater.get_states(dump_optimizer=True))
    args = {f"arg:{NAMES[key]}": param for key, param in params.items()}
    mx.nd.save(str(inputs.HERE / f"{name}.params"), args)
    whole = {NAMES[key]: param for key, param in params.items()}
    for index, key in enumerate(params):
        slots = ("n", "g", "delta") if updater.optimizer.centered else ("n",)
        for slot, state in zip(slots, updater.states[index]):  # noqa: B905 - strict
            whole[f"{NAMES[key]}.{slot}"] = state
    mx.nd.save(str(inputs.HERE / f"{name}.nd"), whole)
    np.savez_compressed(inputs.HERE / f"{name}.states.npz", **{key: value.asnumpy() for key, value in whole.items()})
    check(name)


def check(name: str) -> None:
    """See that the files are what the docstring says."""
    raw = (inputs.HERE / f"{name}.params").read_bytes()
    at = 0

    def take(form: str) -> tuple[Any, ...]:
        nonlocal at
        at += struct.calcsize("<" + form)
        return struct.unpack_from("<" + form, raw, at - struct.calcsize("<" + form))

    assert take("QQQ") == (0x112, 0, 4)
    for shape in inputs.SHAPES.values():
        assert take("IiI") == (0xF993FAC9, 0, len(shape))
        assert take(f"{len(shape)}q") == shape
        assert take("iii") == (1, 0, 0)
        at += 4 * int(np.prod(shape))
    assert take("Q") == (4,)
    for key in inputs.SHAPES:
        (length,) = take("Q")
        at += length
        assert raw[at - length : at].decode() == f"arg:{NAMES[key]}"
    assert at == len(raw)
    states = pickle.loads((inputs.HERE / f"{name}.states").read_bytes())
    assert list(states) == [0, 1, 2, 3]
    assert isinstance(states[0], tuple)
    assert isinstance(states[0][0], mx.nd.NDArray)


if __name__ == "__main__":
    make("mxnet_rmsprop", {"gamma1": 0.9, "epsilon": 1e-8, "centered": False, "wd": 0.01})
    make("mxnet_rmsprop_centered", {"gamma1": 0.95, "gamma2": 0.9, "epsilon": 1e-4, "centered": True})
