"""A3C: train one network on CartPole in four processes that share one RMSprop and its state, without locks.

    python examples/a3c_cartpole.py [--episodes 800] [--workers 4] [--start spawn]

Prints the mean return of the last 100 episodes during training, and finally that of 20 games of the greedy policy.
Source: Mnih et al., arXiv:1602.01783; CartPole: Barto, Sutton and Anderson, 1983, as in Gymnasium.
"""

import argparse
import math
import random
from collections import deque
from typing import Any

import torch
from torch import multiprocessing, nn

from rmsprop import RMSprop


class CartPole:
    """A pole on a cart that is pushed left or right. The return is the number of steps it stays up, at most 500."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def reset(self) -> list[float]:
        """Start a game. Returns: the cart's position and speed, and the pole's angle and angular speed."""
        self.state, self.steps = [self.random.uniform(-0.05, 0.05) for _ in range(4)], 0
        return self.state

    def step(self, right: int) -> tuple[list[float], bool, bool]:
        """Push the cart. Returns: the new state, whether the pole fell, and whether the game is over."""
        x, speed, angle, turn = self.state
        force, length, cart, pole, dt = 10.0 if right else -10.0, 0.5, 1.0, 0.1, 0.02
        sin, cos, mass = math.sin(angle), math.cos(angle), cart + pole
        pull = (force + pole * length * turn * turn * sin) / mass
        bend = (9.8 * sin - cos * pull) / (length * (4 / 3 - pole * cos * cos / mass))
        push = pull - pole * length * bend * cos / mass
        self.state = [x + dt * speed, speed + dt * push, angle + dt * turn, turn + dt * bend]
        self.steps += 1
        fell = abs(self.state[0]) > 2.4 or abs(self.state[2]) > math.radians(12)
        return self.state, fell, fell or self.steps == 500


def network() -> nn.ModuleDict:
    """Return the policy network, which gives logits, and the value network."""
    heads = {"policy": 2, "value": 1}
    return nn.ModuleDict({k: nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, n)) for k, n in heads.items()})


def worker(rank: int, shared: nn.ModuleDict, optimizer: RMSprop, returns: Any, args: argparse.Namespace) -> None:
    """Play and step the shared network with gradients of a local copy, until the learning rate is 0."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed + rank)
    game, own = CartPole(args.seed + rank), network()
    state = game.reset()
    while optimizer.param_groups[0]["lr"] > 0:  # decays to 0 over the run
        own.load_state_dict(shared.state_dict())
        states, actions, over, fell = [], [], False, False
        while len(states) < 20 and not over:
            with torch.no_grad():
                logits = own["policy"](torch.tensor([state]))
            states.append(state)
            actions.append(int(torch.multinomial(logits.softmax(-1), 1)))
            state, fell, over = game.step(actions[-1])
        with torch.no_grad():
            total = 0.0 if fell else float(own["value"](torch.tensor([state])))
        targets = [total := 1.0 + 0.99 * total for _ in states][::-1]
        advantage = torch.tensor(targets) - own["value"](torch.tensor(states))[:, 0]
        log = own["policy"](torch.tensor(states)).log_softmax(-1)
        chosen = log.gather(1, torch.tensor(actions)[:, None])[:, 0]
        entropy = -(log.exp() * log).sum(-1)
        own.zero_grad()
        (advantage.square() / 2 - chosen * advantage.detach() - 0.01 * entropy).sum().backward()
        for theirs, mine in zip(shared.parameters(), own.parameters(), strict=True):
            theirs.grad = mine.grad  # gradients are local; only parameters and the optimizer's state are shared
        optimizer.step()
        if over:
            returns.put(game.steps)
            state = game.reset()


def play(net: nn.ModuleDict, games: int = 20) -> float:
    """Return the mean return of games of the greedy policy."""
    game, total = CartPole(12345), 0
    for _ in range(games):
        state, over = game.reset(), False
        while not over:
            with torch.no_grad():
                state, _, over = game.step(int(net["policy"](torch.tensor([state])).argmax()))
        total += game.steps
    return total / games


def main() -> None:
    """Train, and print the progress."""
    parser = argparse.ArgumentParser()
    for name, default in (("episodes", 800), ("workers", 4), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--start", default="spawn", choices=multiprocessing.get_all_start_methods())
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    net = network().share_memory()
    rate = torch.tensor(4e-3)  # shared, so that all workers use the value that is set below
    optimizer = RMSprop(net.parameters(), dialect="a3c2016", learning_rate=rate, epsilon=1e-3).share_memory()
    context = multiprocessing.get_context(args.start)
    returns, last = context.SimpleQueue(), deque(maxlen=100)
    work = (net, optimizer, returns, args)
    workers = [context.Process(target=worker, args=(i, *work), daemon=True) for i in range(args.workers)]
    for process in workers:
        process.start()
    for episode in range(1, args.episodes + 1):
        last.append(returns.get())
        rate.fill_(4e-3 * (1 - episode / args.episodes))
        if episode % max(1, args.episodes // 10) == 0:
            print(f"{episode:5} episodes: the last {len(last)} returned {sum(last) / len(last):.0f} on average")
    for process in workers:
        process.join()
    print(f"greedy policy: {play(net):.0f} of 500")


if __name__ == "__main__":
    main()
