"""State in two bytes or in one: settings, what a group keeps in which dtype, loads of any into any, and edits."""

import copy
import itertools
import pickle
import re
import warnings

import pytest
import torch
from cases import mostly_long
from narrowed import STATES
from torch import nn

from rmsprop import RMSprop, checkpoint, estimate, reference
from rmsprop.functional import rmsprop
from rmsprop.in_backward import step_in_backward
from rmsprop.spec import STATE_DTYPES
from rmsprop.tensors.bucket import slot_dtype
from rmsprop.tensors.float8 import converted, from_float8, to_float8, widened

KEPT = {
    "float32": dict.fromkeys(("square_avg", "grad_avg", "momentum_buffer"), torch.float32),
    "bfloat16": dict.fromkeys(("square_avg", "grad_avg", "momentum_buffer"), torch.bfloat16),
    "float8": {"square_avg": torch.uint8, "grad_avg": torch.bfloat16, "momentum_buffer": torch.bfloat16},
}


def network(dtype=torch.float32):
    """Two parameters; the same at each call."""
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(7, 5).to(dtype)), nn.Parameter(torch.randn(33).to(dtype))]


def build(state_dtype, params=None, **settings):
    params = network() if params is None else params
    return RMSprop(
        params,
        **{"lr": 0.01, "momentum": 0.9, "centered": True, **settings},
        state_dtype=state_dtype,
    )


def train(optimizer, steps=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    return optimizer


def dtypes(optimizer, index=0):
    entry = optimizer.state_dict()["state"][index]
    return {name: entry[name].dtype for name in KEPT["float32"]}


def numbers(optimizer):
    """The state of every parameter in float32, and its step."""
    state = optimizer.state_dict()["state"]
    return {key: {name: widened(x, torch.float32) for name, x in entry.items()} for key, entry in state.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        for name, x in one[key].items():
            assert torch.equal(x, other[key][name]), (key, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_slots_are_kept_in_the_dtype_of_the_setting(state_dtype, dtype):
    """square_avg in one byte under float8, the others in two; the step count and `ema` stay as they are."""
    optimizer = train(build(state_dtype, network(dtype), ema=0.9))
    assert dtypes(optimizer) == KEPT[state_dtype]
    entry = optimizer.state_dict()["state"][0]
    assert (entry["step"].dtype, entry["ema"].dtype) == (torch.float64, torch.float32)
    assert entry["square_avg"].shape == (7, 5)


@pytest.mark.parametrize("state_dtype", STATES)
def test_parameters_of_other_arithmetic_keep_full_state(state_dtype):
    """float64 and complex parameters beside float32 ones step as in an optimizer of their own."""
    wide = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
    spun = nn.Parameter(torch.complex(torch.ones(4), torch.arange(4.0)))
    alone = [nn.Parameter(x.detach().clone()) for x in (wide, spun)]
    optimizer, plain = build(state_dtype, [network()[0], wide, spun]), build("float32", alone)
    for t in range(3):
        for p, q in zip((wide, spun), alone, strict=True):
            p.grad = q.grad = torch.full_like(p, 0.5 + t)
        optimizer.param_groups[0]["params"][0].grad = torch.ones(7, 5)
        optimizer.step()
        plain.step()
    assert [optimizer.state[p]["square_avg"].dtype for p in (wide, spun)] == [torch.float64, torch.complex64]
    for p, q in zip((wide, spun), alone, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["square_avg"], plain.state[q]["square_avg"])


def test_groups_have_their_own_state_dtype():
    """Of groups of several, also one that is added later; the bits of one do not depend on the others."""
    a, b = network()
    optimizer = build("float32", [{"params": [a], "state_dtype": "bfloat16"}, {"params": [b]}])
    late = nn.Parameter(torch.ones(4))
    optimizer.add_param_group({"params": [late], "state_dtype": "float8"})
    train(optimizer)
    kept = [optimizer.state[p]["square_avg"].dtype for p in (a, b, late)]
    assert kept == [torch.bfloat16, torch.float32, torch.uint8]
    alone = build("bfloat16", network()[:1])
    alone.param_groups[0]["params"][0].data.copy_(network()[0])
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        drawn = [torch.randn(p.shape, generator=generator) for p in (a, b, late)]
        alone.param_groups[0]["params"][0].grad = drawn[0]
        alone.step()
    assert torch.equal(alone.param_groups[0]["params"][0], a)


@pytest.mark.parametrize("state_dtype", STATES)
def test_momentum_that_begins_in_mid_run_has_a_buffer_of_two_bytes(state_dtype):
    """The slot that a schedule makes necessary is made in the group's dtype."""
    optimizer = train(build(state_dtype, momentum=0.0))
    optimizer.param_groups[0]["momentum"] = 0.5
    train(optimizer)
    assert dtypes(optimizer) == KEPT[state_dtype]


@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        ({"state_dtype": "fp8"}, torch.float32, "Invalid state_dtype: 'fp8'; choose one of 'float32', 'bfloat16', "),
        ({"state_dtype": torch.uint8}, torch.float32, "Invalid state_dtype: <dtype>; choose one of"),
        ({"state_dtype": None}, torch.float32, "Invalid state_dtype: None; choose one of"),
        ({"state_dtype": 8}, torch.float32, "Invalid state_dtype: 8; choose one of"),
        ({"state_dtype": "float8", "differentiable": True}, torch.float32, "leave it as 'float32'"),
        ({"state_dtype": "float8"}, torch.float64, "these are float64, whose averages stay float64; leave it out"),
        ({"state_dtype": "bfloat16"}, torch.complex64, "applies to float32, bfloat16 and float16 parameters only"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_refused_at_construction(settings, dtype, message):
    """Unknown names, a dtype in place of a name, autograd, and parameters that it does not apply to."""
    with pytest.raises(ValueError, match=re.escape(message)):
        RMSprop([nn.Parameter(torch.ones(3, dtype=dtype))], **settings)


@pytest.mark.parametrize(
    ("own", "dtype", "message"),
    [
        ({"state_dtype": "float8"}, torch.float64, "state_dtype='float8' applies to float32, bfloat16 and float16"),
        ({"rounding": "stochastic"}, torch.float32, "rounding='stochastic' applies to half-precision parameters"),
        ({"compensation": True}, torch.float32, "compensation=True applies to half-precision parameters"),
    ],
    ids=str,
)
def test_a_precision_needs_one_parameter_of_the_optimizer(own, dtype, message):
    """Groups of different layers may share their settings; what no parameter has is refused, whichever group's."""
    half, other = nn.Parameter(torch.ones(3).bfloat16()), nn.Parameter(torch.ones(3, dtype=dtype))
    with pytest.raises(ValueError, match=re.escape(message)):
        RMSprop([{"params": [other]}, {"params": [nn.Parameter(torch.ones(2, dtype=dtype))], **own}])
    for groups, settings in (
        ([{"params": [half], **own}, {"params": [other], **own}], {}),
        ([{"params": [half]}, {"params": [other]}], own),
    ):
        optimizer = RMSprop(groups, **settings)
        assert RMSprop(optimizer.param_groups).param_groups[1].items() >= own.items()
        assert estimate(optimizer).total == estimate(optimizer.param_groups).total
        for other_way in estimate(optimizer).alternatives:
            assert other_way.usage is not None, other_way


# bfloat16 state under "float32" steps as it did before there was a setting: rounded to nearest, which lint reports.
CHANGES = [pair for pair in itertools.permutations(STATE_DTYPES, 2) if pair != ("bfloat16", "float32")]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_setting_that_changes_in_mid_run_is_refused_until_the_state_is_converted(before, after):
    """The message has the call that converts; nothing has moved; codes never pass for numbers."""
    optimizer = train(build(before))
    params = optimizer.param_groups[0]["params"]
    values, state = [p.detach().clone() for p in params], numbers(optimizer)
    optimizer.param_groups[0]["state_dtype"] = after
    with pytest.raises(
        RuntimeError, match=r"load_state_dict\(optimizer.state_dict\(full_precision=True\)\)"
    ) as found:
        train(optimizer, 1)
    assert str(KEPT[before]["square_avg"]) in str(found.value)
    assert f"state_dtype={after!r}" in str(found.value)
    assert all(torch.equal(p, value) for p, value in zip(params, values, strict=True))
    assert_same(numbers(optimizer), state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.load_state_dict(optimizer.state_dict(full_precision=True))
    train(optimizer, 1)
    assert dtypes(optimizer) == KEPT[after]


@pytest.mark.parametrize(
    ("saved", "here", "dtype", "hparams"),
    mostly_long(
        itertools.product(STATE_DTYPES, STATE_DTYPES, [torch.float32, torch.bfloat16], [None, "load", "keep"]),
        lambda _, row: row[2] == torch.float32 or row[3] == "keep",
        unpack=True,
    ),
    ids=str,
)
def test_any_state_loads_into_any_other(saved, here, dtype, hparams):
    """Wider: exact, in silence. Narrower: to nearest, with a warning. The constructor's choice stays."""
    source, optimizer = train(build(saved, network(dtype))), build(here, network(dtype))
    loses = STATE_DTYPES.index(saved) < STATE_DTYPES.index(here)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = optimizer.load_state_dict(source.state_dict(), hparams=hparams)
    assert [str(w.message).partition(":")[0] for w in caught] == (
        [f"the loaded state is rounded to state_dtype={here!r} of this optimizer"] if loses else []
    )
    assert (len(report.loaded), report.differences) == (2, ())
    assert optimizer.param_groups[0]["state_dtype"] == here
    assert dtypes(optimizer) == KEPT[here]
    wanted = numbers(source)
    for key, entry in wanted.items():
        for name, x in entry.items():
            if name == "square_avg" and here == "float8":
                wanted[key][name] = from_float8(to_float8(x))
            elif name != "step" and here != "float32":
                wanted[key][name] = x.bfloat16().float()
    assert_same(numbers(optimizer), wanted)
    train(optimizer, 1)


def test_the_warning_of_a_load_says_what_is_lost():
    """Each slot with its relative error, and numbers of square_avg outside the range of float8."""
    source = train(build("float32"))
    source.state[source.param_groups[0]["params"][1]]["square_avg"][:3] = torch.tensor([3e4, 1e-20, 1e-16])
    with pytest.warns(UserWarning, match="is rounded to") as caught:
        build("float8").load_state_dict(source.state_dict())
    assert str(caught[0].message) == (
        "the loaded state is rounded to state_dtype='float8' of this optimizer: square_avg by up to 11 % (the root "
        "by 5 %), grad_avg by up to 0.4 %, momentum_buffer by up to 0.4 %; 3 elements of square_avg are outside its "
        "range, 4.4e-16 to 10240, and become 0 or its end; build it with state_dtype='float32' to keep the state as "
        "it was saved"
    )


def test_the_warning_of_a_load_has_a_sentence_for_each_precision():
    """Two groups of different state_dtype: what each loses, under its own name."""
    source, params = train(build("float32")), network()
    source.state[source.param_groups[0]["params"][0]]["square_avg"].view(-1)[0] = 3e4
    groups = [{"params": params[:1], "state_dtype": "float8"}, {"params": params[1:], "state_dtype": "bfloat16"}]
    saved = source.state_dict()
    settings = {name: value for name, value in saved["param_groups"][0].items() if name != "params"}
    saved["param_groups"] = [{**settings, "params": [i]} for i in range(2)]
    with pytest.warns(UserWarning, match="is rounded to") as caught:
        RMSprop(groups, momentum=0.9, centered=True).load_state_dict(saved, hparams="keep")
    said = [str(w.message) for w in caught]
    assert ["'float8'" in text for text in said] == [True, False]
    assert "square_avg by up to 11 %" in said[0]
    assert "1 elements of square_avg are outside" in said[0]
    assert "'bfloat16'" in said[1]
    assert "square_avg by up to 0.4 %" in said[1]
    assert "outside" not in said[1]


def test_a_load_whose_warning_is_an_error_changes_nothing():
    """Under warnings as errors, the optimizer is as before."""
    source, optimizer = train(build("float32")), train(build("float8"), seed=5)
    before = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="is rounded to"):
            optimizer.load_state_dict(source.state_dict())
    assert_same(before["state"], optimizer.state_dict()["state"])


def test_a_state_that_loses_nothing_is_loaded_in_silence():
    """What float8 exported in float32 is float8's numbers, so it comes back to the last bit."""
    source, optimizer = train(build("float8")), build("float8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(source.state_dict(full_precision=True))
    assert_same(optimizer.state_dict()["state"], source.state_dict()["state"])


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_full_precision_is_float32_for_torchs_optimizer(state_dtype):
    """torch's optimizer continues from the numbers that the state stands for; the state itself is unchanged."""
    source = train(build(state_dtype))
    before = copy.deepcopy(source.state_dict())
    full = source.state_dict(full_precision=True)
    assert full["param_groups"][0]["state_dtype"] == "float32"
    assert {name: full["state"][0][name].dtype for name in KEPT["float32"]} == KEPT["float32"]
    theirs = torch.optim.RMSprop(network(), lr=0.01, momentum=0.9, centered=True)
    theirs.load_state_dict(full)
    for key, entry in numbers(source).items():
        for name in KEPT["float32"]:
            assert torch.equal(theirs.state_dict()["state"][key][name], entry[name])
    assert_same(source.state_dict()["state"], before["state"])
    assert source.param_groups[0]["state_dtype"] == state_dtype
    with pytest.raises(TypeError, match="Invalid full_precision: 'yes'"):
        source.state_dict(full_precision="yes")


def test_torchs_checkpoint_loads_into_narrow_state():
    """Of torch's optimizer, whose groups lack the setting: converted, with the warning."""
    theirs = torch.optim.RMSprop(network(), lr=0.01, momentum=0.9, centered=True)
    for p in theirs.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    theirs.step()
    optimizer = build("float8")
    with pytest.warns(UserWarning, match="is rounded to state_dtype='float8'"):
        optimizer.load_state_dict(theirs.state_dict())
    assert dtypes(optimizer) == KEPT["float8"]


def _cast(slot, dtype):
    return lambda _, entry: entry.update({slot: entry[slot].to(dtype)})


def _said(state_dtype):
    return lambda group, _: group.update(state_dtype=state_dtype)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_said("float32"), "is uint8, the codes of state_dtype='float8', but"),
        (_said("bfloat16"), "its saved group has state_dtype='bfloat16'"),
        (lambda group, _: group.pop("state_dtype"), "its saved group has state_dtype='float32'"),
        (_cast("square_avg", torch.float32), "is float32, but its saved group has state_dtype='float8'"),
        (_cast("grad_avg", torch.uint8), "torch.uint8"),
        (_cast("square_avg", torch.int16), "torch.int16"),
        (_said("fp4"), "Invalid state_dtype: 'fp4'"),
        (_said(8), "Invalid state_dtype: 8"),
    ],
)
def test_codes_are_never_loaded_as_numbers_nor_numbers_as_codes(edit, message):
    """The saved group's state_dtype says what a uint8 square_avg is; a cast by a tool in between is found."""
    saved = copy.deepcopy(train(build("float8")).state_dict())
    edit(saved["param_groups"][0], saved["state"][1])
    for here in STATE_DTYPES:
        optimizer = build(here)
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.load_state_dict(saved)
        assert not optimizer.state


@pytest.mark.parametrize("state_dtype", STATES)
def test_a_resumed_run_ends_with_the_same_bits(state_dtype):
    """By a state dict, by pickle and by a deep copy: the random bits depend on seed, step, parameter and element."""
    whole = train(build(state_dtype, seed=3), 6)
    half = train(build(state_dtype, seed=3), 3)
    resumed = []
    by_state = build(state_dtype, [nn.Parameter(p.detach().clone()) for p in half.param_groups[0]["params"]])
    by_state.load_state_dict(copy.deepcopy(half.state_dict()))
    resumed.append(by_state)
    resumed.append(copy.deepcopy(half))
    resumed.append(pickle.loads(pickle.dumps(half)))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        [torch.randn(p.shape, generator=generator) for p in network()]
    grads = [[torch.randn(p.shape, generator=generator) for p in network()] for _ in range(3)]
    for optimizer in resumed:
        for drawn in grads:
            for p, g in zip(optimizer.param_groups[0]["params"], drawn, strict=True):
                p.grad = g
            optimizer.step()
        assert_same(optimizer.state_dict()["state"], whole.state_dict()["state"])
        for p, q in zip(optimizer.param_groups[0]["params"], whole.param_groups[0]["params"], strict=True):
            assert torch.equal(p, q)


def test_a_seed_of_its_own_gives_other_bits():
    """So that the test above can fail."""
    one, other = (train(build("float8", seed=seed), 6).state_dict()["state"] for seed in (3, 4))
    assert not torch.equal(one[0]["square_avg"], other[0]["square_avg"])


def test_state_by_name_and_renamed_is_converted():
    """In another order and under another name, with one parameter that is missing."""
    named = list(zip(("a", "b"), network(), strict=True))
    source = train(build("float32", named))
    optimizer = build("float8", [("c", network()[1]), ("a", network()[0]), ("new", nn.Parameter(torch.ones(2)))])
    with pytest.warns(UserWarning, match="is rounded"):
        report = optimizer.load_state_dict(source.state_dict(), strict=False, rename={"b": "c"})
    assert report.missing == ("new",)
    state = optimizer.state_dict()["state"]
    assert torch.equal(state[0]["square_avg"], to_float8(source.state_dict()["state"][1]["square_avg"]))


@pytest.mark.parametrize("fault", ["ones", "half", "wide"])
def test_state_written_by_hand_must_have_the_groups_dtype(fault):
    """A float32 square_avg in a float8 group is refused before anything moves, with what would work."""
    optimizer = build("float8")
    p, _ = optimizer.param_groups[0]["params"]
    dtype = {"ones": torch.float32, "half": torch.bfloat16, "wide": torch.float64}[fault]
    optimizer.state[p] = {"square_avg": torch.ones(7, 5, dtype=dtype)}
    before = p.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"square_avg of parameter 0 of its group is torch\..* keeps it in torch\.uint8"
    ):
        train(optimizer, 1)
    assert torch.equal(p, before)
    optimizer.state[p] = {"square_avg": to_float8(torch.ones(7, 5))}
    train(optimizer, 1)


def test_the_initial_average_is_rounded_to_nearest():
    """1 is exact; TensorFlow's and any other starting point becomes the nearest code, for fresh state."""
    for init in (1.0, 0.3, 0.0, 1e6, 1e-30):
        optimizer = build(
            "float8", dialect="torch", square_avg_init=init, alpha=0.5, centered=False, momentum=0.0, lr=0.0
        )
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        found = {int(c) for p in optimizer.state for c in optimizer.state[p]["square_avg"].flatten()}
        assert found == {int(to_float8(torch.tensor(init, dtype=torch.float32)))}


@pytest.mark.parametrize("state_dtype", STATES)
def test_a_skipped_step_leaves_the_state(state_dtype):
    """nonfinite="skip", and GradScaler's found_inf, write no slot."""
    optimizer = train(build(state_dtype, nonfinite="skip"))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.full_like(p, torch.inf)
    optimizer.step()
    assert_same(optimizer.state_dict()["state"], before)
    scaled = train(build(state_dtype, capturable=True, amp_in_step=True))
    before = copy.deepcopy(scaled.state_dict()["state"])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for p in scaled.param_groups[0]["params"]:
        p.grad = torch.full_like(p, torch.inf)
    scaler.scale(torch.zeros((), requires_grad=True))
    scaler.step(scaled)
    scaler.update()
    assert_same(scaled.state_dict()["state"], before)


def test_a_first_step_that_only_makes_state_makes_it_narrow():
    """As torch's distributed checkpoints take it, with lr 0 and gradients of 0: nothing decays."""
    optimizer = build("float8", square_avg_init=1.0, lr=0.0)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert dtypes(optimizer) == KEPT["float8"]
    assert set(optimizer.state_dict()["state"][0]["square_avg"].flatten().tolist()) == {
        int(reference.to_float8(torch.ones(1).numpy(), torch.tensor([1 << 20]).numpy().astype("uint32"))[0])
    }


def test_every_slot_has_one_dtype_by_one_function():
    """slot_dtype agrees with the table, and leaves other dtypes' state alone."""
    for state_dtype, table in KEPT.items():
        for name, kept in table.items():
            assert slot_dtype(name, torch.bfloat16, state_dtype) == kept
            assert slot_dtype(name, torch.float64, state_dtype) == torch.float64
            assert slot_dtype(name, torch.complex64, state_dtype) == torch.complex64
        assert slot_dtype("ema", torch.bfloat16, state_dtype) == torch.float32


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("sparse_dim", [1, 2])
def test_lazy_rows_are_rounded_by_themselves(state_dtype, sparse_dim):
    """Rows without a gradient keep their bytes; those with one have the bits of a parameter of these rows alone."""
    rows = torch.tensor([4, 1])
    table, alone = nn.Parameter(torch.ones(6, 3)), nn.Parameter(torch.ones(2, 3))
    settings = {"lr": 0.01, "momentum": 0.9, "state_dtype": state_dtype, "seed": 2}
    lazy, dense = RMSprop([table], sparse="lazy", **settings), RMSprop([alone], **settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        alone.grad = torch.randn(2, 3, generator=generator)
        grad = torch.zeros(6, 3)
        grad[rows.sort().values] = alone.grad
        table.grad = grad.to_sparse(sparse_dim)
        lazy.step()
        dense.step()
    for name, x in lazy.state[table].items():
        if name != "step":
            assert x.dtype == KEPT[state_dtype][name]
            assert not x[[0, 2, 3, 5]].any()
            if sparse_dim == 1:
                assert torch.equal(x[rows.sort().values], dense.state[alone][name])


@pytest.mark.parametrize("state_dtype", STATES)
def test_state_in_shared_memory_stays_there(state_dtype):
    """share_memory makes narrow slots; a load of float32 state writes into the same bytes."""
    params = network()
    for p in params:
        p.share_memory_()
    optimizer = build(state_dtype, params).share_memory()
    train(optimizer)
    kept = optimizer.state[params[0]]["square_avg"]
    assert kept.is_shared()
    assert kept.dtype == KEPT[state_dtype]["square_avg"]
    source = train(build("float32"), seed=9)
    with pytest.warns(UserWarning, match="is rounded to"):
        optimizer.load_state_dict(source.state_dict())
    assert optimizer.state[params[0]]["square_avg"] is kept
    wanted = converted(source.state[source.param_groups[0]["params"][0]]["square_avg"], kept.dtype)
    assert torch.equal(kept, wanted)
    with pytest.warns(UserWarning, match="replaces"):  # slots that the state lacks start fresh, in place
        optimizer.load_state_dict(RMSprop(network(), lr=0.5, eps=1.0).state_dict())
    assert optimizer.state[params[0]]["square_avg"] is kept
    assert not kept.any()


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_shared_state_is_never_converted_to_another_precision(before, after):
    """The other processes would keep the tensors of before: the load is refused, and nothing has changed."""
    params = network()
    for p in params:
        p.share_memory_()
    optimizer = train(build(before, params).share_memory())
    kept = {name: (x, x.clone()) for name, x in optimizer.state[params[0]].items() if isinstance(x, torch.Tensor)}
    saved = optimizer.state_dict(full_precision=True)
    optimizer.param_groups[0]["state_dtype"] = after
    with pytest.raises(RuntimeError, match=f"shared memory, but state_dtype='{after}' needs .*set state_dtype back"):
        optimizer.load_state_dict(saved)
    for name, (x, value) in kept.items():
        assert optimizer.state[params[0]][name] is x
        assert torch.equal(x, value)
    optimizer.param_groups[0]["state_dtype"] = before
    train(optimizer, 1)


@pytest.mark.parametrize("state_dtype", STATES)
def test_capturable_state_is_loaded_in_place_and_exported_as_copies(state_dtype):
    """A captured graph reads the same bytes; a state dict of either precision is not written by later loads."""
    optimizer = train(build(state_dtype, capturable=True))
    p = optimizer.param_groups[0]["params"][0]
    kept, saved, full = (
        optimizer.state[p]["square_avg"],
        optimizer.state_dict(),
        optimizer.state_dict(full_precision=True),
    )
    before = saved["state"][0]["square_avg"].clone()
    with pytest.warns(UserWarning, match="is rounded to"):
        optimizer.load_state_dict(train(build("float32"), seed=9).state_dict(), hparams="keep")
    assert optimizer.state[p]["square_avg"] is kept
    assert not torch.equal(kept, before)
    assert torch.equal(saved["state"][0]["square_avg"], before)
    assert torch.equal(full["state"][0]["square_avg"], widened(before, torch.float32))


@pytest.mark.parametrize("state_dtype", STATES)
def test_stepping_in_backward_keeps_the_same_bits(state_dtype):
    """Parameters that move during backward() have the bits of a step after it, and so has their state."""
    settings = {"lr": 0.01, "momentum": 0.9, "state_dtype": state_dtype, "seed": 4}
    ends = []
    for inside in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        optimizer = step_in_backward(model, **settings) if inside else RMSprop(model.named_parameters(), **settings)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
        ends.append((optimizer.state_dict(), optimizer.state_dict(full_precision=True), list(model.parameters())))
    for one, other in zip(ends[0][:2], ends[1][:2], strict=True):
        assert_same(one["state"], other["state"])
    assert all(torch.equal(p, q) for p, q in zip(ends[0][2], ends[1][2], strict=True))


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_the_function_steps_explicit_state_of_each_precision(state_dtype):
    """As the class does, with its seed; state of another precision is refused by the name of its slot."""
    optimizer = build(state_dtype, seed=6)
    params = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    slots = {
        name: [torch.zeros_like(p, dtype=slot_dtype(name, p.dtype, state_dtype)) for p in params]
        for name in ("square_avg", "grad_avg", "momentum_buffer")
    }
    steps = [torch.tensor(0.0) for _ in params]
    settings = dict(lr=0.01, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.9, centered=True)

    def step(grads, **more):
        rmsprop(params, grads, *slots.values(), steps, **settings, **{"state_dtype": state_dtype, "seed": 6, **more})

    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        grads = [torch.randn(p.shape, generator=generator) for p in params]
        for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        step(grads)
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        assert torch.equal(p, params[i])
        assert all(torch.equal(optimizer.state[p][name], values[i]) for name, values in slots.items())
    for other in STATE_DTYPES:
        if other != state_dtype and (state_dtype, other) != ("bfloat16", "float32"):
            with pytest.raises(ValueError, match=r"the square_avg of params\[0\] is .* but state_dtype='" + other):
                step(grads, state_dtype=other)
    with pytest.raises(ValueError, match="differentiable=True"):
        step(grads, differentiable=True, state_dtype="float8")


@pytest.mark.parametrize("state_dtype", STATES)
def test_a_run_is_resumed_from_one_file_to_the_last_bit(state_dtype, tmp_path):
    """rmsprop.checkpoint keeps bytes as bytes, and converts into another precision as load_state_dict does."""
    optimizer = train(build(state_dtype))
    checkpoint.save(tmp_path / "run", optimizer=optimizer)
    same, wide = build(state_dtype), build("float32")
    checkpoint.load(tmp_path / "run", optimizer=same)
    checkpoint.load(tmp_path / "run", optimizer=wide)
    assert_same(same.state_dict()["state"], optimizer.state_dict()["state"])
    assert_same(numbers(wide), numbers(optimizer))
