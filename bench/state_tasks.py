"""Five kinds of training, each a few seconds on one core, for bench/state_training.py.

A task is a function of a seed and a trainee. The seed sets weights and batches; the data and its split do not change.
The trainee makes the optimizer and takes its steps.
"""

import math
import pydoc_data.topics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmsprop.demo.data import load_digits
from rmsprop.demo.training import make_network

Result = dict[str, float]


class Trainee(Protocol):
    """The maker and keeper of a run's optimizer."""

    def make(self, params: Any, recipe: str | None = None, **settings: Any) -> Callable[..., None]:
        """Return a function that takes a loss and perhaps a learning rate, and takes a step."""


@dataclass(frozen=True)
class Task:
    """A training: its function, the metric that is compared, that metric's unit, and whether more is better."""

    run: Callable[[int, Trainee], Result]
    title: str
    metric: str
    unit: str
    higher: bool


def batches(seed: int, count: int, size: int, steps: int) -> Iterator[Tensor]:
    """Yield the rows of each batch: shuffled passes over `count` rows, the last, smaller batch of each left out."""
    draw = torch.Generator().manual_seed(seed)
    taken = 0
    while True:
        for rows in torch.randperm(count, generator=draw).split(size)[: count // size]:
            if taken == steps:
                return
            taken += 1
            yield rows


# --- images --------------------------------------------------------------------------------------


def digits(seed: int, trainee: Trainee, **changes: Any) -> Result:
    """Train the demo's convolutional network on the digits."""
    data = load_digits(0)
    network = make_network(data, seed)
    step = trainee.make(network.parameters(), lr=0.003, **changes)
    for rows in batches(seed, len(data.y_train), 64, 250):
        step(F.cross_entropy(network(data.x_train[rows]), data.y_train[rows]))
    return classified(network, data.x_test, data.y_test)


@torch.no_grad()
def classified(network: nn.Module, x: Tensor, y: Tensor) -> Result:
    """Return the share of rows that are classified right, in %, and the cross-entropy in nats."""
    network.eval()
    scores = network(x)
    right = (scores.argmax(1) == y).double().mean().item()
    return {"accuracy": 100 * right, "loss": F.cross_entropy(scores, y).item()}


class Squeeze(nn.Module):
    """Squeeze-and-excite: scale each channel by a gate computed from all channels' means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, width // 4, 1),
            nn.SiLU(),
            nn.Conv2d(width // 4, width, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return x with its channels scaled."""
        gated: Tensor = x * self.gate(x)
        return gated


class Inverted(nn.Module):
    """MBConv: expand, convolve each channel alone, squeeze-and-excite, project; the input is added if it fits."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        wide = 4 * width
        self.adds = width == out and stride == 1
        self.body = nn.Sequential(
            *normalized(nn.Conv2d(width, wide, 1, bias=False)),
            nn.SiLU(),
            *normalized(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)),
            nn.SiLU(),
            Squeeze(wide),
            *normalized(nn.Conv2d(wide, out, 1, bias=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y: Tensor = self.body(x)
        return x + y if self.adds else y


def normalized(convolution: nn.Conv2d) -> tuple[nn.Module, nn.Module]:
    """Return a convolution and its batch normalization."""
    return convolution, nn.BatchNorm2d(convolution.out_channels)


def efficientnet(seed: int, trainee: Trainee) -> Result:
    """Train a small EfficientNet on the digits at 16 x 16 pixels, under timm's rule and schedule."""
    data = load_digits(0)
    x_train, x_test = (F.interpolate(x, scale_factor=2, mode="bilinear") for x in (data.x_train, data.x_test))
    torch.manual_seed(seed)
    network = nn.Sequential(
        *normalized(nn.Conv2d(1, 8, 3, 2, 1, bias=False)),
        nn.SiLU(),
        Inverted(8, 8, 1),
        Inverted(8, 16, 2),
        Inverted(16, 16, 1),
        *normalized(nn.Conv2d(16, 64, 1, bias=False)),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, len(data.class_names)),
    )
    steps, peak = 220, 0.008  # the recipe's 0.048 for a batch of 768, by the batch
    step = trainee.make(network.parameters(), "timm-efficientnet-b0", lr=peak)
    for i, rows in enumerate(batches(seed, len(data.y_train), 64, steps)):
        lr = peak * min((i + 1) / 20, 1) * 0.97 ** (100 * i / steps)
        step(F.cross_entropy(network(x_train[rows]), data.y_train[rows]), lr)
    return classified(network, x_test, data.y_test)


# --- text ----------------------------------------------------------------------------------------


@cache
def text() -> tuple[Tensor, Tensor, int]:
    """Return the training and the test part of Python's help topics as indices of characters, and their number."""
    whole = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    letters = sorted(set(whole))
    places = {letter: i for i, letter in enumerate(letters)}
    indices = torch.tensor([places[letter] for letter in whole])
    cut = len(indices) * 9 // 10
    return indices[:cut], indices[cut:], len(letters)


class Characters(nn.Module):
    """An LSTM that predicts the next character."""

    def __init__(self, letters: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, 32)
        self.lstm = nn.LSTM(32, width, batch_first=True)
        self.out = nn.Linear(width, letters)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the scores of the next character after each."""
        scores: Tensor = self.out(self.lstm(self.embedding(rows))[0])
        return scores


def windows(of: Tensor, starts: Tensor, length: int) -> Tensor:
    """Return a row of `length` characters for each start."""
    return of[starts[:, None] + torch.arange(length)]


def next_character(network: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean cross-entropy of each next character, in nats."""
    return F.cross_entropy(network(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def lstm(seed: int, trainee: Trainee, scale: float = 1.0, **changes: Any) -> Result:
    """Train a character LSTM by char-rnn's recipe, with the loss multiplied by `scale`."""
    train, test, letters = text()
    torch.manual_seed(seed)
    network = Characters(letters, 64)
    draw = torch.Generator().manual_seed(seed)
    step = trainee.make(network.parameters(), "char-rnn", **changes)
    for _ in range(250):
        rows = windows(train, torch.randint(len(train) - 51, (16,), generator=draw), 51)
        step(scale * next_character(network, rows))
    with torch.no_grad():
        rows = windows(test, torch.arange(0, len(test) - 51, 200), 51)
        return {"bits": next_character(network, rows).item() / math.log(2)}


# --- preferences ---------------------------------------------------------------------------------

LENGTH = 32
PAIRS = 1280


class Transformer(nn.Module):
    """A causal transformer of two layers on characters."""

    def __init__(self, letters: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, width)
        self.place = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = partial(nn.TransformerEncoderLayer, width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(layer() for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, letters)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the scores of the next character after each."""
        length = rows.shape[1]
        mask = torch.full((length, length), -math.inf).triu(1)
        x = self.embedding(rows) + self.place[:length]
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        scores: Tensor = self.out(self.norm(x))
        return scores


def misspelled(rows: Tensor, seed: int) -> Tensor:
    """Return rows with three pairs of neighbors swapped in the second half of each."""
    draw = torch.Generator().manual_seed(seed)
    rows, each = rows.clone(), torch.arange(len(rows))
    for _ in range(3):
        at = torch.randint(LENGTH // 2, LENGTH - 1, (len(rows),), generator=draw)
        rows[each, at], rows[each, at + 1] = rows[each, at + 1], rows[each, at]
    return rows


@cache
def reference_model() -> tuple[Transformer, Tensor, Tensor, Tensor, Tensor]:
    """Return a model trained on the text, and pairs of rows with its log probabilities: preferred, rejected."""
    train, _, letters = text()
    torch.manual_seed(0)
    model = Transformer(letters)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        optimizer.zero_grad()
        next_character(
            model, windows(train, torch.randint(len(train) - LENGTH, (32,), generator=draw), LENGTH)
        ).backward()
        optimizer.step()
    model.bfloat16().float()  # the policy starts from these weights in bfloat16
    preferred = windows(train, torch.randint(len(train) - LENGTH, (PAIRS,), generator=draw), LENGTH)
    rejected = misspelled(preferred, 1)
    with torch.no_grad():
        return model, preferred, rejected, log_probability(model, preferred), log_probability(model, rejected)


def log_probability(model: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Return the log probability of the second half of each row, given the first."""
    scores = model(rows[:, :-1])[:, LENGTH // 2 - 1 :]
    following = rows[:, LENGTH // 2 :]
    return -F.cross_entropy(scores.transpose(1, 2), following, reduction="none").sum(1)


def preference(seed: int, trainee: Trainee) -> Result:
    """Train bfloat16 weights by the DPO loss to prefer text over misspelled text; the last pairs test."""
    reference, preferred, rejected, base_preferred, base_rejected = reference_model()
    weights = {name: p.detach().bfloat16().requires_grad_() for name, p in reference.named_parameters()}

    def margin(rows: Tensor) -> Tensor:
        """Return the rewards of the preferred rows less those of the rejected."""
        wide = {name: p.float() for name, p in weights.items()}  # products in float32, as bfloat16's accumulate
        both = torch.cat([preferred[rows], rejected[rows]])
        found = log_probability(lambda x: torch.func.functional_call(reference, wide, (x,)), both)
        kept, lost = found.chunk(2)
        return 0.1 * (kept - base_preferred[rows] - lost + base_rejected[rows])

    # the recipe's 5e-7 is for matrices of 4096 rows or more; these have 64
    lr, warm_up = 64 * 5e-7, 20
    step = trainee.make(list(weights.values()), "dpo", lr=lr, clip_global_norm=10.0, rounding="stochastic")
    cut = PAIRS * 3 // 5
    for i, rows in enumerate(batches(seed, cut, 16, 150)):
        step(-F.logsigmoid(margin(rows)).mean(), lr * min((i + 1) / warm_up, 1))
    with torch.no_grad():
        held = margin(torch.arange(cut, PAIRS))
        return {"accuracy": 100 * (held > 0).double().mean().item(), "loss": -F.logsigmoid(held).mean().item()}


# --- reinforcement learning ----------------------------------------------------------------------


class CartPole:
    """Several copies of gymnasium's CartPole-v1 that restart by themselves.

    Source: gymnasium 1.0, envs/classic_control/cartpole.py (Barto, Sutton and Anderson, 1983), Euler steps.
    """

    LIMIT = 500  # steps of an episode; each is worth 1

    def __init__(self, count: int, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        self.state = self.draw.uniform(-0.05, 0.05, (count, 4))
        self.age = np.zeros(count, int)

    def step(self, right: Any) -> tuple[Any, Any, Any]:
        """Push each cart. Returns: the new states, and which episodes fell, and which ran out of time."""
        x, speed, angle, turn = self.state.T
        force = np.where(right, 10.0, -10.0)
        cosine, sine = np.cos(angle), np.sin(angle)
        pull = (force + 0.05 * turn**2 * sine) / 1.1  # pole mass x half-length 0.05, total mass 1.1
        angular = (9.8 * sine - cosine * pull) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        linear = pull - 0.05 * angular * cosine / 1.1
        after = np.stack([x + 0.02 * speed, speed + 0.02 * linear, angle + 0.02 * turn, turn + 0.02 * angular], 1)
        self.age += 1
        fell = (abs(after[:, 0]) > 2.4) | (abs(after[:, 2]) > 12 * 2 * math.pi / 360)
        over = (self.age >= self.LIMIT) & ~fell
        ended = fell | over
        self.state = np.where(ended[:, None], self.draw.uniform(-0.05, 0.05, after.shape), after)
        self.age[ended] = 0
        return after, fell, over


def tower(outputs: int, gain: float) -> nn.Sequential:
    """Return SB3's network for the policy or the value: two layers of 64, with orthogonal weights."""
    layers: list[nn.Module] = []
    for inputs, width, scale in ((4, 64, math.sqrt(2)), (64, 64, math.sqrt(2)), (64, outputs, gain)):
        linear = nn.Linear(inputs, width)
        nn.init.orthogonal_(linear.weight, scale)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def a2c(seed: int, trainee: Trainee, recipe: str, lr: float = 2e-3) -> Result:
    """Train A2C on CartPole in 800 updates from 16 environments, 5 steps each, with Stable-Baselines3's settings.

    The learning rate falls to 0 from 2e-3, or 1e-2 where v starts at 1, in place of 7e-4 for some 10,000 updates.
    """
    torch.manual_seed(seed)
    policy, value = tower(2, 0.01), tower(1, 1.0)
    step = trainee.make([*policy.parameters(), *value.parameters()], recipe, clip_global_norm=0.5)
    count, length, gamma = 16, 5, 0.99
    carts = CartPole(count, seed)
    for update in range(800):
        seen, pushed, rewards, ended = [], [], [], []
        with torch.no_grad():
            for _ in range(length):
                now = torch.from_numpy(carts.state).float()
                right = torch.rand(count) < policy(now).softmax(1)[:, 1]
                after, fell, over = carts.step(right.numpy())
                reward = torch.ones(count)
                if over.any():  # time ran out: the rest of the episode is worth what the value says
                    reward += gamma * torch.from_numpy(over) * value(torch.from_numpy(after).float())[:, 0]
                seen.append(now)
                pushed.append(right.long())
                rewards.append(reward)
                ended.append(torch.from_numpy(fell | over))
            to_come = value(torch.from_numpy(carts.state).float())[:, 0]
            returns = []
            for reward, end in zip(reversed(rewards), reversed(ended), strict=True):
                to_come = reward + gamma * to_come * ~end
                returns.append(to_come)
        states, actions, wanted = torch.cat(seen), torch.cat(pushed), torch.cat(returns[::-1])
        guessed = value(states)[:, 0]
        advantage = (wanted - guessed).detach()
        chosen = policy(states).log_softmax(1).gather(1, actions[:, None])[:, 0]
        step(-(advantage * chosen).mean() + 0.5 * F.mse_loss(guessed, wanted), lr * (1 - update / 800))
    return {"return": mean_return(policy, 100)}


@torch.no_grad()
def mean_return(policy: nn.Module, episodes: int) -> float:
    """Return the mean length of an episode under the likelier action."""
    carts = CartPole(episodes, 12345)
    going, total = np.ones(episodes, bool), 0
    for _ in range(CartPole.LIMIT):
        total += going.sum()
        _, fell, _ = carts.step(policy(torch.from_numpy(carts.state).float()).argmax(1).numpy())
        going &= ~fell
    return float(total / episodes)


TASKS: Mapping[str, Task] = {
    "digits": Task(digits, "digits, CNN", "accuracy", "%", True),
    "digits-centered": Task(partial(digits, centered=True), "the same, centered", "accuracy", "%", True),
    "lstm": Task(lstm, "characters, LSTM", "bits", "bits per character", False),
    "lstm-long": Task(partial(lstm, alpha=0.999), "the same, alpha 0.999", "bits", "bits per character", False),
    "lstm-small": Task(partial(lstm, scale=1e-4), "the same, loss x 1e-4", "bits", "bits per character", False),
    "a2c-sb3": Task(partial(a2c, recipe="a2c-sb3"), "CartPole, A2C", "return", "steps", True),
    "a2c-sb2": Task(partial(a2c, recipe="a2c-sb2", lr=1e-2), "CartPole, A2C, ε inside", "return", "steps", True),
    "efficientnet": Task(efficientnet, "digits, EfficientNet", "accuracy", "%", True),
    "preference": Task(preference, "preferences, bfloat16, transformer", "accuracy", "%", True),
}
