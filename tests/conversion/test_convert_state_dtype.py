"""Files and state whose averages are kept in fewer bytes: read as numbers, and never as codes."""

import copy
import importlib.util
import tracemalloc

import numpy as np
import pytest
import torch
from allocated import peak
from narrowed import STATES
from torch import nn

from rmsprop import RMSprop, checkpoint, convert, reference
from rmsprop.conversion import Unreadable
from rmsprop.conversion.file import prepare, read_checkpoint, recognize, write
from rmsprop.inspection.checkpoint import inspect
from rmsprop.spec import STATE_DTYPES
from rmsprop.tensors.float8 import to_float8, widened

SAFETENSORS = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed"
)


def trained(state_dtype, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    settings = {"lr": 0.01, "momentum": 0.9, "centered": True, "backend": "eager", **settings}
    optimizer = RMSprop(model.named_parameters(), **settings, state_dtype=state_dtype)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return model, optimizer


def saved(tmp_path, state_dtype, edit=None, **settings):
    model, optimizer = trained(state_dtype, **settings)
    state_dict = copy.deepcopy(optimizer.state_dict())
    if edit is not None:
        edit(state_dict)
    path = tmp_path / f"{state_dtype}.pt"
    torch.save({"model": model.state_dict(), "optimizer": state_dict}, path)
    return path, model, optimizer


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_a_file_of_this_package_is_read_as_numbers(state_dtype, tmp_path):
    """Every slot in float32, with a note; what the group says of memory is reported, and not written."""
    path, model, optimizer = saved(tmp_path, state_dtype)
    held = read_checkpoint(path)
    for (name, p), key in zip(model.named_parameters(), held.slots, strict=True):
        assert key == name
        for slot in ("square_avg", "grad_avg", "momentum_buffer"):
            found = held.slots[name][slot]
            assert found.dtype == np.float32
            assert np.array_equal(found, widened(optimizer.state[p][slot], torch.float32).numpy())
    notes = " ".join(held.notes)
    assert ("state_dtype='float8' is widened from one byte to float32" in notes) is (state_dtype == "float8")
    assert (f"state_dtype='{state_dtype}' is dropped: pass it" in notes) is (state_dtype != "float32")


@pytest.mark.parametrize("suffix", [".pt", pytest.param(".safetensors", marks=SAFETENSORS)])
@pytest.mark.parametrize("state_dtype", STATES)
def test_a_converted_file_is_float32_and_continues_in_any_precision(state_dtype, suffix, tmp_path):
    """For torch's optimizer, and back into an optimizer of the same state_dtype, to the last bit."""
    path, model, optimizer = saved(tmp_path, state_dtype)
    out = tmp_path / f"out{suffix}"
    made = prepare(path, "torch" if suffix == ".pt" else "rmsprop")
    write(made, out)
    assert recognize(out).name == ("torch" if suffix == ".pt" else "safetensors")
    again = read_checkpoint(out)
    if suffix == ".pt":
        theirs = torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.9, centered=True)
        theirs.load_state_dict(torch.load(out)["optimizer"])
        same = RMSprop(model.named_parameters(), state_dtype=state_dtype, lr=0.01, momentum=0.9, centered=True)
        same.load_state_dict(torch.load(out)["optimizer"])
        for p in model.parameters():
            wide = widened(optimizer.state[p]["square_avg"], torch.float32)
            assert torch.equal(theirs.state[p]["square_avg"], wide)
            assert torch.equal(same.state[p]["square_avg"], optimizer.state[p]["square_avg"])
    for name, p in model.named_parameters():
        wide = widened(optimizer.state[p]["square_avg"], torch.float32).numpy()
        assert np.array_equal(again.slots[name]["square_avg"], wide)


def test_inspection_is_that_of_the_numbers(tmp_path):
    """The table of a float8 file is that of its float32 export."""
    path, model, optimizer = saved(tmp_path, "float8")
    full = tmp_path / "full.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(full_precision=True)}, full)
    assert inspect(path).rows == inspect(full).rows


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s["param_groups"][0].update(state_dtype="float32"), "has state_dtype='float32'"),
        (lambda s: s["param_groups"][0].pop("state_dtype"), "has state_dtype='float32'"),
        (lambda s: s["param_groups"][0].update(state_dtype=8), "has state_dtype=8"),
        (lambda s: s["state"][0].update(square_avg=s["state"][0]["square_avg"].float()), "is float32 and not uint8"),
        (lambda s: s["state"][0].update(grad_avg=s["state"][0]["grad_avg"].to(torch.uint8)), "is uint8, codes whose"),
    ],
)
def test_codes_that_the_group_does_not_explain_are_refused(edit, message, tmp_path):
    """Nothing is guessed: neither codes taken for numbers nor the reverse."""
    path, *_ = saved(tmp_path, "float8", edit)
    with pytest.raises(Unreadable, match=message):
        read_checkpoint(path)


def test_a_large_file_of_codes_is_read_within_the_bound_on_memory(tmp_path):
    """Ten times the file, as SECURITY.md has it, where a number takes four bytes of a code's one."""

    def read(path):
        found = []
        tracemalloc.start()
        own = peak(lambda: found.append(read_checkpoint(path)))
        own, _ = own + tracemalloc.get_traced_memory()[1], tracemalloc.stop()
        assert own < 10 * path.stat().st_size
        return found[0]

    p = nn.Parameter(torch.zeros(3000, 500))
    optimizer = RMSprop([p], state_dtype="float8")
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "ours.pt")
    assert len(read(tmp_path / "ours.pt").slots) == 1
    entry = {
        "step": 3,
        "state1": torch.full((3000, 500), 255, dtype=torch.uint8),
        "qmap1": torch.linspace(0, 1, 256),
        "absmax1": torch.ones(-(-1_500_000 // 256)),
    }
    group = {"params": [0], "lr": 0.01, "betas": (0.9, 0.0), "eps": 1e-8, "weight_decay": 0.0}
    torch.save({"state": {0: entry}, "param_groups": [group]}, tmp_path / "theirs.pt")
    held = read(tmp_path / "theirs.pt")
    (slots,) = held.slots.values()
    assert (slots["state1"] == 1).all()


def test_bitsandbytes_codes_continue_in_one_byte(tmp_path):
    """Dequantized by their tables into float32, and from there into the optimizer's own state_dtype."""
    from paths import CHECKPOINTS

    write(prepare(CHECKPOINTS / "bnb_rmsprop8.pt", "rmsprop"), tmp_path / "ours.pt")
    whole = torch.load(tmp_path / "ours.pt")
    params = [nn.Parameter(torch.zeros(entry["square_avg"].shape)) for entry in whole["optimizer"]["state"].values()]
    optimizer = RMSprop(params, state_dtype="float8", dialect="bitsandbytes")
    with pytest.warns(UserWarning, match="is rounded to state_dtype='float8'"):
        optimizer.load_state_dict(whole["optimizer"], match="order")
    for p, entry in zip(params, whole["optimizer"]["state"].values(), strict=True):
        assert entry["square_avg"].dtype == torch.float32
        assert torch.equal(optimizer.state[p]["square_avg"], to_float8(entry["square_avg"]))


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float8"])
def test_state_in_memory_is_converted_as_numbers(state_dtype):
    """What an optimizer holds: codes to float32, and bfloat16 stays; to TensorFlow, as from its float32 export."""
    _, optimizer = trained(state_dtype, centered=False)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    narrow = convert(optimizer.state_dict()["state"], "torch", "tensorflow1", lr=0.01)
    wide = convert(optimizer.state_dict(full_precision=True)["state"], "torch", "tensorflow1", lr=0.01)
    for key, entry in narrow.state.items():
        for name, value in entry.items():
            assert value.dtype == (torch.float32 if state_dtype == "float8" else torch.bfloat16)
            assert torch.equal(value, wide.state[key][name].to(value.dtype))
    for key, entry in before.items():
        assert all(torch.equal(x, optimizer.state_dict()["state"][key][name]) for name, x in entry.items())


def test_codes_in_numpy_are_read_too_and_bitsandbytes_are_refused():
    """The numbers are the reference's; codes with tables of their own are not ours."""
    codes = np.arange(254, dtype=np.uint8)
    state, _ = convert({"square_avg": codes}, "torch", "torch")
    assert np.array_equal(state["square_avg"], reference.from_float8(codes).astype(np.float32))
    with pytest.raises(ValueError, match="depend on qmap1 and absmax1"):
        convert({"state1": torch.from_numpy(codes)}, "bitsandbytes", "torch")


class Device:
    """An array of another library, such as JAX."""

    def __init__(self, array):
        self.array, self.dtype, self.shape, self.ndim = array, array.dtype, array.shape, array.ndim

    def __array__(self, dtype=None, copy=None):
        return self.array if dtype is None else self.array.astype(dtype)


def test_codes_of_another_library_are_read_as_numpys():
    """Whatever gives NumPy its numbers."""
    codes = np.arange(254, dtype=np.uint8).reshape(2, 127)
    state, _ = convert({"square_avg": Device(codes)}, "torch", "torch")
    assert np.array_equal(state["square_avg"], reference.from_float8(codes).astype(np.float32))


@pytest.mark.parametrize(
    ("dialect", "name"), [("keras3", "velocity"), ("optax", "nu"), ("tensorflow1", "rms"), ("mxnet1", "n")]
)
def test_integers_in_the_place_of_another_frameworks_average_are_refused(dialect, name):
    """No other framework keeps codes there, so that they would be taken for numbers they are not."""
    codes = {name: np.arange(6, dtype=np.uint8)}
    with pytest.raises(ValueError, match=f"{name} is uint8, but {dialect} keeps numbers there.*give the numbers"):
        convert(codes, dialect, "torch")


def test_a_whole_run_is_refused_with_what_would_work(tmp_path):
    """A file of rmsprop.checkpoint is neither a model nor an optimizer's state; the sentence's call makes one."""
    model, optimizer = trained("float8")
    path = checkpoint.save(tmp_path / "run.safetensors", model=model, optimizer=optimizer, step=3)
    with pytest.raises(Unreadable, match=r"run\.safetensors is a whole run, saved by rmsprop.checkpoint"):
        read_checkpoint(path)
    torch.save(checkpoint.load(path)["optimizer"], tmp_path / "optimizer.pt")
    assert len(inspect(tmp_path / "optimizer.pt").rows) == 4
