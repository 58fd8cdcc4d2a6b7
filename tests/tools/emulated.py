"""Calls of the CPU kernel, recorded with their memory, to be repeated by a kernel for another processor."""

import ctypes
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rmsprop.kernels import native

SCRATCH = {"end": 8, "correction": 8, "ema_weight": 8, "coefficient": 16, "random_key": 8, "key": 8}  # bytes a tensor
TENSORS = ("param", "grad", "square_avg", "grad_avg", "momentum_buffer", "ema", "compensation", "step")
FIELDS = ("size", *TENSORS, *SCRATCH)  # the pointers of Work, in their order
BYTES = (4, 8, 2, 2, 1)  # of native.SLOT_TYPES


class Recorder:
    """Stands in for the loaded kernel, and keeps each call of `step` and `norms`: its memory before and after.

    Attributes:
        calls: what tests/tools/emulated.cpp reads, without the number of calls before it.
        results: what it has to write, if the other kernel computes the same bits.
    """

    def __init__(self) -> None:
        self.real = native.load()
        assert not isinstance(self.real, str)
        self.calls: list[bytes] = []
        self.results: list[bytes] = []
        self.kernel = replace(
            self.real, step=self._kept(self.real.step, norms=False), norms=self._kept(self.real.norms, norms=True)
        )

    def write(self, path: Path) -> None:
        """Write all calls to a file."""
        path.write_bytes(struct.pack("q", len(self.calls)) + b"".join(self.calls))

    def _kept(self, call: Callable[..., int], *, norms: bool) -> Callable[..., int]:
        def _call(works: Any, count: int, last: Any, *rest: Any) -> int:
            each = ctypes.cast(works, ctypes.POINTER(native.Work * count)).contents
            before = b"".join(_described(work) for work in each)
            code = call(works, count, last, *rest)
            after = b"".join(part for work in each for _, parts in _memory(work) for part in parts)
            self.calls.append(struct.pack("qq", norms, count) + before)
            self.results.append(struct.pack("qd", code, last._obj.value if norms else -1.0) + after)
            return code

        return _call


def _described(work: native.Work) -> bytes:
    """Return a work with its memory."""
    found = bytes(work)
    for tensors, parts in _memory(work):
        found += struct.pack("q", tensors) + b"".join(struct.pack("q", len(part)) + part for part in parts)
    return found


def _memory(work: native.Work) -> Iterator[tuple[int, list[bytes]]]:
    """Yield what each pointer leads to: -1 for null, 0 and one array, or the number of tensors and their memory."""
    sizes = (ctypes.c_int64 * work.count).from_address(work.size)
    types = dict.fromkeys(("param", "grad", "compensation"), work.param_type)
    types |= dict.fromkeys(("grad_avg", "momentum_buffer"), work.other_type)
    types |= {"square_avg": work.state_type, "ema": work.ema_type, "step": work.step_type}
    for field in FIELDS:
        address = getattr(work, field)
        if not address:
            yield -1, []
        elif field in TENSORS:
            addresses = (ctypes.c_void_p * work.count).from_address(address)
            width = BYTES[types[field]]
            lengths = [width] * work.count if field == "step" else [width * size for size in sizes]
            yield (
                work.count,
                [ctypes.string_at(a or 0, n) if n else b"" for a, n in zip(addresses, lengths, strict=True)],
            )
        else:
            yield 0, [ctypes.string_at(address, work.count * SCRATCH.get(field, 8))]
