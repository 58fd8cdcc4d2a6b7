"""Keys of a parameter group that are not ours: schedulers', trainers', wrappers' and other optimizers'."""

import copy
import functools
import warnings

import oracles
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from rmsprop import RMSprop
from rmsprop.conversion.file import prepare
from rmsprop.inspection.checkpoint import inspect
from rmsprop.settings import TORCH_GROUP

THEIRS = torch.optim.RMSprop
WORDS = {"keras1": "rho", "keras3": "rho", "mxnet2": "rho", "flux": "rho"}


def parameters(seed=0, dtype=torch.float64):
    """Two parameters, the same for one seed."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((3, 2), (4,))]


def run(optimizer, params, steps=8, each=None):
    """Step with gradients that are the same in every run. Returns: the parameters."""
    generator = torch.Generator().manual_seed(1)
    for i in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
        if each is not None:
            each(i)
    return [p.detach().clone() for p in params]


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization as its public forms wrap an optimizer: Foret et al., arXiv:2010.01412."""

    def __init__(self, params, base_optimizer, rho=0.05, named=("adaptive",), **kwargs):
        notes = {"adaptive": False, "alpha": 0.7, "k": 2}
        super().__init__(params, dict(rho=rho, **{name: notes[name] for name in named}, **kwargs))
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def step(self):
        """Ascend by ρ along the gradient, go back, and take the base optimizer's step."""
        held = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.clone()
                p.add_(p.grad, alpha=group["rho"] / norm.item())
                p.grad.add_(p, alpha=0.1)  # the gradient there
        for p in held:
            p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()

    def load_state_dict(self, state_dict):
        """Load, and share the groups again."""
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


@pytest.mark.parametrize("named", [("adaptive",), (), ("alpha",), ("alpha", "k")], ids=["SAM", "bare", "Look", "k"])
@pytest.mark.parametrize("kwargs", [{"lr": 0.02}, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}], ids=str)
def test_sam_around_this_class_is_sam_around_torchs(named, kwargs):
    """LookSAM too, whose `alpha` in the groups is RMSprop's to both; groups of a wrapper's user have their own lr."""
    found = []
    for cls in (RMSprop, THEIRS):
        a, b = parameters()
        optimizer = SAM([{"params": [a]}, {"params": [b], "lr": 0.005}], cls, named=named, **kwargs)
        assert [group["rho"] for group in optimizer.param_groups] == [0.05, 0.05]
        found.append(run(optimizer, [a, b]))
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        found[-1] += run(optimizer, [a, b], 3)
        assert [group["rho"] for group in optimizer.base_optimizer.param_groups] == [0.05, 0.05]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("kwargs", ("adaptive",)),
        ("kwargs", ("alpha",)),
        ("kwargs", ()),
        ("partial", ("adaptive",)),
        ("partial", ("alpha", "adaptive")),
    ],
    ids=["SAM", "Look", "bare", "SAM-partial", "Look-partial"],
)
@pytest.mark.parametrize("dialect", WORDS)
def test_sams_rho_is_not_the_decay_of_a_dialect(dialect, named, how):
    """`rho` is that dialect's word for alpha, and stays SAM's in a group that SAM hands over; lint says so."""
    params = parameters()
    base = RMSprop if how == "kwargs" else functools.partial(RMSprop, dialect=dialect)
    kwargs = {"learning_rate": 0.02, **({"dialect": dialect} if how == "kwargs" else {})}
    kwargs = kwargs if dialect != "flux" else {**kwargs, "learning_rate": None, "eta": 0.02}
    kwargs = {word: value for word, value in kwargs.items() if value is not None}
    optimizer = SAM(params, base, named=named, **kwargs)
    group = optimizer.base_optimizer.param_groups[0]
    plain = RMSprop(parameters(), dialect=dialect, lr=0.02, **({"alpha": 0.7} if "alpha" in named else {}))
    assert {name: group[name] for name in TORCH_GROUP} == {name: plain.param_groups[0][name] for name in TORCH_GROUP}
    assert group["rho"] == 0.05
    found = [x for x in optimizer.base_optimizer.lint() if x.name == "ignored_key"]
    assert "rho=0.05" in found[0].seen
    assert f"alpha={group['alpha']}" in found[0].seen


@pytest.mark.parametrize("note", [{}, {"name": "head"}, {"initial_lr": 0.1, "lr_scale": 0.5}, {"lr": 0.3}], ids=str)
@pytest.mark.parametrize("dialect", WORDS)
def test_a_users_own_word_in_a_group_is_the_decay(dialect, note):
    """Also beside notes of a trainer's, in the constructor and in add_param_group."""
    a, b = parameters()
    optimizer = RMSprop([{"params": [a], "rho": 0.5, **note}], dialect=dialect, lr=0.1)
    optimizer.add_param_group({"params": [b], "rho": 0.25, **note})
    assert [group["alpha"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert all("rho" not in group for group in optimizer.param_groups)
    assert "ignored_key" not in [x.name for x in optimizer.lint()]


def test_what_the_constructor_was_given_too_is_read_in_a_wrappers_group():
    """A word among the wrapper's keywords is RMSprop's, with the value that the group has for it."""
    a, b = parameters()
    groups = [{"params": [a]}, {"params": [b], "learning_rate": 0.3, "epsilon": 1e-3}]
    optimizer = SAM(groups, RMSprop, learning_rate=0.1, epsilon=1e-5, dialect="keras3", nonfinite="skip")
    assert [(g["lr"], g["eps"], g["alpha"]) for g in optimizer.param_groups] == [(0.1, 1e-5, 0.9), (0.3, 1e-3, 0.9)]
    assert "learning_rate" not in optimizer.param_groups[1]


OTHERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.5, 0.6), eps=1e-4, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, dampening=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.02, rho=0.3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02, lr_decay=0.1, initial_accumulator_value=0.5),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.02, decoupled_weight_decay=True, weight_decay=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.02, alpha=0.6),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02, alpha=0.7, centered=True, maximize=True),
    "scheduled": lambda p: lr_scheduler.OneCycleLR(torch.optim.SGD(p, momentum=0.5), 0.1, 50).optimizer,
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_groups_of_another_optimizer_step_as_under_torch(make):
    """RMSprop(adam.param_groups): torch's names are settings, all other keys are carried along untouched."""
    found = []
    for cls in (RMSprop, THEIRS):
        params = parameters()
        other = make(params)
        optimizer = cls(other.param_groups)
        found.append(run(optimizer, params))
        group = optimizer.param_groups[0]
        for name, value in other.param_groups[0].items():
            assert name in ("params", "nesterov", "fused") or group[name] == value
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dialect", ["textbook", "keras1", "keras3", "mxnet2", "heavyball", "caffe2", "bitsandbytes"])
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_another_optimizers_numbers_are_torchs_under_every_dialect(make, dialect):
    """betas and rho are not its words in such a group, and alpha is the decay; the rule is the dialect's."""
    other = make(parameters()).param_groups[0]
    if other.get("momentum") and dialect in ("keras1", "bitsandbytes"):
        with pytest.raises(ValueError, match=r"momentum=.* does not work under dialect"):
            RMSprop([other], dialect=dialect)
        return
    if other.get("centered") and dialect in ("keras1", "bitsandbytes"):
        with pytest.raises(ValueError, match="centered=True does not work under dialect"):
            RMSprop([other], dialect=dialect)
        return
    group = RMSprop([other], dialect=dialect, lr=0.5).param_groups[0]
    centered = {"centered": True} if other.get("centered") else {}
    alone = RMSprop(parameters(), dialect=dialect, lr=0.5, **centered).param_groups[0]
    for name in TORCH_GROUP:
        taken = name in other and name not in ("nesterov", "fused")
        assert group[name] == (other if taken else alone)[name], name
    assert all(group[name] == other[name] for name in other.keys() - TORCH_GROUP.keys() - {"params"})


def test_another_rules_nesterov_is_named_and_not_taken_over():
    """torch's RMSprop has none, so it carries SGD's; given to the constructor it counts."""
    other = torch.optim.SGD(parameters(), lr=0.1, momentum=0.9, nesterov=True)
    with pytest.warns(UserWarning, match="nesterov=True in a group that another optimizer made is not taken over"):
        optimizer = RMSprop(other.param_groups)
    assert optimizer.param_groups[0]["nesterov"] is False
    assert RMSprop(other.param_groups, nesterov=True, momentum=0.5).param_groups[0]["nesterov"] is True


def test_groups_of_this_class_are_taken_whole():
    """Under our names, whatever the dialect's words are, with the recipe and a wrapper's notes."""
    for made in (
        RMSprop(parameters(), dialect="textbook", learning_rate=0.1, beta=0.5),
        RMSprop(parameters(), dialect="bitsandbytes", lr=0.1),
        RMSprop.recipe("a2c-sb2", parameters(), lr=0.3),
        SAM(parameters(), RMSprop, dialect="keras1", lr=0.1).base_optimizer,
    ):
        again = RMSprop(made.param_groups)
        assert again.param_groups[0] == made.param_groups[0]


SCHEDULERS = {
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=12, cycle_momentum=False),
    "one_cycle_momentum": lambda o: lr_scheduler.OneCycleLR(o, [0.5, 0.25], total_steps=12),
    "one_cycle_tensor": lambda o: lr_scheduler.OneCycleLR(
        o, torch.tensor(0.5, dtype=torch.float64), total_steps=12, cycle_momentum=False
    ),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, base_momentum=0.5, max_momentum=0.8),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=4),
    "lambdas": lambda o: lr_scheduler.LambdaLR(o, [lambda i: 1 / (i + 1), lambda i: 0.5**i]),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "constant": lambda o: lr_scheduler.ConstantLR(o),
    "linear": lambda o: lr_scheduler.LinearLR(o),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "chained": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(o), lr_scheduler.StepLR(o, 2)]),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
}


@pytest.mark.parametrize("corrected", [False, True], ids=["torch", "timm"])
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_no_scheduler_writes_a_setting_but_lr_and_momentum(schedule, corrected):
    """Every scheduler of torch: its keys are carried, and our other settings stay as they were."""
    a, b = parameters()
    words = dict(dialect="timm", decoupled_decay=True, corrected_weight_decay=True) if corrected else {}
    optimizer = RMSprop([{"params": [a]}, {"params": [b]}], lr=0.02, momentum=0.9, weight_decay=0.1, **words)
    before = [dict(group) for group in optimizer.param_groups]
    scheduler = schedule(optimizer)
    run(optimizer, [a, b], 6, lambda _: scheduler.step())
    for old, group in zip(before, optimizer.param_groups, strict=True):
        changed = {name for name in TORCH_GROUP if name not in ("lr", "momentum") and group[name] != old[name]}
        assert not changed


def test_timms_corrected_decay_under_one_cycle_is_timms():
    """OneCycleLR writes `max_lr` into the groups; timm divides by the learning rate of its construction."""
    timm = oracles.timm()
    if timm is None:
        pytest.skip("timm is not installed")
    found = []
    for make in (timm, functools.partial(RMSprop, dialect="timm")):
        params = parameters()
        optimizer = make(params, lr=0.05, weight_decay=0.3, decoupled_decay=True, corrected_weight_decay=True)
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=20, cycle_momentum=False)
        found.append(run(optimizer, params, 15, lambda _, scheduler=scheduler: scheduler.step()))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["float", "tensor"])
@pytest.mark.parametrize("schedule", ["lambdas", "one_cycle_momentum"])
def test_each_group_has_a_rate_of_its_own_under_a_scheduler(schedule, lr):
    """A scheduler fills a tensor lr in place, so groups do not share one: added, copied and loaded groups neither."""
    runs = []
    for given in (lr, 0.1):
        a, b = parameters()
        optimizer = RMSprop([{"params": [a]}], lr=given, momentum=0.5)
        optimizer.add_param_group({"params": [b]})
        optimizer = copy.deepcopy(optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        a, b = (group["params"][0] for group in optimizer.param_groups)
        scheduler = SCHEDULERS[schedule](optimizer)
        runs.append(run(optimizer, [a, b], 6, lambda _, scheduler=scheduler: scheduler.step()))
        if given is lr:
            assert optimizer.param_groups[0]["lr"] is not optimizer.param_groups[1]["lr"]
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-14)


def test_a_tensor_lr_that_requires_grad_is_shared():
    """Its gradient comes from every group, and no scheduler can fill it."""
    lr = torch.tensor(0.1, requires_grad=True)
    optimizer = RMSprop([{"params": [p]} for p in parameters()], lr=lr, differentiable=True)
    assert all(group["lr"] is lr for group in optimizer.param_groups)


@pytest.mark.parametrize("dialect", ["torch", "keras1", "keras3", "mxnet2"])
def test_loading_sams_groups_of_torchs_class_leaves_rho_alone(dialect):
    """A state dict that SAM saved around torch.optim.RMSprop: its alpha is the decay, whatever rho means here."""
    saved = SAM(parameters(), THEIRS, lr=0.02, alpha=0.8).base_optimizer.state_dict()
    optimizer = RMSprop(parameters(), dialect=dialect)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch names no rule
        optimizer.load_state_dict(saved, hparams="load")
    assert (optimizer.param_groups[0]["alpha"], optimizer.param_groups[0]["rho"]) == (0.8, 0.05)


FOREIGN = {"learning_rate": 0.1, "rho": 0.05, "betas": (0.9, 0.99), "decay": 0.1, "gamma": 2, "epsilon": 1e-3}
NOTES = {"name": "head", "lr_scale": 0.5, "decoupled_weight_decay": True, "tag": {"deep": [1, 2]}, "adaptive": False}


def test_foreign_keys_are_carried_through_everything():
    """Construction, add_param_group, steps, state_dict and load_state_dict leave them, and their objects, alone."""
    a, b = parameters()
    given = {"params": [a], **FOREIGN, **NOTES}
    optimizer = RMSprop([given])
    optimizer.add_param_group({"params": [b], **FOREIGN, **NOTES})
    assert given == {"params": [a], **FOREIGN, **NOTES}
    run(optimizer, [a, b], 4)
    fresh = RMSprop([{"params": [p]} for p in parameters()])
    fresh.load_state_dict(optimizer.state_dict())
    for own in (*optimizer.param_groups, *fresh.param_groups, *optimizer.state_dict()["param_groups"]):
        assert {name: own[name] for name in FOREIGN | NOTES} == FOREIGN | NOTES
        assert {name: own[name] for name in TORCH_GROUP} == TORCH_GROUP


@pytest.mark.parametrize("name", [*FOREIGN, "decoupled_weight_decay", "momentun", "weight-decay"])
def test_lint_names_a_carried_key_that_looks_like_a_setting(name):
    """Accepted, and read by no step: in a group as it was given, and as it was edited."""
    edited = RMSprop(parameters())
    edited.param_groups[0][name] = 0.5
    for optimizer in (RMSprop([{"params": parameters(), name: 0.5}]), edited):
        ((severity, seen, change),) = [
            (x.severity, x.seen, x.change) for x in optimizer.lint() if x.name == "ignored_key"
        ]
        assert severity == "warning"
        assert f"{name}=0.5, which no step reads" in seen
        assert "Set group['" in change


def test_lint_leaves_the_notes_of_schedulers_and_trainers_alone():
    """Keys that resemble no setting, and those of torch's schedulers."""
    optimizer = RMSprop([{"params": parameters(), "name": "head", "lr_scale": 0.1, "layer": 3}], momentum=0.9)
    lr_scheduler.OneCycleLR(optimizer, 0.1, 10)
    lr_scheduler.CyclicLR(optimizer, 0.1, 0.2)
    torch.optim.swa_utils.SWALR(optimizer, 0.1)
    assert "ignored_key" not in [x.name for x in optimizer.lint()]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("nonfinite", "skip", "a gradient that is not finite stops the step of all groups"),
        ("nonfinite_limit", 3, "so give nonfinite_limit to RMSprop, as an argument"),
        ("backend", "eager", "all groups share one backend"),
        ("amp_in_step", True, "torch.amp.GradScaler reads it from the optimizer"),
    ],
)
def test_an_argument_of_the_whole_optimizer_is_refused_in_a_group_unless_it_repeats_it(key, value, says):
    """A wrapper repeats all that it hands on; Muon's groups have a `backend` of their own."""
    with pytest.raises(TypeError, match=says):
        RMSprop([{"params": parameters(), key: value}])
    words = {"capturable": True} if key == "amp_in_step" else {}
    assert SAM(parameters(), RMSprop, **{key: value}, **words).param_groups[0][key] == value
    RMSprop([{"params": parameters(), "backend": "newtonschulz5"}])


def test_a_file_of_such_a_run_is_converted_and_inspected(tmp_path):
    """The groups of torch.optim.RMSprop that SAM filled: its keys are reported as no settings, and not refused."""
    params = parameters()
    wrapped = SAM(params, THEIRS, lr=0.02)
    run(wrapped, params, 2)
    torch.save(wrapped.base_optimizer.state_dict(), tmp_path / "in.pt")
    report = prepare(tmp_path / "in.pt", "timm").report
    assert any("rho, adaptive in the group: not a setting of PyTorch" in line for line in report.dropped)
    inspect(tmp_path / "in.pt")
