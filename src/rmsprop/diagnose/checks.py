"""What can be wrong with an optimizer: one check for each finding, with its threshold and the reason for it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from rmsprop import analysis
from rmsprop.diagnose.facts import Facts
from rmsprop.diagnose.readings import STUCK, Reading
from rmsprop.diagnose.usage import Found, clip_zero, momentum_switched, names, no_gradient, slow_path, zero_grad
from rmsprop.printing import shown
from rmsprop.settings import TORCH_GROUP
from rmsprop.settings.group_keys import is_noted, resembling
from rmsprop.tensors.bucket import arithmetic_dtype

FIRST_SHARE = 1.0  # a first step as long as the weights replaces the initialisation
STEADY_SHARE = 0.25  # what momentum adds up to: four steps of it replace the weights
STEP_SHARE = 0.1  # of a step in mid-training; 1e-3 is usual
TENFOLD = 10.0  # beyond a threshold by this, or a step as long as the weights, it is an error
MOST = 0.5  # "most elements"
ALMOST_ALL = 0.9
NEAR_SIGN = 0.5  # an alpha below this remembers fewer than two gradients
CANCELLING = 0.01  # a share of elements whose steps ε alone bounds


def _nonfinite(f: Facts) -> Found:
    for part, what, change in (
        ("bad_params", "the parameters", "Go back to a checkpoint from before they appeared"),
        (
            "bad_grads",
            "the gradients",
            "They enter the averages for good: nonfinite='skip' leaves such a step out",
        ),
        (
            "bad_state",
            "the state",
            "They stay: later steps of these elements are NaN or 0. Load an older checkpoint",
        ),
    ):
        bad = [x for x in f.tensors if x.sums[part]]
        if bad and not (part == "bad_grads" and f.history.nonfinite != "propagate"):
            count = f.total(part)
            yield "error", f"{count:.0f} NaN or infinite elements in {what}, of {names(bad)}", change


def _first_step(f: Facts) -> Found:
    if f.oldest or not f.weight:
        return
    first = analysis.first_step(f.rule, f.hyper)
    length, weight = first * f.lr, f.weight
    known = [x for x in f.matrices if x.step_rms is not None]
    if known:
        length, weight = _lengths(known)
    elif f.rule.square_avg_init or f.guarded or math.isinf(first):
        return
    times = length / weight
    if times >= FIRST_SHARE and math.isfinite(times):
        rule = "" if math.isinf(first) else f", where lr is {f.lr:g} and 1/√(1−alpha) makes {first:.3g} of it"
        lr = _lr(f, f.lr / times / 10)
        corrected = (
            not (f.rule.centered or f.rule.square_avg_init or f.rule.bias_correction) and f.lr < 0.9 * f.weight
        )
        yield (
            "error" if times >= TENFOLD * FIRST_SHARE else "warning",
            f"the first step will be {length:.3g} long, {times:.3g} times the weights' RMS of {weight:.3g}{rule}",
            f"Take {lr} for a tenth of the weights"
            + (", or bias_correction=True for one of lr" if corrected else ""),
        )


def _centered_start(f: Facts) -> Found:
    if f.oldest or not math.isinf(analysis.first_step(f.rule, f.hyper)):
        return
    why = "with bias_correction: the first variance is 0" if f.rule.bias_correction else "with alpha=0: v − m² is 0"
    left = replace(f.rule, centered=False)
    long = f.weight and analysis.first_step(left, f.hyper) * f.lr >= FIRST_SHARE * f.weight
    yield (
        "error",
        f"centered {why}, so the first step is {f.lr:g}·g/ε, up to "
        f"{f.lr * analysis.most(f.rule, f.hyper):g} times the gradient",
        "Take centered=False" + (f" with {_lr(f, f.calm_lr)}" if long else ""),
    )


def _momentum(f: Facts) -> Found:
    if not f.rule.momentum or f.guarded or not f.weight:
        return
    steady, longest = analysis.steady_step(f.rule, f.hyper), analysis.longest_step(f.rule, f.hyper)
    times = steady * f.lr / f.weight
    if times < STEADY_SHARE:
        return
    early = ""
    if longest is not None and not f.rule.square_avg_init and longest[0] > steady:
        early = f", and step {longest[1]} of a run, while v fills, {longest[0]:.3g}·lr"
    lr = min(f.lr, 0.8 * STEADY_SHARE * f.weight) / steady
    yield (
        "error" if times >= 1 else "warning",
        f"momentum {f.hyper.momentum:g} makes a steady step {steady:.3g}·lr = {steady * f.lr:.3g}, {times:.2g} times "
        f"the weights' RMS of {f.weight:.3g}{early}",
        "SGD's momentum and lr do not carry over, as RMSprop's step is lr whatever the gradient: "
        f"{_lr(f, lr)} steps "
        + ("as far as without momentum" if lr == f.lr / steady else "by less than the weights"),
    )


def _large_step(f: Facts) -> Found:
    known = [x for x in f.matrices if x.steps > 1 and x.step_rms is not None]
    if not known:
        return
    step, weight = _lengths(known)
    filled = 1.0 if f.rule.bias_correction else math.sqrt(1 - f.hyper.alpha**f.oldest)  # early steps are longer
    if step / weight * filled >= STEP_SHARE and math.isfinite(step):
        worst = max(known, key=lambda x: (x.step_rms or 0.0) / x.param_rms)
        yield (
            "error" if step >= weight else "warning",
            f"step {f.oldest} moved the weights by {step:.3g}, {step / weight:.2g} of their RMS of {weight:.3g}, "
            f"most of all {worst.name}",
            f"A thousandth to a hundredth is usual: try {_lr(f, f.lr * weight / step / 100)}",
        )


def _eps_zero(f: Facts) -> Found:
    if not f.hyper.eps:
        least = max((_least_eps(x.dtype) for x in f.tensors), default=0.0)
        yield (
            "warning",
            "eps is 0, so nothing bounds what a small gradient is multiplied by (0/0 is 0 here, NaN elsewhere)",
            f"Take eps={max(min(1e-8, f.fitting_eps if f.oldest else 1.0), least):g} or larger",
        )


def _eps_underflows(f: Facts) -> Found:
    for dtype in dict.fromkeys(x.dtype for x in f.tensors):
        wide, eps = arithmetic_dtype(dtype), float(f.hyper.eps)
        real = wide.to_real() if wide.is_complex else wide
        own = dtype.to_real() if dtype.is_complex else dtype
        if eps and not torch.tensor(eps, dtype=real, device="cpu").item():
            yield (
                "warning",
                f"eps={eps:g} is 0 in {str(real).removeprefix('torch.')}, in which steps are computed",
                f"Take eps={max(10 * torch.finfo(real).tiny, _least_eps(dtype)):.0e} or larger",
            )
        elif eps and not torch.tensor(eps, dtype=own, device="cpu").item():
            yield (
                "note",
                f"eps={eps:g} is 0 in {str(own).removeprefix('torch.')}; it counts here, where steps are computed in "
                f"{str(real).removeprefix('torch.')}, and not where the parameter's dtype is used, as in torch",
                f"Take eps={_least_eps(dtype):.0e} or larger if the run is to go on there",
            )


def _least_eps(dtype: torch.dtype) -> float:
    """An ε that is not 0 in that dtype: beside float16's smallest number, 6e-8, the usual 1e-8 is."""
    info = torch.finfo(dtype.to_real() if dtype.is_complex else dtype)
    return float(_round(max(2 * info.tiny * info.eps, 1e-37)))


def _eps_dominates(f: Facts) -> Found:
    share = f.share("below_eps", "touched")
    if not f.oldest or share <= MOST:
        return
    root = f.total("roots") / f.total("touched")
    inside = f.rule.eps_mode in ("inside", "both")
    calm = f.calm_lr / 2  # v of a small alpha leaves some steps longer than lr
    lr = f" with {_lr(f, calm)}" if calm < f.lr / 2 else ""
    yield (
        "note" if f.guarded else "warning",
        f"eps={f.hyper.eps:g} exceeds {'v' if inside else '√v'} in {share:.0%} of the elements (√v is {root:.2g} on "
        f"average): they learn as by SGD with lr {f.lr * analysis.most(f.rule, f.hyper):.3g}",
        f"Take eps={f.fitting_eps:g}{lr} to scale by the gradients, or keep it if it is the recipe's",
    )


def _alpha_small(f: Facts) -> Found:
    alpha, run = f.hyper.alpha, f.run or math.inf
    rare = [x for x in f.tensors if x.steps and x.has_grad and x.sums["touched"] and not x.is_lazy]
    if alpha < NEAR_SIGN and run > 1:
        better = 0.9 if run >= analysis.memory(0.9) else _alpha_of(run)
        longer = analysis.first_step(f.rule, replace(f.hyper, alpha=better)) * f.lr
        lr = f" with {_lr(f, 0.9 * f.weight / longer * f.lr)}" if f.weight and longer >= f.weight else ""
        yield (
            "warning",
            f"alpha={alpha:g} remembers {analysis.memory(alpha):.2g} gradients: every step is about ±lr, and a rare "
            "large gradient counts no more than a common small one",
            f"Take alpha={better:g}{lr}" + (" or larger" if math.isinf(run) and not lr else ""),
        )
        return
    rare = [x for x in rare if 0 < x.sums["touched_with_grad"] < (1 - alpha) * x.sums["touched"]]
    if rare and alpha >= NEAR_SIGN:
        worst = min(rare, key=_present)
        share = _present(worst)
        fits = share / 2 >= 1e-6 and 2 / share <= run
        yield (
            "warning",
            f"{share:.2%} of the elements of {worst.name} that ever had a gradient have one now: each comes about "
            f"every {1 / share:.0f} steps, and alpha={alpha:g} remembers {analysis.memory(alpha):.0f}",
            (f"Take alpha={1 - share / 2:.7g} or larger for {names(rare)}, or" if fits else f"For {names(rare)} take")
            + " sparse='lazy' with sparse gradients, whose averages wait",
        )


def _alpha_long(f: Facts) -> Found:
    memory = analysis.memory(f.hyper.alpha)
    if f.run is None or not 0 < f.run < memory * (1 - 1e-9) or f.rule.bias_correction:
        return
    correctable = not (f.rule.centered or f.rule.square_avg_init)
    better = max(1 - 10 / f.run, 0.9) if f.run >= analysis.memory(0.9) else _alpha_of(f.run)
    change = [f"alpha={math.floor(1000 * better + 1e-9) / 1000:g} or smaller"] if f.run >= 10 else []
    change += ["bias_correction=True"] if correctable else []
    change += [f"alpha={better:g}"] if not change and better >= NEAR_SIGN else []
    if not change:
        return
    if f.rule.square_avg_init:
        effect = f"{f.hyper.alpha**f.run:.0%} of v is still v₀ = {f.rule.square_avg_init:g} at its end"
    else:
        effect = f"steps are still {1 / math.sqrt(1 - f.hyper.alpha**f.run):.2g}·lr long at its end"
    yield (
        "note",
        f"alpha={f.hyper.alpha:g} remembers {memory:.0f} steps, and the run has {f.run}: {effect}",
        f"Take {', or '.join(change)}",
    )


def _alpha_of(run: float) -> float:
    """The alpha that remembers no more than that many steps, rounded down."""
    return math.floor(1000 * (1 - 1 / run) + 1e-9) / 1000


def _decay_twice(f: Facts) -> Found:
    pulled = [x for x in f.tensors if x.pull]
    if pulled:
        yield (
            "warning",
            f"weight_decay={f.hyper.weight_decay:g} here, and a tenth or more of the elements of {names(pulled)} "
            f"have the gradient {pulled[0].pull:.3g}·p: the loss decays the weights too",
            "Take the penalty out of the loss, or weight_decay=0",
        )


def _decay_on_bias(f: Facts) -> Found:
    flat = [x for x in f.tensors if len(x.shape) < 2]
    if f.hyper.weight_decay and flat and f.matrices:
        yield (
            "note",
            f"weight_decay={f.hyper.weight_decay:g} also pulls {len(flat)} biases and scales to 0: {names(flat)}",
            "Give them a group of their own with weight_decay=0",
        )


def _updates_lost(f: Facts) -> Found:
    if f.group.get("rounding") == "stochastic" or f.group.get("compensation"):
        return
    share = f.share("lost", "moving")
    if share <= MOST:
        return
    lost = [x for x in f.tensors if x.sums["moving"] and x.sums["lost"] > MOST * x.sums["moving"]]
    half = [x for x in lost if arithmetic_dtype(x.dtype) != x.dtype]
    dtype = str((half or lost)[0].dtype).removeprefix("torch.")
    yield (
        "error" if share > ALMOST_ALL else "warning",
        f"steps are below half a unit in the last place of {share:.0%} of the elements, which stay as they are "
        f"({dtype}, lr={f.peak:g}): {names(lost)}",
        _keep_updates(f, bool(half)),
    )


def _keep_updates(f: Facts, half: bool) -> str:
    """How steps that round away can be kept."""
    in_float32 = f.share("lost_in_float32", "moving") > MOST
    own = ", or take compensation=True or rounding='stochastic'" if half and "rounding" in f.group else ""
    if half and not in_float32:
        return f"Keep the parameters in float32, with autocast for speed{own}"
    follows = f.share("below_eps", "touched") <= MOST and not f.guarded and not f.rule.square_avg_init and f.weight
    lr = f"Take lr={_round(1e-3 * f.weight)}, or keep" if follows and not half else "Keep"
    return f"{lr} the parameters in float64" + (" or take rounding='stochastic'" if own else "")


def _schedule_in_buffer(f: Facts) -> Found:
    start = f.group.get("initial_lr")
    if start is None or not (f.rule.lr_in_buffer and f.rule.momentum) or analysis.number(start) == f.lr:
        return
    steady = analysis.steady_step(f.rule, f.hyper)
    yield (
        "note",
        f"a schedule moved lr from {analysis.number(start):g} to {f.lr:g}, and the momentum buffer holds steps at "
        f"the rates of the last {steady:.3g} steps",
        "Right for TensorFlow's rule; lr_in_buffer=False makes a change act at once, as in torch",
    )


def _stuck(f: Facts) -> Found:
    share = f.share("stuck", "touched_with_grad")
    if share <= MOST:
        return
    times = f.total("stuck_roots") / max(f.total("stuck_grads"), 1e-300)
    if not math.isfinite(times):  # the check of the state for what is not finite finds it
        return
    yield (
        "warning",
        f"√v is more than {STUCK:g} times the present gradient in {share:.0%} of the elements, {times:.3g} times on "
        f"average, worst in {f.worst('stuck', 'touched_with_grad')}: after a spike they hardly move for about "
        f"{analysis.steps_stuck(f.hyper.alpha, times):.0f} steps",
        ("Load" if f.hyper.max_update else "Take max_update=3, under which v at most doubles in a step, or load")
        + " a state from before it",
    )


def _centered_cancels(f: Facts) -> Found:
    share = f.share("cancelled", "touched")
    if f.rule.centered and f.oldest > 1 and share > CANCELLING:
        yield (
            "warning",
            f"v − m² is rounding noise in {share:.0%} of the elements: their gradient hardly varies, so a step is up "
            f"to {f.lr * analysis.most(f.rule, f.hyper):.3g} times it",
            "Take centered=False",
        )


def _maximize(f: Facts) -> Found:
    if f.descends:
        if f.rule.maximize:
            yield "note", "maximize=True: every step raises the loss", "Leave it out to minimize"
    elif f.lr:
        both = " with maximize=False" if f.rule.maximize else ""
        yield (
            "warning",
            f"lr={-f.lr:g} is below 0, and steps go the other way",
            f"Take lr={f.lr:g}{both}, and a schedule that ends at 0",
        )


def _ignored_key(f: Facts) -> Found:
    meant = resembling(f.group, TORCH_GROUP)
    if not meant:
        return
    held = ", ".join(f"{key}={shown(f.group[key], 40)}" for key in meant)
    here = ", ".join(f"{name}={shown(f.group[name], 40)}" for name in dict.fromkeys(meant.values()))
    keys = ", ".join(f"group[{name!r}]" for name in dict.fromkeys(meant.values()))
    yield (
        "note" if is_noted(f.group) else "warning",
        f"the group carries {held}, which no step reads; the step has {here}",
        f"Set {keys} if RMSprop is meant; a key of another optimizer or of a trainer may stay",
    )


CHECKS: Mapping[str, Callable[[Facts], Found]] = {
    "nonfinite": _nonfinite,
    "first_step": _first_step,
    "centered_start": _centered_start,
    "momentum": _momentum,
    "large_step": _large_step,
    "eps_zero": _eps_zero,
    "eps_underflows": _eps_underflows,
    "eps_dominates": _eps_dominates,
    "alpha_small": _alpha_small,
    "alpha_long": _alpha_long,
    "decay_twice": _decay_twice,
    "decay_on_bias": _decay_on_bias,
    "no_gradient": no_gradient,
    "zero_grad": zero_grad,
    "clip_zero": clip_zero,
    "momentum_switched": momentum_switched,
    "updates_lost": _updates_lost,
    "schedule_in_buffer": _schedule_in_buffer,
    "stuck": _stuck,
    "centered_cancels": _centered_cancels,
    "slow_path": slow_path,
    "maximize": _maximize,
    "ignored_key": _ignored_key,
}


def _present(x: Reading) -> float:
    """Return the share of the elements that ever had a gradient that have one now."""
    return x.sums["touched_with_grad"] / x.sums["touched"]


def _lengths(tensors: Sequence[Reading]) -> tuple[float, float]:
    """The root mean squares of the steps and of the parameters, over all these tensors."""
    elements = sum(x.elements for x in tensors)
    step = math.sqrt(sum(x.sums["step_squares"] for x in tensors) / elements)
    return step, math.sqrt(sum(x.sums["param_squares"] for x in tensors) / elements)


def _lr(f: Facts, lr: float) -> str:
    """A learning rate to suggest, and what keeps such steps where half precision would round them away."""
    return f"lr={_round(lr)}" + ("" if f.keeps(lr) else " and compensation=True")


def _round(number: float) -> str:
    """A number to suggest: one digit, rounded down."""
    if not 1e-300 < number < math.inf:
        return "0"
    number *= 1 + 1e-9  # 0.001 that was rounded down on its way is 0.001, and not 0
    power = math.floor(math.log10(number))
    return f"{math.floor(number / 10.0**power) * 10.0**power:.1g}"
