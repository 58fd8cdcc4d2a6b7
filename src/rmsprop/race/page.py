"""A race as one self-contained HTML page, with play, pause, and a slider."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from rmsprop.files import write_whole
from rmsprop.printing import in_html
from rmsprop.race.figures import Races, loss_range, moments, surface
from rmsprop.race.landscapes import TARGET, Landscape, Trajectory
from rmsprop.style import CSS, LOOKS, REFERENCE, YELLOW

CASES = 6000
"""The settings on which the engine has the reference's bits, in tests/race/test_engine.py."""


def page(landscape: Landscape, runs: Races, path: Path) -> Path:
    """Write the race as one HTML file, which includes plotly.js. Returns: the path written."""
    picture = _interactive(landscape, runs).to_html(
        full_html=False,
        include_plotlyjs=True,
        include_mathjax=False,
        auto_play=False,
        default_height="100%",
        config={"displaylogo": False, "responsive": True, "displayModeBar": False},
    )
    text = PAGE.format(
        css=CSS + RACE_CSS,
        title=in_html(f"A race with RMSprop: {landscape.name}"),
        description=in_html(landscape.description),
        lesson=in_html(landscape.lesson),
        picture=picture,
        rows="\n".join(_row(run) for run in runs),
        target=f"{landscape.target:.3g}",
        share=f"{TARGET:g}",
        noise="The losses shown exclude the noise. " if landscape.noise else "",
    )
    return write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def _row(run: Trajectory) -> str:
    """Return one optimizer's row of the table of results."""
    look = LOOKS[run.name]
    arrived = "not reached" if run.target_at is None else f"step {run.target_at}"
    cells = [arrived, f"{run.losses[-1]:.3g}", f"{run.distance:.3g}"]
    if run.diverged:
        cells = [f"diverged at step {run.diverged_at}", "-", "-"]
    name = f'<span style="color:{look.color}">{look.sign}</span> {in_html(run.label)}'
    settings = f"<small>{in_html(run.settings)}</small>"
    numbers = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{name}<br>{settings}</th>{numbers}</tr>'


def _interactive(landscape: Landscape, runs: Races) -> Any:
    """Return the plotly figure, which first shows the whole race; the slider and the play button show its course."""
    from plotly.graph_objects import Figure

    moving = [trace for run in runs for trace in _run_traces(run, len(run.points))]
    traces = [_contours(landscape), *moving, *_marks(landscape)]  # the marks are on top, so no path hides them
    places = list(range(1, 1 + len(moving)))
    steps = moments(runs)
    frames = [
        {
            "name": str(step),
            "traces": places,
            "data": [
                {key: trace[key] for key in ("type", "x", "y")}
                for run in runs
                for trace in _run_traces(run, step + 1)
            ],
        }
        for step in steps
    ]
    left, right, low, high = landscape.window
    grid = {"gridcolor": "#e5e5e5", "zeroline": False, "fixedrange": False, "automargin": True}
    decades = [math.log10(end) for end in loss_range(landscape, runs)]
    layout = {
        "template": "none",
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "xaxis": grid | {"range": [left, right], "anchor": "y", "title": {"text": "x", "standoff": 2}},
        "yaxis": grid | {"range": [low, high], "domain": [0.4, 1], "title": {"text": "y"}},
        "xaxis2": grid | {"range": [0, max(steps[-1], 1)], "anchor": "y2", "title": {"text": "step", "standoff": 2}},
        "yaxis2": grid
        | {"range": decades, "domain": [0, 0.31], "title": {"text": "loss"}}
        | {"type": "log", "exponentformat": "power"},
        "legend": {"orientation": "h", "x": 0, "y": 1.01, "xanchor": "left", "yanchor": "bottom"},
        "hovermode": "closest",
        "shapes": [
            {
                "type": "line",
                "xref": "x2 domain",
                "yref": "y2",
                "x0": 0,
                "x1": 1,
                "y0": landscape.target,
                "y1": landscape.target,
                "line": {"color": REFERENCE, "width": 1},
            }
        ],
        "updatemenus": [_buttons()],
        "sliders": [_slider(steps)],
    }
    return Figure({"data": traces, "layout": layout, "frames": frames})


def _contours(landscape: Landscape) -> dict[str, Any]:
    """Return the trace of the contours of the log loss."""
    x, y, z = (numbers.astype(np.float32) for numbers in surface(landscape, 80))
    return {
        "type": "contour",
        "x": x,
        "y": y,
        "z": z,
        "ncontours": 24,
        "colorscale": [[0, "#f7fbff"], [1, "#b5d1ea"]],
        "line": {"color": "#8fa3b5", "width": 0.5},
        "showscale": False,
        "hoverinfo": "skip",
    }


def _marks(landscape: Landscape) -> list[dict[str, Any]]:
    """Return the traces of the start and the minima."""
    mark = {"type": "scatter", "mode": "markers", "hovertemplate": "%{x}, %{y}"}
    ink = {"color": "black", "width": 1}
    minima = np.array(landscape.minima)
    return [
        mark
        | {"name": "start", "x": [landscape.start[0]], "y": [landscape.start[1]]}
        | {"marker": {"symbol": "cross", "size": 12, "color": "white", "line": ink}},
        mark
        | {"name": "minimum", "x": minima[:, 0], "y": minima[:, 1]}
        | {"marker": {"symbol": "star", "size": 13, "color": YELLOW, "line": ink}},
    ]


def _run_traces(run: Trajectory, shown: int) -> list[dict[str, Any]]:
    """Return one optimizer's traces up to a number of points: its path, its current point, and its loss."""
    look = LOOKS[run.name]
    points, losses = run.points[:shown].astype(np.float32), run.losses[:shown]
    common = {"type": "scatter", "name": run.label, "legendgroup": run.name}
    line = look.plotly_line | {"width": 2}
    head = {"symbol": look.marker[1], "size": 12, "color": look.color, "line": {"color": "white", "width": 1}}
    return [
        common
        | {"mode": "lines", "line": line, "x": points[:, 0], "y": points[:, 1], "showlegend": False}
        | {"hovertemplate": "step %{pointNumber}: %{x:.4g}, %{y:.4g}"},
        common
        | {"mode": "lines+markers", "line": line, "marker": head, "x": points[-1:, 0], "y": points[-1:, 1]}
        | {"hovertemplate": "%{x:.4g}, %{y:.4g}"},
        common
        | {"mode": "lines", "line": line, "x": np.arange(len(losses), dtype=np.int32), "y": losses}
        | {"xaxis": "x2", "yaxis": "y2", "showlegend": False, "hovertemplate": "step %{x}: %{y:.4g}"},
    ]


def _buttons() -> dict[str, Any]:
    """Return the play and pause buttons."""
    play = {"frame": {"duration": 80, "redraw": False}, "transition": {"duration": 0}, "mode": "immediate"}
    pause = {"frame": {"duration": 0, "redraw": False}, "mode": "immediate"}
    return {
        "type": "buttons",
        "direction": "right",
        "showactive": False,
        "x": 0,
        "y": -0.1,
        "xanchor": "left",
        "yanchor": "top",
        "buttons": [
            {"label": "▶ Play", "method": "animate", "args": [None, play]},
            {"label": "❚❚ Pause", "method": "animate", "args": [[None], pause]},
        ],
    }


def _slider(steps: list[int]) -> dict[str, Any]:
    """Return the slider over the steps, set to the last."""
    jump = {"frame": {"duration": 0, "redraw": False}, "transition": {"duration": 0}, "mode": "immediate"}
    return {
        "active": len(steps) - 1,
        "x": 0,
        "y": -0.16,
        "len": 1,
        "pad": {"t": 20, "b": 5, "l": 10, "r": 10},
        "currentvalue": {"prefix": "step ", "xanchor": "right"},
        "transition": {"duration": 0},
        "steps": [{"label": str(step), "method": "animate", "args": [[str(step)], jump]} for step in steps],
    }


RACE_CSS = """
body { font: 1rem/1.5 system-ui, sans-serif; background: #fff; max-width: 60rem; }
h1 { font-size: 1.4rem; line-height: 1.25; margin: 0 0 .5rem; }
.picture { height: 50rem; }
table { width: 100%; }
th, td { text-align: left; padding: .35rem .6rem .35rem 0; white-space: normal; vertical-align: top; }
small { color: #555; font-weight: normal; }
"""

# The security policy forbids the page to fetch anything.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{description} Each optimizer is the class that trains networks, applied to two numbers with gradients from
autograd. Press Play, or drag the slider.</p>
<div class="picture" role="group" aria-label="Paths of the optimizers over contours of the loss,
 and the loss at each step. The table below gives the results.">{picture}</div>
<noscript><p>The figure needs JavaScript; the results below do not.</p></noscript>
<h2>What happens at the suggested settings</h2>
<p>{lesson}</p>
<h2>Results</h2>
<div class="scroll"><table>
<thead><tr><th scope="col">optimizer</th><th scope="col">target</th><th scope="col">final loss</th>
<th scope="col">distance</th></tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<p><small>The target, the horizontal line in the lower plot, is a loss of {target}: {share} of the starting loss.
{noise}The distance is measured from the final point to the nearest minimum.
Written by <code>rmsprop race</code>.</small></p>
</main>
</body>
</html>
"""
