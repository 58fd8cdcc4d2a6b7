"""Conversion of arrays between dialects: names, order, units, signs, counts, and the report."""

import itertools
import re

import numpy as np
import pytest
import torch

import rmsprop
from rmsprop import DIALECTS, analysis, reference
from rmsprop.analysis import matched_eps
from rmsprop.conversion import ConversionReport, convert
from rmsprop.conversion.owner import find_owner
from rmsprop.conversion.settings import target_settings
from rmsprop.settings import read, resolve_settings
from rmsprop.spec import EPS_MODES

V, M, B = np.array([1.0, 4.0, 9.0]), np.array([0.5, -1.0, 2.0]), np.array([2.0, -3.0, 0.25])


def test_calling_the_package_is_calling_the_function():
    """`rmsprop.convert(...)` is the function of rmsprop.conversion."""
    assert rmsprop.convert({"S": V}, "textbook", "torch").state.keys() == {"step", "square_avg"}
    assert rmsprop.convert is convert


def test_the_velocity_takes_the_learning_rate_in_and_out_and_turns_its_sign():
    """torch's b is TensorFlow's divided by lr, and optax's is negative; a power of two is exact both ways."""
    state, report = convert({"step": 7, "square_avg": V, "momentum_buffer": B}, "torch", "optax", lr=0.125)
    np.testing.assert_array_equal(state["trace"], -0.125 * B)
    assert list(state) == ["count", "nu", "trace"]
    assert state["count"] == 7
    assert any("its sign flipped" in sentence for sentence in report.exact)
    back, _ = convert(state, "optax", "torch", lr=0.125)
    np.testing.assert_array_equal(back["momentum_buffer"], B)


def test_where_both_keep_the_rate_inside_no_rate_is_asked_for():
    """TensorFlow 1 to Keras 3 needs no lr, and the arrays are equal."""
    state, report = convert({"rms": V, "momentum": B, "mg": M}, "tensorflow1", "keras3")
    assert list(state) == ["iteration", "velocity", "momentum", "average_gradient"]
    np.testing.assert_array_equal(state["momentum"], B)
    np.testing.assert_array_equal(state["average_gradient"], M)
    assert report.approximate == []
    assert report.assumed == ["step is set to 0: tensorflow1 does not count steps"]


def test_mxnet_changed_the_order_of_its_slots():
    """n, g, delta of MXNet 1 are var, mean, mom of MXNet 2, in the order mean, var, mom."""
    state, _ = convert({"n": V, "g": M, "delta": B}, "mxnet1", "mxnet2")
    assert list(state) == ["mean", "var", "mom"]
    np.testing.assert_array_equal(state["var"], V)
    np.testing.assert_array_equal(state["mean"], M)
    np.testing.assert_array_equal(state["mom"], B)


MODES = {mode: next(row for row in DIALECTS.values() if row.rule.eps_mode == mode) for mode in EPS_MODES}
PLACES = {
    "outside": "outside the root",
    "inside": "inside the root",
    "both": "both inside and outside the root",
    "floor": "as a floor under the root",
}


@pytest.mark.parametrize("eps", [1e-12, 1e-8, 0.003, 2.0])
@pytest.mark.parametrize(("was", "now"), [*itertools.permutations(EPS_MODES, 2)])
def test_a_file_and_a_call_get_the_same_eps(was, now, eps):
    """`convert` writes the same ε as `translate` for every pair of places, and reports how far steps differ."""
    source, target = MODES[was], MODES[now]
    settings = {**source.complete({"eps": eps}, {"eps"}), "dialect": source.name}
    report = ConversionReport()
    found = target_settings(settings, target.name, report)
    assert found["eps"] == matched_eps(was, eps, now)
    assert analysis.smallest_d(now, found["eps"]) == pytest.approx(analysis.smallest_d(was, eps), rel=1e-5)
    (sentence,) = [sentence for sentence in report.approximate if sentence.startswith("eps=")]
    assert f"is {PLACES[was]} in the source and {PLACES[now]} in the target: {found['eps']:g} gives" in sentence
    share, root = map(float, re.search(r"up to (\S+)%, where √v is about (\S+),", sentence).groups())
    steps = [analysis.denominator(mode, e, root=root) for mode, e in ((was, eps), (now, found["eps"]))]
    assert steps[0] / steps[1] - 1 == pytest.approx(share / 100, abs=0.02)  # the root is printed in two digits


def test_heavyball_keeps_the_corrected_average():
    """v = v̂·(1 − betaᵗ), which needs the count and the beta."""
    source = {"dialect": "heavyball", "beta2": 0.9}
    state, report = convert({"exp_avg_sq": V}, source, {"dialect": "optax", "bias_correction": True}, step=5)
    np.testing.assert_allclose(state["nu"], V * (1 - 0.9**5), rtol=1e-15)
    assert report.approximate == []
    with pytest.raises(ValueError, match=r"differ by bias correction.*give step="):
        convert({"exp_avg_sq": V}, source, {"dialect": "optax", "bias_correction": True})


def test_bias_correction_on_one_side_makes_the_roots_agree_at_the_switch():
    """The corrected average becomes the average, and the report states the error of the weight."""
    source = {"dialect": "optax", "bias_correction": True, "decay": 0.9}
    state, report = convert({"count": 3, "nu": V}, source, "torch")
    np.testing.assert_allclose(state["square_avg"], V / (1 - 0.9**3), rtol=1e-15)
    (sentence,) = report.approximate
    assert f"{0.1 * (1 / (1 - 0.9**3) - 1):.2g} at the first step" in sentence


def test_missing_buffers_are_made_and_the_report_says_what_that_costs():
    """No momentum becomes a zero buffer, exactly; no centering becomes a zero mean, which is not exact."""
    target = {"dialect": "torch", "momentum": 0.9, "centered": True}
    state, report = convert({"step": 3, "square_avg": V}, "torch", target)
    np.testing.assert_array_equal(state["momentum_buffer"], 0 * V)
    np.testing.assert_array_equal(state["grad_avg"], 0 * V)
    assert any("starts at 0: torch had no momentum" in sentence for sentence in report.exact)
    assert any("grad_avg starts at 0" in sentence and "100 steps" in sentence for sentence in report.approximate)


def test_what_the_target_does_not_keep_is_dropped_and_named():
    """The report names a dropped mean, and a dropped velocity as a loss."""
    target = {"dialect": "torch7"}
    _, report = convert({"step": 3, "square_avg": V, "momentum_buffer": B, "grad_avg": M}, "torch", target)
    assert len(report.dropped) == 2 or len(report.dropped) == 3
    assert any("momentum" in sentence for sentence in report.dropped)
    _, report = convert({"square_avg": V, "grad_avg": M, "step": 1}, "torch", {"dialect": "torch", "centered": False})
    assert report.dropped == ["grad_avg: the target is not centered and does not use it"]


def test_each_parameter_may_have_its_own_rate():
    """lr= takes a mapping by name; the error names a missing parameter."""
    slots = {"square_avg": V, "momentum_buffer": B, "step": 1}
    state, _ = convert({"a": slots, "b": slots}, "torch", "timm", lr={"a": 0.5, "b": 0.25})
    np.testing.assert_array_equal(state["a"]["momentum_buffer"], 0.5 * B)
    np.testing.assert_array_equal(state["b"]["momentum_buffer"], 0.25 * B)
    with pytest.raises(ValueError, match="has no rate for parameter 'b'"):
        convert({"a": slots, "b": slots}, "torch", "timm", lr={"a": 0.5})


def test_a_rate_that_is_missing_or_zero_is_refused_with_the_reason():
    """Units that change need lr, and 0 cannot be divided out."""
    slots = {"rms": V, "momentum": B}
    with pytest.raises(TypeError, match=r"give lr=\.\.\., the learning rate of the next step"):
        convert(slots, "tensorflow1", "torch")
    with pytest.raises(ValueError, match="lr=0 cannot be divided out"):
        convert(slots, "tensorflow1", "torch", lr=0.0)
    for bad in (-1.0, float("nan"), float("inf"), True, "0.1"):
        with pytest.raises(ValueError, match="is not a learning rate"):
            convert(slots, "tensorflow1", "torch", lr=bad)
    state, report = convert({"step": 1, "square_avg": V, "momentum_buffer": B}, "torch", "timm", lr=0)
    assert not state["momentum_buffer"].any()
    assert any("velocity is lost" in sentence for sentence in report.approximate)


def test_settings_of_a_side_decide_its_units():
    """timm with lr_in_momentum=False keeps torch's units."""
    source = {"dialect": "timm", "lr_in_momentum": False}
    state, _ = convert({"step": 1, "square_avg": V, "momentum_buffer": B}, source, "torch")
    np.testing.assert_array_equal(state["momentum_buffer"], B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_tensors_stay_tensors_and_the_input_is_not_touched_nor_shared(dtype):
    """Type and dtype are the input's; its arrays are neither changed nor shared."""
    slots = {"step": torch.tensor(4.0), "square_avg": torch.ones(3, dtype=dtype)}
    slots["momentum_buffer"] = torch.full((3,), 3.0, dtype=dtype)
    before = {name: value.clone() for name, value in slots.items()}
    state, _ = convert(slots, "torch", "keras3", lr=0.1)
    assert state["velocity"].dtype == state["momentum"].dtype == dtype
    assert state["iteration"] == 4
    for value in state.values():
        value.zero_()
    assert all(torch.equal(slots[name], before[name]) for name in slots)


def test_a_slot_or_dialect_that_nobody_knows_is_said():
    """The message lists the source's own names."""
    with pytest.raises(ValueError, match=r"keras3 has no state 'rms'; its state is iteration, average, velocity"):
        convert({"rms": V}, "keras3", "torch")
    with pytest.raises(ValueError, match="lacks 'velocity', the average of squared gradients"):
        convert({"momentum": V}, "keras3", "torch")
    with pytest.raises(ValueError, match="Unknown dialect: 'keras9'"):
        convert({"rms": V}, "tensorflow1", "keras9")
    for count in (-1, 0.5, float("nan")):
        with pytest.raises(ValueError, match="is not a number of steps"):
            convert({"step": count, "square_avg": V}, "torch", "keras3")


@pytest.mark.parametrize("name", [*DIALECTS, "adam", "adamw", "rmsprop:keras3"])
def test_an_owner_has_the_name_that_it_is_found_by(name):
    """Files and reports name the owner, and this package's own state has torch's slots."""
    owner = find_owner(name)
    assert owner.name == name
    assert owner.ours == name.startswith("rmsprop:")
    assert not owner.ours or owner.row.states == DIALECTS["torch"].states


@pytest.mark.parametrize("name", [name for name, row in DIALECTS.items() if "square_avg" in row.states.values()])
def test_every_dialect_converts_to_torch_and_back(name):
    """v, m and b return unchanged, with every slot of the dialect."""
    row = DIALECTS[name]
    values = {"step": np.asarray(6), "square_avg": V, "grad_avg": M, "momentum_buffer": B, "ema": M}
    slots = {theirs: values[ours] for theirs, ours in row.states.items()}
    alpha = {"dialect": name, row.argument("alpha"): (0.0, 0.9) if row.argument("alpha") == "betas" else 0.9}
    there, _ = convert(slots, alpha, "torch", lr=0.25, step=6)
    back, _ = convert(there, {"dialect": "torch", "alpha": 0.9}, alpha, lr=0.25, step=6)
    assert list(back) == list(slots)
    for slot, value in slots.items():
        np.testing.assert_allclose(back[slot], value, rtol=1e-15, err_msg=slot)


def test_adam_is_rmsprop_with_bias_correction():
    """With beta1 = 0, Adam's next ten steps equal RMSprop's from the converted state, up to rounding."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.nn.Parameter(torch.randn(5, dtype=torch.float64, generator=generator))
    twin = torch.nn.Parameter(weight.detach().clone())
    adam = torch.optim.Adam([weight], lr=0.01, betas=(0.0, 0.99))
    gradients = [torch.randn(5, dtype=torch.float64, generator=generator) for _ in range(20)]
    for gradient in gradients[:10]:
        weight.grad = gradient
        adam.step()
    twin.data.copy_(weight.data)
    target = {"dialect": "torch", "bias_correction": True}
    state, report = convert(adam.state[weight], {"dialect": "adam", "betas": (0.0, 0.99)}, target)
    assert any(sentence.startswith("exp_avg:") for sentence in report.dropped)
    ours = rmsprop.RMSprop([twin], lr=0.01, alpha=0.99, bias_correction=True)
    ours.state[twin] = state
    for gradient in gradients[10:]:
        weight.grad, twin.grad = gradient, gradient.clone()
        adam.step()
        ours.step()
    torch.testing.assert_close(twin, weight, rtol=1e-12, atol=1e-14)


def test_adams_first_moment_becomes_a_momentum_buffer_where_the_target_has_momentum():
    """With gradients of equal size both continue alike: lr·(1 − beta1) and b = exp_avg / ((1 − beta1)·(√v̂ + ε))."""
    weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    adam = torch.optim.Adam([weight], lr=0.01, betas=(0.9, 0.99))
    signs = torch.randn(400, 4, dtype=torch.float64).sign()
    for sign in signs[:390]:
        weight.grad = sign
        adam.step()
    twin = torch.nn.Parameter(weight.detach().clone())
    target = {"dialect": "torch", "bias_correction": True, "momentum": 0.9}
    state, report = convert(adam.state[weight], {"dialect": "adam", "betas": (0.9, 0.99)}, target)
    assert any("(1 − beta1) of Adam's learning rate" in sentence for sentence in report.approximate)
    ours = rmsprop.RMSprop([twin], lr=0.001, alpha=0.99, bias_correction=True, momentum=0.9)
    ours.state[twin] = state
    for sign in signs[390:]:
        weight.grad, twin.grad = sign, sign.clone()
        adam.step()
        ours.step()
    torch.testing.assert_close(twin, weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("source", "target"), [("torch", "optax"), ("torch", "tensorflow1"), ("graves2013", "torch"), ("keras3", "sb3")]
)
def test_a_run_goes_on_as_it_would_have(source, target):
    """With ε = 0 all dialects share one rule: after a conversion, the reference reaches the same parameters."""
    centered = source == "graves2013"
    draw = np.random.default_rng(5)
    lr, gradients, p = 0.02, draw.normal(size=(24, 6)), draw.normal(size=6)
    given = {"lr": lr, "alpha": 0.9, "eps": 0.0, "momentum": 0.9, "centered": centered}
    (rule, hyper), (after, _) = (read(resolve_settings(name, given)[0]) for name in (source, target))
    state = reference.start(rule, p)
    for g in gradients[:12]:
        p, state = reference.step(rule, hyper, p, g, state)
    sign = {name: np.where(DIALECTS[name].buffer_sign < 0, -1.0, 1.0) for name in (source, target)}
    theirs = {
        slot: state[ours] * (sign[source] if ours == "momentum_buffer" else 1.0)
        for slot, ours in DIALECTS[source].states.items()
        if ours in state
    }
    converted, _ = convert(theirs, source, {"dialect": target, "momentum": 0.9, "centered": centered}, lr=lr)
    there = {
        ours: converted[slot] * (sign[target] if ours == "momentum_buffer" else 1.0)
        for slot, ours in DIALECTS[target].states.items()
        if slot in converted
    }
    q, there = p, {"step": 12, **there}
    for g in gradients[12:]:
        p, state = reference.step(rule, hyper, p, g, state)
        q, there = reference.step(after, hyper, q, g, there)
    np.testing.assert_allclose(q, p, rtol=1e-12, atol=1e-13)


def test_a_report_prints_as_lines():
    """Each line begins with its kind."""
    report = ConversionReport(exact=["v: unchanged", "m: unchanged"], dropped=["g: not needed"])
    assert str(report) == "exact: v: unchanged\nexact: m: unchanged\ndropped: g: not needed"
