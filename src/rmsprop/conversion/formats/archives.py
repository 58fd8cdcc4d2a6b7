"""Reads zip archives and NumPy's .npz that may be hostile, after validating their members and sizes."""

from __future__ import annotations

import io
import lzma
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from rmsprop.conversion.formats.reading import array, count, strange
from rmsprop.conversion.record import Array, Unreadable
from rmsprop.printing import shown

# The exceptions that zipfile may raise for a hostile file.
BROKEN = (
    zipfile.BadZipFile,
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    OverflowError,
    IndexError,
    KeyError,
    lzma.LZMAError,
    struct.error,
    zlib.error,
)
MOST_MEMBERS = 1_000_000
SLACK = 1 << 20
_CHUNK = 1 << 18
_MAGIC = b"PK\x03\x04"
_HEADER = 10_000  # maximum bytes of an .npy header; usual ones have fewer than 200
_LOCAL_HEADER = 30  # bytes before a member's name


def is_archive(path: Path) -> bool:
    """Return whether the file begins and ends as a zip archive. A tar that contains one only ends as one."""
    try:
        with path.open("rb") as file:
            return file.read(2) == b"PK" and zipfile.is_zipfile(path)
    except BROKEN:
        return False


@contextmanager
def opened(path: Path, file: IO[bytes] | None = None) -> Iterator[zipfile.ZipFile]:
    """Open an archive and validate its members with `check`.

    Args:
        file: the same file, if the caller has it open.
    Raises: Unreadable with one sentence, also if the body fails on a damaged archive.
    """
    try:
        with zipfile.ZipFile(file or path) as archive:
            check(archive, path)
            yield archive
    except Unreadable:
        raise
    except BROKEN as error:
        raise Unreadable(f"{path.name} is a damaged or truncated archive: {shown(str(error), 100)}") from error


def check(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse an archive that no checkpoint resembles. Raises: Unreadable.

    Members must not be encrypted, have paths outside the archive, share a name or overlap. They must be stored or
    deflated, as NumPy and Keras write them. Together they may declare at most ten times the file's size plus 1 MiB;
    `content` never reads more of a member than it declares.
    """
    members = archive.infolist()
    if len(members) > MOST_MEMBERS:
        raise Unreadable(f"{path.name} holds {len(members)} members, more than any checkpoint")
    most = 10 * path.stat().st_size + SLACK
    total = end = 0
    for member in sorted(members, key=lambda own: own.header_offset):
        name = member.filename
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
            raise Unreadable(f"{path.name} holds a member with a path outside the archive: {shown(name)}")
        if member.flag_bits & 1:
            raise Unreadable(f"{path.name} is encrypted; rewrite it without a password")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Unreadable(
                f"{path.name} compresses {shown(name)} by zip method {member.compress_type}; rewrite it stored or "
                "deflated, as np.savez and np.savez_compressed do"
            )
        if member.header_offset < end:
            raise Unreadable(f"{path.name} holds members that overlap, such as {shown(name)}")
        end = member.header_offset + _LOCAL_HEADER + member.compress_size
        total += member.file_size
        if total > most:
            raise Unreadable(
                f"{path.name} would unpack to more than ten times its size, which is not read; if it is valid, "
                "rewrite it without compression, such as with np.savez"
            )
    if len({member.filename for member in members}) < len(members):
        raise Unreadable(f"{path.name} holds two members with the same name")


def content(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> bytes:
    """Return a member's bytes. Raises: Unreadable if their number differs from the declared size."""
    parts = []
    with archive.open(member) as stream:
        while part := stream.read(_CHUNK):  # a single read would unpack more than the declared size first
            parts.append(part)
    raw = b"".join(parts)
    if len(raw) != member.file_size:
        raise Unreadable(f"{path.name} is cut short: {shown(member.filename)} has {len(raw)} bytes")
    return raw


def intact(archive: zipfile.ZipFile, path: Path) -> None:
    """Verify the checksum of every member. Raises: Unreadable for the first that differs."""
    bad = archive.testzip()
    if bad is not None:
        raise Unreadable(
            f"{path.name} is damaged: {shown(bad)} does not match its checksum (a file written under "
            "torch.serialization.set_crc32_options(False) has none: rewrite it without that, with "
            "torch.save(torch.load(file, map_location='cpu', weights_only=True), new))"
        )


def is_zip(path: Path) -> bool:
    """Return whether the file starts as a zip archive does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False


def names(path: Path) -> list[str]:
    """Return the members' names, or [] if the file is not a zip archive."""
    if not is_zip(path):
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception:  # sniffing never raises
        return []


def keys(path: Path) -> list[str]:
    """Return the names of an .npz file's arrays, or [] if the file is not an .npz."""
    files = names(path)
    return [name.removesuffix(".npy") for name in files] if all(name.endswith(".npy") for name in files) else []


def members(path: Path, wanted: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Return the contents of an archive's members, in its order, or of the `wanted` members only.

    Raises: Unreadable for a damaged archive, one that would unpack to far more than its size, or a missing member.
    """
    with opened(path) as archive:
        infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        for name in wanted:
            if name not in infos:
                raise Unreadable(f"{path.name} holds no {name}; it has {shown(', '.join(infos), 200)}")
        return {name: content(archive, infos[name], path) for name in wanted or infos}


def arrays(path: Path) -> dict[str, Array]:
    """Return the arrays of an .npz, in the file's order. Raises: Unreadable, also for objects, which need pickle."""
    with strange(path, "an .npz"):
        return {
            name.removesuffix(".npy"): _array(raw, path, name.removesuffix(".npy"))
            for name, raw in members(path).items()
            if name.endswith(".npy")
        }


def save(path: Path, values: Mapping[str, Array]) -> None:
    """Write an .npz with any keys. np.savez reserves the key `file`."""
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
        value = array(rest, "bfloat16", sizes, path, name)  # how NumPy stores ml_dtypes' bfloat16
    elif dtype.kind in "biufcSU" and dtype.names is None and dtype.subdtype is None:
        if count(shape, path, name) * dtype.itemsize != len(rest):
            raise Unreadable(f"{path.name} declares {shown(name)} of shape {shape[:8]} and holds {len(rest)} bytes")
        value = np.frombuffer(rest, dtype, math.prod(shape)).reshape(sizes).astype(dtype.newbyteorder("="))
    else:
        raise Unreadable(f"{path.name} holds {shown(name)} as {shown(str(dtype))}, which is not a numeric type")
    return np.ascontiguousarray(value.T) if fortran else value
