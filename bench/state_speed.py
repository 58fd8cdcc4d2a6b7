"""Measure steps whose state is kept in fewer bytes beside the step with float32 state.

    python bench/state_speed.py [rounds]

64 M parameters are 64 tensors of 1 M, each with an optimizer of its own, stepped in order, so that no cache holds the
next one. The contestants take turns tensor by tensor. A step's time is the sum over the tensors of the minimum over
all rounds, since another process can only add to a time. The median over rounds and its spread are recorded, too. The
cached case steps one tensor of 1 M again and again. Writes bench/results/state_speed.json, with the bytes of the
state, and the bytes that a step allocates.
"""

import sys
import time
from pathlib import Path
from typing import Any

import pass_marks
import torch

from rmsprop import RMSprop
from rmsprop.bench.cpu import machine, save

HERE = Path(__file__).parent
MILLION = 1 << 20
PLAIN = "float32"
HALF: dict[str, Any] = {"dtype": torch.bfloat16, "rounding": "stochastic"}
CONTESTANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "bfloat16 state": {"state_dtype": "bfloat16"},
    "float8 state": {"state_dtype": "float8"},
    "bfloat16 parameters": HALF,
    "bfloat16 parameters and state": {**HALF, "state_dtype": "bfloat16"},
    "bfloat16 parameters, float8 state": {**HALF, "state_dtype": "float8"},
}
# Contestant, case, and the bound of its speed over the plain step's; of its time in the cached case.
FASTER = {"bfloat16 state": 1.12, "float8 state": 1.05, "bfloat16 parameters, float8 state": 1.5}
CACHED = {"bfloat16 state": 1.35, "float8 state": 1.35}


def optimizers(count: int, dtype: torch.dtype = torch.float32, **settings: Any) -> list[RMSprop]:
    """Return optimizers of one tensor of 1 M elements each, with a gradient, after two steps, which make a plan."""
    made = []
    for _ in range(count):
        p = torch.nn.Parameter(torch.randn(MILLION).to(dtype))
        p.grad = torch.randn(MILLION).to(dtype)
        optimizer = RMSprop([p], lr=1e-3, backend="cpu", **settings)
        optimizer.step()
        optimizer.step()
        made.append(optimizer)
    return made


def measure(steps: dict[str, list[RMSprop]], rounds: int) -> dict[str, dict[str, float]]:
    """Return the time of a step of each contestant in milliseconds: minimum, median, 10th and 90th percentile."""
    count = len(next(iter(steps.values())))
    found = {name: torch.zeros(rounds, count, dtype=torch.float64) for name in steps}
    for r in range(rounds):
        for i in range(count):
            for name, own in steps.items():
                begin = time.perf_counter()
                own[i].step()
                found[name][r, i] = time.perf_counter() - begin
    times = {}
    for name, seconds in found.items():
        whole = seconds.sum(dim=1)
        spread = {f"p{int(100 * q)}": float(whole.quantile(q)) for q in (0.1, 0.9)}
        numbers = {"minimum": float(seconds.amin(dim=0).sum()), "median": float(whole.median()), **spread}
        times[name] = {key: round(1e3 * value, 4) for key, value in numbers.items()}
    return times


def memory(own: list[RMSprop]) -> dict[str, float]:
    """Return the bytes of state for each parameter, without `step`, and the bytes that a step allocates."""
    state = sum(x.nbytes for one in own for entry in one.state.values() for k, x in entry.items() if k != "step")
    with torch.profiler.profile(profile_memory=True) as profile:
        for one in own:
            one.step()
    allocated = sum(max(0, event.cpu_memory_usage) for event in profile.events())
    return {"state_bytes_per_parameter": state / (MILLION * len(own)), "allocated_by_a_step": allocated}


def main(rounds: int) -> None:
    """Measure, print, judge, and write."""
    cores = torch.get_num_threads()
    results, bars = [], []
    for case, count in (("64 M", 64), ("1 M in cache", 1)):
        steps = {name: optimizers(count, **settings) for name, settings in CONTESTANTS.items()}
        for threads in sorted({1, cores}):
            torch.set_num_threads(threads)
            times = measure(steps, rounds if count > 1 else 40 * rounds)
            results.append({"case": case, "threads": threads, "times": times})
            plain = times[PLAIN]["minimum"]
            for name, time_ in times.items():
                speed = plain / time_["minimum"]
                print(f"{case:14} {threads} threads  {name:36} {time_['minimum']:8.3f} ms  {speed:.3f} times as fast")
                label = f"{case}, {threads} threads, {name}"
                if count > 1 and name in FASTER:
                    bars.append((f"{label}: speed over {PLAIN}", speed, FASTER[name], speed >= FASTER[name]))
                if count == 1 and name in CACHED:
                    bars.append((f"{label}: time over {PLAIN}", 1 / speed, CACHED[name], 1 / speed <= CACHED[name]))
        if count > 1:
            held = {name: memory(own) for name, own in steps.items()}
            grown = max(row["allocated_by_a_step"] for row in held.values())
            bars.append(("64 M: bytes that a step allocates", grown, MILLION, grown < MILLION))
            state = held["float8 state"]["state_bytes_per_parameter"]
            bars.append(("64 M, float8 state: bytes of state for each parameter", state, 1.01, state <= 1.01))
            results.append({"case": "64 M", "memory": held})
    torch.set_num_threads(cores)
    about = {"machine": machine(), "unit": "milliseconds", "rounds": rounds}
    save(about | {"bars": pass_marks.rows(bars), "results": results}, HERE / "results" / "state_speed.json")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
