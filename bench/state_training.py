"""Compare the formats of the averages by training: python bench/state_training.py

Trains every task of state_tasks.py in every format of state_formats.py from five seeds, on one thread, and writes
bench/results/state_training.json after every run. A run that the file has is not repeated. Prints the mean and the
standard deviation of each task's metric over the seeds, the range of √v in each task, and steps on simulated
gradients.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from state_formats import FORMATS, Format, decay, rounded, simulate
from state_tasks import TASKS
from torch import Tensor

from rmsprop import RMSprop
from rmsprop.bench.cpu import machine, save

PATH = Path(__file__).parent / "results" / "state_training.json"
EVERY = 25  # steps between two looks at √v
SIMULATED = [(alpha, spread, 1.0) for alpha in (0.9, 0.99, 0.999) for spread in (0.5, 1.5)]
SIZES = [(0.99, 0.5, 10.0**k) for k in (-10, -9, -8, -7, -6, -5, 1, 2, 3, 4)]


class Trained:
    """The optimizer of a run, whose averages are kept in a format, and the √v that it has seen."""

    def __init__(self, kept: Format, seed: int) -> None:
        self.kept, self.seed = kept, seed
        self.seen: list[Tensor] = []  # of float32 runs
        self.draw = torch.Generator().manual_seed(1000 + seed)

    def make(self, params: Iterable[Tensor], recipe: str | None = None, **settings: Any) -> Callable[..., None]:
        """Return a function that takes a loss and perhaps a learning rate, and takes a step."""
        settings |= {"seed": self.seed, **self.kept.settings}
        optimizer = RMSprop(params, **settings) if recipe is None else RMSprop.recipe(recipe, params, **settings)
        taken = 0
        simulated = [name for name in ("square_avg", "momentum") if getattr(self.kept, name)]

        def step(loss: Tensor, lr: float | None = None) -> None:
            nonlocal taken
            if lr is not None:
                optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            for state in optimizer.state.values() if simulated else ():
                for slot in simulated:
                    x = state.get({"momentum": "momentum_buffer"}.get(slot, slot))
                    if x is not None:
                        x.copy_(rounded(self.kept, slot, x, self.draw))
            taken += 1
            if taken % EVERY == 0 and self.kept is FORMATS["float32"]:
                self.seen.append(torch.cat([s["square_avg"].flatten() for s in optimizer.state.values()]).sqrt())

        return step

    def spread(self) -> dict[str, float]:
        """Return the extremes and percentiles of √v over the run, in units of g, and the last share of zeros."""
        roots = torch.cat(self.seen)
        above = roots[roots > 0].sort().values
        places = {"lowest": 0.0, "1 %": 0.01, "50 %": 0.5, "99 %": 0.99, "highest": 1.0}
        found = {name: above[round(share * (len(above) - 1))].item() for name, share in places.items()}
        return found | {"zeros": (self.seen[-1] == 0).double().mean().item()}


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each task and format: mean and spread of the metric, and its distance from float32's.

    The distance is in the metric's unit, positive where the format is better. `seeds` counts the runs.
    """
    rows = []
    for name, task in TASKS.items():
        found = {
            kept: {
                run["seed"]: run["result"][task.metric]
                for run in runs
                if (run["task"], run["format"]) == (name, kept)
            }
            for kept in FORMATS
        }
        for kept, values in found.items():
            if len(values) < 2:
                continue
            row: dict[str, Any] = {"task": name, "format": kept, "title": task.title}
            row |= {"metric": task.metric, "unit": task.unit, "higher": task.higher}
            row |= {"seeds": len(values), "mean": mean(values.values()), "spread": stdev(values.values())}
            shared = values.keys() & found["float32"].keys()
            if len(shared) > 1:
                gained = [(values[s] - found["float32"][s]) * (1 if task.higher else -1) for s in sorted(shared)]
                row |= {"gained": mean(gained), "error": stdev(gained) / len(gained) ** 0.5}
            rows.append(row)
    return rows


def simulated() -> list[dict[str, Any]]:
    """Return the steps of every format on simulated gradients, over alphas and spreads, and over sizes."""
    rows = []
    for name in ("6+2", "6+2 high", "5+3", "log", "4+1", "6+2 nearest", "bfloat16 nearest"):
        for alpha, spread, size in [*SIMULATED, *(SIZES if name in ("6+2", "6+2 high", "log") else ())]:
            found = simulate(FORMATS[name], alpha, spread, size)
            rows.append({"format": name, "alpha": alpha, "g_spread": spread, "g_size": size, **found})
            print(*(f"{key} {x:.3g}" if isinstance(x, float) else x for key, x in rows[-1].items()), flush=True)
    return rows


def decayed() -> list[dict[str, Any]]:
    """Return what formats make of a v that decays from 1 without gradients, after 2, 4 and 8 memories of alpha."""
    return [
        {"format": name, "alpha": 0.99, "steps": steps, **decay(FORMATS[name], 0.99, steps)}
        for name in ("6+2", "5+3", "log")
        for steps in (200, 400, 800)
    ]


def show(record: Mapping[str, Any]) -> None:
    """Print the tables of a record."""
    print(f"\n{'task':13} {'format':17} seeds {'mean':>8} {'spread':>8} {'gained':>8} {'error':>8}")
    for row in record["summary"]:
        numbers = " ".join(f"{row.get(key, float('nan')):8.3f}" for key in ("mean", "spread", "gained", "error"))
        print(f"{row['task']:13} {row['format']:17} {row['seeds']:5} {numbers}")
    for name, found in record["ranges"].items():
        print(f"{name:13} √v " + "  ".join(f"{key} {x:.2g}" for key, x in found.items()))


def main() -> None:
    """Run what is missing, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--again", action="store_true", help="repeat runs that the file has")
    parser.add_argument("--simulate", action="store_true", help="take the steps on simulated gradients, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "machine": {},
        "formats": {},
        "summary": [],
        "ranges": {},
        "simulated": [],
        "decayed": [],
        "runs": [],
    }
    if PATH.exists():
        record |= json.loads(PATH.read_text(encoding="utf-8"))
    record["machine"], record["formats"] = machine(), {name: kept.title for name, kept in FORMATS.items()}
    record["summary"] = summary(record["runs"])
    if options.simulate:
        record |= {"simulated": simulated(), "decayed": decayed()}
        save(record, PATH)
    for seed in options.seeds:
        for name in options.tasks:
            for kept in options.formats:
                key = {"task": name, "format": kept, "seed": seed}
                before = [run for run in record["runs"] if {k: run[k] for k in key} == key]
                if (before and not options.again) or (kept.startswith("momentum") and name != "efficientnet"):
                    continue
                begun, trained = time.process_time(), Trained(FORMATS[kept], seed)
                result = TASKS[name].run(seed, trained)
                seconds = round(time.process_time() - begun, 1)
                run = {**key, "result": result, "seconds": seconds, "commit": record["machine"]["commit"]}
                print(*key.values(), *(f"{k} {x:.4g}" for k, x in result.items()), f"{seconds} s", flush=True)
                record["runs"] = [*(run for run in record["runs"] if run not in before), run]
                if trained.seen and seed == 0:
                    record["ranges"][name] = trained.spread()
                record["summary"] = summary(record["runs"])
                save(record, PATH)
    save(record, PATH)
    show(record)


if __name__ == "__main__":
    main()
