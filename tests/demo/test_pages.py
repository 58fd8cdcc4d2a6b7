"""The demo's charts and page: readable charts, and one small self-contained page."""

import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from cases import mostly_long
from links import Links
from PIL import Image

from rmsprop.chart import Axis, Chart, picture, short
from rmsprop.demo.data import Dataset
from rmsprop.demo.figures import (
    POINTS,
    accuracy_chart,
    accuracy_floor,
    final_chart,
    layers,
    loss_chart,
    loss_limits,
    rate_charts,
    rate_limits,
    smooth,
    window,
)
from rmsprop.demo.page import page
from rmsprop.demo.training import OPTIMIZERS, Run, Settings, by_optimizer
from rmsprop.diagnose.effective_lr import LayerRecord
from rmsprop.style import COLORS, LOOKS

HOSTILE = "<script>alert(1)</script>"
SPOILED = '"><img src=x onerror="document.title=\'spoiled\'">'


def dataset(names=("a", "b"), features=("x0", "x1"), source="table.csv"):
    """Return a data set of six training rows and four test rows."""
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    return Dataset(torch.ones(6, 2), y, torch.ones(4, 2), y[:4], names, features, source)


def run(name="rmsprop", steps=80, diverged_at=None, seed=0):
    """Return a run as the demo records it; a higher seed is a worse one."""
    made = Run(name, OPTIMIZERS[name].lr, seed, train_loss=0.01, seconds=1.5, step_us=12.3, diverged_at=diverged_at)
    made.losses = [(2.3 + seed**2) / (1 + step) for step in range(steps)]
    made.test_losses = [1 / (1 + epoch) for epoch in range(steps // 8)]
    made.test_accuracies = [1 - (0.5 + 0.1 * seed) / (1 + epoch) for epoch in range(steps // 8)]
    if name == "rmsprop" and seed == 0:
        made.layers = [
            LayerRecord(step, layer, 0.1 * step, 0.05 * step, 0.3 * step, 1234)
            for step in range(1, steps + 1, 4)
            for layer in ("hidden.weight", "hidden.bias", "out.weight", "out.bias")
        ]
    return made


def runs():
    """Return three runs of each optimizer."""
    return [run(name, seed=seed) for name in OPTIMIZERS for seed in range(3)]


def built(**arguments):
    """Return a page with charts."""
    return page(runs(), dataset(**arguments), Settings(seeds=3))


def test_page_loads_nothing():
    """The page has no address to fetch, since every chart and script is inside it."""
    text = built()
    assert Links(text).addresses == []
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style


def test_page_is_for_everyone():
    """The page names its language, adapts to a phone and to dark mode, and its charts are words, too."""
    text = built()
    tags = Links(text).tags
    assert ("html", {"lang": "en"}) in tags
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags
    assert "@media (prefers-color-scheme: dark)" in text
    charts = sum(tag == "svg" and attrs.get("role") == "img" for tag, attrs in tags)
    assert charts == text.count('role="img"') == 3 + 4
    assert text.count("<title>") == 1 + charts


def test_page_is_small():
    """The longest default run makes a page of under 200 kB."""
    many = [run(name, steps=440, seed=seed) for name in OPTIMIZERS for seed in range(3)]
    assert len(page(many, dataset(), Settings(seeds=3)).encode()) < 200_000


def test_page_explains_its_figures():
    """The page has the table, the uncertainty of the accuracy, and the meaning of the effective learning rate."""
    text = built()
    for part in (
        "<td>SGD + momentum 0.9</td>",
        "<td>12 µs</td>",
        "Each entry is the median of 3 seeds, with the lowest and the highest in parentheses.",
        "One of the 4 test rows is worth 25.0 percentage points",
        "the band around it their range",
        "<code>bench/demo_lr.py</code>",
        "seeds 0, 1, 2",
        "Always predicting the most frequent\nclass would be right on 50.0 % of the test rows",
        "effective learning rate</b>",
        "for 20 epochs",
        "a (3 + 2 rows); b (3 + 2 rows)",
    ):
        assert part in text, part


@pytest.mark.parametrize("hostile", mostly_long([HOSTILE, SPOILED, "&amp;", "</title></style>"], lambda i, _: i < 2))
def test_names_are_escaped(hostile):
    """Class, column and file names are text on the page, whatever they hold."""
    from html import escape

    text = built(names=(hostile, "b"), features=(hostile, "y"), source=hostile)
    assert text.count(escape(hostile)) >= 4
    bare = text.replace(escape(hostile), "")
    assert "alert(1)" not in bare
    assert "spoiled" not in bare
    assert [tag for tag, _ in Links(text).tags] == [tag for tag, _ in Links(built()).tags]


def test_page_without_rmsprop():
    """Without RMSprop there is no chapter on effective learning rates, and one seed has no range."""
    text = page([run("adam")], dataset(), Settings())
    assert "One network, 1 optimizer, 1 seed<" in text
    assert "effective learning rate" not in text
    assert "This is one run from one seed." in text
    assert 'class="band' not in text


def test_page_of_divergence():
    """A run that diverged is said to have done so, even if it is the only one and had no finite loss at all."""
    text = page([run("sgd", 0, diverged_at=1)], dataset(), Settings())
    assert "SGD, lr 0.5, diverged at step 1: the loss was no longer a finite number" in text
    assert "<td>diverged at step 1</td>" in text


def lines(chart, kind):
    """Return the paths of a kind in a chart."""
    return [part for part in chart.parts if part.startswith(f'<path class="line {kind}"')]


def test_curves_are_medians_with_ranges():
    """The line is the median of the seeds at each step, and the band reaches from the lowest to the highest."""
    chart = loss_chart(by_optimizer(runs()))
    assert chart.y.log
    assert chart.y.label == "training loss (nats), mean of 2 steps"
    reading = chart.readings[0]
    assert reading["name"] == "SGD"
    assert (reading["low"][0], reading["y"][0], reading["high"][0]) == (2.3, 3.3, 6.3)
    assert len(lines(chart, "sgd")) == 1
    assert sum('class="band sgd"' in part for part in chart.parts) == 1
    accuracy = accuracy_chart(by_optimizer(runs())).readings[0]
    assert (accuracy["low"][0], accuracy["y"][0], accuracy["high"][0]) == (30, 40, 50)
    assert set(OPTIMIZERS) <= set(LOOKS) & set(COLORS)


def test_a_long_run_has_few_points():
    """A line of a long run is thinned out, and keeps its first and its last step."""
    chart = loss_chart(by_optimizer([run(steps=5000)]))
    xs = chart.readings[0]["x"]
    assert len(xs) == POINTS
    assert (xs[0], xs[-1]) == (1, 5000)


def test_a_run_that_diverged_is_drawn_and_said():
    """A run that diverged has a line of its own up to a cross, and is no part of the median."""
    made = [run("sgd", seed=0), run("sgd", 5, diverged_at=6, seed=1), run("adam", 0, diverged_at=1)]
    chart = loss_chart(by_optimizer(made))
    assert len(lines(chart, "sgd")) == 2
    assert lines(chart, "sgd")[1].count("L") == 4
    assert sum("✕" in part for part in chart.parts) == 1
    assert chart.readings[0]["y"][0] == 2.3
    final = final_chart(by_optimizer(made))
    assert any("1 of 2 diverged" in part for part in final.parts)
    assert any(">diverged<" in part for part in final.parts)
    text = page(made, dataset(), Settings(seeds=2))
    assert "SGD, lr 0.5, 1 of 2 diverged at step 6" in text
    assert "A thin line that ends in ✕ is a run that diverged." in text


def test_the_end_of_every_seed_is_a_dot():
    """The last chart has a dot for each seed and a bar at the median of each optimizer."""
    chart = final_chart(by_optimizer(runs()))
    assert sum(part.startswith("<circle") for part in chart.parts) == 12
    assert [words for _, words in chart.y.marks()] == [choice.label for choice in OPTIMIZERS.values()]
    middle, _ = chart.at(100 * (1 - 0.6 / 10), 0)
    assert f"M{middle:.1f} " in lines(chart, "sgd")[0]


def test_rates_have_a_chart_each():
    """Each parameter has a chart with its name, its band, its median and the nominal lr, on one common axis."""
    charts = rate_charts(run())
    assert list(charts) == [
        f"{name}: 1 234 numbers" for name in ("hidden.weight", "hidden.bias", "out.weight", "out.bias")
    ]
    assert {(chart.y.low, chart.y.high) for chart in charts.values()} == {rate_limits(run())}
    for chart in charts.values():
        assert [part.split('"')[1] for part in chart.parts] == ["rule", "line plain", "band plain"]


def test_infinite_rates_are_left_out():
    """Infinite rates (eps = 0 and no gradient) are gaps in the chart, and do not stretch its axis."""
    made = run()
    made.layers.append(LayerRecord(81, "out.bias", math.inf, 0.1, math.inf, 10))
    assert rate_limits(made) == rate_limits(run())
    text = page([made], dataset(), Settings())
    assert "nan" not in text.partition("<script>")[0].lower().replace("nan</", "")  # a cell of the table, not a place
    assert "Infinity" not in text


def test_smooth():
    """The smoothed curve is the mean of the last steps, of fewer at the start."""
    assert smooth([1, 2, 6, 4], 2) == [1, 1.5, 4, 5]
    assert smooth([3, 1], 1) == [3, 1]
    assert smooth([], 5) == []
    assert window([run(steps=80)]) == 2
    assert window([run(steps=8)]) == 1


def test_accuracy_axis():
    """The accuracy axis starts below all but the lowest tenth of the points, and at 0 where there are none."""
    made = run()
    made.test_accuracies = [0.1] + [0.9] * 19
    assert accuracy_floor([made]) == 85
    made.test_accuracies = [0.02]
    assert accuracy_floor([made]) == 0
    assert accuracy_floor([run("sgd", 0)]) == 0


def test_loss_axis():
    """The loss axis ends at thrice the highest start, however far a run blows up, and never holds a zero."""
    good, bad = run("sgd"), run("adam", 3, diverged_at=4)
    bad.losses = [2.0, 1e9, 1e30]
    assert loss_limits([good, bad], 1) == pytest.approx((2.3 / 80 / 1.5, 3 * 2.3))
    good.losses = [1.0, 0.0]
    low, high = loss_limits([good], 1)
    assert 0 < low < high
    assert loss_limits([run("sgd", 0)], 1) == (pytest.approx(0.2), 3)


def test_layers_keep_their_order():
    """Records are sorted by parameter, in the order of the network."""
    assert list(layers(run().layers)) == ["hidden.weight", "hidden.bias", "out.weight", "out.bias"]


def test_ticks():
    """Ticks are round numbers inside the range: powers of ten on a wide log axis, 1, 2, 3, 5 on a short one."""
    assert [value for value, _ in Axis(0, 440, count=5).marks()] == [0, 100, 200, 300, 400]
    assert [words for _, words in Axis(-0.15, 0.3, count=4).marks()] == ["0", "0.2"]
    assert [words for _, words in Axis(1e-6, 20, log=True).marks()] == ["10⁻⁶", "10⁻⁴", "0.01", "1"]
    assert [value for value, _ in Axis(1.5, 6, log=True).marks()] == [2, 3, 5]
    assert [value for value, _ in Axis(0, 1, ticks=[(0.5, "half"), (2, "two")]).marks()] == [0.5]
    assert [short(x) for x in (0.5, -2.0, 1e-5, 3e6, 0)] == ["0.5", "−2", "10⁻⁵", "3·10⁶", "0"]


def test_points_that_cannot_be_shown_are_gaps():
    """NaN, infinity, and zero on a logarithmic axis interrupt a line instead of stretching it."""
    chart = Chart(Axis(0, 4), Axis(0.1, 10, log=True), "a line")
    chart.line([0, 1, 2, 3, 4], [1, 0, math.nan, 2, 3], "sgd", name="loss")
    assert re.sub(r"[\d. ]", "", re.search(r'd="([^"]*)"', chart.parts[0]).group(1)) == "MhMhL"
    assert chart.readings[0]["y"] == [1, 0, None, 2, 3]


def test_a_lone_point_is_seen(browser, tmp_path):
    """A line of one point, such as the accuracy of a single epoch, is a dot as wide as the line."""
    chart = Chart(Axis(0, 2), Axis(0, 2), "a point", size=(100, 100), edges=(0, 0, 0, 0))
    chart.line([1], [1], "sgd", width=20)
    path, shot = tmp_path / "point.svg", tmp_path / "point.png"
    path.write_text(picture([chart]), encoding="utf-8")
    with browser.new_context(viewport={"width": 400, "height": 400}) as context:
        opened = context.new_page()
        opened.goto(path.as_uri())
        opened.screenshot(path=shot)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    color = [int(COLORS["sgd"][0][i : i + 2], 16) for i in (1, 3, 5)]
    assert 250 < (pixels == color).all(axis=1).sum() < 380  # a disk of diameter 20 has 314


@pytest.mark.parametrize("hostile", [HOSTILE, SPOILED])
def test_a_picture_stands_alone(hostile):
    """A file of charts is well-formed SVG with its own colors for light and dark, and its words are text."""
    chart = Chart(Axis(0, 1, hostile), Axis(0, 1, hostile), hostile)
    chart.text(0.5, 0.5, hostile)
    svg = picture([chart, chart, chart], columns=2)
    root = ElementTree.fromstring(svg)
    assert (root.get("width"), root.get("height")) == ("920", "600")
    assert root[0].text == hostile
    assert "prefers-color-scheme: dark" in root[1].text
    assert not [e for e in root.iter() if e.tag.endswith(("script", "image", "img"))]


def test_colors_are_legible():
    """Text and lines have a contrast of 4.5 with the paper, light and dark; bars and grids need none."""

    def _luminance(color):
        digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for side in (0, 1):
        paper = _luminance(COLORS["paper"][side])
        for name in set(COLORS) - {"paper", "card", "rule", "grid"}:
            high, low = sorted((_luminance(COLORS[name][side]), paper), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, side)


@pytest.mark.parametrize("width", [1400, 390])
def test_page_opens_in_a_browser(browser, tmp_path, width):
    """A browser reads a chart out under the pointer, hides lines by a click, and runs no name from the file; the page
    is no wider than the screen."""
    path = tmp_path / "index.html"
    path.write_text(built(names=(SPOILED, HOSTILE), features=(SPOILED,)))
    with browser.new_context(offline=True, viewport={"width": width, "height": 900}) as context:
        opened = context.new_page()
        opened.goto(path.as_uri())
        figure = opened.locator("figure[data-lines]").first
        figure.locator("svg").first.hover()
        said = figure.locator(".reading").text_content()
        assert re.fullmatch(r"step \d+: SGD [\d.]+ \([\d.]+–[\d.]+\), .*Adam [\d.]+ \([\d.]+–[\d.]+\)", said)
        opened.locator("button[data-kind=sgd]").first.click()
        assert figure.locator(".line.sgd").evaluate("e => getComputedStyle(e).display") == "none"
        assert figure.locator(".line.adam").evaluate("e => getComputedStyle(e).display") == "inline"
        assert opened.title() == "RMSprop demo: table.csv"
        assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_what_a_page_reads_out_is_json():
    """The record of a chart is JSON without infinities."""
    chart = Chart(Axis(0, 1, "</script>"), Axis(0, 1), "")
    chart.line([0, 1], [math.inf, 0.123456], "sgd", name="</script>")
    record = json.loads(chart.data())
    assert record["lines"][0]["y"] == [None, 0.1235]
    assert record["lines"][0]["name"] == "</script>"
