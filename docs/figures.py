"""The figures: of choosing.md, drawn from the findings of claims.py, and of what bench/ measured."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import distributed_page
import training_page
from claims import CONDITIONS, NEAR, Measured
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rmsprop.demo.figures import STYLES

# The demo's colours and dashes; RMSprop with momentum is black, long dashes.
LOOKS: dict[str, dict[str, Any]] = {
    label: {"color": STYLES[name][0], "linestyle": STYLES[name][1], "marker": marker}
    for label, name, marker in (
        ("SGD", "sgd", "s"),
        ("SGD + momentum 0.9", "momentum", "^"),
        ("RMSprop", "rmsprop", "o"),
        ("Adam", "adam", "D"),
    )
} | {"RMSprop + momentum 0.9": {"color": "#000000", "linestyle": (0, (7, 3)), "marker": "v"}}
SIZE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "legend.fontsize": 10,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
}


def ravine(finding: Measured) -> Figure:
    """The distance left against the condition of the ravine, along the axes and turned."""
    figure, (left, right) = _canvas(2)
    for axes, degrees, title in ((left, 0, "along the axes"), (right, 45, "turned by 45 degrees")):
        for name in ("SGD", "SGD + momentum 0.9", "RMSprop", "Adam"):
            distances = [distance for distance, _ in finding.data["found"][name, degrees]]
            axes.plot(CONDITIONS, distances, label=name, **LOOKS[name])
        axes.set(xscale="log", yscale="log", ylim=(NEAR / 2.5, 3), xlabel="condition (steep : flat)", title=title)
        axes.set_yticks([1e-6, 1e-4, 1e-2, 1], ["arrived", "0.01 %", "1 %", "100 %"])
        axes.set_xticks(CONDITIONS, [f"{condition:g}" for condition in CONDITIONS])
        axes.minorticks_off()
    left.set_ylabel("distance left after 300 steps")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def digits(finding: Measured) -> Figure:
    """Test accuracy against the learning rate, one line per optimizer."""
    figure, (axes,) = _canvas(1)
    axes.axhline(95, color="#666666", linewidth=1)
    for name, scores in finding.data["scores"].items():
        axes.plot(finding.data["lrs"], [100 * score for score in scores], label=name, **LOOKS[name])
    axes.set(xscale="log", ylim=(0, 101), xlabel="learning rate (line: 95 %)", ylabel="test images right (%)")
    axes.set_xticks([1e-4, 1e-3, 1e-2, 1e-1, 1], ["0.0001", "0.001", "0.01", "0.1", "1"])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def hover(finding: Measured) -> Figure:
    """The weight over the steps, near the minimum."""
    figure, panels = _canvas(3)
    shown = (("RMSprop, lr 0.1", "#D55E00"), ("RMSprop, lr 0.1 falling to 0", "#D55E00"), ("SGD, lr 0.1", "#0072B2"))
    for axes, (label, colour) in zip(panels, shown, strict=True):
        axes.axhline(0, color="#666666", linewidth=1)
        axes.plot(finding.data["paths"][label], color=colour, linewidth=0.6 if "RMSprop" in label else 2)
        axes.set(ylim=(-0.15, 0.15), xlabel="step")
        axes.set_title(label, fontsize=11)
    panels[0].set_ylabel("the weight (minimum at 0)")
    return figure


def drift(finding: Measured) -> Figure:
    """The net move per step against alpha, for two kinds of rare gradients."""
    figure, panels = _canvas(2)
    memory = [1 / (1 - alpha) for alpha in finding.data["alphas"]]
    for axes, (label, moves) in zip(panels, finding.data["moves"].items(), strict=True):
        axes.axhspan(0, 10, color="#D55E00", alpha=0.12, linewidth=0)
        axes.axhspan(-10, 0, color="#0072B2", alpha=0.12, linewidth=0)
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
    """The length of the first thousand steps under a steady gradient."""
    figure, (axes,) = _canvas(1)
    curves = finding.data["curves"]
    looks: Mapping[tuple[str, float], tuple[str, Mapping[str, Any]]] = {
        ("alpha=0.99 (torch's default)", 1.0): ("alpha=0.99 (torch's default)", {"color": "#D55E00"}),
        ("alpha=0.9", 1.0): ("alpha=0.9", {"color": "#CC79A7", "linestyle": "-."}),
        ("bias_correction=True", 1.0): ("bias_correction=True", {"color": "#009E73", "linestyle": "--"}),
        ("square_avg_init=1.0", 0.001): (
            "square_avg_init=1.0, gradient 0.001",
            {"color": "#0072B2", "linestyle": ":"},
        ),
    }
    for key, (label, style) in looks.items():
        axes.plot(range(1, 1001), curves[key], label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="step", ylabel="length of the step (lr)")
    axes.set_yticks([0.001, 0.01, 0.1, 1, 10], ["0.001", "0.01", "0.1", "1", "10"])
    axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def eps(finding: Measured) -> Figure:
    """The length of a step against the size of the gradient, for four values and places of ε."""
    figure, (axes,) = _canvas(1)
    styles: tuple[dict[str, Any], ...] = (
        {"color": "#D55E00", "marker": "o"},
        {"color": "#CC79A7", "linestyle": "-.", "marker": "^"},
        {"color": "#0072B2", "linestyle": ":", "marker": "s"},
        {"color": "#009E73", "linestyle": "--", "marker": "D"},
    )
    for (label, steps), style in zip(finding.data["steps"].items(), styles, strict=True):
        axes.plot(finding.data["gradients"], steps, label=f"ε = {label}", **style)
    axes.set(xscale="log", yscale="log", xlabel="size of the gradient", ylabel="length of the step (lr)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


# Each figure with the words for readers who do not see it.
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
    """The step of a sharded model against the number of processes."""
    figure, panels = _canvas(3)
    distributed_page.draw(figure, panels)
    return figure


# Figures of what bench/ measured, each with the record that it is drawn from.
MEASURED: Mapping[str, tuple[Callable[[], Figure], Path]] = {
    "distributed": (distributed, distributed_page.RECORD),
    "release": (training_page.figure, training_page.RECORD),
}


def _canvas(columns: int) -> tuple[Figure, list[Axes]]:
    """A small figure that pyplot knows nothing of, with a light grid."""
    with rc_context(SIZE):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        panels = list(figure.subplots(1, columns, squeeze=False, sharey=True)[0])
    for axes in panels:
        axes.grid(True, color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
