"""Takes the norms of gradients in Triton, and turns them into the factors that bound them: csrc/norms.h.

Sums are float64 and in a fixed order. Nothing waits for the device.
"""

# Triton gives annotations and returns its own meaning.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, name-defined, import-untyped, no-untyped-call"
# ruff: noqa: F821, RET505, SIM108

import triton
import triton.language as tl

from rmsprop.kernels.triton_kernel import COLUMNS, FIRST, GRAD, PARAM, SIZE, advance, count_steps
from rmsprop.kernels.triton_numbers import _load, _prepared

__all__ = ["advance", "bound", "count_steps", "norms", "squares"]

# Sums of a block: squares, and for float64 gradients squares of what is scaled down and up, since squares may
# overflow or vanish.
SUMS = tl.constexpr(3)
DOWN, UP = tl.constexpr(2.0**-600), tl.constexpr(2.0**600)
SMALLEST = tl.constexpr(2.0**-126)  # csrc/lines.h kSmallest


@triton.jit
def _plus(x, y):
    return x + y


@triton.jit
def _sum(x):
    """Return the sum of a vector. tl.sum is not interpreted where only these kernels are."""
    return tl.reduce(x, 0, _plus)


@triton.jit
def _summed(
    row, count, offset, left, scale, early, value, param: tl.constexpr, arithmetic: tl.constexpr,
    pulled: tl.constexpr, block: tl.constexpr, vector: tl.constexpr,
):  # fmt: skip
    """Return the sums of one block's gradients as the step takes them."""
    at = tl.arange(0, block)
    mask = None if vector > 1 else at < left
    g = _load(tl.load(row + GRAD * count), offset, at, mask, vector, param, arithmetic) * tl.cast(scale, arithmetic)
    p = g
    if pulled:
        p = _load(tl.load(row + PARAM * count), offset, at, mask, vector, param, arithmetic)
    x = _prepared(g, p, early, value, pulled, arithmetic).to(tl.float64)
    if vector == 1:
        x = tl.where(at < left, x, 0.0)
    plain = _sum(x * x)
    if arithmetic == tl.float64:
        return plain, _sum((x * DOWN) * (x * DOWN)), _sum((x * UP) * (x * UP))
    else:
        return plain, plain, plain


@triton.jit
def _root(plain, down, up):
    """Return the root of a sum of squares, by one of the others where it has overflowed or lost digits."""
    found = tl.sqrt(plain)
    found = tl.where(plain >= 1e300, tl.sqrt(down) * UP, found)
    return tl.where(plain <= 1e-280, tl.sqrt(up) * DOWN, found)


@triton.jit
def _held(norm, limit, factor, rest):
    """Return a tensor's two factors such that a norm keeps its limit. A norm of NaN makes NaN of the gradient."""
    beyond = (norm > limit) | (norm != norm)
    ratio = limit / norm
    held = tl.where(ratio < SMALLEST, SMALLEST, ratio)  # in two, since the arithmetic's dtype has fewer numbers
    left = limit / held / norm
    more = tl.where(factor == 1, left, held * left)
    first = tl.where(factor == 1, held, factor)
    return tl.where(beyond, first, factor), tl.where(beyond, rest * more, rest)


@triton.jit(do_not_specialize=["count", "grad_scale", "sums"])
def squares(
    table,  # triton_kernel.py
    count,
    sums,  # float64 of [blocks, SUMS]
    grad_scale,  # address of the loss scale, or None
    early: "fp64",  # weight decay of [1] that comes before clipping
    value: "fp64",  # clip_value, or infinity
    param: tl.constexpr,
    arithmetic: tl.constexpr,
    maximize: tl.constexpr,
    pulled: tl.constexpr,  # early is not 0
    block: tl.constexpr,
    piece: tl.constexpr,
):
    """One program sums the squares of one block of one gradient. Mutates: sums."""
    owner = tl.load((table + COLUMNS * count).to(tl.pointer_type(tl.int32)) + tl.program_id(0))
    row = table + owner
    size = tl.load(row + SIZE * count)
    number = tl.program_id(0) - tl.load(row + FIRST * count)
    scale = tl.cast(-1.0 if maximize else 1.0, tl.float64)
    if grad_scale is not None:
        scale = scale / tl.load(grad_scale).to(tl.float64)
    offset = number * block
    left = size - offset
    together = tl.load(row + GRAD * count)
    if pulled:
        together |= tl.load(row + PARAM * count)
    plain, down, up = tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64)
    if (left >= block) & (together % 16 == 0):
        plain, down, up = _summed(
            row, count, offset, left, scale, early, value, param, arithmetic, pulled,
            block, 16 // (param.primitive_bitwidth // 8),
        )  # fmt: skip
    else:
        begin = 0
        end = tl.minimum(left, block).to(tl.int32)
        while begin < end:
            a, b, c = _summed(
                row, count, offset + begin, left - begin, scale, early, value, param, arithmetic, pulled, piece, 1,
            )  # fmt: skip
            plain, down, up = plain + a, down + b, up + c
            begin += piece
    at = sums + tl.program_id(0).to(tl.int64) * SUMS
    tl.store(at, plain)
    tl.store(at + 1, down)
    tl.store(at + 2, up)


@triton.jit(do_not_specialize=["count", "sums", "coefficients", "shared"])
def norms(
    table,
    count,
    sums,
    coefficients,  # float64 of [count, 2]: the factors of each tensor
    shared,  # float64 of [count]: the norms that the global norm is made of, or -1; None without one
    clip_norm: "fp64",
    scaled: tl.constexpr,  # sums have squares of scaled gradients
    summed: tl.constexpr,  # elements of a block
    block: tl.constexpr,
):
    """One program takes the norm of one gradient from the sums of its blocks, and bounds it. Mutates: the rest."""
    i = tl.program_id(0)
    size = tl.load(table + SIZE * count + i)
    at = sums + tl.load(table + FIRST * count + i) * SUMS
    blocks = (size + summed - 1) // summed
    lane = tl.arange(0, block)
    plain = tl.full([block], 0.0, tl.float64)
    down, up = plain, plain
    begin = tl.cast(0, tl.int64)
    while begin < blocks:
        place, there = at + (begin + lane) * SUMS, begin + lane < blocks
        plain += tl.load(place, mask=there, other=0.0)
        if scaled:
            down += tl.load(place + 1, mask=there, other=0.0)
            up += tl.load(place + 2, mask=there, other=0.0)
        begin += block
    if scaled:
        norm = _root(_sum(plain), _sum(down), _sum(up))
    else:
        norm = tl.sqrt(_sum(plain))
    factor, rest = _held(norm, clip_norm, tl.cast(1.0, tl.float64), tl.cast(1.0, tl.float64))
    tl.store(coefficients + 2 * i, factor)
    tl.store(coefficients + 2 * i + 1, rest)
    if shared is not None:
        tl.store(shared + i, tl.where(size < 0, -1.0, tl.where(norm > clip_norm, clip_norm, norm)))


@triton.jit(do_not_specialize=["count", "many", "coefficients", "shared", "total", "found_inf"])
def bound(
    count,
    coefficients,
    shared,  # of all tensors whose norm is bounded together
    many,  # their number
    total,  # float64: their norm, written unless the step is skipped or there is no gradient
    found_inf,
    clip_global_norm: "fp64",
    block: tl.constexpr,
):
    """One program bounds the norm of all gradients. Mutates: coefficients and total."""
    lane = tl.arange(0, block)
    plain = tl.full([block], 0.0, tl.float64)
    down, up = plain, plain
    begin, gradients = 0, 0
    while begin < many:
        norm = tl.load(shared + begin + lane, mask=begin + lane < many, other=-1.0)
        gradients += _sum((norm != -1.0).to(tl.int32))
        norm = tl.where(norm == -1.0, 0.0, norm)
        plain += norm * norm
        down += (norm * DOWN) * (norm * DOWN)
        up += (norm * UP) * (norm * UP)
        begin += block
    norm = _root(_sum(plain), _sum(down), _sum(up))
    live = gradients > 0
    if found_inf is not None:
        live = live & (tl.load(found_inf) == 0)
    tl.store(total, norm, mask=live)
    begin = 0
    while begin < count:
        at, there = coefficients + 2 * (begin + lane), begin + lane < count
        factor, rest = tl.load(at, mask=there, other=1.0), tl.load(at + 1, mask=there, other=1.0)
        factor, rest = _held(norm, clip_global_norm, factor, rest)
        tl.store(at, factor, mask=there)
        tl.store(at + 1, rest, mask=there)
        begin += block
