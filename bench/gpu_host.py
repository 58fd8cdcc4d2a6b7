"""Time the host's work in a step of the Triton kernel, without a GPU: python bench/gpu_host.py

Triton compiles for an H100 and launches CPU tensors into a driver that does nothing, so the time of a real driver is
missing. Prints the median of whole `step()` calls in microseconds, by case and settings.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton

from rmsprop import RMSprop, kernels
from rmsprop.bench import cpu
from rmsprop.kernels import triton as backend
from rmsprop.kernels.triton_plan import DevicePlan

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "tools"))
from ptx_machine import Driver

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "counted there": {"capturable": True},
    "counted there, bias": {"capturable": True, "bias_correction": True},
}


def median(case: str, settings: dict[str, Any], steps: int = 5000) -> float:
    """Return the median microseconds of a step with a cached plan."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in cpu.CASES[case]()]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = RMSprop(params, backend="triton", **settings)
    for _ in range(5):
        optimizer.step()
    assert isinstance(optimizer._stepper.plan, DevicePlan)
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def main() -> None:
    """Measure and print."""
    triton.runtime.driver._active = Driver(90, lambda *_: lambda *_: None)
    backend._refuse_device = lambda _: None  # accepts CPU tensors in place of a GPU's
    kernels.BACKENDS = (backend.TRITON,)
    for case in ("rl", "mobilenet"):
        for name, settings in SETTINGS.items():
            print(f"{case:<10} {name:<20} {median(case, settings):7.1f}")


if __name__ == "__main__":
    main()
