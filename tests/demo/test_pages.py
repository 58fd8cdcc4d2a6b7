"""The demo's figures and page: readable figures, and one self-contained page."""

import functools
import io
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from cases import mostly_long
from PIL import Image

from rmsprop.demo.data import Dataset
from rmsprop.demo.figures import (
    accuracy_floor,
    curves,
    effective_lr,
    layers,
    loss_limits,
    rate_limits,
    smooth,
    to_png,
    window,
)
from rmsprop.demo.page import page
from rmsprop.demo.training import OPTIMIZERS, Run, Settings
from rmsprop.diagnose.effective_lr import LayerRecord
from rmsprop.style import LOOKS

HOSTILE = "<script>alert(1)</script>"
SPOILED = '"><img src=x onerror="document.title=\'spoiled\'">'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def dataset(names=("a", "b"), features=("x0", "x1"), source="table.csv"):
    """Return a data set of six training rows and four test rows."""
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    return Dataset(torch.ones(6, 2), y, torch.ones(4, 2), y[:4], names, features, source)


def run(name="rmsprop", steps=80, diverged_at=None):
    """Return a run as the demo records it."""
    made = Run(name, OPTIMIZERS[name].lr, train_loss=0.01, seconds=1.5, step_us=12.3, diverged_at=diverged_at)
    made.losses = [2.3 / (1 + step) for step in range(steps)]
    made.test_losses = [1 / (1 + epoch) for epoch in range(steps // 8)]
    made.test_accuracies = [1 - 0.5 / (1 + epoch) for epoch in range(steps // 8)]
    if name == "rmsprop":
        made.layers = [
            LayerRecord(step, layer, 0.1 * step, 0.05 * step, 0.3 * step, 1234)
            for step in range(1, steps + 1, 4)
            for layer in ("hidden.weight", "hidden.bias", "out.weight", "out.bias")
        ]
    return made


def runs():
    """Return one run of each optimizer."""
    return [run(name) for name in OPTIMIZERS]


class Links(HTMLParser):
    """Collects every address that a browser would fetch, and the tags."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


@functools.cache
def picture():
    """Return the curves as a PNG."""
    return to_png(curves(runs()))


def built(**arguments):
    """Return a page with figures."""
    return page(runs(), dataset(**arguments), Settings(), {"curves": picture()})


def test_page_loads_nothing():
    """The page has no address to fetch, since every figure and script is inside it."""
    text = built()
    links = Links(text)
    assert links.addresses
    assert all(address.startswith("data:image/png;base64,") for address in links.addresses)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style


def test_page_is_for_everyone():
    """The page names its language, adapts to a phone, and shows pictures where there is no JavaScript."""
    text = built()
    tags = Links(text).tags
    assert ("html", {"lang": "en"}) in tags
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags
    assert any(tag == "img" and attrs["alt"] == "curves" for tag, attrs in tags)
    assert text.index("<noscript>") < text.index("<img ") < text.index("</noscript>")


def test_page_explains_its_figures():
    """The page has the table, the uncertainty of the accuracy, and the meaning of the effective learning rate."""
    text = built()
    for part in (
        "<td>SGD + momentum 0.9</td>",
        "<td>12 µs</td>",
        "This is one run from one seed. One of the 4 test rows is worth 25.0 percentage points",
        "Always predicting the most frequent\nclass would be right on 50.0 % of the test rows",
        "effective learning rate</b>",
        "the same 20 epochs",
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
    assert sum(tag == "title" for tag, _ in Links(text).tags) == 1


def test_page_without_rmsprop():
    """Without RMSprop there is no chapter on effective learning rates."""
    text = page([run("adam")], dataset(), Settings(), {})
    assert "One network, 1 optimizer<" in text
    assert "effective learning rate" not in text


def test_page_of_divergence():
    """A run that diverged is said to have done so, even if it is the only one and had no finite loss at all."""
    text = page([run("sgd", 0, diverged_at=1)], dataset(), Settings(), {})
    assert "SGD diverged: the loss was no longer a finite number" in text
    assert "<td>diverged at step 1</td>" in text


def test_figures_are_pictures():
    """Both figures are PNG files of a size for a lecture, and pyplot holds on to neither."""
    for figure in (curves(runs()), effective_lr(run())):
        picture = Image.open(io.BytesIO(to_png(figure)))
        assert picture.format == "PNG"
        assert picture.width >= 1500
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_curves_name_their_axes():
    """The curves have a line with its own color and dash for each optimizer, and units on the axes."""
    left, right = curves(runs()).axes
    assert left.get_yscale() == "log"
    assert left.get_ylabel() == "training loss (nats), mean of 2 steps"
    assert right.get_ylabel() == "correct on the test rows (%)"
    assert [line.get_label() for line in left.lines][:2] == ["SGD, lr 0.5", "SGD + momentum 0.9, lr 0.05"]
    assert set(OPTIMIZERS) <= set(LOOKS)


def test_curves_of_divergence():
    """A run that diverged is drawn as far as it went, and its name says where it ended."""
    left, _ = curves([run("sgd", 5, diverged_at=6), run("adam", 0, diverged_at=1)]).axes
    assert left.lines[0].get_label() == "SGD, lr 0.5, diverged at step 6"
    assert len(left.lines[0].get_xdata()) == 5
    to_png(left.figure)


def test_rates_have_a_panel_each():
    """Each parameter has a panel with its name, its band, its median and the nominal lr, on one common axis."""
    figure = effective_lr(run())
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == [
        f"{name}: 1 234 numbers" for name in ("hidden.weight", "hidden.bias", "out.weight", "out.bias")
    ]
    assert {axes.get_ylim() for axes in shown} == {rate_limits(run())}
    assert list(shown[0].lines[1].get_ydata()) == [0.003, 0.003]
    assert len(shown[0].collections) == 1


def test_infinite_rates_are_left_out():
    """Infinite rates (eps = 0 and no gradient) are gaps in the picture, and do not stretch its axis."""
    made = run()
    made.layers.append(LayerRecord(81, "out.bias", math.inf, 0.1, math.inf, 10))
    assert rate_limits(made) == rate_limits(run())
    to_png(effective_lr(made))
    page([made], dataset(), Settings(), {})


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


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")
@pytest.mark.parametrize("width", [1200, 500])
def test_page_opens_in_a_browser(tmp_path, width):
    """In a browser all charts are drawn, the page is no wider than the screen, and no name from the file is run."""
    path = tmp_path / "index.html"
    probe = "<script>document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth</script>"
    path.write_text(built(names=(SPOILED, HOSTILE), features=(SPOILED,)).replace("</body>", probe + "</body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = "--disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom"
    words = [*flags.split(), *more.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    done = subprocess.run([CHROMIUM, *words, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    drawn = re.findall(r'<div id="(\w+)" class="plotly-graph-div[^"]*js-plotly-plot"', done.stdout)
    assert drawn == ["loss", "accuracy", "rate0", "rate1", "rate2", "rate3"]
    assert done.stdout.count('<path class="js-line"') >= 8 + 4
    assert "<title>RMSprop demo: table.csv</title>" in done.stdout
    assert 'data-wide="false"' in done.stdout
