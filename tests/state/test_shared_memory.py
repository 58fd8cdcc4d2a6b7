"""share_memory(): processes that step one state, started by fork and by spawn."""

import copy
import multiprocessing
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import alone
import pytest
import torch
from paths import ROOT
from torch import nn

from rmsprop import RMSprop

# Another test of the same worker may have imported JAX, which warns of every fork.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")

FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
STARTS = [pytest.param("fork", marks=FORK), pytest.param("spawn", marks=pytest.mark.long)]
EVERYTHING = dict(momentum=0.9, centered=True, square_avg_init=1.0, lr=0.01)


def made(size: int = 3, **settings: Any) -> tuple[nn.Module, RMSprop]:
    """A shared model and its shared optimizer."""
    torch.manual_seed(0)
    model = nn.Linear(size, 2).share_memory()
    return model, RMSprop(model.named_parameters(), **settings).share_memory()


def step(model: nn.Module, optimizer: RMSprop, times: int = 1) -> None:
    for t in range(times):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5 + t)
        optimizer.step()


def elsewhere(start: str, work: Callable[..., None], *args: Any) -> None:
    """Run the work in another process, to its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork in a process with threads
        context = alone.context() if start == "forkserver" else torch.multiprocessing.get_context(start)
        process = context.Process(target=work, args=args)
        process.start()
    process.join(120)
    alive = process.is_alive()
    process.kill()
    assert not alive, "the process hangs"
    assert process.exitcode == 0


def tensors(optimizer: RMSprop) -> list[torch.Tensor]:
    return [value for entry in optimizer.state.values() for value in entry.values()]


@pytest.mark.parametrize(
    ("start", "settings"),
    [
        *(pytest.param("fork", settings, marks=FORK) for settings in ({}, EVERYTHING, {"backend": "eager"})),
        pytest.param("forkserver", EVERYTHING, marks=FORK),
        pytest.param("spawn", EVERYTHING, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_steps_of_another_process_are_steps_here(start: str, settings: dict) -> None:
    """Parameters, averages, buffers and counts are one memory: turns in two processes are one run."""
    model, optimizer = made(**settings)
    before = tensors(optimizer)
    elsewhere(start, step, model, optimizer, 3)
    step(model, optimizer, 2)
    if start == "fork":  # and back once more; a spawned process takes seconds to start
        elsewhere(start, step, model, optimizer, 1)
    torch.manual_seed(0)
    alone = nn.Linear(3, 2)
    ordinary = RMSprop(alone.named_parameters(), **settings)
    for times in (3, 2, 1) if start == "fork" else (3, 2):
        step(alone, ordinary, times)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), alone.parameters(), strict=True))
    for mine, theirs in zip(optimizer.state.values(), ordinary.state.values(), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert all(a is b for a, b in zip(before, tensors(optimizer), strict=True))


def _check(model: nn.Module, optimizer: RMSprop, step: float) -> None:
    names = {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} == names == {id(p) for p in optimizer.param_groups[0]["params"]}
    assert all(value.is_shared() for value in tensors(optimizer))
    assert all(entry["step"] == step for entry in optimizer.state.values())
    optimizer.param_groups[0]["lr"].fill_(0.125)


@pytest.mark.parametrize("start", STARTS)
def test_an_lr_that_is_a_tensor_is_shared(start: str) -> None:
    """One schedule then moves all; the model and the optimizer arrive as they belong together."""
    model, optimizer = made(lr=torch.tensor(0.5))
    step(model, optimizer)
    elsewhere(start, _check, model, optimizer, 1.0)
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_state_is_made_at_once_and_moved_in_place() -> None:
    """All slots and counts of a fresh start, without a step; what was there stays the same tensor with its values."""
    model = nn.Linear(3, 2)
    ordinary = RMSprop(model.parameters(), **EVERYTHING)
    step(model, ordinary, 2)
    old = {p: dict(entry) for p, entry in ordinary.state.items()}
    values = [value.clone() for value in tensors(ordinary)]
    ordinary.zero_grad()
    model.share_memory()
    assert ordinary.share_memory() is ordinary
    assert all(ordinary.state[p][name] is value for p, entry in old.items() for name, value in entry.items())
    assert all(torch.equal(a, b) for a, b in zip(values, tensors(ordinary), strict=True))
    frozen = nn.Linear(3, 2).share_memory()
    frozen.bias.requires_grad_(False)
    optimizer = RMSprop(frozen.parameters(), **EVERYTHING).share_memory()
    assert list(optimizer.state) == [frozen.weight]
    entry = optimizer.state[frozen.weight]
    assert set(entry) == {"step", "square_avg", "grad_avg", "momentum_buffer"}
    assert entry["square_avg"].eq(1).all()
    assert not entry["step"]
    assert not entry["momentum_buffer"].any()
    assert all(value.is_shared() for value in entry.values())


def _load(optimizer: RMSprop, saved: dict) -> None:
    optimizer.load_state_dict(saved, hparams="load")


@pytest.mark.parametrize("start", STARTS)
def test_a_load_in_one_process_is_seen_by_all(start: str) -> None:
    """load_state_dict writes where the others read."""
    other = nn.Linear(3, 2)
    source = RMSprop(other.named_parameters(), **EVERYTHING)
    step(other, source, 4)
    model, optimizer = made(**EVERYTHING)
    before = tensors(optimizer)
    elsewhere(start, _load, optimizer, source.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(tensors(optimizer), tensors(source), strict=True))
    step(model, optimizer)
    assert all(a is b for a, b in zip(before, tensors(optimizer), strict=True))


def test_a_load_never_leaves_the_shared_tensors() -> None:
    """Also where the saved state lacks parameters or slots, or has others: they are written in place."""
    model, optimizer = made(**EVERYTHING)
    step(model, optimizer, 2)
    before = {p: dict(entry) for p, entry in optimizer.state.items()}
    saved = copy.deepcopy(optimizer.state_dict())
    step(model, optimizer)
    del saved["state"][1]
    saved["state"][0]["step"] = 7
    saved["state"][0]["square_avg"] = saved["state"][0]["square_avg"].double()
    optimizer.load_state_dict(saved, hparams="keep")
    for p, entry in before.items():
        assert optimizer.state[p].keys() == entry.keys()
        assert all(optimizer.state[p][name] is value and value.is_shared() for name, value in entry.items())
    loaded, afresh = (optimizer.state[p] for p in (model.weight, model.bias))
    assert loaded["step"] == 7
    assert torch.equal(loaded["grad_avg"], saved["state"][0]["grad_avg"])
    assert not afresh["step"]
    assert afresh["square_avg"].eq(1).all()
    assert not afresh["momentum_buffer"].any()
    step(model, optimizer)
    assert all(value.is_shared() for value in tensors(optimizer))


def test_a_load_before_processes_start_may_bring_momentum() -> None:
    """What the loaded settings need and the state lacked is in shared memory too."""
    model, optimizer = made()
    source = torch.optim.RMSprop(model.parameters(), momentum=0.9)
    step(model, source)
    optimizer.zero_grad()
    optimizer.load_state_dict(source.state_dict(), hparams="load")
    assert all(value.is_shared() for value in tensors(optimizer))
    step(model, optimizer)
    assert optimizer.state[model.weight]["step"] == 2
    assert "momentum_buffer" in optimizer.state[model.weight]


def test_a_copy_is_an_ordinary_optimizer() -> None:
    """deepcopy leaves shared memory: the copy steps itself alone, and may make state when it likes."""
    model, optimizer = made()
    step(model, optimizer)
    other, twin = copy.deepcopy((model, optimizer))
    assert not any(value.is_shared() for value in tensors(twin))
    twin.param_groups[0]["momentum"] = 0.5
    step(other, twin)
    assert all(entry["step"] == 1 for entry in optimizer.state.values())


def test_state_that_others_would_not_see_is_refused() -> None:
    """Momentum raised later, a late group, a thawed parameter: until share_memory() is called again."""
    model, optimizer = made()
    optimizer.param_groups[0]["momentum"] = 0.9
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"'weight' has no momentum_buffer in shared memory.*share_memory\(\)"):
        step(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    step(model, optimizer.share_memory())
    late = nn.Parameter(torch.ones(2))
    late.share_memory_()
    optimizer.add_param_group({"params": [("late", late)]})
    late.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"'late' has no step in shared memory"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.share_memory()
    late.grad = torch.ones(2)
    optimizer.step()
    assert all(value.is_shared() for value in tensors(optimizer))
    half = nn.Linear(3, 2).bfloat16().share_memory()
    optimizer = RMSprop(half.named_parameters()).share_memory()
    optimizer.param_groups[0]["compensation"] = True
    with pytest.raises(RuntimeError, match="'weight' has no compensation in shared memory"):
        step(half, optimizer)


def test_what_is_not_shared_is_refused_before_anything_is_changed() -> None:
    """Parameters in a process's own memory, without a shape, or with a gradient in shared memory."""
    model = nn.Linear(3, 2)
    optimizer = RMSprop(model.named_parameters())
    with pytest.raises(ValueError, match=r"'weight' is not in shared memory.*model.share_memory\(\) first"):
        optimizer.share_memory()
    model.weight.grad = torch.ones(2, 3)
    model.share_memory()
    with pytest.raises(ValueError, match=r"gradient of parameter 'weight'.*zero_grad\(\) first"):
        optimizer.share_memory()
    assert not optimizer.state
    optimizer.zero_grad()
    optimizer.share_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that lazy modules are new
        lazy = nn.LazyLinear(2)
    with pytest.raises(ValueError, match=r"parameter 0 of its group has no shape yet"):
        RMSprop(lazy.parameters()).share_memory()


def _many(model: nn.Module, optimizer: RMSprop, times: int) -> None:
    torch.set_num_threads(1)
    for _ in range(times):
        for p in model.parameters():
            p.grad = 2 * p.detach()
        optimizer.step()


@FORK
@pytest.mark.parametrize("size", [50, 40_000])
def test_several_processes_step_at_once_without_locks(size: int) -> None:
    """Four forked processes, beside a parent whose threads have run: none hangs, and all move one minimum."""
    model, optimizer = made(size, lr=1e-3)
    step(model, optimizer)  # a parallel region, if it is large
    optimizer.zero_grad()
    for p in model.parameters():
        p.data.fill_(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=_many, args=(model, optimizer, 100)) for _ in range(4)]
        for child in children:
            child.start()
    for child in children:
        child.join(60)
    hung = [child for child in children if child.is_alive()]
    for child in hung:
        child.kill()
    assert not hung
    assert all(child.exitcode == 0 for child in children)
    assert 101 <= optimizer.state[model.weight]["step"] <= 401  # two that read one count at once lose one
    assert model.weight.detach().abs().max() < 0.9
    assert torch.isfinite(optimizer.state[model.weight]["square_avg"]).all()


@FORK
@pytest.mark.parametrize("episodes", [3, pytest.param(120, marks=pytest.mark.long)])
def test_the_example_learns(episodes: int) -> None:
    """Two workers of examples/a3c_cartpole.py play; in 120 episodes they learn to balance longer than by chance."""
    script = ROOT / "examples" / "a3c_cartpole.py"
    done = alone.run(script, "--episodes", episodes, "--workers", 2, "--start", "fork", timeout=120)
    done.check_returncode()
    lines = re.findall(r"^ *(\d+) episodes: the last (\d+) returned (\d+) on average$", done.stdout, re.MULTILINE)
    step = max(1, episodes // 10)
    assert [int(played) for played, *_ in lines] == list(range(step, episodes + 1, step))
    assert float(lines[-1][2]) > (40 if episodes == 120 else 0)
    assert re.search(r"^greedy policy: \d+ of 500$", done.stdout, re.MULTILINE)
