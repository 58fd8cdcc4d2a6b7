"""What numerics promise, on every backend: the compiled kernel, plain torch, and Triton's source, interpreted."""

import pytest
import torch
from torch import nn

from rmsprop import RMSprop
from rmsprop.kernels import BACKENDS, native

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(params=[backend.name for backend in BACKENDS])
def backend(request):
    """The name of each backend, with what it takes to run on CPU tensors."""
    if request.param == "cpu" and native.missing() is not None:
        pytest.skip(native.missing())
    if request.param != "triton":
        yield request.param
        return
    pytest.importorskip("triton")
    from interpreted import interpreter, kernel_module

    with interpreter(kernel_module()):
        yield "triton"


def stepped(optimizer, *grads):
    """One step for each gradient. Returns: the parameter."""
    (p,) = optimizer.param_groups[0]["params"]
    for grad in grads:
        p.grad = torch.as_tensor(grad).to(p.dtype).expand(p.shape).clone()
        optimizer.step()
    return p


def start(*values, dtype=torch.float32):
    return [nn.Parameter(torch.tensor(values, dtype=dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_variance_below_zero_is_zero(backend, dtype):
    """[5] with m² above v: the denominator is ε, exactly, and NaN in the state stays NaN."""
    optimizer = RMSprop(start(1.0, 1.0, dtype=dtype), lr=0.5, alpha=0.5, eps=4.0, centered=True, backend=backend)
    (p,) = optimizer.param_groups[0]["params"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    optimizer.state[p] = {
        "step": torch.tensor(4.0),
        "square_avg": torch.tensor([1.0, torch.nan], dtype=wide),
        "grad_avg": torch.tensor([9.0, 9.0], dtype=wide),
    }
    stepped(optimizer, 2.0)
    assert p[0].item() == 1 - 0.5 * 2 / 4
    assert p[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, dict(momentum=0.9), dict(centered=True, momentum=0.9, nesterov=True)], ids=str
)
def test_nothing_over_nothing_is_nothing(backend, dtype, settings):
    """[7] eps 0 and a gradient that was always 0."""
    p = stepped(RMSprop(start(1.0, -2.0, dtype=dtype), eps=0, backend=backend, **settings), 0.0, 0.0)
    assert p.tolist() == [1.0, -2.0]


@HALF
def test_half_precision_is_float32_within(backend, dtype):
    """State is float32, and a step is the float32 step of the same numbers, rounded once."""
    values, settings = (1.0, -0.3, 2e-3, 0.0), dict(momentum=0.9, centered=True, backend=backend)
    half = RMSprop(start(*values, dtype=dtype), **settings)
    (p,) = half.param_groups[0]["params"]
    full = RMSprop([nn.Parameter(p.detach().float())], **settings)
    (q,) = full.param_groups[0]["params"]
    for lr, grad in ((0.01, [1e-3, 5.0, -1e-4, 0.7]), (0.02, [-2e-4, 4.0, 6e-5, 0.0])):
        half.param_groups[0]["lr"] = full.param_groups[0]["lr"] = lr
        p.grad = torch.tensor(grad, dtype=dtype)
        q.grad = p.grad.float()
        half.step()
        full.step()
        for name in ("square_avg", "grad_avg", "momentum_buffer"):
            assert half.state[p][name].dtype == torch.float32
            assert torch.equal(half.state[p][name], full.state[q][name])
        assert torch.equal(p, q.to(dtype))
        with torch.no_grad():
            q.copy_(p)


@HALF
def test_torchs_half_precision_state_is_widened_on_load(backend, dtype):
    """Its numbers stay, in float32, and the run goes on in float32 arithmetic."""
    theirs = torch.optim.RMSprop(start(1.0, -2.0, dtype=dtype), momentum=0.9, centered=True)
    p = stepped(theirs, 0.25, 0.5)
    ours = RMSprop([nn.Parameter(p.detach().clone())], momentum=0.9, centered=True, backend=backend)
    (q,) = ours.param_groups[0]["params"]
    ours.load_state_dict(theirs.state_dict())
    for name in ("square_avg", "grad_avg", "momentum_buffer"):
        assert theirs.state[p][name].dtype == dtype
        assert ours.state[q][name].dtype == torch.float32
        assert torch.equal(ours.state[q][name], theirs.state[p][name].float())
    before = ours.state[q]["square_avg"].clone()
    stepped(ours, 1e-3)
    torch.testing.assert_close(ours.state[q]["square_avg"], 0.99 * before + 0.01 * q.grad.float() ** 2)


@HALF
def test_an_eps_that_the_dtype_cannot_hold_is_honoured(backend, dtype):
    """ε = 1e-8 is 0 in float16; beside a gradient of 2⁻²⁴ it is most of the denominator."""
    g = 2.0**-24
    p = stepped(RMSprop(start(0.0, dtype=dtype), lr=0.25, backend=backend), g)
    assert p.item() == pytest.approx(-0.25 * g / (0.1 * g + 1e-8), rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize("settings", [{}, dict(momentum=0.9, lr_in_buffer=True), dict(capturable=True)], ids=str)
def test_lr_changes_its_type_in_mid_run(backend, settings):
    """float, tensor of no or one dimension, of float32 or float64, and back: the run with floats."""
    a, b = (RMSprop(start(1.0, -2.0), backend=backend, **settings) for _ in range(2))
    lrs = (0.01, torch.tensor(0.02), 0.03, torch.tensor([0.01], dtype=torch.float64), torch.tensor(0.04), 0.0, 0.01)
    for t, lr in enumerate(lrs):
        a.param_groups[0]["lr"], b.param_groups[0]["lr"] = lr, float(lr)
        p, q = (stepped(optimizer, [0.1 * (t + 1), -3.0]) for optimizer in (a, b))
        torch.testing.assert_close(p, q, rtol=3e-7, atol=0)
    assert a.state[p]["step"] == len(lrs)


def test_momentum_begins_and_ends_in_mid_run(backend):
    """Raised from 0 its buffer is made, from 0; at 0 it is kept as it is, and goes on from there."""
    optimizer = RMSprop(start(1.0), lr=0.5, alpha=0.0, eps=0.0, backend=backend)  # u is the gradient's sign
    group = optimizer.param_groups[0]
    p = stepped(optimizer, 2.0)
    assert "momentum_buffer" not in optimizer.state[p]
    group["momentum"] = 0.5
    stepped(optimizer, 2.0, 2.0)
    buffer = optimizer.state[p]["momentum_buffer"]
    assert buffer.item() == 1.5
    assert p.item() == 1 - 0.5 * (1 + 1 + 1.5)
    group["momentum"] = 0.0
    stepped(optimizer, -2.0)
    assert optimizer.state[p]["momentum_buffer"] is buffer
    assert buffer.item() == 1.5
    group["momentum"] = 0.5
    stepped(optimizer, 2.0)
    assert buffer.item() == 0.5 * 1.5 + 1
