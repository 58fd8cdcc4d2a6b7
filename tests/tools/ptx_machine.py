"""What Triton compiled for a GPU, run on a CPU: PTX becomes C++, a thread a call, and a driver launches that.

Threads run one after the other, in either order: what depends on the order shows as a difference. Memory is the
CPU's, so an address in a table is a tensor's `data_ptr()`. What instructions mean: "Parallel Thread Execution ISA",
docs.nvidia.com/cuda/parallel-thread-execution. One that is not known here is an error.
"""

import ctypes
import gc
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled", allow_module_level=True)
try:
    triton.knobs.nvidia.ptxas  # noqa: B018 - raises where there is none
except RuntimeError:
    pytest.skip("this triton brings no ptxas", allow_module_level=True)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.cache import get_cache_manager  # noqa: E402

COMPILER = shutil.which("g++") or shutil.which("clang++")
PRELUDE = Path(__file__).with_name("ptx_machine.h")

CTYPE = {
    **{f"{kind}{bits}": f"{'int' if kind == 's' else 'uint'}{bits}_t" for kind in "bus" for bits in (8, 16, 32, 64)},
    "pred": "bool",
    "f32": "float",
    "f64": "double",
    "bf16": "bf16",
    "f16": "f16",
}
INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^"}
COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
# Rounding to nearest, and what changes nothing here: the low half of a product of such a type is the product.
UNSAID = {"rn", "lo"}


def translate(ptx: str) -> str:
    """C++ of the one kernel in it: `run(parameters, blocks, threads, backwards)`."""
    body = ptx[ptx.index(".entry") :]
    parameters = re.findall(r"\.param\s+[^,)]*?(\w+)\s*[,)]", body[: body.index("{")].replace("\n", " "))
    body = body[body.index("{") + 1 : body.index("\n}")]
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"^\s*\.(loc|file|pragma)\b[^\n]*", "", body, flags=re.M)
    body = re.sub(r"^(\$\w+):", r"\1:;", body, flags=re.M)
    lines = [_statement(" ".join(said.split()), parameters) for said in body.split(";")]
    return f'#include "{PRELUDE}"\nTHREAD {{\n' + "\n".join(lines) + "\n}\n"


def _name(word: str) -> str:
    return word.strip().replace("%", "_").replace("$", "L").replace(".", "_")


def _statement(said: str, parameters: list[str]) -> str:
    """One statement, which may open or close a scope of its own."""
    before = ""
    while said[:1] in ("{", "}"):
        before, said = before + said[0], said[1:].strip()
    if not said:
        return before
    if said.endswith(":"):
        return f"{before}{_name(said)};"
    if said.startswith(".reg"):
        _, kind, names = said.split(None, 2)
        many = re.fullmatch(r"(%\w+)<(\d+)>", names)
        words = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else names.split(",")
        return f"{before}{CTYPE[kind[1:]]} {', '.join(map(_name, words))};"
    guard = re.match(r"@(!?)(%\w+) ", said)
    if guard:
        said, before = said[guard.end() :], f"{before}if ({guard[1]}{_name(guard[2])}) "
    op, _, rest = said.partition(" ")
    operands = [x.strip() for x in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,{}\[\]]+", rest) if x.strip()]
    return f"{before}{{ {_operation(op.split('.'), operands, parameters)} }}"


def _read(word: str, kind: str) -> str:
    """An operand as a value of that type."""
    literal = re.fullmatch(r"0[fd]([0-9A-Fa-f]+)", word)
    raw = f"0x{literal[1]}{'u' if len(literal[1]) == 8 else 'ull'}" if literal else _name(word)
    return f"as<{CTYPE[kind]}>({raw})"


def _many(word: str) -> list[str]:
    """The registers of a vector, or the one."""
    return [x.strip() for x in word.strip("{} ").split(",")]


def _operation(op: list[str], args: list[str], parameters: list[str]) -> str:
    """What an instruction does."""
    name, kind = op[0], op[-1]
    said = [word for word in op[1:-1] if word not in UNSAID]
    if name == "bra":
        return f"goto {_name(args[0])};"
    if name == "ret":
        return "return;"
    if name in ("ld", "st"):
        return _memory(op, args, parameters)
    if name == "mov" and ("{" in args[0] or "{" in args[1]):
        parts, whole = (args[0], args[1]) if "{" in args[0] else (args[1], args[0])
        names = _many(parts)
        width = int(kind[1:]) // len(names)
        if parts is args[0]:
            pieces = [f"put({_name(x)}, {_name(whole)} >> {width * i});" for i, x in enumerate(names) if x != "_"]
            return " ".join(pieces)
        joined = " | ".join(f"{CTYPE[kind]}(uint{width}_t({_name(x)})) << {width * i}" for i, x in enumerate(names))
        return f"{_name(whole)} = {joined};"
    if name == "setp" and kind.endswith("x2"):
        (compare,), kind = said, kind[:-2]
        low, high = args[0].split("|")
        one, two = (_compared(compare, f"half<{CTYPE[kind]}, {i}>({{}})", args[1:]) for i in (0, 1))
        return f"{_name(low)} = {one}; {_name(high)} = {two};"
    if name == "setp":
        (compare,) = said
        return f"{_name(args[0])} = {_compared(compare, '{}', [_read(x, kind) for x in args[1:]], named=False)};"
    if name == "cvt":
        return _convert(said, op, args)
    values = [_read(x, kind) for x in args[1:]]
    if name == "selp":
        return f"put({_name(args[0])}, {_name(args[3])} ? {values[0]} : {values[1]});"
    if name in ("mul", "mad") and said == ["wide"]:
        wide = CTYPE[kind].replace("32", "64")
        total = f"({wide}){values[0]} * ({wide}){values[1]}"
        return f"put({_name(args[0])}, {total}{f' + as<{wide}>({_name(args[2 + 1])})' if name == 'mad' else ''});"
    if name == "mov" and not said:
        return f"put({_name(args[0])}, {values[0]});"
    if name in INFIX and not said:
        return f"put({_name(args[0])}, {values[0]} {INFIX[name]} {values[1]});"
    if not said or (name, *said) in (("abs", "ftz"), ("rcp", "approx", "ftz"), ("shf", "l", "wrap")):
        amounts = [f"uint32_t({_name(x)})" for x in args[2:]] if name in ("shl", "shr", "bfe", "prmt") else values[1:]
        return f"put({_name(args[0])}, op_{'_'.join([name, *said])}({', '.join([values[0], *amounts])}));"
    raise NotImplementedError(f"PTX: {'.'.join(op)} {', '.join(args)}")


def _compared(compare: str, form: str, args: list[str], named: bool = True) -> str:
    """A comparison; one that ends with u is true for NaN too."""
    a, b = (form.format(_name(x) if named else x) for x in args)
    if compare in ("nan", "num"):
        return f"({a} != {a} || {b} != {b})" if compare == "nan" else f"({a} == {a} && {b} == {b})"
    if compare in COMPARED:
        # != of PTX is false for NaN
        return f"({a} {COMPARED[compare]} {b}" + (f" && {a} == {a} && {b} == {b})" if compare == "ne" else ")")
    return f"({a} != {a} || {b} != {b} || {a} {COMPARED[compare[:-1]]} {b})"


def _convert(said: list[str], op: list[str], args: list[str]) -> str:
    """cvt: from the last type to the one before it."""
    source, target = op[-1], op[-2]
    if target.endswith("x2"):
        half = CTYPE[target[:-2]]
        high, low = (f"uint32_t(({half}({_read(x, source)})).bits)" for x in args[1:])
        return f"{_name(args[0])} = {high} << 16 | {low};"
    if said[:-1] not in ([], ["rzi"]):
        raise NotImplementedError(f"PTX: {'.'.join(op)}")
    return f"put({_name(args[0])}, {CTYPE[target]}({_read(args[1], source)}));"


def _memory(op: list[str], args: list[str], parameters: list[str]) -> str:
    """Loads and stores, of vectors too; a vector's address must be aligned to all of it."""
    place, values = (args[1], args[0]) if op[0] == "ld" else (args[0], args[1])
    address, _, offset = place.strip("[] ").partition("+")
    kind, names = CTYPE[op[-1]], _many(values)
    assert len(names) == (int(op[-2][1:]) if op[-2].startswith("v") else 1), (op, args)
    if op[1] == "param":
        return f"put({_name(names[0])}, ({kind})parameter[{parameters.index(address.strip())}]);"
    if op[1] != "global":
        raise NotImplementedError(f"PTX: {'.'.join(op)}")
    lines = [f"auto* at = aligned<{kind}, {len(names)}>({_name(address)} + {int(offset or 0)});"]
    for i, word in enumerate(names):
        lines.append(f"put({_name(word)}, at[{i}]);" if op[0] == "ld" else f"at[{i}] = as<{kind}>({_name(word)});")
    return " ".join(lines)


@cache
def built(ptx: str) -> Any:
    """The kernel as a C function."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        source.write_text(translate(ptx))
        # -O0, and nothing fused: the machine adds and multiplies as PTX says
        command = [str(COMPILER), "-std=c++17", "-O0", "-w", "-ffp-contract=off", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", str(library), str(source)], check=True)
        run = ctypes.CDLL(str(library)).run
    run.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int32]
    return run


@dataclass(frozen=True)
class Launch:
    """A kernel, and what it is given."""

    kernel: "Launcher"
    blocks: int
    args: tuple[Any, ...]

    def run(self) -> None:
        """Run it, every thread of every block; tensors are read and written where they are."""
        Launcher.ran.append(self.kernel.name)
        words = [_word(kind, x) for kind, x in zip(self.kernel.kinds, self.args, strict=True) if kind != "constexpr"]
        memory = (ctypes.c_uint64 * len(words))(*words)
        built(self.kernel.ptx)(memory, self.blocks, self.kernel.threads, Launcher.backwards)


class Launcher:
    """A kernel as Triton's driver launches it; while `kept` is a list, launches are kept there and not run.

    Triton makes the launchers, so the class says: `ran` names what ran, `backwards` runs threads in the other order.
    """

    ran: ClassVar[list[str]] = []
    kept: ClassVar[list[Launch] | None] = None
    backwards: ClassVar[bool] = False

    def __init__(self, src: Any, metadata: Any) -> None:
        path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        self.name, self.threads, self.ptx = metadata.name, 32 * metadata.num_warps, Path(path).read_text()
        self.kinds = list(src.signature.values())

    def __call__(self, blocks: int, _y: int, _z: int, *rest: Any) -> None:
        launch = Launch(self, blocks, rest[6:])  # what stands before them: stream, function, metadata, hooks
        if Launcher.kept is None:
            launch.run()
        else:
            Launcher.kept.append(launch)


def _word(kind: str, x: Any) -> int:
    """An argument as 64 bits."""
    if isinstance(x, Tensor):
        assert kind.startswith("*")
        return x.data_ptr()
    form = {"fp64": "<d", "i32": "<ixxxx", "i64": "<q"}[kind]
    return int.from_bytes(struct.pack(form, x), "little")


class Driver:
    """A GPU's driver, as Triton asks for one, on this machine."""

    def __init__(self, capability: int, launcher: Any = Launcher) -> None:
        self.launcher_cls = launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": 1 << 20},
            load_binary=lambda *_: (object(), object(), 32, 0, 1024),
            unload_module=lambda _: None,
        )
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda _: 0
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)


@contextmanager
def machine(*kernels: Any, capability: int = 90) -> Iterator[type[Launcher]]:
    """Triton compiles for a GPU of that capability, and launches here; nothing is compiled for it yet."""

    def forget() -> None:
        for kernel in kernels:
            kernel.device_caches.clear()
        Launcher.ran.clear()
        Launcher.kept, Launcher.backwards = None, False
        gc.collect()  # a kernel that is gone tells its driver

    forget()
    with pytest.MonkeyPatch.context() as patch, triton.knobs.cache.scope(), tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        patch.setattr(triton.runtime.driver, "_active", Driver(capability))
        yield Launcher
        forget()


@contextmanager
def kept(launcher: type[Launcher]) -> Iterator[list[Launch]]:
    """Launches are kept and not run, as while a CUDA graph is captured."""
    launcher.kept = []
    try:
        yield launcher.kept
    finally:
        launcher.kept = None
