"""Steps are counted where counting cannot stop: what is keyed on the count goes on beyond float32's 2²⁴."""

import copy
import pickle

import numpy as np
import pytest
import torch
from cpu_parity import BF16, F32, copied, tensors
from halves import SEED, check_written, compiled, rounded_as, twin
from torch import nn

from rmsprop import RMSprop, reference
from rmsprop.functional import rmsprop as functional
from rmsprop.kernels import CPU
from rmsprop.kernels.eager import EAGER
from rmsprop.spec import Hyper, Rule

STOP = 2**24  # from here on float32 + 1 is the same number

WAYS = {
    "plan": {},
    "eager": dict(backend="eager"),
    "foreach": dict(foreach=True),
    "capturable": dict(capturable=True),
    "clip": dict(clip_norm=1.0),
    "skip": dict(nonfinite="skip"),
}


def _parameter(dtype=torch.float32):
    return nn.Parameter(torch.linspace(-1, 1, 40, dtype=torch.float64).to(dtype))


def _torchs(count):
    """A state dict of torch's RMSprop that has taken so many steps."""
    p = _parameter()
    other = torch.optim.RMSprop([p])
    p.grad = torch.ones_like(p)
    other.step()
    other.state[p]["step"].fill_(count)
    return other.state_dict()


def _by_hand(optimizer, p, count):
    optimizer.state[p] = {"step": torch.tensor(count), "square_avg": torch.ones(40)}
    return optimizer


def _loaded(optimizer, _p, count):
    optimizer.load_state_dict(_torchs(count), hparams="keep")
    return optimizer


def _filled(optimizer, p, count):
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["step"].fill_(count)
    return optimizer


def _copied(optimizer, p, count):
    return pickle.loads(pickle.dumps(_by_hand(optimizer, p, count)))


@pytest.mark.parametrize("begin", [_by_hand, _loaded, _filled, _copied])
@pytest.mark.parametrize("way", WAYS)
def test_a_count_goes_on_beyond_float32_wherever_it_came_from(way, begin):
    """Set by hand, loaded from torch, written in place or unpickled: every step adds 1."""
    p = _parameter()
    optimizer = begin(RMSprop([p], lr=1e-3, **WAYS[way]), p, float(STOP - 1))
    p = optimizer.param_groups[0]["params"][0]
    for _ in range(4):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[p]["step"].item() == STOP + 3


@compiled
@pytest.mark.parametrize("count", [STOP - 1, STOP, STOP + 1, 2**31, 2**32 - 1, 2**32 + 8, 2**40 + 1])
@pytest.mark.parametrize("backend", [CPU, EAGER], ids=lambda backend: backend.name)
def test_random_bits_follow_the_whole_count(backend, count):
    """The words of step t are the reference's, also where t is no float32 and no 32-bit number."""
    rule, hyper = Rule(), Hyper(lr=0.01, alpha=0.9, eps=1e-8)
    bucket = tensors(rule, (BF16, F32), (33, 1000), 3)
    bucket.slots["step"] = [torch.tensor(float(count), dtype=torch.float64) for _ in bucket.slots["step"]]
    bucket = rounded_as(bucket, stochastic=True, compensated=False, generator=torch.Generator())
    before, wide = copied(bucket), twin(bucket)
    backend.step(rule, hyper, wide)
    backend.step(rule, hyper, bucket)
    check_written(bucket, wide, before)


def test_no_two_counts_share_their_bits():
    """Neither 2²⁴ steps apart nor 2³²."""
    words = [reference.bits(SEED, 0, t, 64).tobytes() for t in (1, 1 + STOP, 2 + STOP, 1 + 2**32, 1 + 2**33)]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("settings", [{}, dict(backend="eager"), dict(capturable=True, backend="eager")])
def test_bias_correction_follows_the_count_beyond_float32(settings):
    """Four steps from 2²⁴ under an α near 1 are the reference's: 1 − αᵗ still grows by 2e-8 of itself a step."""
    p = _parameter(torch.float64)
    alpha = 1 - 1e-7
    optimizer = RMSprop([p], lr=0.5, alpha=alpha, bias_correction=True, **settings)
    state = {"step": STOP, "square_avg": np.full(40, 0.25)}
    optimizer.state[p] = {"step": torch.tensor(float(STOP)), "square_avg": torch.full_like(p, 0.25).detach()}
    rule, hyper = Rule(bias_correction=True), Hyper(lr=0.5, alpha=alpha, eps=1e-8)
    wanted = p.detach().numpy().copy()
    for i in range(4):
        p.grad = torch.full_like(p, 0.5 + i)
        optimizer.step()
        wanted, state = reference.step(rule, hyper, wanted, p.grad.numpy(), state)
    np.testing.assert_allclose(p.detach().numpy(), wanted, rtol=0, atol=1e-12)


def test_torch_goes_on_from_the_count_and_the_count_goes_on_from_torchs():
    """A state dict from 2²⁴ + 3 steps loads into torch's class, whole, and comes back the same."""
    p = _parameter()
    ours = _filled(RMSprop([p]), p, float(STOP + 3))
    saved = copy.deepcopy(ours.state_dict())
    theirs = torch.optim.RMSprop([p])
    theirs.load_state_dict(saved)
    assert theirs.state[p]["step"].item() == STOP + 3
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    ours.step()
    assert ours.state[p]["step"].item() == STOP + 5


def test_a_refused_step_leaves_a_counter_as_it_was_given():
    """A float32 counter is replaced only by a step that is taken."""
    p, q = _parameter(), _parameter()
    optimizer = RMSprop([p, q])
    given = torch.tensor(3.0)
    optimizer.state[p] = {"step": given, "square_avg": torch.ones(40)}
    p.grad, q.grad = torch.ones(40), torch.ones(40).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert optimizer.state[p]["step"] is given
    assert q not in optimizer.state


def test_a_counter_in_shared_memory_stays_the_one_that_processes_share():
    """What a program has shared by hand is counted in, and not replaced by a process's own."""
    p = _parameter()
    optimizer = RMSprop([p])
    shared = torch.tensor(3.0).share_memory_()
    optimizer.state[p] = {"step": shared, "square_avg": torch.ones(40)}
    p.grad = torch.ones(40)
    optimizer.step()
    optimizer.step()
    assert optimizer.state[p]["step"] is shared
    assert shared.item() == 5


def test_the_function_refuses_to_correct_bias_by_a_counter_that_has_stopped():
    """A float32 counter at 2²⁴ is the caller's, and is not replaced: one sentence, and nothing moves."""
    p = torch.ones(3)
    state = [torch.zeros(3)], [], [], [torch.tensor(float(STOP))]
    numbers = dict(lr=0.1, alpha=0.9, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False)
    with pytest.raises(ValueError, match=r"state_steps\[0\] is float32 and has reached 16777216.*torch.float64"):
        functional([p], [torch.ones(3)], *state, **numbers, bias_correction=True)
    assert torch.equal(p, torch.ones(3))
    functional([p], [torch.ones(3)], *state, **numbers)
    assert not torch.equal(p, torch.ones(3))
