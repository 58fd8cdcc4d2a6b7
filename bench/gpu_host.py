"""What a step of the Triton kernel costs the host, where there is no GPU: python bench/gpu_host.py

Triton compiles for an H100 and launches into a driver that does nothing, on tensors of the CPU: a GPU's driver adds
its own time. Prints the median of whole `step()` calls in us, by case and settings.
"""

import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from rmsprop import RMSprop, bench, kernels
from rmsprop.kernels import triton as backend
from rmsprop.kernels.triton_plan import DevicePlan

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "counted there": {"capturable": True},
    "counted there, bias": {"capturable": True, "bias_correction": True},
}


class Driver:
    """As much of one as Triton asks for: it has a device and a stream, and runs nothing."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": 1 << 20},
            load_binary=lambda *_: (object(), object(), 32, 0, 1024),
            unload_module=lambda _: None,
        )
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda _: 0
        self.get_current_target = lambda: GPUTarget("cuda", 90, 32)
        self.launcher_cls = lambda *_: lambda *_: None


def median(case: str, settings: dict[str, Any], steps: int = 5000) -> float:
    """Microseconds of one planned step."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in bench.CASES[case]()]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = RMSprop(params, backend="triton", **settings)
    for _ in range(5):
        optimizer.step()
    assert isinstance(optimizer._plan, DevicePlan)
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def main() -> None:
    """Measure and print."""
    triton.runtime.driver._active = Driver()
    backend._refuse_device = lambda _: None  # the CPU stands for the GPU
    kernels.BACKENDS = (backend.TRITON,)
    for case in ("rl", "mobilenet"):
        for name, settings in SETTINGS.items():
            print(f"{case:<10} {name:<20} {median(case, settings):7.1f}")


if __name__ == "__main__":
    main()
