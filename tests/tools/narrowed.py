"""Buckets whose state is kept in fewer bytes, and the judge of how a backend rounds it: the reference's bits."""

from dataclasses import replace

import numpy as np
import torch
from cpu_parity import F32
from halves import SEED

from rmsprop import reference
from rmsprop.spec import NARROWED, STATE_DTYPES, StateDtype, random_key
from rmsprop.tensors.bucket import Bucket, slot_dtype
from rmsprop.tensors.float8 import to_float8, widened

STATES: tuple[StateDtype, ...] = tuple(name for name in STATE_DTYPES if name != "float32")


def again(bucket: Bucket) -> Bucket:
    """Return a copy, with gradients of its own."""
    return replace(bucket.copy(), grad=[g.clone() for g in bucket.grad], random_keys=list(bucket.random_keys))


def narrowed(bucket: Bucket, state_dtype: StateDtype) -> Bucket:
    """Return a copy whose averages are kept in this precision, to nearest, and are to be rounded stochastically."""
    made = replace(again(bucket), state_dtype=state_dtype)
    made.random_keys = [random_key(SEED, i) for i in range(len(made.param))]
    for name in NARROWED:
        dtype = slot_dtype(name, made.param[0].dtype, state_dtype)
        made.slots[name] = [to_float8(x) if dtype == torch.uint8 else x.to(dtype) for x in made.slots[name]]
    return made


def spread(bucket: Bucket) -> Bucket:
    """Return the bucket itself, with averages over the range of a byte and beyond, zeros, infinities and NaN."""
    for g, v in zip(bucket.grad, bucket.slots["square_avg"], strict=True):
        scale = torch.exp2(torch.linspace(-30, 8, len(v)))
        v *= scale**2
        v[::7] = 0
        g *= scale.to(g.dtype)
        g[2:8:5] = torch.tensor([torch.inf, torch.nan])[: len(g[2:8:5])]
    return bucket


def in_float32(bucket: Bucket) -> Bucket:
    """Return a copy with the same numbers in float32 state, whose step leaves what is to be rounded."""
    made = replace(again(bucket), state_dtype="float32")
    if made.rounding == "nearest":
        made.random_keys = []
    for name in NARROWED:
        made.slots[name] = [widened(x, F32) for x in made.slots[name]]
    return made


def check_narrowed(bucket: Bucket, wide: Bucket, before: Bucket) -> None:
    """Assert that the state is the reference's rounding of the step in float32 state, and all else is that step's."""
    for name, got, expected in (
        ("param", bucket.param, wide.param),
        ("grad", bucket.grad, before.grad),
        *((name, bucket.slots[name], wide.slots[name]) for name in ("step", "compensation", "ema")),
    ):
        for a, b in zip(got, expected, strict=True):
            assert same_numbers(a.double().numpy(), b.double().numpy()), name
    for i, t in enumerate(before.slots["step"]):
        words = reference.bits(SEED, i, int(t) + 1, wide.param[i].numel()).reshape(wide.param[i].shape)
        for name in NARROWED:
            for got, exact in zip(bucket.slots[name][i : i + 1], wide.slots[name][i : i + 1], strict=True):
                own = reference.state_bits(words, name)
                if got.dtype == torch.uint8:
                    assert np.array_equal(reference.to_float8(exact.numpy(), own), got.numpy()), name
                else:
                    rounded = reference.round_stochastically(exact.numpy(), own, "bfloat16")
                    assert same_numbers(rounded, got.double().numpy()), name


def same_numbers(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two arrays are equal, with NaN equal to NaN and the signs of zeros compared."""
    return np.array_equal(a, b, equal_nan=True) and np.array_equal(np.signbit(a) & (a == a), np.signbit(b) & (b == b))


def identical(a: Bucket, b: Bucket) -> bool:
    """Return whether two buckets hold the same numbers."""
    pairs = [pair for values in zip(a.lists(), b.lists(), strict=True) for pair in zip(*values, strict=True)]
    return all(x.dtype == y.dtype and same_numbers(x.double().numpy(), y.double().numpy()) for x, y in pairs)
