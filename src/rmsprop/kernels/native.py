"""Loads the compiled kernel, and mirrors its C interface (csrc/rmsprop.h, csrc/plan.h) in ctypes."""

import ctypes
import sys
from ctypes import Structure, c_double, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rmsprop.spec import CLIPS
from rmsprop.tensors.forked import in_child

# kInterface of csrc/rmsprop.h. A library of another number, such as one that was built before a change of this
# checkout, would read the structures below as others.
INTERFACE = 2

# Element types of parameters, and of slots with float8's bytes, in the order of csrc/rmsprop.h.
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SLOT_TYPES = {**TYPES, torch.uint8: 4}

# Minimum number of elements per thread. They take 13 µs on one core of a Xeon and 8 µs on two idle cores. If the
# second core is busy, every parallel region takes milliseconds.
GRAIN = 1 << 15

_LIBRARY = "_native.dll" if sys.platform == "win32" else "_native.so"


class Work(Structure):
    """Tensors that share a rule, its numbers and their types: `Work` in csrc/rmsprop.h."""

    _fields_ = (
        *((name, c_double) for name in ("lr", "alpha", "eps", "momentum", "weight_decay", "scale", "cap", *CLIPS)),
        ("ema_decay", c_double),
        *((name, c_int32) for name in ("param_type", "state_type", "other_type", "ema_type", "step_type")),
        *((name, c_int32) for name in ("eps_mode", "centered", "has_momentum", "nesterov", "lr_in_buffer")),
        *(
            (name, c_int32)
            for name in ("decoupled", "bias_correction", "maximize", "clip_after_decay", "clip_value_last")
        ),
        *((name, c_int32) for name in ("ema_warmup", "stochastic", "narrowed")),
        *((name, c_int64) for name in ("ema_start", "ema_interval")),
        ("count", c_int64),
        *((name, c_void_p) for name in ("size", "param", "grad", "square_avg", "grad_avg", "momentum_buffer", "ema")),
        *((name, c_void_p) for name in ("compensation", "step", "end", "correction", "ema_weight", "coefficient")),
        *((name, c_void_p) for name in ("random_key", "key")),
    )


class Host(Structure):
    """Addresses of functions of Python and torch, and the layout of a plain tensor: `Host` in csrc/plan.h."""

    _fields_ = (
        *(
            (name, c_void_p)
            for name in ("list_size", "list_item", "list_append", "dict_size", "dict_next", "dict_item")
        ),
        *((name, c_void_p) for name in ("device_index", "dtype", "dim", "sizes", "strides", "data", "bump")),
        *((name, c_int64) for name in ("type", "header", "keys")),
        *((name, c_void_p) for name in ("none", "dict", "tensor", "parameter")),
        ("plain", c_uint64),
        ("inference", c_uint64),
    )


TENSORS = 8  # number of tensors of a parameter, in the order of Bucket.lists(): `Kept` in csrc/plan.h


class Plan(Structure):
    """The locations of all tensors of an optimizer in the last step: `Plan` in csrc/plan.h."""

    _fields_ = (
        ("host", c_void_p),
        ("params", c_int64),
        ("items", c_int64),
        *((name, c_void_p) for name in ("item", "entry_size", "entry")),
        ("slot_names", c_void_p * TENSORS),
        ("works", c_int64),
        *((name, c_void_p) for name in ("work", "kinds", "place", "spread_slot", "spread_shard")),
        *((name, c_int64) for name in ("elements", "serial_limit", "idle")),
        ("idle_place", c_void_p),
        ("span", c_void_p),
        ("stepping", c_void_p),
        *((name, c_int64) for name in ("spans", "apart", "normed")),
        ("norm", c_double),
        *((name, c_int64) for name in ("guarded", "unfinite", "active", "inferred")),
    )


@dataclass(frozen=True)
class Native:
    """The functions of the compiled library.

    Attributes:
        step: rmsprop_step, called without the GIL.
        norms: rmsprop_norms, called without the GIL.
        again: rmsprop_again, called with it.
        apart: rmsprop_apart, called with it.
        plain: rmsprop_plain, called with it.
        unfinite: rmsprop_unfinite, called without the GIL.
        pieces: rmsprop_pieces, for tests.
        stream: rmsprop_stream, for the benchmark.
        parallel_for: the address of torch_parallel_for. None: one thread does all the work.
        host: functions and layouts of Python and torch, for tensors on the CPU. None if this Python or torch has
            others: each step then reads its tensors from Python, which is slower for many small tensors.
        dtype_codes: torch's codes of the dtypes in SLOT_TYPES.
    """

    step: Any
    norms: Any
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
    """Return the path of the compiled library, next to the package's modules."""
    return Path(__file__).parents[1] / _LIBRARY


def missing() -> str | None:
    """Return why the compiled kernel is missing, and how to get it. None if it is loaded."""
    loaded = load()
    return loaded if isinstance(loaded, str) else None


@cache
def load(library: Path | None = None) -> Native | str:
    """Return the compiled library, or why it is missing. The result is cached."""
    library = library or path()
    if not library.exists():
        return (
            f"the compiled kernel is missing ({library.name}, built when the package is installed): install a wheel, "
            "or install from source with a C++17 compiler on PATH (`apt install g++`, `xcode-select --install`)"
        )
    try:
        released, held = ctypes.CDLL(str(library)), ctypes.PyDLL(str(library))
    except OSError as error:
        return f"the compiled kernel cannot be loaded on this machine ({error}); reinstall the package from source"
    interface = getattr(released, "rmsprop_interface", None)
    if interface is None or interface() != INTERFACE:
        return (
            f"the compiled kernel ({library.name}) was built from another version of this package; install it "
            "again (`pip install .`, or `pip install --editable .` in a checkout)"
        )
    step = released.rmsprop_step
    step.argtypes, step.restype = (c_void_p, c_int64, c_double, c_void_p, c_int64), c_int32
    norms = released.rmsprop_norms
    norms.argtypes, norms.restype = (c_void_p, c_int64, c_void_p, c_void_p, c_int64), c_int32
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
    codes = {} if host is None else {t: _code(symbols, "dtype_" + str(t).removeprefix("torch.")) for t in SLOT_TYPES}
    return Native(
        step=step,
        norms=norms,
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
    """Return a handle that resolves the symbols of torch's loaded libraries."""
    if sys.platform == "win32":
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "torch_cpu.dll"))
    return ctypes.CDLL(torch._C.__file__)


def _address(library: ctypes.CDLL, name: str) -> int | None:
    """Return the address of a C function. None if the library does not have it."""
    function = getattr(library, name, None)
    return None if function is None else ctypes.cast(function, c_void_p).value


def _code(library: ctypes.CDLL, name: str) -> int:
    """Return a constant of torch's C interface, which exports it as a function."""
    return int(getattr(library, "aoti_torch_" + name)())


def _host(library: ctypes.CDLL) -> Host | None:
    """Return what C needs to read Python objects and tensors. None if their layout is unknown here."""
    if not _has_gil():
        return None  # without the GIL, lists and dicts may change while C reads them
    read = ("device_index", "dtype", "dim", "sizes", "strides", "data_ptr")
    torchs = [_address(library, "aoti_torch_get_" + name) for name in read]
    names = ("List_Size", "List_GetItem", "List_Append", "Dict_Size", "Dict_Next", "Dict_GetItemWithError")
    python = [_address(ctypes.pythonapi, "Py" + name) for name in names]
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
    """Return the address of torch's bump_version. None if it has another name or does not work."""
    name = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"
    address = _address(library, name)
    if address is None:
        return None
    probe = torch.zeros(1, device="cpu")
    before = probe._version
    ctypes.CFUNCTYPE(None, c_void_p)(address)(id(probe) + header)
    return address if probe._version == before + 1 else None


def _keys_offset() -> int | None:
    """Return the offset of the dispatch keys in a TensorImpl, found by six kinds of tensors. None if ambiguous."""
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
    """Return the dispatch keys of dense tensors on a device, made outside and inside torch.inference_mode."""
    found = []
    for inside in (False, True):
        with torch.inference_mode(inside):
            found.append(_keys(torch.empty(0, device=device)))
    return found[0], found[1]


@cache
def host(device: torch.device) -> Host | None:
    """Return what C needs to read tensors on a device. None if it cannot."""
    loaded = load()
    if isinstance(loaded, str) or loaded.host is None or device.type not in ("cpu", "cuda"):
        return None
    own = Host.from_buffer_copy(loaded.host)
    own.plain, own.inference = _key_sets(device)
    return own


def _has_gil() -> bool:
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())
