"""Files written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, save: Callable[[Path], object]) -> Path:
    """Save under a temporary name beside the path, then rename, so that nobody meets half a file.

    Args:
        save: writes the file at the path that it is given.
    Returns: the path. Its directory is made if need be.
    Raises: what `save` raises; then the file that was at the path is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
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
