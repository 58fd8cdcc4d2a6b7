"""Checks of an optimizer's settings, gradients and state: one function per finding, with its threshold."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from rmsprop import analysis
from rmsprop.diagnose.facts import Facts
from rmsprop.diagnose.precision import state_eps, state_range, state_rounding, state_start
from rmsprop.diagnose.readings import STUCK, Reading
from rmsprop.diagnose.usage import (
    Found,
    counted,
    momentum_switched,
    names,
    no_gradient,
    slow_path,
    zero_grad,
)
from rmsprop.printing import shown
from rmsprop.settings import TORCH_GROUP
from rmsprop.settings.group_keys import is_noted, resembling
from rmsprop.tensors.bucket import arithmetic_dtype

FIRST_SHARE = 1.0  # a first step as long as the weights replaces the initialization
STEADY_SHARE = 0.25  # four steps of this length replace the weights
STEP_SHARE = 0.1  # 1e-3 is usual in mid-training
TENFOLD = 10.0  # a first step longer than the threshold by this factor is an error
MOST = 0.5  # "most elements"
ALMOST_ALL = 0.9
NEAR_SIGN = 0.5  # a smaller alpha averages over fewer than two gradients
CANCELLING = 0.01  # the share of elements whose steps only ε bounds


def _nonfinite(f: Facts) -> Found:
    for part, what, change in (
        ("bad_params", "the parameters", "Go back to a checkpoint from before they appeared"),
        (
            "bad_grads",
            "the gradients",
            "Use nonfinite='skip' to skip such steps, since NaN stays in the averages",
        ),
        (
            "bad_state",
            "the state",
            "Load an older checkpoint, since later steps of these elements are NaN or 0",
        ),
    ):
        bad = [x for x in f.tensors if x.sums[part]]
        if bad and not (part == "bad_grads" and f.history.nonfinite != "propagate"):
            count = f.total(part)
            yield "error", f"{counted(count, 'NaN or infinite element')} in {what} of {names(bad)}", change


def _first_step(f: Facts) -> Found:
    if f.oldest or not f.weight:
        return
    first = analysis.first_step(f.rule, f.hyper)
    length, weight = first * f.lr, f.weight
    known = [x for x in f.matrices if x.step_rms is not None]
    if known:
        length, weight = _lengths(known)
    elif f.rule.square_avg_init or f.eps_limited or math.isinf(first):
        return
    times = length / weight
    if times >= FIRST_SHARE and math.isfinite(times):
        rule = "" if math.isinf(first) else f", with lr={f.lr:g} and a first step of up to {first:.3g}·lr"
        lr = _lr(f, f.lr / times / 10)
        corrected = (
            not (f.rule.centered or f.rule.square_avg_init or f.rule.bias_correction) and f.lr < 0.9 * f.weight
        )
        yield (
            "error" if times >= TENFOLD * FIRST_SHARE else "warning",
            f"the first step will be {length:.3g}, {times:.3g} times the weights' RMS of {weight:.3g}{rule}",
            f"Use {lr} for a first step of a tenth of the weights"
            + (", or bias_correction=True for a first step of lr" if corrected else ""),
        )


def _centered_start(f: Facts) -> Found:
    if f.oldest or not math.isinf(analysis.first_step(f.rule, f.hyper)):
        return
    why = "with bias_correction: the first variance is 0" if f.rule.bias_correction else "with alpha=0: v − m² is 0"
    floor = {"outside": "ε", "inside": "√ε", "both": "(√ε + ε)", "floor": "ε"}[f.rule.eps_mode]
    left = replace(f.rule, centered=False)
    long = f.weight and analysis.first_step(left, f.hyper) * f.lr >= FIRST_SHARE * f.weight
    yield (
        "error",
        f"centered {why}, so the first step is {f.lr:g}·g/{floor}, up to "
        f"{f.lr * analysis.most(f.rule, f.hyper):g} times the gradient",
        "Use centered=False" + (f" with {_lr(f, f.calm_lr)}" if long else ""),
    )


def _momentum(f: Facts) -> Found:
    if not f.rule.momentum or f.eps_limited or not f.weight:
        return
    steady, longest = analysis.steady_step(f.rule, f.hyper), analysis.longest_step(f.rule, f.hyper)
    times = steady * f.lr / f.weight
    if times < STEADY_SHARE:
        return
    early = ""
    if longest is not None and not f.rule.square_avg_init and longest[0] > steady:
        early = f"; step {longest[1]} of a run, while v fills, is {longest[0]:.3g}·lr"
    lr = min(f.lr, 0.8 * STEADY_SHARE * f.weight) / steady
    yield (
        "error" if times >= 1 else "warning",
        f"with momentum {f.hyper.momentum:g}, a steady step is {steady:.3g}·lr = {steady * f.lr:.3g}, "
        f"{times:.2g} times the weights' RMS of {f.weight:.3g}{early}",
        f"Use {_lr(f, lr)} for steps "
        + ("as long as without momentum" if lr == f.lr / steady else "shorter than the weights")
        + ", since RMSprop's step, unlike SGD's, does not grow with the gradient",
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
            f"with the largest share in {worst.name}",
            f"Try {_lr(f, f.lr * weight / step / 100)}: a thousandth to a hundredth is usual",
        )


def _eps_zero(f: Facts) -> Found:
    if not f.hyper.eps:
        least = max((_least_eps(x.dtype) for x in f.tensors), default=0.0)
        yield (
            "warning",
            "eps is 0, so nothing bounds the factor on a small gradient (0/0 is 0 here, NaN elsewhere)",
            f"Use eps={max(min(1e-8, f.fitting_eps if f.oldest else 1.0), least):g} or larger",
        )


def _eps_underflows(f: Facts) -> Found:
    for dtype in dict.fromkeys(x.dtype for x in f.tensors):
        wide, eps = arithmetic_dtype(dtype), float(f.hyper.eps)
        real = wide.to_real() if wide.is_complex else wide
        stored = dtype.to_real() if dtype.is_complex else dtype
        if eps and not torch.tensor(eps, dtype=real, device="cpu").item():
            yield (
                "warning",
                f"eps={eps:g} is 0 in {str(real).removeprefix('torch.')}, in which steps are computed",
                f"Use eps={max(10 * torch.finfo(real).tiny, _least_eps(dtype)):.0e} or larger",
            )
        elif eps and not torch.tensor(eps, dtype=stored, device="cpu").item():
            yield (
                "note",
                f"eps={eps:g} is 0 in {str(stored).removeprefix('torch.')}; it has an effect here, with steps in "
                f"{str(real).removeprefix('torch.')}, but not in torch, which computes in the parameter's dtype",
                f"Use eps={_least_eps(dtype):.0e} or larger if the run will continue in torch",
            )


def _least_eps(dtype: torch.dtype) -> float:
    """Return an ε that is not 0 in the dtype, as the usual 1e-8 is in float16."""
    info = torch.finfo(dtype.to_real() if dtype.is_complex else dtype)
    return float(_round(max(2 * info.tiny * info.eps, 1e-37)))


def _eps_dominates(f: Facts) -> Found:
    share = f.share("below_eps", "touched")
    if not f.oldest or share <= MOST:
        return
    root = f.total("roots") / f.total("touched")
    variance = "(v − m²)" if f.rule.centered else "v"
    exceeded = variance if f.rule.eps_mode in ("inside", "both") else f"√{variance}"
    calm = f.calm_lr / 2  # v of a small alpha leaves some steps longer than lr
    lr = f" with {_lr(f, calm)}" if calm < f.lr / 2 else ""
    yield (
        "note" if f.eps_limited else "warning",
        f"eps={f.hyper.eps:g} exceeds {exceeded} in {share:.0%} of the elements (√{variance} is {root:.2g} on "
        f"average), which train as with SGD at lr {f.lr * analysis.most(f.rule, f.hyper):.3g}",
        f"Use eps={f.fitting_eps:g}{lr} to scale by the gradients, or keep eps if the recipe sets it",
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
            f"alpha={alpha:g} averages over {analysis.memory(alpha):.2g} gradients: every step is about ±lr, and a "
            "rare large gradient counts no more than a common small one",
            f"Use alpha={better:g}{lr}" + (" or larger" if math.isinf(run) and not lr else ""),
        )
        return
    rare = [x for x in rare if 0 < x.sums["touched_with_grad"] < (1 - alpha) * x.sums["touched"]]
    if rare and alpha >= NEAR_SIGN:
        worst = min(rare, key=_present)
        share = _present(worst)
        fits = share / 2 >= 1e-6 and 2 / share <= run
        yield (
            "warning",
            f"{share:.2%} of the elements of {worst.name} that ever had a gradient have one now: each has one about "
            f"every {1 / share:.0f} steps, and alpha={alpha:g} averages over {analysis.memory(alpha):.0f}",
            (f"Use alpha={1 - share / 2:.7g} or larger for {names(rare)}, or" if fits else f"For {names(rare)} use")
            + " sparse='lazy' with sparse gradients, which leaves averages without a gradient unchanged",
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
        effect = f"{f.hyper.alpha**f.run:.0%} of v₀ = {f.rule.square_avg_init:g} is still in v"
    else:
        effect = f"steps are still {1 / math.sqrt(1 - f.hyper.alpha**f.run):.2g} times their steady length"
    yield (
        "note",
        f"alpha={f.hyper.alpha:g} averages over {memory:.0f} steps, and the run has {f.run}: at its end, {effect}",
        f"Use {', or '.join(change)}",
    )


def _alpha_of(run: float) -> float:
    """Return the alpha that averages over no more than this many steps, rounded down."""
    return math.floor(1000 * (1 - 1 / run) + 1e-9) / 1000


def _ema_long(f: Facts) -> Found:
    average = f.hyper.average
    if average is None or f.run is None or average.warmup is not None:
        return
    updates, span = (f.run - average.start) // average.interval, analysis.memory(average.decay)
    if not 1 < updates < span * (1 - 1e-9):
        return
    shorter = math.floor(1000 * max(1 - 10 / updates, 0) + 1e-9) / 1000
    yield (
        "warning",
        f"ema={average.decay:g} averages over {span:.0f} updates, and the run has {updates}: at its end, "
        f"{average.decay ** (updates - 1):.0%} of the average is still the first weights",
        f"Use ema_warmup='timm', or ema={shorter:g} or smaller",
    )


def _decay_twice(f: Facts) -> Found:
    pulled = [x for x in f.tensors if x.pull]
    if pulled:
        yield (
            "warning",
            f"weight_decay={f.hyper.weight_decay:g} is set, and a tenth or more of the elements of {names(pulled)} "
            f"have the gradient {pulled[0].pull:.3g}·p, so the loss decays the weights too",
            "Remove the penalty from the loss, or set weight_decay=0",
        )


def _decay_on_bias(f: Facts) -> Found:
    flat = [x for x in f.tensors if len(x.shape) < 2]
    if f.hyper.weight_decay and flat and f.matrices:
        decayed = counted(len(flat), "bias or scale", "biases and scales")
        yield (
            "note",
            f"weight_decay={f.hyper.weight_decay:g} also decays {decayed}: {names(flat)}",
            "Put them into a group of their own with weight_decay=0",
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
        f"steps are below half a unit in the last place of {share:.0%} of the elements, and round away "
        f"({dtype}, lr={f.peak:g}): {names(lost)}",
        _keep_updates(f, bool(half)),
    )


def _keep_updates(f: Facts, half: bool) -> str:
    """Return how to keep steps that round away."""
    in_float32 = f.share("lost_in_float32", "moving") > MOST
    alternatives = ", or use compensation=True or rounding='stochastic'" if half and "rounding" in f.group else ""
    if half and not in_float32:
        return f"Keep the parameters in float32, with autocast for speed{alternatives}"
    follows = (
        f.share("below_eps", "touched") <= MOST and not f.eps_limited and not f.rule.square_avg_init and f.weight
    )
    lr = f"Use lr={_round(1e-3 * f.weight)}, or keep" if follows and not half else "Keep"
    return f"{lr} the parameters in float64" + (" or use rounding='stochastic'" if alternatives else "")


def _schedule_in_buffer(f: Facts) -> Found:
    start = f.group.get("initial_lr")
    if start is None or not (f.rule.lr_in_buffer and f.rule.momentum) or analysis.number(start) == f.lr:
        return
    yield (
        "note",
        f"a schedule changed lr from {analysis.number(start):g} to {f.lr:g}, and the momentum buffer holds steps at "
        f"the learning rates of the last {analysis.memory(f.hyper.momentum):.3g} steps",
        "Use lr_in_buffer=False for changes that act at once, as in torch, or keep TensorFlow's rule",
    )


def _stuck(f: Facts) -> Found:
    share = f.share("stuck", "touched_with_grad")
    if share <= MOST:
        return
    times = f.total("stuck_roots") / max(f.total("stuck_grads"), 1e-300)
    if not math.isfinite(times):  # reported as nonfinite
        return
    root = "√(v − m²)" if f.rule.centered else "√v"
    yield (
        "warning",
        f"{root} is more than {STUCK:g} times the current gradient in {share:.0%} of the elements ({times:.3g} "
        f"times on average, worst in {f.worst('stuck', 'touched_with_grad')}): after a spike of the gradient they "
        f"hardly move for about {analysis.steps_stuck(f.hyper.alpha, times):.0f} steps",
        ("Load" if f.hyper.max_update else "Use max_update=3, which lets v at most double in a step, or load")
        + " a state from before the spike",
    )


def _centered_cancels(f: Facts) -> Found:
    share = f.share("cancelled", "touched")
    if f.rule.centered and f.oldest > 1 and share > CANCELLING:
        kept = f.group.get("state_dtype", "float32")
        why = "their gradient hardly varies"
        if kept != "float32":
            why = f"state_dtype={kept!r} keeps v too coarsely for how little their gradient varies"
        yield (
            "warning",
            f"v − m² is rounding noise in {share:.0%} of the elements: {why}, so a step is up to "
            f"{f.lr * analysis.most(f.rule, f.hyper):.3g} times the gradient",
            "Use centered=False" + (" or state_dtype='float32'" if kept != "float32" else ""),
        )


def _maximize(f: Facts) -> Found:
    if f.descends:
        if f.rule.maximize:
            yield "note", "maximize=True: every step raises the loss", "Set maximize=False to minimize"
    elif f.lr:
        both = " with maximize=False" if f.rule.maximize else ""
        yield (
            "warning",
            f"lr={-f.lr:g} is below 0, which reverses every step",
            f"Use lr={f.lr:g}{both}, and a schedule that ends at 0",
        )


def _ignored_key(f: Facts) -> Found:
    meant = resembling(f.group, TORCH_GROUP)
    if not meant:
        return
    unread = ", ".join(f"{key}={shown(f.group[key], 40)}" for key in meant)
    used = ", ".join(f"{name}={shown(f.group[name], 40)}" for name in dict.fromkeys(meant.values()))
    keys = ", ".join(f"group[{name!r}]" for name in dict.fromkeys(meant.values()))
    yield (
        "note" if is_noted(f.group) else "warning",
        f"the group has {unread}, which no step reads; steps use {used}",
        f"Set {keys} if the key is meant for RMSprop; a key of another optimizer or of a trainer can stay",
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
    "ema_long": _ema_long,
    "decay_twice": _decay_twice,
    "decay_on_bias": _decay_on_bias,
    "no_gradient": no_gradient,
    "zero_grad": zero_grad,
    "momentum_switched": momentum_switched,
    "updates_lost": _updates_lost,
    "state_rounding": state_rounding,
    "state_range": state_range,
    "state_eps": state_eps,
    "state_start": state_start,
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
    """Return the root mean squares of the steps and of the parameters, over all these tensors."""
    elements = sum(x.elements for x in tensors)
    step = math.sqrt(sum(x.sums["step_squares"] for x in tensors) / elements)
    return step, math.sqrt(sum(x.sums["param_squares"] for x in tensors) / elements)


def _lr(f: Facts, lr: float) -> str:
    """Return a learning rate to suggest, with compensation if half precision would lose such steps."""
    return f"lr={_round(lr)}" + ("" if f.keeps(lr) else " and compensation=True")


def _round(number: float) -> str:
    """Return a number to suggest: one digit, rounded down."""
    if not 1e-300 < number < math.inf:
        return "0"
    number *= 1 + 1e-9  # so that a 0.001 that arithmetic rounded down stays 0.001
    power = math.floor(math.log10(number))
    return f"{math.floor(number / 10.0**power) * 10.0**power:.1g}"
