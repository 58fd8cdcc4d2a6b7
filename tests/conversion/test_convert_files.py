"""Recorded checkpoints of real frameworks continue here as they did there, and convert back; damage is refused."""

import json
import pickle
import re
import shlex
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from cases import mostly_long
from commands import invoke
from paths import CHECKPOINTS
from saved import resaved

from rmsprop import DIALECTS, RMSprop
from rmsprop.conversion import Checkpoint, Unreadable
from rmsprop.conversion.file import prepare, read_checkpoint, write
from rmsprop.conversion.formats import FORMATS
from rmsprop.conversion.layout import Map, plan, read_map, torch_name, turn, turn_back
from rmsprop.conversion.owner import find_owner

HERE = CHECKPOINTS
sys.path.insert(0, str(HERE))
import inputs  # noqa: E402

TORCH = ("torch_rmsprop", "torch_rmsprop_centered", "torch_rmsprop_bare", "torch_rmsprop_named", "timm_rmsproptf")
TORCH += ("timm_rmsproptfc", "sb3_rmsproptflike", "bnb_rmsprop32")


# What only its own framework reads -> the same run in a file that is read here.
REFUSED = {
    "mxnet_rmsprop": "mxnet_rmsprop.nd",
    "mxnet_rmsprop_centered": "mxnet_rmsprop_centered.nd",
    "optax_orbax_standard": "optax_rmsprop.state.npz",
}


def record(name):
    """Return the record beside a checkpoint: its description, and the parameters at the save and at the end."""
    with np.load(HERE / f"{name}.npz") as held:
        arrays = {key: held[key] for key in held.files if key != "description"}
        said = json.loads(str(held["description"]))
    parts = {
        part: {k.split("/", 1)[1]: v for k, v in arrays.items() if k.startswith(part)} for part in ("saved", "final")
    }
    return said, parts["saved"], parts["final"]


def shapes_file(folder, table=False):
    """Write a state dict of the small net, for --model."""
    path = folder / "shapes.pt"
    torch.save({name: torch.zeros(shape) for name, shape in inputs.shapes(table).items()}, path)
    return path


def go_on(optimizer, params, steps=range(inputs.SAVED_AT, inputs.STEPS)):
    """Step on the recorded gradients, at the recorded learning rates."""
    gradients = inputs.gradients(table="table.weight" in params)
    for at in steps:
        for group in optimizer.param_groups:
            group["lr"] = inputs.LRS[at]
        for name, param in params.items():
            param.grad = torch.from_numpy(gradients[at][name].copy())
        optimizer.step()


def load(path, saved, make=None):
    """Return the parameters of a written .pt, and an optimizer that has loaded its state dict."""
    whole = torch.load(path, weights_only=True)
    values = whole["model"] or {name: torch.from_numpy(value) for name, value in saved.items()}
    params = {name: torch.nn.Parameter(values[name].clone()) for name in saved}
    (group,) = whole["optimizer"]["param_groups"]
    switches = ("eps_mode", "lr_in_buffer", "bias_correction", "weight_decay_mode")
    words = {name: group[name] for name in switches if name in group}
    if make is None:
        optimizer = RMSprop(params.items(), lr=0.1, dialect=group["dialect"], **words)
    else:
        optimizer = make(list(params.values()))
    chosen = {"hparams": "load"} if make is None else {}  # torch's own classes know no other
    optimizer.load_state_dict(whole["optimizer"], **chosen)
    return params, optimizer


def assert_ends_at(params, final, rtol=1e-5):
    """Assert that every element is within the tolerance of the framework's result."""
    for name, value in final.items():
        np.testing.assert_allclose(params[name].detach().numpy(), value, rtol=rtol, err_msg=name)


def readable():
    """Yield the recorded checkpoints that some format reads."""
    for path in sorted(HERE.glob("*.npz")):
        with np.load(path) as held:
            if "description" not in held.files:
                continue
            said = json.loads(str(held["description"]))
        if said["dialect"] not in ("adam", "adamw") and path.stem not in ("bnb_rmsprop8", *REFUSED):
            assert any(row.sniff(HERE / said["checkpoint"]) for row in FORMATS), path.stem
            yield path.stem


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_only_its_own_framework_reads_is_refused_with_what_to_do(name):
    """MXNet's pickles and Orbax's folders are refused in one sentence, with how to save a readable file."""
    said, _, _ = record(name)
    with pytest.raises(Unreadable, match="save"):
        read_checkpoint(HERE / said["checkpoint"])


@pytest.mark.parametrize("name", mostly_long([*readable(), *REFUSED], lambda i, _: i % 3 == 0))
def test_a_recorded_run_goes_on_as_it_went_on_there(name, tmp_path):
    """Ten more steps of the recorded gradients end where the framework ended, to 1e-5 of each parameter."""
    said, saved, final = record(name)
    source, out = HERE / REFUSED.get(name, said["checkpoint"]), tmp_path / "out.pt"
    before = source.read_bytes() if source.is_file() else None
    held = read_checkpoint(source, said["dialect"])
    row = DIALECTS[said["dialect"]]
    known = {row.arguments.get(word, word) for word in held.hyper}
    given = {word: value for word, value in said["words"].items() if row.arguments.get(word, word) not in known}
    model = shapes_file(tmp_path, "table.weight" in saved)
    made = prepare(source, source=said["dialect"], given=given, model=model)
    write(made, out)
    if not held.params:
        whole = torch.load(out, weights_only=True)
        torch.save({**whole, "model": {}}, out)
    params, optimizer = load(out, saved)
    for key, value in saved.items():
        np.testing.assert_array_equal(params[key].detach().numpy(), value, err_msg=key)
    go_on(optimizer, params)
    assert_ends_at(params, final)
    assert before is None or source.read_bytes() == before


@pytest.mark.parametrize("name", ["torch_rmsprop", "torch_rmsprop_centered", "torch_rmsprop_named"])
def test_torch_itself_goes_on_from_what_is_written_for_it(name, tmp_path):
    """From torch to here to torch: torch.optim.RMSprop ends, bit for bit, where it does from its own file."""
    _, saved, final = record(name)
    ours, theirs = tmp_path / "ours.pt", tmp_path / "theirs.pt"
    write(prepare(HERE / f"{name}.pt"), ours)
    write(prepare(ours, "torch"), theirs)
    params, optimizer = load(theirs, saved, lambda tensors: torch.optim.RMSprop(tensors, lr=0.1))
    own, first = load(HERE / f"{name}.pt", saved, lambda tensors: torch.optim.RMSprop(tensors, lr=0.1))
    for run in ((optimizer, params), (first, own)):
        go_on(*run)
    assert_ends_at(params, {name: p.detach().numpy() for name, p in own.items()}, rtol=0)
    assert_ends_at(params, final)


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("through", ["ours.pt", "ours.safetensors"])
def test_a_checkpoint_returns_to_its_framework_bit_for_bit(name, through, tmp_path):
    """From the framework to here and back, state, settings and parameters are unchanged."""
    said, _, _ = record(name)
    if through.endswith("safetensors") and said["dialect"] == "sb3":
        pytest.skip("one way through is enough for what is torch's state dict")
    path, middle, back = HERE / said["checkpoint"], tmp_path / through, tmp_path / "back.pt"
    out = next(row for row in FORMATS if middle.suffix in row.suffixes)
    write(prepare(path, source=said["dialect"], out=out), middle)
    write(prepare(middle, said["dialect"]), back)
    first, last = (read_checkpoint(file, said["dialect"]) for file in (path, back))
    assert list(first.slots) == list(last.slots)
    for key, slots in first.slots.items():
        assert slots.keys() == last.slots[key].keys()
        for slot, value in slots.items():
            np.testing.assert_array_equal(last.slots[key][slot], value, err_msg=f"{key} {slot}")
    for key, value in first.params.items():
        np.testing.assert_array_equal(last.params[key], value, err_msg=key)
    assert {k: v for k, v in last.hyper.items() if k in first.hyper} == first.hyper


def test_states_of_8_bits_are_multiplied_out_exactly_and_the_next_step_agrees(tmp_path):
    """v equals bitsandbytes' own dequantization, and its next step from there equals ours to 1e-6.

    From then on it rounds its states to 8 bits again at each step, and a run in float32 departs from it.
    """
    _, saved, _ = record("bnb_rmsprop8")
    held = read_checkpoint(HERE / "bnb_rmsprop8.pt")
    with np.load(HERE / "bnb_rmsprop8.states.npz") as states:
        for name, slots in held.slots.items():
            np.testing.assert_array_equal(slots["state1"], states[f"square_avg/{name}"])
    out = tmp_path / "out.pt"
    made = prepare(HERE / "bnb_rmsprop8.pt")
    assert any("8-bit states are dequantized" in sentence for sentence in made.report.assumed)
    write(made, out)
    params, optimizer = load(out, saved)
    go_on(optimizer, params, steps=[inputs.SAVED_AT])
    with np.load(HERE / "bnb_rmsprop8.next.npz") as after:
        assert_ends_at(params, {name: after[f"next/{name}"] for name in saved}, rtol=1e-6)


@pytest.mark.parametrize(("name", "mode"), [("torch_adam", "l2"), ("torch_adamw", "decoupled")])
def test_from_adam_the_first_step_divides_by_adams_own_root(name, mode, tmp_path):
    """(p − p')/lr = g/(√v̂ + ε) with Adam's v̂ of that step and its kind of decay; with --to torch, to a tenth."""
    _, saved, _ = record(name)
    whole = torch.load(HERE / f"{name}.pt", weights_only=True)
    gradient = inputs.gradients()[inputs.SAVED_AT]["fc.weight"].astype(np.float64)
    v = whole["optimizer"]["state"][2]["exp_avg_sq"].double().numpy()
    decay = whole["optimizer"]["param_groups"][0]["weight_decay"]
    start = saved["fc.weight"].astype(np.float64)
    v = (0.99 * v + 0.01 * gradient**2) / (1 - 0.99**21)
    expected = start * (1 - inputs.LR * decay) - inputs.LR * gradient / (np.sqrt(v) + 1e-8)
    for target, rtol in (("rmsprop", 1e-5), ("torch", 0.1)):
        out = tmp_path / f"{target}.pt"
        made = prepare(HERE / f"{name}.pt", target)
        write(made, out)
        assert any(sentence.startswith("exp_avg:") for sentence in made.report.dropped)
        if target == "rmsprop":
            params, optimizer = load(out, saved)
            assert optimizer.param_groups[0]["weight_decay_mode"] == mode
        else:
            assert any("1 − alphaᵗ" in sentence for sentence in made.report.approximate)
            params, optimizer = load(out, saved, lambda tensors: torch.optim.RMSprop(tensors, lr=0.1))
            if mode == "decoupled":
                assert any("weight_decay=0.01 is decoupled" in sentence for sentence in made.report.approximate)
                continue
        go_on(optimizer, params, steps=[inputs.SAVED_AT])
        moved = params["fc.weight"].detach().numpy()
        np.testing.assert_allclose(
            moved - start, expected - start, rtol=0, atol=rtol * np.abs(expected - start).max()
        )


def test_adams_first_moment_can_become_momentum_of_a_tenth_of_the_rate(tmp_path):
    """--set momentum=0.9 keeps exp_avg as a buffer, and writes lr·(1 − 0.9)."""
    out = tmp_path / "out.pt"
    made = prepare(HERE / "torch_adam.pt", given={"momentum": 0.9})
    write(made, out)
    whole = torch.load(out, weights_only=True)
    assert whole["optimizer"]["param_groups"][0]["lr"] == pytest.approx(inputs.LR * 0.1)
    assert "momentum_buffer" in whole["optimizer"]["state"][0]
    assert any("lr is 0.1 of Adam's" in sentence for sentence in made.report.approximate)


def test_stable_baselines3s_zip_is_read(tmp_path):
    """policy.pth and policy.optimizer.pth are read from the archive; the user names the rule."""
    _, saved, final = record("sb3_rmsproptflike")
    out = tmp_path / "out.pt"
    write(prepare(HERE / "sb3_rmsproptflike.zip", source="sb3"), out)
    params, optimizer = load(out, saved)
    go_on(optimizer, params)
    assert_ends_at(params, final)


def test_groups_keep_their_settings_and_their_order(tmp_path):
    """Two groups with different rates and decays stay two groups, with their parameters' names."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    groups = [
        {"params": [model[0].weight, model[1].weight], "weight_decay": 0.1},
        {"params": [model[0].bias, model[1].bias], "lr": 0.5},
    ]
    optimizer = torch.optim.RMSprop(groups, lr=0.25, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    names = [["0.weight", "1.weight"], ["0.bias", "1.bias"]]
    packed = optimizer.state_dict()
    for group, own in zip(packed["param_groups"], names, strict=True):
        group["param_names"] = own
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": packed}, path)
    write(prepare(path), out)
    whole = torch.load(out, weights_only=True)
    assert [group["param_names"] for group in whole["optimizer"]["param_groups"]] == names
    assert [group["lr"] for group in whole["optimizer"]["param_groups"]] == [0.25, 0.5]
    assert [group["weight_decay"] for group in whole["optimizer"]["param_groups"]] == [0.1, 0]
    ours = RMSprop(groups, lr=0.1)
    ours.load_state_dict(whole["optimizer"], hparams="load")
    for param in model.parameters():
        for slot in ("square_avg", "momentum_buffer"):
            assert torch.equal(ours.state[param][slot], optimizer.state[param][slot])


# --- names, layouts, maps --------------------------------------------------------------------------


def keras_like():
    """A checkpoint in TensorFlow's layouts, with a depthwise kernel whose multiplier is 2."""
    draw = np.random.default_rng(0)
    shapes = {"conv/kernel": (3, 3, 2, 4), "dw/depthwise_kernel": (3, 3, 2, 2), "fc/kernel": (6, 5), "fc/bias": (5,)}
    params = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    slots = {name: {"velocity": value**2, "momentum": value * 0.5} for name, value in params.items()}
    hyper = {"learning_rate": 0.1, "rho": 0.9, "epsilon": 1e-7, "momentum": 0.9}
    return Checkpoint(find_owner("keras3"), params, slots, 20, hyper)


def test_layouts_turn_by_rule_and_back():
    """HWIO becomes OIHW, HWIM (I·M, 1, H, W), and (in, out) (out, in); both directions are inverses."""
    held = keras_like()
    moves = {move.source: move for move in plan(held)}
    shapes = {name: move.shape for name, move in moves.items()}
    expected = [(4, 2, 3, 3), (4, 1, 3, 3), (5, 6), (5,)]
    assert list(shapes.values()) == expected
    assert [move.target for move in moves.values()] == ["conv.weight", "dw.weight", "fc.weight", "fc.bias"]
    for name, value in held.params.items():
        kind = moves[name].kind
        turned = turn(value, kind)
        assert turned.shape == shapes[name]
        np.testing.assert_array_equal(turn_back(turned, kind, channels=2), value)
    image = torch.randn(1, 2, 5, 5)
    kernel = held.params["dw/depthwise_kernel"]
    out = torch.nn.functional.conv2d(image, torch.from_numpy(turn(kernel, "depthwise")), groups=2)[0]
    for channel in range(2):
        for m in range(2):
            alone = torch.from_numpy(kernel[:, :, channel, m].copy())[None, None]
            one = torch.nn.functional.conv2d(image[:, channel : channel + 1], alone)[0, 0]
            torch.testing.assert_close(out[2 * channel + m], one, rtol=1e-5, atol=1e-5)


def test_layout_keep_turns_and_renames_nothing():
    """--layout keep changes neither layouts nor names."""
    held = keras_like()
    for move in plan(held, "keep"):
        assert (move.source, held.params[move.source].shape) == (move.target, move.shape)


@pytest.mark.parametrize(
    ("name", "ours"), [("a/kernel:0", "a.weight"), ("a/b/gamma", "a.b.weight"), ("bn/moving_mean", "bn.running_mean")]
)
def test_names_become_torchs(name, ours):
    """The last part of a name selects torch's name."""
    assert torch_name(name) == ours


def test_a_map_renames_and_transposes_over_the_rules(tmp_path):
    """[rename] and [transpose] take the file's names, axes or a kind; a mistake raises one sentence."""
    path = tmp_path / "map.toml"
    path.write_text(
        '[rename]\n"fc/kernel" = "head.weight"\n[transpose]\n"fc/kernel" = [0, 1]\n"conv/kernel" = "keep"\n'
    )
    moves = {move.source: move for move in plan(keras_like(), "torch", read_map(path))}
    assert (moves["fc/kernel"].target, moves["fc/kernel"].shape) == ("head.weight", (6, 5))
    assert moves["conv/kernel"].shape == (3, 3, 2, 4)
    for text, sentence in {
        "[rename": "cannot be read as TOML",
        "[names]\na = 'b'": "a map has the tables",
        "[rename]\na = 3": "takes a name in quotes",
        "[transpose]\na = [0, 0]": "takes a permutation",
        "[transpose]\na = 'sideways'": "takes a permutation",
    }.items():
        path.write_text(text)
        with pytest.raises(Unreadable, match=sentence):
            read_map(path)
    with pytest.raises(ValueError, match=r'names "nowhere", which the file does not hold'):
        plan(keras_like(), "torch", Map(rename={"nowhere": "x"}))
    with pytest.raises(ValueError, match="lists 2 axes; it has 4"):
        plan(keras_like(), "torch", Map(transpose={"conv/kernel": [0, 1]}))
    with pytest.raises(ValueError, match="two parameters would both be named"):
        plan(
            keras_like(),
            "torch",
            Map(rename={"conv/kernel": "x", "fc/kernel": "x"}),
            model=dict.fromkeys(("x", "dw.weight", "fc.bias"), (1,)),
        )


def test_a_model_gives_names_by_name_or_by_order_and_shapes_must_fit():
    """Names pair parameters if all match, else the order does; a shape that differs is reported."""
    held = keras_like()
    model = {
        "fc.bias": (5,),
        "fc.weight": (5, 6),
        "conv.weight": (4, 2, 3, 3),
        "dw.weight": (4, 1, 3, 3),
        "more": (2,),
    }
    assert [move.target for move in plan(held, model=model)] == list(model)[:4]
    other = {"a": (4, 2, 3, 3), "b": (4, 1, 3, 3), "c": (5, 6), "d": (5,)}
    first = plan(held, model=other)[0]
    assert (first.source, first.target) == ("conv/kernel", "a")
    with pytest.raises(
        ValueError, match=r"fc/kernel would become c with shape \(5, 6\), and the model's has \(6, 5\)"
    ):
        plan(held, model={**other, "c": (6, 5)})
    with pytest.raises(ValueError, match="the file has 4 parameters and the model 1"):
        plan(held, model={"a": (1,)})


# --- the command line ------------------------------------------------------------------------------


def test_the_command_converts_reports_and_never_touches_its_input(tmp_path):
    """OUT and the report are written, and IN is unchanged; without --force nothing is replaced."""
    source, out, report = HERE / "timm_rmsproptf.pt", tmp_path / "out.pt", tmp_path / "report.json"
    before = source.read_bytes()
    words = ("convert", str(source), str(out), "--to", "torch", "--report", str(report))
    code, text = invoke(*words)
    assert code == 0, text
    assert "approximate: eps=0.001 is inside the root" in text
    said = json.loads(report.read_text())
    assert (said["source"], said["target"], len(said["parameters"])) == ("timm", "torch", 4)
    assert said["exact"]
    assert source.read_bytes() == before
    code, text = invoke(*words)
    assert code == 2
    assert "exists; name another file, or add --force" in text
    assert invoke(*words, "--force")[0] == 0
    code, text = invoke("convert", str(out), str(out), "--force")
    assert code == 2
    assert "is the input, which is never changed" in text


def test_the_files_of_a_tensorflow_checkpoint_are_an_input_together(tmp_path):
    """Given by its prefix or its index, neither of its files is written to through a link, even with --force."""
    for part in (".index", ".data-00000-of-00001"):
        recorded = HERE / f"tensorflow1-momentum.ckpt-20{part}"
        (tmp_path / f"model{part}").write_bytes(recorded.read_bytes())
        (tmp_path / f"link{part}.pt").symlink_to(f"model{part}")
    words = {"learning_rate": 0.1, "decay": 0.9, "epsilon": 1e-10, "momentum": 0.9}
    for name in ("model", "model.index"):
        made = prepare(tmp_path / name, given=words)
        for part in (".index", ".data-00000-of-00001"):
            with pytest.raises(ValueError, match="is the input, which is never changed"):
                write(made, tmp_path / f"link{part}.pt", force=True, also_not=tmp_path / name)


@pytest.mark.parametrize(("out", "format"), [("x.index", "tensorflow"), ("x.nd", "mxnet"), ("x.params", "mxnet")])
def test_formats_that_are_only_read_are_refused_as_outputs(out, format, tmp_path):
    """The error names the format and the endings that are written."""
    code, text = invoke("convert", str(HERE / "torch_rmsprop.pt"), str(tmp_path / out), "--to", "tensorflow1")
    assert code == 2
    told = " ".join(text.replace("│", " ").split())
    assert f"{out}: {format} files are read and not written; there are .pt, .pth," in told
    assert ".keras, .weights.h5, .h5, .hdf5, .npz, .msgpack" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["chainer", "tensorflow1"])
def test_an_npz_is_written_for_optax_and_mxnet_only(target, tmp_path):
    """The error names both, and formats that hold the state of every dialect."""
    code, text = invoke("convert", str(HERE / "torch_rmsprop.pt"), str(tmp_path / "x.npz"), "--to", target)
    assert code == 2
    told = " ".join(text.replace("│", " ").split())
    assert f"an .npz is written for optax and MXNet, not for {target}; write a .pt or a .safetensors" in told
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_the_mapping_and_writes_nothing(tmp_path):
    """Each parameter is one line, with its shape."""
    out = tmp_path / "out.pt"
    code, text = invoke("convert", str(HERE / "torch_rmsprop.pt"), str(out), "--dry-run")
    assert code == 0
    assert "conv.weight -> conv.weight  (4, 2, 3, 3)" in text
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "OUT is missing"),
        (("out.pt", "--layout", "sideways"), "--layout takes torch or keep"),
        (("out.xyz",), "no format with that name is written here"),
        (("out.pt", "--set", "lr"), "is not a setting; write it as NAME=VALUE"),
        (("out.pt", "--set", "lr=1", "--set", "lr=2"), "is given twice"),
        (("out.pt", "--set", "rho=0.9"), "write alpha=... here"),
        (("out.pt", "--to", "keras9"), "Unknown dialect"),
        (("out.pt", "--from", "keras3"), "--from keras3 does not fit"),
        (("out.pt", "--model", "nowhere.pt"), "there is no file"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, tmp_path, monkeypatch):
    """The exit code is 2, the error states the mistake and what works, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    code, text = invoke("convert", str(HERE / "torch_rmsprop.pt"), *words)
    assert code == 2
    assert sentence in " ".join(text.replace("│", " ").split())
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


def test_settings_that_the_file_does_not_hold_are_asked_for_by_name(tmp_path):
    """The error lists options under the framework's names, ready to be typed."""
    path = tmp_path / "in.safetensors"
    held = keras_like()
    held.hyper = {"learning_rate": 0.1}
    next(row for row in FORMATS if row.name == "safetensors").write(path, held)
    with pytest.raises(
        ValueError, match=r"does not hold rho, epsilon, momentum, .* add --set rho=0\.9 --set epsilon=1e-7"
    ):
        prepare(path)
    made = prepare(path, given={"rho": 0.9, "epsilon": 1e-7, "momentum": 0.9})
    assert made.checkpoint.hyper["dialect"] == "keras3"


def test_the_commands_of_the_docs_work(tmp_path, monkeypatch):
    """Every command of docs/convert.md exits with 0, on checkpoints of the kinds that it names."""
    page = (HERE.parents[1] / "docs" / "convert.md").read_text(encoding="utf-8")
    files = {"model.keras": "keras3-momentum.keras", "timm.pth": "timm_rmsproptf.pt", "adam.pt": "torch_adam.pt"}
    files["state.npz"] = "optax_rmsprop.state.npz"
    for part in (".index", ".data-00000-of-00001"):
        files[f"model.ckpt-20{part}"] = f"tensorflow1-momentum.ckpt-20{part}"
    for name, recorded in files.items():
        (tmp_path / name).write_bytes((HERE / recorded).read_bytes())
    shapes_file(tmp_path).rename(tmp_path / "net.pt")
    one, two = (torch.load(HERE / f"torch_{name}.pt", weights_only=True) for name in ("rmsprop", "adam"))
    gan = {"generator": one["model"], "discriminator": two["model"]}
    torch.save({**gan, "optimizer_g": one["optimizer"], "optimizer_d": two["optimizer"]}, tmp_path / "gan.pt")
    (tmp_path / "map.toml").write_text(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^\$ rmsprop ((?:convert|inspect) .*)$", page, re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        code, text = invoke(*shlex.split(command))
        assert code == 0, f"{command}\n{text}"


# --- hostile files ---------------------------------------------------------------------------------


class Evil:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return (print, ("this ran",))


def test_a_pickle_that_needs_code_is_refused_and_never_run(tmp_path, capsys):
    """The error names the code and how to save the file again."""
    path = tmp_path / "evil.pt"
    torch.save({"model": {}, "optimizer": Evil()}, path)
    with pytest.raises(Unreadable, match=r"would run code \('(builtins|__builtin__) print'\).*torch\.save\("):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(Unreadable, match="is a pickle of Python objects"):
        read_checkpoint(path)
    assert capsys.readouterr().out == ""


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    """A stride of 0 makes a terabyte of four bytes; it is not allocated."""
    path = tmp_path / "huge.pt"
    huge = torch.zeros(1).expand(10**6, 10**6)
    torch.save({"model": {"w": huge}, "optimizer": torch.optim.RMSprop([torch.zeros(1)]).state_dict()}, path)
    with pytest.raises(Unreadable, match="claims 4000000000000 bytes, more than its storage has"):
        read_checkpoint(path)


def test_a_storage_that_claims_more_than_its_record_reads_nothing_outside_the_file(tmp_path):
    """torch would read past the record; here a storage is a slice of the file, and the tensor is unchanged."""
    claims = struct.pack("<BB", ord("K"), 72), struct.pack("<BI", ord("J"), 0x7FFFFFFF)  # of conv.weight's elements
    source, path = HERE / "torch_rmsprop.pt", tmp_path / "grown.pt"
    resaved(source, path, lambda name, data: data.replace(*claims) if name.endswith("data.pkl") else data)
    first, last = read_checkpoint(source), read_checkpoint(path)
    np.testing.assert_array_equal(last.params["conv.weight"], first.params["conv.weight"])


def test_every_way_to_break_an_archive_is_one_sentence(tmp_path):
    """Truncation, flipped bits, a wrong checksum, an outside path, compression and a bomb are each refused."""
    source, out = HERE / "torch_rmsprop.pt", tmp_path / "broken.pt"
    data = source.read_bytes()
    out.write_bytes(data[: len(data) // 2])
    with pytest.raises(Unreadable):
        read_checkpoint(out)
    at = data.index(b"data/0") + 100
    out.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(Unreadable, match="damaged"):
        read_checkpoint(out)
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../data.pkl", b"")
    with pytest.raises(Unreadable, match="path outside"):
        read_checkpoint(out)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * (1 << 24))
    with pytest.raises(Unreadable, match="ten times its size"):
        read_checkpoint(out)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(Unreadable, match="compressed members"):
        read_checkpoint(out)


def test_the_state_of_another_optimizer_is_refused_by_what_it_keeps(tmp_path):
    """SGD's momentum is not RMSprop's state, and a model alone has no state."""
    weight = torch.nn.Parameter(torch.ones(2))
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(2)
    sgd.step()
    path = tmp_path / "in.pt"
    torch.save({"model": {"w": weight.data}, "optimizer": sgd.state_dict()}, path)
    with pytest.raises(
        Unreadable, match=r"the state of another optimizer, torch\.optim\.SGD, which keeps 'momentum_buffer'"
    ):
        prepare(path)
    torch.save({"w": weight.data}, path)
    with pytest.raises(Unreadable, match="holds parameters and no optimizer state"):
        prepare(path)
    path.write_bytes(b"hello")
    with pytest.raises(Unreadable, match="is a text file"):
        prepare(path)
