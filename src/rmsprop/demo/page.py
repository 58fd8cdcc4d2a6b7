"""One self-contained HTML page with a demo's table, curves, and effective learning rates.

Every string from the user's file or command is escaped, since a column may be named <script>.
"""

import math
from collections.abc import Sequence

from rmsprop import chart
from rmsprop.chart import Chart
from rmsprop.demo.data import Dataset
from rmsprop.demo.figures import (
    Groups,
    accuracy_chart,
    accuracy_floor,
    final_chart,
    label,
    loss_chart,
    rate_charts,
)
from rmsprop.demo.training import BATCH, HEADINGS, Run, Settings, by_optimizer, cells
from rmsprop.printing import in_html
from rmsprop.style import CSS, LOOKS

DEMO_CSS = """
html { overflow-y: scroll; }
body { max-width: 72rem; }
h2 { font-size: 1.35rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1.05rem; margin: .8rem 0 .2rem; }
code { padding: .1em .3em; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem 2rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: .5rem 1.5rem; }
.pair > *, .grid > * { min-width: 0; }
figure { margin: 0; position: relative; }
figure svg { width: 100%; height: auto; display: block; }
.reading { font-size: .85rem; color: var(--soft); margin: 0; min-height: 1.5em; font-variant-numeric: tabular-nums; }
.guide { position: absolute; top: 0; width: 1px; background: var(--soft); pointer-events: none; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none; max-width: none; }
.key button { font: inherit; color: var(--ink); background: none; border: 0; padding: .2rem; cursor: pointer; }
.key button[aria-pressed="false"] { text-decoration: line-through; color: var(--soft); }
.key svg { width: 2.4rem; height: .8rem; margin-right: .4rem; vertical-align: middle; }
.hide-sgd figure .sgd, .hide-momentum figure .momentum, .hide-rmsprop figure .rmsprop, .hide-adam figure .adam {
  display: none; }
dd { overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  th, td { padding: .35rem .3rem; font-size: .8rem; white-space: normal; }
  .chart { font-size: 15px; }
}
"""

# Reads out the lines under the pointer, and hides lines whose name is clicked. Without it, the charts stand as drawn.
SCRIPT = """
const few = (v) => Math.abs(v) < 1e-3 && v ? v.toExponential(1) : String(Number(v.toPrecision(3)));
const short = (v) => v === null ? "none" : few(v);
for (const figure of document.querySelectorAll("figure[data-lines]")) {
  const data = JSON.parse(figure.dataset.lines), said = figure.querySelector(".reading");
  const picture = figure.querySelector("svg"), guide = figure.appendChild(document.createElement("div"));
  Object.assign(guide, { className: "guide", hidden: true });
  figure.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect(), [left, right] = data.panel;
    const share = ((event.clientX - box.left) / box.width - left) / (right - left);
    if (share < 0 || share > 1) return;
    const at = data.x[0] + share * (data.x[1] - data.x[0]), words = [];
    let place = at;
    for (const line of data.lines) {
      if (document.body.classList.contains("hide-" + line.kind)) continue;
      let i = 0;
      line.x.forEach((x, k) => { if (Math.abs(x - at) < Math.abs(line.x[i] - at)) i = k; });
      place = line.x[i];
      const range = line.low ? ` (${short(line.low[i])}–${short(line.high[i])})` : "";
      words.push(`${line.name} ${short(line.y[i])}${range}`);
    }
    said.textContent = `${data.label} ${Math.round(place)}: ${words.join(", ")}`;
    guide.hidden = false;
    guide.style.left = `${(left + (place - data.x[0]) / (data.x[1] - data.x[0]) * (right - left)) * box.width}px`;
    guide.style.height = `${box.height}px`;
  });
  figure.addEventListener("pointerleave", () => { guide.hidden = true; said.textContent = ""; });
}
for (const button of document.querySelectorAll(".key button"))
  button.addEventListener("click", () => {
    const hidden = document.body.classList.toggle("hide-" + button.dataset.kind);
    button.setAttribute("aria-pressed", String(!hidden));
  });
"""


def page(runs: Sequence[Run], dataset: Dataset, settings: Settings) -> str:
    """Return the whole page as text."""
    groups, seeds = by_optimizer(runs), settings.seeds
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>RMSprop demo: {in_html(dataset.source)}</title>
<style>{CSS}{chart.CSS}{DEMO_CSS}</style>
</head>
<body>
<h1>One network, {len(groups)} optimizer{"s" * (len(groups) > 1)}, {seeds} seed{"s" * (seeds > 1)}</h1>
<p>A small {"convolutional network" if dataset.is_image else "perceptron"} trains on
{in_html(dataset.source)} once with each optimizer{" and seed" * (seeds > 1)}, for {settings.epochs} epochs. From one
seed, all optimizers start with the same weights and see the same batches in the same order. The test rows are the
same for all.</p>
<h2>Results</h2>
{_table(groups)}
{_reading(groups, dataset, settings)}
{_curves(groups, settings)}
{"".join(_rates(run) for run in runs if run.layers)}
<h2>Data and settings</h2>
{_facts(dataset, settings)}
<script>{SCRIPT}</script>
</body>
</html>
"""


def _table(groups: Groups) -> str:
    head = "".join(f"<th>{in_html(name)}</th>" for name in HEADINGS)
    body = "".join(
        "<tr>" + "".join(f"<td>{in_html(cell)}</td>" for cell in cells(each)) + "</tr>" for each in groups.values()
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _reading(groups: Groups, dataset: Dataset, settings: Settings) -> str:
    rows = len(dataset.y_test)
    share = int(dataset.y_test.bincount().max()) / rows
    runs = [run for each in groups.values() for run in each]
    best = max((run.test_accuracies[-1] for run in runs if run.diverged_at is None), default=share)
    error = 100 * math.sqrt(best * (1 - best) / rows)
    one = 100 / rows
    ended = "".join(
        f"<li>{in_html(label(each))}: the loss was no longer a finite number, so training stopped there. A smaller "
        "learning rate usually helps.</li>"
        for each in groups.values()
        if any(run.diverged_at is not None for run in each)
    )
    runs_of = (
        f"Each entry is the median of {settings.seeds} seeds, with the lowest and the highest in parentheses. Where "
        "the ranges of two optimizers overlap, these runs do not rank them."
        if settings.seeds > 1
        else "This is one run from one seed. Another <code>--seed</code> may reverse small differences."
    )
    return f"""<ul>
{ended}
<li>{runs_of} One of the {rows} test rows is worth {one:.1f} percentage points, and the random choice of test rows
alone moves an accuracy by about ±{max(error, one):.1f} points.</li>
<li>Losses are mean cross-entropies in nats. A perfect network has 0, and guessing evenly among the
{len(dataset.class_names)} classes has {math.log(len(dataset.class_names)):.2f}. Always predicting the most frequent
class would be right on {100 * share:.1f} % of the test rows.</li>
<li>Each optimizer's default learning rate is the best of its own search: the lowest mean validation loss on the
digits, over five seeds and a grid whose ends are worse. <code>bench/demo_lr.py</code> in the repository repeats the
search. On other data any of them may be a poor choice; try other values with <code>--lr</code>.</li>
<li>Seconds count the training steps of one run alone (forward, backward, update). The optimizer step is the median
time of one update. For a network this small it is mostly overhead, not arithmetic.</li>
</ul>"""


def _curves(groups: Groups, settings: Settings) -> str:
    runs = [run for each in groups.values() for run in each]
    floor = accuracy_floor(runs)
    cut = f" The accuracy axis starts at {floor:.0f} %." if floor else ""
    band = "A line is the median of the seeds, and the band around it their range." if settings.seeds > 1 else ""
    lost = any(run.diverged_at is not None for run in runs)
    cross = " A thin line that ends in ✕ is a run that diverged." if lost else ""
    key = "".join(
        f'<li><button data-kind="{name}" aria-pressed="true"><svg viewBox="0 0 40 10" class="{name}" '
        f'aria-hidden="true"><path d="M1 5H39" stroke="currentColor" stroke-width="3" '
        f'stroke-dasharray="{LOOKS[name].dash[1]}"/></svg>{in_html(label(each))}</button></li>'
        for name, each in groups.items()
    )
    return f"""<h2>Learning curves</h2>
<p>{band}{cross} Point at a chart to read its values. Click a name to hide its lines.{cut}</p>
<ul class="key">{key}</ul>
<div class="pair">
<div><h3>Training loss</h3>{_figure(loss_chart(groups))}</div>
<div><h3>Test accuracy</h3>{_figure(accuracy_chart(groups))}</div>
<div><h3>Test accuracy at the end, seed by seed</h3>{_figure(final_chart(groups))}</div>
</div>"""


def _rates(run: Run) -> str:
    charts = "".join(
        f"<div><h3>{in_html(name)}</h3>{_figure(drawn)}</div>" for name, drawn in rate_charts(run).items()
    )
    return f"""<h2>The effective learning rate of each weight</h2>
<p>RMSprop keeps a running mean v of each weight's squared gradient g² and moves the weight by
lr / (√v + eps) · g. The factor <b>lr / (√v + eps)</b> is the <b>effective learning rate</b>. Plain SGD would need
this learning rate, for this one weight, to take the same step. Weights with small gradients get a large one, so all
weights move by about lr. The charts show the run of seed {run.seed}.</p>
<ul>
<li>The line is the median weight of a layer, and the band is the middle 80 % of its weights. The dashed line is
lr = {run.lr:g}. A wide band shows adaptation at work: no single learning rate would suit that layer.</li>
<li>The first values are high because v starts at 0 and takes about 1/(1 − alpha) = 100 steps to fill. The early steps
are up to 1/√(1 − alpha) = 10 times lr long. Later the rates rise because the gradients shrink as the network
learns.</li>
<li>The rise is at most 0.5 % per step (a straight line here), the rate at which √v decays without a gradient. Rates
that have risen too far can make the loss jump. The gradients are then large, so v jumps, too, and the rates fall at
the same step. A rate of lr/eps = {run.lr / 1e-8:.0e} belongs to a weight that never had a gradient; it does not
move.</li>
</ul>
<div class="grid">{charts}</div>"""


def _figure(drawn: Chart) -> str:
    """Return a chart with the numbers that the page reads out under the pointer."""
    if not drawn.readings:
        return f"<figure>{drawn.svg()}</figure>"
    return f'<figure data-lines="{in_html(drawn.data())}">{drawn.svg()}<p class="reading"></p></figure>'


def _facts(dataset: Dataset, settings: Settings) -> str:
    train, test = dataset.y_train.bincount().tolist(), dataset.y_test.bincount().tolist()
    counts = zip(dataset.class_names, train, test, strict=True)
    shape = " × ".join(str(n) for n in dataset.x_train.shape[1:])
    seeds = settings.all_seeds
    facts = {
        "Source": dataset.source,
        "Rows": f"{len(dataset.y_train)} for training, {len(dataset.y_test)} for testing, split alike in every class",
        "One row": f"{shape} numbers",
        "Features": ", ".join(dataset.feature_names) or "pixels",
        "Classes": "; ".join(f"{name} ({a} + {b} rows)" for name, a, b in counts),
        "Settings": f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, batches of {BATCH} rows, "
        f"device {settings.device}",
    }
    return "<dl>" + "".join(f"<dt>{key}</dt><dd>{in_html(value)}</dd>" for key, value in facts.items()) + "</dl>"
