"""Charts as SVG text, in the colors of a light or a dark page, with no library and no script.

A chart takes its colors from the variables of `style.THEME`. Inside a page they are the page's; a chart of its own
carries them, with a background, so that it is legible wherever it stands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rmsprop.printing import in_html
from rmsprop.style import THEME

CSS = """
.chart { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.chart text { fill: var(--soft); }
.chart .name { fill: currentColor; font-weight: 600; }
.chart .strong { fill: var(--ink); font-weight: 600; }
.chart .grid { stroke: var(--grid); }
.chart .rule { stroke: var(--ink); stroke-dasharray: 5 4; stroke-width: 1.3; }
.chart .line { fill: none; stroke: currentColor; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.chart .band { fill: currentColor; fill-opacity: .2; }
.chart .mark { fill: currentColor; stroke: var(--paper); }
.chart .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
.sgd { color: var(--sgd); } .momentum { color: var(--momentum); } .adam { color: var(--adam); }
.rmsprop { color: var(--rmsprop); } .plain { color: var(--plain); } .second { color: var(--ink); }
"""


def short(value: float) -> str:
    """Return a number for the end of a tick: 1e-05 as 10⁻⁵, and others in as few digits as they need."""
    if value == 0 or 1e-4 < abs(value) < 1e5:
        return f"{value:.10g}".replace("-", "−")
    mantissa, exponent = f"{value:.3e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    digits = f"{float(mantissa):g}".replace("-", "−")
    return power if digits == "1" else f"{digits}·{power}"


@dataclass(frozen=True)
class Axis:
    """A range of values, linear or logarithmic, with its ticks; without given ticks, round numbers are chosen."""

    low: float
    high: float
    label: str = ""
    log: bool = False
    ticks: Sequence[tuple[float, str]] | None = None
    count: int = 6

    def share(self, value: float) -> float:
        """Return the position of a value, 0 at the low end and 1 at the high one; NaN if the axis cannot show it."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        if not value > 0:
            return math.nan
        return math.log(value / self.low) / math.log(self.high / self.low)

    def marks(self) -> list[tuple[float, str]]:
        """Return the ticks inside the range."""
        if self.ticks is not None:
            return [mark for mark in self.ticks if -1e-9 <= self.share(mark[0]) <= 1 + 1e-9]
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            if last > first:
                every = max(1, math.ceil((last - first) / self.count))
                return [(10.0**k, short(10.0**k)) for k in range(first, last + 1, every)]
            tens = math.floor(math.log10(self.low))
            values = [m * 10.0**k for k in range(tens, tens + 2) for m in (1, 2, 3, 5)]
            return [(value, short(value)) for value in values if self.low <= value <= self.high]
        raw = (self.high - self.low) / self.count
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(k * step, short(round(k * step, 12))) for k in range(first, last + 1)]


@dataclass
class Chart:
    """One panel with axes, to which lines, bands, marks and words are added.

    Attributes:
        alt: the picture in words, for readers who do not see it.
        size: width and height in the SVG's units, which are pixels at full size.
        edges: the space left, right, above and below the panel.
        heading: words above the panel, and the class of their color.
    """

    x: Axis
    y: Axis
    alt: str
    size: tuple[float, float] = (460, 300)
    edges: tuple[float, float, float, float] = (56, 22, 26, 44)
    heading: tuple[str, str] = ("", "")
    parts: list[str] = field(default_factory=list)
    readings: list[dict[str, object]] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the position of a point in the SVG's units; far outside the panel it is cut off."""
        left, right, top, bottom = self.edges
        across, up = (min(max(axis.share(v), -9.0), 9.0) for axis, v in ((self.x, x), (self.y, y)))
        return left + across * (self.size[0] - left - right), self.size[1] - bottom - up * (
            self.size[1] - top - bottom
        )

    def line(
        self, xs: Sequence[float], ys: Sequence[float], kind: str, dash: str = "", width: float = 2.2, name: str = ""
    ) -> None:
        """Draw a line through the points, with a gap where a value cannot be shown.

        Args:
            kind: the color's class, such as "rmsprop".
            dash: SVG's stroke-dasharray, such as "6 4".
            name: records the points for a page that reads them out.
        """
        path, begin = "", True
        for x, y in zip(xs, ys, strict=True):
            a, b = self.at(x, y)
            if not (math.isfinite(a) and math.isfinite(b)):
                begin = True
                continue
            path += f"M{a:.1f} {b:.1f}h0" if begin else f"L{a:.1f} {b:.1f}"  # h0 makes a dot of a lone point
            begin = False
        pattern = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<path class="line {kind}" d="{path}" style="stroke-width:{width}"{pattern}/>')
        if name:
            self.readings.append({"name": name, "kind": kind, "x": list(xs), "y": [_finite(y) for y in ys]})

    def band(self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], kind: str) -> None:
        """Fill the range between two lines; points that cannot be shown are left out."""
        ranges = [(self.at(x, low), self.at(x, high)) for x, low, high in zip(xs, lows, highs, strict=True)]
        shown = [pair for pair in ranges if all(math.isfinite(c) for point in pair for c in point)]
        outline = [low for low, _ in shown] + [high for _, high in reversed(shown)]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in outline)
        self.parts.append(f'<polygon class="band {kind}" points="{points}"/>')
        if self.readings and self.readings[-1]["x"] == list(xs):
            self.readings[-1] |= {"low": [_finite(low) for low in lows], "high": [_finite(high) for high in highs]}

    def rule(self, y: float) -> None:
        """Draw a dashed line across the panel at a value."""
        (a, b), (c, d) = self.at(self.x.low, y), self.at(self.x.high, y)
        self.parts.append(f'<path class="rule" d="M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}"/>')

    def mark(self, x: float, y: float, kind: str, radius: float = 4) -> None:
        """Draw a dot."""
        a, b = self.at(x, y)
        self.parts.append(f'<circle class="mark {kind}" cx="{a:.1f}" cy="{b:.1f}" r="{radius:g}"/>')

    def text(
        self,
        x: float,
        y: float,
        words: str,
        kind: str = "",
        anchor: str = "start",
        shift: tuple[float, float] = (0, 0),
    ) -> None:
        """Write words at a point, moved by a shift in the SVG's units."""
        a, b = self.at(x, y)
        self.parts.append(
            f'<text class="name halo {kind}" x="{a + shift[0]:.1f}" y="{b + shift[1]:.1f}" '
            f'text-anchor="{anchor}">{in_html(words)}</text>'
        )

    def draw(self) -> str:
        """Return the panel with its axes, without the <svg> around it."""
        left, right, top, bottom = self.edges
        width, height = self.size
        frame = ""
        for value, words in self.x.marks():
            a, _ = self.at(value, self.y.low)
            frame += f'<path class="grid" d="M{a:.1f} {top}V{height - bottom}"/>'
            frame += f'<text x="{a:.1f}" y="{height - bottom + 17}" text-anchor="middle">{in_html(words)}</text>'
        for value, words in self.y.marks():
            _, b = self.at(self.x.low, value)
            frame += f'<path class="grid" d="M{left} {b:.1f}H{width - right}"/>'
            frame += f'<text x="{left - 7}" y="{b + 4.5:.1f}" text-anchor="end">{in_html(words)}</text>'
        middle = (left + width - right) / 2
        frame += f'<text x="{middle:.1f}" y="{height - 6}" text-anchor="middle">{in_html(self.x.label)}</text>'
        frame += f'<text x="2" y="{top - 10}">{in_html(self.y.label)}</text>'
        if self.heading[0]:
            words, kind = self.heading
            frame += (
                f'<text class="name {kind}" x="{left}" y="{top - 14}" style="font-size:19px">{in_html(words)}</text>'
            )
        return (
            f'{frame}<svg x="{left}" y="{top}" width="{width - left - right}" height="{height - top - bottom}" '
            f'viewBox="{left} {top} {width - left - right} {height - top - bottom}">{"".join(self.parts)}</svg>'
        )

    def svg(self) -> str:
        """Return the chart for a page that has `style.THEME` and CSS."""
        width, height = self.size
        return (
            f'<svg class="chart" role="img" viewBox="0 0 {width:g} {height:g}" width="{width:g}">'
            f"<title>{in_html(self.alt)}</title>{self.draw()}</svg>"
        )

    def data(self) -> str:
        """Return what a page reads out under the pointer, as JSON."""
        left, right, *_ = self.edges
        record = {
            "lines": self.readings,
            "log": self.x.log,
            "x": [self.x.low, self.x.high],
            "panel": [left / self.size[0], 1 - right / self.size[0]],
            "label": self.x.label,
        }
        return json.dumps(record, separators=(",", ":"), allow_nan=False)


def picture(charts: Sequence[Chart], alt: str = "", columns: int = 0) -> str:
    """Return an SVG file of one or more charts of one size, side by side, with its own colors and background."""
    columns = columns or len(charts)
    (width, height), rows = charts[0].size, math.ceil(len(charts) / columns)
    panels = "".join(
        f'<g transform="translate({i % columns * width:g} {i // columns * height:g})">{chart.draw()}</g>'
        for i, chart in enumerate(charts)
    )
    full = f"{width * columns:g}", f"{height * rows:g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" viewBox="0 0 {full[0]} {full[1]}" '
        f'width="{full[0]}" height="{full[1]}">\n<title>{in_html(alt or charts[0].alt)}</title>\n'
        f"<style>{THEME}{CSS}</style>\n"
        f'<rect width="{full[0]}" height="{full[1]}" rx="6" fill="var(--paper)"/>\n{panels}\n</svg>\n'
    )


def _finite(value: float) -> float | None:
    """Return the value in four digits, or None, which JSON can hold, in place of infinity and NaN."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
