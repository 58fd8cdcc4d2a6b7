"""Measure the cost of stochastic rounding, Kahan remainders, bounded steps, and the nonfinite guard.

    python bench/robust.py [seconds per case]

Prints medians of `step()` in microseconds beside the plain step of the same tensors, interleaved in one process, with
one thread and with all threads, and writes them to bench/results/robust.json. "look" is the guard's scan of the
gradients alone. In bfloat16, torch's foreach and for-loop, which round to nearest, are measured, too.
"""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pass_marks
import torch

from rmsprop import RMSprop
from rmsprop.bench.cpu import CASES, OURS, machine, save, turn_about
from rmsprop.kernels import cpu, native
from rmsprop.spec import Hyper, Rule
from rmsprop.tensors.bucket import Bucket

HERE = Path(__file__).parent
MOST = 1.1  # pass mark: the guarded step over the plain one, on 64 M elements


def optimizer(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, kind: Any = RMSprop, **arguments: Any
) -> Callable[[], Any]:
    """Return the step of an optimizer over parameters of those shapes, with gradients."""
    made = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape).to(dtype)
    step: Callable[[], Any] = kind(made, lr=1e-3, **arguments).step
    return step


def scan(size: int) -> Callable[[], Any]:
    """Return a call of the compiled scan for nonfinite values of a gradient of `size` elements."""
    loaded = native.load()
    assert not isinstance(loaded, str)
    p, g, v = torch.ones(size), torch.randn(size), torch.ones(size)
    lists = cpu.Lists(Rule(), Bucket([p], [g], {"square_avg": [v], "step": [torch.tensor(0.0)]}))
    lists.numbers(Hyper(1e-3, 0.99, 1e-8))
    tensors = (p, g, v)  # the lists point into their memory

    def run() -> int:
        assert tensors
        parallel = loaded.parallel_for if torch.get_num_threads() > 1 else None
        return int(loaded.unfinite(ctypes.byref(lists.work), 1, parallel, native.GRAIN))

    return run


def cases() -> dict[str, Callable[[], dict[str, Callable[[], Any]]]]:
    """Return the timed steps of each case; OURS is the plain step."""
    f32, bf16 = torch.float32, torch.bfloat16
    net = CASES["rl"]()
    many = [(1 << 20,)] * 16
    return {
        "guard, 64 M": lambda: {
            OURS: optimizer([(64 << 20,)], f32),
            "skip": optimizer([(64 << 20,)], f32, nonfinite="skip"),
            "look": scan(64 << 20),
        },
        "guard, RL net": lambda: {
            OURS: optimizer(net, f32),
            "skip": optimizer(net, f32, nonfinite="skip"),
        },
        "max_update, 16 x 1 M": lambda: {
            OURS: optimizer(many, f32),
            "max_update": optimizer(many, f32, max_update=3.0),
        },
        "bfloat16, 16 x 1 M": lambda: {
            OURS: optimizer(many, bf16),
            "stochastic": optimizer(many, bf16, rounding="stochastic"),
            "compensation": optimizer(many, bf16, compensation=True),
            "both": optimizer(many, bf16, rounding="stochastic", compensation=True),
            "torch foreach": optimizer(many, bf16, torch.optim.RMSprop, foreach=True),
            "torch loop": optimizer(many, bf16, torch.optim.RMSprop, foreach=False),
        },
    }


def main(seconds: float) -> None:
    """Measure, print, judge, and write."""
    cores = torch.get_num_threads()
    rows, bars = [], []
    for case, make in cases().items():
        for threads in sorted({1, cores}):
            torch.set_num_threads(threads)
            times = turn_about(make(), seconds)
            plain = times[OURS].median
            shown = "  ".join(f"{name} {time.median:.1f} ({time.median / plain:.2f})" for name, time in times.items())
            rows.append({"case": case, "threads": threads, "times": {n: vars(t) for n, t in times.items()}})
            print(f"{case:22} {threads} threads  {shown}", flush=True)
            if case == "guard, 64 M" and threads == cores:
                ratio = times["skip"].median / plain
                bars.append((f"{case}: guarded over plain", ratio, MOST, ratio <= MOST))
    torch.set_num_threads(cores)
    record = {"machine": machine(), "unit": "microseconds", "bars": pass_marks.rows(bars), "results": rows}
    save(record, HERE / "results" / "robust.json")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0)
