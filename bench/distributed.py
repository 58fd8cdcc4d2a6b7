"""Time the step of a sharded model of constant size against the number of processes.

    python bench/distributed.py [rounds]

Every parameter is a DTensor, sharded over its first axis as by fully_shard. Gradients are given, so only `step()` is
timed. Each process runs one thread, a barrier precedes each step, and the optimizers take turns. The time of a round
is that of its slowest process, by the clock ("wall") and of its thread ("cpu"). The latter excludes waiting for a
core where there are more processes than cores. Medians in microseconds are written to bench/results/distributed.json,
from which docs/build.py makes the figure and the table of docs/distributed.md.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rmsprop import RMSprop
from rmsprop.bench import cpu

HERE = Path(__file__).parent
WORLDS = (1, 2, 4)
MODELS = ("500x16", "mobilenet", "resnet50")
LOOP, FOREACH = "torch, for-loop", "torch, foreach"


def contestants(case: str) -> dict[str, Callable[[], Any]]:
    """Return the steps over the case's parameters, sharded over all processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    classes: dict[str, Callable[..., torch.optim.Optimizer]] = {
        cpu.OURS: lambda params: RMSprop(params, lr=1e-6, backend="cpu"),
        LOOP: lambda params: torch.optim.RMSprop(params, lr=1e-6, foreach=False),
        FOREACH: lambda params: torch.optim.RMSprop(params, lr=1e-6, foreach=True),
    }
    made: dict[str, Callable[[], Any]] = {}
    for name, make in classes.items():
        torch.manual_seed(0)
        params = []
        for shape in cpu.CASES[case]():
            whole = torch.randn(shape)
            params.append(torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)))
            params[-1].grad = torch.ones_like(params[-1]) * 1e-3
        made[name] = make(params).step
    return made


def work(rank: int, world: int, folder: Path, rounds: int) -> None:
    """Run one of the processes, and write the times of all rounds to the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "meet").as_uri(), rank=rank, world_size=world)
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for case in MODELS:
        steps = contestants(case)
        for step in steps.values():
            step()
            step()  # allocates the state and caches the plan
        times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                dist.barrier()
                begun = time.perf_counter(), time.thread_time()
                step()
                ended = time.perf_counter(), time.thread_time()
                for clock, begin, end in zip(("wall", "cpu"), begun, ended, strict=True):
                    times[name][clock].append((end - begin) * 1e6)
        found[case] = times
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure(world: int, rounds: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return the times of each round's slowest process, by case, optimizer, and clock."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, __file__, "--process", str(world), name, str(rounds)]
        started = [subprocess.Popen([*command, str(rank)]) for rank in range(world)]
        if any(process.wait() for process in started):
            raise SystemExit(f"a process of {world} failed")
        parts = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]

    def slowest(*path: str) -> list[float]:
        case, name, clock = path
        return [max(times) for times in zip(*(part[case][name][clock] for part in parts), strict=True)]

    return {
        case: {name: {clock: slowest(case, name, clock) for clock in clocks} for name, clocks in times.items()}
        for case, times in parts[0].items()
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the 10th and 90th percentiles."""
    tenths = statistics.quantiles(values, n=10)
    return {"median": round(statistics.median(values), 1), "p10": round(tenths[0], 1), "p90": round(tenths[-1], 1)}


def main(rounds: int) -> None:
    """Measure, print, and write."""
    rows = []
    for world in WORLDS:
        for case, times in measure(world, rounds).items():
            elements = sum(torch.Size(shape).numel() for shape in cpu.CASES[case]())
            for name, clocks in times.items():
                row = {"case": case, "tensors": len(cpu.CASES[case]()), "elements": elements, "world": world}
                rows.append({**row, "name": name, **{clock: spread(values) for clock, values in clocks.items()}})
            shown = "  ".join(f"{name} {spread(clocks['cpu'])['median']:10.0f}" for name, clocks in times.items())
            print(f"{world} processes  {case:10}  {shown}", flush=True)
    found = {"machine": cpu.machine(), "cores": os.cpu_count(), "unit": "microseconds", "rounds": rounds}
    cpu.save({**found, "results": rows}, HERE / "results" / "distributed.json")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        work(int(sys.argv[5]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
