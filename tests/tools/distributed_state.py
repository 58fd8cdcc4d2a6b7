"""More cases of test_distributed.py: checkpoints of the state, and what needs all elements."""

import copy
import os
import re
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import (
    CASES,
    EVERYTHING,
    RATES,
    Block,
    Feed,
    assert_same,
    assert_same_state,
    assert_spread_alike,
    batch,
    block,
    case,
    in_parallel,
    own_batches,
    params,
    same_batches,
    sequences,
    sharded,
    train,
    train_beside,
    watched,
    whole,
)
from paths import DOCS
from processes import Here
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rmsprop import RMSprop
from rmsprop.conversion.file import read_checkpoint

__all__ = ["CASES"]

# --- what needs all elements ---------------------------------------------------------------------

BOUNDS = [dict(clip_norm=0.05), dict(clip_global_norm=0.1), dict(clip_norm=0.05, clip_global_norm=0.08)]


@case(2, 4)
def clipped_by_norm(here: Here) -> None:
    """A norm is that of the whole gradient, on every mesh and on plain parameters; all processes scale alike.

    eps is large, so that a step follows the gradient's size. The bound: the sum of squares is taken in another order,
    at most 1e-7 of a coefficient below 1 on steps of lr/eps·0.1 at most. Measured 0 to 6e-8.
    """
    for bounds in BOUNDS:
        model, twin = block(), block()
        fully_shard(model.layer)
        if here.world == 4:
            fully_shard(model.head, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
        settings = dict(lr=0.01, eps=0.01, **bounds)
        optimizer, other = (RMSprop(m.parameters(), backend="cpu", **settings) for m in (model, twin))
        train(model, optimizer, same_batches())
        train(twin, other, same_batches())
        assert_same(model.parameters(), twin.parameters(), atol=2.4e-7)
        first = model.embedding.weight.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, model.embedding.weight)
    mesh = init_device_mesh("cpu", (here.world,))
    parallel, twin = in_parallel(mesh), Feed()
    twin.load_state_dict({name: whole(x) for name, x in parallel.state_dict().items()})
    optimizer, other = (RMSprop(m.parameters(), lr=0.01, eps=0.01, clip_global_norm=0.1) for m in (parallel, twin))
    train_beside(parallel, optimizer, other, sequences())
    assert_same(parallel.parameters(), twin.parameters(), atol=2.4e-7)


@case(2)
def norms_that_cannot_be_seen(here: Here) -> None:
    """FSDP1 hands out plain shards, whose other parts nothing names: a norm is refused, the rest works."""
    model, twin = block(), block()
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = RMSprop(model.parameters(), backend="cpu", **EVERYTHING)
    other = RMSprop(twin.parameters(), backend="cpu", **EVERYTHING)
    train(model, optimizer, same_batches())
    train(twin, other, same_batches())
    with FullyShardedDataParallel.summon_full_params(model):
        assert_same(model.parameters(), twin.parameters())
    clipped = RMSprop(model.parameters(), clip_global_norm=1.0)
    model(batch(here.rank)).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"model.clip_grad_norm_\(...\) before step"):
        clipped.step()
    assert_same(model.parameters(), before)


@case(4)
def looked_at_without_waiting(here: Here) -> None:
    """explain and lint tell of this process's shards, and one process alone may ask."""
    model = sharded(block())
    optimizer = RMSprop(model.named_parameters(), lr=0.01)
    train(model, optimizer, same_batches())
    model(batch(0)).backward()
    with torch.no_grad():
        shard = model.embedding.weight.to_local()
        shard.view(-1)[:1] = float("nan")
    if here.rank == 1:
        found = [str(finding) for finding in optimizer.lint()]
        assert any("embedding.weight" in line and "NaN" in line for line in found), found
        held = sum(p.to_local().numel() for p in model.parameters())
        assert f"{4 * held:,} for {held:,} elements" in optimizer.explain()
    dist.barrier()


# --- torch's distributed checkpoints -------------------------------------------------------------

# flattened and full at once torch itself does not take back (2.13, 2.14: KeyError, with torch.optim.RMSprop too)
MODES = {
    "plain": {},
    "full": dict(full_state_dict=True),
    "flat": dict(flatten_optimizer_state_dict=True),
    "offloaded": dict(cpu_offload=True),
    "broadcast": dict(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),  # only process 0 has it
}


def begin(mesh: DeviceMesh | None = None, *, empty: bool = False, **settings: Any) -> tuple[Block, RMSprop]:
    """A model with a frozen parameter, two dtypes and two groups of settings, sharded where there is a mesh."""
    model = block()
    model.layer.bfloat16()
    model.layer.linear1.weight.requires_grad_(False)
    if mesh is not None:
        fully_shard(model.layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    named = list(model.named_parameters())
    named = [(name, p) for name, p in named if name.startswith("layer")], [x for x in named if x[0][:5] != "layer"]
    groups: list[dict[str, Any]] = [{"params": named[0], "momentum": 0.5}, {"params": named[1], "lr": 0.02}]
    if empty:  # torch takes no empty group beside named ones
        groups = [{**group, "params": [p for _, p in group["params"]]} for group in groups] + [{"params": []}]
    return model, RMSprop(groups, **{"backend": "cpu", **EVERYTHING, "square_avg_init": 1.0, **settings})


def forward(model: Block, tokens: torch.Tensor) -> torch.Tensor:
    """The middle of it in bfloat16."""
    hidden = model.layer(model.embedding(tokens).bfloat16())
    return model.head(hidden.float()).mean()


def go_on(optimizer: RMSprop, seeds: range) -> None:
    """Steps on gradients that depend on the seed alone, whatever the number of processes, and on nothing else."""
    for seed in seeds:
        for i, p in enumerate(params(optimizer)):
            if p.requires_grad:
                torch.manual_seed(100 * seed + i)
                grad = torch.randn(p.shape).to(p.dtype)
                own = isinstance(p, DTensor)
                p.grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None) if own else grad
        optimizer.step()


@case(2, 4)
def every_mode(here: Here) -> None:
    """get, set into a fresh optimizer, go on: bit for bit the run that was not stopped, in every mode of torch's."""
    mesh = init_device_mesh("cpu", (here.world,))
    for name, wanted in MODES.items():
        get = StateDictOptions(**{key: x for key, x in wanted.items() if key != "broadcast_from_rank0"})
        model, optimizer = begin(mesh, empty=not name.startswith("flat"))
        go_on(optimizer, range(3))
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=get))
        weights = {key: whole(x).clone() for key, x in model.state_dict().items()}
        go_on(optimizer, range(3, 5))
        other, resumed = begin(mesh, empty=not name.startswith("flat"))
        with torch.no_grad():
            for key, x in other.state_dict().items():
                part = distribute_tensor(weights[key], x.device_mesh, x.placements, src_data_rank=None)
                x.copy_(part)
        if name == "broadcast" and here.rank:
            saved = {}
        set_optimizer_state_dict(other, resumed, saved, options=StateDictOptions(**wanted))
        go_on(resumed, range(3, 5))
        assert_same(other.parameters(), model.parameters())
        assert_same_state(resumed, optimizer)
        assert (
            type(resumed.state[other.layer.linear1.weight]) is dict or not resumed.state[other.layer.linear1.weight]
        )
        assert all(p not in resumed.state or not resumed.state[p] for p in params(resumed) if not p.requires_grad)


@case(4)
def resharded(here: Here) -> None:
    """dcp.save on 4 processes, load on 2, save there, load on 1, save, load on 4: the same run, bit for bit."""
    pair = dist.new_group([0, 1])
    for flat in (False, True):
        _reshard(here, pair, StateDictOptions(flatten_optimizer_state_dict=flat))


def _reshard(here: Here, pair: Any, options: StateDictOptions) -> None:
    folder = here.folder / f"dcp{options.flatten_optimizer_state_dict}"
    expected_model, expected = begin()
    go_on(expected, range(8))

    def load(model: Block, optimizer: RMSprop, stage: str, **how: Any) -> None:
        weights, state = get_state_dict(model, optimizer, options=options)
        held = {"model": weights, "optimizer": state}
        dcp.load(held, checkpoint_id=folder / stage, **how)
        set_state_dict(
            model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"], options=options
        )

    def save(model: Block, optimizer: RMSprop, stage: str, **how: Any) -> None:
        weights, state = get_state_dict(model, optimizer, options=options)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / stage, **how)

    four = init_device_mesh("cpu", (4,))
    model, optimizer = begin(four)
    go_on(optimizer, range(2))
    save(model, optimizer, "of4")
    if here.rank < 2:
        model, optimizer = begin(DeviceMesh.from_group(pair, "cpu"))
        load(model, optimizer, "of4", process_group=pair)
        go_on(optimizer, range(2, 4))
        save(model, optimizer, "of2", process_group=pair)
    dist.barrier()
    if here.rank == 0:
        model, optimizer = begin()
        load(model, optimizer, "of2", no_dist=True)
        go_on(optimizer, range(4, 6))
        save(model, optimizer, "of1", no_dist=True)
    dist.barrier()
    model, optimizer = begin(four)
    load(model, optimizer, "of1")
    go_on(optimizer, range(6, 8))
    assert_same(model.parameters(), expected_model.parameters())
    assert_same_state(optimizer, expected)
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert optimizer.param_groups[1]["lr"] == 0.02


@case(2, 4)
def a_getter_changes_nothing(_: Here) -> None:
    """D16: reading the state of a fresh optimizer makes the state of a fresh start, on empty shards too."""
    for settings in (
        dict(square_avg_init=1.0),
        dict(weight_decay=0.5),
        dict(eps=0.0),
        dict(momentum=0.9, centered=True),
    ):
        for lr in (0.01, torch.tensor(0.01)):
            model, twin = sharded(block()), sharded(block())
            optimizer, other = (RMSprop(m.parameters(), **{"lr": lr, **settings}) for m in (model, twin))
            get_optimizer_state_dict(model, optimizer)
            assert_same(model.parameters(), twin.parameters())
            for p in model.parameters():
                own = optimizer.state[p]
                assert float(own["step"]) == 0.0
                assert bool((own["square_avg"].to_local() == settings.get("square_avg_init", 0.0)).all())
                assert_spread_alike(own["square_avg"], p)
                assert all(not own[name].to_local().any() for name in own if name not in ("step", "square_avg"))
            go_on_with(model, optimizer)
            go_on_with(twin, other)
            assert_same(model.parameters(), twin.parameters())
            assert_same_state(optimizer, other)


def go_on_with(model: Block, optimizer: RMSprop) -> None:
    for tokens in same_batches()[:3]:
        optimizer.zero_grad()
        model(tokens).backward()
        optimizer.step()


@case(4)
def one_process_may_ask(here: Here) -> None:
    """Making the state for a sharded state dict waits for no other process."""
    model = sharded(block())
    optimizer = RMSprop(model.parameters())
    if here.rank == 2:
        get_optimizer_state_dict(model, optimizer)
    dist.barrier()


# --- our own state dicts -------------------------------------------------------------------------


@case(2, 4)
def own_state_dicts(_: Here) -> None:
    """By name and by order, in place, from one process's state, and refused with a sentence where it cannot fit."""
    model, twin = sharded(block()), block()
    optimizer = RMSprop(model.named_parameters(), backend="cpu", capturable=True, **EVERYTHING)
    other = RMSprop(list(twin.named_parameters())[::-1], backend="cpu", capturable=True, **EVERYTHING)
    train(twin, other, same_batches())
    optimizer.load_state_dict(other.state_dict())  # a single process's state, all of it on every process
    for name, p in model.named_parameters():
        assert_spread_alike(optimizer.state[p]["square_avg"], p)
        assert_same(
            [optimizer.state[p]["momentum_buffer"]],
            [other.state[dict(twin.named_parameters())[name]]["momentum_buffer"]],
        )
    first = next(iter(optimizer.state.values()))
    kept = dict(first)
    addresses = [x.to_local().data_ptr() for name, x in kept.items() if name != "step"]
    saved = copy.deepcopy(optimizer.state_dict())
    for values in optimizer.state.values():
        values["square_avg"].zero_()
    optimizer.load_state_dict(saved)
    first = next(iter(optimizer.state.values()))
    assert all(first[name] is x for name, x in kept.items())
    assert addresses == [x.to_local().data_ptr() for name, x in kept.items() if name != "step"]
    assert bool(whole(first["square_avg"]).any())
    optimizer.load_state_dict(optimizer.state_dict())
    fresh = RMSprop(sharded(block()).parameters(), backend="cpu", **EVERYTHING)
    fresh.load_state_dict(fresh.state_dict())
    fresh.load_state_dict(
        {**saved, "param_groups": [{k: v for k, v in g.items() if k != "param_names"} for g in saved["param_groups"]]}
    )
    slots = [x for own in fresh.state.values() for name, x in own.items() if name != "step"]
    assert all(x.dtype == torch.float32 for x in slots)
    lone = RMSprop(block().named_parameters(), **EVERYTHING)
    with pytest.raises(ValueError, match=r"StateDictOptions\(full_state_dict=True\)"):
        lone.load_state_dict(saved)


@case(2)
def container(here: Here) -> None:
    """As torchtitan has it: named groups, fused= in each, an optimizer for each part of the model, one flat dict.

    The keys of the state are parameters and its values tensors, since flattening takes nothing else. The folder is
    read by `rmsprop convert` without a process group, all shards together.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def make() -> tuple[Block, list[RMSprop]]:
        model = sharded(block())
        named = list(model.named_parameters())
        halves = named[:5], named[5:]
        return model, [RMSprop([{"params": half, "fused": True}], foreach=False, **EVERYTHING) for half in halves]

    model, optimizers = make()
    for tokens in own_batches(here):
        model.zero_grad()
        model(tokens).backward()
        [optimizer.step() for optimizer in optimizers]
    for optimizer in optimizers:
        assert {*optimizer.state} == {*params(optimizer)}
        assert all(isinstance(x, torch.Tensor) for own in optimizer.state.values() for x in own.values())
        assert "cpu: steps them" in optimizer.explain()
    saved = {}
    for optimizer in optimizers:
        saved |= get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save(saved, checkpoint_id=here.folder / "container")
    held: dict[str, Any] = {}
    twin, others = make()
    for optimizer in others:
        held |= get_optimizer_state_dict(twin, optimizer, options=options)
    dcp.load(held, checkpoint_id=here.folder / "container")
    for optimizer, expected in zip(others, optimizers, strict=True):
        set_optimizer_state_dict(twin, optimizer, held, options=options)
        assert_same_state(optimizer, expected)
    converted = read_checkpoint(here.folder / "container")
    names = {p: name for name, p in model.named_parameters()}
    for p, own in ((p, own) for optimizer in optimizers for p, own in optimizer.state.items()):
        for slot, value in own.items():
            assert torch.equal(torch.from_numpy(converted.slots[names[p]][slot]), whole(value).to(torch.float32)), (
                slot
            )


@case(2)
def state_put_there_before(here: Here) -> None:
    """torchtitan's hook: a slot that is there before the first step stays, with its dtype, and others are made."""
    model = sharded(block())
    optimizer = RMSprop(model.parameters(), lr=0.01, momentum=0.9)
    put = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in model.parameters()}
    for p, slot in put.items():
        optimizer.state[p]["square_avg"] = slot
    train(model, optimizer, own_batches(here))
    for p, slot in put.items():
        own = optimizer.state[p]
        assert own["square_avg"] is slot
        assert slot.dtype == torch.bfloat16
        assert {*own} == {"step", "square_avg", "momentum_buffer"}
        assert float(own["step"]) == len(RATES)


@case(2, 4)
def zero(here: Here) -> None:
    """ZeroRedundancyOptimizer over our class: each process steps its share, and the state comes together again."""
    for view in (False, True):
        model, twin = block(), block()
        settings = dict(EVERYTHING, backend="cpu")
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=RMSprop, parameters_as_bucket_view=view, **settings
        )
        other = RMSprop(twin.parameters(), **settings)
        train(model, optimizer, same_batches())
        train(twin, other, same_batches())
        assert type(optimizer.optim) is RMSprop
        assert 0 < len(params(optimizer.optim)) < len(params(other))
        assert "cpu: steps them" in optimizer.optim.explain()
        assert_same(model.parameters(), twin.parameters())
        optimizer.consolidate_state_dict(0)
        held = [optimizer.state_dict() if here.rank == 0 else None]
        dist.broadcast_object_list(held, 0)
        single = RMSprop(block().parameters(), **settings)
        single.load_state_dict(held[0])
        for p, q in zip(params(single), params(other), strict=True):
            assert_same(single.state[p].values(), other.state[q].values())
        again = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=RMSprop, **settings)
        again.load_state_dict(held[0])
        train(model, again, same_batches())
        train(twin, other, same_batches())
        assert_same(model.parameters(), twin.parameters())


@case(2)
def scaled(here: Here) -> None:
    """GradScaler: an overflow in one process's shard skips the step in all, and then no step is counted."""
    for in_step in (False, True):
        model, twin = sharded(block()), block()
        settings = dict(EVERYTHING, amp_in_step=in_step, capturable=in_step)
        optimizer, other = (RMSprop(m.parameters(), backend="cpu", **settings) for m in (model, twin))
        scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000) for _ in range(2)]
        for i, tokens in enumerate(same_batches()):
            for m, o, scaler in zip((model, twin), (optimizer, other), scalers, strict=True):
                o.zero_grad()
                scaler.scale(m(tokens)).backward()
                if i == 2:  # the last row of the embedding, which the last process holds
                    grad = m.embedding.weight.grad
                    held = grad.to_local() if isinstance(grad, DTensor) else grad
                    if here.rank == here.world - 1 or held is grad:
                        held[-1, -1] = float("inf")
                scaler.step(o)
                scaler.update()
        assert {scaler.get_scale() for scaler in scalers} == {2.0}
        assert {float(own["step"]) for own in optimizer.state.values()} == {len(RATES) - 1.0}
        assert_same(model.parameters(), twin.parameters())
        assert_same_state(optimizer, other)


@case(2)
def what_moved_is_seen(here: Here) -> None:
    """State that was replaced takes the full step; shards that moved are stepped where they are today."""
    model, twin = sharded(block()), block()
    optimizer, other = (RMSprop(m.parameters(), backend="cpu", **EVERYTHING) for m in (model, twin))
    long_way = watched(optimizer)
    train_beside(model, optimizer, other, own_batches(here))
    assert len(long_way) == 1
    p, q = model.embedding.weight, twin.embedding.weight
    own, counterpart = optimizer.state[p], other.state[q]
    own["square_avg"] = own["square_avg"] * 2
    counterpart["square_avg"] = counterpart["square_avg"] * 2
    train_beside(model, optimizer, other, own_batches(here)[:2])
    assert len(long_way) == 2
    p._local_tensor = p._local_tensor.clone()
    train_beside(model, optimizer, other, own_batches(here)[:2])
    assert len(long_way) == 2
    slot = own["square_avg"]
    slot._local_tensor = slot._local_tensor.clone()
    train_beside(model, optimizer, other, own_batches(here)[:2])
    assert len(long_way) == 2
    p.grad = None
    q.grad = None
    optimizer.step()
    other.step()
    assert len(long_way) == 2
    assert_same(model.parameters(), twin.parameters())
    assert_same_state(optimizer, other)


@case(2)
def autograd_sees_the_step(_: Here) -> None:
    """A backward pass through values from before a step raises, as after torch's own operators."""
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)], src_data_rank=None))
    optimizer = RMSprop([p], backend="cpu")
    for forward in (lambda: (p * p).sum(), lambda: p.to_local().square().sum()):
        for _ in range(2):  # the long way, and by the plan
            p.grad = torch.ones_like(p)
            loss = forward()
            optimizer.step()
            with pytest.raises(RuntimeError, match="inplace"):
                loss.backward()


@case(2)
def documented(here: Here) -> None:
    """Every block of docs/distributed.md runs as it stands, one after the other."""
    page = (DOCS / "distributed.md").read_text(encoding="utf-8")
    os.environ["CHECKPOINTS"] = str(here.folder / "documented")
    scope: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    with mock.patch.object(dist, "init_process_group"):  # there is one already
        for i, block in enumerate(blocks):
            exec(compile(block, f"distributed.md, block {i}", "exec"), scope)
    for name in ("optimizer", "ddp_optimizer", "tp_optimizer"):
        assert "cpu: steps them" in scope[name].explain()
        assert all(float(own["step"]) for own in scope[name].state.values())
    assert scope["zero"].optim.state
