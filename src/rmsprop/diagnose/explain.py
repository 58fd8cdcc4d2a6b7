"""Explanations of an optimizer: its equation, what its numbers mean, and the backend that steps its parameters."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from rmsprop import analysis, kernels, settings
from rmsprop.diagnose.usage import counted, detour, detours
from rmsprop.dialects import DIALECTS, SWITCHES, find_dialect
from rmsprop.printing import printable, shown
from rmsprop.spec import NARROWED, Hyper, Rule, StateDtype
from rmsprop.tensors import clipping, shards
from rmsprop.tensors.bucket import bucket_for, is_half, kind, slot_dtype, state_names
from rmsprop.tensors.nonfinite import Guard

Groups = Sequence[Mapping[str, Any]]
State = Mapping[Any, Mapping[str, Any]]

_LONGEST = 400  # characters of a value, such as the parameters' names


def explain(groups: Groups, backend: str, state: State | None = None, guard: Guard | None = None) -> str:
    """Return, for each group, its equation, what its numbers mean, and each backend's answer for its parameters."""
    lines = [] if guard is None else [guard.describe(groups)]
    for i, group in enumerate(groups):
        rule, hyper = settings.read(group)
        lines.append(f"Parameter group {i}, dialect {group['dialect']}, backend {backend!r}")
        about = [*_origin(group, rule), *equation(group), *meaning(rule, hyper), _state(group, rule, state or {})]
        lines += [f"    {line}" for line in about]
        whole = shards.localized(bucket_for(group, group["params"])).split()
        apart = backend == "auto"
        for bucket in (part for own in whole for part in (kernels.apart(rule, own) if apart else [own])):
            device, dtype, _ = kind(bucket.param[0])
            sharded = sum(id(p) in bucket.whole for p in bucket.param)
            of = f", {sharded} of them this process's shards of DTensors" if sharded else ""
            tensors = counted(len(bucket.param), f"{str(dtype).removeprefix('torch.')} tensor")
            lines.append(f"    {tensors} on {device}{of}")
            lines += [f"        {line}" for line in kernels.describe(backend, rule, bucket)]
        found = detours(backend, rule, group, state or {})
        lines += [f"    as it is now, {detour(found)}"] if found else []
    return "\n".join(lines)


def show(name: str, groups: Groups, backend: str, guard: Guard | None = None) -> str:
    """Return the optimizer as repr() shows it.

    One line per group has its size and the settings that differ from its dialect's defaults. Below the first group is
    its equation with its numbers. The text of a single group has at most 15 lines.
    """
    lines = [f"{name}(backend={backend!r}" + ("" if guard is None else f", nonfinite={guard.mode!r}")]
    for i, group in enumerate(groups):
        changed = "".join(f", {printable(str(key))}={_value(group[key])}" for key in _changed(group))
        lines.append(f"    group {i}: {_contents(group)}{changed}")
        if i == 0:
            lines += [f"        {line}" for line in _equation_or_error(group)]
    return "\n".join(lines) + "\n)"


def _contents(group: Mapping[str, Any]) -> str:
    """Return the number of tensors and elements in a group."""
    params = group["params"]
    if not isinstance(params, list | tuple) or not all(isinstance(p, Tensor) for p in params):
        return f"params is {shown(params)}"  # an edited group
    elements = sum(p.numel() for p in params if not is_lazy(p))
    return f"{len(params)} tensor{'' if len(params) == 1 else 's'}, {elements:,} elements"


def _changed(group: Mapping[str, Any]) -> list[Any]:
    """Return the keys whose values are not the dialect's defaults, the dialect first."""
    dialect = group.get("dialect")
    row = find_dialect(dialect if isinstance(dialect, str) and dialect in DIALECTS else "torch")
    defaults = {**settings.TORCH_GROUP, **row.defaults(), "dialect": "torch", "params": group["params"]}

    def _differs(key: Any) -> bool:
        value = group[key]
        plain = isinstance(value, str | int | float | None.__class__)
        return key not in defaults or not plain or value != defaults[key]

    keys = [key for key in group if key not in ("params", "param_names") and _differs(key)]
    return sorted(keys, key=lambda key: (key != "dialect", str(key)))


def _equation_or_error(group: Mapping[str, Any]) -> list[str]:
    """Return the equation, with clipping and sparse gradients in one line, or the reason that there is none."""
    try:
        whole = dict(group)
        settings.check_edited(whole, {})
        rule, hyper = settings.read(whole)
        beside = "; ".join(clipping.describe(whole))
        return [*rule.equation(hyper), *([beside] if beside else []), *_rounding(whole)]
    except (TypeError, ValueError) as error:  # an edited group; the next step raises this too
        return [f"no equation: {error}"]


def _value(value: Any) -> str:
    """Return a setting or another key's value as text of bounded length."""
    number = isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta and not value.is_complex()
    return f"tensor({value.item():g})" if number else shown(value, _LONGEST)


def equation(group: Mapping[str, Any]) -> list[str]:
    """Return the lines of the equation with the group's numbers, and its clipping and rounding."""
    rule, hyper = settings.read(group)
    return [*rule.equation(hyper), *clipping.describe(group), *_rounding(group), *_narrowing(group, rule)]


def _rounding(group: Mapping[str, Any]) -> Iterator[str]:
    """Yield how [9] is rounded in half precision, unless it is to nearest."""
    stochastic = group["rounding"] == "stochastic"
    how = f"stochastically (seed {group['seed']})"
    if group["compensation"]:
        rest = f"; `compensation` is rounded {how}" if stochastic else ""
        yield f"half precision: `compensation` keeps what rounding drops in [9] and adds it back{rest}"
    elif stochastic:
        yield f"half precision: [9] is rounded {how}"


def _narrowing(group: Mapping[str, Any], rule: Rule) -> Iterator[str]:
    """Yield the precision of the averages between steps, unless it is that of the arithmetic."""
    if group["state_dtype"] == "float32":
        return
    slots = [name for name in rule.slots() if name in NARROWED]
    coded = slots[:1] if group["state_dtype"] == "float8" else []
    parts = [("float8", coded), ("bfloat16", [name for name in slots if name not in coded])]
    listed = ", ".join(f"{' and '.join(own)} in {dtype}" for dtype, own in parts if own)
    yield f"between steps: {listed}, rounded stochastically (seed {group['seed']})"


def meaning(rule: Rule, hyper: Hyper) -> list[str]:
    """Return what the numbers mean: ε in its units, the first step, momentum's steady factor, the warm-up from v₀."""
    lr = analysis.number(hyper.lr)
    return [*_eps(rule, hyper, lr), *_first(rule, hyper, lr), *_momentum(rule, hyper, lr), *_warm_up(rule, hyper)]


def _origin(group: Mapping[str, Any], rule: Rule) -> Iterator[str]:
    row = find_dialect(group["dialect"])
    if "recipe" in group:
        noted = group["recipe"]
        yield f"recipe {printable(noted[:_LONGEST]) if isinstance(noted, str) else shown(noted, _LONGEST)}"
    yield f"{row.title}; source: {row.source}"
    own = row.complete({name: group[name] for name in ("eps", "centered", "lr")}, ("eps", "centered", "lr"))
    changed = [name for name in SWITCHES if name != "centered" and getattr(rule, name) != own[name]]
    if changed:
        yield "changed from the dialect: " + ", ".join(f"{n}={getattr(rule, n)!r}, not {own[n]!r}" for n in changed)


def _eps(rule: Rule, hyper: Hyper, lr: float) -> Iterator[str]:
    eps = float(hyper.eps)
    place, inverse = {
        "outside": ("added to the root, in units of g", "1/ε"),
        "inside": ("added under the root, in units of g²", "1/√ε"),
        "both": ("added under the root, in units of g², and to the root, in units of g", "1/(√ε + ε)"),
        "floor": ("the least value of the root, in units of g", "1/ε"),
    }[rule.eps_mode]
    if not eps:
        yield "ε is 0, so nothing bounds the factor on a small gradient"
        return
    largest = analysis.most(rule, hyper)
    yield f"ε = {eps:g} is {place}; it matters for gradients below about {1 / largest:g}"
    yield f"a gradient is multiplied by at most {inverse} = {largest:g}, so no element's lr exceeds {lr * largest:g}"


def _first(rule: Rule, hyper: Hyper, lr: float) -> Iterator[str]:
    first = analysis.first_step(rule, hyper)
    if math.isinf(first):
        largest = lr * analysis.most(rule, hyper)
        yield f"the first variance is 0, so only ε bounds the first step: it is {largest:g} times the gradient"
        return
    if first < analysis.first_step(rule, replace(hyper, max_update=None)):
        why = "bounded by max_update"
    else:
        why = "bias-corrected" if rule.bias_correction else "1/√(1−alpha)"
        why = "1/√(alpha·(1−alpha)), centered" if rule.centered else why
        why += ", times 1 + momentum" if rule.momentum and rule.nesterov else ""
    which = "whatever the gradient"
    if rule.square_avg_init:
        which = f"for gradients far above √v₀ = {math.sqrt(rule.square_avg_init):g}"
    yield f"the first step is {first:g}·lr = {first * lr:g} long ({why}), {which}"


def _momentum(rule: Rule, hyper: Hyper, lr: float) -> Iterator[str]:
    if not rule.momentum:
        return
    steady = analysis.steady_step(rule, hyper)
    factor = 1 / (1 - float(hyper.momentum))
    length = f"{steady:g}·lr = {steady * lr:g} long"
    why = f"1/(1−momentum) = {length}" if steady == factor else f"{length} (bounded by max_update)"
    yield f"under a steady gradient, steps are {why}"
    longest = analysis.longest_step(rule, hyper)
    if longest is not None and longest[0] > 1.05 * steady and not rule.square_avg_init:
        step, at = longest
        yield f"before that, step {at} is {step:g}·lr = {step * lr:g} long, since the long first steps add up"
    if rule.lr_in_buffer:
        yield (
            "the buffer holds lr·u, so after a change of lr the old rate fades over about "
            f"1/(1−momentum) = {factor:g} steps"
        )


def _warm_up(rule: Rule, hyper: Hyper) -> Iterator[str]:
    if not rule.square_avg_init:
        return
    known = ", ".join(
        f"{counted(math.ceil(analysis.warm_up(rule, hyper, size)), 'step')} for |g| = {size:g}"
        for size in (0.1, 0.01, 0.001)
    )
    yield (
        f"v starts at v₀ = {rule.square_avg_init:g}, a warm-up: steps are about lr·|g|/√(alphaᵗ·v₀) until alphaᵗ·v₀ "
        f"is below g² ({known})"
    )


def _state(group: Mapping[str, Any], rule: Rule, state: State) -> str:
    """Return the bytes of a group's state in a sentence, with missing slots as the next step makes them."""
    names = [name for name in state_names(rule, group, half=True) if name != "step"]
    per = {
        sum(_size(name, state.get(p, {}).get(name), p, group["state_dtype"]) for name in names)
        for p in group["params"]
        if not torch.nn.parameter.is_lazy(p)
    }
    total = elements = made = 0
    for p in group["params"]:
        if torch.nn.parameter.is_lazy(p):
            continue
        slots = state.get(p, {})
        made += "square_avg" in slots
        count = shards.shard(p).numel()
        elements += count
        total += sum(count * _size(name, slots.get(name), p, group["state_dtype"]) for name in names)
    each = " or ".join(f"{size:g}" for size in sorted(per)) or "0"
    of = counted(len(group["params"]), "tensor has", "tensors have")
    when = "" if made == len(group["params"]) else f"; {made} of {of} state so far"
    return (
        f"state ({', '.join(names)}): {each} byte{'s' * (each != '1')} per element, {total:,} for {elements:,} "
        f"element{'s' * (elements != 1)}, and a step count per tensor{when}"
    )


def _size(name: str, slot: Any, param: Tensor, state_dtype: StateDtype) -> int:
    """Return the bytes of an element of a slot, or of the slot that the next step would make."""
    if isinstance(slot, Tensor):
        return slot.element_size()
    if name == "compensation":
        return param.element_size() if is_half(param.dtype) else 0
    return slot_dtype(name, param.dtype, state_dtype).itemsize
