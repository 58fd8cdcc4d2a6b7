"""Distributed parameters as one process sees them: what is refused, looked at, and left alone. A mesh of one process.

What several processes do: test_distributed.py.
"""

import re

import pytest
import torch

pytest.importorskip("torch.distributed.tensor", reason="this torch is built without torch.distributed")

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from rmsprop import RMSprop, kernels
from rmsprop.diagnose.effective_lr import Recorder, effective_lr
from rmsprop.functional import rmsprop
from rmsprop.tensors import shards


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory):
    """One process, which is a group of its own."""
    meet = tmp_path_factory.mktemp("meet") / "here"
    dist.init_process_group("gloo", init_method=meet.as_uri(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def spread(values, mesh, placement=None):
    """A distributed parameter."""
    return nn.Parameter(distribute_tensor(values, mesh, [placement or Shard(0)], src_data_rank=None))


def step(optimizer, *sizes):
    """A step for each size of the gradient."""
    for size in sizes:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, size)
        optimizer.step()


SETTINGS = {
    "plain": {},
    "all": dict(momentum=0.9, centered=True, weight_decay=0.1, bias_correction=True, square_avg_init=1.0),
    "clipped": dict(clip_norm=0.5, clip_global_norm=0.4, clip_weights=1.5, eps=0.1),
    "averaged": dict(ema=0.9, ema_warmup="tensorflow", clip_weights=1.5),
    "eager": dict(backend="eager", centered=True, momentum=0.9, ema=0.9),
    "foreach": dict(foreach=True, centered=True),
    "loop": dict(foreach=False, centered=True),
    "recorded": dict(differentiable=True),
    "device": dict(capturable=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_shard_steps_as_a_plain_tensor_does(settings, dtype, mesh, monkeypatch):
    """Every setting, dtype and placement, beside the same tensors without a mesh: all elements are the same."""
    monkeypatch.setattr(kernels, "clips", lambda *_: False)  # torch's operators clip shards, and here the twin too
    values = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=dtype)
    own = [spread(values, mesh), spread(values, mesh, Replicate()), nn.Parameter(values.clone())]
    plain = [nn.Parameter(values.clone()) for _ in own]
    pair = RMSprop(own, **settings), RMSprop(plain, **settings)
    if settings.get("differentiable"):
        for params in (own, plain):
            for p in params:
                p.requires_grad_(False)
    for lr, size in ((0.1, 0.5), (0.02, -3.0), (0.05, 0.25)):
        for optimizer in pair:
            optimizer.param_groups[0]["lr"] = lr
            step(optimizer, size)
    for p, q in zip(own, plain, strict=True):
        assert torch.equal(shards.shard(p), q)
        for name, slot in pair[1].state[q].items():
            assert torch.equal(shards.shard(pair[0].state[p][name]), slot)
            assert isinstance(pair[0].state[p][name], DTensor) == (isinstance(p, DTensor) and name != "step")


def test_distributed_parameters_take_the_fused_kernel(mesh):
    """explain says so, fused=True and backend="cpu" do not raise, and plain and distributed are one bucket."""
    params = [spread(torch.ones(3), mesh), nn.Parameter(torch.ones(2))]
    optimizer = RMSprop(params, fused=True, backend="cpu")
    said = optimizer.explain()
    assert "2 float32 tensors on cpu, 1 of them this process's shards of DTensors" in said
    assert "cpu: steps them" in said
    step(optimizer, 1.0)
    assert optimizer._stepper.plan is not None
    with pytest.raises(RuntimeError, match="fused=True requires a native kernel"):
        RMSprop([spread(torch.ones(3).long().float(), mesh).to(torch.complex64)], fused=True)


def test_the_triton_kernel_takes_shards(mesh):
    """Its source under the interpreter: the long way, and by its plan, beside plain tensors."""
    pytest.importorskip("triton", reason="triton is not installed, and its interpreter runs this test")
    from interpreted import interpreter, kernel_module

    own = [spread(torch.ones(3), mesh), nn.Parameter(torch.ones(2))]
    plain = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    settings = dict(backend="triton", momentum=0.9, centered=True)
    with interpreter(kernel_module()):
        pair = RMSprop(own, **settings), RMSprop(plain, **settings)
        for optimizer in pair:
            step(optimizer, 1.0, -2.0, 0.5)
    assert pair[0]._stepper.plan is not None
    assert all(torch.equal(shards.shard(p), q) for p, q in zip(own, plain, strict=True))


def test_a_term_of_a_sum_is_no_parameter(mesh):
    """A Partial parameter is refused before anything moves, at construction where a backend was asked for."""
    p = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    with pytest.raises(RuntimeError, match="each process holds one term of a sum"):
        RMSprop([p], backend="cpu")
    optimizer = RMSprop([p])
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="redistribute it to Replicate or Shard"):
        optimizer.step()
    assert torch.equal(shards.shard(p), torch.ones(3))


def test_a_gradient_that_is_not_summed_yet_is_summed(mesh):
    """As torch's operators do. The user's gradient stays as it is, and the plan leaves it to the long way."""
    p, q = spread(torch.ones(3), mesh, Replicate()), nn.Parameter(torch.ones(3))
    pair = RMSprop([p]), RMSprop([q])
    for size in (1.0, 2.0):
        p.grad = DTensor.from_local(torch.full((3,), size), mesh, [Partial()])
        q.grad = torch.full((3,), size)
        [optimizer.step() for optimizer in pair]
        assert p.grad.placements == (Partial(),)
        assert torch.equal(shards.shard(p), q)
    assert pair[0]._stepper.plan is None
    p.grad = distribute_tensor(torch.ones(3), mesh, [Replicate()], src_data_rank=None)
    pair[0].step()
    assert pair[0]._stepper.plan is not None
    p.grad = DTensor.from_local(torch.full((3,), 1.0), mesh, [Partial()])
    pair[0].step()
    assert pair[0]._stepper.plan is None
    q.grad = torch.ones(3)
    pair[1].step()
    pair[1].step()
    assert torch.equal(shards.shard(p), q)


@pytest.mark.parametrize("kind", ["plain", "other"])
@pytest.mark.parametrize("slot", ["square_avg", "momentum_buffer", "grad_avg"])
def test_state_that_is_spread_otherwise_is_refused(slot, kind, mesh):
    """One sentence with both kinds and what to do, before anything moves; by the plan and the long way."""
    for steps in (1, 2):
        p = spread(torch.ones(3), mesh)
        optimizer = RMSprop([p], momentum=0.9, centered=True, lr=0.1)
        step(optimizer, *[1.0] * steps)
        before = shards.shard(p).clone()
        other = distribute_tensor(torch.ones(3), mesh, [Replicate()], src_data_rank=None)
        optimizer.state[p][slot] = torch.ones(3) if kind == "plain" else other
        words = "is a Tensor and the parameter a DTensor" if kind == "plain" else "has placements (Replicate(),) on"
        with pytest.raises(RuntimeError, match=re.escape(f"the {slot} of the parameter of shape (3,) {words}")):
            step(optimizer, 1.0)
        assert torch.equal(shards.shard(p), before)
        with pytest.raises(RuntimeError, match=r"load the state again, or delete it from optimizer\.state"):
            optimizer.step()
        del optimizer.state[p]
        step(optimizer, 1.0)


def test_a_gradient_of_another_kind_is_refused(mesh):
    """A plain gradient of a distributed parameter, and the other way about, whether there is a plan or not."""
    own, plain = spread(torch.ones(3), mesh), nn.Parameter(torch.ones(3))
    optimizer = RMSprop([own, plain])
    for steps in (0, 2):
        step(optimizer, *[1.0] * steps)
        for p, other in ((own, torch.ones(3)), (plain, torch.ones_like(own))):
            step(RMSprop([own, plain], lr=0.0), 1.0)  # both have a gradient of their kind
            before = [shards.shard(x).clone() for x in (own, plain)]
            p.grad = other
            with pytest.raises(RuntimeError, match=r"give it a gradient of its own type, such as backward\(\) makes"):
                optimizer.step()
            assert [torch.equal(shards.shard(x), y) for x, y in zip((own, plain), before, strict=True)] == [True] * 2


def test_a_plain_parameter_takes_no_distributed_state(mesh):
    """The other way about, too."""
    q = nn.Parameter(torch.ones(3))
    optimizer = RMSprop([q])
    step(optimizer, 1.0)
    optimizer.state[q]["square_avg"] = distribute_tensor(torch.ones(3), mesh, [Shard(0)], src_data_rank=None)
    with pytest.raises(RuntimeError, match="is a DTensor and the parameter a Parameter"):
        step(optimizer, 1.0)


def test_a_state_dict_of_plain_tensors_is_cut_up(mesh):
    """One process's state goes to a distributed parameter, in place with capturable=True; parts are no whole."""
    p, q = spread(torch.ones(3), mesh), nn.Parameter(torch.ones(3))
    pair = tuple(RMSprop([x], momentum=0.9, capturable=True) for x in (p, q))
    step(pair[1], 1.0, 2.0)
    for _ in range(2):
        pair[0].load_state_dict(pair[1].state_dict())
        slots = {name: slot for name, slot in pair[0].state[p].items() if name != "step"}
        for name, slot in slots.items():
            assert slot.placements == (Shard(0),)
            assert torch.equal(shards.shard(slot), pair[1].state[q][name])
    before = {name: slot.data_ptr() for name, slot in ((n, shards.shard(x)) for n, x in slots.items())}
    pair[0].load_state_dict(pair[1].state_dict())
    assert before == {name: shards.shard(pair[0].state[p][name]).data_ptr() for name in slots}
    moved = spread(torch.ones(3), mesh, Replicate())
    other = RMSprop([moved], momentum=0.9)
    other.load_state_dict(pair[0].state_dict())  # of other placements
    assert other.state[moved]["square_avg"].placements == (Replicate(),)
    assert torch.equal(shards.shard(other.state[moved]["square_avg"]), pair[1].state[q]["square_avg"])
    with pytest.raises(ValueError, match=r"is a DTensor and .* StateDictOptions\(full_state_dict=True\)"):
        pair[1].load_state_dict(pair[0].state_dict())


def test_a_shard_of_fsdp1_has_no_norm():
    """Nothing names the processes that hold the rest: refused with what works, before anything moves."""
    p = nn.Parameter(torch.ones(3))
    p._fsdp_flattened = True
    optimizer = RMSprop([p], clip_norm=1.0)
    with pytest.raises(RuntimeError, match=r"cannot see the other shards .* call model.clip_grad_norm_"):
        step(optimizer, 1.0)
    assert torch.equal(p.detach(), torch.ones(3))


def test_shards_and_slots_may_be_replaced(mesh):
    """A shard of the parameter or of its state is replaced, or a slot: the next step takes today's."""
    p = spread(torch.ones(3), mesh)
    optimizer = RMSprop([p])
    step(optimizer, 1.0, 1.0)
    own = optimizer.state[p]
    for turn, replace in enumerate(
        (
            lambda: setattr(p, "_local_tensor", p._local_tensor.clone()),
            lambda: setattr(own["square_avg"], "_local_tensor", own["square_avg"]._local_tensor.clone()),
            lambda: own.update(square_avg=own["square_avg"].clone()),
        )
    ):
        plan = optimizer._stepper.plan
        step(optimizer, 1.0)
        assert optimizer._stepper.plan is plan
        replace()
        before = shards.shard(p).clone()
        step(optimizer, 1.0)
        assert not torch.equal(shards.shard(p), before)
        assert int(own["step"]) == 4 + 2 * turn


def test_a_recorded_step_of_a_distributed_parameter_has_a_derivative(mesh):
    """differentiable=True leaves DTensors as they are: autograd knows them, and not their shards."""
    found = []
    for make in (lambda x: distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None), torch.clone):
        p, w = make(torch.ones(3)), make(torch.tensor([1.0, 2.0, 3.0])).requires_grad_()
        optimizer = RMSprop([p], lr=0.1, eps=1.0, differentiable=True)
        p.grad = w * 2
        optimizer.step()
        p.sum().backward()
        found.append(shards.shard(w.grad))
    assert bool(found[1].all())
    torch.testing.assert_close(*found, rtol=1e-6, atol=0.0)


def test_the_functional_form_takes_shards(mesh):
    """The lists that are given stay as they are, and the shards of what they hold are stepped."""
    values = [torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]), torch.zeros(2), torch.zeros(2)]
    numbers = dict(lr=0.1, alpha=0.9, eps=1e-8, weight_decay=0.1, momentum=0.0, centered=True)
    found = []
    for make in (lambda x: distribute_tensor(x.clone(), mesh, [Shard(0)], src_data_rank=None), torch.clone):
        p, g, v, m = map(make, values)
        lists = [[p], [g], [v], [m]]
        version = p._version
        rmsprop(*lists, [], [torch.tensor(0.0)], backend="cpu", **numbers)
        assert all(values[0] is x for values, x in zip(lists, (p, g, v, m), strict=True))
        assert p._version > version
        found.append([shards.shard(x) for x in (p, v, m)])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_effective_learning_rates_are_of_the_shard(mesh):
    """The record of a step reads what this process holds, and asks no other."""
    p, q = spread(torch.ones(3), mesh), nn.Parameter(torch.ones(3))
    pair = RMSprop([p], lr=0.1), RMSprop([q], lr=0.1)
    rows = []
    for optimizer in pair:
        step(optimizer, 0.5)
        recorder = Recorder(optimizer)
        recorder.record()
        rows.append(recorder.rows)
    (own,), (other,) = (effective_lr(optimizer).values() for optimizer in pair)
    assert type(own) is torch.Tensor
    assert torch.equal(own, other)
    assert rows[0] == rows[1]


def test_lint_reads_the_shard(mesh):
    """The findings are those of the same plain tensors, and a gradient that is not summed yet is not read."""
    values, grad = torch.ones(20, 20), torch.full((20, 20), float("nan"))
    p, q = spread(values, mesh, Replicate()), nn.Parameter(values.clone())
    pair = RMSprop([p]), RMSprop([q])
    for optimizer in pair:
        step(optimizer, 0.5)
    p.grad, q.grad = distribute_tensor(grad, mesh, [Replicate()], src_data_rank=None), grad
    assert [str(finding) for finding in pair[0].lint()] == [str(finding) for finding in pair[1].lint()]
    assert any("NaN" in str(finding) for finding in pair[0].lint())
    p.grad = DTensor.from_local(grad, mesh, [Partial()])
    assert not any("NaN" in str(finding) for finding in pair[0].lint())


def test_a_lazily_negated_gradient_of_one_element_is_seen(mesh):
    """It can lie in the plain layout, and its memory holds the other sign."""
    p, q = spread(torch.ones(1), mesh), nn.Parameter(torch.ones(1))
    pair = RMSprop([p], momentum=0.9), RMSprop([q], momentum=0.9)
    for optimizer in pair:
        step(optimizer, 1.0, 1.0)
    grad = torch._neg_view(torch.full((1,), 2.0))
    p.grad, q.grad = DTensor.from_local(grad, mesh, [Shard(0)]), torch.full((1,), -2.0)
    assert shards.shard(p.grad).is_neg()
    for optimizer in pair:
        optimizer.step()
    assert torch.equal(shards.shard(p), q)


def test_a_parameter_without_a_gradient_stays(mesh):
    """The plan steps those that have one."""
    params = [spread(torch.ones(3), mesh), spread(torch.ones(2), mesh), nn.Parameter(torch.ones(2))]
    optimizer = RMSprop(params)
    step(optimizer, 1.0, 1.0)
    params[0].grad = None
    before = [shards.shard(p).clone() for p in params]
    versions = [p._version for p in params]
    optimizer.step()
    assert [torch.equal(shards.shard(p), x) for p, x in zip(params, before, strict=True)] == [True, False, False]
    assert [p._version == v for p, v in zip(params, versions, strict=True)] == [True, False, False]


def test_a_gradient_under_way_is_waited_for(mesh):
    """torch's functional collectives hand out tensors that are not there yet."""
    from torch.distributed import _functional_collectives as collectives

    p, q = spread(torch.ones(3), mesh), nn.Parameter(torch.ones(3))
    pair = RMSprop([p]), RMSprop([q])
    for size in (1.0, 2.0):
        under_way = collectives.all_reduce(torch.full((3,), size), "sum", mesh.get_group(0))
        assert type(under_way) is not torch.Tensor
        p.grad = DTensor.from_local(under_way, mesh, [Shard(0)])
        q.grad = torch.full((3,), size)
        [optimizer.step() for optimizer in pair]
    assert torch.equal(shards.shard(p), q)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch's own parts
def test_a_compiled_step_takes_distributed_parameters(mesh):
    """torch.compile traces it through DTensor's own operators."""
    p, q = spread(torch.ones(4), mesh), nn.Parameter(torch.ones(4))
    pair = RMSprop([p], capturable=True), RMSprop([q], capturable=True)
    compiled = torch.compile(pair[0].step, backend="eager")
    for size in (1.0, 2.0):
        p.grad, q.grad = torch.full_like(p, size), torch.full_like(q, size)
        compiled()
        pair[1].step()
    torch.testing.assert_close(shards.shard(p).detach(), q.detach(), rtol=1e-6, atol=1e-7)


def test_lazy_parameters_are_explained():
    """A parameter without a shape yet is no shard: explain() and the first step go as without torch.distributed."""
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    optimizer = RMSprop(model.parameters(), lr=0.01)
    assert "Parameter group 0" in optimizer.explain()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert float(optimizer.state[model[0].weight]["step"]) == 1
