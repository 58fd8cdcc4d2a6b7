"""A CleanRL-style loop on CartPole, with annealed lr and clipped gradients; only the import of RMSprop changes.

Run: pip install . gymnasium && python examples/cleanrl_loop.py
"""

import gymnasium
import torch
from torch import nn

from rmsprop import RMSprop


def train(episodes: int = 300, lr: float = 2e-3) -> tuple[RMSprop, list[int]]:
    torch.manual_seed(1)
    env = gymnasium.make("CartPole-v1")
    policy = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
    optimizer = RMSprop(policy.parameters(), lr=lr, alpha=0.99, eps=1e-5)  # was: torch.optim.RMSprop
    returns = []
    for episode in range(episodes):
        optimizer.param_groups[0]["lr"] = (1.0 - episode / episodes) * lr  # as CleanRL anneals it
        state, done, log_probs = env.reset(seed=episode)[0], False, []
        while not done:
            choice = torch.distributions.Categorical(logits=policy(torch.as_tensor(state)))
            log_probs.append(choice.log_prob(action := choice.sample()))
            state, _, ended, truncated, _ = env.step(action.item())
            done = ended or truncated
        to_go = torch.arange(len(log_probs), 0.0, -1.0)  # the reward of every step is 1
        loss = -(torch.stack(log_probs) * (to_go - to_go.mean()) / to_go.std()).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
        returns.append(len(log_probs))
    return optimizer, returns


if __name__ == "__main__":
    optimizer, returns = train()
    print(optimizer.explain(), f"\nmean return of the last 20 episodes: {sum(returns[-20:]) / 20:.0f} of 500")
