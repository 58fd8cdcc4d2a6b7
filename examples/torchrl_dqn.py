"""TorchRL: DQN's loss module on CartPole, stepped by the RMSprop of the Nature paper's recipe.

Run: pip install rmsprop torchrl gymnasium && python examples/torchrl_dqn.py
"""

import torch
from tensordict.nn import TensorDictSequential
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv
from torchrl.modules import EGreedyModule, QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate

from rmsprop import RMSprop


def train(rounds: int = 200, lr: float = 1e-3) -> tuple[RMSprop, list[float]]:
    torch.manual_seed(0)
    env = GymEnv("CartPole-v1")
    net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    actor = QValueActor(net, in_keys=["observation"], spec=env.action_spec)
    explorer = TensorDictSequential(actor, EGreedyModule(env.action_spec, 0.3, 0.05, rounds * 16))
    criterion = DQNLoss(actor, action_space=env.action_spec, delay_value=True)
    target = SoftUpdate(criterion, eps=0.98)
    optimizer = RMSprop.recipe("dqn-nature", criterion.parameters(), lr=lr)  # the target network is no parameter
    buffer, losses = TensorDictReplayBuffer(storage=LazyTensorStorage(10_000), batch_size=64), []
    for _ in range(rounds):
        with torch.no_grad():
            buffer.extend(env.rollout(16, explorer, break_when_any_done=False))
        explorer[1].step(16)
        optimizer.zero_grad()
        (loss := criterion(buffer.sample())["loss"]).backward()
        optimizer.step()
        target.step()
        losses.append(loss.item())
    return optimizer, losses


if __name__ == "__main__":
    optimizer, losses = train()
    print(optimizer.explain(), f"\nloss {losses[0]:.3f} -> {losses[-1]:.3f}")
