"""Figures of a race: an image (PNG) and an animation (GIF, WebP)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmsprop.files import write_whole
from rmsprop.race.landscapes import TARGET, Floats, Landscape, Trajectory
from rmsprop.style import LOOKS, REFERENCE, YELLOW

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from PIL.Image import Image

Races = Sequence[Trajectory]

FRAMES = 60
"""The approximate number of frames of an animation or page."""

FLOOR = 1e-6
"""The lower end of the loss axis, as a share of the starting loss."""

ASPECT = 1.7
"""The ratio of width to height of the picture of a landscape."""


def outcome(run: Trajectory) -> str:
    """Describe the end of a run."""
    if run.diverged:
        return f"diverged at step {run.diverged_at}"
    arrived = "target never reached" if run.target_at is None else f"first below the target at step {run.target_at}"
    return f"{arrived}, ends {run.distance:.2g} from the minimum"


def figure(landscape: Landscape, runs: Races, path: Path) -> Path:
    """Write the finished race as a PNG, with paths over contours and the losses below. Returns: the path written."""
    drawing = _draw(landscape, runs, dpi=120)
    return write_whole(path, lambda part: drawing.figure.savefig(part, format="png"))


def animation(landscape: Landscape, runs: Races, path: Path) -> Path:
    """Write the race as an animation that repeats and pauses at its end. Returns: the path written.

    Raises: ValueError if the path ends in neither .gif nor .webp.
    """
    from PIL.Image import Dither, Quantize

    kind = path.suffix.lower()
    if kind not in (".gif", ".webp"):
        raise ValueError(f"path={path.name!r}: an animation is a .gif or a .webp.")
    images = _film(landscape, runs)
    if kind == ".gif":
        # All frames share the palette of the last frame, which shows every color, so nothing flickers.
        # The median cut would spend its colors on the background and turn the yellow star brown.
        palette = images[-1].quantize(colors=255, method=Quantize.FASTOCTREE, dither=Dither.NONE)
        images = [image.quantize(palette=palette, dither=Dither.NONE) for image in images]
    pauses = [80] * (len(images) - 1) + [2500]  # milliseconds; the long pause shows the result
    options = {"save_all": True, "append_images": images[1:], "duration": pauses, "loop": 0}
    if kind == ".webp":
        options |= {"quality": 80, "method": 2}
    return write_whole(path, lambda part: images[0].save(part, format=kind[1:], **options))


def moments(runs: Races) -> list[int]:
    """Return the step that each frame shows: every 1, 2, 5, 10, ... steps, about `FRAMES` in all, and the last."""
    last = max(len(run.points) for run in runs) - 1
    strides = (digit * 10**power for power in range(6) for digit in (1, 2, 5))
    stride = next(stride for stride in strides if last <= FRAMES * stride)
    return sorted({*range(0, last, stride), last})


def surface(landscape: Landscape, cells: int) -> tuple[Floats, Floats, Floats]:
    """Evaluate log10 of the loss on a grid, at most four decades below its highest value.

    Lower bands would be narrower than the grid, and break up into beads along a valley.

    Shapes: x (cells,), y (cells,), z (cells, cells) indexed [y, x].
    """
    left, right, low, high = landscape.window
    x, y = np.linspace(left, right, cells), np.linspace(low, high, cells)
    loss = landscape.loss(np.stack(np.meshgrid(x, y), axis=-1))
    return x, y, np.log10(np.maximum(loss, 1e-4 * loss.max()))


def loss_range(landscape: Landscape, runs: Races) -> tuple[float, float]:
    """Return the range of the loss axis, limited by `FLOOR` and by a thousand times the starting loss."""
    begin = landscape.target / TARGET
    every = np.concatenate([run.losses for run in runs])
    lowest = max(float(every.min()), FLOOR * begin)
    highest = min(float(every.max()), 1e3 * begin)
    return min(lowest, landscape.target) / 2, 2 * max(highest, begin)


@dataclass
class _Drawing:
    """A figure and the artists that move in an animation."""

    figure: Figure
    paths: list[Line2D]
    heads: list[Line2D]
    losses: list[Line2D]
    marks: list[Line2D]


def _draw(landscape: Landscape, runs: Races, dpi: int) -> _Drawing:
    """Draw a whole race without pyplot, which would change the user's current figure."""
    from matplotlib.figure import Figure
    from matplotlib.patheffects import Normal, Stroke
    from matplotlib.ticker import MaxNLocator

    landscape = landscape.seen_at(ASPECT)
    canvas = Figure(figsize=(9, 8.8), dpi=dpi, layout="constrained")
    land, loss = canvas.subplots(2, 1, height_ratios=[2.3, 1])
    drawing = _Drawing(canvas, [], [], [], marks=_draw_ground(landscape, land))
    halo = [Stroke(linewidth=3.2, foreground="white", alpha=0.8), Normal()]
    for run in runs:
        look = LOOKS[run.name]
        every = max(1, len(run.points) // 30)
        style: dict[str, Any] = look.marked_line | {"linewidth": 1.7, "markersize": 4.5, "markevery": every}
        label = f"{run.label} ({run.settings}): {outcome(run)}"
        drawing.paths += land.plot(*run.points.T, label=label, path_effects=halo, **style)
        drawing.heads += land.plot(
            *run.points[-1],
            look.marker[0],
            color=look.color,
            markersize=10,
            markeredgecolor="white",
            zorder=5,
        )
        drawing.losses += loss.plot(np.maximum(run.losses, 1e-300), **style)
    steps = max(moments(runs)[-1], 1)  # avoids an axis from 0 to 0 if all runs diverge at once
    loss.set(yscale="log", ylabel="loss", ylim=loss_range(landscape, runs), xlim=(0, steps))
    for run in runs:
        _mark_ends(landscape, run, land, loss)
    loss.axhline(landscape.target, color=REFERENCE, linewidth=1)
    loss.set_xlabel(
        f"step (line: the target, {TARGET:g} of the starting loss; triangle: a curve goes on beyond the axis)"
    )
    loss.xaxis.set_major_locator(MaxNLocator(integer=True))
    loss.grid(alpha=0.25)
    canvas.legend(handles=drawing.paths, loc="outside lower left", fontsize=10, frameon=False)
    return drawing


def _draw_ground(landscape: Landscape, land: Axes) -> list[Line2D]:
    """Draw contours of the log loss, the start, and the minima. Returns: the marks, to be drawn above all paths."""
    x, y, z = surface(landscape, 300)
    levels = z.max() - np.arange(14, -1, -1) / 4
    land.contourf(x, y, z, levels=levels, cmap="Blues", vmin=z.min(), vmax=z.min() + 9, extend="both")
    land.contour(x, y, z, levels=levels, colors="#8fa3b5", linewidths=0.5, linestyles="solid")
    land.set(xlim=landscape.window[:2], ylim=landscape.window[2:], xlabel="w₁", ylabel="w₂")
    land.set_box_aspect(1 / ASPECT)
    land.set_title(landscape.description, fontsize=12, loc="left")
    mark: dict[str, Any] = {"linestyle": "none", "zorder": 6}
    [start] = land.plot(*landscape.start, marker="P", ms=11, color="white", mec="black", label="start", **mark)
    [end] = land.plot(*np.array(landscape.minima).T, marker="*", ms=16, color=YELLOW, mec="black", **mark)
    end.set_label("minimum")
    # Below the right end of the x axis, where no path can hide the legend.
    land.legend(handles=[start, end], loc="upper right", bbox_to_anchor=(1, -0.06), ncols=2, frameon=False)
    return [start, end]


def _mark_ends(landscape: Landscape, run: Trajectory, land: Axes, loss: Axes) -> None:
    """Mark by triangles the first place where a path leaves the view, and where its loss leaves the axis."""
    color = LOOKS[run.name].color
    mark: dict[str, Any] = {
        "color": color,
        "markersize": 9,
        "markeredgecolor": "white",
        "clip_on": False,
        "zorder": 7,
    }
    left, right, low, high = landscape.window
    within: Any = ((run.points >= [left, low]) & (run.points <= [right, high])).all(axis=1)
    for t in np.flatnonzero(within[:-1] & ~within[1:])[:1]:
        here, way = run.points[t], run.points[t + 1] - run.points[t]
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.where(way > 0, (np.array([right, high]) - here) / way, (np.array([left, low]) - here) / way)
        x, y = here + np.nanmin(np.where(way == 0, np.inf, shares)) * way
        land.plot(x, y, marker=(3, 0, math.degrees(math.atan2(way[1], way[0])) - 90), **mark)
    bottom, top = loss.get_ylim()
    for beyond, edge, sign in ((run.losses < bottom, bottom, "v"), (run.losses > top, top, "^")):
        for t in np.flatnonzero(beyond[1:] & ~beyond[:-1])[:1]:
            loss.plot(t + 1, edge, marker=sign, **mark)


def _film(landscape: Landscape, runs: Races) -> list[Image]:
    """Render the frames. The background is drawn once, and each frame redraws only what moves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    drawing = _draw(landscape, runs, dpi=80)
    canvas: Any = FigureCanvasAgg(drawing.figure)
    land, loss = drawing.figure.axes
    clock = land.text(0.99, 0.97, "", transform=land.transAxes, ha="right", va="top", fontsize=13, zorder=7)
    clock.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8})
    moving = [*drawing.paths, *drawing.heads, *drawing.losses, *drawing.marks, clock]
    for artist in moving:
        artist.set_animated(True)
    canvas.draw()
    still = canvas.copy_from_bbox(drawing.figure.bbox)
    images = []
    for step in moments(runs):
        canvas.restore_region(still)
        for run, trail, head, curve in zip(runs, drawing.paths, drawing.heads, drawing.losses, strict=True):
            trail.set_data(*run.points[: step + 1].T)
            head.set_data(*run.points[: step + 1][-1:].T)
            curve.set_data(np.arange(len(run.losses))[: step + 1], np.maximum(run.losses[: step + 1], 1e-300))
        clock.set_text(f"step {step}")
        for artist in moving:
            (loss if artist in drawing.losses else land).draw_artist(artist)
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    return images
