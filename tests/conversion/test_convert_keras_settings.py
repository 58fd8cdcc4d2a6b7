"""Settings and counts of Keras and TensorFlow: decay, the count in files, and HDF5 that must be rewritten."""

import dataclasses
import json
import re
import shlex
import zipfile

import h5py
import numpy as np
import pytest
import torch
from bundles import write_table
from commands import invoke
from paths import CHECKPOINTS as HERE

from rmsprop import RMSprop
from rmsprop.conversion import Unreadable
from rmsprop.conversion.file import prepare, read_checkpoint, write, writer
from rmsprop.conversion.formats import hdf5
from rmsprop.conversion.formats.tensorflow import sstable
from rmsprop.inspection.checkpoint import inspect

PLAIN = HERE / "tfkeras-legacy-plain.h5"


def decayed(path, decay, count=True):
    """Write a recorded run of 20 steps with `decay` in its settings."""
    path.write_bytes(PLAIN.read_bytes())
    with h5py.File(path, "r+") as file:
        said = json.loads(file.attrs["training_config"])
        said["optimizer_config"]["config"]["decay"] = decay
        file.attrs["training_config"] = json.dumps(said)
        if not count:
            group = file["optimizer_weights"]
            kept = [name for name in group.attrs["weight_names"] if not name.endswith(("iter:0", "iteration:0"))]
            group.attrs["weight_names"] = kept
    return path


def test_keras_decay_becomes_the_rate_that_the_run_had_reached(tmp_path):
    """The rate is lr/(1 + decay·20), and the scheduler in the report continues as Keras does."""
    held = read_checkpoint(PLAIN)
    made = prepare(decayed(tmp_path / "x.h5", 0.25))
    lr = held.hyper["learning_rate"]
    assert made.checkpoint.hyper["lr"] == pytest.approx(lr / 6, rel=1e-12)
    (said,) = [sentence for sentence in made.report.approximate if "decay" in sentence]
    factor = re.search(r"LambdaLR\(optimizer, (lambda t: .*?)\) continues the decay", said)[1]
    optimizer = RMSprop([torch.nn.Parameter(torch.ones(2))], lr=made.checkpoint.hyper["lr"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, eval(factor))  # the sentence is typed in
    for t in range(21, 25):
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr / (1 + 0.25 * t), rel=1e-6)
    assert inspect(tmp_path / "x.h5").settings[0]["lr"] == pytest.approx(lr / 6)
    assert any("decay=0.25 went on" in sentence for sentence in inspect(tmp_path / "x.h5").assumed)


def test_decay_without_a_count_asks_for_the_rate_and_takes_it(tmp_path):
    """The option in the error works; inspect uses the initial rate and reports it."""
    path = decayed(tmp_path / "x.h5", 0.25, count=False)
    with pytest.raises(ValueError, match=r"does not count the steps t: add --set learning_rate=\.\.\.") as asked:
        prepare(path)
    option = re.search(r"--set (\w+)=", str(asked.value))[1]
    made = prepare(path, given={option: 0.125})
    assert made.checkpoint.hyper["lr"] == 0.125
    assert prepare(path, given={"decay": 0, option: 0.125}).checkpoint.hyper["lr"] == 0.125
    found = inspect(path)
    assert found.settings[0]["lr"] == read_checkpoint(PLAIN).hyper["learning_rate"]
    assert any("rates are those of the start" in sentence for sentence in found.assumed)


def test_a_rate_that_has_decayed_does_not_decay_again_in_the_file_written(tmp_path):
    """The template's decay becomes 0 beside the rate of the next step, and the count is not reported as dropped."""
    path, back = decayed(tmp_path / "x.h5", 0.25), tmp_path / "back.h5"
    middle = tmp_path / "middle.pt"
    write(prepare(path), middle)
    made = prepare(middle, "keras2", model=path, out=writer(back))
    write(made, back)
    assert not [sentence for sentence in made.report.dropped if "step" in sentence]
    last = read_checkpoint(back)
    assert last.step == 20
    assert last.hyper.get("decay", 0) == 0
    assert last.hyper["learning_rate"] == pytest.approx(read_checkpoint(PLAIN).hyper["learning_rate"] / 6)


def test_without_a_count_nobody_is_called_untouched(tmp_path):
    """Without global_step, v started at 1 and has decayed by an unknown amount; shares are of all elements."""
    recorded = HERE / "tensorflow1-momentum.ckpt-20"
    assert read_checkpoint(recorded).step == 20
    table = sstable.read(recorded.with_name(f"{recorded.name}.index"))
    del table[b"global_step"]
    write_table(tmp_path / "model.index", table)
    data = recorded.with_name(f"{recorded.name}.data-00000-of-00001").read_bytes()
    (tmp_path / "model.data-00000-of-00001").write_bytes(data)
    words = {"learning_rate": 0.1, "decay": 0.9, "epsilon": 10.0, "momentum": 0.9}
    told, found = (
        inspect(recorded, given=words),
        inspect(tmp_path / "model", given=words),
    )
    assert told.totals()["untouched"] == 0
    assert found.totals()["untouched"] is None
    assert all(row.untouched is None for row in found.rows)
    assert found.totals()["below_eps"] == told.totals()["below_eps"] > 0.5
    assert found.totals()["stuck"] == told.totals()["stuck"]
    assert any("elements that never had a gradient cannot be counted" in sentence for sentence in found.assumed)
    code, text = invoke("inspect", str(tmp_path / "model"), *[f"--set={k}={v}" for k, v in words.items()])
    assert code == 0, text
    assert "untouched ?" in text
    assert json.loads(json.dumps(found.record()))["totals"]["untouched"] is None


def test_a_file_of_a_newer_kind_is_read_once_it_was_rewritten_as_the_sentence_says(tmp_path):
    """The advised options of h5repack are applied through h5py, under the same names."""
    new, old = tmp_path / "new.h5", tmp_path / "old.h5"
    with h5py.File(PLAIN) as source, h5py.File(new, "w", libver="latest") as file:
        file.attrs.update(source.attrs)
        for name in source:
            source.copy(name, file)
    with pytest.raises(Unreadable, match="h5repack") as refused, new.open("rb") as stream:
        hdf5.read(new, stream, new.stat().st_size)
    words = shlex.split(re.search("`(h5repack.*?)`", str(refused.value))[1])
    bounds = [
        {"0": "earliest", "1": "v108"}[word.partition("=")[2]] for word in words if word.startswith(("--l", "--h"))
    ]
    with h5py.File(new) as source, h5py.File(old, "w", libver=tuple(bounds)) as file:

        def copy(name, item):
            made = (
                file.require_group(name) if isinstance(item, h5py.Group) else file.create_dataset(name, data=item[()])
            )
            made.attrs.update(item.attrs)

        file.attrs.update(source.attrs)
        source.visititems(copy)
    held = read_checkpoint(old)
    for name, value in read_checkpoint(PLAIN).params.items():
        np.testing.assert_array_equal(held.params[name], value)


@pytest.mark.parametrize("name", ["torch_rmsprop.pt", "tfkeras-legacy-plain.h5"])
def test_the_settings_word_of_every_sentence_is_taken(name, tmp_path):
    """lr= for torch and learning_rate= for Keras work; the error on a mistyped name gives the right one."""
    out = tmp_path / "out.pt"
    word = "lr" if name.endswith(".pt") else "learning_rate"
    code, text = invoke("convert", str(HERE / name), str(out), "--set", f"{word}=0.5")
    assert code == 0, text
    assert torch.load(out, weights_only=True)["optimizer"]["param_groups"][0]["lr"] == 0.5
    code, text = invoke("convert", str(HERE / name), str(tmp_path / "b.pt"), "--set", "rate")
    assert "write it as NAME=VALUE, such as lr=0.01" in " ".join(text.replace("│", " ").split())


def keras3_file(path, change):
    """Write the recorded .weights.h5 of a run with momentum, with the optimizer's list of variables changed."""
    path.write_bytes((HERE / "keras3-momentum.weights.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        group = file["optimizer/vars"]
        held = [group[str(i)][()] for i in range(len(group))]
        for name in list(group):
            del group[name]
        for i, value in enumerate(change(held)):
            group[str(i)] = value
    return path


@pytest.mark.parametrize("first", ["weights", "zeros"])
def test_averaged_weights_are_not_taken_for_the_average_of_squares(first, tmp_path):
    """use_ema and gradient accumulation store a state before velocity, without a name in a .weights.h5."""
    each = (
        len(read_checkpoint(HERE / "keras3-momentum.weights.h5", None, {"momentum": 0.9, "centered": False}).slots),
    )

    def change(held):
        count, rate, velocity = held[0], held[1], held[2 : 2 + each[0]]
        extra = [np.zeros_like(v) if first == "zeros" else -np.ones_like(v) for v in velocity]
        return [count, rate, *extra, *velocity]

    path = keras3_file(tmp_path / "x.weights.h5", change)
    for given in ({}, {"momentum": 0.9, "centered": False}):
        with pytest.raises(Unreadable, match="no averages of squares"):
            read_checkpoint(path, None, given)


def archive(path, change):
    """Write the recorded .keras with its description changed."""
    with zipfile.ZipFile(HERE / "keras3-momentum.keras") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            raw = old.read(name)
            if name == "config.json":
                said = json.loads(raw)
                change(said)
                raw = json.dumps(said).encode()
            new.writestr(name, raw)
    return path


@pytest.mark.parametrize("name", ["use_ema", "gradient_accumulation_steps"])
def test_a_template_that_averages_weights_or_sums_gradients_is_refused(name, tmp_path):
    """The averages, or the sums, would be another model's, or missing."""
    template = archive(
        tmp_path / "x.keras", lambda said: said["compile_config"]["optimizer"]["config"].update({name: 2})
    )
    middle, out = tmp_path / "m.pt", tmp_path / "out.keras"
    write(prepare(HERE / "keras3-momentum.keras"), middle)
    made = prepare(middle, "keras3", model=HERE / "keras3-momentum.keras", out=writer(out))
    with pytest.raises(Unreadable, match=f"compiled with {name}"):
        write(dataclasses.replace(made, template=template), out)
    assert not out.exists()


def test_what_the_description_says_of_a_layer_holds_for_writing_too(tmp_path):
    """A frozen layer without state is frozen in the template too, and converts back unchanged."""
    frozen = HERE / "layouts-keras3.keras"
    with zipfile.ZipFile(frozen) as held:
        said = json.loads(held.read("config.json"))
    (layer,) = [one for one in said["config"]["layers"] if one["config"]["name"] == "tail"]
    layer["config"]["trainable"] = False
    path, middle, back = tmp_path / "x.keras", tmp_path / "m.pt", tmp_path / "back.keras"
    with zipfile.ZipFile(frozen) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            raw = json.dumps(said).encode() if name == "config.json" else old.read(name)
            if name.endswith(".h5"):
                raw = _without(raw, tmp_path, "tail")
            new.writestr(name, raw)
    first = read_checkpoint(path)
    assert "tail/kernel" in first.params
    assert "tail/kernel" not in first.slots
    write(prepare(path), middle)
    write(prepare(middle, "keras3", model=path, out=writer(back)), back)
    last = read_checkpoint(back)
    for key, value in first.params.items():
        np.testing.assert_array_equal(last.params[key], value)
    assert first.slots.keys() == last.slots.keys()


def _without(raw, folder, layer):
    """Write the recorded model's weights without the states of its last layer, which are the last of each kind."""
    (folder / "w.h5").write_bytes(raw)
    held = read_checkpoint(HERE / "layouts-keras3.keras")
    names = list(held.slots)
    kept = [i for i, name in enumerate(names) if not name.startswith(f"{layer}/")]
    with h5py.File(folder / "w.h5", "r+") as file:
        group = file["optimizer/vars"]
        values = [group[str(i)][()] for i in range(len(group))]
        for name in list(group):
            del group[name]
        states = values[2:]
        rest = values[:2] + [states[at + i] for at in range(0, len(states), len(names)) for i in kept]
        for i, value in enumerate(rest):
            group[str(i)] = value
    return (folder / "w.h5").read_bytes()
