"""NumPy's .npz, and members of archives, read without believing what they declare."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rmsprop.convert.formats.archive import content, opened, shown
from rmsprop.convert.formats.reading import array, count, strange
from rmsprop.convert.record import Array, Unreadable

_MAGIC = b"PK\x03\x04"
_HEADER = 10_000  # bytes of an .npy header; ours and everybody's are below 200


def is_zip(path: Path) -> bool:
    """Whether the file starts as a zip archive does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False


def names(path: Path) -> list[str]:
    """The members' names; none of what is no archive."""
    if not is_zip(path):
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception:  # a sniff answers; it does not complain
        return []


def keys(path: Path) -> list[str]:
    """The names of an .npz' arrays; none of what is no .npz."""
    found = names(path)
    return [name.removesuffix(".npy") for name in found] if all(name.endswith(".npy") for name in found) else []


def members(path: Path, wanted: tuple[str, ...] = ()) -> dict[str, bytes]:
    """The archive's members, in its order, or those of them that are wanted.

    Raises: Unreadable, for a damaged archive, one that unpacks to far more than it is, or a wanted name not in it.
    """
    with opened(path) as archive:
        infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        for name in wanted:
            if name not in infos:
                raise Unreadable(f"{path.name} holds no {name}; it has {shown(', '.join(infos), 200)}")
        return {name: content(archive, infos[name], path) for name in wanted or infos}


def arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz, in the file's order. Raises: Unreadable, also for objects: only pickle can read them."""
    with strange(path, ".npz"):
        return {
            name.removesuffix(".npy"): _array(raw, path, name.removesuffix(".npy"))
            for name, raw in members(path).items()
            if name.endswith(".npy")
        }


def save(path: Path, values: Mapping[str, Array]) -> None:
    """Write an .npz of any keys, `file` among them, which np.savez takes for itself."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, value in values.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(value), allow_pickle=False)


def _array(raw: bytes, path: Path, name: str) -> Array:
    file = io.BytesIO(raw)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise Unreadable(f"{path.name} holds {shown(name)} in version {version} of .npy; 1.0 and 2.0 are read")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file, max_header_size=_HEADER)
    if dtype.hasobject:
        raise Unreadable(
            f"{path.name} holds Python objects as {shown(name)}, which are code; save plain arrays instead"
        )
    rest = memoryview(raw)[file.tell() :]
    sizes = tuple(reversed(shape)) if fortran else shape
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None:
        value = array(rest, "bfloat16", sizes, path, name)  # what NumPy makes of ml_dtypes' bfloat16
    elif dtype.kind in "biufcSU" and dtype.names is None and dtype.subdtype is None:
        if count(shape, path, name) * dtype.itemsize != len(rest):
            raise Unreadable(f"{path.name} declares {shown(name)} of shape {shape[:8]} and holds {len(rest)} bytes")
        value = np.frombuffer(rest, dtype, math.prod(shape)).reshape(sizes).astype(dtype.newbyteorder("="))
    else:
        raise Unreadable(f"{path.name} holds {shown(name)} as {shown(str(dtype))}, which is no number")
    return np.ascontiguousarray(value.T) if fortran else value
