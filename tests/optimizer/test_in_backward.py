"""step_in_backward: the ordinary optimizer's numbers, and no gradient that outlives its step."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from rmsprop import RMSprop, in_backward, step_in_backward

EVERYTHING = dict(momentum=0.9, centered=True, weight_decay=0.01, eps_mode="inside", nesterov=True)


class Net(nn.Module):
    """Layers of several sizes, one used twice, one frozen, and one that only some passes reach."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.twice = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.sometimes = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.out = nn.Linear(8, 2, bias=False)

    def forward(self, x: Tensor, reach: bool = True) -> Tensor:
        x = self.inner(x).tanh()
        x = self.frozen(self.twice(self.twice(x).tanh())).tanh()
        return self.out(self.sometimes(x).tanh() if reach else x)


def net(kind: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def loss_of(model: nn.Module, t: int, **how: Any) -> Tensor:
    """A loss on data of iteration t."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(t))
    return model(x, **how).square().mean()


def train(model: nn.Module, optimizer: Any, steps: int = 6, first: int = 0, scheduler: Any = None) -> None:
    """An ordinary loop; every third pass leaves a layer out."""
    for t in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, t, reach=t % 3 != 1).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_equal(a: nn.Module, b: nn.Module, first: RMSprop, second: RMSprop) -> None:
    """Parameters, state and settings, to the last bit."""
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
    one, other = first.state_dict(), second.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for i, entry in one["state"].items():
        assert entry.keys() == other["state"][i].keys()
        assert all(torch.equal(value, other["state"][i][name]) for name, value in entry.items())


@pytest.fixture(params=[0, 300, 1 << 20], ids=["at once", "some", "together"])
def together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many bytes of gradients wait for one another."""
    monkeypatch.setattr(in_backward, "TOGETHER", request.param)
    return int(request.param)


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("settings", [{}, EVERYTHING, {"backend": "eager"}, {"clip_norm": 0.01}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_is_the_ordinary_optimizer_to_the_last_bit(settings: dict, dtype: torch.dtype) -> None:
    """Parameters used twice, out of reach, frozen or without gradient, while a schedule moves lr and momentum."""
    models = [net().to(dtype) for _ in range(2)]
    a = RMSprop(models[0].named_parameters(), lr=0.01, **settings)
    b = step_in_backward(models[1], lr=0.01, **settings)
    for model, optimizer in zip(models, (a, b), strict=True):
        cast = lambda _, args: (args[0].to(dtype),)  # noqa: E731
        model.register_forward_pre_hook(cast)
        cyclic = settings.get("momentum", 0) > 0
        scheduler = (
            lr_scheduler.CyclicLR(optimizer, 0.001, 0.01, 2, cycle_momentum=True, base_momentum=0.5, max_momentum=0.9)
            if cyclic
            else lr_scheduler.ExponentialLR(optimizer, 0.7)
        )
        train(model, optimizer, scheduler=scheduler)
    assert_equal(*models, a, b)


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_random_bits_and_remainders_are_the_ordinary_optimizers(backend: str) -> None:
    """Stochastic rounding draws by a parameter's place and count, whatever it steps together with."""
    settings = dict(lr=0.01, rounding="stochastic", compensation=True, max_update=1.0, seed=3, backend=backend)
    models = [net().bfloat16() for _ in range(2)]
    a, b = RMSprop(models[0].named_parameters(), **settings), step_in_backward(models[1], **settings)
    for model, optimizer in zip(models, (a, b), strict=True):
        model.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
        train(model, optimizer)
    assert_equal(*models, a, b)


def test_backward_moves_and_frees_and_no_gradient_outlives_its_step(together: int) -> None:
    """At no moment is there more than the newest gradient and what may wait; after backward() there is none."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16, bias=i % 2 == 0) for i in range(12)])
    params, most = list(model.parameters()), []

    def alive() -> int:
        return sum(p.grad.nbytes for p in params if p.grad is not None)

    for p in params:
        p.register_post_accumulate_grad_hook(lambda _: most.append(alive()))
    optimizer = step_in_backward(model, lr=0.01)
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        model(torch.ones(2, 16)).sum().backward()
        assert alive() == 0
        assert all(not torch.equal(p, q) for p, q in zip(params, before, strict=True))
        optimizer.step()
    whole, largest = sum(p.nbytes for p in params), 16 * 16 * 4
    assert len(most) == 3 * len(params)
    assert max(most) <= together + largest
    assert max(most) == (whole if together == 1 << 20 else largest if together == 0 else max(most))


def test_a_large_gradient_does_not_wait() -> None:
    """A parameter of a megabyte moves, with those that wait, before the next gradient is made."""
    large = nn.Linear(512, 513)
    model, seen = nn.Sequential(nn.Linear(8, 512), large), []
    optimizer = step_in_backward(model, lr=0.01)
    model[0].weight.register_hook(lambda _: seen.append(large.weight.grad is None and large.bias.grad is None))
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert seen == [True]


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("settings", [{}, {"backend": "eager"}], ids=str)
def test_accumulated_passes_are_one_step(settings: dict) -> None:
    """Inside accumulate() nothing moves; the last pass steps, and step() what that did not reach."""
    models = [net(), net()]
    a = RMSprop(models[0].named_parameters(), lr=0.01, **settings)
    b = step_in_backward(models[1], lr=0.01, **settings)
    for t in range(4):
        reach = (t % 2 == 0, True, t % 2 == 1)  # the last pass leaves a layer out every other time
        a.zero_grad()
        for i, r in enumerate(reach):
            (loss_of(models[0], 3 * t + i, reach=r) / 3).backward()
        a.step()
        before = models[1].inner.weight.detach().clone()
        for i, r in enumerate(reach):
            with b.accumulate(i < 2):
                (loss_of(models[1], 3 * t + i, reach=r) / 3).backward()
            assert torch.equal(before, models[1].inner.weight) == (i < 2)
        b.step()
        assert all(p.grad is None for p in models[1].parameters())
    assert_equal(*models, a, b)


def test_accumulated_gradients_that_are_dropped_are_dropped() -> None:
    """zero_grad() between accumulated passes is the user's; blocks may be nested."""
    model = net()
    optimizer = step_in_backward(model, lr=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.accumulate():
        with optimizer.accumulate(False):
            loss_of(model, 0).backward()
        optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert len(optimizer.state) == 0


@pytest.mark.usefixtures("together")
def test_a_second_gradient_without_step_is_an_error() -> None:
    """The parameter has moved, so adding would be wrong: the sentence says what to write."""
    model = net()
    optimizer = step_in_backward(model, lr=0.01)
    loss_of(model, 0).backward()
    with pytest.raises(
        RuntimeError, match=r"parameter 'out.weight' has moved.*step\(\).*accumulate\(\).*use_reentrant"
    ):
        loss_of(model, 1).backward()
    optimizer.zero_grad()
    optimizer.step()
    loss_of(model, 2).backward()


class Checkpointed(nn.Module):
    """A layer used in two checkpointed parts."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = nn.Linear(6, 6), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=self.reentrant)
        return x


class _Fails(torch.autograd.Function):
    """Hands its input on, and raises in the backward pass."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, _grad: Tensor) -> Tensor:
        raise ArithmeticError("a backward pass that fails")


class Failing(nn.Module):
    """Two layers; between them the backward pass may fail, when the second one's gradients are complete."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        x = self.inner(x).tanh()
        return self.out(_Fails.apply(x) if fail else x)


@pytest.mark.parametrize("after", ["zero_grad", "nothing", "step"])
def test_a_backward_pass_that_failed_moved_nothing_and_bars_no_other(after: str) -> None:
    """What waited when an exception came has not moved; what follows is the ordinary optimizer's, to the last bit."""
    a, b = net(Failing), net(Failing)
    ours, plain = step_in_backward(a, lr=0.05), RMSprop(b.named_parameters(), lr=0.05)
    for t in range(6):
        if t in (0, 2, 3):
            before = [p.detach().clone() for p in a.parameters()]
            for model in (a, b):
                with pytest.raises(ArithmeticError, match="that fails"):
                    loss_of(model, t + 10, fail=True).backward()
            assert all(map(torch.equal, a.parameters(), before))
            for optimizer in (ours, plain):
                if after != "nothing":
                    getattr(optimizer, after)()
            if after == "step":
                plain.zero_grad()
        for model in (a, b):
            loss_of(model, t).backward()
        for optimizer in (ours, plain):
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(a, b, ours, plain)


def test_a_step_that_is_refused_in_backward_moved_nothing_and_bars_no_other() -> None:
    """A setting that does not work raises in the pass; put right, the next pass moves the parameters."""
    model = net(Failing)
    optimizer = step_in_backward(model, lr=0.05)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["alpha"] = 2.0
    with pytest.raises(ValueError, match="alpha"):
        loss_of(model, 0).backward()
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.param_groups[0]["alpha"] = 0.99
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    optimizer.step()
    assert not any(map(torch.equal, model.parameters(), before))
    assert {int(entry["step"]) for entry in optimizer.state.values()} == {1}


def test_what_moved_before_a_pass_failed_waits_for_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large gradients are used at once; after an exception the error says so, and step() begins anew."""
    monkeypatch.setattr(in_backward, "TOGETHER", 0)
    model = net(Failing)
    optimizer = step_in_backward(model, lr=0.05)
    with pytest.raises(ArithmeticError):
        loss_of(model, 0, fail=True).backward()
    with pytest.raises(RuntimeError, match=r"'out\..*has moved.*step\(\)"):
        loss_of(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    optimizer.step()


def test_activation_checkpoints_go_and_reentrant_ones_are_refused_where_parameters_are_shared() -> None:
    """Reentrant parts complete a shared gradient twice, which is noticed."""
    models = [net(lambda: Checkpointed(False)), net(lambda: Checkpointed(False))]
    a = RMSprop(models[0].named_parameters(), lr=0.01)
    b = step_in_backward(models[1], lr=0.01)
    for model, optimizer in zip(models, (a, b), strict=True):
        for t in range(3):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            optimizer.step()
    assert_equal(*models, a, b)
    model = Checkpointed(True)
    optimizer = step_in_backward(model, lr=0.01)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss_of(model, 0).backward()
    del optimizer


def test_checkpoints_go_both_ways() -> None:
    """Ordinary, in backward, torch's, ordinary: the run goes on to the last bit."""
    whole = net()
    straight = RMSprop(whole.named_parameters(), lr=0.01, momentum=0.5)
    train(whole, straight, 6)
    model = net()
    first = RMSprop(model.named_parameters(), lr=0.01, momentum=0.5)
    train(model, first, 2)
    second = step_in_backward(model, lr=0.01, momentum=0.5)
    second.load_state_dict(first.state_dict())
    train(model, second, 2, 2)
    saved = second.state_dict()
    second.load_state_dict(saved)  # a live one keeps its hooks, once each
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters() if p.requires_grad)
    theirs = torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.5)
    theirs.load_state_dict(saved)
    second.remove()
    third = RMSprop(model.named_parameters(), lr=0.01, momentum=0.5)
    third.load_state_dict(theirs.state_dict())
    train(model, third, 2, 4)
    for p, q in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_step_in_backward_by_themselves(how: Callable[[Any], Any]) -> None:
    """A copied model and optimizer go on alike, each pair by itself; a copy of the model alone is a plain one."""
    model = net()
    optimizer = step_in_backward(model, lr=0.01)
    train(model, optimizer, 2)
    other, twin = how((model, optimizer))
    alone = how(model)
    train(model, optimizer, 2, 2)
    before = [p.detach().clone() for p in model.parameters()]
    train(other, twin, 2, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert_equal(model, other, optimizer, twin)
    loss_of(alone, 0).backward()
    assert alone.out.weight.grad is not None
    optimizer.remove()
    assert how((model, optimizer))[1]._handles == {}


def test_what_needs_all_gradients_is_refused() -> None:
    """In the constructor, in a group, and in the midst of a run; nothing is left on the model."""
    model = net()
    for settings in (
        {"clip_global_norm": 1.0},
        {"differentiable": True},
        {"amp_in_step": True, "capturable": True},
        {"nonfinite": "skip"},
    ):
        name = next(iter(settings))
        with pytest.raises(ValueError, match=f"{name}=.*(step in backward|before any parameter moves)"):
            step_in_backward(model, **settings)
    params = [{"params": [model.inner.weight]}, {"params": [model.inner.bias], "clip_global_norm": 1.0}]
    with pytest.raises(ValueError, match="clip_global_norm"):
        step_in_backward(model, params)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    optimizer = step_in_backward(model, [model.inner.weight])
    with pytest.raises(ValueError, match="clip_global_norm"):
        optimizer.add_param_group({"params": [model.inner.bias], "clip_global_norm": 1.0})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["clip_global_norm"] = 1.0
    with pytest.raises(ValueError, match="clip_global_norm"):
        loss_of(model, 0).backward()


def test_a_gradient_scaler_is_refused_with_the_reason() -> None:
    """By the time that it looks at gradients there are none; a disabled one passes."""
    model = net()
    optimizer, scaler = step_in_backward(model, lr=0.01), torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler unscales .* bfloat16"):
        scaler.step(optimizer)
    optimizer.step()  # the scaler's attributes do not stay behind
    model = net()
    optimizer, scaler = step_in_backward(model, lr=0.01), torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    scaler.update()


def test_step_inside_accumulate_is_refused() -> None:
    """A loop that steps there would step nothing."""
    optimizer = step_in_backward(net(), lr=0.01)
    with optimizer.accumulate(), pytest.raises(RuntimeError, match=r"inside accumulate\(\)"):
        optimizer.step()


def test_two_optimizers_do_not_step_one_parameter() -> None:
    """The second is refused while the first lives; remove() or the first's end frees the parameter."""
    model = net()
    first = step_in_backward(model, lr=0.01)
    with pytest.raises(ValueError, match=r"parameter 'inner.weight' is stepped .* remove\(\) first"):
        step_in_backward(model, lr=0.01)
    first.remove()
    second = step_in_backward(model, lr=0.01)
    del second
    train(model, step_in_backward(model, lr=0.01), 1)


def test_after_remove_it_is_an_ordinary_optimizer() -> None:
    """Gradients stay until zero_grad(), and settings that need all of them work."""
    models = [net(), net()]
    a = RMSprop(models[0].named_parameters(), lr=0.01)
    b = step_in_backward(models[1], lr=0.01)
    train(models[0], a, 2)
    train(models[1], b, 2)
    assert "moves in backward()" in b.explain()
    b.remove()
    assert "moves in backward()" not in b.explain()
    assert not any(p._post_accumulate_grad_hooks for p in models[1].parameters())
    assert not models[1]._forward_pre_hooks
    for optimizer in (a, b):
        optimizer.param_groups[0]["clip_global_norm"] = 0.01
    train(models[0], a, 2, 2)
    train(models[1], b, 2, 2)
    assert models[1].out.weight.grad is not None
    assert_equal(*models, a, b)


def test_model_and_optimizer_are_freed_without_the_garbage_collector() -> None:
    """No cycle: memory comes back at once. While the model lives without its optimizer, gradients are plain ones."""
    model = net()
    optimizer = step_in_backward(model, lr=0.01)
    train(model, optimizer, 3)
    gone = [weakref.ref(optimizer), weakref.ref(model.inner.weight)]
    gc.disable()
    try:
        del optimizer
        assert gone[0]() is None
        loss_of(model, 0).backward()
        assert model.inner.weight.grad is not None
        del model
        assert gone[1]() is None
    finally:
        gc.enable()


def test_a_closure_is_evaluated_and_its_loss_returned() -> None:
    """Lightning and skorch step with one: the pass inside it moves the parameters, step() the rest."""
    models = [net(), net()]
    a = RMSprop(models[0].named_parameters(), lr=0.01)
    b = step_in_backward(models[1], lr=0.01)
    losses = []
    for model, optimizer in zip(models, (a, b), strict=True):

        def closure(model: nn.Module = model, optimizer: RMSprop = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        losses.append([optimizer.step(closure) for _ in range(3)])
    assert losses[0] == losses[1]
    assert_equal(*models, a, b)


def test_thawed_and_late_parameters_join() -> None:
    """One that is frozen at first steps from the step() after its thaw on in backward; so does a late group's."""
    models = [net(), net()]
    optimizers = [RMSprop(models[0].named_parameters(), lr=0.01), step_in_backward(models[1], lr=0.01)]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 1)
        model.frozen.requires_grad_(True)
        torch.manual_seed(1)
        model.late = nn.Linear(8, 2)
        model.out.register_forward_hook(lambda _, args, out, model=model: out + model.late(args[0]))
        optimizer.add_param_group({"params": list(model.late.named_parameters()), "lr": 0.02})
        train(model, optimizer, 1, 1)
        optimizer.zero_grad()
        loss_of(model, 2).backward()
    assert models[1].frozen.weight.grad is None
    assert models[1].late.weight.grad is None
    for optimizer in optimizers:
        optimizer.step()
    assert_equal(*models, *optimizers)


def test_gradients_set_by_hand_are_stepped_by_step() -> None:
    """step() takes every gradient that is there, as ever, and frees it."""
    p = nn.Parameter(torch.ones(3))
    model = nn.ParameterList([p])
    optimizer = step_in_backward(model, lr=0.1, alpha=0.0, eps=0.0)
    p.grad = torch.tensor([1.0, -2.0, 0.0])
    optimizer.step()
    assert torch.allclose(p.detach(), torch.tensor([0.9, 1.1, 1.0]))
    assert p.grad is None


def test_a_warm_up_from_lr_0_counts_every_step() -> None:
    """The first backward pass of a run with lr 0 and a zero gradient is a step, and not the making of state."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # the last layer's gradient is zero, and it is complete first
    optimizer = step_in_backward(model, lr=0.0)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert {float(entry["step"]) for entry in optimizer.state.values()} == {1.0}


@pytest.mark.usefixtures("together")
def test_the_kernel_steps_in_backward_by_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second iteration on no call takes the long way, also where each parameter has a call of its own."""
    from rmsprop.kernels import native

    if native.missing():
        pytest.skip(str(native.missing()))
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    optimizer, took = step_in_backward(model, lr=0.01), []
    monkeypatch.setattr(optimizer, "_step", lambda *args, step=optimizer._step: (took.append(1), step(*args))[1])
    counts = []
    for t in range(5):
        took.clear()
        loss_of(model, t).backward()
        optimizer.step()
        counts.append(len(took))
    assert counts[2:] == [0, 0, 0]
    assert counts[1] == 1


@pytest.mark.usefixtures("together")
def test_the_triton_kernel_steps_in_backward() -> None:
    """A launch for the parameters that are due, and none of the others'; under Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed, and its interpreter runs this test")
    from interpreted import interpreter, kernel_module

    models = [nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    with interpreter(kernel_module()):
        a = RMSprop(models[0].named_parameters(), lr=0.01, backend="triton")
        b = step_in_backward(models[1], lr=0.01, backend="triton")
        for model, optimizer in zip(models, (a, b), strict=True):
            for t in range(3):
                with optimizer.accumulate() if optimizer is b else nullcontext():
                    loss_of(model, t).backward()
                loss_of(model, t + 9).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert_equal(*models, a, b)


def test_sparse_and_complex_gradients_step_too() -> None:
    """Rows of an embedding, and complex parameters, as in the ordinary optimizer."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Embedding(10, 4, sparse=True)
            self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))

        def forward(self, t: int) -> Tensor:
            return ((self.rows(torch.tensor([t, 3])) * self.phase).abs()).sum()

    models = [net(Odd), net(Odd)]
    a = RMSprop(models[0].named_parameters(), lr=0.01, sparse="lazy")
    b = step_in_backward(models[1], lr=0.01, sparse="lazy")
    for model, optimizer in zip(models, (a, b), strict=True):
        for t in range(4):
            optimizer.zero_grad()
            model(t).backward()
            optimizer.step()
    assert_equal(*models, a, b)


def test_lazy_layers_join_when_they_have_a_shape() -> None:
    """The first iteration steps them in step(), the next ones in backward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that lazy modules are new
        models = [nn.Sequential(nn.LazyLinear(3)), nn.Sequential(nn.LazyLinear(3))]
    optimizers = [RMSprop(models[0].named_parameters(), lr=0.01), step_in_backward(models[1], lr=0.01)]
    for model, optimizer in zip(models, optimizers, strict=True):
        torch.manual_seed(0)
        for t in range(3):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            optimizer.step()
    assert_equal(*models, *optimizers)


def test_one_optimizer_of_many_settings() -> None:
    """Groups with settings of their own step in backward as they do in the ordinary optimizer."""
    models = [net(), net()]
    groups = [
        [
            {"params": [(n, p) for n, p in model.named_parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [(n, p) for n, p in model.named_parameters() if p.ndim == 1], "lr": 0.001, "momentum": 0.9},
        ]
        for model in models
    ]
    a, b = RMSprop(groups[0], lr=0.01), step_in_backward(models[1], groups[1], lr=0.01)
    train(models[0], a)
    train(models[1], b)
    assert_equal(*models, a, b)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch's own parts
def test_a_compiled_model_steps_in_backward() -> None:
    """torch.compile's graph hands its gradients to autograd, whose hooks step; the forward pass stays one graph."""
    import torch._dynamo as dynamo

    dynamo.reset()
    models = [net(), net()]
    a = RMSprop(models[0].named_parameters(), lr=0.01)
    b = step_in_backward(models[1], lr=0.01)
    train(torch.compile(models[0], backend="aot_eager", fullgraph=True), a)
    train(torch.compile(models[1], backend="aot_eager", fullgraph=True), b)
    dynamo.reset()
    assert_equal(*models, a, b)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_data_parallel_is_refused_with_the_reason() -> None:
    """DDP averages after our hooks: wrapped before, the model is refused; wrapped after, its first pass is."""
    ddp = nn.parallel.DistributedDataParallel
    model = net()
    with pytest.raises(ValueError, match=r"averages gradients .*fully_shard"):
        step_in_backward(ddp(model, find_unused_parameters=True))
    optimizer = step_in_backward(model, lr=0.01)
    wrapped = ddp(model, find_unused_parameters=True)
    with pytest.raises(ValueError, match=r"averages gradients .*fully_shard"):
        loss_of(wrapped, 0)
    optimizer.remove()
    loss_of(wrapped, 0).backward()
    assert model.inner.weight.grad is not None


@pytest.mark.usefixtures("one_process")
def test_distributed_checkpoints_read_and_write_its_state() -> None:
    """A getter on a fresh optimizer makes state and moves nothing; what it gives loads into an ordinary optimizer."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = step_in_backward(model, lr=0.01, weight_decay=0.1, momentum=0.5)
    fresh = get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert {float(entry["step"]) for entry in fresh["state"].values()} == {0.0}
    train(model, optimizer, 3)
    saved = get_optimizer_state_dict(model, optimizer)
    other = copy.deepcopy(model)
    ordinary = RMSprop(other.named_parameters(), lr=0.5)
    set_optimizer_state_dict(other, ordinary, saved)
    back = step_in_backward(again := copy.deepcopy(model), lr=0.5)
    set_optimizer_state_dict(again, back, get_optimizer_state_dict(other, ordinary))
    for m, o in ((model, optimizer), (other, ordinary), (again, back)):
        train(m, o, 2, 3)
    for p, q, r in zip(model.parameters(), other.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_the_docstrings_example_is_true() -> None:
    """step_in_backward's docstring runs."""
    import doctest

    assert doctest.testmod(in_backward).failed == 0
    assert doctest.testmod(in_backward).attempted > 0
