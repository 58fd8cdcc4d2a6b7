"""The average of the weights, line [10], inside the step, and what `averaged` and `average_into` make of it."""

import copy
import importlib.util
import math
import pickle
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, DTYPES, SCHEDULE, as64, mostly_long, spacing
from runs import Run
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rmsprop import RMSprop, checkpoint, reference, step_in_backward
from rmsprop.kernels import native
from rmsprop.spec import Averaging

# In units of the largest number that takes part. Measured: .92 in the CPU kernel; 1.3 by torch, which rounds the
# distance, its share and the sum, in float32 and half precision; 2 in float64, where the reference rounds too.
BUDGET = {torch.float32: 1.6, torch.float64: 3.0}

KINDS = [
    {"ema": 0.9},
    {"ema": 0.99, "ema_warmup": "tensorflow"},
    {"ema": 0.9, "ema_warmup": "timm", "ema_interval": 2},
    {"ema": 0.3, "ema_start": 6},
    {"ema": 0.0},
]
NATIVE = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def averaging(settings: dict[str, Any]) -> Averaging:
    return Averaging(*(settings.get(name, d) for name, d in zip(_NAMES, (None, None, 0, 1), strict=True)))


_NAMES = ("ema", "ema_warmup", "ema_start", "ema_interval")


def stepped(optimizer: RMSprop, steps: int = 1, seed: int = 0) -> list[torch.Tensor]:
    """Take steps with gradients that follow from the seed. Return the averages."""
    draw = torch.Generator().manual_seed(seed)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype)
        optimizer.step()
    return [optimizer.state[p]["ema"] for p in params]


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)) for shape in shapes]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 5, generator=draw)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("case", "backend", "dtype"),
    mostly_long(product(CASES, ["cpu", "eager"], DTYPES), lambda i, _: i % 13 == 0, unpack=True),
    ids=str,
)
def test_every_element_is_the_references(case: Any, backend: str, dtype: torch.dtype) -> None:
    """After each step, from the weights as stored, with lr changing; the nine lines keep their own bounds."""
    if backend == "cpu" and native.missing() is not None:
        pytest.skip(native.missing())
    for settings in KINDS:
        run = Run(case, dtype, backend=backend, **settings)
        for param in run.params:
            run.optimizer.state[param]["ema"] = (
                param.detach().to(run.optimizer.state[param]["square_avg"].dtype) * 0.7
            )
        before = [as64(run.optimizer.state[p]["ema"]) for p in run.params]
        for t, _ in enumerate(run.steps(SCHEDULE), start=5):
            for i, p in enumerate(run.params):
                e = run.optimizer.state[p]["ema"]
                expected = reference.average(averaging(settings).decay_at(t), as64(p), before[i])
                unit = spacing(np.maximum(np.abs(before[i]), np.abs(as64(p))), e.dtype)
                before[i] = as64(e)
                assert (np.abs(before[i] - expected) <= BUDGET[e.dtype] * unit).all(), settings


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(
    "settings",
    [
        {"clip_weights": 0.5},
        {"clip_global_norm": 0.3},
        {"clip_norm": 0.2, "clip_value": 0.1, "weight_decay": 0.1, "clip_after_decay": True},
        {"nonfinite": "skip", "max_update": 2.0},
        {"rounding": "stochastic", "dtype": torch.bfloat16},
        {"compensation": True, "dtype": torch.float16},
    ],
    ids=str,
)
def test_the_average_is_of_what_the_step_stored(settings: dict[str, Any], backend: str) -> None:
    """Beside every kind of clipping, guards and rounding, which give the same weights as without an average."""
    settings = dict(settings)
    dtype = settings.pop("dtype", torch.float32)
    shapes = ((33,), (3, 5), (9000,))
    ours, plain = weights(*shapes, dtype=dtype), weights(*shapes, dtype=dtype)
    optimizer = RMSprop(ours, lr=0.05, ema=0.8, ema_warmup="tensorflow", backend=backend, **settings)
    without = RMSprop(plain, lr=0.05, backend=backend, **settings)
    expected = [as64(p) for p in ours]
    for t in range(1, 6):
        averages = stepped(optimizer, seed=t)
        for p, q in zip(ours, plain, strict=True):
            q.grad = p.grad
        without.step()
        assert all(map(torch.equal, ours, plain))
        expected = [
            reference.average(averaging({"ema": 0.8, "ema_warmup": "tensorflow"}).decay_at(t), as64(p), e)
            for p, e in zip(ours, expected, strict=True)
        ]
    for e, wanted in zip(averages, expected, strict=True):
        assert np.allclose(as64(e), wanted, rtol=1e-6, atol=1e-7)


@NATIVE
@pytest.mark.parametrize("clip", [{}, {"clip_global_norm": 0.3}, {"clip_weights": 0.5}], ids=str)
def test_the_plan_takes_it_on_any_number_of_threads(clip: dict[str, float]) -> None:
    """The plan serves from the second step on, and gives the full step's bits, on one thread and on two."""
    runs = []
    for threads, planned in ((1, True), (2, True), (1, False)):
        torch.set_num_threads(threads)
        optimizer = RMSprop(weights((100_003,), (7,), (40, 30)), lr=0.01, momentum=0.9, ema=0.95, **clip)
        stepped(optimizer)
        plan = optimizer._stepper.plan
        assert plan is not None
        for t in range(1, 5):
            if not planned:
                optimizer._stepper.drop_plan()
            averages = stepped(optimizer, seed=t)
        assert not planned or optimizer._stepper.plan is plan
        runs.append(averages)
    assert all(map(torch.equal, runs[0], runs[1]))
    assert all(map(torch.equal, runs[0], runs[2]))


def test_equals_torchs_averaged_model() -> None:
    """Also of BatchNorm's statistics, with use_buffers=True."""
    model = network()
    optimizer = RMSprop(model.parameters(), lr=0.01, ema=0.9)
    optimizer.average_buffers(model)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer.register_step_post_hook(lambda *_: theirs.update_parameters(model))
    trained(model, optimizer, 12)
    with optimizer.averaged():
        _close(model, theirs.module)


def test_equals_timms_ema() -> None:
    """ModelEmaV3 with and without warm-up, and a start, on a run with BatchNorm: state_dict_ema to 1e-6."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        pytest.skip("timm is not installed")
    path = spec.origin.replace("__init__.py", "utils/model_ema.py")
    alone = importlib.util.spec_from_file_location("timm_model_ema_alone", path)
    assert alone is not None
    assert alone.loader is not None
    module = importlib.util.module_from_spec(alone)
    alone.loader.exec_module(module)
    for settings, arguments in (
        ({}, {}),
        ({"ema_warmup": "timm"}, {"use_warmup": True}),
        ({"ema_start": 4}, {"update_after_step": 4}),
    ):
        model = network()
        optimizer = RMSprop(model.parameters(), lr=0.01, ema=0.97, **settings)
        optimizer.average_buffers(model)
        theirs = module.ModelEmaV3(model, decay=0.97, **arguments)
        count = iter(range(1, 100))
        optimizer.register_step_post_hook(
            lambda *_, theirs=theirs, model=model, count=count: theirs.update(model, step=next(count))
        )
        trained(model, optimizer, 20)
        with optimizer.averaged():
            _close(model, theirs.module)


def _close(model: nn.Module, other: nn.Module) -> None:
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        if x.is_floating_point():
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7, msg=name)


def test_the_warm_ups_by_hand() -> None:
    """d of updates 1, 2, 3 and far ahead; a start and an interval shift them."""
    tensorflow, timm = Averaging(0.99, "tensorflow"), Averaging(0.99, "timm")
    assert [tensorflow.decay_at(t) for t in (1, 2, 3, 10_000)] == [2 / 11, 3 / 12, 4 / 13, 0.99]
    assert [timm.decay_at(t) for t in (1, 8, 10_000)] == [0.0, 1 - 8 ** (-2 / 3), 0.99]
    assert [Averaging(0.9).decay_at(t) for t in (1, 2, 3)] == [0.0, 0.9, 0.9]
    late = Averaging(0.9, start=2, interval=3)
    assert [late.decay_at(t) for t in range(1, 10)] == [0.0, 0.0, None, None, 0.0, None, None, 0.9, None]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_steps_on_the_device_give_the_same_shares(settings: dict[str, Any]) -> None:
    """capturable=True computes 1 − d from the count without reading it back."""
    runs = [
        stepped(
            RMSprop(
                weights((9,), dtype=torch.float64),
                ema_start=settings.get("ema_start", 2),
                backend="eager",
                capturable=capturable,
                **{k: v for k, v in settings.items() if k != "ema_start"},
            ),
            steps=9,
        )
        for capturable in (False, True)
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_skipped_step_leaves_the_average(backend: str) -> None:
    """By the guard, and by a loss scale that overflowed."""
    params = weights((50,), (3,))
    optimizer = RMSprop(params, ema=0.9, nonfinite="skip", backend=backend)
    kept = [e.clone() for e in stepped(optimizer, 3)]
    params[1].grad[1] = math.nan
    optimizer.step()
    assert optimizer.skipped.total == 1
    assert all(torch.equal(optimizer.state[p]["ema"], e) for p, e in zip(params, kept, strict=True))
    optimizer = RMSprop(weights((50,)), ema=0.9, clip_weights=0.1, amp_in_step=True, capturable=True, backend=backend)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    kept = [e.clone() for e in stepped(optimizer, 3)]
    (p,) = optimizer.param_groups[0]["params"]
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["ema"], kept[0])


@pytest.mark.parametrize("registered", ["before", "after"])
def test_a_skipped_step_leaves_the_buffers(registered: str) -> None:
    """In the middle of a run, and as the first step after a load."""
    model = network()
    optimizer = RMSprop(model.parameters(), ema=0.9, nonfinite="skip")
    optimizer.average_buffers(model)
    trained(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    again = network()
    resumed = RMSprop(again.parameters(), ema=0.9, nonfinite="skip")
    if registered == "before":
        resumed.average_buffers(again)
    resumed.load_state_dict(saved)
    if registered == "after":
        resumed.average_buffers(again)
    for net, own in ((model, optimizer), (again, resumed)):
        net(torch.randn(16, 5)).square().sum().backward()
        net[1].running_mean += 1
        net[0].weight.grad[0, 0] = math.inf
        own.step()
        assert own.skipped.total == 1
        held = own.state_dict()["ema_buffers"]
        assert all(torch.equal(x, held[name]) for name, x in saved["ema_buffers"].items())


def test_buffers_follow_while_some_parameters_are_frozen() -> None:
    """As torch's AveragedModel averages them, also if the first layer no longer steps."""
    model = network()
    optimizer = RMSprop(model.parameters(), lr=0.01, ema=0.9)
    optimizer.average_buffers(model)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer.register_step_post_hook(lambda *_: theirs.update_parameters(model))
    trained(model, optimizer, 3)
    model[0].requires_grad_(False)
    trained(model, optimizer, 4, seed=1)
    model[0].requires_grad_(True)
    model[3].requires_grad_(False)
    trained(model, optimizer, 2, seed=2)
    with optimizer.averaged():
        for (name, x), y in zip(model.named_buffers(), theirs.module.buffers(), strict=True):
            if x.is_floating_point():
                torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7, msg=name)


def test_a_copy_of_the_optimizer_keeps_the_buffers_averages() -> None:
    """By copy and by pickle, of a model that average_buffers was given."""
    model = network()
    optimizer = RMSprop(model.parameters(), ema=0.9)
    optimizer.average_buffers(model)
    trained(model, optimizer, 3)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        held, kept = (own.state_dict()["ema_buffers"] for own in (other, optimizer))
        assert all(torch.equal(x, held[name]) for name, x in kept.items())


@pytest.mark.parametrize("sparse", ["lazy", "dense"])
def test_sparse_rows(sparse: str) -> None:
    """Rows without a gradient are averaged too, since their weights are what the model uses."""
    table = nn.Embedding(6, 3, sparse=True)
    optimizer = RMSprop(table.parameters(), lr=0.1, ema=0.5, sparse=sparse)
    e = table.weight.detach().clone()
    for t in range(1, 6):
        optimizer.zero_grad()
        table(torch.tensor([t % 3, 0])).sum().backward()
        optimizer.step()
        e = table.weight.detach().clone() if t == 1 else 0.5 * e + 0.5 * table.weight.detach()
    torch.testing.assert_close(optimizer.state[table.weight]["ema"], e, rtol=1e-6, atol=1e-7)


def test_complex_parts_are_averaged() -> None:
    p = nn.Parameter(torch.tensor([1 + 2j, -3 - 1j]))
    optimizer = RMSprop([p], lr=0.1, ema=0.5, ema_warmup="tensorflow")
    start = p.detach().clone()
    p.grad = torch.tensor([1 - 1j, 2 + 0j])
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["ema"], start + 9 / 11 * (p.detach() - start))


@pytest.mark.parametrize("compiled", mostly_long([False, True], lambda _, compiled: not compiled))
def test_other_ways_to_step(compiled: bool) -> None:
    """torch.compile, and steps in backward, average as the plain step does."""
    plain = _plain()
    optimizer = RMSprop(plain.parameters(), lr=0.01, ema=0.9, ema_warmup="timm")
    trained(plain, optimizer, 5)
    expected = [optimizer.state[p]["ema"] for p in plain.parameters()]
    other = _plain()
    if compiled:
        found = RMSprop(other.parameters(), lr=0.01, ema=0.9, ema_warmup="timm")
        step = torch.compile(found.step, backend="eager")
        draw = torch.Generator().manual_seed(0)
        for _ in range(5):
            found.zero_grad()
            other(torch.randn(16, 5, generator=draw)).square().sum().backward()
            step()
    else:
        found = step_in_backward(other, lr=0.01, ema=0.9, ema_warmup="timm")
        trained(other, found, 5)
    averages = [found.state[p]["ema"] for p in other.parameters()]
    torch.testing.assert_close(averages, expected, rtol=1e-5, atol=1e-6)


def _plain() -> nn.Module:
    """Without BatchNorm, under which the gradient of a bias is rounding alone."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))


def test_only_groups_that_ask_for_it() -> None:
    a, b = weights((3,), (4,))
    optimizer = RMSprop([{"params": [a]}, {"params": [b], "ema": None}], ema=0.9)
    b.grad, a.grad = torch.ones(4), torch.ones(3)
    optimizer.step()
    assert "ema" in optimizer.state[a]
    assert "ema" not in optimizer.state[b]
    kept = b.detach().clone()
    with optimizer.averaged():
        assert torch.equal(b, kept)


# --- averaged() and average_into() ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_averaged_gives_the_weights_back_after_anything(dtype: torch.dtype) -> None:
    params = weights((5,), (2, 3), dtype=dtype)
    optimizer = RMSprop(params, lr=0.1, ema=0.9, compensation=dtype == torch.bfloat16)
    averages = [e.clone() for e in stepped(optimizer, 4)]
    kept = [p.detach().clone() for p in params]
    with optimizer.averaged():
        assert all(torch.equal(p, e.to(dtype)) for p, e in zip(params, averages, strict=True))
    with pytest.raises(KeyboardInterrupt), optimizer.averaged():
        raise KeyboardInterrupt
    assert all(map(torch.equal, params, kept))
    assert all(torch.equal(optimizer.state[p]["ema"], e) for p, e in zip(params, averages, strict=True))
    stepped(optimizer)  # trains on


def test_what_averaged_refuses(tmp_path: Any) -> None:
    """Nothing that trains or saves runs on the averages, and nothing changes by trying."""
    model = network()
    optimizer = RMSprop(model.parameters(), ema=0.9)
    trained(model, optimizer, 3)
    saved = optimizer.state_dict()
    calls = {
        "step()": optimizer.step,
        "averaged()": lambda: optimizer.averaged().__enter__(),
        "average_into()": optimizer.average_into,
        "average_buffers()": lambda: optimizer.average_buffers(model),
        "state_dict()": optimizer.state_dict,
        "load_state_dict()": lambda: optimizer.load_state_dict(saved),
        "a copy": lambda: pickle.dumps(optimizer),
    }
    with optimizer.averaged():
        kept = [p.detach().clone() for p in model.parameters()]
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=name.replace("(", r"\(").replace(")", r"\)") + " inside averaged"):
                call()
        with pytest.raises(RuntimeError, match="inside averaged"):
            checkpoint.save(tmp_path / "run.safetensors", model=model, optimizer=optimizer)
        assert all(map(torch.equal, model.parameters(), kept))
    assert not list(tmp_path.iterdir())
    copy.deepcopy(optimizer)


def test_an_average_must_exist() -> None:
    params = weights((3,))
    optimizer = RMSprop(params)
    stepped_grad = torch.ones(3)
    params[0].grad = stepped_grad
    optimizer.step()
    for name, call in (
        ("averaged", lambda: optimizer.averaged().__enter__()),
        ("average_into", optimizer.average_into),
        ("average_buffers", lambda: optimizer.average_buffers(network())),
    ):
        with pytest.raises(ValueError, match=rf"{name}\(\) needs an average of the weights: give ema="):
            call()


def test_average_into_the_trained_model_is_for_good() -> None:
    model = network()
    optimizer = RMSprop(model.parameters(), ema=0.9)
    optimizer.average_buffers(model)
    trained(model, optimizer, 4)
    with optimizer.averaged():
        expected = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer.average_into(model)
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())
    trained(model, optimizer, 1)


@pytest.mark.parametrize("named", [False, True])
def test_average_into_a_copy(named: bool) -> None:
    """By name where the optimizer has names, in any order of the groups; else by order. The original stays."""
    model = network()
    params = list(model.named_parameters()) if named else list(model.parameters())
    groups = [{"params": params[2:]}, {"params": params[:2]}] if named else params
    optimizer = RMSprop(groups, ema=0.9)
    optimizer.average_buffers(model)
    trained(model, optimizer, 4)
    kept = {name: x.clone() for name, x in model.state_dict().items()}
    other = copy.deepcopy(model)
    optimizer.average_into(other)
    assert all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())
    with optimizer.averaged():
        assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_average_into_another_model_is_refused() -> None:
    model = network()
    optimizer = RMSprop(model.parameters(), ema=0.9)
    trained(model, optimizer, 2)
    wider = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 2))
    with pytest.raises(ValueError, match=r"a parameter of shape \(9, 5\) where the optimizer has \(8, 5\)"):
        optimizer.average_into(wider)
    with pytest.raises(ValueError, match="a model with 2 parameters where the optimizer has 6"):
        optimizer.average_into(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module or None, but got 3"):
        optimizer.average_into(3)


# --- state ---


def test_state_goes_through_files_and_resumes_bitwise(tmp_path: Any) -> None:
    model = network()
    optimizer = RMSprop(model.parameters(), ema=0.9, ema_warmup="timm", clip_global_norm=0.5)
    optimizer.average_buffers(model)
    trained(model, optimizer, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    trained(model, optimizer, 3, seed=1)
    again = network()
    resumed = RMSprop(again.parameters(), ema=0.9, ema_warmup="timm", clip_global_norm=0.5)
    loaded = torch.load(tmp_path / "run.pt", weights_only=True)
    again.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    resumed.average_buffers(again)
    trained(again, resumed, 3, seed=1)
    ends = [
        [*m.state_dict().values(), *(o.state[p]["ema"] for p in m.parameters())]
        for m, o in ((model, optimizer), (again, resumed))
    ]
    assert all(map(torch.equal, *ends))
    buffers = [o.state_dict()["ema_buffers"] for o in (optimizer, resumed)]
    assert all(torch.equal(x, buffers[1][name]) for name, x in buffers[0].items())


def test_torch_loads_it_and_its_state_begins_an_average() -> None:
    model = network()
    optimizer = RMSprop(model.parameters(), ema=0.9)
    trained(model, optimizer, 2)
    theirs = torch.optim.RMSprop(model.parameters())
    theirs.load_state_dict(optimizer.state_dict())
    trained(model, theirs, 2)
    old = torch.optim.RMSprop(network().parameters())
    fresh = RMSprop(model.parameters(), ema=0.9)
    trained(model, torch.optim.RMSprop(model.parameters()), 1)
    fresh.load_state_dict(old.state_dict())
    weight = model[0].weight.detach().clone()
    trained(model, fresh, 1)
    assert fresh.param_groups[0]["ema"] == 0.9
    assert not torch.equal(weight, model[0].weight)
    assert "ema" in fresh.state[model[0].weight]


def test_keeping_settings_without_an_average_drops_it() -> None:
    """With a warning, and not silently kept to grow stale."""
    model = network()
    optimizer = RMSprop(model.parameters(), ema=0.9)
    trained(model, optimizer, 2)
    plain = RMSprop(model.parameters())
    with pytest.warns(UserWarning, match=r"averages of the weights \(ema\) of 6 parameters, which are dropped"):
        plain.load_state_dict(optimizer.state_dict(), hparams="keep")
    assert all("ema" not in plain.state[p] for p in model.parameters())
    trained(model, plain, 1)


def test_buffers_of_another_model_are_refused() -> None:
    model = network()
    optimizer = RMSprop(model.parameters(), ema=0.9)
    optimizer.average_buffers(model)
    trained(model, optimizer, 1)
    saved = optimizer.state_dict()
    wider = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9))
    fresh = RMSprop(network().parameters(), ema=0.9)
    fresh.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"average of the buffer '1\.running_mean' has shape"):
        fresh.average_buffers(wider)
    for bad in (3, {"a": 1}, {"1.running_mean": torch.zeros(3)}):
        with pytest.raises(ValueError, match="buffer"):
            optimizer.load_state_dict({**saved, "ema_buffers": bad})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema": 1.0}, r"Invalid ema: 1.0; ema takes the decay of the weights' average, 0 <= ema < 1"),
        ({"ema": -0.1}, "Invalid ema: -0.1"),
        ({"ema": math.nan}, "Invalid ema: nan"),
        ({"ema": "0.9"}, "Invalid ema: '0.9' is a str"),
        ({"ema": True}, "Invalid ema: True is a bool"),
        (
            {"ema": 0.9, "ema_warmup": "keras"},
            "Invalid ema_warmup: 'keras'; choose one of 'tensorflow', 'timm', or None",
        ),
        ({"ema": 0.9, "ema_start": -1}, "Invalid ema_start: -1; ema_start takes an integer from 0"),
        ({"ema": 0.9, "ema_interval": 0}, "Invalid ema_interval: 0; ema_interval takes an integer from 1"),
        ({"ema": 0.9, "ema_interval": 1.5}, "Invalid ema_interval: 1.5 is a float"),
        ({"ema_warmup": "timm", "ema_start": 3}, "ema_warmup='timm' and ema_start=3 needs an average"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        RMSprop(weights((3,)), **settings)


def test_shared_parameters_are_not_swapped() -> None:
    model = network()
    model.share_memory()
    optimizer = RMSprop(model.parameters(), ema=0.9).share_memory()
    trained(model, optimizer, 2)
    assert optimizer.state[model[0].weight]["ema"].is_shared()
    with pytest.raises(ValueError, match="averaged\\(\\) would give the averages to the other processes"):
        optimizer.averaged().__enter__()
    optimizer.average_into(copy.deepcopy(model))


def test_it_is_said() -> None:
    optimizer = RMSprop(weights((3,)), ema=0.999, ema_warmup="timm", ema_start=5, ema_interval=2)
    line = "[10] e ← d·e + (1−d)·p   d = min(0.999, 1 − k^(−2/3)) in update k, every 2 steps after step 5"
    assert line in repr(optimizer)
    assert line in optimizer.explain()
    assert "state (square_avg, ema): 8 bytes per element" in optimizer.explain()
    assert "[10] e ← 0.9·e + 0.1·p" in repr(RMSprop(weights((3,)), ema=0.9))
