"""Sparse gradients: lazy rows or dense decay, against the real frameworks and against dense gradients."""

import json

import numpy as np
import pytest
import torch
from cases import bucket_of
from paths import GOLDEN
from torch import nn

from rmsprop import RMSprop
from rmsprop.spec import Hyper
from rmsprop.tensors import sparse

with np.load(GOLDEN / "sparse.npz") as file:
    DESCRIBED = json.loads(str(file["description"]))
    ARRAYS = {name: file[name] for name in file.files}
CASES = [case for case in DESCRIBED["cases"] if case["rows"] != "dense, squares summed"]
assert CASES, "no sparse runs were found"
RTOL = {"float32": 1e-5, "float64": 1e-11}


def run(case: dict, **options: object) -> float:
    """The largest relative difference of our run from the recorded one."""
    dtype = getattr(torch, case["dtype"])
    start = ARRAYS["start"]
    table = nn.Parameter(torch.tensor(start, dtype=dtype))
    words = {**case["words"], case["lr_word"]: DESCRIBED["lrs"][0], **options}
    optimizer = RMSprop([table], dialect=case["dialect"], **words)
    worst = 0.0
    for t, lr in enumerate(DESCRIBED["lrs"]):
        optimizer.param_groups[0]["lr"] = lr
        indices = torch.tensor(ARRAYS[f"{case['sequence']}/{t}/indices"]).reshape(1, -1)
        values = torch.tensor(ARRAYS[f"{case['sequence']}/{t}/values"], dtype=dtype)
        table.grad = torch.sparse_coo_tensor(indices, values, table.shape, check_invariants=True)
        optimizer.step()
        expected = ARRAYS[f"{case['key']}/w"][t].astype(np.float64)
        off = np.abs(table.detach().double().numpy() - expected) / np.maximum(np.abs(expected), np.abs(start))
        worst = max(worst, float(off.max()))
    return worst


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['key']}-{c['dialect']}-{c['dtype']}-{c['sequence']}")
def test_a_dialect_steps_sparse_gradients_as_its_framework_does(case: dict, backend: str):
    """Each framework's own meaning is the default of its dialect, with duplicates summed first."""
    assert run(case, backend=backend) <= RTOL[case["dtype"]]


def test_the_other_meaning_is_another_run():
    """The comparison notices lazy for dense and dense for lazy."""
    for case in CASES:
        momentum = case["words"].get("momentum", 0)
        if case["dtype"] == "float64" and momentum:
            other = "dense" if case["rows"] == "lazy" else "lazy"
            assert run(case, sparse=other) > 1e-6, case


def grads(shape: tuple[int, ...], rows: list[int], seed: int = 0) -> torch.Tensor:
    values = torch.randn((len(rows), *shape[1:]), generator=torch.Generator().manual_seed(seed))
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, shape, check_invariants=True)


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.5}], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("centered", [False, True])
def test_dense_means_a_dense_gradient(centered: bool, momentum: float, decay: float, clip: dict):
    """sparse="dense" gives the bits of the same run with dense gradients; duplicate indices are summed."""
    tables = [nn.Parameter(torch.ones(5, 3)) for _ in range(2)]
    settings = dict(lr=0.1, centered=centered, momentum=momentum, weight_decay=decay, **clip)
    both = RMSprop([tables[0]], sparse="dense", **settings), RMSprop([tables[1]], **settings)
    for t, rows in enumerate(([0, 3], [3, 3, 1], [], [4])):
        gradient = grads((5, 3), rows, t)
        tables[0].grad, tables[1].grad = gradient, gradient.to_dense()
        for optimizer in both:
            optimizer.step()
        assert torch.equal(*tables)


@pytest.mark.parametrize("rule", ["torch", "tensorflow1", "timm"])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_lazy_leaves_other_rows_alone(rule: str, backend: str):
    """Rows without a gradient keep their values and state bitwise; those with one move as if they were the table."""
    table, alone = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(2, 4))
    settings = dict(dialect=rule, lr=0.1, momentum=0.9, centered=True, weight_decay=0.01, backend=backend)
    lazy, dense = RMSprop([table], sparse="lazy", **settings), RMSprop([alone], **settings)
    for t in range(4):
        table.grad = grads((6, 4), [1, 4], t)
        alone.grad = table.grad.to_dense()[[1, 4]]
        lazy.step()
        dense.step()
    assert torch.equal(table[[1, 4]], alone)
    assert torch.equal(table[[0, 2, 3, 5]], torch.ones(4, 4))
    for name, value in lazy.state[table].items():
        if name != "step":
            assert torch.equal(value[[1, 4]], dense.state[alone][name])
            assert torch.equal(value[[0, 2, 3, 5]], torch.full((4, 4), value[0, 0].item()))


def test_lazy_gathers_only_the_rows_that_have_a_gradient():
    """The cost follows the touched rows: the bucket that a kernel sees holds no more."""
    table = nn.Parameter(torch.ones(1000, 8))
    bucket = bucket_of([table], [grads((1000, 8), [5, 5, 7])], [torch.zeros(1000, 8)], [], [], [torch.tensor(0.0)])
    ((rows, write_back),) = sparse.parts({"sparse": "lazy", "differentiable": False}, Hyper(0.1, 0.9, 1e-8), bucket)
    assert write_back is not None
    assert [x.shape for values in rows.tensors() for x in values] == [(2, 8)] * 3


@pytest.mark.parametrize("meaning", ["lazy", "dense"])
def test_sparse_and_dense_parameters_share_a_group(meaning: str):
    """An embedding beside a layer: one optimizer, the gradients stay as they are, mixed from step to step."""
    table, weight = nn.Embedding(7, 3, sparse=True), nn.Linear(3, 2)
    params = [table.weight, *weight.parameters()]
    optimizer = RMSprop(params, lr=0.01, sparse=meaning)
    for rows in ([1, 1, 2], [0], [6, 5]):
        optimizer.zero_grad()
        weight(table(torch.tensor(rows))).square().sum().backward()
        kept = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(a.to_dense(), b.grad.to_dense()) for a, b in zip(kept, params, strict=True))
    table.weight.grad = torch.ones(7, 3)  # dense now
    optimizer.step()
    table.weight.grad = grads((7, 3), [2])
    before = table.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(table.weight[2], before[2])
    assert torch.equal(table.weight[0], before[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_dtypes(dtype: torch.dtype):
    """Half precision keeps float32 state; complex rows are pairs of reals."""
    table = nn.Parameter(torch.ones(4, 2, dtype=dtype))
    optimizer = RMSprop([table], lr=0.5, sparse="lazy")
    table.grad = grads((4, 2), [3]).to(dtype)
    optimizer.step()
    assert not torch.equal(table[3], torch.ones(2, dtype=dtype))
    assert torch.equal(table[:3], torch.ones(3, 2, dtype=dtype))


def test_two_sparse_dimensions_and_odd_layouts():
    """A gradient that is sparse in both dimensions, for a transposed table."""
    table = nn.Parameter(torch.ones(3, 5).t())
    optimizer = RMSprop([table], lr=0.1, sparse="lazy", momentum=0.5)
    values = torch.tensor([2.0, -1.0])
    table.grad = torch.sparse_coo_tensor(torch.tensor([[0, 4], [2, 1]]), values, (5, 3), check_invariants=True)
    optimizer.step()
    expected = torch.ones(5, 3)
    expected[0, 2], expected[4, 1] = 0.0, 2.0  # the first step is 10·lr
    torch.testing.assert_close(table.detach(), expected)
    assert table.stride() == (1, 5)


@pytest.mark.parametrize("meaning", ["Lazy", "rows", True, 1])
def test_another_word_is_refused(meaning: object):
    """The sentence lists what works."""
    with pytest.raises(ValueError, match=r"it takes 'lazy' .* 'dense' .* or None"):
        RMSprop([nn.Parameter(torch.ones(1))], sparse=meaning)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_other_layouts_are_refused():
    """CSR gradients, which parameters that are CSR may have, are named, and what would work."""
    table = nn.Parameter(torch.sparse_csr_tensor([0, 1, 1], [0], [1.0], (2, 2), check_invariants=True))
    table.grad = table.detach().clone()
    with pytest.raises(RuntimeError, match=r"layout torch.sparse_csr: parameter 0 .*COO"):
        RMSprop([table], sparse="lazy").step()


def test_resume_is_bitwise():
    """Save, load, go on: as if it had never stopped."""
    table = nn.Parameter(torch.ones(5, 3))
    settings = dict(dialect="tensorflow1", learning_rate=0.1, momentum=0.9)
    optimizer = RMSprop([table], **settings)
    for t in range(3):
        table.grad = grads((5, 3), [t, 4], t)
        optimizer.step()
    other = nn.Parameter(table.detach().clone())
    resumed = RMSprop([other], **settings)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["sparse"] == "lazy"
    for t in range(3):
        for p, o in ((table, optimizer), (other, resumed)):
            p.grad = grads((5, 3), [t, 1], 10 + t)
            o.step()
    assert torch.equal(table, other)
