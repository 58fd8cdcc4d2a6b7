"""What differs between two settings of RMSprop: a record each, with its size and what to do about it."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rmsprop.analysis import Ranges, Settings, agreeing, cap, denominator, nth_step, ratio, steps_until_alike, worst
from rmsprop.dialects import Dialect

GRADIENTS = (1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Constant gradients whose first steps are compared."""


@dataclass(frozen=True)
class Difference:
    """One difference between a translation and its source.

    Attributes:
        kind: the setting of ours that differs.
        source, target: its two values.
        what: the difference, in a sentence.
        size: how much it is, with these numbers.
        advice: what to do about it.
        columns, rows: the size as a table of numbers; empty where a sentence says it all.
        within: for ε, the tolerance -> the ranges of √v in which the steps agree; None where no end was met.
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
    """Two dialects, and all settings of each under our names."""

    here: Dialect
    meant: Settings
    there: Dialect
    said: Settings

    @property
    def names(self) -> tuple[str, str]:
        """What to call the two."""
        alike = self.here.name == self.there.name
        return (f"dialect={self.here.name!r}" if alike else self.here.name), self.there.name

    def sides(self, switch: str) -> tuple[str, str]:
        """The name of the one where a switch is on, then that of the other."""
        return self.names if self.meant[switch] else (self.names[1], self.names[0])

    def state(self, ours: str) -> str:
        """What the target calls a state of ours."""
        return next((theirs for theirs, name in self.there.states.items() if name == ours), f"its {ours}")

    def finding(self, kind: str, what: str, size: str, advice: str, *table: Any) -> Difference:
        """A record, with columns, rows and ranges if there are any."""
        return Difference(kind, self.meant[kind], self.said[kind], what, size, advice, *table)


def findings(
    here: Dialect, meant: Settings, there: Dialect, said: Settings, differing: Iterable[str]
) -> tuple[Difference, ...]:
    """A record for each difference between the settings meant here and those said there.

    Args:
        differing: the names of ours that differ.
    """
    left, pair, found = set(differing), _Pair(here, meant, there, said), []
    for names, measure in _MEASURES:
        if left & set(names):
            found.append(measure(pair))
            left -= set(names)
    return (*found, *(_plain(pair, name) for name in sorted(left)))


_PLACES = {
    "outside": ("√v + ε", "g"),
    "inside": ("√(v + ε)", "g²"),
    "both": ("√(v + ε) + ε", "g² and g"),
    "floor": ("max(√v, ε)", "g"),
}


def _eps(pair: _Pair) -> Difference:
    (a, b), meant, said = pair.names, pair.meant, pair.said
    fixed = "eps" in pair.there.own.fixed
    least, root = worst(meant, said)
    within = {f"{share:.0%}": agreeing(meant, said, share) for share in (0.01, 0.1)}
    size = f"At worst a step of {b} is {least:.3g} times {a}'s, at √v = {root:.3g}. "
    size += " ".join(f"Within {share[:-1]} %: {_ranges(found)}." for share, found in within.items())
    if not fixed and meant["eps"] >= pair.there.own.least_eps and not math.isclose(meant["eps"], said["eps"]):
        naive, root = worst(meant, {**said, "eps": meant["eps"]})
        size += f" The number typed unchanged would make it {naive:.3g} times, at √v = {root:.3g}."
    (place, unit), (other, other_unit) = _PLACES[meant["eps_mode"]], _PLACES[said["eps_mode"]]
    what = f"{a} divides by {place}, with ε = {meant['eps']:g}, and {b} by {other}, with ε = {said['eps']:g}"
    if fixed:
        what += ", which cannot be set."
    elif meant["eps_mode"] == said["eps_mode"] or not meant["eps"]:
        what += ", the smallest that it takes."
    else:
        what += (
            f": ε is in units of {unit} there and {other_unit} here, and no number makes the two equal for every v. "
            "This one gives the same largest 1/d, at v → 0."
        )
    middle = max(cap(meant["eps_mode"], meant["eps"]), cap(said["eps_mode"], said["eps"]))
    roots = [middle * 10**k for k in (-8, -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4)]
    sizes = [[r / denominator(s["eps_mode"], s["eps"], root=r) for s in (meant, said)] for r in roots]
    rows = tuple((r, *pair_of, ratio(meant, said, r)) for r, pair_of in zip(roots, sizes, strict=True))
    return pair.finding(
        "eps",
        what,
        size,
        f"Where √v stays well above {middle:.2g} the two agree; nearer to it, search for the learning rate again.",
        ("√v", f"{a}: |g|/d for |g| = √v", b, "ratio"),
        rows,
        within,
    )


def _start(pair: _Pair, name: str, what: str, advice: str) -> Difference:
    """A difference that wears off: by constant gradients, how large it is and how long it lasts."""
    one, other, rows = pair.meant, {**pair.meant, name: pair.said[name]}, []
    for g in GRADIENTS:
        firsts = nth_step(one, g, 1), nth_step(other, g, 1)
        rows.append((g, *firsts, firsts[1] / firsts[0], float(steps_until_alike(one, other, g))))
    unit, small = next(row for row in rows if row[0] == 1.0), rows[0]
    size = (
        f"For |g| = 1 the first step is {unit[2]:.3g} lr instead of {unit[1]:.3g} lr, {unit[3]:.3g} times, "
        f"and within 1 % from step {unit[4]:.0f} on; for |g| = {small[0]:g} it is {small[3]:.3g} times, and within "
        f"1 % from step {small[4]:.0f} on."
    )
    columns = ("|g|", f"{pair.names[0]}: first step/lr", pair.names[1], "ratio", "within 1 % from step")
    return pair.finding(name, what, size, advice, columns, tuple(rows))


def _v_init(pair: _Pair) -> Difference:
    (a, b), v, other = pair.names, pair.meant["square_avg_init"], pair.said["square_avg_init"]
    what = f"v starts at {v:g} in {a} and at {other:g} in {b}"
    what += "" if v < other else "; the higher start works like a warm-up while g² is below it"
    advice = f"Fill {pair.state('square_avg')} of {b} with {v:g} before the first step: that is exact."
    return _start(pair, "square_avg_init", f"{what}.", advice)


def _bias_correction(pair: _Pair) -> Difference:
    on, off = pair.sides("bias_correction")
    factor = "√(1 − αᵗ)" if pair.meant["bias_correction"] else "1/√(1 − αᵗ)"
    what = f"{on} divides the averages by 1 − αᵗ, as Adam does; {off} does not."
    advice = f"Multiply the learning rate of step t by {factor}: the same without momentum where ε is not felt."
    return _start(pair, "bias_correction", what, advice)


def _centered(pair: _Pair) -> Difference:
    on, off = pair.sides("centered")
    return pair.finding(
        "centered",
        f"{on} divides by the root of v − m², the gradient's variance; {off} by the root of v.",
        f"{on}'s steps are √(1 + (mean/σ)²) times as long, for a gradient of that mean and standard deviation σ: "
        "1.41 times where they are equal, and up to where ε is felt where the gradient is steady.",
        "There is no equivalent: search for the learning rate again, from a lower one where steps become longer.",
        ("mean/σ of the gradient", f"steps of {on}/{off}"),
        tuple((x, math.sqrt(1 + x * x)) for x in (0.1, 0.3, 1.0, 3.0, 10.0)),
    )


def _momentum(pair: _Pair) -> Difference:
    (a, b), mu, other = pair.names, pair.meant["momentum"], pair.said["momentum"]
    return pair.finding(
        "momentum",
        f"momentum is {mu:g} in {a} and {other:g} in {b}, which takes no other.",
        f"In a steady direction {a} moves {1 / (1 - mu):.3g} lr a step and {b} {1 / (1 - other):.3g} lr.",
        f"There is no equivalent; a learning rate {(1 - other) / (1 - mu):.3g} times as high moves as fast in a "
        "steady direction, without averaging over steps.",
    )


def _nesterov(pair: _Pair) -> Difference:
    (on, off), mu = pair.sides("nesterov"), pair.meant["momentum"]
    return pair.finding(
        "nesterov",
        f"{on} looks one momentum step ahead (Nesterov), {off} does not.",
        f"A new gradient counts {1 + mu:.3g} times at once in {on} and once in {off}; in a steady direction both "
        f"settle at {1 / (1 - mu):.3g} lr, {on} one step earlier.",
        "There is no equivalent; they part most at high learning rates.",
    )


def _lr_in_buffer(pair: _Pair) -> Difference:
    (on, off), mu, rows = pair.sides("lr_in_buffer"), pair.meant["momentum"], []
    for factor in (0.97, 0.5, 0.1, 2.0):
        excess, steps = 1 / factor - 1, 1
        while abs(excess) * mu**steps > 0.01:
            steps += 1
        rows.append((factor, 1 + excess * mu, float(steps), excess * mu / (1 - mu)))
    small, _, cut, _ = rows
    rescale = "lr_old/lr_new" if pair.meant["lr_in_buffer"] else "lr_new/lr_old"
    return pair.finding(
        "lr_in_buffer",
        f"{on} multiplies by the learning rate on the way into the momentum buffer, {off} on the way out: the same "
        f"while it is constant. When it changes, {on}'s buffer keeps the old one for about 1/(1 − momentum) = "
        f"{1 / (1 - mu):.3g} steps.",
        f"After lr × 0.1 the next step of {on} is {cut[1]:.3g} times {off}'s, within 1 % from step {cut[2]:.0f} on; "
        f"in all it goes {cut[3]:.3g} of the new steps farther. After lr × 0.97 it is {small[1]:.3g} times.",
        f"With a constant learning rate nothing. Else multiply {pair.state('momentum_buffer')} of {pair.names[1]} by "
        f"{rescale} at every change: that is exact unless one of them is 0.",
        ("lr ×", f"next step, {on}/{off}", "within 1 % from step", "farther, in new steps"),
        tuple(rows),
    )


def _maximize(pair: _Pair) -> Difference:
    a, b = pair.names
    advice = "Minimise the loss with a minus sign: that is exact."
    return pair.finding("maximize", f"{a} goes uphill, {b} downhill.", "Every step has the other sign.", advice)


def _weight_decay(pair: _Pair) -> Difference:
    (a, b), meant, said = pair.names, pair.meant, pair.said
    if said["weight_decay"]:
        return _corrected(pair) if said["weight_decay_mode"] != "corrected" else _plain(pair, "reference_lr")
    lr, wd, mode = meant["lr"], meant["weight_decay"], meant["weight_decay_mode"]
    kinds = {"l2": "adds wd·p to the gradient", "l1": "adds wd·sign(p) to the gradient"}
    has = "weight_decay" in (*pair.there.own.takes, *pair.there.own.composed)
    reason = kinds.get(said["weight_decay_mode"], "shrinks p by lr·wd") if has else "has none"
    what = f"Weight decay {wd:g} {kinds.get(mode, 'shrinks p')} in {a} ({mode}); {b}'s {reason}"
    what = what.replace(f"{b}'s has none", f"{b} has none") + ", so it is left out."
    pull, penalty = ("p", f"{wd / 2:g}·Σp²") if mode == "l2" else ("sign(p)", f"{wd:g}·Σ|p|")
    joins = f"Add {penalty} to the loss, whose gradient is wd·{pull}: that is exact."
    if any(meant[name] is not None for name in _CLIPPED) and not meant["clip_after_decay"]:
        joins = f"Clip the gradients by hand and add {wd:g}·{pull} to them after that: that is exact."
    ways = {
        "l2": joins,
        "l1": joins,
        "decoupled": f"Multiply p by 1 − lr·{wd:g} before each step: that is exact.",
        "corrected": f"Multiply p by 1 − lr²/{meant['reference_lr'] or lr:g}·{wd:g} before each step: that is exact.",
    }
    rows = tuple(
        (r, lr * wd / denominator(meant["eps_mode"], meant["eps"], root=r), lr * wd)
        for r in (1e-3, 1e-2, 0.1, 1.0, 10.0)
    )
    if mode in kinds:
        size = (
            "The pull is divided by d like every gradient: where the loss is flat it moves p by "
            f"{rows[0][1]:.3g} times {pull} a step at √v = 0.001 and {rows[3][1]:.3g} "
            f"at √v = 1. Decoupled, the same number takes {lr * wd:.3g} times p everywhere."
        )
    else:
        halving = f", half of it in {math.log(2) / (lr * wd):.3g} steps" if lr * wd else ""
        size = f"p shrinks by {lr * wd:.3g} of itself a step{halving}; as l2 the same number would be divided by d."
    return pair.finding("weight_decay", what, size, ways[mode], ("√v", "lr·wd/d (l2, l1)", "lr·wd (decoupled)"), rows)


def _corrected(pair: _Pair) -> Difference:
    """Decoupled where corrected is meant."""
    a, b = pair.names
    return pair.finding(
        "weight_decay_mode",
        f"p shrinks by lr²/reference_lr·wd in {a} and by lr·wd in {b}: the same while lr is at its highest.",
        f"When lr has fallen to a tenth, {b} decays 10 times as strongly as {a}.",
        f"Multiply the weight decay of {b} by lr/reference_lr at every change of lr: that is exact.",
        ("lr/reference_lr", f"decay of {b}/{a}"),
        tuple((share, 1 / share) for share in (1.0, 0.5, 0.1, 0.01)),
    )


# What each bounds, and how that is done in torch.
_CLIPPED = {
    "clip_value": ("each element of the gradient", "clip_grad_value_(params, {:g})"),
    "clip_norm": ("the norm of each tensor's gradient", "clip_grad_norm_(p, {:g}) for each p"),
    "clip_global_norm": ("the norm of all gradients together", "clip_grad_norm_(params, {:g})"),
}


def _clip(name: str) -> Callable[[_Pair], Difference]:
    def _measure(pair: _Pair) -> Difference:
        (a, b), meant, bound = pair.names, pair.meant, pair.meant[name]
        alpha, rows = meant["alpha"], []
        for size in (2.0, 10.0, 100.0):  # after gradients at the bound
            v = alpha + (1 - alpha) * size * size
            rows.append((size, size / math.sqrt(v), 1 / math.sqrt(alpha * v + 1 - alpha)))
        words, call = _CLIPPED[name]
        shown = f"torch.nn.utils.{call.format(bound)} in torch"
        advice = f"Clip it before each step ({shown}{', to 1e-6 of the bound' if 'norm' in name else ''}): exact"
        decays = meant["weight_decay"] and meant["clip_after_decay"] and meant["weight_decay_mode"] in ("l2", "l1")
        advice += ", if the decay is added to the gradient by hand before that." if decays else "."
        return pair.finding(
            name,
            f"{a} bounds {words} by {bound:g}; nothing in this call of {b} does.",
            f"A gradient 10 times over the bound makes a step {rows[1][1]:.3g} times as long, and the steps after it "
            f"{rows[1][2]:.3g} times, for about 1/(1 − alpha) = {1 / (1 - alpha):.3g} steps, as v remembers.",
            advice,
            ("gradient/bound", "its step, unclipped/clipped", "the step after it"),
            tuple(rows),
        )

    return _measure


def _clip_weights(pair: _Pair) -> Difference:
    (a, b), bound = pair.names, pair.meant["clip_weights"]
    return pair.finding(
        "clip_weights",
        f"{a} keeps each weight within ±{bound:g}; {b} does not.",
        "Every weight that leaves the bounds differs by what it is beyond them.",
        f"Clamp the weights after each step: that is exact (in torch: p.data.clamp_({-bound:g}, {bound:g})).",
    )


def _clip_order(pair: _Pair) -> Difference:
    on, off = pair.sides("clip_after_decay")
    return pair.finding(
        "clip_after_decay",
        f"{on} clips the gradient with the weight decay in it, {off} before the decay joins.",
        f"Where something is clipped, {off} adds the pull of the decay whole, and {on} cuts it with the rest.",
        "Clip by hand in the source's order, and leave the target's clipping out: that is exact.",
    )


def _clip_last(pair: _Pair) -> Difference:
    on, off = pair.sides("clip_value_last")
    return pair.finding(
        "clip_value_last",
        f"{on} clips the norm before the elements, {off} the elements before the norm.",
        f"Where both are over their bounds, {off} keeps more of the small elements beside a large one.",
        "Clip by hand in the source's order, and leave the target's clipping out: that is exact.",
    )


def _plain(pair: _Pair, name: str) -> Difference:
    """A difference that nobody has measured."""
    what = f"{name} is {pair.meant[name]!r} in {pair.names[0]} and {pair.said[name]!r} in {pair.names[1]}."
    return pair.finding(name, what, "Not measured here.", "Take the source's dialect, which is exact.")


# Which settings a measure speaks of, in the order of reading.
_MEASURES: tuple[tuple[tuple[str, ...], Callable[[_Pair], Difference]], ...] = (
    (("eps", "eps_mode"), _eps),
    (("square_avg_init",), _v_init),
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


def _ranges(found: Ranges) -> str:
    """Ranges of √v in words."""
    parts = []
    for low, high in found:
        bounds = [f"above {low:.3g}" if low is not None else "", f"below {high:.3g}" if high is not None else ""]
        parts.append(" and ".join(filter(None, bounds)) or "everywhere")
    return "√v " + " or ".join(parts) if parts else "nowhere"
