"""Builds the CPU kernel beside the package: a plain shared library, for every Python and torch.

Without a working C++17 compiler the package installs all the same, and says what is missing when it is asked for.
"""

import ctypes
import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# Never -ffast-math: GCC then switches the whole process to flush-to-zero. -ffp-contract=off: the same bits from every
# instruction set.
_FLAGS = {
    "unix": [
        "-std=c++17",
        "-O3",
        "-g0",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
        "-fvisibility=hidden",
    ],
    "msvc": ["/std:c++17", "/O2", "/fp:precise"],
}
_SOURCES = ["src/rmsprop/csrc/rmsprop.cpp", "src/rmsprop/csrc/plan.cpp"]


class BuildNative(build_ext):
    """A library for ctypes: no Python headers, no version of Python in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + (".dll" if sys.platform == "win32" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:  # noqa: ARG002
        return []  # no PyInit_

    def get_libraries(self, ext: Extension) -> list[str]:  # noqa: ARG002
        return []  # no libpython

    def run(self) -> None:
        if "musl" in str(sysconfig.get_config_var("HOST_GNU_TYPE")):  # Alpine Linux and its like
            sys.exit(
                "rmsprop needs torch, which has no wheel for musl, the C library of this Python; install it on a "
                "Linux with glibc, such as Debian, or in a container such as python:3.12-slim"
            )
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if self.editable_mode and not self.force and (kept := self._newer_than_its_sources(ext)):
            self.copy_file(str(kept), self.get_ext_fullpath(ext.name))
            return
        ext.extra_link_args = ["-s"] if self.compiler.compiler_type == "unix" and sys.platform == "linux" else []
        ext.extra_compile_args = _FLAGS.get(self.compiler.compiler_type, _FLAGS["unix"])
        try:
            super().build_extension(ext)
        except CompileError:  # a compiler without function versions
            ext.define_macros = [("RMSPROP_ONE_TARGET", None)]
            super().build_extension(ext)

    def _newer_than_its_sources(self, ext: Extension) -> Path | None:
        """Return the library that an editable install for another Python left in this checkout, or None."""
        kept = Path("src").resolve() / self.get_ext_filename(ext.name)
        newest = max(Path(name).stat().st_mtime for name in (__file__, *ext.sources, *ext.depends))
        asked = any(name in os.environ for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS"))
        if asked or not kept.exists() or kept.stat().st_mtime <= newest:
            return None
        try:
            ctypes.CDLL(str(kept))  # of this system: a checkout may be shared with another
        except OSError:
            return None
        return kept


class PlainWheel(bdist_wheel):
    """py3-none-<platform>: the library asks nothing of a Python's version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "rmsprop._native",
            _SOURCES,
            depends=[f"src/rmsprop/csrc/{name}.h" for name in ("rmsprop", "plan", "lines", "norms", "types")],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlainWheel},
)
