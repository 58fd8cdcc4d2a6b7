"""Reads LevelDB's table of sorted keys, which TensorFlow uses as an index of tensors, and computes its checksum.

A table has blocks of entries, in which a key stores only its difference from the previous key, then a block that
lists the blocks, and a footer.
Source: google/leveldb, doc/table_format.md and util/crc32c.cc; tensorflow/core/lib/io/format.cc, the same format.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rmsprop.conversion.record import Array, Unreadable

MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_LANES = 4096
_MOST = 1 << 28


def varint(raw: bytes, at: int) -> tuple[int, int]:
    """Decode a number of seven bits per byte. Returns: the number and its end. Raises: ValueError."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(raw):
            raise ValueError("a number is cut short")
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if value >> 64:
                break
            return value, at
    raise ValueError("a number has more than 64 bits")


def crc32c(raw: bytes | memoryview, crc: int = 0) -> int:
    """Compute the Castagnoli checksum. It is linear, so a long input is split into lanes processed in parallel."""
    table = _table()
    length = len(raw) // _LANES
    if length >= 8:
        lanes = np.frombuffer(raw, np.uint8, length * _LANES).reshape(_LANES, length)
        state = np.zeros(_LANES, np.uint32)
        state[0] = crc ^ 0xFFFFFFFF
        for column in np.ascontiguousarray(lanes.T):
            state = table[(state ^ column) & 255] ^ (state >> np.uint32(8))
        shift = _zeros(length)
        while len(state) > 1:  # a lane precedes its neighbor: shift it by the neighbor's length
            state = _apply(shift, state[0::2]) ^ state[1::2]
            shift = _apply(shift, shift)
        crc = int(state[0]) ^ 0xFFFFFFFF
        raw = raw[length * _LANES :]
    small = table.tolist()
    crc ^= 0xFFFFFFFF
    for byte in bytes(raw):
        crc = small[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def mask(crc: int) -> int:
    """Return the masked form of a checksum, as stored, since data that contain plain checksums weaken a checksum."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read(path: Path) -> dict[bytes, bytes]:
    """Return all keys and values of a table, in the order of keys. Raises: Unreadable or ValueError."""
    size = path.stat().st_size
    if size > _MOST:
        raise Unreadable(f"{path.name} has {size} bytes, too many for an index of tensors")
    raw = path.read_bytes()
    if len(raw) < _FOOTER or struct.unpack_from("<Q", raw, size - 8)[0] != MAGIC:
        raise Unreadable(
            f"{path.name} does not end as the index of a TensorFlow checkpoint does: it is cut short, or another file"
        )
    footer = raw[-_FOOTER:]
    _, at = _handle(footer, 0)
    index, _ = _handle(footer, at)
    found: dict[bytes, bytes] = {}
    last = b""
    used = 0
    for _, handle in _entries(_block(raw, index, path)):
        place, _ = _handle(handle, 0)
        used += place[1]
        if used > size:
            raise Unreadable(f"{path.name} lists its blocks more than once: it is damaged")
        for key, value in _entries(_block(raw, place, path)):
            if found and key <= last:
                raise Unreadable(f"{path.name} has unsorted keys: it is damaged")
            found[key] = value
            last = key
    return found


def _handle(raw: bytes, at: int) -> tuple[tuple[int, int], int]:
    offset, at = varint(raw, at)
    size, at = varint(raw, at)
    return (offset, size), at


def _block(raw: bytes, handle: tuple[int, int], path: Path) -> bytes:
    offset, size = handle
    if offset + size + 5 > len(raw):
        raise Unreadable(f"{path.name} has a block beyond its end: it is damaged or cut")
    kind = raw[offset + size]
    (stored,) = struct.unpack_from("<I", raw, offset + size + 1)
    if stored != mask(crc32c(raw[offset : offset + size + 1])):
        raise Unreadable(f"{path.name} has a block that does not match its checksum: it is damaged")
    if kind != 0:
        raise Unreadable(
            f"{path.name} is compressed (kind {kind}), unlike TensorFlow's checkpoints; save it again in TensorFlow"
        )
    return raw[offset : offset + size]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the entries of a block, without its restart array."""
    if len(block) < 4:
        raise ValueError("a block is too short")
    (restarts,) = struct.unpack_from("<I", block, len(block) - 4)
    end = len(block) - 4 * (restarts + 1)
    if end < 0:
        raise ValueError("a block has too many restarts")
    at, key = 0, b""
    while at < end:
        shared, at = varint(block, at)
        own, at = varint(block, at)
        length, at = varint(block, at)
        if shared > len(key) or at + own + length > end or shared + own > 1 << 16:
            raise ValueError("an entry is longer than its block")
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


@functools.cache
def _table() -> Array:
    table: Array = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> np.uint32(1) ^ np.uint32(0x82F63B78), table >> np.uint32(1))
    return table


def _zeros(length: int) -> Array:
    """Return the effect of `length` zero bytes on a checksum's state, as a bit matrix with 32-bit columns."""
    made: Array = np.uint32(1) << np.arange(32, dtype=np.uint32)
    power = made.copy()
    for _ in range(8):  # one zero byte is eight times one zero bit
        power = np.where(power & 1, power >> np.uint32(1) ^ np.uint32(0x82F63B78), power >> np.uint32(1))
    while length:
        if length & 1:
            made = _apply(power, made)
        power = _apply(power, power)
        length >>= 1
    return made


def _apply(matrix: Array, vectors: Array) -> Array:
    made: Array = np.zeros_like(vectors)
    for bit in range(32):
        made ^= np.where(vectors >> np.uint32(bit) & 1, matrix[bit], np.uint32(0))
    return made
