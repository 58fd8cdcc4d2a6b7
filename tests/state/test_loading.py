"""Loading a state dict: by name or by order, whole or in part, in place, and all or nothing."""

import copy
import math

import pytest
import torch
from torch import nn

from rmsprop import RMSprop

SHAPES = {"a": (2,), "b": (3,), "c": (2, 2)}


def params(order="abc", dtype=torch.float32):
    """Named parameters, whose shapes tell them apart."""
    return [(name, nn.Parameter(torch.ones(SHAPES[name], dtype=dtype))) for name in order]


def step(optimizer):
    """One step, with a gradient that differs from parameter to parameter."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, float(p.numel()))
    optimizer.step()


def saved(groups=("abc",), **settings):
    """The state dict of a run over named parameters in these groups, after two steps."""
    optimizer = RMSprop([{"params": params(order)} for order in groups], **settings)
    step(optimizer)
    step(optimizer)
    return copy.deepcopy(optimizer.state_dict())


def averages(optimizer):
    """By name, what the first element of square_avg is."""
    return {
        name: optimizer.state[p]["square_avg"].flatten()[0].item()
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if optimizer.state.get(p)
    }


@pytest.fixture
def expected():
    """The averages of the saved run, by name."""
    optimizer = RMSprop(params())
    optimizer.load_state_dict(saved())
    found = averages(optimizer)
    assert len(set(found.values())) == 3
    return found


@pytest.mark.parametrize("there", [("abc",), ("cab",), ("c", "ab"), ("b", "c", "a")], ids="|".join)
@pytest.mark.parametrize("here", [("abc",), ("bca",), ("bc", "a"), ("a", "b", "c")], ids="|".join)
def test_names_decide_in_every_order_and_grouping(there, here, expected):
    """State follows the name; the list of names stays as it is here; settings come along."""
    optimizer = RMSprop([{"params": params(order)} for order in here])
    report = optimizer.load_state_dict(saved(there, lr=0.5))
    assert averages(optimizer) == expected
    assert [g["param_names"] for g in optimizer.param_groups] == [list(order) for order in here]
    assert all(group["lr"] == 0.5 for group in optimizer.param_groups)
    assert (report.matched, sorted(report.loaded), report.missing) == ("name", ["a", "b", "c"], ())
    step(optimizer)


def test_settings_follow_the_parameters_and_may_not_disagree():
    """Groups in another order keep their own lr; a group made of two with different ones is refused, or kept."""
    run = RMSprop([{"params": params("ab"), "lr": 0.5, "tag": "x"}, {"params": params("c"), "lr": 0.25, "tag": "y"}])
    step(run)
    kept = run.state_dict()
    turned = RMSprop([{"params": params("c")}, {"params": params("ba")}])
    turned.load_state_dict(kept)
    assert [(g["lr"], g["tag"]) for g in turned.param_groups] == [(0.25, "y"), (0.5, "x")]
    merged = RMSprop(params())
    with pytest.raises(
        ValueError, match=r"group 0 here holds parameters of groups 0, 1 .* settings differ \(lr: 0.5, 0.25"
    ):
        merged.load_state_dict(kept)
    assert not merged.state
    merged.load_state_dict(kept, hparams="keep")
    assert merged.param_groups[0]["lr"] == 0.01
    assert len(merged.state) == 3
    kept["param_groups"][1]["lr"] = 0.5
    merged.load_state_dict(kept)
    assert merged.param_groups[0]["lr"] == 0.5
    assert "tag" not in merged.param_groups[0]


def test_a_strict_load_lists_everything_that_does_not_fit():
    """Missing, unexpected and reshaped entries come in one error, with what to do."""
    kept = saved(("ab",))
    kept["param_groups"][0]["param_names"] = ["a", "z"]
    kept["state"][0]["square_avg"] = torch.ones(5)
    optimizer = RMSprop(params())
    with pytest.raises(ValueError, match="does not fit") as error:
        optimizer.load_state_dict(kept)
    assert str(error.value).splitlines() == [
        "loaded state dict does not fit this optimizer:",
        "  missing from it (2): 'b'; 'c'",
        "  unexpected in it (1): 'z'",
        "  of another shape or kind (1): square_avg of parameter 'a' has shape (5,), the parameter has shape (2,)",
        "give rename={name there: name here} if names changed, or strict=False to load what fits and leave the "
        "rest as it is",
    ]
    assert not optimizer.state


def test_a_partial_load_reports_what_it_left():
    """strict=False loads what fits; the rest keeps the state that it has."""
    kept = saved()
    kept["param_groups"][0]["param_names"] = ["a", "z", "c"]
    kept["state"][2]["square_avg"] = torch.ones(5)
    optimizer = RMSprop(params())
    step(optimizer)
    before = averages(optimizer)
    tensors = [optimizer.state[p]["square_avg"] for p in optimizer.param_groups[0]["params"]]
    held = optimizer.state_dict()
    report = optimizer.load_state_dict(kept, strict=False)
    after = averages(optimizer)
    assert after["a"] != before["a"]
    assert (after["b"], after["c"]) == (before["b"], before["c"])
    now = [optimizer.state[p]["square_avg"] for p in optimizer.param_groups[0]["params"]]
    assert [a is b for a, b in zip(tensors, now, strict=True)] == [False, True, True]
    assert held["state"][0]["square_avg"][0] == before["a"]
    assert (report.loaded, report.missing, report.unexpected) == (("a",), ("b",), ("z",))
    assert str(report) == (
        "state of 1 parameters loaded, matched by name\nmissing (1): b\nunexpected (1): z\n"
        "reshaped (1): square_avg of parameter 'c' has shape (5,), the parameter has shape (2, 2)"
    )
    step(optimizer)


@pytest.mark.parametrize(
    "rename",
    [{"module.": ""}, {"module.a": "a", "module.": ""}, {f"module.{name}": name for name in SHAPES}],
    ids=["prefix", "both", "whole"],
)
def test_renamed_parameters_are_found(rename, expected):
    """A rename map takes whole names, and prefixes that end with a dot; the error proposes it."""
    kept = saved()
    kept["param_groups"][0]["param_names"] = ["module.a", "module.b", "module.c"]
    optimizer = RMSprop(params("cba"))
    with pytest.raises(ValueError, match=r"give rename={'module.': ''} if names changed"):
        optimizer.load_state_dict(kept)
    optimizer.load_state_dict(kept, rename=rename)
    assert averages(optimizer) == expected


def test_the_other_way_round_a_rename_is_proposed_too():
    """A checkpoint without the prefix, into a wrapped model."""
    wrapped = RMSprop([(f"module.{name}", p) for name, p in params()])
    with pytest.raises(ValueError, match=r"give rename={'a': 'module.a', 'b': 'module.b', 'c': 'module.c'} if"):
        wrapped.load_state_dict(saved())
    wrapped.load_state_dict(saved(), rename={name: f"module.{name}" for name in SHAPES})


@pytest.mark.parametrize(
    ("edit", "options", "says"),
    [
        ({}, {"rename": {"x": "a"}}, "rename names 'x', which the loaded state dict lacks; it has 'a', 'b', 'c'"),
        ({}, {"rename": {"a": "b"}}, "the loaded state dict has more than one parameter named 'b'"),
        ({"param_names": ["a", "b"]}, {}, r"group 0 has 3 parameters and the param_names \['a', 'b'\]; .*takes one"),
        ({"param_names": ["a", "b", 3]}, {}, "takes one string for each"),
        ({"param_names": 3}, {}, "the param_names 3; param_names takes one string for each parameter"),
        ({"param_names": "abc"}, {}, "takes one string for each"),
        ({"param_names": ["a", "a", "c"]}, {}, "more than one parameter named 'a'"),
        ({}, {"hparams": "ask"}, "Invalid hparams: 'ask'; it takes 'load'"),
    ],
    ids=str,
)
def test_names_that_say_two_things_are_refused(edit, options, says):
    """Before anything is changed."""
    kept = saved()
    kept["param_groups"][0] |= edit
    optimizer = RMSprop(params())
    with pytest.raises(ValueError, match=says):
        optimizer.load_state_dict(kept, **options)
    assert not optimizer.state


def test_a_rename_needs_names():
    """It would be ignored otherwise."""
    kept = saved()
    unnamed = RMSprop([p for _, p in params()])
    with pytest.raises(ValueError, match=r"this optimizer has none: build it with model.named_parameters"):
        unnamed.load_state_dict(kept, rename={"a": "b"})
    del kept["param_groups"][0]["param_names"]
    with pytest.raises(ValueError, match="the loaded state dict has none"):
        RMSprop(params()).load_state_dict(kept, rename={"a": "b"})


def test_without_names_on_both_sides_the_order_decides_and_shapes_are_checked():
    """As in torch, but no state goes to a parameter of another shape, and names here stay."""
    kept = saved()
    unnamed = RMSprop([p for _, p in params()])
    assert unnamed.load_state_dict(kept).matched == "order"
    assert unnamed.param_groups[0]["param_names"] == ["a", "b", "c"]  # taken over, as torch does
    del kept["param_groups"][0]["param_names"]
    named = RMSprop(params())
    assert named.load_state_dict(kept).matched == "order"
    assert named.param_groups[0]["param_names"] == ["a", "b", "c"]
    turned = RMSprop(params("bac"))
    with pytest.raises(
        ValueError, match=r"(?s)of another shape or kind \(2\).*parameter 0 has shape \(2,\).*parameter 1 has shape"
    ):
        turned.load_state_dict(kept)
    assert turned.load_state_dict(kept, strict=False).loaded == ("2",)
    with pytest.raises(ValueError, match=r"group 0 has 3 parameters there and 2 here; names on both sides"):
        RMSprop(params("ab")).load_state_dict(kept, strict=False)


def test_names_in_the_place_of_numbers_are_names():
    """torch's distributed checkpoints key state by name."""
    kept = saved()
    names = kept["param_groups"][0]["param_names"]
    kept["state"] = {names[key]: entry for key, entry in kept["state"].items()}
    kept["param_groups"][0]["params"] = names
    optimizer = RMSprop(params("cab"))
    assert optimizer.load_state_dict(kept).matched == "name"
    assert averages(optimizer)["a"] == kept["state"]["a"]["square_avg"][0]
    strange = RMSprop([(f"module.{name}", p) for name, p in params()])
    assert strange.load_state_dict(kept).matched == "order"


SETTINGS = dict(momentum=0.9, centered=True, lr_in_buffer=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_tensors_that_fit_stay_the_same_tensors(dtype):
    """With capturable=True, CUDA graphs and pointers that someone keeps see the loaded numbers."""
    run = RMSprop(params(dtype=dtype), lr=torch.tensor(0.5), capturable=True, **SETTINGS)
    step(run)
    kept = copy.deepcopy(run.state_dict())
    step(run)
    lr = run.param_groups[0]["lr"]
    tensors = [[(name, value, value.data_ptr()) for name, value in entry.items()] for entry in run.state.values()]
    lr.fill_(0.25)
    run.load_state_dict(kept)
    assert run.param_groups[0]["lr"] is lr
    assert lr == 0.5
    for entry, before, there in zip(run.state.values(), tensors, kept["state"].values(), strict=True):
        for name, tensor, address in before:
            assert entry[name] is tensor
            assert tensor.data_ptr() == address
            assert torch.equal(tensor, there[name])
    twin = RMSprop(params(dtype=dtype), lr=torch.tensor(0.5), capturable=True, **SETTINGS)
    twin.load_state_dict(kept)
    for own in (run, twin):
        for p in own.param_groups[0]["params"]:
            p.data.fill_(1)
        step(own)
    assert all(map(torch.equal, run.param_groups[0]["params"], twin.param_groups[0]["params"]))


def test_shared_memory_is_written_where_it_is():
    """Another process that holds the state sees what was loaded."""
    run = RMSprop(params())
    step(run)
    shared = [entry["square_avg"].share_memory_() for entry in run.state.values()]
    kept = saved()
    run.load_state_dict(kept)
    assert all(
        torch.equal(own, entry["square_avg"]) for own, entry in zip(shared, kept["state"].values(), strict=True)
    )
    assert all(own.is_shared() for own in shared)


def test_its_own_state_under_other_names_is_not_overwritten_while_it_is_read():
    """The dict holds the optimizer's own tensors; a swap of two of them swaps their numbers."""
    twins = [(name, nn.Parameter(torch.ones(2))) for name in "ab"]
    optimizer = RMSprop(twins)
    for value, (_, p) in enumerate(twins, 1):
        p.grad = torch.full((2,), float(value))
    optimizer.step()
    before = averages(optimizer)
    optimizer.load_state_dict(optimizer.state_dict(), rename={"a": "b", "b": "a"})
    assert averages(optimizer) == {"a": before["b"], "b": before["a"]}
    before = averages(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert averages(optimizer) == before


def test_a_tensor_that_cannot_be_written_is_replaced():
    """One with a graph behind it, of another shape, or whose elements share memory."""
    for strange in (
        torch.ones(2, requires_grad=True) * 2,
        torch.ones(7),
        torch.ones(1).expand(2),
        torch.ones(2, dtype=torch.float64),
    ):
        optimizer = RMSprop(params("a"))
        step(optimizer)
        (p,) = optimizer.param_groups[0]["params"]
        optimizer.state[p]["square_avg"] = strange
        optimizer.load_state_dict(saved(("a",)))
        own = optimizer.state[p]["square_avg"]
        assert own is not strange
        assert not own.requires_grad
        step(optimizer)


def test_groups_that_were_given_one_tensor_lr_load_their_own():
    """Each group has a tensor of its own, which stays the same tensor, and takes its own loaded number."""
    lr = torch.tensor(0.1)
    optimizer = RMSprop([{"params": params("a")}, {"params": params("b")}], lr=lr)
    tensors = [group["lr"] for group in optimizer.param_groups]
    kept = optimizer.state_dict()
    kept["param_groups"][0]["lr"], kept["param_groups"][1]["lr"] = torch.tensor(0.3), torch.tensor(0.4)
    optimizer.load_state_dict(kept, hparams="load")
    assert [round(g["lr"].item(), 6) for g in optimizer.param_groups] == [0.3, 0.4]
    assert all(g["lr"] is own for g, own in zip(optimizer.param_groups, tensors, strict=True))


def test_new_state_has_its_parameters_layout():
    """A file holds contiguous tensors; the compiled kernel wants those of one parameter in one layout."""
    weight = nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last))
    run = RMSprop([weight])
    step(run)
    kept = copy.deepcopy(run.state_dict())
    kept["state"][0]["square_avg"] = kept["state"][0]["square_avg"].contiguous()
    fresh = RMSprop([nn.Parameter(weight.detach().clone())])
    fresh.load_state_dict(kept)
    (entry,) = fresh.state.values()
    assert entry["square_avg"].stride() == weight.stride()
    assert torch.equal(entry["square_avg"], kept["state"][0]["square_avg"])


def test_what_was_asked_for_is_not_replaced_without_a_word():
    """One sentence names every such setting; a choice, a schedule, a default, and a run that goes back are silent."""
    kept = saved(lr=0.5, eps_mode="inside")
    with pytest.warns(UserWarning, match=r"replaces lr=0.1 by 0.5, eps_mode='floor' by 'inside', as torch") as said:
        RMSprop(params(), lr=0.1, eps_mode="floor").load_state_dict(kept)
    assert len(said) == 1
    assert said[0].filename == __file__
    RMSprop(params(), lr=0.1, eps_mode="floor").load_state_dict(kept, hparams="load")
    RMSprop(params(), lr=0.5).load_state_dict(kept)
    RMSprop(params()).load_state_dict(kept)
    RMSprop(params(), lr=torch.tensor(0.5)).load_state_dict(kept)
    running = RMSprop(params(), lr=0.1, eps_mode="inside")
    step(running)
    running.load_state_dict(kept)
    RMSprop(params(), lr=0.1).load_state_dict(saved(lr=0.5))  # a learning rate alone is what every schedule moves
    groups = RMSprop([{"params": params("ab"), "alpha": 0.5}, {"params": params("c")}])
    with pytest.warns(UserWarning, match="replaces alpha=0.5 by 0.9 in group 0, as torch does"):
        groups.load_state_dict(saved(("ab", "c"), alpha=0.9))


@pytest.mark.parametrize(
    ("schedule", "attached"),
    [
        (lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), True),
        (lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), False),
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=10), True),
    ],
    ids=["exponential", "not-yet-attached", "onecycle"],
)
def test_what_a_schedule_moved_is_no_surprise(schedule, attached):
    """A resumed run is built with the lr that the schedule began at."""
    run, again = (RMSprop(params(), lr=0.1, momentum=0.9) for _ in range(2))
    scheduler = schedule(run)
    for _ in range(3):
        step(run)
        scheduler.step()
    if attached:
        schedule(again)
    assert again.load_state_dict(copy.deepcopy(run.state_dict())).differences


def test_keep_keeps_a_whole_group_but_no_rule_of_another_state():
    """Numbers and execution settings stay, and so do notes; a switch that differs is refused in a sentence."""
    kept = saved(lr=0.5, momentum=0.9, foreach=True, nesterov=True)
    optimizer = RMSprop(params(), lr=0.1, momentum=0.5, nesterov=True, square_avg_init=1.0)
    optimizer.param_groups[0]["tag"] = "mine"
    before = dict(optimizer.param_groups[0])
    report = optimizer.load_state_dict(kept, hparams="keep")
    assert dict(optimizer.param_groups[0]) == before
    assert {d.name: (d.here, d.saved) for d in report.differences} == {
        "lr": (0.1, 0.5),
        "momentum": (0.5, 0.9),
        "foreach": (None, True),
        "square_avg_init": (1.0, 0.0),
    }
    other = RMSprop(params(), lr_in_buffer=True, momentum=0.5)
    with pytest.raises(
        ValueError,
        match=r"hparams='keep' keeps nesterov=False, lr_in_buffer=True of group 0, but the loaded state was made "
        r"under nesterov=True, lr_in_buffer=False; build the optimizer with nesterov=True, .* `rmsprop convert`",
    ):
        other.load_state_dict(kept, hparams="keep")
    assert not other.state


def test_a_group_without_parameters_is_matched_by_its_place():
    """Stages of a pipeline may hold none; their settings come back all the same."""
    run = RMSprop([{"params": params("a")}, {"params": [], "param_names": [], "lr": 0.5}])
    step(run)
    fresh = RMSprop([{"params": params("a")}, {"params": [], "param_names": []}])
    fresh.load_state_dict(run.state_dict())
    assert fresh.param_groups[1]["lr"] == 0.5


def test_parameters_that_never_stepped_begin_afresh():
    """The state dict knows them and has no state: what they had here goes, as in torch."""
    kept = saved()
    del kept["state"][1]
    optimizer = RMSprop(params())
    step(optimizer)
    report = optimizer.load_state_dict(kept)
    assert report.stateless == ("b",)
    assert list(averages(optimizer)) == ["a", "c"]
    step(optimizer)


def _changed(**slots):
    kept = saved(centered=True, momentum=0.9)
    for name, value in slots.items():
        if value is None:
            del kept["state"][0][name]
        else:
            kept["state"][0][name] = value
    return kept


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (lambda: None, "not an optimizer's state dict"),
        (lambda: [1], "not an optimizer's state dict"),
        (lambda: {"optimizer": saved(), "model": {}}, "its entry 'optimizer' is one: load that"),
        (lambda: {"state": {}, "param_groups": [3]}, "not an optimizer's state dict"),
        (lambda: {"state": {}, "param_groups": [{"params": [[1]]}]}, "not an optimizer's state dict"),
        (lambda: {"state": [], "param_groups": []}, "for another framework's checkpoint, `rmsprop convert`"),
        (lambda: {**saved(), "state": {0: 7}}, "state of parameter 0 is an int"),
        (lambda: _changed(step=None), "parameter 'a' holds .* and lacks step"),
        (lambda: _changed(grad_avg=None), "parameter 'a' holds .* and lacks grad_avg"),
        (lambda: _changed(step="1"), "step of parameter 'a' is '1'; it takes one finite count >= 0"),
        (lambda: _changed(step=torch.ones(2)), "it takes one finite count >= 0"),
        (lambda: _changed(step=-1), "it takes one finite count >= 0"),
        (lambda: _changed(step=math.nan), "it takes one finite count >= 0"),
        (lambda: _changed(step=True), "it takes one finite count >= 0"),
        (
            lambda: _changed(square_avg=3.0),
            r"square_avg of parameter 'a' has a float, the parameter has shape \(2,\)",
        ),
        (lambda: _changed(square_avg=torch.ones(2, dtype=torch.int32)), "has torch.int32 of layout torch.strided"),
        (lambda: _changed(square_avg=torch.ones(2).to_sparse()), "of layout torch.sparse_coo"),
        (lambda: _changed(square_avg=torch.ones(2, device="meta")), "on meta"),
        (
            lambda: _changed(square_avg=torch.ones(2, dtype=torch.complex64)),
            "has torch.complex64, the parameter has tor",
        ),
    ],
    ids=range(19),
)
def test_state_dicts_that_are_none_change_nothing(kept, says):
    """One error; state, settings and tensors are as they were."""
    optimizer = RMSprop(params(), centered=True, momentum=0.9)
    step(optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    tensors = [value for entry in optimizer.state.values() for value in entry.values()]
    with pytest.raises(ValueError, match=says):
        optimizer.load_state_dict(kept())
    assert [value for entry in optimizer.state.values() for value in entry.values()] == tensors
    assert repr(optimizer.state_dict()) == repr(before)


def test_a_warning_that_is_an_error_changes_nothing():
    """python -W error: settings and state are as they were."""
    optimizer = RMSprop(params(), alpha=0.5)
    with pytest.raises(UserWarning, match=r"replaces alpha=0\.5"):
        optimizer.load_state_dict(saved(alpha=0.9))
    assert optimizer.param_groups[0]["alpha"] == 0.5
    assert not optimizer.state


def test_what_others_keep_in_state_comes_along():
    """Entries that are no parameter's, and slots that are not ours, are kept in their own dtype."""
    kept = saved(("a",))
    kept["state"]["note"] = {"x": 1}
    kept["state"][0]["residual"] = torch.ones(2, dtype=torch.bfloat16)
    kept["state"][0]["seed"] = torch.tensor(7)
    kept["state"][0]["words"] = ["x"]
    optimizer = RMSprop(params("a"))
    optimizer.load_state_dict(kept)
    (entry,) = (entry for key, entry in optimizer.state.items() if key != "note")
    assert optimizer.state["note"] == {"x": 1}
    assert (entry["residual"].dtype, entry["seed"].item(), entry["words"]) == (torch.bfloat16, 7, ["x"])
    residual = entry["residual"]
    kept["state"][0]["residual"].fill_(2)
    optimizer.load_state_dict(kept)
    (entry,) = (entry for key, entry in optimizer.state.items() if key != "note")
    assert (residual == 1).all()
    assert (entry["residual"] == 2).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_captured_graph_goes_on_from_what_was_loaded(backend):
    """Loading writes where the graph reads: state, step counts and lr."""
    weight = nn.Parameter(torch.ones(64, device="cuda"))
    weight.grad = torch.ones_like(weight)
    lr = torch.tensor(0.1, device="cuda")
    optimizer = RMSprop([weight], lr=lr, capturable=True, momentum=0.9, centered=True, backend=backend)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    start, kept = weight.detach().clone(), copy.deepcopy(optimizer.state_dict())
    ends = []
    for _ in range(2):
        graph.replay()
        graph.replay()
        ends.append(weight.detach().clone())
        lr.fill_(0.0)
        weight.data.copy_(start)
        optimizer.load_state_dict(kept)
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], start)


def test_the_page_about_differences_says_what_torch_makes_of_other_state():
    """Codes become numbers, unless full_precision=True widens them; an average is kept, and no longer updated."""
    p = torch.nn.Parameter(torch.ones(5))
    ours = RMSprop([p], lr=0.01, state_dtype="float8", ema=0.9)
    for _ in range(3):
        p.grad = torch.full_like(p, 0.5)
        ours.step()
    torchs = torch.optim.RMSprop([p], lr=0.01)
    torchs.load_state_dict(ours.state_dict())
    assert (torchs.state[p]["square_avg"] > 1).all()  # a code
    torchs.load_state_dict(ours.state_dict(full_precision=True))
    assert (torchs.state[p]["square_avg"] < 0.1).all()
    average = torchs.state[p]["ema"].clone()
    torchs.step()
    assert torch.equal(torchs.state[p]["ema"], average)
