"""Zip archives and NumPy's .npz, read member by member, without believing what they declare."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..record import Unreadable
from .reading import array, count, strange

# An archive may unfold to this many bytes, or to this many times its own size; more is taken for a bomb.
FREE, RATIO = 1 << 28, 64
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


def members(path: Path, wanted: tuple[str, ...] = ()) -> dict[str, bytes]:
    """The archive's members, in its order, or those of them that are wanted.

    Raises: Unreadable, for a damaged archive, one that unfolds to far more than it is, or a wanted name not in it.
    """
    with strange(path, "zip archive"), zipfile.ZipFile(path) as archive:
        infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        if len(infos) != sum(not info.is_dir() for info in archive.infolist()):
            raise Unreadable(f"{path} holds two members of one name")
        for name in wanted:
            if name not in infos:
                raise Unreadable(f"{path} holds no {name}; it has {', '.join(list(infos)[:8]) or 'no members'}")
        chosen = {name: infos[name] for name in wanted or infos}
        size, whole = path.stat().st_size, sum(info.file_size for info in chosen.values())
        packed = sum(info.compress_size for info in infos.values())
        if whole > max(FREE, RATIO * size) or packed > size:
            raise Unreadable(
                f"{path} declares {whole} bytes in an archive of {size}, as a decompression bomb does; "
                "if you made it, save it uncompressed"
            )
        read = {}
        for name, info in chosen.items():
            with archive.open(info) as member:
                read[name] = member.read()
            if len(read[name]) != info.file_size:
                raise Unreadable(f"{path} is cut short: {name} has {len(read[name])} of {info.file_size} bytes")
        return read


def arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz, in the file's order; objects are refused, for only pickle can read them."""
    with strange(path, ".npz"):
        return {
            name.removesuffix(".npy"): _array(raw, path, name.removesuffix(".npy"))
            for name, raw in members(path).items()
            if name.endswith(".npy")
        }


def npz_keys(path: Path) -> list[str]:
    """The names of an .npz' arrays; none of what is no .npz."""
    found = names(path)
    return [name.removesuffix(".npy") for name in found] if all(name.endswith(".npy") for name in found) else []


def save(path: Path, values: Mapping[str, np.ndarray]) -> None:
    """Write an .npz of any keys, `file` among them, which np.savez takes for itself."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, value in values.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(value), allow_pickle=False)


def _array(raw: bytes, path: Path, name: str) -> np.ndarray:
    file = io.BytesIO(raw)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise Unreadable(f"{path} holds {name!r} in version {version} of .npy; 1.0 and 2.0 are read")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file, max_header_size=_HEADER)
    if dtype.hasobject:
        raise Unreadable(
            f"{path} holds Python objects in {name!r}, which only code could read; save arrays of numbers"
        )
    rest = memoryview(raw)[file.tell() :]
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None:
        read_in = "bfloat16"  # what NumPy makes of ml_dtypes' bfloat16
    elif dtype.kind in "biufcSU" and dtype.names is None and dtype.subdtype is None:
        read_in = ""
    else:
        raise Unreadable(f"{path} holds {name!r} as {dtype}, which is no number")
    sizes = tuple(reversed(shape)) if fortran else shape
    if read_in:
        value = array(rest, read_in, sizes, path, name)
    else:
        if count(shape, path, name) * dtype.itemsize != len(rest):
            raise Unreadable(f"{path} declares {name!r} as {dtype} of shape {shape} and holds {len(rest)} bytes")
        value = np.frombuffer(rest, dtype, math.prod(shape)).reshape(sizes).astype(dtype.newbyteorder("="))
    return np.ascontiguousarray(value.T) if fortran else value
