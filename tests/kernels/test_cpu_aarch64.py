"""The kernel for 64-bit Arm, by a cross compiler and user-mode emulation, beside the one of this machine."""

import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cpu_parity import COVERING, F32, SIZES, TYPES, spiked, tensors
from emulated import Recorder
from halves import rounded_as
from test_cpu_builds import SOURCES, clipped_results, narrowed_results

from rmsprop.kernels import cpu, native
from rmsprop.spec import Hyper, Rule

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
TOOLS = Path(__file__).parents[1] / "tools"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(native.missing() is not None, reason=str(native.missing())),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with a kernel for x86-64"),
    pytest.mark.skipif(
        None in (COMPILER, EMULATOR) or not SOURCES.exists(),
        reason="needs sources, aarch64-linux-gnu-g++ and qemu-aarch64 (apt install g++-aarch64-linux-gnu qemu-user)",
    ),
]


def emulated(folder: Path, *flags: str) -> Path:
    """The program of tests/tools/emulated.cpp for aarch64, with setup.py's flags and these."""
    program = folder / "emulated"
    always = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-static", "-w"]
    sources = [str(TOOLS / "emulated.cpp"), str(SOURCES / "rmsprop.cpp")]
    subprocess.run([str(COMPILER), *always, *flags, f"-I{SOURCES}", "-o", str(program), *sources], check=True)
    return program


def different(program: Path, calls: Recorder, folder: Path) -> Sequence[int]:
    """The numbers of the calls whose results are not those of this machine, to the bit."""
    calls.write(folder / "calls")
    subprocess.run([str(EMULATOR), str(program), str(folder / "calls"), str(folder / "results")], check=True)
    found, at, wrong = (folder / "results").read_bytes(), 0, []
    for number, expected in enumerate(calls.results):
        if found[at : at + len(expected)] != expected:
            wrong.append(number)
        at += len(expected)
    assert at == len(found)
    return wrong


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Every pair of switches and of types, spikes, clipping with norms, averages, roundings, narrow state."""
    calls = Recorder()
    monkeypatch.setattr(native, "load", lambda: calls.kernel)
    for types in TYPES:
        for number, (rule, hyper) in enumerate(COVERING):
            cpu.step(rule, hyper, tensors(rule, types, SIZES, seed=number))
        cpu.step(Rule(), Hyper(0.03, 0.9, 1e-3, max_update=1.5), spiked(Rule(), types, 1))
        clipped_results(types, seed=20)
    for dtype in (F32, torch.bfloat16, torch.float16):
        narrowed_results(dtype, seed=20)
    generator = torch.Generator().manual_seed(5)
    for param in (torch.bfloat16, torch.float16):
        for stochastic, compensated in ((True, False), (False, True), (True, True)):
            bucket = tensors(Rule(), (param, F32), (65,), 2)
            bucket = rounded_as(bucket, stochastic=stochastic, compensated=compensated, generator=generator)
            cpu.step(Rule(), Hyper(0.03, 0.9, 1e-3), bucket)
    return calls


def test_aarch64_gives_the_same_bits(recorded: Recorder, tmp_path: Path) -> None:
    """Parameters, state and scratch of every call are those of x86-64, since fused multiply-adds are explicit."""
    assert len(recorded.calls) > 100
    assert different(emulated(tmp_path), recorded, tmp_path) == []


def test_a_kernel_that_contracts_is_caught(recorded: Recorder, tmp_path: Path) -> None:
    """With -ffp-contract=fast, dozens of calls differ: the comparison reads what the kernel wrote."""
    assert len(different(emulated(tmp_path, "-O2", "-ffp-contract=fast"), recorded, tmp_path)) > 20
