"""The differences between two settings of RMSprop, each with its size and a workaround."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rmsprop.analysis import (
    Ranges,
    Settings,
    agreeing,
    denominator,
    nth_step,
    ratio,
    smallest_d,
    steps_until_alike,
    worst,
)
from rmsprop.dialects import Dialect

GRADIENTS = (1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Constant gradients for the comparison of first steps."""


@dataclass(frozen=True)
class Difference:
    """One difference between a translation and its source.

    Attributes:
        kind: the setting that differs, under our name.
        source, target: its two values.
        what: a sentence about the difference.
        size: its size under the given numbers, in words.
        advice: the workaround.
        columns, rows: its size as a table of numbers, or empty.
        within: for ε, a tolerance -> the ranges of √v within which the steps agree; None is an open end.
    """

    kind: str
    source: Any
    target: Any
    what: str
    size: str
    advice: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[float, ...], ...] = ()
    within: Mapping[str, Ranges] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pair:
    """Two dialects with all settings of each, under our names."""

    here: Dialect
    original: Settings
    there: Dialect
    translated: Settings

    @property
    def names(self) -> tuple[str, str]:
        """The names of the two sides in a sentence."""
        alike = self.here.name == self.there.name
        return (f"dialect={self.here.name!r}" if alike else self.here.name), self.there.name

    def sides(self, switch: str) -> tuple[str, str]:
        """Return the name of the side where a switch is on, then the other name."""
        return self.names if self.original[switch] else (self.names[1], self.names[0])

    def state(self, ours: str) -> str:
        """Return the target's name for a state of ours."""
        return next((theirs for theirs, name in self.there.states.items() if name == ours), f"its {ours}")

    def finding(self, kind: str, what: str, size: str, advice: str, *table: Any) -> Difference:
        """Return a difference, with columns, rows and ranges if given."""
        return Difference(kind, self.original[kind], self.translated[kind], what, size, advice, *table)


def findings(
    here: Dialect, original: Settings, there: Dialect, translated: Settings, differing: Iterable[str]
) -> tuple[Difference, ...]:
    """Return the differences between the original settings and the translated ones.

    Args:
        differing: the names of the settings that differ, under our names.
    """
    left, pair, differences = set(differing), _Pair(here, original, there, translated), []
    for names, measure in _MEASURES:
        if left & set(names):
            differences.append(measure(pair))
            left -= set(names)
    return (*differences, *(_plain(pair, name) for name in sorted(left)))


_PLACES = {
    "outside": ("√v + ε", "g"),
    "inside": ("√(v + ε)", "g²"),
    "both": ("√(v + ε) + ε", "g² and g"),
    "floor": ("max(√v, ε)", "g"),
}


def _eps(pair: _Pair) -> Difference:
    (a, b), original, translated = pair.names, pair.original, pair.translated
    fixed = "eps" in pair.there.own.fixed
    least, root = worst(original, translated)
    within = {f"{share:.0%}": agreeing(original, translated, share) for share in (0.01, 0.1)}
    size = f"In the worst case, a step of {b} is {least:.3g} times {a}'s, at √v = {root:.3g}. "
    size += " ".join(f"Within {share[:-1]} %: {_ranges(ranges)}." for share, ranges in within.items())
    if (
        not fixed
        and original["eps"] >= pair.there.own.least_eps
        and not math.isclose(original["eps"], translated["eps"])
    ):
        naive, root = worst(original, {**translated, "eps": original["eps"]})
        size += f" With ε unchanged it would be {naive:.3g} times, at √v = {root:.3g}."
    (place, unit), (other, other_unit) = _PLACES[original["eps_mode"]], _PLACES[translated["eps_mode"]]
    what = f"{a} divides by {place}, with ε = {original['eps']:g}, and {b} by {other}, with ε = {translated['eps']:g}"
    if fixed:
        what += ", which is fixed."
    elif original["eps_mode"] == translated["eps_mode"] or not original["eps"]:
        what += ", the smallest it takes."
    else:
        units = f"ε is in units of {unit} in {a} and of {other_unit} in {b}. " if unit != other_unit else ""
        what += f". {units}No value makes the two equal for every v; this one gives the same largest 1/d, at v → 0."
    middle = max(
        smallest_d(original["eps_mode"], original["eps"]),
        smallest_d(translated["eps_mode"], translated["eps"]),
    )
    roots = [middle * 10**k for k in (-8, -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4)]
    sizes = [[r / denominator(s["eps_mode"], s["eps"], root=r) for s in (original, translated)] for r in roots]
    rows = tuple((r, *pair_of, ratio(original, translated, r)) for r, pair_of in zip(roots, sizes, strict=True))
    return pair.finding(
        "eps",
        what,
        size,
        f"The two agree where √v stays well above {middle:.2g}; closer to it, tune the learning rate again.",
        ("√v", f"{a}: |g|/d for |g| = √v", b, "ratio"),
        rows,
        within,
    )


def _start(pair: _Pair, name: str, what: str, advice: str) -> Difference:
    """Return a difference that fades, with its size and duration under constant gradients."""
    one, other, rows = pair.original, {**pair.original, name: pair.translated[name]}, []
    for g in GRADIENTS:
        firsts = nth_step(one, g, 1), nth_step(other, g, 1)
        rows.append((g, *firsts, firsts[1] / firsts[0], float(steps_until_alike(one, other, g))))
    unit, small = next(row for row in rows if row[0] == 1.0), rows[0]
    size = (
        f"For |g| = 1, the first step is {unit[2]:.3g} lr instead of {unit[1]:.3g} lr ({unit[3]:.3g} times); the "
        f"steps agree within 1 % from step {unit[4]:.0f} on. For |g| = {small[0]:g}, the first step is "
        f"{small[3]:.3g} times as long; the steps agree within 1 % from step {small[4]:.0f} on."
    )
    columns = ("|g|", f"{pair.names[0]}: first step/lr", pair.names[1], "ratio", "within 1 % from step")
    return pair.finding(name, what, size, advice, columns, tuple(rows))


def _square_avg_init(pair: _Pair) -> Difference:
    (a, b), v, other = pair.names, pair.original["square_avg_init"], pair.translated["square_avg_init"]
    what = f"v starts at {v:g} in {a} and at {other:g} in {b}"
    what += "" if v < other else "; the higher start acts as a warm-up while g² is below it"
    advice = f"For exact steps, fill {pair.state('square_avg')} of {b} with {v:g} before the first step."
    return _start(pair, "square_avg_init", f"{what}.", advice)


def _bias_correction(pair: _Pair) -> Difference:
    on, off = pair.sides("bias_correction")
    factor = "√(1 − αᵗ)" if pair.original["bias_correction"] else "1/√(1 − αᵗ)"
    what = f"{on} divides the averages by 1 − αᵗ, as Adam does; {off} does not."
    advice = (
        f"Multiply the learning rate of step t by {factor}, which is exact without momentum where ε is negligible."
    )
    return _start(pair, "bias_correction", what, advice)


def _centered(pair: _Pair) -> Difference:
    on, off = pair.sides("centered")
    return pair.finding(
        "centered",
        f"{on} divides by the root of v − m², the variance of the gradient; {off} divides by the root of v.",
        f"{on}'s steps are √(1 + (mean/σ)²) times as long, for a gradient of that mean and standard deviation σ. "
        "The factor is 1.41 if the two are equal; for a constant gradient only ε limits it.",
        "There is no equivalent. Tune the learning rate again, starting lower if steps become longer.",
        ("mean/σ of the gradient", f"steps of {on}/{off}"),
        tuple((x, math.sqrt(1 + x * x)) for x in (0.1, 0.3, 1.0, 3.0, 10.0)),
    )


def _momentum(pair: _Pair) -> Difference:
    (a, b), mu, other = pair.names, pair.original["momentum"], pair.translated["momentum"]
    return pair.finding(
        "momentum",
        f"momentum is {mu:g} in {a} and {other:g} in {b}, which supports no other value.",
        f"In a constant direction, {a} moves {1 / (1 - mu):.3g} lr per step and {b} {1 / (1 - other):.3g} lr.",
        f"There is no equivalent. A learning rate {(1 - other) / (1 - mu):.3g} times as high moves as fast in a "
        "constant direction, but without averaging over steps.",
    )


def _nesterov(pair: _Pair) -> Difference:
    (on, off), mu = pair.sides("nesterov"), pair.original["momentum"]
    return pair.finding(
        "nesterov",
        f"{on} uses Nesterov momentum; {off} does not.",
        f"In its first step, a new gradient has weight {1 + mu:.3g} in {on} and 1 in {off}. In a constant direction "
        f"both converge to {1 / (1 - mu):.3g} lr per step, {on} one step earlier.",
        "There is no equivalent; the two differ most at high learning rates.",
    )


def _lr_in_buffer(pair: _Pair) -> Difference:
    (on, off), mu, rows = pair.sides("lr_in_buffer"), pair.original["momentum"], []
    for factor in (0.97, 0.5, 0.1, 2.0):
        excess, steps = 1 / factor - 1, 1
        while abs(excess) * mu**steps > 0.01:
            steps += 1
        rows.append((factor, 1 + excess * mu, float(steps), excess * mu / (1 - mu)))
    small, _, cut, _ = rows
    rescale = "lr_old/lr_new" if pair.original["lr_in_buffer"] else "lr_new/lr_old"
    return pair.finding(
        "lr_in_buffer",
        f"{on} applies the learning rate before the momentum buffer, {off} after it. Both are equal while the rate "
        f"is constant. When it changes, {on}'s buffer keeps the old rate for about 1/(1 − momentum) = "
        f"{1 / (1 - mu):.3g} steps.",
        f"After lr × 0.1, the next step of {on} is {cut[1]:.3g} times {off}'s; the steps agree within 1 % from step "
        f"{cut[2]:.0f} on, and {on} moves farther by {cut[3]:.3g} new steps in all. After lr × 0.97, the next step "
        f"is {small[1]:.3g} times {off}'s.",
        f"Do nothing if the learning rate is constant. Otherwise, for exact steps, multiply "
        f"{pair.state('momentum_buffer')} of {pair.names[1]} by {rescale} at every change, unless one of them is 0.",
        ("lr ×", f"next step, {on}/{off}", "within 1 % from step", "farther, in new steps"),
        tuple(rows),
    )


def _maximize(pair: _Pair) -> Difference:
    a, b = pair.names
    advice = "For exact steps, minimize the negative loss."
    return pair.finding("maximize", f"{a} maximizes, {b} minimizes.", "Every step has the opposite sign.", advice)


def _weight_decay(pair: _Pair) -> Difference:
    (a, b), original, translated = pair.names, pair.original, pair.translated
    if translated["weight_decay"]:
        return _corrected(pair) if translated["weight_decay_mode"] != "corrected" else _plain(pair, "reference_lr")
    lr, wd, mode = original["lr"], original["weight_decay"], original["weight_decay_mode"]
    kinds = {"l2": "adds wd·p to the gradient", "l1": "adds wd·sign(p) to the gradient"}
    has = "weight_decay" in (*pair.there.own.takes, *pair.there.own.composed)
    reason = kinds.get(translated["weight_decay_mode"], "shrinks p by lr·wd")
    theirs = f"{b}'s {reason}" if has else f"{b} has none"
    what = f"Weight decay {wd:g} {kinds.get(mode, 'shrinks p')} in {a} ({mode}); {theirs}, so it is left out."
    pull, penalty = ("p", f"{wd / 2:g}·Σp²") if mode == "l2" else ("sign(p)", f"{wd:g}·Σ|p|")
    joins = f"For exact steps, add {penalty} to the loss; its gradient is wd·{pull}."
    if any(original[name] is not None for name in _CLIPPED) and not original["clip_after_decay"]:
        joins = f"For exact steps, clip the gradients by hand and then add {wd:g}·{pull} to them."
    ways = {
        "l2": joins,
        "l1": joins,
        "decoupled": f"For exact steps, multiply p by 1 − lr·{wd:g} before each step.",
        "corrected": f"For exact steps, multiply p by 1 − lr²/{original['reference_lr'] or lr:g}·{wd:g} before each "
        "step.",
    }
    rows = tuple(
        (r, lr * wd / denominator(original["eps_mode"], original["eps"], root=r), lr * wd)
        for r in (1e-3, 1e-2, 0.1, 1.0, 10.0)
    )
    if mode in kinds:
        size = (
            "The decay is divided by d like every gradient. Where the loss is flat, each step moves p by "
            f"{rows[0][1]:.3g}·{pull} at √v = 0.001 and by {rows[3][1]:.3g}·{pull} at √v = 1. As decoupled decay, "
            f"the same number would move p by {lr * wd:.3g}·p at any √v."
        )
    else:
        halving = f", by half in {math.log(2) / (lr * wd):.3g} steps" if lr * wd else ""
        size = f"p shrinks by the fraction {lr * wd:.3g} per step{halving}. As l2, the same number is divided by d."
    return pair.finding("weight_decay", what, size, ways[mode], ("√v", "lr·wd/d (l2, l1)", "lr·wd (decoupled)"), rows)


def _corrected(pair: _Pair) -> Difference:
    """Return the difference of decoupled decay from the original's corrected decay."""
    a, b = pair.names
    return pair.finding(
        "weight_decay_mode",
        f"p shrinks by lr²/reference_lr·wd in {a} and by lr·wd in {b}; the two are equal while lr is at its highest.",
        f"When lr is a tenth of that, {b} decays 10 times as strongly as {a}.",
        f"For exact steps, multiply the weight decay of {b} by lr/reference_lr at every change of lr.",
        ("lr/reference_lr", f"decay of {b}/{a}"),
        tuple((share, 1 / share) for share in (1.0, 0.5, 0.1, 0.01)),
    )


# The quantity that each argument bounds, and the function of torch that does the same.
_CLIPPED = {
    "clip_value": ("each element of the gradient", "clip_grad_value_(params, {:g})"),
    "clip_norm": ("the norm of each tensor's gradient", "clip_grad_norm_(p, {:g}) for each p"),
    "clip_global_norm": ("the norm of all gradients together", "clip_grad_norm_(params, {:g})"),
}


def _clip(name: str) -> Callable[[_Pair], Difference]:
    def _measure(pair: _Pair) -> Difference:
        (a, b), original, bound = pair.names, pair.original, pair.original[name]
        alpha, rows = original["alpha"], []
        for size in (2.0, 10.0, 100.0):  # after gradients at the bound
            v = alpha + (1 - alpha) * size * size
            rows.append((size, size / math.sqrt(v), 1 / math.sqrt(alpha * v + 1 - alpha)))
        bounded, call = _CLIPPED[name]
        shown = f"torch.nn.utils.{call.format(bound)}"
        error = ", which is exact up to 1e-6 of the bound" if "norm" in name else ""
        advice = f"For exact steps, clip before each step with {shown}{error}."
        decays = original["weight_decay"] and original["weight_decay_mode"] in ("l2", "l1")
        if decays and original["clip_after_decay"]:
            advice += " Before clipping, add the weight decay to the gradient by hand."
        return pair.finding(
            name,
            f"{a} bounds {bounded} by {bound:g}; this call of {b} does not.",
            f"A gradient of 10 times the bound makes the step {rows[1][1]:.3g} times as long without clipping. "
            f"The steps after it are {rows[1][2]:.3g} times as long, for about 1/(1 − alpha) = {1 / (1 - alpha):.3g} "
            "steps, since v includes the large gradient.",
            advice,
            ("gradient/bound", "its step, unclipped/clipped", "the step after it"),
            tuple(rows),
        )

    return _measure


def _clip_weights(pair: _Pair) -> Difference:
    (a, b), bound = pair.names, pair.original["clip_weights"]
    return pair.finding(
        "clip_weights",
        f"{a} clamps each weight to ±{bound:g}; {b} does not.",
        "Every weight outside the bounds differs by its excess.",
        f"For exact steps, clamp the weights after each step (in torch: p.data.clamp_({-bound:g}, {bound:g})).",
    )


def _clip_order(pair: _Pair) -> Difference:
    on, off = pair.sides("clip_after_decay")
    return pair.finding(
        "clip_after_decay",
        f"{on} clips the gradient after adding weight decay, {off} before.",
        f"When a gradient exceeds the bound, {off} adds the full weight decay and {on} clips it with the rest.",
        "For exact steps, clip by hand in the source's order and leave out the target's clipping.",
    )


def _clip_last(pair: _Pair) -> Difference:
    on, off = pair.sides("clip_value_last")
    return pair.finding(
        "clip_value_last",
        f"{on} clips the norm before the elements, {off} the elements before the norm.",
        f"When both exceed their bounds, {off} keeps more of the small elements beside a large one.",
        "For exact steps, clip by hand in the source's order and leave out the target's clipping.",
    )


def _plain(pair: _Pair, name: str) -> Difference:
    """Return a difference without a measure of its size."""
    what = f"{name} is {pair.original[name]!r} in {pair.names[0]} and {pair.translated[name]!r} in {pair.names[1]}."
    return pair.finding(name, what, "Not measured.", "For exact steps, use RMSprop with the source's dialect.")


# The measures with the settings that they cover, in the order of the findings.
_MEASURES: tuple[tuple[tuple[str, ...], Callable[[_Pair], Difference]], ...] = (
    (("eps", "eps_mode"), _eps),
    (("square_avg_init",), _square_avg_init),
    (("bias_correction",), _bias_correction),
    (("centered",), _centered),
    (("momentum",), _momentum),
    (("nesterov",), _nesterov),
    (("lr_in_buffer",), _lr_in_buffer),
    (("weight_decay", "weight_decay_mode", "reference_lr"), _weight_decay),
    *(((name,), _clip(name)) for name in _CLIPPED),
    (("clip_weights",), _clip_weights),
    (("clip_after_decay",), _clip_order),
    (("clip_value_last",), _clip_last),
    (("maximize",), _maximize),
)


def _ranges(ranges: Ranges) -> str:
    """Return ranges of √v in words."""
    parts = []
    for low, high in ranges:
        bounds = [f"above {low:.3g}" if low is not None else "", f"below {high:.3g}" if high is not None else ""]
        parts.append(" and ".join(filter(None, bounds)) or "everywhere")
    return "√v " + " or ".join(parts) if parts else "nowhere"
