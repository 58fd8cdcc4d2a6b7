"""The generated blocks and the figure of memory.md on quality, from the trainings of bench/state_training.py."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rmsprop.style import BLACK, BLUE, VERMILION, panels

RECORD = Path(__file__).parents[1] / "bench" / "results" / "state_training.json"
BLOCK = re.compile(r"<!-- bench: (state \w+) -->\n.*?<!-- end -->", re.DOTALL)
DTYPES: Mapping[str, Mapping[str, Any]] = {
    "float32": {"color": BLACK, "marker": "o"},
    "bfloat16": {"color": BLUE, "marker": "s"},
    "float8": {"color": VERMILION, "marker": "D"},
}
ALT = (
    "Gain over float32's mean in units of float32's spread, by task and state dtype, with a small mark for each seed "
    "and a large one for the mean: all but those of float8 in A2C with epsilon inside lie among float32's."
)


def record() -> dict[str, Any]:
    """Return the record of bench/state_training.py."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def training(found: Mapping[str, Any]) -> list[str]:
    """Return the table of the state dtypes: mean and spread of the metric over the seeds."""
    rows = _by_task(found)
    lines = _head("task", "test metric", "seeds", *DTYPES)
    for kept in rows.values():
        first = kept["float32"]
        numbers = [_measured(kept[name]) for name in DTYPES]
        metric = first["unit"] if first["unit"].startswith(first["metric"]) else f"{first['metric']}, {first['unit']}"
        lines.append(_line(first["title"], metric, str(first["seeds"]), *numbers))
    return [*lines, "", f"![{ALT}](figures/state_training.png)"]


def candidates(found: Mapping[str, Any]) -> list[str]:
    """Return the table of the simulated formats: gain over float32, seed by seed, in units of float32's spread."""
    rows = _by_task(found)
    tried = {name: title for name, title in found["formats"].items() if name not in DTYPES}
    tasks = {task: kept for task, kept in rows.items() if tried.keys() & kept.keys()}
    titles = [kept["float32"]["title"] for kept in tasks.values()]
    lines = _head("format of `square_avg`", *titles)
    for name, title in tried.items():
        cells = []
        for kept in tasks.values():
            unit = kept["float32"]["spread"]
            cells.append(
                f"{kept[name]['gained'] / unit:+.1f} ± {kept[name]['error'] / unit:.1f}" if name in kept else ""
            )
        if any(cells):
            lines.append(_line(title, *cells))
    return lines


def ranges(found: Mapping[str, Any]) -> list[str]:
    """Return the table of the √v of each task."""
    rows, columns = _by_task(found), ("lowest", "1 %", "50 %", "99 %", "highest")
    lines = _head("task", *columns, "v = 0")
    for task in rows:
        seen = found["ranges"][task]
        cells = [f"{seen[column]:.1g}" for column in columns]
        lines.append(_line(rows[task]["float32"]["title"], *cells, f"{100 * seen['zeros']:.0f} %"))
    return lines


def steps(found: Mapping[str, Any]) -> list[str]:
    """Return the table of the steps on simulated gradients of size 1, over alphas."""
    lines = _head("format", "alpha", "rms step", "longest step", "spread of √v", "v = 0")
    for row in found["simulated"]:
        if row["g_size"] == 1 and row["g_spread"] == 1.5:
            lengths = [f"{row[key]:.2f} (exact {row[f'exact_{key}']:.2f})" for key in ("rms", "longest")]
            shares = [f"{100 * row[key]:.0f} %" for key in ("spread", "zeros")]
            lines.append(_line(found["formats"][row["format"]], f"{row['alpha']:g}", *lengths, *shares))
    return lines


def decays(found: Mapping[str, Any]) -> list[str]:
    """Return the table of the steps after v has decayed from 1 without gradients."""
    lines = _head("format", "steps of decay", "steps longer than float32's by", "spread of √v")
    for row in found["decayed"]:
        numbers = [str(row["steps"]), f"{100 * row['longer'] - 100:.0f} %", f"{100 * row['spread']:.0f} %"]
        lines.append(_line(found["formats"][row["format"]], *numbers))
    return lines


BLOCKS: Mapping[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "state training": training,
    "state candidates": candidates,
    "state ranges": ranges,
    "state steps": steps,
    "state decays": decays,
}


def page(text: str) -> str:
    """Return the page with up-to-date blocks. Raises: ValueError if it does not have exactly one of each."""
    if sorted(BLOCK.findall(text)) != sorted(BLOCKS):
        raise ValueError(
            f"docs/memory.md needs one <!-- bench: NAME --> with its <!-- end --> for {', '.join(BLOCKS)}"
        )
    found = record()

    def renewed(block: re.Match[str]) -> str:
        """Return a block with its table."""
        return "\n".join([f"<!-- bench: {block[1]} -->", "", *BLOCKS[block[1]](found), "", "<!-- end -->"])

    return BLOCK.sub(renewed, text)


def figure() -> Figure:
    """Draw the gain of every run over float32's mean, in units of float32's spread."""
    found = record()
    rows = _by_task(found)
    drawn, (axes,) = panels(1, 1, (8, 3.6), {"font.size": 11, "legend.fontsize": 10})
    axes.grid(False, axis="x")
    axes.axhspan(-1, 1, color="#000000", alpha=0.08, linewidth=0)
    for j, (task, kept) in enumerate(rows.items()):
        center, unit = kept["float32"]["mean"], kept["float32"]["spread"]
        for i, (name, look) in enumerate(DTYPES.items()):
            values = [
                run["result"][kept[name]["metric"]]
                for run in found["runs"]
                if (run["task"], run["format"]) == (task, name)
            ]
            sign = 1 if kept["float32"]["higher"] else -1
            gains = [sign * (value - center) / unit for value in values]
            place = j + 0.25 * (i - 1)
            axes.plot([place] * len(gains), gains, linestyle="", markersize=3.5, alpha=0.5, **look)
            mean = sum(gains) / len(gains)
            axes.plot([place], [mean], linestyle="", markersize=8, label=name if j == 0 else None, **look)
    axes.set_xticks(range(len(rows)), [kept["float32"]["title"].replace(", ", ",\n") for kept in rows.values()])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_yscale("symlog", linthresh=2)
    axes.set_yticks([-2, -1, 0, 1, 2, 10, 20], ["−2", "−1", "0", "1", "2", "10", "20"])
    axes.minorticks_off()
    axes.set_ylim(-4, 25)
    axes.set_ylabel("gain (spreads of float32)")
    drawn.legend(loc="outside lower center", ncols=3, frameon=False)
    return drawn


def _by_task(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of the summary by task and format."""
    rows: dict[str, dict[str, Any]] = {}
    for row in found["summary"]:
        rows.setdefault(row["task"], {})[row["format"]] = row
    return {task: kept for task, kept in rows.items() if DTYPES.keys() <= kept.keys()}


def _head(*cells: str) -> list[str]:
    """Return the first two lines of a table."""
    return [_line(*cells), "| --- " * len(cells) + "|"]


def _line(*cells: str) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def _measured(row: Mapping[str, Any]) -> str:
    """Return a mean and its spread, to two digits of the spread."""
    places = 3 if row["spread"] < 0.1 else 2 if row["spread"] < 1 else 1 if row["spread"] < 10 else 0
    return f"{row['mean']:.{places}f} ± {row['spread']:.{places}f}"
