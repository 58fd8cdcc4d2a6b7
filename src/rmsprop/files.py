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
