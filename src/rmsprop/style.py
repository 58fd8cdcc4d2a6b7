"""The colors, dashes, markers and paper of every figure, and the CSS that every page shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The color-blind-safe palette of Okabe and Ito.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"

GRID = "#dddddd"
REFERENCE = "#444444"
"""The color of a line to compare with, such as a target."""


@dataclass(frozen=True)
class Look:
    """The style of one optimizer's line: a color, and a dash and a marker that repeat what the color means.

    `dash` is a pair: matplotlib's name, and SVG's stroke-dasharray. `marker` is one, too: matplotlib's name, and the
    live page's. `sign` is the marker as text.
    """

    color: str
    dash: tuple[Any, str]
    marker: tuple[str, str]
    sign: str

    @property
    def line(self) -> dict[str, Any]:
        """The color and dash as matplotlib's arguments."""
        return {"color": self.color, "linestyle": self.dash[0]}

    @property
    def marked_line(self) -> dict[str, Any]:
        """The color, dash and marker as matplotlib's arguments."""
        return self.line | {"marker": self.marker[0]}


LOOKS: dict[str, Look] = {
    "sgd": Look(BLUE, (":", "2 4"), ("s", "square"), "■"),
    "momentum": Look(PURPLE, ("-.", "9 3 2 3"), ("^", "up"), "▲"),
    "adam": Look(GREEN, ("--", "7 4"), ("D", "diamond"), "◆"),
    "rmsprop": Look(VERMILION, ("-", ""), ("o", "circle"), "●"),
    "rmsprop-textbook": Look(BLACK, ((0, (7, 3)), "12 5"), ("v", "down"), "▼"),
}

# Each color of a page on light and on dark paper. The optimizers' are those of LOOKS, made legible on both.
COLORS: dict[str, tuple[str, str]] = {
    "paper": ("#fff", "#12161b"),
    "card": ("#f2f4f6", "#1e252d"),
    "ink": ("#1c2126", "#e7eaed"),
    "soft": ("#56606b", "#a3adb8"),
    "rule": ("#dfe3e8", "#2e3741"),
    "grid": ("#e9ecf0", "#27303a"),
    "sgd": ("#0072b2", "#56b4e9"),
    "momentum": ("#a8508a", "#e79ac4"),
    "adam": ("#00785a", "#3ccb9f"),
    "rmsprop": ("#c65300", "#ff9447"),
    "plain": ("#0072b2", "#56b4e9"),
    "loud": ("#b34700", "#ff9447"),
}


def _variables(dark: bool) -> str:
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in COLORS.items())


THEME = (
    f":root {{ color-scheme: light dark; {_variables(False)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(True)} }} }}\n"
)
"""COLORS as variables of CSS, light or dark as the reader's system is."""

CSS = (
    THEME
    + """
* { box-sizing: border-box; }
body { font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; margin: 0 auto; padding: 1rem;
  background: var(--paper); color: var(--ink); }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .5rem 0; }
p, li { max-width: 44rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
code, pre { background: var(--card); border-radius: 3px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dd { margin: 0; }
"""
)

# Lettering that is readable from the back of a lecture hall, as matplotlib's rc parameters.
LECTURE: Any = {"font.size": 13, "axes.titlesize": 14, "axes.labelsize": 13, "legend.fontsize": 12}


def panels(
    rows: int, columns: int, size: tuple[float, float], fonts: Any, *, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Make a figure that pyplot does not manage, with empty panels on a light grid.

    Args:
        size: width and height in inches.
        fonts: matplotlib's rc parameters for the figure.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(fonts):
        figure = Figure(figsize=size, layout="constrained")
        made = [axes for row in figure.subplots(rows, columns, squeeze=False, sharey=sharey) for axes in row]
    for axes in made:
        axes.grid(True, color=GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, made


def to_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file of 150 dots per inch."""
    from io import BytesIO

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()
