"""Promises of `rmsprop.diagnose.effective_lr`: the learning rate of every element, and nothing disturbed."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from rmsprop import RMSprop
from rmsprop.diagnose.effective_lr import LayerRecord, Recorder, effective_lr

GRADIENTS = np.array([[0.5, -2.0, 1e-3], [0.0, 1.0, -1e-3], [3.0, 0.25, 2e-3]])  # (step, element)
LR, ALPHA, EPS = 0.01, 0.9, 0.1


def stepped(make=RMSprop, dtype=torch.float64, gradients=GRADIENTS, **settings):
    """An optimizer over one parameter after one step per row of the gradients."""
    param = torch.nn.Parameter(torch.zeros(gradients.shape[1], dtype=dtype))
    optimizer = make([("weight", param)], **{"lr": LR, "alpha": ALPHA, "eps": EPS, **settings})
    for gradient in gradients:
        param.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
    return optimizer


def by_hand(eps_mode="outside", centered=False, bias_correction=False, eps=EPS, gradients=GRADIENTS):
    """Lines [2]-[6] in NumPy."""
    v = m = np.zeros(gradients.shape[1])
    for g in gradients:
        v, m = ALPHA * v + (1 - ALPHA) * g * g, ALPHA * m + (1 - ALPHA) * g
    c = 1 - ALPHA ** len(gradients) if bias_correction else 1.0
    w = np.maximum(v / c - (m / c) ** 2, 0) if centered else v / c
    d = {
        "outside": np.sqrt(w) + eps,
        "inside": np.sqrt(w + eps),
        "both": np.sqrt(w + eps) + eps,
        "floor": np.maximum(np.sqrt(w), eps),
    }[eps_mode]
    return LR / d


@pytest.mark.parametrize(
    ("eps_mode", "centered", "bias_correction"),
    list(itertools.product(("outside", "inside", "both", "floor"), (False, True), (False, True))),
)
def test_every_rule(eps_mode, centered, bias_correction):
    """The effective learning rate is lr over the denominator of line [6], for every way to build it."""
    optimizer = stepped(eps_mode=eps_mode, centered=centered, bias_correction=bias_correction)
    expected = by_hand(eps_mode, centered, bias_correction)
    np.testing.assert_allclose(effective_lr(optimizer)["weight"].numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("centered", [False, True])
def test_torch_rmsprop(centered):
    """torch.optim.RMSprop, whose groups hold no eps_mode, is read as eps outside."""
    optimizer = stepped(torch.optim.RMSprop, centered=centered)
    np.testing.assert_allclose(effective_lr(optimizer)["weight"].numpy(), by_hand(centered=centered), rtol=1e-12)


def test_explains_the_next_step():
    """Without momentum a parameter has just moved by the effective learning rate times its gradient."""
    param = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = RMSprop([param], lr=0.1)
    param.grad = torch.tensor([0.3, -4.0], dtype=torch.float64)
    before = param.detach().clone()
    optimizer.step()
    moved = before - effective_lr(optimizer)["group0.param0"] * param.grad
    torch.testing.assert_close(param.detach(), moved, rtol=1e-14, atol=1e-15)


def test_names():
    """Names are those given to the optimizer, else the place of the parameter in its group."""
    net = torch.nn.Linear(2, 3)
    net(torch.ones(1, 2)).sum().backward()
    named = RMSprop(net.named_parameters())
    placed = RMSprop([{"params": [net.weight]}, {"params": [net.bias], "lr": 1.0}])
    named.step()
    placed.step()
    assert list(effective_lr(named)) == ["weight", "bias"]
    assert list(effective_lr(placed)) == ["group0.param0", "group1.param0"]
    assert effective_lr(placed)["group1.param0"].shape == (3,)


def test_unstepped_parameters_are_skipped():
    """A parameter without a gradient so far has no effective learning rate, and gets no state by being asked."""
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = RMSprop([used, unused])
    assert effective_lr(optimizer) == {}
    used.grad = torch.ones(2)
    optimizer.step()
    assert list(effective_lr(optimizer)) == ["group0.param0"]
    assert unused not in optimizer.state


def test_bias_correction_before_the_first_step_is_skipped():
    """With bias correction a state at step 0 has no rate, because line [4] is 0/0 there."""
    optimizer = stepped(bias_correction=True)
    for state in optimizer.state.values():
        state["step"] = torch.tensor(0.0)
    assert effective_lr(optimizer) == {}


def test_lr_of_now():
    """The rate follows a scheduler at once, and a learning rate that is a tensor is read like a number."""
    optimizer = stepped()
    before = effective_lr(optimizer)["weight"]
    optimizer.param_groups[0]["lr"] = torch.tensor(2 * LR, dtype=torch.float64)
    torch.testing.assert_close(effective_lr(optimizer)["weight"], 2 * before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_parameters(dtype):
    """Half-precision parameters give float32 rates."""
    rate = effective_lr(stepped(dtype=dtype, eps=1e-3))["weight"]
    assert rate.dtype == torch.float32
    np.testing.assert_allclose(rate.numpy(), by_hand(eps=1e-3), rtol=0.02)


def test_complex_parameters():
    """The two parts of a complex number have a rate each, in a last axis of 2."""
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = RMSprop([param], lr=LR, alpha=ALPHA, eps=EPS)
    param.grad = torch.tensor([3 + 4j, 0j, 1 - 1j])
    optimizer.step()
    parts = np.array([[3, 4], [0, 0], [1, -1]])
    expected = LR / (np.sqrt((1 - ALPHA) * parts**2) + EPS)
    rate = effective_lr(optimizer)["group0.param0"]
    np.testing.assert_allclose(rate.numpy(), expected, rtol=1e-6)


def test_zero_denominator_is_infinite():
    """Where eps is 0 and no gradient came so far, the rate is infinite, not NaN."""
    rate = effective_lr(stepped(eps=0.0, gradients=np.array([[0.0, 2.0]])))["weight"]
    assert rate[0].item() == math.inf
    assert math.isfinite(rate[1].item())


def test_rounded_variance_counts_as_zero():
    """A centered variance that rounding put below zero counts as zero."""
    optimizer = stepped(centered=True)
    for state in optimizer.state.values():
        state["square_avg"].fill_(1.0)
        state["grad_avg"].fill_(1.0000001)
    assert effective_lr(optimizer)["weight"].tolist() == pytest.approx([LR / EPS] * 3)


def test_other_optimizers_are_refused():
    """An optimizer that is not an RMSprop is refused by name."""
    adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(TypeError, match="Adam is not an RMSprop"):
        effective_lr(adam)


def test_unknown_eps_mode_is_refused():
    """An eps_mode that line [6] does not have is an error that lists those it has."""
    optimizer = stepped()
    optimizer.param_groups[0]["eps_mode"] = "beside"
    with pytest.raises(ValueError, match="'beside' is unknown; choose one of outside, inside, both, floor"):
        effective_lr(optimizer)


def test_nothing_is_modified():
    """Looking changes no parameter, no gradient, no state, no group and no random number."""
    optimizer = stepped(centered=True, momentum=0.9)
    param = optimizer.param_groups[0]["params"][0]
    before, grad = param.detach().clone(), param.grad.clone()
    state, draws = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    recorder = Recorder(optimizer)
    recorder.record()
    for rate in effective_lr(optimizer).values():
        rate.zero_()  # what is returned is the caller's own
    assert torch.equal(param.detach(), before)
    assert torch.equal(param.grad, grad)
    assert torch.equal(torch.get_rng_state(), draws)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for key, value in state["state"][0].items():
        assert torch.equal(value, after["state"][0][key])


def test_records_are_quantiles():
    """A record holds the median and the 10 % and 90 % quantile over the elements, as NumPy finds them."""
    optimizer = stepped(gradients=np.arange(1.0, 24.0)[None])
    recorder = Recorder(optimizer)
    recorder.record()
    rate = effective_lr(optimizer)["weight"].numpy()
    low, median, high = np.quantile(rate, [0.1, 0.5, 0.9])
    (row,) = recorder.rows
    assert row == LayerRecord(1, "weight", pytest.approx(median), pytest.approx(low), pytest.approx(high), 23)


def test_records_keep_infinity_and_nan():
    """An infinite rate is a quantile like any other, and one NaN makes all three NaN."""
    some = stepped(eps=0.0, gradients=np.array([[0.0, 0.0, 1.0, 1.0]]))
    recorder = Recorder(some)
    recorder.record()
    assert recorder.rows[0].high == math.inf
    assert math.isfinite(recorder.rows[0].low)
    recorder = Recorder(stepped(gradients=np.array([[math.nan, 1.0, 2.0]])))
    recorder.record()
    assert math.isnan(recorder.rows[0].low)
    assert math.isnan(recorder.rows[0].median)
    assert math.isnan(recorder.rows[0].high)


def test_every():
    """The first call is recorded and then every `every`-th, under the number of steps taken."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = RMSprop([param])
    recorder = Recorder(optimizer, every=3)
    for _ in range(7):
        param.grad = torch.ones(3)
        optimizer.step()
        recorder.record()
    assert [row.step for row in recorder.rows] == [1, 4, 7]
    with pytest.raises(ValueError, match="every=0: give a number of steps"):
        Recorder(optimizer, every=0)


def test_empty_and_single_parameters():
    """A parameter without elements is left out of the records; one with a single element is its own quantiles."""
    empty, single = torch.nn.Parameter(torch.ones(0)), torch.nn.Parameter(torch.tensor(1.0))
    optimizer = RMSprop([("empty", empty), ("single", single)])
    empty.grad, single.grad = torch.ones(0), torch.tensor(2.0)
    optimizer.step()
    recorder = Recorder(optimizer)
    recorder.record()
    (row,) = recorder.rows
    assert row.name == "single"
    assert row.low == row.median == row.high == effective_lr(optimizer)["single"].item()
