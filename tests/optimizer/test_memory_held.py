"""What the user drops is freed at once: no cache owns what it watches, and none mistakes one object for another."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rmsprop import RMSprop
from rmsprop.in_backward import step_in_backward

SETTINGS = {
    "plain": {},
    "guarded": {"nonfinite": "skip"},
    "eager": {"backend": "eager"},
    "clipped": {"clip_norm": 1.0},
    "tensor lr": {"lr": torch.tensor(0.01)},
}


def stepped(count: int = 3, **settings: object) -> RMSprop:
    """An optimizer of as many groups, each with one parameter, that has stepped three times."""
    optimizer = RMSprop(
        [{"params": [nn.Parameter(torch.ones(5))]} for _ in range(count)], momentum=0.9, centered=True, **settings
    )
    for _ in range(3):
        step(optimizer)
    return optimizer


def step(optimizer: RMSprop) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def watched(optimizer: RMSprop, at: int) -> list[weakref.ref]:
    p = optimizer.param_groups[at]["params"][0]
    return [weakref.ref(x) for x in (p, p.grad, *optimizer.state[p].values())]


def clear_state(optimizer: RMSprop) -> list[weakref.ref]:
    """Reptile and federated rounds."""
    dropped = [x for i in range(3) for x in watched(optimizer, i)[2:]]
    optimizer.state.clear()
    return dropped


def replace_state(optimizer: RMSprop) -> list[weakref.ref]:
    dropped = [x for i in range(3) for x in watched(optimizer, i)[2:]]
    optimizer.state = type(optimizer.state)(dict)
    return dropped


def pop_entry(optimizer: RMSprop) -> list[weakref.ref]:
    dropped = watched(optimizer, 1)[2:]
    optimizer.state.pop(optimizer.param_groups[1]["params"][0])
    return dropped


def replace_slots(optimizer: RMSprop) -> list[weakref.ref]:
    dropped = watched(optimizer, 1)[2:]
    entry = optimizer.state[optimizer.param_groups[1]["params"][0]]
    entry.update({name: x.clone() for name, x in entry.items()})
    return dropped


def replace_entry(optimizer: RMSprop) -> list[weakref.ref]:
    p = optimizer.param_groups[1]["params"][0]
    dropped = watched(optimizer, 1)[2:]
    optimizer.state[p] = {name: x.clone() for name, x in optimizer.state[p].items()}
    return dropped


def replace_parameter(optimizer: RMSprop) -> list[weakref.ref]:
    """Densifying and pruning, as Gaussian splatting does."""
    dropped = watched(optimizer, 1)
    group = optimizer.param_groups[1]
    entry = optimizer.state.pop(group["params"][0])
    group["params"][0] = nn.Parameter(torch.ones(9))
    optimizer.state[group["params"][0]] = {name: torch.ones(9 if x.dim() else ()) for name, x in entry.items()}
    return dropped


def replace_list(optimizer: RMSprop) -> list[weakref.ref]:
    dropped = watched(optimizer, 1)
    group = optimizer.param_groups[1]
    del optimizer.state[group["params"][0]]
    group["params"] = [nn.Parameter(torch.ones(9))]
    return dropped


def remove_group(optimizer: RMSprop) -> list[weakref.ref]:
    dropped = watched(optimizer, 1)
    group = optimizer.param_groups.pop(1)
    del optimizer.state[group["params"][0]]
    return dropped


def replace_groups(optimizer: RMSprop) -> list[weakref.ref]:
    dropped = [x for i in range(3) for x in watched(optimizer, i)]
    optimizer.param_groups.clear()
    optimizer.state.clear()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(9))]})
    return dropped


def zero_grad(optimizer: RMSprop) -> list[weakref.ref]:
    dropped = [watched(optimizer, i)[1] for i in range(3)]
    optimizer.zero_grad()
    return dropped


def new_lr(optimizer: RMSprop) -> list[weakref.ref]:
    dropped = []
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.02)
    step(optimizer)
    for group in optimizer.param_groups:
        dropped.append(weakref.ref(group["lr"]))
        group["lr"] = 0.02
    return dropped


DROPS: tuple[Callable[[RMSprop], list[weakref.ref]], ...] = (
    clear_state,
    replace_state,
    pop_entry,
    replace_slots,
    replace_entry,
    replace_parameter,
    replace_list,
    remove_group,
    replace_groups,
    zero_grad,
    new_lr,
)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("drop", DROPS, ids=lambda f: f.__name__)
def test_what_is_dropped_is_freed_there_and_then(drop, settings) -> None:
    """No step, and no garbage collection, has to come in between; and the next step works."""
    optimizer = stepped(**SETTINGS[settings])
    gc.disable()
    try:
        held = [ref() for ref in drop(optimizer)]
    finally:
        gc.enable()
    assert held
    assert held == [None] * len(held)
    step(optimizer)
    step(optimizer)


def test_a_refused_step_keeps_nothing() -> None:
    """State that was made for it is taken back, and owned by nobody."""
    optimizer = stepped(2)
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late, nn.Parameter(torch.ones(4))]})
    late.grad = torch.ones(3)
    optimizer.param_groups[-1]["params"][1].grad = torch.eye(2).to_sparse()[0].to_dense().new_ones(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    ref = weakref.ref(late)
    del optimizer.param_groups[-1], late
    assert ref() is None


def test_a_hook_of_a_step_in_backward_owns_no_parameter() -> None:
    """A parameter that leaves the optimizer and the model is freed; one that stays there keeps its gradient."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = step_in_backward(model)
    for _ in range(3):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    group, gone, stays = optimizer.param_groups[0], model[1].weight, model[2].weight
    group["params"] = [p for p in group["params"] if p is not gone and p is not stays]
    for p in (gone, stays):
        optimizer.state.pop(p)
    ref = weakref.ref(gone)
    model[1] = nn.Linear(3, 3, bias=False)
    del gone, p
    assert ref() is None
    before = stays.detach().clone()
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert torch.equal(stays, before)
    assert stays.grad is not None


def test_an_optimizer_that_is_dropped_is_freed_with_all_it_has() -> None:
    """Neither the package nor the parameters keep it."""
    optimizer = stepped()
    refs = [weakref.ref(optimizer), *(x for i in range(3) for x in watched(optimizer, i))]
    del optimizer
    gc.collect()  # torch's Optimizer is in a cycle with its own hooks
    assert [ref() for ref in refs] == [None] * len(refs)


def test_no_object_is_mistaken_for_one_that_had_its_id() -> None:
    """Tensors, entries, groups and lists made anew at the same ids, for 200 steps: each step is torch's."""
    fast, slow = (
        cls([{"params": [nn.Parameter(torch.ones(5))]} for _ in range(2)], lr=0.01, momentum=0.9)
        for cls in (RMSprop, torch.optim.RMSprop)
    )
    generator = torch.Generator().manual_seed(0)
    reused = 0
    for turn in range(200):
        size = 3 + turn % 3
        seeds = torch.randn(2, size, generator=generator)
        for optimizer in (fast, slow):
            at = turn % 2
            group = optimizer.param_groups[at]
            p, how = group["params"][0], turn % 5
            before = {id(p), *map(id, optimizer.state.get(p, {}).values())}
            if how == 0:
                entry = optimizer.state.pop(p, None)
                del p, entry
                group["params"][0] = nn.Parameter(seeds[0].clone())
            elif how == 1:
                optimizer.state.clear()
            elif how == 2 and p in optimizer.state:
                entry = {name: x.clone() for name, x in optimizer.state.pop(p).items()}
                optimizer.state[p] = entry
            elif how == 3:
                optimizer.param_groups[at] = {**optimizer.param_groups[at], "params": list(group["params"])}
                del group
            p = optimizer.param_groups[at]["params"][0]
            reused += bool(before & {id(p), *map(id, optimizer.state.get(p, {}).values())}) and how == 0
            for own in optimizer.param_groups:
                for q in own["params"]:
                    q.grad = seeds[1][: q.numel()].clone() if q.numel() <= size else torch.ones_like(q)
            optimizer.step()
            del p, q, own
        params: list[list[Tensor]] = [[p for g in o.param_groups for p in g["params"]] for o in (fast, slow)]
        for p, q in zip(*params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_rule_is_remembered_of_parameters_and_not_of_a_group_that_is_gone() -> None:
    """A new group may have another rule, at whatever id; one that was copied may not."""
    optimizer = stepped(2)
    optimizer.param_groups[1] = {**optimizer.param_groups[1], "eps_mode": "inside"}
    with pytest.raises(RuntimeError, match="eps_mode changed"):
        step(optimizer)
    for mode in ("inside", "both", "floor", "outside"):
        optimizer.param_groups.pop()
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5))], "eps_mode": mode})
        step(optimizer)


def test_what_is_remembered_of_groups_does_not_grow() -> None:
    """A thousand groups that come and go leave no trace."""
    optimizer = stepped(1)
    for i in range(1000):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "weight_decay": i / 1000})
        if i % 100 == 0:
            step(optimizer)
        optimizer.state.pop(optimizer.param_groups.pop()["params"][0], None)
    step(optimizer)
    assert len(optimizer._stepper.checked) <= 2
    assert len(optimizer._stepper.rules) <= 2
