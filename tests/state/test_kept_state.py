"""State dicts that somebody keeps, what a load may bring, and optimizers that still step after it."""

import copy
import time
import warnings

import pytest
import torch
from torch import nn

from rmsprop import RMSprop

EVERYTHING = dict(momentum=0.9, centered=True)


def begun(dtype=torch.float32, names="ab", **settings):
    """An optimizer after a step."""
    params = [(name, nn.Parameter(torch.ones(2, 3, dtype=dtype))) for name in names]
    return step(RMSprop(params, **settings))


def step(optimizer, size=0.5):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, size)
    optimizer.step()
    return optimizer


def as_numbers(state_dict):
    """A state dict, with its tensors as numbers."""
    state = {key: {name: value.tolist() for name, value in own.items()} for key, own in state_dict["state"].items()}
    groups = [
        {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return state, groups


KINDS = {
    "plain": {},
    "everything": EVERYTHING,
    "capturable": {"capturable": True, **EVERYTHING},
    "tensor-lr": {"lr": torch.tensor(0.25)},
    "capturable-tensor-lr": {"lr": torch.tensor(0.25), "capturable": True},
    "compensation": {"compensation": True, "dtype": torch.bfloat16},
    "complex": {"dtype": torch.complex64, **EVERYTHING},
    "float64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", ["", "by share_memory()", "by hand"])
def test_a_state_dict_that_somebody_keeps_is_not_changed_by_a_load(kind, shared):
    """Load another, and the kept one is what it was, and goes back; steps on the way change it at most as torch's."""
    settings = dict(KINDS[kind])
    if "lr" in settings:
        settings["lr"] = settings["lr"].clone()
    optimizer = begun(**settings)
    if shared == "by share_memory()":
        for p in optimizer.param_groups[0]["params"]:
            p.grad = None
            p.share_memory_()
        optimizer.share_memory()
    elif shared:
        for entry in optimizer.state.values():
            entry["square_avg"].share_memory_()
    if "lr" in settings:
        settings["lr"] = torch.tensor(0.125)
    other = copy.deepcopy(step(begun(**settings), size=3.0).state_dict())
    kept = optimizer.state_dict()
    before = copy.deepcopy(as_numbers(kept))
    optimizer.load_state_dict(other, hparams="load")
    assert as_numbers(kept) == before
    assert as_numbers(optimizer.state_dict())[0] == as_numbers(other)[0]
    optimizer.load_state_dict(kept, hparams="load")
    assert as_numbers(optimizer.state_dict()) == before
    assert as_numbers(other) != before
    other_before = copy.deepcopy(as_numbers(other))
    optimizer.load_state_dict(other, hparams="load")
    step(optimizer)
    assert as_numbers(other) == other_before, "a step after a load writes into what was given"


@pytest.mark.parametrize("partial", ["missing", "reshaped"])
def test_a_kept_state_dict_survives_a_partial_load(partial):
    """Also the entries of parameters that the load leaves alone."""
    optimizer = begun()
    other = copy.deepcopy(step(begun(), 3.0).state_dict())
    if partial == "missing":
        other["param_groups"][0]["param_names"] = ["a", "z"]
    else:
        other["state"][1]["square_avg"] = torch.ones(5)
    kept = optimizer.state_dict()
    before = copy.deepcopy(as_numbers(kept))
    optimizer.load_state_dict(other, strict=False)
    assert as_numbers(kept) == before


def test_state_is_not_shared_between_two_optimizers_of_one_state_dict():
    """Two that load one dict step apart, and it stays."""
    source = copy.deepcopy(begun(**EVERYTHING).state_dict())
    before = copy.deepcopy(as_numbers(source))
    one, two = (begun(**EVERYTHING) for _ in range(2))
    for optimizer in (one, two):
        optimizer.load_state_dict(source)
    step(one)
    assert as_numbers(source) == before
    assert as_numbers(two.state_dict())[0] == before[0]


@pytest.mark.parametrize("strides", ["expanded", "transposed", "sliced"])
def test_loaded_state_has_places_of_its_own_for_every_element(strides):
    """Whatever the layout in the dict: in the parameter's layout, and a step agrees with one from a plain dict."""
    kept = copy.deepcopy(begun().state_dict())
    value = torch.rand(2, 1).expand(2, 3) if strides == "expanded" else torch.rand(3, 2).T
    value = torch.rand(2, 6)[:, ::2] if strides == "sliced" else value
    ends = []
    for own in (value, value.contiguous()):
        kept["state"][0]["square_avg"] = own
        optimizer = begun()
        optimizer.load_state_dict(kept)
        p = optimizer.param_groups[0]["params"][0]
        assert optimizer.state[p]["square_avg"].stride() == p.stride()
        step(optimizer)
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


def test_inference_mode_loads_ordinary_state():
    """State that was loaded inside torch.inference_mode() can be stepped outside of it."""
    kept = copy.deepcopy(begun(**EVERYTHING).state_dict())
    optimizer = RMSprop([("a", nn.Parameter(torch.ones(2, 3))), ("b", nn.Parameter(torch.ones(2, 3)))], **EVERYTHING)
    with torch.inference_mode():
        optimizer.load_state_dict(kept)
    step(optimizer)


# --- what a load may bring -----------------------------------------------------------------------


def nested(kind, depth=60):
    """A value that is small, and endless when it is hashed, compared or printed whole."""
    value = ()
    for _ in range(depth):
        value = kind((value, value)) if kind is not dict else {"a": value, "b": value}
    return value


@pytest.mark.parametrize("kind", [tuple, list, dict])
@pytest.mark.parametrize("name", ["dialect", "lr", "betas", "eps_mode", "seed", "note", "initial_lr", "rounding"])
def test_nested_settings_and_notes_are_refused_at_once(kind, name):
    """Type and size come before hash, comparison, copy and message, which is short; nothing has changed."""
    kept = copy.deepcopy(begun().state_dict())
    kept["param_groups"][0][name] = nested(kind)
    optimizer = begun()
    before = as_numbers(optimizer.state_dict())
    start = time.process_time()
    with pytest.raises((ValueError, TypeError)) as error:
        optimizer.load_state_dict(kept)
    assert time.process_time() - start < 1
    assert name in str(error.value)
    assert len(str(error.value)) < 300
    assert as_numbers(optimizer.state_dict()) == before


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("slot", nested(list)),
        ("slot", [0] * 200_000),
        ("step", nested(tuple)),
        ("step", "9" * 10**6),
        ("step", 10**5000),
        ("square_avg", nested(list)),
        ("momentum_buffer", "x" * 10**6),
    ],
    ids=range(7),
)
def test_nested_state_is_refused_at_once(place, value):
    """The same of a parameter's entry."""
    kept = copy.deepcopy(begun(momentum=0.9).state_dict())
    kept["state"][0][place] = value
    optimizer = begun(momentum=0.9)
    before = as_numbers(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"{place} of parameter 'a'") as error:
        optimizer.load_state_dict(kept)
    assert len(str(error.value)) < 400
    assert as_numbers(optimizer.state_dict()) == before


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, 10**5000, b"x" * 10**6, object(), complex(1, 2), [1.0]],
    ids=["str", "int", "bytes", "object", "complex", "list"],
)
@pytest.mark.parametrize(
    "name", ["dialect", "lr", "alpha", "eps_mode", "centered", "fused", "reference_lr", "sparse"]
)
def test_settings_of_no_settings_kind_are_refused_in_a_short_sentence(name, value):
    """At most 80 characters of the value."""
    kept = copy.deepcopy(begun().state_dict())
    kept["param_groups"][0][name] = value
    with pytest.raises((ValueError, TypeError), match=name) as error:
        begun().load_state_dict(kept)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("key", ["x" * 10**6, 10**5000], ids=["str", "int"])
def test_long_keys_are_shown_short(key):
    """Of state that belongs to no parameter, of slots, and of groups."""
    for edit in (
        lambda kept: kept["state"].update({key: kept["state"].pop(0)}),
        lambda kept: kept["state"][0].update({key: nested(list)}),
        lambda kept: kept["state"][0].pop("square_avg") is None or kept["state"][0].update({key: 1}),
        lambda kept: kept["param_groups"][0].update({key: nested(list)}),
        lambda kept: kept["param_groups"][0]["params"].__setitem__(0, key),
    ):
        kept = copy.deepcopy(begun().state_dict())
        del kept["param_groups"][0]["param_names"]
        edit(kept)
        with pytest.raises(ValueError, match="loaded state dict") as error:
            begun().load_state_dict(kept)
        assert len(str(error.value)) < 700


def test_notes_of_a_trainer_come_along():
    """Lists, dicts and tensors of any ordinary size."""
    kept = copy.deepcopy(begun().state_dict())
    note = {"names": [f"layer{i}" for i in range(1000)], "table": torch.arange(4), "deep": [[[1], 2], {"a": (3,)}]}
    kept["param_groups"][0]["note"] = note
    optimizer = begun()
    optimizer.load_state_dict(kept)
    assert optimizer.param_groups[0]["note"]["names"] == note["names"]
    assert optimizer.param_groups[0]["note"]["table"] is not note["table"]


DTYPES = ("float4_e2m1fn_x2", "bits8", "uint4")


@pytest.mark.parametrize("name", [name for name in DTYPES if hasattr(torch, name)])
@pytest.mark.parametrize("slot", ["square_avg", "momentum_buffer", "step", "other"])
@pytest.mark.parametrize("settings", [{}, {"capturable": True}], ids=["plain", "capturable"])
def test_a_slot_that_cannot_be_copied_changes_nothing(name, slot, settings):
    """One sentence before the first tensor is written; or the slot is carried along, where that works."""
    kept = copy.deepcopy(step(begun(momentum=0.9, **settings), 3.0).state_dict())
    dtype = getattr(torch, name)
    kept["state"][1][slot] = torch.empty(() if slot == "step" else (2, 3), dtype=dtype)
    optimizer = begun(momentum=0.9, **settings)
    before = as_numbers(optimizer.state_dict())
    try:
        optimizer.load_state_dict(kept)
    except ValueError as error:
        assert "parameter 'b'" in str(error)  # noqa: PT017
        assert as_numbers(optimizer.state_dict()) == before
    else:
        assert slot == "other"
        step(optimizer)


@pytest.mark.parametrize("slot", ["square_avg", "momentum_buffer", "grad_avg"])
@pytest.mark.parametrize("kind", ["int64", "bool", "complex64", "nested", "sparse", "quantized", "meta"])
def test_slots_of_another_kind_are_refused_by_name(slot, kind):
    """Whole numbers, switches, pairs and tensors without a shape are no average."""
    kept = copy.deepcopy(begun(**EVERYTHING).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = {
            "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]),
            "sparse": lambda: torch.ones(2, 3).to_sparse(),
            "quantized": lambda: torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.quint8),
            "meta": lambda: torch.ones(2, 3, device="meta"),
        }.get(kind, lambda: torch.ones(2, 3).to(getattr(torch, kind)))()
        kept["state"][1][slot] = value
        optimizer = begun(**EVERYTHING)
        before = as_numbers(optimizer.state_dict())
        with pytest.raises(ValueError, match=f"{slot} of parameter 'b'"):
            optimizer.load_state_dict(kept)
    assert as_numbers(optimizer.state_dict()) == before


@pytest.mark.parametrize(
    "count", [torch.tensor(7), torch.tensor([7.0]), 7, 7.0, torch.tensor(7, dtype=torch.int32)], ids=range(5)
)
@pytest.mark.parametrize("capturable", [False, True])
def test_a_count_of_any_kind_becomes_one_that_counts(count, capturable):
    """Whole numbers too: the next step is the eighth."""
    kept = copy.deepcopy(begun(capturable=capturable).state_dict())
    kept["state"][0]["step"] = count
    optimizer = begun(capturable=capturable)
    optimizer.load_state_dict(kept)
    p = optimizer.param_groups[0]["params"][0]
    step(optimizer)
    assert optimizer.state[p]["step"] == 8
    assert optimizer.state[p]["step"].dtype == torch.float64


# --- what steps once steps on --------------------------------------------------------------------


@pytest.mark.parametrize("lr", [-0.1, -1, torch.tensor(-0.1)])
def test_what_was_saved_is_loaded_also_below_zero(lr):
    """A schedule may take lr below 0, where a run cannot begin and goes on."""
    run = begun(lr=torch.tensor(0.1) if isinstance(lr, torch.Tensor) else 0.1)
    if isinstance(lr, torch.Tensor):
        run.param_groups[0]["lr"].copy_(lr)
    else:
        run.param_groups[0]["lr"] = lr
    step(run)
    kept = copy.deepcopy(run.state_dict())
    optimizer = begun()
    optimizer.load_state_dict(kept)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(float(lr))
    step(optimizer)
    with pytest.raises(ValueError, match="lr"):
        RMSprop([nn.Parameter(torch.ones(2))], lr=lr)


def test_an_optimizer_steps_after_a_partial_load_that_ends_compensation():
    """What is left keeps its state, but not a remainder that the loaded settings do not go on from."""
    optimizer = begun(torch.bfloat16, compensation=True)
    other = copy.deepcopy(begun(torch.bfloat16, names="az").state_dict())
    optimizer.load_state_dict(other, strict=False, hparams="load")
    left = optimizer.param_groups[0]["params"][1]
    assert "square_avg" in optimizer.state[left]
    step(optimizer)
    assert optimizer.state[left]["step"] == 2


@pytest.mark.parametrize("strict", [True, False])
def test_an_optimizer_in_shared_memory_steps_after_a_load_that_brings_slots(strict):
    """Momentum and centering that the loaded settings turn on have their slots in shared memory at once."""
    optimizer = begun()
    for p in optimizer.param_groups[0]["params"]:
        p.grad = None
        p.share_memory_()
    optimizer.share_memory()
    other = copy.deepcopy(begun(names="ab" if strict else "az", **EVERYTHING).state_dict())
    for entry in other["state"].values():
        del entry["momentum_buffer"]
    optimizer.load_state_dict(other, strict=strict, hparams="load")
    step(optimizer)
    for entry in optimizer.state.values():
        assert set(entry) == {"step", "square_avg", "grad_avg", "momentum_buffer"}
        assert all(value.is_shared() for value in entry.values())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("here", "there", "says"),
    [
        ({"backend": "cpu"}, {"differentiable": True}, "differentiable"),
        ({"amp_in_step": True, "capturable": True}, {"capturable": False}, "amp_in_step=True"),
    ],
)
def test_settings_under_which_no_step_runs_are_refused(here, there, says, strict):
    """As by the constructor; the optimizer keeps on stepping, and may keep its own settings."""
    optimizer = begun(**here)
    other = copy.deepcopy(begun().state_dict())
    other["param_groups"][0] |= there
    with pytest.raises(ValueError, match=rf"group 0 .*cannot step in this optimizer: .*{says}.*hparams='keep'"):
        optimizer.load_state_dict(other, strict=strict)
    step(optimizer)
    optimizer.load_state_dict(other, strict=strict, hparams="keep")
    step(optimizer)


def test_state_of_a_parameter_that_was_replaced_is_named_by_state_dict():
    """One sentence says what to write, and both ways work."""
    optimizer = begun()
    group = optimizer.param_groups[0]
    old, new = group["params"][0], nn.Parameter(torch.ones(2, 3))
    group["params"][0] = new
    with pytest.raises(ValueError, match=r"of 1 parameters that no group lists any more.*state.pop\(old\)"):
        optimizer.state_dict()
    optimizer.state[new] = optimizer.state.pop(old)
    assert list(optimizer.state_dict()["state"]) == [1, 0]
    del optimizer.state[new]
    assert list(optimizer.state_dict()["state"]) == [1]
