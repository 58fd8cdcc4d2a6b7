"""Reads, rounds and writes the numbers of the Triton kernels: conversions, random bits, IEEE operations.

Triton's interpreter computes some of them otherwise, so each of those has a body of its own under it.
"""

# Triton gives annotations and returns its own meaning.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, name-defined, import-untyped, no-untyped-call"
# ruff: noqa: RET505

import triton
import triton.language as tl

# Triton's interpreter truncates to bfloat16 and misreads its subnormals, so the conversion is explicit under it.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
SMALLEST_NORMAL = tl.constexpr(2.0**-49)  # of float8


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
    elif kept == tl.uint8:
        return _from_float8(tl.load(_places(address, kept, offset, at, vector), mask=mask))
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
def _keep(
    address, offset, at, mask, vector: tl.constexpr, kept: tl.constexpr, narrowed: tl.constexpr,
    slot: tl.constexpr, random, x,
):  # fmt: skip
    """Write a block of an average, rounded to nearest or, if it is narrowed, by the random bits of its slot."""
    if narrowed:
        own = _state_bits(random, slot)
        _put(address, offset, at, mask, vector, _to_float8(x, own) if kept == tl.uint8 else _at_random(x, own, kept))
    else:
        _store(address, offset, at, mask, vector, kept, x)


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
def _as(bits, kept: tl.constexpr):
    """Return bits as a stored number, which is an integer under the interpreter in bfloat16."""
    if (INTERPRETED and kept == tl.bfloat16) or bits.dtype == kept:
        return bits
    else:
        return bits.to(kept, bitcast=True)


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
def _drawn(offset, at, first, second):
    """Return the random bits of the elements of a block, from the keys of this step."""
    return _mix((offset.to(tl.uint32) + at.to(tl.uint32)) * 0x9E3779B1 ^ first, second)


@triton.jit
def _at_random(x, random, kept: tl.constexpr):
    """Return the bits of x rounded to a neighbor in half precision, up with a probability of the dropped fraction.

    Random bits are added to the dropped bits, and the carry decides. NaN and infinity stay.
    """
    signed = x.to(tl.uint32, bitcast=True)
    if kept == tl.bfloat16:
        # the low bits of infinity are 0, so that nothing is carried into it
        return (tl.where(x != x, 0x7FC00000, signed + (random & 0xFFFF)) >> 16).to(tl.int16)
    else:
        u = signed & 0x7FFFFFFF
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
def _state_bits(random, slot: tl.constexpr):
    """Return the random bits of a slot from those of the parameter: reference.py state_bits."""
    if slot != "square_avg":
        random = (random ^ (random >> 15)) * 0x2C1B3C6D
        random = random ^ (random >> 12)
    if slot != "grad_avg":
        random = (random >> 16) | (random << 16)
    return random


@triton.jit
def _to_float8(v, random):
    """Return the codes of v (at least 0), rounded by the lowest 21 random bits: reference.py to_float8."""
    small = v < SMALLEST_NORMAL
    pattern = tl.where(small, v + SMALLEST_NORMAL, v).to(tl.uint32, bitcast=True) + (random & 0x1FFFFF)
    code = tl.minimum((pattern - tl.where(small, 312 << 21, 308 << 21).to(tl.uint32)) >> 21, 253)
    return tl.where(v < float("inf"), code, tl.where(v == float("inf"), 254, 255)).to(tl.uint8)


@triton.jit
def _from_float8(code):
    """Return the numbers of float8 codes: reference.py from_float8."""
    c = code.to(tl.int32)
    # the product makes normal numbers of float32's subnormals too; infinity and NaN stay
    return tl.where(c < 254, c << 21, (c << 22) | 0x40000000).to(tl.float32, bitcast=True) * 2.0**77


@triton.jit
def _within(x, bound):
    """Return x with each element bounded to ±bound. NaN stays."""
    x = tl.where(x > bound, bound, x)
    return tl.where(x < -bound, -bound, x)


@triton.jit
def _bounded(bits, wall, kept: tl.constexpr, arithmetic: tl.constexpr):
    """Return the bits of a half-precision number bounded to ±wall, which is rounded to its dtype. NaN stays."""
    x = _widen(_as(bits, kept), kept, arithmetic)
    return _narrow(_within(x, wall.to(arithmetic)), kept)


@triton.jit
def _prepared(g, p, early, value, pulled: tl.constexpr, arithmetic: tl.constexpr):
    """Return a gradient as its norm is taken: after [1] where clip_after_decay asks for it, and after clip_value."""
    if pulled:
        g = _fused(tl.cast(early, arithmetic), p, g)
    return _within(g, tl.cast(value, arithmetic))


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
