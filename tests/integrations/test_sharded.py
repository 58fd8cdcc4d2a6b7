"""A torchtitan-style container with DCP, DeepSpeed's ZeRO, and torchao's offload."""

import contextlib
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from judge import example, judging, needs

from rmsprop import RMSprop
from rmsprop.kernels import native
from rmsprop.spec import Hyper, Rule

MOMENTUM = Case(Rule(momentum=True), Hyper(1e-3, alpha=0.95, eps=1e-8, momentum=0.9))


def _stepped(titan: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    parts = [
        torch.nn.ModuleDict({"embed": torch.nn.Linear(8, 8)}),
        torch.nn.ModuleDict({"head": torch.nn.Linear(8, 1)}),
    ]
    container = titan.OptimizersContainer(parts, **{"lr": 1e-3, "alpha": 0.95, "momentum": 0.9, **settings})
    for _ in range(3):
        parts[1]["head"](parts[0]["embed"](torch.randn(4, 8))).square().mean().backward()
        container.step()
        [optimizer.zero_grad() for _, optimizer in container.pairs]
    return container


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_container_goes_through_dcp_by_name(tmp_path: Path) -> None:
    """Two parts' optimizers step as the reference; a flat state dict restores both bitwise."""
    from torch.distributed.checkpoint import load, save

    titan = example("torchtitan_container")
    with judging(lambda *_: MOMENTUM) as judge:
        ours = _stepped(titan, fused=native.missing() is None or None, foreach=False)  # torchtitan's two arguments
    assert judge.steps == 6
    flat = ours.state_dict()
    assert flat["param_groups.head.weight.alpha"] == 0.95
    save({"optimizer": ours}, checkpoint_id=tmp_path, no_dist=True)
    parts = [part for part, _ in ours.pairs]
    again = titan.OptimizersContainer(parts, lr=0.5, alpha=0.5, momentum=0.1)
    weights = [p.detach().clone() for part in parts for p in part.parameters()]
    load({"optimizer": again}, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(p, q) for p, q in zip(weights, (p for m in parts for p in m.parameters()), strict=True))
    restored = again.state_dict()
    assert restored.keys() == flat.keys()
    for name, value in flat.items():
        same = torch.equal(value, restored[name]) if isinstance(value, torch.Tensor) else value == restored[name]
        assert same, name
    assert "[2] v ← 0.95·v + 0.05·g²" in again.pairs[1][1].explain()


@needs("deepspeed", how="pip install --no-build-isolation deepspeed")
def test_deepspeed_steps_a_flat_tensor_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO 1 with bfloat16 weights steps our float32 master copy, clipped to 1; without its key it refuses."""
    import deepspeed

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    deepspeed.init_distributed("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    zero = example("deepspeed_zero")
    with judging(lambda *_: Case(Rule(), Hyper(1e-3, alpha=0.9, eps=1e-6))) as judge:
        optimizer, losses = zero.train(steps=5)
    assert judge.steps == 5
    assert max(judge.norms) <= 1 + 1e-5
    assert losses[-1] < losses[0]
    assert [p.shape for p in optimizer.param_groups[0]["params"]] == [(64 * 64 + 64 + 64 * 10 + 10,)]
    del zero.CONFIG["zero_allow_untested_optimizer"]
    with pytest.raises(AssertionError, match="untested ZeRO Optimizer"):
        zero.train(steps=1)


@needs("torchao")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would not refuse")
def test_torchaos_offload_refuses_a_cpu() -> None:
    """It supports CUDA and XPU only, and refuses a CPU before it builds RMSprop."""
    with pytest.raises(AssertionError, match="only supports CUDA & XPU"):
        example("torchao_offload").offloaded([torch.nn.Parameter(torch.ones(8192))])


@needs("torchao")
def test_torchaos_offload_steps_ours_with_a_cpu_in_the_gpus_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """One RMSprop per large tensor and one for the small ones step as the reference; their state is restored."""
    from torchao.optim import cpu_offload

    class Stream:
        def wait_stream(self, _other: Any) -> None: ...
        def synchronize(self) -> None: ...
        def record_event(self) -> "Stream":
            return self

    def empty_like(tensor: torch.Tensor, pin_memory: bool = False, **options: Any) -> torch.Tensor:  # noqa: ARG001
        return torch.empty_like(tensor, **options)

    cuda = types.SimpleNamespace(Stream=Stream, current_stream=Stream, stream=lambda _: contextlib.nullcontext())
    fake = types.SimpleNamespace(**{**vars(torch), "cuda": cuda, "empty_like": empty_like})
    monkeypatch.setattr(cpu_offload, "torch", fake)
    monkeypatch.setattr(cpu_offload, "get_available_devices", lambda: ["cpu", "cuda"])
    net = torch.nn.Linear(64, 128)
    offload = example("torchao_offload").offloaded(net.parameters())
    before = net.weight.detach().clone()
    with judging(lambda *_: Case(Rule(), Hyper(1e-3, alpha=0.9, eps=1e-6))) as judge:
        for _ in range(3):
            net(torch.randn(4, 64)).square().mean().backward()
            offload.step()
            offload.zero_grad()
    assert judge.steps == 6  # twice three: the weight's and the bias'
    assert not torch.equal(net.weight, before)
    assert [type(part) for part in offload.optim_dict.values()] == [RMSprop]
    saved = offload.state_dict()
    offload.load_state_dict(saved)
    assert int(saved["offloaded"][0]["state"][0]["step"]) == 3
