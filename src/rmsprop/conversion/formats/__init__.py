"""The file formats of checkpoints, one row each, in the order in which a file is matched against them."""

from __future__ import annotations

from rmsprop.conversion.formats import keras, mxnet, npz, optax, pytorch, safetensors_file, tensorflow
from rmsprop.conversion.record import Format

FORMATS: tuple[Format, ...] = (
    *pytorch.FORMATS,
    Format(
        "safetensors",
        (".safetensors",),
        safetensors_file.sniff,
        safetensors_file.read,
        safetensors_file.write,
        outline=safetensors_file.outline,
    ),
    *keras.FORMATS,
    *tensorflow.FORMATS,
    Format("npz", (".npz",), npz.sniff, npz.read, npz.write, template=True, chooses=True),
    Format("mxnet", (".nd", ".params"), mxnet.sniff, mxnet.read),
    Format("flax", (".msgpack",), optax.sniff, optax.read, optax.write, template=True, chooses=True),
)
