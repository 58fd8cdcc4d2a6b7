"""Judge a record of `rmsprop bench --out FILE` by the pass marks of this project: python bench/pass_marks.py FILE

Prints each mark that the record can answer, and adds them to the record under "bars".
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rmsprop.bench.cpu import OURS, TORCH, TRAFFIC, save
from rmsprop.bench.cuda import COLUMNS, OURS_3_BYTES, OURS_BFLOAT16, OURS_FLOAT8, OURS_GRAPH

Row = Mapping[str, Any]
Verdict = tuple[str, float, float, bool]  # the measured quantity, the value reached, the mark, and whether it is met

# The least ratio of torch's best RMSprop to ours for a plain step.
RATIOS = {"rl": 6.0, "nature": 5.0, "mobilenet": 4.0, "500x16": 25.0, "one": 6.0}
BUSY = 3.0  # a2c on busy cores: 99th percentile over the quiet median
STREAM = 0.95  # one: share of the speed at which memory streams
FULL = 1.1  # one: a centered step with momentum over a plain one, beyond the ratio of their memory traffic

# Case, contestant, column, and bound, which is an upper one except in AT_LEAST. The milliseconds are for an H100.
GPU = (
    ("mobilenet", OURS, "wall_ms", 0.12),
    ("resnet50", OURS, "wall_ms", 0.28),
    ("vit", OURS, "of_copy", 0.95),
    ("256M", OURS, "of_copy", 0.97),
    ("rl", OURS, "wall_ms", 0.06),
    ("rl", OURS_GRAPH, "wall_ms", 0.02),
    ("mobilenet", OURS, "launches", 1.0),
    ("mobilenet", OURS, "waits", 0.0),
    ("256M", OURS, "extra_bytes_per_parameter", 0.0),
    # of the copy rate at a float32 step's bytes: at most 1.25, 1.43 and 2.5 by the bytes that they move
    ("256M", OURS_BFLOAT16, "of_copy", 1.12),
    ("256M", OURS_FLOAT8, "of_copy", 1.05),
    ("256M", OURS_3_BYTES, "of_copy", 1.5),
    ("256M", OURS_FLOAT8, "extra_bytes_per_parameter", 0.0),
)
AT_LEAST = ("of_copy",)


def on_cpu(rows: Iterable[Row]) -> list[Verdict]:
    """Return the verdicts on the results of a CPU."""
    rows = list(rows)
    quiet = [row for row in rows if row["variant"] == "plain" and not row["busy"]]
    verdicts = []
    for case, mark in RATIOS.items():
        same = [row for row in quiet if row["case"] == case]
        if not same:
            continue
        ours = min(_median(row, OURS) for row in same)  # each side with the number of threads that suits it best
        ratio = min(_median(row, name) for row in same for name in TORCH) / ours
        verdicts.append((f"{case}: torch's best over ours", ratio, mark, ratio >= mark))
        if case == "rl":
            sgd = min(_median(row, "SGD fused") for row in same) / ours
            verdicts.append(("rl: torch's fused SGD over ours", sgd, 1.0, sgd >= 1))
        if case == "one" and "stream" in same[-1]["times"]:
            share = _median(same[-1], "stream") / _median(same[-1], OURS)
            verdicts.append(("one: of the streaming limit", share, STREAM, share >= STREAM))
    for row in rows:
        plain = [q for q in quiet if (q["case"], q["threads"]) == (row["case"], row["threads"])]
        if not plain:
            continue
        before = _median(plain[0], OURS)
        if row["case"] == "a2c" and row["busy"] and row["variant"] == "plain":
            times = row["times"][OURS]["p99"] / before
            name = f"a2c, {row['threads']} threads, busy: p99 over the quiet median"
            verdicts.append((name, times, BUSY, times <= BUSY))
        if row["case"] == "one" and row["variant"] == "full" and not row["busy"]:
            cost, mark = _median(row, OURS) / before, FULL * TRAFFIC["full"] / TRAFFIC["plain"]
            name = f"one, {row['threads']} threads: centered with momentum over plain"
            verdicts.append((name, cost, mark, cost <= mark))
    return verdicts


def on_gpu(rows: Iterable[Row]) -> list[Verdict]:
    """Return the verdicts on the results of a GPU."""
    by_name = {(row["case"], row["contestant"]): row for row in rows}
    verdicts = []
    for case, contestant, column, bound in GPU:
        reached = by_name.get((case, contestant), {}).get(column)
        if reached is not None:
            met = reached >= bound if column in AT_LEAST else reached <= bound
            verdicts.append((f"{case}, {contestant}: {COLUMNS[column][0]}", reached, bound, met))
    return verdicts


def _median(row: Row, name: str) -> float:
    return float(row["times"][name]["median"])


def rows(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """Return verdicts as they are recorded."""
    return [
        {"bar": what, "reached": round(reached, 4), "needed": round(needed, 4), "met": met}
        for what, reached, needed, met in verdicts
    ]


def judge(path: Path) -> list[str]:
    """Add the verdicts to a record, before its results. Returns: a line for each."""
    record = json.loads(path.read_text(encoding="utf-8"))
    results = record.pop("results")
    verdicts = (on_gpu if "gpu" in record["machine"] else on_cpu)(results)
    save(record | {"bars": rows(verdicts), "results": results}, path)
    return [
        f"{'met   ' if met else 'missed'} {what} {reached:.4g}, bar {needed:.4g}"
        for what, reached, needed, met in verdicts
    ]


if __name__ == "__main__":
    print("\n".join(judge(Path(sys.argv[1]))))
