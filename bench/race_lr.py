"""The search for the learning rates that `rmsprop race` suggests, the same for every optimizer and landscape.

    python bench/race_lr.py [LANDSCAPE ...]

Each optimizer runs at each rate of the grid: 1, 1.3, 1.6, 1.9, 2.5, 3.2, 4, 5, 6.5 and 8 times a power of ten from
1e-4 to 1. The best rate has the lowest mean over the steps of log10 loss, where a loss below `FLOOR` times the
starting loss counts as that, so that being fast and ending low both count, and a lucky touch of the target does not.
On the noisy ravine the mean is over eight seeds. A run that diverges loses. d2l is left out, since its rate is the
book's.

Prints a line per optimizer and landscape: the rate that the landscape suggests, the best one, and what each reaches.
The search of all landscapes takes about two minutes on two cores, and writes the score of every rate to
bench/results/race_lr.json.
"""

import sys
from pathlib import Path

import numpy as np

from rmsprop.bench.cpu import machine, save
from rmsprop.race.figures import FLOOR
from rmsprop.race.landscapes import LANDSCAPES, OPTIMIZERS, Landscape, race

GRID = [digit * 10.0**power for power in range(-4, 1) for digit in (1, 1.3, 1.6, 1.9, 2.5, 3.2, 4, 5, 6.5, 8)]
SEEDS = range(8)
RECORD = Path(__file__).parent / "results" / "race_lr.json"


def score(landscape: Landscape, name: str, lr: float) -> float:
    """Return the mean log10 of the loss as a share of the starting loss."""
    means = []
    for seed in SEEDS if landscape.noise else (0,):
        [run] = race(landscape, [name], lr=lr, seed=seed)
        if run.diverged:
            return np.inf
        means.append(np.mean(np.log10(np.maximum(run.losses / run.losses[0], FLOOR))))
    return float(np.mean(means))


def main() -> None:
    """Search, print, and write."""
    found = []
    for name in sys.argv[1:] or [name for name in LANDSCAPES if name != "d2l"]:
        landscape = LANDSCAPES[name]
        for entrant in OPTIMIZERS:
            scores = {lr: score(landscape, entrant, lr) for lr in GRID}
            best = min(scores, key=scores.__getitem__)
            kept = {f"{lr:g}": round(mean, 4) if np.isfinite(mean) else None for lr, mean in scores.items()}
            found.append({"landscape": name, "optimizer": entrant, "best": best, "scores": kept})
            own = landscape.lrs[entrant]
            [run] = race(landscape, [entrant], lr=best)
            print(
                f"{name:14} {entrant:17} suggested {own:<8.4g} {score(landscape, entrant, own):7.3f}   "
                f"best {best:<8.4g} {scores[best]:7.3f}   target {run.target_at}, ends at {run.losses[-1]:.3g}",
                flush=True,
            )
    if not sys.argv[1:]:
        save({"machine": machine(), "unit": "mean log10 of loss over starting loss", "results": found}, RECORD)


if __name__ == "__main__":
    main()
