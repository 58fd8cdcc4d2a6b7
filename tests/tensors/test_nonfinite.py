"""nonfinite=: NaN and infinity in gradients stop the whole step before anything is written, and are counted."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from rmsprop import RMSprop
from rmsprop.kernels import native
from rmsprop.tensors.nonfinite import Guard, unfinite

compiled = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
LARGE = native.GRAIN + 7  # a step that leaves the interpreter's lock
VALUES = [math.nan, math.inf, -math.inf]


def params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def give(tensors: list[nn.Parameter], bad: int | None = None, value: float = math.nan) -> None:
    """Gradients for all; of one of them the last element is not finite."""
    for i, p in enumerate(tensors):
        p.grad = torch.randn(p.shape).to(p.dtype)
        if i == bad:
            p.grad.view(-1)[-1] = value


def everything(optimizer: RMSprop, tensors: list[nn.Parameter]) -> list[torch.Tensor]:
    """Copies of parameters, gradients, state and counters."""
    kept = [p.detach().clone() for p in tensors] + [p.grad.clone() for p in tensors if p.grad is not None]
    for p in tensors:
        kept += [x.clone() for x in optimizer.state.get(p, {}).values()]
    return kept


def unchanged(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return len(before) == len(after) and all(
        torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9)) for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("shape", [(5,), (LARGE,)], ids=["small", "large"])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_skipped_step_writes_nothing(backend, shape, value, dtype):
    """First step, planned step, both groups: parameters, averages, counters and gradients stay bit for bit."""
    tensors = params(shape, (3,), dtype=dtype)
    groups = [{"params": tensors[:1]}, {"params": tensors[1:], "momentum": 0.9}]
    optimizer = RMSprop(groups, nonfinite="skip", backend=backend)
    give(tensors, bad=1, value=value)
    before = everything(optimizer, tensors)
    optimizer.step()
    assert unchanged(before, everything(optimizer, tensors))
    for _ in range(3):
        give(tensors)
        optimizer.step()
    for bad in (0, 1):
        give(tensors, bad=bad, value=value)
        before = everything(optimizer, tensors)
        optimizer.step()
        assert unchanged(before, everything(optimizer, tensors))
    give(tensors)
    optimizer.step()
    assert not unchanged(before, everything(optimizer, tensors))
    assert optimizer.skipped.total == 3
    assert all(float(optimizer.state[p]["step"]) == 4 for p in tensors)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_skips_change_nothing_about_the_run(backend):
    """A run with bad batches between good ones is, bit for bit, the run without them."""

    def run(bad: bool) -> list[torch.Tensor]:
        tensors = params((6, 5), (40,))
        optimizer = RMSprop(tensors, nonfinite="skip", backend=backend, momentum=0.5)
        for t in range(8):
            torch.manual_seed(t)
            if bad and t % 2:
                give(tensors, bad=t % 3 % 2)
                optimizer.step()
                torch.manual_seed(t)
            give(tensors)
            optimizer.step()
        return [p.detach() for p in tensors]

    assert all(torch.equal(a, b) for a, b in zip(run(bad=True), run(bad=False), strict=True))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_element_is_looked_at(dtype):
    """One bad element, wherever it is in vectors, blocks and tails, in the compiled look and in torch's."""
    weight = params((521,), dtype=dtype)
    optimizer = RMSprop(weight, nonfinite="skip", nonfinite_limit=None)
    give(weight)
    optimizer.step()
    plan = optimizer._stepper.plan
    assert plan is not None
    for i in range(521):
        weight[0].grad = torch.ones(521, dtype=dtype)
        weight[0].grad[i] = VALUES[i % 3]
        assert unfinite([weight[0].grad], torch.device("cpu")).tolist() == [True]
        optimizer.step()
    assert optimizer.skipped.total == 521
    assert optimizer._stepper.plan is plan


@compiled
def test_every_thread_looks():
    """A step of several threads finds a bad element at both ends and at the seams, and names the first."""
    tensors = params((3 * native.GRAIN + 5,), (2 * native.GRAIN,))
    optimizer = RMSprop(tensors, nonfinite="skip", nonfinite_limit=None)
    give(tensors)
    optimizer.step()
    for i in (0, 1, native.GRAIN - 1, native.GRAIN, 3 * native.GRAIN, 3 * native.GRAIN + 4):
        give(tensors)
        tensors[0].grad[i] = math.inf
        tensors[1].grad[7] = math.nan
        optimizer.step()
        assert optimizer.skipped.parameter == "parameter 0 of group 0"
    assert optimizer.skipped.total == 6
    give(tensors)
    tensors[1].grad[-1] = math.nan
    optimizer.step()
    assert optimizer.skipped.parameter == "parameter 1 of group 0"


def test_large_and_tiny_numbers_are_finite():
    """The largest, the smallest and subnormal numbers pass, in every dtype."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        info = torch.finfo(dtype)
        weight = nn.Parameter(torch.zeros(6, dtype=dtype))
        optimizer = RMSprop([weight], nonfinite="raise")
        for _ in range(2):
            weight.grad = torch.tensor([info.max, info.min, info.tiny, info.tiny / 4, 0.0, -0.0], dtype=dtype)
            optimizer.step()


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_the_first_parameter_at_fault_is_named(backend):
    """By its name where parameters are named, else by its place; mixed dtypes keep the order of the group."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).to(torch.float64), nn.Linear(3, 3))
    optimizer = RMSprop(model.named_parameters(), nonfinite="skip", backend=backend)
    tensors = list(model.parameters())
    give(tensors)
    optimizer.step()
    for first, second in ((2, 5), (1, 2), (3, 4), (0, 5)):
        give(tensors, bad=first)
        tensors[second].grad.view(-1)[0] = math.inf
        optimizer.step()
        names = [name for name, _ in model.named_parameters()]
        assert optimizer.skipped.parameter == repr(names[first])


@pytest.mark.parametrize("shape", [(5,), (LARGE,)], ids=["small", "large"])
def test_raise_stops_before_anything_is_written(shape):
    """nonfinite="raise" names the parameter, and leaves everything as it was; the next good step goes on."""
    tensors = params(shape, (2,))
    optimizer = RMSprop(tensors, nonfinite="raise")
    for _ in range(3):
        before = everything(optimizer, tensors)
        give(tensors, bad=1)
        before = everything(optimizer, tensors)
        with pytest.raises(RuntimeError, match="the gradient of parameter 1 of group 0 holds NaN or infinity"):
            optimizer.step()
        assert unchanged(before, everything(optimizer, tensors))
        give(tensors)
        optimizer.step()
    assert optimizer.skipped.total == 0


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_too_many_in_a_row_raise(backend):
    """The limit counts skips in a row only; the error names the parameter, the count and what to do."""
    tensors = params((4,))
    optimizer = RMSprop(tensors, nonfinite="skip", nonfinite_limit=3, backend=backend)
    for _ in range(4):
        for bad in (0, 0, None):
            give(tensors, bad=bad)
            optimizer.step()
    assert (optimizer.skipped.total, optimizer.skipped.in_a_row, optimizer.skipped.last) == (8, 0, False)
    for _ in range(2):
        give(tensors, bad=0)
        optimizer.step()
    assert optimizer.skipped.last
    with pytest.raises(RuntimeError, match=r"3 steps in a row were skipped, and nonfinite_limit=3 stops there"):
        optimizer.step()
    free = RMSprop(tensors, nonfinite="skip", nonfinite_limit=None)
    for _ in range(300):
        free.step()
    assert free.skipped.in_a_row == 300


def test_propagate_is_the_default():
    """Without being asked nothing looks: NaN reaches the parameter, as in torch."""
    tensors = params((4,))
    optimizer = RMSprop(tensors)
    give(tensors, bad=0)
    optimizer.step()
    assert tensors[0].isnan().any()
    assert optimizer.skipped.total == 0


def test_sparse_and_complex_gradients_are_looked_at():
    """A row of a sparse gradient, or the imaginary part of a complex one, stops the step as any other."""
    table, waves = nn.Parameter(torch.ones(6, 2)), nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = RMSprop([table, waves], nonfinite="skip", sparse="lazy")

    def step(row: float, part: float) -> None:
        values = torch.tensor([[1.0, row]])
        table.grad = torch.sparse_coo_tensor([[4]], values, (6, 2), check_invariants=True)
        waves.grad = torch.complex(torch.ones(3), torch.tensor([1.0, part, 1.0]))
        optimizer.step()

    step(1.0, 1.0)
    kept = table.detach().clone(), waves.detach().clone()
    step(math.nan, 1.0)
    assert optimizer.skipped.parameter == "parameter 0 of group 0"
    step(1.0, math.inf)
    assert optimizer.skipped.parameter == "parameter 1 of group 0"
    assert torch.equal(kept[0], table)
    assert torch.equal(kept[1], waves)


def test_a_closures_gradients_are_looked_at():
    """step(closure) evaluates, looks, and returns the loss of a step that it leaves out."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = RMSprop([weight], nonfinite="skip")
    losses = iter([1.0, math.nan, 2.0])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight * next(losses)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = weight.detach().clone()
    assert optimizer.step(closure).isnan()
    assert torch.equal(before, weight)
    optimizer.step(closure)
    assert not torch.equal(before, weight)


def test_clipping_does_not_hide_it():
    """A global norm of NaN would spread to every gradient: the guard looks before any clipping."""
    tensors = params((4,), (5,))
    optimizer = RMSprop(tensors, nonfinite="skip", clip_global_norm=1.0)
    give(tensors)
    optimizer.step()
    give(tensors, bad=1)
    before = everything(optimizer, tensors)
    optimizer.step()
    assert unchanged(before, everything(optimizer, tensors))
    assert optimizer.skipped.parameter == "parameter 1 of group 0"


def test_a_scaler_keeps_its_own_counsel():
    """Under amp_in_step an overflow is the scaler's own business: it skips, the guard neither counts nor raises."""
    tensors = params((4,))
    optimizer = RMSprop(tensors, nonfinite="raise", amp_in_step=True, capturable=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(tensors[0].sum() * math.inf).backward()
    before = tensors[0].detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(before, tensors[0])
    assert optimizer.skipped.total == 0


def test_copies_and_pickles_keep_the_guard_and_count_anew():
    """A deep copy and a pickle have the mode and the limit; an old pickle has none."""
    tensors = params((4,))
    optimizer = RMSprop(tensors, nonfinite="skip", nonfinite_limit=2)
    give(tensors, bad=0)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.skipped.total == 0
        weight = other.param_groups[0]["params"][0]
        weight.grad = torch.full_like(weight, math.nan)
        other.step()
        with pytest.raises(RuntimeError, match="nonfinite_limit=2"):
            other.step()
    old = RMSprop.__new__(RMSprop)
    old.__setstate__(torch.optim.RMSprop(tensors).__getstate__())
    assert old.skipped.total == 0


@pytest.mark.parametrize(
    ("words", "error", "sentence"),
    [
        (
            dict(nonfinite="ignore"),
            ValueError,
            "Invalid nonfinite: 'ignore'; choose one of 'propagate', 'skip', 'raise'",
        ),
        (dict(nonfinite=True), ValueError, "Invalid nonfinite: True"),
        (dict(nonfinite_limit=0), ValueError, "nonfinite_limit takes an integer >= 1"),
        (dict(nonfinite_limit=2.5), TypeError, "Invalid nonfinite_limit: 2.5 is a float"),
        (dict(nonfinite_limit=True), TypeError, "Invalid nonfinite_limit: True is a bool"),
    ],
    ids=str,
)
def test_other_words_are_refused(words, error, sentence):
    """A mode that is none, or a limit that counts nothing: one sentence."""
    with pytest.raises(error, match=sentence):
        RMSprop(params((2,)), **words)


def test_it_is_of_the_whole_optimizer():
    """A group cannot have a mode of its own: one bad gradient stops all groups."""
    with pytest.raises(TypeError, match="nonfinite='skip' in a parameter group"):
        RMSprop([{"params": params((2,)), "nonfinite": "skip"}])


def test_explain_says_what_was_skipped():
    """explain() has the mode, the counts and the culprit; repr() the mode."""
    tensors = params((3,))
    optimizer = RMSprop(tensors, nonfinite="skip")
    assert "is skipped: 0 so far, 100 in a row raise" in optimizer.explain()
    give(tensors, bad=0)
    optimizer.step()
    assert "1 so far, the last because of parameter 0 of group 0" in optimizer.explain()
    assert "nonfinite='skip'" in repr(optimizer)
    assert "nonfinite='raise'" in RMSprop(tensors, nonfinite="raise").explain()
    assert "nonfinite" not in RMSprop(tensors).explain()


def test_a_step_without_gradients_passes():
    """Nothing to look at is nothing to stop."""
    tensors = params((3,), (0,))
    optimizer = RMSprop(tensors, nonfinite="raise")
    optimizer.step()
    tensors[1].grad = torch.zeros(0)
    optimizer.step()
    assert isinstance(optimizer._stepper.guard, Guard)


@pytest.mark.long
def test_a_compiled_step_is_guarded():
    """Inside torch.compile the look is left to Python: skips write nothing, count, and compile one graph at most."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tensors = params((5,))
    optimizer = RMSprop(tensors, nonfinite="skip")
    step = torch.compile(optimizer.step, backend="eager")
    graphs = []
    for t in range(8):
        give(tensors, bad=0 if t in (3, 4, 6) else None)
        before = tensors[0].detach().clone()
        step()
        assert torch.equal(before, tensors[0]) == (t in (3, 4, 6))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert (optimizer.skipped.total, optimizer.skipped.in_a_row) == (3, 0)
    assert graphs[2] <= graphs[-1] <= graphs[2] + 1
    assert len(set(graphs[5:])) == 1


@pytest.mark.parametrize("sparse", ["lazy", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_duplicates_of_a_sparse_gradient_are_looked_at_as_the_step_sums_them(dtype, sparse):
    """Two finite entries of a row whose sum is infinite stop the step; infinities that are not there do not."""
    big = torch.finfo(dtype).max
    for first, second, stops in ((big, big, True), (big, -big, False), (big, 0.0, False), (math.inf, -1.0, True)):
        table = nn.Parameter(torch.ones(4, 2, dtype=dtype))
        before = table.detach().clone()
        optimizer = RMSprop([table], nonfinite="skip", sparse=sparse, eps=1.0)
        values = torch.tensor([[first, 1.0], [second, 1.0]], dtype=dtype)
        table.grad = torch.sparse_coo_tensor([[2, 2]], values, (4, 2), check_invariants=True)
        optimizer.step()
        assert optimizer.skipped.total == stops
        assert torch.equal(table, before) == stops
        assert not table.grad.is_coalesced()
        assert torch.isfinite(table).all()


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_the_parameter_at_fault_is_named_whatever_the_groups(backend):
    """Groups of two dtypes, frozen groups, groups without gradients: the first in the groups' order is named."""
    wide = params((3,), (3,), dtype=torch.float64)
    narrow, frozen = params((3,), (3,), (3,)), params((3,))
    frozen[0].requires_grad_(False)
    mixed = [("n0", narrow[0]), ("w0", wide[0]), ("n1", narrow[1]), ("w1", wide[1])]
    groups = [[("f", frozen[0])], mixed, [("n2", narrow[2])]]
    optimizer = RMSprop([{"params": group} for group in groups], nonfinite="skip", backend=backend)
    named = [pair for group in groups[1:] for pair in group]
    for step in range(6):
        for late in range(len(named)):
            for first in range(late + 1):
                if step < 2 and (first or late):
                    continue
                for i, (_, p) in enumerate(named):
                    p.grad = torch.full_like(p, math.nan if step > 1 and i in (first, late) else 1.0)
                optimizer.step()
                if step > 1:
                    assert optimizer.skipped.parameter == repr(named[first][0])


def test_every_backend_counts_alike():
    """Skips in all, in a row, and their end, over steps with good, bad and no gradients, from the first step on."""
    seen = []
    for settings in ({}, dict(backend="eager"), dict(foreach=True), dict(clip_norm=1.0), dict(capturable=True)):
        tensors = params((3,), (LARGE,))
        optimizer = RMSprop(tensors, nonfinite="skip", nonfinite_limit=None, **settings)
        seen.append([])
        for what in "bbgnbnbbngggbnngb":
            give(tensors, bad=1 if what == "b" else None)
            if what == "n":
                optimizer.zero_grad()
            optimizer.step()
            seen[-1].append((optimizer.skipped.total, optimizer.skipped.in_a_row, optimizer.skipped.last))
    assert all(own == seen[0] for own in seen)
    assert [row for _, row, _ in seen[0]] == [1, 2, 0, 0, 1, 0, 1, 2, 0, 0, 0, 0, 1, 0, 0, 0, 1]


def test_a_load_begins_a_new_row():
    """Going back to a checkpoint, as the error of the limit advises, is followed by as many skips as ever."""
    tensors = params((3,))
    optimizer = RMSprop(tensors, nonfinite="skip", nonfinite_limit=3)
    give(tensors)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        for _ in range(2):
            give(tensors, bad=0)
            optimizer.step()
        with pytest.raises(RuntimeError, match="3 steps in a row were skipped"):
            optimizer.step()
        optimizer.load_state_dict(saved)
        assert optimizer.skipped.in_a_row == 0
    assert optimizer.skipped.total == 6
