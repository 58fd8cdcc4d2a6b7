"""timm's registry, and a trainer that looks up names as Ultralytics' does."""

from typing import Any

import pytest
import torch
from cases import Case
from judge import example, judging, needs

from rmsprop import RMSprop, recipe
from rmsprop.spec import Hyper, Rule

timm = needs("timm", "torchvision", "sklearn")


@timm
def test_timm_steps_ours_with_its_groups() -> None:
    """timm's own rule under its name in the registry, with timm's momentum 0.9 and weight decay on matrices only."""
    rule = Rule("inside", square_avg_init=1.0, momentum=True, lr_in_buffer=True)

    def expected(_step: int, group: int) -> Case:
        return Case(rule, Hyper(2e-3, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=(0.0, 1e-5)[group]))

    with judging(expected) as judge:
        optimizer, losses = example("timm_registry").train(steps=8)
    assert judge.steps == 8
    assert losses[-1] < losses[0]
    assert type(optimizer) is RMSprop
    assert "[8] b ← 0.9·b + 0.002·u" in optimizer.explain()


@timm
def test_timm_puts_in_what_the_docs_say() -> None:
    """timm sets momentum=0.9 only with has_momentum, and alpha=0.9 in its own entries; given arguments arrive."""
    import timm as package
    from timm.optim import OptimInfo, create_optimizer_v2
    from timm.optim._optim_factory import default_registry

    example("timm_registry")
    model = package.create_model("test_efficientnet")

    def numbers(name: str, **given: Any) -> tuple[float, float]:
        group = create_optimizer_v2(model, name, lr=1e-3, **given).param_groups[0]
        return group["alpha"], group["momentum"]

    assert numbers("rmsprop") == numbers("rmsproptf") == numbers("rmspropours") == (0.9, 0.9)
    assert numbers("rmspropours", momentum=0.5, alpha=0.99) == (0.99, 0.5)
    default_registry.register(OptimInfo("rmspropplain", RMSprop))
    assert numbers("rmspropplain", momentum=0.5) == (0.99, 0.0)
    with pytest.raises(ValueError, match="plain not found"):
        create_optimizer_v2(model, "rmsprop_plain", lr=1e-3)


@timm
def test_timm_takes_a_recipe() -> None:
    """A recipe as defaults= of the registry, with weight decay for the right groups, does not warn."""
    import timm as package
    from timm.optim import OptimInfo, create_optimizer_v2
    from timm.optim._optim_factory import default_registry

    default_registry.register(OptimInfo("rmspropb0", RMSprop, defaults=recipe("timm-efficientnet-b0")))
    model = package.create_model("test_efficientnet")
    optimizer = create_optimizer_v2(model, "rmspropb0", lr=0.048, weight_decay=1e-5)
    assert [group["recipe"] for group in optimizer.param_groups] == [
        "timm-efficientnet-b0; weight_decay=0.0 instead of 1e-05",
        "timm-efficientnet-b0",
    ]


@timm
def test_timm_looks_ahead_with_ours() -> None:
    """The lookahead_ prefix wraps RMSprop, which still takes the steps."""
    from timm.optim import create_optimizer_v2

    example("timm_registry")
    net = torch.nn.Linear(3, 1)
    optimizer = create_optimizer_v2(net, "lookahead_rmspropours", lr=1e-3)
    before = net.weight.detach().clone()
    for _ in range(7):
        net(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert not torch.equal(net.weight, before)
    assert type(optimizer._base_optimizer) is RMSprop


def _conv() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 16, 3))


def test_a_looked_up_name_is_ours_in_a_subclass_and_torch_stays_as_it_was() -> None:
    """Groups, weight decay, and marks are the trainer's, alpha and the class ours; torch is not patched."""
    trainer, torchs = example("ultralytics_trainer").WithOurs(), torch.optim.RMSprop
    optimizer = trainer.build_optimizer(_conv(), momentum=0.0, lr=1e-3)
    assert torch.optim.RMSprop is torchs
    assert type(optimizer) is RMSprop
    known = ("param_group", "weight_decay", "lr", "momentum", "alpha")
    assert [tuple(group[name] for name in known) for group in optimizer.param_groups] == [
        ("weight", 5e-4, 1e-3, 0.0, 0.9),
        ("bias", 0.0, 1e-3, 0.0, 0.9),
    ]
    assert "[9] p ← p − 0.001·u" in optimizer.explain()
    assert not [finding for finding in optimizer.lint() if finding.name == "momentum"]


def test_lint_warns_of_the_momentum_that_is_sgds() -> None:
    """At the trainer's defaults, lr 0.01 and momentum 0.937, the finding's numbers are those of 16 times lr."""
    optimizer = example("ultralytics_trainer").WithOurs().build_optimizer(_conv())
    found = [finding for finding in optimizer.lint() if finding.name == "momentum"]
    assert [(finding.severity, finding.group) for finding in found] == [("error", 0)]  # group 1 is biases
    assert "with momentum 0.937, a steady step is 15.9·lr = 0.159" in found[0].seen
    assert "lr=0.0006" in found[0].change


def test_a_warm_up_that_writes_momentum_is_obeyed() -> None:
    """A warm-up like Ultralytics' writes momentum into every group, so a run without momentum gets a buffer."""
    net = _conv()
    optimizer = example("ultralytics_trainer").WithOurs().build_optimizer(net, momentum=0.0)
    for momentum in (0.0, 0.8):
        for group in optimizer.param_groups:
            group["momentum"] = momentum
        net(torch.ones(1, 3, 8, 8)).sum().backward()
        optimizer.step()
    assert all("momentum_buffer" in slots for slots in optimizer.state.values())
