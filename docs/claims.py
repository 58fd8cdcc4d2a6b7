"""The claims of choosing.md, each a function that runs the optimizers, asserts its result, and returns it.

A marker in choosing.md names a function of CLAIMS. `build.py` writes the tables and `figures.py` draws the figures
from the results. The limits in the assertions are wider than the measured values, so that they hold on other machines
and torch versions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits, load_wine
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from rmsprop import RMSprop

Make = Callable[[Any, float], Optimizer]
Slope = Callable[[Tensor, int], Tensor]
Data = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Measured:
    """The result of a claim: a table for the page, the numbers for its figure, and phrases that the page must say."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: Mapping[str, Any] = field(default_factory=dict)
    quotes: Sequence[str] = ()


MAKERS: Mapping[str, Make] = {
    "SGD": lambda params, lr: SGD(params, lr=lr),
    "SGD + momentum 0.9": lambda params, lr: SGD(params, lr=lr, momentum=0.9),
    "RMSprop": lambda params, lr: RMSprop(params, lr=lr),
    "RMSprop + momentum 0.9": lambda params, lr: RMSprop(params, lr=lr, momentum=0.9),
    "Adam": lambda params, lr: Adam(params, lr=lr),
}


def weight(*values: float) -> nn.Parameter:
    """Return a float64 parameter."""
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def walk(
    optimizer: Optimizer,
    param: nn.Parameter,
    slope: Slope,
    steps: int,
    falling: bool = False,
) -> Tensor:
    """Step `param` along the gradients slope(param, t), t = 1, 2, ..., optionally with a linearly falling lr.

    Returns: every position, the start first.
    """
    full_lr = optimizer.param_groups[0]["lr"]
    path = [param.detach().clone()]
    for t in range(1, steps + 1):
        if falling:
            optimizer.param_groups[0]["lr"] = full_lr * (1 - (t - 1) / steps)
        param.grad = slope(param.detach(), t)
        optimizer.step()
        path.append(param.detach().clone())
    return torch.stack(path)


def constant(gradient: float) -> Slope:
    """Return the same gradient at every step."""
    return lambda p, _: torch.full_like(p, gradient)


def rarely(period: int, rare: float, common: float) -> Slope:
    """Return one gradient at the first step of each period, and another at the others."""
    return lambda p, t: torch.full_like(p, rare if t % period == 1 else common)


def bowl(*curvature: float) -> Slope:
    """Return the gradients of half the sum of curvature·p²."""
    factors = torch.tensor(curvature, dtype=torch.float64)
    return lambda p, _: factors * p


def lengths(path: Tensor) -> Tensor:
    """Return the length of every step of a weight's path."""
    return path[:, 0].diff().abs()


# --- strengths ----------------------------------------------------------------------------------


def scale() -> Measured:
    """A loss multiplied by 1000 leaves RMSprop's path unchanged; SGD's diverges."""
    paths: dict[str, list[Tensor]] = {}
    for name, lr in (("SGD", 0.1), ("RMSprop", 0.01)):
        for factor in (1.0, 1000.0):
            param = weight(1.0, -0.5)
            path = walk(MAKERS[name]([param], lr), param, bowl(factor, 10 * factor), 50)
            paths.setdefault(name, []).append(path)
    change = {name: float((b - a).abs().max() / a.abs().max()) for name, (a, b) in paths.items()}
    assert change["RMSprop"] < 1e-4, change
    assert change["SGD"] > 1e6, change
    rows = [["SGD, lr 0.1", "runs away"], ["RMSprop, lr 0.01", "stays, to 0.01 %"]]
    return Measured(["optimizer", "its path, when the loss is multiplied by 1000"], rows)


CONDITIONS = (1.0, 10.0, 100.0, 1000.0, 10000.0)
RAVINE_LRS = tuple(2.0**-i for i in range(-1, 16))
NEAR = 1e-6  # a distance below this counts as arrived


@cache
def ravines() -> dict[tuple[str, int], list[tuple[float, float]]]:
    """Measure the distance left after 300 steps in ravines of every condition, aligned and rotated by 45 degrees.

    All ravines share one parameter, since these optimizers step element by element.

    Returns: (optimizer, degrees) -> for each condition the distance left, in units of the starting distance along
        each direction, and the lr that left it: the best of a grid of factors of 2, or the lowest that arrived.
            An lr counts as failed if a run gets a hundred times farther away than its start.
    """
    turns = [torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in (0.0, math.pi / 4)]
    turn = torch.stack(turns).double()[:, None]
    curvature = torch.tensor([[1.0, k] for k in CONDITIONS], dtype=torch.float64)[None, :, :, None]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for name, make in MAKERS.items():
        best = [[(math.inf, 0.0) for _ in CONDITIONS] for _ in turns]
        for lr in RAVINE_LRS:
            param = nn.Parameter(turn @ torch.ones(1, len(CONDITIONS), 2, 1, dtype=torch.float64))
            path = walk(make([param], lr), param, lambda p, _: turn @ (curvature * (turn.mT @ p)), 300, falling=True)
            far = (turn.mT @ path).abs().amax((-1, -2))
            failed = ~(far.amax(0) < 100)  # a NaN fails too
            left = far[-1].clamp(min=NEAR).masked_fill(failed, math.inf)
            for i, row in enumerate(left.tolist()):
                best[i] = [min(old, (distance, lr)) for old, distance in zip(best[i], row, strict=True)]
        found[name, 0], found[name, 45] = best
    return found


def _left(distance: float) -> str:
    if distance <= NEAR:
        return "arrived"
    return f"{100 * distance:.0f} %" if distance >= 0.01 else f"{100 * distance:.1g} %"


def _ravine_rows(names: Sequence[str], degrees: int) -> list[list[str]]:
    return [[name, *(f"{_left(d)}, lr {lr:.1g}" for d, lr in ravines()[name, degrees])] for name in names]


_RAVINE_HEADER = ["distance left after 300 steps, at the best lr", *(f"condition {k:g}" for k in CONDITIONS)]


def ravine() -> Measured:
    """In a ravine along the axes, the condition does not affect RMSprop; SGD and momentum slow down with it."""
    found = ravines()
    rms = found["RMSprop", 0]
    assert all(distance <= NEAR for distance, _ in rms), rms
    assert len({lr for _, lr in rms}) == 1, rms
    assert found["SGD", 0][3][0] > 0.3, found["SGD", 0]
    assert found["SGD", 0][1][1] > 30 * found["SGD", 0][3][1], found["SGD", 0]
    assert found["SGD + momentum 0.9", 0][3][0] < 1e-3, "momentum is good enough at a condition of 1000"
    assert found["SGD + momentum 0.9", 0][4][0] > 0.3, found["SGD + momentum 0.9", 0]
    return Measured(_RAVINE_HEADER, _ravine_rows(["SGD", "SGD + momentum 0.9", "RMSprop"], 0), {"found": found})


def turned() -> Measured:
    """A ravine rotated by 45 degrees takes RMSprop's advantage away and does not affect momentum."""
    found = ravines()
    assert found["RMSprop", 45][3][0] > 0.5 * found["SGD", 45][3][0] > 0.2, found["RMSprop", 45]
    assert found["Adam", 45][3][0] < 0.8 * found["RMSprop", 45][3][0], found["Adam", 45]
    for name in ("SGD", "SGD + momentum 0.9"):
        for (along, _), (across, _) in zip(found[name, 0], found[name, 45], strict=True):
            assert math.isclose(along, across, rel_tol=0.1, abs_tol=1e-6), (name, along, across)
    assert found["SGD + momentum 0.9", 45][3][0] < 1e-3 < found["Adam", 45][3][0]
    return Measured(_RAVINE_HEADER, _ravine_rows(["SGD", "SGD + momentum 0.9", "RMSprop", "Adam"], 45))


def train(make: Make, lr: float, data: Data, hidden: Sequence[int], epochs: int, batch: int, seed: int) -> float:
    """Train a ReLU network on the first two tensors, with an lr that falls to 0.

    Returns: the accuracy on the last two tensors, a share.
    """
    features, labels, test_features, test_labels = data
    torch.manual_seed(seed)
    sizes = [features.shape[1], *hidden, int(labels.max()) + 1]
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    net = nn.Sequential(*layers[:-1])
    optimizer = make(net.parameters(), lr)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * (1 - epoch / epochs)
        for rows in torch.split(torch.randperm(len(features)), batch):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(net(features[rows]), labels[rows]))
            optimizer.step()
    with torch.no_grad():
        return float((net(test_features).argmax(1) == test_labels).double().mean())


def unscaled() -> Measured:
    """On raw wine measurements the adaptive optimizers get far ahead; on standardized ones all are equal."""
    raw, labels = load_wine(return_X_y=True)
    tables = {"raw": raw, "standardized": (raw - raw.mean(0)) / raw.std(0)}
    best: dict[str, dict[str, float]] = {}
    for kind, table in tables.items():
        features, classes = torch.tensor(table, dtype=torch.float32), torch.tensor(labels)
        data = (features, classes, features, classes)
        grid = [10**-i for i in range(7)] if kind == "raw" else [0.1, 0.01]
        for name, make in MAKERS.items():
            scores = [np.mean([train(make, lr, data, (), 25, 16, seed) for seed in (0, 1)]) for lr in grid]
            best.setdefault(name, {})[kind] = float(max(scores))
    assert all(scores["standardized"] > 0.97 for scores in best.values()), best
    for adaptive in ("RMSprop", "RMSprop + momentum 0.9", "Adam"):
        for plain in ("SGD", "SGD + momentum 0.9"):
            assert best[adaptive]["raw"] > best[plain]["raw"] + 0.1, best
    rows = [[name, f"{100 * s['raw']:.0f} %", f"{100 * s['standardized']:.0f} %"] for name, s in best.items()]
    return Measured(["right at the best lr, after 25 epochs", "raw", "standardized"], rows)


DIGIT_LRS = tuple(10 ** (i / 2) for i in range(-8, 2))


def digits() -> Measured:
    """On the digits all optimizers reach the same accuracy; what differs is the lr they need."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.2, random_state=0, stratify=labels)
    x, x_test, y, y_test = (torch.tensor(part) for part in parts)
    data = (x.float(), y, x_test.float(), y_test)
    scores = {
        name: [float(np.mean([train(make, lr, data, (64,), 10, 64, seed) for seed in (0, 1)])) for lr in DIGIT_LRS]
        for name, make in MAKERS.items()
    }
    best = {name: max(found) for name, found in scores.items()}
    best_lr = {name: DIGIT_LRS[found.index(best[name])] for name, found in scores.items()}
    assert min(best.values()) > 0.94, best
    assert max(best.values()) - min(best.values()) < 0.025, best
    assert best_lr["SGD"] > 9 * best_lr["RMSprop"], best_lr
    at_1 = DIGIT_LRS.index(1.0)
    assert max(scores[name][at_1] for name in ("RMSprop", "RMSprop + momentum 0.9", "Adam")) < 0.6, scores
    low, high = DIGIT_LRS.index(1e-4), DIGIT_LRS.index(0.1)
    with_momentum = scores["RMSprop + momentum 0.9"]
    assert with_momentum[low] > scores["RMSprop"][low] + 0.1, scores
    assert with_momentum[high] < scores["RMSprop"][high] - 0.1, scores
    rows = []
    for name, found in scores.items():
        good = [lr for lr, score in zip(DIGIT_LRS, found, strict=True) if score >= 0.95]
        window = f"{min(good):.2g} to {max(good):.2g}" if good else "none"
        rows.append([name, f"{100 * best[name]:.1f} %", f"{best_lr[name]:.2g}", window])
    header = ["optimizer", "correct on test images", "at lr", "lrs of the grid with 95 % or more"]
    return Measured(header, rows, {"lrs": DIGIT_LRS, "scores": scores})


# --- weaknesses ---------------------------------------------------------------------------------


def smooth() -> Measured:
    """On a smooth, well-conditioned problem, plain SGD needs a fraction of the steps of RMSprop."""
    limit = 3000
    needed: dict[str, list[float]] = {}
    for name in ("SGD", "SGD + momentum 0.9", "RMSprop", "Adam"):
        best = [math.inf, math.inf]
        for exponent in range(14):
            param = weight(1.0, 1.0)
            path = walk(MAKERS[name]([param], 2.0**-exponent), param, bowl(1.0, 10.0), limit)
            far = path.abs().amax(1)
            for i, goal in enumerate((1e-2, 1e-6)):
                outside = (~(far <= goal)).nonzero()  # a NaN is outside
                arrived = float(outside[-1]) + 1
                best[i] = min(best[i], arrived if arrived <= limit else math.inf)
        needed[name] = best
    for i in (0, 1):
        assert 3 * needed["SGD"][i] < needed["RMSprop"][i], needed
        assert 3 * needed["SGD + momentum 0.9"][i] < needed["RMSprop"][i], needed
    rows = [[name, *(f"{n:.0f}" if n < math.inf else f"> {limit}" for n in best)] for name, best in needed.items()]
    return Measured(["steps to come, and stay, within", "1 %", "0.0001 %"], rows)


def hover() -> Measured:
    """With a constant lr, RMSprop keeps jumping across the minimum at a distance of lr/2; a falling lr stops it."""

    def rms(params: Any, lr: float) -> Optimizer:
        return RMSprop(params, lr=lr, alpha=0.9)  # 0.99 ends at the same place, ten times later

    runs = {
        "SGD, lr 0.1": (MAKERS["SGD"], 0.1, False),
        "Adam, lr 0.1": (MAKERS["Adam"], 0.1, False),
        "RMSprop, lr 0.1": (rms, 0.1, False),
        "RMSprop, lr 0.01": (rms, 0.01, False),
        "RMSprop, lr 0.1 falling to 0": (rms, 0.1, True),
    }
    paths: dict[str, list[float]] = {}
    for label, (make, lr, falling) in runs.items():
        param = weight(1.0)
        paths[label] = walk(make([param], lr), param, bowl(1.0), 1000, falling)[:, 0].tolist()
    ends = {label: abs(path[-1]) for label, path in paths.items()}
    for label, lr in (("RMSprop, lr 0.1", 0.1), ("RMSprop, lr 0.01", 0.01)):
        last = [abs(place) for place in paths[label][-100:]]
        assert 0.4 * lr < min(last) <= max(last) < 0.6 * lr, (label, min(last), max(last))
        assert all(a * b < 0 for a, b in pairwise(paths[label][-100:])), "it must jump from side to side"
    assert max(ends["SGD, lr 0.1"], ends["Adam, lr 0.1"], ends["RMSprop, lr 0.1 falling to 0"]) < 1e-6, ends
    rows = [[label, f"{end:.2g}" if end >= 1e-6 else "below 0.000001"] for label, end in ends.items()]
    return Measured(["run", "distance from the minimum after 1000 steps"], rows, {"paths": paths})


def majority() -> Measured:
    """A construction in which adaptive optimizers fit the training data as SGD does, but then predict the majority.

    Source: Wilson et al., The Marginal Value of Adaptive Gradient Methods, NeurIPS 2017, section 3.3.
    """
    count = 200
    generator = torch.Generator().manual_seed(0)
    y = torch.where(torch.rand(count, generator=generator) < 0.7, 1.0, -1.0).double()
    fresh = torch.where(torch.rand(5000, generator=generator) < 0.7, 1.0, -1.0).double()
    x = torch.zeros(count, 6 * count, dtype=torch.float64)
    x[:, 0], x[:, 1:3] = y, 1
    for i, label in enumerate(y):
        own = 3 + 5 * i
        x[i, own : own + (1 if label > 0 else 5)] = 1
    rows, test_errors = [], {}
    for name, lr in (("SGD", 1e-3), ("SGD + momentum 0.9", 1e-4), ("RMSprop", 0.01), ("Adam", 0.01)):
        param = weight(*[0.0] * 6 * count)
        end = walk(MAKERS[name]([param], lr), param, lambda w, _: x.T @ (x @ w - y), 1000)[-1]
        train_error = float((x @ end * y <= 0).double().mean())
        scores = fresh * end[0] + end[1] + end[2]  # an unseen row's own features have untrained weights
        test_errors[name] = float((scores * fresh <= 0).double().mean())
        assert train_error == 0, (name, train_error)
        rows.append([name, f"{100 * train_error:.1f} %", f"{100 * test_errors[name]:.1f} %"])
    minority = float((fresh < 0).double().mean())
    assert test_errors["SGD"] == test_errors["SGD + momentum 0.9"] == 0, test_errors
    assert test_errors["RMSprop"] == test_errors["Adam"] == minority, (test_errors, minority)
    return Measured(["optimizer", "training error", "test error"], rows)


# --- alpha ---------------------------------------------------------------------------------------


def lecture() -> Measured:
    """With nine gradients of +0.1 and one of -0.9, RMSprop roughly stays in place; steps of the sign run away.

    Source: Hinton, Neural Networks for Machine Learning, lecture 6e, 2012.
    """
    makers: dict[str, Callable[[Any], Optimizer]] = {
        "SGD": lambda p: SGD(p, lr=1.0),
        "RMSprop, alpha 0.99": lambda p: RMSprop(p, lr=1.0, alpha=0.99),
        "RMSprop, alpha 0.9": lambda p: RMSprop(p, lr=1.0, alpha=0.9),
        "RMSprop, alpha 0 (the gradient's sign)": lambda p: RMSprop(p, lr=1.0, alpha=0.0),
    }
    moves = {}
    for label, make in makers.items():
        param = weight(0.0)
        path = walk(make([param]), param, lambda p, t: torch.full_like(p, 0.1 if t % 10 else -0.9), 1000)
        moves[label] = abs(float(path[-1] - path[0])) / 100
    assert moves["RMSprop, alpha 0.9"] < 1.5, moves
    assert moves["RMSprop, alpha 0.99"] < 1.5, moves
    assert math.isclose(moves["RMSprop, alpha 0 (the gradient's sign)"], 8, rel_tol=1e-3), moves
    rows = [[label, f"{move:.2f} lr"] for label, move in moves.items()]
    return Measured(["optimizer", "net move per ten gradients that cancel"], rows)


ALPHAS = (0.0, 0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999)
RARE = {"+3 once in 3, else −1": (3, 3.0, -1.0), "+1010 once in 101, else −10": (101, 1010.0, -10.0)}


def drift() -> Measured:
    """With rare large and frequent small gradients, the weight moves the wrong way if alpha is too small.

    Source: Reddi, Kale and Kumar, On the Convergence of Adam and Beyond, ICLR 2018; Shi et al., RMSprop converges
    with proper hyper-parameter, ICLR 2021.
    """
    moves: dict[str, list[float]] = {}
    for label, (period, rare, common) in RARE.items():
        mean_square = (rare**2 + (period - 1) * common**2) / period
        for alpha in ALPHAS:
            param = weight(0.0)
            memory = 8 / (1 - alpha) if alpha < 0.999 else 3000  # v starts near its mean, so this is long enough
            cycles = math.ceil(memory / period) + 20
            optimizer = RMSprop([param], lr=1.0, alpha=alpha, square_avg_init=mean_square)
            path = walk(optimizer, param, rarely(period, rare, common), cycles * period)
            moves.setdefault(label, []).append(float(path[-1] - path[-1 - period]) / period)
    easy, hard = (dict(zip(ALPHAS, found, strict=True)) for found in moves.values())
    assert all(easy[alpha] > 0.05 for alpha in (0.0, 0.1, 0.3)), easy
    assert all(easy[alpha] < -0.05 for alpha in (0.7, 0.9, 0.99)), easy
    assert all(hard[alpha] > 0.01 for alpha in (0.9, 0.99)), hard
    assert hard[0.9999] < 0, hard
    shown = (0.3, 0.7, 0.9, 0.99, 0.999, 0.9999)
    rows = [[label, *(_way(found[a]) for a in shown)] for label, found in zip(RARE, (easy, hard), strict=True)]
    header = ["gradients (their sum is positive: down is right)", *(f"alpha {a:g}" for a in shown)]
    return Measured(header, rows, {"alphas": ALPHAS, "moves": moves})


def _way(move: float) -> str:
    return f"{'wrong' if move > 0 else 'right'}, {move:+.1g} lr".replace("-", "−")


def spike() -> Measured:
    """After one gradient a thousand times too large, steps stay small for several times 1/(1-alpha) steps."""
    back = {}
    for alpha in (0.9, 0.99, 0.999):
        param = weight(0.0)
        optimizer = RMSprop([param], lr=1.0, alpha=alpha, square_avg_init=1.0)
        steps = lengths(walk(optimizer, param, lambda p, t: torch.full_like(p, 1e3 if t == 1 else 1.0), 8000))
        back[alpha] = int((steps[1:] >= 0.5).nonzero()[0]) + 1
    assert 80 < back[0.9] < 120, back
    assert 700 < back[0.99] < 900, back
    assert 5000 < back[0.999] < 6500, back
    rows = [[f"{alpha:g}", f"{1 / (1 - alpha):.0f}", str(steps)] for alpha, steps in back.items()]
    return Measured(["alpha", "memory 1/(1−alpha)", "steps until half the usual length"], rows)


# --- the first steps and the lr ------------------------------------------------------------------


def first_step() -> Measured:
    """The first step is 1/√(1−alpha) times lr, whatever the gradient; three settings limit it."""
    settings: dict[str, dict[str, float]] = {
        "alpha=0.99 (torch's default)": {},
        "alpha=0.9": {"alpha": 0.9},
        "bias_correction=True": {"bias_correction": True},
        "square_avg_init=1.0": {"square_avg_init": 1.0},
    }
    curves = {}
    for label, options in settings.items():
        for gradient in (1.0, 0.001):
            param = weight(0.0)
            optimizer = RMSprop([param], lr=1.0, **options)  # type: ignore[arg-type]
            curves[label, gradient] = lengths(walk(optimizer, param, constant(gradient), 1000)).tolist()
    for gradient in (1.0, 0.001):
        assert math.isclose(curves["alpha=0.99 (torch's default)", gradient][0], 10, rel_tol=1e-3)
        assert math.isclose(curves["alpha=0.9", gradient][0], math.sqrt(10), rel_tol=1e-3)
        assert max(curves["bias_correction=True", gradient]) < 1.001
    assert math.isclose(curves["square_avg_init=1.0", 1.0][0], 1, rel_tol=1e-3)
    assert curves["square_avg_init=1.0", 0.001][99] < 0.01
    rows = [
        [f"`{label}`" if "(" not in label else "`alpha=0.99`, torch's default", f"{gradient:g}"]
        + [f"{curves[label, gradient][step - 1]:.3g}" for step in (1, 10, 100, 1000)]
        for label, gradient in curves
        if gradient == 1.0 or label == "square_avg_init=1.0"
    ]
    header = ["setting", "gradient", *(f"step {n}" for n in (1, 10, 100, 1000))]
    return Measured(header, rows, {"curves": curves})


def momentum() -> Measured:
    """Under a constant gradient, momentum makes the step 1/(1−momentum) times as long."""
    rows = []
    for value in (0.0, 0.5, 0.9, 0.99):
        param = weight(0.0)
        optimizer = RMSprop([param], lr=1.0, momentum=value, square_avg_init=1.0)
        length = float(lengths(walk(optimizer, param, constant(1.0), 2000))[-1])
        assert math.isclose(length, 1 / (1 - value), rel_tol=1e-3), (value, length)
        rows.append([f"{value:g}", f"{length:.3g} lr"])
    return Measured(["momentum", "step under a steady gradient"], rows)


# --- eps -----------------------------------------------------------------------------------------


EPS_GRADIENTS = tuple(10.0**-i for i in range(11))


def eps() -> Measured:
    """ε is a floor under the denominator, so steps are short where √v is far below it; its place sets the floor."""
    places = {
        "1e-8 outside (torch)": (1e-8, "outside"),
        "1e-5 outside": (1e-5, "outside"),
        "1e-5 inside": (1e-5, "inside"),
        "1e-3 outside": (1e-3, "outside"),
    }
    steps: dict[str, list[float]] = {}
    for label, (value, mode) in places.items():
        for gradient in EPS_GRADIENTS:
            param = weight(0.0)
            optimizer = RMSprop([param], lr=1.0, alpha=0.9, eps=value, eps_mode=mode)
            steps.setdefault(label, []).append(float(lengths(walk(optimizer, param, constant(gradient), 300))[-1]))
    ratio = steps["1e-5 outside"][9] / steps["1e-5 inside"][9]
    assert math.isclose(ratio, 1 / math.sqrt(1e-5), rel_tol=0.01), ratio
    assert all(found[0] > 0.99 for found in steps.values()), steps
    assert steps["1e-8 outside (torch)"][6] > 0.98, steps
    assert steps["1e-3 outside"][6] < 0.002, steps
    shown = (0, 3, 6, 9)
    rows = [[label, *(f"{found[i]:.2g} lr" for i in shown)] for label, found in steps.items()]
    ratios = [steps["1e-5 outside"][i] / steps["1e-5 inside"][i] for i in shown]
    rows.append(["1e-5 outside : 1e-5 inside", *(f"{ratio:.3g} : 1" for ratio in ratios)])
    header = ["ε and its place", *(f"gradient {EPS_GRADIENTS[i]:g}" for i in shown)]
    return Measured(header, rows, {"gradients": EPS_GRADIENTS, "steps": steps})


def large_eps() -> Measured:
    """With ε far above the gradients, RMSprop is SGD with a learning rate of lr/ε."""
    gradients = torch.randn(200, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, apart = [], {}
    for value in (1e-3, 1.0, 1e3, 1e5):
        ends = []
        for make in (lambda p, e=value: RMSprop(p, lr=e, eps=e), lambda p: SGD(p, lr=1.0)):
            param = weight(*[0.0] * 50)
            ends.append(walk(make([param]), param, lambda _, t: gradients[t - 1], 200)[-1])
        apart[value] = float((ends[0] - ends[1]).norm() / ends[1].norm())
        rows.append(
            [f"{value:g}", f"{100 * apart[value]:.0f} %" if apart[value] > 0.01 else f"{100 * apart[value]:.1g} %"]
        )
    assert apart[1e3] < 0.01, apart
    assert apart[1e5] < 1e-4, apart
    assert apart[1e-3] > 0.5, apart
    return Measured(["ε (gradients are about 1)", "distance from where SGD with lr/ε ends"], rows)


# --- relatives -----------------------------------------------------------------------------------


def adam() -> Measured:
    """With bias correction, RMSprop is Adam(betas=(0, alpha)) up to rounding."""
    gradients = torch.randn(500, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    param = weight(*[0.0] * 50)
    judge = walk(Adam([param], lr=0.01, betas=(0.0, 0.99), eps=1e-8), param, lambda _, t: gradients[t - 1], 500)
    apart = {}
    for corrected in (True, False):
        param = weight(*[0.0] * 50)
        path = walk(RMSprop([param], lr=0.01, bias_correction=corrected), param, lambda _, t: gradients[t - 1], 500)
        apart[corrected] = float((path - judge).abs().max() / judge.abs().max())
    assert apart[True] < 1e-12, apart
    assert apart[False] > 0.1, apart
    rows = [
        ["`bias_correction=True`", "< 1e-12, rounding"],
        ["`bias_correction=False`, torch's", f"{apart[False]:.2f}"],
    ]
    return Measured(["RMSprop", "largest difference from Adam's path, as a share of it"], rows)


def centered() -> Measured:
    """Under a constant gradient, the variance goes to zero and the centered step grows almost without limit."""
    far = {}
    for on in (False, True):
        param = weight(0.0)
        path = walk(RMSprop([param], lr=1e-3, centered=on), param, constant(1.0), 2000)
        far[on] = abs(float(path[-1]))
    assert far[False] < 3, far
    assert far[True] > 100, far
    rows = [[f"`centered={on}`", f"{distance:.0f}" if on else f"{distance:.1f}"] for on, distance in far.items()]
    return Measured(["RMSprop, lr 0.001", "distance after 2000 steps of the gradient 1"], rows)


def state() -> Measured:
    """The bytes of state that an optimizer keeps per float32 parameter."""
    makers: dict[str, Callable[[Any], Optimizer]] = {
        "SGD": lambda p: SGD(p, lr=0.01),
        "SGD + momentum": lambda p: SGD(p, lr=0.01, momentum=0.9),
        "RMSprop": lambda p: RMSprop(p),
        "RMSprop + momentum": lambda p: RMSprop(p, momentum=0.9),
        "RMSprop, centered": lambda p: RMSprop(p, centered=True),
        "RMSprop + momentum, centered": lambda p: RMSprop(p, momentum=0.9, centered=True),
        "Adam": lambda p: Adam(p),
    }
    kept = {}
    for name, make in makers.items():
        param = nn.Parameter(torch.zeros(1000))
        param.grad = torch.ones(1000)
        optimizer = make([param])
        optimizer.step()
        slots = [t for t in optimizer.state[param].values() if isinstance(t, Tensor) and t.shape == param.shape]
        kept[name] = sum(slot.nbytes for slot in slots) / 1000
    assert list(kept.values()) == [0, 4, 4, 8, 8, 12, 8], kept
    return Measured(["optimizer", "bytes per parameter"], [[name, f"{size:.0f}"] for name, size in kept.items()])


CLAIMS: Mapping[str, Callable[[], Measured]] = {
    claim.__name__: claim
    for claim in (
        scale,
        ravine,
        unscaled,
        digits,
        turned,
        smooth,
        hover,
        majority,
        lecture,
        drift,
        spike,
        first_step,
        momentum,
        eps,
        large_eps,
        adam,
        centered,
        state,
    )
}


def measure(claim: Callable[[], Measured]) -> Measured:
    """Run a claim from its own seeds on one thread, and restore torch's settings.

    Raises: AssertionError with the numbers if the claim does not hold here.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            return claim()
    finally:
        torch.set_num_threads(threads)
