"""Time our dialects beside the classes of timm and Stable-Baselines3 that they replace, and lazy sparse updates.

    python bench/dialects.py [seconds per case]

Prints medians of `step()` in microseconds, interleaved in one process, with one thread and with all threads, and
writes them to bench/results/dialects.json. timm's for-loop and foreach are both measured, and the better one counts.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "tools"))

import oracles  # noqa: E402
import pass_marks  # noqa: E402

from rmsprop import RMSprop  # noqa: E402
from rmsprop.bench import cpu  # noqa: E402

# The least ratio of the replaced class to ours.
BARS = {"timm on mobilenet": 3.0, "sb3 on a2c": 4.0}
RECIPE = dict(lr=0.048, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=1e-5)  # EfficientNet's, as timm runs it


def params(case: str) -> list[torch.nn.Parameter]:
    """Return the parameters of a case, with gradients."""
    made = [torch.nn.Parameter(torch.randn(shape)) for shape in cpu.CASES[case]()]
    for p in made:
        p.grad = torch.randn_like(p) * 1e-3
    return made


def timm_steps() -> dict[str, Callable[[], Any]]:
    """Return the steps of timm's class and our dialect on MobileNetV3-Large."""
    theirs = oracles.timm()
    return {
        cpu.OURS: RMSprop(params("mobilenet"), dialect="timm", **RECIPE).step,
        "loop": theirs(params("mobilenet"), foreach=False, **RECIPE).step,
        "foreach": theirs(params("mobilenet"), foreach=True, **RECIPE).step,
    }


def sb3_steps() -> dict[str, Callable[[], Any]]:
    """Return the steps of SB3's class and our dialect on the network of its A2C."""
    theirs = oracles.sb3()
    arguments = dict(lr=7e-4, alpha=0.99, eps=1e-5)
    return {
        cpu.OURS: RMSprop(params("a2c"), dialect="sb3", **arguments).step,
        "loop": theirs(params("a2c"), **arguments).step,
    }


def lazy_steps(rows: int) -> dict[str, Callable[[], Any]]:
    """Return the lazy and the dense step of one embedding of 100,000 rows of 64, few of which have a gradient."""
    made: dict[str, Callable[[], Any]] = {}
    for name, meaning in ((cpu.OURS, "lazy"), ("dense", "dense")):
        table = torch.nn.Parameter(torch.randn(100_000, 64))
        indices = torch.randint(0, 100_000, (1, rows))
        table.grad = torch.sparse_coo_tensor(
            indices, torch.randn(rows, 64), table.shape, check_invariants=True
        ).coalesce()
        made[name] = RMSprop([table], lr=1e-6, dialect="tensorflow1", momentum=0.9, sparse=meaning).step
    return made


def main(seconds: float) -> None:
    """Measure, print, judge, and write."""
    cores = torch.get_num_threads()
    rows, bars = [], []
    cases: dict[str, Callable[[], dict[str, Callable[[], Any]]]] = {
        "timm on mobilenet": timm_steps,
        "sb3 on a2c": sb3_steps,
        "lazy, 100 of 100,000 rows": lambda: lazy_steps(100),
        "lazy, 10,000 of 100,000 rows": lambda: lazy_steps(10_000),
    }
    for case, make in cases.items():
        best: dict[str, float] = {}
        for threads in sorted({1, cores}):
            torch.set_num_threads(threads)
            times = cpu.turn_about(make(), seconds)
            for name, time in times.items():
                best[name] = min(best.get(name, float("inf")), time.median)
            shown = "  ".join(f"{name} {time.median:9.1f}" for name, time in times.items())
            rows.append({"case": case, "threads": threads, "times": {n: vars(t) for n, t in times.items()}})
            print(f"{case:30} {threads} threads  {shown}", flush=True)
        ratio = min(time for name, time in best.items() if name != cpu.OURS) / best[cpu.OURS]
        print(f"{case:30} theirs over ours: {ratio:.1f}")
        if case in BARS:
            bars.append((case, ratio, BARS[case], ratio >= BARS[case]))
    torch.set_num_threads(cores)
    record = {"machine": cpu.machine(), "unit": "microseconds", "bars": pass_marks.rows(bars), "results": rows}
    cpu.save(record, HERE / "results" / "dialects.json")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0)
