"""The compiled kernel: where it is, why it is not, and its C interface (csrc/rmsprop.h, csrc/plan.h) in ctypes."""

import ctypes
import sys
from ctypes import POINTER, Structure, c_double, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Element types, in the order of csrc/rmsprop.h.
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Elements that a thread should have at least: 13 µs of work on a Xeon, 8 µs on two idle cores, and milliseconds where
# the second core is busy, as every parallel region then.
GRAIN = 1 << 15

_LIBRARY = "_native.dll" if sys.platform == "win32" else "_native.so"


class Work(Structure):
    """Tensors that share a rule, its numbers and their types: `Work` in csrc/rmsprop.h."""

    _fields_ = (
        *((name, c_double) for name in ("lr", "alpha", "eps", "momentum", "weight_decay", "scale", "cap")),
        *((name, c_int32) for name in ("param_type", "state_type", "step_type", "eps_mode", "centered")),
        *((name, c_int32) for name in ("has_momentum", "nesterov", "lr_in_buffer", "decoupled")),
        *((name, c_int32) for name in ("bias_correction", "maximize", "stochastic")),
        ("count", c_int64),
        *((name, c_void_p) for name in ("size", "param", "grad", "square_avg", "grad_avg", "momentum_buffer")),
        *((name, c_void_p) for name in ("compensation", "step", "end", "correction", "stream", "key")),
    )


class Host(Structure):
    """Functions of the interpreter and of torch, by address: `Host` in csrc/plan.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("list_size", "list_item", "dict_next", "dict_item")),
        *((name, c_void_p) for name in ("layout", "device_type", "dtype", "dim", "sizes", "strides", "data")),
        ("header", c_int64),
        ("none", c_void_p),
        ("strided", c_int32),
        ("cpu", c_int32),
    )


class Row(Structure):
    """One parameter's objects and shape: `Row` in csrc/plan.h."""

    _fields_ = (
        ("param", c_void_p),
        ("entry", c_void_p),
        ("slot", c_void_p * 5),
        ("dim", c_int64),
        ("shape", c_void_p),
        ("size", c_int64),
    )


class Group(Structure):
    """The parameters of one group: `Group` in csrc/plan.h."""

    _fields_ = (("params", c_void_p), ("count", c_int64), ("param", c_void_p))


class Plan(Structure):
    """Where all tensors of an optimizer were last time: `Plan` in csrc/plan.h."""

    _fields_ = (
        ("host", c_void_p),
        ("state", c_void_p),
        ("items", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("groups", c_int64),
        ("group", c_void_p),
        ("slot_names", c_void_p * 5),
        ("works", c_int64),
        ("work", c_void_p),
        ("rows", c_void_p),
        ("dtypes", c_void_p),
        ("places", c_void_p),
        ("elements", c_int64),
        ("grain", c_int64),
        ("idle", c_int64),
        ("idle_places", c_void_p),
        ("guarded", c_int64),
        ("unfinite", c_int64),
    )


@dataclass(frozen=True)
class Native:
    """The functions of the compiled library.

    Attributes:
        step: rmsprop_step, called without the GIL.
        again: rmsprop_again, called with it; None where this torch or Python cannot answer its questions.
        unfinite: rmsprop_unfinite, called without the GIL.
        pieces: rmsprop_pieces, for tests.
        stream: rmsprop_stream, for the benchmark.
        parallel_for: the address of torch_parallel_for, or None: then one thread does all.
        host: what `again` asks.
        dtype_codes: torch's own numbers of the dtypes in TYPES.
    """

    step: Any
    again: Any
    unfinite: Any
    pieces: Any
    stream: Any
    parallel_for: int | None
    host: Host | None
    dtype_codes: dict[torch.dtype, int]


def path() -> Path:
    """Where the compiled library belongs: beside the package's modules."""
    return Path(__file__).parents[1] / _LIBRARY


def missing() -> str | None:
    """Why there is no compiled kernel, and how to get one; None where there is."""
    loaded = load()
    return loaded if isinstance(loaded, str) else None


@cache
def load(library: Path | None = None) -> Native | str:
    """The compiled library, or why there is none; looked for once."""
    library = library or path()
    if not library.exists():
        return (
            f"the compiled kernel is missing ({library.name}, built when the package is installed): install a wheel, "
            "or install from source where a C++17 compiler is on PATH (`apt install g++`, `xcode-select --install`)"
        )
    try:
        released, held = ctypes.CDLL(str(library)), ctypes.PyDLL(str(library))
    except OSError as error:
        return f"the compiled kernel cannot be loaded on this machine ({error}); reinstall the package from source"
    step = released.rmsprop_step
    step.argtypes, step.restype = (c_void_p, c_int64, c_double, c_void_p, c_int64), c_int32
    unfinite = released.rmsprop_unfinite
    unfinite.argtypes, unfinite.restype = (c_void_p, c_int64, c_void_p, c_int64), c_int64
    pieces = released.rmsprop_pieces
    pieces.argtypes, pieces.restype = (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64), c_int64
    stream = released.rmsprop_stream
    stream.argtypes, stream.restype = (*(c_void_p,) * 3, c_int64, c_void_p, c_int64), c_int32
    again = held.rmsprop_again
    again.argtypes, again.restype = (c_void_p, c_void_p, POINTER(c_int64)), c_int32
    symbols = _torch_library()
    host = _host(symbols)
    codes = {} if host is None else {t: _code(symbols, "dtype_" + str(t).removeprefix("torch.")) for t in TYPES}
    return Native(
        step=step,
        again=again if host is not None else None,
        unfinite=unfinite,
        pieces=pieces,
        stream=stream,
        parallel_for=_address(symbols, "torch_parallel_for"),
        host=host,
        dtype_codes=codes,
    )


def _torch_library() -> ctypes.CDLL:
    """torch's libraries, already in this process: symbols are looked up through the extension that needs them all."""
    if sys.platform == "win32":
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "torch_cpu.dll"))
    return ctypes.CDLL(torch._C.__file__)


def _address(library: ctypes.CDLL, name: str) -> int | None:
    """The address of a C function, or None if the library has none of that name."""
    function = getattr(library, name, None)
    return None if function is None else ctypes.cast(function, c_void_p).value


def _code(library: ctypes.CDLL, name: str) -> int:
    """A constant that torch's C interface gives as a function."""
    return int(getattr(library, "aoti_torch_" + name)())


def device_code(name: str) -> int:
    """torch's own number of a kind of device, such as "cuda"."""
    return _code(_torch_library(), "device_type_" + name)


def _host(library: ctypes.CDLL) -> Host | None:
    """What rmsprop_again asks Python and torch; None where one of the questions has no answer.

    Then every step reads its tensors from Python: slower for many small ones, and the same otherwise.
    """
    if not _has_gil():
        return None  # lists and dicts may change under a look without it
    asked = ("layout", "device_type", "dtype", "dim", "sizes", "strides", "data_ptr")
    answers = [_address(library, "aoti_torch_get_" + name) for name in asked]
    python = [
        _address(ctypes.pythonapi, name)
        for name in ("PyList_Size", "PyList_GetItem", "PyDict_Next", "PyDict_GetItemWithError")
    ]
    header = object.__basicsize__
    probe = torch.zeros(1, device="cpu")
    if None in answers or None in python or probe._cdata != c_void_p.from_address(id(probe) + header).value:
        return None
    return Host(
        *python, *answers, header, id(None), _code(library, "layout_strided"), _code(library, "device_type_cpu")
    )


def _has_gil() -> bool:
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())
