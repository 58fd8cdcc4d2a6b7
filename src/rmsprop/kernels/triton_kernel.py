"""Computes the nine lines by one Triton kernel over a table of addresses. Imported when it is requested.

The table is int64 in device memory: COLUMNS of `count` entries each, one per tensor, then an int32 per block, the
index of its tensor. `kernels/triton.py` makes it.
"""

# Triton gives annotations and returns its own meaning.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, name-defined, import-untyped, no-untyped-call"
# ruff: noqa: F821, RET505, SIM102

import triton
import triton.language as tl

# Columns of the table: seven addresses, the number of elements (-1: no gradient), the first block, 1 − αᵗ of [4] as
# the bits of a float64 if the host counts steps, and the source of random bits. The source is the two keys of this
# step if the host counts steps, else the parameter's random key.
PARAM, GRAD, SQUARE_AVG, GRAD_AVG, MOMENTUM_BUFFER, STEP, COMPENSATION = map(tl.constexpr, range(7))
SIZE, FIRST, CORRECTION, RANDOM = map(tl.constexpr, range(7, 11))
COLUMNS = tl.constexpr(11)

# Triton's interpreter truncates to bfloat16 and misreads its subnormals, so the conversion is explicit under it.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _places(address, kept: tl.constexpr, offset, at, vector: tl.constexpr):
    """Return pointers to the elements of a block, of which `vector` may be read or written at once."""
    first = address.to(tl.pointer_type(kept))
    if vector > 1:
        first = tl.multiple_of(first, vector * (kept.primitive_bitwidth // 8))
    return first + offset + at


@triton.jit
def _load(address, offset, at, mask, vector: tl.constexpr, kept: tl.constexpr, arithmetic: tl.constexpr):
    """Return a block of numbers, widened to the arithmetic's dtype."""
    if INTERPRETED and kept == tl.bfloat16:
        return _widen(tl.load(_places(address, tl.int16, offset, at, vector), mask=mask), kept, arithmetic)
    else:
        return tl.load(_places(address, kept, offset, at, vector), mask=mask).to(arithmetic)


@triton.jit
def _store(address, offset, at, mask, vector: tl.constexpr, kept: tl.constexpr, x):
    """Write a block of numbers, rounded once to nearest even."""
    if INTERPRETED and kept == tl.bfloat16:
        tl.store(_places(address, tl.int16, offset, at, vector), _narrow(x, kept), mask=mask)
    else:
        tl.store(_places(address, kept, offset, at, vector), x.to(kept), mask=mask)


@triton.jit
def _put(address, offset, at, mask, vector: tl.constexpr, x):
    """Write a block of bits."""
    tl.store(_places(address, x.dtype, offset, at, vector), x, mask=mask)


@triton.jit
def _narrow(x, kept: tl.constexpr):
    """Return a number in its storage dtype, rounded once to nearest even."""
    if INTERPRETED and kept == tl.bfloat16:
        u = x.to(tl.int32, bitcast=True)
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        return tl.where(x != x, (u >> 16) | 0x40, rounded).to(tl.int16)
    else:
        return x.to(kept)


@triton.jit
def _widen(x, kept: tl.constexpr, arithmetic: tl.constexpr):
    """Return a stored number in the arithmetic's dtype."""
    if INTERPRETED and kept == tl.bfloat16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True).to(arithmetic)
    else:
        return x.to(arithmetic)


@triton.jit
def _mix(x, key):
    """Return a hash of 32 bits. Source: the finalizer `lowbias32` of C. Wellons, with a second key added halfway."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x + key
    x = x * 0x846CA68B
    return x ^ (x >> 16)


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
def _at_random(x, random, kept: tl.constexpr):
    """Return the bits of x rounded to a neighbor in half precision, up with a probability of the dropped fraction.

    Random bits are added to the dropped bits, and the carry decides. NaN and infinity stay.
    """
    signed = x.to(tl.uint32, bitcast=True)
    u = signed & 0x7FFFFFFF
    if kept == tl.bfloat16:
        h = (u + (random & 0xFFFF)) >> 16
        special = tl.where(u > 0x7F800000, (u >> 16) | 0x40, 0x7F80)
    else:
        normal = ((u + (random & 0x1FFF)) >> 13) - ((127 - 15) << 10)
        # below 2⁻¹⁴ neighbors are 2⁻²⁴ apart: smaller numbers drop more bits
        exponent = (u >> 23).to(tl.int32)
        dropped = tl.minimum(tl.maximum(126 - exponent, 14), 31).to(tl.uint32)
        room = (tl.full(x.shape, 1, tl.uint32) << dropped) - 1
        units = (((u & 0x7FFFFF) | 0x800000) + (random & room)) >> dropped
        h = tl.where(exponent < 113, tl.where(exponent < 95, 0, units), tl.minimum(normal, 0x7C00))
        special = tl.where(u > 0x7F800000, 0x7E00, 0x7C00)
    return (tl.where(u >= 0x7F800000, special, h) | (signed >> 16 & 0x8000)).to(tl.int16)


@triton.jit
def _within(x, bound):
    """Return x with each element bounded to ±bound. NaN stays."""
    x = tl.where(x > bound, bound, x)
    return tl.where(x < -bound, -bound, x)


@triton.jit
def _sqrt(x):
    """Return the IEEE-rounded root. tl.sqrt is approximate in float32, and tl.sqrt_rn takes only float32."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _divide(x, y):
    """Return the IEEE-rounded quotient."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _fused(x, y, z):
    """Return x·y + z, rounded once in float32 as in the CPU kernel. The interpreter computes it in float64."""
    if x.dtype == tl.float64:
        return x * y + z
    elif INTERPRETED:
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(x, y, z)


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
    correction,
    first,  # keys of the random bits
    second,
    param: tl.constexpr,
    state: tl.constexpr,
    arithmetic: tl.constexpr,
    eps_mode: tl.constexpr,
    centered: tl.constexpr,
    momentum: tl.constexpr,
    nesterov: tl.constexpr,
    lr_in_buffer: tl.constexpr,
    decoupled: tl.constexpr,
    bias_correction: tl.constexpr,
    capped: tl.constexpr,
    stochastic: tl.constexpr,
    compensated: tl.constexpr,
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
    v = _load(v_at, offset, at, mask, vector, state, arithmetic)
    if centered:
        m = _load(m_at, offset, at, mask, vector, state, arithmetic)
    if momentum:
        b = _load(b_at, offset, at, mask, vector, state, arithmetic)
    if compensated:
        c_at = tl.load(row + COMPENSATION * count)
        scale_of_rest: tl.constexpr = 2048.0 if param == tl.float16 else 1.0  # csrc/types.h kRestScale
        p = p + _load(c_at, offset, at, mask, vector, param, arithmetic) * (1 / scale_of_rest)
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
    _store(v_at, offset, at, mask, vector, state, v)
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
        _store(m_at, offset, at, mask, vector, state, m)
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
        _store(b_at, offset, at, mask, vector, state, b)
        u = _fused(tl.cast(mu, arithmetic), b, u) if nesterov else b
        if capped:
            u = _within(u, tl.cast(cap * tl.abs(lr) if lr_in_buffer else cap, arithmetic))
    # [9] parameter
    p = p - u if momentum and lr_in_buffer else _fused(-tl.cast(lr, arithmetic), u, p)
    if stochastic:
        random = _mix((offset.to(tl.uint32) + at.to(tl.uint32)) * 0x9E3779B1 ^ first, second)
    if compensated:
        near = _narrow(p, param)
        _put(p_at, offset, at, mask, vector, near)
        rest = (p - _widen(near, param, arithmetic)) * scale_of_rest
        rest = tl.where(tl.abs(rest) < float("inf"), rest, 0.0)  # the parameter may be infinite or NaN
        _put(c_at, offset, at, mask, vector, _at_random(rest, random, param) if stochastic else _narrow(rest, param))
    elif stochastic:
        _put(p_at, offset, at, mask, vector, _at_random(p, random, param))
    else:
        _store(p_at, offset, at, mask, vector, param, p)


# The alignment of a tensor lr must not compile another kernel.
@triton.jit(do_not_specialize=["count", "lr_at", "grad_scale", "found_inf"])
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
    param: tl.constexpr,
    state: tl.constexpr,
    widest: tl.constexpr,  # the wider of the two: 16 bytes of it are read at once, and as many elements of the other,
    # since threads that hold different elements of each would exchange them through shared memory
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
    stochastic: tl.constexpr,  # the parameter, or its remainder if compensated, is rounded stochastically
    compensated: tl.constexpr,  # the parameter has a Kahan remainder
    block: tl.constexpr,
    piece: tl.constexpr,  # size of the parts of a block that is not full or not aligned
):
    """One program advances one block of one tensor by one RMSprop step, in place.

    Equation: spec.py, lines [1]-[9].
    Mutates:  parameters, slots and remainders. Also step counters on the device, unless `count_steps` has counted
        them because all programs of a tensor need the count. Never gradients.
    """
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
        correction = tl.cast(1.0, tl.float64)
        if bias_correction:
            correction = _correction(row, count, log_alpha, clock)
        first, second = 0, 0
        if stochastic:
            first, second = _keys(row, count, clock)
        if clock is not None and not (bias_correction or stochastic):
            if number == 0:
                t = tl.load(row + STEP * count).to(tl.pointer_type(clock))
                tl.store(t, tl.load(t) + 1)
        together = tl.load(row + PARAM * count) | tl.load(row + GRAD * count) | tl.load(row + SQUARE_AVG * count)
        together |= tl.load(row + GRAD_AVG * count) | tl.load(row + MOMENTUM_BUFFER * count)
        if compensated:
            together |= tl.load(row + COMPENSATION * count)
        offset = number * block
        left = size - offset
        if (left >= block) & (together % 16 == 0):
            _lines(
                row, count, offset, left, scale, lr, alpha, beta, eps, mu, wd, cap, carried,
                correction, first, second, param, state, arithmetic, eps_mode, centered, momentum, nesterov,
                lr_in_buffer, decoupled, bias_correction, capped, stochastic, compensated,
                block, 16 // (widest.primitive_bitwidth // 8),
            )  # fmt: skip
        else:
            # in pieces of another shape, since Triton would give loads of the same shape the 16-byte layout
            begin = 0
            end = tl.minimum(left, block).to(tl.int32)
            while begin < end:
                _lines(
                    row, count, offset + begin, left - begin, scale, lr, alpha, beta, eps, mu, wd, cap, carried,
                    correction, first, second, param, state, arithmetic, eps_mode, centered, momentum, nesterov,
                    lr_in_buffer, decoupled, bias_correction, capped, stochastic, compensated,
                    piece, 1,
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
