"""Figures of a demo's training curves and effective learning rates."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rmsprop.style import BLUE, LECTURE, LOOKS, SKY, VERMILION, panels

if TYPE_CHECKING:  # they import torch
    from rmsprop.demo.training import Run
    from rmsprop.diagnose.effective_lr import LayerRecord

BAND, MEDIAN, NOMINAL = SKY, BLUE, VERMILION


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the running mean of the last `window` values, or of fewer at the start."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value
        if i >= window:
            total -= values[i - window]
        means.append(total / min(i + 1, window))
    return means


def window(runs: Sequence[Run]) -> int:
    """Return the number of steps that the figures average over: a fortieth of the longest run."""
    return max(1, max(len(run.losses) for run in runs) // 40)


def curve_points(run: Run, width: int) -> tuple[list[int], list[float]]:
    """Return step numbers and smoothed training losses; a diverged run ends at its last finite loss."""
    return list(range(1, len(run.losses) + 1)), smooth(run.losses, width)


def loss_limits(runs: Sequence[Run], width: int) -> tuple[float, float]:
    """Return the range of the loss axis: from the lowest point to three times the highest initial loss.

    The upper limit keeps the other runs readable when one of them blows up.
    """
    points = [loss for run in runs for loss in curve_points(run, width)[1] if loss > 0]
    starts = [run.losses[0] for run in runs if run.losses and run.losses[0] > 0]
    top = 3 * max(starts, default=1.0)
    return min([top / 10, *points]) / 1.5, top


def averaged(width: int) -> str:
    """Return the suffix of an axis label that names the mean over `width` steps, if any."""
    return f", mean of {width} steps" if width > 1 else ""


def layers(rows: Sequence[LayerRecord]) -> dict[str, list[LayerRecord]]:
    """Group the records by parameter, in the order of the network."""
    by_name: dict[str, list[LayerRecord]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    return by_name


def accuracy_floor(runs: Sequence[Run]) -> float:
    """Return the start of the accuracy axis, in percent, which cuts off at most the lowest tenth of the points."""
    percents = sorted(100 * accuracy for run in runs for accuracy in run.test_accuracies)
    return max(0.0, 5.0 * math.floor(percents[len(percents) // 10] / 5) - 5) if percents else 0.0


def rate_limits(run: Run) -> tuple[float, float]:
    """Return one axis range for all panels of effective learning rates, so that layers can be compared."""
    rates = [run.lr, *(rate for row in run.layers for rate in (row.low, row.high) if 0 < rate < math.inf)]
    return min(rates) / 1.6, max(rates) * 1.6


def curves(runs: Sequence[Run]) -> Figure:
    """Draw the training loss by step and the test accuracy by epoch, one line per optimizer."""
    width = window(runs)
    figure, (left, right) = panels(1, 2, (13, 5.6), LECTURE)
    for run in runs:
        ended = f", diverged at step {run.diverged_at}" if run.diverged_at else ""
        label = f"{run.label}, lr {run.lr:g}{ended}"
        style: dict[str, Any] = LOOKS[run.optimizer].line | {"linewidth": 2.4, "label": label}
        left.plot(*curve_points(run, width), **style)
        epochs = range(1, len(run.test_accuracies) + 1)
        right.plot(epochs, [100 * a for a in run.test_accuracies], marker="o", markersize=4, **style)
    left.set(yscale="log", xlabel="step", ylabel=f"training loss (nats){averaged(width)}")
    left.set_ylim(*loss_limits(runs, width))
    left.set_title("Training loss")
    right.set(xlabel="epoch", ylabel="correct on the test rows (%)")
    right.set_ylim(accuracy_floor(runs), 100.5)
    right.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    right.set_title("Test accuracy")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Each optimizer from the same weights, on the same batches")
    return figure


def effective_lr(run: Run) -> Figure:
    """Draw the effective learning rates over time, one panel per parameter: the median and the middle 80 %."""
    by_name = layers(run.layers)
    columns = min(3, len(by_name))
    rows = math.ceil(len(by_name) / columns)
    figure, each = panels(rows, columns, (13, 1.6 + 3.1 * rows), LECTURE)
    for axes, (name, records) in zip(each, by_name.items(), strict=False):
        steps = [record.step for record in records]
        low, high = ([_finite(getattr(record, side)) for record in records] for side in ("low", "high"))
        axes.fill_between(steps, low, high, color=BAND, alpha=0.45, linewidth=0, label="middle 80 % of the elements")
        axes.plot(steps, [_finite(r.median) for r in records], color=MEDIAN, linewidth=2.4, label="median element")
        axes.axhline(run.lr, color=NOMINAL, linestyle="--", linewidth=1.8, label=f"lr = {run.lr:g}")
        axes.set(yscale="log", ylim=rate_limits(run))
        axes.set_title(f"{name}: {records[0].elements:,} numbers".replace(",", " "))
    for axes in each[len(by_name) :]:
        axes.set_visible(False)
    for axes in each[len(by_name) - columns : len(by_name)]:  # the lowest panel of each column
        axes.set_xlabel("step")
    figure.supylabel("effective learning rate  lr / (√v + eps)", fontsize=13)
    figure.legend(*each[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("RMSprop gives every weight a learning rate of its own")
    return figure


def to_png(figure: Figure) -> bytes:
    """Return the figure as a PNG file of 150 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def _finite(value: float) -> float:
    """Return the value, or NaN, which matplotlib leaves out, in place of infinity."""
    return value if math.isfinite(value) else math.nan
