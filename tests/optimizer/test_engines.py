"""What torch runs optimizers in: its compiler, gradient scalers, averaged models, transforms, CUDA graphs."""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import mostly_long
from paths import DOCS
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.optim import lr_scheduler, swa_utils
from torch.testing import assert_close

from rmsprop import RMSprop, step_in_backward
from rmsprop.functional import rmsprop

F64 = torch.float64
EPS_MODES = ("outside", "inside", "both", "floor")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def data(t: int = 0) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(t))


def assert_same(a: nn.Module, b: nn.Module, **bounds: float) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert_close(p, q, **(bounds or dict(rtol=0.0, atol=0.0)))


# torch.compile: forward and backward compiled with the step beside them is test_release's and every user's case; the
# compiled step alone, through the default compiler, is test_contract's.


@pytest.fixture
def dynamo() -> Iterator[Any]:
    """torch's compiler, with nothing compiled yet and its counts at 0."""
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    yield dynamo
    dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch's own parts
@pytest.mark.parametrize(
    ("lr", "graphs"),
    mostly_long([(0.01, 2), (torch.tensor(0.01), 1)], lambda i, _: i == 1, unpack=True),
    ids=["float", "tensor"],
)
def test_a_compiled_training_step_is_compiled_once_or_twice(dynamo: Any, lr: float | Tensor, graphs: int) -> None:
    """While a schedule moves lr: a float is a constant first and a variable from then on, a tensor always one."""
    model, twin = net(), net()
    a = RMSprop(model.parameters(), lr=lr if isinstance(lr, float) else lr.clone(), momentum=0.5)
    b = RMSprop(twin.parameters(), lr=0.01, momentum=0.5)
    schedules = [lr_scheduler.ExponentialLR(optimizer, 0.7) for optimizer in (a, b)]

    @torch.compile(backend="eager")
    def training_step(x: Tensor) -> None:
        a.zero_grad()
        model(x).square().mean().backward()
        a.step()

    counts = []
    for t in range(5):
        training_step(data(t))
        b.zero_grad()
        twin(data(t)).square().mean().backward()
        b.step()
        for schedule in schedules:
            schedule.step()
        counts.append(dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts == [2, *[1 + graphs] * 4]  # one is the forward pass
    assert_same(model, twin, rtol=1e-5, atol=1e-6)


# Gradient scalers: amp_in_step on every backend is test_amp's.


@pytest.mark.parametrize("how", ["unscale_", "clip_global_norm"])
@pytest.mark.parametrize("amp_in_step", [False, True])
def test_scaled_clipped_and_skipped_is_as_unscaled(amp_in_step: bool, how: str) -> None:
    """unscale_, clip and step, or clipping inside the step: the run without a scaler, less an overflowed step."""
    model, twin = net(), net()
    inside = dict(clip_global_norm=0.05) if how == "clip_global_norm" else {}
    asked = dict(capturable=True, amp_in_step=True) if amp_in_step else {}
    a = RMSprop(model.parameters(), lr=0.01, momentum=0.9, **inside, **asked)
    b = RMSprop(twin.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for t in range(6):
        a.zero_grad()
        loss = model(data(t)).square().mean() * (float("inf") if t == 3 else 1.0)
        scaler.scale(loss).backward()
        if how == "unscale_":
            scaler.unscale_(a)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(a)
        scaler.update()
        if t != 3:
            b.zero_grad()
            twin(data(t)).square().mean().backward()
            assert nn.utils.clip_grad_norm_(twin.parameters(), 0.05) > 0.05
            b.step()
    assert_same(model, twin, rtol=1e-4, atol=1e-6)
    assert {float(entry["step"]) for entry in a.state.values()} == {5.0}


def test_autocast_trains_as_with_torchs() -> None:
    """Forward in bfloat16, parameters, gradients and state in float32."""
    models = [net(), net()]
    optimizers = [RMSprop(models[0].parameters(), lr=0.01), torch.optim.RMSprop(models[1].parameters(), lr=0.01)]
    for model, optimizer in zip(models, optimizers, strict=True):
        for t in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(data(t)).square().mean()
            loss.backward()
            optimizer.step()
    assert optimizers[0].state[models[0][0].weight]["square_avg"].dtype == torch.float32
    assert_same(*models, rtol=1e-3, atol=1e-4)


# Averaged models.


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    "made",
    [lambda m: RMSprop(m.parameters(), lr=0.01), lambda m: step_in_backward(m, lr=0.01)],
    ids=["ordinary", "in backward"],
)
@pytest.mark.parametrize("average", [None, swa_utils.get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_averaged_models_follow_as_they_follow_torchs(average: Any, made: Callable[[nn.Module], RMSprop]) -> None:
    """AveragedModel, SWALR and update_bn: the averages, learning rates and statistics are those of torch's class."""
    found = []
    for make in (made, lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01)):
        model = normed()
        optimizer = make(model)
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=average)
        schedule, rates = swa_utils.SWALR(optimizer, swa_lr=0.002, anneal_epochs=4), []
        for t in range(8):
            optimizer.zero_grad()
            model(data(t)).square().mean().backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
            rates.append(optimizer.param_groups[0]["lr"])
        swa_utils.update_bn([data(t) for t in range(8)], averaged)
        found.append((rates, [*averaged.module.parameters(), averaged.module[1].running_mean], model))
    assert found[0][0] == found[1][0]
    assert rates[-1] == pytest.approx(0.002)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found[0][1][0], next(found[0][2].parameters()))


# Functional use.

NUMBERS: dict[str, Any] = dict(lr=0.1, alpha=0.9, eps=1e-8, weight_decay=0.01, momentum=0.0, centered=False)


def linear() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A model, its parameters as a dict, and data, in float64."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    return model, {name: p.detach().clone() for name, p in model.named_parameters()}, torch.randn(5, 3, dtype=F64)


def advanced(
    params: dict[str, Tensor], loss: Callable[..., Tensor], steps: int = 3, **settings: Any
) -> dict[str, Tensor]:
    """The parameters after some functional steps; those given stay as they are."""
    p = {name: value.clone() for name, value in params.items()}
    v, count = [torch.zeros_like(x) for x in p.values()], [torch.tensor(0.0) for _ in p]
    for _ in range(steps):
        g = grad(loss)({name: value.clone() for name, value in p.items()})
        rmsprop(list(p.values()), list(g.values()), v, [], [], count, **{**NUMBERS, **settings})
    return p


def test_functional_steps_on_functional_calls_are_the_optimizers() -> None:
    """functional_call, torch.func.grad and rmsprop() train as the module with its optimizer does."""
    model, params, x = linear()
    found = advanced(params, lambda p: functional_call(model, p, (x,)).square().mean())
    optimizer = RMSprop(model.parameters(), lr=0.1, alpha=0.9, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(found[name], p)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch says in jvp that its own use of it is old
def test_transforms_of_torch_func_go_through_recorded_steps() -> None:
    """grad and jvp with respect to lr are finite differences; vmap over models or learning rates is a loop."""
    model, params, x = linear()

    def loss(p: dict[str, Tensor]) -> Tensor:
        return functional_call(model, p, (x,)).square().mean()

    def outer(lr: Tensor) -> Tensor:
        return loss(advanced(params, loss, lr=lr, differentiable=True))

    lr, h = torch.tensor(0.1, dtype=F64), 1e-6
    slope = (outer(lr + h) - outer(lr - h)) / (2 * h)
    assert_close(grad(outer)(lr), slope, rtol=1e-6, atol=1e-8)
    assert_close(jvp(outer, (lr,), (torch.ones_like(lr),))[1], slope, rtol=1e-6, atol=1e-8)
    many = {name: torch.stack([p, p + 1, p - 1]) for name, p in params.items()}
    rates = torch.tensor([0.1, 0.01, 0.5], dtype=F64)
    together = vmap(lambda p, rate: advanced(p, loss, lr=rate, differentiable=True))(many, rates)
    for i, rate in enumerate(rates.tolist()):
        one = advanced({name: p[i] for name, p in many.items()}, loss, lr=rate)
        for name, p in one.items():
            assert_close(together[name][i], p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_transforms_of_torch_func_without_a_recorded_step_are_refused(backend: str) -> None:
    """A step that is not recorded has no derivative and no batch: a sentence, and not 0."""
    _, params, _ = linear()

    def outer(lr: Tensor) -> Tensor:
        return advanced(params, lambda p: p["weight"].sum(), lr=lr, backend=backend)["weight"].sum()

    with pytest.raises(RuntimeError, match="give differentiable=True"):
        grad(outer)(torch.tensor(0.1, dtype=F64))
    with pytest.raises(RuntimeError, match="give differentiable=True"):
        vmap(outer)(torch.tensor([0.1, 0.2], dtype=F64))


# Meta-learning.

SWITCHES = [
    dict(
        zip(("eps_mode", "momentum", "centered", "bias_correction", "lr_in_buffer", "nesterov"), values, strict=True)
    )
    for values in (
        *itertools.product(EPS_MODES, (0.0, 0.5), (False, True), (False, True), (False,), (False,)),
        ("outside", 0.5, False, False, True, True),
    )
    if not (values[2] and values[3])  # centered, its first corrected variance is 0
]


def trained(start: Tensor, lr: Tensor, loss: Callable[[Tensor], Tensor], **settings: Any) -> Tensor:
    """The parameters after an inner loop that autograd records."""
    p = start.clone()
    optimizer = RMSprop([p], lr=lr, differentiable=True, alpha=0.8, **settings)
    for _ in range(2):
        p.grad = torch.autograd.grad(loss(p.clone()), p, create_graph=True)[0]
        optimizer.step()
    return p.clone()


@pytest.mark.parametrize(
    "switches", mostly_long(SWITCHES, lambda i, _: i % 3 == 0), ids=lambda s: "-".join(map(str, s.values()))
)
def test_derivatives_through_an_inner_loop_are_finite_differences(switches: dict[str, Any]) -> None:
    """First and second ones, with respect to lr and to the start, for every rule."""
    start = torch.tensor([1.0, -0.6], dtype=F64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)

    def outer(start: Tensor, lr: Tensor) -> Tensor:
        return (trained(start, lr, lambda p: (p**4).sum(), eps=1e-3, weight_decay=0.1, **switches) ** 2).sum()

    torch.autograd.gradcheck(outer, (start, lr))
    torch.autograd.gradgradcheck(outer, (start, lr))


@pytest.mark.parametrize("eps", [0.1, 1e-8, 0.0])
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(map(str, s.values())))
def test_derivatives_at_a_gradient_of_zero_are_finite(switches: dict[str, Any], eps: float) -> None:
    """Where the root's own derivative is infinite; with an ε to measure by, the first ones are finite differences."""
    start = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)

    def outer(start: Tensor, lr: Tensor) -> Tensor:
        return trained(start, lr, lambda p: (p**2).sum(), eps=eps, **switches).sum()

    first = torch.autograd.grad(outer(start, lr), (start, lr), create_graph=True)
    second = torch.autograd.grad(sum(x.sum() for x in first), (start, lr))
    assert all(torch.isfinite(x).all() for x in (*first, *second))
    if eps == 0.1:
        torch.autograd.gradcheck(outer, (start, lr), atol=1e-4, rtol=1e-4)


def test_a_learned_lr_lowers_the_loss() -> None:
    """lr is an ordinary parameter of an outer optimizer: the inner loop's last loss falls."""
    start = torch.tensor([1.0, -2.0, 3.0], dtype=F64, requires_grad=True)
    lr = torch.tensor(0.01, dtype=F64, requires_grad=True)
    outer, losses = torch.optim.SGD([lr], lr=1e-3), []
    for _ in range(20):
        loss = (trained(start, lr, lambda p: (p**2).sum()) ** 2).sum()
        outer.zero_grad()
        loss.backward()
        outer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# CUDA graphs: the Triton kernel's are test_triton_gpu's.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_a_captured_training_step_is_the_eager_run() -> None:
    """capturable=True on torch's operators: forward, backward and step in one CUDA graph, lr moved by its tensor."""
    rates = [0.01 / (t + 1) for t in range(6)]
    x = data().cuda()
    model, twin = net().cuda(), net().cuda()
    settings = dict(momentum=0.9, centered=True, bias_correction=True, capturable=True, backend="eager")
    optimizers = [RMSprop(m.parameters(), lr=torch.tensor(0.01, device="cuda"), **settings) for m in (model, twin)]
    for rate in rates:
        optimizers[1].param_groups[0]["lr"].fill_(rate)
        optimizers[1].zero_grad()
        twin(x).square().mean().backward()
        optimizers[1].step()
    start = [p.detach().clone() for p in model.parameters()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(x).square().mean().backward()
        optimizers[0].step()
    torch.cuda.current_stream().wait_stream(side)
    optimizers[0].zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).square().mean().backward()
        optimizers[0].step()
    with torch.no_grad():  # back to the beginning
        for p, value in zip(model.parameters(), start, strict=True):
            p.copy_(value)
            for slot in optimizers[0].state[p].values():
                slot.zero_()
    for rate in rates:
        optimizers[0].param_groups[0]["lr"].fill_(rate)
        graph.replay()
    assert_same(model, twin, rtol=1e-5, atol=1e-6)
    assert all(float(entry["step"]) == 6 for entry in optimizers[0].state.values())


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch's own parts
def test_the_page_about_training_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    """The code of docs/training.md runs as it stands, and prints what its comments say."""
    page = (DOCS / "training.md").read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    with torch.random.fork_rng():
        exec(compile(program, "training.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^# (.*)$", program, re.MULTILINE)
