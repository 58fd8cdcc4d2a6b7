"""Reads files that torch.save wrote before torch 1.6: five pickles, followed by the storages.

torch allocates each storage at its declared size before reading it. This reader first compares each declared size
with the bytes in the file. Storages from a GPU are read onto the CPU.
"""

from __future__ import annotations

import functools
import mmap
import pickletools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

from rmsprop.conversion.formats.pytorch.pickle import Machine
from rmsprop.conversion.record import Unreadable
from rmsprop.printing import shown

_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle: 0x1950a86a20f9469cfc6c
_WIDTHS = {
    **{"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1},
    **{"Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8},
}
_STORAGE = re.compile(r"torch(?:\.cuda|\.storage)? (\w+)Storage")
_ALIGNED = 16
_SLACK = 4096  # bytes of padding that may follow
Places = Mapping[str, tuple[int, int]]


def is_legacy(path: Path) -> bool:
    """Return whether the file begins with the magic number that torch.save wrote before torch 1.6."""
    try:
        with path.open("rb") as file:
            return _MAGIC in file.read(64)
    except OSError:
        return False


def load(path: Path, aligned: bool = True) -> Any:
    """Return the saved value, as `load.load` does.

    Args:
        aligned: copy every storage that is not aligned in the file. False: the numbers of the tensors are not read.
    Raises: Unreadable, with one sentence.
    """
    import torch

    with path.open("rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def _record(key: str) -> Any:
        at, size = places[key]
        made = (
            torch.frombuffer(whole, dtype=torch.uint8, offset=at, count=size)
            if size
            else torch.empty(0, dtype=torch.uint8, device="cpu")
        )
        return made.clone() if aligned and made.data_ptr() % _ALIGNED else made

    try:
        pickle, places = _measured(whole)
        return Machine(functools.cache(_record)).run(pickle)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = shown(str(error) or type(error).__name__, 100)
        raise Unreadable(
            f"{path.name} is a file of torch.save from before torch 1.6, damaged or cut short: {reason}"
        ) from error


def _measured(whole: mmap.mmap) -> tuple[bytes, Places]:
    """Return the pickle that uses the storages, and each storage's offset and size in bytes by key.

    Raises: ValueError for a storage whose bytes are missing, and any other error for a damaged pickle.
    """
    pickles = [_one(whole) for _ in range(5)]
    declared, at = _declared(pickles[3]), whole.tell()
    places = {}
    for key in _texts(pickles[4]):
        count, width = declared.pop(key)
        if int.from_bytes(whole[at : at + 8], "little") != count or at + 8 + count * width > len(whole):
            raise ValueError(f"storage {key} is incomplete")
        places[key] = at + 8, count * width
        at += 8 + count * width
    if declared:
        raise ValueError("it uses a storage that it does not contain")
    if len(whole) - at > _SLACK:
        raise ValueError(f"{len(whole) - at} bytes follow its last storage")
    return pickles[3], places


def _one(whole: mmap.mmap) -> bytes:
    """Return the next pickle of the file. Raises: pickletools' errors if the pickle is cut short."""
    start = whole.tell()
    for _ in pickletools.genops(cast(IO[bytes], whole)):
        pass
    return whole[start : whole.tell()]


def _texts(pickle: bytes) -> list[str]:
    """Return the strings in a pickle, in order."""
    return [text for _, text, _ in pickletools.genops(pickle) if isinstance(text, str)]


def _declared(pickle: bytes) -> dict[str, tuple[int, int]]:
    """Return the element count and the element size in bytes that a pickle declares for each storage, by key.

    A storage's persistent id is ("storage", class, key, device, count, view), of constants or memo entries.
    """
    found: dict[str, tuple[int, int]] = {}
    memo: dict[int, object] = {}
    parts: list[object] = []
    for op, argument, _ in pickletools.genops(pickle):
        if op.name == "MARK":
            parts = []
        elif op.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else int(argument)] = parts[-1] if parts else None
        elif op.name in ("GET", "BINGET", "LONG_BINGET"):
            parts.append(memo[int(argument or 0)])
        elif op.name == "STACK_GLOBAL":
            parts[-2:] = [f"{parts[-2]} {parts[-1]}"]
        elif op.name == "BINPERSID":
            _, kind, key, _, count, view = parts[:6]
            storage = _STORAGE.fullmatch(str(kind))
            if storage is None or not isinstance(key, str) or not isinstance(count, int) or count < 0:
                raise ValueError("a storage has no size")
            if view is not None:
                raise ValueError("a storage is a part of another")
            found[key] = count, _WIDTHS[storage[1]]
        else:
            parts.append(argument)
    return found
