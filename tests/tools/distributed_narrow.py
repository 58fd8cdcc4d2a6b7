"""More cases of test_distributed.py: state in two bytes and in one, on shards, in checkpoints, and under ZeRO."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import CASES, EVERYTHING, batch, block, case, params, same_batches, sharded, train, whole
from distributed_state import begin, go_on
from processes import Here
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from rmsprop import RMSprop
from rmsprop.tensors.float8 import from_float8, to_float8, widened

__all__ = ["CASES"]

KEPT = {"bfloat16": torch.bfloat16, "float8": torch.uint8}


def state_of(optimizer: RMSprop) -> list[dict[str, Tensor]]:
    """The whole state of every parameter, on every process."""
    return [{name: whole(x).clone() for name, x in optimizer.state.get(p, {}).items()} for p in params(optimizer)]


def assert_same_state(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """Every element of every slot, and its dtype."""
    for own, other in zip(found, expected, strict=True):
        assert own.keys() == other.keys()
        for name, x in own.items():
            assert x.dtype == other[name].dtype
            assert torch.equal(x, other[name]), name


@case(2, 4)
def narrow_fsdp2(_: Here) -> None:
    """Slots are DTensors of one byte or two, steps write their shards, and a resumed run has the same bits."""
    for state_dtype, kept in KEPT.items():
        model = sharded(block())
        settings = dict(EVERYTHING, backend="eager", state_dtype=state_dtype, seed=3)
        optimizer = RMSprop(model.named_parameters(), **settings)
        train(model, optimizer, same_batches())
        for p in model.parameters():
            slot = optimizer.state[p]["square_avg"]
            assert type(slot) is DTensor
            assert slot.to_local().dtype == slot.dtype == kept
            assert (slot.shape, slot.placements) == (p.shape, p.placements)
            assert not slot.numel() or int(torch.count_nonzero(whole(slot)))
        weights = [p.to_local().detach().clone() for p in model.parameters()]
        saved, ends = copy.deepcopy(optimizer.state_dict()), []
        for one in (optimizer, RMSprop(model.named_parameters(), **settings)):
            if one is not optimizer:
                one.load_state_dict(saved)
            with torch.no_grad():
                for p, x in zip(model.parameters(), weights, strict=True):
                    p.to_local().copy_(x)
            train(model, one, [batch(t) for t in range(7, 9)])
            ends.append(([p.to_local().detach().clone() for p in model.parameters()], state_of(one)))
        assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
        assert_same_state(ends[0][1], ends[1][1])


@case(2, 4)
def narrow_state_dicts(_: Here) -> None:
    """Any precision into any other on shards, from a single process's state too; full precision has the numbers."""
    twin = block()
    other = RMSprop(twin.named_parameters(), backend="eager", **EVERYTHING)
    train(twin, other, same_batches())
    wide = state_of(other)
    for state_dtype in KEPT:
        optimizer = RMSprop(
            sharded(block()).named_parameters(), backend="eager", state_dtype=state_dtype, **EVERYTHING
        )
        for capturable in (False, True):  # in new tensors, and in the present ones
            optimizer.param_groups[0]["capturable"] = capturable
            with pytest.warns(UserWarning, match=f"is rounded to state_dtype='{state_dtype}'"):
                optimizer.load_state_dict(copy.deepcopy(other.state_dict()), hparams="keep")
            for own, full in zip(state_of(optimizer), wide, strict=True):
                codes = to_float8(full["square_avg"]) if state_dtype == "float8" else full["square_avg"].bfloat16()
                assert torch.equal(own["square_avg"], codes)
                assert torch.equal(own["grad_avg"], full["grad_avg"].bfloat16())
        optimizer.param_groups[0]["capturable"] = False
        back = RMSprop(sharded(block()).named_parameters(), backend="eager", **EVERYTHING)
        full = optimizer.state_dict(full_precision=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for saved in (optimizer.state_dict(), full):
                back.load_state_dict(saved)
                for own, narrow in zip(state_of(back), state_of(optimizer), strict=True):
                    assert own["square_avg"].dtype == torch.float32
                    assert torch.equal(own["square_avg"], widened(narrow["square_avg"], torch.float32))
        for entry in full["state"].values():
            assert type(entry["square_avg"]) is DTensor


@case(3)
def narrow_resharded(here: Here) -> None:
    """dcp.save on 2 processes, load on 3 and save there, load on 2: uneven shards, no code changes, steps follow."""
    pair = dist.new_group([0, 1])
    for state_dtype in KEPT:
        for flat in (False, True):
            _reshard(here, pair, state_dtype, StateDictOptions(flatten_optimizer_state_dict=flat))


def _reshard(here: Here, pair: Any, state_dtype: str, options: StateDictOptions) -> None:
    folder = here.folder / f"narrow-{state_dtype}-{options.flatten_optimizer_state_dict}"

    def load(model: Any, optimizer: RMSprop, stage: str, **how: Any) -> None:
        weights, state = get_state_dict(model, optimizer, options=options)
        held = {"model": weights, "optimizer": state}
        dcp.load(held, checkpoint_id=folder / stage, **how)
        set_state_dict(
            model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"], options=options
        )

    def save(model: Any, optimizer: RMSprop, stage: str, **how: Any) -> None:
        weights, state = get_state_dict(model, optimizer, options=options)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / stage, **how)

    def fresh(mesh: DeviceMesh) -> tuple[Any, RMSprop]:
        return begin(mesh, backend="eager", state_dtype=state_dtype)

    three, written = init_device_mesh("cpu", (3,)), here.folder / f"{folder.name}.pt"
    if here.rank < 2:
        model, optimizer = fresh(DeviceMesh.from_group(pair, "cpu"))
        go_on(optimizer, range(2))
        save(model, optimizer, "of2", process_group=pair)
        state = state_of(optimizer)
        if here.rank == 0:
            torch.save(state, written)
    dist.barrier()
    expected = torch.load(written)
    model, optimizer = fresh(three)
    load(model, optimizer, "of2")
    assert_same_state(state_of(optimizer), expected)
    dtypes = {whole(optimizer.state[p]["square_avg"]).dtype for p in params(optimizer) if p.requires_grad}
    assert dtypes == {KEPT[state_dtype]}
    save(model, optimizer, "of3")
    go_on(optimizer, range(2, 4))
    dist.barrier()
    if here.rank < 2:
        model, optimizer = fresh(DeviceMesh.from_group(pair, "cpu"))
        load(model, optimizer, "of3", process_group=pair)
        assert_same_state(state_of(optimizer), expected)
        go_on(optimizer, range(2, 4))
    dist.barrier()


@case(2)
def narrow_cast_by_dcp(here: Here) -> None:
    """dcp.load casts to the tensors that are there: codes as numbers, or numbers as codes, are refused."""
    for saved, present in (("float8", "float32"), ("float32", "float8"), ("bfloat16", "float8")):
        folder = here.folder / f"cast-{saved}-{present}"
        made = {}
        for state_dtype in (saved, present):
            model = sharded(block())
            made[state_dtype] = (
                model,
                RMSprop(model.named_parameters(), backend="eager", state_dtype=state_dtype, **EVERYTHING),
            )
        model, optimizer = made[saved]
        train(model, optimizer, same_batches())
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
        model, optimizer = made[present]
        held = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(held, checkpoint_id=folder)
        with pytest.raises(ValueError, match=f"state_dtype='{saved}'; load a distributed checkpoint into an"):
            set_optimizer_state_dict(model, optimizer, held["optimizer"])


@case(2)
def narrow_zero(here: Here) -> None:
    """ZeroRedundancyOptimizer: each process steps its share in one byte; the state comes together and continues."""
    for state_dtype, kept in KEPT.items():
        settings = dict(EVERYTHING, backend="eager", state_dtype=state_dtype)
        model = block()
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=RMSprop, **settings)
        train(model, optimizer, same_batches())
        optimizer.consolidate_state_dict(0)
        held = [optimizer.state_dict() if here.rank == 0 else None]
        dist.broadcast_object_list(held, 0)
        assert {entry["square_avg"].dtype for entry in held[0]["state"].values()} == {kept}
        single = RMSprop(block().parameters(), **settings)
        single.load_state_dict(copy.deepcopy(held[0]))
        again = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=RMSprop, **settings)
        again.load_state_dict(held[0])
        for own in params(again.optim):
            i = next(i for i, p in enumerate(model.parameters()) if p is own)
            assert torch.equal(again.optim.state[own]["square_avg"], single.state[params(single)[i]]["square_avg"])
        train(model, again, same_batches())
        full = RMSprop(block().parameters(), **EVERYTHING)
        full.load_state_dict(single.state_dict())
        for p, q in zip(params(full), params(single), strict=True):
            codes = single.state[q]["square_avg"]
            wide = from_float8(codes) if state_dtype == "float8" else codes.float()
            assert torch.equal(full.state[p]["square_avg"], wide)
