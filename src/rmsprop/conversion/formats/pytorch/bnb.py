"""Dequantizes bitsandbytes' optimizer state: float32, or 8-bit codes times the maximum of each block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rmsprop.conversion.formats.pytorch.load import Arrays
from rmsprop.conversion.record import Array, Unreadable
from rmsprop.printing import shown
from rmsprop.state.precision import by_table

BLOCKS = (256, 2048, 4096, 1024, 512, 128, 64)


def dequantize(entry: Mapping[Any, Any], name: str, arrays: Arrays, path: Path) -> Array:
    """Return the average of squares of one parameter: qmap1[state1] · absmax1 per block, or state1 if it is float.

    Source: bitsandbytes 0.50.2, functional.py dequantize_blockwise.
    Raises: Unreadable for tables that do not fit.
    """
    if "state1" not in entry or "state2" in entry:
        raise Unreadable(f"{path.name}: the state of {shown(name)} is not that of bitsandbytes' RMSprop, one state1")
    codes = arrays.array(entry["state1"], f"state1 of {name}")
    if codes.dtype != np.uint8:
        return codes
    if "qmap1" not in entry or "absmax1" not in entry:
        raise Unreadable(f"{path.name}: the 8-bit state of {shown(name)} lacks qmap1 or absmax1, its tables")
    table = arrays.array(entry["qmap1"], f"qmap1 of {name}")
    largest = arrays.array(entry["absmax1"], f"absmax1 of {name}").reshape(-1)
    block = next((b for b in BLOCKS if -(-codes.size // b) == largest.size), None)
    if table.shape != (256,) or block is None or table.dtype.kind != "f" or largest.dtype.kind != "f":
        raise Unreadable(
            f"{path.name}: the 8-bit state of {shown(name)} has {table.size} codes and {largest.size} blocks for "
            f"{codes.size} elements, which fits no block size"
        )
    arrays.left -= 4 * codes.size
    arrays._note("8-bit states are dequantized to float32: the quantization error remains")
    wide = by_table(table.astype(np.float32), codes.reshape(-1))
    for i, factor in enumerate(largest.astype(np.float32)):  # in place: SECURITY.md bounds the memory
        wide[i * block : (i + 1) * block] *= factor
    return wide.reshape(codes.shape)
