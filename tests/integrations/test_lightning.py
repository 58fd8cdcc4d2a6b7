"""Lightning steps with a closure and clips, without amp_in_step."""

import pytest
import torch
from cases import Case
from judge import example, judging, needs

from rmsprop import RMSprop
from rmsprop.spec import Hyper, Rule

pytestmark = needs("lightning", "sklearn")


def expected(step: int, _group: int) -> Case:
    """Return the expected settings: lr halves after each epoch of 29 steps."""
    hyper = Hyper(lr=1e-3 * 0.5 ** ((step - 1) // 29), alpha=0.9, eps=1e-7, momentum=0.5)
    return Case(Rule(momentum=True), hyper)


def test_every_step_has_the_settings_the_schedule_and_the_clipping() -> None:
    """In bfloat16 autocast, each step equals the reference's at the schedule's lr with clipped gradients."""
    with judging(expected) as judge:
        optimizer, accuracy = example("lightning_digits").train(epochs=2)
    assert judge.steps == 58
    assert max(judge.norms) <= 1 + 1e-6
    assert max(judge.norms) == pytest.approx(1.0, abs=1e-4)  # some were clipped
    assert accuracy > 0.7
    assert "[8] b ← 0.5·b + u" in optimizer.explain()


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_amp_in_step_and_clipping_exclude_each_other(precision: str) -> None:
    """Lightning refuses to clip for an optimizer that unscales in its step, even in bfloat16."""
    from lightning.pytorch.plugins import MixedPrecision

    plugin = MixedPrecision(precision, "cpu")
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 3.0)
    with pytest.raises(RuntimeError, match="RMSprop, does not allow for gradient clipping"):
        plugin.clip_gradients(RMSprop([weight], amp_in_step=True, capturable=True), clip_val=1.0)
    assert weight.grad.norm() > 4
    plugin.clip_gradients(RMSprop([weight]), clip_val=1.0)
    assert weight.grad.norm() == pytest.approx(1.0, abs=1e-5)


@needs("jsonargparse")
def test_the_command_line_builds_ours_by_class_path() -> None:
    """LightningCLI reads the signature: omitted arguments are the dialect's, and the configuration can be written."""
    import lightning
    from lightning.pytorch.cli import LightningCLI

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(2, 1)

    said = ["--optimizer=rmsprop.RMSprop", "--optimizer.dialect=keras3", "--optimizer.momentum=0.5"]
    cli = LightningCLI(Model, args=said, run=False, save_config_callback=None)
    optimizer = cli.model.configure_optimizers()
    assert type(optimizer) is RMSprop
    group = optimizer.param_groups[0]
    assert [group[name] for name in ("lr", "alpha", "eps", "momentum")] == [1e-3, 0.9, 1e-7, 0.5]
    assert "alpha: 0.99" in cli.parser.dump(cli.config)  # torch's defaults, as if they had been given
