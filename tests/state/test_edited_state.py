"""State edited by hand is checked in all groups before one moves: the right step, or one sentence with its name."""

import copy
from collections import UserDict

import numpy as np
import pytest
import torch

from rmsprop import RMSprop

BACKENDS = ("auto", "eager")


def run(backend: str = "auto", **settings: object) -> tuple[RMSprop, list[torch.nn.Parameter]]:
    """Two groups that have stepped twice; the second holds "first" and "edited"."""
    params = [torch.nn.Parameter(torch.linspace(1, 2, 6).view(2, 3)) for _ in range(3)]
    groups = [{"params": [("other", params[0])]}, {"params": [("first", params[1]), ("edited", params[2])]}]
    optimizer = RMSprop(groups, lr=0.01, backend=backend, momentum=0.9, centered=True, **settings)
    for _ in range(2):
        gradients(params)
        optimizer.step()
    return optimizer, params


def gradients(params: list[torch.nn.Parameter]) -> None:
    for i, p in enumerate(params):
        p.grad = torch.linspace(-1, 1 + i, 6).view(2, 3)


def everything(optimizer: RMSprop, params: list[torch.nn.Parameter]) -> list:
    return copy.deepcopy([p.detach() for p in params] + [dict(optimizer.state[p]) for p in params])


def same(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and (a.is_meta or torch.equal(a.to_dense(), b.to_dense()))
    return type(a) is type(b) and repr(a) == repr(b)


def like(*shape: int, **kind: object) -> torch.Tensor:
    return torch.zeros(shape, **kind)


COUNTS = {
    "int": (7, 8),
    "zero": (0, 1),
    "float": (7.0, 8),
    "numpy": (np.int64(7), 8),
    "int64": (torch.tensor(7), 8),
    "int32 of one dimension": (torch.tensor([7], dtype=torch.int32), 8),
    "uint8": (torch.tensor(255, dtype=torch.uint8), 256),
    "bfloat16": (torch.tensor(256, dtype=torch.bfloat16), 257),
}
NO_COUNTS = {
    "negative": -1,
    "nan": float("nan"),
    "infinite": float("inf"),
    "bool": True,
    "text": "3",
    "None": None,
    "two": torch.zeros(2),
    "none": torch.zeros(0),
    "complex": torch.tensor(1j),
    "bool tensor": torch.tensor(True),
    "negative tensor": torch.tensor(-1),
    "meta": torch.tensor(1.0, device="meta"),
    "sparse": torch.ones(1).to_sparse(),
    "list": [0.0],
}
NO_SLOTS = {
    "array": np.zeros((2, 3), np.float32),
    "number": 0.0,
    "None": None,
    "list": [0.0] * 6,
    "shape": like(3, 2),
    "fewer dimensions": like(6),
    "broadcast": like(1, 3),
    "scalar": like(),
    "int64": like(2, 3, dtype=torch.int64),
    "bool": like(2, 3, dtype=torch.bool),
    "complex": like(2, 3, dtype=torch.complex64),
    "float8": like(2, 3).to(torch.float8_e4m3fn),
    "meta": like(2, 3, device="meta"),
    "sparse": like(2, 3).to_sparse(),
    "expanded": like(1, 3).expand(2, 3),
    "overlapping": like(4).as_strided((2, 3), (1, 1)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", COUNTS)
def test_a_plain_count_is_taken(name: str, backend: str) -> None:
    """`state[p]["step"] = 7`, or a tensor of whole numbers, goes on from there."""
    optimizer, params = run(backend, bias_correction=True)
    right, others = run(backend, bias_correction=True)
    count, after = COUNTS[name]
    optimizer.state[params[2]]["step"] = count
    right.state[others[2]]["step"].fill_(float(count))
    for _ in range(2):
        for one, own in ((optimizer, params), (right, others)):
            gradients(own)
            one.step()
    assert optimizer.state[params[2]]["step"].item() == after + 1
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("slot", "value"),
    [("step", value) for value in NO_COUNTS.values()]
    + [(slot, value) for value in NO_SLOTS.values() for slot in ("square_avg", "grad_avg", "momentum_buffer")],
    ids=[f"step {name}" for name in NO_COUNTS]
    + [f"{slot} {name}" for name in NO_SLOTS for slot in ("square_avg", "grad_avg", "momentum_buffer")],
)
def test_a_slot_that_cannot_step_is_refused_by_name_before_anything_moves(slot, value, backend) -> None:
    """The sentence names slot and parameter; no count, average or parameter of any group has changed."""
    optimizer, params = run(backend)
    optimizer.state[params[2]][slot] = value
    del optimizer.state[params[1]]["momentum_buffer"]  # what the refused step would have made is taken back
    before = everything(optimizer, params)
    gradients(params)
    with pytest.raises(RuntimeError, match=rf"^{slot} of parameter 'edited' is .+, but it must be") as raised:
        optimizer.step()
    assert len(str(raised.value)) < 400
    assert same(dict(enumerate(before)), dict(enumerate(everything(optimizer, params))))
    del optimizer.state[params[2]]  # the way out that the sentence names
    optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "of", ["square_avg", "grad_avg", "the parameter", "another's square_avg", "another", "shifted", "another's step"]
)
def test_a_slot_in_memory_that_the_step_writes_too_is_refused(of: str, backend: str) -> None:
    """A slot that is another slot, or a parameter, of its own or any other group would be written twice."""
    optimizer, params = run(backend)
    own, other = optimizer.state[params[2]], optimizer.state[params[0]]
    slot = "step" if of == "another's step" else "momentum_buffer"
    memory = torch.ones(8)
    own[slot] = {
        "square_avg": own["square_avg"],
        "grad_avg": own["grad_avg"],
        "the parameter": params[2].data,
        "another's square_avg": other["square_avg"],
        "another": params[0].data,
        "shifted": memory[2:].view(2, 3),
        "another's step": other["step"],
    }[of]
    if of == "shifted":
        own["square_avg"] = memory[:6].view(2, 3)
    before = everything(optimizer, params)
    gradients(params)
    with pytest.raises(RuntimeError, match=r"of parameter '\w+' shares memory with .*parameter '") as raised:
        optimizer.step()
    assert "'edited'" in str(raised.value)
    assert ("'other'" in str(raised.value)) == ("another" in of)
    assert same(dict(enumerate(before)), dict(enumerate(everything(optimizer, params))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_of_other_kinds_that_can_step_are_taken(backend: str) -> None:
    """Another floating-point dtype, another layout, one that requires grad, columns of one matrix: all step right."""
    optimizer, params = run(backend)
    right, others = run("eager")
    own = optimizer.state[params[2]]
    columns = torch.stack([own["grad_avg"], own["momentum_buffer"]], dim=-1)
    own["square_avg"] = own["square_avg"].double().requires_grad_()
    own["grad_avg"], own["momentum_buffer"] = columns[..., 0], columns[..., 1]
    optimizer.state[params[1]]["square_avg"] = optimizer.state[params[1]]["square_avg"].t().contiguous().t()
    for one, its in ((optimizer, params), (right, others)):
        gradients(its)
        one.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("entry", [None, 3, [], torch.ones(2)], ids=["None", "number", "list", "tensor"])
def test_an_entry_that_is_not_a_dict_is_refused(entry: object) -> None:
    """`state[p] = ...` takes a dict of tensors."""
    optimizer, params = run()
    optimizer.state[params[2]] = entry
    kept = [p.detach().clone() for p in params]
    gradients(params)
    with pytest.raises(RuntimeError, match="state of parameter 'edited' is"):
        optimizer.step()
    assert all(map(torch.equal, params, kept))


def test_a_list_of_parameters_that_holds_something_else_is_refused() -> None:
    """`params` of a group holds tensors alone, with a plan or without."""
    for times in (0, 2):
        w = torch.nn.Parameter(torch.ones(2))
        optimizer = RMSprop([w])
        for _ in range(times):
            w.grad = torch.ones(2)
            optimizer.step()
        w.grad = torch.ones(2)
        optimizer.param_groups[0]["params"].append("w")
        before = w.detach().clone()
        with pytest.raises(TypeError, match="holds 'w', a str, at index 1"):
            optimizer.step()
        assert torch.equal(w, before)


def test_a_recorded_step_refuses_a_leaf_that_requires_grad() -> None:
    """Under differentiable=True autograd lets nothing write such a slot in place."""
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = RMSprop([w], differentiable=True)
    x = w.clone()
    optimizer.param_groups[0]["params"][0] = x
    x.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[x]["square_avg"] = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="square_avg of parameter 0 of its group is a leaf that requires grad"):
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazy_views_are_refused_as_state(backend: str) -> None:
    """A slot or a count that is negated when it is read, or zero without memory, cannot be written."""
    for slot in ("step", "square_avg"):
        for lazy in (
            lambda x: torch._neg_view(x.clone()),
            lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
        ):
            optimizer, params = run(backend)
            own = optimizer.state[params[2]]
            own[slot] = lazy(own[slot])
            kept = [p.detach().clone() for p in params]
            gradients(params)
            with pytest.raises(RuntimeError, match=f"{slot} of parameter 'edited' is a lazy view"):
                optimizer.step()
            assert all(map(torch.equal, params, kept))


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_dict_in_the_place_of_torchs_makes_entries_as_torchs_does(kind) -> None:
    """optimizer.state = dict(...) makes no entry by itself: a parameter without one starts fresh."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = RMSprop(params, lr=0.1)
    optimizer.state = kind()
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [2, 2]
    optimizer.load_state_dict(optimizer.state_dict())
    assert type(optimizer.state) is kind
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [3, 3]
