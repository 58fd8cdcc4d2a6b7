"""The landscapes match their descriptions, and races on them are correct, repeatable, and robust."""

import math

import numpy as np
import pytest
import torch

from rmsprop.race.landscapes import (
    ENTRANTS,
    LANDSCAPES,
    MOST_STEPS,
    OPTIMIZERS,
    RAVINES,
    Landscape,
    Trajectory,
    find_landscape,
    noise,
    noisy_ravine,
    race,
    ravine,
    tilted_ravine,
)

# Gradients derived by hand, as functions of x and y.
GRADIENTS = {
    "ravine": lambda x, y: (x, 100 * y),
    "tilted-ravine": lambda x, y: (
        0.5 * (x + y) + 50 * (x - y),
        0.5 * (x + y) - 50 * (x - y),
    ),
    "noisy-ravine": lambda x, y: (x, 100 * y),
    "rosenbrock": lambda x, y: (-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)),
    "beale": lambda x, y: (
        sum(2 * (c - x + x * y**n) * (y**n - 1) for n, c in ((1, 1.5), (2, 2.25), (3, 2.625))),
        sum(2 * (c - x + x * y**n) * n * x * y ** (n - 1) for n, c in ((1, 1.5), (2, 2.25), (3, 2.625))),
    ),
    "saddle": lambda x, y: (x, y**3 - y),
    "d2l": lambda x, y: (0.2 * x, 4 * y),
}


def gradient(landscape: Landscape, x: float, y: float) -> list[float]:
    """Return the gradient from autograd."""
    point = torch.tensor([x, y], dtype=torch.float64, requires_grad=True)
    landscape.f(point[0], point[1]).backward()
    assert point.grad is not None
    return point.grad.tolist()


def by_name(runs: list[Trajectory]) -> dict[str, Trajectory]:
    return {run.name: run for run in runs}


@pytest.mark.parametrize("name", LANDSCAPES)
def test_gradients_match_hand_derivatives(name: str) -> None:
    """Autograd's gradient of every landscape equals the derivative by hand."""
    for x, y in [(-1.5, 0.7), (0.3, -1.2), (2.0, 0.4), LANDSCAPES[name].start]:
        assert gradient(LANDSCAPES[name], x, y) == pytest.approx(GRADIENTS[name](x, y), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", LANDSCAPES)
def test_minima_are_minima(name: str) -> None:
    """At every stated minimum the loss is 0, the gradient is 0, and every point around lies higher."""
    landscape = LANDSCAPES[name]
    around = [[math.cos(angle), math.sin(angle)] for angle in np.linspace(0, 2 * math.pi, 32)]
    for x, y in landscape.minima:
        assert float(landscape.loss(np.array([x, y]))) == 0
        assert gradient(landscape, x, y) == [0, 0]
        assert (landscape.loss(np.array([x, y]) + 0.01 * np.array(around)) > 0).all()


@pytest.mark.parametrize("name", LANDSCAPES)
def test_rows_are_complete(name: str) -> None:
    """Every row suggests a rate for every optimizer, explains itself, and shows its start and minima."""
    row = LANDSCAPES[name]
    left, right, low, high = row.window
    assert row.name == name
    assert row.description.endswith(".")
    assert row.lesson.endswith(".")
    assert set(row.lrs) == set(OPTIMIZERS)
    assert 1 <= row.steps <= MOST_STEPS
    for x, y in (row.start, *row.minima[:1]):
        assert left < x < right
        assert low < y < high


def test_saddle_is_a_saddle() -> None:
    """The middle of the saddle is flat, higher than the minima, up along x and down along y."""
    saddle = LANDSCAPES["saddle"]
    middle, along, across = saddle.loss(np.array([[0, 0], [0.1, 0], [0, 0.1]]))
    assert gradient(saddle, 0.0, 0.0) == [0, 0]
    assert across < middle < along


def test_condition_is_the_ratio_of_curvatures() -> None:
    """A ravine of condition 7 has Hessian eigenvalues 1 and 7, straight, tilted and noisy alike."""
    for make in (ravine, tilted_ravine, noisy_ravine):
        place = make(7)
        point = torch.tensor([0.3, 0.2], dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(lambda p, f=place.f: f(p[0], p[1]), point)
        assert torch.linalg.eigvalsh(hessian).tolist() == pytest.approx([1, 7])


def test_rmsprop_follows_the_equation() -> None:
    """The first ten points of RMSprop are the numbered equation, worked here in NumPy float64."""
    [run] = race("ravine", ["rmsprop"], steps=10, lr=0.1)
    p, v = np.array([-4.0, 1.0]), np.zeros(2)
    expected = [p]
    for _ in range(10):
        g = p * [1, 100]
        v = 0.9 * v + (1 - 0.9) * g**2  # [2]
        d = np.sqrt(v) + 1e-8  # [6]
        u = g / d  # [7]
        p = p - 0.1 * u  # [9]
        expected.append(p)
    np.testing.assert_allclose(run.points, expected, rtol=1e-12)


def test_dive_into_deep_learning_number() -> None:
    """The textbook dialect ends where Dive into Deep Learning 12.8 prints; torch's rule differs in the last digit."""
    runs = by_name(race("d2l", ["rmsprop-textbook", "rmsprop"]))
    book, torchs = runs["rmsprop-textbook"].points[-1], runs["rmsprop"].points[-1]
    assert f"x1: {book[0]:.6f}, x2: {book[1]:.6f}" == "x1: -0.010599, x2: 0.000000"
    assert f"{torchs[0]:.6f}" == "-0.010598"


def test_real_optimizers_race() -> None:
    """The racers are torch's own classes and this package's RMSprop, not rewritten rules."""
    import rmsprop

    param = torch.nn.Parameter(torch.zeros(2))
    classes = {name: type(racer.make([param], 0.1)) for name, racer in OPTIMIZERS.items()}
    assert classes == {
        "sgd": torch.optim.SGD,
        "momentum": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "rmsprop": rmsprop.RMSprop,
        "rmsprop-textbook": rmsprop.RMSprop,
    }


@pytest.mark.parametrize("name", LANDSCAPES)
def test_suggested_races_finish(name: str) -> None:
    """At the suggested settings nobody diverges, everybody ends lower than the start, and shapes are as promised."""
    landscape = LANDSCAPES[name]
    for run in race(landscape, list(OPTIMIZERS)):
        assert not run.diverged
        assert run.points.shape == (landscape.steps + 1, 2)
        assert run.losses.shape == (landscape.steps + 1,)
        assert run.points.dtype == run.losses.dtype == np.float64
        assert tuple(run.points[0]) == landscape.start
        assert run.losses[-1] < run.losses[0]
        assert run.distance == landscape.distance(run.points[-1])


def test_target_is_the_first_step_below_a_thousandth() -> None:
    """The target step is the first whose loss is below a thousandth of the start's, and None if there is none."""
    runs = by_name(race("ravine"))
    step = runs["rmsprop"].target_at
    assert step is not None
    assert runs["rmsprop"].losses[step] < 0.058 <= runs["rmsprop"].losses[step - 1]
    assert runs["sgd"].target_at is None


@pytest.mark.parametrize("condition", [100, 1000, 10_000])
def test_rmsprop_stands_the_rate_that_breaks_sgd(condition: float) -> None:
    """At learning rate 0.1 on ravines of condition 100 and more, SGD and momentum diverge at once, and RMSprop's
    steep coordinate falls below a thousandth within 25 steps, without once changing sides, whatever the condition."""
    runs = by_name(race(ravine(condition), ["sgd", "momentum", "rmsprop"], lr=0.1))
    assert runs["sgd"].diverged
    assert runs["momentum"].diverged
    assert runs["sgd"].steps == runs["rmsprop"].steps == 100
    steep = runs["rmsprop"].points[:25, 1]
    assert (steep > 0).all()
    assert steep[-1] < 1e-3


def test_sgd_zigzags_on_the_ravine() -> None:
    """At its suggested rate, just below the edge of stability, SGD crosses the ravine at every step; RMSprop's first
    20 steps never do."""
    runs = by_name(race("ravine"))
    sides = {name: np.sign(run.points[:21, 1]) for name, run in runs.items()}
    assert (sides["sgd"][1:] != sides["sgd"][:-1]).all()
    assert (sides["rmsprop"] == 1).all()


def test_rmsprop_hovers_half_a_learning_rate_away() -> None:
    """As the ravine's lesson states: with a fixed rate RMSprop does not settle, but hops half a rate to each side."""
    for lr in (0.1, 0.01):
        [run] = race("ravine", ["rmsprop"], steps=2000, lr=lr)
        assert float(np.median(abs(run.points[-200:, 1]))) == pytest.approx(lr / 2, rel=1e-5)
        assert (np.sign(run.points[-200:-1, 1]) == -np.sign(run.points[-199:, 1])).all()


def test_tilt_takes_the_advantage_away() -> None:
    """As the tilted ravine's lesson states: RMSprop ends farther away than untilted, Adam is slower, SGD the same."""
    straight, tilted = by_name(race("ravine")), by_name(race("tilted-ravine"))
    assert 3.5 < tilted["rmsprop"].distance / straight["rmsprop"].distance < 4.5
    assert tilted["rmsprop"].target_at is None
    assert (straight["adam"].target_at, tilted["adam"].target_at) == (9, 43)
    for name in ("sgd", "momentum"):
        assert tilted[name].distance == pytest.approx(straight[name].distance, rel=1e-6)


def test_rosenbrock_is_lost() -> None:
    """As Rosenbrock's lesson states: RMSprop is on the valley floor in 20 steps, and still momentum arrives first."""
    runs = by_name(race("rosenbrock"))
    x, y = runs["rmsprop"].points[20]
    assert abs(y - x * x) < 0.05
    assert runs["rmsprop"].target_at is None
    assert min(run.target_at or math.inf for run in runs.values()) == runs["momentum"].target_at


def test_beale_first_and_hovering() -> None:
    """As Beale's lesson states: three leave the window and return; RMSprop arrives first and ends farthest away."""
    runs = by_name(race("beale"))
    assert all(runs[name].points[:, 1].min() < LANDSCAPES["beale"].window[2] for name in ("sgd", "momentum", "adam"))
    assert min(run.target_at or math.inf for run in runs.values()) == runs["rmsprop"].target_at
    by_distance = sorted(runs, key=lambda name: runs[name].distance)
    assert (by_distance[0], by_distance[-1]) == ("adam", "rmsprop")


def test_saddle_is_left_at_once_by_division() -> None:
    """As the saddle's lesson states: RMSprop and Adam leave the ridge at once; RMSprop is first, and SGD settles."""
    runs = by_name(race("saddle"))
    assert all(runs[name].points[5, 1] > 0.8 for name in ("rmsprop", "adam"))
    assert all(runs[name].points[5, 1] < 0.02 for name in ("sgd", "momentum"))
    assert (runs["rmsprop"].target_at, runs["sgd"].target_at) == (6, 14)
    assert min(run.target_at or math.inf for run in runs.values()) == 6
    assert runs["sgd"].losses[-1] < 1e-100 < 1e-3 < runs["rmsprop"].losses[-1]


def test_noise_affects_sgd_most() -> None:
    """As the noisy ravine's lesson states, over eight seeds: SGD ends with the largest loss, Adam the smallest."""
    loud = {name: [] for name in ENTRANTS}
    for seed in range(8):
        for run in race("noisy-ravine", seed=seed):
            loud[run.name].append(np.median(run.losses[-30:]))
    middle = {name: np.median(values) for name, values in loud.items()}
    assert middle["sgd"] > 1.5 * middle["rmsprop"]
    assert middle["rmsprop"] > middle["adam"]


def test_noise_is_noise() -> None:
    """The noise has mean 0 and variance 1, its coordinates are unrelated, and so are its steps and seeds."""
    drawn = noise(7, 20_000)
    assert drawn.shape == (20_000, 2)
    assert abs(drawn.mean(axis=0)).max() < 0.03
    assert abs(drawn.std(axis=0) - 1).max() < 0.02
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.03
    assert abs(np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1]) < 0.03
    assert 0.31 < (abs(drawn) > 1).mean() < 0.325
    assert abs(np.corrcoef(drawn[:, 0], noise(8, 20_000)[:, 0])[0, 1]) < 0.03


def test_seed_decides_the_noise_alone() -> None:
    """A seed repeats a noisy race bit for bit, another changes it, and without noise the seed changes nothing."""
    first, again, other = (race("noisy-ravine", steps=20, seed=seed) for seed in (1, 1, 2))
    assert all((a.points == b.points).all() for a, b in zip(first, again, strict=True))
    assert all((a.points[1:] != b.points[1:]).any() for a, b in zip(first, other, strict=True))
    calm = [race("ravine", steps=20, seed=seed) for seed in (1, 2)]
    assert all((a.points == b.points).all() for a, b in zip(*calm, strict=True))


def test_race_leaves_the_global_generator_alone() -> None:
    """A noisy race draws from its own generator and does not advance the user's."""
    before = torch.get_rng_state()
    race("noisy-ravine", steps=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", LANDSCAPES)
@pytest.mark.parametrize("lr", [10.0, 1e300])
def test_divergence_ends_a_trajectory(name: str, lr: float) -> None:
    """A run that leaves the landscape ends at its last finite, near point and records the step; nothing crashes."""
    for run in race(name, list(OPTIMIZERS), steps=50, lr=lr):
        assert np.isfinite(run.points).all()
        assert np.isfinite(run.losses).all()
        assert len(run.points) == (run.diverged_at if run.diverged else 51)
    assert by_name(race(name, ["sgd"], steps=50, lr=lr))["sgd"].diverged


def test_start_can_be_moved() -> None:
    """A race starts from the given point, and the window grows to show it; the table is unchanged."""
    moved = find_landscape("ravine").starting_at(-9, 2)
    assert tuple(race(moved, ["sgd"], steps=1)[0].points[0]) == (-9, 2)
    assert moved.window[0] < -9
    assert moved.window[3] > 2
    assert LANDSCAPES["ravine"].start == (-4, 1)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: race("hill"), ["'hill'", "ravine", "rosenbrock"]),
        (lambda: race("ravine", ["adagrad"]), ["'adagrad'", "sgd", "rmsprop"]),
        (lambda: race("ravine", []), ["optimizers=[]", "rmsprop"]),
        (lambda: race("ravine", "sgd"), ["optimizers='sgd'", "list"]),
        (lambda: race("ravine", ["sgd", "sgd"]), ["sgd, sgd", "once"]),
        (lambda: race("ravine", steps=0), ["steps=0", "1 to 2000"]),
        (lambda: race("ravine", steps=2001), ["steps=2001", "1 to 2000"]),
        (lambda: race("ravine", steps=1.5), ["steps=1.5", "whole number"]),
        (lambda: race("ravine", steps=True), ["steps=True", "whole number"]),
        (lambda: race("ravine", lr=0), ["lr=0", "positive"]),
        (lambda: race("ravine", lr=-1), ["lr=-1", "positive"]),
        (lambda: race("ravine", lr=math.nan), ["lr=nan", "positive"]),
        (lambda: race("ravine", lr=math.inf), ["lr=inf", "finite"]),
        (lambda: race("ravine", lr={"sgd": math.nan}), ["lr=nan for sgd"]),
        (lambda: race("ravine", ["sgd"], lr={"adam": 0.1}), ["'adam'", "not in this race"]),
        (lambda: race("ravine", seed=-1), ["seed=-1", "whole number"]),
        (lambda: race(find_landscape("ravine").starting_at(0, 0)), ["start=0,0", "minimum"]),
        (lambda: find_landscape("ravine").starting_at(math.nan, 0), ["start=nan,0", "between"]),
        (lambda: find_landscape("ravine").starting_at(0, 1e9), ["start=0,1e+09", "between"]),
        (lambda: ravine(0.5), ["condition=0.5", "from 1"]),
        (lambda: ravine(math.nan), ["condition=nan", "from 1"]),
        (lambda: noisy_ravine(math.inf), ["condition=inf", "from 1"]),
        (lambda: tilted_ravine(-3), ["condition=-3", "from 1"]),
        (lambda: find_landscape("beale", 10), ["condition=10", "'beale'", *RAVINES]),
    ],
)
def test_invalid_arguments_are_refused(attempt, words: list[str]) -> None:
    """An invalid argument is refused by one sentence, with what was given and what would work."""
    with pytest.raises(ValueError, match=r"\.$") as caught:
        attempt()
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
