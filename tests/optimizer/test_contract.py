"""What torch, and everything built on it, expects of an optimizer."""

import copy
import io
import pickle
from itertools import product

import pytest
import torch
from cases import mostly_long
from torch import nn
from torch.optim import lr_scheduler
from torch.testing import assert_close

import rmsprop
from rmsprop import RMSprop


def net():
    """A small network with named parameters of three shapes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_of(model):
    """A loss on fixed data."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(16, 4, generator=generator), torch.randn(16, 2, generator=generator)
    return ((model(x) - y) ** 2).mean()


def train(model, optimizer, steps=5, scheduler=None):
    """Ordinary training."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


EVERYTHING = dict(
    momentum=0.9, centered=True, weight_decay=0.01, eps_mode="inside", square_avg_init=1.0, lr_in_buffer=True
)


def test_it_is_an_optimizer_of_torch_with_torchs_signature():
    """isinstance holds, and the arguments that torch has come first, with its defaults."""
    import inspect

    assert issubclass(RMSprop, torch.optim.Optimizer)
    ours = list(inspect.signature(RMSprop).parameters.values())
    theirs = list(inspect.signature(torch.optim.RMSprop).parameters.values())
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    defaults = [
        False if p.name == "centered" else p.default for p in ours[: len(theirs)]
    ]  # None, as a dialect's may be True
    assert defaults == [p.default for p in theirs]
    assert RMSprop([torch.nn.Parameter(torch.ones(1))]).param_groups[0]["centered"] is False
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) : -1])


def test_a_number_that_equals_torchs_default_was_given():
    """Under another dialect 0.99 counts where it is said, and the dialect's own where nothing is; both are floats."""
    import inspect

    weight = torch.nn.Parameter(torch.ones(1))
    given = RMSprop([weight], dialect="keras3", lr=0.01, alpha=0.99, eps=1e-8, momentum=0.0).param_groups[0]
    assert (given["lr"], given["alpha"], given["eps"]) == (0.01, 0.99, 1e-8)
    own = RMSprop([weight], dialect="keras3").param_groups[0]
    assert (own["lr"], own["alpha"], own["eps"]) == (1e-3, 0.9, 1e-7)
    assert not RMSprop([weight], dialect="dqn2015", centered=False).param_groups[0]["centered"]
    assert RMSprop([weight], dialect="dqn2015").param_groups[0]["centered"]
    defaults = {name: p.default for name, p in inspect.signature(RMSprop).parameters.items()}
    numbers = ("lr", "alpha", "eps", "weight_decay", "momentum")
    assert [type(defaults[name]) for name in numbers] == [float] * 5  # plain ones, which YAML can write


def test_closures_are_evaluated_with_gradients_and_their_loss_returned():
    """step(closure), step(None), step(closure=None) and step() are all taken."""
    model = net()
    optimizer = RMSprop(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    before = weights(model)
    assert optimizer.step(closure).item() == loss_of_at(before).item()
    assert optimizer.step() is None
    assert optimizer.step(None) is None
    assert optimizer.step(closure=None) is None


def loss_of_at(values):
    model = net()
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)
    return loss_of(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: lr_scheduler.ExponentialLR(o, 0.9),
        lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=20),
        lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, cycle_momentum=True, base_momentum=0.5, max_momentum=0.9),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 10)], [3]
        ),
    ],
    ids=["step", "exponential", "onecycle", "cyclic", "sequential"],
)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float-lr", "tensor-lr"])
def test_schedulers_move_lr_and_momentum_as_they_do_for_torch(make, tensor_lr):
    """The same schedule gives torch's run, through lr as a float or as a tensor."""
    runs = []
    for cls in (RMSprop, torch.optim.RMSprop):
        model = net()
        lr = torch.tensor(0.005) if tensor_lr else 0.005
        optimizer = cls(model.parameters(), lr=lr, momentum=0.8)
        train(model, optimizer, 12, make(optimizer))
        runs.append(weights(model))
    for ours, theirs in zip(*runs, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_step_hooks_see_every_step_and_state_dict_hooks_are_called():
    """Pre and post hooks of steps, of saving and of loading run, in order, and may replace what passes."""
    model = net()
    optimizer, seen = RMSprop(model.parameters()), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, d: {**d, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, d: (seen.append("load"), {**d, "state": {}})[1])
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert seen == ["pre", "post", "save", "load", "loaded"]
    assert len(optimizer.state) == 0


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "file"])
def test_pickles_copies_and_files_continue_bitwise(settings, how):
    """N + M steps equal N steps, a copy by any means, and M steps, to the last bit."""
    whole = net()
    train(whole, RMSprop(whole.parameters(), **settings), 8)
    part = net()
    optimizer = RMSprop(part.parameters(), **settings)
    train(part, optimizer, 5)
    if how == "file":
        file = io.BytesIO()
        torch.save({"model": part.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        part = net()
        part.load_state_dict(saved["model"])
        optimizer = RMSprop(part.parameters())
        optimizer.load_state_dict(saved["optimizer"])
    elif how == "pickle":
        part, optimizer = pickle.loads(pickle.dumps((part, optimizer)))
    else:
        part, optimizer = copy.deepcopy((part, optimizer))
    train(part, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(weights(part), weights(whole), strict=True))


def test_a_pickle_keeps_the_backend_and_one_without_it_means_auto():
    """The backend is the process's, not the checkpoint's: it travels in pickles only."""
    optimizer = RMSprop(net().parameters(), backend="eager")
    assert pickle.loads(pickle.dumps(optimizer)).backend == "eager"
    assert "backend" not in optimizer.state_dict()["param_groups"][0]
    state = optimizer.__getstate__()
    del state["backend"]
    old = RMSprop.__new__(RMSprop)
    old.__setstate__(state)
    assert old.backend == "auto"


def test_a_torch_pickle_with_integer_steps_and_missing_keys_is_filled():
    """Groups and steps of old torch versions are completed with torch's meaning."""
    model = net()
    optimizer = RMSprop(model.parameters())
    train(model, optimizer, 1)
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        for name in ("foreach", "maximize", "differentiable", "capturable", "eps_mode", "dialect", "fused"):
            del group[name]
    for entry in state["state"].values():
        entry["step"] = 1
    optimizer.__setstate__(state)
    group = optimizer.param_groups[0]
    assert (group["eps_mode"], group["dialect"], group["foreach"]) == ("outside", "torch", None)
    assert all(isinstance(entry["step"], torch.Tensor) for entry in optimizer.state.values())
    train(model, optimizer, 1)
    assert all(entry["step"] == 2 for entry in optimizer.state.values())


def test_an_empty_state_dict_round_trip_works():
    """Accelerate loads a fresh optimizer's own state dict at wrap time."""
    optimizer = RMSprop(net().parameters(), **EVERYTHING)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["eps_mode"] == "inside"


def test_named_parameters_and_groups_with_their_own_settings():
    """Groups keep their names and settings, in torch's words or the dialect's."""
    model = net()
    named = list(model.named_parameters())
    optimizer = RMSprop(
        [{"params": named[:2], "lr": 0.5}, {"params": named[2:], "learning_rate": 0.25, "epsilon": 1e-3}],
        dialect="textbook",
    )
    first, second = optimizer.param_groups
    assert (first["lr"], second["lr"], second["eps"], first["eps"]) == (0.5, 0.25, 1e-3, 1e-8)
    assert first["param_names"] == ["0.weight", "0.bias"]
    assert "learning_rate" not in second
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(3)))], "eps_mode": "floor"})
    assert optimizer.param_groups[2]["eps_mode"] == "floor"
    assert optimizer.param_groups[2]["lr"] == 1e-3
    train(model, optimizer, 2)


def test_a_group_may_speak_another_dialect():
    """A group's own dialect brings its rule and defaults."""
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = RMSprop([{"params": [a]}, {"params": [b], "dialect": "textbook", "beta": 0.5}])
    assert [g["eps_mode"] for g in optimizer.param_groups] == ["outside", "inside"]
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.001]
    assert [g["alpha"] for g in optimizer.param_groups] == [0.99, 0.5]


def test_the_dict_that_defines_a_group_stays_as_it_was_given():
    """Groups are copied, not edited."""
    given = {"params": [nn.Parameter(torch.ones(2))], "beta": 0.5}
    RMSprop([given], dialect="textbook")
    assert set(given) == {"params", "beta"}


def test_extra_keys_of_a_group_are_kept():
    """Schedulers and trainers keep notes in groups: initial_lr, lr_scale, name."""
    optimizer = RMSprop([{"params": [nn.Parameter(torch.ones(2))], "lr_scale": 0.5, "name": "head"}])
    assert optimizer.param_groups[0]["lr_scale"] == 0.5
    assert optimizer.state_dict()["param_groups"][0]["name"] == "head"


def test_parameters_without_gradient_are_left_alone():
    """None is not zero: no state is made and nothing moves."""
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = RMSprop([a, b], weight_decay=0.1)
    a.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(b.detach(), torch.ones(2))
    assert b not in optimizer.state
    RMSprop([b]).step()


def test_momentum_raised_from_zero_makes_its_buffer_and_lowered_keeps_it():
    """Schedules may move momentum through 0 (torch raises KeyError)."""
    model = net()
    optimizer = RMSprop(model.parameters())
    train(model, optimizer, 2)
    optimizer.param_groups[0]["momentum"] = 0.9
    train(model, optimizer, 2)
    buffers = [entry["momentum_buffer"].clone() for entry in optimizer.state.values()]
    optimizer.param_groups[0]["momentum"] = 0.0
    train(model, optimizer, 2)
    kept = [entry["momentum_buffer"] for entry in optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(buffers, kept, strict=True))


def test_lr_may_change_between_float_and_tensor():
    """A group's lr may be replaced by a tensor, or a tensor by a float, during a run."""
    model, twin = net(), net()
    a, b = RMSprop(model.parameters(), lr=0.01), RMSprop(twin.parameters(), lr=0.01)
    train(model, a, 2)
    a.param_groups[0]["lr"] = torch.tensor([0.01])
    train(model, a, 2)
    train(twin, b, 4)
    for x, y in zip(weights(model), weights(twin), strict=True):
        assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps_mode", "inside"), ("centered", True), ("square_avg_init", 1.0), ("bias_correction", True)],
)
def test_the_rule_does_not_change_during_a_run(name, value):
    """A switch that is flipped in mid-run raises and says what to do; nothing has moved."""
    model = net()
    optimizer = RMSprop(model.parameters())
    train(model, optimizer, 1)
    before = weights(model)
    optimizer.param_groups[0][name] = value
    with pytest.raises(RuntimeError, match=f"{name} changed from .* build a new RMSprop"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    optimizer.param_groups[0][name] = rmsprop.DIALECTS["torch"].defaults()[name]
    optimizer.step()


def test_a_step_with_zero_gradients_and_lr_0_moves_nothing():
    """Distributed checkpoints make state that way."""
    for settings in ({}, EVERYTHING, {"weight_decay": 0.1, "weight_decay_mode": "decoupled"}, {"eps": 0.0}):
        model = net()
        before = weights(model)
        optimizer = RMSprop(model.parameters(), **settings)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.0)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step(closure=None)
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_gradients_are_not_edited_by_any_rule():
    """l2, maximize and half precision work on copies."""
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        p = nn.Parameter(torch.ones(5, dtype=dtype))
        p.grad = torch.full((5,), 0.5, dtype=dtype)
        RMSprop([p], weight_decay=0.1, maximize=True, centered=True, momentum=0.9).step()
        assert torch.equal(p.grad, torch.full((5,), 0.5, dtype=dtype))


def test_gradscaler_skips_bad_steps():
    """The default contract of GradScaler: unscaled gradients, and no step where one is inf."""
    p = nn.Parameter(torch.ones(3))
    optimizer = RMSprop([p])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((p * 2).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_close(p.detach(), torch.full((3,), 0.9))
    p.grad = torch.full((3,), float("inf"))
    scaler.step(optimizer)
    assert_close(p.detach(), torch.full((3,), 0.9))


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch's own parts
@pytest.mark.parametrize(
    ("settings", "backend"),  # inductor compiles C++
    [
        (EVERYTHING, "eager"),
        *mostly_long(
            [
                (EVERYTHING, "aot_eager"),
                *product([EVERYTHING, {}, {"bias_correction": True, "maximize": True}], ["inductor"]),
            ],
            lambda *_: False,
            unpack=True,
        ),
    ],
    ids=str,
)
def test_a_compiled_step_equals_the_eager_one(settings, backend):
    """torch.compile(optimizer.step), while lr changes, within a float32 unit of the move; two graphs at most."""
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    model, twin = net(), net()
    compiled, eager = RMSprop(model.parameters(), **settings), RMSprop(twin.parameters(), **settings)
    step = torch.compile(compiled.step, backend=backend)
    for t in range(4):
        for optimizer in (compiled, eager):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = 0.01 / (t + 1)
        loss_of(model).backward()
        loss_of(twin).backward()
        step()
        eager.step()
    assert dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert compiled.state[p]["step"] == eager.state[q]["step"] == 4
    dynamo.reset()


@pytest.mark.parametrize("settings", [{}, EVERYTHING, {"eps_mode": "floor", "bias_correction": True}], ids=str)
def test_differentiable_steps_have_finite_first_and_second_derivatives(settings):
    """Meta-learning: gradients flow through steps to lr and to the start, also where a gradient is 0."""
    # (as in torch, the loss must read a clone: the step overwrites the parameter that autograd has saved)
    start = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    p = start.clone()
    optimizer = RMSprop([p], lr=lr, differentiable=True, **settings)
    for _ in range(3):
        p.grad = torch.autograd.grad((p.clone() ** 4).sum(), p, create_graph=True)[0]
        optimizer.step()
    first = torch.autograd.grad((p.clone() ** 2).sum(), (start, lr), create_graph=True)
    second = torch.autograd.grad(sum(x.sum() for x in first), (start, lr))
    assert all(torch.isfinite(x).all() for x in (*first, *second))
    assert first[1].abs().sum() > 0


def test_repr_shows_the_rule_in_force():
    """The equation's lines, the dialect and the numbers can be read off the optimizer."""
    text = repr(RMSprop(net().parameters(), dialect="textbook", momentum=0.9, weight_decay=0.1))
    for part in (
        "dialect='textbook'",
        "√(w + 1e-08)",
        "b ← 0.9·b + u",
        "g ← g + 0.1·p",
        "momentum=0.9, weight_decay=0.1",
    ):
        assert part in text, part


def test_repr_is_short_and_shows_what_was_changed():
    """At most 15 lines for one group with every switch on, and one more for each further group."""
    every = dict(centered=True, momentum=0.9, nesterov=True, bias_correction=True, weight_decay=0.1, maximize=True)
    clips = dict(clip_value=1.0, clip_norm=2.0, clip_global_norm=3.0, clip_weights=1.0, clip_after_decay=True)
    care = dict(max_update=3, sparse="lazy", rounding="stochastic", compensation=True, nonfinite="skip")
    half = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(3)]
    lines = repr(RMSprop(half[:1], **every, **clips, **care)).split("\n")
    assert len(lines) <= 15
    assert lines[0] == "RMSprop(backend='auto', nonfinite='skip'"
    groups = [{"params": half[:1]}, {"params": half[1:], "lr": 0.5, "name": "b"}]
    more = repr(RMSprop(groups, **every, **clips, **care))
    assert len(more.split("\n")) == len(lines) + 1
    assert "    group 1: 2 tensors, 4 elements, bias_correction=True, centered=True, clip_" in more
    assert "lr=0.5" in more.split("\n")[-2]
    assert repr(RMSprop([nn.Parameter(torch.ones(3, 400))])) == (
        "RMSprop(backend='auto'\n"
        "    group 0: 1 tensor, 1,200 elements\n"
        "        [2] v ← 0.99·v + 0.01·g²\n"
        "        [5] w ← v\n"
        "        [6] d ← √w + 1e-08\n"
        "        [7] u ← g/d\n"
        "        [9] p ← p − 0.01·u\n"
        ")"
    )


def test_numpy_numbers_of_schedules_are_saved_as_plain_ones():
    """weights_only loading reads every checkpoint, also after np.float64 got into a group."""
    import numpy as np

    model = net()
    optimizer = RMSprop(model.parameters(), lr=np.float64(0.1))
    assert type(optimizer.param_groups[0]["lr"]) is float
    optimizer.param_groups[0]["lr"] = np.float64(0.05)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["lr"] == 0.05
