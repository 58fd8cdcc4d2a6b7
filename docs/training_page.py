"""The generated block and the figure of training.md, from the measurements of bench/release.py."""

import json
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rmsprop.style import BLUE, ORANGE, SKY, VERMILION, panels

RECORD = Path(__file__).parents[1] / "bench" / "results" / "release.json"
BLOCK = re.compile(r"<!-- bench: release -->\n.*?<!-- end -->", re.DOTALL)
BARS: dict[str, dict[str, Any]] = {
    "step()": {"color": BLUE, "hatch": ""},
    "in backward": {"color": VERMILION, "hatch": "//"},
    "step(), 2 passes": {"color": SKY, "hatch": ""},
    "in backward, 2 passes": {"color": ORANGE, "hatch": "//"},
}
ALT = (
    "Most memory of an iteration beyond parameters and state, by model and way of stepping: in backward the stack of "
    "linear layers needs a fraction of its gradients' size, and the transformer with a batch of 4 as much as before."
)


def record() -> list[dict[str, Any]]:
    """Return the measurements of bench/release.py, a row for each model and way of stepping."""
    rows: list[dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))["results"]
    return rows


def block() -> str:
    """Return the block with the table and the figure."""
    rows = {(row["case"], row["name"]): row for row in record()}
    cases = list(dict.fromkeys(case for case, _ in rows))
    lines = ["| model | gradients | stepped | most beyond parameters and state | the process |", "| --- " * 5 + "|"]
    for case in cases:
        for i, name in enumerate(BARS):
            row = rows[case, name]
            first = [case, _mb(row["gradients"])] if i == 0 else ["", ""]
            lines.append(f"| {' | '.join([*first, name, _mb(row['transient']), _mb(row['resident'])])} |")
    return "\n".join(
        ["<!-- bench: release -->", "", *lines, "", f"![{ALT}](figures/release.png)", "", "<!-- end -->"]
    )


def page(text: str) -> str:
    """Return the page with an up-to-date block. Raises: ValueError if it does not have exactly one block."""
    if len(BLOCK.findall(text)) != 1:
        raise ValueError("docs/training.md needs one <!-- bench: release --> with its <!-- end -->")
    return BLOCK.sub(lambda _: block(), text)


def figure() -> Figure:
    """Draw the peak memory beyond parameters and state, with the size of the gradients as a line."""
    rows = record()
    cases = list(dict.fromkeys(row["case"] for row in rows))
    drawn, (axes,) = panels(1, 1, (8, 3.4), {"font.size": 11, "legend.fontsize": 10})
    axes.grid(False, axis="x")
    width = 0.8 / len(BARS)
    for i, (name, look) in enumerate(BARS.items()):
        heights = [row["transient"] / 1e6 for row in rows if row["name"] == name]
        places = [j - 0.4 + (i + 0.5) * width for j in range(len(cases))]
        axes.bar(places, heights, width, label=name, edgecolor="white", **look)
    for j, case in enumerate(cases):
        size = next(row["gradients"] for row in rows if row["case"] == case) / 1e6
        axes.plot(
            [j - 0.45, j + 0.45], [size, size], color="black", linewidth=1.5, label="gradients" if j == 0 else None
        )
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("MB beyond parameters and state")
    axes.set_axisbelow(True)
    drawn.legend(loc="outside lower center", ncols=5, frameon=False)
    return drawn


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"
