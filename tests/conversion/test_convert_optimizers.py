"""Every optimizer of torch and timm is identified by its state, and the advice in each message works."""

import importlib
import inspect
import json
import re
import shlex
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from cases import mostly_long
from commands import invoke
from oracles import _folder
from paths import CHECKPOINTS

from rmsprop import RMSprop
from rmsprop.conversion import Unreadable
from rmsprop.conversion.file import prepare, read_checkpoint, write

HERE = CHECKPOINTS
TORCHS = [
    cls
    for _, cls in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(cls, torch.optim.Optimizer) and cls not in (torch.optim.Optimizer, torch.optim.RMSprop)
]
CARRIES = ("Adam", "AdamW", "NAdam", "RAdam", "SparseAdam", "Adadelta")


def timms():
    """Return timm's own optimizers, imported without the package."""
    folder = _folder("timm")
    if folder is None:
        return []
    alone = sys.modules.setdefault("timm_optim_alone", types.ModuleType("timm_optim_alone"))
    alone.__path__ = [str(folder / "optim")]
    found = (
        "adafactor",
        "adamw",
        "adan",
        "adopt",
        "lamb",
        "laprop",
        "lion",
        "madgrad",
        "nadamw",
        "nvnovograd",
        "radam",
    )
    names = {
        "nvnovograd": "NvNovoGrad",
        "lion": "Lion",
        "lamb": "Lamb",
        "radam": "RAdamLegacy",
        "adamw": "AdamWLegacy",
    }
    names |= {"adafactor": "Adafactor", "adan": "Adan", "adopt": "Adopt", "laprop": "LaProp", "madgrad": "MADGRAD"}
    names |= {"nadamw": "NAdamW"}
    return [getattr(importlib.import_module(f"timm_optim_alone.{name}"), names[name]) for name in found]


def stepped(cls, **settings):
    """Make a small model, and an optimizer of it after three steps."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3))
    words = inspect.signature(cls).parameters
    if words["lr"].default in (inspect.Parameter.empty, None):
        settings["lr"] = 0.1
    if cls is torch.optim.SGD:
        settings["momentum"] = 0.9
    optimizer = cls([weight], **settings)
    for _ in range(3):
        grad = torch.randn(4, 3)
        weight.grad = grad.to_sparse() if cls is torch.optim.SparseAdam else grad
        optimizer.step(*([lambda: weight.sum()] if cls is torch.optim.LBFGS else []))
    return weight, optimizer


def follow(message, path, out):
    """Run the first `rmsprop convert ...` of a message, or the --from of one of the converter's own."""
    match = re.search(r"`rmsprop (convert[^`]*)`", message)
    words = (
        shlex.split(match[1]) if match else ["convert", "IN", "OUT", *re.search(r"--from \w+", message)[0].split()]
    )
    words = [{"IN": str(path), "OUT": str(out)}.get(word, word) for word in words]
    return invoke(*(words if str(path) in words else [*words, str(path), str(out)]))


@pytest.mark.parametrize(
    "cls",
    mostly_long([*TORCHS, *timms()], lambda i, _: i % 3 == 0),
    ids=lambda cls: f"{cls.__module__.split('.')[0]}.{cls.__name__}",
)
def test_another_optimizers_state_is_named_and_the_advice_works(cls, tmp_path):
    """load_state_dict and convert name it; their advice gives a file that loads, or says that nothing does."""
    weight, other = stepped(cls)
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save({"model": {"w": weight.detach()}, "optimizer": other.state_dict()}, path)
    with pytest.raises(ValueError, match="not an RMSprop's") as refused:
        RMSprop([weight], lr=0.1).load_state_dict(other.state_dict())
    name = cls.__name__.removesuffix("Legacy").removesuffix("WLegacy")
    carries = "exp_avg_sq" in other.state[weight] and "exp_avg" in other.state[weight]
    carries = (carries or cls is torch.optim.Adadelta) and cls.__name__ != "NvNovoGrad"
    assert ("convert" in str(refused.value)) == carries
    if cls in TORCHS:
        assert name in str(refused.value)
        assert carries == (name in CARRIES)
    if not carries:
        assert "nothing in it carries over" in str(refused.value)
        code, text = invoke("convert", str(path), str(out))
        assert code == 2
        assert "nothing in it carries over" in " ".join(text.replace("│", " ").split())
        return
    code, text = follow(str(refused.value), path, out)
    assert code == 0, text
    if cls not in (torch.optim.Adam, torch.optim.AdamW) and cls.__name__ != "AdamWLegacy":
        with pytest.raises(ValueError, match="--from") as asked:
            prepare(path)
        assert follow(str(asked.value), path, tmp_path / "again.pt")[0] == 0 or "--set" in str(asked.value)
    decay = torch.load(out, weights_only=True)["optimizer"]["param_groups"][0]["weight_decay_mode"]
    ours = RMSprop([weight], lr=0.1, weight_decay_mode=decay, bias_correction=cls is not torch.optim.Adadelta)
    ours.load_state_dict(torch.load(out, weights_only=True)["optimizer"], hparams="load")
    kept = other.state[weight]["square_avg" if cls is torch.optim.Adadelta else "exp_avg_sq"]
    assert torch.equal(ours.state[weight]["square_avg"], kept.to(torch.float32))
    assert float(ours.state[weight]["step"]) == 3


@pytest.mark.parametrize("cls", TORCHS, ids=lambda cls: cls.__name__)
def test_before_its_first_step_it_is_told_by_its_settings(cls):
    """ASGD and Adafactor, one of which has an alpha of its own, are included."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    settings = {"lr": 0.1} if cls in (torch.optim.SGD, torch.optim.LBFGS) else {}
    held = "the state of parameter 0 holds" if cls is torch.optim.Adagrad else "its group 0 holds"
    with pytest.raises(ValueError, match=f"not an RMSprop's: {held}"):
        RMSprop([weight], lr=0.1).load_state_dict(cls([weight], **settings).state_dict())


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("wanted", ["adam", "adamw"])
def test_an_adam_whose_groups_do_not_tell_its_decay_is_asked_about(decay, wanted, tmp_path):
    """torch before 2.7 wrote no decoupled_weight_decay; without decay, both are equal."""
    weight, other = stepped(torch.optim.AdamW, weight_decay=decay)
    saved = other.state_dict()
    del saved["param_groups"][0]["decoupled_weight_decay"]
    path = tmp_path / "old.pt"
    torch.save({"model": {"w": weight.detach()}, "optimizer": saved}, path)
    if decay:
        with pytest.raises(ValueError, match="its groups do not show which weight decay it used"):
            prepare(path)
    else:
        assert read_checkpoint(path).owner.name == "adam"
    group = prepare(path, source=wanted).checkpoint.hyper
    assert group["weight_decay_mode"] == ("l2" if wanted == "adam" else "decoupled")
    assert group["weight_decay"] == decay


def test_nadams_next_step_divides_by_its_own_root(tmp_path):
    """--from adam keeps NAdam's v and count: (p − p')/lr is g/(√v̂ + ε)."""
    weight, other = stepped(torch.optim.NAdam)
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save({"model": {"w": weight.detach()}, "optimizer": other.state_dict()}, path)
    made = prepare(path, source="adam")
    write(made, out)
    assert any("mu_product" in sentence for sentence in made.report.assumed)
    v = other.state[weight]["exp_avg_sq"].double()
    grad = torch.randn(4, 3)
    v = (0.999 * v + 0.001 * grad.double() ** 2) / (1 - 0.999**4)
    before = weight.detach().clone()
    ours = RMSprop([weight], lr=0.1, bias_correction=True)
    ours.load_state_dict(torch.load(out, weights_only=True)["optimizer"], hparams="load")
    weight.grad = grad
    ours.step()
    expected = 2e-3 * grad.double() / (v.sqrt() + 1e-8)
    torch.testing.assert_close((before - weight.detach()).double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("group", "state", "sentence"),
    [
        ({"betas": (0.0, 0.0), "eps": 1e-10}, {"state1": torch.ones(2)}, "bitsandbytes' Adagrad"),
        ({"betas": (0.9, 0.99), "eps": 0.0}, {"state1": torch.ones(2)}, "bitsandbytes' SGD or Lion"),
        ({"betas": (0.9, 0), "eps": 1e-8}, {"state1": -torch.ones(2)}, "it is a momentum buffer"),
        ({"betas": (0.9, 0.99), "eps": 1e-8}, {"state1": torch.ones(2), "state2": torch.ones(2)}, "two states"),
    ],
)
def test_bitsandbytes_other_optimizers_are_not_taken_for_its_rmsprop(group, state, sentence, tmp_path):
    """Their states have RMSprop's names; their settings, or a negative average, distinguish them."""
    path = tmp_path / "in.pt"
    groups = [{"params": [0], "lr": 0.1, "weight_decay": 0.0, **group}]
    torch.save(
        {"model": {"w": torch.ones(2)}, "optimizer": {"state": {0: {"step": 1, **state}}, "param_groups": groups}},
        path,
    )
    with pytest.raises(Unreadable, match=sentence):
        prepare(path)


# --- Stable-Baselines3 ------------------------------------------------------------------------------


def sb3_zip(path, named):
    """Write a zip as model.save does, of the recorded policy, with the optimizer's class as its text."""
    kwargs = {
        ":type:": "<class 'dict'>",
        ":serialized:": "gASVBAAAAAAAAAB9lC4=",
        "optimizer_kwargs": "{'eps': 1e-05}",
    }
    kwargs |= {"optimizer_class": named} if named is not None else {}
    with zipfile.ZipFile(HERE / "sb3_rmsproptflike.zip") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if name != "data":
                new.writestr(name, old.read(name))
        new.writestr("data", json.dumps({"policy_kwargs": kwargs, "learning_rate": 0.1}))
    return path


TF_LIKE = "stable_baselines3.common.sb2_compat.rmsprop_tf_like.RMSpropTFLike"


@pytest.mark.parametrize(
    ("named", "source"),
    [
        (f"<class '{TF_LIKE}'>", "sb3"),
        ("<class 'torch.optim.rmsprop.RMSprop'>", "torch"),
        ("<class 'timm.optim.rmsprop_tf.RMSpropTF'>", "timm"),
        (None, "torch"),
    ],
)
def test_an_sb3_zip_is_read_by_the_class_it_names(named, source, tmp_path):
    """The text of policy_kwargs.optimizer_class decides; the pickle beside it is never loaded."""
    assert read_checkpoint(sb3_zip(tmp_path / "model.zip", named)).owner.name == source


@pytest.mark.parametrize("named", ["<class '__main__.Mine'>", "<class 'rmsprop_tf_like.RMSpropTFLike'>"])
def test_an_sb3_zip_of_an_unknown_class_is_asked_about(named, tmp_path):
    """A user's own class may compute anything, so the user decides; the advice works."""
    path = sb3_zip(tmp_path / "model.zip", named)
    with pytest.raises(ValueError, match=r"was trained by .*: add --from torch, or sb3 or timm") as asked:
        prepare(path)
    assert follow(str(asked.value), path, tmp_path / "out.pt")[0] == 0


def test_from_an_sb3_zip_the_next_step_is_that_of_the_class_it_names(tmp_path):
    """RMSpropTFLike has ε inside the root; the next step equals its own."""
    from oracles import sb3

    if sb3() is None:
        pytest.skip("stable-baselines3 is not installed")
    path, out = sb3_zip(tmp_path / "model.zip", f"<class '{TF_LIKE}'>"), tmp_path / "out.pt"
    write(prepare(path), out)
    whole = torch.load(out, weights_only=True)
    with zipfile.ZipFile(path) as held, held.open("policy.optimizer.pth") as file:
        saved = torch.load(file, weights_only=True)
    mine = [torch.nn.Parameter(value.clone()) for value in whole["model"].values()]
    theirs = [torch.nn.Parameter(value.clone()) for value in whole["model"].values()]
    ours = RMSprop(mine, lr=0.1, dialect="sb3")
    ours.load_state_dict(whole["optimizer"], hparams="load")
    other = sb3()(theirs, lr=0.1)
    other.load_state_dict(saved)
    for one, two in zip(mine, theirs, strict=True):
        one.grad = torch.full_like(one, 1e-3)
        two.grad = one.grad.clone()
    ours.step()
    other.step()
    for one, two in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one.detach().numpy(), two.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "data", ["{", "[" * 100_000, "[]", '{"policy_kwargs": []}', '{"policy_kwargs": {"optimizer_class": 3}}']
)
def test_a_description_that_is_not_one_names_no_class_or_is_refused(data, tmp_path):
    """Text that is not JSON is refused in one sentence; other JSON names no class."""
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(HERE / "sb3_rmsproptflike.zip") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name == "data" else old.read(name))
        if "data" not in old.namelist():
            new.writestr("data", data)
    if data.startswith(("{}", "[]", '{"')):
        assert read_checkpoint(path).owner.name == "torch"
    else:
        with pytest.raises(Unreadable, match="not JSON"):
            read_checkpoint(path)
