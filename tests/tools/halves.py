"""Buckets of half precision, and the judge of how a backend rounds them: the reference's bits."""

import numpy as np
import pytest
import torch
from cases import bucket_of
from cpu_parity import BF16, F16, copied

from rmsprop import reference
from rmsprop.kernels import native
from rmsprop.spec import random_key
from rmsprop.tensors.bucket import Bucket

KINDS = {BF16: "bfloat16", F16: "float16"}
SCALE = {BF16: 1.0, F16: 2048.0}
SEED = 5

compiled = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def rounded_as(bucket: Bucket, *, stochastic: bool, compensated: bool, generator: torch.Generator) -> Bucket:
    """The same bucket, to be rounded like that; remainders as large as they can be."""
    bucket = copied(bucket)
    if stochastic:
        bucket.rounding, bucket.random_keys = "stochastic", [random_key(SEED, i) for i in range(len(bucket.param))]
    if compensated:
        for p in bucket.param:
            unit = p.float().abs() * torch.finfo(p.dtype).eps / 4
            rest = unit * (2 * torch.rand(p.shape, generator=generator) - 1) * SCALE[p.dtype]
            bucket.slots["compensation"].append(rest.to(p.dtype))
    return bucket


def twin(bucket: Bucket) -> Bucket:
    """The same step in float32, where [9] is not rounded: what is to be rounded, bit for bit."""
    same = copied(bucket)
    scale = SCALE[bucket.param[0].dtype]
    rests = bucket.slots["compensation"] or [torch.zeros_like(p) for p in bucket.param]
    wide = [p.float() + c.float() / scale for p, c in zip(bucket.param, rests, strict=True)]
    return bucket_of(wide, [g.float() for g in same.grad], *same.lists()[2:6])


def check_written(bucket: Bucket, wide: Bucket, before: Bucket) -> None:
    """What the kernel left in half precision is the reference's rounding of the float32 step, every bit."""
    kind = KINDS[bucket.param[0].dtype]
    for i, (got, exact) in enumerate(zip(bucket.param, wide.param, strict=True)):
        t = int(before.slots["step"][i]) + 1
        words = reference.bits(SEED, i, t, got.numel()).reshape(got.shape)
        near = exact.to(got.dtype)
        if bucket.slots["compensation"]:
            assert torch.equal(near, got)
            rest = ((exact - near.float()) * SCALE[got.dtype]).numpy()
            kept = bucket.slots["compensation"][i].double().numpy()
            wanted = (
                reference.round_stochastically(rest, words, kind)
                if bucket.random_keys
                else torch.from_numpy(rest).to(got.dtype).double().numpy()
            )
            assert np.array_equal(wanted, kept)
        else:
            assert np.array_equal(reference.round_stochastically(exact.numpy(), words, kind), got.double().numpy())
    for old, new in zip(wide.lists()[2:5], bucket.lists()[2:5], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
