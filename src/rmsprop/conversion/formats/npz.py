"""Reads and writes NumPy's .npz. The names of its arrays identify the framework that they come from."""

from __future__ import annotations

from pathlib import Path

from rmsprop.conversion.formats import archives, chainer, mxnet, optax
from rmsprop.conversion.formats.reading import layout, strange
from rmsprop.conversion.record import Checkpoint, Unreadable
from rmsprop.printing import shown


def sniff(path: Path) -> bool:
    """Return whether the file is a zip of .npy files."""
    return bool(archives.keys(path))


def read(path: Path, optimizer: str | None = None, parameters: str | None = None) -> Checkpoint:
    """Read parameters and state of optax, Chainer or MXNet, or parameters alone.

    Args:
        optimizer: the path of the state to read, if the file holds several of optax.
    Raises: Unreadable, also if the file does not contain the given path.
    """
    optax.refuse_parameters(path, parameters)
    with strange(path, "an .npz"):
        arrays = archives.arrays(path)
        keys = list(arrays)
        if optax.has_state(keys):
            return optax.from_arrays(path, arrays, optimizer)
        if optimizer is not None:
            raise Unreadable(f"--optimizer {shown(optimizer)} is not in {path.name}, which holds no state of optax")
        if chainer.has_state(keys):
            return chainer.from_arrays(path, arrays)
        if mxnet.has_state(keys):
            return mxnet.from_arrays(path, arrays)
        arrays = {name: value for name, value in arrays.items() if value.dtype.kind in "biufc"}
        kinds = {name: layout(name, value) for name, value in arrays.items()}
        return Checkpoint(params=arrays, kinds=kinds, notes=["The file holds no state of an optimizer."])


def write(path: Path, checkpoint: Checkpoint, template: Path | None = None) -> None:
    """Write the arrays under the names that optax or MXNet gives them.

    Args:
        template: for optax, a file with the keys to write.
    Raises: Unreadable for the state of another framework.
    """
    name = checkpoint.owner.name
    if name == "optax":
        optax.save(path, checkpoint, template)
    elif name in mxnet.SLOTS:
        archives.save(path, mxnet.to_arrays(checkpoint))
    else:
        raise Unreadable(f"an .npz is written for optax and MXNet, not for {name}; write a .pt or a .safetensors")
