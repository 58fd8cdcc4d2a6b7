"""Training on several processes is training on one.

The contracts and traps of torch's distributed engines, each with the case that would show it (S: test_shards.py, in
one process; L: test_defects_loading.py):

- FSDP2 and tensor parallel step DTensors, which no fused operator of torch takes by another name: fsdp2, hsdp,
  tensor_parallel, fsdp2_over_tensor_parallel; mixed with plain tensors, and of several meshes: mixed_group.
- Empty and uneven shards occur: empty_shards, fsdp2.
- Gradients that are not summed yet (Partial): tensor_parallel. Still under way: S a_gradient_under_way_is_waited_for.
- State is DTensor with the parameter's global shape, stride, mesh and placements: assert_spread_alike, in all cases.
- A getter makes state by a step with zero gradients and lr 0, as a tensor on the CPU where lr is one, and calls
  step(closure=None): a_getter_changes_nothing; L test_d16_*, with capturable too. One process alone may call it:
  one_process_may_ask.
- The state's keys are parameters and its values tensors, or flattening fails: container.
- A trainer puts slots there before the first step: state_put_there_before.
- Groups carry param_names, fused= and foreach=False, and each part of the model has an optimizer: container.
- State dicts in all modes on uneven shards, frozen parameters, empty groups, several dtypes: every_mode; on another
  number of processes: resharded.
- float32 state of bfloat16 parameters stays float32: fsdp2_half_precision, every_mode, own_state_dicts.
- State of one byte or two keeps its codes on another number of processes, and torch's casts are found: narrow_*.
- load_state_dict(state_dict()) of a fresh optimizer works: own_state_dicts.
- Norms over shards are norms of the whole: clipped_by_norm; refused where they cannot be: norms_that_cannot_be_seen.
- Shards and state may be replaced between steps, by load_state_dict(assign=True) or a hook: what_moved_is_seen.
- torch.compile(optimizer.step): S a_compiled_step_takes_distributed_parameters.
"""

import pytest

pytest.importorskip("torch.distributed.fsdp", reason="this torch is built without torch.distributed")

import distributed_narrow
import processes

# Quick ones that between them shard, mix, clip, round, skip, save and load; `make test` runs these on 2 processes.
QUICK = [
    "fsdp2", "mixed_group", "guard_fsdp2", "guard_raise_fsdp2", "half_rounded_fsdp2", "clipped_by_norm",
    "norms_that_cannot_be_seen", "own_state_dicts", "state_put_there_before", "autograd_sees_the_step",
    "narrow_fsdp2",
]  # fmt: skip
REST = [name for name in distributed_narrow.CASES[2] if name not in QUICK]
THREE = list(distributed_narrow.CASES[3])
ALL = list(distributed_narrow.CASES[4])


@pytest.mark.parametrize(
    ("world", "names"),
    [
        pytest.param(2, QUICK, id="2-quick"),
        pytest.param(2, REST, id="2-rest", marks=pytest.mark.long),
        pytest.param(3, THREE, id="3-all", marks=pytest.mark.long),
        pytest.param(4, ALL, id="4-all", marks=pytest.mark.long),
    ],
)
def test_on_several_processes(world, names, tmp_path):
    """Each case of the three modules distributed_*.py, in its words; processes start once for many."""
    said = processes.outcomes("distributed_narrow", world, tmp_path, names)
    assert {name: text for name, text in said.items() if text} == {}
