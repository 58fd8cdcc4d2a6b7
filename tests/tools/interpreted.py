"""The Triton kernel on CPU tensors: its source under Triton's interpreter, beside the compiled one in one process."""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cases import mostly_long

from rmsprop import kernels
from rmsprop.kernels import Backend
from rmsprop.kernels import triton as backend
from rmsprop.kernels.cpu import refuse_call
from rmsprop.spec import Rule
from rmsprop.tensors.bucket import Bucket

triton = pytest.importorskip("triton", reason="triton is not installed, and its interpreter runs these tests")
BLOCK = 32  # of the interpreted kernel: full blocks, pieces of 8 and tails in small tensors
SOURCES = Path(backend.__file__).parent
MODULES = ("triton_numbers", "triton_kernel", "triton_norms")  # each imports from those before it


class _Launched:
    """A kernel whose float arguments stay float64, as its signature says: the interpreter would round them."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arg_names = kernel.arg_names
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        from triton.runtime.interpreter import TensorHandle

        def number(x: object) -> object:
            if not isinstance(x, float):
                return x
            return triton.language.tensor(
                TensorHandle(np.array([x]), triton.language.float64), triton.language.float64
            )

        def launch(*args: object, **named: object) -> None:
            self.grids.append(grid)
            trace = sys.gettrace()
            sys.settrace(None)  # the interpreter's own functions, by the million, are no lines of ours
            try:
                with np.errstate(all="ignore"), _patched_once():
                    self.kernel[grid](*map(number, args), **named)
            finally:
                sys.settrace(trace)
                (lambda: None)()  # a tracer written in C comes back at the next call, which is to be before a return

        return launch


@contextmanager
def _patched_once() -> Iterator[None]:
    """The interpreter replaces Triton's words anew for each function that a kernel calls: a third of the time."""
    from triton.runtime import interpreter

    patch_lang, done = interpreter._patch_lang, []

    def once(function: Any) -> Any:
        if done:
            return interpreter._LangPatchScope()
        done.append(function)
        return patch_lang(function)

    with pytest.MonkeyPatch.context() as patch:
        if hasattr(interpreter, "_LangPatchScope"):  # else it is another Triton, and as slow as it is
            patch.setattr(interpreter, "_patch_lang", once)
        yield


def kernel_module(folder: Path = SOURCES) -> ModuleType:
    """The kernel's module once more, interpreted; or with the sources in another folder."""
    with triton.knobs.runtime.scope(), pytest.MonkeyPatch.context() as patch:
        triton.knobs.runtime.interpret = True
        for name in MODULES:
            spec = importlib.util.spec_from_file_location(f"interpreted_{name}", folder / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            patch.setitem(sys.modules, f"rmsprop.kernels.{name}", module)
    for name in module.__all__:
        setattr(module, name, _Launched(getattr(module, name)))
    return module


def broken(says: str, instead: str, folder: Path) -> ModuleType:
    """The kernel with other words in its source, which is written to an empty folder."""
    sources = {name: (SOURCES / f"{name}.py").read_text() for name in MODULES}
    assert any(says in source for source in sources.values()), f"the kernel no longer says {says!r}; restate it"
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source.replace(says, instead))
    return kernel_module(folder)


def mistake_tests(
    mistakes: Sequence[tuple[str, str, str]],
    check: Callable[[], None],
    quick: Callable[[int, Any], bool],
    errors: type[Exception] | tuple[type[Exception], ...] = AssertionError,
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return two tests of a check: it passes the kernel as it stands, and fails for each mistake in its source.

    Args:
        mistakes: name, words of the source, and the words that replace them.
        check: raises an error if the running kernel is wrong.
        quick: chooses the mistakes of `make test`, as in `mostly_long`.
        errors: what the check may raise.
    """

    def as_it_stands() -> None:
        """The check passes what is right, so a failure means something."""
        with interpreter(kernel_module()):
            check()

    rows = mostly_long([words for _, *words in mistakes], quick, unpack=True)

    @pytest.mark.parametrize(("says", "instead"), rows, ids=[name for name, *_ in mistakes])
    def each_is_caught(says: str, instead: str, tmp_path: Path) -> None:
        """The kernels with one mistake in them are refused."""
        with interpreter(broken(says, instead, tmp_path)), pytest.raises(errors):
            check()

    return as_it_stands, each_is_caught


def refuse(rule: Rule, bucket: Bucket) -> str | None:
    """As the backend does, but of CPU tensors."""
    return refuse_call(bucket) or backend.refuse_tensors(rule, bucket)


@contextmanager
def interpreter(module: ModuleType, block: int = BLOCK) -> Iterator[None]:
    """backend="triton" takes CPU tensors, in blocks of that size."""
    with pytest.MonkeyPatch.context() as patch:
        others = (own for own in kernels.BACKENDS if own.name != "triton")
        patch.setattr(kernels, "BACKENDS", (Backend("triton", refuse, backend.step), *others))
        patch.setattr(backend, "refuse", refuse)
        patch.setattr(backend, "load", lambda: module)
        patch.setattr(backend, "BLOCK", block)
        patch.setattr(backend, "LANES", 4)
        patch.setattr(backend, "_tables", type(backend._tables)())
        yield


def interpreted_fixtures() -> tuple[Any, Any]:
    """Return two fixtures for a module of tests: the interpreted kernel, and its place as backend="triton"."""

    @pytest.fixture(scope="module")
    def module() -> ModuleType:
        return kernel_module()

    @pytest.fixture(autouse=True)
    def in_place(module: ModuleType) -> Iterator[None]:
        with interpreter(module):
            yield

    return module, in_place
