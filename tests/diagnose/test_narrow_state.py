"""What looks at an optimizer reads state of fewer bytes as numbers, never as codes."""

import pytest
import torch
from narrowed import STATES
from torch import nn
from torch.testing import assert_close

from rmsprop import Recorder, RMSprop, effective_lr
from rmsprop.diagnose.readings import take_readings
from rmsprop.tensors.float8 import from_float8


def trained(state_dtype, **settings):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(20, 10)), nn.Parameter(torch.randn(9))]
    settings = {"lr": 1e-3, "momentum": 0.9, **settings}
    optimizer = RMSprop(params, **settings, state_dtype=state_dtype)
    for _ in range(5):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


def widened(optimizer):
    """An optimizer of the same parameters, gradients and numbers, whose state is float32."""
    settings = {"lr": 1e-3, "momentum": 0.9, "centered": optimizer.param_groups[0]["centered"]}
    twin = RMSprop(optimizer.param_groups[0]["params"], **settings)
    twin.load_state_dict(optimizer.state_dict(full_precision=True))
    return twin


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("state_dtype", STATES)
def test_readings_are_those_of_the_numbers(state_dtype, centered):
    """Every sum of a reading, but those about the state's own range and rounding."""
    optimizer = trained(state_dtype, centered=centered)
    one, other = (take_readings(o.param_groups, o.state) for o in (optimizer, widened(optimizer)))
    apart = {"coded", "at_bottom", "at_top", "cancelled", "below_eps"}
    for a, b in zip(one[0], other[0], strict=True):
        assert {k: v for k, v in a.sums.items() if k not in apart} == {
            k: v for k, v in b.sums.items() if k not in apart
        }
        if not centered:
            assert a.decades == b.decades
        assert a.state_dtype == {"bfloat16": torch.bfloat16, "float8": torch.uint8}[state_dtype]
        assert b.state_dtype == torch.float32


@pytest.mark.parametrize("state_dtype", STATES)
def test_effective_learning_rates_are_those_of_the_numbers(state_dtype):
    """By effective_lr and by the Recorder; the last one checks the number itself."""
    optimizer = trained(state_dtype)
    assert_close(effective_lr(optimizer), effective_lr(widened(optimizer)), rtol=0, atol=0)
    recorder = Recorder(optimizer)
    recorder.record()
    v = optimizer.state[optimizer.param_groups[0]["params"][1]]["square_avg"]
    v = from_float8(v) if v.dtype == torch.uint8 else v.float()
    assert_close(recorder.rows[-1].median, float((1e-3 / (v.sqrt() + 1e-8)).median()))


@pytest.mark.parametrize(
    ("state_dtype", "bytes_each", "words"),
    [
        ("float32", 12, None),
        ("bfloat16", 6, "between steps: square_avg and grad_avg and momentum_buffer in bfloat16"),
        ("float8", 5, "between steps: square_avg in float8, grad_avg and momentum_buffer in bfloat16"),
    ],
)
def test_explain_has_the_bytes_and_the_precision_of_the_state(state_dtype, bytes_each, words):
    """Before the first step too; repr names the setting."""
    fresh = RMSprop([nn.Parameter(torch.ones(4))], momentum=0.9, centered=True, state_dtype=state_dtype)
    for optimizer in (fresh, trained(state_dtype, centered=True)):
        text = optimizer.explain()
        assert f"{bytes_each} bytes per element" in text
        assert ("between steps" in text) is (words is not None)
        assert words is None or f"{words}, rounded stochastically (seed 0)" in text
        assert ("state_dtype='" in repr(optimizer)) is (words is not None)


def test_bytes_of_parameters_that_keep_full_state_are_their_own():
    """A float64 parameter beside a float32 one, under float8."""
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, dtype=torch.float64))]
    assert "1 or 8 bytes per element, 26 for 5 elements" in RMSprop(params, state_dtype="float8").explain()


@pytest.mark.parametrize(("mean", "found"), [(0.0, False), (3.0, True)])
@pytest.mark.parametrize("state_dtype", STATES)
def test_centering_that_its_state_cannot_hold_is_found(state_dtype, mean, found):
    """Where v − m² is within the spacing of v, ε alone bounds the step."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(40, 40))
    optimizer = RMSprop([p], lr=1e-6, centered=True, state_dtype=state_dtype, alpha=0.9)
    noise = 1.0 if state_dtype == "float8" else 0.2
    for _ in range(100):
        p.grad = mean + noise * torch.randn(40, 40)
        optimizer.step()
    findings = {finding.name: finding for finding in optimizer.lint()}
    assert ("centered_cancels" in findings) is found
    if found:
        assert f"state_dtype='{state_dtype}' keeps v too coarsely" in findings["centered_cancels"].seen


@pytest.mark.parametrize("grad", [1e-3, 1.0, 50.0])
def test_a_run_within_the_range_of_float8_has_no_finding_about_it(grad):
    """Also where half of the elements have never had a gradient, whose code is 0."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(40, 40))
    optimizer = RMSprop([p], lr=1e-3, state_dtype="float8")
    for _ in range(30):
        p.grad = grad * torch.randn(40, 40)
        p.grad[:20] = 0
        optimizer.step()
    assert optimizer.lint() == []


def test_the_ends_of_the_range_are_found_with_what_helps():
    """The largest number; the smallest, with ε below it and without; and no finding with a larger ε."""

    def names(grad, **settings):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(40, 40))
        optimizer = RMSprop([p], lr=1e-6, **{"state_dtype": "float8", **settings})
        for _ in range(30):
            p.grad = grad * torch.randn(40, 40)
            optimizer.step()
        return {finding.name for finding in optimizer.lint()} & {"state_range", "state_eps", "state_rounding"}

    assert names(500.0) == {"state_range"}
    assert names(500.0, state_dtype="bfloat16") == set()
    assert names(1e-8, eps=1e-12) == {"state_eps"}
    assert names(1e-8, eps=1e-15, eps_mode="inside") == {"state_eps"}
    assert names(1e-8, eps=0.0) == {"state_eps"}
    assert names(1e-8, eps=1e-7) == set()
    assert names(1e-8, eps=1e-14, eps_mode="inside") == set()
    assert names(1e-8, eps=1e-12, state_dtype="bfloat16") == set()
    assert names(1e-5) == set()
