"""Measure what a training loop calls each step: clipping, the step and the average of the weights, inside our step
and as torch's own calls beside it, and zero_grad and a scheduler.

    python bench/iteration.py [seconds per case]

Prints medians in microseconds of one iteration without forward and backward, interleaved in one process, with one
thread and with all threads, on quiet cores and, for the small networks, with every core busy. Writes them to
bench/results/iteration.json.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pass_marks
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rmsprop import RMSprop
from rmsprop.bench.cpu import CASES, OURS, machine, neighbors, save, turn_about

HERE = Path(__file__).parent
NORM, WEIGHTS, DECAY = 0.5, 10.0, 0.9999
CLIP, GUARD, AVERAGE = {"clip_global_norm": NORM}, {"nonfinite": "skip"}, {"ema": DECAY}
INSIDE: dict[str, dict[str, Any]] = {  # our step's arguments
    OURS: {},
    "clip": CLIP,
    "clip, guard": {**CLIP, **GUARD},
    "average": AVERAGE,
    "clip, average": {**CLIP, **AVERAGE},
    "clip, average, guard": {**CLIP, **AVERAGE, **GUARD},
    "weights": {"clip_weights": WEIGHTS},
}
TORCHS = ("torch", "torch, clip", "torch, clip, average")
SMALL = ("a2c", "nature")
# pass marks on one thread of quiet cores: case, call, the call it is divided by, and the largest ratio
MOST = [
    ("a2c", "clip", OURS, 1.8),
    ("a2c", "clip", "torch, clip", 1 / 12),
    ("a2c", "clip, average", OURS, 2.5),
    ("a2c", "clip, average", "torch, clip, average", 1 / 15),
    ("nature", "clip", "torch, clip", 1 / 4),
    ("64 M", "clip", OURS, 1.38),
    ("64 M", "average", OURS, 1.45),
    ("64 M", "clip, average", OURS, 1.75),
    ("64 M", "clip, guard", "clip", 1.01),
    ("64 M", "clip, average, guard", "clip, average", 1.01),
    ("a2c", "weights", OURS, 1.05),
    ("64 M", "weights", OURS, 1.05),
]


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    """Return parameters with gradients."""
    made = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape)
    return made


def inside(params: list[nn.Parameter], arguments: dict[str, Any]) -> Callable[[], Any]:
    """Return our step."""
    return RMSprop(params, lr=1e-3, **arguments).step


def beside(params: list[nn.Parameter], name: str) -> Callable[[], Any]:
    """Return torch's calls of one iteration."""
    optimizer = torch.optim.RMSprop(params, lr=1e-3)
    average = AveragedModel(nn.ParameterList(params), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    model = nn.ParameterList(params)

    def run() -> None:
        if "clip" in name:
            nn.utils.clip_grad_norm_(params, NORM)
        optimizer.step()
        if "average" in name:
            average.update_parameters(model)

    return run


def around(params: list[nn.Parameter], kind: Any) -> dict[str, Callable[[], Any]]:
    """Return the calls that surround a step, for an optimizer of that class."""
    optimizer = kind(params, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    optimizer.step()
    gradients = [p.grad for p in params]

    def zero_grad() -> None:
        for p, grad in zip(params, gradients, strict=True):  # which backward would make
            p.grad = grad
        optimizer.zero_grad()

    return {"zero_grad": zero_grad, "scheduler": scheduler.step}


def calls(shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], Any]]:
    """Return every call to time on tensors of these shapes."""
    found = {name: inside(parameters(shapes), arguments) for name, arguments in INSIDE.items()}
    found |= {name: beside(parameters(shapes), name) for name in TORCHS}
    for owner, kind in (("", RMSprop), ("torch, ", torch.optim.RMSprop)):
        found |= {owner + name: call for name, call in around(parameters(shapes), kind).items()}
    return found


def main(seconds: float) -> None:
    """Measure, print, judge, and write."""
    cores = torch.get_num_threads()
    rows, bars = [], []
    for case in ("a2c", "nature", "mobilenet", "64 M"):
        shapes = CASES[case]() if case in CASES else [(64 << 20,)]
        for threads in sorted({1, cores}):
            for busy in (False, True) if case in SMALL else (False,):
                torch.set_num_threads(threads)
                with neighbors(cores if busy else 0):
                    times = turn_about(calls(shapes), seconds)
                rows.append(
                    {"case": case, "threads": threads, "busy": busy, "times": {n: vars(t) for n, t in times.items()}}
                )
                shown = "  ".join(f"{name} {time.median:.1f}" for name, time in times.items())
                print(f"{case:10} {threads} threads{', busy' if busy else ''}  {shown}", flush=True)
                for _, one, other, most in (mark for mark in MOST if mark[0] == case and threads == 1 and not busy):
                    ratio = times[one].median / times[other].median
                    bars.append((f"{case}: {one} over {other}", ratio, most, ratio <= most))
                    print(f"    {one} over {other}: {ratio:.3f}, at most {most:.3f}", flush=True)
    torch.set_num_threads(cores)
    record = {"machine": machine(), "unit": "microseconds", "bars": pass_marks.rows(bars), "results": rows}
    save(record, HERE / "results" / "iteration.json")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0)
