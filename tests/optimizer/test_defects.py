"""The seventeen defects of torch.optim.RMSprop, D1-D17: each as torch has it, and as it is here.

Those of loading, D8-D10, D12 and D16, are in test_defects_loading.py. Numbers are those of torch 2.13.0 and 2.14.1.
"""

import re
from pathlib import Path

import pytest
import torch
from paths import TESTS
from torch import nn

from rmsprop import RMSprop

SEEN_IN = ("2.13.0", "2.14.1")  # the torch versions that certainly have all seventeen
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "eager"])
# of runs of thousands of steps
CPU_FIRST = pytest.mark.parametrize("backend", ["cpu", pytest.param("eager", marks=pytest.mark.long)])
TORCH = torch.optim.RMSprop


def torch_has(defect: bool, what: str) -> None:
    """Assert that torch shows the defect; a version that is not in the list may have mended it, and that is said."""
    version = torch.__version__.partition("+")[0]
    if not defect and version not in SEEN_IN:
        pytest.skip(f"ours was tested and is right; torch {version} mended it: {what}")
    assert defect, what


def weight(*values, dtype=torch.float32):
    """A parameter of these numbers."""
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def run(optimizer, grads):
    """One step for each gradient, of the optimizer's only parameter. Returns: it."""
    (p,) = optimizer.param_groups[0]["params"]
    for grad in grads:
        p.grad = torch.full_like(p, grad) if isinstance(grad, float) else grad.clone()
        optimizer.step()
    return p


def test_d01_a_variance_rounded_below_zero_is_zero():
    """Centered, gradients that vary by a thousandth: torch takes the root of a negative number within 1,600 steps."""
    params = [nn.Parameter(torch.zeros(10_000)) for _ in range(3)]
    theirs = TORCH(params[:1], lr=1e-3, centered=True)
    ours = [
        RMSprop([p], lr=1e-3, centered=True, backend=name)
        for p, name in zip(params[1:], ("cpu", "eager"), strict=True)
    ]
    for _ in range(1600):
        grad = torch.randn(10_000).mul_(1e-3).add_(1)
        for p in params:
            p.grad = grad
        for optimizer in (theirs, *ours):
            optimizer.step()
    assert all(torch.isfinite(p).all() for p in params[1:])
    torch_has(bool(params[0].isnan().any()), "D1: a variance below zero makes NaN weights")


@CPU_FIRST
def test_d02_a_vanished_variance_does_not_make_endless_steps(backend):
    """Centered, one gradient for 2,000 steps: torch is thrown hundreds of units away with lr 0.001.

    Here max_update bounds every step in units of lr, eps inside the root is a floor under the variance, and without
    either lint says what happens.
    """
    settings = dict(lr=1e-3, centered=True, backend=backend)
    grads = [1.0] * 2000
    assert run(RMSprop([weight(0.0)], max_update=10.0, **settings), grads).abs() <= 2000 * 10 * 1e-3 * 1.001
    assert run(RMSprop([weight(0.0)], eps_mode="inside", eps=0.01, **settings), grads).abs() <= 2000 * 10 * 1e-3 * 1.1
    bare = RMSprop([weight(0.0)], **settings)
    run(bare, grads)
    (found,) = (finding for finding in bare.lint() if finding.name == "centered_cancels")
    assert "v − m² is rounding noise in 100% of the elements: their gradient hardly varies" in str(found)
    torch_has(bool(run(TORCH([weight(0.0)], lr=1e-3, centered=True), grads).abs() > 100), "D2: steps without bound")


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_d03_an_eps_that_half_precision_cannot_hold_is_honoured(dtype, backend):
    """A zero gradient is a zero step in half precision too: torch's float16 rounds ε = 1e-8 to 0, and 0/0 to NaN."""
    p = run(RMSprop([weight(1.0, -2.0, dtype=dtype)], backend=backend), [0.0] * 3)
    assert p.tolist() == [1.0, -2.0]
    if dtype == torch.float16:
        theirs = run(TORCH([weight(1.0, -2.0, dtype=dtype)]), [0.0])
        torch_has(bool(theirs.isnan().all()), "D3: ε underflows in float16, and a zero gradient makes NaN")


@BACKENDS
def test_d04_small_gradients_of_float16_take_ordinary_steps(backend):
    """(1−α)·g² of g = 1e-3 underflows in float16, where torch divides by zero; here the step is float32's 10·lr."""
    p = run(RMSprop([weight(0.0, dtype=torch.float16)], backend=backend), [1e-3])
    assert p.item() == pytest.approx(-0.1, rel=1e-3)
    theirs = run(TORCH([weight(0.0, dtype=torch.float16)]), [1e-3])
    torch_has(theirs.item() == -torch.inf, "D4: g² underflows in float16, and the first step is infinite")


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_d05_nothing_over_nothing_is_nothing(dtype, backend):
    """eps=0 with a zero gradient: a zero step, where torch has NaN in every dtype."""
    p = run(RMSprop([weight(1.0, dtype=dtype)], eps=0, momentum=0.9, backend=backend), [0.0] * 2)
    assert p.item() == 1.0
    torch_has(bool(run(TORCH([weight(1.0, dtype=dtype)], eps=0), [0.0]).isnan()), "D5: 0/0 is NaN")


@BACKENDS
def test_d06_the_first_step_is_announced_and_can_be_one_lr(backend):
    """1/√(1−α) = 10 times lr, and 1/(1−μ) times more later: explain and lint say so, bias_correction mends it."""
    p = run(RMSprop([weight(1.0)], bias_correction=True, backend=backend), [3.0])
    assert p.item() == pytest.approx(1 - 0.01, rel=1e-6)
    p = run(RMSprop([weight(1.0)], square_avg_init=1.0, backend=backend), [0.5])  # TensorFlow's way: a warm-up
    assert 1 - p.item() < 0.01
    plain = RMSprop([nn.Parameter(torch.full((4, 4), 0.01))], momentum=0.9, backend=backend)
    assert "the first step is 10·lr = 0.1 long (1/√(1−alpha)), whatever the gradient" in plain.explain()
    assert {"first_step", "momentum"} <= {finding.name for finding in plain.lint()}
    theirs = run(TORCH([weight(1.0)]), [3.0])
    torch_has(bool((theirs - 0.9).abs() < 1e-5), "D6: the first step is 10 times lr, and nothing says so")


T14 = dict(lr=1e-4)  # 1,000 steps with g = 0.5, from 1


@CPU_FIRST
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", [dict(rounding="stochastic"), dict(compensation=True)], ids=str)
def test_d07_half_precision_learns(how, dtype, backend):
    """T14: bfloat16 that torch does not move at all ends within 1 % of the float32 run, by either way."""
    grads = [0.5] * 1000
    full = run(RMSprop([nn.Parameter(torch.ones(1000))], backend=backend, **T14), grads)
    assert full[0].item() == pytest.approx(0.8876, abs=1e-4)
    half = run(RMSprop([nn.Parameter(torch.ones(1000, dtype=dtype))], backend=backend, **T14, **how), grads)
    assert half.dtype == dtype
    assert half.double().mean().item() == pytest.approx(full.double().mean().item(), rel=0.01)
    if how == dict(compensation=True):  # no draw: every element, not the mean alone
        torch.testing.assert_close(half.float(), full, rtol=0.01, atol=0)
    if dtype == torch.bfloat16:
        theirs = run(TORCH([nn.Parameter(torch.ones(1000, dtype=dtype))], **T14), grads)
        torch_has(bool((theirs == 1).all()), "D7: steps that bfloat16 rounds away move nothing")


@BACKENDS
def test_d11_momentum_may_begin_during_a_run(backend):
    """A group's momentum raised from 0: its buffer is made, from 0; torch raises a KeyError."""
    optimizer = RMSprop([weight(1.0)], backend=backend)
    run(optimizer, [1.0])
    optimizer.param_groups[0]["momentum"] = 0.9
    p = run(optimizer, [1.0])
    root = (0.99 * 0.01 + 0.01) ** 0.5
    assert optimizer.state[p]["momentum_buffer"].item() == pytest.approx(1 / root, rel=1e-6)
    assert p.item() == pytest.approx(1 - 0.1 - 0.01 / root, rel=1e-5)
    theirs = TORCH([weight(1.0)])
    run(theirs, [1.0])
    theirs.param_groups[0]["momentum"] = 0.9
    try:
        run(theirs, [1.0])
        found = None
    except KeyError as error:
        found = str(error)
    torch_has(found == "'momentum_buffer'", "D11: momentum that begins during a run is a KeyError")


@BACKENDS
def test_d13_an_infinite_gradient_can_be_skipped_or_refused(backend):
    """One inf, then 100 good gradients: torch has NaN for ever; nonfinite= decides before anything is written."""
    grads = [1.0, torch.inf, *[1.0] * 100]
    without = run(RMSprop([weight(1.0)], momentum=0.9, backend=backend), [1.0] * 101)
    optimizer = RMSprop([("bias", weight(1.0))], momentum=0.9, nonfinite="skip", backend=backend)
    skipping = run(optimizer, grads)
    assert torch.equal(skipping, without)
    assert optimizer.state[skipping]["step"] == 101
    assert (optimizer.skipped.total, optimizer.skipped.in_a_row, optimizer.skipped.parameter) == (1, 0, "'bias'")
    refusing = RMSprop([weight(1.0)], momentum=0.9, nonfinite="raise", backend=backend)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0"):
        run(refusing, grads)
    (p,) = refusing.param_groups[0]["params"]
    assert refusing.state[p]["step"] == 1
    assert torch.isfinite(p).all()
    left = RMSprop([weight(1.0)], momentum=0.9, backend=backend)
    assert run(left, grads).isnan().all()  # as asked for: it propagates
    theirs = TORCH([weight(1.0)], momentum=0.9)
    p = run(theirs, grads)
    torch_has(bool(p.isnan()) and theirs.state[p]["square_avg"].isinf().item(), "D13: one inf is there for ever")


@CPU_FIRST
def test_d14_a_spike_does_not_freeze_its_weight(backend):
    """One gradient of 1e6, then 1,000 of 1: torch moves 0.003 of the 11 that it would; max_update goes on at once.

    The lint finding "stuck" says it where max_update is off.
    """
    settings = dict(lr=0.01, backend=backend)
    grads = [*[1.0] * 1000, 1e6, *[1.0] * 1000]
    steady = run(RMSprop([weight(0.0)], **settings), [1.0] * 2001).item()
    capped = RMSprop([weight(0.0)], max_update=10.0, **settings)
    p = run(capped, grads)
    assert p.item() == pytest.approx(steady, rel=0.05)
    bare = RMSprop([nn.Parameter(torch.zeros(4, 4))], **settings)
    run(bare, grads[:1500])
    assert "stuck" in {finding.name for finding in bare.lint()}
    moved = []
    for cls, spike in ((TORCH, [1e6]), (TORCH, [])):
        optimizer = cls([weight(0.0)], lr=0.01)
        before = run(optimizer, spike).item() if spike else 0.0
        moved.append(abs(run(optimizer, [1.0] * 1000).item() - before))
    torch_has(moved[0] < 0.01 < 10 < moved[1], "D14: a spike freezes its weight")


@pytest.mark.parametrize(
    "settings", [dict(alpha=1.5), dict(momentum=1.5), dict(alpha=1.0), dict(momentum=1.0)], ids=str
)
def test_d15_a_decay_beyond_one_is_refused(settings):
    """alpha and momentum of 1 or more never forget: one sentence, where torch takes both."""
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"Invalid {name} value: {value}; {name} takes .*0 <= {name} < 1, such as"):
        RMSprop([weight(1.0)], **settings)
    try:
        TORCH([weight(1.0)], **settings)
        taken = True
    except ValueError:
        taken = False
    torch_has(taken, "D15: a decay beyond one is taken")


def sparse_grad():
    """Row 1 of 3 has a gradient."""
    return torch.sparse_coo_tensor([[1]], [[1.0, 1.0]], (3, 2), check_invariants=True)


@pytest.mark.parametrize("meaning", ["lazy", "dense"])
def test_d17_sparse_gradients_step(meaning):
    """Rows with a gradient step as the meaning that was asked for says; without one the refusal names both."""
    p = nn.Parameter(torch.ones(3, 2))
    run(RMSprop([p], sparse=meaning), [sparse_grad()])
    assert torch.equal(p[0], torch.ones(2))
    assert p[1].tolist() == pytest.approx([0.9, 0.9], rel=1e-5)
    bare = RMSprop([nn.Parameter(torch.ones(3, 2))])
    with pytest.raises(RuntimeError, match=r"give sparse='lazy' .* or sparse='dense'"):
        run(bare, [sparse_grad()])
    theirs = TORCH([nn.Parameter(torch.ones(3, 2))])
    try:
        run(theirs, [sparse_grad()])
        refused = False
    except RuntimeError:
        refused = True
    torch_has(refused, "D17: sparse gradients are refused")


def test_d17_a_fused_step_can_be_asked_for():
    """fused=True is a native kernel, or its reason to refuse; torch's RMSprop has no such argument."""
    p = run(RMSprop([weight(1.0)], fused=True), [1.0])
    assert p.item() == pytest.approx(0.9, rel=1e-5)
    with pytest.raises(RuntimeError, match=r"cpu refuses: the parameters are torch.complex64, and it takes float32"):
        RMSprop([nn.Parameter(torch.ones(1, dtype=torch.complex64))], fused=True)
    try:
        TORCH([weight(1.0)], fused=True)
        refused = False
    except TypeError:
        refused = True
    torch_has(refused, "D17: fused=True is no argument")


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float-lr", "tensor-lr"])
def test_d17_capturable_steps_on_a_cpu(lr):
    """capturable=True works on every device, with the ordinary numbers; torch raises an AssertionError on a CPU."""
    p = run(RMSprop([weight(1.0)], lr=lr, capturable=True), [1.0, 2.0])
    assert p.item() == pytest.approx(run(RMSprop([weight(1.0)]), [1.0, 2.0]).item(), rel=1e-6)
    theirs = TORCH([weight(1.0)], lr=lr, capturable=True)
    try:
        run(theirs, [1.0])
        refused = False
    except AssertionError:
        refused = True
    torch_has(refused, "D17: capturable=True does not step on a CPU")


def test_d17_a_learning_rate_that_is_learned_steps():
    """differentiable=True with a tensor lr that requires grad: its derivative is −u; torch raises a TypeError."""

    def derivative(cls):
        lr = torch.tensor(0.01, requires_grad=True)
        leaf = torch.tensor([1.0], requires_grad=True)
        optimizer = cls([leaf], lr=lr, differentiable=True)
        moved = leaf.clone()  # what the step writes must not be a leaf
        optimizer.param_groups[0]["params"][0] = moved
        moved.grad = torch.tensor([2.0])
        optimizer.step()
        moved.sum().backward()
        return lr.grad

    assert derivative(RMSprop).item() == pytest.approx(-10, rel=1e-5)
    try:
        derivative(TORCH)
        refused = False
    except (TypeError, RuntimeError):
        refused = True
    torch_has(refused, "D17: a tensor lr that requires grad is refused")


def test_t17_all_seventeen_have_a_test():
    """Each defect of the list has a test under its number here or in test_defects_loading.py."""
    sources = (Path(__file__), TESTS / "state" / "test_defects_loading.py")
    names = re.findall(r"^def test_(d\d\d)_", "".join(source.read_text() for source in sources), re.MULTILINE)
    assert sorted(set(names)) == [f"d{n:02}" for n in range(1, 18)]
