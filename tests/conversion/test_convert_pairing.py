"""`rmsprop convert` pairs numbered or named state with the right parameters, or refuses.

All layers have one shape, so that nothing but the pairing decides; the value of `square_avg` tells whose it is.
"""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from typer.testing import CliRunner

from rmsprop import RMSprop
from rmsprop.cli import app
from rmsprop.conversion.file import prepare, write
from rmsprop.conversion.layout import Map, plan
from rmsprop.conversion.owner import find_owner
from rmsprop.conversion.pairing import sorted_as_text, ways
from rmsprop.conversion.record import Checkpoint, Unreadable

LAYERS = 12


def network(width=3):
    """Make layers of one shape, whose numbers do not sort as text."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))


def stepped(model, groups, cls=torch.optim.RMSprop):
    """Make an optimizer after a step on gradients that equal the layer's number."""
    optimizer = cls(groups)
    for i, p in enumerate(model.parameters(), 1):
        p.grad = torch.full_like(p, float(i))
    optimizer.step()
    return optimizer


def head_first(model):
    """Put the last two layers in the first group, at another rate."""
    params = list(model.parameters())
    return [{"params": params[-2:], "lr": 0.5}, {"params": params[:-2], "lr": 0.25}]


def saved(path, weights, optimizer):
    torch.save({"model": weights, "optimizer": optimizer}, path)
    return path


def whose(checkpoint):
    """Return, by name, the layer that the state belongs to, and its rate."""
    rates = {name: hyper["lr"] for names, hyper in checkpoint.groups for name in names}
    return {
        name: (round(float(np.ravel(slots["square_avg"])[0] / 0.01) ** 0.5), rates[name])
        for name, slots in checkpoint.slots.items()
    }


RIGHT = {f"{i}.weight": (i + 1, 0.5 if i >= LAYERS - 2 else 0.25) for i in range(LAYERS)}


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("cls", [torch.optim.RMSprop, RMSprop])
def test_state_that_is_keyed_by_name_goes_by_name(tmp_path, wrapper, cls):
    """A distributed state dict with two groups keeps 10 after 2, also if the model was wrapped."""
    model = network()
    kept = get_optimizer_state_dict(model, stepped(model, head_first(model), cls))
    wrapped = {f"{wrapper}{name}": value for name, value in model.state_dict().items()}
    path = saved(tmp_path / "in.pt", wrapped, kept)
    right = {f"{wrapper}{name}": value for name, value in RIGHT.items()}
    assert whose(prepare(path).checkpoint) == right
    alone = saved(tmp_path / "alone.pt", {}, kept)
    model_file = tmp_path / "model.pt"
    torch.save(wrapped, model_file)
    assert whose(prepare(alone).checkpoint) == RIGHT
    assert whose(prepare(alone, model=model_file).checkpoint) == right


@pytest.mark.parametrize("where", ["in the file", "--model"])
def test_numbers_in_several_groups_of_one_shape_are_refused(tmp_path, where):
    """The head is listed first, and shapes are equal: the error names the options that decide."""
    model = network()
    kept = stepped(model, head_first(model)).state_dict()
    path = saved(tmp_path / "in.pt", {} if where == "--model" else model.state_dict(), kept)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    given = {"model": tmp_path / "model.pt"} if where == "--model" else {}
    with pytest.raises(
        ValueError, match=r"in 2 groups \(2, 10\) .* more than one way \(parameter \d+ could be"
    ) as found:
        prepare(path, **given)
    assert "--match order" in str(found.value)
    assert "--match number" in str(found.value)
    fixed = prepare(path, mapping=Map({"0": "10.weight", "1": "11.weight"}), **given)
    assert whose(fixed.checkpoint) == RIGHT
    wrong = prepare(path, match="order", **given).checkpoint
    assert whose(wrong)["0.weight"] == (11, 0.5)  # the user said so
    numbers = prepare(path, match="number", **given)
    write(numbers, tmp_path / "out.pt")
    whole = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all("param_names" not in group for group in whole["optimizer"]["param_groups"])
    assert whole["model"].keys() == model.state_dict().keys()
    twin = network()
    again = RMSprop([{**group, "params": list(group["params"])} for group in head_first(twin)])
    again.load_state_dict(whole["optimizer"])
    assert [round((again.state[p]["square_avg"][0, 0].item() / 0.01) ** 0.5) for p in twin.parameters()] == list(
        range(1, LAYERS + 1)
    )


def test_numbers_are_names_where_shapes_leave_one_way(tmp_path):
    """Shapes pair two groups despite a frozen layer, buffers, tied weights and parameters that never stepped."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 3)
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(LAYERS))
            self.norm = nn.BatchNorm1d(5)
            self.frozen = nn.Linear(4, 4)
            self.head = nn.Linear(3, 7, bias=False)
            self.head.weight = self.embed.weight

    model = Net()
    model.frozen.requires_grad_(False)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    biases = [p for p in params.values() if p.ndim == 1]
    weights = [p for p in params.values() if p.ndim > 1]
    optimizer = torch.optim.RMSprop([{"params": biases, "weight_decay": 0.0}, {"params": weights}], weight_decay=0.1)
    for i, (name, p) in enumerate(params.items(), 1):
        p.grad = None if name == "layers.3.weight" else torch.full_like(p, float(i))
    optimizer.step()
    path = saved(tmp_path / "in.pt", model.state_dict(), optimizer.state_dict())
    made = prepare(path).checkpoint
    found = {name: round(float(np.ravel(slots["square_avg"])[0] / 0.01) ** 0.5) for name, slots in made.slots.items()}
    assert found == {name: i for i, name in enumerate(params, 1) if name != "layers.3.weight"}


@pytest.mark.parametrize("kind", [str, int])
def test_numbers_of_one_group_follow_the_model(tmp_path, kind):
    """The numbers may be strings, as torch's dcp_to_torch_save writes them."""
    model = network()
    kept = copy.deepcopy(stepped(model, model.parameters()).state_dict())
    kept["state"] = {kind(key): entry for key, entry in kept["state"].items()}
    made = prepare(saved(tmp_path / "in.pt", model.state_dict(), kept)).checkpoint
    assert [layer for layer, _ in whose(made).values()] == list(range(1, LAYERS + 1))
    assert list(made.slots) == list(model.state_dict())


def test_state_that_belongs_to_no_parameter_is_refused(tmp_path):
    """`convert` refuses the same as load_state_dict does."""
    model = network()
    kept = stepped(model, model.parameters()).state_dict()
    kept["state"][99] = kept["state"].pop(3)
    with pytest.raises(Unreadable, match=r"in.pt holds state under the key 99, which belongs to no parameter"):
        prepare(saved(tmp_path / "in.pt", model.state_dict(), kept))


def test_state_without_any_names_stays_numbered_and_complete(tmp_path):
    """No names are invented, and a parameter that never stepped keeps its place, since torch loads by order."""
    model = network()
    optimizer = torch.optim.RMSprop(model.parameters())
    for i, p in enumerate(model.parameters(), 1):
        p.grad = None if i == 3 else torch.full_like(p, float(i))
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "in.pt")
    write(prepare(tmp_path / "in.pt"), tmp_path / "out.pt")
    whole = torch.load(tmp_path / "out.pt", weights_only=True)
    for twin in (network(), network()):
        again = RMSprop(twin.named_parameters())
        again.load_state_dict(whole["optimizer"])
        assert [p for p in twin.parameters() if p not in again.state] == [twin[2].weight]
        assert again.state[twin[3].weight]["square_avg"][0, 0].item() == pytest.approx(0.16)


def flax_like(order):
    """Make a checkpoint whose names are not the model's, in this order."""
    slots = {f"Dense_{i}/kernel": {"nu": np.full((3, 3), float(i))} for i in order}
    hyper = {"learning_rate": 0.1, "decay": 0.9, "eps": 1e-8}
    return Checkpoint(find_owner("optax"), {name: np.ones((3, 3)) for name in slots}, slots, 1, hyper)


def test_a_file_that_sorts_names_as_text_does_not_decide_by_order():
    """Flax sorts Dense_10 before Dense_2, which is refused if shapes fit both orders and the user does not decide."""
    model = {f"layers.{i}.weight": (3, 3) for i in range(LAYERS)}
    as_text = sorted(range(LAYERS), key=str)
    with pytest.raises(ValueError, match=r"sorts its names as text \(Dense_10/kernel before Dense_2/kernel\)"):
        plan(flax_like(as_text), model=model)
    assert [m.target for m in plan(flax_like(as_text), model=model, match="order")] == list(model)
    moves = {m.source: m.target for m in plan(flax_like(range(LAYERS)), model=model)}
    assert moves == {f"Dense_{i}/kernel": f"layers.{i}.weight" for i in range(LAYERS)}


def test_names_that_match_are_matched_where_others_do_not():
    """One changed name does not change the pairing of the others."""
    names = [f"{i}.weight" for i in range(5)]
    slots = {name: {"square_avg": np.full((3, 3), 1.0)} for name in [*reversed(names[1:]), "old.weight"]}
    held = Checkpoint(find_owner("torch"), {}, slots, 1, {"lr": 0.1, "alpha": 0.9, "eps": 1e-8})
    moves = {m.source: m.target for m in plan(held, model=dict.fromkeys(names, (3, 3)))}
    assert moves == {**{name: name for name in names[1:]}, "old.weight": "0.weight"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a1", "a10", "a2"], True),
        (["a1", "a2", "a10"], False),
        (["a/b10/c", "a/b9/c", "b"], True),
        (["b", "a"], False),
        (["1" * 5000, "2" * 4000], True),
        ([], False),
    ],
)
def test_names_sorted_as_text_are_recognized(names, said):
    assert sorted_as_text(names) is said


def test_ways_are_counted_as_by_trying_all():
    """The count equals that of trying every choice of disjoint places for the groups."""
    import itertools
    import random

    draw = random.Random(0)
    for _ in range(300):
        model = {f"p{i}": (draw.choice((1, 2)),) for i in range(draw.randint(1, 6))}
        keys = draw.sample(range(10), draw.randint(1, len(model)))
        cut = draw.randint(1, len(keys))
        groups = [keys[:cut], keys[cut:]] if cut < len(keys) else [keys]
        shapes = {key: (draw.choice((1, 2)),) for key in keys if draw.random() < 0.8}
        fixed = {keys[0]: draw.choice(list(model))} if draw.random() < 0.3 else {}
        right = []
        for places in itertools.permutations(model, len(keys)):
            found = dict(zip(keys, places, strict=True))
            ordered = all(
                list(model).index(found[a]) < list(model).index(found[b])
                for group in groups
                for a, b in itertools.pairwise(group)
            )
            fits = all(shapes.get(key, model[name]) == model[name] for key, name in found.items())
            if ordered and fits and all(found[key] == name for key, name in fixed.items()):
                right.append(found)
        got = ways(groups, shapes, model, fixed)
        assert len(got) == min(len(right), 2)
        assert all(found in right for found in got)
        assert len(got) < 2 or got[0] != got[1]


def test_many_groups_of_one_shape_end_soon():
    """60 groups of two parameters each are ambiguous, which the search finds within its bound."""
    model = {f"{i}": (3, 3) for i in range(120)}
    assert len(ways([[2 * i, 2 * i + 1] for i in range(60)], dict.fromkeys(range(120), (3, 3)), model)) == 2


def test_the_command_takes_the_decision(tmp_path):
    """--match takes order and number; any other value is refused."""
    model = network()
    path = saved(tmp_path / "in.pt", model.state_dict(), stepped(model, head_first(model)).state_dict())

    def call(*words):
        return CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out.pt"), "--force", *words])

    assert "add --match order" in " ".join(call().output.replace("│", " ").split())
    assert call("--match", "order", "--report", str(tmp_path / "r.json")).exit_code == 0
    assert any("--match order" in sentence for sentence in json.loads((tmp_path / "r.json").read_text())["assumed"])
    assert call("--match", "number").exit_code == 0
    assert call("--match", "name").exit_code == 2
