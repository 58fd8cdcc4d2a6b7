"""The live page: one HTML file in which every setting of a race can be changed, and which fetches nothing.

`page` writes the page of a race, opened at its landscape and settings. `live` returns the page for any settings.
`figure` returns a page that shows some of its panels alone, to stand in a text, in a frame:

>>> text = figure("land", "bars", controls=["lr", "memory"], land="ravine", condition=1000)

The same works without Python: the fragment of the page's address holds the settings, so that a frame on
`live.html#figure=land,bars&controls=lr,memory&condition=1000` shows the same. `PANELS` and `CONTROLS` are the names
that can be given, `SETTINGS` the settings. A setting that is left out has the landscape's own value.

The scripts beside this file compute what the page shows: `engine.js` is a body of the equation, `landscapes.js` has
the landscapes of landscapes.py, and `live.js` draws. Frameworks and landscapes are written into the page from their
rows in Python.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import urlencode

import numpy as np

from rmsprop.dialects import DIALECTS, SWITCHES, Dialect, read_arguments
from rmsprop.files import write_whole
from rmsprop.printing import in_html
from rmsprop.race.figures import Races, surface
from rmsprop.race.landscapes import (
    CONDITION,
    LANDSCAPES,
    MOST_STEPS,
    RAVINES,
    TARGET,
    Landscape,
    Trajectory,
    find_landscape,
    race,
    ravine,
    tilted_ravine,
    turn,
)
from rmsprop.spec import EPS_MODES
from rmsprop.style import COLORS, LOOKS, YELLOW

CASES = 6000
"""The number of settings for which the engine has the reference's bits, by tests/race/test_engine.py."""

PANELS = ("land", "play", "loss", "results", "lesson", "bars", "phase", "lines", "turn", "map", "code")
"""The parts of the page that `figure` can show."""

CONTROLS = (
    *("land", "condition", "angle", "steps", "seed", "lr", "memory", "eps", "momentum"),
    *("mode", "init", "bias", "centered", "nesterov", "buffer", "frameworks"),
)
"""The controls that `figure` can show beside its panels."""

SETTINGS = (
    *("land", "condition", "angle", "x", "y", "seed", "steps", "t", "lr", "memory", "eps", "momentum", "mode"),
    *("init", "bias", "centered", "nesterov", "buffer", "first", "other", "lr2", "eps2"),
    *("lr_sgd", "lr_momentum", "lr_adam", "hidden", "kick", "theme"),
)
"""The settings in the fragment of an address.

`memory` is 1/(1 - alpha). `mode` is the place of ε and `init` the start of v. `first` and `other` are two dialects
with the same numbers, except for `lr2` and `eps2`. `hidden` lists the optimizers that are not drawn, out of rmsprop,
sgd, momentum and adam. `t` is the step shown, and `kick` the step whose gradient is 30 times as large.
"""

_RATES = {"sgd": "lr_sgd", "momentum": "lr_momentum", "adam": "lr_adam", "rmsprop": "lr"}
_CHOICES: dict[str, Sequence[Any]] = {
    "land": tuple(LANDSCAPES),
    "mode": EPS_MODES,
    **dict.fromkeys(("bias", "centered", "nesterov", "buffer"), (False, True)),
    **dict.fromkeys(("first", "other"), ("", *DIALECTS)),
    "theme": ("light", "dark"),
}
_RANGES = {
    **{"condition": (1, 1e9), "angle": (0, 45), "x": (-1000, 1000), "y": (-1000, 1000), "seed": (0, 2**32 - 1)},
    **{"steps": (1, MOST_STEPS), "t": (0, 1e9), "memory": (1, 1e9), "eps": (0, 1e9), "momentum": (0, 0.999)},
    **{"init": (0, 1e9), "eps2": (0, 1e9), "kick": (0, 1e9)},
}
_WHOLE = ("angle", "seed", "steps", "t", "kick")
_DRAWN = {"land", "condition", "angle", "x", "y", "seed", "steps", "t", "hidden", "theme", *_RATES.values()}
"""The settings of a race in which RMSprop is that of landscapes.OPTIMIZERS."""

_HERE = Path(__file__).parent
_COLORS = " ".join(f"--{name}: light-dark({light}, {dark});" for name, (light, dark) in COLORS.items())


def page(landscape: Landscape, runs: Races, path: Path, seed: int = 0) -> Path:
    """Write the live page, opened at a race; without scripts it shows the result. Returns: the path written."""
    text = _filled(settings_of(landscape, runs, seed), landscape, runs)
    return write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def live(**settings: Any) -> str:
    """Return the live page, opened at some settings.

    Without scripts it shows their race, or none where RMSprop's rule or numbers besides its rate are given.

    Raises: ValueError for an unknown setting, or for a value that the page does not take.
    """
    return _filled(settings, *_raced(settings))


def figure(*panels: str, controls: Sequence[str] = (), **settings: Any) -> str:
    """Return a page that shows some panels of the live page, and the controls that are to stand beside them.

    Raises: ValueError for an unknown panel, control or setting, or for a value that the page does not take.
    """
    for kind, given, known in (("panel", panels, PANELS), ("control", controls, CONTROLS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"{kind} {unknown[0]!r} is unknown; choose from {', '.join(known)}.")
    if not panels:
        raise ValueError(f"A figure needs a panel; choose from {', '.join(PANELS)}.")
    shown = {"figure": ",".join(panels), **({"controls": ",".join(controls)} if controls else {})}
    return _filled({**settings, **shown}, *_raced(settings))


def fragment(settings: Mapping[str, Any]) -> str:
    """Return settings as the fragment of an address, without its #."""
    plain = {name: int(value) if isinstance(value, bool) else value for name, value in settings.items()}
    return urlencode(plain, safe=",")


def settings_of(landscape: Landscape, runs: Races, seed: int = 0) -> dict[str, Any]:
    """Return the settings under which the page shows a race."""
    row = LANDSCAPES[landscape.name]
    settings: dict[str, Any] = {"land": "ravine" if landscape.angle else landscape.name}
    if landscape.condition not in (None, CONDITION):
        settings["condition"] = landscape.condition
    if landscape.angle:
        settings["angle"] = landscape.angle
    usual = RAVINES[row.name](landscape.condition) if landscape.condition is not None else row
    if landscape.start != usual.start:
        settings["x"], settings["y"] = landscape.start
    steps = runs[0].steps if runs else row.steps
    if steps != row.steps:
        settings["steps"] = steps
    if seed:
        settings["seed"] = seed
    lrs = {run.name: run.lr for run in runs}
    if "rmsprop-textbook" in lrs and "rmsprop" in lrs:
        settings |= {"other": "textbook", "lr2": lrs["rmsprop-textbook"], "eps2": 1e-6}
    elif "rmsprop-textbook" in lrs:
        settings |= {"first": "textbook", "eps": 1e-6}
        lrs["rmsprop"] = lrs["rmsprop-textbook"]
    settings |= {key: lrs[name] for name, key in _RATES.items() if name in lrs}
    hidden = [name for name in _RATES if name not in lrs]
    return settings | ({"hidden": ",".join(hidden)} if hidden else {})


def _raced(settings: Mapping[str, Any]) -> tuple[Landscape, Races]:
    """Return the landscape and the race of some settings, without runs where they are not a race's.

    Raises: ValueError for an unknown setting, or for a value that the page does not take.
    """
    for name, value in settings.items():
        _check(name, value)
    landscape = _landscape(settings)
    hidden = settings.get("hidden", "").split(",")
    names = [name for name in _RATES if name not in hidden]
    rates = {name: float(settings[_RATES[name]]) for name in names if _RATES[name] in settings}
    steps = int(settings["steps"]) if "steps" in settings else None
    runs = race(landscape, names or ["rmsprop"], steps, rates, int(settings.get("seed", 0)))
    return landscape, runs if names and set(settings) <= _DRAWN else ()


def _check(name: str, value: Any) -> None:
    """Raises: ValueError if the page has no such setting, or does not take its value."""
    if name not in SETTINGS:
        raise ValueError(f"setting {name!r} is unknown; the page has {', '.join(SETTINGS)}.")
    if name == "hidden":
        unknown = [word for word in str(value).split(",") if word and word not in _RATES]
        if not isinstance(value, str) or unknown:
            raise ValueError(f"hidden={value!r}: give a comma list of {', '.join(_RATES)}.")
    elif name in _CHOICES:
        if value not in _CHOICES[name]:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, _CHOICES[name]))}.")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r}: give a number.")
    elif name in _RANGES:
        low, high = _RANGES[name]
        whole = name in _WHOLE
        if not low <= value <= high or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{name}={value!r}: give {kind} from {low:.10g} to {high:.10g}.")
    elif not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: a learning rate is a positive finite number, such as 0.1.")


def _landscape(settings: Mapping[str, Any]) -> Landscape:
    """Return the landscape of checked settings, seen from their start. Raises: ValueError if they do not fit it."""
    name = settings.get("land", "ravine")
    row = find_landscape(name, settings.get("condition"))
    angle = int(settings.get("angle", row.angle))
    if angle != row.angle:
        if row.condition is None:
            raise ValueError(f"angle={angle} has no meaning on {name!r}; set it on {', '.join(RAVINES)}.")
        turned = ravine(row.condition, angle)
        words = row.description if row.noise else turned.description
        words += f" Turned by {angle} degrees." if angle else ""
        row = replace(turned, name=name, description=words, noise=row.noise, lrs=row.lrs)
    if ("x" in settings) != ("y" in settings):
        raise ValueError("x and y are the two coordinates of the start; give both or neither.")
    return row.starting_at(*((settings["x"], settings["y"]) if "x" in settings else row.start))


def _filled(settings: Mapping[str, Any], landscape: Landscape, runs: Races) -> str:
    """Return the page with its styles, scripts and data, and with a race for readers without scripts."""
    html, css, *scripts = (
        (_HERE / name).read_text(encoding="utf-8")
        for name in ("live.html", "live.css", "engine.js", "landscapes.js", "live.js")
    )
    data = {"preset": fragment(settings), **_data()}
    return Template(html).substitute(
        title=in_html(f"RMSprop, live: {landscape.name}"),
        description=in_html(landscape.description),
        css=Template(css).substitute(colors=_COLORS),
        picture=_picture(landscape, runs) if runs else "",
        table=_table(runs) if runs else "",
        proof=f"The arithmetic is the library's. In a browser, the engine of this page equals the reference "
        f"implementation bit for bit in {CASES:,} settings, over every switch, with zeros, infinities, NaN and the "
        "smallest numbers among the gradients. The landscapes and their gradients have the bits of torch's autograd. "
        "Written by <code>rmsprop race</code>.",
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/"),
        scripts="\n".join(scripts),
    )


@cache
def _data() -> dict[str, Any]:
    """Return what the scripts read: landscapes, the cosines and sines of whole degrees, styles and dialects."""
    tilted = tilted_ravine()
    return {
        "target": TARGET,
        "modes": EPS_MODES,
        "ranges": _RANGES,
        "whole": _WHOLE,
        "turns": [turn(angle) for angle in range(46)],
        "lands": {name: _land(row) for name, row in LANDSCAPES.items() if not row.angle},
        "tilted": {"lesson": tilted.lesson, "lrs": tilted.lrs},
        "looks": {
            {"rmsprop-textbook": "second"}.get(name, name): {"dash": look.dash[1], "sign": look.marker[1]}
            for name, look in LOOKS.items()
        },
        "dialects": {name: _dialect(row) for name, row in DIALECTS.items()},
    }


def _land(row: Landscape) -> dict[str, Any]:
    """Return a landscape's row for the page. `over` has the rates that the condition number divides."""
    bowl = ravine(1).lrs
    over = {name: bowl[name] for name in bowl if row.condition and not math.isclose(row.lrs[name], bowl[name])}
    label = "Dive into Deep Learning" if row.name == "d2l" else row.name.replace("-", " ").capitalize()
    kept = ("description", "lesson", "window", "minima", "steps", "lrs", "noise")
    own = {} if row.condition else {"start": row.start}
    return {
        "label": label,
        "ravine": bool(row.condition),
        "over": over if all(math.isclose(bowl[n] / CONDITION, row.lrs[n]) for n in over) else {},
        **own,
        **{name: getattr(row, name) for name in kept},
    }


def _dialect(row: Dialect) -> dict[str, Any]:
    """Return a dialect's row for the page: its switches, and its names for the numbers of the page."""
    full = row.complete({}, ())
    words = {ours: _word(row, ours) for ours in ("lr", "alpha", "eps", "momentum")}
    when = [
        {"setting": condition.setting, "then": {n: v for n, v in condition.then.items() if n in SWITCHES}}
        for condition in row.when
    ]
    title = row.title.partition(", ")[0].partition(": ")[0].partition(" (")[0].partition(" with ")[0]
    known = row.name in title.lower().replace(" ", "").replace(".", "")
    return {
        "short": title if known else f"{title} ({row.name})",
        "title": row.title,
        "rule": {name: full[name] for name in SWITCHES if name != "weight_decay_mode"},
        "momentum": full["momentum"],
        "starts_at_eps": row.v_init_is_eps,
        "when": [condition for condition in when if condition["then"]],
        "words": {ours: word for ours, word in words.items() if word},
        "lacks": [ours for ours, word in words.items() if not word],
    }


def _word(row: Dialect, ours: str) -> str | None:
    """Return an argument name under which the dialect takes a plain number for a setting, or None."""
    for name in (row.argument(ours), ours):
        try:
            if read_arguments(row, {name: 0.5}) == {ours: 0.5}:
                return name
        except (TypeError, ValueError):
            continue
    return None


def _table(runs: Races) -> str:
    """Return the results of a race as a table, for readers without scripts."""
    rows = "".join(_row(run) for run in runs)
    heads = ("optimizer", "settings", "first below the target", "last loss", "distance to the minimum")
    return (
        '<div class="scroll"><table><thead><tr>'
        + "".join(f"<th>{head}</th>" for head in heads)
        + f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(run: Trajectory) -> str:
    arrived = "never" if run.target_at is None else f"step {run.target_at}"
    cells = [arrived, f"{run.losses[-1]:.3g}", f"{run.distance:.3g}"]
    if run.diverged:
        cells = [f"diverged at step {run.diverged_at}", "-", "-"]
    cells = [
        f'<span style="color:{LOOKS[run.name].color}">{LOOKS[run.name].sign}</span> {in_html(run.label)}',
        in_html(run.settings),
        *cells,
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _picture(landscape: Landscape, runs: Races, width: int = 760) -> str:
    """Return a race as SVG: contours of the log loss, the paths, the start and the minima, at equal scales."""
    from contourpy import contour_generator

    left, right, low, high = landscape.window
    unit = min(width / (right - left), 520 / (high - low))
    w, h = unit * (right - left), unit * (high - low)

    def _path(points: Any) -> str:
        at = np.clip((np.asarray(points) - [left, low]) * [unit, -unit] + [0, h], -5 * w, 6 * w)
        return "M" + "L".join(f"{x:.0f} {y:.0f}" for x, y in at)

    x, y, z = surface(landscape, 120)
    contours = contour_generator(x, y, z)
    levels = z.max() - np.arange(1, 12) / 4
    lines = [ring for level in levels for ring in contours.lines(level) if len(ring) > 2]
    rings = "".join(_path([*ring[::2], ring[-1]]) for ring in lines)
    body = f'<path d="{rings}" fill="none" stroke="#8fa3b5" stroke-width=".7"/>'
    for run in runs:
        look = LOOKS[run.name]
        body += (
            f'<path d="{_path(run.points[:400])}" fill="none" stroke="{look.color}" stroke-width="2"'
            f' stroke-dasharray="{look.dash[1]}"><title>{in_html(run.label)}</title></path>'
        )
    for (x0, y0), color in [*((minimum, YELLOW) for minimum in landscape.minima), (landscape.start, "#fff")]:
        place = f'cx="{(x0 - left) * unit:.0f}" cy="{h - (y0 - low) * unit:.0f}" r="6"'
        body += f'<circle {place} fill="{color}" stroke="#111"/>'
    label = "Paths of the optimizers over contours of the loss, from the white to the yellow circle."
    style = f"max-width:{w:.0f}px;overflow:hidden;border:1px solid #ccc"
    return f'<svg viewBox="0 0 {w:.0f} {h:.0f}" role="img" style="{style}" aria-label="{label}">{body}</svg>'
