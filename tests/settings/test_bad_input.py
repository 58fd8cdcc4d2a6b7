"""Bad input gets one clear sentence that restates what was given and what would work, before anything is changed."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from rmsprop import RMSprop, functional


def params():
    return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"lr": -0.1}, ValueError, r"Invalid learning rate: -0\.1; lr takes a finite number >= 0"),
        ({"lr": math.nan}, ValueError, "Invalid learning rate: nan"),
        ({"lr": math.inf}, ValueError, "Invalid learning rate: inf"),
        ({"lr": 10**400, "weight_decay_mode": "corrected"}, ValueError, "Invalid learning rate: <int of 1329 bits>"),
        ({"lr": "0.1"}, TypeError, r"'0\.1' is a str; lr takes"),
        ({"lr": None}, TypeError, "None is a NoneType; lr takes"),
        ({"lr": True}, TypeError, "True is a bool"),
        ({"lr": [0.1]}, TypeError, "is a list"),
        ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element, got shape"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "Invalid learning rate: -1.0"),
        ({"lr": torch.tensor(1)}, TypeError, "int64 tensor; lr takes a float or a floating-point tensor"),
        ({"alpha": 1.0}, ValueError, r"Invalid alpha value: 1\.0; alpha takes .* 0 <= alpha < 1"),
        ({"alpha": 1.5}, ValueError, "Invalid alpha value: 1.5"),
        ({"alpha": -0.1}, ValueError, "Invalid alpha value: -0.1"),
        ({"eps": -1e-8}, ValueError, "Invalid epsilon value: -1e-08; eps takes a finite number >= 0"),
        ({"eps": math.nan}, ValueError, "Invalid epsilon value: nan"),
        ({"momentum": 1}, ValueError, "Invalid momentum value: 1; momentum takes 0 <= momentum < 1"),
        ({"momentum": -1.0}, ValueError, "Invalid momentum value: -1.0"),
        ({"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
        ({"centered": "False"}, TypeError, "'False' is a str; centered is a switch, True or False"),
        ({"maximize": 2}, TypeError, "2 is an int; maximize is a switch"),
        ({"capturable": None}, TypeError, "Invalid capturable: None"),
        ({"foreach": "yes"}, TypeError, "Invalid foreach: 'yes'"),
        (
            {"eps_mode": "in"},
            ValueError,
            "Invalid eps_mode: 'in'; choose one of 'outside', 'inside', 'both', 'floor'",
        ),
        ({"eps_mode": True}, TypeError, "Invalid eps_mode: True"),
        ({"weight_decay_mode": "adamw"}, ValueError, "choose one of 'l2', 'decoupled'"),
        (
            {"square_avg_init": -1},
            ValueError,
            "Invalid square_avg_init value: -1; square_avg_init takes a finite number >= 0",
        ),
        ({"nesterov": True}, ValueError, "give momentum > 0"),
        ({"foreach": True, "differentiable": True}, ValueError, "leave foreach as None or False"),
        ({"backend": "cuda"}, ValueError, "Unknown backend: 'cuda'; choose one of 'auto'"),
        (
            {"dialect": "tensorflow9"},
            ValueError,
            "Unknown dialect: 'tensorflow9' .*; choose one of 'torch', 'textbook'",
        ),
        ({"dialect": "textbok"}, ValueError, r"did you mean 'textbook'\?"),
        ({"dialect": None}, ValueError, "Unknown dialect: None"),
        (
            {"rho": 0.9},
            TypeError,
            r"takes no rho=0\.9 under dialect='torch': dialect='keras3' .* write alpha=\.\.\. here",
        ),
        ({"learning_rate": 0.1}, TypeError, r"dialect='keras3' has that name; write lr="),
        ({"decay": 0.1}, TypeError, "write alpha="),
        ({"epsilon": 0.1}, TypeError, "dialect='keras3' has that name; write eps="),
        (
            {"betas": (0.9, 0.99)},
            TypeError,
            r"takes no betas=\(0.9, 0.99\), which are Adam's; the second .* write alpha=0.99 here \(the first",
        ),
        (
            {"betas": (0.9, 0.99), "dialect": "keras3"},
            TypeError,
            r"write rho=0.99 here \(the first averages gradients",
        ),
        ({"betas": [0.5]}, TypeError, r"takes no betas=\[0.5\] .* write alpha="),
        ({"lr_in_momentum": True}, TypeError, "write lr_in_buffer="),
        ({"rho": 0.9, "dialect": "textbook"}, TypeError, r"write beta=\.\.\. here"),
        ({"momentun": 0.9}, TypeError, r"unexpected setting momentun=0\.9 .* did you mean 'momentum'\?"),
        ({"xyz": 1}, TypeError, "unexpected setting xyz=1 .* it takes lr, alpha, .*rounding, .*state_dtype, .*ema, "),
        ({"state_dtyp": "float8"}, TypeError, "did you mean 'state_dtype'"),
        (
            {"alpha": 0.9, "dialect": "textbook"},
            TypeError,
            "alpha is the learning rate in the textbook's rule and the",
        ),
        ({"lr": 0.1, "learning_rate": 0.2, "dialect": "textbook"}, TypeError, "both set lr .* give one of them"),
    ],
    ids=str,
)
def test_settings_are_refused_with_the_sentence(settings, error, says):
    """Wrong types, ranges, names and combinations, in the constructor and in a group of its own."""
    with pytest.raises(error, match=says):
        RMSprop(params(), **settings)
    by_constructor = {"backend", "dialect", "foreach", "differentiable", "capturable", "maximize", "nesterov"}
    notes = {
        "momentun",
        "state_dtyp",
        "xyz",
        "rho",
        "learning_rate",
        "decay",
        "epsilon",
        "lr_in_momentum",
        "betas",
    }  # test_group_keys.py
    if not (by_constructor | notes) & settings.keys():
        with pytest.raises(error, match=says):
            RMSprop([{"params": params(), **settings}])
        optimizer = RMSprop(params())
        with pytest.raises(error, match=says):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **settings})
        assert len(optimizer.param_groups) == 1


def test_alpha_by_position_is_refused_under_textbook_too():
    """A positional alpha is as ambiguous as a named one."""
    with pytest.raises(TypeError, match=r"give learning_rate=\.\.\. or beta="):
        RMSprop(params(), 0.001, 0.9, dialect="textbook")


def test_plain_numbers_of_any_kind_pass():
    """Integers, NumPy's numbers and 0/1 switches become plain Python ones."""
    optimizer = RMSprop(params(), lr=np.float32(0.5), alpha=0, eps=1, momentum=np.float64(0.5), centered=1)
    group = optimizer.param_groups[0]
    assert [type(group[k]) for k in ("lr", "alpha", "eps", "momentum", "centered")] == [float] * 4 + [bool]
    assert RMSprop(params(), centered=np.True_).param_groups[0]["centered"] is True


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (lambda: [], ValueError, "optimizer got an empty parameter list"),
        (lambda: torch.ones(2), TypeError, "iterable of Tensors or dicts"),
        (lambda: [1, 2], TypeError, "optimizer can only optimize Tensors"),
        (lambda: [torch.ones(2, requires_grad=True) * 2], ValueError, "non-leaf"),
        (lambda: params()[:1] * 2, ValueError, "duplicate parameters: group 0 lists a tensor twice"),
        (lambda: [("a", params()[0]), params()[1]], ValueError, "with/without names"),
    ],
    ids=["empty", "a-tensor", "numbers", "non-leaf", "duplicates", "half-named"],
)
def test_parameters_are_refused_with_the_sentence(given, error, says):
    """What is no list of distinct leaf tensors."""
    with pytest.raises(error, match=says):
        RMSprop(given())


def test_a_parameter_in_two_groups_is_refused_and_nothing_added():
    """Groups share no parameter."""
    shared = params()
    optimizer = RMSprop(shared)
    for group in ({"params": shared[:1]}, {"params": [nn.Parameter(torch.ones(1))] * 2}):
        with pytest.raises(ValueError, match=r"more than one parameter group|duplicate"):
            optimizer.add_param_group(group)
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([nn.Parameter(torch.ones(1))])
    assert len(optimizer.param_groups) == 1


def test_a_sparse_gradient_is_refused_before_any_parameter_moves():
    """The sentence names the parameter; parameters of earlier groups have not moved either."""
    dense, table = nn.Parameter(torch.ones(3)), nn.Embedding(4, 2, sparse=True)
    optimizer = RMSprop([{"params": [("dense", dense)]}, {"params": [("table", table.weight)]}])
    table(torch.tensor([1])).sum().backward()
    dense.grad = torch.ones(3)
    with pytest.raises(
        RuntimeError, match=r"does not support sparse gradients .*: parameter 'table' .* sparse=False"
    ):
        optimizer.step()
    assert torch.equal(dense.detach(), torch.ones(3))


def good_state():
    source = params()
    optimizer = RMSprop(source, momentum=0.9)
    for p in source:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()


def _adam():
    source = params()
    optimizer = torch.optim.Adam(source)
    for p in source:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()


def _edited(**changes):
    saved = good_state()
    saved["param_groups"][0] |= changes
    return saved


def _reshaped():
    saved = good_state()
    saved["state"][1]["square_avg"] = torch.ones(5)
    return saved


@pytest.mark.parametrize(
    ("saved", "error", "says"),
    [
        (_adam, ValueError, r"not an RMSprop's: .* exp_avg, exp_avg_sq and lacks square_avg"),
        (_reshaped, ValueError, r"square_avg of parameter 1 has shape \(5,\), the parameter has shape \(2, 2\)"),
        (lambda: _edited(alpha=1.5), ValueError, "Invalid alpha value: 1.5"),
        (lambda: _edited(eps_mode="under"), ValueError, "Invalid eps_mode"),
        (lambda: _edited(dialect="klingon"), ValueError, "Unknown dialect"),
        (lambda: _edited(params=[0]), ValueError, "group 0 has 1 parameters there and 2 here"),
        (lambda: {**good_state(), "param_groups": []}, ValueError, "it has 0, this optimizer has 1"),
        (lambda: _edited(centered=True), ValueError, "lacks grad_avg"),
        (lambda: {"model": {}}, ValueError, "not an optimizer's state dict"),
    ],
    ids=["adam", "reshaped", "alpha", "eps_mode", "dialect", "fewer", "no-groups", "uncentered", "no-optimizer"],
)
def test_state_dicts_that_do_not_fit_change_nothing(saved, error, says):
    """Loading is all or nothing: settings and state are as before."""
    optimizer = RMSprop(params(), lr=0.5)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = repr(optimizer)
    tensors = [entry["square_avg"] for entry in optimizer.state.values()]
    with pytest.raises(error, match=says):
        optimizer.load_state_dict(saved())
    assert repr(optimizer) == before
    assert all(entry["square_avg"] is t for entry, t in zip(optimizer.state.values(), tensors, strict=True))


def test_a_torch_checkpoint_under_another_rule_says_what_goes_on():
    """torch saves no eps_mode: the constructed one stays, with a warning; a buffer in other units is refused."""
    source = params()
    theirs = torch.optim.RMSprop(source, momentum=0.9)
    for p in source:
        p.grad = torch.ones_like(p)
    theirs.step()
    ours = RMSprop(params(), dialect="textbook")
    with pytest.warns(
        UserWarning, match="lacks eps_mode, since a class without them, such as torch's, saved it.* eps_mode='inside'"
    ):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["eps_mode"] == "inside"
    units = RMSprop(params(), lr_in_buffer=True, momentum=0.9)
    with pytest.raises(ValueError, match=r"momentum_buffer .* without the learning rate .* lr_in_buffer=False"):
        units.load_state_dict(theirs.state_dict())


def test_loading_copies_and_keeps_the_dtype_of_state():
    """The dict that was given is not shared; float32 state of a bfloat16 model stays float32, bfloat16 is widened."""
    source = [nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    first = RMSprop(source)
    source[0].grad = torch.full((3,), 1 / 3, dtype=torch.bfloat16)
    first.step()
    saved = first.state_dict()
    kept = saved["state"][0]["square_avg"].clone()
    second = RMSprop([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))])
    second.load_state_dict(saved)
    p = second.param_groups[0]["params"][0]
    assert second.state[p]["square_avg"].dtype == torch.float32
    p.grad = torch.ones(3, dtype=torch.bfloat16)
    second.step()
    assert torch.equal(saved["state"][0]["square_avg"], kept)
    saved["state"][0]["square_avg"] = kept.bfloat16()
    second.load_state_dict(saved)
    assert second.state[p]["square_avg"].dtype == torch.float32


def lists(**changes):
    """Arguments of the functional form, one tensor each."""
    given = dict(
        params=[torch.ones(2)],
        grads=[torch.ones(2)],
        square_avgs=[torch.zeros(2)],
        grad_avgs=[],
        momentum_buffer_list=[],
        state_steps=[torch.tensor(0.0)],
        lr=0.1,
        alpha=0.9,
        eps=1e-8,
        weight_decay=0,
        momentum=0,
        centered=False,
    )
    return given | changes


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"lr": -1}, ValueError, "Invalid learning rate"),
        ({"alpha": 1}, ValueError, "Invalid alpha value"),
        ({"grads": []}, ValueError, "grads has 0 tensors for 1 params; give one for each"),
        ({"centered": True}, ValueError, "grad_avgs has 0 tensors"),
        ({"momentum": 0.9}, ValueError, "momentum_buffer_list has 0 tensors"),
        ({"state_steps": [0]}, TypeError, "state_steps must hold one tensor"),
        ({"backend": "gpu"}, ValueError, "Unknown backend"),
    ],
    ids=str,
)
def test_the_functional_form_refuses_before_it_moves(changes, error, says):
    """The same sentences; the tensors are as they were."""
    given = lists(**changes)
    with pytest.raises(error, match=says):
        functional.rmsprop(**given)
    assert torch.equal(given["params"][0], torch.ones(2))
    assert torch.equal(given["square_avgs"][0], torch.zeros(2))


MODEL = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def used_up():
    """A generator that another optimizer went through."""
    parameters = MODEL.parameters()
    list(parameters)
    return parameters


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (lambda: MODEL, TypeError, r"^params is a model \(Sequential\); write RMSprop\(model\.parameters\(\)\)$"),
        (
            lambda: nn.Linear(1, 1),
            TypeError,
            r"^params is a model \(Linear\); write RMSprop\(model\.parameters\(\)\)$",
        ),
        (
            lambda: MODEL.parameters,
            TypeError,
            r"^params is the method parameters, which was not called; call it: write model\.parameters\(\)$",
        ),
        (lambda: MODEL.named_parameters, TypeError, r"write model\.named_parameters\(\)$"),
        (lambda: MODEL.forward, TypeError, "params is the method forward, which was not called; call it$"),
        (
            used_up,
            ValueError,
            r"a generator that was used up before, .* empty parameter list; call model\.parameters",
        ),
        (lambda: map(nn.Parameter, []), ValueError, "empty parameter list: params is a map that yields nothing"),
        (
            lambda: nn.ReLU().parameters(),
            ValueError,
            "empty parameter list: params is a generator that yields nothing",
        ),
        (
            lambda: {"params": params()},
            TypeError,
            r"a dict with 1 keys, the first 'params'; a dict defines one group",
        ),
        (lambda: {}, TypeError, r"params is a dict with 0 keys; write model\.named_parameters"),
        (
            lambda: dict(MODEL.named_parameters()),
            TypeError,
            r"write model\.named_parameters\(\), or the dict's \.items",
        ),
        (
            lambda: MODEL.state_dict(),
            TypeError,
            r"first '0.weight'; the tensors of a state dict .* model\.named_parameters",
        ),
        (lambda: RMSprop(params()).state_dict(), TypeError, "give the state dict to its load_state_dict"),
        (lambda: RMSprop(params()), TypeError, r"an optimizer \(RMSprop\); write RMSprop\(optimizer\.param_groups\)"),
        (
            lambda: [MODEL.parameters()],
            TypeError,
            r"one of the params is generator: entry 0 holds several; write \[\*model\.parameters\(\)\]",
        ),
        (lambda: [params()], TypeError, "one of the params is list: entry 0 holds several"),
        (lambda: [MODEL], TypeError, r"one of the params is torch.*Sequential: write RMSprop\(model\.parameters"),
        (lambda: [MODEL.parameters], TypeError, r"one of the params is method: call it: write model\.parameters\(\)"),
        (lambda: [MODEL.state_dict()], ValueError, r"a parameter group has no params; it holds 0\.weight"),
        (
            lambda: [*params(), {"params": params()}],
            TypeError,
            "is dict: dicts define groups; give a list of such",
        ),
        (lambda: MODEL.named_modules(), TypeError, r"only optimize Tensors, .*Sequential"),
        (lambda: [(1, params()[0])], TypeError, r"a named parameter is a \(name, tensor\) pair"),
        (lambda: MODEL.state_dict().values(), ValueError, None),
    ],
    ids=range(23),
)
def test_what_is_given_as_params_is_named_with_what_to_write(given, error, says):
    """A model, a method, a dict or a generator instead of its parameters; also as the params of a group."""
    if says is None:  # torch takes these too
        RMSprop(given())
        return
    with pytest.raises(error, match=says) as caught:
        RMSprop(given())
    assert len(str(caught.value)) < 250
    assert "Linear(" not in str(caught.value)
    group = given()
    if isinstance(group, list) or "empty" in says or "named_modules" in says:
        return
    with pytest.raises(error) as caught:
        RMSprop([{"params": group}])
    assert "Linear(" not in str(caught.value)


def test_a_group_may_come_out_empty_but_not_from_a_generator_that_was_used_up():
    """torch takes empty groups; a generator that another group went through is a mistake."""
    with pytest.raises(ValueError, match="params is a generator that was used up before"):
        RMSprop([{"params": params()}, {"params": used_up()}])
    optimizer = RMSprop([{"params": params()}, {"params": []}, {"params": filter(lambda _: False, params())}])
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0, 0]


def test_a_parameter_list_is_a_list_of_parameters():
    """torch takes nn.ParameterList, a model that is gone through as its parameters."""
    assert len(RMSprop(nn.ParameterList(params())).param_groups[0]["params"]) == 2


NUMPY = [
    np.float16,
    np.float32,
    np.float64,
    np.longdouble,
    np.int64,
    np.uint8,
    lambda x: np.array(x, dtype=np.float32),
]


@pytest.mark.parametrize("kind", NUMPY, ids=["half", "single", "double", "long", "int", "byte", "array"])
@pytest.mark.parametrize("how", ["constructor", "group", "added", "edited", "scheduled"])
def test_numpys_scalars_are_pythons_numbers(how, kind, tmp_path):
    """As lr and every other number: the same steps bit for bit, and a state dict that weights_only reads."""
    numbers = dict(
        lr=1, alpha=0.5, eps=1, weight_decay=1, momentum=0.25, max_update=3, clip_value=2, square_avg_init=1
    )
    given = {name: kind(value) for name, value in numbers.items()}
    plain = {name: float(value) for name, value in given.items()}
    runs = []
    for words in (given, plain):
        p = nn.Parameter(torch.linspace(-1, 1, 5))
        if how == "constructor":
            optimizer = RMSprop([p], **words)
        elif how == "group":
            optimizer = RMSprop([{"params": [p], **words}])
        elif how == "added":
            optimizer = RMSprop(params(), square_avg_init=1.0)
            optimizer.add_param_group({"params": [p], **words})
        elif how == "edited":
            optimizer = RMSprop([p], square_avg_init=1.0)
            optimizer.param_groups[0].update(words)
            optimizer.param_groups[0]["betas"] = (words["alpha"], words["alpha"])
        else:
            optimizer = RMSprop([p], **{**plain, "lr": 2.0})
            scale = kind(1) if words is given else 1.0
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i, scale=scale: scale / (i + 1))
        assert optimizer.explain()
        optimizer.lint()
        for _ in range(4):
            p.grad = torch.linspace(1, 3, 5)
            optimizer.step()
            if how == "scheduled":
                scheduler.step()
        assert optimizer.explain()
        optimizer.lint()
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        assert all(type(g["lr"]) is float or type(g["lr"]) is int for g in loaded["param_groups"])
        RMSprop([torch.ones_like(x, requires_grad=True) for g in optimizer.param_groups for x in g["params"]]) if (
            how == "added"
        ) else RMSprop([torch.ones(5, requires_grad=True)], square_avg_init=1.0).load_state_dict(
            loaded, hparams="load"
        )
        runs.append(p.detach())
    assert torch.equal(*runs) or (how == "scheduled" and torch.allclose(*runs, rtol=1e-2))


@pytest.mark.parametrize("where", ["constructor", "group", "edited", "planned"])
@pytest.mark.parametrize(
    "name", ["lr", "alpha", "eps", "maximize", "sparse", "dialect", "eps_mode", "foreach", "seed"]
)
@pytest.mark.parametrize(
    "value",
    [
        np.ones(3),
        torch.ones(2, 2),
        [[]],
        nn.Linear(2, 2),
        "x" * 10**6,
        10**5000,
        {"a": object()},
        lambda: 0,
        np.ones(1),
    ],
    ids=["array", "tensor", "list", "model", "text", "int", "dict", "function", "one"],
)
def test_an_object_in_the_place_of_a_setting_is_one_short_sentence(name, value, where):
    """It is neither hashed, compared nor printed whole; in mid-run nothing moves."""
    if name == "eps" and isinstance(value, str):
        value = "\ud800\x1b[2J"
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = RMSprop([p])
    for _ in range(3 if where == "planned" else 0):
        optimizer.step()
    before = p.detach().clone()
    if where in ("edited", "planned"):
        optimizer.param_groups[0][name] = value
    ways = {
        "constructor": lambda: RMSprop([p], **{name: value}),
        "group": lambda: RMSprop([{"params": [p], name: value}]),
    }
    with pytest.raises((TypeError, ValueError)) as caught:
        ways.get(where, optimizer.step)()
    assert torch.equal(p.detach(), before)
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 700
    assert "ambiguous" not in said
