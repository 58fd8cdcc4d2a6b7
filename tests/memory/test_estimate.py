"""The bytes of an estimate beside those that tensors hold after a step."""

import json
import math
from itertools import product

import pytest
import torch
from cases import mostly_long
from torch import nn

from rmsprop import RMSprop, estimate


class Tied(nn.Module):
    """A language model whose output layer is its embedding, with a buffer and a frozen layer."""

    def __init__(self, sparse=False):
        super().__init__()
        self.embedding = nn.Embedding(50, 12, sparse=sparse)
        self.recurrent = nn.LSTM(12, 12)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.output = nn.Linear(12, 50)
        self.output.weight = self.embedding.weight
        self.register_buffer("mask", torch.ones(7, 7, dtype=torch.bool))

    def forward(self, x):
        return self.output(self.frozen(self.recurrent(self.embedding(x))[0]))


def convolutions():
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 36, 10))


def complexes():
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3, 5, dtype=torch.complex64))
    model.wide = nn.Parameter(torch.ones(7, dtype=torch.float64))
    return model


MODELS = {
    "convolutions": convolutions,
    "tied": Tied,
    "half": lambda: convolutions().bfloat16(),
    "mixed": lambda: nn.Sequential(nn.Linear(9, 5).half(), nn.Linear(4, 4).double(), nn.Linear(3, 3)),
    "complex": complexes,
}
SETTINGS = {
    "plain": {},
    "all slots": {"momentum": 0.9, "centered": True, "ema": 0.999},
    "bfloat16": {"state_dtype": "bfloat16", "momentum": 0.9, "ema": 0.9},
    "float8": {"state_dtype": "float8", "momentum": 0.9, "centered": True},
    "capturable": {"capturable": True},
    "dialect": {"dialect": "timm", "lr": 0.1, "momentum": 0.9},
}


SHORT = (("tied", "all slots"), ("half", "float8"), ("complex", "bfloat16"))


def held(model, optimizer):
    """What tensors hold: of weights, gradients and each slot."""
    state = {}
    for p in model.parameters():
        for name, x in optimizer.state.get(p, {}).items():
            state[name] = state.get(name, 0) + x.nbytes
    return {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "average": state.pop("ema", 0),
        "remainders": state.pop("compensation", 0),
        "slots": state,
        "buffers": sum(x.nbytes for x in model.buffers()),
    }


def stepped(model, **settings):
    optimizer = RMSprop(model.parameters(), **settings)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("name", "case"),
    mostly_long(product(MODELS, SETTINGS), lambda _, own: own in SHORT, unpack=True),
)
def test_all_that_tensors_hold_is_counted_to_the_byte(name, case) -> None:
    """Weights, gradients, every slot, average, remainders and buffers, once each, for every kind of parameter."""
    made, settings = MODELS[name], SETTINGS[case]
    model = made()
    if made is complexes and "dialect" in settings:
        settings = {"momentum": 0.9}  # other dialects refuse them
    if made is complexes and "state_dtype" in settings:
        model.plain = nn.Parameter(torch.ones(9))  # its state alone is narrowed
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        settings = {**settings, "compensation": True}
    total = estimate(model, **settings).total
    expected = held(model, stepped(model, **settings))
    assert {name: total.to_dict()[name] for name in expected} == expected
    assert total.total == total.weights + total.gradients + total.state + total.step + total.buffers


def test_a_model_on_the_meta_device_is_the_same_without_memory() -> None:
    """All but the device's note; and nothing of it is changed."""
    with torch.device("meta"):
        there = Tied()
        within = estimate(there, momentum=0.9)
    for found in (within, estimate(there, momentum=0.9)):
        assert found.total == estimate(Tied(), momentum=0.9).total
        assert any("device='cuda'" in note for note in found.notes)
    assert all(p.grad is None for p in there.parameters())


@pytest.mark.long
def test_a_model_in_fake_mode_is_the_same() -> None:
    """Inside the mode and outside."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = convolutions()
        assert estimate(model).total == estimate(convolutions()).total
    assert estimate(model).total == estimate(convolutions()).total


def test_nothing_of_the_model_is_changed() -> None:
    """Neither gradients nor hooks nor values nor the default generator."""
    model, random = Tied(), torch.get_rng_state()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.inference_mode():
        estimate(model, ema=0.9, state_dtype="float8")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_groups_have_their_own_settings() -> None:
    """Their bytes add up to the whole, and a list of named parameters or an optimizer gives the same."""
    model = convolutions()
    first, second = list(model[0].parameters()), list(model[3].parameters())
    groups = [{"params": first, "momentum": 0.9, "state_dtype": "float8"}, {"params": iter(second)}]
    found = estimate([dict(group) for group in groups[:1]] + [{"params": iter(second)}], lr=0.1)
    optimizer = RMSprop(groups, lr=0.1)
    assert [list(group.slots) for group in found.groups] == [
        ["square_avg", "momentum_buffer", "step"],
        ["square_avg", "step"],
    ]
    elements = sum(p.numel() for p in first)
    assert found.groups[0].slots["square_avg"] == elements
    assert found.groups[0].slots["momentum_buffer"] == 2 * elements
    assert sum(group.total for group in found.groups) == found.total.total
    assert estimate(optimizer).total == found.total
    assert estimate(optimizer.param_groups).total == found.total
    assert estimate(first).total == estimate(iter(model[0].named_parameters())).total
    assert "group 1" in str(found)


def test_a_groups_own_settings_win_as_in_the_optimizer() -> None:
    """Over those of the call; not in an optimizer, whose groups are all filled in, nor over an alternative's."""
    model = convolutions()
    first, second = list(model[0].parameters()), list(model[3].parameters())
    groups = [{"params": first, "momentum": 0.9, "state_dtype": "float8"}, {"params": second}]
    settings = {"momentum": 0.5, "state_dtype": "bfloat16", "centered": True}
    found = estimate([dict(group) for group in groups], **settings)
    optimizer = RMSprop([dict(group) for group in groups], **settings)
    for p in first + second:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for group, own in zip((first, second), found.groups, strict=True):
        for name, size in own.slots.items():
            assert size == sum(optimizer.state[p][name].nbytes for p in group), name
    assert estimate(optimizer).total == found.total
    wide = estimate(optimizer, state_dtype="float32").total
    assert wide.slots["square_avg"] == 4 * sum(p.numel() for p in first + second)
    others = {other.name: other.usage for other in found.alternatives}
    assert others["float32 state"] == wide
    assert others["float8 state"] == estimate(optimizer, state_dtype="float8").total


def test_the_alternatives_are_the_estimates_of_their_settings() -> None:
    """Each row is what its own call gives, those in backward with one gradient."""
    model = nn.Sequential(nn.Linear(700, 700), nn.Linear(700, 700))
    found = estimate(model, momentum=0.9)
    others = {other.name: other for other in found.alternatives}
    assert list(others) == [
        "bfloat16 state",
        "float8 state",
        "in backward",
        "bfloat16 state, in backward",
        "float8 state, in backward",
        "bfloat16 weights, float8, in backward",
        "torch.optim.Adam",
    ]
    assert others["float8 state"].usage == estimate(model, momentum=0.9, state_dtype="float8").total
    assert others["in backward"].usage.state == found.total.state
    assert others["in backward"].usage.gradients == 4 * 700 * 701  # the second bias waits for its weight
    least = others["bfloat16 weights, float8, in backward"].usage
    own = estimate(model, momentum=0.9, state_dtype="float8", rounding="stochastic", dtype="bfloat16").total
    assert (least.weights, least.state, least.buffers) == (own.weights, own.state, own.buffers)
    assert others["torch.optim.Adam"].usage.state == 2 * found.total.weights + 4 * 4  # a float32 count for each
    assert not any("state" in other.name for other in estimate(complexes(), dtype="float64").alternatives)


def test_a_refused_alternative_says_why() -> None:
    """Once, and the others stay."""
    found = estimate(convolutions(), clip_global_norm=1.0)
    (refused,) = [other for other in found.alternatives if other.usage is None]
    assert refused.name == "in backward"
    assert "clip_global_norm=1.0 cannot be combined" in refused.reason
    assert str(found).count("clip_global_norm=1.0 cannot") == 1
    assert found.to_dict()["alternatives"][-1]["name"] == "torch.optim.Adam"


@pytest.mark.long
def test_weights_of_another_dtype_are_those_of_the_converted_model() -> None:
    """As after model.to(dtype), buffers too; integers stay."""
    for dtype in (torch.bfloat16, torch.float64):
        model = convolutions()
        expected = estimate(convolutions().to(dtype)).total
        assert estimate(model, dtype=dtype).total == expected
        assert estimate(model, dtype=str(dtype).removeprefix("torch.")).total == expected


@pytest.mark.parametrize(
    ("memory", "size"),
    [
        (1000, 1000),
        ("16GB", 16 * 10**9),
        ("16 gib", 16 * 2**30),
        ("1.5k", 1500),
        ("2e3B", 2000),
        (1e9, 10**9),
        ("512MiB", 2**29),
    ],
)
def test_memory_is_bytes_or_a_text(memory, size) -> None:
    """GB are 10⁹ bytes and GiB 2³⁰, in any case and with or without a space."""
    assert estimate([nn.Parameter(torch.ones(2))], memory=memory).memory == size


def test_what_fits_is_said_for_each() -> None:
    """To the byte, with what is left or short; and activations come on top."""
    model = nn.Linear(1000, 1000, bias=False)
    total = estimate(model).total.total
    fits, short = estimate(model, memory=total), estimate(model, memory=total - 1)
    assert (fits.fits(), short.fits(), estimate(model).fits()) == (True, False, None)
    line = next(line for line in str(short).splitlines() if line.startswith("as given"))
    assert line.endswith("no, 1 B short")
    assert next(line for line in str(fits).splitlines() if line.startswith("as given")).endswith("fits, 0 B left")
    assert "activations come on top" in str(fits)
    verdicts = {other["name"]: other["fits"] for other in short.to_dict()["alternatives"]}
    assert verdicts["torch.optim.Adam"] is False
    assert verdicts["in backward"] is False  # a single gradient is all of them


def test_the_record_is_json_and_adds_up() -> None:
    """Nested plain data, with sums; the text has the same numbers within 100 columns."""
    found = estimate(Tied(), momentum=0.9, ema=0.99, memory="1GB")
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["total"]["state"] == sum(record["total"]["slots"].values()) + record["total"]["average"]
    assert record["total"]["total"] == found.total.total
    assert (record["elements"], record["frozen"]) == (50 * 12 + 2 * 48 * 12 + 2 * 48 + 50, 12 * 13)
    assert max(map(len, str(found).splitlines())) <= 100
    assert "average (ema)" in str(found)


def test_sparse_gradients_are_counted_as_dense_and_said_so() -> None:
    """By the layer, or by the gradient that there is; torch's rule refuses them, which is said."""
    found = estimate(Tied(sparse=True))
    assert any(note.startswith("1 sparse gradient is counted as dense") and "refuses" in note for note in found.notes)
    lazy = estimate(Tied(sparse=True), sparse="lazy")
    assert lazy.total == found.total
    assert not any("refuses" in note for note in lazy.notes)
    weight = nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.eye(3, 2).to_sparse()
    assert any("sparse gradient" in note for note in estimate([weight]).notes)


def test_shards_are_this_process_s() -> None:
    """Of a DTensor on a mesh of four, a quarter counts, and a gathered layer is said to come on top."""
    from torch import distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        weight = nn.Parameter(distribute_tensor(torch.ones(10, 3), mesh, [Shard(0)]))
        local = weight.to_local()
        found = estimate([weight], momentum=0.9)
        assert local.shape == (3, 3)
        assert found.total == estimate([nn.Parameter(torch.ones(3, 3))], momentum=0.9).total
        assert any("this process's shards" in note for note in found.notes)
    finally:
        dist.destroy_process_group()


def test_a_wrapped_weight_holds_its_parts() -> None:
    """Such as a quantized one: its bytes are those of the tensors within."""
    from torch.testing._internal.two_tensor import TwoTensor

    frozen = nn.Parameter(TwoTensor(torch.ones(5), torch.ones(5)), requires_grad=False)
    found = estimate([frozen, nn.Parameter(torch.ones(2))])
    assert (found.total.weights, found.total.gradients) == (2 * 20 + 8, 8)


def test_views_of_one_storage_count_once() -> None:
    """Two parameters of one memory are one weight, with two gradients; parts of a storage keep their sizes."""
    weight = torch.ones(8)
    twice = [nn.Parameter(weight), nn.Parameter(weight)]
    assert estimate(twice).total.weights == 32
    assert estimate(twice).total.gradients == 64
    assert estimate([nn.Parameter(weight[:3]), nn.Parameter(weight[3:])]).total.weights == 32


def test_a_model_without_anything_to_train_has_weights_alone() -> None:
    """All frozen: no gradient, no state, no peak, and no division by zero in the text."""
    found = estimate(nn.Linear(5, 5).requires_grad_(False))
    assert (found.total.total, found.elements, found.frozen) == (120, 0, 30)
    assert "120 B" in str(found)
    assert estimate([nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(()))]).total.weights == 4


@pytest.mark.parametrize(
    ("model", "settings", "error", "says"),
    [
        (
            nn.Sequential(nn.LazyLinear(3)),
            {},
            ValueError,
            "parameter 0.weight is of a lazy layer and has no shape yet",
        ),
        (nn.ReLU(), {}, ValueError, r"the model \(ReLU\) has no parameters"),
        ([], {}, ValueError, "model holds no parameters"),
        (torch.ones(3), {}, TypeError, r"give a list of parameters, such as \[tensor\]"),
        (7, {}, TypeError, "params is 7, an int"),
        ({"a": torch.ones(2)}, {}, TypeError, "params is a dict"),
        ([{"lr": 0.1}], {}, ValueError, "group 0 of model has no params"),
        ([{"params": [nn.Parameter(torch.ones(1))]}, 3], {}, TypeError, "entry 1 of model is an int among groups"),
        ("nowhere.pt", {}, ValueError, "there is no file 'nowhere.pt'"),
        (convolutions(), {"parameters": "net"}, ValueError, "parameters='net' selects a model in a checkpoint file"),
        (convolutions(), {"lr": -1}, ValueError, "Invalid learning rate"),
        (convolutions(), {"mometum": 0.9}, TypeError, "did you mean 'momentum'"),
        (convolutions(), {"rounding": "stochastic"}, ValueError, "applies to half-precision parameters only"),
        (convolutions(), {"state_dtype": "float4"}, ValueError, "'float8'"),
        (convolutions(), {"memory": "16 pounds"}, ValueError, "memory takes bytes, or a text such as '16GB'"),
        (convolutions(), {"memory": 0}, ValueError, "Invalid memory: 0"),
        (convolutions(), {"memory": 0.5}, ValueError, "Invalid memory: 0.5"),
        (convolutions(), {"memory": "0.5 B"}, ValueError, "Invalid memory: '0.5 B'"),
        (convolutions(), {"memory": math.nan}, ValueError, "Invalid memory: nan"),
        (convolutions(), {"memory": "16"}, ValueError, "Invalid memory: '16' has no unit; write '16B', or '16GB'"),
        (convolutions(), {"memory": " 2e9 "}, ValueError, "Invalid memory: ' 2e9 ' has no unit; write '2e9B'"),
        (convolutions(), {"memory": "1e999GB"}, ValueError, "Invalid memory"),
        (convolutions(), {"memory": True}, TypeError, "Invalid memory: True is a bool"),
        (convolutions(), {"device": "gpu7"}, ValueError, "device takes the name of one"),
        (convolutions(), {"device": "meta"}, ValueError, "'meta' has no memory"),
        (convolutions(), {"device": 3}, TypeError, "Invalid device: 3 is an int"),
        (convolutions(), {"dtype": "int8"}, ValueError, "dtype takes one of 'float32', 'bfloat16'"),
        (convolutions(), {"dtype": 16}, TypeError, "Invalid dtype: 16 is an int"),
        (convolutions(), {"backend": "cpu", "device": "cuda"}, RuntimeError, "it computes on the CPU"),
        (convolutions(), {"backend": "cpu", "weight_decay_mode": "l1"}, RuntimeError, "cpu refuses"),
        (complexes(), {"fused": True}, RuntimeError, "cannot take this step"),
        ([torch.eye(2).to_sparse().requires_grad_()], {}, ValueError, "RMSprop steps dense parameters only"),
    ],
)
def test_what_cannot_be_estimated_is_one_sentence(model, settings, error, says) -> None:
    """What was given and what would work."""
    with pytest.raises(error, match=says) as caught:
        estimate(model, **settings)
    assert "\n" not in str(caught.value)
