"""The Trainer of transformers, a DPO run on it, and Accelerate step with the given settings."""

from pathlib import Path

import pytest
import torch
from cases import Case
from judge import example, judging, needs

from rmsprop import RMSprop
from rmsprop.spec import Hyper, Rule

transformers = needs("accelerate", "transformers")
accelerate = needs("accelerate", "sklearn")


def warmed(step: int, steps: int, lr: float, warmup: int = 10) -> float:
    """Return the linear schedule of transformers at a step: up from 0, then down to 0."""
    done = step - 1
    return lr * (done / warmup if done < warmup else (steps - done) / (steps - warmup))


@transformers
def test_the_trainer_passes_everything_on(tmp_path: Path) -> None:
    """30 steps: warm-up from lr 0, linear decay, clipping to 1, weight decay 0.01 on matrices only."""

    def expected(step: int, group: int) -> Case:
        decay = (0.01, 0.0)[group]
        hyper = Hyper(lr=warmed(step, 30, 2e-3), alpha=0.95, eps=1e-6, weight_decay=decay)
        return Case(Rule(centered=True), hyper)

    with judging(expected) as judge:
        optimizer, losses = example("hf_trainer").train(str(tmp_path), steps=30)
    assert judge.steps == 30
    assert max(judge.norms) <= 1 + 1e-5
    assert losses[-1] < losses[0]
    assert type(optimizer) is RMSprop
    assert [group["initial_lr"] for group in optimizer.param_groups] == [2e-3, 2e-3]  # TrainingArguments has 5e-5
    assert "[5] w ← max(v − m², 0)" in optimizer.explain()


@transformers
def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    """The Trainer's checkpoint, read with weights_only, restores state and schedule bitwise."""
    hf = example("hf_trainer")
    whole, _ = hf.train(str(tmp_path), steps=12, save_strategy="steps", save_steps=8)

    class Resuming(hf.Trainer):  # type: ignore[misc, name-defined]
        def train(self) -> None:
            super().train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))

    hf.Trainer = Resuming
    resumed, _ = hf.train(str(tmp_path / "again"), steps=12)
    for ours, theirs in zip(
        whole.state_dict()["state"].values(), resumed.state_dict()["state"].values(), strict=True
    ):
        assert ours["step"] == 12
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@transformers
def test_optim_args_reach_torchs_rmsprop(tmp_path: Path) -> None:
    """`optim="rmsprop"` is torch's class; its optim_args, dropped before 2026, arrive."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(tmp_path), optim="rmsprop", optim_args="alpha=0.9,momentum=0.5", use_cpu=True)
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments)
    assert cls is torch.optim.RMSprop
    assert kwargs == {"lr": 5e-5, "alpha": 0.9, "momentum": 0.5}


@transformers
def test_dpo_runs_by_its_recipe(tmp_path: Path) -> None:
    """The given optimizer steps, with constant lr after a warm-up, clipping at 10, and the recipe recorded."""
    case = Rule(), 1e-4
    with judging(lambda t, _: Case(case[0], Hyper(case[1] * min(1.0, (t - 1) / 10), 0.99, 1e-8))) as judge:
        optimizer, loss = example("trl_dpo").train(str(tmp_path), steps=15)
    assert judge.steps == 15
    assert max(judge.norms) <= 10 + 1e-4
    assert loss < 0.69
    assert "recipe dpo; lr=0.0001 instead of 5e-07" in optimizer.explain()


@accelerate
def test_accelerate_steps_ours_at_every_second_batch() -> None:
    """57 batches make 29 steps, each Keras 3's at the schedule's lr, with accumulated and clipped gradients."""
    with judging(lambda t, _: Case(Rule("inside"), Hyper(1e-3 * 0.98 ** (t - 1), 0.9, 1e-6))) as judge:
        optimizer, accuracy = example("accelerate_loop").train(epochs=1)
    assert judge.steps == 29
    assert max(judge.norms) <= 1 + 1e-5
    assert accuracy > 0.4
    assert type(optimizer) is RMSprop
    assert "[6] d ← √(w + 1e-06)" in optimizer.explain()


@accelerate
@pytest.mark.parametrize("amp_in_step", [False, True])
def test_accelerate_sees_a_skipped_step_unless_amp_in_step(amp_in_step: bool) -> None:
    """An overflow never changes anything; step_was_skipped is True only if the scaler itself skips."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    weight = torch.nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = RMSprop([weight], amp_in_step=amp_in_step, capturable=amp_in_step)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    for overflow in (False, True):
        before = weight.detach().clone()
        scaler.scale((weight * (torch.inf if overflow else 1.0)).sum()).backward()
        wrapped.step()
        wrapped.zero_grad()
        assert torch.equal(weight, before) == overflow
        assert wrapped.step_was_skipped == (overflow and not amp_in_step)
