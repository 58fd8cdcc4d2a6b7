"""What `fuzz/optimizer.py` found: odd parameters, settings edited in mid-run, refusals that had changed something."""

import collections

import numpy as np
import pytest
import torch
from torch import nn

from rmsprop import RMSprop, analysis, checkpoint, settings


def ones(*shape, dtype=torch.float32):
    """A parameter with a gradient of ones."""
    p = nn.Parameter(torch.ones(shape, dtype=dtype))
    p.grad = torch.ones_like(p)
    return p


@pytest.mark.parametrize(
    ("params", "error", "says"),
    [
        (None, TypeError, r"params is None, a NoneType; it takes an iterable of tensors, of \(name, tensor\) pairs"),
        (3, TypeError, "params is 3, an int; it takes an iterable"),
        ("weight", TypeError, "params is 'weight', a str; it takes"),
        ([("a",)], TypeError, r"params holds the tuple \('a',\); a named parameter is a \(name, tensor\) pair"),
        ([{"params": 3}], TypeError, "params is 3, an int; it takes an iterable"),
        ([{"lr": 0.1}], ValueError, "a parameter group has no params; it holds lr"),
        (
            [torch.ones(1).expand(3)],
            ValueError,
            r"parameter 0 has elements that share memory \(shape \(3,\), strides",
        ),
        ([torch.ones(4).as_strided((3, 2), (1, 1))], ValueError, r"strides \(1, 1\)\), .* give its clone\(\)"),
    ],
    ids=str,
)
def test_what_is_no_list_of_parameters_is_refused(params, error, says):
    """Also tensors whose elements share memory: a step would write some of them twice."""
    with pytest.raises(error, match=says):
        RMSprop(params)


def test_strides_that_only_look_as_if_they_overlapped_are_taken():
    """Offsets 0, 2, 4 and 3, 5, 7: no two elements are one place."""
    p = torch.ones(8).as_strided((3, 2), (2, 3)).requires_grad_()
    p.grad = torch.ones(3, 2)
    RMSprop([p]).step()
    assert p.detach().numpy() == pytest.approx(np.full((3, 2), 0.9), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: torch.arange(3),
            "parameter 1 of its group is torch.int64 of layout torch.strided and has a gradient",
        ),
        (lambda: torch.ones(3).to(torch.float8_e4m3fn), "is torch.float8_e4m3fn"),
        (lambda: torch.eye(3).to_sparse(), "is torch.float32 of layout torch.sparse_coo"),
    ],
    ids=["int64", "float8", "sparse"],
)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_a_parameter_that_cannot_step_is_named_before_any_has(make, says, nonfinite):
    """It may be there while it has no gradient; with one the step is refused, and no state is left behind."""
    fine, odd = ones(2), make()
    optimizer = RMSprop([fine, odd], nonfinite=nonfinite, sparse="lazy")
    optimizer.step()
    before = fine.detach().clone(), optimizer.state[fine]["step"].clone()
    odd.grad = odd.detach().clone()
    with pytest.raises(RuntimeError, match=says):
        optimizer.step()
    assert torch.equal(fine.detach(), before[0])
    assert optimizer.state[fine]["step"] == before[1]
    assert odd not in optimizer.state


def test_a_refused_step_leaves_no_state():
    """Slots that were made for it are taken back, those that were there before stay."""
    first, second = ones(2), nn.Parameter(torch.ones(3, 2))
    second.grad = torch.eye(3, 2).to_sparse()
    optimizer = RMSprop([first, second])
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert not optimizer.state
    second.grad = None
    optimizer.step()
    second.grad = torch.eye(3, 2).to_sparse()
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert set(optimizer.state[first]) == {"step", "square_avg"}
    assert second not in optimizer.state


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("alpha", 1.5, ValueError, "Invalid alpha value: 1.5; alpha takes"),
        ("alpha", float("nan"), ValueError, "Invalid alpha value: nan"),
        ("momentum", 1.0, ValueError, "Invalid momentum value: 1.0"),
        ("eps", -1e-8, ValueError, "Invalid epsilon value: -1e-08"),
        ("weight_decay", float("inf"), ValueError, "Invalid weight_decay value: inf"),
        ("lr", "0.1", TypeError, r"'0\.1' is a str; lr takes"),
        ("lr", None, TypeError, "None is a NoneType; lr takes"),
        ("lr", float("nan"), ValueError, "Invalid learning rate: nan"),
        ("lr", torch.ones(2), ValueError, "Tensor lr must be 1-element"),
        ("lr", 10**400, ValueError, "Invalid learning rate"),
        ("maximize", "yes", TypeError, "'yes' is a str; maximize is a switch"),
        ("foreach", [], TypeError, r"Invalid foreach: \[\]"),
        ("clip_value", "1", TypeError, "clip_value takes"),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [0, 3])
def test_an_edited_setting_that_does_not_work_is_refused(steps, name, value, error, says, backend):
    """With and without a plan, in the constructor's sentence; nothing moves, and set back the run goes on."""
    p = ones(3)
    optimizer = RMSprop([p], backend=backend)
    for _ in range(steps):
        optimizer.step()
    group = optimizer.param_groups[0]
    kept, group[name] = group[name], value
    before = p.detach().clone()
    for _ in range(2):
        with pytest.raises(error, match=says):
            optimizer.step()
    assert torch.equal(p.detach(), before)
    group[name] = kept
    optimizer.step()
    assert optimizer.state[p]["step"] == steps + 1


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_schedule_may_take_lr_below_0(backend):
    """By rounding, or on purpose: torch steps then too."""
    p, q = ones(3), ones(3)
    ours, theirs = RMSprop([p], backend=backend), torch.optim.RMSprop([q])
    for lr in (0.01, -1e-3, -1e-18):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_numpys_switches_are_switches_in_mid_run_too(backend):
    """np.True_ in a group, as from a table of settings."""
    p, q = ones(3), ones(3)
    for x, flag in ((p, np.True_), (q, True)):
        optimizer = RMSprop([x], backend=backend)
        optimizer.step()
        optimizer.param_groups[0]["maximize"] = flag
        optimizer.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("setting", ["lr", "eps", "weight_decay", "square_avg_init"])
@pytest.mark.parametrize("eps_mode", ["outside", "inside", "floor"])
def test_numbers_beyond_float32_are_infinite_there_on_every_backend(setting, eps_mode):
    """1e300 beside float32 parameters is what float32 makes of it; torch refuses the number in mid-step."""
    found = []
    for backend in ("cpu", "eager"):
        p = ones(3)
        optimizer = RMSprop([p], backend=backend, eps_mode=eps_mode, **{setting: 1e300})
        optimizer.step()
        found.append(p.detach())
        assert optimizer.explain()
        optimizer.lint()
    assert torch.equal(*(x.nan_to_num(nan=7.0) for x in found))


def test_each_group_has_its_own_differentiable():
    """The constructor's is a default: a group without records nothing and may hold leaves, one with it records."""
    plain, start = ones(2), torch.ones(2, requires_grad=True)
    moved = start * 1
    moved.grad = torch.ones(2)
    for default in (False, True):
        groups = [{"params": [plain], "differentiable": False}, {"params": [start], "differentiable": True}]
        optimizer = RMSprop(groups, differentiable=default)
        optimizer.param_groups[1]["params"][0] = moved
        optimizer.step()
        assert plain.is_leaf
        assert moved.requires_grad
        assert not plain.grad.requires_grad
        moved.sum().backward(retain_graph=True)
        assert start.grad is not None
        start.grad = None


def test_a_leaf_is_refused_under_differentiable_before_its_state_moves():
    """autograd lets nobody write to it in place; torch has moved the averages when it notices."""
    p = ones(2)
    optimizer = RMSprop([p], differentiable=True)
    with pytest.raises(RuntimeError, match=r"parameter 0 of the bucket in place, but it is a leaf .* give its clone"):
        optimizer.step()
    assert not optimizer.state


def test_guard_and_first_step_leave_meta_tensors_alone():
    """They hold no numbers to look at; state is made, and a step counted."""
    p = nn.Parameter(torch.ones(2, device="meta"))
    p.grad = torch.ones(2, device="meta")
    for words in (dict(nonfinite="skip"), dict(lr=0.0), dict(nonfinite="raise", lr=0.0)):
        optimizer = RMSprop([p], **words)
        optimizer.step()
        assert optimizer.state[p]["square_avg"].is_meta


def test_the_longest_step_is_not_searched_for_for_hours():
    """alpha and momentum of 0.9999999: explain and lint answer at once, without that line."""
    optimizer = RMSprop([ones(4, 4)], alpha=0.9999999, momentum=0.9999999)
    assert "add up" not in optimizer.explain()
    optimizer.lint()
    assert analysis.longest_step(*settings.read(optimizer.param_groups[0])) is None


def test_a_variance_of_0_that_max_update_bounds_is_explained():
    """centered with bias_correction: the first step is max_update long."""
    optimizer = RMSprop([ones(2)], centered=True, bias_correction=True, max_update=10.0)
    assert "the first step is 10·lr = 0.1 long (bounded by max_update)" in optimizer.explain()


@pytest.mark.parametrize("rename", [{1: "a"}, {"a": 2}, {"a": None}])
def test_a_rename_is_of_names(rename):
    """Numbers are no names: a sentence, and nothing changed."""
    saved = RMSprop([("a", ones(2))]).state_dict()
    with pytest.raises(TypeError, match="must map saved names to names here, all strings"):
        RMSprop([("a", ones(2))]).load_state_dict(saved, rename=rename)


def test_a_tensor_of_one_element_is_saved_whatever_its_stride(tmp_path):
    """A column of a matrix of one row has stride 2, and counts as contiguous."""
    odd = torch.arange(6.0)[1::2][1:2]
    assert odd.stride() == (2,)
    checkpoint.save(
        tmp_path / "run.safetensors", odd=odd, half=odd.bfloat16(), grid=torch.ones(4)[::2][:1].reshape(1, 1)
    )
    found = checkpoint.load(tmp_path / "run.safetensors")
    assert found["odd"].tolist() == [3.0]
    assert found["grid"].tolist() == [[1.0]]


@pytest.mark.parametrize("words", [{"fused": True}, {"backend": "cpu"}, {"backend": "eager"}], ids=str)
def test_a_kernel_may_be_asked_for_before_parameters_have_storage(words):
    """Deferred initialisation: the wish is checked at the first step, after to_empty, and raises there on meta."""
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    optimizer = RMSprop(model.parameters(), **words)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, device="meta"))]})
    for group in optimizer.param_groups:
        group["params"] = [torch.empty_like(p, device="cpu").fill_(1.0).requires_grad_() for p in group["params"]]
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    assert all(torch.allclose(p, torch.tensor(0.9), rtol=1e-5) for p in moved)
    asked = RMSprop(model.parameters(), **words)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if words.get("backend") != "eager":
        with pytest.raises(RuntimeError, match="cannot take this step"):
            asked.step()


@pytest.mark.parametrize("lr", [-0.25, -1e-18, np.float32(-0.5), torch.tensor(-0.125)], ids=str)
def test_a_run_below_0_loads_what_it_saved(lr):
    """A schedule may take lr below 0: its state dict goes back into it, into a new optimizer and into torch's."""
    p = ones(3)
    optimizer = RMSprop([p])
    optimizer.step()
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    saved = optimizer.state_dict()
    for other in (optimizer, RMSprop([ones(3)]), torch.optim.RMSprop([ones(3)])):
        other.load_state_dict(saved)
        assert float(other.param_groups[0]["lr"]) == float(lr)
        other.step()
    with pytest.raises(ValueError, match="Invalid learning rate"):
        RMSprop([ones(3)], lr=lr)


def planned(steps, count=2, **words):
    """An optimizer that has stepped that often, and copies of its parameters."""
    params = [ones(3) for _ in range(count)]
    optimizer = RMSprop([{"params": [p]} for p in params], **words)
    for _ in range(steps):
        optimizer.step()
    return params, optimizer, [p.detach().clone() for p in params]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda o: o.param_groups[0].update(params=None), "params of group 0 is None, a NoneType; it takes a list"),
        (lambda o: o.param_groups[1].update(params=iter([])), "params of group 1 is <list_iterator>"),
        (
            lambda o: o.param_groups[1].update(params=(p for p in [ones(1)])),
            "a generator; it takes a list of tensors",
        ),
        (lambda o: o.param_groups[0].update(params="ab"), "params of group 0 is 'ab', a str"),
        (lambda o: o.param_groups[0].update(params={1: ones(1)}), "a dict; it takes a list of tensors, since every"),
        (lambda o: o.param_groups[0].update(params=ones(2)), "a Parameter; it takes a list of tensors"),
        (lambda o: o.param_groups[0]["params"].append(None), "params of group 0 holds None, a NoneType, at index 1"),
        (lambda o: o.param_groups[0]["params"].append([1]), r"params of group 0 holds \[1\], a list, at index 1"),
        (lambda o: o.param_groups[0]["params"].append(("a", ones(1))), r"holds \('a', <.*, a tuple, at index 1"),
        (lambda o: o.param_groups[1]["params"].append(np.ones(2)), "holds <ndarray float64 .*at index 1"),
        (lambda o: o.param_groups[0]["params"].append(nn.Linear(9, 9)), "holds <Linear>, a Linear, at index 1"),
        (lambda o: o.param_groups[0].pop("params"), "group 0 has lost its params"),
        (lambda o: o.param_groups[0].pop("foreach"), "a parameter group has lost its foreach; a group must keep all"),
        (lambda o: o.param_groups[1].pop("lr"), "a parameter group has lost its lr"),
        (lambda o: o.param_groups[0].clear(), "group 0 has lost its params"),
        (lambda o: o.param_groups.append([ones(1)]), r"group 2 of param_groups is \[<.*, a list; a group is a dict"),
        (lambda o: o.param_groups.insert(0, None), "group 0 of param_groups is None, a NoneType; a group is a dict"),
        (lambda o: setattr(o, "param_groups", None), "param_groups is None, a NoneType; it takes a list of dicts"),
        (lambda o: setattr(o, "param_groups", iter(o.param_groups)), "param_groups is <list_iterator>"),
        (
            lambda o: setattr(o, "param_groups", o.param_groups[0]),
            "param_groups is {'params.*a dict; it takes a list",
        ),
        (
            lambda o: o.param_groups[0]["params"].append(o.param_groups[1]["params"][0]),
            "is already listed in group 0",
        ),
        (lambda o: o.param_groups[0].update(params=o.param_groups[0]["params"] * 2), "list each parameter once"),
        (lambda o: o.param_groups.append(o.param_groups[0]), "parameter 0 of group 2 is already listed in group 0"),
    ],
    ids=range(23),
)
def test_groups_that_were_edited_into_something_else_are_one_sentence(edit, says, steps, backend):
    """Before anything moves, with and without a plan; so are explain, lint and state_dict of it."""
    params, optimizer, before = planned(steps, backend=backend)
    edit(optimizer)
    for way in (optimizer.step, optimizer.explain, optimizer.lint, optimizer.step):
        with pytest.raises((TypeError, ValueError), match=says):
            way()
    assert all(torch.equal(p.detach(), b) for p, b in zip(params, before, strict=True))
    assert all(optimizer.state[p]["step"] == steps for p in params if steps)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    "edit",
    [
        lambda o: o.param_groups[0].update(params=tuple(o.param_groups[0]["params"])),
        lambda o: o.param_groups[0].update(params=collections.UserList(o.param_groups[0]["params"])),
        lambda o: o.param_groups[0].update(params=collections.deque(o.param_groups[0]["params"])),
        lambda o: o.param_groups[0].update(params=nn.ParameterList(o.param_groups[0]["params"])),
        lambda o: o.param_groups[0].update(params=dict(enumerate(o.param_groups[0]["params"])).values()),
        lambda o: setattr(o, "param_groups", tuple(o.param_groups)),
        lambda o: setattr(o, "param_groups", collections.deque(map(collections.OrderedDict, o.param_groups))),
        lambda o: setattr(o, "param_groups", [collections.UserDict(group) for group in o.param_groups]),
        lambda o: setattr(o, "param_groups", [collections.ChainMap({}, group) for group in o.param_groups]),
        lambda o: o.param_groups.reverse(),
        lambda o: o.param_groups.append({**o.param_groups[0], "params": [], 3: "note", ("a",): None}),
    ],
    ids=range(11),
)
def test_groups_that_torch_steps_are_stepped_after_every_edit(edit, steps):
    """Other kinds of list and of dict, and more of them: the run stays torch's."""
    ends = []
    for cls in (RMSprop, torch.optim.RMSprop):
        params = [ones(3), ones(2, 2)]
        optimizer = cls([{"params": params[:1], "lr": 0.1}, {"params": params[1:]}], momentum=0.5)
        for i in range(steps + 3):
            if i == steps:
                edit(optimizer)
            if i == steps + 1:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5
            optimizer.step()
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(*ends)


def wide(depth):
    """A tuple of two to that power of numbers, which holds one tuple twice at each level."""
    value = (1,)
    for _ in range(depth):
        value = (value, value)
    return value


@pytest.mark.parametrize(
    "name", ["lr", "alpha", "seed", "sparse", "dialect", "eps_mode", "square_avg_init", "note", "recipe", "rounding"]
)
@pytest.mark.parametrize("make", [lambda: wide(64), lambda: [0] * 10**6, lambda: "x\x1b[2J" * 10**6], ids=range(3))
def test_a_huge_value_in_a_group_is_shown_in_part_at_once(make, name):
    """By repr, explain, lint and the step, in a setting and in a note; none waits for the whole of it."""
    p = ones(3)
    optimizer = RMSprop([p])
    optimizer.step()
    optimizer.step()
    optimizer.param_groups[0][name] = make()
    shown = repr(optimizer)
    assert len(shown) < 5000
    assert "\x1b" not in shown
    assert ("no equation: " in shown) is (name not in ("note", "recipe"))
    for way in (optimizer.step, optimizer.explain, optimizer.lint):
        if name in ("note", "recipe"):
            way()
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            way()
        assert len(str(caught.value)) < 800
    if name in ("dialect", "lr"):
        for word in (name, "recipe", "backend", "nonfinite", "nonfinite_limit", "foo"):
            with pytest.raises((TypeError, ValueError)) as caught:
                RMSprop([ones(1)], **{word: make()})
            assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "name", ["square_avg_init", "clip_value", "clip_global_norm", "weight_decay", "max_update", "lr"]
)
def test_an_integer_beyond_64_bits_is_a_number_in_mid_run_too(name):
    """As at construction, where it becomes a float."""
    ends = []
    for value in (2**70, 2.0**70):
        p = ones(3)
        optimizer = RMSprop([p])
        optimizer.param_groups[0][name] = value
        optimizer.step()
        optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*(x.nan_to_num(nan=7.0) for x in ends))


def test_a_parameter_that_was_appended_without_a_name_is_called_by_its_place():
    """By lint, state_dict and the step: torch's names are a list of their own."""
    optimizer = RMSprop([("weight", ones(2, 2))])
    optimizer.param_groups[0]["params"].append(ones(2, 2))
    optimizer.step()
    optimizer.step()
    optimizer.param_groups[0]["params"][1].grad = torch.full((2, 2), float("nan"))
    assert any("group0.param1" in str(finding) for finding in optimizer.lint())
