"""The words of each dialect: its own and torch's are taken, a third framework's refused, and limits say why."""

import copy
import pickle

import pytest
import torch
from torch import nn

from rmsprop import RMSprop, dialects
from rmsprop.dialects import DIALECTS, FOREIGN, UNFIT, find_dialect, read_arguments, write_arguments
from rmsprop.settings import TORCH_GROUP
from rmsprop.spec import Hyper, Rule

NAMES = [
    "torch",
    "textbook",
    "hinton2012",
    "graves2013",
    "dqn2015",
    "a3c2016",
    "tensorflow1",
    "keras1",
    "keras2",
    "keras3",
    "optax",
    "jax",
    "timm",
    "sb3",
    "bitsandbytes",
    "mxnet1",
    "mxnet2",
    "paddle",
    "mindspore",
    "mindspore_experimental",
    "mlx",
    "chainer",
    "chainer_graves",
    "lasagne",
    "caffe",
    "caffe2",
    "torch7",
    "flux",
    "dl4j",
    "sonnet2",
    "neon",
    "blocks",
    "climin",
    "heavyball",
]
ROWS = pytest.mark.parametrize("row", DIALECTS.values(), ids=lambda row: row.name)


def make(dialect: str, **words: object) -> RMSprop:
    row = DIALECTS[dialect]
    if row.hyper.lr is None and not {"lr", *(w for w, o in row.arguments.items() if o == "lr")} & words.keys():
        words["lr"] = 0.1
    return RMSprop([nn.Parameter(torch.ones(3))], dialect=dialect, **words)


def group(dialect: str, **words: object) -> dict:
    return make(dialect, **words).param_groups[0]


def test_every_dialect_that_was_promised_is_there():
    """By these names."""
    assert sorted(DIALECTS) == sorted(NAMES)


@ROWS
def test_a_row_is_complete(row):
    """Title, source, states, how it is called there and an example that constructs, with every trap a sentence."""
    assert row.title
    assert row.source
    assert "square_avg" in row.states.values()
    assert row.call or row.name in ("textbook", "hinton2012", "graves2013", "dqn2015", "a3c2016")
    assert row.traps
    assert all(trap.endswith(".") for trap in row.traps)
    made = RMSprop([nn.Parameter(torch.ones(2))], dialect=row.name, **eval(f"dict({row.example})"))
    assert made.param_groups[0]["dialect"] == row.name
    assert set(row.arguments.values()) <= dialects.__dict__["_OURS"]


@ROWS
def test_its_defaults_are_the_rows(row):
    """Rule and numbers, unless something was given."""
    settings = group(row.name)
    full = row.complete({}, ())
    for name in (*dialects.HYPERS, *dialects.SWITCHES, "sparse"):
        if name != "lr" or row.hyper.lr is not None:
            assert settings[name] == full[name], name


@ROWS
def test_torchs_words_are_taken_too(row):
    """lr, eps, weight_decay; alpha unless it is the learning rate there."""
    words = dict(lr=0.5, eps=0.25, weight_decay=0.125)
    if "alpha" not in row.refused:
        words["alpha"] = 0.75
    settings = group(row.name, **words)
    assert {name: settings[name] for name in words} == words


@ROWS
def test_a_word_of_a_third_framework_is_refused_with_the_right_one(row):
    """Every foreign word: one sentence with the word to write here."""
    for word in FOREIGN:
        if word in row.arguments or word in row.refused or word in row.limits or word in TORCH_GROUP:
            continue
        with pytest.raises(TypeError, match=rf"takes no {word}=.* write .*=\.\.\. here"):
            make(row.name, **{word: 0.5})


@ROWS
def test_a_learning_rate_that_the_framework_asks_for_is_asked_for(row):
    """By the framework's name for it; groups may bring their own."""
    if row.hyper.lr is not None:
        assert RMSprop([nn.Parameter(torch.ones(1))], dialect=row.name).param_groups[0]["lr"] == row.hyper.lr
        return
    with pytest.raises(TypeError, match=rf"no default learning rate, .*give {row.argument('lr')}=\.\.\."):
        RMSprop([nn.Parameter(torch.ones(1))], dialect=row.name)
    own = RMSprop([{"params": [nn.Parameter(torch.ones(1))], row.argument("lr"): 0.25}], dialect=row.name)
    assert own.param_groups[0]["lr"] == 0.25


@ROWS
def test_limits_take_their_value_and_no_other(row):
    """The neutral value says nothing; another is refused with the reason."""
    for word, limit in row.limits.items():
        neutral = limit.neutral if isinstance(limit.neutral, tuple) else (limit.neutral,)
        flag = {row.idle[word]: True} if word in row.idle else {}
        settings = group(row.name, **flag, **{word: "label" if neutral[0] is dialects.ANYTHING else neutral[0]})
        assert settings == group(row.name, **flag) | {"params": settings["params"]}
        if neutral[0] is dialects.ANYTHING:
            continue
        with pytest.raises(ValueError, match=rf"{word}=0.375 does not work under dialect='{row.name}': "):
            make(row.name, **flag, **{word: 0.375})


@ROWS
def test_words_are_written_as_they_are_read(row):
    """write_arguments is the inverse of read_arguments, for every setting the dialect has a word for."""
    given = {"lr": 0.25, "eps": 0.125, "weight_decay": 0.5}
    for switch in ("lr_in_buffer", "centered"):
        given |= {switch: True} if switch in row.arguments.values() else {}
    given |= {"eps_mode": "outside"} if "eps_mode" in row.arguments.values() else {}
    given |= {"weight_decay_mode": "decoupled"} if row.name == "timm" else {}
    spoken = write_arguments(row, given)
    assert read_arguments(row, spoken) == given
    if row.name == "timm":
        corrected = write_arguments(row, {"weight_decay_mode": "corrected"})
        assert corrected == {"decoupled_decay": True, "corrected_weight_decay": True}
        assert read_arguments(row, dict(reversed(corrected.items()))) == {"weight_decay_mode": "corrected"}


@ROWS
def test_a_saved_run_goes_on_under_its_dialect(row):
    """state_dict, deepcopy and pickle keep every setting, and a group that is added later has them too."""
    optimizer = make(row.name, lr=0.125)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        for name in TORCH_GROUP:
            assert other.param_groups[1][name] == optimizer.param_groups[0][name], name
    fresh = make(row.name)
    fresh.load_state_dict(optimizer.state_dict(), hparams="load")
    assert fresh.param_groups[0]["lr"] == 0.125


def test_keras2s_rule_depends_on_momentum():
    """ε moves inside with momentum, in the constructor and in a group of its own; what was asked for stays."""
    assert group("keras2")["eps_mode"] == "outside"
    moved = group("keras2", momentum=0.9)
    assert (moved["eps_mode"], moved["lr_in_buffer"], moved["sparse"]) == ("inside", True, "lazy")
    assert group("keras2", momentum=0.9, eps_mode="outside")["eps_mode"] == "outside"
    mixed = make("keras2", momentum=0.9)
    mixed.add_param_group({"params": [nn.Parameter(torch.ones(1))], "momentum": 0.0})
    assert [g["eps_mode"] for g in mixed.param_groups] == ["inside", "outside"]
    assert group("keras2", epsilon=0)["eps"] == group("keras2", epsilon=None)["eps"] == 1e-7
    assert group("keras1", epsilon=0)["eps"] == 0


def test_keras_use_ema_is_ema():
    """With its default decay, in a group of its own too; without use_ema, ema_momentum is idle as in Keras."""
    assert group("keras3")["ema"] is None
    assert group("keras3", use_ema=True)["ema"] == 0.99
    assert group("keras3", ema_momentum=0.5, use_ema=True)["ema"] == 0.5
    assert group("keras3", use_ema=False, ema_momentum=0.5, ema_overwrite_frequency=100)["ema"] is None
    optimizer = make("keras3", use_ema=True)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "use_ema": False})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert [g["ema"] for g in optimizer.param_groups] == [0.99, None, 0.99]
    assert write_arguments(DIALECTS["keras3"], {"ema": 0.5}) == {"use_ema": True, "ema_momentum": 0.5}
    assert write_arguments(DIALECTS["keras3"], {"ema": None}) == {"use_ema": False}
    with pytest.raises(ValueError, match=r"ema_overwrite_frequency=100 does not work .*average_into"):
        make("keras3", use_ema=True, ema_overwrite_frequency=100)
    with pytest.raises(TypeError, match=r"ema=0.5 and use_ema=True both set ema"):
        make("keras3", use_ema=True, ema=0.5)
    with pytest.raises(TypeError, match=r"use_ema: 1 .*neither True nor False"):
        make("keras3", use_ema=1)


def test_mxnets_centered_operator_brings_its_momentum():
    """gamma2=0.9 with the learning rate inside; without centered its value is idle, and another one refused."""
    plain, centered = group("mxnet1", gamma2=0.9), group("mxnet1", centered=True)
    assert (plain["momentum"], plain["eps_mode"]) == (0, "inside")
    assert (centered["momentum"], centered["lr_in_buffer"]) == (0.9, True)
    assert group("mxnet2", centered=True)["eps_mode"] == "inside"
    assert group("mxnet2")["eps_mode"] == "outside"
    assert group("mxnet1", centered=True, gamma2=0.5)["momentum"] == 0.5
    with pytest.raises(ValueError, match=r"gamma2=0.5 does not work .* only with centered=True"):
        make("mxnet1", gamma2=0.5)


def test_bitsandbytes_ignored_momentum_is_refused():
    """With the reason and where to get momentum."""
    with pytest.raises(ValueError, match=r"momentum=0.9 .*never reads it.*dialect=\"torch\""):
        make("bitsandbytes", momentum=0.9)
    assert group("bitsandbytes", momentum=0, centered=False, optim_bits=32)["momentum"] == 0
    with pytest.raises(ValueError, match=r"optim_bits=8 .*8-bit"):
        make("bitsandbytes", optim_bits=8)


def test_dl4j_starts_at_eps():
    """v₀ = ε, whatever ε is; an explicit start wins."""
    assert group("dl4j", epsilon=0.25)["square_avg_init"] == 0.25
    assert group("dl4j", epsilon=0.25, square_avg_init=0.0)["square_avg_init"] == 0.0


def test_timms_reference_lr_is_the_constructors_in_every_group():
    """Also for a group with a learning rate of its own."""
    words = dict(decoupled_decay=True, corrected_weight_decay=True, weight_decay=0.1)
    optimizer = make("timm", lr=0.5, **words)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.25})
    assert [g["reference_lr"] for g in optimizer.param_groups] == [0.5, 0.5]
    assert "p ← p − 0.5²/0.5·0.1·p" in optimizer.explain()
    with pytest.raises(
        ValueError, match=r"divides by the learning rate at construction, which is 0; give reference_lr"
    ):
        make("timm", lr=0.0, **words)
    with pytest.raises(ValueError, match=r"without decoupled_decay=True"):
        make("timm", corrected_weight_decay=True)


def test_climins_momentum_looks_ahead():
    """On the look-ahead points, climin's Nesterov is ours."""
    assert group("climin", momentum=0.5)["nesterov"] is True
    assert group("climin")["nesterov"] is False


def test_climins_run_by_hand():
    """w ← w − (μ·b + lr·u) with the gradient at w − μ·b: our parameters are those points."""
    decay, rate, mu, target = 0.9, 0.05, 0.8, 3.0
    w, v, b = 1.0, 1.0, 0.0
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = RMSprop([p], dialect="climin", step_rate=rate, decay=decay, momentum=mu)
    for _ in range(20):
        ahead = w - mu * b
        g = 2 * (ahead - target)
        v = decay * v + (1 - decay) * g * g
        b = mu * b + rate * g / (v + 1e-8) ** 0.5
        w -= b
        optimizer.zero_grad()
        ((p - target) ** 2).sum().backward()
        optimizer.step()
        assert abs(p.item() - (w - mu * b)) < 1e-12


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_refused_by_name(name):
    """With the reason, and what there is instead."""
    with pytest.raises(ValueError, match=rf"dialect={name!r} is not offered: .*dialect='"):
        find_dialect(name)


@pytest.mark.parametrize(("name", "meant"), [("tf", "tensorflow1"), ("Keras", "keras3"), ("rmsproptf", "timm")])
def test_a_near_name_is_suggested(name, meant):
    """Names that people try."""
    with pytest.raises(ValueError, match=f"did you mean .*'{meant}'"):
        find_dialect(name)


def test_complex_parameters_are_refused_where_the_square_is_another():
    """torch's meaning is re² and im² apart; the others say why not."""
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    RMSprop([p])
    for row in DIALECTS.values():
        if row.complex:
            with pytest.raises(ValueError, match=r"takes no complex parameters: .*dialect='torch'"):
                RMSprop([p], dialect=row.name, lr=0.1)


def test_a_groups_own_name_is_no_setting():
    """`name` in a group is the user's note, though Keras' constructor has a word for it."""
    optimizer = RMSprop([{"params": [nn.Parameter(torch.ones(1))], "name": "decoder"}], dialect="keras3")
    assert optimizer.param_groups[0]["name"] == "decoder"


def test_a_keras_config_can_be_pasted():
    """optimizer.get_config() of Keras 3, whole."""
    config = {
        "name": "rmsprop", "learning_rate": 0.5, "weight_decay": None, "clipnorm": None, "global_clipnorm": None,
        "clipvalue": 1.5, "use_ema": False, "ema_momentum": 0.99, "ema_overwrite_frequency": None,
        "loss_scale_factor": None, "gradient_accumulation_steps": None, "rho": 0.75, "momentum": 0.0, "epsilon": 1e-6,
        "centered": True,
    }  # fmt: skip
    made = group("keras3", **config)
    assert (made["lr"], made["alpha"], made["clip_value"], made["centered"]) == (0.5, 0.75, 1.5, True)


def test_two_words_for_one_thing_are_refused():
    """Its own and torch's, or two of its own."""
    with pytest.raises(TypeError, match=r"both set lr under dialect='keras3'; give one"):
        RMSprop([nn.Parameter(torch.ones(1))], dialect="keras3", learning_rate=0.1, lr=0.2)
    with pytest.raises(TypeError, match=r"decay_rate=0.9 and decay=0.8 both set alpha"):
        make("blocks", decay_rate=0.9, decay=0.8)


def test_the_rules_are_as_documented():
    """Spot checks against dialects.md's one-page summary, by value."""
    expected = {
        "tensorflow1": (Rule("inside", 1.0, lr_in_buffer=True), Hyper(None, 0.9, 1e-10)),
        "keras3": (Rule("inside", lr_in_buffer=True, weight_decay_mode="decoupled"), Hyper(1e-3, 0.9, 1e-7)),
        "sb3": (Rule("inside", 1.0), Hyper(1e-2, 0.99, 1e-8)),
        "neon": (Rule("both"), Hyper(2e-3, 0.95, 1e-6)),
        "heavyball": (Rule("floor", bias_correction=True, weight_decay_mode="decoupled"), Hyper(0.0025, 0.99, 1e-6)),
        "chainer_graves": (Rule("inside", 0.0, True, lr_in_buffer=True), Hyper(1e-4, 0.95, 1e-4, 0.9)),
    }
    for name, (rule, hyper) in expected.items():
        assert (DIALECTS[name].rule, DIALECTS[name].hyper) == (rule, hyper), name
