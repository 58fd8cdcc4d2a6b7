"""Checkpoints of other frameworks: recorded ones are read right, written ones are like them, hostile ones refused."""

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

from rmsprop import dialects
from rmsprop.conversion.formats import FORMATS, hdf5, npz, optax
from rmsprop.conversion.formats.keras import h5, keras3
from rmsprop.conversion.formats.keras.owners import Unordered, Variable, assign
from rmsprop.conversion.formats.tensorflow import sstable
from rmsprop.conversion.layout import torch_name, turn
from rmsprop.conversion.record import Checkpoint, Format, Unreadable

HERE = Path(__file__).parent / "checkpoints"
sys.path.insert(0, str(HERE))
import inputs  # noqa: E402

CENTERED = {"mg", "average_gradient", "mu", "g"}
BY_HAND = {"conv/W": "conv.weight", "conv/b": "conv.bias", "fc/W": "fc.weight", "fc/b": "fc.bias"}
BY_HAND |= {name.replace(".", "_"): name for name in inputs.SHAPES}


@dataclasses.dataclass(frozen=True)
class File:
    """A recorded checkpoint, and the record that tells where its run stood."""

    path: Path
    record: str

    def __str__(self):
        return self.path.name

    @property
    def format(self) -> Format:
        return next(row for row in FORMATS if row.sniff(self.path))

    @property
    def told(self):
        return json.loads(str(np.load(HERE / f"{self.record}.npz")["description"]))

    def read(self, path: Path | None = None) -> Checkpoint:
        row = self.format
        words = {word: value for word, value in self.told["words"].items() if word in ("momentum", "centered")}
        return row.read(path or self.path, words) if row.asks else row.read(path or self.path)


def _files() -> list[File]:
    found = []
    for path in sorted(HERE.glob("*.npz")):
        with np.load(path) as record:
            if "description" not in record:
                continue
            told = json.loads(str(record["description"]))
        name = told["checkpoint"]
        if path.stem.startswith(("keras3", "tfkeras", "tf2", "tensorflow1", "optax", "chainer", "mxnet")):
            others = [name, *(name.replace(*pair) for pair in ((".optimizer.", ".snapshot."), (".states", ".nd")))]
            others += [f"{name}.npz"] if name.endswith(".states") else []
            found += [File(HERE / other, path.stem) for other in dict.fromkeys(others)]
    return [file for file in found if not file.path.name.endswith(".states") and not file.path.is_dir()]


FILES = _files()
FRAMEWORKS = ("keras3", "tfkeras", "tf2", "tensorflow1", "optax", "chainer", "mxnet")


def test_every_framework_has_files():
    """Else the tests below would pass on nothing."""
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
    """The parameters are those of the record, bit for bit; every parameter has the dialect's states, of its shape."""
    held, told = file.read(), file.told
    record = np.load(HERE / f"{file.record}.npz")
    assert held.source == told["dialect"]
    row = dialects.find_dialect(held.source)
    names = {name: BY_HAND.get(name) or torch_name(name) for name in held.slots}
    assert sorted(names.values()) == sorted(inputs.SHAPES)
    assert list(held.slots) == [name for name in held.params or held.slots if name in held.slots]
    for name, value in held.params.items():
        np.testing.assert_array_equal(turn(value, held.kinds[name]), record[f"saved/{names[name]}"])
    momentum = bool(told["words"].get("momentum", told["words"].get("gamma2")))
    for name, slots in held.slots.items():
        assert slots.keys() <= row.states.keys()
        ours = {row.states[slot] for slot in slots}
        assert "square_avg" in ours
        assert ("momentum_buffer" in ours) == (momentum or held.source == "tensorflow1")
        graves = held.source == "chainer_graves"
        assert ("grad_avg" in ours) == (bool(told["words"].get("centered")) or graves)
        for slot, value in slots.items():
            assert turn(value, held.kinds[name]).shape == inputs.SHAPES[names[name]], slot
            assert value.dtype == np.float32
    if held.step is not None:
        assert held.step == inputs.SAVED_AT
    for word, value in held.hyper.items():
        wanted = told["words"].get(word, 0.0 if word == "momentum" else False)
        assert value == pytest.approx(wanted if wanted is not None else 0.0, rel=1e-12), word


@pytest.mark.parametrize("file", FILES, ids=str)
def test_states_are_the_averages_of_the_recorded_gradients(file):
    """No two slots are mixed up: v is the average of squares and m of gradients; the velocity is what is left."""
    held, words = file.read(), file.told["words"]
    row = dialects.find_dialect(held.source)
    rho = next(words[word] for word in ("rho", "decay", "alpha", "gamma1") if word in words)
    decay = words.get("weight_decay", words.get("wd", 0.0))
    for name, slots in held.slots.items():
        ours = BY_HAND.get(name) or torch_name(name)
        v = np.ones(inputs.SHAPES[ours]) * (held.source == "tensorflow1")
        m = 0 * v
        for gradient in inputs.gradients()[: inputs.SAVED_AT]:
            g = gradient[ours].astype(np.float64)
            v, m = rho * v + (1 - rho) * g * g, rho * m + (1 - rho) * g
        for slot, value in slots.items():
            got = turn(value, held.kinds[name])
            if decay:
                continue  # the decay is in the recorded gradient; its one slot cannot be mixed up
            if row.states[slot] == "square_avg":
                np.testing.assert_allclose(got, v, rtol=1e-4)
            if row.states[slot] == "grad_avg":
                np.testing.assert_allclose(got, m, rtol=1e-3, atol=1e-5)


def alike(one: Checkpoint, other: Checkpoint) -> None:
    """Assert that two checkpoints say the same."""
    assert one.source == other.source
    assert one.kinds == other.kinds
    assert list(one.params) == list(other.params)
    assert {name: list(slots) for name, slots in one.slots.items()} == {n: list(s) for n, s in other.slots.items()}
    for name, value in one.params.items():
        np.testing.assert_array_equal(value, other.params[name], strict=True)
    for name, slots in one.slots.items():
        for slot, value in slots.items():
            np.testing.assert_array_equal(value, other.slots[name][slot], strict=True)


def blank(held: Checkpoint) -> Checkpoint:
    """The same with other numbers."""
    made = dataclasses.replace(held, params={name: 0 * value + 7 for name, value in held.params.items()})
    made.slots = {n: {slot: 0 * value + 5 for slot, value in slots.items()} for n, slots in held.slots.items()}
    made.step = None if held.step is None else 3
    made.hyper = {**held.hyper, **({"learning_rate": 0.5} if "learning_rate" in held.hyper else {})}
    return made


@pytest.mark.parametrize("file", FILES, ids=str)
def test_what_is_written_is_read_back(file, tmp_path):
    """Into a template that holds other numbers where the format wants one, else from nothing."""
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
    if out.is_file():
        _same_structure(file.path, out)


WHOLE = [file for file in FILES if file.path.name.startswith(("tensorflow1", "optax_rmsprop.state", "mxnet"))]
WHOLE += [file for file in FILES if file.path.name.endswith(".weights.h5") or file.path.name.startswith("chainer")]


@pytest.mark.parametrize("file", WHOLE, ids=str)
def test_some_formats_need_no_template(file, tmp_path):
    """Flat models of .weights.h5, TensorFlow 1, MXNet, Chainer, and optax' commonest tree."""
    held, out = file.read(), tmp_path / file.path.name
    file.format.write(out, held)
    alike(held, file.read(out))
    if out.is_file():
        _same_structure(file.path, out)
    else:
        for name in (f"{out.name}.index", f"{out.name}.data-00000-of-00001"):
            assert (HERE / name).read_bytes() == (tmp_path / name).read_bytes()


def _same_structure(real: Path, made: Path) -> None:
    """What a framework finds in a file: members, groups, datasets, types and attributes."""
    if real.suffix in (".nd", ".msgpack"):
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
        if real.name.endswith(".weights.h5"):  # empty groups of layers without weights, and the optimizer's own name
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
def test_our_hdf5_is_the_c_librarys(path):
    """Groups, attributes and values of every recorded file are what h5py reads."""
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


# --- which state is whose -------------------------------------------------------------------------


def _variables(*shapes, trainable=True):
    return [Variable(f"v{i}", shape, trainable) for i, shape in enumerate(shapes)]


def test_states_find_their_variables_past_the_frozen_ones():
    """What was frozen is skipped where shapes leave one way only."""
    layers = [*_variables((3, 4), (4,)), Variable("mean", (4,), False), Variable("last", (4, 2), True)]
    assert assign(layers, [(3, 4), (4,), (4, 2)]) == (["v0", "v1", "last"], 0, True)
    assert assign(layers, [(4,), (4, 2)]) == (["v1", "last"], 1, True)
    assert assign(layers, [(5,)]) is None


def test_states_that_fit_in_two_ways_are_not_guessed():
    """Of three alike and two states, any two may be meant."""
    way = assign(_variables((4, 4), (4, 4), (4, 4)), [(4, 4), (4, 4)])
    assert way is not None
    assert not way[2]


def test_parts_without_an_order_are_put_into_one_by_shape():
    """Attributes of a subclassed model are saved by name; its variables train in the order of their making."""
    one, two = Variable("one", (2,), True), Variable("two", (3,), True)
    items = [Unordered((((one,),), ((two,),)))]
    assert assign(items, [(3,), (2,)]) == (["two", "one"], 0, True)
    alike = [Unordered((((one,),), ((Variable("other", (2,), True),),)))]
    way = assign(alike, [(2,), (2,)])
    assert way is not None
    assert not way[2]


def test_a_weights_file_that_does_not_name_its_second_state_asks(tmp_path):
    """A small momentum could be an average of gradients: the file does not say, so the user has to."""
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


def test_the_checksum_is_castagnolis():
    """The published value, and long inputs in lanes as short ones."""
    assert sstable.crc32c(b"123456789") == 0xE3069283
    raw = np.random.default_rng(1).bytes(3 * 4096 * 8 + 77)
    whole = 0
    for at in range(0, len(raw), 1000):
        whole = sstable.crc32c(raw[at : at + 1000], whole)
    assert sstable.crc32c(raw) == whole


def test_tables_of_many_keys_are_read_back(tmp_path):
    """Keys share beginnings; every sixteenth is whole."""
    entries = {f"layer/{i:04}/kernel".encode(): bytes(range(i % 7)) for i in range(500)}
    sstable.write(tmp_path / "x.index", entries)
    assert sstable.read(tmp_path / "x.index") == entries


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
    """keystr in both forms, Orbax' dots, flax' slashes."""
    assert optax.words(key) == wanted


def test_wrapped_states_of_optax_are_found(tmp_path):
    """inject_hyperparams and a chain inside a chain: nu is where it is."""
    tree = {"hyperparams/learning_rate": np.array(0.25, np.float32), "count": np.array(7, np.int32)}
    tree |= {f"inner_state/1/0/{slot}/net/w": np.ones(2, np.float32) for slot in ("nu", "mu")}
    tree = {f"opt_state/{key}": value for key, value in tree.items()} | {"params/net/w": np.ones(2, np.float32)}
    np.savez(tmp_path / "x.npz", **tree)
    held = npz.read(tmp_path / "x.npz")
    assert held.slots.keys() == {"net/w"}
    assert (held.step, held.hyper["learning_rate"], held.hyper["centered"]) == (7, 0.25, True)


def test_big_arrays_of_flax_come_in_chunks(tmp_path):
    """As flax.serialization splits what is over a gigabyte."""
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
    """Exactly, to float32."""
    from rmsprop.conversion.formats.reading import array

    raw = struct.pack("<3H", 0x3F80, 0xC000, 0x7F80)
    np.testing.assert_array_equal(array(raw, "bfloat16", (3,), Path("x"), "x"), np.array([1, -2, np.inf], np.float32))


@pytest.mark.parametrize("file", [file for file in FILES if file.path.suffix in (".h5", ".nd", ".msgpack")], ids=str)
def test_damage_without_checksums_is_one_sentence_or_arrays(file, tmp_path):
    """Numbers, bits and pieces exchanged at random, where no checksum stops it first."""
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
    """Its states are called training/RMSprop/Variable:0, ...; they are in the order of the trainable weights."""
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
    assert (held.source, held.step, held.hyper) == ("keras1", 9, {"learning_rate": 0.25, "rho": 0.9, "epsilon": 1e-7})
    for name, slots in held.slots.items():
        np.testing.assert_array_equal(slots["a"], held.params[name] ** 2)


def test_what_this_package_alone_keeps_is_named_as_dropped(tmp_path):
    """A remainder and a bound of steps are no dialect's: the report says that they are left out, and of what size."""
    import torch

    from rmsprop import RMSprop, settings
    from rmsprop.conversion.file import prepare
    from rmsprop.conversion.formats.pytorch.file import _OWN_CARE

    assert _OWN_CARE == settings.CARE
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
