"""One self-contained HTML page with a demo's table, curves, and effective learning rates.

Every string from the user's file or command is escaped, since a column may be named <script>.
"""

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

from plotly import graph_objects
from plotly.offline import get_plotlyjs

from rmsprop.demo.data import Dataset
from rmsprop.demo.figures import (
    BAND,
    MEDIAN,
    NOMINAL,
    accuracy_floor,
    averaged,
    curve_points,
    layers,
    loss_limits,
    rate_limits,
    window,
)
from rmsprop.demo.training import BATCH, HEADINGS, Run, Settings, cells
from rmsprop.printing import in_html
from rmsprop.style import CSS, LOOKS

DEMO_CSS = """
html { overflow-y: scroll; }
body { max-width: 68rem; }
h2 { font-size: 1.35rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1.05rem; margin: .8rem 0 0; }
code { background: #f2f2f2; padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: .5rem 1rem; }
.pair > *, .grid > * { min-width: 0; }
.key span { display: inline-block; margin-right: 1.2rem; }
.key i { display: inline-block; width: 2rem; height: 0; margin-right: .4rem; vertical-align: middle; }
img { max-width: 100%; height: auto; }
dd { overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  th, td { padding: .35rem .3rem; font-size: .8rem; }
  th, td:first-child { white-space: normal; }
}
"""


def page(runs: Sequence[Run], dataset: Dataset, settings: Settings, pictures: Mapping[str, bytes]) -> str:
    """Return the whole page as text.

    Args:
        pictures: PNG files by description, for readers without JavaScript.
    """
    images = "".join(
        f'<p><img src="data:image/png;base64,{b64encode(png).decode()}" alt="{in_html(name)}"></p>'
        for name, png in pictures.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>RMSprop demo: {in_html(dataset.source)}</title>
<style>{CSS}{DEMO_CSS}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<h1>One network, {len(runs)} optimizer{"s" * (len(runs) > 1)}</h1>
<p>A small {"convolutional network" if dataset.is_image else "perceptron"} trains on
{in_html(dataset.source)} once with each optimizer, from the same initial weights, on the same batches in the same
order, for the same {settings.epochs} epochs.</p>
<h2>Results</h2>
{_table(runs)}
{_reading(runs, dataset)}
<noscript><h2>Figures</h2>{images}</noscript>
{_curves(runs)}
{"".join(_rates(run) for run in runs if run.layers)}
<h2>Data and settings</h2>
{_facts(dataset, settings)}
</body>
</html>
"""


def _table(runs: Sequence[Run]) -> str:
    head = "".join(f"<th>{in_html(name)}</th>" for name in HEADINGS)
    body = "".join("<tr>" + "".join(f"<td>{in_html(cell)}</td>" for cell in cells(run)) + "</tr>" for run in runs)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _reading(runs: Sequence[Run], dataset: Dataset) -> str:
    rows = len(dataset.y_test)
    share = int(dataset.y_test.bincount().max()) / rows
    best = max((run.test_accuracies[-1] for run in runs if run.diverged_at is None), default=share)
    error = 100 * math.sqrt(best * (1 - best) / rows)
    one = 100 / rows
    diverged = [run.label for run in runs if run.diverged_at is not None]
    ended = (
        f"<li>{in_html(', '.join(diverged))} diverged: the loss was no longer a finite number, so training "
        "stopped there. A smaller learning rate usually helps.</li>"
        if diverged
        else ""
    )
    return f"""<ul>
{ended}
<li>Losses are mean cross-entropies in nats. A perfect network has 0, and guessing evenly among the
{len(dataset.class_names)} classes has {math.log(len(dataset.class_names)):.2f}. Always predicting the most frequent
class would be right on {100 * share:.1f} % of the test rows.</li>
<li>This is one run from one seed. One of the {rows} test rows is worth {one:.1f} percentage points, and the random
choice of test rows alone moves an accuracy by about ±{max(error, one):.1f} points. Differences of that size do not
rank the optimizers; another <code>--seed</code> may reverse them.</li>
<li>Each default learning rate comes from a small search on the digits, so on other data any of them may be a poor
choice. Try other values with <code>--lr</code>.</li>
<li>Seconds count the training steps alone (forward, backward, update). The optimizer step is the median time of
one update. For a network this small it is mostly overhead, not arithmetic.</li>
</ul>"""


def _curves(runs: Sequence[Run]) -> str:
    width = window(runs)
    left, right = graph_objects.Figure(), graph_objects.Figure()
    for run in runs:
        line = LOOKS[run.optimizer].plotly_line | {"width": 2.5}
        steps, losses = curve_points(run, width)
        hover = "step %{x}: %{y:.4f}"
        left.add_scatter(x=steps, y=losses, name=run.label, line=line, mode="lines", hovertemplate=hover)
        percent = [100 * accuracy for accuracy in run.test_accuracies]
        epochs = list(range(1, len(percent) + 1))
        hover = "epoch %{x}: %{y:.1f} %"
        right.add_scatter(x=epochs, y=percent, name=run.label, line=line, mode="lines+markers", hovertemplate=hover)
    low, high = (math.log10(limit) for limit in loss_limits(runs, width))
    ticks = math.ceil((high - low) / 8)
    left.update_yaxes(type="log", title=f"nats{averaged(width)}", range=[low, high], dtick=ticks)
    left.update_xaxes(title="step")
    right.update_yaxes(title="correct (%)", range=[accuracy_floor(runs), 100.5])
    right.update_xaxes(title="epoch")
    cut = f" The accuracy axis starts at {accuracy_floor(runs):.0f} %." if accuracy_floor(runs) else ""
    return f"""<h2>Learning curves</h2>
<p>Hover over a line to read its values. Click a name to hide its line.{cut}</p>
<div class="pair">
<div><h3>Training loss</h3>{_chart(left, "loss", 420, legend=True)}</div>
<div><h3>Test accuracy</h3>{_chart(right, "accuracy", 420, legend=True)}</div>
</div>"""


def _rates(run: Run) -> str:
    charts = []
    limits = [math.log10(limit) for limit in rate_limits(run)]
    for i, (name, records) in enumerate(layers(run.layers).items()):
        steps = [record.step for record in records]
        figure = graph_objects.Figure()
        edge: dict[str, Any] = {"x": steps, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_scatter(y=[record.low for record in records], **edge)
        figure.add_scatter(y=[record.high for record in records], fill="tonexty", fillcolor=BAND + "73", **edge)
        spread = [(record.low, record.high) for record in records]
        hover = "step %{x}<br>median %{y:.2g}<br>middle 80 %: %{customdata[0]:.2g} to %{customdata[1]:.2g}"
        medians = [record.median for record in records]
        line = {"color": MEDIAN, "width": 2.5}
        figure.add_scatter(x=steps, y=medians, customdata=spread, line=line, mode="lines", hovertemplate=hover)
        figure.add_hline(y=run.lr, line={"color": NOMINAL, "dash": "dash", "width": 2})
        figure.update_yaxes(type="log", range=limits, dtick=math.ceil((limits[1] - limits[0]) / 8))
        figure.update_xaxes(title="step")
        title = f"{in_html(name)}: {records[0].elements:,} numbers".replace(",", " ")
        charts.append(f"<div><h3>{title}</h3>{_chart(figure, f'rate{i}', 280)}</div>")
    return f"""<h2>The effective learning rate of each weight</h2>
<p>RMSprop keeps a running mean v of each weight's squared gradient g² and moves the weight by
lr / (√v + eps) · g. The factor <b>lr / (√v + eps)</b> is the <b>effective learning rate</b>. Plain SGD would need
this learning rate, for this one weight, to take the same step. Weights with small gradients get a large one, so all
weights move by about lr.</p>
<ul>
<li>The line is the median weight of a layer, and the band is the middle 80 % of its weights. A wide band shows
adaptation at work: no single learning rate would suit that layer.</li>
<li>The first values are high because v starts at 0 and takes about 1/(1 − alpha) = 100 steps to fill. The early steps
are up to 1/√(1 − alpha) = 10 times lr long. Later the rates rise because the gradients shrink as the network
learns.</li>
<li>The rise is at most 0.5 % per step (a straight line here), the rate at which √v decays without a gradient. Rates
that have risen too far can make the loss jump. The gradients are then large, so v jumps, too, and the rates fall at
the same step. A rate of lr/eps = {run.lr / 1e-8:.0e} belongs to a weight that never had a gradient; it does not
move.</li>
</ul>
<p class="key"><span><i style="border-top: 4px solid {MEDIAN}"></i>median</span>
<span><i style="border-top: 14px solid {BAND}73"></i>middle 80 % of the weights</span>
<span><i style="border-top: 3px dashed {NOMINAL}"></i>lr = {run.lr:g}</span></p>
<div class="grid">{"".join(charts)}</div>"""


def _chart(figure: graph_objects.Figure, name: str, height: int, legend: bool = False) -> str:
    """Return the figure as a division that adapts to the width of the screen and uses the page's plotly.js."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        font={"size": 14},
        showlegend=legend,
        dragmode=False,  # otherwise scrolling by touch would zoom the chart
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"namelength": -1},
    )
    axis = {"automargin": True, "linecolor": "#888", "tickfont": {"size": 13}}
    figure.update_xaxes(**axis)
    figure.update_yaxes(exponentformat="power", **axis)
    config = {"responsive": True, "displayModeBar": False}
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)
    return text


def _facts(dataset: Dataset, settings: Settings) -> str:
    train, test = dataset.y_train.bincount().tolist(), dataset.y_test.bincount().tolist()
    counts = zip(dataset.class_names, train, test, strict=True)
    shape = " × ".join(str(n) for n in dataset.x_train.shape[1:])
    facts = {
        "Source": dataset.source,
        "Rows": f"{len(dataset.y_train)} for training, {len(dataset.y_test)} for testing, split alike in every class",
        "One row": f"{shape} numbers",
        "Features": ", ".join(dataset.feature_names) or "pixels",
        "Classes": "; ".join(f"{name} ({a} + {b} rows)" for name, a, b in counts),
        "Settings": f"seed {settings.seed}, batches of {BATCH} rows, device {settings.device}",
    }
    return "<dl>" + "".join(f"<dt>{key}</dt><dd>{in_html(value)}</dd>" for key, value in facts.items()) + "</dl>"
