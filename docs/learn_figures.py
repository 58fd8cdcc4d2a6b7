"""The figures of learn.md and of the README: small SVG files, legible on light and on dark paper.

Each is drawn from the result of a claim of `learn_claims.py`, and followed in the chapter by a link that opens the
same setting in the live page.
"""

from collections.abc import Callable, Mapping

from claims import Measured
from learn_claims import ANGLES, CONDITION, SGD_LR, START

from rmsprop.chart import Axis, Chart, picture
from rmsprop.style import LOOKS

_COURSE = "condition=50&lr=0.2&memory=10&mode=inside&lr_sgd=0.038"
LIVE = {
    "point": f"{_COURSE}&steps=25&hidden=momentum,adam",
    "rates": f"figure=land,play,bars&controls=condition,lr,memory&{_COURSE}&steps=25&t=1&hidden=momentum,adam",
    "floors": "figure=land,play,bars&controls=eps,mode&eps=0.01&mode=inside&hidden=sgd,momentum,adam",
    "start": "figure=land,play,bars,lines&controls=memory,init,bias&memory=100&t=1&hidden=sgd,momentum,adam",
    "memory": "figure=land,play,phase&controls=memory&memory=100&hidden=sgd,momentum,adam",
    "settling": "figure=land,play,loss&controls=lr,memory,steps&lr=0.2&steps=200&hidden=sgd,momentum,adam",
    "stuck": "figure=land,play,phase&controls=memory&memory=100&kick=21&t=22&hidden=sgd,momentum,adam",
    "angles": "figure=land,turn&controls=angle,lr,memory",
}
"""The fragment that opens the live page at the setting of a figure, in the names of `rmsprop.race.page`."""

SIZE, HALF = (620, 300), (420, 300)
DASHES = {name: look.dash[1] for name, look in LOOKS.items()}


def point(finding: Measured) -> str:
    """Draw the first 25 steps of SGD and of RMSprop down the same ravine, side by side, on equal scales."""
    charts = []
    for kind, name, words in (
        ("sgd", "SGD", "SGD zigzags across and crawls along"),
        ("rmsprop", "RMSprop", "RMSprop goes straight"),
    ):
        chart = Chart(Axis(-4.5, 0.7, ticks=()), Axis(-1.3, 1.3, ticks=()), "", (440, 262), (8, 8, 40, 2))
        for level in (0.08, 0.5, 1.6, 4.0, 8.0, 14.0, 25.0):
            (a, b), (c, d) = chart.at(0, 0), chart.at((2 * level) ** 0.5, (2 * level / CONDITION) ** 0.5)
            chart.parts.append(
                f'<ellipse cx="{a:.1f}" cy="{b:.1f}" rx="{c - a:.1f}" ry="{b - d:.1f}" fill="none" '
                'stroke="var(--soft)" stroke-opacity=".45"/>'
            )
        path = finding.data[name]
        chart.line([x for x, _ in path], [y for _, y in path], kind, width=2.6)
        for x, y in path:
            chart.mark(x, y, kind, 3)
        chart.mark(0, 0, "second", 5)
        chart.text(0, 0, "minimum", "second", "middle", (0, 24))
        chart.text(*START, "start", "second", "start", (8, -8))
        chart.heading = (words, kind)
        charts.append(chart)
    return picture(
        charts,
        "The same 25 steps down a ravine that is 50 times as steep across as along. SGD jumps from wall to wall and "
        "gets little more than halfway; RMSprop reaches the floor at once and follows it to the minimum.",
    )


def rates(finding: Measured) -> str:
    """Draw the effective learning rates of both weights over the steps, beside SGD's one rate."""
    steps = list(range(1, 16))
    chart = Chart(Axis(0.5, 15.5, "step"), Axis(0.005, 1, "effective learning rate", log=True), "", SIZE)
    chart.line(steps, finding.data["w"], "rmsprop")
    chart.line(steps, finding.data["b"], "rmsprop", DASHES["adam"])
    chart.line(steps, [SGD_LR] * len(steps), "sgd", DASHES["sgd"])
    chart.text(8, finding.data["w"][7], "w, the flat direction: lr/√v", "rmsprop", shift=(0, -10))
    chart.text(8, finding.data["b"][7], "b, the steep direction: lr/√v", "rmsprop", shift=(0, 20))
    chart.text(8, SGD_LR, f"SGD: {SGD_LR:g} for both", "sgd", shift=(0, -9))
    return picture(
        [chart],
        "The effective learning rates of RMSprop: the flat weight's is more than ten times the steep weight's, and "
        "SGD's one rate lies between.",
    )


def floors(finding: Measured) -> str:
    """Draw the length of a steady step against the size of the gradient, for two places of ε."""
    label = "length of the step, in lr"
    chart = Chart(Axis(1e-9, 1, "size of the gradient", log=True, count=9), Axis(1e-5, 3, label, log=True), "", SIZE)
    # Two of the three coincide, so that dots are drawn over a line.
    kinds = (("rmsprop", "", 2.6), ("sgd", "7 4", 2.6), ("adam", "1 6", 4))
    for (name, steps), (kind, dash, width) in zip(finding.data["steps"].items(), kinds, strict=True):
        chart.line(finding.data["gradients"], steps, kind, dash, width)
        if name.endswith("1e-4"):
            chart.text(3e-7, 6e-5, "1e-4 outside: the same floor", kind)
        elif name.startswith("inside"):
            chart.text(2e-5, 6e-3, f"ε {name}", kind)
        else:
            chart.text(4e-9, 0.16, f"ε {name}", kind)
    return picture(
        [chart],
        "Step length against gradient size. With 1e-8 outside the root steps are lr long down to gradients of 1e-7; "
        "with 1e-8 inside only down to 1e-4, where 1e-4 outside ends, too.",
    )


def start(finding: Measured) -> str:
    """Draw the length of the first thousand steps under a steady gradient."""
    label = "length of the step, in lr"
    chart = Chart(Axis(1, 1000, "step", log=True), Axis(5e-4, 20, label, log=True), "", SIZE)
    kinds = ("rmsprop", "momentum", "adam", "sgd")
    steps = sorted({round(10 ** (i / 30)) for i in range(91)})
    places = ((1.7, 9.5, (0, 0)), (1.05, 1.3, (0, 0)), (8, 1, (0, 19)), (4, 1.4e-3, (0, -12)))
    for (name, curve), kind, (x, y, shift) in zip(finding.data["curves"].items(), kinds, places, strict=True):
        chart.line(steps, [curve[step - 1] for step in steps], kind, DASHES[kind])
        chart.text(x, y, name, kind, shift=shift)
    return picture(
        [chart],
        "Step length against step number: 10 lr at first with alpha 0.99, 3.2 lr with 0.9, lr with bias correction, "
        "and a thousandth of lr where v starts at 1 and gradients are 0.001.",
    )


def memory(finding: Measured) -> str:
    """Draw the share of one gradient in v against its age."""
    chart = Chart(
        Axis(0, 300, "steps since the gradient"), Axis(0, 0.105, "its share in v", ticks=_percents), "", SIZE
    )
    for (alpha, shares), kind, place in zip(
        finding.data["shares"].items(),
        ("momentum", "rmsprop"),
        ((16, 0.045), (75, 0.0105)),
        strict=True,
    ):
        chart.line(list(range(300)), shares[:300], kind, DASHES[kind], 2.6)
        chart.text(*place, f"alpha {alpha:g}: about {1 / (1 - alpha):.0f} steps", kind)
    return picture(
        [chart],
        "The share of one gradient in v against its age. With alpha 0.9 it starts at 10 % and is gone after 40 "
        "steps; with 0.99 it starts at 1 % and fades over hundreds of steps.",
    )


_percents = [(value / 100, f"{value} %") for value in (0, 2, 4, 6, 8, 10)]


def settling(finding: Measured) -> str:
    """Draw a weight near its minimum under a constant and under a falling learning rate."""
    charts = []
    for name, path in finding.data["paths"].items():
        chart = Chart(Axis(0, 300, "step"), Axis(-0.15, 0.3, "the weight (minimum at 0)", count=4), "", HALF)
        chart.rule(0)
        chart.line(list(range(301)), path, "rmsprop", width=1.3)
        chart.text(295, 0.24, name, "rmsprop", "end")
        charts.append(chart)
    return picture(
        charts,
        "A weight over 300 steps. With a constant learning rate it ends up jumping between plus and minus half the "
        "learning rate; with a falling one the jumps shrink to nothing.",
    )


def stuck(finding: Measured) -> str:
    """Draw the length of the steps around one gradient that is 30 times too large."""
    label = "length of the step, in lr"
    chart = Chart(Axis(0, 600, "step"), Axis(0.08, 20, label, log=True, ticks=_lengths), "", SIZE)
    chart.rule(1)
    for (alpha, steps), kind, place in zip(
        finding.data["steps"].items(),
        ("momentum", "rmsprop"),
        ((75, 1.25), (170, 0.42)),
        strict=True,
    ):
        chart.line(list(range(1, 601)), steps, kind, DASHES[kind])
        chart.text(*place, f"alpha {alpha:g}", kind)
    chart.text(36, 9.5, "one gradient, 30 times too large", "second")
    return picture(
        [chart],
        "Step length around one gradient that is 30 times too large: one long step, then short steps, for about 60 "
        "steps with alpha 0.9 and for hundreds with 0.99.",
    )


_lengths = [(value, f"{value:g}") for value in (0.1, 0.3, 1, 3, 10)]


def angles(finding: Measured) -> str:
    """Draw the distance left against the angle of the ravine."""
    chart = Chart(
        Axis(0, 45, "angle of the ravine to the axes, in degrees", ticks=[(a, f"{a}") for a in ANGLES if a != 1]),
        Axis(1e-13, 1, "distance left after 200 steps", log=True),
        "",
        SIZE,
    )
    kinds = {"SGD": "sgd", "SGD + momentum 0.9": "momentum", "RMSprop": "rmsprop", "Adam": "adam"}
    places = {"SGD": (31, -8), "SGD + momentum 0.9": (22, 18), "RMSprop": (6, 24), "Adam": (34, -8)}
    for name, left in finding.data["left"].items():
        kind = kinds[name]
        chart.line(ANGLES, left, kind, DASHES[kind])
        x, shift = places[name]
        near = min(range(len(ANGLES)), key=lambda i: abs(ANGLES[i] - x))
        chart.text(x, left[near], name, kind, shift=(0, shift))
    return picture(
        [chart],
        "Distance left against the angle of the ravine. RMSprop gets to a trillionth along the axes and to a "
        "hundredth at 45 degrees; SGD and SGD with momentum do not depend on the angle.",
    )


LEARN_FIGURES: Mapping[str, tuple[str, Callable[[Measured], str]]] = {
    "point": ("one_rate", point),
    **{draw.__name__: (draw.__name__, draw) for draw in (rates, floors, start, memory, settling, stuck, angles)},
}
"""Each figure with the claim that it shows and its function."""
