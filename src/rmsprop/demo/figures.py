"""Draw the figures of a demo from its records.

Colours stay apart for colour-blind readers; line styles repeat them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:  # they bring torch
    from rmsprop.demo.training import Run
    from rmsprop.diagnose.effective_lr import LayerRecord

# Okabe and Ito's palette, with matplotlib's and plotly's word for the same dash.
STYLES = {
    "sgd": ("#0072B2", ":", "dot"),
    "momentum": ("#CC79A7", "-.", "dashdot"),
    "rmsprop": ("#D55E00", "-", "solid"),
    "adam": ("#009E73", "--", "dash"),
}
BAND = "#56B4E9"
MEDIAN = "#0072B2"
NOMINAL = "#D55E00"
SIZE: Any = {"font.size": 13, "axes.titlesize": 14, "axes.labelsize": 13, "legend.fontsize": 12}


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values at each place (of fewer at the start)."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value
        if i >= window:
            total -= values[i - window]
        means.append(total / min(i + 1, window))
    return means


def window(runs: Sequence[Run]) -> int:
    """How many steps the figures average over: a fortieth of the longest run."""
    return max(1, max(len(run.losses) for run in runs) // 40)


def curve_points(run: Run, width: int) -> tuple[list[int], list[float]]:
    """Step numbers and smoothed training loss; a run that diverged ends one step before its loss did."""
    return list(range(1, len(run.losses) + 1)), smooth(run.losses, width)


def loss_limits(runs: Sequence[Run], width: int) -> tuple[float, float]:
    """The range of the loss axis: from the lowest point to thrice the highest start, so that one run that blows up
    does not press the others flat."""
    points = [loss for run in runs for loss in curve_points(run, width)[1] if loss > 0]
    starts = [run.losses[0] for run in runs if run.losses and run.losses[0] > 0]
    top = 3 * max(starts, default=1.0)
    return min([top / 10, *points]) / 1.5, top


def averaged(width: int) -> str:
    """The words for a mean of `width` steps."""
    return f", mean of {width} steps" if width > 1 else ""


def layers(rows: Sequence[LayerRecord]) -> dict[str, list[LayerRecord]]:
    """The records of each parameter, in the order of the network."""
    found: dict[str, list[LayerRecord]] = {}
    for row in rows:
        found.setdefault(row.name, []).append(row)
    return found


def accuracy_floor(runs: Sequence[Run]) -> float:
    """Where the accuracy axis starts, in percent: so that all but the lowest tenth of the points are seen large."""
    found = sorted(100 * accuracy for run in runs for accuracy in run.test_accuracies)
    return max(0.0, 5.0 * math.floor(found[len(found) // 10] / 5) - 5) if found else 0.0


def rate_limits(run: Run) -> tuple[float, float]:
    """One range for all panels of effective learning rates, so that layers can be compared."""
    found = [run.lr, *(rate for row in run.layers for rate in (row.low, row.high) if 0 < rate < math.inf)]
    return min(found) / 1.6, max(found) * 1.6


def curves(runs: Sequence[Run]) -> Figure:
    """Training loss by step and test accuracy by epoch, one line per optimizer."""
    width = window(runs)
    figure, (left, right) = figure_with_panels(1, 2, (13, 5.6))
    for run in runs:
        colour, dash, _ = STYLES[run.optimizer]
        ended = f", diverged at step {run.diverged_at}" if run.diverged_at else ""
        style: dict[str, Any] = {
            "color": colour,
            "linestyle": dash,
            "linewidth": 2.4,
            "label": f"{run.label}, lr {run.lr:g}{ended}",
        }
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
    """The effective learning rate over time: one panel per parameter, with the middle 80 % of its elements."""
    found = layers(run.layers)
    columns = min(3, len(found))
    rows = math.ceil(len(found) / columns)
    figure, panels = figure_with_panels(rows, columns, (13, 1.6 + 3.1 * rows))
    for axes, (name, records) in zip(panels, found.items(), strict=False):
        steps = [record.step for record in records]
        low, high = ([_finite(getattr(record, side)) for record in records] for side in ("low", "high"))
        axes.fill_between(steps, low, high, color=BAND, alpha=0.45, linewidth=0, label="middle 80 % of the elements")
        axes.plot(steps, [_finite(r.median) for r in records], color=MEDIAN, linewidth=2.4, label="median element")
        axes.axhline(run.lr, color=NOMINAL, linestyle="--", linewidth=1.8, label=f"lr = {run.lr:g}")
        axes.set(yscale="log", ylim=rate_limits(run))
        axes.set_title(f"{name}: {records[0].elements:,} numbers".replace(",", " "))
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    for axes in panels[len(found) - columns : len(found)]:  # the lowest panel of each column
        axes.set_xlabel("step")
    figure.supylabel("effective learning rate  lr / (√v + eps)", fontsize=13)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("RMSprop gives every weight a learning rate of its own")
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file of 150 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def figure_with_panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure that pyplot knows nothing of, with a light grid and lettering for a lecture hall."""
    with rc_context(SIZE):
        figure = Figure(figsize=size, layout="constrained")
        panels = [axes for row in figure.subplots(rows, columns, squeeze=False) for axes in row]
    for axes in panels:
        axes.grid(True, color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
