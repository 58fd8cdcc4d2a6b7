"""State in fewer bytes in the Triton kernel as it is compiled for a GPU, run on the CPU by ptx_machine.py."""

import re
from copy import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import mostly_long
from cpu_parity import BF16, F16, F32, tensors
from halves import rounded_as
from narrowed import STATES, again, check_narrowed, identical, in_float32, narrowed, spread
from ptx_machine import COMPILER, kept
from stand_in import gpu_fixtures, stepped

from rmsprop.kernels import cpu, native, triton
from rmsprop.spec import Hyper, Rule

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here to build what stands for a GPU")

SIZES = (0, 1, 1000, triton.BLOCK, 2 * triton.BLOCK + 5)


h100, gpu = gpu_fixtures()


@pytest.mark.parametrize(
    ("state_dtype", "dtype", "how", "capturable"),
    mostly_long(
        [
            *product(STATES, [F32], [(False, False)], [False, True]),
            *product(STATES, [BF16, F16], [(False, False), (True, False), (True, True)], [True]),
        ],
        lambda i, _: i == 2,
        unpack=True,
    ),
    ids=str,
)
def test_state_is_rounded_with_the_references_bits(
    state_dtype: str, dtype: torch.dtype, how: tuple, capturable: bool, gpu
) -> None:
    """Of the kernel's own averages in float32, over the range of a byte and beyond; also where nothing is aligned."""
    rule, hyper = Rule(momentum=True, centered=True), Hyper(0.03, 0.9, 1e-3, 0.8, max_update=1.5)
    before = spread(tensors(rule, (dtype, F32), SIZES, seed=1))
    draw = torch.Generator().manual_seed(1)
    before = rounded_as(before, stochastic=how[0], compensated=how[1], generator=draw)
    before = replace(narrowed(before, state_dtype), capturable=capturable)
    here, wide = stepped(gpu, rule, hyper, before), stepped(gpu, rule, hyper, in_float32(before))
    check_narrowed(here, wide, before)
    if native.missing() is None:
        there = replace(again(before), capturable=False)
        cpu.step(rule, hyper, there)
        assert identical(here, there)
    for begin in (3, 4):  # at an address between words of four codes, and at one of a word
        moved = again(before)
        memory = [torch.ones(n + 8, dtype=before.slots["square_avg"][0].dtype) for n in SIZES]
        pairs = zip(memory, before.slots["square_avg"], strict=True)
        moved.slots["square_avg"] = [x[begin : begin - 8].copy_(v) for x, v in pairs]
        triton.step(rule, hyper, moved)
        assert identical(here, moved)
        assert all((x[:begin] == 1).all() and (x[begin - 8 :] == 1).all() for x in memory)


BYTE_MISTAKES = (
    ("min.u32", "max.u32"),
    ("0x7772U", "0x7773U"),  # the byte of a word that is read
    ("0x3340U", "0x3341U"),  # the bytes that become half a word
    (r"(shf\.l\.wrap\.b32 .*), 16", r"\1, 15"),
)


@pytest.mark.long
@pytest.mark.parametrize(("right", "wrong"), [("", ""), *BYTE_MISTAKES])
def test_each_mistake_in_bytes_is_caught(right: str, wrong: str, gpu) -> None:
    """Another instruction where codes are read, drawn or written gives other codes than the reference's."""
    hyper = Hyper(0.03, 0.9, 1e-3)
    before = narrowed(spread(tensors(Rule(), (F32, F32), (triton.BLOCK,), seed=7)), "float8")
    here, wide = again(before), in_float32(before)
    triton.step(Rule(), hyper, wide)
    with kept(gpu) as launches:
        triton.step(Rule(), hyper, here)
    (launch,) = launches
    kernel = copy(launch.kernel)
    kernel.ptx, count = re.subn(right, wrong, kernel.ptx) if right else (kernel.ptx, 1)
    assert count
    replace(launch, kernel=kernel).run()
    try:
        check_narrowed(here, wide, before)
    except AssertionError:
        assert right
    else:
        assert not right
