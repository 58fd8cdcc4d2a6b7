"""Training of one small network by each of four optimizers and seeds, from the same weights on the same batches.

Nothing is drawn or printed here. `train` yields its progress after every step, and fills a `Run`. `summary` reduces
the runs of an optimizer to medians and ranges.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rmsprop.demo.data import Dataset
from rmsprop.diagnose.effective_lr import LayerRecord, Recorder

BATCH = 64
EPOCHS = 20
RECORDS = 150  # records of effective learning rates per run; a figure cannot show more

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def _rmsprop(params: NamedParameters, lr: float) -> Optimizer:
    from rmsprop.optimizer import RMSprop

    optimizer: Optimizer = RMSprop(params, lr=lr)
    return optimizer


@dataclass(frozen=True)
class Choice:
    """An optimizer of the demo: its label, its default learning rate, and its constructor."""

    label: str
    lr: float
    make: Callable[[NamedParameters, float], Optimizer]


# Default learning rates: the lowest mean validation loss on the digits over seeds 1-5 after 20 epochs, on the grid
# of bench/demo_lr.py, whose ends are worse. The validation rows are a quarter of seed 0's training rows; its test
# rows, which the demo tests every seed on, were not used.
# Mean validation loss in nats around each choice (bench/demo_lr.py):
#   sgd       0.3: 0.068   0.5: 0.061    0.7: 0.943 (some seeds fail)
#   momentum  0.03: 0.082  0.05: 0.081   0.1: 0.098
#   rmsprop   0.002: 0.054 0.003: 0.050  0.005: 0.051
#   adam      0.01: 0.053  0.02: 0.051   0.03: 0.052
OPTIMIZERS = {
    "sgd": Choice("SGD", 0.5, lambda params, lr: torch.optim.SGD(params, lr=lr)),
    "momentum": Choice("SGD + momentum 0.9", 0.05, lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9)),
    "rmsprop": Choice("RMSprop", 0.003, _rmsprop),
    "adam": Choice("Adam", 0.02, lambda params, lr: torch.optim.Adam(params, lr=lr)),
}


@dataclass(frozen=True)
class Settings:
    """Settings of all runs: passes over the training rows, the first seed, the device, and the number of seeds."""

    epochs: int = EPOCHS
    seed: int = 0
    device: str = "cpu"
    seeds: int = 1

    @property
    def all_seeds(self) -> range:
        """The seeds of the runs of each optimizer."""
        return range(self.seed, self.seed + self.seeds)


@dataclass
class Run:
    """The record of one optimizer's training from one seed, filled in by `train`.

    Attributes:
        seed: the seed of the initial weights and the batches. All runs share the split of `Settings.seed`.
        losses: mean cross-entropy of each batch, before its step, in nats.
        test_losses, test_accuracies: after each epoch, on the test rows; accuracy is a share, 0 to 1.
        train_loss: on all training rows, with the final weights; NaN if the run diverged.
        seconds: time of the training steps alone (forward, backward, step), without evaluation and records.
        step_us: median time of `optimizer.step()`, in microseconds.
        diverged_at: the step at which the loss, or after which the test loss, was not finite; None if all were.
        layers: the effective learning rates (of RMSprop's first seed only).
    """

    optimizer: str
    lr: float
    seed: int = 0
    losses: list[float] = field(default_factory=list)
    test_losses: list[float] = field(default_factory=list)
    test_accuracies: list[float] = field(default_factory=list)
    train_loss: float = math.nan
    seconds: float = 0.0
    step_us: float = math.nan
    diverged_at: int | None = None
    layers: list[LayerRecord] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The optimizer's label."""
        return OPTIMIZERS[self.optimizer].label


@dataclass(frozen=True)
class Progress:
    """The state of a run after one step; `accuracy` is that of the last full epoch, or None before the first."""

    step: int
    steps: int
    epoch: int
    loss: float
    accuracy: float | None
    epoch_done: bool


def make_optimizer(name: str, params: NamedParameters, lr: float) -> Optimizer:
    """Make the named optimizer with its framework's defaults, apart from the learning rate.

    Raises: ValueError for a name that is not in OPTIMIZERS.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"There is no optimizer {name!r}; choose from {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[name].make(params, lr)


def make_network(dataset: Dataset, seed: int) -> nn.Sequential:
    """Make a small convolutional network for images, or a small perceptron for tables, with weights from the seed.

    The activation is SiLU, because the v of a dead ReLU decays forever, which would hide the other weights in the
    figure of effective learning rates. The caller's random number generator is not advanced.
    """
    shape, classes = dataset.x_train.shape[1:], len(dataset.class_names)
    kind: Any = {"dtype": torch.float32, "device": "cpu"}  # matches the data, whatever torch's defaults are
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[tuple[str, nn.Module]]
        if dataset.is_image:
            layers = [
                ("conv1", nn.Conv2d(shape[0], 16, 3, padding=1, **kind)),
                ("silu1", nn.SiLU()),
                ("conv2", nn.Conv2d(16, 32, 3, padding=1, **kind)),
                ("silu2", nn.SiLU()),
                ("pool", nn.AdaptiveMaxPool2d(4)),  # any image size becomes 4x4
                ("flat", nn.Flatten()),
                ("out", nn.Linear(32 * 4 * 4, classes, **kind)),
            ]
        else:
            layers = [
                ("hidden1", nn.Linear(shape[0], 64, **kind)),
                ("silu1", nn.SiLU()),
                ("hidden2", nn.Linear(64, 32, **kind)),
                ("silu2", nn.SiLU()),
                ("out", nn.Linear(32, classes, **kind)),
            ]
        return nn.Sequential(OrderedDict(layers))


def available_devices() -> list[str]:
    """Return the devices that are available here: "cpu", and "cuda:0", "xpu:0", or "mps" if present."""
    devices = ["cpu"]
    devices += [f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    devices += [f"xpu:{i}" for i in range(torch.xpu.device_count() if torch.xpu.is_available() else 0)]
    return devices + (["mps"] if torch.backends.mps.is_available() else [])


def check_device(device: str) -> str:
    """Return `device` if the demo can run on it ("cuda" means "cuda:0").

    Raises: ValueError with the available devices.
    """
    available = available_devices()
    if device not in available and f"{device}:0" not in available:
        raise ValueError(f"The device {device!r} is not available here; available: {', '.join(available)}.")
    return device


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one CPU thread inside the block.

    Layers this small do not gain from a second thread, and every operation waits for it when another program uses its
    core: 20 epochs then took 28 s instead of 2 s. With one thread, the order of sums, and so the last digit of a
    loss, does not depend on the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(run: Run, dataset: Dataset, settings: Settings) -> Iterator[Progress]:
    """Train the network from the run's seed's weights on its batches, and yield one `Progress` per step.

    A loss that is not finite ends the run and sets `run.diverged_at`.

    Mutates: run.
    """
    device = torch.device(settings.device)
    network = make_network(dataset, run.seed).to(device)
    x, y = dataset.x_train.to(device), dataset.y_train.to(device)
    x_test, y_test = dataset.x_test.to(device), dataset.y_test.to(device)
    _warm_up(run, network, x[:BATCH], y[:BATCH])
    optimizer = make_optimizer(run.optimizer, network.named_parameters(), run.lr)
    per_epoch = math.ceil(len(y) / BATCH)
    steps = settings.epochs * per_epoch
    recorder = None
    if run.optimizer == "rmsprop" and run.seed == settings.seed:
        recorder = Recorder(optimizer, max(1, steps // RECORDS))
        run.layers = recorder.rows
    times: list[float] = []
    accuracy = None
    for step, batch in enumerate(_batches(len(y), settings.epochs, run.seed), start=1):
        rows = batch.to(device)
        start = _now(device)
        loss = nn.functional.cross_entropy(network(x[rows]), y[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        before = _now(device)
        optimizer.step()
        end = _now(device)
        times.append(end - before)
        run.seconds += end - start
        if (step - 1) % per_epoch == 0 or step == steps:
            run.step_us = median(times) * 1e6
        value = float(loss.detach())
        if not math.isfinite(value):
            run.diverged_at = step
            return
        run.losses.append(value)
        if recorder:
            recorder.record()
        epoch_done = step % per_epoch == 0
        if epoch_done:
            test_loss, accuracy = evaluate(network, x_test, y_test)
            if not math.isfinite(test_loss):
                run.diverged_at = step
                return
            run.test_losses.append(test_loss)
            run.test_accuracies.append(accuracy)
        yield Progress(step, steps, math.ceil(step / per_epoch), value, accuracy, epoch_done)
    run.train_loss, _ = evaluate(network, x, y)


def _batches(rows: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of row indices in the seed's order, each row once per epoch.

    The order is drawn on the CPU, so it is the same on every device. The batches of an epoch have even sizes, because
    a last batch of the few remaining rows makes a spike in every curve.
    """
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(rows, generator=order, device="cpu").tensor_split(math.ceil(rows / BATCH))


@torch.no_grad()
def evaluate(network: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the mean cross-entropy in nats and the accuracy, a share."""
    loss, right = 0.0, 0
    for i in range(0, len(y), 1024):
        scores, labels = network(x[i : i + 1024]), y[i : i + 1024]
        loss += float(nn.functional.cross_entropy(scores, labels, reduction="sum"))
        right += int((scores.argmax(dim=1) == labels).sum())
    return loss / len(y), right / len(y)


def _warm_up(run: Run, network: nn.Module, x: Tensor, y: Tensor) -> None:
    """Take one step on a copy, so that one-time costs (loading kernels, first allocations) are not timed."""
    copy = deepcopy(network)
    optimizer = make_optimizer(run.optimizer, copy.named_parameters(), run.lr)
    torch.autograd.backward(nn.functional.cross_entropy(copy(x), y))
    optimizer.step()


def _now(device: torch.device) -> float:
    """Return the time in seconds after all work queued on the device has finished."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return perf_counter()


def by_optimizer(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group the runs by optimizer, in their order."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.optimizer, []).append(run)
    return found


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the lowest and the highest of the values; NaN for none."""
    return (median(values), min(values), max(values)) if values else (math.nan, math.nan, math.nan)


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Return one row of the results table: an optimizer's medians and ranges over its seeds.

    Runs that diverged have no results; the row counts them, and holds None for results if all diverged.

    Units: losses in nats, accuracy as a share, seconds, optimizer_step_us in microseconds.
    """
    done = [run for run in runs if run.diverged_at is None]
    row: dict[str, Any] = {"optimizer": runs[0].label, "lr": runs[0].lr, "seeds": len(runs)}
    for name, values in {
        "train_loss": [run.train_loss for run in done],
        "test_loss": [run.test_losses[-1] for run in done],
        "test_accuracy": [run.test_accuracies[-1] for run in done],
    }.items():
        middle, low, high = spread(values)
        row |= {name: middle, f"{name}_low": low, f"{name}_high": high}
    row["seconds"] = median(run.seconds for run in runs)
    row["optimizer_step_us"] = median(run.step_us for run in runs)
    row["diverged"] = len(runs) - len(done)
    return {key: None if value != value else value for key, value in row.items()}


HEADINGS = ("optimizer", "lr", "test loss", "test accuracy", "seconds", "optimizer step")


def cells(runs: Sequence[Run]) -> list[str]:
    """Return the row of `summary` as text, under HEADINGS: medians, with ranges in parentheses."""
    row = summary(runs)
    loss, accuracy = "–", ""
    if row["test_loss"] is not None:
        loss, accuracy = f"{row['test_loss']:.4f}", f"{100 * row['test_accuracy']:.1f} %"
        if row["seeds"] - row["diverged"] > 1:
            loss += f" ({row['test_loss_low']:.4f}–{row['test_loss_high']:.4f})"
            accuracy += f" ({100 * row['test_accuracy_low']:.1f}–{100 * row['test_accuracy_high']:.1f})"
    ended = ""
    if row["diverged"]:
        first = min(run.diverged_at for run in runs if run.diverged_at is not None)
        share = "" if row["seeds"] == 1 else f"{row['diverged']} of {row['seeds']} "
        ended = f"{share}diverged at step {first}" if row["diverged"] == 1 else f"{share}diverged from step {first}"
    accuracy = ", ".join(filter(None, (accuracy, ended)))
    return [
        runs[0].label,
        f"{runs[0].lr:g}",
        loss,
        accuracy,
        f"{row['seconds']:.2f}",
        f"{row['optimizer_step_us']:.0f} µs",
    ]


def results(runs: Sequence[Run], dataset: Dataset, settings: Settings) -> dict[str, Any]:
    """Return all measurements as numbers and strings for results.json, with None for NaN and infinity."""
    record = {
        "settings": {**asdict(settings), "batch_size": BATCH, "torch": torch.__version__},
        "data": {
            "source": dataset.source,
            "rows_train": len(dataset.y_train),
            "rows_test": len(dataset.y_test),
            "classes": list(dataset.class_names),
            "features": list(dataset.feature_names),
        },
        "table": [summary(each) for each in by_optimizer(runs).values()],
        "curves": [asdict(run) for run in runs],
    }
    return {key: _plain(value) for key, value in record.items()}


def _plain(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
