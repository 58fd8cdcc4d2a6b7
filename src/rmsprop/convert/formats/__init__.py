"""The files that a checkpoint may come in: one row per format, asked in this order."""

from __future__ import annotations

from rmsprop.convert.formats import (
    hdf5_write,
    keras3,
    mxnet,
    npz,
    optax,
    safetensors_file,
    tensorbundle,
    tf_hdf5,
    torch_dcp,
    torch_file,
    torch_folder,
    torch_write,
)
from rmsprop.convert.record import Format

FORMATS: tuple[Format, ...] = (
    Format("torch", torch_file.SUFFIXES, torch_file.sniff, torch_file.read, torch_write.write, chooses=True),
    Format("torch dcp", (), torch_dcp.sniff, torch_dcp.read, chooses=True),
    Format("torch folder", (), torch_folder.sniff, torch_folder.read, chooses=True),
    Format("safetensors", (".safetensors",), safetensors_file.sniff, safetensors_file.read, safetensors_file.write),
    Format(
        "keras", (".keras",), keras3.sniff_archive, keras3.read, hdf5_write.write_archive, asks=True, template=True
    ),
    Format(
        "keras weights",
        (".weights.h5",),
        keras3.sniff_weights,
        keras3.read,
        hdf5_write.write_weights,
        asks=True,
        template=True,
    ),
    Format("keras hdf5", (".h5", ".hdf5"), tf_hdf5.sniff, tf_hdf5.read, hdf5_write.write_h5, template=True),
    Format(
        "tensorflow",
        (".index",),
        tensorbundle.sniff,
        tensorbundle.read,
        tensorbundle.write,
        template=True,
        parts=(".data-00000-of-00001", ".index"),
    ),
    Format("npz", (".npz",), npz.sniff, npz.read, npz.write, template=True, chooses=True),
    Format("mxnet", (".nd", ".params"), mxnet.sniff, mxnet.read, mxnet.write),
    Format("flax", (".msgpack",), optax.sniff, optax.read, optax.write, template=True, chooses=True),
)
