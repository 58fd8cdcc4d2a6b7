"""Computes the lines of the equation by one Triton kernel over a table of addresses. Imported when it is requested.

The table is int64 in device memory: COLUMNS of `count` entries each, one per tensor, then an int32 per block, the
index of its tensor. `kernels/triton.py` makes it.
"""

# Triton gives annotations and returns its own meaning.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, name-defined, import-untyped, no-untyped-call"
# ruff: noqa: F821, RET505, SIM102

import triton
import triton.language as tl

from rmsprop.kernels.triton_numbers import (
    _as,
    _at_random,
    _bounded,
    _divide,
    _drawn,
    _fused,
    _keep,
    _load,
    _mix,
    _narrow,
    _prepared,
    _put,
    _sqrt,
    _store,
    _widen,
    _within,
)

# Columns of the table: seven addresses, the number of elements (-1: no gradient), the first block, 1 − αᵗ of [4] as
# the bits of a float64 if the host counts steps, the source of random bits, the address of the average, and 1 − d of
# [10] as such bits (-1: this step does not average). The source is the two keys of this step if the host counts
# steps, else the parameter's random key.
PARAM, GRAD, SQUARE_AVG, GRAD_AVG, MOMENTUM_BUFFER, STEP, COMPENSATION = map(tl.constexpr, range(7))
SIZE, FIRST, CORRECTION, RANDOM, EMA, SHARE = map(tl.constexpr, range(7, 13))
COLUMNS = tl.constexpr(13)


@triton.jit
def _keys(row, count, clock: tl.constexpr):
    """Return the two keys of this step's random bits, from the host or from a counter on the device."""
    own = tl.load(row + RANDOM * count)
    low, high = own.to(tl.uint32), (own >> 32).to(tl.uint32)
    if clock is None:
        return low, high
    else:
        t = tl.load(tl.load(row + STEP * count).to(tl.pointer_type(clock))).to(tl.int64)
        first = _mix(low + t.to(tl.uint32) * 0x9E3779B9, (t >> 32).to(tl.uint32))
        return first, _mix(high ^ first, 0)


@triton.jit
def _correction(row, count, log_alpha, clock: tl.constexpr):
    """Return 1 − αᵗ of [4] in float64, from the host or from a step counter on the device."""
    if clock is None:
        return tl.load(row + CORRECTION * count).to(tl.float64, bitcast=True)
    else:
        t = tl.load(tl.load(row + STEP * count).to(tl.pointer_type(clock))).to(tl.float64)
        # 1 − eˣ without cancellation (W. Kahan): the rounding of eˣ is undone by its own logarithm
        x = t * log_alpha
        y = tl.exp(x)
        return tl.where(y == 1.0, -x, tl.where(y == 0.0, 1.0, (1.0 - y) * x / tl.log(tl.where(y == 0.0, 0.5, y))))


@triton.jit
def _share(row, count, decay, start, interval, warm_up: tl.constexpr, clock: tl.constexpr):
    """Return 1 − d of [10] in float64, from the host or from a step counter on the device: spec.py Averaging."""
    if clock is None:
        return tl.load(row + SHARE * count).to(tl.float64, bitcast=True)
    else:
        t = tl.load(tl.load(row + STEP * count).to(tl.pointer_type(clock))).to(tl.int64)
        since, interval = t - start.to(tl.int64), interval.to(tl.int64)
        k = tl.maximum(since, 0) // interval
        n = tl.maximum(k, 1).to(tl.float64)
        if warm_up == "tensorflow":
            d = tl.minimum(decay, (1 + n) / (10 + n))
        elif warm_up == "timm":
            d = tl.minimum(decay, 1 - tl.exp(tl.log(n) * (-2 / 3)))
        else:
            d = tl.where(k > 1, decay, 0.0)
        return tl.where(since <= 0, 1.0, tl.where(since == k * interval, 1 - d, -1.0))


@triton.jit
def _averaged(e, p, share, arithmetic: tl.constexpr):
    """[10] Return the average that a parameter as stored enters with a share of 1 − d."""
    # from the nearer of the two: a share of 1 copies, and equal weights stay equal
    apart = p - e
    near = tl.where(share > 0.5, p, e)
    near = _fused(tl.cast(tl.where(share > 0.5, -(1 - share), share), arithmetic), apart, near)
    # inf and NaN as in the equation
    plain = tl.cast(1 - share, arithmetic) * e + tl.cast(share, arithmetic) * p
    return tl.where(apart - apart == 0, near, plain)


@triton.jit
def _lines(
    row,  # the tensor's entry in the table's first column
    count,
    offset,  # the block's first element in the tensor
    left,  # elements of the tensor from there on
    scale,  # 1 / loss scale, negative to ascend; it and the numbers below in float64, rounded once here
    lr,
    alpha,
    beta,
    eps,
    mu,
    wd,
    cap,
    carried,
    wall,
    early,
    value,
    last,
    factor,
    rest,
    correction,
    share,
    first,  # keys of the random bits
    second,
    param: tl.constexpr,
    square: tl.constexpr,
    state: tl.constexpr,
    ema: tl.constexpr,
    arithmetic: tl.constexpr,
    eps_mode: tl.constexpr,
    centered: tl.constexpr,
    momentum: tl.constexpr,
    nesterov: tl.constexpr,
    lr_in_buffer: tl.constexpr,
    decoupled: tl.constexpr,
    bias_correction: tl.constexpr,
    capped: tl.constexpr,
    narrowed: tl.constexpr,
    stochastic: tl.constexpr,
    compensated: tl.constexpr,
    walled: tl.constexpr,
    averaged: tl.constexpr,
    clipped: tl.constexpr,
    pulled: tl.constexpr,
    block: tl.constexpr,
    vector: tl.constexpr,  # elements that may be read at once; 1: some of the block's may be missing
):
    """Advance one block of one tensor. Mutates: parameter, slots and remainder. Never the gradient."""
    at = tl.arange(0, block)
    p_at, g_at, v_at = tl.load(row + PARAM * count), tl.load(row + GRAD * count), tl.load(row + SQUARE_AVG * count)
    m_at, b_at = tl.load(row + GRAD_AVG * count), tl.load(row + MOMENTUM_BUFFER * count)
    mask = None if vector > 1 else at < left
    # all reads come before the first write, which a compiler must assume to alias them
    p = _load(p_at, offset, at, mask, vector, param, arithmetic)
    g = _load(g_at, offset, at, mask, vector, param, arithmetic) * tl.cast(scale, arithmetic)
    v = _load(v_at, offset, at, mask, vector, square, arithmetic)
    if centered:
        m = _load(m_at, offset, at, mask, vector, state, arithmetic)
    if momentum:
        b = _load(b_at, offset, at, mask, vector, state, arithmetic)
    if compensated:
        c_at = tl.load(row + COMPENSATION * count)
        scale_of_rest: tl.constexpr = 2048.0 if param == tl.float16 else 1.0  # csrc/types.h kRestScale
        p = p + _load(c_at, offset, at, mask, vector, param, arithmetic) * (1 / scale_of_rest)
    if averaged:
        e_at = tl.load(row + EMA * count)
        mean = p
        if share >= 0:
            mean = _load(e_at, offset, at, mask, vector, ema, arithmetic)
    random = first
    if narrowed:
        random = _drawn(offset, at, first, second)
    if clipped is not None:
        g = _prepared(g, p, early, value, pulled, arithmetic)
        g = _within(g * tl.cast(factor, arithmetic) * tl.cast(rest, arithmetic), tl.cast(last, arithmetic))
    # [1] decay
    if decoupled:
        p = p * tl.cast(1 - lr * wd, arithmetic)
    else:
        g = tl.where(wd != 0, _fused(tl.cast(wd, arithmetic), p, g), g)
    # [2] second moment
    before, entering = v, g
    v = _fused(tl.cast(beta, arithmetic) * g, g, tl.cast(alpha, arithmetic) * v)
    if capped:
        # a spike at most doubles v, unless v is 0; an infinite gradient is not a spike
        spike = (v > 2 * before) & (before > 0) & (tl.abs(g) < float("inf"))
        v = tl.where(spike, 2 * before, v)
        if centered:
            largest = tl.cast(carried, arithmetic) * _sqrt(before)
            entering = tl.where(spike, tl.where(g < 0, -largest, largest), g)
    _keep(v_at, offset, at, mask, vector, square, narrowed, "square_avg", random, v)
    # [4] bias
    unbias = tl.cast(1 / correction, arithmetic)
    w = v * unbias if bias_correction else v
    if centered:
        # [3] first moment
        # from the nearer of the two: alpha and beta are rounded, and a constant mean must stay constant
        apart = entering - m
        near = tl.where(alpha < 0.5, entering, m)
        near = _fused(tl.cast(tl.where(alpha < 0.5, -alpha, beta), arithmetic), apart, near)
        # inf and NaN as in the equation
        plain = tl.cast(alpha, arithmetic) * m + tl.cast(beta, arithmetic) * entering
        m = tl.where(apart - apart == 0, near, plain)
        _keep(m_at, offset, at, mask, vector, state, narrowed, "grad_avg", random, m)
        # [4] bias
        m = m * unbias if bias_correction else m
        # [5] variance: rounded below zero it is zero; NaN stays
        w = _fused(-m, m, w)
        w = tl.where(w < 0, 0.0, w)
    # [6] denominator
    e = tl.cast(eps, arithmetic)
    if eps_mode == "inside":
        d = _sqrt(w + e)
    elif eps_mode == "both":
        d = _sqrt(w + e) + e
    elif eps_mode == "floor":
        d = _sqrt(w)
        d = tl.where(d < e, e, d)
    else:
        d = _sqrt(w) + e
    # [7] direction: 0/0 is 0
    u = _divide(g, tl.where((g == 0) & (d == 0), 1.0, d))
    if capped:
        u = _within(u, tl.cast(cap, arithmetic))
    if momentum:
        # [8] momentum
        if lr_in_buffer:
            u = tl.cast(lr, arithmetic) * u
        b = _fused(tl.cast(mu, arithmetic), b, u)
        _keep(b_at, offset, at, mask, vector, state, narrowed, "momentum_buffer", random, b)
        u = _fused(tl.cast(mu, arithmetic), b, u) if nesterov else b
        if capped:
            u = _within(u, tl.cast(cap * tl.abs(lr) if lr_in_buffer else cap, arithmetic))
    # [9] parameter
    p = p - u if momentum and lr_in_buffer else _fused(-tl.cast(lr, arithmetic), u, p)
    if stochastic and not narrowed:  # as late as it can be, since it occupies registers
        random = _drawn(offset, at, first, second)
    if compensated:
        near = _narrow(p, param)
        rest = (p - _widen(near, param, arithmetic)) * scale_of_rest
        if walled:
            near = _bounded(near, wall, param, arithmetic)
        _put(p_at, offset, at, mask, vector, near)
        rest = tl.where(tl.abs(rest) < float("inf"), rest, 0.0)  # the parameter may be infinite or NaN
        _put(c_at, offset, at, mask, vector, _at_random(rest, random, param) if stochastic else _narrow(rest, param))
    elif stochastic:
        near = _at_random(p, random, param)
        if walled:
            near = _bounded(near, wall, param, arithmetic)
        _put(p_at, offset, at, mask, vector, near)
    else:
        if walled:
            p = _within(p, wall.to(arithmetic))
        near = _narrow(p, param)
        _put(p_at, offset, at, mask, vector, near)
    # [10] average
    if averaged:
        if share >= 0:
            new = _averaged(mean, _widen(_as(near, param), param, arithmetic), share, arithmetic)
            _store(e_at, offset, at, mask, vector, ema, new)


# The alignment of a tensor lr must not compile another kernel.
@triton.jit(do_not_specialize=["count", "lr_at", "grad_scale", "found_inf", "coefficients"])
def advance(
    table,  # int64, as described above
    count,  # tensors
    lr: "fp64",  # annotated as float64, as the numbers below, since a float argument would be float32
    alpha: "fp64",
    beta: "fp64",
    log_alpha: "fp64",
    eps: "fp64",
    mu: "fp64",
    wd: "fp64",
    lr_at,  # address of the learning rate instead, or None
    grad_scale,  # address of the loss scale, or None
    found_inf,  # address of a number, or None: if not 0, nothing is written and no step is counted
    cap: "fp64",  # max_update; read if capped
    carried: "fp64",  # the largest |g|/√v that enters [3] if capped
    wall: "fp64",  # clip_weights; read if walled
    decay: "fp64",  # [10]: the largest d, and the steps from which and between which it averages; read if averaged
    start: "fp64",
    interval: "fp64",
    coefficients,  # address of two factors of each gradient, or None: triton_norms.py
    early: "fp64",  # weight decay of [1] that comes before clipping; it and the next two are read if clipped
    value: "fp64",  # clip_value before the factors, or infinity
    last: "fp64",  # clip_value after them, or infinity
    param: tl.constexpr,
    square: tl.constexpr,  # dtype of the second moment; uint8: float8
    state: tl.constexpr,  # dtype of the first moment and the momentum buffer
    ema: tl.constexpr,  # dtype of the average
    widest: tl.constexpr,  # of these: 16 bytes of it are read at once, and as many elements of the others, since
    # threads that hold different elements of each would exchange them through shared memory
    clock: tl.constexpr,  # dtype of step counters on the device; None: the host counts
    arithmetic: tl.constexpr,
    eps_mode: tl.constexpr,
    centered: tl.constexpr,
    momentum: tl.constexpr,
    nesterov: tl.constexpr,
    lr_in_buffer: tl.constexpr,
    decoupled: tl.constexpr,
    bias_correction: tl.constexpr,
    maximize: tl.constexpr,
    capped: tl.constexpr,
    narrowed: tl.constexpr,  # the moments and the buffer are rounded stochastically
    stochastic: tl.constexpr,  # the parameter, or its remainder if compensated, is rounded stochastically
    compensated: tl.constexpr,  # the parameter has a Kahan remainder
    walled: tl.constexpr,  # the parameter is bounded after [9]
    averaged: tl.constexpr,  # [10] runs
    warm_up: tl.constexpr,  # of the decay in [10], or None
    clipped: tl.constexpr,  # None; "scaled": by one factor that joins the scale, if one suffices; or "whole"
    pulled: tl.constexpr,  # early is not 0
    block: tl.constexpr,
    piece: tl.constexpr,  # size of the parts of a block that is not full or not aligned
):
    """One program advances one block of one tensor by one RMSprop step, in place.

    Equation: spec.py, lines [1]-[10].
    Mutates:  parameters, slots and remainders. Also step counters on the device, unless `count_steps` has counted
        them because all programs of a tensor need the count. Never gradients.
    """
    width: tl.constexpr = widest.primitive_bitwidth
    owner = tl.load((table + COLUMNS * count).to(tl.pointer_type(tl.int32)) + tl.program_id(0))
    row = table + owner
    size = tl.load(row + SIZE * count)
    number = tl.program_id(0) - tl.load(row + FIRST * count)  # of this block in its tensor
    live = size >= 0
    if found_inf is not None:
        live = live & (tl.load(found_inf) == 0)
    if live:
        if lr_at is not None:
            lr = tl.load(lr_at).to(tl.float64)
        scale = tl.cast(-1.0 if maximize else 1.0, tl.float64)
        if grad_scale is not None:
            scale = scale / tl.load(grad_scale).to(tl.float64)
        factor, rest = tl.cast(1.0, tl.float64), tl.cast(1.0, tl.float64)
        if coefficients is not None:
            factor = tl.load(coefficients + 2 * owner)
            rest = tl.load(coefficients + 2 * owner + 1)
            if clipped == "scaled":
                scale = tl.where(rest == 1, scale * factor, scale)
                factor = tl.where(rest == 1, 1.0, factor)
        correction = tl.cast(1.0, tl.float64)
        if bias_correction:
            correction = _correction(row, count, log_alpha, clock)
        first, second = 0, 0
        if stochastic or narrowed:
            first, second = _keys(row, count, clock)
        share = tl.cast(0.0, tl.float64)
        if averaged:
            share = _share(row, count, decay, start, interval, warm_up, clock)
        if clock is not None and not (bias_correction or stochastic or narrowed or averaged):
            if number == 0:
                t = tl.load(row + STEP * count).to(tl.pointer_type(clock))
                tl.store(t, tl.load(t) + 1)
        # slots of fewer bytes need fewer zero bits at the end of an address
        together = tl.load(row + PARAM * count) | tl.load(row + GRAD * count)
        if compensated:
            together |= tl.load(row + COMPENSATION * count)
        together |= tl.load(row + SQUARE_AVG * count) * (width // square.primitive_bitwidth)
        moments = tl.load(row + GRAD_AVG * count) | tl.load(row + MOMENTUM_BUFFER * count)
        together |= moments * (width // state.primitive_bitwidth)
        if averaged:
            together |= tl.load(row + EMA * count) * (width // ema.primitive_bitwidth)
        offset = number * block
        left = size - offset
        if (left >= block) & (together % 16 == 0):
            _lines(
                row, count, offset, left, scale, lr, alpha, beta, eps, mu, wd, cap, carried, wall, early, value, last,
                factor, rest, correction, share, first, second, param, square, state, ema, arithmetic, eps_mode,
                centered, momentum, nesterov, lr_in_buffer, decoupled, bias_correction, capped, narrowed, stochastic,
                compensated, walled, averaged, clipped, pulled, block, 16 // (width // 8),
            )  # fmt: skip
        else:
            # in pieces of another shape, since Triton would give loads of the same shape the 16-byte layout
            begin = 0
            end = tl.minimum(left, block).to(tl.int32)
            while begin < end:
                _lines(
                    row, count, offset + begin, left - begin, scale, lr, alpha, beta, eps, mu, wd, cap, carried, wall,
                    early, value, last, factor, rest, correction, share, first, second, param, square, state, ema,
                    arithmetic, eps_mode, centered, momentum, nesterov, lr_in_buffer, decoupled, bias_correction,
                    capped, narrowed, stochastic, compensated, walled, averaged, clipped, pulled, piece, 1,
                )  # fmt: skip
                begin += piece


@triton.jit(do_not_specialize=["count", "found_inf"])
def count_steps(table, count, found_inf, clock: tl.constexpr, block: tl.constexpr):
    """Count the step of every tensor with a gradient on the device, before many programs read the counts at once."""
    i = tl.program_id(0) * block + tl.arange(0, block)
    live = i < (count if found_inf is None else tl.where(tl.load(found_inf) == 0, count, 0))
    live = live & (tl.load(table + SIZE * count + i, mask=live, other=-1) >= 0)
    t = tl.load(table + STEP * count + i, mask=live, other=0).to(tl.pointer_type(clock))
    tl.store(t, tl.load(t, mask=live, other=0.0) + 1, mask=live)
