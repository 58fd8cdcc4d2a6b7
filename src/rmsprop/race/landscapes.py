"""Two-dimensional losses ("landscapes"), and races of optimizers down them.

A race steps a torch parameter of two numbers with the optimizer classes that train networks, on gradients from
autograd. No update rule is written here. To add a landscape, add a row to `LANDSCAPES`. To add an optimizer, add a
row to `OPTIMIZERS` and its suggested learning rate to each landscape.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from rmsprop.optimizer import RMSprop

Floats = NDArray[np.float64]
Surface = Callable[[Tensor, Tensor], Tensor]

FAR = 1e6
"""The distance from the window's middle, in window widths, beyond which a run has diverged."""

TARGET = 1e-3
"""The target of a race, as a share of the starting loss. Every minimum here has loss 0."""

MOST_STEPS = 2000
"""The largest number of steps of a race."""

CONDITION = 100.0
"""The default condition number of the ravines: steep curvature 100, flat curvature 1."""


@dataclass(frozen=True)
class Racer:
    """An optimizer for races: its label, its settings besides the learning rate, and its constructor."""

    label: str
    settings: str
    make: Callable[[list[Tensor], float], Optimizer]


# alpha is Hinton's 0.9 (Coursera lecture 6e). torch's default 0.99 averages over a hundred steps, about as long as
# a whole race, and with v starting at 0 makes the first step ten learning rates long.
OPTIMIZERS: dict[str, Racer] = {
    "sgd": Racer("SGD", "plain", lambda params, lr: torch.optim.SGD(params, lr=lr)),
    "momentum": Racer(
        "SGD momentum", "momentum 0.9", lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9)
    ),
    "adam": Racer("Adam", "betas 0.9, 0.999, eps 1e-8", lambda params, lr: torch.optim.Adam(params, lr=lr)),
    "rmsprop": Racer(
        "RMSprop", "alpha 0.9, eps 1e-8", lambda params, lr: RMSprop(params, lr=lr, alpha=0.9, eps=1e-8)
    ),
    "rmsprop-textbook": Racer(
        "RMSprop textbook",
        "beta 0.9, epsilon 1e-6 in the root",
        lambda params, lr: RMSprop(params, dialect="textbook", learning_rate=lr, beta=0.9, epsilon=1e-6),
    ),
}

ENTRANTS = ("sgd", "momentum", "adam", "rmsprop")
"""The default optimizers of a race."""


@dataclass(frozen=True)
class Landscape:
    """A loss over two coordinates, with the settings of a race on it.

    Units:  `noise` is the standard deviation of the noise on each gradient coordinate, in units of the gradient.
            `angle` is in degrees. A landscape without a condition number has None.
    Shapes: `f` is elementwise over two tensors of the same shape. `window` is (x low, x high, y low, y high).
    """

    name: str
    description: str
    lesson: str
    f: Surface
    start: tuple[float, float]
    minima: tuple[tuple[float, float], ...]
    window: tuple[float, float, float, float]
    steps: int
    lrs: Mapping[str, float]
    noise: float = 0.0
    condition: float | None = None
    angle: int = 0

    def loss(self, points: Floats) -> Floats:
        """Return the loss without noise, of shape (...), at points of shape (..., 2)."""
        grid = torch.from_numpy(np.ascontiguousarray(points, dtype=np.float64))
        values: Floats = self.f(grid[..., 0], grid[..., 1]).numpy()
        return values

    def distance(self, point: Floats) -> float:
        """Return the Euclidean distance from a point of shape (2,) to the nearest minimum."""
        return min(math.hypot(point[0] - x, point[1] - y) for x, y in self.minima)

    @property
    def target(self) -> float:
        """The loss to reach: `TARGET` times the loss at the start."""
        return TARGET * float(self.loss(np.array(self.start)))

    def starting_at(self, x: float, y: float) -> Landscape:
        """Return this landscape with another starting point, and a window wide enough to show it.

        Around a start outside the window, the window reaches as far on the other side of the nearest minimum, where
        runs that overshoot go.

        Raises: ValueError if a coordinate is not between -1000 and 1000.
        """
        if not (abs(x) <= 1000 and abs(y) <= 1000):
            raise ValueError(f"start={x:g},{y:g}: both coordinates must be numbers between -1000 and 1000.")
        left, right, low, high = self.window
        if not (left <= x <= right and low <= y <= high):
            near_x, near_y = min(self.minima, key=lambda minimum: math.dist(minimum, (x, y)))
            wide, tall = 1.06 * abs(x - near_x), 1.06 * abs(y - near_y)
            left, right = min(left, near_x - wide), max(right, near_x + wide)
            low, high = min(low, near_y - tall), max(high, near_y + tall)
        return dataclasses.replace(self, start=(x, y), window=(left, right, low, high))

    def seen_at(self, aspect: float) -> Landscape:
        """Return this landscape with its window widened to a ratio of width to height, for equal scales."""
        left, right, low, high = self.window
        wide = max(right - left, aspect * (high - low)) / 2
        x, y, tall = (left + right) / 2, (low + high) / 2, wide / aspect
        return dataclasses.replace(self, window=(x - wide, x + wide, y - tall, y + tall))


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The path of one optimizer.

    `steps` is the requested number of steps.

    Shapes: `points` is (n + 1, 2) and `losses` (n + 1,), the start first. n is `steps`, or `diverged_at - 1` if the
            run diverged.
    Units:  `losses` never include the noise of a noisy landscape. `target_at` and `diverged_at` count steps.
    """

    name: str
    label: str
    lr: float
    steps: int
    settings: str
    points: Floats
    losses: Floats
    distance: float
    target_at: int | None
    diverged_at: int | None

    @property
    def diverged(self) -> bool:
        """True if the run left the landscape, or became infinite or NaN."""
        return self.diverged_at is not None


def checked_condition(condition: float) -> float:
    """Return the condition number as a float. Raises: ValueError if no ravine can have it."""
    if not 1 <= condition <= 1e9:  # false for NaN too
        raise ValueError(
            f"condition={condition:g}: the steep curvature over the flat one is a number from 1 (a bowl) to 1e9, "
            "such as 100."
        )
    return float(condition)


def turn(angle: float) -> tuple[float, float]:
    """Return the cosine and the sine of an angle in degrees."""
    return math.cos(math.radians(angle)), math.sin(math.radians(angle))


def ravine(condition: float = CONDITION, angle: int = 0) -> Landscape:
    """Return the quadratic (u² + condition·w²)/2 in coordinates u, w that are rotated by an angle in degrees.

    At angle 0, u and w are x and y, so the steep direction is an axis. The start is rotated, too.

    Raises: ValueError for a condition number below 1.
    """
    k = checked_condition(condition)
    c, s = turn(angle)

    def _loss(x: Tensor, y: Tensor) -> Tensor:
        u, w = c * x + s * y, c * y - s * x
        return 0.5 * (u * u + k * w * w)

    return Landscape(
        name="ravine",
        description=f"A quadratic that is {k:g} times as steep across as along: (x² + {k:g} y²)/2.",
        lesson="The steep walls limit SGD's learning rate, so SGD zigzags between them and crawls along the floor. "
        "Momentum and Adam overshoot the minimum and return. RMSprop divides each coordinate by its recent gradient "
        "size, so the steep coordinate does not slow the flat one: RMSprop turns into the ravine and runs straight "
        "down. The price comes at the end. With a fixed learning rate RMSprop does not settle, because the divisor "
        "shrinks with the gradients. A step throws it off the floor again, and it keeps hopping, half a learning "
        "rate to each side. A decaying learning rate fixes that.",
        f=_loss,
        start=(-4 * c - s, c - 4 * s),
        minima=((0.0, 0.0),),
        window=(-4.6, 1.6, -1.5, 1.5),
        steps=100,
        # SGD is stable below 2/k, momentum 0.9 below 3.8/k: one number for both would hide what each can do.
        lrs={"sgd": 1.9 / k, "momentum": 0.65 / k, "adam": 0.5, "rmsprop": 0.13, "rmsprop-textbook": 0.13},
        condition=k,
        angle=angle,
    )


def tilted_ravine(condition: float = CONDITION) -> Landscape:
    """Return the ravine rotated by 45 degrees. Raises: ValueError below 1."""
    k = checked_condition(condition)
    return dataclasses.replace(
        ravine(k, 45),
        name="tilted-ravine",
        description=f"The ravine of condition {k:g} rotated by 45 degrees, so that no axis is the steep one.",
        lesson="RMSprop rescales coordinates, not directions. Along the diagonal, both coordinates meet the same "
        "steep walls and are scaled down alike, so the advantage is gone: RMSprop ends four times as far from the "
        "minimum as on the straight ravine and never reaches the target. Adam, whose first moment averages the "
        "zigzag, takes 43 steps instead of 9. SGD and momentum end at exactly the same distance.",
        window=(-4.2, 1.6, -4.2, 1.6),
        lrs={**ravine(k).lrs, "adam": 1.3},
    )


def noisy_ravine(condition: float = CONDITION) -> Landscape:
    """Return the ravine with noise on each gradient, as from mini-batches. Raises: ValueError below 1."""
    k = checked_condition(condition)
    straight = ravine(k)
    return dataclasses.replace(
        straight,
        name="noisy-ravine",
        description=f"The ravine of condition {k:g} with noise of size 5 on each gradient coordinate.",
        lesson="Every optimizer gets the same noise, and the losses shown exclude it. SGD carries the noise from "
        "wall to wall. RMSprop stays on the floor, but where the noise is larger than the slope, it divides by the "
        "noise: its steps along the floor shrink, and near the minimum it wanders. Adam, which also averages the "
        "gradient, mostly ends with smaller oscillations.",
        window=(-4.6, 2.4, -1.5, 1.5),
        lrs={"sgd": 1.6 / k, "momentum": 0.4 / k, "adam": 0.19, "rmsprop": 0.19, "rmsprop-textbook": 0.19},
        noise=5.0,
    )


def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    """Return Rosenbrock's banana function, (1 − x)² + 100 (y − x²)², with minimum 0 at (1, 1)."""
    return (1 - x) ** 2 + 100 * (y - x * x) ** 2


def beale(x: Tensor, y: Tensor) -> Tensor:
    """Return Beale's function, with flat plains, sharp corners, and minimum 0 at (3, 0.5)."""
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


_ROWS = (
    ravine(),
    tilted_ravine(),
    noisy_ravine(),
    Landscape(
        name="rosenbrock",
        description="Rosenbrock's banana valley, (1 − x)² + 100 (y − x²)²: steep walls and a flat, curved floor.",
        lesson="RMSprop loses here. It reaches the floor of the valley in a few steps, but the floor curves, so no "
        "coordinate stays the steep one for long. Hops of fixed length from wall to wall keep the divisor large and "
        "the progress along the floor slow. A smaller learning rate would hop less and travel even slower. Momentum "
        "averages the hops away and arrives first.",
        f=rosenbrock,
        start=(-1.2, 1.0),
        minima=((1.0, 1.0),),
        window=(-1.8, 1.8, -0.6, 2.0),
        steps=500,
        lrs={"sgd": 0.0032, "momentum": 0.0032, "adam": 0.8, "rmsprop": 0.019, "rmsprop-textbook": 0.019},
    ),
    Landscape(
        name="beale",
        description="Beale's function: a flat plain between sharp corners, minimum at (3, 0.5).",
        lesson="The start is steep and the plain before the minimum nearly flat. The steep start throws SGD, "
        "momentum and Adam out of the figure, and they return. RMSprop takes steps of nearly the same length on the "
        "slope and on the plain: it reaches the target first, and hovers at the end, farthest from the minimum. Adam "
        "ends closest to it.",
        f=beale,
        start=(1.0, 1.5),
        minima=((3.0, 0.5),),
        window=(0.0, 3.8, -0.8, 1.8),
        steps=200,
        lrs={"sgd": 0.032, "momentum": 0.0032, "adam": 0.5, "rmsprop": 0.25, "rmsprop-textbook": 0.25},
    ),
    Landscape(
        name="saddle",
        description="A saddle at (0, 0) between two minima, x²/2 + (y² − 1)²/4, entered almost along its ridge.",
        lesson="Along the ridge, the gradient points into the saddle, and the way out begins with a slope of a "
        "thousandth. SGD and momentum wait until that slope grows: after 5 steps they are still on the ridge. "
        "RMSprop and Adam divide the slope by its own size, so they leave the ridge with their first steps. RMSprop "
        "arrives first, at step 6, and SGD at step 14; but SGD settles, and RMSprop hovers.",
        f=lambda x, y: 0.5 * x * x + 0.25 * (y * y - 1) ** 2,
        start=(-1.5, 0.001),
        minima=((0.0, 1.0), (0.0, -1.0)),
        window=(-1.9, 1.5, -1.7, 1.7),
        steps=100,
        lrs={"sgd": 0.8, "momentum": 0.5, "adam": 0.65, "rmsprop": 0.25, "rmsprop-textbook": 0.05},
    ),
    Landscape(
        name="d2l",
        description="The ellipse of Dive into Deep Learning 12.8, 0.1 x² + 2 y², with its start and learning rate.",
        lesson="All optimizers have the learning rate 0.4. The book prints x1: -0.010599, x2: 0.000000 after 20 "
        "steps of RMSprop. The textbook rule (eps inside the root) ends exactly there, and torch's rule at "
        "-0.010598. SGD is slow along the floor. At this rate, momentum 0.9 and Adam overshoot the minimum and are "
        "still returning.",
        f=lambda x, y: 0.1 * x * x + 2 * y * y,
        start=(-5.0, -2.0),
        minima=((0.0, 0.0),),
        window=(-5.6, 3.2, -3.0, 3.0),
        steps=20,
        lrs=dict.fromkeys(OPTIMIZERS, 0.4),
    ),
)

LANDSCAPES: dict[str, Landscape] = {row.name: row for row in _ROWS}

RAVINES: dict[str, Callable[[float], Landscape]] = {
    "ravine": ravine,
    "tilted-ravine": tilted_ravine,
    "noisy-ravine": noisy_ravine,
}
"""The landscapes that have a condition number."""


def find_landscape(name: str, condition: float | None = None) -> Landscape:
    """Return a landscape by name, with another condition number if one is given.

    Raises: ValueError for an unknown name, or for a condition number of a landscape that has none.
    """
    if name not in LANDSCAPES:
        raise ValueError(f"landscape={name!r} is unknown; choose one of {', '.join(LANDSCAPES)}.")
    if condition is None:
        return LANDSCAPES[name]
    if name not in RAVINES:
        raise ValueError(f"condition={condition:g} has no meaning on {name!r}; set it on {', '.join(RAVINES)}.")
    return RAVINES[name](condition)


def learning_rates(
    landscape: Landscape, optimizers: Sequence[str], lr: float | Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return the learning rate of each optimizer: the given one, or the landscape's suggestion.

    Raises: ValueError for no, unknown, or repeated optimizers, and for a rate that is not positive and finite.
    """
    if isinstance(optimizers, str) or not optimizers:
        raise ValueError(f"optimizers={optimizers!r}: give a list of at least one of {', '.join(OPTIMIZERS)}.")
    for name in optimizers:
        if name not in OPTIMIZERS:
            raise ValueError(f"optimizer {name!r} is unknown; choose from {', '.join(OPTIMIZERS)}.")
    if len(set(optimizers)) < len(optimizers):
        raise ValueError(f"optimizers={', '.join(optimizers)}: name each one once.")
    given = dict.fromkeys(optimizers, lr) if isinstance(lr, (int, float)) else dict(lr or {})
    for name, value in given.items():
        if name not in optimizers:
            raise ValueError(f"lr is given for {name!r}, which is not in this race of {', '.join(optimizers)}.")
        if not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise ValueError(f"lr={value!r} for {name}: a learning rate is a positive finite number, such as 0.1.")
    return {name: float(given.get(name, landscape.lrs[name])) for name in optimizers}


def race(
    landscape: Landscape | str,
    optimizers: Sequence[str] = ENTRANTS,
    steps: int | None = None,
    lr: float | Mapping[str, float] | None = None,
    seed: int = 0,
) -> list[Trajectory]:
    """Run each optimizer from the landscape's start, and record its path.

    `steps` and `lr` default to the landscape's suggestions; `lr` is one number for all or a number per optimizer.
    On a noisy landscape, every optimizer gets the same noise, drawn from `seed`.

    Returns: one Trajectory per optimizer, in the given order.
    Raises:  ValueError for an invalid argument, before anything runs.
    """
    where = find_landscape(landscape) if isinstance(landscape, str) else landscape
    budget = where.steps if steps is None else steps
    if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= MOST_STEPS:
        raise ValueError(f"steps={budget!r}: on {where.name} give a whole number from 1 to {MOST_STEPS}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r}: give a whole number from 0 to 2**32 - 1.")
    if not where.target > 0:
        raise ValueError(
            f"start={where.start[0]:g},{where.start[1]:g} is a minimum of {where.name}; "
            "choose a start with a positive loss."
        )
    rates = learning_rates(where, optimizers, lr)
    return [_run(where, name, rate, budget, seed) for name, rate in rates.items()]


def noise(seed: int, steps: int) -> Floats:
    """Return the noise of each step, of mean 0 and variance 1, the same on every machine and on the live page.

    Each number is the sum of twelve uniform ones, less 6, which a normal distribution hardly differs from. The
    uniform ones are multiples of 2⁻³², so the sums are exact. Shape: (steps, 2).
    """
    index = np.arange(24 * steps, dtype=np.uint64) * np.uint64(0x9E3779B1)
    random = _mix(_mix(index.astype(np.uint32) ^ np.uint32(seed)) ^ np.uint32(0x85EBCA6B))
    sums: Floats = (random / 2.0**32).reshape(steps, 2, 12).sum(axis=2) - 6
    return sums


def _mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Mix the bits of 32-bit numbers. Source: the finalizer lowbias32 of C. Wellons."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    mixed: NDArray[np.uint32] = x ^ (x >> np.uint32(16))
    return mixed


def _run(landscape: Landscape, name: str, lr: float, steps: int, seed: int) -> Trajectory:
    """Step one optimizer for the given number of steps, or until the run diverges."""
    racer = OPTIMIZERS[name]
    param = torch.nn.Parameter(torch.tensor(landscape.start, dtype=torch.float64, device="cpu"))
    optimizer = racer.make([param], lr)
    tilts = torch.from_numpy(noise(seed, steps))
    left, right, low, high = landscape.window
    middle, reach = np.array([left + right, low + high]) / 2, FAR * max(right - left, high - low)
    points = [np.array(landscape.start)]
    diverged_at = None
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = landscape.f(param[0], param[1])
        if landscape.noise:
            # The gradient of a random tilt of the surface is the noise, so the noise goes through autograd, too.
            loss = loss + landscape.noise * (tilts[step - 1] * param).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        point = param.detach().numpy().copy()
        if not (np.isfinite(point).all() and np.abs(point - middle).max() <= reach):
            diverged_at = step
            break
        points.append(point)
    path = np.stack(points)
    losses = landscape.loss(path)
    arrived = np.flatnonzero(losses < landscape.target)
    return Trajectory(
        name=name,
        label=racer.label,
        lr=lr,
        steps=steps,
        settings=f"lr {lr:.4g}, {racer.settings}",
        points=path,
        losses=losses,
        distance=landscape.distance(path[-1]),
        target_at=int(arrived[0]) if len(arrived) else None,
        diverged_at=diverged_at,
    )
