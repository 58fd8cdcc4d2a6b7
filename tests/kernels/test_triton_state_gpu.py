"""State in fewer bytes in the Triton kernel on a GPU: the reference's bits, the CPU kernel's run, and its memory."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from cpu_parity import BF16, F16, F32, tensors
from halves import rounded_as
from narrowed import STATES, again, check_narrowed, in_float32, narrowed, spread
from torch import Tensor, nn

from rmsprop import RMSprop
from rmsprop.kernels import triton
from rmsprop.spec import Hyper, Rule
from rmsprop.tensors.bucket import Bucket

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
    pytest.mark.filterwarnings("default"),  # of drivers and compilers that are not ours
]

SIZES = (0, 1, 1000, triton.BLOCK, 2 * triton.BLOCK + 5)
STATE = pytest.mark.parametrize("state_dtype", STATES)
WAYS = [(F32, False, False), *product([BF16, F16], [False, True], [False, True])]


def moved(bucket: Bucket, device: str) -> Bucket:
    """The bucket on another device; its step counters stay on the host unless they are counted on the device."""
    slots = {name: [x.to(device, copy=True) for x in values] for name, values in bucket.slots.items()}
    if not bucket.capturable:
        slots["step"] = [t.clone() for t in bucket.slots["step"]]
    param, grad = ([x.to(device, copy=True) for x in values] for values in (bucket.param, bucket.grad))
    return replace(bucket, param=param, grad=grad, slots=slots)


def stepped(rule: Rule, hyper: Hyper, bucket: Bucket) -> Bucket:
    """The bucket after the GPU's step, back on the CPU."""
    there = moved(bucket, "cuda")
    triton.step(rule, hyper, there)
    return moved(there, "cpu")


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(("dtype", "stochastic", "compensated"), WAYS, ids=str)
@STATE
def test_state_is_rounded_with_the_references_bits(
    state_dtype: str, dtype: torch.dtype, stochastic: bool, compensated: bool, capturable: bool
) -> None:
    """Of the kernel's own averages in float32, over the range of a byte and beyond, with NaN and infinities."""
    rule, hyper = Rule(momentum=True, centered=True), Hyper(0.03, 0.9, 1e-3, 0.8, max_update=1.5)
    before = spread(tensors(rule, (dtype, F32), SIZES, seed=1))
    draw = torch.Generator().manual_seed(1)
    before = rounded_as(before, stochastic=stochastic, compensated=compensated, generator=draw)
    before = replace(narrowed(before, state_dtype), capturable=capturable)
    check_narrowed(stepped(rule, hyper, again(before)), stepped(rule, hyper, in_float32(before)), before)


def train(device: str, graph: bool = False, **settings: object) -> list[Tensor]:
    """All that a run of six steps leaves, whose steps after the first a graph may replay."""
    start = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=start).to(device, d)) for n, d in ((9000, F32), (5, BF16))]
    backend = "triton" if device == "cuda" else "cpu"
    optimizer = RMSprop(params, lr=0.01, momentum=0.9, rounding="stochastic", backend=backend, **settings)
    captured = None
    for t in range(6):
        draw = torch.Generator().manual_seed(100 + t)
        for p in params:
            g = torch.randn(p.shape, generator=draw).to(device, p.dtype)
            p.grad = g if p.grad is None else p.grad.copy_(g)
        if captured is not None:
            captured.replay()
        elif graph:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                optimizer.step()
            torch.cuda.current_stream().wait_stream(side)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                optimizer.step()
        else:
            optimizer.step()
    return [x.detach().cpu() for x in (*params, *(x for p in params for x in optimizer.state[p].values()))]


@STATE
def test_a_run_is_the_cpu_kernels(state_dtype: str) -> None:
    """By a plan, counting here or there, and replayed by a graph: codes, averages and parameters bit for bit."""
    expected = train("cpu", state_dtype=state_dtype)
    for words in ({}, {"capturable": True}, {"capturable": True, "graph": True}):
        found = train("cuda", state_dtype=state_dtype, **words)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), words


@STATE
def test_a_step_waits_for_nothing_and_needs_no_memory(state_dtype: str) -> None:
    """State is as large as its bytes, and a step adds nothing but a table with the keys of its random bits."""
    before = torch.cuda.memory_allocated()
    p = nn.Parameter(torch.ones(1 << 22, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = RMSprop([p], backend="triton", state_dtype=state_dtype)
    optimizer.step()
    held = torch.cuda.memory_allocated()
    assert held - before - 8 * p.numel() <= p.numel() * (1 if state_dtype == "float8" else 2) + (1 << 16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - held <= 1 << 16
