"""Draw the step lengths of a translation over √v."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from rmsprop.analysis import roots, step_size
from rmsprop.style import BLACK, LECTURE, LOOKS, panels
from rmsprop.translation import Translation


def draw(translation: Translation) -> Figure:
    """Draw the step of a gradient as large as √v: under the source, under the translation, and with ε unchanged."""
    source, target = translation.source_settings, translation.target_settings
    unchanged = {**target, "eps": source["eps"]}
    curves = (
        (f"{translation.source}, original", source, {"color": BLACK, "linestyle": "-"}),
        (f"{translation.target}, translated", target, LOOKS["rmsprop"].line),
        (f"{translation.target}, ε unchanged", unchanged, LOOKS["momentum"].line),
    )
    where = roots(source, target, unchanged)
    figure, (left, right) = panels(1, 2, (13, 5.6), LECTURE)
    for i, (label, settings, line) in enumerate(curves):
        style: dict[str, Any] = {**line, "linewidth": 4.5 - 1.3 * i}
        left.plot(where, [step_size(settings, root) for root in where], label=label, **style)
        right.plot(where, [step_size(settings, r) / step_size(source, r) for r in where], **style)
    low = min(step_size(settings, root) for _, settings, *_ in curves for root in where[80:])
    high = max(step_size(settings, where[-1]) for _, settings, *_ in curves)
    left.set(xscale="log", yscale="log", xlabel="√v", ylabel="step / lr", ylim=(low / 2, high * 2))
    left.set_title("Steps under a constant gradient as large as √v")
    right.set(xscale="log", yscale="log", xlabel="√v", ylabel=f"step / step of {translation.source}")
    right.set_title("Relative to the source")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    exact = ": exact" if translation.exact else ""
    figure.suptitle(f"{translation.source} translated to {translation.target}{exact}")
    return figure
