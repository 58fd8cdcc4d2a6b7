"""Translation: exact only where the steps are the same, and sizes that a run confirms."""

import ast
import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import mostly_long
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from paths import ROOT
from typer.testing import CliRunner

import rmsprop
from rmsprop import DIALECTS, Hyper, Rule, reference, translate
from rmsprop.analysis import denominator, matched_eps
from rmsprop.cli import app
from rmsprop.dialects import SWITCHES, read_arguments, write_arguments

STEPS = 30


# --- runs ----------------------------------------------------------------------------------------


def body(full):
    """The rule and the numbers of complete settings."""
    rule = Rule(**{name: full[name] for name in SWITCHES}, momentum=full["momentum"] != 0, maximize=full["maximize"])
    names = ("lr", "alpha", "eps", "momentum", "weight_decay", "reference_lr")
    return rule, Hyper(**{name: full[name] for name in names})


def read_back(found):
    """Return the settings that a translation's arguments result in, by the target's dialect alone."""
    row = DIALECTS[found.target]
    composed = {
        name: found.target_settings[name]
        for name in (" ".join(row.own.composed).replace("l1", "weight_decay_mode")).split()
        if name not in row.own.takes or name.startswith("weight_decay")
    }
    read = read_arguments(row, found.arguments) | composed
    return {"maximize": False, **row.complete(read, read)}


def bounded(g, norm, bound):
    return g * (bound / max(norm, bound)) if bound else g * 0


def run(full, gradients, rates):
    """Parameters after each step from fresh state, by the reference in float64, with clipping in the row's order."""
    rule, hyper = body(full)
    params = [np.linspace(-2, 2, g.size).reshape(g.shape) for g in gradients[0]]
    states = [reference.start(rule, p) for p in params]
    trail = []
    for grads, rate in zip(gradients, rates, strict=True):
        now, h, gs = rule, replace(hyper, lr=hyper.lr * rate), list(grads)
        if full["clip_after_decay"] and rule.weight_decay_mode in ("l2", "l1"):
            sign = -1 if rule.maximize else 1
            pulls = params if rule.weight_decay_mode == "l2" else [np.sign(p) for p in params]
            gs = [sign * g + h.weight_decay * pull for g, pull in zip(gs, pulls, strict=True)]
            now, h = replace(rule, maximize=False), replace(h, weight_decay=0.0)
        value, whole = full["clip_value"], full["clip_global_norm"]
        if value is not None and not full["clip_value_last"]:
            gs = [g.clip(-value, value) for g in gs]
        if full["clip_norm"] is not None:
            gs = [bounded(g, np.linalg.norm(g), full["clip_norm"]) for g in gs]
        if whole is not None:
            gs = [bounded(g, math.sqrt(sum(float((x * x).sum()) for x in gs)), whole) for g in gs]
        if value is not None and full["clip_value_last"]:
            gs = [g.clip(-value, value) for g in gs]
        pairs = [reference.step(now, h, p, g, s) for p, g, s in zip(params, gs, states, strict=True)]
        params, states = [p for p, _ in pairs], [s for _, s in pairs]
        if full["clip_weights"] is not None:
            params = [p.clip(-full["clip_weights"], full["clip_weights"]) for p in params]
        trail.append(np.concatenate([p.ravel() for p in params]))
    return np.array(trail)


def material(seed=0, unit=1.0):
    """Gradients of two tensors with a drift, noise, zeros and spikes; and a rate that warms up, holds, and falls."""
    rng = np.random.default_rng(seed)
    scale = [unit * 10.0 ** rng.uniform(-4, 1, 5), unit * 10.0 ** rng.uniform(-4, 1, (2, 2))]
    gradients = []
    for t in range(STEPS):
        grads = [s * (0.7 + rng.standard_normal(s.shape)) * (30.0 if t == 12 else 1.0) for s in scale]
        grads[0][t % 5] = 0.0
        gradients.append(grads)
    rates = [min(1.0, (t + 1) / 5) * (0.3 if t > 14 else 1.0) * 0.97 ** max(0, t - 20) for t in range(STEPS)]
    return gradients, rates


def apart(found, seed=0, unit=1.0):
    """Return the largest relative difference between a run of the original and one of the arguments read back."""
    gradients, rates = material(seed, unit)
    one, other = run(found.source_settings, gradients, rates), run(read_back(found), gradients, rates)
    assert np.isfinite(one).all()
    return float((np.abs(one - other) / (np.abs(one) + np.abs(one).max() * 1e-3)).max())


# --- exact ---------------------------------------------------------------------------------------

ASKED = (
    {},
    {"momentum": 0.9},
    {"eps": 0.0},
    {"eps": 1e-3, "momentum": 0.5, "weight_decay": 1e-2},
    {"centered": True, "eps": 1e-2},
    {"centered": True, "momentum": 0.9, "lr_in_buffer": True, "eps": 1e-4, "eps_mode": "inside"},
    {"weight_decay": 1e-2, "weight_decay_mode": "decoupled"},
    {"weight_decay": 1e-2, "weight_decay_mode": "l1"},
    {"square_avg_init": 1.0, "eps_mode": "inside", "eps": 1e-5},
    {"momentum": 0.9, "nesterov": True, "lr_in_buffer": True},
    {"clip_global_norm": 1.0, "weight_decay": 1e-2},
    {"clip_value": 0.5, "weight_decay": 1e-2, "clip_after_decay": True},
    {"bias_correction": True},
)


def translated(source, target, asked):
    """The translation of settings under our names, or None where the source does not take them."""
    row = DIALECTS[source]
    try:
        return translate(source, target, **write_arguments(row, {"lr": 0.01, **asked}))
    except (TypeError, ValueError):
        return None


def dealt(source, k):
    """Of each target one of ASKED, another for another source and k; of the source itself all of them."""
    names = list(DIALECTS)
    for i, target in enumerate(DIALECTS):
        yield from ((target, asked) for asked in ASKED if target == source)
        yield target, ASKED[(i + 5 * names.index(source) + k) % len(ASKED)]


def check_exactness(source, pairs):
    """Assert that an exact translation makes the same 30 steps to 1e-12 while lr moves, and others have findings."""
    exact = inexact = 0
    for target, asked in pairs:
        found = translated(source, target, asked)
        if found is None:
            continue
        assert found.exact == (not found.findings)
        if found.exact:
            exact += 1
            assert apart(found) <= 1e-12, (target, asked)
        else:
            inexact += 1
            assert all(f.what and f.size and f.advice and "Not measured" not in f.size for f in found.findings)
    assert exact >= len(ASKED) // 3  # to itself at least
    assert inexact


@pytest.mark.parametrize("source", mostly_long(DIALECTS, lambda i, _: i % 6 == 0))
def test_exact_is_exact_and_inexact_has_findings(source):
    """Of each pair of dialects, with settings dealt out over them."""
    check_exactness(source, dealt(source, 0))


@pytest.mark.long
@pytest.mark.parametrize("source", DIALECTS)
def test_every_exact_is_exact_and_inexact_has_findings(source):
    """The same of every pair with a third of the settings each."""
    check_exactness(source, itertools.chain(*(dealt(source, k) for k in (1, 4, 7, 10))))


NUMBERS = {
    "lr": st.sampled_from([1e-3, 0.01, 0.3]),
    "alpha": st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    "eps": st.sampled_from([0.0, 1e-16, 1e-8, 3e-5, 0.1, 1.0]),
    "momentum": st.sampled_from([0.0, 0.5, 0.9]),
    "weight_decay": st.sampled_from([0.0, 1e-2]),
    "square_avg_init": st.sampled_from([0.0, 1e-8, 1.0]),
    "eps_mode": st.sampled_from(["outside", "inside", "both", "floor"]),
    "weight_decay_mode": st.sampled_from(["l2", "l1", "decoupled", "corrected"]),
    **{name: st.booleans() for name in ("centered", "nesterov", "lr_in_buffer", "bias_correction", "maximize")},
    **{name: st.booleans() for name in ("clip_after_decay", "clip_value_last")},
    **{name: st.sampled_from([0.1, 2.0]) for name in ("clip_value", "clip_norm", "clip_global_norm", "clip_weights")},
}


def check_any(source, target, asked, seed):
    """Assert that exact means the same run; else every record can be printed as strict JSON."""
    found = translated(source, target, asked)
    assume(found is not None)
    meant = found.source_settings
    # v − m² is 0 at α = 0, and without ε nothing divides by it: the run as meant is no numbers
    assume(not (meant["centered"] and meant["alpha"] == 0 and meant["eps"] == 0))
    assert found.exact == (not found.findings)
    if found.exact:
        assert apart(found, seed) <= 1e-12
    for finding in found.findings:
        assert json.dumps([finding.rows, finding.within], allow_nan=False)


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.long)])
def test_no_approximation_is_called_exact(count):
    """For any pair and settings."""
    search = given(
        source=st.sampled_from(sorted(DIALECTS)),
        target=st.sampled_from(sorted(DIALECTS)),
        asked=st.lists(st.sampled_from(sorted(NUMBERS)), max_size=6, unique=True).flatmap(
            lambda names: st.fixed_dictionaries({name: NUMBERS[name] for name in names})
        ),
        seed=st.integers(0, 99),
    )
    settings(max_examples=count, deadline=None)(search(check_any))()


EXACT = [
    ("torch", "mlx", {"lr": 0.01}, "mlx.optimizers.RMSprop(learning_rate=0.01, alpha=0.99, eps=1e-08)"),
    (
        "tensorflow1",
        "timm",
        {"learning_rate": 0.1, "momentum": 0.9, "centered": True},
        "timm.optim.RMSpropTF(params, lr=0.1, alpha=0.9, eps=1e-10, centered=True, momentum=0.9)",
    ),
    (
        "tensorflow1",
        "optax",
        {"learning_rate": 0.1},
        "optax.rmsprop(learning_rate=0.1, decay=0.9, eps=1e-10, initial_scale=1.0)",
    ),
    ("sb3", "tensorflow1", {"lr": 7e-4, "eps": 1e-5}, None),
    ("timm", "sb3", {"lr": 0.1, "momentum": 0.9, "lr_in_momentum": False}, None),
    ("keras2", "torch", {"learning_rate": 0.01}, "torch.optim.RMSprop(params, lr=0.01, alpha=0.9, eps=1e-07)"),
    ("keras2", "keras3", {"momentum": 0.9}, None),
    ("hinton2012", "torch", {"learning_rate": 0.01}, None),
    (
        "chainer_graves",
        "mxnet1",
        {},
        "mx.optimizer.RMSProp(learning_rate=0.0001, gamma1=0.95, epsilon=0.0001, centered=True)",
    ),
    (
        "torch",
        "flux",
        {"weight_decay": 0.1, "centered": True},
        "OptimiserChain(WeightDecay(0.1), RMSProp(; eta=0.01, rho=0.99, epsilon=1e-08, centred=true))",
    ),
    ("torch", "caffe", {"weight_decay": 0.1, "weight_decay_mode": "l1"}, None),
    ("blocks", "blocks", {"max_scaling": 3e4, "momentum": 0.9, "learning_rate": 0.1}, None),
    (
        "dl4j",
        "torch7",
        {},
        "optim.rmsprop(feval, x, {learningRate=0.1, alpha=0.95, epsilon=1e-08, initialMean=1e-08})",
    ),
]


@pytest.mark.parametrize(("source", "target", "words", "call"), EXACT, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_equal_is_found_equal(source, target, words, call):
    """The known equal pairs are exact, in the words that their users would type."""
    found = translate(source, target, **words)
    assert found.exact, found.findings
    if call is not None:
        assert found.call == call
    assert apart(found) <= 1e-12


INEXACT = [
    (
        "tensorflow1",
        "torch",
        {"lr": 0.045, "momentum": 0.9, "epsilon": 1.0},
        {"eps", "square_avg_init", "lr_in_buffer"},
    ),
    ("torch", "tensorflow1", {"momentum": 0.9}, {"eps", "square_avg_init", "lr_in_buffer"}),
    ("tensorflow1", "keras3", {"lr": 0.01}, {"square_avg_init"}),
    ("torch", "optax", {"momentum": 0.9, "eps": 0.01}, {"lr_in_buffer"}),
    ("torch", "mlx", {"momentum": 0.9}, {"momentum"}),
    ("torch", "mlx", {"centered": True}, {"centered"}),
    ("torch", "chainer_graves", {"eps": 0.0}, {"centered"}),
    (
        "optax",
        "torch",
        {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True, "eps": 0.0},
        {"nesterov", "lr_in_buffer"},
    ),
    ("torch", "keras3", {"weight_decay": 0.1, "eps": 0.0}, {"weight_decay"}),
    ("keras3", "timm", {"weight_decay": 0.1, "square_avg_init": 1.0}, set()),
    ("keras3", "torch", {"weight_decay": 0.1, "epsilon": 0.0}, {"weight_decay"}),
    ("caffe", "torch", {"base_lr": 0.1, "weight_decay": 0.1, "regularization_type": "L1"}, {"weight_decay"}),
    (
        "timm",
        "keras3",
        {"weight_decay": 0.1, "decoupled_decay": True, "corrected_weight_decay": True, "square_avg_init": 0.0},
        {"weight_decay_mode"},
    ),
    ("keras3", "keras1", {"global_clipnorm": 0.1, "epsilon": 0.0}, set()),
    ("keras3", "keras1", {"clipnorm": 0.1, "epsilon": 0.0}, {"clip_norm"}),
    ("keras1", "torch", {"clipnorm": 0.1, "clipvalue": 0.01}, {"clip_global_norm", "clip_value"}),
    ("keras1", "keras2", {"clipnorm": 0.1, "clipvalue": 0.01}, {"clip_value_last"}),
    ("mxnet2", "mxnet1", {"wd": 0.1, "clip_gradient": 0.1, "epsilon": 0.0}, {"clip_after_decay"}),
    ("neon", "keras1", {"param_clip_value": 0.1, "epsilon": 0.0}, {"clip_weights"}),
    ("heavyball", "torch", {}, {"eps", "bias_correction"}),
    ("torch", "heavyball", {"eps": 0.0}, {"bias_correction"}),
    ("torch", "keras1", {"maximize": True}, {"maximize"}),
    ("torch", "climin", {"eps": 1e-3}, {"eps", "square_avg_init"}),
    ("hinton2012", "keras2", {"lr": 0.1}, {"eps"}),
    ("tensorflow1", "climin", {"lr": 0.1, "decay": 0.5, "epsilon": 1.001e-8}, {"eps"}),
    ("torch", "dl4j", {"eps": 1e-3}, {"square_avg_init"}),
    ("mlx", "mlx", {"learning_rate": 0.1, "momentum": 0.9}, {"momentum"}),
    (
        "timm",
        "timm",
        {"weight_decay": 0.1, "decoupled_decay": True, "corrected_weight_decay": True, "max_lr_snapshot": 1.0},
        {"reference_lr"},
    ),
]


def _shown(value: object) -> str:
    """A set in one order, so that all workers collect the same names."""
    return str(sorted(value)) if isinstance(value, set) else str(value)


@pytest.mark.parametrize(("source", "target", "words", "kinds"), INEXACT, ids=_shown)
def test_what_differs_is_named_and_differs_in_a_run(source, target, words, kinds):
    """Each kind of difference is found by its name, and there is a run that it changes."""
    found = translate(source, target, **words)
    assert {finding.kind for finding in found.findings} == kinds
    assert (max(apart(found, unit=unit) for unit in (1.0, 1e-4, 1e-30)) > 1e-10) == bool(kinds)
    for finding in found.findings:
        assert finding.source == found.source_settings[finding.kind]
        assert finding.target == found.target_settings[finding.kind]


def test_every_measure_is_among_these_cases():
    """No kind of finding goes untested."""
    from rmsprop.translation.findings import _MEASURES

    assert {names[0] for names, _ in _MEASURES} <= set().union(*(kinds for *_, kinds in INEXACT))


# --- the target's words --------------------------------------------------------------------------


@pytest.mark.parametrize("target", mostly_long(DIALECTS, lambda i, _: i % 3 == 0))
def test_the_words_are_the_targets_own(target):
    """Only what the framework's optimizer takes is typed; a Python call parses, with these words as keywords."""
    row = DIALECTS[target]
    for asked in ASKED:
        found = translated("torch", target, asked)
        ours = set(read_arguments(row, found.arguments))
        implied = {"weight_decay_mode"} if "weight_decay" in row.own.takes else set()
        assert ours <= {"lr", "alpha", "eps", *row.own.takes, *implied} - set(row.own.fixed)
        if target in ("caffe", "caffe2", "dl4j", "flux", "torch7"):
            assert all(repr(value) in found.call for value in found.arguments.values() if not isinstance(value, bool))
            continue
        keywords = [
            k for node in ast.walk(ast.parse(found.call)) if isinstance(node, ast.Call) for k in node.keywords
        ]
        typed = {k.arg: ast.unparse(k.value) for k in keywords}
        assert {word: ast.literal_eval(typed[word]) for word in found.arguments} == dict(found.arguments)


@pytest.mark.parametrize("source", ["keras1", "keras2", "mlx", "caffe", "mindspore_experimental", "flux", "torch7"])
def test_torchs_call_makes_the_run_that_was_meant(source):
    """An exact translation to torch, pasted, steps torch.optim.RMSprop as the source's dialect says, to 1e-11."""
    found = translated(source, "torch", {"eps": 1e-5, "alpha": 0.9})
    assert found.exact
    gradients, rates = material()
    params = [torch.from_numpy(np.linspace(-2, 2, g.size).reshape(g.shape)).requires_grad_() for g in gradients[0]]
    optimizer = eval(found.call, {"torch": torch, "params": params})
    trail = []
    for grads, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = 0.01 * rate
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.from_numpy(g)
        optimizer.step()
        trail.append(torch.cat([p.detach().ravel() for p in params]).numpy().copy())
    np.testing.assert_allclose(np.array(trail), run(found.source_settings, gradients, rates), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("source", "target", "words", "kinds"), INEXACT, ids=_shown)
def test_our_own_call_is_the_source(source, target, words, kinds):
    """`rmsprop_call` constructs this package's optimizer with the original settings."""
    found = translate(source, target, **words)
    weight = torch.nn.Parameter(torch.zeros(1))
    group = eval(found.rmsprop_call, {"RMSprop": rmsprop.RMSprop, "params": [weight]}).param_groups[0]
    assert {name: group[name] for name in found.source_settings} == dict(found.source_settings)
    assert kinds or found.exact


# --- sizes ---------------------------------------------------------------------------------------


def only(found, kind):
    return next(finding for finding in found.findings if finding.kind == kind)


@pytest.mark.parametrize("mode", ["outside", "inside", "both", "floor"])
@pytest.mark.parametrize("other", ["outside", "inside", "both", "floor"])
@pytest.mark.parametrize("eps", [1e-30, 1e-10, 1e-3, 0.1, 1.0])
def test_the_matched_eps_has_the_same_cap(mode, other, eps):
    """At v = 0 both divide by the same, to six digits."""
    matched = matched_eps(mode, eps, other)
    assert denominator(other, matched, 0.0) == pytest.approx(denominator(mode, eps, 0.0), rel=1e-5)


def test_the_size_of_eps_is_where_it_is_felt():
    """Inside against outside: 1/√2 at √v = √ε, and the edges of the ranges are where the ratio says."""
    found = only(translate("optax", "torch", learning_rate=0.1, eps=1e-3), "eps")
    assert found.target == pytest.approx(math.sqrt(1e-3), rel=1e-5)
    assert "0.707 times optax's, at √v = 0.0316" in found.size
    assert "With ε unchanged it would be 31.6 times" in found.size
    for share, tolerance in (("1%", 0.01), ("10%", 0.1)):
        (_, low), (high, _) = found.within[share]
        for edge in (low, high):
            assert math.hypot(edge, math.sqrt(1e-3)) / (edge + found.target) == pytest.approx(1 - tolerance, rel=1e-6)
    roots = [row[0] / math.sqrt(1e-3) for row in found.rows]
    assert roots[0] == pytest.approx(1e-8)
    assert roots[-1] == pytest.approx(1e4)
    for root, one, other, ratio in found.rows:
        assert ratio == pytest.approx(other / one)
        assert one == pytest.approx(root / math.hypot(root, math.sqrt(1e-3)))


def first_alike(one, other, g, tolerance=0.01):
    """By stepping both with a constant gradient: the ratio of the first steps, and from when it is within 1 %."""
    ratios = []
    steps = []
    for full in (one, other):
        rule, hyper = body({**full, "momentum": 0.0, "lr": 1.0})
        p, state = np.zeros(1), reference.start(rule, np.zeros(1))
        taken = []
        for _ in range(3000):
            new, state = reference.step(rule, hyper, p, np.array([g]), state)
            taken.append(float(p[0] - new[0]))
            p = np.zeros(1)
        steps.append(taken)
    ratios = [b / a for a, b in zip(*steps, strict=True)]
    return ratios[0], 1 + next(t for t in range(3000) if all(abs(r - 1) <= tolerance for r in ratios[t:]))


@pytest.mark.parametrize(
    ("source", "target", "words", "kind"),
    mostly_long(
        [
            ("tensorflow1", "keras3", {"lr": 0.1, "epsilon": 1e-10}, "square_avg_init"),
            ("tensorflow1", "keras3", {"lr": 0.1, "epsilon": 1.0}, "square_avg_init"),
            ("keras3", "tensorflow1", {"lr": 0.1, "epsilon": 1e-3}, "square_avg_init"),
            ("torch", "dl4j", {"eps": 1e-3}, "square_avg_init"),
            ("heavyball", "mlx", {}, "bias_correction"),
        ],
        lambda i, _: i == 4,
        unpack=True,
    ),
    ids=str,
)
def test_the_size_of_a_start_is_that_of_a_run(source, target, words, kind):
    """First steps, their ratio and the length of the hidden warm-up are those of the reference."""
    found = translate(source, target, **words)
    finding = only(found, kind)
    for g, _, _, ratio, steps in finding.rows:
        measured, alike = first_alike(
            found.source_settings, {**found.source_settings, kind: found.target_settings[kind]}, g
        )
        assert ratio == pytest.approx(measured, rel=1e-9)
        assert steps == alike


def test_the_size_of_the_rate_in_the_buffer_is_that_of_a_run():
    """A steady gradient, then another learning rate: next step, fading and surplus are as the table says."""
    found = only(translate("optax", "torch", learning_rate=0.1, momentum=0.9, eps=0.0), "lr_in_buffer")
    for factor, following, alike, surplus in found.rows:
        taken = []
        for inside in (True, False):
            rule, p, moves = Rule(lr_in_buffer=inside, momentum=True), np.zeros(1), []
            state = reference.start(rule, p)
            for t in range(1000):
                hyper = Hyper(lr=1.0 if t < 400 else factor, alpha=0.5, eps=0.0, momentum=0.9)
                new, state = reference.step(rule, hyper, p, np.ones(1), state)
                moves.append(float(p[0] - new[0]))
                p = np.zeros(1)
            taken.append(moves[400:])
        ratios = [a / b for a, b in zip(*taken, strict=True)]
        assert following == pytest.approx(ratios[0], rel=1e-9)
        assert surplus == pytest.approx((sum(taken[0]) - sum(taken[1])) / taken[1][-1], rel=1e-6)
        assert alike == 1 + next(t for t, r in enumerate(ratios) if abs(r - 1) <= 0.01)


def test_rescaling_the_buffer_makes_the_rate_in_the_buffer_exact():
    """The advice, followed by hand: buffer × lr_old/lr_new at every change gives the source's run to 1e-12."""
    gradients, rates = material()
    rule, hyper = Rule(lr_in_buffer=True, momentum=True), Hyper(lr=0.01, alpha=0.9, eps=1e-3, momentum=0.9)
    other = replace(rule, lr_in_buffer=False)
    p = q = np.ones(5)
    one, two = reference.start(rule, p), reference.start(other, q)
    for t, (grads, rate) in enumerate(zip(gradients, rates, strict=True)):
        two["momentum_buffer"] = two["momentum_buffer"] * (rates[t - 1] / rate if t else 1)
        p, one = reference.step(rule, replace(hyper, lr=0.01 * rate), p, grads[0], one)
        q, two = reference.step(other, replace(hyper, lr=0.01 * rate), q, grads[0], two)
        np.testing.assert_allclose(p, q, rtol=1e-12)


def test_filling_the_average_makes_the_start_exact():
    """The advice, followed by hand: v filled with 1 gives TensorFlow 1's run under Keras 3's rule."""
    found = translate("tensorflow1", "keras3", lr=0.01, momentum=0.9)
    gradients, rates = material()
    rule, hyper = body(found.target_settings)
    p, state = np.linspace(-2, 2, 5), reference.start(rule, np.zeros(5))
    state["square_avg"] = np.full(5, 1.0)
    for grads, rate in zip(gradients, rates, strict=True):
        p, state = reference.step(rule, replace(hyper, lr=0.01 * rate), p, grads[0], state)
    np.testing.assert_allclose(p, run(found.source_settings, gradients, rates)[-1][:5], rtol=1e-12)


def test_notes_say_what_nobody_typed():
    """Notes name implicit defaults, implied settings, replaced values and settings that the source lacks."""
    keras = translate("keras2", "torch", momentum=0.9, epsilon=0)
    assert keras.notes[0] == "Not given, so keras2's defaults apply: learning_rate=0.001, rho=0.9."
    assert "In keras2, momentum=0.9 implies eps_mode='inside'." in keras.notes
    assert "epsilon=0 becomes 1e-07 in keras2." in keras.notes
    mxnet = translate("mxnet1", "mxnet2", centered=True)
    assert "In mxnet1, centered=True implies momentum=0.9." in mxnet.notes
    assert mxnet.exact
    assert any(
        "itself has no argument for momentum=0.9" in n for n in translate("mlx", "torch", lr=0.1, momentum=0.9).notes
    )
    assert any("lazy in tensorflow1 and refused in timm" in n for n in translate("tensorflow1", "timm", lr=0.1).notes)
    averaged = translate("keras3", "timm", use_ema=True)
    assert any("timm has no argument for use_ema=True, ema_momentum=0.99" in n for n in averaged.notes)
    assert translate("timm", "keras3", lr=0.1, ema=0.5).call.endswith(", use_ema=True, ema_momentum=0.5)")
    assert any("below the range of float32" in n for n in translate("torch", "textbook", eps=1e-20).notes)


# --- what does not work --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "words", "sentence"),
    [
        ("tensorflow9", "torch", {}, "Unknown dialect: 'tensorflow9' \\(did you mean"),
        ("torch", "cntk", {}, "dialect='cntk' is not offered"),
        ("tensorflow1", "torch", {}, "has no default learning rate.*give learning_rate=..., such as 1e-3"),
        (
            "tensorflow1",
            "torch",
            {"lr": 0.1, "rho": 0.9},
            "takes no rho=0.9 under dialect='tensorflow1'.*write decay=",
        ),
        ("textbook", "torch", {"alpha": 0.1}, "ambiguous under dialect='textbook'"),
        ("torch", "mlx", {"lr": "fast"}, "Invalid learning rate: 'fast' is a str"),
        ("torch", "mlx", {"eps": 1e-300}, "translation takes 0 or 1e-120"),
        ("torch", "mlx", {"alpha": 1.0}, "Invalid alpha value: 1.0"),
        ("torch", "mlx", {"centered": "no"}, "centered is a switch"),
        ("torch", "mlx", {"nesterov": True}, "give momentum > 0"),
        ("torch", "mlx", {"sparse": "none"}, "Invalid sparse"),
        ("torch", "mlx", {"clip_after_decay": 3}, "clip_after_decay is a switch"),
        ("torch", "mlx", {"lr": 0, "weight_decay_mode": "corrected"}, "give reference_lr="),
    ],
    ids=str,
)
def test_bad_settings_are_one_sentence(source, target, words, sentence):
    """The dialects' own messages, from the function as from the command."""
    with pytest.raises((TypeError, ValueError), match=sentence):
        translate(source, target, **words)


@pytest.mark.parametrize("eps", [0.0, 1e-120, 1e-40, 1e60, 1e120])
@pytest.mark.parametrize("target", ["torch", "optax", "neon", "blocks", "climin", "hinton2012", "keras2"])
@pytest.mark.parametrize("source", ["torch", "textbook", "neon", "heavyball"])
def test_extreme_numbers_are_translated(source, target, eps):
    """No ε that is taken breaks the arithmetic of the sizes, and JSON stays strict."""
    found = translated(source, target, {"eps": eps})
    assert json.dumps([[f.rows, f.within] for f in found.findings], allow_nan=False)
    assert found.exact == (not found.findings)


# --- the command ---------------------------------------------------------------------------------


def invoke(*words):
    """The command's exit code and everything it printed, on a terminal of 110 columns; errors without their box."""
    result = CliRunner().invoke(app, ["translate", *words], env={"COLUMNS": "110", "TERM": "dumb", "NO_COLOR": "1"})
    return result.exit_code, re.sub(r"\s*│\n│ ", " ", result.output)


def test_the_command_prints_the_call_the_verdict_and_the_sizes():
    """The issue's example: what to paste, three differences with sizes and advice, and the exact way."""
    code, text = invoke("--from", "tensorflow1", "--to", "torch", "lr=.045", "decay=.9", "momentum=.9", "epsilon=1.0")
    assert code == 0
    assert text.startswith("torch.optim.RMSprop(params, lr=0.045, alpha=0.9, eps=1.0, momentum=0.9)\n")
    for part in (
        "Not exact: 3 differences.",
        "0.707 times tensorflow1's, at √v = 1",
        "v starts at 1 in tensorflow1",
        "0.97",
        'RMSprop(params, dialect="tensorflow1", lr=0.045, decay=0.9, momentum=0.9, epsilon=1.0)',
        "Traps of torch:",
    ):
        assert part in text


def test_the_command_says_exact_only_of_exact():
    """Three verdicts: exact, exact while the rate is constant, and a count."""
    assert "\nExact: the same steps" in invoke("--from", "torch", "--to", "mlx", "lr=0.01")[1]
    rate = invoke("--from", "sb3", "--to", "tensorflow1", "momentum=0.9")[1]
    assert "Not exact: the same steps only while the learning rate is constant." in rate
    assert "Not exact: 1 difference.\n" in invoke("--from", "tensorflow1", "--to", "keras3", "lr=1")[1]


def test_json_is_the_translation():
    """--json is one object with all of it."""
    code, text = invoke("--from", "tensorflow1", "--to", "torch", "lr=.045", "momentum=None", "--json")
    assert code == 2, text  # None is no momentum
    code, text = invoke("--from", "optax", "--to", "torch", "learning_rate=.045", "momentum=None", "--json")
    assert code == 0
    shown = json.loads(text)
    assert shown["exact"] is False
    assert shown["arguments"] == {"lr": 0.045, "alpha": 0.9, "eps": 0.0001}
    assert [finding["kind"] for finding in shown["findings"]] == ["eps"]


def test_the_plot_is_a_png(tmp_path):
    """--plot writes it, and its path is printed; nothing is left where it cannot be."""
    path = tmp_path / "figures" / "eps.png"
    code, text = invoke("--from", "optax", "--to", "torch", "learning_rate=0", "eps=1e-3", "--plot", str(path))
    assert code == 0, text
    assert "wrote" in text
    assert path.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    code, text = invoke(
        "--from", "optax", "--to", "torch", "learning_rate=1", "--plot", str(tmp_path / "file" / "a.png")
    )
    assert code == 2
    assert "cannot be written" in text


def test_the_plot_shows_three_settings():
    """The source is the thick line at ratio 1; with ε unchanged the ratio is 1/√ε at small v."""
    from rmsprop.translation.figure import draw

    figure = draw(translate("optax", "torch", learning_rate=0.1, eps=1e-4))
    steps, ratios = figure.axes
    assert [line.get_label() for line in steps.lines] == [
        "optax, original",
        "torch, translated",
        "torch, ε unchanged",
    ]
    meant, translated_, naive = (line.get_ydata() for line in ratios.lines)
    assert set(meant) == {1.0}
    assert min(translated_) == pytest.approx(math.sqrt(0.5), rel=1e-3)
    assert naive[0] == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--from", "torch", "--to", "mlx", "lr"), "'lr' is not a setting; write it as NAME=VALUE"),
        (("--from", "torch", "--to", "mlx", "=1"), "'=1' is not a setting"),
        (("--from", "torch", "--to", "mlx", "lr=1", "lr=2"), "lr is given twice"),
        (("--from", "torch", "--to", "mlx", "lr=1/3"), "Invalid learning rate: '1/3' is a str"),
        (("--from", "torch", "--to", "mlx", "lr=__import__('os')"), "is a str"),
        (("--from", "torch", "--to", "mlx", "lr=" + "(" * 500), "is a str"),
        (("--from", "torch", "--to", "mlx", "lr=-1"), "Invalid learning rate: -1"),
        (("--from", "torch", "--to", "mlx", "lr=True"), "True is a bool"),
        (("--from", "torch", "--to", "mlx", "lr=nan"), "Invalid learning rate"),
        (("--from", "tf", "--to", "mlx"), "did you mean"),
        (("--from", "torch", "--to", "mlx", "rho=.9"), "write alpha=... here"),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_sentence(words, says):
    """Exit code 2, no traceback."""
    code, text = invoke(*words)
    assert code == 2
    assert says in text
    assert "Traceback" not in text


@pytest.mark.parametrize("plot", mostly_long([False, True], lambda _, plot: not plot), ids=["words", "picture"])
def test_the_command_needs_no_torch(plot, tmp_path):
    """Neither the words nor the picture wait for it."""
    argv = ["rmsprop", "translate", "--from", "optax", "--to", "torch", "learning_rate=1"]
    argv += ["--plot", str(tmp_path / "a.png")] if plot else []
    code = f"import sys; sys.argv = {argv!r}\nfrom rmsprop.__main__ import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8")
    assert done.stdout.splitlines()[-1] == "False"


# --- docs ----------------------------------------------------------------------------------------


def test_the_page_quotes_what_the_command_prints():
    """Every `$ rmsprop translate` block of docs/translate.md is the command's output today."""
    page = (ROOT / "docs" / "translate.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n\$ rmsprop translate (.*?)\n(.*?)```", page, re.S)
    assert len(blocks) >= 2
    for words, printed in blocks:
        code, text = invoke(*words.split())
        assert code == 0
        assert [line.rstrip() for line in printed.splitlines()] == [line.rstrip() for line in text.splitlines()]


def test_the_pages_python_runs_and_the_docstring_is_true():
    """The Python on the page and the example in the function's docstring run as they stand."""
    import doctest

    for source in re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "translate.md").read_text(encoding="utf-8"), re.S
    ):
        exec(compile(source, "translate.md", "exec"), {})
    results = doctest.testmod(sys.modules["rmsprop.translation"])
    assert (results.failed, results.attempted > 0) == (0, True)
