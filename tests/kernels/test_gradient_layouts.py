"""A gradient in another layout than its parameter costs a copy of itself, not the kernel for its whole group."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rmsprop import RMSprop
from rmsprop.kernels import native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "transposed": lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": lambda g: torch.stack((g, g), -1)[..., 0],
    "expanded": lambda g: g[:1, :1, :1, :1].expand(g.shape),
    "negated": lambda g: torch.complex(g, -g).conj().imag,
}


@pytest.mark.parametrize("settings", [{}, {"clip_global_norm": 0.3}, {"nonfinite": "skip", "momentum": 0.9}], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_step_is_that_of_a_gradient_in_the_parameters_layout(name: str, settings: dict) -> None:
    """Bit for bit, by a plan; the gradients stay as they are, also where one is missing for a step."""
    runs = []
    for layout in (LAYOUTS[name], lambda g: LAYOUTS[name](g).resolve_neg().contiguous()):
        params = [nn.Parameter(torch.linspace(-1, 1, 120).view(2, 3, 4, 5) + k) for k in range(3)]
        optimizer = RMSprop(params, lr=0.01, **settings)
        for t in range(5):
            for k, p in enumerate(params):
                g = torch.cos(p.detach() * (t + k + 1))
                p.grad = None if (t, k) == (3, 1) else layout(g) if k == 1 else g
            before = [None if p.grad is None else (p.grad, p.grad.clone(), p.grad.stride()) for p in params]
            optimizer.step()
            for p, kept in zip(params, before, strict=True):
                assert (p.grad is None) if kept is None else (p.grad is kept[0])
                assert kept is None or (torch.equal(p.grad, kept[1]) and p.grad.stride() == kept[2])
            assert optimizer._stepper.plan is not None
        runs.append([p.detach().clone() for p in params])
    assert all(map(torch.equal, *runs))


def test_a_layout_that_changes_during_the_run_keeps_the_kernel() -> None:
    """The first step in another layout takes the full step; those after it have a plan."""
    params = [nn.Parameter(torch.ones(2, 3, 4, 5)) for _ in range(2)]
    optimizer = RMSprop(params, lr=0.01)
    full = []
    step = optimizer._step
    optimizer._step = lambda closure: full.append(1) or step(closure)
    for layout in ["contiguous"] * 3 + ["channels_last"] * 3 + ["contiguous"] * 3:
        for p in params:
            p.grad = torch.ones_like(p)
        if layout != "contiguous":
            params[0].grad = LAYOUTS[layout](params[0].grad)
        optimizer.step()
    assert len(full) == 2
