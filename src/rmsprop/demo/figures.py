"""Charts of a demo: learning curves and final results over seeds, and effective learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rmsprop.chart import Axis, Chart, short
from rmsprop.style import LOOKS

if TYPE_CHECKING:  # they import torch
    from rmsprop.demo.training import Run
    from rmsprop.diagnose.effective_lr import LayerRecord

POINTS = 110  # points of a line; a screen shows no more

Groups = dict[str, list["Run"]]


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
    """Return the number of steps that the charts average over: a fortieth of the longest run."""
    return max(1, max(len(run.losses) for run in runs) // 40)


def loss_limits(runs: Sequence[Run], width: int) -> tuple[float, float]:
    """Return the range of the loss axis: from the lowest point to three times the highest initial loss.

    The upper limit keeps the other runs readable when one of them blows up.
    """
    points = [loss for run in runs for loss in smooth(run.losses, width) if loss > 0]
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


def loss_chart(groups: Groups) -> Chart:
    """Draw the training loss by step."""
    runs = [run for each in groups.values() for run in each]
    width = window(runs)
    chart = Chart(
        Axis(0, max([1, *(len(run.losses) for run in runs)]), "step"),
        Axis(*loss_limits(runs, width), f"training loss (nats){averaged(width)}", log=True),
        "Training loss by step, the median of each optimizer's seeds with its range.",
    )
    for name, each in groups.items():
        _draw(chart, name, [(smooth(run.losses, width), run.diverged_at) for run in each], each[0].label, first=1)
    return chart


def accuracy_chart(groups: Groups) -> Chart:
    """Draw the test accuracy by epoch."""
    runs = [run for each in groups.values() for run in each]
    floor, epochs = accuracy_floor(runs), max([1, *(len(run.test_accuracies) for run in runs)])
    ticks = [(k, f"{k}") for k in range(1, epochs + 1) if k == 1 or k % max(1, math.ceil(epochs / 8)) == 0]
    chart = Chart(
        Axis(0.5, epochs + 0.5, "epoch", ticks=ticks),
        Axis(floor, 100.4, "correct on the test rows (%)"),
        "Test accuracy by epoch, the median of each optimizer's seeds with its range.",
    )
    for name, each in groups.items():
        curves = [([100 * a for a in run.test_accuracies], run.diverged_at) for run in each]
        _draw(chart, name, curves, each[0].label, first=1)
    return chart


def _draw(chart: Chart, name: str, curves: Sequence[tuple[list[float], int | None]], label: str, first: int) -> None:
    """Add the median of the whole curves with their range, and each curve that ended early, up to a cross."""
    from rmsprop.demo.training import spread

    whole = [curve for curve, ended in curves if ended is None and curve]
    if whole:
        count = len(whole[0])
        picked = sorted({round(i * (count - 1) / max(1, min(count, POINTS) - 1)) for i in range(min(count, POINTS))})
        rows = [spread([curve[i] for curve in whole]) for i in picked]
        xs = [first + i for i in picked]
        chart.line(xs, [row[0] for row in rows], name, LOOKS[name].dash[1], 2.4, label)
        if len(whole) > 1:
            chart.band(xs, [row[1] for row in rows], [row[2] for row in rows], name)
    for curve, ended in curves:
        if ended is not None and curve:
            xs = list(range(first, first + len(curve)))
            chart.line(xs, curve, name, LOOKS[name].dash[1], 1.4)
            y = min(max(curve[-1], chart.y.low), chart.y.high)
            chart.text(xs[-1], y, "✕", name, "middle", (0, 12 if y == chart.y.high else 4))


def final_chart(groups: Groups) -> Chart:
    """Draw the final test accuracy of every seed, one row per optimizer, with the median as a bar."""
    from rmsprop.demo.training import spread

    ends = {
        name: [100 * run.test_accuracies[-1] for run in each if run.diverged_at is None]
        for name, each in groups.items()
    }
    every = [end for each in ends.values() for end in each] or [0.0, 100.0]
    pad = max(0.5, 0.15 * (max(every) - min(every)))
    rows = list(groups)
    chart = Chart(
        Axis(max(0, min(every) - pad), min(100.4, max(every) + pad), "correct on the test rows (%)", count=5),
        Axis(len(rows) - 0.5, -0.5, "", ticks=[(i, groups[name][0].label) for i, name in enumerate(rows)]),
        "Final test accuracy: a dot for each seed and a bar at the median of each optimizer.",
        (460, 74 + 38 * len(rows)),
        (176, 20, 16, 44),
    )
    for i, name in enumerate(rows):
        if ends[name]:
            middle = spread(ends[name])[0]
            chart.line([middle, middle], [i - 0.28, i + 0.28], name, width=4)
            for end in ends[name]:
                chart.mark(end, i, name, 5)
        lost = len(groups[name]) - len(ends[name])
        if lost:
            words = "diverged" if lost == len(groups[name]) else f"{lost} of {len(groups[name])} diverged"
            chart.text(chart.x.low, i, words, name, shift=(6, 5))
    return chart


def rate_charts(run: Run) -> dict[str, Chart]:
    """Draw the effective learning rates over time, one chart per parameter: the median and the middle 80 %."""
    charts = {}
    steps = max(record.step for record in run.layers)
    for name, records in layers(run.layers).items():
        chart = Chart(
            Axis(0, steps, "step", count=4),
            Axis(*rate_limits(run), "", log=True, count=5),
            f"Effective learning rates of {name}: the median and the middle 80 % of its weights.",
            (340, 210),
            (50, 18, 12, 42),
        )
        xs = [record.step for record in records]
        chart.rule(run.lr)
        chart.line(xs, [record.median for record in records], "plain", name="median")
        chart.band(xs, [record.low for record in records], [record.high for record in records], "plain")
        charts[f"{name}: {records[0].elements:,} numbers".replace(",", " ")] = chart
    return charts


def label(each: Sequence[Run]) -> str:
    """Return an optimizer's name in a key: its learning rate, and how many of its runs diverged."""
    lost = [run.diverged_at for run in each if run.diverged_at is not None]
    ended = ""
    if lost:
        where = f"diverged at step {lost[0]}" if len(lost) == 1 else f"diverged from step {min(lost)}"
        ended = f", {where}" if len(each) == 1 else f", {len(lost)} of {len(each)} {where}"
    return f"{each[0].label}, lr {short(each[0].lr)}{ended}"
