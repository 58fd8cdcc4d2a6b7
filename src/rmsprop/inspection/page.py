"""An inspection as sentences, as table cells, and as one HTML page that needs no network.

The page escapes every string from the file, since a parameter may be called <script>.
"""

from __future__ import annotations

import math

from rmsprop import style
from rmsprop.inspection.checkpoint import STUCK, Inspection, Row
from rmsprop.printing import in_html
from rmsprop.style import BLUE, SKY, VERMILION

HEADINGS = (
    "parameter",
    "shape",
    "steps",
    "αᵗ",
    "effective lr (10 % to 90 %)",
    "ε rules",
    "stuck",
    "untouched",
    "NaN, inf",
    "state",
)
MEANINGS = {
    "effective lr": "lr/d, the factor on an element's gradient: the median element, and the middle 80 %",
    "αᵗ": "the fraction of v's initial value that is left",
    "ε rules": "elements where ε exceeds √w, or w where ε is inside the root; they train as with SGD",
    "stuck": f"elements whose √w is more than {STUCK:g} times the median; after a gradient spike they hardly move",
    "untouched": "elements that never had a gradient; ε rules and stuck are shares of the others",
    "NaN, inf": "such elements of the state and, after a +, of the parameter",
}
PLAIN, BAND, LOUD = BLUE, SKY, VERMILION

CSS = (
    style.CSS
    + """
body { max-width: 80rem; }
h1 { overflow-wrap: anywhere; }
p, li, dd { max-width: 44rem; overflow-wrap: anywhere; }
pre { padding: .5rem .8rem; overflow-x: auto; }
table { font-size: .9rem; }
th, td { padding: .3rem .7rem; }
.loud { color: var(--loud); font-weight: 600; }
"""
)


def sentences(found: Inspection) -> list[str]:
    """Return the lines above the table: the file, its settings, totals, and assumptions."""
    totals = found.totals()
    steps = "an unknown number of steps" if totals["steps"] is None else _counted(totals["steps"], "step")
    lines = [f"{found.file}: {found.title}, after {steps}"]
    for i, settings in enumerate(found.settings):
        said = ", ".join(f"{name}={_said(value)}" for name, value in settings.items())
        lines.append(f"group {i}: {said}")
    lines.append(
        f"{_counted(totals['parameters'], 'parameter')}, {_counted(totals['elements'], 'element')}, "
        f"{_counted(totals['bytes'], 'byte')} of state; "
        f"ε rules {totals['below_eps']:.1%}, stuck {totals['stuck']:.1%}, untouched {_share(totals['untouched'])}, "
        f"{totals['nonfinite'] + totals['nonfinite_params']} NaN or infinite"
    )
    return lines + [f"assumed: {sentence}" for sentence in found.assumed]


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _share(value: float | None) -> str:
    return "?" if value is None else f"{value:.1%}"


def cells(row: Row) -> list[str]:
    """Return a parameter's line of the table."""
    rates = f"{row.lr_median:.2g} ({row.lr_low:.2g} to {row.lr_high:.2g})"
    bad = f"{row.nonfinite}" + (f" + {row.nonfinite_params}" if row.nonfinite_params else "")
    each = row.bytes / row.elements if row.elements else 0
    return [
        row.name,
        "×".join(map(str, row.shape)) or "scalar",
        "?" if row.step is None else str(row.step),
        "?" if row.fresh is None else f"{row.fresh:.2g}",
        rates,
        _percent(row.below_eps),
        _percent(row.stuck) + (f", {_counted(round(row.steps_stuck), 'step')}" if row.steps_stuck >= 1 else ""),
        "?" if row.untouched is None else _percent(row.untouched),
        bad,
        f"{row.dtype}, {each:g} B each",
    ]


def page(found: Inspection) -> str:
    """Return the whole page as text."""
    head = "".join(f"<th{' colspan=2' if i == 4 else ''}>{in_html(name)}</th>" for i, name in enumerate(HEADINGS))
    limits = _limits(found)
    body = "".join(_line(row, limits, float(found.settings[row.group]["lr"])) for row in found.rows)
    first, *rest = sentences(found)
    rules = "".join(f"<pre>{chr(10).join(map(in_html, lines))}</pre>" for lines in found.equations)
    meanings = "".join(f"<dt>{in_html(name)}</dt><dd>{in_html(text)}</dd>" for name, text in MEANINGS.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>RMSprop state of {in_html(found.file)}</title>
<style>{CSS}</style>
</head>
<body>
<h1>{in_html(first)}</h1>
<ul>{"".join(f"<li>{in_html(line)}</li>" for line in rest)}</ul>
{rules}
<p>Bars are effective learning rates from the 10 % to the 90 % quantile of a parameter's elements, on one logarithmic
scale from {limits[0]:.1g} to {limits[1]:.1g}. The tick is the median, the dashed line the lr of the parameter's
group.</p>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<dl>{meanings}</dl>
</body>
</html>
"""


def _line(row: Row, limits: tuple[float, float], lr: float) -> str:
    loud = {5: row.below_eps > 0.5, 6: row.stuck > 0, 8: row.nonfinite + row.nonfinite_params > 0}
    line = ""
    for i, cell in enumerate(cells(row)):
        mark = ' class="loud"' if loud.get(i) else ""
        line += f"<td>{_bar(row, limits, lr)}</td>" if i == 4 else ""
        line += f"<td{mark}>{in_html(cell)}</td>"
    return f"<tr>{line}</tr>"


def _limits(found: Inspection) -> tuple[float, float]:
    """Return one range for all bars, so that parameters can be compared."""
    rates = [rate for row in found.rows for rate in (row.lr_low, row.lr_high)]
    rates += [float(settings["lr"]) for settings in found.settings]
    known = [rate for rate in rates if 0 < rate < math.inf]
    return (min(known) / 1.5, max(known) * 1.5) if known else (0.1, 10.0)


def _bar(row: Row, limits: tuple[float, float], lr: float) -> str:
    """Return the range of a parameter's rates as a small SVG picture."""

    def _at(rate: float) -> float:
        """Return a rate's position, 0 to 120; infinite and undefined rates stand at the right end."""
        if not 0 < rate < math.inf:
            return 0.0 if rate == 0 else 120.0
        low, high = (math.log(limit) for limit in limits)
        return min(120.0, max(0.0, 120 * (math.log(rate) - low) / (high - low)))

    if math.isnan(row.lr_median):
        return ""
    left, middle, right, nominal = (_at(rate) for rate in (row.lr_low, row.lr_median, row.lr_high, lr))
    return (
        '<svg width="120" height="14" viewBox="0 0 120 14" aria-hidden="true">'
        f'<line x1="{nominal:.1f}" x2="{nominal:.1f}" y1="0" y2="14" stroke="{LOUD}" stroke-dasharray="2 2"/>'
        f'<rect x="{left:.1f}" y="4" width="{max(right - left, 1):.1f}" height="6" fill="{BAND}"/>'
        f'<rect x="{middle - 1:.1f}" y="2" width="2" height="10" fill="{PLAIN}"/></svg>'
    )


def _percent(share: float) -> str:
    return "0" if share == 0 else "<0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


def _said(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else "unknown" if value is None else str(value)
