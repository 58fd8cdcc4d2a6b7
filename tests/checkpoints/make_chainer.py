"""Record checkpoints of Chainer's RMSprop and RMSpropGraves on CPU.

    python tests/checkpoints/make_chainer.py

The model is a Chain with conv (Convolution2D: W OIHW, b) and fc (Linear: W (out, in), b), float32. For each of
chainer_rmsprop and chainer_graves:

*.model.npz      serializers.save_npz(model): "conv/W", "conv/b", "fc/W", "fc/b".
*.optimizer.npz  serializers.save_npz(optimizer): "t" () int64 20, "epoch" () int64 0, and for every parameter
                 "conv/W/t" () int64 20 and "conv/W/ms" float32 of its shape; for Graves "conv/W/n", "conv/W/g",
                 "conv/W/delta" instead of ms. Hyper-parameters and hooks are not saved.
*.snapshot.npz   what the trainer's snapshot extension saves (its file has no suffix): the updater's part of it, under
                 "updater/model:main/conv/W" and "updater/optimizer:main/conv/W/ms", "updater/optimizer:main/t", ....

save_npz writes an archive of .npy files whose names have no leading "/".
"""

import warnings
from typing import Any

import inputs
import numpy as np

warnings.filterwarnings("ignore")
import chainer  # noqa: E402
from chainer import links, optimizer_hooks, optimizers, serializers, training  # noqa: E402

COMMAND = "python tests/checkpoints/make_chainer.py"
VERSIONS = {"chainer": chainer.__version__, "numpy": np.__version__}
LEAVES = {"weight": "W", "bias": "b"}


class Net(chainer.Chain):
    """The small net of inputs.py."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv = links.Convolution2D(2, 4, 3)
            self.fc = links.Linear(6, 5)
        for name, value in inputs.parameters().items():
            self.named(name).array[...] = value

    def named(self, name: str) -> chainer.Parameter:
        """The parameter that inputs.py calls so."""
        layer, leaf = name.split(".")
        return getattr(getattr(self, layer), LEAVES[leaf])

    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters now."""
        return {name: self.named(name).array.copy() for name in inputs.SHAPES}


def make(name: str, dialect: str, optimizer: Any, words: dict[str, Any], weight_decay: float = 0.0) -> None:
    """Step, save, go on, record."""
    net = Net()
    optimizer = optimizer(lr=inputs.LR, **words).setup(net)
    if weight_decay:
        optimizer.add_hook(optimizer_hooks.WeightDecay(weight_decay))
    saved = {}
    for at, gradients in enumerate(inputs.gradients()):
        optimizer.lr = inputs.LRS[at]
        for key in inputs.SHAPES:
            net.named(key).grad = gradients[key].copy()
        optimizer.update()
        if at + 1 == inputs.SAVED_AT:
            saved = net.arrays()
            serializers.save_npz(inputs.HERE / f"{name}.model.npz", net)
            serializers.save_npz(inputs.HERE / f"{name}.optimizer.npz", optimizer)
            iterator = chainer.iterators.SerialIterator([0], 1)
            updater = training.StandardUpdater(iterator, optimizer)
            flat = serializers.DictionarySerializer()
            updater.serialize(flat["updater"])
            kept = {key: value for key, value in flat.target.items() if "iterator" not in key}
            np.savez_compressed(inputs.HERE / f"{name}.snapshot.npz", **kept)
    all_words = {"lr": inputs.LR, **words} | ({"weight_decay": weight_decay} if weight_decay else {})
    note = "the parameters are in the .model.npz beside it; weight_decay is a hook, WeightDecay(rate)"
    final = net.arrays()
    inputs.record(name, f"{name}.optimizer.npz", dialect, all_words, saved, final, VERSIONS, COMMAND, note)
    for path in sorted(inputs.HERE.glob(f"{name}.*.npz")):
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    rmsprop = {"alpha": 0.99, "eps": 1e-8, "eps_inside_sqrt": False}
    make("chainer_rmsprop", "chainer", optimizers.RMSprop, rmsprop, weight_decay=0.01)
    graves = {"alpha": 0.95, "momentum": 0.9, "eps": 1e-4}
    make("chainer_graves", "chainer_graves", optimizers.RMSpropGraves, graves)
