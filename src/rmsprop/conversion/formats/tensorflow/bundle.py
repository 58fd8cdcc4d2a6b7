"""Reads TensorFlow's tensor bundles without TensorFlow: PREFIX.index, a table of tensors, and PREFIX.data-....

Values in the table are protocol buffers. This module decodes the few fields that it needs by hand.
Source: tensorflow/core/util/tensor_bundle/tensor_bundle.cc and core/protobuf/tensor_bundle.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rmsprop.conversion.formats.reading import array, count
from rmsprop.conversion.formats.tensorflow import sstable
from rmsprop.conversion.formats.tensorflow.sstable import crc32c, mask, varint
from rmsprop.conversion.record import Array, Unreadable
from rmsprop.printing import shown

STRING = 7
_DTYPES = {
    **{1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 8: "complex64", 9: "int64"},
    **{10: "bool", 14: "bfloat16", 17: "uint16", 18: "complex128", 19: "float16", 22: "uint32", 23: "uint64"},
}
_SHARDS = 10_000
_NAME = 4096  # bytes of a tensor's name
Field = tuple[int, int | bytes]


def prefix(path: Path) -> Path:
    """Return a bundle's prefix, from the prefix itself or the path of one of its files."""
    name = path.name
    if name.endswith(".index"):
        return path.with_name(name.removesuffix(".index"))
    start, dot, rest = name.rpartition(".data-")
    return path.with_name(start) if dot and rest[:5].isdigit() else path


def index_of(path: Path) -> Path:
    """Return the path of the bundle's table."""
    start = prefix(path)
    return start.with_name(f"{start.name}.index")


def shard(path: Path, number: int, shards: int) -> Path:
    """Return the path of one of the bundle's data files."""
    start = prefix(path)
    return start.with_name(f"{start.name}.data-{number:05d}-of-{shards:05d}")


def fields(raw: bytes) -> Iterator[Field]:
    """Yield the fields of a protocol buffer: integers, and bytes for length-delimited ones. Raises: ValueError."""
    at = 0
    while at < len(raw):
        tag, at = varint(raw, at)
        kind, number = tag & 7, tag >> 3
        if kind == 0:
            value, at = varint(raw, at)
            yield number, value
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            if at + size > len(raw):
                raise ValueError("a field is cut short")
            yield number, int.from_bytes(raw[at : at + size], "little")
            at += size
        elif kind == 2:
            size, at = varint(raw, at)
            if at + size > len(raw):
                raise ValueError("a field is cut short")
            yield number, raw[at : at + size]
            at += size
        else:
            raise ValueError(f"a field is of kind {kind}")


def text(value: int | bytes) -> str:
    """Return a string field. Raises: ValueError."""
    if isinstance(value, int):
        raise ValueError("a field is an integer instead of a string")
    return value.decode()


def number(value: int | bytes) -> int:
    """Return an integer field. Raises: ValueError."""
    if isinstance(value, bytes):
        raise ValueError("a field is bytes instead of an integer")
    return value


class Bundle:
    """A bundle's validated table. Tensors are read one by one.

    Attributes: entries: by name, (dtype, shape, shard, offset, size, checksum).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, tuple[int, tuple[int, ...], int, int, int, int]] = {}
        table = sstable.read(index_of(path))
        if b"" not in table:
            raise Unreadable(f"{index_of(path).name} has no header: it is not the index of a TensorFlow checkpoint")
        self.shards = 0
        for tag, value in fields(table.pop(b"")):
            if tag == 1:
                self.shards = number(value)
            if tag == 2 and value:
                raise Unreadable(f"{index_of(path).name} was written on a big-endian machine, which is not supported")
        if not 0 < self.shards <= _SHARDS:
            raise Unreadable(f"{index_of(path).name} declares {self.shards} data files: it is damaged")
        for name, raw in table.items():
            if len(name) > _NAME:
                raise Unreadable(f"{index_of(path).name} has a name of {len(name)} bytes: it is damaged")
            self.entries[name.decode()] = self._entry(name.decode(), raw)
        files = [shard(path, number, self.shards) for number in {entry[2] for entry in self.entries.values()}]
        stored = sum(file.stat().st_size for file in files if file.is_file())
        if all(file.is_file() for file in files) and sum(entry[4] for entry in self.entries.values()) > stored:
            raise Unreadable(
                f"{self.path.name} lists more bytes than its data files have: it is cut short, or damaged"
            )

    def _entry(self, name: str, raw: bytes) -> tuple[int, tuple[int, ...], int, int, int, int]:
        values = dict.fromkeys(range(1, 8), 0)
        shape: tuple[int, ...] = ()
        for tag, value in fields(raw):
            if tag == 2:
                dims = [dict(fields(dim)) for at, dim in fields(_bytes(value)) if at == 2 and isinstance(dim, bytes)]
                shape = tuple(number(dim.get(1, 0)) for dim in dims)
            elif tag == 7:
                raise Unreadable(
                    f"{self.path.name} holds {shown(name)} in parts (a partitioned variable), which is not "
                    "supported; load it in TensorFlow, assign it to one variable and save that"
                )
            elif tag in values:
                values[tag] = number(value)
        if values[3] >= self.shards:
            raise Unreadable(
                f"{self.path.name} places {shown(name)} in file {values[3]} of {self.shards}: it is damaged"
            )
        return values[1], shape, values[3], values[4], values[5], values[6]

    def raw(self, name: str) -> bytes:
        """Read a tensor's bytes and verify their checksum, except for strings, whose checksum has another form."""
        dtype, shape, place, offset, size, checksum = self.entries[name]
        if dtype != STRING:
            kind = _DTYPES.get(dtype)
            if kind is None:
                raise Unreadable(
                    f"{self.path.name} holds {shown(name)} as TensorFlow type {dtype}, which is not numeric"
                )
            width = 2 if kind == "bfloat16" else np.dtype(kind).itemsize
            if count(shape, self.path, name) * width != size:
                raise Unreadable(
                    f"{self.path.name} declares {shown(name)} as {kind} of shape {shape[:8]} in {size} bytes: damaged"
                )
        file = shard(self.path, place, self.shards)
        if not file.is_file():
            raise Unreadable(
                f"{file.name} is missing: a TensorFlow checkpoint consists of its .index and its .data files"
            )
        if offset + size > file.stat().st_size:
            raise Unreadable(f"{file.name} is cut short: {shown(name)} should end at byte {offset + size}")
        with file.open("rb") as stream:
            stream.seek(offset)
            raw = stream.read(size)
        if dtype != STRING and mask(crc32c(raw)) != checksum:
            raise Unreadable(f"{file.name} does not match the checksum of {shown(name)}: it is damaged")
        return raw

    def tensor(self, name: str) -> Array:
        """Read a numeric tensor."""
        dtype, shape, *_ = self.entries[name]
        return array(self.raw(name), _DTYPES.get(dtype, ""), shape, self.path, name)

    def string(self, name: str) -> bytes:
        """Read a tensor of one string."""
        raw = self.raw(name)
        length, at = varint(raw, 0)
        if self.entries[name][0] != STRING or at + 4 + length != len(raw):
            raise Unreadable(f"{self.path.name} does not store {shown(name)} as one string: it is damaged")
        checksum = mask(crc32c(struct.pack("<I", length)))
        if raw[at : at + 4] != struct.pack("<I", checksum):
            raise Unreadable(f"{self.path.name} does not match the checksum of {shown(name)}: it is damaged")
        return raw[at + 4 :]


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a field is an integer instead of a message")
    return value
