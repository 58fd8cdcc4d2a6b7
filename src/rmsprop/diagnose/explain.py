"""An optimizer in words: what it computes, with its numbers, what they mean, and who steps its parameters."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rmsprop import analysis, kernels, settings
from rmsprop.dialects import SWITCHES, find_dialect
from rmsprop.printing import printable, shown
from rmsprop.spec import Hyper, Rule
from rmsprop.tensors import clipping, shards
from rmsprop.tensors.bucket import arithmetic_dtype, bucket_for, is_half, kind
from rmsprop.tensors.nonfinite import Guard

Groups = Sequence[Mapping[str, Any]]
State = Mapping[Any, Mapping[str, Any]]

_LONGEST = 400  # characters of a note, such as the parameters' names


def explain(groups: Groups, backend: str, state: State | None = None, guard: Guard | None = None) -> str:
    """For each group the rule with its numbers, what they mean, and who steps its parameters or why they cannot."""
    lines = [] if guard is None else [guard.describe(groups)]
    for i, group in enumerate(groups):
        rule, hyper = settings.read(group)
        lines.append(f"Parameter group {i}, dialect {group['dialect']}, backend {backend!r}")
        about = [*_origin(group, rule), *equation(group), *meaning(rule, hyper), _state(group, rule, state or {})]
        lines += [f"    {line}" for line in about]
        for bucket in shards.localized(bucket_for(group, group["params"])).split():
            device, dtype, _ = kind(bucket.param[0])
            spread = sum(id(p) in bucket.whole for p in bucket.param)
            of = f", {spread} of them this process's shards of DTensors" if spread else ""
            lines.append(f"    {len(bucket.param)} {str(dtype).removeprefix('torch.')} tensors on {device}{of}")
            lines += [f"        {line}" for line in kernels.describe(backend, rule, bucket)]
    return "\n".join(lines)


def show(name: str, groups: Groups, backend: str, guard: Guard | None = None) -> str:
    """The optimizer as repr() shows it: all settings, and the equation."""
    lines = [f"{name} (backend: {backend}" + ("" if guard is None else f", nonfinite: {guard.mode}")]
    for i, group in enumerate(groups):
        lines.append(f"Parameter Group {i}")
        names = sorted((name for name in group if name != "params"), key=str)
        lines += [f"    {printable(str(name))}: {_value(group[name])}" for name in names]
        try:
            whole = dict(group)
            settings.check_edited(whole, {})
            lines += [f"    {line}" for line in equation(whole)]
        except (TypeError, ValueError) as error:  # edited; the next step says so too
            lines.append(f"    no equation: {error}")
    return "\n".join(lines) + "\n)"


def _value(value: Any) -> str:
    """A setting or a note as text: a number or a word as it is, anything else bounded."""
    if isinstance(value, str):
        return printable(value[:_LONGEST])
    number = isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta and not value.is_complex()
    return f"tensor({value.item():g})" if number else shown(value, _LONGEST)


def equation(group: Mapping[str, Any]) -> list[str]:
    """The lines of the equation with the group's numbers, and what it does beside them."""
    rule, hyper = settings.read(group)
    return [*rule.equation(hyper), *clipping.describe(group), *_rounding(group)]


def _rounding(group: Mapping[str, Any]) -> Iterator[str]:
    """How [9] is written to parameters of half precision, where it is not just rounded to nearest."""
    stochastic = group["rounding"] == "stochastic"
    how = f"stochastically (seed {group['seed']})"
    if group["compensation"]:
        rest = f", which is rounded {how}" if stochastic else ""
        yield f"half precision: what [9]'s rounding drops is kept in `compensation`, and added back{rest}"
    elif stochastic:
        yield f"half precision: [9] is rounded {how}"


def meaning(rule: Rule, hyper: Hyper) -> list[str]:
    """What the numbers mean: ε in its units, the first step, momentum's steady factor, the warm-up in v₀."""
    lr = analysis.number(hyper.lr)
    return [*_eps(rule, hyper, lr), *_first(rule, hyper, lr), *_momentum(rule, hyper, lr), *_warm_up(rule, hyper)]


def _origin(group: Mapping[str, Any], rule: Rule) -> Iterator[str]:
    row = find_dialect(group["dialect"])
    if "recipe" in group:
        yield f"recipe {_value(group['recipe'])}"
    yield f"{row.title}; read in {row.source}"
    own = row.complete({name: group[name] for name in ("eps", "centered", "lr")}, ("eps", "centered", "lr"))
    changed = [name for name in SWITCHES if name != "centered" and getattr(rule, name) != own[name]]
    if changed:
        yield "not as there: " + ", ".join(f"{n}={getattr(rule, n)!r} for {own[n]!r}" for n in changed)


def _eps(rule: Rule, hyper: Hyper, lr: float) -> Iterator[str]:
    eps = float(hyper.eps)
    unit, place, inverse = {
        "outside": ("g", "beside the root", "1/ε"),
        "inside": ("g²", "under the root", "1/√ε"),
        "both": ("g² under the root and of g beside it", "in both places", "1/(√ε + ε)"),
        "floor": ("g", "the least that the root counts for", "1/ε"),
    }[rule.eps_mode]
    if not eps:
        yield "ε is 0: nothing bounds what a small gradient is multiplied by"
        return
    largest = analysis.most(rule, hyper)
    yield (
        f"ε = {eps:g} is in units of {unit}, {place}: gradients below about {1 / largest:g} feel it; it multiplies "
        f"a gradient by at most {inverse} = {largest:g}, so no element's lr exceeds {lr * largest:g}"
    )


def _first(rule: Rule, hyper: Hyper, lr: float) -> Iterator[str]:
    first = analysis.first_step(rule, hyper)
    if math.isinf(first):
        largest = lr * analysis.most(rule, hyper)
        yield f"the first step has variance 0, so only ε bounds it: {largest:g} times the gradient"
        return
    why = {
        (False, False): "1/√(1−alpha)",
        (False, True): "1/√(alpha·(1−alpha)), centered",
        (True, False): "corrected",
        (True, True): "its variance is 0, and max_update bounds it",
    }
    shown = why[rule.bias_correction, rule.centered]
    ahead = ", times 1 + momentum" if rule.momentum and rule.nesterov else ""
    which = (
        f", of gradients far above √v₀ = {math.sqrt(rule.square_avg_init):g}"
        if rule.square_avg_init
        else ", whatever g is"
    )
    yield f"the first step is {first:g}·lr = {first * lr:g} long ({shown}{ahead}){which}"


def _momentum(rule: Rule, hyper: Hyper, lr: float) -> Iterator[str]:
    if not rule.momentum:
        return
    steady = analysis.steady_step(rule, hyper)
    yield f"a steady gradient takes steps of 1/(1−momentum) = {steady:g}·lr = {steady * lr:g}"
    found = analysis.longest_step(rule, hyper)
    if found is not None and found[0] > 1.05 * steady and not rule.square_avg_init:
        yield f"before that, step {found[1]} is {found[0]:g}·lr = {found[0] * lr:g}: the long first steps add up"
    if rule.lr_in_buffer:
        yield (
            "the buffer holds lr·u: after a change of lr the old rate fades over some "
            f"1/(1−momentum) = {steady:g} steps"
        )


def _warm_up(rule: Rule, hyper: Hyper) -> Iterator[str]:
    if not rule.square_avg_init:
        return
    known = ", ".join(
        f"{math.ceil(analysis.warm_up(rule, hyper, size))} steps for |g| = {size:g}" for size in (0.1, 0.01, 0.001)
    )
    start = f"{rule.square_avg_init:g}"
    yield (
        f"v starts at {start}, a warm-up: steps are about lr·|g|/√(alphaᵗ·{start}) until alphaᵗ·{start} is below g²: "
        f"{known}"
    )


def _state(group: Mapping[str, Any], rule: Rule, state: State) -> str:
    """The bytes of a group's state: what there is of it, and what the rest will take."""
    names = [name for name in rule.slots() if name != "step"] + ["compensation"] * group["compensation"]
    per = {
        sum(_size(name, state.get(p, {}).get(name), p) for name in names)
        for p in group["params"]
        if not torch.nn.parameter.is_lazy(p)
    }
    total = elements = made = 0
    for p in group["params"]:
        if torch.nn.parameter.is_lazy(p):
            continue
        own = state.get(p, {})
        made += "square_avg" in own
        held = shards.shard(p).numel()
        elements += held
        total += sum(held * _size(name, own.get(name), p) for name in names)
    each = " or ".join(f"{size:g}" for size in sorted(per)) or "0"
    when = "" if made == len(group["params"]) else f"; {made} of {len(group['params'])} tensors have it so far"
    return (
        f"state {', '.join(names)}: {each} bytes per element, {total:,} for {elements:,} elements, and a step count "
        f"per tensor{when}"
    )


def _size(name: str, slot: Any, param: Tensor) -> int:
    """The bytes of an element of a slot, or of the one that would be made."""
    if isinstance(slot, Tensor):
        return slot.element_size()
    if name == "compensation":
        return param.element_size() if is_half(param.dtype) else 0
    return torch.empty(0, dtype=arithmetic_dtype(param.dtype), device="meta").element_size()
