"""Reads archives of torch.save that may be hostile, as data and within bounds on their size.

torch.load trusts the sizes in a pickle, and rejects a whole file for one foreign class, such as the run's arguments.
Here every tensor is a view of its record in the memory-mapped file, so it cannot exceed the record and allocates
nothing. Records are stored uncompressed, with checksums.
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
    "load it where it was created and save plain state dicts: torch.save({'model': model.state_dict(), 'optimizer': "
    "optimizer.state_dict()}, 'plain.pt')"
)
REWRITE = "torch.save(torch.load(file, map_location='cpu', weights_only=True), new)"
_MOST_PICKLE = 1 << 26
_ALIGNED = 16


def load(path: Path, checksums: bool = True) -> Any:
    """Return the saved value, with an `Opaque` for every object that only running code could create.

    OrderedDict, defaultdict and Counter become dicts, Parameters tensors, NumPy scalars numbers, and torch.Size a
    tuple. No code is run and nothing is imported.

    Args:
        checksums: verify every record, which reads the whole file. False: read the pickle alone. A file from before
            torch 1.6 has none, and its storages are views of the file, aligned or not.
    Raises: Unreadable, with one sentence, if the file is damaged, not torch.save's, or itself such an object.
    """
    if legacy.is_legacy(path):
        value = legacy.load(path, aligned=checksums)
        refuse_code(value, path)
        return value
    if not archives.is_archive(path):
        raise Unreadable(f"{path.name} is not an archive of torch.save, or is damaged")
    with path.open("rb") as file, archives.opened(path, file) as archive:
        pickle = _check(archive, path, checksums)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        records = _Records(archive, mapped, pickle.filename.removesuffix("data.pkl"))
        try:
            value = Machine(records.get).run(archives.content(archive, pickle, path))
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # an invalid pickle can raise anything
            reason = str(error) or type(error).__name__
            raise Unreadable(f"{path.name} is damaged: its pickle is invalid ({shown(reason, 100)})") from error
    refuse_code(value, path)
    return value


def refuse_code(value: Any, path: Path) -> None:
    """Refuse a value that only running code could create. Raises: Unreadable."""
    if isinstance(value, Opaque):
        raise Unreadable(f"loading {path.name} would run code ({shown(value.name)}), which is refused; {RESAVE}")


class _Records:
    """The records of an archive, as uint8 tensors over the memory-mapped file."""

    def __init__(self, archive: zipfile.ZipFile, mapped: mmap.mmap, folder: str) -> None:
        self._mapped = mapped
        self._members = {info.filename.removeprefix(f"{folder}data/"): info for info in archive.infolist()}
        self._cache: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        """Return the bytes of a record. Raises: KeyError; ValueError if they exceed the file."""
        import torch

        if key not in self._cache:
            info = self._members[key]
            head = self._mapped[info.header_offset : info.header_offset + 30]
            begin = (
                info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:], "little")
            )
            if begin + info.file_size > len(self._mapped):
                raise ValueError(f"the record {key} extends past the end of the file")
            made = torch.empty(0, dtype=torch.uint8, device="cpu")
            if info.file_size:
                made = torch.frombuffer(self._mapped, dtype=torch.uint8, offset=begin, count=info.file_size)
            self._cache[key] = made.clone() if made.data_ptr() % _ALIGNED else made
        return self._cache[key]


def _check(archive: zipfile.ZipFile, path: Path, checksums: bool) -> zipfile.ZipInfo:
    """Check that every record is stored uncompressed, once, and matches its checksum, unless `checksums` is False.

    Returns: the member with the pickle.
    Raises: Unreadable.
    """
    members = archive.infolist()
    pickles = [member for member in members if member.filename.rsplit("/", 1)[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise Unreadable(
            f"{path.name} is an archive that torch.save did not write: it holds {len(pickles)} data.pkl, not 1"
        )
    folder = pickles[0].filename.removesuffix("data.pkl")
    names = {member.filename for member in members}
    if any(name.rsplit("/", 1)[-1] == "constants.pkl" for name in names):
        raise Unreadable(f"{path.name} is a TorchScript archive, which contains code; {RESAVE}")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise Unreadable(
                f"{path.name} has compressed members, but torch.save stores them uncompressed: "
                f"rewrite it with {REWRITE}"
            )
    if pickles[0].file_size > _MOST_PICKLE:
        raise Unreadable(
            f"{path.name} has a pickle of {pickles[0].file_size} bytes without the tensors; at most {_MOST_PICKLE} "
            "are read"
        )
    if checksums:
        archives.intact(archive, path)
    if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") == b"big":
        raise Unreadable(f"{path.name} is big-endian: rewrite it with {REWRITE}")
    return pickles[0]


class Arrays:
    """Copies a file's tensors to NumPy arrays, within a bound on their total size.

    Attributes:
        left: how many bytes may still be allocated.
        notes: sentences about conversions, such as a widened dtype.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left = 8 * path.stat().st_size + (1 << 20)  # a byte of a quantized state takes 1 + 4
        self.notes: list[str] = []

    def array(self, value: Any, name: str) -> Array:
        """Return a tensor as an array. Raises: Unreadable for a tensor that is larger than its storage."""
        import torch

        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            kind = str(value.layout) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            kind = f"created by code ({shown(value.name)})" if isinstance(value, Opaque) else kind
            raise Unreadable(f"{self.path.name}: {shown(name)} is {kind}, not a dense tensor")
        if value.is_quantized or value.dtype in (torch.complex32,):
            raise Unreadable(f"{self.path.name}: {shown(name)} is {value.dtype}, which is not supported")
        size = value.numel() * value.element_size()
        self.left -= size
        if size > value.untyped_storage().nbytes() or self.left < 0:
            raise Unreadable(f"{self.path.name}: {shown(name)} claims {size} bytes, more than its storage has")
        value = value.detach().resolve_conj().resolve_neg()
        if value.dtype not in _NUMPY:
            self._note(f"{str(value.dtype).removeprefix('torch.')} arrays are kept, and written, as float32")
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
