"""Measure clipping beside the step, inside it and before it, with and without the guard.

    python bench/iteration.py [seconds per case]

Prints medians in microseconds of one iteration without forward and backward, with clipping inside our step and with
torch's clip_grad_norm_ before torch's, interleaved in one process, with one thread and with all threads. Writes them
to bench/results/iteration.json.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pass_marks
import torch
from torch import nn

from rmsprop import RMSprop
from rmsprop.bench.cpu import CASES, OURS, machine, save, turn_about

HERE = Path(__file__).parent
NORM, WEIGHTS = 0.5, 10.0
CALLS: dict[str, tuple[Any, dict[str, Any], bool]] = {  # class, arguments, whether clip_grad_norm_ comes before
    OURS: (RMSprop, {}, False),
    "clip": (RMSprop, {"clip_global_norm": NORM}, False),
    "clip, guard": (RMSprop, {"clip_global_norm": NORM, "nonfinite": "skip"}, False),
    "weights": (RMSprop, {"clip_weights": WEIGHTS}, False),
    "torch": (torch.optim.RMSprop, {}, False),
    "torch, clip": (torch.optim.RMSprop, {}, True),
}
# pass marks on one thread: case, call, the call it is divided by, and the largest ratio
MOST = [
    ("a2c", "clip", OURS, 1.8),
    ("a2c", "clip", "torch, clip", 1 / 12),
    ("nature", "clip", "torch, clip", 1 / 4),
    ("64 M", "clip", OURS, 1.38),
    ("64 M", "clip, guard", "clip", 1.01),
    ("a2c", "weights", OURS, 1.05),
    ("64 M", "weights", OURS, 1.05),
]


def iteration(shapes: list[tuple[int, ...]], kind: Any, arguments: dict[str, Any], before: bool) -> Callable[[], Any]:
    """Return the calls of one iteration on parameters of these shapes, which have gradients."""
    made = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape)
    optimizer = kind(made, lr=1e-3, **arguments)

    def run() -> None:
        if before:
            nn.utils.clip_grad_norm_(made, NORM)
        optimizer.step()

    return run


def main(seconds: float) -> None:
    """Measure, print, judge, and write."""
    cores = torch.get_num_threads()
    rows, bars = [], []
    for case in ("a2c", "nature", "mobilenet", "64 M"):
        shapes = CASES[case]() if case in CASES else [(64 << 20,)]
        for threads in sorted({1, cores}):
            torch.set_num_threads(threads)
            times = turn_about({name: iteration(shapes, *how) for name, how in CALLS.items()}, seconds)
            rows.append({"case": case, "threads": threads, "times": {n: vars(t) for n, t in times.items()}})
            shown = "  ".join(f"{name} {time.median:.1f}" for name, time in times.items())
            print(f"{case:10} {threads} threads  {shown}", flush=True)
            if threads == 1:
                for _, one, other, most in (mark for mark in MOST if mark[0] == case):
                    ratio = times[one].median / times[other].median
                    bars.append((f"{case}: {one} over {other}", ratio, most, ratio <= most))
                    print(f"    {one} over {other}: {ratio:.3f}, at most {most:.3f}", flush=True)
    torch.set_num_threads(cores)
    record = {"machine": machine(), "unit": "microseconds", "bars": pass_marks.rows(bars), "results": rows}
    save(record, HERE / "results" / "iteration.json")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0)
