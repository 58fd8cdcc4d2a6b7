"""The live page: its arithmetic, every control, and its work alone, by keyboard, on phones and without scripts."""

import csv
import html
import io
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pytest
import torch
from cases import mostly_long
from links import Links
from paths import DOCS

from rmsprop.dialects import DIALECTS
from rmsprop.race.landscapes import LANDSCAPES, RAVINES, Landscape, find_landscape, noise, race, ravine
from rmsprop.race.page import CONTROLS, PANELS, SETTINGS, figure, fragment, live, page, settings_of
from rmsprop.settings import read

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page as `rmsprop race` writes it."""
    landscape = LANDSCAPES["ravine"]
    return page(landscape, race(landscape), tmp_path_factory.mktemp("page") / "live.html")


@pytest.fixture
def visit(browser: Any, written: Path) -> Iterator[Open]:
    """Opens the page with a fragment, without a network. At the end nothing may have failed or been blocked."""
    failures: list[str] = []
    contexts = []

    def _open(settings: str = "", path: Path = written, **options: Any) -> Any:
        context = browser.new_context(offline=True, **{"viewport": {"width": 1400, "height": 900}, **options})
        contexts.append(context)
        opened = context.new_page()
        opened.on("console", lambda message: failures.append(message.text))
        opened.on("pageerror", lambda error: failures.append(str(error)))
        opened.goto(path.as_uri() + ("#" + settings if settings else ""))
        return opened

    yield _open
    for context in contexts:
        context.close()
    assert failures == []


def settings(opened: Any) -> dict[str, Any]:
    return opened.evaluate("live.settings()")


def path_of(opened: Any, way: str = "rmsprop") -> list[float]:
    return opened.evaluate(f"[...live.runs().{way}.xs, ...live.runs().{way}.ys]")


def wait(opened: Any, condition: str) -> None:
    """Wait until an expression is true; the page's policy keeps the browser's driver from doing so in the page."""
    for _ in range(600):
        if opened.evaluate(condition):
            return
        opened.wait_for_timeout(50)
    raise AssertionError(f"{condition} is still false")


def painted(opened: Any) -> str:
    """Return the picture of the contours."""
    return opened.evaluate("document.querySelector('#view canvas').toDataURL()")


def colors(opened: Any) -> int:
    """Return how many colors the contours have."""
    return opened.evaluate(
        """() => { const c = document.querySelector("#view canvas");
        const p = new Uint32Array(c.getContext("2d").getImageData(0, 0, c.width, c.height).data.buffer);
        return new Set(p).size; }"""
    )


def test_page_opens_alone(visit: Open, written: Path) -> None:
    """The page opens from disk without a network, draws its contours and paths, and stays below 200 kB."""
    assert written.stat().st_size <= 200_000
    opened = visit()
    assert opened.title() == "RMSprop, live: ravine"
    assert colors(opened) > 10
    assert opened.locator("#view path.track[data-way]").count() == 4
    assert opened.locator("#results tbody tr").count() == 4
    assert "6,000 settings" in opened.locator("footer").inner_text()
    assert settings(opened)["land"] == "ravine"


def test_page_fetches_nothing(written: Path) -> None:
    """The page names no other address, and its policy forbids to fetch one."""
    text = written.read_text(encoding="utf-8")
    reader = Links(text)
    assert reader.addresses == []
    assert ("html", {"lang": "en"}) in reader.tags
    assert "http:" not in text
    assert "https:" not in text
    assert "default-src 'none'" in text
    assert 'name="viewport"' in text


def test_page_without_scripts_shows_the_race(visit: Open) -> None:
    """Without scripts, the page shows contours, paths and the results of the race."""
    opened = visit(java_script_enabled=False)
    assert opened.locator("noscript svg path").count() >= 5
    words = opened.locator("noscript table").inner_text()
    for name in ("SGD momentum", "Adam", "RMSprop", "step 32", "never"):
        assert name in words
    assert not opened.locator("#app").is_visible()


# ---- arithmetic ----

_SLOPES = """([name, condition, angle, points]) => { const land = lands.find(name, condition, angle), g = [0, 0];
    return points.map(([x, y]) => { land.slope(x, y, g); return [land.f(x, y), ...g]; }); }"""


def autograd(landscape: Landscape, points: np.ndarray) -> np.ndarray:
    """Return the loss and the gradient at each point. Shape: (n, 3)."""
    rows = []
    for x, y in points:
        at = torch.tensor([x, y], dtype=torch.float64, requires_grad=True)
        loss = landscape.f(at[0], at[1])
        loss.backward()
        rows.append([loss.item(), *at.grad.tolist()])
    return np.array(rows)


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.long)])
def test_landscapes_have_the_bits_of_autograd(visit: Open, count: int) -> None:
    """The loss and the gradient of every landscape, at every kind of angle, equal torch's bit for bit."""
    opened = visit()
    points = np.random.default_rng(3).normal(size=(count, 2)) * 2
    places = [(name, 0, 0, LANDSCAPES[name]) for name in LANDSCAPES if name not in RAVINES]
    places += [("ravine", k, angle, ravine(k, angle)) for k, angle in ((100, 0), (37.3, 17), (1, 30), (1000, 45))]
    for name, k, angle, landscape in places:
        found = np.array(opened.evaluate(_SLOPES, [name, k, angle, points.tolist()]))
        assert (found.view(np.int64) == autograd(landscape, points).view(np.int64)).all(), name


@pytest.mark.long
def test_noise_is_pythons(visit: Open) -> None:
    """The noise of any seed and step equals Python's bit for bit."""
    opened = visit()
    for seed in (0, 1, 4_000_000_000):
        found = opened.evaluate("seed => [1, 2, 3, 500].map(t => lands.noise(seed, t))", seed)
        assert found == noise(seed, 500)[[0, 1, 2, 499]].tolist()


@pytest.mark.parametrize("name", mostly_long(LANDSCAPES, lambda k, _: k == 1))
def test_paths_are_the_librarys(visit: Open, name: str, tmp_path: Path) -> None:
    """The page opens at the race; RMSprop's path in it has the bits of rmsprop.RMSprop's, and others are close."""
    landscape = find_landscape(name, 50) if name in RAVINES else LANDSCAPES[name]
    runs = race(landscape, ["sgd", "momentum", "adam", "rmsprop", "rmsprop-textbook"], steps=90, seed=3)
    opened = visit(path=page(landscape, runs, tmp_path / "race.html", seed=3))
    for run in runs:
        way = "second" if run.name == "rmsprop-textbook" else run.name
        found = np.array(path_of(opened, way)).reshape(2, -1).T
        if way in ("rmsprop", "second"):
            assert (found == run.points).all(), way
        else:
            np.testing.assert_allclose(found, run.points, rtol=1e-6, atol=1e-9)
        assert opened.evaluate(f"live.runs().{way}.targetAt") == run.target_at


# ---- controls ----

CHANGES: dict[str, tuple[str, Any, Any]] = {  # control: (setting, how, its new value)
    "land": ("land", "beale", "beale"),
    "condition": ("condition", "500", 500),
    "angle": ("angle", "20", 20),
    "steps": ("steps", "150", 150),
    "seed": ("seed", "7", 7),
    "lr": ("lr", "0.05", 0.05),
    "memory": ("memory", "100", 100),
    "eps": ("eps", "0.5", 0.5),
    "momentum": ("momentum", "0.5", 0.5),
    "mode": ("mode", "inside", "inside"),
    "init": ("init", "1", 1),
    "bias": ("bias", True, True),
    "centered": ("centered", True, True),
    "first": ("first", "keras3", "keras3"),
    "other": ("other", "tensorflow1", "tensorflow1"),
}
_BESIDE = {"mode": "eps=0.5", "first": "eps=0.5", "seed": "land=noisy-ravine"}


def test_every_control_is_changed() -> None:
    """Each control of the page has a row above; Nesterov and the place of lr have a test of their own below."""
    assert {*CHANGES, "nesterov", "buffer"} - {"first", "other"} == {*CONTROLS} - {"frameworks"}


@pytest.mark.long
@pytest.mark.parametrize("name", CHANGES)
def test_each_control_moves_its_setting(visit: Open, name: str) -> None:
    """A control changes the setting that it names, the path, and the fragment of the address."""
    opened = visit(_BESIDE.get(name, ""))
    setting, how, value = CHANGES[name]
    before = path_of(opened)
    control = opened.locator(f"#{name}")
    if how is True:
        control.check()
    elif control.evaluate("e => e.tagName") == "SELECT":
        control.select_option(how)
    else:
        control.fill(how)
        control.press("Enter")
    assert settings(opened)[setting] == value
    assert name == "other" or path_of(opened) != before
    wait(opened, f"location.hash.includes('{setting}=')")
    assert colors(opened) > 10


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("mode=inside&eps=0.01", ""),
        ("first=textbook&bias=1", ""),
        ("first=textbook&eps=0.01", "textbook"),
        ("first=tensorflow1&mode=inside&init=1&buffer=1", "tensorflow1"),
        ("mode=outside&eps=0.01", "torch"),
    ],
)
def test_switches_of_the_address_stay(visit: Open, text: str, first: str) -> None:
    """Switches that differ from a framework's own are no framework's, so that ε and momentum can move beside them."""
    opened = visit(text)
    switches = [settings(opened)[name] for name in ("mode", "init", "bias", "centered", "nesterov", "buffer")]
    assert settings(opened)["first"] == first
    opened.fill("#eps", "0.02")
    opened.locator("#eps").press("Enter")
    opened.fill("#momentum", "0.5")
    opened.locator("#momentum").press("Enter")
    assert settings(opened)["eps"] == 0.02
    assert [settings(opened)[name] for name in ("mode", "init", "bias", "centered", "nesterov", "buffer")] == switches


@pytest.mark.long
@pytest.mark.parametrize("name", ["condition", "angle", "steps", "lr", "memory", "eps", "momentum"])
def test_each_slider_moves_its_number(visit: Open, name: str) -> None:
    """A slider changes the number beside it, by keyboard as well."""
    opened = visit()
    before = opened.input_value(f"#{name}")
    slider = opened.locator(f'[data-for="{name}"]')
    slider.focus()
    for _ in range(12):
        slider.press("ArrowRight")
    assert float(opened.input_value(f"#{name}")) > float(before)


@pytest.mark.long
def test_switches_of_momentum_need_momentum(visit: Open) -> None:
    """Nesterov and the place of lr can be set with momentum alone."""
    opened = visit()
    assert opened.locator("#nesterov").is_disabled()
    for name in ("nesterov", "buffer"):
        opened = visit("momentum=0.5")
        before = path_of(opened)
        opened.locator(f"#{name}").check()
        assert settings(opened)[name] is True
        # lr is constant, so its place changes the last digits alone
        assert path_of(opened) != before
        assert np.allclose(path_of(opened), before) == (name == "buffer")


@pytest.mark.long
def test_rates_and_entrants_can_be_chosen(visit: Open) -> None:
    """The table sets the rate of each optimizer, and hides those that are not wanted."""
    opened = visit()
    opened.locator('[data-rate="lr_sgd"]').fill("0.001")
    opened.locator('[data-rate="lr_sgd"]').press("Enter")
    assert settings(opened)["lr_sgd"] == 0.001
    opened.locator('[data-show="adam"]').uncheck()
    assert settings(opened)["hidden"] == "adam"
    assert opened.locator('#view path[data-way="adam"]').count() == 0


@pytest.mark.long
@pytest.mark.parametrize("typed", ["", "-1", "1e99"])
def test_invalid_numbers_are_put_back(visit: Open, typed: str) -> None:
    """A number that a control does not take leaves the setting, and its field shows the setting again."""
    opened = visit()
    for name in ("lr", "memory", "momentum"):
        opened.fill(f"#{name}", typed)
        opened.locator(f"#{name}").press("Tab")
    assert settings(opened)["memory"] == 10
    assert float(opened.input_value("#memory")) == 10
    assert path_of(opened) == path_of(visit())


# ---- moving ----


@pytest.mark.long
@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_play_moves_and_contours_stay(visit: Open, motion: str) -> None:
    """Play moves the step to the end, and the contours stay as they are, then and under the slider."""
    opened = visit("t=97", reduced_motion=motion)
    before = painted(opened)
    opened.click("#go")
    wait(opened, "live.settings().t === 100")
    assert opened.inner_text("#go") == "▶ Play"
    assert painted(opened) == before
    opened.locator("#time").fill("30")
    assert settings(opened)["t"] == 30
    assert "step 30 of 100" in opened.inner_text("#clock")
    assert painted(opened) == before
    assert colors(opened) > 10


@pytest.mark.long
def test_start_can_be_dragged(visit: Open) -> None:
    """Dragging the start recomputes all paths on the way; the view stays."""
    opened = visit()
    handle = opened.locator("#start").bounding_box()
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    before = painted(opened)
    opened.mouse.move(x, y)
    opened.mouse.down()
    seen = []
    for k in range(1, 6):
        opened.mouse.move(x + 20 * k, y + 10 * k)
        seen.append(path_of(opened)[0])
    opened.mouse.up()
    unit = opened.evaluate("live.view.unit")
    assert seen == sorted(set(seen))
    assert settings(opened)["x"] == pytest.approx(-4 + 100 / unit, abs=2 / unit)
    assert settings(opened)["y"] == pytest.approx(1 - 50 / unit, abs=2 / unit)
    assert painted(opened) == before


@pytest.mark.long
def test_page_works_by_keyboard(visit: Open) -> None:
    """Arrows step, Home and End jump, space plays, and arrows on the start move it; in a field they do neither."""
    opened = visit("t=10")
    for key, t in (("ArrowRight", 11), ("ArrowLeft", 10), ("End", 100), ("Home", 0)):
        opened.keyboard.press(key)
        assert settings(opened)["t"] == t
    opened.keyboard.press(" ")
    wait(opened, "live.settings().t > 2")
    opened.keyboard.press(" ")
    assert opened.inner_text("#go") == "▶ Play"
    opened.focus("#start")
    t = settings(opened)["t"]
    opened.keyboard.press("ArrowUp")
    opened.keyboard.press("ArrowUp")
    assert settings(opened)["y"] > 1
    assert settings(opened)["t"] == t
    assert opened.evaluate("document.activeElement.id") == "start"
    opened.focus("#lr")
    opened.keyboard.press("ArrowRight")
    assert settings(opened)["t"] == t


@pytest.mark.long
def test_lines_show_the_numbers_of_the_step(visit: Open) -> None:
    """The nine lines carry their numbers, and the values of the equation at the step."""
    opened = visit("lr=0.1&t=1")
    rows = opened.locator("#lines tr").all_inner_texts()
    assert [re.match(r"\[(\d)\]", row)[1] for row in rows[1:]] == list("123456789")
    assert "0.1·(−4)² = 1.6" in rows[2]
    assert "0.1·100² = 1000" in rows[2]
    assert "−3.6838" in rows[9]
    opened.keyboard.press("ArrowRight")
    assert "step 2" in opened.inner_text("#lines")


@pytest.mark.long
def test_bars_are_on_one_log_scale(visit: Open) -> None:
    """The bars' lengths are the logarithms of |g|, √v, rate and step of both weights."""
    opened = visit("t=5")
    seen = opened.evaluate("live.lines()[5]")
    lr = opened.evaluate("live.entrant('rmsprop').hyper.lr")
    width = {
        bar.get_attribute("data-bar"): float(bar.get_attribute("width"))
        for bar in opened.locator("[data-bar]").element_handles()
    }
    values = {}
    for i in (0, 1):
        own = (abs(seen["g"][i]), math.sqrt(seen["v"][i]), lr / seen["d"][i], abs(seen["moved"][i]))
        values |= {f"{row}{i}": math.log10(value) for row, value in enumerate(own)}
    slope, least = np.polyfit([values[k] for k in width], [width[k] for k in width], 1)
    assert slope > 0
    assert max(abs(width[k] - slope * values[k] - least) for k in width) < 0.01


@pytest.mark.long
def test_kick_lifts_v_and_shows_the_weight_stuck(visit: Open) -> None:
    """The button multiplies one gradient by 30, which lifts √v to 30/√10 of it, and takes it back."""
    opened = visit("t=9")
    before = path_of(opened)
    calm = opened.evaluate("live.lines()[10]")
    opened.click("#kick")
    hit = opened.evaluate("live.lines()[10]")
    assert hit["g"] == pytest.approx([30 * g for g in calm["g"]])
    assert hit["v"][0] == pytest.approx(0.9 * calm["old"][0] + 0.1 * 900 * calm["g"][0] ** 2)
    assert re.search(r"falls to 1/\d", opened.inner_text("#phase-note"))
    opened.click("#kick")
    assert path_of(opened) == before


@pytest.mark.long
def test_map_goes_where_it_is_clicked(visit: Open) -> None:
    """The map has the end of a run for each rate and memory, and a click goes there."""
    opened = visit()
    opened.wait_for_selector("#map .cell")
    assert opened.locator("#map .cell").count() == 29 * 13
    for kind in ("arrived", "hovers", "short", "diverged"):
        assert opened.locator(f"#map .cell.{kind}").count() > 0
    opened.locator('#map [data-cell="131"]').click()
    assert (settings(opened)["lr"], settings(opened)["memory"]) == (0.14, 10)
    title = opened.locator('#map [data-cell="131"] title').text_content()
    losses, target = opened.evaluate("[[...live.runs().rmsprop.losses], data.target * live.runs().rmsprop.losses[0]]")
    assert ("ends below the target" in title) == (losses[-1] < target)
    assert opened.locator("#here").count() == 1


@pytest.mark.long
def test_curve_over_the_angle_is_that_of_its_runs(visit: Open) -> None:
    """The curve has the first step below the target at each angle, and the angle costs RMSprop the target."""
    opened = visit("angle=10")
    opened.wait_for_selector("#turn svg")
    words = opened.inner_text("#turn-note")
    assert "reaches the target at step 32" in words
    assert "never reaches the target" in words
    visit("angle=45").wait_for_selector("#turn svg")
    assert opened.evaluate("live.set({ angle: 45 }), live.runs().rmsprop.targetAt") is None
    assert visit("land=saddle").locator("#turn svg").count() == 0


def middle(opened: Any) -> list[float]:
    """Return the point in the middle of the view."""
    return opened.evaluate("(({ x0, y0, w, h, unit }) => [x0 + w / unit / 2, y0 + h / unit / 2])(live.view)")


def middle_of(landscape: Landscape) -> list[float]:
    """Return the point in the middle of a landscape's window."""
    left, right, low, high = landscape.window
    return [(left + right) / 2, (low + high) / 2]


@pytest.mark.long
def test_far_starts_and_paths_that_leave_are_seen(visit: Open) -> None:
    """A far start is in view with the other side of the minimum; paths that leave the view are marked."""
    opened = visit("x=1000&y=1000")
    box, view = opened.locator("#start").bounding_box(), opened.locator("#view").bounding_box()
    assert view["x"] < box["x"] + box["width"] / 2 < view["x"] + view["width"]
    assert view["y"] < box["y"] + box["height"] / 2 < view["y"] + view["height"]
    saddle = find_landscape("saddle").starting_at(0, -3)
    assert middle(visit("land=saddle&x=0&y=-3")) == pytest.approx(middle_of(saddle))
    opened = visit("lr_sgd=0.0203")
    assert opened.locator("#view .out.sgd").count() >= 1
    opened = visit("lr_sgd=1")
    assert opened.locator("#loss .out.sgd").count() >= 1
    assert "diverged" in opened.inner_text("#results")


@pytest.mark.long
def test_both_axes_have_the_same_scale(visit: Open) -> None:
    """A ravine at 45 degrees is drawn at 45 degrees: one unit is as many pixels along both axes."""
    opened = visit("angle=45")
    unit = opened.evaluate("live.view.unit")
    spots = []
    for x, y in ((-3, -3), (-1, -1)):
        opened.evaluate(f"live.set({{ x: {x}, y: {y} }})")
        spots.append([float(n) for n in re.findall(r"-?[\d.]+", opened.get_attribute("#start", "transform"))])
    (left, below), (right, above) = spots
    assert right - left == pytest.approx(2 * unit)
    assert below - above == pytest.approx(2 * unit)


# ---- frameworks, code, links, files ----


@pytest.mark.long
def test_code_makes_these_steps(visit: Open) -> None:
    """The code constructs an RMSprop of the rule and the numbers that the page runs, in every dialect."""
    opened = visit()
    for name, extra in itertools.product(DIALECTS, ("", "&momentum=0.9")):
        opened.evaluate("settings => live.open(settings)", f"first={name}&eps=1e-6{extra}")
        scope: dict[str, Any] = {"params": [torch.nn.Parameter(torch.zeros(2))]}
        exec(opened.evaluate("live.code()"), scope)
        rule, hyper = read(scope["optimizer"].param_groups[0])
        entry = opened.evaluate("live.entrant('rmsprop')")
        idle = () if hyper.momentum else ("lr_in_buffer", "nesterov")
        assert {key: getattr(rule, key) for key in entry["rule"] if key not in idle} == {
            key: value for key, value in entry["rule"].items() if key not in idle
        }, name
        assert {key: getattr(hyper, key) for key in entry["hyper"]} == entry["hyper"], name


@pytest.mark.long
def test_own_switches_are_in_the_code(visit: Open) -> None:
    """Switches that are set one by one are arguments of the code."""
    opened = visit("momentum=0.9&mode=both&init=1&bias=1&centered=1&nesterov=1&buffer=1")
    opened.evaluate("live.set({ mode: 'floor' })")
    scope = {"params": [torch.nn.Parameter(torch.zeros(2))]}
    exec(opened.evaluate("live.code()"), scope)
    rule, _ = read(scope["optimizer"].param_groups[0])
    entry = opened.evaluate("live.entrant('rmsprop')")
    assert {key: getattr(rule, key) for key in entry["rule"]} == entry["rule"]
    assert rule.eps_mode == "floor"


@pytest.mark.long
def test_two_frameworks_part(visit: Open) -> None:
    """The same numbers under two frameworks: what differs, and the step at which the paths part."""
    opened = visit("other=tensorflow1&eps=0.01")
    words = opened.inner_text("#parting")
    assert "the place of ε" in words
    assert "the start of v" in words
    step = int(re.search(r"part at step (\d+)", words)[1])
    one, two = (np.array(path_of(opened, way)).reshape(2, -1) for way in ("rmsprop", "second"))
    apart = np.hypot(*(one - two)) / math.hypot(4, 1)
    assert apart[step] > 0.01 >= apart[:step].max()
    assert opened.locator("#results tbody tr").count() == 5
    assert "do not part" in visit("other=mlx").inner_text("#parting")


@pytest.mark.long
def test_permalink_brings_everything_back(visit: Open) -> None:
    """The fragment of any settings opens the same page again."""
    full = (
        "land=noisy-ravine&condition=30&angle=12&x=-2.5&y=1.5&seed=5&steps=80&t=33&lr=0.07&memory=25&eps=0.001"
        "&momentum=0.5&mode=floor&init=1&bias=1&centered=1&nesterov=1&buffer=1&first=&other=keras2&lr2=0.06&eps2=0.002"
        "&lr_sgd=0.01&lr_momentum=0.002&lr_adam=0.2&hidden=adam&kick=20"
    )
    opened = visit(full)
    again = visit(opened.evaluate("live.fragment()"))
    assert settings(again) == settings(opened)
    assert path_of(again) == path_of(opened)
    assert settings(opened) | {"mode": "floor", "kick": 20, "t": 33, "seed": 5, "buffer": True} == settings(opened)
    assert {*re.findall(r"(\w+)=", full)} | {"theme"} == set(SETTINGS)


@pytest.mark.long
@pytest.mark.parametrize(
    "text",
    [
        *("lr=-1&memory=0&angle=99&land=nowhere&steps=1e9", "x=nan&y=1&mode=under&first=none&t=-5", "%%%&=&&lr"),
        *("land=toString", "land=__proto__", "first=constructor&other=valueOf"),
    ],
)
def test_unusable_fragments_are_left_out(visit: Open, text: str) -> None:
    """A fragment with unusable values opens the page with defaults in their place."""
    opened = visit(text)
    assert settings(opened)["land"] == "ravine"
    assert settings(opened)["first"] == "torch"
    assert settings(opened)["other"] == ""
    assert np.isfinite(path_of(opened)).all()
    assert colors(opened) > 10


@pytest.mark.parametrize("condition", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_tilted_ravine_has_its_own_rates(visit: Open, condition: int) -> None:
    """The address of the tilted ravine opens its race, at the rates that it suggests for any condition number."""
    opened = visit(f"land=tilted-ravine&condition={condition}")
    for run in race(find_landscape("tilted-ravine", condition)):
        assert opened.evaluate(f"live.entrant('{run.name}').hyper.lr") == pytest.approx(run.lr)
    assert settings(visit("land=tilted-ravine&lr_adam=0.7"))["lr_adam"] == 0.7


@pytest.mark.long
def test_run_is_written_as_csv(visit: Open) -> None:
    """The CSV has a row for each optimizer and step, with the numbers as they are."""
    opened = visit("steps=20")
    with opened.expect_download() as download:
        opened.click("#csv")
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
    assert download.value.suggested_filename == "rmsprop-ravine.csv"
    assert len(rows) == 4 * 21
    own = [row for row in rows if row["optimizer"] == "RMSprop"]
    [run] = race("ravine", ["rmsprop"], steps=20)
    assert [float(row["w1"]) for row in own] == run.points[:, 0].tolist()
    assert [float(row["loss"]) for row in own] == run.losses.tolist()
    assert float(own[1]["rate1"]) * float(own[1]["g1"]) == pytest.approx(float(own[0]["w1"]) - float(own[1]["w1"]))


@pytest.mark.long
def test_start_over_forgets_the_settings(visit: Open) -> None:
    """Starting over brings the landscape's own settings back."""
    opened = visit("lr=0.5&memory=100&other=keras3&x=1&y=1")
    opened.click("#reset")
    assert path_of(opened) == path_of(visit("land=ravine"))


# ---- looks ----


@pytest.mark.long
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_phones_and_both_schemes(visit: Open, width: int, scheme: str) -> None:
    """Nothing is wider than the screen, light and dark differ in paper and contours, and the button changes both."""
    opened = visit(viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    paper = "getComputedStyle(document.body).backgroundColor"
    assert opened.evaluate(paper) == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 27)"}[scheme]
    before, sheet = painted(opened), opened.evaluate(paper)
    opened.click("#theme")
    assert opened.evaluate(paper) != sheet
    assert painted(opened) != before
    opened.set_viewport_size({"width": 600, "height": 800})
    wait(opened, "live.view.w < 600")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 600


def test_showing_a_step_repeats_no_work_of_the_run(visit: Open) -> None:
    """What another step changes is drawn in work that does not grow with the number of steps."""
    opened = visit("figure=land,loss,bars&steps=2000&other=keras3&lr=0.2")
    calls = opened.evaluate("""() => {
        let count = 0;
        for (const name of ["abs", "hypot", "log10", "max", "min", "sqrt"]) {
            const own = Math[name];
            Math[name] = (...values) => { count++; return own(...values); };
        }
        live.seek(5);
        const few = count;
        live.set({ lr: 0.3 });
        return [few, count - few];
    }""")
    assert 0 < calls[0] < 1000 < 10_000 < calls[1]


@pytest.mark.long
def test_color_is_not_alone(visit: Open) -> None:
    """Every path has its own dash and its own head."""
    opened = visit("other=keras3")
    dashes = opened.evaluate("Object.values(data.looks).map(look => look.dash)")
    signs = opened.evaluate("Object.values(data.looks).map(look => look.sign)")
    assert len(set(dashes)) == len(set(signs)) == 5


def test_figures_show_their_panels(visit: Open, tmp_path: Path) -> None:
    """A figure shows the panels and controls that it names, and nothing else."""
    path = tmp_path / "figure.html"
    path.write_text(figure("land", "bars", controls=["lr"], condition=10), encoding="utf-8")
    opened = visit(path=path)
    assert [e for e in PANELS if opened.locator(f'[data-panel="{e}"]').is_visible()] == ["land", "bars"]
    assert [e for e in CONTROLS if opened.locator(f'.slide[data-control="{e}"]').is_visible()] == ["lr"]
    assert not opened.locator("header").is_visible()
    assert settings(opened)["condition"] == 10
    opened.evaluate("location.hash = 'condition=20'")
    wait(opened, "live.settings().condition === 20")
    opened.evaluate("location.hash = ''")
    wait(opened, "live.settings().condition === 10")
    assert [e for e in PANELS if opened.locator(f'[data-panel="{e}"]').is_visible()] == ["land", "bars"]
    opened = visit("figure=turn")
    opened.wait_for_selector("#turn svg")
    assert [e for e in PANELS if opened.locator(f'[data-panel="{e}"]').is_visible()] == ["turn"]


LINKS = re.findall(r'href="live\.html#([^"]+)"', (DOCS / "learn.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("link", mostly_long(map(html.unescape, LINKS), lambda i, _: i == 1))
def test_links_of_the_chapter_open_what_they_say(visit: Open, link: str) -> None:
    """A link shows its panels and controls, and has each of its settings as it is given."""
    given, opened = dict(parse_qsl(link, strict_parsing=True)), visit(link)
    seen = {e for e in PANELS if opened.locator(f'[data-panel="{e}"]').is_visible()} | {"lesson"}  # it may be empty
    assert seen == {*given.pop("figure", ",".join(PANELS)).split(","), "lesson"}
    for name in given.pop("controls", "").split(","):
        assert not name or opened.locator(f'div[data-control="{name}"], label[data-control="{name}"]').is_visible()
    found = settings(opened)
    for name, value in given.items():
        assert found[name] == type(found[name])(value), name


def test_settings_follow_the_race() -> None:
    """The fragment of a race has what differs from the landscape's own settings."""
    straight = LANDSCAPES["ravine"]
    own = settings_of(straight, race(straight, steps=5))
    assert own == {
        "land": "ravine",
        "steps": 5,
        "lr": 0.13,
        "lr_sgd": 0.019,
        "lr_momentum": 0.65 / 100,
        "lr_adam": 0.5,
    }
    lost = race(straight, ["sgd", "momentum"], steps=80, lr=1e3)
    assert settings_of(straight, lost)["steps"] == 80
    assert "steps" not in settings_of(straight, race(straight, ["sgd"], lr=1e3))
    moved = find_landscape("tilted-ravine", 7).starting_at(-1, 2)
    given = settings_of(moved, race(moved, ["rmsprop-textbook"], lr=0.2), 4)
    assert given == {
        **{"land": "ravine", "condition": 7, "angle": 45, "x": -1, "y": 2, "seed": 4},
        **{"first": "textbook", "eps": 1e-6, "lr": 0.2, "hidden": "sgd,momentum,adam"},
    }
    assert fragment(given).startswith("land=ravine&condition=7")


@pytest.mark.parametrize(
    "given",
    [
        {"condition": 7, "lr": 5, "steps": 30},
        {"angle": 20, "x": -1, "y": 2.5, "hidden": "sgd,adam", "lr_momentum": 0.001},
        {"land": "tilted-ravine", "condition": 1000},
        {"land": "noisy-ravine", "angle": 45, "seed": 5},
    ],
    ids=str,
)
def test_race_without_scripts_is_that_of_the_settings(visit: Open, given: dict[str, Any], tmp_path: Path) -> None:
    """The table without scripts has the results that the page shows, and the picture has the start in it."""
    path = tmp_path / "race.html"
    path.write_text(live(**given), encoding="utf-8")
    plain, opened = visit(path=path, java_script_enabled=False), visit(path=path)
    rows = plain.locator("noscript tbody tr").all_inner_texts()
    shown = [
        text for text in opened.locator("#results tbody tr").all_inner_texts() if re.search("step|never|div", text)
    ]
    assert len(rows) == len(shown) == 4 - len(given.get("hidden", "").split(",")) * ("hidden" in given)
    for text in rows:
        name, rate = re.match(r"\W*(.+?)\tlr ([\d.e-]+)", text).groups()
        way = {"SGD": "sgd", "SGD momentum": "momentum", "Adam": "adam", "RMSprop": "rmsprop"}[name]
        assert float(rate) == pytest.approx(opened.evaluate(f"live.entrant('{way}').hyper.lr"), rel=1e-3)
        target, lost, t = opened.evaluate(f"(r => [r.targetAt, r.divergedAt, r.last])(live.runs().{way})")
        assert (f"diverged at step {lost}" if lost else f"step {target}" if target else "never") in text
        assert t == (lost - 1 if lost else given.get("steps", 100))
    start = [
        float(x)
        for x in plain.locator("noscript circle").last.evaluate("e => [e.cx, e.cy].map(c => c.baseVal.value)")
    ]
    size = plain.locator("noscript svg").evaluate("e => [e.viewBox.baseVal.width, e.viewBox.baseVal.height]")
    assert all(0 <= a <= b for a, b in zip(start, size, strict=True))


def test_race_that_is_not_the_settings_is_left_out() -> None:
    """Where RMSprop has another rule or other numbers than a race's, the page without scripts shows no race."""
    for given in ({"mode": "inside"}, {"memory": 100}, {"first": "keras3"}, {"hidden": "rmsprop,sgd,momentum,adam"}):
        text = live(**given).partition("</noscript>")[0]
        assert "<table" not in text
        assert "<svg" not in text


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: live(rate=1), ["'rate'", "lr", "memory"]),
        (lambda: figure("sky"), ["'sky'", "land", "bars"]),
        (lambda: figure("land", controls=["rate"]), ["'rate'", "memory"]),
        (lambda: live(land="hill"), ["'hill'", "ravine"]),
        (lambda: live(mode="middle"), ["mode='middle'", "'inside'"]),
        (lambda: live(first="keras9"), ["first='keras9'", "'keras3'"]),
        (lambda: live(bias="yes"), ["bias='yes'", "True"]),
        (lambda: live(theme="blue"), ["theme='blue'", "'dark'"]),
        (lambda: live(hidden="adm"), ["hidden='adm'", "adam"]),
        (lambda: live(condition=0.5), ["condition=0.5", "from 1 to 1000000000"]),
        (lambda: live(angle=12.5), ["angle=12.5", "whole number from 0 to 45"]),
        (lambda: live(steps=3000), ["steps=3000", "from 1 to 2000"]),
        (lambda: live(memory=math.nan), ["memory=nan", "from 1 to"]),
        (lambda: live(eps="small"), ["eps='small'", "number"]),
        (lambda: live(lr=None), ["lr=None", "number"]),
        (lambda: live(lr_adam=-1), ["lr_adam=-1", "positive"]),
        (lambda: live(x=1), ["x and y", "both"]),
        (lambda: live(x=0, y=0), ["start=0,0", "minimum"]),
        (lambda: live(land="beale", condition=5), ["condition=5", "'beale'"]),
        (lambda: figure("land", land="beale", angle=5), ["angle=5", "'beale'", "ravine"]),
    ],
)
def test_unknown_names_and_values_are_refused(attempt: Callable[[], str], words: list[str]) -> None:
    """An unknown panel, control, setting or value is refused by one sentence with those that there are."""
    with pytest.raises(ValueError, match=r"\.$") as caught:
        attempt()
    for word in words:
        assert word in str(caught.value)
