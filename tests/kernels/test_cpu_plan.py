"""A plan is never stale: whatever moved since the last step, the next one is what plain torch would have done."""

import copy
import dataclasses
import gc
import multiprocessing
import os
import pickle
import threading
import warnings
import weakref
from itertools import product

import alone
import pytest
import torch
from allocated import peak
from torch import Tensor

from rmsprop import RMSprop, kernels
from rmsprop.kernels import native, plan
from rmsprop.kernels.plan import Plan
from rmsprop.step import Stepper

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

KW = {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "momentum": 0.9, "centered": True}


class Pair:
    """The same parameters stepped by the kernel, with its plan, and by plain torch.

    Both get gradients from one generator; `moved` says whether the plan was dropped since the last look.
    """

    def __init__(self, shapes: tuple = ((3, 4), (4,), (1,), ()), **settings: object) -> None:
        self.generator = torch.Generator().manual_seed(0)
        start = [torch.randn(shape, generator=self.generator) for shape in shapes]
        self.params = [[torch.nn.Parameter(x.clone()) for x in start] for _ in range(2)]
        settings = {**KW, **settings}
        self.fast = RMSprop(self.params[0], **settings)
        self.slow = RMSprop(self.params[1], backend="eager", **settings)

    def __iter__(self):
        return iter((self.fast, self.slow))

    def gradients(self, at: tuple[int, ...] | None = None) -> None:
        for k, (p, q) in enumerate(zip(*self.params, strict=True)):
            p.grad = q.grad = None
            if at is None or k in at:
                p.grad = torch.randn(p.shape, generator=self.generator)
                q.grad = p.grad.clone()

    def step(self, times: int = 1, at: tuple[int, ...] | None = None) -> None:
        for _ in range(times):
            self.gradients(at)
            for optimizer in self:
                optimizer.step()
        self.check()

    def check(self) -> None:
        for p, q in zip(*self.params, strict=True):
            assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)
            a, b = self.fast.state.get(p, {}), self.slow.state.get(q, {})
            assert a.keys() == b.keys()
            for name in a:
                assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5), name

    @property
    def plan(self) -> Plan | None:
        return self.fast._stepper.plan


def each(pair: Pair):
    """Both optimizers with their parameters."""
    return zip(pair, pair.params, strict=True)


def replace_state_tensor(pair: Pair) -> None:
    for optimizer, params in each(pair):
        optimizer.state[params[0]]["square_avg"] = torch.full((3, 4), 7.0)


def replace_state_entry(pair: Pair) -> None:
    for optimizer, params in each(pair):
        optimizer.state[params[1]] = {name: x.clone() + 1 for name, x in optimizer.state[params[1]].items()}


def swap_state_entries(pair: Pair) -> None:
    for optimizer, params in each(pair):
        state = optimizer.state
        state[params[2]]["step"], state[params[3]]["step"] = torch.tensor(5.0), torch.tensor(6.0)


def drop_state_entry(pair: Pair) -> None:
    for optimizer, params in each(pair):
        del optimizer.state[params[1]]


def drop_slot(pair: Pair) -> None:
    for optimizer, params in each(pair):
        del optimizer.state[params[1]]["momentum_buffer"]


def clear_state(pair: Pair) -> None:
    for optimizer, _ in each(pair):
        optimizer.state.clear()


def new_state_dict(pair: Pair) -> None:
    for optimizer, _ in each(pair):
        fresh = type(optimizer.state)(dict)
        fresh.update({p: {k: x.clone() * 2 for k, x in entry.items()} for p, entry in optimizer.state.items()})
        optimizer.state = fresh


def edit_step(pair: Pair) -> None:
    for optimizer, params in each(pair):
        optimizer.state[params[0]]["step"].fill_(100)
        optimizer.state[params[1]]["step"] = torch.tensor(50.0)


def step_in_double(pair: Pair) -> None:
    for optimizer, params in each(pair):
        optimizer.state[params[0]]["step"].data = torch.tensor(3.0, dtype=torch.float64)


def swap_data(pair: Pair) -> None:
    for _, params in each(pair):
        params[0].data = torch.ones(3, 4)


def data_in_another_layout(pair: Pair) -> None:
    for _, params in each(pair):
        params[0].data = torch.ones(4, 3).t()


def transpose_everything(pair: Pair) -> None:
    for optimizer, params in each(pair):
        params[0].data = params[0].data.t()
        for slot in ("square_avg", "grad_avg", "momentum_buffer"):
            optimizer.state[params[0]][slot].t_()


def to_double(pair: Pair) -> None:
    for _, params in each(pair):
        params[0].data = params[0].data.double()
        params[0].grad = None


def resize_state(pair: Pair) -> None:
    for optimizer, params in each(pair):
        v = optimizer.state[params[1]]["square_avg"]
        v.set_(torch.full((4,), 3.0))


def swap_tensors(pair: Pair) -> None:
    for _, params in each(pair):
        other = torch.nn.Parameter(torch.full((4,), 2.0))
        params[1].grad = None
        torch.utils.swap_tensors(params[1], other)


def append_parameter(pair: Pair) -> None:
    for optimizer, params in each(pair):
        params.append(torch.nn.Parameter(torch.ones(5)))
        optimizer.param_groups[0]["params"].append(params[-1])


def replace_parameter(pair: Pair) -> None:
    for optimizer, params in each(pair):
        params[2] = torch.nn.Parameter(params[2].detach().clone())  # equal, and another
        optimizer.param_groups[0]["params"][2] = params[2]


def new_params_list(pair: Pair) -> None:
    for optimizer, params in each(pair):
        params.reverse()
        optimizer.param_groups[0]["params"] = list(params)


def shorter_params_list(pair: Pair) -> None:
    for optimizer, params in each(pair):
        optimizer.param_groups[0]["params"] = params[:2]


def add_group(pair: Pair) -> None:
    for optimizer, params in each(pair):
        params.append(torch.nn.Parameter(torch.ones(2, 2)))
        optimizer.add_param_group({"params": params[-1:], "lr": 0.5, "momentum": 0.0})


def drop_group(pair: Pair) -> None:
    add_group(pair)
    for optimizer, params in each(pair):
        optimizer.param_groups.pop(0)
        del params[:-1]


def replace_group(pair: Pair) -> None:
    for optimizer, _ in each(pair):
        optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.3}


def new_numbers(pair: Pair) -> None:
    for optimizer, _ in each(pair):
        optimizer.param_groups[0].update(lr=0.5, alpha=0.5, eps=1e-2, momentum=0.1, weight_decay=0.3)


def lr_as_tensor(pair: Pair) -> None:
    for optimizer, _ in each(pair):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.25)


def lr_in_place(pair: Pair) -> None:
    for optimizer, _ in each(pair):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    pair.step(3)
    for optimizer, _ in each(pair):
        optimizer.param_groups[0]["lr"].fill_(0.125)


def maximize(pair: Pair) -> None:
    for optimizer, _ in each(pair):
        optimizer.param_groups[0]["maximize"] = True


def load_state_dict(pair: Pair) -> None:
    for optimizer, _ in each(pair):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["square_avg"].fill_(9.0)
        optimizer.load_state_dict(saved)


CHANGES = (
    replace_state_tensor,
    replace_state_entry,
    swap_state_entries,
    drop_state_entry,
    drop_slot,
    clear_state,
    new_state_dict,
    edit_step,
    step_in_double,
    swap_data,
    data_in_another_layout,
    transpose_everything,
    resize_state,
    swap_tensors,
    append_parameter,
    replace_parameter,
    new_params_list,
    shorter_params_list,
    add_group,
    drop_group,
    replace_group,
    new_numbers,
    lr_as_tensor,
    lr_in_place,
    maximize,
    load_state_dict,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_plan_notices(change) -> None:
    """After any change by the user, the next steps are plain torch's, and a plan holds again soon."""
    pair = Pair()
    pair.step(3)
    assert pair.plan is not None
    for p in pair.params[0]:
        assert p.data_ptr()
    change(pair)
    pair.step(3)
    assert pair.plan is not None or change in (data_in_another_layout, transpose_everything, step_in_double)


@pytest.mark.parametrize("rows", [2, 5])
def test_a_shape_that_changes_under_the_same_strides_raises(rows: int) -> None:
    """A parameter that grew or shrank no longer fits its state: an error, as without a plan."""
    pair = Pair(shapes=((3, 4),))
    pair.step(3)
    for optimizer, params in each(pair):
        params[0].grad = None
        params[0].data = torch.ones(rows, 4)
        params[0].grad = torch.ones(rows, 4)
        with pytest.raises(RuntimeError):
            optimizer.step()


def test_momentum_may_begin_in_mid_run() -> None:
    """Raising momentum from 0 makes its buffer, and the plan learns of it."""
    pair = Pair(momentum=0.0)
    pair.step(3)
    for optimizer, _ in each(pair):
        optimizer.param_groups[0]["momentum"] = 0.9
    pair.step(3)
    for optimizer, _ in each(pair):
        optimizer.param_groups[0]["momentum"] = 0.0
    pair.step(3)


@pytest.mark.parametrize(("size", "settings"), [(40_000, {}), (40, {"nonfinite": "raise"})], ids=str)
def test_a_plan_in_use_is_not_used_again(size: int, settings: dict) -> None:
    """While another thread steps with the plan, without the GIL or with a guard, a step goes the long way."""
    pair = Pair(shapes=((size,), (7,)), **settings)
    pair.step(2)
    plan = pair.plan
    with plan._lock:
        pair.step()
    assert pair.plan is not plan


def test_a_plan_is_used() -> None:
    """From the second step on the plan steps, whatever gradients are handed to it, and is not made again."""
    pair = Pair()
    pair.step()
    plan = pair.plan
    pair.step(5)
    assert pair.plan is plan


def test_gradients_may_come_and_go() -> None:
    """A parameter without a gradient today keeps its value, state and count; the plan stays."""
    pair = Pair()
    pair.step(2)
    plan = pair.plan
    for at in ((0, 2), (1,), (), (3,), (0, 1, 2, 3)):
        pair.step(2, at)
    assert pair.plan is plan
    versions = [p._version for p in pair.params[0]]
    pair.step(1, (1,))
    assert [p._version - v for p, v in zip(pair.params[0], versions, strict=True)] == [0, 1, 0, 0]


def test_a_late_first_gradient_makes_state() -> None:
    """A parameter that never had a gradient joins when it gets one."""
    pair = Pair()
    pair.step(3, (0, 1))
    plan = pair.plan
    pair.step(1, (0, 1))
    assert pair.plan is plan
    pair.step(3, (0, 1, 2))
    pair.step(3)


@pytest.mark.parametrize(
    "odd",
    [
        lambda g: torch.randn(*reversed(g.shape)).t() if g.dim() == 2 else g,
        lambda g: torch.randn(*g.shape, 2)[..., 0],
        lambda g: torch.randn(()).expand(g.shape),
        lambda g: torch._neg_view(g.clone()) if g.numel() == 1 else g,
        lambda g: torch._efficientzerotensor(g.shape),
        lambda g: torch.nn.Parameter(g.clone()),
    ],
    ids=["transposed", "strided", "expanded", "negated", "zero", "parameter"],
)
def test_odd_gradients_are_looked_at_every_step(odd) -> None:
    """A gradient in another layout, negated lazily or without memory, is read right in the midst of a run."""
    pair = Pair()
    pair.step(3)
    for _ in range(2):
        pair.gradients()
        for p, q in zip(*pair.params, strict=True):
            p.grad = odd(p.grad)
            q.grad = p.grad.clone()
        for optimizer in pair:
            optimizer.step()
        pair.check()
        pair.step(2)


def test_a_sparse_gradient_raises_in_the_midst_of_a_run() -> None:
    """As without a plan: in words, and before anything moved."""
    pair = Pair(shapes=((3, 4), (4,)))
    pair.step(3)
    pair.gradients()
    kept = [p.detach().clone() for p in pair.params[0]]
    pair.params[0][1].grad = pair.params[0][1].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        pair.fast.step()
    assert all(torch.equal(p, q) for p, q in zip(kept, pair.params[0], strict=True))


def test_a_shifted_overlap_of_parameter_and_gradient_is_seen() -> None:
    """A gradient that is a shifted view of its own parameter is not stepped in one pass."""
    memory = torch.randn(9)
    w = torch.nn.Parameter(torch.randn(8))
    optimizer = RMSprop([w], backend="cpu")
    w.grad = torch.randn(8)
    optimizer.step()
    w.data = memory[:8]
    w.grad = torch.randn(8)
    optimizer.step()
    w.grad = memory[1:]
    with pytest.raises(RuntimeError, match="overlap"):
        optimizer.step()


def test_a_rule_that_changes_raises_with_a_plan_too() -> None:
    """Changing a switch in mid-run is the same error as without a plan."""
    pair = Pair()
    pair.step(3)
    pair.fast.param_groups[0]["eps_mode"] = "inside"
    pair.gradients()
    with pytest.raises(RuntimeError, match="eps_mode changed"):
        pair.fast.step()


def test_execution_switches_are_read_again() -> None:
    """foreach, differentiable and fused decide who steps, also in mid-run."""
    for name, value in (("foreach", True), ("foreach", False), ("fused", False)):
        pair = Pair()
        pair.step(2)
        pair.fast.param_groups[0][name] = value
        pair.step(2)
        assert pair.plan is None
        pair.fast.param_groups[0][name] = None
        pair.step(2)
        assert pair.plan is not None
    pair.fast.backend = "eager"
    pair.step(2)
    assert pair.plan is None


def test_two_dtypes_and_two_groups_are_one_call() -> None:
    """Buckets of every dtype and group step together, each with its own numbers."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    pairs = []
    for backend in ("auto", "eager"):
        generator = torch.Generator().manual_seed(1)
        params = [torch.nn.Parameter(torch.randn(20, generator=generator).to(d)) for d in (*dtypes, *dtypes)]
        groups = [{"params": params[:4], "lr": 0.1}, {"params": params[4:], "lr": 0.01, "weight_decay": 0.1}]
        optimizer = RMSprop(groups, backend=backend, momentum=0.9)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(20, generator=generator).to(p.dtype)
            optimizer.step()
        pairs.append((params, optimizer._stepper.plan))
    for p, q in zip(pairs[0][0], pairs[1][0], strict=True):
        assert torch.allclose(p, q, rtol=2e-2 if p.dtype in dtypes[2:] else 1e-5)
    assert pairs[0][1] is not None
    assert len(pairs[0][1]._works) == 8


def test_copies_and_pickles_leave_the_plan_behind() -> None:
    """A deep copy or a pickle steps its own parameters, not the original's."""
    for clone in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        pair = Pair()
        pair.step(3)
        other = clone(pair.fast)
        kept = [p.detach().clone() for p in pair.params[0]]
        for group in other.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        other.step()
        other.step()
        assert all(torch.equal(p, q) for p, q in zip(kept, pair.params[0], strict=True))
        pair.step(2)


def test_a_plan_holds_no_gradient() -> None:
    """zero_grad frees the gradients' memory: a plan keeps none alive."""
    pair = Pair()
    pair.step(3)
    born = torch.ones(3, 4)
    freed = []

    class Watched(Tensor):
        def __del__(self) -> None:
            freed.append(True)

    pair.params[0][0].grad = born.as_subclass(Watched)
    pair.fast.step()
    pair.fast.zero_grad()
    del born
    gc.collect()
    assert freed


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.10 says so of any profile
def test_hooks_and_profilers_see_every_step() -> None:
    """Step hooks run, and a profiler records the step, with a plan as without."""
    pair = Pair()
    pair.step(2)
    seen = []
    handles = [
        pair.fast.register_step_pre_hook(lambda *_: seen.append("pre")),
        pair.fast.register_step_post_hook(lambda *_: seen.append("post")),
    ]
    pair.step()
    assert seen == ["pre", "post"]
    for handle in handles:
        handle.remove()
    with torch.profiler.profile() as profile:
        pair.step()
    assert any(event.key == "Optimizer.step#RMSprop.step" for event in profile.key_averages())


def test_a_closure_steps_with_a_plan() -> None:
    """step(closure) evaluates it once, with gradients on, and returns its loss."""
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = RMSprop([w], backend="cpu")

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (w * w).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert optimizer._stepper.plan is not None


def test_modes_that_watch_operators_see_a_step() -> None:
    """Under a TorchDispatchMode the step is made of torch's operators."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return func(*args, **(kwargs or {}))

    pair = Pair()
    pair.step(2)
    with Count() as count:
        pair.fast.step()
    assert count.seen > 4


def test_two_optimizers_step_in_two_threads() -> None:
    """Each gives what it gives alone, above and below the size at which threads are used."""
    for size in (100, 200_000):
        pairs = [Pair(shapes=((size,), (7,))) for _ in range(2)]
        alone = Pair(shapes=((size,), (7,)))
        alone.step(20)
        threads = [threading.Thread(target=pair.step, args=(20,)) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for pair in pairs:
            assert all(torch.equal(p, q) for p, q in zip(pair.params[0], alone.params[0], strict=True))


def test_one_optimizer_stepped_from_two_threads_does_not_crash() -> None:
    """Racing steps of one optimizer mix their gradients, as in torch, and nothing else goes wrong."""
    w = torch.nn.Parameter(torch.zeros(200_000))
    optimizer = RMSprop([w], backend="cpu")
    pool = [torch.ones(200_000) for _ in range(50)]  # kept: torch 2.15 crashes where p.grad is freed while it is read

    def run() -> None:
        for grad in pool:
            w.grad = grad
            optimizer.step()

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.isfinite(w).all()


def test_state_that_another_thread_removes_after_a_step_makes_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan without a place for every parameter would read an entry that it has never looked up."""
    pair = Pair()
    pair.step()
    optimizer = pair.fast
    optimizer._stepper.drop_plan()
    parts_of = plan.parts_of

    def then_remove(groups: list, state: dict, left: set) -> list:
        found = list(parts_of(groups, state, left))
        state.pop(pair.params[0][1])
        return found

    monkeypatch.setattr(plan, "parts_of", then_remove)
    monkeypatch.setattr(plan, "whole_groups", lambda *_: [])
    pair.gradients()
    optimizer.step()
    assert pair.plan is None
    monkeypatch.undo()
    optimizer.step()  # makes the state again
    assert pair.plan is not None
    assert set(optimizer.state) == set(pair.params[0])


@pytest.mark.parametrize("switched", ["momentum", "centered"])
def test_a_setting_that_another_thread_changes_during_a_step_is_one_error(
    monkeypatch: pytest.MonkeyPatch, switched: str
) -> None:
    """The kernel gets no rule whose state was not read; nothing moves, and the next step is right."""
    pair = Pair()
    pair.step(2)
    group, before = pair.fast.param_groups[0], [p.detach().clone() for p in pair.params[0]]
    had, read = group[switched], Stepper.read

    def read_then_switch(stepper: Stepper, group: dict) -> tuple:
        found = read(stepper, group)
        group[switched] = type(had)()
        return found

    monkeypatch.setattr(Stepper, "read", read_then_switch)
    pair.fast._stepper.drop_plan()
    pair.gradients()
    with pytest.raises(RuntimeError, match=r"did another thread change the group during the step\?"):
        pair.fast.step()
    monkeypatch.undo()
    assert all(torch.equal(p, x) for p, x in zip(pair.params[0], before, strict=True))
    group[switched] = had
    for optimizer in pair:
        optimizer.step()
    pair.check()


def test_a_plan_holds_the_settings_of_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A switch that another thread changes between a step and its plan is seen by the next step."""
    pair = Pair()
    pair.step()
    plan_of = kernels.plan_of

    def switch_then_plan(*arguments: object) -> Plan | None:
        pair.fast.param_groups[0]["maximize"] = True
        return plan_of(*arguments)

    pair.fast._stepper.drop_plan()
    monkeypatch.setattr(kernels, "plan_of", switch_then_plan)
    pair.gradients()
    for optimizer in pair:
        optimizer.step()
    monkeypatch.undo()
    pair.slow.param_groups[0]["maximize"] = True
    outcome = []
    pair.gradients()
    for optimizer in pair:
        try:
            optimizer.step()
            outcome.append(None)
        except RuntimeError as error:
            outcome.append(str(error))
    assert outcome[0] == outcome[1]
    pair.check()


@pytest.mark.parametrize(
    ("call", "settings", "planned"),
    [
        *product(["step"], [{}, {"clip_global_norm": 1.0}, {"nonfinite": "raise"}], [True, False]),
        *product(["norms"], [{"clip_global_norm": 1.0}], [True, False]),
        ("unfinite", {"nonfinite": "raise"}, True),
    ],
    ids=str,
)
def test_what_another_thread_drops_lives_as_long_as_the_step_that_writes_it(
    monkeypatch: pytest.MonkeyPatch, call: str, settings: dict, planned: bool
) -> None:
    """Where the kernel runs without the GIL, another thread may replace parameters, gradients and state."""
    pair = Pair(shapes=((200_000,), (7,)), **settings)
    pair.step(2)
    pair.gradients()
    pair.slow.step()
    optimizer = pair.fast
    watched = [weakref.ref(x) for p in pair.params[0] for x in (p, p.grad, *optimizer.state[p].values())]
    kept = [x.clone() for p in pair.params[1] for x in (p, *pair.slow.state[p].values())]
    called, written = [], []

    def drop_then_call(*arguments: object) -> int:
        if not called:
            for p in pair.params[0]:
                written.extend([p.data, *(x.data for x in optimizer.state[p].values())])  # the memory alone
                p.grad = None
                optimizer.state[p].clear()
            del p
            optimizer.param_groups[0]["params"].clear()
            optimizer.state.clear()
            pair.params[0].clear()
            gc.collect()
            called.append([ref() is not None for ref in watched])
        return getattr(loaded, call)(*arguments)

    loaded = native.load()
    watching = dataclasses.replace(loaded, **{call: drop_then_call})
    if planned:
        optimizer._stepper.plan._loaded = watching
    else:
        optimizer._stepper.drop_plan()
        monkeypatch.setattr(native, "load", lambda: watching)
    optimizer.step()
    assert called == [[True] * len(watched)]
    assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(written, kept, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")  # of JAX, if it was imported
@pytest.mark.parametrize("size", [50, 200_000])
def test_an_optimizer_built_before_fork_steps_in_the_child(size: int) -> None:
    """Also where the parent has used its threads, which do not exist in the child."""
    pair = Pair(shapes=((size,), (7,)))
    pair.slow = pair.fast  # the comparison itself would wait for the parent's threads
    pair.params[1] = pair.params[0]
    pair.step(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork in a process with threads
        child = multiprocessing.get_context("fork").Process(target=_step_in_child, args=(pair.fast,))
        child.start()
    child.join(60)
    alive = child.is_alive()
    child.kill()
    assert not alive, "the child hangs"
    assert child.exitcode == 0


def _step_in_child(optimizer: RMSprop) -> None:
    before = optimizer.param_groups[0]["params"][0][:1].item()
    for _ in range(3):
        for p in optimizer.param_groups[0]["params"]:
            if p.grad is None:  # a spawned process is sent none; a forked one must not start torch's threads
                p.grad = torch.ones_like(p)
        optimizer.step()
    os._exit(0 if optimizer.param_groups[0]["params"][0][:1].item() != before else 1)


def test_a_spawned_process_steps() -> None:
    """An optimizer sent to a spawned process steps there."""
    pair = Pair(shapes=((50,),))
    pair.step(2)
    pair.gradients()
    child = alone.context().Process(target=_step_in_child, args=(pair.fast,))
    child.start()
    child.join(120)
    assert child.exitcode == 0


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13 warns about itself while it compiles
def test_compiled_steps_stay_right() -> None:
    """torch.compile traces the eager step, before and after steps with a plan."""
    pair = Pair(shapes=((3, 4),), momentum=0.9)
    pair.step(3)
    compiled = torch.compile(pair.fast.step, backend="eager")
    for _ in range(3):
        pair.gradients()
        compiled()
        pair.slow.step()
    pair.check()
    pair.step(2)


def test_a_step_allocates_nothing_that_grows() -> None:
    """Peak memory during a step does not grow with the parameters."""
    resource = pytest.importorskip("resource")
    w = torch.nn.Parameter(torch.zeros(1 << 22))
    w.grad = torch.ones(1 << 22)
    optimizer = RMSprop([w], backend="cpu", momentum=0.9, centered=True, weight_decay=0.1)
    optimizer.step()
    optimizer.step()
    assert peak(optimizer.step) < 4096
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5):
        optimizer.step()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 4096  # kB; the parameter has 16384
