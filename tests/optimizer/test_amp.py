"""amp_in_step: what torch.amp.GradScaler does, done by the step, on every backend."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from rmsprop import RMSprop
from rmsprop.kernels import native


@pytest.mark.parametrize("backend", ["triton", "cpu", "eager"])
class TestAmpInStep:
    """amp_in_step=True: GradScaler hands its scale and found_inf to the step."""

    @pytest.fixture(autouse=True)
    def _there(self, backend: str) -> Iterator[None]:
        if backend == "cpu" and native.missing() is not None:
            pytest.skip(str(native.missing()))
        if backend != "triton":
            yield
            return
        pytest.importorskip("triton", reason="triton is not installed, and its interpreter runs this test")
        from interpreted import interpreter, kernel_module

        with interpreter(kernel_module()):
            yield

    def made(self, backend: str, **settings: object) -> tuple[Tensor, RMSprop, torch.amp.GradScaler]:
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        settings = dict(capturable=True, amp_in_step=True) | settings
        return p, RMSprop([p], lr=0.1, backend=backend, momentum=0.9, **settings), torch.amp.GradScaler("cpu")

    def run(self, backend: str, bad: int | None = None, unscale: bool = False, **settings: object) -> list[float]:
        p, optimizer, scaler = self.made(backend, **settings)
        for t in range(4):
            optimizer.zero_grad()
            scaler.scale((p * p).sum() * (float("inf") if t == bad else 1.0)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            grad = p.grad.clone()
            scaler.step(optimizer)
            assert torch.equal(p.grad, grad) or not optimizer._step_supports_amp_scaling
            scaler.update()
        assert float(optimizer.state[p]["step"]) == 4 - (bad is not None)
        return p.tolist()

    def test_is_what_the_scaler_would_have_done(self, backend: str) -> None:
        """The same run as with amp_in_step=False, where the scaler unscales before the step."""
        assert self.run(backend) == pytest.approx(self.run(backend, amp_in_step=False), rel=1e-6)

    def test_an_overflow_writes_nothing_and_counts_no_step(self, backend: str) -> None:
        """An infinite gradient skips parameters, slots and count, as the scaler itself does."""
        expected = self.run(backend, bad=2, amp_in_step=False)
        assert self.run(backend, bad=2) == pytest.approx(expected, rel=1e-6)

    def test_gradients_already_unscaled_are_not_unscaled_twice(self, backend: str) -> None:
        """After scaler.unscale_ the step gets found_inf and no scale."""
        assert self.run(backend, unscale=True) == pytest.approx(self.run(backend), rel=1e-6)
        assert self.run(backend, unscale=True, bad=1) == pytest.approx(self.run(backend, bad=1), rel=1e-6)

    @pytest.mark.parametrize("found", [1.0, 2.0, float("nan")])
    def test_found_inf_is_a_sum_over_devices(self, backend: str, found: float) -> None:
        """Whatever is not 0 skips: torch's own fused optimizers take 2 for a success."""
        p, optimizer, _ = self.made(backend)
        p.grad = torch.ones(3)
        optimizer.step()
        before, state = p.tolist(), copy.deepcopy(optimizer.state_dict()["state"])
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(found)
        optimizer.step()
        assert p.tolist() == before
        after = optimizer.state_dict()["state"]
        assert all(torch.equal(after[0][name], value) for name, value in state[0].items())
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        assert p.tolist() != before


def test_it_is_off_unless_asked_for_and_kept_by_a_pickle() -> None:
    """Lightning clips, and Accelerate sees skipped steps, only while torch's flag is off."""
    assert not RMSprop([torch.zeros(1)])._step_supports_amp_scaling
    asked = RMSprop([torch.zeros(1)], capturable=True, amp_in_step=True)
    assert copy.deepcopy(asked)._step_supports_amp_scaling
    with pytest.raises(ValueError, match="give capturable=True too"):
        RMSprop([torch.zeros(1)], amp_in_step=True)
    with pytest.raises(TypeError, match="amp_in_step is a switch"):
        RMSprop([torch.zeros(1)], capturable=True, amp_in_step="yes")


def test_while_off_the_scaler_decides_alone() -> None:
    """Lightning clips unscaled gradients, and Accelerate sees a skipped step by `step` not being called."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer, scaler, called = RMSprop([p], lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0), []
    optimizer.register_step_pre_hook(lambda *_: called.append(p.grad.tolist()))
    for factor in (1.0, float("inf")):
        optimizer.zero_grad()
        scaler.scale((p * p).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert called == [[2.0, -4.0]]


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_scaled_step_that_raises_leaves_nothing_of_the_scaler(backend):
    """GradScaler removes found_inf and the scale only after a step that returns; later steps are as if it had."""
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    ours, plain = (RMSprop([x], lr=0.1, amp_in_step=True, capturable=True, backend=backend) for x in (p, q))
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2))
    p.grad = torch.full((3,), 2.0)
    ours.param_groups[0]["alpha"] = 2.0
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match="alpha"):
        scaler.step(ours)
    assert not hasattr(ours, "found_inf")
    assert not hasattr(ours, "grad_scale")
    ours.param_groups[0]["alpha"] = 0.99
    scaler.update()
    other.scale(torch.ones(()))
    for x, optimizer, own in ((p, ours, scaler), (q, plain, other)):
        x.grad = torch.full((3,), 2.0)
        own.step(optimizer)
        x.grad = torch.full((3,), 0.5)
        optimizer.step()
    assert torch.equal(p, q)


def test_a_closure_that_raises_leaves_the_optimizer_as_it_was():
    """Also with a scaler's attributes set, and whatever the guard: the next step is an ordinary one."""
    for settings in ({}, dict(nonfinite="skip"), dict(nonfinite="raise"), dict(differentiable=True)):
        p = torch.ones(3) if settings.get("differentiable") else nn.Parameter(torch.ones(3))
        optimizer = RMSprop([p], lr=0.1, **settings)
        p.grad = torch.ones(3)
        optimizer.found_inf = torch.ones(())

        def closure():
            raise ArithmeticError("a loss that fails")

        grad_mode = torch.is_grad_enabled()
        with pytest.raises(ArithmeticError, match="that fails"):
            optimizer.step(closure)
        assert torch.is_grad_enabled() == grad_mode
        assert torch.equal(p, torch.ones(3))
        assert not optimizer.state
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.zeros(3), rtol=0, atol=1e-5)
