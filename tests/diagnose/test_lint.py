"""What lint finds, and that it finds nothing where nothing is wrong, and changes nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rmsprop import RMSprop
from rmsprop.diagnose.checks import CHECKS
from rmsprop.diagnose.facts import History
from rmsprop.diagnose.lint import SEVERITIES, Finding, lint
from rmsprop.recipes import RECIPES

TRIGGERS = {}


def names(findings):
    return [finding.name for finding in findings]


def network():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))


def train(net, optimizer, steps):
    """Steps on a task that can be learned; the last gradients stay."""
    for _ in range(steps):
        x = torch.randn(64, 32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), x[:, :4].argmax(dim=1)).backward()
        optimizer.step()


def weight(*shape, value=0.1, grad=None, dtype=torch.float32):
    """A parameter of one value, with a gradient of one value."""
    p = nn.Parameter(torch.full(shape, value, dtype=dtype))
    if grad is not None:
        p.grad = torch.full(shape, grad, dtype=dtype)
    return p


@pytest.mark.parametrize(
    "words",
    [
        {"lr": 1e-3},
        {"lr": 1e-3, "centered": True},
        {"lr": 1e-4, "momentum": 0.9},
        {"lr": 1e-4, "momentum": 0.9, "nesterov": True},
        {"lr": 1e-3, "bias_correction": True},
        {"dialect": "keras3"},
        {"dialect": "textbook"},
        {"dialect": "tensorflow1", "learning_rate": 1e-3, "momentum": 0.9},
    ],
    ids=str,
)
def test_a_clean_run_has_no_findings(words):
    """Before the first gradient, before the first step, after it, in mid-run and at the end."""
    net = network()
    optimizer = RMSprop(net.named_parameters(), **words)
    assert optimizer.lint() == []
    net(torch.randn(8, 32)).square().mean().backward()
    assert optimizer.lint() == []
    for steps in (1, 9, 190):
        train(net, optimizer, steps)
        assert [str(finding) for finding in optimizer.lint()] == []
    assert optimizer.lint(steps=200) == []
    optimizer.zero_grad()
    assert optimizer.lint() == []


def test_looking_changes_nothing():
    """No parameter, gradient, state, setting or random number; no slot is made."""
    net = network()
    optimizer = RMSprop(net.parameters(), lr=1e-3, momentum=0.9, centered=True, weight_decay=1e-4)
    assert optimizer.lint() is not None
    assert len(optimizer.state) == 0
    train(net, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in net.parameters()]
    gradients, random = [p.grad.clone() for p in net.parameters()], torch.get_rng_state()
    optimizer.lint(steps=10)
    optimizer.explain()
    after = optimizer.state_dict()
    assert after["param_groups"] == before[0]["param_groups"]
    assert_close(after["state"], before[0]["state"], rtol=0, atol=0)
    assert_close([p.detach() for p in net.parameters()], before[1], rtol=0, atol=0)
    assert_close([p.grad for p in net.parameters()], gradients, rtol=0, atol=0)
    assert_close(torch.get_rng_state(), random, rtol=0, atol=0)


def trigger(function):
    """A setup that must give the finding of its name."""
    TRIGGERS[function.__name__] = function
    return function


@trigger
def nonfinite():
    p = weight(4, 4)
    p.grad = torch.zeros(4, 4)
    p.grad[0, 0] = torch.inf
    return RMSprop([p], lr=1e-4), "error", "1 NaN or infinite element in the gradients of group0.param0"


@trigger
def first_step():
    return (
        RMSprop([weight(4, 4, value=0.05)]),
        "warning",
        "0.1, 2 times the weights' RMS of 0.05, with lr=0.01 and a first step of up to 10·lr",
    )


@trigger
def centered_start():
    optimizer = RMSprop([weight(4, 4)], lr=1e-3, centered=True, bias_correction=True)
    return optimizer, "error", "the first step is 0.001·g/ε, up to 100000 times"


@trigger
def momentum():  # YOLO's, when optimizer="RMSProp" is asked for
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 3))
    return RMSprop(net.parameters(), lr=0.01, momentum=0.937), "error", "a steady step is 15.9·lr = 0.159"


@trigger
def large_step():
    p = weight(4, 4, grad=1.0)
    optimizer = RMSprop([p], lr=0.05)
    for _ in range(50):
        optimizer.step()
        p.data.fill_(0.1)
    return optimizer, "warning", "step 50 moved the weights by"


@trigger
def eps_zero():
    return RMSprop([weight(4, 4)], lr=1e-4, eps=0.0), "warning", "eps is 0"


@trigger
def eps_underflows():
    return RMSprop([weight(4, 4)], lr=1e-4, eps=1e-60), "warning", "eps=1e-60 is 0 in float32"


@trigger
def eps_dominates():
    p = weight(4, 4, grad=1e-4)
    optimizer = RMSprop([p], lr=1e-3, eps=1e-3)
    optimizer.step()
    return optimizer, "warning", "eps=0.001 exceeds √v in 100% of the elements (√v is 1e-05 on average)"


@trigger
def alpha_small():
    p = weight(1000, 2, grad=0.0)
    optimizer = RMSprop([p], lr=1e-3, alpha=0.9)
    for row in range(0, 1000, 50):
        p.grad.zero_()
        p.grad[row : row + 50] = 1.0
        optimizer.step()
    return optimizer, "warning", "5.00% of the elements of group0.param0 that ever had a gradient have one now"


@trigger
def alpha_long():
    optimizer = RMSprop([weight(4, 4)], lr=1e-5, alpha=0.999)
    return (
        optimizer,
        "note",
        "alpha=0.999 averages over 1000 steps, and the run has 100: at its end, steps are still 3.2 times",
    )


@trigger
def ema_long():
    optimizer = RMSprop([weight(4, 4)], lr=1e-5, ema=0.999, ema_start=10)
    return (
        optimizer,
        "warning",
        "ema=0.999 averages over 1000 updates, and the run has 90: at its end, 91% of the average is still the first",
    )


@trigger
def decay_twice():
    table = nn.Parameter(torch.randn(400, 4))
    (table[:100].sin().sum() + 0.005 * table.square().sum()).backward()
    return RMSprop([("table", table)], lr=1e-3, weight_decay=0.1), "warning", "of table have the gradient 0.01·p"


@trigger
def decay_on_bias():
    return RMSprop(network().parameters(), lr=1e-3, weight_decay=1e-4), "note", "also decays 2 biases and scales"


@trigger
def no_gradient():
    used, unused = weight(4, 4, grad=1.0), weight(4, 4)
    optimizer = RMSprop([("used", used), ("unused", unused)], lr=1e-3)
    optimizer.step()
    return optimizer, "warning", "1 parameter had no gradient in 1 step: unused"


@trigger
def updates_lost():  # D7
    p = weight(4, 4, value=1.0, grad=0.5, dtype=torch.bfloat16)
    optimizer = RMSprop([p], lr=1e-4)
    for _ in range(200):
        optimizer.step()
    return (
        optimizer,
        "error",
        "half a unit in the last place of 100% of the elements, and round away (bfloat16",
    )


@trigger
def state_rounding():
    p = weight(20, 20, value=1.0, grad=0.1, dtype=torch.bfloat16)
    optimizer = RMSprop([p], lr=1e-2, alpha=0.999, rounding="stochastic", backend="eager")
    optimizer.step()
    optimizer.state[p]["square_avg"] = optimizer.state[p]["square_avg"].bfloat16()
    return (
        optimizer,
        "warning",
        "square_avg is bfloat16 in group0.param0 and rounded to nearest, while a step changes it",
    )


@trigger
def state_range():
    p = weight(20, 20, value=1e4, grad=2e3)
    optimizer = RMSprop([p], lr=1e-2, state_dtype="float8")
    optimizer.step()
    return optimizer, "warning", "square_avg is at float8's largest number, 10240, in 100% of the elements, worst in"


@trigger
def state_eps():
    p = weight(20, 20, value=1.0, grad=1e-8)
    optimizer = RMSprop([p], lr=1e-2, eps=1e-12, state_dtype="float8")
    optimizer.step()
    return optimizer, "warning", "and eps=1e-12 is below 4.2e-08, where it would bound them"


@trigger
def state_start():
    p = weight(20, 20, value=1.0, grad=1e-4)
    optimizer = RMSprop([p], lr=1e-2, alpha=0.9, square_avg_init=1.0, state_dtype="float8")
    for _ in range(25):
        optimizer.step()
    return optimizer, "warning", "started at 1 and has only decayed since, for 25 steps, in 100% of the elements"


@trigger
def schedule_in_buffer():
    optimizer = RMSprop([weight(4, 4, grad=1.0)], dialect="timm", lr=1e-3, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    optimizer.step()
    schedule.step()
    return optimizer, "note", "a schedule changed lr from 0.001 to 0.0001"


@trigger
def stuck():  # D14
    p = weight(4, 4, grad=1.0)
    optimizer = RMSprop([p], lr=1e-4)
    for t in range(20):
        p.grad.fill_(1e6 if t == 10 else 1.0)
        optimizer.step()
    return optimizer, "warning", "√v is more than 100 times the current gradient in 100% of the elements"


@trigger
def centered_cancels():  # D2
    p = weight(4, 4, grad=1.0, value=1.0)
    optimizer = RMSprop([p], lr=1e-6, centered=True)
    for _ in range(2000):
        optimizer.step()
    return optimizer, "warning", "v − m² is rounding noise in 100% of the elements"


@trigger
def maximize():
    return RMSprop([weight(4, 4)], lr=1e-4, maximize=True), "note", "every step raises the loss"


@trigger
def ignored_key():
    optimizer = RMSprop([weight(4, 4)], lr=1e-4)
    optimizer.param_groups[0]["learning_rate"] = 0.1
    return optimizer, "warning", "the group has learning_rate=0.1, which no step reads; steps use lr=0.0001"


@trigger
def zero_grad():  # rmsprop check sees it: tests/inspection/test_script.py
    optimizer = RMSprop([("w", weight(4, 4))], lr=1e-4)
    optimizer.lint = lambda steps: lint(optimizer.param_groups, optimizer.state, steps, History(kept=(0, "w")))
    return optimizer, "warning", "backward() added to the gradient of w that the step before had used"


@trigger
def momentum_switched():
    optimizer = RMSprop([weight(4, 4)], lr=1e-4)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-4, total_steps=10)
    return (
        optimizer,
        "warning",
        "is 0.95 now, set by OneCycleLR or CyclicLR, so a steady step is 20·lr instead of 1·lr",
    )


@trigger
def slow_path():
    p = weight(2, 3, 4, 4)
    p.data = p.data.to(memory_format=torch.channels_last)
    p.grad = torch.ones(2, 3, 4, 4)
    return (
        RMSprop([p], lr=1e-4),
        "note",
        "copies the gradient of parameter 0 into the layout of its parameter (it has strides (48, 1, 12, 3)",
    )


def test_every_check_has_a_trigger():
    """A new check needs a setup here that it finds."""
    assert set(TRIGGERS) == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_finding_is_triggered_with_its_numbers(name):
    """Name, severity, group, what was seen, and what to change."""
    optimizer, severity, seen = TRIGGERS[name]()
    findings = optimizer.lint(steps=100 if name in ("alpha_long", "ema_long") else None)
    found = [finding for finding in findings if finding.name == name]
    assert len(found) == 1, names(findings)
    assert (found[0].severity, found[0].group) == (severity, 0)
    assert seen in found[0].seen
    assert found[0].change
    assert str(found[0]).startswith(f"{severity} {name}, group 0: ")
    assert [f.severity for f in findings] == sorted((f.severity for f in findings), key=SEVERITIES.index)


@pytest.mark.parametrize(
    ("name", "make", "seen"),
    [
        ("nonfinite", lambda: _stepped(torch.inf), "in the state of"),
        (
            "nonfinite",
            lambda: RMSprop([weight(2, 2, value=torch.nan)], lr=1e-3),
            "4 NaN or infinite elements in the par",
        ),
        ("no_gradient", lambda: _stepped(0.0), "1 parameter had a gradient of 0 in every step: group0.param0"),
        ("no_gradient", lambda: _with_frozen(), "1 parameter has requires_grad=False: group0.param1"),
        ("alpha_small", lambda: RMSprop([weight(2, 2)], lr=1e-3, alpha=0.1), "alpha=0.1 averages over 1.1 gradients"),
        (
            "eps_underflows",
            lambda: RMSprop([weight(2, 2, dtype=torch.float16)], lr=1e-3),
            "eps=1e-08 is 0 in float16",
        ),
        ("updates_lost", lambda: RMSprop([weight(2, 2, value=1.0)], lr=1e-9), "(float32, lr=1e-09)"),
        ("first_step", lambda: RMSprop([weight(2, 2, value=1e-4)], lr=1e-3), "100 times the weights' RMS of 0.0001"),
        ("alpha_small", lambda: _embedding(), "1.00% of the elements of group0.param0"),
    ],
    ids=["state", "params", "zero gradient", "frozen parameter", "alpha", "half", "lr", "small weights", "sparse"],
)
def test_other_ways_to_a_finding(name, make, seen):
    """The same names for what has the same cause."""
    assert any(finding.name == name and seen in finding.seen for finding in make().lint()), make().lint()


def _stepped(grad):
    p = weight(2, 2, grad=grad)
    optimizer = RMSprop([p], lr=1e-3)
    optimizer.step()
    return optimizer


def _with_frozen():
    params = [weight(2, 2, grad=1.0), weight(2, 2).requires_grad_(False)]
    optimizer = RMSprop(params, lr=1e-3)
    optimizer.step()
    return optimizer


def _embedding():
    table = nn.Embedding(1000, 2, sparse=True)
    optimizer = RMSprop(table.parameters(), lr=1e-3, alpha=0.9, sparse="dense")
    for row in range(0, 1000, 10):
        optimizer.zero_grad()
        table(torch.arange(row, row + 10)).sum().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("dtype", "half"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-24)], ids=str
)
@pytest.mark.parametrize("grad", [None, 1.0], ids=["numbers", "first gradient"])
def test_an_update_is_lost_below_half_a_unit_in_the_last_place(dtype, half, grad):
    """Of 1.5 it is 2⁻⁸ in bfloat16; a first step ten times as long does not hide it."""
    below, above = (weight(2, 2, value=1.5, grad=grad, dtype=dtype) for _ in range(2))
    assert "updates_lost" in names(RMSprop([below], lr=0.98 * half, eps=1e-6).lint())
    assert "updates_lost" not in names(RMSprop([above], lr=1.02 * half, eps=1e-6).lint())


def test_the_buffers_unit_is_the_rules():
    """A step of 1e-3 is a thousandth, with lr in the buffer or not."""
    for inside in (False, True):
        p = weight(4, 4, grad=1.0)
        optimizer = RMSprop([p], lr=1e-4, momentum=0.5, lr_in_buffer=inside, bias_correction=True)
        for _ in range(5):
            optimizer.step()
            p.data.fill_(1.0)
        assert optimizer.lint() == []
        p.data.fill_(1e-3)
        assert "large_step" in names(optimizer.lint())


def test_findings_name_their_group_and_parameters():
    """The index of the group and the names that named_parameters gave."""
    net = network()
    groups = [
        {"params": list(net[0].named_parameters(prefix="a"))},
        {"params": list(net[2].named_parameters(prefix="b")), "weight_decay": 0.1},
    ]
    (finding,) = RMSprop(groups, lr=1e-3).lint()
    assert (finding.name, finding.group) == ("decay_on_bias", 1)
    assert finding.seen.endswith(": b.bias")


def test_a_change_that_is_suggested_helps():
    """With the suggested lr neither the momentum nor the first step is found any more."""
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 3))
    findings = RMSprop(net.parameters(), lr=0.01, momentum=0.937).lint()
    assert names(findings) == ["momentum", "first_step"]
    lr = min(float(f.change.partition("lr=")[2].split()[0]) for f in findings)
    assert RMSprop(net.parameters(), lr=lr, momentum=0.937).lint() == []


def test_published_recipes_with_a_large_eps_are_not_blamed():
    """torchvision's MobileNetV3 and TensorFlow's Inception have a lr that ε keeps in check."""
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 3))
    assert RMSprop(net.parameters(), lr=0.064, alpha=0.9, momentum=0.9, eps=0.0316).lint() == []
    inception = {"dialect": "tensorflow1", "learning_rate": 0.045, "decay": 0.9, "momentum": 0.9, "epsilon": 1.0}
    assert RMSprop(net.parameters(), **inception).lint() == []


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_is_warned_of(name):
    """On the network of its kind, by its numbers: notes at most."""
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 3), nn.Linear(512, 10))
    findings = RMSprop.recipe(name, net.parameters()).lint()
    assert {finding.severity for finding in findings} <= {"note"}, findings


def test_the_warm_up_of_v_is_no_spike():
    """v starts at 1, far above small gradients: that is TensorFlow's rule, and no stuck element."""
    p = weight(4, 4, grad=1e-4)
    optimizer = RMSprop([p], dialect="tensorflow1", learning_rate=1e-3)
    for _ in range(20):
        optimizer.step()
    assert "stuck" not in names(optimizer.lint())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.bfloat16], ids=str)
def test_every_dtype_and_layout_is_read(dtype):
    """Complex numbers as pairs; a transposed tensor; one of several parts."""
    p = nn.Parameter(torch.ones(6, 4, dtype=dtype).t())
    p.grad = torch.full_like(p, 0.5)
    optimizer = RMSprop([p], lr=0.01)
    optimizer.step()
    assert "nonfinite" not in names(optimizer.lint())
    p.data[0, 0] = torch.nan
    (finding,) = [finding for finding in optimizer.lint() if finding.name == "nonfinite"]
    assert finding.severity == "error"


def test_tensors_are_read_in_parts(monkeypatch):
    """The same findings whatever the size of a part."""
    from rmsprop.diagnose import readings

    net = network()
    optimizer = RMSprop(net.parameters(), lr=1e-3, eps=1.0, weight_decay=0.1, momentum=0.9)
    train(net, optimizer, 20)
    whole = optimizer.lint()
    assert whole
    monkeypatch.setattr(readings, "PART", 7)
    assert optimizer.lint() == whole


def test_empty_lazy_and_meta_parameters_are_left_out():
    """They have no numbers to read."""
    params = [nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(2, device="meta"))]
    assert RMSprop(params, lr=1e-3).lint() == []
    lazy = nn.LazyLinear(2)
    assert RMSprop(lazy.parameters(), lr=1e-3).lint() == []


def test_a_finding_is_a_plain_record():
    """It can be compared, and turned into a dict."""
    assert Finding("a", "note", 0, "s", "c") == Finding("a", "note", 0, "s", "c")


@pytest.mark.parametrize("k", range(-8, 1))
def test_a_suggested_number_is_not_rounded_to_nothing(k):
    """lr 10ᵏ with momentum 0.9: 10ᵏ⁻¹ is suggested, although 1/(1 − 0.9) is a little more than 10 in binary."""
    found = RMSprop([weight(4, 4, value=2 * 10.0 ** (k + 1))], lr=10.0**k, momentum=0.9).lint()
    (momentum,) = (finding for finding in found if finding.name == "momentum")
    assert f"lr={10.0 ** (k - 1):g} for steps as long as without momentum" in momentum.change


def test_steps_without_any_gradient_are_an_error():
    """An optimizer of another model: 50 steps and nothing moved; one with a gradient ends it."""
    net, other = network(), network()
    optimizer = RMSprop(other.parameters(), lr=1e-3)
    assert optimizer.lint() == []
    for _ in range(50):
        net(torch.randn(8, 32)).sum().backward()
        optimizer.step()
    (finding,) = optimizer.lint()
    assert (finding.name, finding.severity) == ("no_gradient", "error")
    assert "no parameter had a gradient in the last 50 steps" in finding.seen
    train(other, optimizer, 1)
    assert optimizer.lint() == []


def test_steps_without_a_gradient_after_loading_are_an_error():
    """The state is another run's, and the model that is trained is not the optimizer's."""
    net = network()
    saved = RMSprop(net.parameters(), lr=1e-3)
    train(net, saved, 3)
    optimizer = RMSprop(network().parameters(), lr=1e-3)
    optimizer.load_state_dict(saved.state_dict())
    for _ in range(3):
        optimizer.step()
    assert ("no_gradient", "error") in [(finding.name, finding.severity) for finding in optimizer.lint()]


@pytest.mark.parametrize(
    "params",
    [
        lambda net: [p.detach() for p in net.parameters()],
        lambda net: list(net.state_dict().values()),
        lambda net: [p.data for p in net.requires_grad_(False).parameters()],
    ],
    ids=["detached", "state_dict", "frozen"],
)
def test_parameters_that_no_backward_reaches_are_found_before_the_first_step(params):
    """Every tensor has requires_grad=False; one with a gradient that was set by hand is enough."""
    tensors = params(network())
    optimizer = RMSprop(tensors, lr=1e-3)
    assert [(f.name, f.severity) for f in optimizer.lint()] == [("no_gradient", "warning")]
    tensors[0].grad = torch.randn_like(tensors[0])
    assert optimizer.lint() == []


def test_a_group_that_joins_a_run_is_not_blamed_for_its_past():
    """Gradual unfreezing: no gradient in the steps before the group was there."""
    net = network()
    optimizer = RMSprop(net[0].parameters(), lr=1e-3)
    train(net, optimizer, 5)
    optimizer.add_param_group({"params": net[2].parameters()})
    for p in net.parameters():
        p.grad = None
    assert optimizer.lint() == []


def test_momentum_that_was_switched_is_found_at_any_time():
    """On or off, before and after the next step; momentum that moves between other values is not."""
    for first, later, severity in ((0.0, 0.9, "warning"), (0.9, 0.0, "note")):
        net = network()
        optimizer = RMSprop(net.parameters(), lr=1e-4, momentum=first)
        train(net, optimizer, 3)
        optimizer.param_groups[0]["momentum"] = later
        for _ in range(2):
            found = [(f.name, f.severity) for f in optimizer.lint() if f.name == "momentum_switched"]
            assert found == [("momentum_switched", severity)]
            train(net, optimizer, 3)
        optimizer.param_groups[0]["momentum"] = first
        assert names(optimizer.lint()) == (["momentum_switched"] if later else [])  # its buffer is left in the state
    net = network()
    optimizer = RMSprop(net.parameters(), lr=1e-4, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-4, total_steps=10)
    assert names(optimizer.lint()) == []


def test_a_loaded_momentum_was_not_switched():
    """The saved run had it from its beginning."""
    net = network()
    saved = RMSprop(net.parameters(), lr=1e-4, momentum=0.9)
    train(net, saved, 3)
    optimizer = RMSprop(net.parameters(), lr=1e-4)
    optimizer.load_state_dict(saved.state_dict(), hparams="load")
    assert names(optimizer.lint()) == []
    assert names(copy.deepcopy(saved).lint()) == []


def _channels_last(p):
    p.data = p.data.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "grad",
    [
        lambda p: torch.ones(1, 1, 1, 1).expand_as(p),
        lambda p: torch.ones_like(p).contiguous(memory_format=torch.channels_last),
        lambda p: torch.ones(*p.shape[:-1], 2 * p.shape[-1])[..., ::2],
        lambda p: torch.ones_like(p).transpose(2, 3),
        lambda p: torch.complex(torch.ones_like(p), torch.ones_like(p)).conj().imag,
    ],
    ids=["expanded", "channels_last", "strided", "transposed", "negated"],
)
def test_a_gradient_whose_layout_costs_the_kernel_is_noted(grad):
    """By the name of its parameter; what was asked for by name, or has no kernel, is not."""
    p, q = weight(2, 3, 4, 4), weight(2, 3, 4, 4, grad=1.0)
    p.grad = grad(p)
    params = [("first", q), ("second", p)]
    (finding,) = RMSprop(params, lr=1e-4).lint()
    assert (finding.name, finding.severity) == ("slow_path", "note")
    assert "copies the gradient of second into" in finding.seen
    assert names(RMSprop(params, lr=1e-4, clip_norm=1.0).lint()) == ["slow_path"]
    for words in ({"backend": "eager"}, {"foreach": True}):
        assert names(RMSprop(params, lr=1e-4, **words).lint()) == []
    copied = torch.empty_like(p)
    p.grad = copied.copy_(p.grad)
    assert names(RMSprop(params, lr=1e-4).lint()) == []


def test_a_parameter_whose_layout_left_its_state_is_noted():
    """model.to(memory_format=torch.channels_last) after the first step."""
    p = weight(2, 3, 4, 4, grad=1.0)
    optimizer = RMSprop([p], lr=1e-4)
    optimizer.step()
    _channels_last(p)
    p.grad = torch.ones_like(p)
    assert "slow_path" in names(optimizer.lint())


def test_a_learning_rate_below_0_is_found():
    """A linear schedule that ran on past its end."""
    optimizer = RMSprop([weight(4, 4)], lr=1e-4)
    optimizer.param_groups[0]["lr"] = -1e-4
    assert [(f.name, f.severity) for f in optimizer.lint()] == [("maximize", "warning")]


def test_what_the_guard_stops_is_not_found():
    """With nonfinite="skip" the advice to take it is followed."""
    p = weight(4, 4, grad=torch.inf)
    assert names(RMSprop([p], lr=1e-4, nonfinite="skip").lint()) == []
