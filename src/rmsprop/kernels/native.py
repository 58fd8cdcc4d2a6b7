"""The compiled kernel: where it is, why it is not, and its C interface (csrc/rmsprop.h, csrc/plan.h) in ctypes."""

import ctypes
import sys
from ctypes import Structure, c_double, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rmsprop.tensors.forked import in_child

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
        *((name, c_void_p) for name in ("compensation", "step", "end", "correction", "random_key", "key")),
    )


class Host(Structure):
    """Functions of the interpreter and of torch, by address, and what a plain tensor is: `Host` in csrc/plan.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("list_size", "list_item", "dict_size", "dict_next", "dict_item")),
        *((name, c_void_p) for name in ("device_index", "dtype", "dim", "sizes", "strides", "data", "bump")),
        *((name, c_int64) for name in ("type", "header", "keys")),
        *((name, c_void_p) for name in ("none", "dict", "tensor", "parameter")),
        ("plain", c_uint64),
        ("inference", c_uint64),
    )


TENSORS = 7  # of a parameter, in the order of Bucket.lists(): `Kept` in csrc/plan.h


class Plan(Structure):
    """Where all tensors of an optimizer were last time: `Plan` in csrc/plan.h."""

    _fields_ = (
        ("host", c_void_p),
        ("params", c_int64),
        ("items", c_int64),
        *((name, c_void_p) for name in ("item", "entry_size", "entry")),
        ("slot_names", c_void_p * TENSORS),
        ("works", c_int64),
        *((name, c_void_p) for name in ("work", "kinds", "place", "spread_slot", "spread_shard")),
        *((name, c_int64) for name in ("elements", "grain", "idle")),
        ("idle_place", c_void_p),
        ("span", c_void_p),
        *((name, c_int64) for name in ("spans", "apart", "guarded", "unfinite", "active", "inferred")),
    )


@dataclass(frozen=True)
class Native:
    """The functions of the compiled library.

    Attributes:
        step: rmsprop_step, called without the GIL.
        again: rmsprop_again, called with it.
        apart: rmsprop_apart, called with it.
        plain: rmsprop_plain, called with it.
        unfinite: rmsprop_unfinite, called without the GIL.
        pieces: rmsprop_pieces, for tests.
        stream: rmsprop_stream, for the benchmark.
        parallel_for: the address of torch_parallel_for, or None: then one thread does all.
        host: what both read of the interpreter and torch, for tensors on the CPU; None where this torch or Python
            differs, and each step reads its tensors from Python: slower for many small ones, and the same otherwise.
        dtype_codes: torch's own numbers of the dtypes in TYPES.
    """

    step: Any
    again: Any
    apart: Any
    plain: Any
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
    again, apart, plain = held.rmsprop_again, held.rmsprop_apart, held.rmsprop_plain
    again.argtypes, again.restype = (c_void_p,) * 5, c_int32
    apart.argtypes, apart.restype = (c_void_p,), c_int32
    plain.argtypes, plain.restype = (c_void_p, c_void_p, c_int64, *(c_void_p,) * 3), c_int32
    symbols = _torch_library()
    host = _host(symbols)
    codes = {} if host is None else {t: _code(symbols, "dtype_" + str(t).removeprefix("torch.")) for t in TYPES}
    return Native(
        step=step,
        again=again,
        apart=apart,
        plain=plain,
        unfinite=unfinite,
        pieces=pieces,
        stream=stream,
        parallel_for=None if in_child() else _address(symbols, "torch_parallel_for"),  # else csrc sees the fork
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


def _host(library: ctypes.CDLL) -> Host | None:
    """What the look in C reads of Python and torch; None where something is not where it is elsewhere."""
    if not _has_gil():
        return None  # lists and dicts may change under a look without it
    read = ("device_index", "dtype", "dim", "sizes", "strides", "data_ptr")
    torchs = [_address(library, "aoti_torch_get_" + name) for name in read]
    names = ("PyList_Size", "PyList_GetItem", "PyDict_Size", "PyDict_Next", "PyDict_GetItemWithError")
    python = [_address(ctypes.pythonapi, name) for name in names]
    header, kind = object.__basicsize__, object.__basicsize__ - ctypes.sizeof(c_void_p)
    probe = torch.zeros(1, device="cpu")
    if None in torchs or None in python or probe._cdata != c_void_p.from_address(id(probe) + header).value:
        return None
    keys = _keys_offset()
    if keys is None or c_void_p.from_address(id(probe) + kind).value != id(torch.Tensor):
        return None
    plain, inference = _key_sets(torch.device("cpu"))
    objects = map(id, (None, dict, torch.Tensor, torch.nn.Parameter))
    return Host(*python, *torchs, _bump(library, header), kind, header, keys, *objects, plain, inference)


def _bump(library: ctypes.CDLL, header: int) -> int | None:
    """The address of the function by which torch's operators count a write, if it has its usual name and works."""
    name = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"
    address = _address(library, name)
    if address is None:
        return None
    probe = torch.zeros(1, device="cpu")
    before = probe._version
    ctypes.CFUNCTYPE(None, c_void_p)(address)(id(probe) + header)
    return address if probe._version == before + 1 else None


def _keys_offset() -> int | None:
    """The bytes of a TensorImpl before its set of dispatch keys, found by tensors of six kinds."""
    with torch.inference_mode():
        inference = torch.ones(2, device="cpu")
    x = torch.ones(2, device="cpu")
    probes = [x, inference, torch._neg_view(x), x.to(torch.complex64).conj()]
    probes += [torch.ones(2, device="meta"), torch._efficientzerotensor(2, device="cpu")]
    found = [
        offset
        for offset in range(8, 192, 8)
        if all(c_uint64.from_address(p._cdata + offset).value == _keys(p) for p in probes)
    ]
    return found[0] if len(found) == 1 else None


def _keys(tensor: torch.Tensor) -> int:
    return int(torch._C._dispatch_keys(tensor).raw_repr())


@cache
def _key_sets(device: torch.device) -> tuple[int, int]:
    """The dispatch keys of a dense tensor on a device, made outside and inside torch.inference_mode."""
    found = []
    for inside in (False, True):
        with torch.inference_mode(inside):
            found.append(_keys(torch.empty(0, device=device)))
    return found[0], found[1]


@cache
def host(device: torch.device) -> Host | None:
    """What the look in C reads, for tensors on that device; None where it cannot look at them."""
    loaded = load()
    if isinstance(loaded, str) or loaded.host is None or device.type not in ("cpu", "cuda"):
        return None
    own = Host.from_buffer_copy(loaded.host)
    own.plain, own.inference = _key_sets(device)
    return own


def _has_gil() -> bool:
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())
