"""Recorded checkpoints of other frameworks are read correctly, and written ones have the same structure."""

import contextlib
import dataclasses
import io
import json
import random
import struct
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from paths import CHECKPOINTS

from rmsprop import dialects
from rmsprop.conversion.formats import FORMATS, hdf5, npz, optax
from rmsprop.conversion.formats.keras import h5, keras3
from rmsprop.conversion.formats.keras.owners import Unordered, Variable, assign
from rmsprop.conversion.formats.tensorflow import sstable
from rmsprop.conversion.layout import torch_name, turn
from rmsprop.conversion.record import Checkpoint, Format, Unreadable

HERE = CHECKPOINTS
sys.path.insert(0, str(HERE))
import inputs  # noqa: E402

CENTERED = {"mg", "average_gradient", "mu", "g"}
BY_HAND = {"conv/W": "conv.weight", "conv/b": "conv.bias", "fc/W": "fc.weight", "fc/b": "fc.bias"}
BY_HAND |= {name.replace(".", "_"): name for name in inputs.SHAPES}


@dataclasses.dataclass(frozen=True)
class File:
    """A recorded checkpoint, and the name of the record of its run."""

    path: Path
    record: str

    def __str__(self):
        return self.path.name

    @property
    def format(self) -> Format:
        return next(row for row in FORMATS if row.sniff(self.path))

    @property
    def description(self):
        return json.loads(str(np.load(HERE / f"{self.record}.npz")["description"]))

    def read(self, path: Path | None = None) -> Checkpoint:
        row = self.format
        given = {name: value for name, value in self.description["words"].items() if name in ("momentum", "centered")}
        return row.read(path or self.path, given) if row.asks else row.read(path or self.path)


def _files() -> list[File]:
    found = []
    for path in sorted(HERE.glob("*.npz")):
        with np.load(path) as record:
            if "description" not in record:
                continue
            name = json.loads(str(record["description"]))["checkpoint"]
        if path.stem.startswith(("keras3", "tfkeras", "tf2", "tensorflow1", "optax", "chainer", "mxnet")):
            others = [name, *(name.replace(*pair) for pair in ((".optimizer.", ".snapshot."), (".states", ".nd")))]
            others += [f"{name}.npz"] if name.endswith(".states") else []
            found += [File(HERE / other, path.stem) for other in dict.fromkeys(others)]
    return [file for file in found if not file.path.name.endswith(".states") and not file.path.is_dir()]


FILES = _files()
FRAMEWORKS = ("keras3", "tfkeras", "tf2", "tensorflow1", "optax", "chainer", "mxnet")


def test_every_framework_has_files():
    """The tests below have files for every framework."""
    assert {frame: sum(file.path.name.startswith(frame) for file in FILES) for frame in FRAMEWORKS} == {
        "keras3": 4,
        "tfkeras": 6,
        "tf2": 6,
        "tensorflow1": 2,
        "optax": 4,
        "chainer": 4,
        "mxnet": 4,
    }


@pytest.mark.parametrize("file", FILES, ids=str)
def test_recorded_files_are_read_with_names_order_kinds_and_values(file):
    """Parameters equal the record's bit for bit, and each has the dialect's states in its own shape."""
    held, description = file.read(), file.description
    record = np.load(HERE / f"{file.record}.npz")
    assert held.owner.name == description["dialect"]
    row = dialects.find_dialect(held.owner.name)
    names = {name: BY_HAND.get(name) or torch_name(name) for name in held.slots}
    assert sorted(names.values()) == sorted(inputs.SHAPES)
    assert list(held.slots) == [name for name in held.params or held.slots if name in held.slots]
    for name, value in held.params.items():
        np.testing.assert_array_equal(turn(value, held.kinds[name]), record[f"saved/{names[name]}"])
    settings = description["words"]
    momentum = bool(settings.get("momentum", settings.get("gamma2")))
    for name, slots in held.slots.items():
        assert slots.keys() <= row.states.keys()
        ours = {row.states[slot] for slot in slots}
        assert "square_avg" in ours
        assert ("momentum_buffer" in ours) == (momentum or held.owner.name == "tensorflow1")
        graves = held.owner.name == "chainer_graves"
        assert ("grad_avg" in ours) == (bool(settings.get("centered")) or graves)
        for slot, value in slots.items():
            assert turn(value, held.kinds[name]).shape == inputs.SHAPES[names[name]], slot
            assert value.dtype == np.float32
    if held.step is not None:
        assert held.step == inputs.SAVED_AT
    for name, value in held.hyper.items():
        wanted = settings.get(name, 0.0 if name == "momentum" else False)
        assert value == pytest.approx(wanted if wanted is not None else 0.0, rel=1e-12), name


@pytest.mark.parametrize("file", FILES, ids=str)
def test_states_are_the_averages_of_the_recorded_gradients(file):
    """v is the average of squared gradients and m of gradients, so no two slots are swapped."""
    held, settings = file.read(), file.description["words"]
    row = dialects.find_dialect(held.owner.name)
    rho = next(settings[name] for name in ("rho", "decay", "alpha", "gamma1") if name in settings)
    decay = settings.get("weight_decay", settings.get("wd", 0.0))
    for name, slots in held.slots.items():
        ours = BY_HAND.get(name) or torch_name(name)
        v = np.ones(inputs.SHAPES[ours]) * (held.owner.name == "tensorflow1")
        m = 0 * v
        for gradient in inputs.gradients()[: inputs.SAVED_AT]:
            g = gradient[ours].astype(np.float64)
            v, m = rho * v + (1 - rho) * g * g, rho * m + (1 - rho) * g
        for slot, value in slots.items():
            got = turn(value, held.kinds[name])
            if decay:
                continue  # the recorded gradient lacks the decay, and this optimizer has one slot only
            if row.states[slot] == "square_avg":
                np.testing.assert_allclose(got, v, rtol=1e-4)
            if row.states[slot] == "grad_avg":
                np.testing.assert_allclose(got, m, rtol=1e-3, atol=1e-5)


def alike(one: Checkpoint, other: Checkpoint) -> None:
    """Assert that two checkpoints are equal."""
    assert one.owner == other.owner
    assert one.kinds == other.kinds
    assert list(one.params) == list(other.params)
    assert {name: list(slots) for name, slots in one.slots.items()} == {n: list(s) for n, s in other.slots.items()}
    for name, value in one.params.items():
        np.testing.assert_array_equal(value, other.params[name], strict=True)
    for name, slots in one.slots.items():
        for slot, value in slots.items():
            np.testing.assert_array_equal(value, other.slots[name][slot], strict=True)


def blank(held: Checkpoint) -> Checkpoint:
    """Return the same checkpoint with other values."""
    made = dataclasses.replace(held, params={name: 0 * value + 7 for name, value in held.params.items()})
    made.slots = {n: {slot: 0 * value + 5 for slot, value in slots.items()} for n, slots in held.slots.items()}
    made.step = None if held.step is None else 3
    made.hyper = {**held.hyper, **({"learning_rate": 0.5} if "learning_rate" in held.hyper else {})}
    return made


def _is_written(file: File) -> bool:
    return file.format.write is not None and not file.path.name.startswith("chainer")


WRITTEN = [file for file in FILES if _is_written(file)]


@pytest.mark.parametrize("file", WRITTEN, ids=str)
def test_a_written_file_reads_back_equal(file, tmp_path):
    """A template with other values is used if the format needs one."""
    row, held = file.format, file.read()
    out = tmp_path / file.path.name
    if row.template:
        other = tmp_path / f"other-{file.path.name}"
        row.write(other, blank(held), template=file.path)
        assert file.read(other).params == {} or 7 in next(iter(file.read(other).params.values()))
        row.write(out, held, template=other)
    else:
        row.write(out, held)
    back = file.read(out)
    alike(held, back)
    assert (held.step, held.hyper) == (back.step, back.hyper)
    _same_structure(file.path, out)


WHOLE = [file for file in WRITTEN if file.path.name.startswith(("optax_rmsprop.state", "mxnet"))]
WHOLE += [file for file in WRITTEN if file.path.name.endswith(".weights.h5")]


@pytest.mark.parametrize("file", WHOLE, ids=str)
def test_some_formats_need_no_template(file, tmp_path):
    """Flat models of .weights.h5, MXNet's .npz, and optax's most common tree are written without a template."""
    held, out = file.read(), tmp_path / file.path.name
    file.format.write(out, held)
    alike(held, file.read(out))
    _same_structure(file.path, out)


def _same_structure(real: Path, made: Path) -> None:
    """Assert that two files have equal members, groups, datasets, types and shapes."""
    if real.suffix == ".msgpack":
        assert real.read_bytes() == made.read_bytes()
    elif real.suffix == ".npz":
        with np.load(real) as one, np.load(made) as other:
            assert {k: (v.dtype, v.shape) for k, v in one.items()} == {
                k: (v.dtype, v.shape) for k, v in other.items()
            }
    elif real.suffix == ".keras":
        with zipfile.ZipFile(real) as one, zipfile.ZipFile(made) as other:
            assert one.namelist() == other.namelist()
            assert json.loads(one.read("config.json")) == json.loads(other.read("config.json"))
            inner = [_outline(io.BytesIO(archive.read(keras3.WEIGHTS))) for archive in (one, other)]
        assert inner[0] == inner[1]
    else:
        one, other = _outline(real), _outline(made)
        if real.name.endswith(".weights.h5"):  # only the real file has empty groups of layers without weights
            filled = {name: what for name, what in one.items() if what is not None}
            assert filled == {name: what for name, what in other.items() if what is not None}
        else:
            assert one == other


def _outline(file) -> dict[str, object]:
    found: dict[str, object] = {}
    with h5py.File(file) as opened:
        opened.visititems(
            lambda name, item: found.update({name: (item.dtype, item.shape) if hasattr(item, "shape") else None})
        )
    return found


@pytest.mark.parametrize("path", sorted(HERE.glob("*.h5")), ids=lambda path: path.name)
def test_the_hdf5_reader_agrees_with_h5py(path):
    """Groups, attributes and values of every recorded file are equal to h5py's."""
    with path.open("rb") as stream, h5py.File(path) as theirs:
        ours = hdf5.read(path, stream, path.stat().st_size)
        seen = 0
        for name, group in ours.walk():
            other = theirs[name] if name else theirs
            assert group.groups.keys() | group.datasets.keys() == set(other)
            for key, value in other.attrs.items():
                wanted = [
                    text.decode() if isinstance(text, bytes) else text for text in np.atleast_1d(value).tolist()
                ]
                assert np.atleast_1d(group.attrs[key]).tolist() == wanted
            for key, dataset in group.datasets.items():
                np.testing.assert_array_equal(dataset.read(), other[key][()], strict=True)
                seen += 1
        assert seen > 6


# --- assigning states to variables ----------------------------------------------------------------


def _variables(*shapes, trainable=True):
    return [Variable(f"v{i}", shape, trainable) for i, shape in enumerate(shapes)]


def test_states_find_their_variables_past_the_frozen_ones():
    """Frozen variables are skipped if the shapes determine the assignment."""
    layers = [*_variables((3, 4), (4,)), Variable("mean", (4,), False), Variable("last", (4, 2), True)]
    assert assign(layers, [(3, 4), (4,), (4, 2)]) == (["v0", "v1", "last"], 0, True)
    assert assign(layers, [(4,), (4, 2)]) == (["v1", "last"], 1, True)
    assert assign(layers, [(5,)]) is None


def test_states_that_fit_in_two_ways_are_not_guessed():
    """With three equal variables and two states, the assignment is ambiguous."""
    way = assign(_variables((4, 4), (4, 4), (4, 4)), [(4, 4), (4, 4)])
    assert way is not None
    assert not way[2]


def test_unordered_parts_are_ordered_by_shape():
    """A subclassed model's attributes are saved by name, but its variables train in the order of their creation."""
    one, two = Variable("one", (2,), True), Variable("two", (3,), True)
    items = [Unordered((((one,),), ((two,),)))]
    assert assign(items, [(3,), (2,)]) == (["two", "one"], 0, True)
    alike = [Unordered((((one,),), ((Variable("other", (2,), True),),)))]
    way = assign(alike, [(2,), (2,)])
    assert way is not None
    assert not way[2]


def test_an_unnamed_second_state_needs_a_setting(tmp_path):
    """A small momentum could be an average gradient, which the file does not specify, so the user has to."""
    held = next(file for file in FILES if file.path.name == "keras3-momentum.weights.h5").read()
    held = dataclasses.replace(held, hyper={"learning_rate": 0.5}, step=3)
    held.slots = {
        n: {"velocity": 0 * s["velocity"] + 4, "momentum": 0 * s["velocity"] + 1} for n, s in held.slots.items()
    }
    path = tmp_path / "x.weights.h5"
    next(row for row in FORMATS if row.name == "keras weights").write(path, held)
    with pytest.raises(Unreadable, match="pass --set momentum="):
        keras3.read(path)
    assert set(keras3.read(path, {"momentum": 0.9}).slots["fc/bias"]) == {"velocity", "momentum"}
    assert set(keras3.read(path, {"centered": True}).slots["fc/bias"]) == {"velocity", "average_gradient"}


def test_the_checksum_is_crc32c():
    """The published value is reproduced, and long inputs give the same result as short pieces."""
    assert sstable.crc32c(b"123456789") == 0xE3069283
    raw = np.random.default_rng(1).bytes(3 * 4096 * 8 + 77)
    whole = 0
    for at in range(0, len(raw), 1000):
        whole = sstable.crc32c(raw[at : at + 1000], whole)
    assert sstable.crc32c(raw) == whole


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("opt_state/0/nu/conv/kernel", ("opt_state", "0", "nu", "conv", "kernel")),
        ("['opt_state'][0].nu['conv']['kernel']", ("opt_state", "0", "nu", "conv", "kernel")),
        ("[<flat index 3>]", ("3",)),
        ("opt_state.0.nu.conv.kernel", ("opt_state", "0", "nu", "conv", "kernel")),
    ],
)
def test_keys_of_jax_are_paths(key, wanted):
    """Both forms of keystr, Orbax's dots and flax's slashes are split alike."""
    assert optax.split_key(key) == wanted


def test_wrapped_states_of_optax_are_found(tmp_path):
    """nu is found inside inject_hyperparams and nested chains."""
    tree = {"hyperparams/learning_rate": np.array(0.25, np.float32), "count": np.array(7, np.int32)}
    tree |= {f"inner_state/1/0/{slot}/net/w": np.ones(2, np.float32) for slot in ("nu", "mu")}
    tree = {f"opt_state/{key}": value for key, value in tree.items()} | {"params/net/w": np.ones(2, np.float32)}
    np.savez(tmp_path / "x.npz", **tree)
    held = npz.read(tmp_path / "x.npz")
    assert held.slots.keys() == {"net/w"}
    assert (held.step, held.hyper["learning_rate"], held.hyper["centered"]) == (7, 0.25, True)


def test_big_arrays_of_flax_come_in_chunks(tmp_path):
    """flax.serialization splits arrays of more than a gigabyte."""
    msgpack = pytest.importorskip("msgpack")

    def pack(value):
        return msgpack.ExtType(1, msgpack.packb((value.shape, value.dtype.name, value.tobytes())))

    whole = np.arange(6, dtype=np.float32)
    chunks = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}}
    chunks["chunks"] = {"0": pack(whole[:4]), "1": pack(whole[4:])}
    tree = {"params": {"w": chunks}, "opt_state": {"0": {"nu": {"w": pack(whole.reshape(2, 3))}}}}
    (tmp_path / "x.msgpack").write_bytes(msgpack.packb(tree))
    np.testing.assert_array_equal(optax.read(tmp_path / "x.msgpack").params["w"], whole.reshape(2, 3))


def test_bfloat16_is_widened():
    """The conversion to float32 is exact."""
    from rmsprop.conversion.formats.reading import array

    raw = struct.pack("<3H", 0x3F80, 0xC000, 0x7F80)
    np.testing.assert_array_equal(array(raw, "bfloat16", (3,), Path("x"), "x"), np.array([1, -2, np.inf], np.float32))


@pytest.mark.parametrize("file", [file for file in FILES if file.path.suffix in (".h5", ".nd", ".msgpack")], ids=str)
def test_damage_without_checksums_is_one_sentence_or_arrays(file, tmp_path):
    """Numbers replaced at random in formats without checksums give one sentence or arrays."""
    draw, raw, path = random.Random(str(file)), file.path.read_bytes(), tmp_path / file.path.name
    row, read = file.format, 0
    for _ in range(60):
        changed = bytearray(raw)
        for _ in range(draw.choice((1, 2, 8))):
            at, width = draw.randrange(len(raw) - 8), draw.choice((1, 2, 4, 8))
            number = draw.choice((0, 1, 127, 255, 65535, 2**31, 2**63, 2**64 - 1, draw.randrange(len(raw))))
            changed[at : at + width] = (number % 256**width).to_bytes(width, "little")
        path.write_bytes(changed)
        with contextlib.suppress(Unreadable):
            row.read(path)
            read += 1
    assert read < 60


def test_keras_before_tensorflow_2_is_read_in_order(tmp_path):
    """Its states, training/RMSprop/Variable:0, ..., are in the order of the trainable weights."""
    draw = np.random.default_rng(3)
    values = {
        f"dense_1/{leaf}:0": draw.random(shape, np.float32) for leaf, shape in (("kernel", (3, 2)), ("bias", (2,)))
    }
    with h5py.File(tmp_path / "x.h5", "w") as file:
        layer = file.create_group("model_weights/dense_1")
        file["model_weights"].attrs["layer_names"] = [b"dense_1"]
        layer.attrs["weight_names"] = [name.encode() for name in values]
        config = {"class_name": "RMSprop", "config": {"lr": 0.25, "rho": 0.9, "epsilon": 1e-7, "decay": 0.0}}
        file.attrs["training_config"] = json.dumps({"optimizer_config": config}).encode()
        states = file.create_group("optimizer_weights")
        names = ["training/RMSprop/Variable:0", "training/RMSprop/Variable_1:0"]
        states.attrs["weight_names"] = [b"RMSprop/iterations:0", *(name.encode() for name in names)]
        states["RMSprop/iterations:0"] = np.array(9)
        for name, (weight, value) in zip(names, values.items(), strict=True):
            layer[weight], states[name] = value, value**2
    held = h5.read(tmp_path / "x.h5")
    assert (held.owner.name, held.step, held.hyper) == (
        "keras1",
        9,
        {"learning_rate": 0.25, "rho": 0.9, "epsilon": 1e-7},
    )
    for name, slots in held.slots.items():
        np.testing.assert_array_equal(slots["a"], held.params[name] ** 2)


def test_state_that_only_this_package_has_is_reported_as_dropped(tmp_path):
    """No dialect has compensation, rounding or max_update, so the report lists them as dropped."""
    import torch

    from rmsprop import RMSprop, settings
    from rmsprop.conversion import averages
    from rmsprop.conversion.file import prepare
    from rmsprop.conversion.formats.pytorch.file import _OWN_CARE

    assert {name: value for name, value in settings.CARE.items() if name not in averages.SETTINGS} == _OWN_CARE
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = RMSprop([weight], rounding="stochastic", compensation=True, max_update=3.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    for target in ("torch", "rmsprop"):
        said = str(prepare(tmp_path / "run.pt", target).report)
        assert "compensation, the rounding error of half-precision parameters, is dropped" in said
        assert "rounding='stochastic', compensation=True, max_update=3.0 is dropped" in said
    plain = RMSprop([weight])
    plain.step()
    torch.save({"optimizer": plain.state_dict()}, tmp_path / "plain.pt")
    assert "dropped" not in str(prepare(tmp_path / "plain.pt", "torch").report)
