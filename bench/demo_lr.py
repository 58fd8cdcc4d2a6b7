"""Search for the demo's default learning rates: python bench/demo_lr.py [optimizer ...], about 3 minutes.

Prints means over seeds 1-5 after 20 epochs on the digits, for each optimizer and learning rate. A quarter of seed 0's
training rows is used for validation, so the demo's test rows do not affect the choice. The search of all optimizers
writes its table to bench/results/demo_lr.json.
"""

import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from rmsprop.bench.cpu import machine, save
from rmsprop.demo.data import _split, load_digits
from rmsprop.demo.training import Run, Settings, one_thread, train

GRID = {
    "sgd": (0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0),
    "momentum": (0.01, 0.03, 0.05, 0.1, 0.2),
    "rmsprop": (0.0003, 0.001, 0.002, 0.003, 0.005, 0.01),
    "adam": (0.0003, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03),
}
RECORD = Path(__file__).parent / "results" / "demo_lr.json"


def main(names: list[str]) -> None:
    """Print one line per optimizer and learning rate, and write them unless names are given."""
    digits, found = load_digits(0), []
    for name in names or GRID:
        for lr in GRID[name]:
            runs = []
            for seed in range(1, 6):
                rows = _split(digits.y_train.numpy(), digits.class_names, seed)
                kept, held = (torch.from_numpy(i) for i in rows)
                x, y = digits.x_train, digits.y_train
                split = replace(digits, x_train=x[kept], y_train=y[kept], x_test=x[held], y_test=y[held])
                runs.append(Run(name, lr, seed))
                for _ in train(runs[-1], split, Settings(epochs=20)):
                    pass
            row: dict[str, object] = {"optimizer": name, "lr": lr}
            found.append(row)
            if any(run.diverged_at for run in runs):
                row["diverged"] = True
                print(f"{name:9} {lr:<7g} diverged")
                continue
            losses, accuracies = (
                [getattr(run, key)[-1] for run in runs] for key in ("test_losses", "test_accuracies")
            )
            row |= {"loss": mean(losses), "accuracy": mean(accuracies), "lowest accuracy": min(accuracies)}
            print(
                f"{name:9} {lr:<7g} loss {mean(losses):.4f}  right {mean(accuracies):.4f} (min {min(accuracies):.4f})"
            )
    if not names:
        about = {"machine": machine(), "unit": "means over five seeds, of validation loss in nats and accuracy"}
        save(about | {"results": found}, RECORD)


if __name__ == "__main__":
    with one_thread():
        main(sys.argv[1:])
