"""Benchmark of an optimizer step on the CPU, beside torch's RMSprop and its fused SGD and Adam.

All optimizers take turns in one process, on the same parameters and gradients. Each time is one whole
`optimizer.step()`, Python included. Times are medians with their spread, since a shared machine is never quiet.
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rmsprop.files import write_whole
from rmsprop.kernels import native
from rmsprop.optimizer import RMSprop
from rmsprop.printing import version

Shapes = list[tuple[int, ...]]

TRAFFIC = {"plain": 20, "full": 36}  # bytes per element that a step must move
OURS, TORCH, YARDSTICKS = "rmsprop", ("torch foreach", "torch loop"), ("SGD fused", "Adam fused")


@dataclass(frozen=True)
class Times:
    """The times of one optimizer, in microseconds."""

    median: float
    p10: float
    p90: float
    p99: float
    count: int


@dataclass(frozen=True)
class Result:
    """One case under one set of conditions, with the times of every optimizer."""

    case: str
    tensors: int
    elements: int
    variant: str
    threads: int
    busy: bool
    times: dict[str, Times]

    def ratio(self) -> float:
        """Return the ratio of torch's best RMSprop, for-loop or foreach, to ours."""
        return min(self.times[name].median for name in TORCH) / self.times[OURS].median

    def gigabytes(self) -> float:
        """Return the memory traffic that the step needs, in GB/s."""
        return self.elements * TRAFFIC[self.variant] / self.times[OURS].median / 1e3


def rl() -> Shapes:
    """Return the shapes of a policy for CartPole: 4-64-64-2."""
    return [(64, 4), (64,), (64, 64), (64,), (2, 64), (2,)]


def a2c() -> Shapes:
    """Return the shapes of Stable-Baselines3's A2C for CartPole: two towers and two heads."""
    tower: Shapes = [(64, 4), (64,), (64, 64), (64,)]
    return [*tower, *tower, (2, 64), (2,), (1, 64), (1,)]


def nature() -> Shapes:
    """Return the shapes of the Nature DQN for Atari with 6 actions."""
    convolutions: Shapes = [(32, 4, 8, 8), (32,), (64, 32, 4, 4), (64,), (64, 64, 3, 3), (64,)]
    return [*convolutions, (512, 3136), (512,), (6, 512), (6,)]


def _normed(out: int, into: int, kernel: int) -> Shapes:
    """Return the shapes of a convolution without bias and of its batch norm."""
    return [(out, into, kernel, kernel), (out,), (out,)]


def mobilenet() -> Shapes:
    """Return the shapes of torchvision's MobileNetV3-Large."""
    blocks = [  # into, kernel, expanded, out, squeeze-and-excitation
        *[(16, 3, 16, 16, 0), (16, 3, 64, 24, 0), (24, 3, 72, 24, 0)],
        *[(24, 5, 72, 40, 1), (40, 5, 120, 40, 1), (40, 5, 120, 40, 1)],
        *[(40, 3, 240, 80, 0), (80, 3, 200, 80, 0), (80, 3, 184, 80, 0), (80, 3, 184, 80, 0)],
        *[(80, 3, 480, 112, 1), (112, 3, 672, 112, 1)],
        *[(112, 5, 672, 160, 1), (160, 5, 960, 160, 1), (160, 5, 960, 160, 1)],
    ]
    shapes = _normed(16, 3, 3)
    for into, kernel, expanded, out, squeezes in blocks:
        if expanded != into:
            shapes += _normed(expanded, into, 1)
        shapes += _normed(expanded, 1, kernel)
        if squeezes:
            narrow = _divisible(expanded / 4)
            shapes += [(narrow, expanded, 1, 1), (narrow,), (expanded, narrow, 1, 1), (expanded,)]
        shapes += _normed(out, expanded, 1)
    return [*shapes, *_normed(960, 160, 1), (1280, 960), (1280,), (1000, 1280), (1000,)]


def _divisible(channels: float) -> int:
    """Return the nearest multiple of 8 that is at most a tenth smaller, as torchvision's _make_divisible does."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def resnet50() -> Shapes:
    """Return the shapes of torchvision's ResNet-50."""
    shapes, into = _normed(64, 3, 7), 64
    for planes, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(depth):
            shapes += _normed(planes, into, 1) + _normed(planes, planes, 3) + _normed(4 * planes, planes, 1)
            if i == 0:
                shapes += _normed(4 * planes, into, 1)
            into = 4 * planes
    return [*shapes, (1000, 2048), (1000,)]


def vit() -> Shapes:
    """Return the shapes of torchvision's ViT-B/16."""
    norm: Shapes = [(768,), (768,)]
    attention: Shapes = [(2304, 768), (2304,), (768, 768), (768,)]
    block: Shapes = [*norm, *attention, *norm, (3072, 768), (3072,), (768, 3072), (768,)]
    return [(1, 1, 768), (768, 3, 16, 16), (768,), (1, 197, 768), *block * 12, *norm, (1000, 768), (1000,)]


CASES: dict[str, Callable[[], Shapes]] = {
    "rl": rl,
    "a2c": a2c,
    "nature": nature,
    "mobilenet": mobilenet,
    "resnet50": resnet50,
    "vit": vit,
    "500x16": lambda: [(16,)] * 500,
    "500x1024": lambda: [(1024,)] * 500,
    "one": lambda: [(1 << 26,)],
}


def contestants(params: list[torch.Tensor], variant: str) -> dict[str, Callable[[], Any]]:
    """Return the step of every optimizer, on the same parameters and gradients, each with its own state."""
    full: dict[str, Any] = {"momentum": 0.9, "centered": True} if variant == "full" else {}
    made: dict[str, Callable[[], Any]] = {
        OURS: RMSprop(params, lr=1e-6, **full).step,
        "torch foreach": torch.optim.RMSprop(params, lr=1e-6, foreach=True, **full).step,
        "torch loop": torch.optim.RMSprop(params, lr=1e-6, foreach=False, **full).step,
        "SGD fused": torch.optim.SGD(params, lr=1e-6, fused=True, momentum=full.get("momentum", 0.0)).step,
        "Adam fused": torch.optim.Adam(params, lr=1e-6, fused=True).step,
    }
    loaded = native.load()
    if len(params) == 1 and not isinstance(loaded, str):
        p, v = params[0], torch.zeros_like(params[0])
        assert p.grad is not None
        arrays = (p.data_ptr(), p.grad.data_ptr(), v.data_ptr(), p.numel(), loaded.parallel_for, native.GRAIN)
        made["stream"] = lambda: (loaded.stream(*arrays), v)[0]
    return made


def measure(case: str, variant: str, threads: int, busy: bool, seconds: float) -> Result:
    """Time every optimizer on one case, in turn, for about `seconds` each."""
    shapes = CASES[case]()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator, device="cpu")) for shape in shapes]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, device="cpu") * 1e-3
        with neighbors(threads if busy else 0):
            times = turn_about(contestants([*params], variant), seconds)
    finally:
        torch.set_num_threads(before)
    return Result(case, len(shapes), sum(map(math.prod, shapes)), variant, threads, busy, times)


def turn_about(steps: dict[str, Callable[[], Any]], seconds: float) -> dict[str, Times]:
    """Time the steps in alternating bursts of about 2 ms, so that a noisy moment affects all of them."""
    burst = {}
    for name, step in steps.items():
        step()
        step()  # allocates the state and caches the plan
        begin = time.perf_counter()
        step()
        burst[name] = max(1, int(2e-3 / (time.perf_counter() - begin)))
    found: dict[str, list[float]] = {name: [] for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    while any((spent[name] < seconds and len(found[name]) < 100_000) or len(found[name]) < 5 for name in steps):
        for name, step in steps.items():
            if name not in (OURS, "stream") and spent[name] >= seconds and len(found[name]) >= 5:
                continue
            step()  # refills the processor's caches
            for _ in range(burst[name]):
                begin = time.perf_counter()
                step()
                took = time.perf_counter() - begin
                found[name].append(took * 1e6)
                spent[name] += took
    return {name: summary(values) for name, values in found.items()}


def summary(values: list[float]) -> Times:
    """Return the median and the spread."""
    ordered = sorted(values)

    def _at(part: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(part * len(ordered)))], 2)

    return Times(round(median(ordered), 2), _at(0.1), _at(0.9), _at(0.99), len(ordered))


@contextmanager
def neighbors(count: int) -> Iterator[None]:
    """Run `count` other processes, each of which keeps one core busy."""
    working = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        if working:
            time.sleep(0.3)
        yield
    finally:
        for process in working:
            process.kill()
            process.wait()


def machine() -> dict[str, Any]:
    """Return the machine and the versions that the times hold for."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x), model)
    load = os.getloadavg() if hasattr(os, "getloadavg") else (0.0, 0.0, 0.0)
    return {
        "cpu": model,
        "cores": cores(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rmsprop": version(),
        "commit": _commit(),
        "load_before": round(load[0], 2),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def cores() -> int:
    """Return the number of cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def _commit() -> str | None:
    """Return the commit of this checkout, with a + if files differ from it, or None for an installed package."""
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run(
    cases: list[str], variants: list[str], threads: list[int], loads: list[bool], seconds: float
) -> Iterator[Result]:
    """Measure every case under every set of conditions."""
    for case in cases:
        for variant in variants:
            for count in threads:
                for busy in loads:
                    yield measure(case, variant, count, busy, seconds)


def record(results: list[Result], about: dict[str, Any]) -> dict[str, Any]:
    """Return the results as plain data, with the machine that they hold for."""
    rows = [{**asdict(r), "ratio": round(r.ratio(), 2)} for r in results]
    return {"machine": about, "unit": "microseconds", "results": rows}


def save(record: dict[str, Any], path: Path) -> None:
    """Write a record as a JSON file."""
    write_whole(path, lambda part: part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8"))
