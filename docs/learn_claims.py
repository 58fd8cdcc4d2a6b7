"""The claims of learn.md. Each runs the optimizers, asserts its result, and returns what the chapter says about it.

Most of the chapter's numbers stand in its sentences. A claim returns these phrases with the numbers that it measured,
as `quotes`; `build.py` and the tests look for each of them in the chapter, word for word.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from claims import Make, Measured, Slope, bowl, constant, lengths, walk, weight
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam
from torch.optim.lr_scheduler import LinearLR

from rmsprop import RMSprop
from rmsprop.analysis import matched_eps

START = (-4.0, 1.0)
CONDITION = 50.0
RAVINE = bowl(1.0, CONDITION)
SGD_LR = 0.038
COURSE_LR, BETA = 0.2, 0.9

GIVEN = frozenset(
    [*"0 1 2 3 4 10 30 45 50 100 500 1000 2012".split(), *"0.9 0.99 0.999 0.1 0.2 0.01 0.001 0.038 1e-6 1e-8".split()]  # noqa: SIM905
)
"""Numbers that the chapter sets rather than measures: the settings of its runs, powers and a year."""


def course(params: list[nn.Parameter], lr: float = COURSE_LR, beta: float = BETA) -> RMSprop:
    """Return RMSprop as the course writes it, with ε inside the root."""
    return RMSprop(params, dialect="textbook", learning_rate=lr, beta=beta, epsilon=1e-8)


def tex(value: float, digits: int = 3) -> str:
    """Return a number as the chapter prints it: with a proper minus sign, and 1e-6 as in Python."""
    mantissa, e, exponent = f"{value:.{digits}g}".partition("e")
    return mantissa.replace("-", "−") + (f"e{int(exponent)}" if e else "")


def one_rate() -> Measured:
    """In a ravine of condition 50, the steep weight limits SGD's lr, and the flat one crawls; RMSprop serves both."""
    paths = {}
    for lr in (SGD_LR, 0.039, 0.041):
        param = weight(*START)
        paths[lr] = walk(SGD([param], lr=lr), param, RAVINE, 200)
    assert abs(float(paths[0.039][-1, 1])) < 1 < abs(float(paths[0.041][-1, 1]))
    sgd = paths[SGD_LR]
    kept = (sgd[1] / sgd[0]).tolist()
    needed = int((sgd[:, 0].abs() < 0.01 * 4).nonzero()[0])
    param = weight(*START)
    rms = walk(course([param]), param, RAVINE, 25)
    flips = [int((path[1:26, 1] * path[:25, 1] < 0).sum()) for path in (sgd, rms)]
    assert flips[0] == 25, flips
    settled = int((rms[:, 1].abs() > 0.01).nonzero()[-1]) + 1
    assert settled < 10, settled
    assert float(rms[1:settled, 1].min()) > 0, "b must not cross before it has arrived"
    quotes = [
        f"only below 2/50 = {2 / CONDITION:g}",
        f"loses {100 * (1 + kept[1]):.0f} % of its size",
        f"loses {100 * (1 - kept[0]):.1f} % of its size",
        f"loses less than {100 * 2 / CONDITION:g} % of its distance",
        f"needs {needed} steps to come within 1 % of its start",
        f"After 25 steps SGD's w is at {tex(float(sgd[25, 0]))} and RMSprop's at {tex(float(rms[25, 0]), 2)}",
        f"b jumped across the floor in all {flips[0]} steps",
        f"b came within 0.01 of the floor in {settled} steps",
    ]
    return Measured((), (), {"SGD": sgd[:26].tolist(), "RMSprop": rms.tolist()}, quotes)


def by_hand() -> Measured:
    """Three steps in plain arithmetic are the library's, and the first one is equally long for both weights."""
    lr, eps = 0.1, 1e-8
    param = weight(*START)
    optimizer = course([param], lr=lr)
    p, s = list(START), [0.0, 0.0]
    rows, first = [], []
    for t in range(1, 4):
        g = [p[0], CONDITION * p[1]]
        s = [BETA * old + (1 - BETA) * slope * slope for old, slope in zip(s, g, strict=True)]
        step = [lr * slope / math.sqrt(average + eps) for slope, average in zip(g, s, strict=True)]
        p = [place - move for place, move in zip(p, step, strict=True)]
        walked = walk(optimizer, param, RAVINE, 1)[-1]
        assert torch.allclose(walked, torch.tensor(p, dtype=torch.float64), rtol=1e-12, atol=0), (walked, p)
        first = first or step
        for name, i in (("w", 0), ("b", 1)):
            rows.append(
                [f"{t}" if i == 0 else "", name, *(tex(x) for x in (g[i], s[i], math.sqrt(s[i]), step[i], p[i]))]
            )
    assert math.isclose(abs(first[0]), abs(first[1]), rel_tol=1e-6), first
    quotes = [f"both weights move by {tex(abs(first[0]))}, although their gradients are −4 and 50"]
    return Measured(
        ["step", "weight", "gradient g", "S", "√S", "step α·g/√(S+ε)", "weight after it"], rows, {}, quotes
    )


def rates() -> Measured:
    """The steep weight's effective learning rate is smaller by the gradients' ratio, so both steps are alike."""
    param = weight(*START)
    optimizer, found = course([param]), []
    for _ in range(15):
        gradient = RAVINE(param.detach(), 0)
        walk(optimizer, param, RAVINE, 1)
        root = optimizer.state[param]["square_avg"].sqrt()
        found.append((COURSE_LR / root, gradient.abs() * COURSE_LR / root))
    flat, steep = (float(x) for x in found[0][0])
    assert math.isclose(flat / steep, CONDITION / 4, rel_tol=1e-6), (flat, steep)
    quotes = [f"In the first step w's rate is {tex(flat, 2)} and b's {tex(steep, 2)}"]
    data = {"w": [float(r[0]) for r, _ in found], "b": [float(r[1]) for r, _ in found]}
    return Measured((), (), data, quotes)


def forgets() -> Measured:
    """AdaGrad sums all squared gradients, so its steps shrink under a steady gradient; RMSprop's settle at lr."""
    makers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "adagrad": lambda p: Adagrad(p, lr=1.0),
        "rmsprop": lambda p: RMSprop(p, lr=1.0, alpha=0.9),
    }
    last = {}
    for name, make in makers.items():
        param = weight(0.0)
        last[name] = float(lengths(walk(make([param]), param, constant(1.0), 100))[-1])
    assert math.isclose(last["adagrad"], 0.1, rel_tol=1e-3), last
    assert math.isclose(last["rmsprop"], 1.0, rel_tol=1e-3), last
    return Measured(
        (),
        (),
        {},
        [f"after 100 steps AdaGrad's step is {last['adagrad']:.1f} lr and RMSprop's {last['rmsprop']:.0f} lr"],
    )


def memory() -> Measured:
    """A gradient's share in v falls by the factor alpha per step, so alpha 0.99 remembers about 100 steps."""
    shares: dict[float, list[float]] = {}
    for alpha in (0.9, 0.99):
        param = weight(0.0)
        optimizer = RMSprop([param], lr=0.0, alpha=alpha)
        for t in range(1, 500):
            walk(optimizer, param, constant(1.0 if t == 1 else 0.0), 1)
            shares.setdefault(alpha, []).append(float(optimizer.state[param]["square_avg"]))
    left = shares[0.99][100] / shares[0.99][0]
    gone = next(i for i, share in enumerate(shares[0.99]) if share < 0.01 * shares[0.99][0])
    short = shares[0.9][10] / shares[0.9][0]
    assert math.isclose(left, 0.99**100, rel_tol=1e-6), left
    quotes = [
        f"After 100 steps {100 * left:.0f} % of a gradient's share is left, after {gone} steps less than 1 %",
        f"With 0.9 the memory is 10 steps, after which {100 * short:.0f} % is left",
    ]
    return Measured((), (), {"shares": shares}, quotes)


def start() -> Measured:
    """From v = 0 the first step is lr/√(1−alpha); bias correction makes it lr; from v = 1, small gradients wait."""
    curves: dict[str, list[float]] = {}
    settings: Mapping[str, tuple[float, Mapping[str, float]]] = {
        "alpha=0.99": (1.0, {}),
        "alpha=0.9": (1.0, {"alpha": 0.9}),
        "bias_correction=True": (1.0, {"bias_correction": True}),
        "v starts at 1, gradient 0.001": (0.001, {"square_avg_init": 1.0}),
    }
    for label, (gradient, options) in settings.items():
        param = weight(0.0)
        optimizer = RMSprop([param], lr=1.0, **options)  # type: ignore[arg-type]
        curves[label] = lengths(walk(optimizer, param, constant(gradient), 1000)).tolist()
    param = weight(0.0)
    tiny = float(lengths(walk(RMSprop([param], lr=1.0), param, constant(1e-3), 1))[0])
    assert math.isclose(tiny, curves["alpha=0.99"][0], rel_tol=1e-3), "whatever the size of the gradient"
    waits = curves["v starts at 1, gradient 0.001"]
    quotes = [
        f"{curves['alpha=0.99'][0]:.0f} lr at alpha 0.99 and {tex(curves['alpha=0.9'][0])} lr at 0.9",
        f"Step 10 is still {tex(curves['alpha=0.99'][9], 2)} lr long and step 100 {tex(curves['alpha=0.99'][99])} lr",
        f"{tex(waits[0], 1)} lr at first and {tex(waits[-1], 2)} lr in step 1000",
    ]
    assert max(curves["bias_correction=True"]) < 1.001
    return Measured((), (), {"curves": curves}, quotes)


def floors() -> Measured:
    """An ε inside the root is in units of g², so 1e-8 inside caps the rate as 1e-4 outside does."""
    gradients = [10.0**-i for i in range(10)]
    steps: dict[str, list[float]] = {}
    for label, (eps, mode) in {
        "inside, 1e-8: √(v + ε)": (1e-8, "inside"),
        "outside, 1e-8: √v + ε": (1e-8, "outside"),
        "outside, 1e-4": (1e-4, "outside"),
    }.items():
        for gradient in gradients:
            param = weight(0.0)
            optimizer = RMSprop([param], lr=1.0, alpha=0.9, eps=eps, eps_mode=mode)
            steps.setdefault(label, []).append(float(lengths(walk(optimizer, param, constant(gradient), 250))[-1]))
    inside, outside, matched = steps.values()
    equal = f"{matched_eps('inside', 1e-8, 'outside'):.0e}".replace("e-0", "e-")
    assert math.isclose(inside[9], matched[9], rel_tol=1e-3), (inside[9], matched[9])
    quotes = [
        f"{tex(outside[6], 2)} lr under PyTorch's rule and {tex(inside[6], 1)} lr under the course's",
        f"1e-8 inside the root caps the rate exactly where {equal} outside does",
        f"√(1e-8) = {equal}, because PyTorch adds ε outside the root",
    ]
    return Measured((), (), {"gradients": gradients, "steps": steps}, quotes)


def stuck() -> Measured:
    """After one gradient 30 times too large, alpha 0.99 keeps the steps short for hundreds of steps."""
    found: dict[float, list[float]] = {}
    for alpha in (0.9, 0.99):
        param = weight(0.0)
        optimizer = RMSprop([param], lr=1.0, alpha=alpha, square_avg_init=1.0)
        path = walk(optimizer, param, lambda p, t: torch.full_like(p, 30.0 if t == 21 else 1.0), 600)
        found[alpha] = lengths(path).tolist()
    after = found[0.99][21:]
    back = [next(i for i, step in enumerate(after, 1) if step >= share) for share in (0.5, 0.9)]
    quotes = [
        f"The step of the large gradient itself is {found[0.99][20]:.1f} lr long",
        f"the next one is {tex(after[0], 2)} lr, and it takes {back[0]} steps to come back to half of lr and "
        f"{back[1]} to nine tenths",
    ]
    return Measured((), (), {"steps": found}, quotes)


ANGLES = (0, 1, 2, 5, 10, 20, 30, 45)


def angles() -> Measured:
    """Turning the ravine by 45 degrees takes RMSprop's gain away and leaves SGD with momentum as it was."""
    radians = [math.radians(angle) for angle in ANGLES]
    turn = torch.tensor([[[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]] for a in radians]).double()
    curvature = torch.tensor([[1.0], [100.0]], dtype=torch.float64)

    def _slope(p: Tensor, _: int) -> Tensor:
        return turn @ (curvature * (turn.mT @ p))

    makers: Mapping[str, Make] = {
        "SGD": lambda params, lr: SGD(params, lr=lr),
        "SGD + momentum 0.9": lambda params, lr: SGD(params, lr=lr, momentum=0.9),
        "RMSprop": lambda params, lr: RMSprop(params, lr=lr, alpha=0.9),
        "Adam": lambda params, lr: Adam(params, lr=lr),
    }
    left: dict[str, list[float]] = {}
    for name, make in makers.items():
        best = torch.full((len(ANGLES),), math.inf, dtype=torch.float64)
        for exponent in range(-1, 10):
            param = nn.Parameter(turn @ torch.ones(2, 1, dtype=torch.float64))
            end = walk(make([param], 2.0**-exponent), param, _slope, 200, falling=True)[-1]
            best = torch.minimum(best, (turn.mT @ end).abs().amax((-1, -2)).nan_to_num(math.inf))
        left[name] = best.tolist()
    assert left["RMSprop"][0] < 1e-12 < left["RMSprop"][3] < 1e-6 < 5e-3 < left["RMSprop"][-1], left
    assert max(left["SGD + momentum 0.9"]) < 1e-4, left
    assert left["Adam"][-1] < 0.1 * left["RMSprop"][-1], left
    gradient = _slope(turn @ torch.ones(2, 1, dtype=torch.float64), 0)
    sizes = sorted(gradient[-1, :, 0].abs().tolist())
    quotes = [
        f"the two weights' gradients are {sizes[0]:.1f} and {sizes[1]:.1f} in size",
        f"the best learning rate leaves {100 * left['RMSprop'][-1]:.1f} % of the distance after 200 steps, and SGD's "
        f"{100 * left['SGD'][-1]:.1f} %",
        f"SGD with momentum 0.9 leaves {100 * max(left['SGD + momentum 0.9']):.3f} % at every angle, and Adam "
        f"{100 * left['Adam'][-1]:.3f} % at 45 degrees",
    ]
    return Measured((), (), {"left": left}, quotes)


def settling() -> Measured:
    """With a constant lr, RMSprop ends up jumping across the minimum, lr/2 to each side; a falling lr stops it."""
    paths: dict[str, list[float]] = {}
    for label, falling in (("constant lr", False), ("lr falling to 0", True)):
        param = weight(1.0)
        optimizer = RMSprop([param], lr=0.1, alpha=0.9)
        schedule = LinearLR(optimizer, 1.0, 0.0, 300) if falling else None
        path = [1.0]
        for _ in range(300):
            path.append(float(walk(optimizer, param, bowl(1.0), 1)[-1]))
            if schedule:
                schedule.step()
        paths[label] = path
    ends = [abs(path[-1]) for path in paths.values()]
    assert math.isclose(ends[0], 0.05, rel_tol=0.1), ends
    assert paths["constant lr"][-1] * paths["constant lr"][-2] < 0, "it jumps from side to side"
    assert ends[1] < 1e-6, ends
    quotes = [f"lr 0.1 ends {ends[0]:.2f} from the minimum", "comes within a millionth"]
    return Measured((), (), {"paths": paths}, quotes)


def same_numbers() -> Measured:
    """The same three numbers under torch's rule and the textbook's part where gradients are small."""
    rows = []
    for gradient in (1.0, 1e-3, 1e-4, 1e-6):
        row = [tex(gradient)]
        for make in (lambda p: RMSprop(p, lr=1.0, alpha=0.9, eps=1e-8), lambda p: course(p, lr=1.0)):
            param = weight(0.0)
            optimizer = make([param])
            row.append(tex(float(lengths(walk(optimizer, param, constant(gradient), 250))[-1]), 3) + " lr")
        rows.append(row)
    assert rows[0][1] == rows[0][2] == "1 lr", rows
    assert rows[-1][1] != rows[-1][2], rows
    header = ["steady gradient", "PyTorch's rule", "the course's rule"]
    return Measured(header, rows)


def to_adam() -> Measured:
    """Bias correction makes RMSprop Adam without a first moment; momentum is not Adam's first moment."""
    gradients = torch.randn(500, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def _random(p: Tensor, t: int) -> Tensor:
        return gradients[t - 1].expand_as(p)

    def _path(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], slope: Slope) -> Tensor:
        param = weight(*[0.0] * 50)
        return walk(make([param]), param, slope, 500)

    pairs: Mapping[str, tuple[Make, Make]] = {
        "`bias_correction=True` | `Adam(betas=(0, 0.99))`": (
            lambda p, lr: RMSprop(p, lr=lr, bias_correction=True),
            lambda p, lr: Adam(p, lr=lr, betas=(0.0, 0.99)),
        ),
        "torch's rule | `Adam(betas=(0, 0.99))`": (
            lambda p, lr: RMSprop(p, lr=lr),
            lambda p, lr: Adam(p, lr=lr, betas=(0.0, 0.99)),
        ),
        "`bias_correction=True, momentum=0.9`, lr / 10 | `Adam(betas=(0.9, 0.99))`": (
            lambda p, lr: RMSprop(p, lr=lr / 10, bias_correction=True, momentum=0.9),
            lambda p, lr: Adam(p, lr=lr, betas=(0.9, 0.99)),
        ),
    }
    rows, apart, steady = [], [], []
    for label, (ours, adams) in pairs.items():
        one, other = (_path(lambda p, make=make: make(p, 0.01), _random) for make in (ours, adams))
        apart.append(float((one - other).abs().max() / other.abs().max()))
        one, other = (_path(lambda p, make=make: make(p, 0.01), constant(1.0)) for make in (ours, adams))
        steady.append(float((one[-1, 0] - one[-2, 0]) / (other[-1, 0] - other[-2, 0])))
        shown = "the same, to rounding" if apart[-1] < 1e-12 else f"{100 * apart[-1]:.0f} %"
        rows.append([*label.split(" | "), shown, f"{steady[-1]:.2f} : 1"])
    assert apart[0] < 1e-12 < 0.05 < min(apart[1:]), apart
    assert all(math.isclose(ratio, 1, abs_tol=0.01) for ratio in steady), steady
    header = [
        "RMSprop here",
        "Adam",
        "largest difference of the paths, of the largest distance, random gradients",
        "500th step, ours : Adam's, steady gradient",
    ]
    return Measured(header, rows)


def answers() -> Measured:
    """The answers to the questions, each by a run."""

    def _first(gradient: float, lr: float, **options: float) -> float:
        param = weight(0.0)
        return float(lengths(walk(RMSprop([param], lr=lr, **options), param, constant(gradient), 1))[0])  # type: ignore[arg-type]

    one, other = _first(3.0, 0.1, alpha=0.9), _first(0.1, 0.1, alpha=0.9)
    assert math.isclose(one, other, rel_tol=1e-3)
    quotes = [
        f"S = 0.1·9 = {0.1 * 9:g}, so √S = {tex(math.sqrt(0.1 * 9))} and a step of {tex(one)}",
        f"for b √S = {tex(math.sqrt(0.1 * 0.01))} and again {tex(other)}",
        f"At alpha 0.999 it would be {_first(1.0, 1.0, alpha=0.999):.0f} lr",
        f"the step is 10 lr: {_first(5.0, 0.01):.1g} at lr 0.01",
    ]
    return Measured((), (), {}, quotes)


CLAIMS: Mapping[str, Callable[[], Measured]] = {
    claim.__name__: claim
    for claim in (
        one_rate,
        by_hand,
        rates,
        forgets,
        floors,
        start,
        memory,
        settling,
        stuck,
        angles,
        same_numbers,
        to_adam,
        answers,
    )
}

TABLES = ("by_hand", "same_numbers", "to_adam")
"""The claims whose tables stand in the chapter."""


def missing(page: str, quotes: Sequence[str]) -> list[str]:
    """Return the phrases that the page lacks, wherever its lines break."""
    words = " ".join(page.split())
    return [quote for quote in quotes if quote not in words]
