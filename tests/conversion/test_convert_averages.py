"""Averages of the weights in other frameworks' checkpoints become the slot `ema`, and go on bitwise."""

import argparse
import copy
import json
import zipfile

import h5py
import numpy as np
import pytest
import torch
from bundles import field, write_bundle
from commands import invoke
from paths import CHECKPOINTS as HERE

import rmsprop
from rmsprop import RMSprop
from rmsprop.conversion import Unreadable
from rmsprop.conversion.file import prepare, read_checkpoint, write, writer
from rmsprop.conversion.formats.tensorflow.bundle import Bundle
from rmsprop.conversion.formats.tensorflow.checkpoint import VALUE
from rmsprop.conversion.turning import turn
from rmsprop.inspection.checkpoint import inspect

# The shadow variables of TensorFlow 1, and the settings that its checkpoints lack.
AVERAGE = "ExponentialMovingAverage"
TF1 = {"learning_rate": 0.1, "decay": 0.9, "epsilon": 10.0, "momentum": 0.9}
NAMES = ("conv/kernel", "conv/bias", "fc/kernel", "fc/bias")
TORCHS = {name: name.replace("/", ".").replace("kernel", "weight") for name in NAMES}


def averages_of(params):
    """Distinct averages of the recorded network's parameters, some of them negative."""
    return {name: (params[name] * 0.5 - 0.25).astype(np.float32) for name in NAMES}


def converted(path, out, **options):
    """Convert a file to a .pt, and return the conversion and what was written."""
    made = prepare(path, **options)
    write(made, out)
    return made, torch.load(out, weights_only=True)


def resumed(whole):
    """Return the parameters of a converted file, and an optimizer that has loaded its state without a warning."""
    (group,) = whole["optimizer"]["param_groups"]
    params = {name: torch.nn.Parameter(whole["model"][name].clone()) for name in group["param_names"]}
    optimizer = RMSprop(params.items(), dialect=group["dialect"], lr=0.1, ema=0.5)
    optimizer.load_state_dict(whole["optimizer"], hparams="load")
    return params, optimizer


def assert_goes_on(whole, averages, decay, kinds):
    """The averages are the file's in torch's layout, and the next steps average with its decay."""
    params, optimizer = resumed(whole)
    assert optimizer.param_groups[0]["ema"] == decay
    expected = {TORCHS[name]: turn(value, kinds[name]) for name, value in averages.items()}
    for name, p in params.items():
        np.testing.assert_array_equal(optimizer.state[p]["ema"].numpy(), expected[name])
    for seed in range(3):
        torch.manual_seed(seed)
        for p in params.values():
            p.grad = torch.randn_like(p)
        optimizer.step()
        for name, p in params.items():
            expected[name] = decay * expected[name].astype(np.float64) + (1 - decay) * p.detach().double().numpy()
            np.testing.assert_allclose(optimizer.state[p]["ema"].numpy(), expected[name], rtol=1e-5, atol=1e-7)


def tensorflow1(folder, more=(), without=()):
    """Write the recorded checkpoint of TensorFlow 1 with shadow variables, and return its averages."""
    held = Bundle(HERE / "tensorflow1-momentum.ckpt-20")
    tensors = {name: held.tensor(name) for name in held.entries if name not in without}
    averages = averages_of(tensors)
    tensors |= {f"{name}/{AVERAGE}": value for name, value in averages.items()} | dict(more)
    return write_bundle(folder / "model.ckpt", tensors), averages


@pytest.mark.parametrize("counted", [True, False])
def test_tensorflows_shadow_variables_become_ema(counted, tmp_path):
    """Also from a variable scope. BatchNorm's become ema_buffers; those of tensors and second ones are left out."""
    mean, scoped = np.arange(4, dtype=np.float32), np.full(2, 7, np.float32)
    more = {
        "bn/moving_mean": mean,
        f"bn/moving_mean/{AVERAGE}": mean + 1,
        "w/frozen": scoped,
        f"model/w/frozen/{AVERAGE}": scoped + 1,
        "w/constant": scoped,
        f"w/constant/{AVERAGE}": scoped,
        f"loss/{AVERAGE}": np.float32(3).reshape(()),
        f"fc/bias/{AVERAGE}_1": np.zeros(5, np.float32),
    }
    path, averages = tensorflow1(tmp_path, more, () if counted else ("global_step",))
    given = {**TF1, "ema": 0.75}
    made, whole = converted(path, tmp_path / "out.pt", given=given)
    assert_goes_on(whole, averages, 0.75, read_checkpoint(path).kinds)
    assert {name: x.tolist() for name, x in whole["optimizer"]["ema_buffers"].items()} == {
        "bn.running_mean": [1, 2, 3, 4]
    }
    said = str(made.report)
    assert "2 averaged weights are left out" in said
    assert "the averages (ema) of 1 tensors ('w/frozen') are left out: the optimizer has no state of them" in said
    assert counted or "step is set to 1" in said
    if counted:
        made = prepare(path, given={**given, "ema_warmup": "tensorflow"})
        assert made.checkpoint.hyper["ema_warmup"] == "tensorflow"
    else:
        with pytest.raises(ValueError, match="ema_warmup='tensorflow' depends on the number of steps"):
            prepare(path, given={**given, "ema_warmup": "tensorflow"})


def test_averages_without_a_decay_or_a_place_are_left_out_with_a_sentence(tmp_path):
    """The sentence gives the option that keeps them, and only where the target holds them."""
    path, _ = tensorflow1(tmp_path)
    made, whole = converted(path, tmp_path / "out.pt", given=TF1)
    assert "4 tensors ('conv/bias', 'conv/kernel', 'fc/bias', 'fc/kernel') are left out: add --set ema=" in str(
        made.report
    )
    assert all("ema" not in entry for entry in whole["optimizer"]["state"].values())
    assert whole["optimizer"]["param_groups"][0]["ema"] is None
    for at, given in enumerate((TF1, {**TF1, "ema": 0.9})):
        made, whole = converted(path, tmp_path / f"{at}.pt", target="torch", given=given)
        assert "are left out: the target holds none" in str(made.report)
        assert set(whole["optimizer"]["state"][0]) == {"step", "square_avg", "momentum_buffer"}
    with pytest.raises(ValueError, match=r"--set ema_start=3 needs the average's decay: add --set ema="):
        prepare(path, given={**TF1, "ema_start": 3})
    with pytest.raises(ValueError, match="Invalid ema: 1"):
        prepare(path, given={**TF1, "ema": 1})
    assert inspect(path, given=TF1).rows
    words = [f"--set={name}={value}" for name, value in {**TF1, "ema": 0.5}.items()]
    code, text = invoke("convert", str(path), str(tmp_path / "cli.pt"), *words)
    assert code == 0, text
    assert "ema: unchanged" in text


def test_an_average_of_another_shape_is_refused(tmp_path):
    """In one sentence with both shapes."""
    path, _ = tensorflow1(tmp_path, {f"fc/bias/{AVERAGE}": np.zeros(4, np.float32)})
    with pytest.raises(Unreadable, match=r"the average of 'fc/bias' has shape \(4,\), and the variable \(5,\)"):
        prepare(path, given={**TF1, "ema": 0.5})


def tensorflow2(folder, average):
    """Write a checkpoint of tf.train.Checkpoint with an average of each variable under that name."""
    held = Bundle(HERE / "tf2-newer-momentum")
    recorded = read_checkpoint(HERE / "tf2-newer-momentum")
    averages, keys, graph, tensors = averages_of(recorded.params), {}, b"", {}
    for at, name in enumerate(NAMES):
        keys[name] = f"model/layer/{at}", recorded.params[name]
        keys[average.format(name)] = (
            f"{'optimizer/_variables' if 'RMSprop' in average else 'ema'}/{at}",
            averages[name],
        )
        for slot, value in recorded.slots[name].items():
            keys[f"RMSprop/{slot}/{name}"] = f"optimizer/_variables/{slot}{at}", value
    for name, (key, value) in keys.items():
        graph += field(1, field(2, field(2, name.encode()) + field(3, (key + VALUE).encode())))
        tensors[key + VALUE] = value
    for key in ("_iterations", "_learning_rate"):
        tensors[f"optimizer/{key}{VALUE}"] = held.tensor(f"optimizer/{key}{VALUE}")
    return write_bundle(folder / "ckpt-1", {**tensors, "_CHECKPOINTABLE_OBJECT_GRAPH": graph}), averages


@pytest.mark.parametrize("average", ["RMSprop/average/{}", f"{{}}/{AVERAGE}"])
def test_averages_in_tensorflow2s_checkpoints_become_ema(average, tmp_path):
    """Those of tf_keras' use_ema, and shadow variables under their own name."""
    path, averages = tensorflow2(tmp_path, average)
    given = {"rho": 0.9, "epsilon": 1e-7, "momentum": 0.9, "use_ema": True, "ema_momentum": 0.75}
    _, whole = converted(path, tmp_path / "out.pt", given=given)
    assert sorted(whole["model"]) == sorted(TORCHS.values())
    assert_goes_on(whole, averages, 0.75, read_checkpoint(path).kinds)


def keras3(path, averaged, **config):
    """Write the recorded .keras or .weights.h5 with averages before the velocities, and return them."""
    name = f"keras3-momentum{''.join(path.suffixes)}"
    held = read_checkpoint(HERE / name, None, {"momentum": 0.9, "centered": False})
    averages = averages_of(held.params)
    weights = path.with_name("w.h5") if path.suffix == ".keras" else path
    with zipfile.ZipFile(HERE / "keras3-momentum.keras") as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    weights.write_bytes(members["model.weights.h5"])
    with h5py.File(weights, "r+") as file:
        group = file["optimizer/vars"]
        values = [group[str(i)][()] for i in range(len(group))]
        for one in list(group):
            del group[one]
        first = [averages[one] for one in held.slots] if averaged else []
        for i, value in enumerate([*values[:2], *first, *values[2:]]):
            group[str(i)] = value
    if path.suffix == ".keras":
        said = json.loads(members["config.json"])
        said["compile_config"]["optimizer"]["config"].update(use_ema=averaged, **config)
        members |= {"config.json": json.dumps(said).encode(), "model.weights.h5": weights.read_bytes()}
        with zipfile.ZipFile(path, "w") as archive:
            for member, raw in members.items():
                archive.writestr(member, raw)
    return averages


def test_keras_use_ema_becomes_ema(tmp_path):
    """In a .keras the configuration has the decay; for a .weights.h5 the user gives it."""
    averages = keras3(tmp_path / "x.keras", True, ema_momentum=0.75, ema_overwrite_frequency=7)
    made, whole = converted(tmp_path / "x.keras", tmp_path / "out.pt")
    kinds = read_checkpoint(tmp_path / "x.keras").kinds
    assert_goes_on(whole, averages, 0.75, kinds)
    assert "ema_overwrite_frequency=7 replaced the weights by their averages" in str(made.report)
    keras3(tmp_path / "x.weights.h5", True)
    settings = {"rho": 0.9, "epsilon": 1e-7, "momentum": 0.9, "centered": False}
    with pytest.raises(Unreadable, match="for a run with use_ema, pass --set use_ema=true"):
        prepare(tmp_path / "x.weights.h5", given=settings)
    with pytest.raises(Unreadable, match="for the first, pass --set use_ema=true"):
        prepare(tmp_path / "x.weights.h5")
    for at, given in enumerate(({"use_ema": True, "ema_momentum": 0.75}, {"ema": 0.75})):
        _, whole = converted(tmp_path / "x.weights.h5", tmp_path / f"{at}.pt", given={**settings, **given})
        assert_goes_on(whole, averages, 0.75, kinds)


def keras_h5(path, source, name):
    """Write a recorded .h5 with averages under that name, and return them."""
    path.write_bytes((HERE / source).read_bytes())
    averages = averages_of(read_checkpoint(path).params)
    with h5py.File(path, "r+") as file:
        said = json.loads(file.attrs["training_config"])
        said["optimizer_config"]["config"].update(use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=None)
        file.attrs["training_config"] = json.dumps(said)
        group = file["optimizer_weights"]
        names = [name(one) for one in NAMES]
        for one, full in zip(NAMES, names, strict=True):
            group[full] = averages[one]
        listed = list(group.attrs["weight_names"])
        group.attrs["weight_names"] = [*listed[:1], *names, *listed[1:]]
    return averages


@pytest.mark.parametrize(
    "name", [lambda one: f"RMSprop/average/{one}:0", lambda one: f"rm_sprop/{one.replace('/', '_')}_average"]
)
def test_averages_in_keras_hdf5_become_ema_and_go_back(name, tmp_path):
    """Under the names of tf_keras and of Keras 3."""
    path, out = tmp_path / "x.h5", tmp_path / "back.h5"
    averages = keras_h5(path, "tfkeras-newer-momentum.h5", name)
    _, whole = converted(path, tmp_path / "out.pt")
    assert_goes_on(whole, averages, 0.75, read_checkpoint(path).kinds)
    write(prepare(tmp_path / "out.pt", "keras3", model=path, out=writer(out)), out)
    assert_same(read_checkpoint(out), read_checkpoint(path))


def assert_same(one, other):
    assert {**one.hyper, "weight_decay": 0} == {**other.hyper, "weight_decay": 0}
    assert one.slots.keys() == other.slots.keys()
    for name, slots in other.slots.items():
        assert one.slots[name].keys() == slots.keys() >= {"average"}
        for slot, value in slots.items():
            np.testing.assert_array_equal(one.slots[name][slot], value, err_msg=f"{name} {slot}")


def test_averages_return_to_keras(tmp_path):
    """Into a template with use_ema, with the decay; another template is refused with what to do."""
    path, middle = tmp_path / "x.keras", tmp_path / "out.pt"
    keras3(path, True, ema_momentum=0.75)
    write(prepare(path), middle)
    for ending in (".keras", ".weights.h5"):
        template, out = tmp_path / f"template{ending}", tmp_path / f"back{ending}"
        keras3(template, True, ema_momentum=0.5)
        made = prepare(middle, "keras3", model=template, out=writer(out))
        write(made, out)
        settings = {"use_ema": True, "ema_momentum": 0.75, "momentum": 0.9, "centered": False}
        back = read_checkpoint(out, None, settings)
        source = read_checkpoint(path)
        back.hyper, source.hyper = {}, {}
        assert_same(back, source)
    assert read_checkpoint(tmp_path / "back.keras").hyper["ema"] == 0.75
    plain, out = tmp_path / "plain.keras", tmp_path / "no.keras"
    keras3(plain, False)
    with pytest.raises(Unreadable, match=r"compiled without use_ema.*use_ema=True.*--set ema=none"):
        write(prepare(middle, "keras3", model=plain, out=writer(out)), out)
    made = prepare(middle, "keras3", model=plain, out=writer(out), given={"ema": None})
    write(made, out)
    assert "average" not in next(iter(read_checkpoint(out).slots.values()))


def network():
    """Make a network with BatchNorm and a frozen layer."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2), torch.nn.Linear(2, 3)
    model = torch.nn.Sequential(*layers)
    model[3].requires_grad_(False)
    return model


def train(model, optimizer, steps=3, seed=0):
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()


def build(model, decay, **settings):
    """Make an optimizer with timm's two groups, which averages the weights and buffers."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(name, p) for name, p in named if p.ndim == 1], "weight_decay": 0.0},
        {"params": [(name, p) for name, p in named if p.ndim > 1]},
    ]
    optimizer = RMSprop(groups, dialect="timm", lr=0.01, weight_decay=0.01, momentum=0.9, ema=decay, **settings)
    optimizer.average_buffers(model)
    return optimizer


def timm(model, optimizer, args):
    """Return what timm's CheckpointSaver saves, whose groups number the parameters."""
    with optimizer.averaged():
        averages = copy.deepcopy(model.state_dict())
    state = optimizer.state_dict()
    entries = {key: {n: x for n, x in entry.items() if n != "ema"} for key, entry in state["state"].items()}
    names = ("params", "lr", "alpha", "eps", "momentum", "centered", "weight_decay")
    groups = [{name: group[name] for name in names} | {"lr_in_momentum": True} for group in state["param_groups"]]
    return {
        "epoch": 1,
        "state_dict": model.state_dict(),
        "optimizer": {"state": entries, "param_groups": groups},
        "state_dict_ema": averages,
        "version": 2,
        **({} if args is None else {"args": args}),
    }


@pytest.mark.parametrize("warmup", [None, "timm"])
def test_timms_averages_go_on_bitwise(warmup, tmp_path):
    """The decay and the warm-up are in the run's arguments, and buffers are averaged on."""
    model = network()
    optimizer = build(model, 0.75, ema_warmup=warmup)
    train(model, optimizer)
    other = argparse.Namespace(model_ema_decay=0.25)
    args = argparse.Namespace(model="net", model_ema_decay=0.75, model_ema_warmup=warmup == "timm", other=other)
    torch.save(timm(model, optimizer, args), tmp_path / "timm.pth")
    made, whole = converted(tmp_path / "timm.pth", tmp_path / "out.pt")
    assert not made.report.dropped
    second = network()
    second.load_state_dict(whole["model"])
    resumed = build(second, 0.5)
    resumed.load_state_dict(whole["optimizer"], hparams="load")
    assert [group["ema_warmup"] for group in resumed.param_groups] == [warmup, warmup]
    for run, run_optimizer in ((model, optimizer), (second, resumed)):
        train(run, run_optimizer, seed=1)
    for one, two in zip(model.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    with optimizer.averaged(), resumed.averaged():
        for one, two in zip(model.state_dict().values(), second.state_dict().values(), strict=True):
            assert torch.equal(one, two)


def test_timms_averages_without_arguments_need_the_decay(tmp_path):
    """A bare file, whose decay --set gives; --match number keeps numbers, which name no average."""
    model = network()
    optimizer = build(model, 0.75)
    train(model, optimizer)
    torch.save(timm(model, optimizer, None), tmp_path / "timm.pth")
    made, whole = converted(tmp_path / "timm.pth", tmp_path / "a.pt")
    assert "add --set ema=..., such as ema=0.9999" in str(made.report)
    assert "ema_buffers" not in whole["optimizer"]
    made, whole = converted(tmp_path / "timm.pth", tmp_path / "b.pt", given={"ema": 0.75})
    assert [group["ema"] for group in whole["optimizer"]["param_groups"]] == [0.75, 0.75]
    assert sorted(whole["optimizer"]["ema_buffers"]) == ["1.running_mean", "1.running_var"]
    copied = prepare(tmp_path / "timm.pth", parameters="state_dict_ema", given={"ema": 0.75})
    assert not copied.checkpoint.averages


def test_numbers_that_name_no_parameter_leave_the_averages_out(tmp_path):
    """Two groups of equal shapes: names, or an order, keep the averages."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    named = list(model.named_parameters())
    optimizer = RMSprop([{"params": named[2:]}, {"params": named[:2]}], dialect="timm", lr=0.01, ema=0.5)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    whole = timm(model, optimizer, argparse.Namespace(model_ema_decay=0.5))
    whole["state_dict_ema"] = {name: value + 1 for name, value in whole["state_dict_ema"].items()}
    torch.save(whole, tmp_path / "timm.pth")
    made = prepare(tmp_path / "timm.pth", match="number")
    assert "name them in a map.toml's [rename], or add --match order" in str(made.report)
    made = prepare(tmp_path / "timm.pth", match="order")
    np.testing.assert_array_equal(
        made.checkpoint.slots["0.weight"]["ema"], whole["state_dict_ema"]["0.weight"].numpy()
    )


@pytest.mark.parametrize("middle", ["x.pt", "x.safetensors"])
def test_our_averages_survive_our_formats(middle, tmp_path):
    """All settings of the average, the slots and the buffers; torch's optimizer gets none of them."""
    model = network()
    optimizer = build(model, 0.75, ema_warmup="timm", ema_start=1, ema_interval=2)
    train(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    write(prepare(tmp_path / "run.pt", out=writer(tmp_path / middle)), tmp_path / middle)
    made, whole = converted(tmp_path / middle, tmp_path / "out.pt")
    assert not made.report.dropped
    mine, theirs = optimizer.state_dict(), whole["optimizer"]
    for name in ("ema", "ema_warmup", "ema_start", "ema_interval"):
        assert [group[name] for group in mine["param_groups"]] == [group[name] for group in theirs["param_groups"]]
    for key, entry in mine["state"].items():
        assert torch.equal(entry["ema"], theirs["state"][key]["ema"])
    for name in ("1.running_mean", "1.running_var"):
        assert torch.equal(mine["ema_buffers"][name], theirs["ema_buffers"][name])
    plain, whole = converted(tmp_path / middle, tmp_path / "plain.pt", target="torch")
    assert "the averages (ema) of 9 tensors" in str(plain.report)
    assert "are left out: the target holds none" in str(plain.report)
    assert "ema_buffers" not in whole["optimizer"]
    assert "ema" not in whole["optimizer"]["param_groups"][0]


def test_an_average_is_converted_unchanged_between_arrays():
    """Under the name ema, and Keras' own; the step counts on, so that the first step does not replace it."""
    state = {"rms": np.ones(2), "momentum": np.ones(2), "ema": np.array([1.0, 3.0])}
    ours, report = rmsprop.convert(state, "tensorflow1", "torch", lr=0.5)
    assert ours["ema"].tolist() == [1.0, 3.0]
    assert ours["step"] == 1
    assert "ema: unchanged, the average of the weights" in report.exact
    keras, _ = rmsprop.convert(ours, "torch", "keras3", lr=0.5)
    assert list(keras) == ["iteration", "average", "velocity", "momentum"]
    assert rmsprop.convert(keras, "keras3", "tensorflow1").state["ema"].tolist() == [1.0, 3.0]
