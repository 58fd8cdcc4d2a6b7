"""Writes TensorFlow checkpoints, whole ones and the index of damaged ones; the package only reads them."""

import struct

from rmsprop.conversion.formats.tensorflow.bundle import STRING
from rmsprop.conversion.formats.tensorflow.sstable import MAGIC, crc32c, mask


def varint(value):
    """A number in seven bits a byte."""
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])


def field(tag, value):
    """One field of a protocol buffer: a number, or bytes with their length."""
    if isinstance(value, int):
        return varint(tag << 3) + varint(value)
    return varint(tag << 3 | 2) + varint(len(value)) + value


def write_table(path, entries):
    """A table of one block, whose checksums are sound and whose keys share no beginnings."""
    made = bytearray()

    def _put(keys):
        block = b"".join(
            b"\0" + varint(len(key)) + varint(len(value)) + key + value for key, value in sorted(keys.items())
        )
        block += struct.pack("<2I", 0, 1)  # one restart, at 0
        handle = varint(len(made)) + varint(len(block))
        made.extend(block + b"\0" + struct.pack("<I", mask(crc32c(block + b"\0"))))
        return handle

    data = _put(entries)
    footer = _put({}) + _put({max(entries): data})
    path.write_bytes(made + footer.ljust(40, b"\0") + struct.pack("<Q", MAGIC))


def write_bundle(prefix, tensors):
    """A checkpoint of one data file, from arrays of float32 or int64, and bytes for strings."""
    data, table = bytearray(), {b"": field(1, 1)}
    for name, value in sorted(tensors.items()):
        if isinstance(value, bytes):
            length = struct.pack("<I", len(value))
            raw = varint(len(value)) + struct.pack("<I", mask(crc32c(length))) + value
            kind, shape = STRING, ()
        else:
            raw, kind, shape = value.tobytes(), {"float32": 1, "int64": 9}[value.dtype.name], value.shape
        sizes = b"".join(field(2, field(1, size)) for size in shape)
        entry = {1: kind, 2: sizes, 3: 0, 4: len(data), 5: len(raw), 6: mask(crc32c(raw))}
        table[name.encode()] = b"".join(field(tag, one) for tag, one in entry.items())
        data += raw
    write_table(prefix.with_name(f"{prefix.name}.index"), table)
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)
    return prefix
