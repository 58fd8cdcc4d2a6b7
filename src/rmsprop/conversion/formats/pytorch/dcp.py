"""Reads folders of torch.distributed.checkpoint: `.metadata`, a pickle that locates each piece, and `*.distcp`.

A restricted unpickler reads the metadata. It creates only numbers, strings, lists and blank records. Every piece is a
torch.save archive, and is read as one.
"""

from __future__ import annotations

import math
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from rmsprop.conversion.formats.pytorch.file import understand
from rmsprop.conversion.formats.pytorch.load import load
from rmsprop.conversion.record import Checkpoint, Unreadable
from rmsprop.printing import shown

METADATA = ".metadata"
_MOST_METADATA = 1 << 26
_PIECES = 1_000_000
_RECORDS = {
    f"torch.distributed.checkpoint.{name}"
    for name in (
        "metadata.Metadata",
        "metadata.TensorStorageMetadata",
        "metadata.BytesStorageMetadata",
        "metadata.ChunkStorageMetadata",
        "metadata.TensorProperties",
        "metadata.MetadataIndex",
        "metadata.StorageMeta",
        "metadata._MEM_FORMAT_ENCODING",
        "filesystem._StorageInfo",
    )
}
_LEFT_OUT = {
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "torch.serialization._get_layout",
}


class _Pairs(list[tuple[Any, Any]]):
    """Replaces a dict by a list of its items, so that no key is hashed."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.append((key, value))


class _Record:
    """Replaces an object by its attributes."""

    held: Mapping[str, Any] = MappingProxyType({})

    def __new__(cls, *_: Any) -> _Record:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, _Pairs):
            self.held = {name: value for name, value in state if isinstance(name, str)}
        elif isinstance(state, tuple) and state and isinstance(state[0], str):
            self.held = {"dtype": state[0]}  # of TensorProperties


class _Reader(pickle._Unpickler):
    """Unpickler in pure Python, which imports nothing that the file names and hashes none of its keys."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement for a name of the pickle. Raises: UnpicklingError for an unexpected name."""
        full = f"{module}.{name}"
        if full in _RECORDS:
            return _Record
        if full == "torch.Size":
            return _size
        if full in _LEFT_OUT:
            return _nothing
        if module == "torch" and name.isalnum():  # a dtype
            return name
        raise pickle.UnpicklingError(f"it names {shown(full)}, which metadata does not contain")


def _on(opcode: bytes) -> Callable[[Callable[[Any], None]], None]:
    def _register(do: Callable[[Any], None]) -> None:
        _Reader.dispatch[opcode[0]] = do

    return _register


@_on(pickle.EMPTY_DICT)
def _empty_dict(reader: Any) -> None:
    reader.append(_Pairs())


for _opcode in (pickle.DICT, pickle.EMPTY_SET, pickle.FROZENSET, pickle.ADDITEMS):
    del _Reader.dispatch[_opcode[0]]


def _size(sizes: Any = ()) -> tuple[int, ...]:
    """Validate a shape; replaces torch.Size."""
    if not isinstance(sizes, (tuple, list)) or len(sizes) > 64 or any(type(n) is not int or n < 0 for n in sizes):
        raise ValueError("an invalid shape")
    return tuple(sizes)


def _nothing(*_: Any) -> None:
    """Return None; replaces the objects that are skipped."""


def sniff(path: Path) -> bool:
    """Return whether a folder contains `.metadata` and pieces."""
    return path.is_dir() and (path / METADATA).is_file() and any(path.glob("*.distcp"))


def read(path: Path, optimizer: str | None = None, parameters: str | None = None) -> Checkpoint:
    """Read the model and the optimizer, assembled from all processes' pieces. Raises: Unreadable."""
    whole, size = _whole(path, _Pieces.tensor)
    return understand(whole, path, optimizer, parameters, size=size)


def outline(path: Path) -> Any:
    """Return the nested dict that was saved, with tensors on the meta device. Raises: Unreadable."""
    return _whole(path, _Pieces.outline)[0]


def _whole(path: Path, tensor: Callable[[_Pieces, str, Mapping[str, Any]], Any]) -> tuple[Any, int]:
    """Return the nested dict that was saved, and the bytes of its pieces.

    Args:
        tensor: returns a tensor by its name and its metadata.
    """
    files = {file.name: file for file in path.glob("*.distcp")}
    size = sum(file.stat().st_size for file in files.values())
    try:
        return _nested(_Pieces(path, files, size), tensor), size
    except Unreadable:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise Unreadable(
            f"{path.name} is a folder of torch.distributed.checkpoint that cannot be read "
            f"({shown(str(error) or type(error).__name__, 100)}); where it was created, convert it to a file with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(folder, 'plain.pt')"
        ) from error


class _Pieces:
    """Index of the metadata: each entry's kind, the location of its pieces, and its path in the nested dict."""

    def __init__(self, path: Path, files: dict[str, Path], size: int) -> None:
        self.path, self.files = path, files
        raw = (path / METADATA).read_bytes() if (path / METADATA).stat().st_size <= _MOST_METADATA else b""
        metadata = _Reader(BytesIO(raw)).load().held
        self.entries: dict[str, Any] = {
            name: own for name, own in metadata["state_dict_metadata"] if isinstance(name, str)
        }
        self.places = {name: place for name, place in metadata.get("planner_data") or () if isinstance(name, str)}
        self.stored: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
        total = 0
        for index, info in metadata["storage_data"]:
            own, where = index.held, info.held
            if where.get("transform_descriptors"):
                raise ValueError(f"its pieces are transformed by {shown(where['transform_descriptors'])}")
            at = where["relative_path"], int(where["offset"]), int(where["length"])
            self.stored[str(own["fqn"]), tuple(own.get("offset") or ())] = at
            total += at[2]
            if at[0] not in files:
                raise ValueError(f"{shown(at[0])} is missing")
            if min(at[1:]) < 0 or at[1] + at[2] > files[at[0]].stat().st_size or total > size:
                raise ValueError("it lists more bytes than its pieces have: one of them is cut short")

    def get(self, name: str, offset: tuple[int, ...] = ()) -> Any:
        """Load one piece. Raises: Unreadable; KeyError if the metadata does not list the piece."""
        if (name, offset) not in self.stored and not any(offset):
            offset = ()
        file, start, length = self.stored[name, offset]
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / f"{self.path.name}.{file}"
            with self.files[file].open("rb") as stream:
                stream.seek(start)
                part.write_bytes(stream.read(length))
            value = load(part)
            return value.clone() if hasattr(value, "untyped_storage") else value

    def tensor(self, name: str, entry: Mapping[str, Any]) -> Any:
        """Assemble a tensor from its chunks. Raises: ValueError for chunks that leave a gap."""
        import torch

        size, whole, filled = _size(entry["size"]), None, 0
        for chunk in entry["chunks"]:
            at, shape = _size(chunk.held["offsets"]), _size(chunk.held["sizes"])
            value = self.get(name, at)
            sound = isinstance(value, torch.Tensor) and tuple(value.shape) == shape
            if not sound or not len(at) == len(shape) == len(size):
                raise ValueError(f"a piece of {shown(name)} does not match the metadata")
            if shape == size:
                return value
            filled += math.prod(shape)
            if whole is None:
                if sum(math.prod(_size(c.held["sizes"])) for c in entry["chunks"]) != math.prod(size):
                    raise ValueError(f"the pieces of {shown(name)} leave a gap, or overlap")
                whole = torch.zeros(size, dtype=value.dtype, device="cpu")
            whole[tuple(slice(a, a + n) for a, n in zip(at, shape, strict=True))] = value
        if whole is None or filled != math.prod(size):
            raise ValueError(f"{shown(name)} has no pieces")
        return whole

    def outline(self, name: str, entry: Mapping[str, Any]) -> Any:
        """Return a tensor of the shape and dtype in the metadata, on the meta device. Raises: ValueError."""
        import torch

        dtype = getattr(torch, str(entry["properties"].held.get("dtype")), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{shown(name)} has no dtype")
        return torch.empty(_size(entry["size"]), dtype=dtype, device="meta")


def _nested(pieces: _Pieces, tensor: Callable[[_Pieces, str, Mapping[str, Any]], Any]) -> Any:
    """Return the nested dict that was saved, without objects that only running code could create."""
    whole: dict[Any, Any] = {}
    for name, entry in pieces.entries.items():
        held = entry.held
        try:
            value = tensor(pieces, name, held) if "size" in held else pieces.get(name)
        except Unreadable:
            if "size" in held:
                raise
            continue
        place = pieces.places.get(name, (name,))
        if not isinstance(place, tuple) or not place or len(place) > 100:
            raise ValueError(f"{shown(name)} has no path")
        _put(whole, place, value)
    return _listed(whole)


def _put(whole: dict[Any, Any], place: tuple[Any, ...], value: Any) -> None:
    for key in _plain(place[:-1]):
        whole = whole.setdefault(key, {})
    (last,) = _plain(place[-1:])
    whole[last] = value


def _plain(place: tuple[Any, ...]) -> Iterator[Any]:
    for key in place:
        if type(key) not in (str, int):
            raise ValueError("a path with a key that is neither a string nor an integer")
        yield key


def _listed(value: Any) -> Any:
    """Convert nested dicts with integer keys back to lists. A dict's own keys were saved as strings."""
    if not isinstance(value, dict):
        return value
    items = {key: _listed(item) for key, item in value.items()}
    if items and all(type(key) is int for key in items):
        return [items[key] for key in sorted(items)]
    return items
