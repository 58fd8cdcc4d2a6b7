"""Stable-Baselines3: A2C on CartPole with the recipe of Stable-Baselines 2's RMSprop.

Run: pip install . stable-baselines3 && python examples/sb3_a2c.py
"""

import torch
from stable_baselines3 import A2C
from stable_baselines3.common.evaluation import evaluate_policy

from rmsprop import RMSprop, recipe


def train(steps: int = 5_000, learning_rate=7e-4) -> A2C:
    torch.set_num_threads(1)  # a policy this small is slower on more threads
    agent = A2C(
        "MlpPolicy",
        "CartPole-v1",
        learning_rate=learning_rate,  # a number or a schedule, which SB3 writes into the groups at every update
        # Without optimizer_class=, A2C replaces optimizer_kwargs and uses torch's RMSprop with its own numbers.
        policy_kwargs=dict(optimizer_class=RMSprop, optimizer_kwargs=recipe("a2c-sb2")),
        seed=0,
        device="cpu",
    )
    return agent.learn(steps)


if __name__ == "__main__":
    agent = train()
    print(agent.policy.optimizer.explain())
    mean, spread = evaluate_policy(agent, agent.get_env(), n_eval_episodes=10)
    print(f"mean return {mean:.0f} ± {spread:.0f} of 500")  # 50 to 100 after 5,000 steps, which are too few to learn
