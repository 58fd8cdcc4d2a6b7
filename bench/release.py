"""Measure the peak memory of training with and without stepping in backward, on the CPU.

    python bench/release.py

Each case runs in a separate process. Prints a table and writes it to bench/results/release.json, from which
docs/build.py draws docs/figures/release.png. `transient` is the peak memory of tensors during an iteration beyond
parameters and state, as torch's profiler reports it. `resident` is the peak resident set of the process, with glibc
set to return blocks of a megabyte at once.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmsprop import RMSprop, step_in_backward
from rmsprop.bench import cpu

RESULTS = Path(__file__).parent / "results" / "release.json"
RETURN = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


def stack() -> tuple[nn.Module, torch.Tensor]:
    """Return 48 layers of 1024 x 1024 with few activations, so that gradients dominate the memory of an iteration."""
    layers = [part for _ in range(48) for part in (nn.Linear(1024, 1024), nn.Tanh())]
    return nn.Sequential(*layers), torch.randn(8, 1024)


def transformer(batch: int) -> tuple[nn.Module, torch.Tensor]:
    """Return 12 layers of width 512 on sequences of 128 tokens, whose activations grow with the batch."""
    layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False), torch.randn(batch, 128, 512)


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "stack of linear layers": stack,
    "transformer, batch 1": lambda: transformer(1),
    "transformer, batch 4": lambda: transformer(4),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "step()": lambda model: RMSprop(model.parameters(), lr=1e-5),
    "in backward": lambda model: step_in_backward(model, lr=1e-5),
    "step(), 2 passes": lambda model: RMSprop(model.parameters(), lr=1e-5),
    "in backward, 2 passes": lambda model: step_in_backward(model, lr=1e-5),
}


def measure(case: str, name: str) -> dict[str, Any]:
    """Measure one case in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, x = MODELS[case]()
    optimizer = OPTIMIZERS[name](model)
    passes = 2 if "2 passes" in name else 1

    def iterate() -> None:
        optimizer.zero_grad()
        for i in range(passes):
            with optimizer.accumulate(i < passes - 1) if "backward" in name else nullcontext():
                model(x).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        iterate()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before the profiler allocates
    optimizer.zero_grad()
    with torch.profiler.profile(profile_memory=True) as profile:
        iterate()
    records = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for record in sorted(records, key=lambda e: e.start_ns()):
        held += record.nbytes()
        most = max(most, held)
    parameters = sum(p.nbytes for p in model.parameters())
    return {
        "case": case,
        "name": name,
        "tensors": len(list(model.parameters())),
        "gradients": parameters,  # bytes, as many as the parameters
        "transient": most,
        "resident": resident,
    }


def main() -> None:
    """Run every case in a separate process, print, and write."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(*sys.argv[1:])))
        return
    found = []
    for case in MODELS:
        for name in OPTIMIZERS:
            command = [sys.executable, __file__, case, name]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | RETURN)
            row = json.loads(done.stdout.splitlines()[-1])
            found.append(row)
            print(
                f"{case:22} {name:21} gradients {row['gradients'] / 1e6:4.0f} MB, transient "
                f"{row['transient'] / 1e6:4.0f} MB, resident {row['resident'] / 1e6:5.0f} MB"
            )
    cpu.save({"machine": cpu.machine(), "unit": "bytes", "results": found}, RESULTS)


if __name__ == "__main__":
    main()
