"""Files written whole or not at all."""

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, save: Callable[[Path], object], *, sync: bool = False) -> Path:
    """Save under a temporary name beside the path, then rename, so that nobody meets half a file.

    Args:
        save: writes the file at the path that it is given.
        sync: wait until the file, and its name, are on the disk: then a power failure leaves the old file or the new
            one too. What killed processes of this machine left of their own saves is removed.
    Returns: the path. Its directory is made if need be.
    Raises: what `save` raises; then the file that was at the path is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{platform.node()}."
    part = path.with_name(f"{prefix}{os.getpid()}.part")
    try:
        save(part)
        if sync:
            _sync(part, os.O_RDWR)
        os.replace(part, path)
        if sync and os.name == "posix":
            _sync(path.parent, os.O_RDONLY)
    finally:
        part.unlink(missing_ok=True)
    if sync:
        _sweep(path.parent, prefix)
    return path


def write_together(path: Path, endings: tuple[str, ...], save: Callable[[Path], object]) -> Path:
    """The same for files of one beginning that belong together, such as x.index and x.data: all or none of them.

    Args:
        path: the beginning, or one of the files.
        endings: what follows the beginning, in the order in which files are to appear.
        save: writes all of them; it is given a beginning.
    Returns: the last file's path.
    """
    start = path
    for ending in endings:
        start = start.with_name(start.name.removesuffix(ending))
    start.parent.mkdir(parents=True, exist_ok=True)
    part = start.with_name(f".{start.name}.{os.getpid()}.part")
    try:
        save(part)
        for ending in endings:
            os.replace(part.with_name(part.name + ending), start.with_name(start.name + ending))
    finally:
        for ending in endings:
            part.with_name(part.name + ending).unlink(missing_ok=True)
    return start.with_name(start.name + endings[-1])


def _sync(path: Path, flags: int) -> None:
    """Wait until what was written to a file, or to a directory's list of names, is on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(folder: Path, prefix: str) -> None:
    """Remove the parts whose process is gone."""
    if os.name != "posix":
        return  # signal 0, which asks whether a process lives, ends it elsewhere
    for left in folder.iterdir():
        pid = left.name[len(prefix) : -len(".part")]
        if not (left.name.startswith(prefix) and left.suffix == ".part" and pid.isdecimal()):
            continue
        with suppress(PermissionError):  # another user's, and alive
            try:
                os.kill(int(pid), 0)
            except (ProcessLookupError, OverflowError):
                left.unlink(missing_ok=True)
