"""Pairing saved state with parameters: names as names, numbers where there is one way, else a refusal.

Every layer has one shape, so that nothing but the pairing decides; the value of `square_avg` tells whose it is.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from rmsprop import RMSprop

LAYERS = 12


def network():
    """Layers of one shape, whose numbers do not sort as text."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(LAYERS)))


def built(model, head=6, named=True, turned=False, cls=RMSprop):
    """An optimizer with the last layers in a group of their own, which comes first unless turned."""
    params = list(model.named_parameters()) if named else list(model.parameters())
    groups = [{"params": params[head:], "lr": 0.5}, {"params": params[:head], "lr": 0.25}]
    return cls(groups[::-1] if turned else groups)


def run(optimizer, model):
    """One step, whose gradient is the layer's number."""
    for i, p in enumerate(model.parameters(), 1):
        p.grad = torch.full_like(p, float(i))
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def whose(optimizer, model):
    """By parameter of the model, the layer whose state it has, and its learning rate."""
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return [
        (round((optimizer.state[p]["square_avg"][0, 0].item() / 0.01) ** 0.5), rates[p]) for p in model.parameters()
    ]


def right(head=6):
    """What `whose` is where every parameter has its own state."""
    return [(i, 0.25 if i <= head else 0.5) for i in range(1, LAYERS + 1)]


def distributed(**how):
    """The state dict keyed by names of a run that had none, as torch's distributed checkpoints take it."""
    model = network()
    return copy.deepcopy(get_optimizer_state_dict(model, run(built(model, named=False, **how), model)))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_keys_that_are_names_are_matched_as_names(turned, wrapper):
    """In any order and grouping, also where a wrapper of the model adds to the names."""
    model = network()
    named = [(f"{wrapper}{name}", p) for name, p in model.named_parameters()]
    groups = [{"params": named[6:], "lr": 1.0}, {"params": named[:6], "lr": 1.0}]
    optimizer = RMSprop(groups[::-1] if turned else groups)
    optimizer.load_state_dict(distributed(), hparams="load")
    assert whose(optimizer, model) == right()
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in groups[-1 if turned else 0]["params"]]


def test_names_of_another_model_are_not_matched_by_order():
    """What one side lacks is listed, though sizes and shapes fit."""
    model = network()
    optimizer = RMSprop([(f"body.{name}", p) for name, p in model.named_parameters()])
    kept = distributed()
    kept["param_groups"] = [{**kept["param_groups"][0], "params": sorted(kept["state"])}]
    with pytest.raises(ValueError, match=r"missing from it \(12\).*\n.*unexpected in it \(12\)"):
        optimizer.load_state_dict(kept)
    assert not optimizer.state
    optimizer.load_state_dict(kept, rename={f"{i}.": f"body.{i}." for i in range(LAYERS)})
    assert [layer for layer, _ in whose(optimizer, model)] == list(range(1, LAYERS + 1))


@pytest.mark.parametrize("turned", [False, True])
def test_names_on_one_side_are_refused_where_the_order_is_not_theirs_alone(turned):
    """Parameters of one shape without names: refused and nothing changed, unless the user decides for the order."""
    model = network()
    optimizer = built(model, named=False, turned=turned)
    with pytest.raises(
        ValueError, match=r"'6.weight', '7.weight', ...\), but this optimizer has no names.*match='order'"
    ):
        optimizer.load_state_dict(distributed())
    assert not optimizer.state
    assert optimizer.load_state_dict(distributed(turned=turned), match="order").matched == "order"
    assert whose(optimizer, model) == right()


def test_shapes_that_leave_one_way_need_no_names():
    """Every parameter of another shape: the order is proved, and taken."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    source = RMSprop(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    source.step()
    kept = copy.deepcopy(get_optimizer_state_dict(model, source))
    optimizer = RMSprop(model.parameters())
    assert optimizer.load_state_dict(kept).matched == "order"
    assert all(torch.equal(optimizer.state[p]["square_avg"], source.state[p]["square_avg"]) for p in source.state)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("here", [False, True], ids=["as-it-was", "turned"])
@pytest.mark.parametrize("names", ["none", "local"])
def test_torchs_own_setter_needs_no_decision(full, here, names):
    """set_optimizer_state_dict lists the names in this optimizer's order, whatever it calls its parameters."""
    model = network()
    optimizer = built(model, named=False, turned=here)
    if names == "local":
        optimizer = RMSprop(
            [
                {**g, "params": [(f"p{i}", p) for i, p in enumerate(g["params"])]}
                for g in [{"params": g["params"], "lr": g["lr"]} for g in optimizer.param_groups]
            ]
        )
    options = StateDictOptions(full_state_dict=full)
    set_optimizer_state_dict(model, optimizer, distributed(), options=options)
    assert whose(optimizer, model) == right()


@pytest.mark.parametrize("cls", [torch.optim.RMSprop, RMSprop])
@pytest.mark.parametrize("there", [False, True], ids=["numbers", "named"])
@pytest.mark.parametrize("here", [False, True], ids=["no-names", "names"])
def test_a_numbered_state_dict_goes_into_the_same_optimizer_by_order(cls, there, here):
    """As in torch, with names on neither side, on one or on both."""
    model, twin = network(), network()
    kept = run(built(model, named=there, cls=cls), model).state_dict()
    optimizer = built(twin, named=here)
    assert optimizer.load_state_dict(kept).matched == ("name" if here and there else "order")
    assert whose(optimizer, twin) == right()


def test_an_optimizer_without_names_takes_over_those_of_the_state_dict():
    """As torch does, and so the next load finds every parameter by its name."""
    model, twin, last = network(), network(), network()
    kept = run(built(model), model).state_dict()
    optimizer = built(twin, named=False)
    optimizer.load_state_dict(kept)
    assert [g["param_names"] for g in optimizer.param_groups] == [g["param_names"] for g in kept["param_groups"]]
    again = built(last, turned=True)
    assert again.load_state_dict(optimizer.state_dict()).matched == "name"
    assert whose(again, last) == right()
    kept["param_groups"][0]["param_names"][0] = 7
    with pytest.raises(ValueError, match="takes one string for each"):
        built(twin, named=False).load_state_dict(kept, match="order")


@pytest.mark.parametrize("listed", [int, str])
@pytest.mark.parametrize("kept_as", [int, str])
@pytest.mark.parametrize("named", [False, True])
def test_numbers_that_became_strings_are_numbers(listed, kept_as, named):
    """torch's dcp_to_torch_save turns the state's numbers into strings; JSON and others turn both, or the list."""
    model, twin = network(), network()
    kept = run(built(model, named=False), model).state_dict()
    kept["state"] = {kept_as(key): entry for key, entry in kept["state"].items()}
    for group in kept["param_groups"]:
        group["params"] = [listed(key) for key in group["params"]]
    optimizer = built(twin, named=named)
    report = optimizer.load_state_dict(kept)
    assert (len(report.loaded), report.stateless) == (LAYERS, ())
    assert whose(optimizer, twin) == right()
    assert all(isinstance(key, torch.Tensor) for key in optimizer.state)


def test_what_torch_makes_of_a_distributed_checkpoint_is_loaded(tmp_path):
    """The file of dcp_to_torch_save, of numbered state and of state by name."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    model, twin = network(), network()
    optimizer = run(built(model, named=False), model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no process group is there
        whole = {"numbers": optimizer.state_dict(), "names": get_optimizer_state_dict(model, optimizer)}
        dcp.save(whole, checkpoint_id=tmp_path / "dcp", no_dist=True)
        dcp_to_torch_save(tmp_path / "dcp", tmp_path / "one.pt")
    found = torch.load(tmp_path / "one.pt", weights_only=False)
    assert all(isinstance(key, str) for key in found["numbers"]["state"])
    for part in ("numbers", "names"):
        other = built(twin)
        assert len(other.load_state_dict(found[part]).loaded) == LAYERS
        assert whose(other, twin) == right()


def test_digits_that_are_names_are_names():
    """The parameters of a ParameterList are called 0, 1, 2."""
    model = nn.ParameterList(nn.Parameter(torch.ones(3, 3)) for _ in range(LAYERS))
    kept = copy.deepcopy(get_optimizer_state_dict(model, run(RMSprop(model.parameters()), model)))
    turned = RMSprop(reversed(list(model.named_parameters())))
    assert turned.load_state_dict(kept).matched == "name"
    assert [layer for layer, _ in whose(turned, model)] == list(range(1, LAYERS + 1))


@pytest.mark.parametrize("kind", [int, str])
def test_numbers_that_were_sorted_as_text_are_refused(kind):
    """10 before 2 is not the order that an optimizer gave them."""
    model = network()
    kept = run(RMSprop(model.parameters()), model).state_dict()
    kept["param_groups"][0]["params"] = [kind(key) for key in sorted(map(str, range(LAYERS)))]
    optimizer = RMSprop(network().parameters())
    with pytest.raises(ValueError, match=r"group 0 lists its parameters sorted as text \(0, 1, 10, 11, ...\)"):
        optimizer.load_state_dict(kept)
    assert not optimizer.state
    kept["param_groups"][0]["params"].sort(key=int)
    optimizer.load_state_dict(kept)


@pytest.mark.parametrize("key", [12, "12", "13.weight", "head"])
@pytest.mark.parametrize("named", [False, True])
def test_state_that_belongs_to_no_parameter_is_refused(key, named):
    """One error names its key, and nothing has changed; strict=False leaves it out, and the report says so."""
    model = network()
    kept = run(built(model, named=named), model).state_dict()
    kept["state"][key] = kept["state"].pop(3)
    optimizer = built(network(), named=named)
    with pytest.raises(ValueError, match=rf"of no parameter that its groups list \(1\): state under the key {key!r}"):
        optimizer.load_state_dict(kept)
    assert not optimizer.state
    report = optimizer.load_state_dict(kept, strict=False)
    assert report.unexpected == (f"state under the key {key!r}",)
    assert (len(report.loaded), len(report.stateless), len(optimizer.state)) == (LAYERS - 1, 1, LAYERS - 1)


def test_a_parameter_that_is_listed_or_kept_twice_is_refused():
    """Its state would go to two, or one of two would be lost."""
    model = network()
    kept = run(RMSprop(model.parameters()), model).state_dict()
    twice = copy.deepcopy(kept)
    twice["param_groups"][0]["params"][1] = 0
    with pytest.raises(ValueError, match="lists a parameter twice"):
        RMSprop(network().parameters()).load_state_dict(twice)
    kept["state"]["3"] = kept["state"][4]
    with pytest.raises(ValueError, match="keeps the state of parameter 3 twice, as 3 and '3'"):
        RMSprop(network().parameters()).load_state_dict(kept)


@pytest.mark.parametrize(
    ("options", "named", "says"),
    [
        ({"match": "shape"}, True, "Invalid match: 'shape'; it takes 'name', 'order' or None"),
        ({"match": "order", "rename": {"a": "b"}}, True, "match='order' does not; leave one out"),
        ({"match": "name"}, False, "match='name' needs names on both sides, and this optimizer has none"),
    ],
)
def test_decisions_that_do_not_work_are_refused(options, named, says):
    """In one sentence, before anything is changed."""
    optimizer = built(network(), named=named)
    with pytest.raises(ValueError, match=says):
        optimizer.load_state_dict(distributed(), **options)


def test_the_user_may_decide_for_the_order_against_names():
    """match="order" is torch's meaning: state by position; the names here stay."""
    model = network()
    kept = run(RMSprop(model.named_parameters()), model).state_dict()
    turned = list(reversed(list(network().named_parameters())))
    optimizer = RMSprop(turned)
    assert optimizer.load_state_dict(kept, match="order").matched == "order"
    assert round(float(optimizer.state[turned[0][1]]["square_avg"][0, 0]) / 0.01) == 1
    assert optimizer.param_groups[0]["param_names"][0] == "11.weight"


@pytest.mark.parametrize(("here", "there"), [("keras3", "torch"), ("torch", "keras3"), ("tensorflow1", "textbook")])
def test_a_run_that_becomes_another_dialect_is_warned(here, there):
    """Also after it has stepped, when numbers that schedules move pass in silence."""
    model = network()
    rate = {"lr": 0.01}
    kept = run(RMSprop(model.named_parameters(), dialect=there, **rate), model).state_dict()
    twin = network()
    optimizer = run(RMSprop(twin.named_parameters(), dialect=here, **rate), twin)
    with pytest.warns(UserWarning, match=f"replaces .*dialect='{here}' by '{there}'"):
        optimizer.load_state_dict(kept)
    assert optimizer.param_groups[0]["dialect"] == there
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(kept)  # it is that dialect now, and goes back to its checkpoint
