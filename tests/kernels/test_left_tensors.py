"""Tensors that the CPU kernel does not take cost their own step by torch's operators, not the others' plan."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from rmsprop import RMSprop
from rmsprop.kernels import native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def holed() -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6)[:, ::2])


def complex_() -> nn.Parameter:
    return nn.Parameter(torch.complex(torch.linspace(-1, 1, 6), torch.ones(6)))


def plain(k: int) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 20 + k))


def feed(params: list[nn.Parameter], t: int, missing: tuple[int, ...] = ()) -> None:
    for k, p in enumerate(params):
        p.grad = None if k in missing else torch.cos(p.detach() * (t + k + 1)).clone()


def full_steps(optimizer: RMSprop) -> list[int]:
    """A list that grows by one at each full step."""
    steps: list[int] = []
    step = optimizer._step
    optimizer._step = lambda closure: steps.append(1) or step(closure)  # type: ignore[method-assign]
    return steps


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("other", [holed, complex_])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_tensor_steps_as_it_does_alone(other, settings, groups) -> None:
    """Bit for bit, with lr moving, and with a gradient missing now and then; the full step is taken once."""
    params = [plain(0), other(), plain(1), plain(2)]
    twins = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
    twins[1] = other()
    listed = [{"params": params}] if groups == 1 else [{"params": params[:2]}, {"params": params[2:], "eps": 1e-3}]
    optimizer = RMSprop(listed, lr=0.01, **settings)
    alone = [
        RMSprop([p], lr=0.01, eps=1e-3 if groups == 2 and k >= 2 else 1e-8, **settings) for k, p in enumerate(twins)
    ]
    steps = full_steps(optimizer)
    for t in range(8):
        missing = {4: (1,), 5: (2,), 6: (1, 0)}.get(t, ())
        for one in (optimizer, *alone):
            for group in one.param_groups:
                group["lr"] = 0.01 / (t + 1)
        feed(params, t, missing)
        feed(twins, t, missing)
        optimizer.step()
        for one in alone:
            one.step()
        for p, q, one in zip(params, twins, alone, strict=True):
            assert torch.equal(p, q), t
            for name, value in one.state[q].items():
                assert torch.equal(value, optimizer.state[p][name]), name
    assert len(steps) == 1
    assert optimizer._stepper.plan.leaves


def test_a_tensor_that_the_kernel_takes_again_is_planned_again() -> None:
    """The layout of a parameter is mended in mid-run."""
    params = [plain(0), holed(), plain(1)]
    optimizer = RMSprop(params, lr=0.01)
    steps = full_steps(optimizer)
    for t in range(6):
        if t == 3:
            params[1].data = params[1].data.contiguous()
            optimizer.state[params[1]]["square_avg"] = optimizer.state[params[1]]["square_avg"].contiguous()
        feed(params, t)
        optimizer.step()
    assert len(steps) == 2
    assert not optimizer._stepper.plan.leaves


def test_what_no_kernel_takes_is_refused_before_anything_moves() -> None:
    """State edited by hand, of the tensor that the plan leaves: one sentence with its name."""
    params = [plain(0), holed()]
    optimizer = RMSprop([("first", params[0]), ("second", params[1])], lr=0.01)
    for t in range(3):
        feed(params, t)
        optimizer.step()
    optimizer.state[params[1]]["square_avg"] = torch.ones(2)
    feed(params, 3)
    before = [p.detach().clone() for p in params]
    with pytest.raises((RuntimeError, ValueError), match="second"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert float(optimizer.state[params[0]]["step"]) == 3


def test_a_tensor_that_shares_memory_with_the_others_is_not_stepped_beside_them() -> None:
    """All tensors of one storage take one way."""
    whole = torch.linspace(-1, 1, 30)
    params = [nn.Parameter(whole[:10]), nn.Parameter(whole[10:30:2]), plain(1)]
    optimizer = RMSprop(params, lr=0.01)
    for t in range(3):
        feed(params, t)
        optimizer.step()
    assert optimizer._stepper.plan is None


def test_tensors_that_the_plan_leaves_are_not_kept_alive() -> None:
    params = [plain(0), holed()]
    optimizer = RMSprop([{"params": [p]} for p in params], lr=0.01)
    for t in range(3):
        feed(params, t)
        optimizer.step()
    gone = weakref.ref(params.pop())
    del optimizer.param_groups[1]
    optimizer.state.pop(gone(), None)
    gc.collect()
    assert gone() is None
    feed(params, 4)
    optimizer.step()


@pytest.mark.parametrize(
    "settings", [{"nonfinite": "skip"}, {"clip_global_norm": 0.1}, {"clip_weights": 0.5}], ids=str
)
def test_what_is_decided_together_takes_the_full_step(settings) -> None:
    """Guards and norms see every tensor: the result is that of torch's operators on all of them."""
    runs: list[list[Tensor]] = []
    for words in ({}, {"backend": "eager"}):
        params = [plain(0), holed(), complex_()]
        optimizer = RMSprop(params, lr=0.01, **settings, **words)
        for t in range(4):
            feed(params, t)
            if t == 2 and "nonfinite" in settings:
                params[1].grad[0, 0] = torch.inf
            optimizer.step()
        runs.append([p.detach().clone() for p in params])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_copied_gradient_and_a_left_tensor_go_together() -> None:
    """A gradient of another layout, a parameter with gaps, and one without a gradient when the plan is made."""
    first = nn.Parameter(torch.linspace(-1, 1, 120).view(2, 3, 4, 5))
    params = [first, holed(), plain(0), plain(1)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twins[1] = holed()
    optimizer, alone = RMSprop(params, lr=0.01), [RMSprop([p], lr=0.01) for p in twins]
    steps = full_steps(optimizer)
    for t in range(6):
        missing = (3,) if t == 1 else ()
        for own in (params, twins):
            feed(own, t, missing)
        params[0].grad = params[0].grad.contiguous(memory_format=torch.channels_last)
        if t == 1:
            optimizer._stepper.forget()  # the plan is made in a step in which a gradient is missing
        optimizer.step()
        for one in alone:
            one.step()
        assert all(map(torch.equal, params, twins)), t
    assert len(steps) == 2
    assert optimizer._stepper.plan.leaves
    assert optimizer._stepper.plan._copied == [0]


def test_a_loss_scale_that_comes_later_is_of_every_tensor() -> None:
    """The first steps have no scaler, and a plan; then GradScaler scales, and once overflows."""
    runs = []
    for scale in (1.0, 512.0):
        params = [plain(0), holed(), complex_()]
        optimizer = RMSprop(params, lr=0.01, amp_in_step=True, capturable=True)
        for t in range(6):
            feed(params, t)
            if t >= 3:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(t == 4))
                for p in params:
                    p.grad = p.grad * scale
            optimizer.step()
        assert [float(optimizer.state[p]["step"]) for p in params] == [5, 5, 5]
        runs.append([p.detach().clone() for p in params])
    assert all(map(torch.equal, *runs))
