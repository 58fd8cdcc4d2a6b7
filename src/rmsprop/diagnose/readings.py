"""Readings of an optimizer's tensors: sums over every parameter, gradient and slot, with one transfer per device.

Tensors are read in parts that fit a cache, so a reading needs no temporary the size of the parameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rmsprop import analysis, settings
from rmsprop.analysis import denominator
from rmsprop.printing import printable
from rmsprop.spec import Hyper, Rule
from rmsprop.tensors import shards
from rmsprop.tensors.float8 import LARGEST, SMALLEST_NORMAL, widened
from rmsprop.tensors.forked import serial_after_fork
from rmsprop.tensors.names import names

PART = 1 << 18  # elements: a megabyte of each of some twenty temporaries
SAMPLE = 1 << 14
STUCK = 100.0  # an element is stuck where √w is this many times its present gradient
CANCELLED = 1e-5  # a centered variance below this share of v is rounding noise
# With v in fewer bytes: its spacing.
_CANCELLED = {torch.bfloat16: 2.0**-7, torch.uint8: 0.25}
# An average that no gradient has met exceeds αᵗ·v₀ by less than this factor: stochastic rounding adds up.
_SLACK = {torch.bfloat16: 1.1, torch.uint8: 4.0}
DECADES = 40  # powers of ten from 1 down to float32's smallest number


@dataclass(frozen=True)
class Reading:
    """The numbers of one parameter, of complex elements over both parts.

    Attributes:
        elements: how many numbers this process holds of the parameter.
        steps: the number of steps it has taken; 0 without state.
        state_dtype: the dtype of its square_avg, uint8 for the codes of float8. None without state.
        has_grad: whether it has a gradient now.
        is_lazy: whether averages of rows without a gradient wait.
        sums: the sums over its elements that `_sums` lists.
        decades: touched elements by the k for which 10⁻ᵏ is the largest power of ten, up to 1, that their root
            reaches (w in place of the root where ε stands inside).
        pull: c > 0 if many elements have the gradient c·p, else 0.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    elements: int
    steps: int
    has_grad: bool
    has_state: bool
    has_buffer: bool
    state_dtype: torch.dtype | None
    is_lazy: bool
    requires_grad: bool
    sums: Mapping[str, float]
    decades: tuple[float, ...]
    pull: float

    @property
    def param_rms(self) -> float:
        """The root mean square of the parameter."""
        return math.sqrt(self.sums["param_squares"] / self.elements) if self.elements else 0.0

    @property
    def step_rms(self) -> float | None:
        """The root mean square of the step, or None if it is not known."""
        known = self.sums["steps_known"]
        return math.sqrt(self.sums["step_squares"] / known) if known else None


@serial_after_fork
@torch.no_grad()
def take_readings(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]]) -> list[list[Reading]]:
    """Return a reading of every parameter, by group, without lazy and meta tensors.

    A distributed parameter is read as this process's shard, without communication, so one process alone may call it.

    Mutates: nothing.
    """
    params: list[tuple[int, dict[str, Any]]] = []
    numbers: list[dict[str, Tensor]] = []
    for i, group in enumerate(groups):
        rule, hyper = settings.read(group)
        peak = peak_lr(group, analysis.number(hyper.lr))
        param_names = names(group) or [f"group{i}.param{j}" for j in range(len(group["params"]))]
        for name, p in zip(param_names, group["params"], strict=True):
            if not _readable(p):
                continue
            slots = {key: shards.shard(x) for key, x in (state.get(p) or {}).items()}
            shard, grad = shards.shard(p), shards.shard_of_gradient(p)
            about: dict[str, Any] = {
                "name": printable(str(name)),
                "shape": tuple(p.shape),
                "dtype": p.dtype,
                "elements": shard.numel() * (2 if p.is_complex() else 1),
                "steps": int(slots.get("step", 0)),
                "has_grad": p.grad is not None,
                "has_state": "square_avg" in slots,
                "has_buffer": "momentum_buffer" in slots,
                "state_dtype": getattr(slots.get("square_avg"), "dtype", None),
                "is_lazy": group["sparse"] == "lazy" and p.grad is not None and p.grad.is_sparse,
                "requires_grad": p.requires_grad,
            }
            params.append((i, about))
            numbers.append(_numbers(rule, hyper, peak, shard, grad, slots, about["steps"]))
    readings: list[list[Reading]] = [[] for _ in groups]
    for (i, about), sums in zip(params, _fetch(numbers), strict=True):
        decades, pull, spread = sums.pop("decades"), sums.pop("pull"), sums.pop("pull_spread")
        readings[i].append(Reading(**about, sums=sums, decades=decades, pull=pull if spread < 1e-3 else 0.0))
    return readings


def _readable(p: Tensor) -> bool:
    if torch.nn.parameter.is_lazy(p) or p.is_meta:
        return False
    return p.layout == torch.strided and (p.is_floating_point() or p.is_complex())


def _fetch(numbers: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """Return the numbers of every parameter as floats, tensors with an axis as tuples, with one transfer per device.

    Every mapping has the same names and shapes.
    """
    rows: dict[int, list[float]] = {}
    packed = [torch.cat([x.reshape(-1) for x in sums.values()]) for sums in numbers]
    for device in dict.fromkeys(tensor.device for tensor in packed):
        places = [k for k, tensor in enumerate(packed) if tensor.device == device]
        rows |= zip(places, torch.stack([packed[k] for k in places]).tolist(), strict=True)
    fetched = []
    for k, sums in enumerate(numbers):
        values = iter(rows[k])
        fetched.append({name: tuple(islice(values, len(x))) if x.dim() else next(values) for name, x in sums.items()})
    return fetched


def _numbers(
    rule: Rule, hyper: Hyper, peak: float, p: Tensor, g: Tensor | None, slots: Mapping[str, Any], t: int
) -> dict[str, Tensor]:
    """Return the sums over all parts of a parameter and the numbers of `_pull`, on the parameter's device.

    Shapes: decades (DECADES,), all others without axes; float64, or float32 on MPS.
    """
    wide = torch.float32 if p.device.type == "mps" else torch.float64
    sparse = g.detach().coalesce().values() if g is not None and g.layout == torch.sparse_coo else None
    if g is not None and g.layout != torch.strided:
        g = None
    tensors = {"p": p, "g": g, **{name: slots.get(name) for name in ("square_avg", "grad_avg", "momentum_buffer")}}
    flat = {
        name: _flat(x)
        for name, x in tensors.items()
        if isinstance(x, Tensor) and (x.shape, x.device) == (p.shape, p.device)
    }
    total: dict[str, Tensor] = {}
    for begin in range(0, max(flat["p"].numel(), 1), PART):
        part = {name: _wide(x[begin : begin + PART]) for name, x in flat.items()}
        kept = getattr(flat.get("square_avg"), "dtype", None)
        sums = {name: x.to(wide) for name, x in _sums(rule, hyper, peak, part, p.dtype, kept, t).items()}
        total = {name: total[name] + x for name, x in sums.items()} if total else sums
    if sparse is not None:  # its zeros are not stored
        total["with_grad"] = total["touched_with_grad"] = torch.count_nonzero(sparse).to(wide)
        total["bad_grads"] = torch.count_nonzero(~torch.isfinite(sparse)).to(wide)
    pull = _pull(flat["p"], flat["g"]) if hyper.weight_decay and "g" in flat else (math.inf, 0.0)
    for name, x in zip(("pull_spread", "pull"), pull, strict=True):
        total[name] = torch.as_tensor(x, dtype=wide, device=p.device)
    return total


def _flat(x: Tensor) -> Tensor:
    x = x.detach()
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else widened(x, torch.float32)


def _bounded(number: float) -> float:
    """Return the number, or float32's largest if that is smaller: torch refuses comparisons with larger ones."""
    return min(number, torch.finfo(torch.float32).max)


def _sums(
    rule: Rule,
    hyper: Hyper,
    peak: float,
    part: Mapping[str, Tensor],
    dtype: torch.dtype,
    kept: torch.dtype | None,
    t: int,
) -> dict[str, Tensor]:
    """Return what is summed over one part of a parameter. A new reading is one entry of the dict at the end.

    Args:
        dtype, kept: the dtypes of the parameter and of its square_avg.
    """
    p, g = part["p"], part.get("g")
    zero = torch.zeros((), dtype=p.dtype, device=p.device)
    nowhere, everywhere = torch.zeros_like(p, dtype=torch.bool), torch.ones_like(p, dtype=torch.bool)
    peak = _bounded(peak)
    lr, alpha, eps = _bounded(analysis.number(hyper.lr)), float(hyper.alpha), _bounded(float(hyper.eps))
    h = g
    if g is not None and rule.weight_decay_mode == "l2" and hyper.weight_decay:
        h = g + float(hyper.weight_decay) * p  # [1]
    v, m, b = (part.get(name) for name in ("square_avg", "grad_avg", "momentum_buffer"))
    stepped = t > 0 and v is not None
    bad_state = sum((torch.count_nonzero(~torch.isfinite(x)) for x in (v, m, b) if x is not None), zero)
    if not stepped:
        t, b = 1, None
        v = None if h is None else alpha * rule.square_avg_init + (1 - alpha) * h * h  # [2] of the step to come
        m = None if h is None else (1 - alpha) * h
    touched, below_eps, cancelled, root, u = nowhere, nowhere, nowhere, p.new_zeros(()), None
    w = root
    inside = rule.eps_mode in ("inside", "both")
    if v is not None and not (rule.centered and m is None):
        c = 1 - alpha**t if rule.bias_correction else 1.0  # [4]
        left = _bounded(alpha**t * rule.square_avg_init)
        slack = _SLACK.get(kept, 1.01)  # type: ignore[arg-type]
        touched = v > (slack * left + (1e-37 if rule.square_avg_init else 0.0))  # below, float32 rounds coarsely
        w = v / c
        if rule.centered and m is not None:
            w = (w - (m / c).square()).clamp(min=0)  # [5]
            cancelled = touched & (w < _CANCELLED.get(kept, CANCELLED) * v / c) & stepped  # type: ignore[arg-type]
        root = w.sqrt()
        below_eps = ((w if inside else root) < eps) & ~cancelled
        d = denominator(rule.eps_mode, eps, w)  # [6]
        u = None if h is None else torch.where((h == 0) & (d == 0), 0.0, h / d)  # [7]
    move = _move(rule, hyper, u, b, stepped, lr)
    present = nowhere if g is None else g != 0
    coded, at_bottom, at_top = nowhere, nowhere, nowhere
    if kept == torch.uint8 and stepped and v is not None:
        coded = (v > 0) | present
        at_bottom, at_top = coded & (v < SMALLEST_NORMAL), (v >= LARGEST) & v.isfinite()
    stuck = nowhere
    if h is not None and stepped:
        stuck = touched & (h != 0) & (root > STUCK * h.abs())
    # A step below half a unit in the last place rounds away. The first steps are longer than those that follow.
    early = math.sqrt(1 - alpha**t) if not rule.square_avg_init and not rule.bias_correction else 1.0
    if rule.momentum and b is None:
        early /= math.sqrt(1 - float(hyper.momentum) ** 2)  # how much longer momentum makes steps of varying sign
    steady = torch.full_like(p, peak) if move is None else move.abs() * (early * (peak / abs(lr) if lr else 0.0))
    known = move is not None or analysis.most(rule, hyper) > analysis.GUARDED
    moving = (everywhere if known else nowhere) & (steady != 0) & (p != 0)
    power_of_two = torch.exp2(p.abs().log2().floor())
    lost, lost_in_float32 = (
        moving & (steady < power_of_two * unit / 2)
        for unit in (torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    )
    decade = (-(w if inside else root).clamp(min=torch.finfo(root.dtype).tiny).log10()).ceil().clamp(0, DECADES - 1)
    sum_dtype = torch.float32 if p.device.type == "mps" else torch.float64
    count = torch.count_nonzero
    return {
        # NaN and infinite elements.
        "bad_params": count(~torch.isfinite(p)),
        "bad_grads": zero if g is None else count(~torch.isfinite(g)),
        "bad_state": bad_state,
        # p², and the square of the last step (before the first, of the next) with the elements where it is known.
        "param_squares": p.square().sum(dtype=sum_dtype),
        "step_squares": zero if move is None else move.to(sum_dtype).square().sum(),
        "steps_known": zero if move is None else zero + p.numel(),
        # Elements with a gradient other than 0 now, with an average that ever met one, and with both.
        "with_grad": count(present),
        "touched": count(touched),
        "touched_with_grad": count(touched & present),
        # Touched elements where ε exceeds the root (w, where ε stands inside).
        "below_eps": count(touched & below_eps),
        # Elements whose root is STUCK times the present gradient, their roots and their gradients.
        "stuck": count(stuck),
        "stuck_roots": torch.where(stuck, root, 0.0).sum(),
        "stuck_grads": zero if h is None else torch.where(stuck, h.abs(), 0.0).sum(),
        # Elements whose square_avg is kept in float8 and not 0 for want of a gradient; those of them with the
        # smallest codes, 0 to 3, and with the largest number.
        "coded": count(coded),
        "at_bottom": count(at_bottom),
        "at_top": count(at_top),
        # Touched elements whose variance v − m² is rounding noise.
        "cancelled": count(cancelled),
        # Elements that would move, and those of them whose steady step rounds away in their dtype and in float32.
        "moving": count(moving),
        "lost": count(lost),
        "lost_in_float32": count(lost_in_float32),
        # √w of touched elements.
        "roots": torch.where(touched, root, 0.0).sum(),
        # Reading.decades.
        "decades": torch.histc(torch.where(touched & ~cancelled, decade, -1.0), DECADES, 0, DECADES),
    }


def peak_lr(group: Mapping[str, Any], lr: float) -> float:
    """Return the size of the largest learning rate that a group is known to take; schedulers record their first."""
    known = [lr, *(group.get(name) or 0.0 for name in ("initial_lr", "max_lr"))]
    return max(abs(analysis.number(x)) for x in known)


def _move(rule: Rule, hyper: Hyper, u: Tensor | None, b: Tensor | None, stepped: bool, lr: float) -> Tensor | None:
    """Return the last step, from the buffer if there is one; before the first step, the next one. [8], [9]"""
    mu = float(hyper.momentum)
    if rule.momentum and stepped and b is not None:
        scale = 1.0 if rule.lr_in_buffer else lr
        if rule.nesterov:
            return None if u is None else lr * u + mu * scale * b
        return scale * b
    if u is None:
        return None
    return lr * u * (1 + mu if rule.momentum and rule.nesterov else 1)


def _pull(p: Tensor, g: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Detect weight decay inside the loss: many elements share one ratio g/p.

    Returns: the spread of the densest tenth of the positive ratios in a sample, relative to their ratio, and that
        ratio; (inf, 0) below 200 elements.
    """
    stride = max(1, p.numel() // SAMPLE)
    p, g = _wide(p[::stride]), _wide(g[::stride])
    if p.numel() < 200:
        return math.inf, 0.0
    ratio = torch.where((p != 0) & (g != 0), g / p, -1.0)
    ordered = torch.where(ratio > 0, ratio, math.inf).sort().values
    k = p.numel() // 10
    spread = (ordered[k:] - ordered[:-k]) / ordered[:-k]
    spread = torch.where(spread.isnan(), math.inf, spread)
    best, index = spread.min(dim=0)
    return best, ordered[index + k // 2]
