"""Zip archives that may be hostile: opened, measured and checked before anything in them is believed."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rmsprop.convert.record import Unreadable
from rmsprop.printing import shown as shown

# What a hostile file may make zipfile raise, besides its own BadZipFile.
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


def is_archive(path: Path) -> bool:
    """Whether it begins and ends as an archive does: another file may end with one, such as a tar that holds it."""
    try:
        with path.open("rb") as file:
            return file.read(2) == b"PK" and zipfile.is_zipfile(path)
    except BROKEN:
        return False


@contextmanager
def opened(path: Path, file: IO[bytes] | None = None) -> Iterator[zipfile.ZipFile]:
    """An archive whose members unpack within reason, none of them encrypted, none with a path outside.

    Args:
        file: the open file, for who reads it in other ways too.
    Raises: Unreadable with one sentence, also for what the body meets in a damaged archive.
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
    """Refuse members that are encrypted, lie outside, or unpack to far more than the file. Raises: Unreadable."""
    members = archive.infolist()
    if len(members) > MOST_MEMBERS:
        raise Unreadable(f"{path.name} holds {len(members)} members, more than any checkpoint")
    most = 10 * path.stat().st_size + SLACK
    total = 0
    for member in members:
        name = member.filename
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
            raise Unreadable(f"{path.name} holds a member that lies outside of it: {shown(name)}")
        if member.flag_bits & 1:
            raise Unreadable(f"{path.name} is encrypted; write it again without a password")
        total += member.file_size
        if total > most:
            raise Unreadable(f"{path.name} would unpack to more than ten times its size; no checkpoint does")


def intact(archive: zipfile.ZipFile, path: Path) -> None:
    """Compare every member with its checksum. Raises: Unreadable for the first that differs."""
    bad = archive.testzip()
    if bad is not None:
        raise Unreadable(
            f"{path.name} is damaged: {shown(bad)} does not have its checksum (a file written under "
            "torch.serialization.set_crc32_options(False) has none: write it again without that, with "
            "torch.save(torch.load(file, map_location='cpu', weights_only=True), new))"
        )
