"""Archives of torch.save that may be hostile: checked before, read as data, and what comes out measured.

torch.load believes the sizes in a pickle, and refuses a file for one foreign class in it, such as the arguments of
the run. Here every tensor is a view of its record in the mapped file, so nothing lies outside it and nothing is
allocated. Records are stored, not compressed, and have checksums.
"""

from __future__ import annotations

import mmap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from rmsprop.conversion.formats import archives
from rmsprop.conversion.formats.pytorch import legacy
from rmsprop.conversion.formats.pytorch.pickle import Machine, Opaque
from rmsprop.conversion.record import Array, Unreadable
from rmsprop.printing import shown

RESAVE = (
    "where it was made, load it and save plain state dicts: torch.save({'model': model.state_dict(), 'optimizer': "
    "optimizer.state_dict()}, 'plain.pt')"
)
REWRITE = "torch.save(torch.load(file, map_location='cpu', weights_only=True), new)"
_MOST_PICKLE = 1 << 26
_ALIGNED = 16


def load(path: Path) -> Any:
    """What torch.save wrote, an `Opaque` in the place of every object that only code could make.

    OrderedDict, defaultdict and Counter become dicts, Parameters their tensors, NumPy scalars numbers, torch.Size a
    tuple. No code is run and nothing is imported.
    Raises: Unreadable, in one sentence, for damage, an archive of others, or a file that is one such object.
    """
    if legacy.is_legacy(path):
        value = legacy.load(path)
        refuse_code(value, path)
        return value
    if not archives.is_archive(path):
        raise Unreadable(f"{path.name} is not an archive of torch.save, or is damaged")
    with path.open("rb") as file, archives.opened(path, file) as held:
        pickle = _check(held, path)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        records = _Records(held, mapped, pickle.filename.removesuffix("data.pkl"))
        try:
            value = Machine(records.get).run(archives.content(held, pickle, path))
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # whatever an unsound pickle leads to
            said = str(error) or type(error).__name__
            raise Unreadable(f"{path.name} is damaged: its pickle has no meaning ({shown(said, 100)})") from error
    refuse_code(value, path)
    return value


def refuse_code(value: Any, path: Path) -> None:
    """Refuse what is wanted of a file, and needs code to be made. Raises: Unreadable."""
    if isinstance(value, Opaque):
        raise Unreadable(f"{path.name} needs code to be loaded ({shown(value.name)}), and no code is run; {RESAVE}")


class _Records:
    """The records of an archive as tensors of bytes over the mapped file."""

    def __init__(self, held: zipfile.ZipFile, mapped: mmap.mmap, folder: str) -> None:
        self._mapped = mapped
        self._members = {info.filename.removeprefix(f"{folder}data/"): info for info in held.infolist()}
        self._known: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        """The bytes of a record. Raises: KeyError."""
        import torch

        if key not in self._known:
            info = self._members[key]
            head = self._mapped[info.header_offset : info.header_offset + 30]
            begin = (
                info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:], "little")
            )
            if begin + info.file_size > len(self._mapped):
                raise ValueError(f"the record {key} past the end of the file")
            made = torch.empty(0, dtype=torch.uint8, device="cpu")
            if info.file_size:
                made = torch.frombuffer(self._mapped, dtype=torch.uint8, offset=begin, count=info.file_size)
            self._known[key] = made.clone() if made.data_ptr() % _ALIGNED else made
        return self._known[key]


def _check(held: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    """Check that records are stored whole, once, with their checksums.

    Returns: the member with the pickle.
    Raises: Unreadable.
    """
    members = held.infolist()
    pickles = [member for member in members if member.filename.rsplit("/", 1)[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise Unreadable(
            f"{path.name} is an archive, and none of torch.save's: it holds {len(pickles)} data.pkl, not 1"
        )
    folder = pickles[0].filename.removesuffix("data.pkl")
    names = {member.filename for member in members}
    if any(name.rsplit("/", 1)[-1] == "constants.pkl" for name in names):
        raise Unreadable(f"{path.name} is a TorchScript archive, which holds code; {RESAVE}")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise Unreadable(
                f"{path.name} has compressed members, which torch.save stores: write it again with {REWRITE}"
            )
    if pickles[0].file_size > _MOST_PICKLE:
        raise Unreadable(
            f"{path.name} has a pickle of {pickles[0].file_size} bytes, beside the tensors: too much to trust"
        )
    archives.intact(held, path)
    if f"{folder}byteorder" in names and held.read(f"{folder}byteorder") == b"big":
        raise Unreadable(f"{path.name} is big-endian: write it again with {REWRITE}")
    return pickles[0]


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
            kind = f"made by code ({shown(value.name)})" if isinstance(value, Opaque) else kind
            raise Unreadable(f"{self.path.name}: {shown(name)} is {kind}, and no dense tensor")
        if value.is_quantized or value.dtype in (torch.complex32,):
            raise Unreadable(f"{self.path.name}: {shown(name)} is {value.dtype}, which no RMSprop keeps")
        size = value.numel() * value.element_size()
        self.left -= size
        if size > value.untyped_storage().nbytes() or self.left < 0:
            raise Unreadable(f"{self.path.name}: {shown(name)} claims {size} bytes, more than the file stores for it")
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
