"""Reads the part of HDF5 that h5py writes by default, in pure Python.

A checkpoint may come from anyone, and the HDF5 C library crashes or hangs on damaged files: on two of a thousand with
a few bytes changed. This reader handles the parts of the format that Keras uses: superblock version 0, groups with
symbol tables, object headers of version 1, contiguous and compact numeric datasets, and attributes of numbers or
strings. It refuses anything else by name. Files are written with h5py.

pyfive 1.3.0 does not replace this reader. It discards the order in which names were created, which Keras 3's files
need. It also reads many damaged files as valid, and allocates what they declare.

Source: The HDF Group, HDF5 File Format Specification, version 3.0, sections II to IV.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rmsprop.conversion.formats.reading import array, count, strange
from rmsprop.conversion.record import Array, Unreadable
from rmsprop.printing import shown

MAGIC = b"\x89HDF\r\n\x1a\n"
REPACK = "rewrite it by `h5repack --low=0 --high=1 -f NONE -l CONTI IN OUT`"
RESAVE = "Keras does not write such files: load the model in Keras and save it again with model.save"
_NOWHERE = 2**64 - 1
_NODES, _DEPTH, _MESSAGES = 500_000, 64, 10_000  # objects per file, nesting depth of groups, messages per header
_FLOATS = {(2, 5): "float16", (2, 8): "bfloat16", (4, 8): "float32", (8, 11): "float64"}  # bytes, exponent bits


def is_hdf5(path: Path) -> bool:
    """Return whether the file starts as an HDF5 file does."""
    try:
        with path.open("rb") as file:
            return file.read(8) == MAGIC
    except OSError:
        return False


@dataclasses.dataclass
class Group:
    """A group with its attributes, subgroups and datasets, in the order of their creation.

    h5py lists names alphabetically. The heap that stores them grows at its end, so offsets in it give the order.
    """

    address: int
    attrs: dict[str, Any] = dataclasses.field(default_factory=dict)
    groups: dict[str, Group] = dataclasses.field(default_factory=dict)
    datasets: dict[str, Dataset] = dataclasses.field(default_factory=dict)

    def group(self, path: str) -> Group | None:
        """Return the group at a path such as a/b, or None."""
        at: Group | None = self
        for part in path.split("/"):
            at = at.groups.get(part) if at else None
        return at

    def dataset(self, path: str) -> Dataset | None:
        """Return the dataset at a path such as a/b, or None."""
        inside, _, name = path.rpartition("/")
        group = self.group(inside) if inside else self
        return group.datasets.get(name) if group else None

    def walk(self, path: str = "") -> Iterator[tuple[str, Group]]:
        """Yield the group and all groups below it, with their paths."""
        yield path, self
        for name, group in self.groups.items():
            yield from group.walk(f"{path}/{name}" if path else name)


@dataclasses.dataclass
class Dataset:
    """A dataset whose bytes lie within the file, and are not read yet."""

    file: _File
    name: str
    address: int
    dtype: str
    shape: tuple[int, ...]
    size: int
    order: str
    inline: bytes | None = None
    attrs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def read(self) -> Array:
        """Read the values."""
        raw = self.file.take(self.address, self.size) if self.inline is None else self.inline
        if self.order == ">" and self.dtype != "bfloat16":
            raw = np.frombuffer(raw, np.dtype(self.dtype).newbyteorder(">")).astype(f"<{self.dtype}").tobytes()
        return array(raw, self.dtype, self.shape, self.file.path, self.name)


def read(path: Path, stream: BinaryIO, size: int) -> Group:
    """Read all groups and attributes of a file, and locate its datasets.

    Args:
        path: the file's name in messages.
        stream: the file, which must stay open while datasets are read.
        size: the file's size in bytes.
    Raises: Unreadable.
    """
    with strange(path, "an HDF5 file"):
        return _File(path, stream, size).root()


def top(path: Path) -> set[str]:
    """Return the names of a file's top-level members and attributes, or an empty set if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return _File(path, stream, path.stat().st_size).names()
    except Exception:  # sniffing never raises
        return set()


@dataclasses.dataclass
class _Message:
    kind: int
    data: bytes


class _File:
    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self.path, self.stream, self.size = path, stream, size
        self.seen: set[int] = set()
        self.declared = 0  # total bytes of datasets and attributes, at most the file's size
        self.left = 4 * size + (1 << 20)  # bytes that may still be read; a valid file is read about once
        self.heaps: dict[int, dict[int, tuple[int, int]]] = {}

    def take(self, at: int, length: int) -> bytes:
        """Read bytes of the file. Raises: Unreadable beyond its end, or if too many bytes were read in total."""
        if at < 0 or length < 0 or at + length > self.size:
            raise Unreadable(
                f"{self.path.name} points to {length} bytes at {at}, beyond its {self.size}: it is damaged or cut"
            )
        self.left -= max(length, 16)
        if self.left < 0:
            raise Unreadable(f"{self.path.name} refers to the same bytes too many times: it is damaged")
        self.stream.seek(at)
        raw = self.stream.read(length)
        if len(raw) != length:
            raise Unreadable(f"{self.path.name} is cut short at {at + len(raw)} bytes")
        return raw

    def declare(self, size: int, name: str) -> None:
        """Count the bytes that a dataset or an attribute declares. Raises: Unreadable above the file's size."""
        self.declared += size
        if self.declared > self.size:
            raise Unreadable(
                f"{self.path.name} declares more data than it has bytes, from {shown(name)} on: it is damaged"
            )

    def refuse(self, what: str, how: str = REPACK) -> Unreadable:
        """Return the exception for an unsupported part of the format. Args: how: advice to get a supported file."""
        return Unreadable(f"{self.path.name} has {what}, which is not supported; {how}")

    def start(self) -> int:
        """Return the address of the root group (II.A)."""
        head = self.take(0, 96)
        if head[:8] != MAGIC:
            raise Unreadable(f"{self.path.name} is not an HDF5 file")
        if head[8] != 0 or head[13:15] != b"\x08\x08":
            raise self.refuse(f"an HDF5 superblock of version {head[8]}")
        base, _, end = struct.unpack_from("<3Q", head, 24)
        if base != 0:
            raise self.refuse("an HDF5 base address")
        if end > self.size:
            raise Unreadable(f"{self.path.name} is cut short: it has {self.size} of {end} bytes")
        return int(struct.unpack_from("<Q", head, 64)[0])

    def names(self) -> set[str]:
        """Return the names of the root group's attributes and members."""
        messages = self.messages(self.start())
        names = {self.attribute(message.data, "/")[0] for message in messages if message.kind == 0x0C}
        for message in messages:
            if message.kind == 0x11:
                names |= {name for name, _ in self.children(*struct.unpack_from("<2Q", message.data))}
        return names

    def root(self) -> Group:
        """Read all groups."""
        root = self.object(self.start(), "/", 0)
        if not isinstance(root, Group):
            raise Unreadable(f"{self.path.name} has no root group: it is damaged")
        return root

    def object(self, address: int, name: str, depth: int) -> Group | Dataset:
        """Read the object that a header describes (IV.A). Keras gives every object one name, so none occurs twice."""
        if address in self.seen or len(self.seen) >= _NODES or depth > _DEPTH:
            raise self.refuse(f"{shown(name)} under two names, or too deeply nested groups", RESAVE)
        self.seen.add(address)
        messages = self.messages(address)
        attrs = dict(self.attribute(message.data, name) for message in messages if message.kind == 0x0C)
        tables = [message.data for message in messages if message.kind == 0x11]
        if tables:
            group = Group(address, attrs)
            for child, at in self.children(*struct.unpack_from("<2Q", tables[0])):
                if child in group.groups or child in group.datasets:
                    raise Unreadable(f"{self.path.name} has {shown(child)} twice in {shown(name)}: it is damaged")
                made = self.object(at, child, depth + 1)
                if isinstance(made, Group):
                    group.groups[child] = made
                else:
                    group.datasets[child] = made
            return group
        return self.dataset({message.kind: message.data for message in messages}, attrs, name)

    def messages(self, address: int) -> list[_Message]:
        """Read an object header's messages, including continuation blocks (IV.A.1.a)."""
        version, _, total, _, length = struct.unpack_from("<BBHII", self.take(address, 12))
        if version != 1:
            raise self.refuse(f"an HDF5 object header of another version than 1 (at {address})")
        if total > _MESSAGES:
            raise Unreadable(f"{self.path.name} has {total} messages in one header: it is damaged")
        blocks, seen = [(address + 16, length)], set()
        found: list[_Message] = []
        while blocks and len(found) < total:
            at, left = blocks.pop(0)
            if at in seen:
                raise Unreadable(f"{self.path.name} has a header that continues in a loop: it is damaged")
            seen.add(at)
            raw, here = self.take(at, left), 0
            while here + 8 <= left and len(found) < total:
                kind, size, flags = struct.unpack_from("<HHB", raw, here)
                data = raw[here + 8 : here + 8 + size]
                if len(data) != size:
                    raise Unreadable(f"{self.path.name} has a header message that exceeds its block: it is damaged")
                if flags & 2:
                    raise self.refuse("a shared (committed) HDF5 datatype", RESAVE)
                here += 8 + size
                if kind == 0x10:
                    blocks.append(struct.unpack("<2Q", data))
                if kind in (0x02, 0x06, 0x15):
                    raise self.refuse("a new-style HDF5 group")
                found.append(_Message(kind, data))
        return found

    def children(self, tree: int, heap: int) -> list[tuple[str, int]]:
        """Return the names in a group, oldest first, with their addresses (III.A to III.D)."""
        magic, length, _, names = struct.unpack_from("<4s4x3Q", self.take(heap, 32))
        if magic != b"HEAP":
            raise Unreadable(f"{self.path.name} has no name heap at {heap}: it is damaged")
        text = self.take(names, length)
        pending, seen = [tree], set()
        found: list[tuple[int, str, int]] = []
        while pending:
            at = pending.pop()
            if at in seen:
                raise Unreadable(f"{self.path.name} has a name tree with a cycle: it is damaged")
            seen.add(at)
            magic = self.take(at, 4)
            if magic == b"TREE":
                kind, _, used = struct.unpack_from("<BBH", self.take(at + 4, 4))
                if kind != 0:
                    raise Unreadable(f"{self.path.name} has a tree at {at} that is not a name tree: it is damaged")
                entries = struct.unpack(f"<{2 * used}Q", self.take(at + 32, 16 * used)) if used else ()
                pending.extend(reversed(entries[::2]))
            elif magic == b"SNOD":
                (symbols,) = struct.unpack_from("<H", self.take(at + 6, 2))
                table = self.take(at + 8, 40 * symbols)
                for offset in range(0, 40 * symbols, 40):
                    name, address, cached = struct.unpack_from("<QQI", table, offset)
                    end = text.find(b"\0", name)
                    if cached == 2 or address == _NOWHERE:
                        raise self.refuse("a soft or external link", RESAVE)
                    if name >= length or end <= name:
                        raise Unreadable(f"{self.path.name} has a name beyond its heap: it is damaged")
                    found.append((name, text[name:end].decode(), address))
            else:
                raise Unreadable(f"{self.path.name} has no node of a name tree at {at}: it is damaged")
        return [(name, address) for _, name, address in sorted(found)]

    def dataset(self, messages: dict[int, bytes], attrs: dict[str, Any], name: str) -> Dataset:
        """Build a dataset from its header messages: shape, type and location of its bytes."""
        if not {0x01, 0x03, 0x08} <= messages.keys():
            raise Unreadable(
                f"{self.path.name} has {shown(name)} without a shape, type or location: it is damaged, or not a "
                "checkpoint"
            )
        if 0x0B in messages or 0x07 in messages:
            raise self.refuse(f"{shown(name)} compressed, or stored in another file")
        shape = self.shape(messages[0x01], name)
        dtype, order, width = self.number(messages[0x03], name)
        size = count(shape, self.path, name) * width
        place = messages[0x08]
        inline = None
        where = 0
        if place[0] != 3 or place[1] > 1:
            raise self.refuse(f"{shown(name)} in chunks")
        if place[1] == 0:
            (stored,) = struct.unpack_from("<H", place, 2)
            inline = place[4 : 4 + stored]
        else:
            where, stored = struct.unpack_from("<2Q", place, 2)
            where, stored = (0, 0) if where == _NOWHERE else (where, stored)
        if stored != size:
            raise Unreadable(
                f"{self.path.name} declares {size} bytes of {shown(name)} and stores {stored}: it is damaged"
            )
        self.declare(size, name)
        if inline is None:
            self.take(where, 0 if not size else 1)
            self.take(where + size, 0)
        return Dataset(self, name, where, dtype, shape, size, order, inline, attrs)

    def shape(self, raw: bytes, name: str) -> tuple[int, ...]:
        """Return the shape in a dataspace message (IV.A.2.b)."""
        version, rank, flags = raw[0], raw[1], raw[2]
        if version not in (1, 2) or rank > 32 or (version == 2 and raw[3] == 2):
            raise self.refuse(f"{shown(name)} with an unsupported dataspace ({version}, {rank}, {flags})", RESAVE)
        return struct.unpack_from(f"<{rank}Q", raw, 8 if version == 1 else 4)

    def number(self, raw: bytes, name: str) -> tuple[str, str, int]:
        """Decode a datatype (IV.A.2.d). Returns: NumPy's name, the byte order, the size in bytes."""
        kind, bits = raw[0] & 15, raw[1]
        (width,) = struct.unpack_from("<I", raw, 4)
        order = ">" if bits & 1 else "<"
        if kind == 0 and width in (1, 2, 4, 8):
            return f"{'int' if bits & 8 else 'uint'}{8 * width}", order, width
        if kind == 1 and not bits & 64:
            dtype = _FLOATS.get((width, raw[13]))
            if dtype and (dtype != "bfloat16" or order == "<"):
                return dtype, order, width
        if kind == 8 and width == 1:
            return "uint8", "<", 1  # h5py's True and False
        raise self.refuse(f"{shown(name)} of a type that is not numeric", RESAVE)

    def attribute(self, raw: bytes, owner: str) -> tuple[str, Any]:
        """Return an attribute's name and value (IV.A.2.m)."""
        version, flags, names, types, spaces = struct.unpack_from("<BBHHH", raw)
        if version not in (1, 2, 3) or (version > 1 and flags):
            raise self.refuse(f"an unsupported attribute on {shown(owner)}", RESAVE)
        at, step = (9 if version == 3 else 8), (8 if version == 1 else 1)
        parts = []
        for length in (names, types, spaces):
            parts.append(raw[at : at + length])
            at += -(-length // step) * step
        name = parts[0].split(b"\0")[0].decode()
        return name, self.value(name, parts[1], self.shape(parts[2], name), raw[at:])

    def value(self, name: str, kind: bytes, shape: tuple[int, ...], data: bytes) -> Any:
        """Return a string, a list of strings or an array, or None for a type that Keras does not use."""
        total = count(shape, self.path, name)
        (width,) = struct.unpack_from("<I", kind, 4)
        self.declare(total * width, name)
        if total * width > len(data):
            raise Unreadable(
                f"{self.path.name} has an attribute {shown(name)} that exceeds its header: it is damaged"
            )
        texts: list[str]
        if kind[0] & 15 == 3:
            texts = [data[i * width : (i + 1) * width].rstrip(b"\0 ").decode() for i in range(total)]
        elif kind[0] & 15 == 9 and kind[1] & 15 == 1 and width == 16:
            texts = [self.heaped(*struct.unpack_from("<IQI", data, 16 * i)).decode() for i in range(total)]
        elif kind[0] & 15 in (0, 1, 8):
            dtype, order, _ = self.number(kind, name)
            return array(data[: total * width], dtype, shape, self.path, name) if order == "<" else None
        else:
            return None
        return texts if shape else texts[0]

    def heaped(self, length: int, heap: int, index: int) -> bytes:
        """Read a string from the global heap (III.E)."""
        if length == 0:
            return b""
        if heap not in self.heaps:
            self.heaps[heap] = dict(self.objects(heap))
        at, size = self.heaps[heap].get(index, (0, 0))
        if length > size:
            raise Unreadable(f"{self.path.name} has a string that is not in its heap: it is damaged")
        self.declare(length, "a string")
        return self.take(at, length)

    def objects(self, heap: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yield the index, the address and the size of each object in a global heap."""
        magic, total = struct.unpack_from("<4s4xQ", self.take(heap, 16))
        if magic != b"GCOL":
            raise Unreadable(f"{self.path.name} has no global heap at {heap}: it is damaged")
        at = heap + 16
        while at + 16 <= heap + total:
            index, size = struct.unpack_from("<H6xQ", self.take(at, 16))
            if index == 0:
                break
            yield index, (at + 16, size)
            at += 16 + -(-size // 8) * 8
