"""Time construction, load_state_dict, and first steps beside torch's, interleaved in one process, on one thread.

    python bench/loading.py [rounds]

Prints the median processor time of each in microseconds, and the ratio of ours to torch's with its upper limit.
"""

import copy
import random
import statistics
import sys
import time
from collections.abc import Callable

import torch

from rmsprop import RMSprop

Kind = Callable[..., torch.optim.Optimizer]
KINDS: dict[str, Kind] = {"torch": torch.optim.RMSprop, "ours": RMSprop}
Params = list[torch.nn.Parameter]


def parameters(count: int) -> Params:
    """Return small parameters with gradients, so that the work per tensor dominates."""
    params = [torch.nn.Parameter(torch.randn(16)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def loads(cls: Kind, params: Params) -> Callable[[], object]:
    """Return a call that loads into an optimizer that has stepped."""
    optimizer = cls(params, momentum=0.9)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    return lambda: optimizer.load_state_dict(saved)


def rounds_of_three(cls: Kind, params: Params) -> Callable[[], object]:
    """Return a call that makes an optimizer, loads into it, and steps three times, as a federated round does."""
    optimizer = cls(params, momentum=0.9)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())

    def run() -> None:
        own = cls(params, momentum=0.9)
        own.load_state_dict(saved)
        for _ in range(3):
            own.step()

    return run


def begins(cls: Kind, params: Params) -> Callable[[], object]:
    """Return a call that makes an optimizer and takes its first step."""
    return lambda: cls(params, momentum=0.9).step()


CASES = (
    ("load", 12, loads, None, 20),
    ("load", 200, loads, 3.0, 5),
    ("make, load, 3 steps", 12, rounds_of_three, 1.0, 10),
    ("make, first step", 12, begins, None, 10),
    ("make, first step", 2_000, begins, 1.0, 1),
    ("make, first step", 10_000, begins, 1.0, 1),
)


def measure(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median processor time of each in microseconds, measured in random order within each round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name in random.sample(list(works), len(works)):
            begin = time.thread_time()
            works[name]()
            times[name].append(time.thread_time() - begin)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def main(rounds: int) -> None:
    """Print a line per case."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, microseconds of processor time")
    for name, count, work, bar, times in CASES:
        params = parameters(count)
        found = measure({kind: work(cls, params) for kind, cls in KINDS.items()}, rounds * times)
        shown = "  ".join(f"{kind} {value:11.1f}" for kind, value in found.items())
        limit = "" if bar is None else f"  bar {bar:.2f}"
        print(f"{name:20} {count:6} tensors  {shown}  ratio {found['ours'] / found['torch']:.2f}{limit}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 11)
