"""Packs nested values into plain JSON and named tensors, and unpacks them exactly and without running code.

Values that JSON has stay as they are. Every other value becomes an object with one key that begins with "!".
"""

import base64
import math
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmsprop.printing import shown, with_article

# The dtypes that every version of safetensors stores.
_NATIVE = tuple(
    getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
)
# Other dtypes are stored as a dtype of the same size, complex numbers as pairs.
_PAIRS = {torch.complex128: torch.float64, torch.complex64: torch.float32, torch.complex32: torch.float16}
_BITS = {
    **{getattr(torch, f"uint{n}"): getattr(torch, f"int{n}") for n in (16, 32, 64)},
    **{
        getattr(torch, name): torch.uint8
        for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
        if hasattr(torch, name)
    },
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*_NATIVE, *_PAIRS, *_BITS)}
_DIGITS = 14_000  # bits of an int: Python converts at most 4300 decimal digits
_KEY = 64  # bits of an int key: larger ones could be crafted to have equal hashes
_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Packed:
    """A nested value as JSON and tensors.

    Attributes:
        tree: the value as JSON, with references to the tensors.
        tensors: contiguous CPU tensors by name, each once.
    """

    def __init__(self, value: Any, where: str = "") -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[Any, dict[str, Any]] = {}
        self._held: list[Any] = []  # keeps tensors alive, so that no address is reused
        try:
            self.tree = self._pack(value, where)
        except RecursionError:
            raise ValueError(f"{where or 'the value'} is nested too deep, or holds itself") from None

    def _pack(self, value: Any, where: str) -> Any:
        if type(value) is int and value.bit_length() > _DIGITS:
            raise ValueError(
                f"{where or 'the value'} is {shown(value)}; a checkpoint holds ints up to {_DIGITS} bits"
            )
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, float):  # NumPy's float64 is one
            return float(value) if math.isfinite(value) else {"!float": str(float(value))}
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        if type(value) in (list, tuple, set, frozenset, torch.Size):
            items = [self._pack(item, f"{where}.{i}") for i, item in enumerate(value)]
            if isinstance(value, set | frozenset):
                _check_keys(value, where)
            return items if type(value) is list else {f"!{type(value).__name__}": items}
        if isinstance(value, Mapping):
            return self._mapping(value, where)
        if type(value) is complex:
            return {"!complex": [self._pack(part, where) for part in (value.real, value.imag)]}
        if type(value) is bytes:
            return {"!bytes": base64.b64encode(value).decode("ascii")}
        if isinstance(value, torch.dtype | torch.device):
            return {f"!{type(value).__name__}": str(value).removeprefix("torch.")}
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
            return self._array(value, where)
        kind = type(value).__name__
        what = f"the {kind} {value!r:.60}" if isinstance(value, Enum) else with_article(kind)
        raise TypeError(
            f"{where or 'the value'} is {what}; a checkpoint holds tensors, numbers, strings, None, and lists, "
            "tuples, sets and dicts of them"
        )

    def _array(self, value: Any, where: str) -> Any:
        kind = "!array" if isinstance(value, np.ndarray) else "!scalar"
        try:
            tensor = torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
        except TypeError as error:
            raise TypeError(f"{where or 'the value'} is a NumPy {value.dtype}, which torch does not have") from error
        return {kind: self._tensor(tensor, where)}

    def _mapping(self, value: Mapping[Any, Any], where: str) -> Any:
        kind = type(value)
        if kind is dict and all(type(key) is str and not key.startswith("!") for key in value):
            return {key: self._pack(item, f"{where}.{key}" if where else key) for key, item in value.items()}
        if kind not in (dict, OrderedDict, Counter):
            raise TypeError(
                f"{where or 'the value'} is {with_article(kind.__name__)}; a checkpoint holds plain dicts"
            )
        _check_keys(value, where)
        keys = [self._pack(key, f"a key of {where}") for key in value]
        pairs = [[key, self._pack(item, f"{where}.{k}")] for key, (k, item) in zip(keys, value.items(), strict=True)]
        extra = getattr(value, "_metadata", None)  # of a module's state dict: the versions of its layers
        return {f"!{kind.__name__}": pairs} | ({"!metadata": self._pack(dict(extra), where)} if extra else {})

    def _tensor(self, value: Tensor, where: str) -> dict[str, Any]:
        if type(value) not in (Tensor, torch.nn.Parameter):
            hint = "; torch.distributed.checkpoint saves it" if hasattr(value, "to_local") else ""
            raise TypeError(f"{where} is {with_article(type(value).__name__)}, not a plain tensor{hint}")
        if (
            value.layout != torch.strided
            or value.is_meta
            or value.is_quantized
            or value.dtype not in _DTYPES.values()
        ):
            raise TypeError(
                f"{where} is a {value.dtype} tensor of layout {value.layout} on {value.device}; a checkpoint "
                "holds dense tensors of numbers"
            )
        value = value.detach()
        same = (
            value.data_ptr(),
            value.dtype,
            value.device,
            value.shape,
            value.stride(),
            value.is_conj(),
            value.is_neg(),
        )
        if value.numel() and same in self._known:
            return self._known[same]
        held = _carried(_plain(value.resolve_conj().resolve_neg().cpu().contiguous()))
        if held.untyped_storage().data_ptr() == value.untyped_storage().data_ptr():
            held = held.clone()  # another thread may write to it before the file is written
        name = where.encode("utf-8", "backslashreplace").decode()  # lone surrogates are not valid UTF-8
        while name in self.tensors or name in ("", "__metadata__"):
            name += "'"
        self.tensors[name] = held
        dtype = str(value.dtype).removeprefix("torch.")
        node = {"!tensor": [name, dtype, list(value.shape), checksum(held)]}
        self._held.append(value)
        return self._known.setdefault(same, node) if value.numel() else node


def _plain(value: Tensor) -> Tensor:
    """Return the same memory with default strides: any stride counts as contiguous for a single element."""
    return value.as_strided((value.numel(),), (1,)).view(value.shape)


def _carried(value: Tensor) -> Tensor:
    """Return the same bits in a dtype that safetensors stores."""
    if value.dtype in _PAIRS:
        return torch.view_as_real(value).contiguous()
    return value.view(_BITS[value.dtype]) if value.dtype in _BITS else value


def checksum(value: Tensor) -> int:
    """Return the CRC-32 of a contiguous tensor's bytes."""
    return zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data) if value.numel() else 0


def unpack(tree: Any, get: Callable[[str], Tensor] | None) -> Any:
    """Return the value of a tree.

    Args:
        get: returns a new tensor by its name in the file. None: every tensor is one on the meta device instead.
    Raises: ValueError if the tree is not valid, or a tensor is not the one that was saved.
    """
    known: dict[str, Tensor] = {}

    def _tensor(name: str, dtype: str, shape: list[int], crc: int) -> Tensor:
        wanted = _DTYPES[dtype]
        if get is None and name not in known:
            known[name] = torch.empty(shape, dtype=wanted, device="meta")
        elif get is not None and name not in known:
            held = get(name)
            whole = [*shape, 2] if wanted in _PAIRS else list(shape)
            carrier = _PAIRS.get(wanted) or _BITS.get(wanted, wanted)
            if held.dtype != carrier or list(held.shape) != whole or checksum(held) != crc:
                raise ValueError(f"the tensor {shown(name)} is not the one that was saved")
            known[name] = torch.view_as_complex(held) if wanted in _PAIRS else held.view(wanted)
        return known[name]

    def _tagged(node: dict[str, Any]) -> Any:
        (tag, content), *rest = node.items()
        if tag == "!tensor":
            return _tensor(*content)
        if tag in ("!array", "!scalar"):
            array = _unpack(content)
            if get is None:
                return array
            return array.numpy() if tag == "!array" else array.numpy()[()]
        if tag in ("!dict", "!OrderedDict", "!Counter"):
            made = {"!dict": dict, "!OrderedDict": OrderedDict, "!Counter": Counter}[tag]()
            for key, item in content:
                made[_checked(_unpack(key))] = _unpack(item)
            if rest:
                made._metadata = OrderedDict(_unpack(dict(rest)["!metadata"]))
            return made
        return _SIMPLE[tag](_unpack(content))

    def _unpack(node: Any) -> Any:
        if isinstance(node, list):
            return [_unpack(item) for item in node]
        if not isinstance(node, dict):
            return node
        if any(key.startswith("!") for key in node):
            return _tagged(node)
        return {key: _unpack(item) for key, item in node.items()}

    try:
        return _unpack(tree)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"its tree is not valid ({type(error).__name__}: {shown(str(error))})") from error


def _check_keys(keys: Iterable[Any], where: str) -> None:
    """Refuse keys of a dict and members of a set that `unpack` would refuse. Raises: ValueError."""
    try:
        for key in keys:
            _checked(key)
    except ValueError as error:
        raise ValueError(f"{where or 'the value'} has {error}") from None


def _checked(key: Any) -> Any:
    """Return the key; refuse ints that could be crafted to have equal hashes. Raises: ValueError."""
    if type(key) is int and key.bit_length() > _KEY:
        raise ValueError(f"the key {shown(key)}; a key has at most {_KEY} bits")
    if isinstance(key, tuple):
        for item in key:
            _checked(item)
    return key


_SIMPLE: Mapping[str, Callable[[Any], Any]] = {
    "!float": _NUMBERS.__getitem__,
    "!complex": lambda parts: complex(parts[0], parts[1]),
    "!bytes": lambda text: base64.b64decode(text, validate=True),
    "!dtype": lambda name: _dtype(name),
    "!device": torch.device,
    "!tuple": tuple,
    "!set": lambda items: set(map(_checked, items)),
    "!frozenset": lambda items: frozenset(map(_checked, items)),
    "!Size": torch.Size,
}


def _dtype(name: str) -> torch.dtype:
    found = vars(torch).get(name)  # getattr imports modules of torch
    if not isinstance(found, torch.dtype):
        raise TypeError("not a dtype")
    return found
