"""What several processes do together in test_distributed.py: each case is a function of Here, and asserts.

Every case trains a twin in one process beside the distributed model, and compares all elements. The bound is 0 units
in the last place where both had the same gradients: the rule is element-wise, and the kernel computes an element in
one way wherever it lies. So that the gradients are the same bit for bit, either all processes have the same batch
(the mean over 2 or 4 equal numbers is exact), or the twin steps on the gradients that arrived.
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Here
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from rmsprop import RMSprop
from rmsprop.in_backward import step_in_backward

CASES: dict[int, dict[str, Callable[[Here], None]]] = {2: {}, 3: {}, 4: {}}

# Every slot, and numbers at which a wrong one shows.
EVERYTHING = dict(lr=0.01, alpha=0.9, momentum=0.9, centered=True, weight_decay=0.02, bias_correction=True, eps=1e-3)
# lr moves in every run: a constant one hides half of the mistakes
RATES = (0.0, 0.01, 0.02, 0.005, 0.01)

warnings.simplefilter("ignore")  # torch's, of its own parts


def case(*worlds: int) -> Callable[[Callable[[Here], None]], Callable[[Here], None]]:
    """Run the function on so many processes."""

    def note(function: Callable[[Here], None]) -> Callable[[Here], None]:
        for world in worlds:
            CASES[world][function.__name__] = function
        return function

    return note


class Block(nn.Module):
    """A small transformer, of sizes that no number of processes divides: shards are uneven, and some are empty."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 10)
        self.layer = nn.TransformerEncoderLayer(10, 2, 13, dropout=0.0, batch_first=True)
        self.head = nn.Linear(10, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens))).mean()


def block(seed: int = 0) -> Block:
    """A transformer that is the same in every process."""
    torch.manual_seed(seed)
    return Block()


def batch(seed: int, size: int = 4) -> Tensor:
    """Tokens: of one seed, the same in every process."""
    return torch.randint(0, 7, (size, 5), generator=torch.Generator().manual_seed(seed))


def sharded(model: Block, **settings: Any) -> Block:
    """The model under FSDP2, with the layer and the rest in groups of their own."""
    fully_shard(model.layer, **settings)
    fully_shard(model, **settings)
    return model


def whole(x: Tensor) -> Tensor:
    """All of a tensor, wherever its parts are."""
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_same(found: Iterable[Tensor], expected: Iterable[Tensor], *, atol: float = 0.0) -> None:
    """Every element of every tensor, bit for bit, or within the bound."""
    off = []
    for x, y in zip(map(whole, found), map(whole, expected), strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        off.append(float((x.double() - y.double()).abs().max()) if x.numel() else 0.0)
    assert max(off) <= atol, off


def assert_same_state(optimizer: RMSprop, twin: RMSprop, *, atol: float = 0.0) -> None:
    """Every slot of every parameter; a DTensor's state is a DTensor of the same global shape, mesh and placements."""
    pairs = zip(params(optimizer), params(twin), strict=True)
    for p, q in pairs:
        own, other = optimizer.state[p], twin.state[q]
        assert own.keys() == other.keys()
        assert own.get("step") == other.get("step")
        for name in [name for name in own if name != "step"]:  # in the same order on every process
            if isinstance(p, DTensor):
                assert_spread_alike(own[name], p)
            assert_same([own[name]], [other[name]], atol=atol)


def assert_spread_alike(slot: Tensor, p: DTensor) -> None:
    """The contract of distributed checkpoints: state is a DTensor, with the global shape and stride."""
    assert type(slot) is DTensor
    assert (slot.shape, slot.stride()) == (p.shape, p.stride())
    assert (slot.device_mesh, slot.placements) == (p.device_mesh, p.placements)
    assert slot.to_local().shape == p.to_local().shape
    assert slot.dtype == (torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype)


def params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def watched(optimizer: RMSprop) -> list[None]:
    """A list that grows by one with each step that takes the long way."""
    long_way: list[None] = []
    step = optimizer._step
    optimizer._step = lambda closure: long_way.append(None) or step(closure)  # type: ignore[method-assign]
    return long_way


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor]) -> None:
    """As many steps as there are batches, with lr moving."""
    for lr, tokens in zip(RATES, batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        model(tokens).backward()
        optimizer.step()


def train_beside(model: nn.Module, optimizer: RMSprop, twin: RMSprop, batches: Iterable[Tensor]) -> None:
    """`train`, with a twin in one process that steps on the gradients that arrived."""
    pairs = list(zip(params(optimizer), params(twin), strict=True))
    for lr, tokens in zip(RATES, batches, strict=False):
        for group in (*optimizer.param_groups, *twin.param_groups):
            group["lr"] = lr
        optimizer.zero_grad()
        model(tokens).backward()
        for p, q in pairs:
            q.grad = None if p.grad is None else whole(p.grad).clone()
        optimizer.step()
        twin.step()


def same_batches() -> list[Tensor]:
    return [batch(i) for i in range(len(RATES))]


def own_batches(here: Here) -> list[Tensor]:
    return [batch(10 * i + here.rank) for i in range(len(RATES))]


# --- training ------------------------------------------------------------------------------------


@case(2, 4)
def ddp(here: Here) -> None:
    """Same batch: the parameters of one process; own batches: the twin's, and the same on every process."""
    for view in (False, True):
        plain, twin = block(), block()
        model = DistributedDataParallel(plain, gradient_as_bucket_view=view)
        optimizer, other = (RMSprop(m.parameters(), backend="cpu", **EVERYTHING) for m in (plain, twin))
        long_way = watched(optimizer)
        train(model, optimizer, same_batches())
        train(twin, other, same_batches())
        assert_same(plain.parameters(), twin.parameters())
        train_beside(model, optimizer, other, own_batches(here))
        assert_same(plain.parameters(), twin.parameters())
        assert_same_state(optimizer, other)
        assert len(long_way) == 1
        for p in plain.parameters():
            first = p.detach().clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, p)


@case(2, 4)
def fsdp2(here: Here) -> None:
    """A transformer trains to one process's parameters on uneven and empty shards, by the plan after one step."""
    model, twin = sharded(block()), block()
    optimizer, other = (RMSprop(m.parameters(), backend="cpu", **EVERYTHING) for m in (model, twin))
    long_way = watched(optimizer)
    train(model, optimizer, same_batches())
    train(twin, other, same_batches())
    assert_same(model.parameters(), twin.parameters())
    assert_same_state(optimizer, other)
    assert len(long_way) == 1
    sizes = {p.to_local().numel() * here.world == p.numel() for p in model.parameters()}
    assert False in sizes
    assert (model.head.weight.to_local().numel() == 0) == (here.rank > 0)
    said = optimizer.explain()
    assert "15 float32 tensors on cpu, 15 of them this process's shards of DTensors" in said
    assert "cpu: steps them" in said


@case(2, 4)
def fsdp2_own_batches(here: Here) -> None:
    """Own batches: bit for bit the twin's on the gradients that arrived, and near one process's with all.

    The bound to one process that has all batches at once: its sums are in another order, some 1e-7 of a gradient of
    up to about 1; a step multiplies that by at most lr/eps = 0.2. Not centered: v − m² would turn it into noise.
    Measured 6e-8, a unit in the last place of an element below 1; frozen at four times that.
    """
    model, twin, single = sharded(block()), block(), block()
    settings = EVERYTHING | {"eps": 0.1, "centered": False}
    optimizer, other, alone = (RMSprop(m.parameters(), backend="cpu", **settings) for m in (model, twin, single))
    train_beside(model, optimizer, other, own_batches(here))
    assert_same(model.parameters(), twin.parameters())
    assert_same_state(optimizer, other)
    together = [torch.cat([batch(10 * i + rank) for rank in range(here.world)]) for i in range(len(RATES))]
    train(single, alone, together)
    assert_same(model.parameters(), single.parameters(), atol=2.4e-7)


@case(2)
def stepped_in_backward(here: Here) -> None:
    """fully_shard's parameters, stepped in backward when a shard's gradient is reduced, and afterwards: one run."""
    found = []
    for early in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 1))  # uneven
        for layer in (model[0], model[2], model[4], model):
            fully_shard(layer)
        made = step_in_backward if early else lambda m, **settings: RMSprop(m.named_parameters(), **settings)
        optimizer = made(model, lr=0.01, momentum=0.5)
        for t in range(6):
            optimizer.zero_grad()
            for i in range(2):
                wait = t > 2 and early  # for the second pass: by our block, or by keeping gradients unreduced
                model.set_requires_gradient_sync(wait or i == 1)
                with optimizer.accumulate(i == 0) if wait else nullcontext():
                    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(4 * t + 2 * i + here.rank))
                    model(x).square().sum().backward()
            left = [p.grad for p in model.parameters() if p.grad is not None]
            assert not (early and left)
            optimizer.step()
        state = [value.full_tensor() for p in model.parameters() for value in list(optimizer.state[p].values())[1:]]
        found.append([p.full_tensor() for p in model.parameters()] + state)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@case(2)
def fsdp2_half_precision(here: Here) -> None:
    """bfloat16 parameters keep float32 state; under a mixed precision policy parameters stay float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for model, twin in (
        (sharded(block().bfloat16()), block().bfloat16()),
        (sharded(block(), mp_policy=policy), block()),
    ):
        optimizer, other = (RMSprop(m.parameters(), backend="cpu", **EVERYTHING) for m in (model, twin))
        train_beside(model, optimizer, other, own_batches(here))
        assert_same(model.parameters(), twin.parameters())
        assert_same_state(optimizer, other)
        assert {optimizer.state[p]["square_avg"].dtype for p in model.parameters()} == {torch.float32}


@case(2)
def cpu_offload(here: Here) -> None:
    """Under CPUOffloadPolicy shards, gradients and state are in CPU memory, and the fused CPU kernel steps them."""
    model, twin = sharded(block(), offload_policy=CPUOffloadPolicy(pin_memory=False)), block()
    optimizer, other = (RMSprop(m.parameters(), fused=True, **EVERYTHING) for m in (model, twin))
    train_beside(model, optimizer, other, own_batches(here))
    assert_same(model.parameters(), twin.parameters())
    assert "cpu: steps them" in optimizer.explain()


@case(4)
def hsdp(here: Here) -> None:
    """A mesh of 2 replicas of 2 shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, twin = sharded(block(), mesh=mesh), block()
    optimizer, other = (RMSprop(m.parameters(), backend="cpu", **EVERYTHING) for m in (model, twin))
    long_way = watched(optimizer)
    train(model, optimizer, same_batches())
    train(twin, other, same_batches())
    assert_same(model.parameters(), twin.parameters())
    train_beside(model, optimizer, other, own_batches(here))
    assert_same(model.parameters(), twin.parameters())
    assert_same_state(optimizer, other)
    assert len(long_way) == 1
    assert {p.placements for p in model.parameters()} == {(Replicate(), Shard(0))}


class Feed(nn.Module):
    """A layer norm and two linear layers, as tensor parallelism cuts them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(self.norm(x))))
        return (y.to_local() if isinstance(y, DTensor) else y).sum()


def in_parallel(mesh: DeviceMesh) -> Feed:
    """The feed-forward cut over the mesh, its norm over the sequence."""
    torch.manual_seed(1)
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    return parallelize_module(Feed(), mesh, plan)  # type: ignore[return-value]


def sequences() -> list[Tensor]:
    return [torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(len(RATES))]


@case(2, 4)
def tensor_parallel(here: Here) -> None:
    """Column, row and sequence parallel; a norm's gradient is not summed yet, and is before it is used."""
    mesh = init_device_mesh("cpu", (here.world,), mesh_dim_names=("tp",))
    model = in_parallel(mesh)
    torch.manual_seed(1)
    twin = Feed()
    optimizer, other = (RMSprop(m.parameters(), backend="cpu", **EVERYTHING) for m in (model, twin))
    train_beside(model, optimizer, other, sequences())
    assert any(placement.is_partial() for placement in model.norm.weight.grad.placements)
    assert {p.placements for p in model.parameters()} == {(Shard(0),), (Shard(1),), (Replicate(),)}
    assert_same(model.parameters(), twin.parameters())
    assert_same_state(optimizer, other)
    only = RMSprop([*model.up.parameters(), *model.down.parameters()], backend="cpu", **EVERYTHING)
    long_way = watched(only)
    train(model, only, sequences())
    assert len(long_way) == 1


@case(4)
def fsdp2_over_tensor_parallel(_: Here) -> None:
    """Two dimensions: sharded over 2 for the data and over 2 for the tensors."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = in_parallel(mesh["tp"])
    fully_shard(model, mesh=mesh["dp"])
    torch.manual_seed(1)
    twin = Feed()
    optimizer, other = (RMSprop(m.parameters(), backend="cpu", **EVERYTHING) for m in (model, twin))
    train_beside(model, optimizer, other, sequences())
    assert {len(p.placements) for p in model.parameters()} == {2}
    assert_same(model.parameters(), twin.parameters())
    assert_same_state(optimizer, other)


@case(2, 4)
def mixed_group(here: Here) -> None:
    """Plain and distributed parameters of several meshes in one group step in one call."""
    model, twin = block(), block()
    fully_shard(model.layer)
    if here.world > 2:
        fully_shard(model.head, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    optimizer, other = (RMSprop(m.parameters(), backend="cpu", **EVERYTHING) for m in (model, twin))
    long_way = watched(optimizer)
    train(model, optimizer, same_batches())
    train(twin, other, same_batches())
    assert type(model.embedding.weight) is nn.Parameter
    assert_same(model.parameters(), twin.parameters())
    assert_same_state(optimizer, other)
    assert len(long_way) == 1
    spread = 14 if here.world > 2 else 12
    assert f"15 float32 tensors on cpu, {spread} of them this process's shards" in optimizer.explain()


@case(4)
def empty_shards(here: Here) -> None:
    """A model with fewer rows than processes: who holds nothing counts its steps and moves nothing."""
    for backend in ("cpu", "eager"):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        twin = copy.deepcopy(model)
        fully_shard(model)
        settings = dict(EVERYTHING, backend=backend)
        optimizer, other = (RMSprop(m.parameters(), **settings) for m in (model, twin))
        for lr in RATES[1:]:
            for m, o in ((model, optimizer), (twin, other)):
                o.param_groups[0]["lr"] = lr
                o.zero_grad()
                m(torch.ones(1, 3)).sum().backward()
                o.step()
        held = [p.to_local().numel() for p in model.parameters()]
        assert (held == [0, 0]) == (here.rank > 1)
        assert {float(own["step"]) for own in optimizer.state.values()} == {4.0}
        assert_same(model.parameters(), twin.parameters())
        assert_same_state(optimizer, other)


def spoil(p: torch.nn.Parameter, here: Here, rank: int) -> bool:
    """Make an element of the gradient infinite that this process alone holds; whether it has one to spoil."""
    local = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
    if here.rank == rank and local.numel():
        local.view(-1)[-1] = torch.inf
    return bool(local.numel())


@case(2)
def guard_ddp(here: Here) -> None:
    """One process is fed infinity: after the reduction all have it, and all skip; the next step goes on alike."""
    model = DistributedDataParallel(block())
    optimizer = RMSprop(model.named_parameters(), lr=1e-3, nonfinite="skip", backend="cpu")
    for t in range(6):
        optimizer.zero_grad()
        inputs = batch(10 * t + here.rank)
        bad = t in (2, 3)
        (model(inputs) * (torch.inf if bad and here.rank == 1 else 1.0)).backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert optimizer.skipped.last == bad
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == bad
    assert optimizer.skipped.total == 2
    for p in model.parameters():
        others = [torch.empty_like(p) for _ in range(here.world)]
        torch.distributed.all_gather(others, p.detach())
        assert all(torch.equal(p, other) for other in others)


@case(2, 4)
def guard_fsdp2(here: Here) -> None:
    """A shard of one process is bad: all skip, and name the same parameter; between that they step by the plan."""
    model = sharded(block())
    named = list(model.named_parameters())
    optimizer = RMSprop(named, lr=1e-3, nonfinite="skip", nonfinite_limit=3, backend="cpu")
    planned = []
    for t in range(8):
        plan = optimizer._stepper.plan
        optimizer.zero_grad()
        model(batch(t)).backward()
        bad = t in (0, 3, 4, 6)
        if bad:
            spoil(named[2][1], here, rank=here.world - 1 if t < 4 else 0)
            spoil(named[5][1], here, rank=0)
        before = [p.to_local().detach().clone() for p in model.parameters()]
        optimizer.step()
        planned += [t] if plan is not None and plan is optimizer._stepper.plan and not bad else []
        same = all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))
        held = any(a.numel() for a in before)
        assert same == bad or not held
        assert optimizer.skipped.last == bad
        if bad:
            assert optimizer.skipped.parameter == repr(named[2][0])
    assert optimizer.skipped.total == 4
    assert planned == [2, 5, 7]  # the first good step makes the plan, which then holds
    for _ in range(2):
        spoil(named[2][1], here, rank=0)
        optimizer.step()
    with pytest.raises(RuntimeError, match="nonfinite_limit=3"):
        optimizer.step()


@case(2)
def guard_raise_fsdp2(here: Here) -> None:
    """nonfinite="raise" raises on every process, and nothing is written on any."""
    model = sharded(block())
    optimizer = RMSprop(model.named_parameters(), lr=1e-3, nonfinite="raise")
    model(batch(1)).backward()
    spoil(next(model.parameters()), here, rank=0)
    before = [p.to_local().detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="holds NaN or infinity"):
        optimizer.step()
    assert all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))


@case(2)
def half_rounded_fsdp2(here: Here) -> None:
    """Stochastic rounding and remainders on shards: state is DTensor, and a resumed run is the run."""
    model = sharded(block().bfloat16())
    words = dict(lr=1e-3, rounding="stochastic", compensation=True, backend="cpu")
    optimizer = RMSprop(model.parameters(), **words)
    train(model, optimizer, [batch(t) for t in range(3)])
    kept = [p.to_local().detach().clone() for p in model.parameters()]
    state = optimizer.state_dict()
    assert all(type(own["compensation"]).__name__ == "DTensor" for own in optimizer.state.values())
    other = RMSprop(model.parameters(), **words)
    other.load_state_dict(state)
    ends = []
    for one in (optimizer, other):
        with torch.no_grad():
            for p, x in zip(model.parameters(), kept, strict=True):
                p.to_local().copy_(x)
        train(model, one, [batch(t) for t in range(3, 5)])
        ends.append([p.to_local().detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert here.world == 2
