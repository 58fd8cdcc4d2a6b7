"""Time the eager backend beside torch's for-loop and foreach, interleaved in one process, on one thread.

    python bench/eager.py [seconds per case]

Prints medians of `step()` in microseconds, and torch's best over ours.
"""

import random
import statistics
import sys
import time

import torch

from rmsprop import RMSprop

CASES = {
    "RL net, 6 tensors": [(64, 4), (64,), (64, 64), (64,), (2, 64), (2,)],
    "500 x 16": [(16,)] * 500,
    "500 x 1024": [(1024,)] * 500,
    "60 x 16k": [(16384,)] * 60,
    "one of 4 M": [(4_000_000,)],
}
SETTINGS = ({}, {"momentum": 0.9, "centered": True})


def build(
    cls: type[torch.optim.Optimizer], shapes: list[tuple[int, ...]], **settings: object
) -> torch.optim.Optimizer:
    """Return an optimizer over random parameters with gradients."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return cls(params, **settings)


def measure(optimizers: dict[str, torch.optim.Optimizer], seconds: float) -> dict[str, float]:
    """Return the median time of each step in microseconds, measured in random order within each round."""
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 7:
        for name in random.sample(list(optimizers), len(optimizers)):
            begin = time.perf_counter()
            optimizers[name].step()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def main(seconds: float) -> None:
    """Print a line per case and rule."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, microseconds per step")
    for settings in SETTINGS:
        for name, shapes in CASES.items():
            found = measure(
                {
                    "torch loop": build(torch.optim.RMSprop, shapes, foreach=False, **settings),
                    "torch foreach": build(torch.optim.RMSprop, shapes, foreach=True, **settings),
                    "ours": build(RMSprop, shapes, backend="eager", **settings),
                    "ours, foreach=False": build(RMSprop, shapes, foreach=False, **settings),
                },
                seconds,
            )
            best = min(found["torch loop"], found["torch foreach"])
            shown = "  ".join(f"{key} {value:9.1f}" for key, value in found.items())
            print(f"{name:18} {' '.join(settings):18} {shown}  ratio {best / found['ours']:.2f}")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0)
