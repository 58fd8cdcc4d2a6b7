"""One step of the CPU kernel beside the reference, element by element: what its tests compare with.

Errors are counted in ULPs of the dtype that a result is kept in (or of the arithmetic's, for float64 state beside
float32 arithmetic), at the size of the largest term that went into it:
p − lr·u may cancel, and then no arithmetic keeps the difference to an ULP of itself.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, product, starmap

import numpy as np
import torch
from cases import bucket_of, covering
from torch import Tensor

from rmsprop import reference
from rmsprop.kernels import cpu
from rmsprop.spec import EPS_MODES, Hyper, Rule
from rmsprop.tensors.bucket import Bucket

# Around the widths of vectors (4, 8, 16, 32) and of a loop's tail; 1000 runs the loop itself.
SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000)

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TYPES = (
    (F32, F32),
    (F32, F64),
    (F64, F32),
    (F64, F64),
    (BF16, F32),
    (BF16, F64),
    (BF16, BF16),
    (F16, F32),
    (F16, F64),
    (F16, F16),
)

# Largest error over every rule, size and 8 seeds, measured by ulp_table() in the comment, and some room above it. It
# holds for these sizes: more elements find rarer sums. ulp_table((60_000,), 1), 29 million elements of each, finds
# 4.02 in float32, and 4.09 with float64 state.
# The numbers of a step are rounded to the arithmetic's dtype, and the longest chain (l2, centered, Nesterov) has
# eleven roundings in float32, where sums take a product rounded once; a result that is kept in half precision has its
# own one and no other to speak of.
BOUND: dict[tuple[torch.dtype, torch.dtype], float] = {
    (F32, F32): 3.5,  # 3.21
    (F32, F64): 3.5,  # 3.29
    (F64, F32): 3.5,  # 3.0
    (F64, F64): 3.5,  # 3.0
    (BF16, F32): 4.5,  # 3.65, in the float32 state
    (BF16, F64): 4.5,  # 3.94, in the float32 arithmetic
    (BF16, BF16): 0.51,  # 0.50001
    (F16, F32): 4.5,  # 2.82
    (F16, F64): 4.5,  # 3.04
    (F16, F16): 0.51,  # 0.50016
}

_BITS = {F32: 23, F64: 52, BF16: 7, F16: 10}
_SMALLEST = {F32: -149, F64: -1074, BF16: -133, F16: -24}

# has momentum, nesterov, lr in the buffer
MOMENTA = ((0, 0, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1))


def rules(eps_mode: str, centered: bool, momentum: tuple[int, int, int]) -> Iterator[tuple[Rule, Hyper]]:
    """Every rule with these switches, with numbers that set every line to work."""
    for others in product(*_OTHERS):
        yield _rule(eps_mode, centered, momentum, *others)


# weight decay, bias_correction, maximize
_OTHERS = ((None, "l2", "decoupled"), (False, True), (False, True))


def _rule(
    eps_mode: str,
    centered: bool,
    momentum: tuple[int, int, int],
    decay: str | None,
    bias_correction: bool,
    maximize: bool,
) -> tuple[Rule, Hyper]:
    on, nesterov, in_buffer = (bool(x) for x in momentum)
    rule = Rule(
        eps_mode=eps_mode,
        centered=centered,
        momentum=on,
        nesterov=nesterov,
        lr_in_buffer=in_buffer,
        weight_decay_mode=decay or "l2",
        bias_correction=bias_correction,
        maximize=maximize,
    )
    return rule, Hyper(lr=0.03, alpha=0.9, eps=1e-3, momentum=0.8 if on else 0.0, weight_decay=0.05 if decay else 0.0)


ALL_SWITCHES = tuple(product(EPS_MODES, (False, True), MOMENTA))
EVERY = tuple(chain.from_iterable(starmap(rules, ALL_SWITCHES)))
# Every pair of settings of two switches at least once.
COVERING = tuple(starmap(_rule, covering(EPS_MODES, (False, True), MOMENTA, *_OTHERS)))


def tensors(rule: Rule, types: tuple[torch.dtype, torch.dtype], sizes: tuple[int, ...], seed: int) -> Bucket:
    """A bucket in the middle of a run: 9 steps done, and a variance well above the squared mean."""
    param, state = types
    rng = np.random.default_rng(seed)

    def made(values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(values).to(dtype)

    bucket = Bucket()
    for size in sizes:
        v = rng.uniform(0.1, 4, size)
        bucket.param.append(made(rng.normal(size=size), param))
        bucket.grad.append(made(rng.normal(size=size), param))
        bucket.slots["square_avg"].append(made(v, state))
        if rule.centered:
            bucket.slots["grad_avg"].append(made(rng.uniform(-0.3, 0.3, size) * np.sqrt(v), state))
        if rule.momentum:
            bucket.slots["momentum_buffer"].append(made(rng.normal(size=size), state))
        bucket.slots["step"].append(torch.tensor(9.0))
    return bucket


def copied(bucket: Bucket) -> Bucket:
    """A bucket with the same values in memory, strides and alignment of its own."""
    return bucket_of(*([x.clone() for x in values] for values in bucket.lists()))


def expected(rule: Rule, hyper: Hyper, bucket: Bucket, i: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What the reference makes of tensor i: for each result its value, and the size of its largest term."""
    p, g = bucket.param[i].double().numpy(), bucket.grad[i].double().numpy()
    state = {"step": int(bucket.slots["step"][i])}
    for name in rule.slots()[1:]:
        state[name] = bucket.slots[name][i].double().numpy()
    moved, new = reference.step(rule, hyper, p, g, state)
    # the same step over magnitudes; the denominator is the true one
    lr, alpha, mu, wd = hyper.lr, hyper.alpha, hyper.momentum, hyper.weight_decay
    slope = -1 if rule.maximize else 1
    true_g = slope * g + (wd * p if rule.weight_decay_mode == "l2" else 0)
    size_g = np.abs(g) + (wd * np.abs(p) if rule.weight_decay_mode == "l2" else 0)
    plain = replace(rule, momentum=False, nesterov=False)
    with np.errstate(all="ignore"):
        start = np.zeros_like(p)
        u = -reference.step(
            replace(plain, maximize=False),
            replace(hyper, lr=1.0, weight_decay=0.0),
            start,
            true_g,
            state,
        )[0]
        u = np.where(true_g == 0, 0, np.abs(u) * size_g / np.abs(true_g))
    terms = {"param": np.abs(p), "square_avg": alpha * np.abs(state["square_avg"]) + (1 - alpha) * size_g**2}
    if rule.centered:
        terms["grad_avg"] = alpha * np.abs(state["grad_avg"]) + (1 - alpha) * size_g
    if rule.momentum:
        u = lr * u if rule.lr_in_buffer else u
        b = mu * np.abs(state["momentum_buffer"]) + u
        terms["momentum_buffer"] = b
        u = u + mu * b if rule.nesterov else b
    terms["param"] = np.maximum(terms["param"], u if rule.momentum and rule.lr_in_buffer else lr * u)
    values = {"param": moved, **{name: new[name] for name in rule.slots()[1:]}}
    return {name: (value, terms[name]) for name, value in values.items()}


def ulps(got: Tensor, value: np.ndarray, term: np.ndarray, dtype: torch.dtype) -> float:
    """The largest error of a tensor in ULPs of that dtype at the size of the term; inf where NaN or inf differ."""
    x = got.double().numpy().reshape(value.shape)
    if not np.array_equal(np.isnan(x), np.isnan(value)) or not np.array_equal(np.isinf(x), np.isinf(value)):
        return float("inf")
    finite = np.isfinite(value)
    if not finite.any():
        return 0.0
    size = np.maximum(np.abs(term), np.abs(value))[finite]
    size = np.where(np.isfinite(size), size, np.abs(value)[finite])
    exponent = np.maximum(np.frexp(size)[1] - 1 - _BITS[dtype], _SMALLEST[dtype])
    return float(np.max(np.abs(x[finite] - value[finite]) / np.ldexp(1.0, exponent)))


def worst(rule: Rule, hyper: Hyper, before: Bucket, after: Bucket) -> float:
    """The largest error of any element of any result, in ULPs."""
    found = 0.0
    for i in range(len(before.param)):
        assert float(after.slots["step"][i]) == float(before.slots["step"][i]) + 1
        for name, (value, term) in expected(rule, hyper, before, i).items():
            got = (after.param if name == "param" else after.slots[name])[i]
            exact = F32 if got.dtype == F64 and before.param[i].dtype != F64 else got.dtype
            found = max(found, ulps(got, value, term, exact))
    return found


def stepped(rule: Rule, hyper: Hyper, bucket: Bucket) -> float:
    """Step the bucket with the CPU kernel; its worst error against the reference. Raises if a gradient was edited."""
    before = copied(bucket)
    cpu.step(rule, hyper, bucket)
    for mine, kept in zip(bucket.grad, before.grad, strict=True):
        if not torch.equal(mine.nan_to_num(), kept.nan_to_num()):
            raise AssertionError("the step edited a gradient")
    return worst(rule, hyper, before, bucket)


def spiked(rule: Rule, types: tuple[torch.dtype, torch.dtype], seed: int) -> Bucket:
    """Return a bucket in which every third gradient is a spike, and every seventh average has not begun."""
    bucket = tensors(rule, types, (0, 1, 7, 33, 200), seed)
    for g, v in zip(bucket.grad, bucket.slots["square_avg"], strict=True):
        g[::3] *= 40  # and not so large that its square overflows in float16 state
        v[::7] = 0
    for m in bucket.slots["grad_avg"]:
        m[::7] = 0
    return bucket


def ulp_table(sizes: tuple[int, ...] = SIZES, seeds: int = 8) -> dict[tuple[torch.dtype, torch.dtype], float]:
    """The measurement behind BOUND: python -c 'import cpu_parity; print(cpu_parity.ulp_table())', in tests/."""
    table = {}
    for types in TYPES:
        found = 0.0
        for switches in ALL_SWITCHES:
            for rule, hyper in rules(*switches):
                for seed in range(seeds):
                    found = max(found, stepped(rule, hyper, tensors(rule, types, sizes, seed)))
        table[types] = found
    return table
