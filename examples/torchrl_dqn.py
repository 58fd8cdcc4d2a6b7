"""TorchRL: DQN's loss module on CartPole, stepped by the RMSprop of the Nature paper's recipe.

Run: pip install . torchrl gymnasium && python examples/torchrl_dqn.py
"""

import torch
from tensordict.nn import TensorDictSequential
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv
from torchrl.modules import EGreedyModule, QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate

from rmsprop import RMSprop


def train(rounds: int = 150, lr: float = 5e-3) -> tuple[RMSprop, float]:
    torch.manual_seed(0)
    env = GymEnv("CartPole-v1")
    net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    actor = QValueActor(net, in_keys=["observation"], spec=env.action_spec)
    explorer = TensorDictSequential(actor, EGreedyModule(env.action_spec, 1.0, 0.05, rounds * 100))
    criterion = DQNLoss(actor, action_space=env.action_spec, delay_value=True)
    target = SoftUpdate(criterion, eps=0.98)
    optimizer = RMSprop.recipe("dqn-nature", criterion.parameters(), lr=lr)  # without the target network
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10_000), batch_size=64)
    for _ in range(rounds):
        buffer.extend(env.rollout(200, explorer).detach())
        explorer[1].step(200)
        for _ in range(8):
            optimizer.zero_grad()
            criterion(buffer.sample())["loss"].backward()
            optimizer.step()
            target.step()
    with torch.no_grad():
        return optimizer, env.rollout(500, actor)["next", "reward"].sum().item()


if __name__ == "__main__":
    optimizer, reward = train()
    print(optimizer.explain(), f"\nreturn of one episode {reward:.0f} of 500")
