"""The main job: one small network, trained by four optimizers from the same weights on the same batches.

Nothing is drawn or printed here. `train` yields what happens, step by step, and fills a `Run`.
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
RECORDS = 150  # effective learning rates kept per run: more would not be visible in a figure

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def _rmsprop(params: NamedParameters, lr: float) -> Optimizer:
    from rmsprop.optimizer import RMSprop

    optimizer: Optimizer = RMSprop(params, lr=lr)
    return optimizer


@dataclass(frozen=True)
class Choice:
    """An optimizer of the demo: its name in words, its default learning rate, and how it is made."""

    label: str
    lr: float
    make: Callable[[NamedParameters, float], Optimizer]


# Default learning rates: the lowest mean validation loss on the digits over seeds 1-5 after 20 epochs, on the grid
# 1, 2, 3, 5, 10 per decade, with a quarter of seed 0's training rows held back for it (its test rows took no part).
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
    """What all runs share: the number of passes over the training rows, the seed, and where to compute."""

    epochs: int = EPOCHS
    seed: int = 0
    device: str = "cpu"


@dataclass
class Run:
    """One optimizer's training, filled while `train` goes on.

    Attributes:
        losses: mean cross-entropy of each batch, before its step, in nats.
        test_losses, test_accuracies: after each epoch, on the rows held back; accuracy is a share, 0 to 1.
        train_loss: on all training rows, with the final weights; NaN if the run diverged.
        seconds: in the training steps alone (forward, backward, step), without evaluation and records.
        step_us: median time of `optimizer.step()`, in microseconds.
        diverged_at: the step whose loss, or after which the test loss, was not finite; None if that never happened.
        layers: the effective learning rates (RMSprop only).
    """

    optimizer: str
    lr: float
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
        """The optimizer's name in words."""
        return OPTIMIZERS[self.optimizer].label


@dataclass(frozen=True)
class Progress:
    """Where a run stands after one step; `accuracy` is that of the last full epoch, None before it."""

    step: int
    steps: int
    epoch: int
    loss: float
    accuracy: float | None
    epoch_done: bool


def make_optimizer(name: str, params: NamedParameters, lr: float) -> Optimizer:
    """The named optimizer with its framework's defaults, apart from the learning rate.

    Raises: ValueError for a name that is not in OPTIMIZERS.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"There is no optimizer {name!r}; choose from {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[name].make(params, lr)


def make_network(dataset: Dataset, seed: int) -> nn.Sequential:
    """A small convolutional network for images, a small perceptron for tables; the seed decides the weights.

    SiLU, because a dead ReLU's v decays without end and would hide the other weights in the picture of rates.
    The caller's random numbers are left as they were.
    """
    shape, classes = dataset.x_train.shape[1:], len(dataset.class_names)
    kind: Any = {"dtype": torch.float32, "device": "cpu"}  # as the data, whatever the process's defaults
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[tuple[str, nn.Module]]
        if dataset.is_image:
            layers = [
                ("conv1", nn.Conv2d(shape[0], 16, 3, padding=1, **kind)),
                ("silu1", nn.SiLU()),
                ("conv2", nn.Conv2d(16, 32, 3, padding=1, **kind)),
                ("silu2", nn.SiLU()),
                ("pool", nn.AdaptiveMaxPool2d(4)),  # any picture size becomes 4x4
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
    """The devices that this PyTorch can compute on here: "cpu", and "cuda:0", "xpu:0" or "mps" if present."""
    found = ["cpu"]
    found += [f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    found += [f"xpu:{i}" for i in range(torch.xpu.device_count() if torch.xpu.is_available() else 0)]
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def check_device(device: str) -> str:
    """Return `device` if the demo can run there ("cuda" means "cuda:0").

    Raises: ValueError, naming the devices that there are.
    """
    available = available_devices()
    if device not in available and f"{device}:0" not in available:
        raise ValueError(f"The device {device!r} is not available here; available: {', '.join(available)}.")
    return device


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one CPU thread inside the block, and on as many as before after it.

    Layers this small gain nothing from a second thread, and when another program holds its core every operation
    waits for it: 20 epochs then took 28 s instead of 2 s. The order of
    sums, and so the last digit of a loss, no longer depends on the number of cores either.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(run: Run, dataset: Dataset, settings: Settings) -> Iterator[Progress]:
    """Train the network from the seed's weights on the seed's batches, one `Progress` per step.

    A loss that is not finite ends the run and is noted in `run.diverged_at`.

    Mutates: run.
    """
    device = torch.device(settings.device)
    network = make_network(dataset, settings.seed).to(device)
    x, y = dataset.x_train.to(device), dataset.y_train.to(device)
    x_test, y_test = dataset.x_test.to(device), dataset.y_test.to(device)
    _warm_up(run, network, x[:BATCH], y[:BATCH])
    optimizer = make_optimizer(run.optimizer, network.named_parameters(), run.lr)
    per_epoch = math.ceil(len(y) / BATCH)
    steps = settings.epochs * per_epoch
    recorder = None
    if run.optimizer == "rmsprop":
        recorder = Recorder(optimizer, max(1, steps // RECORDS))
        run.layers = recorder.rows
    times: list[float] = []
    accuracy = None
    for step, batch in enumerate(_batches(len(y), settings), start=1):
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


def _batches(rows: int, settings: Settings) -> Iterator[Tensor]:
    """Row indices, each row once an epoch, in the seed's order: drawn on the CPU, so the same on every device.

    The batches of an epoch are of even size: a last one with the 3 rows left over makes a spike in every curve.
    """
    order = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        yield from torch.randperm(rows, generator=order, device="cpu").tensor_split(math.ceil(rows / BATCH))


@torch.no_grad()
def evaluate(network: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy in nats, and the share of rows whose class is the network's first choice."""
    loss, right = 0.0, 0
    for i in range(0, len(y), 1024):
        scores, labels = network(x[i : i + 1024]), y[i : i + 1024]
        loss += float(nn.functional.cross_entropy(scores, labels, reduction="sum"))
        right += int((scores.argmax(dim=1) == labels).sum())
    return loss / len(y), right / len(y)


def _warm_up(run: Run, network: nn.Module, x: Tensor, y: Tensor) -> None:
    """One step on a copy, so that no optimizer's times hold what happens once (loading kernels, first memory)."""
    copy = deepcopy(network)
    optimizer = make_optimizer(run.optimizer, copy.named_parameters(), run.lr)
    torch.autograd.backward(nn.functional.cross_entropy(copy(x), y))
    optimizer.step()


def _now(device: torch.device) -> float:
    """Seconds, after all work queued on the device has finished."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return perf_counter()


def summary(run: Run) -> dict[str, Any]:
    """One row of the results table; None where a run that diverged has no number.

    Units: losses in nats, accuracy as a share, seconds, optimizer_step_us in microseconds.
    """
    done = run.diverged_at is None
    return {
        "optimizer": run.label,
        "lr": run.lr,
        "train_loss": run.train_loss if done else None,
        "test_loss": run.test_losses[-1] if done else None,
        "test_accuracy": run.test_accuracies[-1] if done else None,
        "seconds": run.seconds,
        "optimizer_step_us": run.step_us,
        "diverged_at_step": run.diverged_at,
    }


HEADINGS = ("optimizer", "lr", "train loss", "test loss", "test accuracy", "seconds", "optimizer step")


def cells(run: Run) -> list[str]:
    """The row of `summary` as text, under HEADINGS."""
    row = summary(run)
    losses = ["–", "–", f"diverged at step {run.diverged_at}"]
    if run.diverged_at is None:
        losses = [f"{run.train_loss:.4f}", f"{row['test_loss']:.4f}", f"{100 * row['test_accuracy']:.1f} %"]
    return [run.label, f"{run.lr:g}", *losses, f"{run.seconds:.2f}", f"{run.step_us:.0f} µs"]


def results(runs: Sequence[Run], dataset: Dataset, settings: Settings) -> dict[str, Any]:
    """Everything measured, as plain numbers and strings for results.json; None stands for NaN and infinity."""
    found = {
        "settings": {**asdict(settings), "batch_size": BATCH, "torch": torch.__version__},
        "data": {
            "source": dataset.source,
            "rows_train": len(dataset.y_train),
            "rows_test": len(dataset.y_test),
            "classes": list(dataset.class_names),
            "features": list(dataset.feature_names),
        },
        "table": [summary(run) for run in runs],
        "curves": [asdict(run) for run in runs],
    }
    return {key: _plain(value) for key, value in found.items()}


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
