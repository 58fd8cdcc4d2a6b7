"""What an optimizer's tensors look like, in one reading: nothing is changed, and each device is waited for once.

Every tensor is read in parts that fit a cache, so a reading needs no temporary the size of the parameters.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmsprop import analysis, settings
from rmsprop.analysis import denominator
from rmsprop.printing import printable
from rmsprop.spec import Hyper, Rule
from rmsprop.tensors import shards
from rmsprop.tensors.forked import serial_after_fork
from rmsprop.tensors.names import names

PART = 1 << 18  # a megabyte of each of some twenty temporaries
SAMPLE = 1 << 14
STUCK = 100.0  # an element is stuck where √w is that many times its present gradient
CANCELLED = 1e-5  # and its variance is rounding noise where it is below that share of v

_COUNTS = (
    "bad_params",
    "bad_grads",
    "bad_state",
    "param_squares",
    "step_squares",
    "steps_known",
    "with_grad",
    "touched",
    "touched_with_grad",
    "below_eps",
    "stuck",
    "stuck_roots",
    "stuck_grads",
    "cancelled",
    "moving",
    "lost",
    "lost_in_float32",
    "roots",
)
DECADES = 40  # powers of ten from 1 down to float32's smallest number


@dataclass(frozen=True)
class Reading:
    """One parameter: sums over its elements, of complex ones over both parts.

    Attributes:
        steps: how many it has taken; 0 without state.
        has_grad: whether it has a gradient now; is_lazy: whether averages of rows without one wait.
        bad_params, bad_grads, bad_state: NaN and infinite elements.
        param_squares: the sum of p².
        step_squares, steps_known: the sum of squares of the last step, before the first of the one that the gradient
            asks for; and over how many elements.
        with_grad: elements whose gradient is not 0 now.
        touched: elements whose average has ever met a gradient; touched_with_grad: those with one now.
        below_eps: touched elements where ε exceeds the root (of w, in units of g², where ε stands inside).
        stuck: elements with a gradient and a root STUCK times as large; stuck_roots, stuck_grads: sums of both.
        cancelled: touched elements whose variance v − m² is rounding noise.
        moving, lost, lost_in_float32: elements that would move, and those whose steady step is below half a unit in
            the last place of their dtype, and of float32.
        roots: the sum of √w over touched elements.
        decades: touched elements by the k for which 10⁻ᵏ is the largest power of ten, up to 1, that their root (w,
            where ε stands inside) reaches.
        pull: c, if many elements have the gradient c·p for one and the same c > 0, else 0.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    elements: int
    steps: int
    has_grad: bool
    has_state: bool
    has_buffer: bool
    is_lazy: bool
    requires_grad: bool
    bad_params: float = 0.0
    bad_grads: float = 0.0
    bad_state: float = 0.0
    param_squares: float = 0.0
    step_squares: float = 0.0
    steps_known: float = 0.0
    with_grad: float = 0.0
    touched: float = 0.0
    touched_with_grad: float = 0.0
    below_eps: float = 0.0
    stuck: float = 0.0
    stuck_roots: float = 0.0
    stuck_grads: float = 0.0
    cancelled: float = 0.0
    moving: float = 0.0
    lost: float = 0.0
    lost_in_float32: float = 0.0
    roots: float = 0.0
    decades: tuple[float, ...] = ()
    pull: float = 0.0

    @property
    def param_rms(self) -> float:
        """The root mean square of the parameter."""
        return math.sqrt(self.param_squares / self.elements) if self.elements else 0.0

    @property
    def step_rms(self) -> float | None:
        """The root mean square of the step, where it is known."""
        return math.sqrt(self.step_squares / self.steps_known) if self.steps_known else None


@serial_after_fork
@torch.no_grad()
def survey(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]]) -> list[list[Reading]]:
    """A reading of every parameter, by group. Lazy and meta tensors are left out.

    Of a distributed parameter this process's shard is read, and no other process is asked: one alone may look.

    Mutates: nothing.
    """
    found: list[tuple[int, dict[str, Any], Tensor]] = []
    for i, group in enumerate(groups):
        rule, hyper = settings.read(group)
        peak = peak_lr(group, analysis.number(hyper.lr))
        called = names(group) or [f"group{i}.param{j}" for j in range(len(group["params"]))]
        for name, p in zip(called, group["params"], strict=True):
            if not _readable(p):
                continue
            own = {key: shards.shard(x) for key, x in (state.get(p) or {}).items()}
            held, grad = shards.shard(p), shards.shard_of_gradient(p)
            about: dict[str, Any] = {
                "name": printable(str(name)),
                "shape": tuple(p.shape),
                "dtype": p.dtype,
                "elements": held.numel() * (2 if p.is_complex() else 1),
                "steps": int(own.get("step", 0)),
                "has_grad": p.grad is not None,
                "has_state": "square_avg" in own,
                "has_buffer": "momentum_buffer" in own,
                "is_lazy": group["sparse"] == "lazy" and p.grad is not None and p.grad.is_sparse,
                "requires_grad": p.requires_grad,
            }
            found.append((i, about, _numbers(rule, hyper, peak, held, grad, own, about["steps"])))
    values = _fetch([numbers for _, _, numbers in found])
    readings: list[list[Reading]] = [[] for _ in groups]
    for (i, about, _), row in zip(found, values, strict=True):
        *counts, spread, pull = row
        sums: dict[str, Any] = dict(zip(_COUNTS, counts[: len(_COUNTS)], strict=True))
        sums["decades"] = tuple(counts[len(_COUNTS) :])
        readings[i].append(Reading(**about, **sums, pull=pull if spread < 1e-3 else 0.0))
    return readings


def _readable(p: Tensor) -> bool:
    if torch.nn.parameter.is_lazy(p) or p.is_meta:
        return False
    return p.layout == torch.strided and (p.is_floating_point() or p.is_complex())


def _fetch(numbers: list[Tensor]) -> list[list[float]]:
    """The numbers of every parameter, with one transfer for each device."""
    rows: dict[int, list[float]] = {}
    for device in dict.fromkeys(tensor.device for tensor in numbers):
        places = [k for k, tensor in enumerate(numbers) if tensor.device == device]
        rows |= zip(places, torch.stack([numbers[k] for k in places]).tolist(), strict=True)
    return [rows[k] for k in range(len(numbers))]


def _numbers(
    rule: Rule, hyper: Hyper, peak: float, p: Tensor, g: Tensor | None, own: Mapping[str, Any], t: int
) -> Tensor:
    """The sums of _COUNTS and the decades over all parts, and the two numbers of _pull, on the parameter's device."""
    wide = torch.float32 if p.device.type == "mps" else torch.float64
    total = torch.zeros(len(_COUNTS) + DECADES, dtype=wide, device=p.device)
    sparse = g.detach().coalesce().values() if g is not None and g.layout == torch.sparse_coo else None
    if g is not None and g.layout != torch.strided:
        g = None
    slots = {name: own.get(name) for name in ("square_avg", "grad_avg", "momentum_buffer")}
    tensors = {"p": p, "g": g, **slots}
    flat = {
        name: _flat(x)
        for name, x in tensors.items()
        if isinstance(x, Tensor) and (x.shape, x.device) == (p.shape, p.device)
    }
    for begin in range(0, flat["p"].numel(), PART):
        part = {name: _wide(x[begin : begin + PART]) for name, x in flat.items()}
        total += torch.cat([x.reshape(-1).to(wide) for x in _sums(rule, hyper, peak, part, p.dtype, t)])
    if sparse is not None:  # its zeros are not stored
        hit = torch.count_nonzero(sparse).to(wide)
        total[_COUNTS.index("with_grad")] = total[_COUNTS.index("touched_with_grad")] = hit
        total[_COUNTS.index("bad_grads")] = torch.count_nonzero(~torch.isfinite(sparse)).to(wide)
    pull = _pull(flat["p"], flat["g"]) if hyper.weight_decay and "g" in flat else (math.inf, 0.0)
    return torch.cat([total, torch.stack([torch.as_tensor(x, dtype=wide, device=p.device) for x in pull])])


def _flat(x: Tensor) -> Tensor:
    x = x.detach()
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _held(number: float) -> float:
    """The number, or the largest that float32 holds: torch refuses to compare tensors with a larger one."""
    return min(number, torch.finfo(torch.float32).max)


def _sums(
    rule: Rule, hyper: Hyper, peak: float, part: Mapping[str, Tensor], dtype: torch.dtype, t: int
) -> Iterator[Tensor]:
    """The sums of _COUNTS over one part, in that order, and the decades."""
    p, g = part["p"], part.get("g")
    none = torch.zeros((), dtype=p.dtype, device=p.device)
    no, yes = torch.zeros_like(p, dtype=torch.bool), torch.ones_like(p, dtype=torch.bool)
    peak = _held(peak)
    lr, alpha, eps = _held(analysis.number(hyper.lr)), float(hyper.alpha), _held(float(hyper.eps))
    h = g
    if g is not None and rule.weight_decay_mode == "l2" and hyper.weight_decay:
        h = g + float(hyper.weight_decay) * p  # [1]
    v, m, b = (part.get(name) for name in ("square_avg", "grad_avg", "momentum_buffer"))
    stepped = t > 0 and v is not None
    bad_state = sum((torch.count_nonzero(~torch.isfinite(x)) for x in (v, m, b) if x is not None), none)
    if not stepped:
        t, b = 1, None
        v = None if h is None else alpha * rule.square_avg_init + (1 - alpha) * h * h  # [2], the step to come
        m = None if h is None else (1 - alpha) * h
    touched, eps_rules, cancelled, root, u = no, no, no, p.new_zeros(()), None
    w = root
    if v is not None and not (rule.centered and m is None):
        c = 1 - alpha**t if rule.bias_correction else 1.0  # [4]
        left = _held(alpha**t * rule.square_avg_init)
        touched = v > (1.01 * left + (1e-37 if rule.square_avg_init else 0.0))  # below, float32 rounds coarsely
        w = v / c
        if rule.centered and m is not None:
            w = (w - (m / c).square()).clamp(min=0)  # [5]
            cancelled = touched & (w < CANCELLED * v / c) & stepped
        root = w.sqrt()
        eps_rules = ((w if rule.eps_mode in ("inside", "both") else root) < eps) & ~cancelled
        d = denominator(rule.eps_mode, eps, w)  # [6]
        u = None if h is None else torch.where((h == 0) & (d == 0), 0.0, h / d)  # [7]
    move = _move(rule, hyper, u, b, stepped, lr)
    present = no if g is None else g != 0
    stuck = no
    if h is not None and stepped:
        stuck = touched & (h != 0) & (root > STUCK * h.abs())
    yield torch.count_nonzero(~torch.isfinite(p))
    yield none if g is None else torch.count_nonzero(~torch.isfinite(g))
    yield bad_state
    yield p.square().sum(dtype=torch.float32 if p.device.type == "mps" else torch.float64)
    yield none if move is None else move.double().square().sum() if p.device.type != "mps" else move.square().sum()
    yield none if move is None else none + p.numel()
    yield torch.count_nonzero(present)
    yield torch.count_nonzero(touched)
    yield torch.count_nonzero(touched & present)
    yield torch.count_nonzero(touched & eps_rules)
    yield torch.count_nonzero(stuck)
    yield torch.where(stuck, root, 0.0).sum()
    yield none if h is None else torch.where(stuck, h.abs(), 0.0).sum()
    yield torch.count_nonzero(cancelled)
    # A step below half a unit in the last place rounds away. The first steps are longer than those that follow.
    early = math.sqrt(1 - alpha**t) if not rule.square_avg_init and not rule.bias_correction else 1.0
    if rule.momentum and b is None:
        early /= math.sqrt(1 - float(hyper.momentum) ** 2)  # how much longer momentum makes steps of varying sign
    steady = torch.full_like(p, peak) if move is None else move.abs() * (early * (peak / abs(lr) if lr else 0.0))
    known = move is not None or analysis.most(rule, hyper) > analysis.GUARDED
    moving = (yes if known else no) & (steady != 0) & (p != 0)
    place = torch.exp2(p.abs().log2().floor())
    yield torch.count_nonzero(moving)
    for unit in (torch.finfo(dtype).eps, torch.finfo(torch.float32).eps):
        yield torch.count_nonzero(moving & (steady < place * unit / 2))
    yield torch.where(touched, root, 0.0).sum()
    beside = w if rule.eps_mode in ("inside", "both") else root
    below = (-beside.clamp(min=torch.finfo(beside.dtype).tiny).log10()).ceil().clamp(0, DECADES - 1)
    yield torch.histc(torch.where(touched & ~cancelled, below, -1.0), DECADES, 0, DECADES)


def peak_lr(group: Mapping[str, Any], lr: float) -> float:
    """The size of the largest learning rate that a group is known to take: a schedule leaves what it began with."""
    known = [lr, *(group.get(name) or 0.0 for name in ("initial_lr", "max_lr"))]
    return max(abs(analysis.number(x)) for x in known)


def _move(rule: Rule, hyper: Hyper, u: Tensor | None, b: Tensor | None, stepped: bool, lr: float) -> Tensor | None:
    """The last step, from the buffer if there is one; before the first, the one to come. [8], [9]"""
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
    """How closely the densest tenth of the ratios g/p > 0 agrees, and on what: a pull towards 0 in the gradient.

    Returns: (spread relative to the ratio, the ratio), of a sample; (inf, 0) of fewer than 200 elements.
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
    best, place = spread.min(dim=0)
    return best, ordered[place + k // 2]
