"""Pickles of torch.save are read as data, and hostile ones neither run code nor exhaust memory."""

import argparse
import collections
import datetime
import enum
import io
import os
import pathlib
import pickle
import pickletools
import subprocess
import sys
import tracemalloc
import types
import zipfile
from decimal import Decimal

import numpy as np
import pytest
import torch
from cases import mostly_long
from torch import nn

from rmsprop.conversion.file import prepare, read_checkpoint
from rmsprop.conversion.formats.pytorch.load import load
from rmsprop.conversion.formats.pytorch.pickle import Machine, Opaque
from rmsprop.conversion.record import Unreadable


class Settings(dict):
    """A dict subclass, as many trainers define one (EasyDict, CfgNode, AttributeDict)."""


class Rows(list):
    """A list subclass."""


class Color(enum.Enum):
    """An enum."""

    RED = 1


class Loud:
    """An object that would run code at every opcode of its pickle."""

    def __reduce__(self):
        return print, ("this ran",), {"a": 1}, iter([1]), iter([("a", 2)])


class Kept(types.SimpleNamespace):
    """An object with state."""


FOREIGN = {
    "Namespace": argparse.Namespace(lr=0.1, opt="rmsprop", nested=argparse.Namespace(a=[1])),
    "path": pathlib.Path("/x"),
    "datetime": datetime.datetime(2020, 1, 1),
    "enum": Color.RED,
    "Decimal": Decimal("0.1"),
    "function": os.system,
    "class": nn.Linear,
    "module": nn.Linear(2, 2),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "defaultdict of a class": collections.defaultdict(Kept, a=Kept(b=1)),
    "Counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2], 3),
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "set of paths": {pathlib.Path("/x")},
    "dict subclass": Settings(a=1, b=Settings(c=2)),
    "list subclass": Rows([1, Rows([2])]),
    "object": Kept(a=Kept(b=torch.ones(2))),
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"\x00\xff"),
    "large int": 1 << 2000,
    "complex": 1 + 2j,
    "ndarray": np.arange(6.0).reshape(2, 3),
    "ndarray of objects": np.array([{}, None], dtype=object),
    "RNG state": np.random.get_state(),
    "Generator": np.random.default_rng(0),
    "torch.Generator state": torch.get_rng_state(),
    "device": torch.device("cuda:1"),
    "dtype": torch.bfloat16,
    "Size": torch.Size((2, 3)),
    "layout": torch.strided,
    "sparse": torch.eye(3).to_sparse(),
    "slice": slice(1, 2),
    "range": range(3),
    "Ellipsis": ...,
    "loud": Loud(),
    "loud keys": {Color.RED: 1, pathlib.Path("/x"): 2, (1, (2, "a")): 3, 1 << 2000: 4, None: 5},
    "itself": None,
}
FOREIGN["itself"] = [FOREIGN]


def a_run():
    """Return a model and its optimizer after two steps."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("protocol", range(2, 6))
def test_state_is_read_from_a_file_with_foreign_objects(tmp_path, protocol, capfd):
    """Arguments, paths, enums, subclasses and objects in the file do not affect its tensors and numbers."""
    model, optimizer = a_run()
    whole = {"args": FOREIGN, "model": model.state_dict(), "optimizer": optimizer.state_dict(), **FOREIGN}
    torch.save(whole, tmp_path / "x.pt", pickle_protocol=protocol)
    held = read_checkpoint(tmp_path / "x.pt")
    assert held.owner.name == "torch"
    for i, (name, p) in enumerate(model.named_parameters()):
        np.testing.assert_array_equal(held.params[name], p.detach().numpy())
        for slot in ("square_avg", "momentum_buffer"):
            np.testing.assert_array_equal(held.slots[name][slot], optimizer.state_dict()["state"][i][slot].numpy())
    assert "this ran" not in capfd.readouterr().out


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("name", FOREIGN)
def test_each_foreign_value_becomes_data_or_a_placeholder(tmp_path, name, protocol, capfd):
    """No value is created by its own class."""
    path = tmp_path / "x.pt"
    torch.save({"before": 1, "it": FOREIGN[name], "after": torch.ones(2)}, path, pickle_protocol=protocol)
    found = load(path)
    assert found["before"] == 1
    assert torch.equal(found["after"], torch.ones(2))
    plain = (Opaque, dict, list, tuple, bytes, int, complex, str, float, torch.Tensor, torch.device, torch.dtype)
    assert type(found["it"]) in plain
    assert "this ran" not in capfd.readouterr().out


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_values_are_read_exactly(tmp_path, protocol):
    """NumPy scalars become numbers; bytes, text and containers keep their values and order."""
    path = tmp_path / "x.pt"
    given = {
        "numpy": [np.float64(0.1), np.float32(0.5), np.int64(-7), np.uint8(200), np.bool_(True), np.float64("nan")],
        "big-endian": np.array([1.5], ">f8")[0],
        "complex": [1 - 2j, np.complex64(1j)],
        "bytes": [b"", b"\x00\xff", "größe".encode()],
        "text": ["größe", "\ud800", "a" * 300, ""],
        "numbers": [0, -1, 255, 65536, 1 << 40, -(1 << 70), 0.1, float("inf"), True, None],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "Counter": collections.Counter("aab"),
        "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
        "default": collections.defaultdict(list, a=[1]),
        5: {None: 1, 2.5: 2, b"k": 3},
    }
    torch.save(given, path, pickle_protocol=protocol)
    found = load(path)
    nan = found["numpy"].pop()
    assert nan != nan
    assert found == {**given, "numpy": [0.1, 0.5, -7, 200, True]}
    assert [type(x) for x in found["numpy"]] == [float, float, int, int, bool]
    assert list(found["ordered"]) == ["b", "a"]


TENSORS = {
    "float": torch.randn(3, 4),
    "a transpose": torch.randn(3, 4).t(),
    "a slice": torch.arange(20.0)[3:9:2],
    "expanded": torch.ones(1).expand(4),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3),
    "bool": torch.tensor([True, False]),
    "half": torch.randn(5).half(),
    "bfloat16": torch.randn(5).bfloat16(),
    "double": torch.randn(5).double(),
    "int8": torch.tensor([-3], dtype=torch.int8),
    "uint16": torch.tensor([60000], dtype=torch.uint16),
    "float8": torch.randn(4).to(torch.float8_e4m3fn),
    "complex": torch.randn(3, dtype=torch.complex64),
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
    "Parameter": nn.Parameter(torch.randn(2)),
    "requires grad": torch.randn(2, requires_grad=True),
    "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("protocol", [2, 5])
def test_tensors_are_read_as_torch_reads_them(tmp_path, protocol):
    """Every dtype, view and layout is equal bit for bit, and shared storages stay shared."""
    path = tmp_path / "x.pt"
    named = nn.Parameter(torch.randn(2))
    named.note = "an attribute"
    given = {**TENSORS, "again": TENSORS["a slice"], "attribute": named}
    torch.save(given, path, pickle_protocol=protocol)
    found = load(path)
    for name, value in given.items():
        value, own = value.detach(), found[name]
        assert (own.dtype, own.shape, own.stride()) == (value.dtype, value.shape, value.stride()), name
        assert own.is_conj() == value.is_conj()
        wide = (torch.float32,) if value.dtype in (torch.float8_e4m3fn, torch.uint16) else ()
        assert torch.equal(own.resolve_conj().resolve_neg().to(*wide), value.resolve_conj().resolve_neg().to(*wide))
    assert found["again"].data_ptr() == found["a slice"].data_ptr()


# --- hostile pickles ------------------------------------------------------------------------------


def archived(path, data, records=None):
    """Write an archive of torch.save with this pickle."""
    with zipfile.ZipFile(path, "w") as held:
        held.writestr("x/data.pkl", data)
        for key, raw in (records or {}).items():
            held.writestr(f"x/data/{key}", raw)
    return path


def said(path):
    """Return the value in a file, or the message of its refusal."""
    try:
        return load(path)
    except Unreadable as error:
        return str(error)


class Reduced:
    """An object whose pickle is any given call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "call",
    [
        (os.system, ("touch ran",)),
        (eval, ("open('ran', 'w')",)),
        (exec, ("open('ran', 'w')",)),
        (getattr, (os, "getcwd")),
        (__import__, ("antigravity_of_rmsprop",)),
        (map, (os.system, ["touch ran"])),
        (subprocess.Popen, (["touch", "ran"],)),
        (torch.load, ("ran",)),
        (open, ("ran", "w")),
        (pickle.loads, (pickle.dumps(Reduced(os.system, ("touch ran",))),)),
        (torch.hub.load, ("a/b", "c")),
        (torch._utils._rebuild_tensor_v2, (Reduced(os.system, ("touch ran",)), 0, (1,), (1,), False, None)),
        (torch._tensor._rebuild_from_type_v2, (os.system, torch.Tensor, ("touch ran",), {})),
        (collections.defaultdict, (os.system,)),
        (collections.OrderedDict, (Reduced(os.system, ("touch ran",)),)),
    ],
    ids=range(15),
)
def test_no_call_in_a_pickle_is_executed(tmp_path, monkeypatch, call, protocol):
    """No function runs and no module is imported, in any protocol."""
    monkeypatch.chdir(tmp_path)
    try:
        data = pickle.dumps({"a": Reduced(*call), "b": [1]}, protocol)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError):
        pytest.skip("pickle cannot write this call")
    loaded = set(sys.modules)
    found = said(archived(tmp_path / "x.pt", data))
    assert len(found) < 400 if isinstance(found, str) else found["b"] == [1]
    assert not (tmp_path / "ran").exists()
    assert {name for name in set(sys.modules) - loaded if not name.startswith("encodings.")} == set()


def test_no_name_in_a_pickle_is_imported(tmp_path, monkeypatch):
    """A module on the import path is not imported."""
    (tmp_path / "evil_module.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for data in (
        b"cevil_module\nThing\n.",
        b"(ievil_module\nThing\n.",
        b"\x80\x04\x8c\x0bevil_module\x8c\x05Thing\x93)R.",
    ):
        with pytest.raises(Unreadable, match=r"would run code \('evil_module Thing'\)"):
            load(archived(tmp_path / "x.pt", data))
    assert not (tmp_path / "ran").exists()
    assert "evil_module" not in sys.modules


def test_build_changes_no_function_or_class(tmp_path):
    """BUILD, which sets attributes of an object, changes none."""
    before = torch._utils._rebuild_tensor_v2.__defaults__, dict(vars(collections.OrderedDict))
    for name in (b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict", b"builtins\nprint"):
        state = pickle.dumps((None, {"__defaults__": (1,), "__code__": 5, "items": 3, "__init__": 4}), 2)[2:-1]
        with pytest.raises(Unreadable):
            load(archived(tmp_path / "x.pt", b"\x80\x02c" + name + b"\n" + state + b"b."))
    assert (torch._utils._rebuild_tensor_v2.__defaults__, dict(vars(collections.OrderedDict))) == before
    made = b"\x80\x02ccollections\nOrderedDict\n)R" + pickle.dumps({"items": 3}, 2)[2:-1] + b"b."
    assert load(archived(tmp_path / "x.pt", made)).items() == {}.items()


def tensor(size, stride, offset=0, storage="FloatStorage", key="0"):
    """Return the pickle of one tensor with any size, stride and offset."""

    class _Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", getattr(torch, storage), key, "cpu", 1 << 40) if value is Ellipsis else None

    file = io.BytesIO()
    call = (torch._utils._rebuild_tensor_v2, (..., offset, size, stride, False, None))
    _Pickler(file, 2).dump({"t": Reduced(*call)})
    return file.getvalue()


@pytest.mark.parametrize(
    "arguments",
    [
        dict(size=(5,), stride=(1,)),
        dict(size=(1,), stride=(1,), offset=4),
        dict(size=(1,), stride=(1,), offset=-1),
        dict(size=(2,), stride=(-1,), offset=1),
        dict(size=(2,), stride=(1 << 62,)),
        dict(size=(1 << 62, 1 << 62), stride=(1, 1)),
        dict(size=(1 << 70,), stride=(0,)),
        dict(size=(-1,), stride=(1,)),
        dict(size=(2, 2), stride=(1,)),
        dict(size=(True,), stride=(1,)),
        dict(size=(1.0,), stride=(1,)),
        dict(size=(1,) * 100, stride=(1,) * 100),
        dict(size="ab", stride="ab"),
        dict(size=5, stride=1),
        dict(size=(1 << 70, 0), stride=(1, 1)),
        dict(size=(1,), stride=(1,), key="1"),
        dict(size=(1,), stride=(1,), key="../data.pkl"),
    ],
    ids=range(17),
)
def test_a_tensor_never_exceeds_its_record(tmp_path, arguments):
    """Invalid offsets, strides and sizes give one sentence."""
    with pytest.raises(Unreadable, match="its pickle is invalid"):
        load(archived(tmp_path / "x.pt", tensor(**arguments), {"0": bytes(16)}))
    assert load(archived(tmp_path / "y.pt", tensor((4,), (1,)), {"0": bytes(16)}))["t"].numel() == 4


BOMBS = {
    "a memo far away": b"\x80\x02]r\xff\xff\xff\xff.",
    "a negative length": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "a long text": b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b"a.",
    "long bytes": b"\x80\x05\x96" + (1 << 60).to_bytes(8, "little") + b"a.",
    "a long frame": b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b"N.",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "deep lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "a deep key": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
    "a shared key": b"\x80\x02})" + b"2\x86" * 1000 + b"Ns.",
    "a long int as key": b"\x80\x02}\x8b"
    + (100_000).to_bytes(4, "little")
    + b"\x7f" * 100_000
    + b"q\0Ns"
    + b"h\0Ns" * 100_000
    + b".",
    "dicts of one list": b"\x80\x02]("
    + b"K\1K\2\x86" * 50_000
    + b"e\x85q\0ccollections\nOrderedDict\nq\1"
    + b"h\1h\0R" * 50_000
    + b".",
    "bytes of one text": b"\x80\x02X"
    + (100_000).to_bytes(4, "little")
    + b"a" * 100_000
    + b"X\6\0\0\0latin1\x86q\0c_codecs\nencode\nq\1"
    + b"h\1h\0R" * 50_000
    + b".",
    "sets": b"\x80\x04" + b"\x8f" * 200_000 + b".",
    "marks": b"\x80\x02" + b"(" * 200_000 + b"l.",
    "an empty stack": b"\x80\x02R.",
    "an unknown opcode": b"\x80\x02\xff.",
    "an extension": b"\x80\x02\x82\1.",
    "nothing": b"",
    "a text for a call": b"\x80\x02X\1\0\0\0a)R.",
}


SLOW = ("a long int as key", "dicts of one list", "deep lists", "deep tuples", "marks", "sets")


@pytest.mark.parametrize("name", mostly_long(BOMBS, lambda _, name: name not in SLOW))
def test_memory_is_linear_in_the_pickle_size(tmp_path, name):
    """Wrong counts, nesting, sharing and endless copies are refused, or take at most 100 bytes per byte of pickle."""
    path = archived(tmp_path / "x.pt", BOMBS[name])
    tracemalloc.start()
    found = said(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not isinstance(found, str) or len(found) < 400
    assert peak < 100 * len(BOMBS[name]) + (1 << 20)


def test_the_class_of_a_required_object_is_named(tmp_path):
    """A whole optimizer instead of its state dict, and a file that is a whole module, are refused by class."""
    path = tmp_path / "x.pt"
    model, optimizer = a_run()
    torch.save({"model": model.state_dict(), "optimizer": optimizer}, path)
    with pytest.raises(Unreadable, match=r"would run code \('torch.optim.rmsprop RMSprop'\)"):
        prepare(path)
    torch.save(model, path)
    with pytest.raises(Unreadable, match=r"would run code \('torch.nn.modules.linear Linear'\)"):
        prepare(path)


@pytest.mark.parametrize(
    "settings",
    mostly_long(
        [{"dialect": 60}, {"lr": 60}, {"alpha": 60}, {"eps": 60}, {"note": 60}, {"momentum": 60}],
        lambda i, _: i in (1, 4),
    ),
    ids=str,
)
def test_a_hostile_setting_is_not_compared_or_printed_whole(tmp_path, settings):
    """A tuple nested sixty times with shared parts, or another huge value, gives one short sentence."""
    (name,) = settings
    tree = ()
    for _ in range(60):
        tree = (tree, tree)
    _, optimizer = a_run()
    for value in (tree, [tree], [1.0] * 10**5, "\x1b[2J\n" * 1000, 1 << 20000):
        kept = optimizer.state_dict()
        kept["param_groups"][0][name] = value
        torch.save({"optimizer": kept}, tmp_path / "x.pt")
        with pytest.raises((ValueError, TypeError)) as caught:
            prepare(tmp_path / "x.pt")
        assert len(str(caught.value)) < 500
        assert str(caught.value).isprintable()


def test_every_opcode_that_torch_writes_is_supported():
    """Only buffers, extensions and persistent ids as text are refused."""
    refused = {"PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
    for op in pickletools.opcodes:
        said = ""
        try:
            Machine({}.__getitem__).run(op.code.encode("latin-1") + bytes(8) + b"\n.")
        except Exception as error:
            said = str(error)
        assert (f"the opcode {op.name}" in said) == (op.name in refused), op.name


def test_the_arguments_of_a_run_are_data(tmp_path):
    """Each Namespace keeps its own attributes and stays a placeholder; the state of any other object is skipped."""
    one, two = argparse.Namespace(a=1, inner=argparse.Namespace(b=2.5)), argparse.Namespace(a=3)
    torch.save({"one": one, "two": two, "other": Kept(a=1)}, tmp_path / "x.pt")
    made = load(tmp_path / "x.pt")
    assert all(isinstance(value, Opaque) for value in made.values())
    inner = made["one"].arguments.pop("inner")
    assert [x.arguments for x in (made["one"], inner, made["two"])] == [{"a": 1}, {"b": 2.5}, {"a": 3}]
    assert made["other"].arguments == {}
