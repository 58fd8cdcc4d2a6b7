"""Recipes: each row is what its source says, its numbers may change and be seen to, its meaning may not."""

import copy
import io
import json
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch
from paths import DOCS
from typer.testing import CliRunner

from rmsprop import RMSprop, recipe
from rmsprop.cli import app
from rmsprop.dialects import DIALECTS, HYPERS, SWITCHES, read_arguments
from rmsprop.recipes import _ALIASES, RECIPES, TEXTS, call, find_recipe

sys.path.insert(0, str(DOCS))

import recipes_page

ROWS = pytest.mark.parametrize("row", RECIPES.values(), ids=lambda row: row.name)

# Typed from the sources a second time: dialect, lr, alpha, eps, momentum, weight_decay, centered.
NUMBERS = {
    "dqn-nature": ("dqn2015", 0.00025, 0.95, 0.01, 0, 0, True),
    "dqn-dopamine-tf": ("tensorflow1", 0.00025, 0.95, 0.00001, 0, 0, True),
    "dqn-dopamine-jax": ("optax", 0.00025, 0.95, 0.00001, 0, 0, True),
    "a3c": ("a3c2016", 0.0007, 0.99, 0.1, 0, 0, False),
    "a2c-baselines": ("tensorflow1", 0.0007, 0.99, 0.00001, 0, 0, False),
    "acer": ("tensorflow1", 0.0007, 0.99, 0.00001, 0, 0, False),
    "a2c-sb3": ("torch", 0.0007, 0.99, 0.00001, 0, 0, False),
    "a2c-sb2": ("sb3", 0.0007, 0.99, 0.00001, 0, 0, False),
    "impala": ("tensorflow1", 0.0006, 0.99, 0.01, 0, 0, False),
    "impala-code": ("tensorflow1", 0.00048, 0.99, 0.1, 0, 0, False),
    "torchbeast": ("torch", 0.00048, 0.99, 0.01, 0, 0, False),
    "pymarl": ("torch", 0.0005, 0.99, 0.00001, 0, 0, False),
    "minatar": ("torch", 0.00025, 0.95, 0.01, 0, 0, True),
    "inception-v2": ("tensorflow1", 0.165, 0.9, 1, 0.9, 0.00004, False),
    "inception-v3": ("tensorflow1", 0.045, 0.9, 1, 0.9, 0, False),
    "inception-v3-tpu": ("tensorflow1", 0.165, 0.9, 1, 0.9, 0.00004, False),
    "inception-v4": ("tensorflow1", 0.045, 0.9, 1, 0.9, 0, False),
    "inception-v4-tpu": ("tensorflow1", 0.15, 0.9, 1, 0.9, 0.00004, False),
    "mobilenet-v1": ("tensorflow1", 0.165, 0.9, 1, 0.9, 0.00004, False),
    "mobilenet-v2": ("tensorflow1", 0.045, 0.9, 1, 0.9, 0.00004, False),
    "mobilenet-v3": ("tensorflow1", 0.1, 0.9, 0.001, 0.9, 0.00001, False),
    "mnasnet": ("tensorflow1", 0.016, 0.9, 0.001, 0.9, 0.00001, False),
    "efficientnet": ("tensorflow1", 0.016, 0.9, 0.001, 0.9, 0.00001, False),
    "timm-efficientnet-b0": ("timm", 0.048, 0.9, 0.001, 0.9, 0.00001, False),
    "timm-efficientnet-b2": ("timm", 0.016, 0.9, 0.001, 0.9, 0.00001, False),
    "timm-efficientnet-es": ("timm", 0.064, 0.9, 0.001, 0.9, 0.00001, False),
    "timm-mixnet-xl": ("timm", 0.016, 0.9, 0.001, 0.9, 0.00001, False),
    "timm-mobilenetv3-large": ("timm", 0.064, 0.9, 0.001, 0.9, 0.00001, False),
    "ghostnetv2": ("timm", 0.064, 0.9, 0.001, 0.9, 0.00001, False),
    "amoebanet": ("tensorflow1", 0.015, 0.9, 1, 0.9, 0.00004, False),
    "amoebanet-tpu": ("tensorflow1", 0.64, 0.9, 1, 0.9, 0.00004, False),
    "tf-slim": ("tensorflow1", 0.01, 0.9, 1, 0.9, 0.00004, False),
    "graves-handwriting": ("graves2013", 0.0001, 0.95, 0.0001, 0.9, 0, True),
    "ntm": ("graves2013", 0.0001, 0.95, 0.0001, 0.9, 0, True),
    "char-rnn": ("torch7", 0.002, 0.95, 1e-8, 0, 0, False),
    "wgan": ("torch", 0.00005, 0.99, 1e-8, 0, 0, False),
    "dpo": ("torch", 5e-7, 0.99, 1e-8, 0, 0, False),
    "dpo-paper": ("torch", 1e-6, 0.99, 1e-8, 0, 0, False),
}


def weight():
    return torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))


def group_of(optimizer):
    return {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}


def invoke(*words):
    """The command's exit code and output on a wide terminal."""
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "400", "TERM": "dumb"})
    return result.exit_code, result.output


class Agent:
    """How Stable-Baselines3 makes an optimizer: it passes its own learning rate."""

    def __init__(self, optimizer_class, optimizer_kwargs, learning_rate=7e-4):
        self.weight = weight()
        self.optimizer = optimizer_class([self.weight], lr=learning_rate, **optimizer_kwargs)


# --- the rows ------------------------------------------------------------------------------------


@ROWS
def test_a_recipe_is_what_its_source_says(row):
    """The group that it makes holds the numbers typed here, and the switches of its dialect."""
    group = group_of(RMSprop.recipe(row.name, [weight()]))
    names = ("dialect", "lr", "alpha", "eps", "momentum", "weight_decay", "centered")
    assert tuple(group[name] for name in names) == NUMBERS[row.name]
    rule = DIALECTS[row.dialect].rule
    assert {name: group[name] for name in SWITCHES if name != "centered"} == {
        name: getattr(rule, name) for name in SWITCHES if name != "centered"
    }
    assert group["recipe"] == row.name


def test_no_recipe_is_unchecked():
    """Every row is typed twice."""
    assert set(NUMBERS) == set(RECIPES)


@ROWS
def test_a_row_is_complete(row):
    """Key, words of its own dialect, a learning rate, every text, a source; what is unsure is something it states."""
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row.name)
    assert row.title
    assert row.fixes
    assert len(row.source) > 15
    assert all(getattr(row, text) for text in TEXTS if text != "other")
    settings = read_arguments(DIALECTS[row.dialect], row.settings)
    assert settings["lr"] > 0
    words = {*DIALECTS[row.dialect].arguments, *HYPERS, *SWITCHES}
    assert set(row.settings) <= words
    assert set(row.from_memory) <= {*row.settings, *TEXTS}
    assert set(row.assumed) <= set(row.settings)
    assert not set(row.from_memory) & set(row.assumed)
    assert not set(TEXTS) & set(row.settings)


@ROWS
def test_the_printed_call_is_the_recipe(row):
    """The constructor's call that is printed computes the same thing."""
    written = eval(call(row), {"RMSprop": RMSprop, "params": [weight()]})
    group = group_of(RMSprop.recipe(row.name, [weight()]))
    del group["recipe"]
    assert group_of(written) == group


def test_two_recipes_step_as_their_sources_do():
    """DQN's Lua, by hand, and torch's RMSprop for DPO."""
    p, g = weight(), torch.tensor([0.3, -2.0, 1e-3])
    start = p.detach().clone()
    optimizer = RMSprop.recipe("dqn-nature", [p])
    p.grad = g.clone()
    optimizer.step()
    mean, square = 0.05 * g, 0.05 * g * g
    torch.testing.assert_close(p.detach(), start - 2.5e-4 * g / (square - mean * mean + 0.01).sqrt())
    p, q = weight(), weight()
    ours, theirs = RMSprop.recipe("dpo", [p]), torch.optim.RMSprop([q], lr=5e-7)
    p.grad, q.grad = g.clone(), g.clone()
    ours.step()
    theirs.step()
    torch.testing.assert_close(p, q)


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("dqn", ("dqn-nature", "dqn-dopamine-tf", "dqn-dopamine-jax")),
        ("A2C_SB2", ("a2c-sb2",)),
        ("EfficientNet-B0", ("efficientnet", "timm-efficientnet-b0")),
        ("qmix", ("pymarl",)),
        ("wgn", ("wgan",)),
        ("dopamine", ("dqn-dopamine-tf", "dqn-dopamine-jax")),
        ("mobilenet v2", ("mobilenet-v2",)),
    ],
    ids=str,
)
def test_a_near_name_is_answered(name, meant):
    """One sentence with the recipes that may be meant."""
    with pytest.raises(ValueError, match="Unknown recipe") as caught:
        RMSprop.recipe(name, [weight()])
    assert str(caught.value) == f"Unknown recipe: {name!r}; did you mean {' or '.join(map(repr, meant))}?"


@pytest.mark.parametrize("name", ["yolo26", "", None, 3, ["dpo"]], ids=str)
def test_an_unknown_name_lists_those_there_are(name):
    """Whatever is given, and not only text."""
    with pytest.raises(ValueError, match=re.escape(f"Unknown recipe: {name!r}; choose one of 'dqn-nature', ")):
        recipe(name)


def test_aliases_lead_to_recipes():
    """An alias names recipes that are there, and is none itself."""
    for name, meant in _ALIASES.items():
        assert set(meant) <= set(RECIPES)
        with pytest.raises(ValueError, match=re.escape(" or ".join(map(repr, meant)))):
            find_recipe(name)


# --- changes -------------------------------------------------------------------------------------


def test_a_changed_learning_rate_is_recorded_without_a_warning():
    """It is the normal case; a float, a tensor and the dialect's own word."""
    for changes in ({"lr": 0.048}, {"learning_rate": 0.048}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = RMSprop.recipe("efficientnet", [weight()], **changes)
        assert optimizer.param_groups[0]["lr"] == 0.048
        assert optimizer.param_groups[0]["recipe"] == "efficientnet; lr=0.048 instead of 0.016"
    optimizer = RMSprop.recipe("efficientnet", [weight()], lr=torch.tensor(0.048))
    assert optimizer.param_groups[0]["recipe"] == "efficientnet; lr=a tensor instead of 0.016"
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


def test_the_same_number_is_no_change():
    """Saying what the recipe says is not overriding it."""
    optimizer = RMSprop.recipe("efficientnet", [weight()], lr=0.016, epsilon=0.001, eps_mode="inside", momentum=0.9)
    assert optimizer.param_groups[0]["recipe"] == "efficientnet"


def test_other_changed_numbers_are_one_warning_at_the_users_line():
    """In the dialect's words or torch's; the warning names all of them, and the file that asked."""
    for changes in ({"epsilon": 0.01, "momentum": 0.8}, {"eps": 0.01, "momentum": 0.8}):
        with pytest.warns(UserWarning, match="eps=0.01 instead of 0.001, momentum=0.8 instead of 0.9: ") as caught:
            optimizer = RMSprop.recipe("efficientnet", [weight()], lr=0.1, **changes)
        assert [warning.filename for warning in caught] == [__file__]
        assert optimizer.param_groups[0]["recipe"] == (
            "efficientnet; lr=0.1 instead of 0.016; eps=0.01 instead of 0.001; momentum=0.8 instead of 0.9"
        )
    with pytest.warns(UserWarning, match="alpha=0.95 instead of 0.9") as caught:
        RMSprop([weight()], **recipe("efficientnet", decay=0.95))
    assert [warning.filename for warning in caught] == [__file__]


def test_a_number_that_groups_have_from_the_recipe_is_no_change():
    """timm and transformers give weight decay to groups and 0 to the constructor: warned of if no group has it."""
    decayed, plain = dict(params=[weight()], weight_decay=1e-5), dict(params=[weight()], weight_decay=0.0)
    optimizer = RMSprop([plain, decayed], **recipe("timm-efficientnet-b0", weight_decay=0.0), lr=0.048)
    assert [group["recipe"] for group in optimizer.param_groups] == [
        "timm-efficientnet-b0; weight_decay=0.0 instead of 1e-05",
        "timm-efficientnet-b0",
    ]
    plain = dict(params=[weight()], weight_decay=0.0)
    with pytest.warns(UserWarning, match="weight_decay=0.0 instead of 1e-05: ") as caught:
        RMSprop([plain], **recipe("timm-efficientnet-b0", weight_decay=0.0), lr=0.048)
    assert [warning.filename for warning in caught] == [__file__]


def test_clipping_may_be_added():
    """A recipe gives it in words, so giving it is no deviation that needs a warning; it is recorded."""
    optimizer = RMSprop.recipe("a2c-baselines", [weight()], clip_global_norm=0.5)
    assert optimizer.param_groups[0]["clip_global_norm"] == 0.5
    assert optimizer.param_groups[0]["recipe"] == "a2c-baselines; clip_global_norm=0.5 instead of None"


def test_how_a_step_runs_is_no_part_of_a_recipe():
    """Backend, foreach, capturable, maximize pass through, and None leaves a switch."""
    optimizer = RMSprop.recipe(
        "wgan", [weight()], backend="eager", foreach=False, maximize=True, capturable=True, eps_mode=None
    )
    assert optimizer.backend == "eager"
    group = optimizer.param_groups[0]
    assert (group["foreach"], group["maximize"], group["capturable"], group["recipe"]) == (False, True, True, "wgan")


def test_explain_and_repr_show_the_recipe():
    """Both say what was changed."""
    optimizer = RMSprop.recipe("efficientnet", [weight()], lr=0.048)
    assert "    recipe efficientnet; lr=0.048 instead of 0.016\n" in optimizer.explain()
    assert "recipe='efficientnet; lr=0.048 instead of 0.016'" in repr(optimizer)
    assert "recipe" not in RMSprop([weight()]).explain()
    assert "recipe" not in RMSprop([weight()]).param_groups[0]


def test_a_bad_value_is_refused_early():
    """By `recipes` itself, in the sentences of the constructor."""
    with pytest.raises(ValueError, match="Invalid epsilon value: -1"):
        recipe("efficientnet", epsilon=-1)
    with pytest.raises(TypeError, match="Invalid learning rate: 'fast'"):
        recipe("efficientnet", lr="fast")
    with pytest.raises(TypeError, match=re.escape("write decay=... here")):
        recipe("efficientnet", rho=0.9)
    with pytest.raises(TypeError, match="did you mean 'epsilon'"):
        recipe("efficientnet", epsilom=0.9)
    with pytest.raises(TypeError, match=re.escape("learning_rate=0.1 and lr=0.2 both set lr")):
        recipe("efficientnet", learning_rate=0.1, lr=0.2)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("efficientnet", {"eps_mode": "outside"}, "fixes eps_mode='inside', and got 'outside'"),
        ("efficientnet", {"square_avg_init": 0.0}, "fixes square_avg_init=1.0, and got 0.0"),
        ("efficientnet", {"lr_in_buffer": False}, "fixes lr_in_buffer=True, and got False"),
        ("efficientnet", {"nesterov": True}, "fixes nesterov=False, and got True"),
        ("efficientnet", {"centered": True}, "fixes centered=False, and got True"),
        ("efficientnet", {"bias_correction": True}, "fixes bias_correction=False, and got True"),
        ("efficientnet", {"weight_decay_mode": "decoupled"}, "fixes weight_decay_mode='l2', and got 'decoupled'"),
        ("efficientnet", {"momentum": 0.0}, "fixes momentum=0.9, and got 0.0"),
        ("dqn-nature", {"momentum": 0.95}, "there is no heavy-ball momentum, and momentum=0.95 would make steps 20"),
        ("timm-efficientnet-b0", {"decoupled_decay": True}, "fixes weight_decay_mode='l2', and got 'decoupled'"),
        ("minatar", {"centered": False}, "fixes centered=True, and got False"),
    ],
    ids=str,
)
def test_what_breaks_its_meaning_is_refused(name, change, says):
    """The sentence says what the recipe fixes and why; the call that it offers instead works."""
    for make in (lambda: RMSprop.recipe(name, [weight()], **change), lambda: recipe(name, **change)):
        with pytest.raises(ValueError, match="fixes") as caught:
            make()
        assert says in str(caught.value)
        offered = str(caught.value).rpartition("write ")[2]
        if "nesterov" not in change:
            optimizer = eval(offered, {"RMSprop": RMSprop, "params": [weight()]})
            assert all(optimizer.param_groups[0].get(word, value) == value for word, value in change.items())
    with pytest.raises(ValueError, match="fixes"):  # the same through keyword arguments that were made before
        RMSprop([weight()], **{**recipe(name), **change})


def test_another_dialect_is_refused():
    """By every way in: the numbers would mean something else."""
    for make in (
        lambda: RMSprop.recipe("efficientnet", [weight()], dialect="torch"),
        lambda: recipe("efficientnet", dialect="keras3"),
        lambda: RMSprop([weight()], recipe="efficientnet"),
        lambda: RMSprop([weight()], **{**recipe("efficientnet"), "dialect": "caffe2"}),
    ):
        with pytest.raises(ValueError, match="the recipe 'efficientnet' fixes dialect='tensorflow1', and got '"):
            make()
    assert RMSprop.recipe("efficientnet", [weight()], dialect="tensorflow1").param_groups[0]["eps"] == 0.001


# --- groups --------------------------------------------------------------------------------------


def test_a_group_may_change_numbers_and_says_so():
    """Such as one without weight decay; each group's record is its own."""
    groups = [{"params": [weight()]}, {"params": [weight()], "weight_decay": 0.0}]
    optimizer = RMSprop.recipe("efficientnet", groups, lr=0.048)
    assert [group["recipe"] for group in optimizer.param_groups] == [
        "efficientnet; lr=0.048 instead of 0.016",
        "efficientnet; lr=0.048 instead of 0.016; weight_decay=0.0 instead of 1e-05",
    ]
    optimizer.add_param_group({"params": [weight()], "learning_rate": 0.016})
    assert optimizer.param_groups[2]["recipe"] == "efficientnet"
    assert groups[1].keys() == {"params", "weight_decay"}


def test_a_group_may_not_break_the_meaning():
    """Neither by a switch nor by another dialect."""
    optimizer = RMSprop.recipe("efficientnet", [weight()])
    with pytest.raises(ValueError, match=re.escape("fixes square_avg_init=1.0")):
        optimizer.add_param_group({"params": [weight()], "square_avg_init": 0.0})
    with pytest.raises(ValueError, match="fixes dialect='tensorflow1', and got 'torch'"):
        optimizer.add_param_group({"params": [weight()], "dialect": "torch"})
    assert len(optimizer.param_groups) == 1


def test_a_group_may_follow_a_recipe_of_its_own():
    """With that recipe's numbers, and nothing left of the optimizer's; a group that was copied stays as it is."""
    optimizer = RMSprop.recipe("inception-v2", [weight()])
    optimizer.add_param_group({"params": [weight()], "recipe": "inception-v3"})
    assert optimizer.param_groups[1]["recipe"] == "inception-v3"
    assert optimizer.param_groups[1]["lr"] == 0.045
    assert optimizer.param_groups[1]["weight_decay"] == 0
    with pytest.raises(ValueError, match="fixes dialect='torch', and got 'tensorflow1'"):
        optimizer.add_param_group({"params": [weight()], "recipe": "wgan"})
    source = RMSprop.recipe("efficientnet", [weight()], lr=0.048)
    plain = RMSprop([weight()])
    plain.add_param_group({**source.param_groups[0], "params": [weight()]})
    assert plain.param_groups[1] == {**source.param_groups[0], "params": plain.param_groups[1]["params"]}


# --- checkpoints ---------------------------------------------------------------------------------


def test_the_record_is_saved_and_loaded():
    """As plain text: weights-only reading, torch's optimizer, copies and pickles keep it."""
    p = weight()
    optimizer = RMSprop.recipe("wgan", [p], lr=1e-4)
    p.grad = torch.ones(3)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    noted = "wgan; lr=0.0001 instead of 5e-05"
    assert type(saved["param_groups"][0]["recipe"]) is str
    for other in (RMSprop.recipe("wgan", [weight()]), RMSprop([weight()]), torch.optim.RMSprop([weight()])):
        other.load_state_dict(saved, **({"hparams": "load"} if isinstance(other, RMSprop) else {}))
        assert other.param_groups[0]["recipe"] == noted
        other.step()
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert again.param_groups[0]["recipe"] == noted
    assert RMSprop([weight()], **optimizer.defaults).param_groups[0]["recipe"] == noted


def test_settings_from_a_file_without_a_record_are_no_recipe():
    """What torch's optimizer saved replaces the settings, so the recipe's name would be untrue."""
    optimizer = RMSprop.recipe("wgan", [weight()])
    optimizer.load_state_dict(torch.optim.RMSprop([weight()], lr=0.3).state_dict(), hparams="load")
    assert "recipe" not in optimizer.param_groups[0]


# --- other libraries -----------------------------------------------------------------------------


@ROWS
def test_keyword_arguments_are_plain_and_make_the_same_optimizer(row):
    """They survive JSON and pickle; with no learning rate of the library's own it is the recipe's."""
    kwargs = recipe(row.name)
    assert json.loads(json.dumps(kwargs)) == kwargs == pickle.loads(pickle.dumps(kwargs))
    assert {type(value) for value in kwargs.values()} <= {str, float, bool}
    assert not {"lr", DIALECTS[row.dialect].argument("lr")} & kwargs.keys()
    made = RMSprop([weight()], **kwargs)
    assert group_of(made) == group_of(RMSprop.recipe(row.name, [weight()]))


@ROWS
def test_a_library_that_passes_its_own_learning_rate_works(row):
    """As Stable-Baselines3 does; the record says whose number it is."""
    agent = Agent(RMSprop, recipe(row.name), learning_rate=0.125)
    group = agent.optimizer.param_groups[0]
    assert group["lr"] == 0.125
    assert group["recipe"] == f"{row.name}; lr=0.125 instead of {NUMBERS[row.name][1]!r}"
    agent.weight.grad = torch.ones(3)
    agent.optimizer.step()
    assert agent.weight.isfinite().all()


def test_stable_baselines3_needs_one_argument():
    """recipe("a2c-sb2") under A2C's own learning rate is the recipe, unchanged."""
    policy_kwargs = dict(optimizer_class=RMSprop, optimizer_kwargs=recipe("a2c-sb2"))
    assert Agent(**policy_kwargs).optimizer.param_groups[0]["recipe"] == "a2c-sb2"
    assert policy_kwargs["optimizer_kwargs"] == {"recipe": "a2c-sb2", "dialect": "sb3", "alpha": 0.99, "eps": 1e-5}


def test_a_changed_learning_rate_is_among_the_arguments():
    """For libraries that pass none; numpy's numbers become plain."""
    np = pytest.importorskip("numpy")
    assert recipe("dpo", lr=1e-6)["lr"] == 1e-6
    kwargs = recipe("efficientnet", learning_rate=np.float32(0.5))
    assert type(kwargs["learning_rate"]) is float
    assert json.dumps(kwargs)


def test_the_table_is_not_shared():
    """Changing what `recipes` returned changes no recipe."""
    recipe("wgan")["alpha"] = 0.5
    assert recipe("wgan")["alpha"] == 0.99


def test_recipes_need_no_torch():
    """`from rmsprop import recipe` and a call leave torch out; the doctest runs."""
    code = "import sys\nfrom rmsprop import recipe\nrecipe('a2c-sb2', lr=1)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    import doctest

    import rmsprop.recipes

    assert doctest.testmod(rmsprop.recipes).failed == 0
    assert doctest.testmod(rmsprop.recipes).attempted > 0


# --- the command and the page ----------------------------------------------------------------------


def test_the_command_lists_them():
    """Every row, with a star at what is unsure."""
    code, text = invoke("recipes")
    assert code == 0
    for row in RECIPES.values():
        assert f" {row.name} " in text
    assert "learning_rate=0.0006*" in text
    assert "learning_rate=0.00048," in text


@ROWS
def test_the_command_shows_one_in_full(row):
    """The call, all texts, what is unsure, and the source."""
    code, text = invoke("recipes", row.name)
    assert code == 0
    assert text.startswith(f"{row.name}: {row.title}\n")
    texts = [getattr(row, name) for name in TEXTS]
    for part in (call(row), *texts, row.fixes, row.source, *row.assumed.values()):
        assert part in text
    assert ("From memory: " in text) == bool(row.from_memory)
    for word in row.from_memory:
        assert TEXTS.get(word, word) in text.partition("From memory: ")[2]


def test_an_unknown_recipe_is_one_sentence():
    """Exit code 2, and no traceback."""
    code, text = invoke("recipes", "qmix")
    assert code == 2
    assert "Unknown recipe: 'qmix'; did you mean 'pymarl'?" in text


def test_the_page_is_fresh_and_runs():
    """docs/recipes.md is what the rows say today, and its Python prints what its comments say."""
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert page == recipes_page.recipes_page()
    program = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S))
    printed = []
    exec(compile(program, "recipes.md", "exec"), {"print": printed.append})
    assert printed == re.findall(r"print\(.*\)  # (.*)", program)
    for row in RECIPES.values():
        section = page.split(f"\n## {row.name}\n")[1].split("\n## ")[0]
        assert call(row) in section
        assert row.source in section


def test_a_recipe_takes_how_half_precision_is_kept_and_what_guards_it():
    """rounding, state_dtype, seed and nonfinite are no change of a recipe; max_update is one, and is noted."""
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    words = dict(rounding="stochastic", compensation=True, seed=3, nonfinite="skip", nonfinite_limit=5)
    words["state_dtype"] = "float8"
    optimizer = RMSprop.recipe("dpo", [weight], lr=1e-6, max_update=3.0, **words)
    group = optimizer.param_groups[0]
    assert (group["rounding"], group["compensation"], group["seed"], group["max_update"]) == (
        "stochastic",
        True,
        3,
        3.0,
    )
    assert group["state_dtype"] == "float8"
    assert "max_update=3.0" in group["recipe"]
    assert "rounding" not in group["recipe"]
    assert "state_dtype" not in group["recipe"]
    assert "nonfinite='skip'" in repr(optimizer)


def test_recipes_set_their_sources_average() -> None:
    """The constructor and the dict for libraries average; turning it off is recorded, and costs no state."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = RMSprop.recipe("efficientnet", [weight])
    group = optimizer.param_groups[0]
    assert (group["ema"], group["ema_warmup"], group["recipe"]) == (0.9999, "tensorflow", "efficientnet")
    assert recipe("timm-efficientnet-b0")["ema"] == 0.9999
    assert "ema" not in recipe("a2c-sb2")
    for off in (RMSprop.recipe("efficientnet", [weight], ema=None), RMSprop([weight], **recipe("mnasnet", ema=None))):
        assert off.param_groups[0]["ema"] is None
        assert "ema=None instead of 0.9999" in off.param_groups[0]["recipe"]
    shorter = RMSprop.recipe("efficientnet", [weight], ema=0.99, ema_warmup=None)
    assert shorter.param_groups[0]["recipe"] == (
        "efficientnet; ema=0.99 instead of 0.9999; ema_warmup=None instead of 'tensorflow'"
    )
