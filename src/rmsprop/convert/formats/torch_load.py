"""torch.load(weights_only=True) on files that may be hostile: checked before, and what comes out measured.

torch believes the sizes in a pickle: it would read past a record's end. With `mmap=True` every storage is a slice of
the file, so nothing lies outside it and nothing is allocated; records are stored, not compressed, and have checksums.
"""

from __future__ import annotations

import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from rmsprop.convert.formats import archive
from rmsprop.convert.record import Array, Unreadable

RESAVE = (
    "where it was made, load it and save plain state dicts: torch.save({'model': model.state_dict(), 'optimizer': "
    "optimizer.state_dict()}, 'plain.pt')"
)
# What state dicts are made of. Everything else in a pickle is code, or has no place in a checkpoint.
_PLAIN = {
    "collections OrderedDict",
    "collections defaultdict",
    "collections Counter",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
    "torch._tensor _rebuild_from_type_v2",
    "torch.nn.parameter Parameter",
    "torch Tensor",
    "torch.serialization _get_layout",
    "__builtin__ dict",
    "builtins dict",
    "builtins set",
    "__builtin__ set",
}
_MOST_PICKLE = 1 << 28


def load(path: Path) -> Any:
    """What torch.save wrote. Raises: Unreadable, in one sentence, for code, damage, or an archive of others."""
    import torch

    if not archive.is_archive(path):
        raise Unreadable(
            f"{path.name} is no archive of torch.save: it is damaged, or from before torch 1.6; then write it again "
            "with torch.save(torch.load(file, weights_only=True), new)"
        )
    with archive.opened(path) as held:
        _check(held, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # torch's reader raises whatever a damaged pickle leads it to
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unreadable(
            f"{path.name} cannot be loaded with weights_only=True: {archive.shown(first, 160)}"
        ) from error


def _check(held: zipfile.ZipFile, path: Path) -> None:
    """Records stored whole, with their checksums, and a pickle of plain data. Raises: Unreadable."""
    pickles = [member for member in held.infolist() if member.filename.rsplit("/", 1)[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise Unreadable(
            f"{path.name} is an archive, and none of torch.save's: it holds {len(pickles)} data.pkl, not 1"
        )
    names = {member.filename.rsplit("/", 1)[-1] for member in held.infolist()}
    if "constants.pkl" in names:
        raise Unreadable(f"{path.name} is a TorchScript archive, which holds code; {RESAVE}")
    for member in held.infolist():
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise Unreadable(
                f"{path.name} has compressed members; torch.save stores them: save it again with torch.save"
            )
    if pickles[0].file_size > _MOST_PICKLE:
        raise Unreadable(
            f"{path.name} has a pickle of {pickles[0].file_size} bytes, beside the tensors: too much to trust"
        )
    archive.intact(held, path)
    code = next((name for name in _globals(held.read(pickles[0]), path) if not _plain(name)), None)
    if code is not None:
        raise Unreadable(f"{path.name} needs code to be loaded ({archive.shown(code)}), and no code is run; {RESAVE}")


def _globals(pickle: bytes, path: Path) -> list[str]:
    """Every name that a pickle would import."""
    try:
        found = []
        for op, argument, _ in pickletools.genops(pickle):
            if op.name == "GLOBAL":
                found.append(str(argument))
            elif op.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "BYTEARRAY8"):
                found.append(f"the opcode {op.name}")
            elif op.name in ("LONG_BINPUT", "LONG_BINGET") and int(argument or 0) > len(pickle):
                raise Unreadable(f"{path.name} is damaged: its pickle counts further than it is long")
        return found
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(
            f"{path.name} is damaged: its pickle breaks off ({archive.shown(str(error), 80)})"
        ) from error


def _plain(name: str) -> bool:
    """Whether a name in a pickle stands for data: a container, a tensor, its dtype or its storage."""
    module, _, what = name.partition(" ")
    storage = module in ("torch", "torch.storage", "torch.cuda") and what.endswith("Storage")
    dtype = module == "torch" and what in _DTYPES
    return name in _PLAIN or storage or dtype


_DTYPES = {
    *("float16 float32 float64 bfloat16 half float double complex32 complex64 complex128 bool".split()),  # noqa: SIM905
    *("uint8 uint16 uint32 uint64 int8 int16 int32 int64 short int long".split()),  # noqa: SIM905
}


class Arrays:
    """NumPy copies of a file's tensors, within a bound on what they may take together.

    Attributes:
        notes: what was widened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left = 4 * path.stat().st_size + (1 << 20)
        self.notes: list[str] = []

    def array(self, value: Any, name: str) -> Array:
        """One tensor as an array. Raises: Unreadable for a tensor that claims more than its storage holds."""
        import torch

        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            kind = str(value.layout) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise Unreadable(f"{self.path.name}: {archive.shown(name)} is {kind}, and no dense tensor")
        if value.is_quantized or value.dtype in (torch.complex32,):
            raise Unreadable(f"{self.path.name}: {archive.shown(name)} is {value.dtype}, which no RMSprop keeps")
        size = value.numel() * value.element_size()
        self.left -= size
        if size > value.untyped_storage().nbytes() or self.left < 0:
            raise Unreadable(
                f"{self.path.name}: {archive.shown(name)} claims {size} bytes, more than the file stores for it"
            )
        value = value.detach().resolve_conj().resolve_neg()
        if value.dtype not in _NUMPY:
            self._note(f"{str(value.dtype).removeprefix('torch.')} arrays are held, and written, as float32")
            return np.array(value.to(torch.float32).numpy())
        return np.array(value.numpy(), order="C")

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


def _dtypes() -> set[Any]:
    import torch

    plain = (torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bool)
    return {*plain, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


_NUMPY = _dtypes()
