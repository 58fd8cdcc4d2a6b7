"""The figures of choosing.md, from the results of claims.py, and of the measurements of bench/."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import distributed_page
import state_page
import training_page
from claims import CONDITIONS, NEAR, Measured
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rmsprop import style
from rmsprop.style import BLUE, GREEN, LOOKS, PURPLE, VERMILION

# Each optimizer of claims.py, by its label, in the style of the demo's optimizers.
LINES: dict[str, dict[str, Any]] = {
    label: LOOKS[name].marked_line
    for label, name in (
        ("SGD", "sgd"),
        ("SGD + momentum 0.9", "momentum"),
        ("RMSprop", "rmsprop"),
        ("Adam", "adam"),
        ("RMSprop + momentum 0.9", "rmsprop-textbook"),
    )
}
SIZE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "legend.fontsize": 10,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
}


def ravine(finding: Measured) -> Figure:
    """Draw the distance left against the condition of the ravine, aligned and rotated."""
    figure, (left, right) = _canvas(2)
    for axes, degrees, title in ((left, 0, "along the axes"), (right, 45, "turned by 45 degrees")):
        for name in ("SGD", "SGD + momentum 0.9", "RMSprop", "Adam"):
            distances = [distance for distance, _ in finding.data["found"][name, degrees]]
            axes.plot(CONDITIONS, distances, label=name, **LINES[name])
        axes.set(xscale="log", yscale="log", ylim=(NEAR / 2.5, 3), xlabel="condition (steep : flat)", title=title)
        axes.set_yticks([1e-6, 1e-4, 1e-2, 1], ["arrived", "0.01 %", "1 %", "100 %"])
        axes.set_xticks(CONDITIONS, [f"{condition:g}" for condition in CONDITIONS])
        axes.minorticks_off()
    left.set_ylabel("distance left after 300 steps")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def digits(finding: Measured) -> Figure:
    """Draw the test accuracy against the learning rate, one line per optimizer."""
    figure, (axes,) = _canvas(1)
    axes.axhline(95, color="#666666", linewidth=1)
    for name, scores in finding.data["scores"].items():
        axes.plot(finding.data["lrs"], [100 * score for score in scores], label=name, **LINES[name])
    axes.set(xscale="log", ylim=(0, 101), xlabel="learning rate (line: 95 %)", ylabel="test images right (%)")
    axes.set_xticks([1e-4, 1e-3, 1e-2, 1e-1, 1], ["0.0001", "0.001", "0.01", "0.1", "1"])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def hover(finding: Measured) -> Figure:
    """Draw the weight over the steps, near the minimum."""
    figure, panels = _canvas(3)
    shown = (("RMSprop, lr 0.1", VERMILION), ("RMSprop, lr 0.1 falling to 0", VERMILION), ("SGD, lr 0.1", BLUE))
    for axes, (label, color) in zip(panels, shown, strict=True):
        axes.axhline(0, color="#666666", linewidth=1)
        axes.plot(finding.data["paths"][label], color=color, linewidth=0.6 if "RMSprop" in label else 2)
        axes.set(ylim=(-0.15, 0.15), xlabel="step")
        axes.set_title(label, fontsize=11)
    panels[0].set_ylabel("the weight (minimum at 0)")
    return figure


def drift(finding: Measured) -> Figure:
    """Draw the net move per step against alpha, for two kinds of rare gradients."""
    figure, panels = _canvas(2)
    memory = [1 / (1 - alpha) for alpha in finding.data["alphas"]]
    for axes, (label, moves) in zip(panels, finding.data["moves"].items(), strict=True):
        axes.axhspan(0, 10, color=VERMILION, alpha=0.12, linewidth=0)
        axes.axhspan(-10, 0, color=BLUE, alpha=0.12, linewidth=0)
        axes.plot(memory, moves, color="black", marker="o")
        axes.set(xscale="log", xlabel="memory 1/(1−alpha) in steps", title=label)
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(-1, 3)
        axes.set_xticks([1, 10, 100, 1000, 10000], ["1", "10", "100", "1000", "10000"])
        axes.set_yticks([-0.1, -0.01, 0, 0.01, 0.1, 1], ["−0.1", "−0.01", "0", "0.01", "0.1", "1"])
        axes.text(0.97, 0.93, "wrong way", transform=axes.transAxes, ha="right", color="#8a3c00")
        axes.text(0.03, 0.05, "right way", transform=axes.transAxes, color="#004a75")
    panels[0].set_ylabel("net move per step (lr)")
    return figure


def first_step(finding: Measured) -> Figure:
    """Draw the length of the first thousand steps under a constant gradient."""
    figure, (axes,) = _canvas(1)
    curves = finding.data["curves"]
    lines: Mapping[tuple[str, float], tuple[str, Mapping[str, Any]]] = {
        ("alpha=0.99 (torch's default)", 1.0): ("alpha=0.99 (torch's default)", {"color": VERMILION}),
        ("alpha=0.9", 1.0): ("alpha=0.9", {"color": PURPLE, "linestyle": "-."}),
        ("bias_correction=True", 1.0): ("bias_correction=True", {"color": GREEN, "linestyle": "--"}),
        ("square_avg_init=1.0", 0.001): (
            "square_avg_init=1.0, gradient 0.001",
            {"color": BLUE, "linestyle": ":"},
        ),
    }
    for key, (label, line) in lines.items():
        axes.plot(range(1, 1001), curves[key], label=label, **line)
    axes.set(xscale="log", yscale="log", xlabel="step", ylabel="length of the step (lr)")
    axes.set_yticks([0.001, 0.01, 0.1, 1, 10], ["0.001", "0.01", "0.1", "1", "10"])
    axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def eps(finding: Measured) -> Figure:
    """Draw the length of a step against the size of the gradient, for four values and places of ε."""
    figure, (axes,) = _canvas(1)
    lines: tuple[dict[str, Any], ...] = (
        {"color": VERMILION, "marker": "o"},
        {"color": PURPLE, "linestyle": "-.", "marker": "^"},
        {"color": BLUE, "linestyle": ":", "marker": "s"},
        {"color": GREEN, "linestyle": "--", "marker": "D"},
    )
    for (label, steps), line in zip(finding.data["steps"].items(), lines, strict=True):
        axes.plot(finding.data["gradients"], steps, label=f"ε = {label}", **line)
    axes.set(xscale="log", yscale="log", xlabel="size of the gradient", ylabel="length of the step (lr)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


# Each figure with its alternative text.
FIGURES: Mapping[str, tuple[Callable[[Measured], Figure], str]] = {
    "ravine": (
        ravine,
        "Distance left against condition. Along the axes RMSprop arrives at every condition; turned by 45 degrees it "
        "falls behind SGD with momentum.",
    ),
    "digits": (
        digits,
        "Test accuracy against learning rate: five humps of the same height, RMSprop's near 0.01 and SGD's near 1.",
    ),
    "hover": (
        hover,
        "The weight over 1000 steps. With a constant learning rate RMSprop ends up jumping between plus and minus "
        "half of it; with a falling one the jumps shrink to nothing; SGD goes straight to the minimum.",
    ),
    "drift": (
        drift,
        "Net move against the memory of alpha: the easy case turns right at a memory of 2 steps, the hard one only "
        "beyond 1000.",
    ),
    "first_step": (
        first_step,
        "Step length against step number: 10 lr at first with alpha 0.99, lr with bias correction.",
    ),
    "eps": (eps, "Step length against gradient size: lr for gradients above a floor that ε sets, shorter below it."),
}


def distributed() -> Figure:
    """Draw the step time of a sharded model against the number of processes."""
    figure, panels = _canvas(3)
    distributed_page.draw(figure, panels)
    return figure


# The figures of the measurements of bench/, each with its record.
MEASURED: Mapping[str, tuple[Callable[[], Figure], Path]] = {
    "distributed": (distributed, distributed_page.RECORD),
    "release": (training_page.figure, training_page.RECORD),
    "state_training": (state_page.figure, state_page.RECORD),
}


def _canvas(columns: int) -> tuple[Figure, list[Axes]]:
    """Make an empty figure of one row of panels with a common y axis."""
    return style.panels(1, columns, (8, 3.4), SIZE, sharey=True)
