"""Reads the pickle of torch.save as data, with an opcode interpreter that imports and calls nothing from the file.

The names in a pickle select from a fixed list of constructors: containers, tensors over records of the file, dtypes
and NumPy scalars. Every other name, and any object built with it, becomes an `Opaque`.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rmsprop.printing import shown

# Opcodes whose argument is the value.
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE"),
    *("SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MARK = object()
_NUMBER = re.compile(r"[<>=|]?([biufc])(\d{1,2})\Z")
_DTYPES = {
    *("float16 float32 float64 bfloat16 half float double complex32 complex64 complex128 bool".split()),  # noqa: SIM905
    *("uint8 uint16 uint32 uint64 int8 int16 int32 int64 short int long".split()),  # noqa: SIM905
    *("float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu".split()),  # noqa: SIM905
}
_STORAGES = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "Untyped": "uint8",
}


class Opaque:
    """Placeholder for a value that only running code could create.

    Attributes:
        name: the module and the name in the pickle, separated by a space.
        arguments: the attributes of an argparse.Namespace, the arguments of a run.
    """

    __slots__ = ("arguments", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.arguments: dict[Any, Any] = {}


class _Dtype:
    """A NumPy dtype whose byte order is set by a later opcode."""

    def __init__(self, text: object, *_: object) -> None:
        found = _NUMBER.match(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError("a dtype that is not numeric")
        self.kind, self.order = found[0].lstrip("<>=|"), found[0][0] if found[0][0] in "<>" else "<"

    def scalar(self, raw: object) -> Any:
        """Convert the bytes of one number to a Python number."""
        dtype = np.dtype(self.order + self.kind)
        if not isinstance(raw, bytes) or len(raw) != dtype.itemsize:
            raise ValueError("a scalar of the wrong size")
        return np.frombuffer(raw, dtype)[0].item()


class Machine:
    """Interpreter for one pickle, with its stack and memo.

    Work and memory are linear in the pickle's length. Copies, such as dicts built repeatedly from one list, may total
    as many items as the pickle has bytes. A dict key that is slow to hash becomes text.

    Args:
        record: returns the bytes of a record as a uint8 tensor, by key; raises KeyError.
    """

    def __init__(self, record: Callable[[str], Any]) -> None:
        self._record = record
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._opaque: dict[str, Opaque] = {}
        self._left = 0

    def run(self, pickle: bytes) -> Any:
        """Return the pickled value.

        Raises: any error, for an invalid pickle.
        """
        self._left = len(pickle)
        argument: Any
        for op, argument, _ in pickletools.genops(pickle):
            name = op.name
            if name in _VALUES:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                self._memo[len(self._memo) if argument is None else argument] = self._stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self._stack.append(self._memo[argument])
            elif name not in ("PROTO", "FRAME", "STOP"):
                do = _DO.get(name)
                if do is None:
                    raise ValueError(f"the opcode {name}")
                do(self, argument)
        (value,) = self._stack
        return value

    def _pop_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def spend(self, count: int) -> None:
        """Count copied items. Raises: ValueError once they exceed the pickle's length."""
        self._left -= count
        if self._left < 0:
            raise ValueError("too many copies of one value")

    def opaque(self, name: str) -> Opaque:
        """Return the placeholder for a name, one per name."""
        return self._opaque.setdefault(name, Opaque(name))

    # --- names and calls --------------------------------------------------------------------------

    def _global(self, name: str) -> None:
        module, _, what = name.partition(" ")
        import torch

        if module == "torch" and what in _DTYPES and hasattr(torch, what):
            self._stack.append(getattr(torch, what))
        else:
            self._stack.append(self.opaque(name))

    def _stack_global(self, _: Any) -> None:
        what, module = self._stack.pop(), self._stack.pop()
        if not isinstance(module, str) or not isinstance(what, str):
            raise ValueError("a name that is not a string")
        self._global(f"{module} {what}")

    def _call(self, _: Any = None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._made(function, arguments))

    def _call_with_names(self, _: Any) -> None:
        self._stack.pop()
        self._call()

    def _instance(self, name: str) -> None:
        self._pop_mark()
        self._stack.append(self.opaque(name))

    def _object(self, _: Any) -> None:
        self._stack.append(self._pop_mark()[0])

    def _made(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Opaque) or not isinstance(arguments, tuple):
            raise TypeError(f"a call of {shown(function)}")
        if function.name not in _MAKERS:
            return function
        made = _MAKERS[function.name](self, *arguments)
        return self.opaque(function.name) if made is None else made

    def _build(self, _: Any) -> None:
        state, made = self._stack.pop(), self._stack[-1]
        if isinstance(made, _Dtype) and isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            made.order = state[1]
        if isinstance(made, Opaque) and made.name == _ARGUMENTS and isinstance(state, dict):
            made.arguments = state

    def _persistent(self, _: Any) -> None:
        kind, storage, key, *_ = self._stack.pop()
        name = storage.name if isinstance(storage, Opaque) else ""
        module, _, what = name.partition(" ")
        if kind != "storage" or module not in ("torch", "torch.storage", "torch.cuda") or not isinstance(key, str):
            raise ValueError("a persistent id that is not a storage")
        dtype = _STORAGES.get(what.removesuffix("Storage"))
        if dtype is None:
            self._stack.append(storage)  # of quantized elements
            return
        import torch

        self._stack.append(_Storage(self._record(key), getattr(torch, dtype)))

    # --- containers -------------------------------------------------------------------------------

    def _put_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            target.update(_paired(items))
        elif not isinstance(target, Opaque):
            raise TypeError(f"items put into {shown(target)}")

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise TypeError(f"items appended to {shown(target)}")

    def _take(self, count: int) -> list[Any]:
        if count > len(self._stack):
            raise IndexError("an empty stack")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _text(self, text: str) -> None:
        raw = text.encode("latin-1")  # a Python 2 string, which pickletools decodes as latin-1
        try:
            self._stack.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            self._stack.append(raw)

    # --- tensors ----------------------------------------------------------------------------------

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any, metadata: Any) -> Any:
        """Return a view that lies within its record. Raises: ValueError, RuntimeError."""
        import torch

        if not isinstance(storage, _Storage):
            return None
        flat = storage.view(dtype)
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or len(size) > 64 or any(type(x) is not int or x < 0 for x in numbers):
            raise ValueError(f"a tensor of shape {shown(size)} and strides {shown(stride)}")
        reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and reach >= flat.numel():
            raise ValueError(f"a tensor of shape {shown(size)} past the end of its storage")
        if 0 in size:
            return torch.empty(size, dtype=flat.dtype, device="cpu")
        value = torch.as_strided(flat, size, stride, offset)
        if metadata is not None:
            if not isinstance(metadata, dict) or not {"conj", "neg"} >= metadata.keys():
                return None
            value = value.conj() if metadata.get("conj") is True else value
            value = torch._neg_view(value) if metadata.get("neg") is True else value
        return value


class _Storage:
    """A record of the file with its dtype."""

    def __init__(self, raw: Any, dtype: Any) -> None:
        self.raw, self.dtype = raw, dtype

    def view(self, dtype: Any) -> Any:
        """Return the record viewed as `dtype`, or as its own dtype if that is None."""
        dtype = self.dtype if dtype is None else dtype
        whole = self.raw.numel() // dtype.itemsize * dtype.itemsize
        return self.raw[:whole].view(dtype)


def _key(key: Any) -> Any:
    """Return a dict key that is cheap to hash and compare unchanged, and any other as text."""
    plain = type(key) in (str, float, bool, bytes, type(None)) or (type(key) is int and key.bit_length() <= 64)
    return key if plain else shown(key)


def _paired(items: list[Any]) -> dict[Any, Any]:
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _rebuilt(machine: Machine, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    return machine._tensor(storage, offset, size, stride, None, rest[2] if len(rest) > 2 else None)


def _rebuilt_v3(machine: Machine, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    return machine._tensor(storage, offset, size, stride, rest[2], rest[3] if len(rest) > 3 else None)


def _from_type(machine: Machine, function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """Return a tensor without its extra attributes, or the placeholder of a tensor subclass."""
    if isinstance(kind, Opaque) and kind.name not in _TENSORS:
        return kind
    return machine._made(function, arguments)


def _dict(machine: Machine, items: Any = (), *_: Any) -> Any:
    """Build a dict from the arguments of an OrderedDict or a Counter."""
    if not isinstance(items, list | tuple | dict):
        return None
    machine.spend(len(items))
    return {_key(key): value for key, value in (items.items() if isinstance(items, dict) else items)}


def _device(_: Machine, *name: Any) -> Any:
    import torch

    return torch.device(*name) if all(type(part) in (str, int) for part in name) else None


def _bytes(machine: Machine, text: Any = "", encoding: Any = None) -> Any:
    """Decode bytes that an old pickle protocol wrote as latin-1 text."""
    if not isinstance(text, str) or encoding != "latin1":
        return None
    machine.spend(len(text))
    return text.encode("latin-1")


def _raw(_: Machine, content: Any = b"", *__: Any) -> Any:
    return content if isinstance(content, bytes) else None


def _complex(_: Machine, *parts: Any) -> Any:
    return complex(*parts) if all(type(part) in (int, float) for part in parts) else None


def _dtype(_: Machine, text: Any = None, *__: Any) -> Any:
    return _Dtype(text) if isinstance(text, str) and _NUMBER.match(text) else None


def _scalar(_: Machine, dtype: Any, raw: Any = None) -> Any:
    return dtype.scalar(raw) if isinstance(dtype, _Dtype) else None


_TENSORS = ("torch Tensor", "torch.nn.parameter Parameter", "torch.nn.parameter Buffer")
_ARGUMENTS = "argparse Namespace"
# Constructors by name. A result of None becomes a placeholder.
_MAKERS: Mapping[str, Callable[..., Any]] = {
    **{f"collections {name}": _dict for name in ("OrderedDict", "Counter")},
    "collections defaultdict": lambda machine, *_: _dict(machine),
    **{f"{module} dict": _dict for module in ("builtins", "__builtin__")},
    **{f"{module} complex": _complex for module in ("builtins", "__builtin__")},
    **{f"{module} {kind}": _raw for module in ("builtins", "__builtin__") for kind in ("bytes", "bytearray")},
    _ARGUMENTS: lambda *_: Opaque(_ARGUMENTS),
    "torch Size": lambda _, sizes=(): sizes if isinstance(sizes, tuple) else None,
    "torch device": _device,
    "_codecs encode": _bytes,
    "numpy dtype": _dtype,
    **{f"numpy.{core}.multiarray scalar": _scalar for core in ("core", "_core")},
    "torch._utils _rebuild_tensor": _rebuilt,
    "torch._utils _rebuild_tensor_v2": _rebuilt,
    "torch._utils _rebuild_tensor_v3": _rebuilt_v3,
    "torch._utils _rebuild_parameter": lambda _, value, *__: value,
    "torch._utils _rebuild_parameter_with_state": lambda _, value, *__: value,
    "torch._utils _rebuild_device_tensor_from_cpu_tensor": lambda _, value, *__: value,
    "torch._tensor _rebuild_from_type_v2": _from_type,
}
_DO: Mapping[str, Callable[[Machine, Any], None]] = {
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._call,
    "NEWOBJ": Machine._call,
    "NEWOBJ_EX": Machine._call_with_names,
    "INST": Machine._instance,
    "OBJ": Machine._object,
    "BUILD": Machine._build,
    "BINPERSID": Machine._persistent,
    "STRING": Machine._text,
    "BINSTRING": Machine._text,
    "SHORT_BINSTRING": Machine._text,
    "BYTEARRAY8": lambda machine, raw: machine._stack.append(bytes(raw)),
    "MARK": lambda machine, _: machine._stack.append(_MARK),
    "POP": lambda machine, _: machine._stack.pop(),
    "POP_MARK": lambda machine, _: machine._pop_mark().clear(),
    "DUP": lambda machine, _: machine._stack.append(machine._stack[-1]),
    "EMPTY_DICT": lambda machine, _: machine._stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine._stack.append([]),
    "EMPTY_SET": lambda machine, _: machine._stack.append(machine.opaque("builtins set")),
    "LIST": lambda machine, _: machine._stack.append(machine._pop_mark()),
    "TUPLE": lambda machine, _: machine._stack.append(tuple(machine._pop_mark())),
    "TUPLE1": lambda machine, _: machine._stack.append(tuple(machine._take(1))),
    "TUPLE2": lambda machine, _: machine._stack.append(tuple(machine._take(2))),
    "TUPLE3": lambda machine, _: machine._stack.append(tuple(machine._take(3))),
    "FROZENSET": lambda machine, _: machine._instance("builtins frozenset"),
    "DICT": lambda machine, _: machine._stack.append(_paired(machine._pop_mark())),
    "APPEND": lambda machine, _: machine._extend(machine._take(1)),
    "APPENDS": lambda machine, _: machine._extend(machine._pop_mark()),
    "ADDITEMS": lambda machine, _: machine._extend(machine._pop_mark()),
    "SETITEM": lambda machine, _: machine._put_items(machine._take(2)),
    "SETITEMS": lambda machine, _: machine._put_items(machine._pop_mark()),
}
