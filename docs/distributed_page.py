"""The generated blocks and the figure of distributed.md, from the measurements of bench/distributed.py."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rmsprop.style import LOOKS

HERE = Path(__file__).parent
RECORD = HERE.parent / "bench" / "results" / "distributed.json"
CPU = HERE.parent / "bench" / "results" / "cpu.json"
BLOCK = r"<!-- {} -->\n.*?<!-- end -->"
OURS, LOOP, FOREACH = "rmsprop", "torch, for-loop", "torch, foreach"
LINES: Mapping[str, Mapping[str, Any]] = {
    OURS: LOOKS["rmsprop"].marked_line | {"label": "rmsprop"},
    FOREACH: LOOKS["adam"].marked_line | {"label": "torch, foreach"},
    LOOP: LOOKS["sgd"].marked_line | {"label": "torch, for-loop"},
}
TITLES = {"500x16": "500 tensors of 16", "mobilenet": "MobileNetV3-L", "resnet50": "ResNet-50"}
ALT = (
    "Step time against 1, 2 and 4 processes for three models: torch's two take over 3 times as long as rmsprop's, "
    "at every number of processes; with many small tensors no time falls."
)

H100 = 3.0e12  # bytes per second, copying
# name, parameters, processes, bytes per element, bytes per second, tensors (as in Llama: nine per layer, plus three)
SCALES: Sequence[tuple[str, float, int, int, float | None, int]] = (
    ("ResNet-50 on a laptop's CPU, float32", 25.6e6, 1, 20, None, 161),
    ("1 B on an H100, float32", 1e9, 1, 20, H100, 147),
    ("7 B on 8 H100, float32", 7e9, 8, 20, H100, 291),
    ("70 B on 64 H100, float32", 70e9, 64, 20, H100, 723),
    ("70 B on 1,024 H100, float32", 70e9, 1024, 20, H100, 723),
    ("70 B on 1,024 H100, p and g in bfloat16", 70e9, 1024, 14, H100, 723),
)


def record() -> dict[str, Any]:
    """Return the record of bench/distributed.py."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def medians(found: Mapping[str, Any]) -> dict[tuple[str, int, str], float]:
    """Return the medians of processor time in microseconds, by case, number of processes, and optimizer."""
    return {(row["case"], row["world"], row["name"]): row["cpu"]["median"] for row in found["results"]}


def measured() -> str:
    """Return the table of medians."""
    found = record()
    times = medians(found)
    lines = ["| model | tensors, elements | processes | rmsprop | torch's best | ratio |", "| --- " * 6 + "|"]
    own_rows = [row for row in found["results"] if row["name"] == OURS]
    for row in sorted(own_rows, key=lambda row: (row["elements"], row["world"])):
        best = min(times[row["case"], row["world"], name] for name in (LOOP, FOREACH))
        own = row["cpu"]["median"]
        what = f"{row['tensors']}, {row['elements'] / 1e6:.3g} M" if row["world"] == 1 else ""
        title = TITLES[row["case"]] if row["world"] == 1 else ""
        cells = [title, what, str(row["world"]), _time(own), _time(best), f"{best / own:.0f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    machine = found["machine"]
    below = (
        f"{machine['cpu']}, {found['cores']} cores, torch {machine['torch']}; medians of {found['rounds']} rounds, "
    )
    below += f"on a machine that others used too (load {machine['load_before']:.0f})."
    return "\n".join([*lines, "", below, "", f"![{ALT}](figures/distributed.png)"])


def computed() -> str:
    """Return the table of computed times."""
    host = medians(record())["500x16", 4, OURS] / 500
    lines = [
        "| where | elements each | bytes moved each | at | the step | the host | state each |",
        "| --- " * 7 + "|",
    ]
    for where, elements, processes, width, rate, tensors in SCALES:
        each = elements / processes
        speed = rate or cpu_rate()
        cells = [where, f"{each / 1e6:,.1f} M", f"{each * width / 1e9:.3g} GB", f"{speed / 1e9:,.0f} GB/s"]
        cells += [_time(each * width / speed * 1e6), _time(host * tensors), f"{each * 4 / 1e6:,.0f} MB"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"The host: {host:.2g} µs for each tensor, times the tensors."])


def cpu_rate() -> float:
    """Return the bytes per second of the CPU kernel on one large tensor, with all threads."""
    rows = json.loads(CPU.read_text(encoding="utf-8"))["results"]
    row = max(
        (r for r in rows if (r["case"], r["variant"], r["busy"]) == ("one", "plain", False)),
        key=lambda r: int(r["threads"]),
    )
    return float(row["elements"] * 20 / row["times"][OURS]["median"] * 1e6)


def _time(microseconds: float) -> str:
    """Format a time to two or three digits."""
    if microseconds < 1000:
        return f"{microseconds:.0f} µs"
    return f"{microseconds / 1000:.2g} ms" if microseconds < 1e5 else f"{microseconds / 1000:.0f} ms"


def distributed_page() -> str:
    """Return the page with up-to-date generated blocks."""
    page = (HERE / "distributed.md").read_text(encoding="utf-8")
    for name, make in (("measured", measured), ("computed", computed)):
        block = f"<!-- {name} -->\n\n{make()}\n\n<!-- end -->"
        page, count = re.subn(BLOCK.format(name), lambda _, block=block: block, page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"distributed.md needs one <!-- {name} --> with its <!-- end -->")
    return page


def draw(figure: Figure, panels: Sequence[Any]) -> None:
    """Draw the step time against the number of processes, with a panel for each model."""
    times = medians(record())
    worlds = sorted({world for _, world, _ in times})
    for axes, (case, title) in zip(panels, TITLES.items(), strict=True):
        for name, line in LINES.items():
            axes.plot(worlds, [times[case, world, name] / 1000 for world in worlds], **line)
        axes.set(xscale="log", yscale="log", xlabel="processes", title=title)
        axes.set_xticks(worlds, [str(world) for world in worlds])
        axes.minorticks_off()
        axes.set_ylim(0.5, 500)
        axes.set_yticks([1, 10, 100], ["1", "10", "100"])
    panels[0].set_ylabel("step (ms)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
