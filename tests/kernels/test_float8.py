"""float8, the byte of `square_avg`: its codes, and its stochastic rounding, in torch and in the reference."""

import math

import numpy as np
import pytest
import torch
from cases import mostly_long

from rmsprop import reference
from rmsprop.kernels import rounding
from rmsprop.spec import NARROWED
from rmsprop.tensors import float8

CODES = np.arange(256, dtype=np.uint8)


def numbers_around_codes() -> np.ndarray:
    """Every code's number, its neighbors in float32, the midpoints, and special values."""
    exact = reference.from_float8(CODES[:254]).astype(np.float32)
    middle = ((exact[1:].astype(np.float64) + exact[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(x, np.float32(way)) for x in (exact, middle) for way in (-np.inf, np.inf)]
    special = np.float32([0.0, -0.0, 1e-45, 1e-38, 2.0**-75, 1e30, 3.4e38, np.inf, -np.inf, np.nan, -1.0, -1e-45])
    return np.concatenate([exact, middle, *near, special])


def test_every_code_is_the_number_that_the_format_names() -> None:
    """Codes count up from 0 in quarters of an octave, and end in infinity and NaN."""
    number = reference.from_float8(CODES)
    assert number[:5].tolist() == [0.0, 2.0**-51, 2.0**-50, 3 * 2.0**-51, 2.0**-49]
    assert number[8] == 2.0**-48
    assert number[253] == 1.25 * 2.0**13
    assert np.all(np.diff(number[:254]) > 0)
    assert np.all(number[8:254] == 2 * number[4:250])
    assert number[254] == np.inf
    assert math.isnan(number[255])
    assert np.array_equal(float8.from_float8(torch.from_numpy(CODES)).double().numpy(), number, equal_nan=True)


def test_every_code_encodes_to_itself_under_all_random_bits() -> None:
    """An exact number is kept by any random bits, also by those that would carry anything else."""
    exact = reference.from_float8(CODES).astype(np.float32)
    for word in (0, 1, 0x1FFFFF, 0xFFFFFFFF):
        assert np.array_equal(reference.to_float8(exact, np.full(256, word, np.uint32)), CODES)


def test_torch_has_the_references_bits() -> None:
    """The two implementations agree at every code, its neighbors and midpoints, and special values."""
    generator = np.random.default_rng(0)
    x = np.repeat(numbers_around_codes(), 64)
    words = generator.integers(0, 2**32, len(x), dtype=np.uint64).astype(np.uint32)
    words[::64], words[1::64], words[2::64] = 0, 0x1FFFFF, 0xFFFFFFFF
    expected = reference.to_float8(x, words)
    got = float8.to_float8(torch.from_numpy(x), torch.from_numpy(words.astype(np.int64)))
    assert np.array_equal(got.numpy(), expected)


def test_rounding_to_nearest_takes_the_nearer_code() -> None:
    """Without random bits a number becomes the nearer of its neighbors, and the upper one from their middle on."""
    x = numbers_around_codes()
    x = x[np.isfinite(x) & (x >= 0) & (x < 1.25 * 2.0**13)]
    got = reference.from_float8(float8.to_float8(torch.from_numpy(x)).numpy())
    number = reference.from_float8(CODES[:254])
    wide = x.astype(np.float64)
    best = np.abs(wide[:, None] - number[None, :]).min(axis=1)
    assert np.all(np.abs(wide - got) <= best + 2.0**-72)


def test_a_number_outside_the_range_is_kept_in_it() -> None:
    """Above the largest code the largest is kept, infinity and NaN stay, and a number below zero is NaN."""
    x = torch.tensor([20000.0, 3.4e38, math.inf, math.nan, -1.0, -math.inf, -0.0])
    assert float8.to_float8(x, torch.full((7,), 0x1FFFFF)).tolist() == [253, 253, 254, 255, 255, 255, 0]


@pytest.mark.parametrize(
    "x",
    mostly_long(
        [2.0**-51 * 0.3, 0.7, 1.24 * 2.0**13, 2.0**-53, 2.0**-50 * 1.4, 2.0**-49 * 0.99, 2.0**-49 * 1.1, 1e-12, 3e-7],
        lambda i, _: i < 3,
    ),
)
def test_the_mean_of_stochastic_rounding_is_exact(x: float) -> None:
    """Over every value of the 21 random bits, the mean is the number, to 2⁻²¹ of the distance of its neighbors."""
    words = np.arange(2**21, dtype=np.uint32)
    got = reference.from_float8(reference.to_float8(np.full(2**21, x, np.float32), words))
    lower, upper = got.min(), got.max()
    assert lower < np.float32(x) < upper
    assert abs(got.mean() - float(np.float32(x))) <= (upper - lower) * 2.0**-21


def test_the_bits_of_slots_are_independent_of_the_parameters() -> None:
    """The lowest 16 bits of the parameter and of each slot: no correlation beyond 5 standard errors; carries too."""
    count = 1 << 18
    random = reference.bits(3, 5, 7, count)
    drawn = {"param": random, **{slot: reference.state_bits(random, slot) for slot in NARROWED}}
    torchs = {slot: rounding.state_bits(torch.from_numpy(random.astype(np.int64)), slot) for slot in NARROWED}
    for slot, words in torchs.items():
        assert np.array_equal(words.numpy(), drawn[slot].astype(np.int64))
    for mask in (0xFFFF, 0x1FFFFF):
        level = {name: (words & np.uint32(mask)).astype(np.float64) / mask - 0.5 for name, words in drawn.items()}
        names = list(level)
        for i, one in enumerate(names):
            assert abs(level[one].mean()) < 5 / math.sqrt(12 * count)
            for other in names[i + 1 :]:
                correlation = 12 * (level[one] * level[other]).mean()
                assert abs(correlation) < 5 / math.sqrt(count) + (0.1 if mask > 0xFFFF else 0), (
                    one,
                    other,
                    correlation,
                )
