"""Gradients that autograd leaves conjugated or negated lazily step as the numbers that they are, everywhere."""

import pytest
import torch
from torch import nn

from rmsprop import RMSprop, step_in_backward
from rmsprop.functional import rmsprop as functional

WAYS = {
    "plan": {},
    "full": dict(momentum=0.9, centered=True, bias_correction=True, weight_decay=0.1),
    "eager": dict(backend="eager"),
    "foreach": dict(foreach=True),
    "differentiable": dict(differentiable=True),
    "capturable": dict(capturable=True),
    "clip": dict(clip_norm=0.1, clip_value=0.05, clip_after_decay=True, weight_decay=0.1),
    "clip together": dict(clip_global_norm=0.1, clip_weights=1.0),
    "max_update": dict(max_update=0.5, momentum=0.5),
    "skip": dict(nonfinite="skip"),
    "raise": dict(nonfinite="raise", clip_norm=0.1),
    "lazy": dict(sparse="lazy"),
    "amp": dict(amp_in_step=True, capturable=True),
}
Z = torch.complex(torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([0.5, 1.0, -4.0, 0.25]))

# A gradient as autograd may leave it, and the numbers that it is.
LAZY = {
    "conjugated": lambda t: (t * Z).conj(),
    "negated complex": lambda t: torch._neg_view(t * Z),
    "both": lambda t: torch._neg_view((t * Z).conj()),
    "negated real": lambda t: (t * Z).conj().imag,
}


def _start(kind):
    return Z.real.clone() + 1 if kind == "negated real" else Z.clone() * 2


def _steps(way, kind, resolve):
    p = _start(kind)
    p = p if way == "differentiable" else nn.Parameter(p)
    optimizer = RMSprop([p], **WAYS[way])
    for t in (1.0, -0.5, 2.0):
        g = LAZY[kind](t)
        assert g.is_conj() or g.is_neg()
        p.grad = g.resolve_conj().resolve_neg().clone() if resolve else g
        if way == "amp":
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.zeros(())
        optimizer.step()
    return [p.detach(), *optimizer.state[p].values()]


@pytest.mark.parametrize("kind", LAZY)
@pytest.mark.parametrize("way", WAYS)
def test_a_lazy_gradient_steps_as_its_numbers(way, kind):
    """Bitwise the step of the same gradient in memory of its own, and the gradient is left as it was."""
    for one, other in zip(_steps(way, kind, resolve=False), _steps(way, kind, resolve=True), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", LAZY)
def test_the_function_takes_lazy_gradients(kind):
    """rmsprop.functional steps them as the class does."""
    p, g = _start(kind), LAZY[kind](1.0)
    q, h = p.clone(), g.resolve_conj().resolve_neg().clone()
    numbers = dict(lr=0.1, alpha=0.9, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False)
    for tensor, grad in ((p, g), (q, h)):
        functional([tensor], [grad], [torch.zeros_like(h)], [], [], [torch.tensor(0.0)], **numbers)
    assert torch.equal(p, q)
    assert g.is_conj() or g.is_neg()


def test_backward_of_a_conjugate_steps_in_backward_and_after():
    """What autograd makes of a conjugated parameter is a conjugated gradient, and both optimizers take it."""

    class Conjugated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(Z.clone())

        def forward(self):
            return (self.weight.conj() * Z).sum().abs()

    one, other = Conjugated(), Conjugated()
    inside, after = step_in_backward(one, lr=0.1), RMSprop(other.parameters(), lr=0.1)
    for _ in range(3):
        one().backward()
        inside.step()
        after.zero_grad()
        other().backward()
        assert other.weight.grad.is_conj()
        other.weight.grad = other.weight.grad
        after.step()
    assert torch.equal(one.weight, other.weight)
    assert not torch.equal(one.weight, Z)


@pytest.mark.parametrize("mode", ["skip", "raise"])
@pytest.mark.parametrize("kind", LAZY)
def test_the_guard_sees_into_lazy_gradients(kind, mode):
    """One element that is not finite stops the step, however the gradient is kept."""
    p = nn.Parameter(_start(kind))
    before = p.detach().clone()
    optimizer = RMSprop([p], nonfinite=mode)
    p.grad = LAZY[kind](torch.inf)
    if mode == "raise":
        with pytest.raises(RuntimeError, match="holds NaN or infinity"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped.total == 1
    assert torch.equal(p, before)


def test_a_parameter_that_is_conjugated_is_refused_in_a_sentence():
    """Its pairs of reals are no memory to write; nothing is changed."""
    p = nn.Parameter(Z.conj())
    before = p.detach().clone()
    p.grad = torch.ones_like(before)
    optimizer = RMSprop([("z", p)])
    with pytest.raises(RuntimeError, match=r"parameter 'z' is conjugated lazily.*resolve_conj\(\)"):
        optimizer.step()
    assert torch.equal(p, before)
    assert not optimizer.state
    numbers = dict(lr=0.1, alpha=0.9, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False)
    with pytest.raises(ValueError, match=r"square_avgs\[0\] is conjugated lazily"):
        functional([Z.clone()], [Z.clone()], [Z.conj()], [], [], [torch.tensor(0.0)], **numbers)
