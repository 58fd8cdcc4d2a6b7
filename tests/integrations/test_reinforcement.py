"""Stable-Baselines3, a CleanRL-style loop and TorchRL step with the given settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from judge import example, judging, needs

from rmsprop import RMSprop, recipe
from rmsprop.spec import Hyper, Rule

SB2 = Case(Rule(eps_mode="inside", square_avg_init=1.0), Hyper(lr=7e-4, alpha=0.99, eps=1e-5))
sb3 = needs("gymnasium", "stable_baselines3")


def at(case: Case, lr: float) -> Case:
    """Return the case at another learning rate."""
    return Case(case.rule, replace(case.hyper, lr=lr))


@sb3
def test_sb3_steps_by_the_recipe() -> None:
    """Every step of A2C is Stable-Baselines 2's: ε inside, v from 1, clipped to 0.5 by A2C; explain() shows it."""
    with judging(lambda *_: SB2) as judge:
        agent = example("sb3_a2c").train(500)
    assert judge.steps == 100
    assert max(judge.norms) <= 0.5 + 1e-6
    optimizer = agent.policy.optimizer
    assert type(optimizer) is RMSprop
    assert optimizer.param_groups[0]["recipe"] == "a2c-sb2"
    assert "recipe a2c-sb2" in optimizer.explain()
    assert "[6] d ← √(w + 1e-05)" in optimizer.explain()


@sb3
def test_sb3_trains_as_before_with_the_clipping_inside_the_step() -> None:
    """clip_global_norm=0.5 here and none in A2C: the same run, but for the 1e-6 that torch adds to the norm."""
    from stable_baselines3 import A2C

    ends = []
    for arguments, norm in ((recipe("a2c-sb2", clip_global_norm=0.5), float("inf")), (recipe("a2c-sb2"), 0.5)):
        policy = dict(optimizer_class=RMSprop, optimizer_kwargs=arguments)
        agent = A2C("MlpPolicy", "CartPole-v1", 7e-4, max_grad_norm=norm, policy_kwargs=policy, seed=0, device="cpu")
        ends.append([p.detach().clone() for p in agent.learn(300).policy.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@sb3
def test_sb3_schedules_save_and_load(tmp_path: Path) -> None:
    """A schedule of SB3 reaches every step, and a saved agent is loaded with its optimizer's state."""
    with judging(lambda t, _: at(SB2, 1e-3 * (1 - t * 5 / 200))):
        agent = example("sb3_a2c").train(200, learning_rate=lambda left: 1e-3 * left)
    agent.save(tmp_path / "agent")
    again = type(agent).load(tmp_path / "agent", device="cpu")
    ours, theirs = agent.policy.optimizer.state_dict(), again.policy.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert len(ours["state"]) == 12
    for i, slots in ours["state"].items():
        assert all(torch.equal(value, theirs["state"][i][name]) for name, value in slots.items())


@sb3
def test_sb3_drops_settings_without_a_class() -> None:
    """A2C replaces optimizer_kwargs if policy_kwargs has no optimizer_class."""
    from stable_baselines3 import A2C

    kwargs: dict[str, Any] = dict(optimizer_kwargs=dict(alpha=0.5))
    optimizer = A2C("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs, device="cpu").policy.optimizer
    assert type(optimizer) is torch.optim.RMSprop
    assert optimizer.param_groups[0]["alpha"] == 0.99
    assert optimizer.param_groups[0]["eps"] == 1e-5


@sb3
@pytest.mark.parametrize("name", ["dqn-nature", "a3c", "a2c-baselines"])
def test_sb3_takes_recipes_of_other_dialects(name: str) -> None:
    """SB3 passes lr=, torch's name; recipes with other names (learning_rate, decay, epsilon) accept it, too."""
    from stable_baselines3 import A2C

    kwargs: dict[str, Any] = dict(optimizer_class=RMSprop, optimizer_kwargs=recipe(name))
    optimizer = A2C("MlpPolicy", "CartPole-v1", 3e-4, policy_kwargs=kwargs, device="cpu").policy.optimizer
    assert optimizer.param_groups[0]["lr"] == 3e-4
    assert f"recipe {name}; lr=0.0003 instead of" in optimizer.explain()


@needs("gymnasium")
def test_cleanrl_anneals_and_clips() -> None:
    """Every step has the annealed lr that the loop writes, and gradients clipped to 0.5."""
    case = Case(Rule(), Hyper(lr=2e-3, alpha=0.99, eps=1e-5))
    with judging(lambda t, _: at(case, (1.0 - (t - 1) / 20) * 2e-3)) as judge:
        optimizer, returns = example("cleanrl_loop").train(episodes=20)
    assert judge.steps == len(returns) == 20
    assert max(judge.norms) <= 0.5 + 1e-6
    assert "[6] d ← √w + 1e-05" in optimizer.explain()


@needs("gymnasium", "torchrl")
def test_torchrl_steps_the_loss_module_by_the_recipe() -> None:
    """DQN's loss module trains by the Nature paper's rule, centered with ε = 0.01 inside; its target does not."""
    case = Case(Rule(eps_mode="inside", centered=True), Hyper(lr=5e-3, alpha=0.95, eps=0.01))
    with judging(lambda *_: case) as judge:
        optimizer, _ = example("torchrl_dqn").train(rounds=10)
    assert judge.steps == 80
    assert [p.numel() for p in optimizer.param_groups[0]["params"]] == [256, 64, 128, 2]
    assert "recipe dqn-nature; lr=0.005 instead of 0.00025" in optimizer.explain()
