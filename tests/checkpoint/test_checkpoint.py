"""Checkpoint files: what is saved comes back as it was, and a file is whole, the one before, or refused."""

import copy
import json
import os
import random
import re
import subprocess
import sys
import zlib
from collections import Counter, OrderedDict, defaultdict
from enum import IntEnum

import alone
import numpy as np
import pytest
import torch
from nested import same
from paths import DOCS, TESTS
from torch import nn

from rmsprop import RMSprop, checkpoint, files
from rmsprop.checkpoint import packing
from rmsprop.spec import STATE_DTYPES

safetensors_torch = pytest.importorskip(
    "safetensors.torch", reason="safetensors is not installed, and checkpoints need it"
)


def run():
    """A small run that has begun, as the keywords of save."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = RMSprop(model.named_parameters(), lr=torch.tensor(0.1), momentum=0.9, centered=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 4])
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    scheduler.step()
    return dict(model=model, optimizer=optimizer, scheduler=scheduler, scaler=torch.amp.GradScaler("cpu"))


FLOATS = torch.tensor([0.0, -0.0, 1 / 3, float("inf"), float("-inf"), float("nan"), 1e-42, -3e38])
DTYPES = [
    *(getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "complex64", "complex128")),
    *(getattr(torch, name) for name in ("complex32", "int64", "int32", "int16", "int8", "uint8", "bool")),
    *(getattr(torch, name) for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")),
]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_come_back_bit_by_bit(tmp_path, dtype):
    """NaN, inf, subnormal and negative zero too; without dimensions, without elements, in any layout."""
    size = dtype.itemsize
    whole = torch.randint(0, 256, (6 * size,), dtype=torch.uint8)
    whole = torch.tensor([True, False] * 3) if dtype == torch.bool else whole.view(dtype)
    if dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        whole = FLOATS.to(dtype)[:6]
    values = [whole, whole[0], whole[:0], whole.reshape(2, 3), whole.reshape(2, 3).t(), whole[::2]]
    path = checkpoint.save(tmp_path / "x", values=values)
    assert same(checkpoint.load(path), {"values": values})


def test_everything_that_is_no_tensor_comes_back_as_it_was(tmp_path):
    """Numbers exactly, containers of the same type, keys of any plain type."""
    values = [
        None,
        True,
        0,
        -(2**200),
        0.1,
        -0.0,
        float("nan"),
        float("inf"),
        float("-inf"),
        5e-324,
        1 + 2j,
        complex("nan"),
        "",
        "ü \ud800 !tensor \n\"'\\",
        b"\x00\xff",
        (1, (2,)),
        [],
        {1: 2, None: "x", (1, 2): [3], 0.5: {}},
        {"!tensor": 1},
        {"a": {"b": {}}},
        OrderedDict(b=1, a=2),
        Counter({3: 2}),
        {1, 2},
        frozenset({"x"}),
        torch.Size([1, 2]),
        torch.bfloat16,
        torch.device("cpu"),
        np.float32(0.1),
        np.int64(-3),
        np.bool_(True),
        np.arange(6, dtype=np.uint32).reshape(2, 3)[:, ::2],
        np.array(2.5, ">f8").astype("f8"),
    ]
    path = checkpoint.save(tmp_path / "x", values=values, more={"deep": {"er": values}})
    loaded = checkpoint.load(path)
    assert same(loaded, {"values": values, "more": {"deep": {"er": values}}})
    assert type(checkpoint.load(checkpoint.save(path, x=np.float64(0.1)))["x"]) is float


def test_a_run_comes_back_whole(tmp_path):
    """Model, optimizer, scheduler and scaler are loaded, and everything is returned."""
    parts = run()
    path = checkpoint.save(tmp_path / "deep" / "er" / "x.safetensors", step=7, **parts)
    other = run()
    for p in other["model"].parameters():
        p.data.zero_()
    loaded = checkpoint.load(path, **other)
    assert loaded["step"] == 7
    for name, part in parts.items():
        assert same(part.state_dict(), other[name].state_dict()), name
        assert same(part.state_dict(), loaded[name]), name
    assert loaded["model"]._metadata == parts["model"].state_dict()._metadata
    assert os.listdir(path.parent) == ["x.safetensors"]
    assert not any(value.requires_grad for value in loaded["model"].values())


def test_tensors_that_are_one_stay_one_and_those_that_overlap_do_not(tmp_path):
    """Tied weights are in the file once; a slice is saved by itself."""
    weight = torch.randn(1000)
    path = checkpoint.save(tmp_path / "x", tied=[weight, weight.detach(), nn.Parameter(weight)], part=weight[10:20])
    assert path.stat().st_size < 6000
    loaded = checkpoint.load(path)
    assert all(value is loaded["tied"][0] for value in loaded["tied"])
    assert torch.equal(loaded["part"], weight[10:20])
    loaded["tied"][0].fill_(0)
    assert torch.equal(loaded["part"], weight[10:20])


def test_names_with_dots_do_not_collide(tmp_path):
    """Two places that would have one name in the file are two tensors."""
    values = {"a.b": torch.ones(1), "a": {"b": torch.zeros(1), 0: torch.ones(2)}, "__metadata__": torch.ones(3)}
    path = checkpoint.save(tmp_path / "x", values=values, __metadata__=torch.ones(4))
    assert same(checkpoint.load(path), {"values": values, "__metadata__": torch.ones(4)})


def test_what_is_returned_does_not_hang_on_the_file(tmp_path):
    """The file may be replaced, cut or removed afterwards."""
    path = checkpoint.save(tmp_path / "x", weight=torch.arange(100000.0))
    loaded = checkpoint.load(path)["weight"]
    path.write_bytes(b"")
    assert torch.equal(loaded, torch.arange(100000.0))
    loaded.fill_(1)


def test_what_is_saved_is_the_moment_of_the_call(tmp_path, monkeypatch):
    """A thread that steps while the file is written is not in it, and does not spoil it."""
    weight = torch.zeros(10)
    whole = files.write_whole

    def write(path, save, *, sync):
        weight.fill_(1)
        return whole(path, save, sync=sync)

    monkeypatch.setattr(checkpoint, "write_whole", write)
    assert not checkpoint.load(checkpoint.save(tmp_path / "x", weight=weight))["weight"].any()


def test_random_generators_go_on_where_they_were(tmp_path):
    """The global ones with rng=True, others as parts."""
    own = dict(a=torch.Generator(), b=np.random.default_rng(3), c=random.Random(4), d=np.random.RandomState(5))

    def draw():
        ours = own["a"], own["b"].random(3), own["c"].random(), own["d"].rand(3)
        numbers = (
            torch.rand(3),
            np.random.rand(3),
            random.random(),
            random.gauss(0, 1),
            torch.rand(2, generator=ours[0]),
        )
        return [*numbers, *ours[1:]]

    draw()
    path = checkpoint.save(tmp_path / "x", rng=True, **own)
    first = draw()
    assert not same(first, draw())
    checkpoint.load(path, rng=True, **own)
    assert same(first, draw())
    checkpoint.save(path)
    with pytest.raises(ValueError, match="does not hold rng; it holds nothing"):
        checkpoint.load(path, rng=True)


class Colour(IntEnum):
    """A number with a name."""

    RED = 1


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (lambda: {"a": [1, abs]}, "part.a.1 is a builtin_function_or_method; a checkpoint holds tensors, numbers"),
        (lambda: nn.Linear, "part is a type; a checkpoint holds"),
        (lambda: defaultdict(dict), "part is a defaultdict; a checkpoint holds plain dicts"),
        (lambda: Colour.RED, r"part is the Colour <Colour.RED: 1>"),
        (lambda: np.array(["x"]), "part is an? ndarray"),
        (lambda: np.longdouble(1) * np.ones(1, np.longdouble), "part is a NumPy .*, which torch does not have"),
        (lambda: torch.ones(2).to_sparse(), "part is a torch.float32 tensor of layout torch.sparse_coo"),
        (lambda: torch.ones(2, device="meta"), "on meta; a checkpoint holds dense tensors"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "part is a torch.qint8 tensor"),
        (lambda: nn.Buffer(torch.ones(2)).as_subclass(Strange), "part is a Strange, not a plain tensor"),
        (lambda: {("a", abs): 1}, "a key of part.1 is a builtin"),
    ],
    ids=range(11),
)
@pytest.mark.filterwarnings("ignore:.*quantize")
def test_what_cannot_be_saved_is_named_and_the_old_file_stays(tmp_path, value, says):
    """The sentence says where it is and what it is, before anything is written."""
    path = checkpoint.save(tmp_path / "x", step=1)
    with pytest.raises(TypeError, match=says):
        checkpoint.save(path, part=value())
    assert checkpoint.load(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["x"]


class Strange(torch.Tensor):
    """A subclass, whose meaning a file would lose."""


def test_a_value_that_holds_itself_and_one_that_is_too_long_are_refused(tmp_path, monkeypatch):
    """Neither recursion nor a header that nobody could read."""
    loop = []
    loop.append(loop)
    with pytest.raises(ValueError, match=r"is nested too deep, or holds itself"):
        checkpoint.save(tmp_path / "x", loop=loop)
    monkeypatch.setattr(checkpoint, "_LARGEST", 1_000_000)
    with pytest.raises(
        ValueError, match="hold 1 MB of numbers and strings outside tensors, and a checkpoint takes 1 MB"
    ):
        checkpoint.save(tmp_path / "x", losses=[0.125] * 200_000)
    assert not os.listdir(tmp_path)


@pytest.mark.long
def test_the_largest_header_that_is_written_can_be_read(tmp_path):
    """Quotes are escaped twice; safetensors reads headers of up to 100 MB."""
    words = ['"' * 10] * 1_300_000
    assert len(json.dumps(words)) > 0.9 * checkpoint._LARGEST
    assert checkpoint.load(checkpoint.save(tmp_path / "x", words=words))["words"] == words


def test_objects_and_parts_must_meet(tmp_path):
    """An object without its part, or that takes none, is refused before anything is loaded."""
    parts = run()
    path = checkpoint.save(tmp_path / "x", optimizer=parts["optimizer"], step=3)
    before = copy.deepcopy(parts["optimizer"].state_dict())
    other = run()["optimizer"]
    with pytest.raises(ValueError, match="x does not hold model or ema; it holds optimizer, step"):
        checkpoint.load(path, optimizer=other, model=parts["model"], ema=parts["model"])
    with pytest.raises(TypeError, match="step is an int, which has no load_state_dict; omit it"):
        checkpoint.load(path, optimizer=other, step=3)
    wrong = RMSprop([("x", nn.Parameter(torch.ones(1)))])
    model = nn.Linear(1, 1)
    weights = copy.deepcopy(model.state_dict())
    checkpoint.save(path, optimizer=parts["optimizer"], model=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="loaded state dict does not fit this optimizer"):
        checkpoint.load(path, model=model, optimizer=wrong)
    assert same(model.state_dict(), weights)
    assert same(parts["optimizer"].state_dict(), before)


class Refusing(nn.Module):
    """An object that refuses its part after others took theirs."""

    def load_state_dict(self, *_):
        raise ValueError("never")


def trained(make, model, steps=2):
    """An optimizer that has stepped."""
    optimizer = make(model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("wrong", ["a model of another shape", "a model with other names", "another object", "rng"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_load_that_is_refused_changes_nothing(tmp_path, wrong, begun):
    """Models, optimizers of ours and of torch, schedulers, scalers, generators: those before are as they were."""
    makers = {
        "ours": lambda model: RMSprop(model.named_parameters(), lr=0.1, momentum=0.9, centered=True),
        "ours too": lambda model: RMSprop(model.parameters(), lr=0.2),
        "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.3, amsgrad=True),
        "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.4, momentum=0.5),
    }

    def make(steps, seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        made = {"model": model, **{name: trained(maker, model, steps) for name, maker in makers.items()}}
        made["scheduler"] = torch.optim.lr_scheduler.StepLR(made["adam"], seed + 1)
        made["plateau"] = torch.optim.lr_scheduler.ReduceLROnPlateau(made["rmsprop"], patience=seed)
        made["scaler"] = torch.amp.GradScaler("cpu", init_scale=2.0**seed)
        made["generator"] = torch.Generator().manual_seed(seed)
        return made

    saved = make(3, 1)
    saved["model2"] = nn.Linear(2, 2)
    last = {
        "a model of another shape": {"model2": nn.Linear(2, 3)},
        "a model with other names": {"model2": nn.Sequential(nn.Linear(2, 2))},
        "another object": {"model2": Refusing()},
        "rng": {},
    }[wrong]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_rng_state", lambda: {"torch": torch.get_rng_state(), "numpy": 5})
        checkpoint.save(tmp_path / "x", rng=True, **saved)
    own = {**make(2 if begun else 0, 2), **last}

    def seen():
        return copy.deepcopy(
            {name: checkpoint._state(part) for name, part in own.items()} | {"rng": checkpoint._rng_state()}
        )

    before, weights = seen(), list(own["model"].parameters())
    with pytest.raises(
        (ValueError, RuntimeError), match=r"never|size mismatch|Missing key|is not a state of the random"
    ):
        checkpoint.load(tmp_path / "x", rng=wrong == "rng", **own)
    after = seen()
    for name, state in before.items():
        assert same(after[name], state), name
    assert all(one is other for one, other in zip(own["model"].parameters(), weights, strict=True))
    model = own["model"]
    model(torch.ones(2, 3)).sum().backward()
    for name in makers:
        own[name].step()


# --- files that are not whole, or not ours --------------------------------------------------------


def small(path):
    """A small checkpoint's bytes."""
    values = dict(weight=torch.arange(6.0).reshape(2, 3), z=torch.ones(3, dtype=torch.complex64), step=3)
    return checkpoint.save(path, **values).read_bytes(), values


def test_a_file_cut_anywhere_is_refused(tmp_path):
    """Every length but the whole one, in one sentence."""
    path = tmp_path / "x"
    whole, _ = small(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=rf"x \({length} bytes\) is not a complete checkpoint: it is damaged, truncated"
        ):
            checkpoint.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        checkpoint.load(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    """Each fifth bit of the file: refused in one sentence, or of no consequence."""
    path = tmp_path / "x"
    whole, values = small(path)
    sentences, places = [], range(0, 8 * len(whole), 5)
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert same(checkpoint.load(path), values), place
        except ValueError as error:
            sentences.append(str(error))
    assert all(
        re.match(r".*x( \(\d+ bytes\))? is (not a complete|a) (checkpoint|safetensors file)", s) for s in sentences
    )
    assert len(sentences) > 0.9 * len(places)


def test_other_files_are_refused_in_a_sentence(tmp_path):
    """Pickles of torch, other safetensors, text, a folder; a missing file is a missing file."""
    path = tmp_path / "x"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(
        ValueError, match="is not a complete checkpoint: it is damaged, truncated, or another kind of file"
    ):
        checkpoint.load(path)
    safetensors_torch.save_file({"a": torch.ones(2)}, path)
    with pytest.raises(
        ValueError, match=r"is a safetensors file, but not a checkpoint of rmsprop: .*load_file reads"
    ):
        checkpoint.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        checkpoint.load(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "y")
    with pytest.raises(IsADirectoryError, match="is a folder; a checkpoint is one file"):
        checkpoint.load(tmp_path)


def test_a_newer_format_is_refused_with_both_versions(tmp_path, monkeypatch):
    """The sentence says who wrote it, what this reads, and what to do."""
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    path = checkpoint.save(tmp_path / "x", step=1)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"is a checkpoint of format 2, written by rmsprop .* reads up to format 1; install"
    ):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "node",
    [
        {"!eval": "1"},
        {"!tensor": ["nothing", "float32", [1], 0]},
        {"!tensor": ["t", "int32", [1], 0]},
        {"!tensor": ["t", "float32", [2], 0]},
        {"!tensor": ["t", "float32", [1], 5]},
        {"!tensor": ["t", "void", [1], 0]},
        {"!tensor": 3},
        {"!set": [[]]},
        {"!bytes": "?"},
        {"!dtype": "load"},
        {"!device": 1.5},
        {"!float": "1"},
        {"!dict": [[1]]},
        {"!dict": 5},
        {"!tuple": 5},
        {"!complex": [1]},
    ],
    ids=str,
)
def test_a_tree_without_meaning_is_refused(node):
    """Only the kinds that are written are read: no name in a file is looked up as code."""
    with pytest.raises(ValueError, match="its tree is not valid"):
        packing.unpack({"a": [node]}, {"t": torch.ones(1)}.__getitem__)


HOSTILE_TREES = {
    "a long int": "1" * 5000,
    "an int beyond every float": {"!complex": [1 << 5000, 0]},
    "sizes beyond every int": {"!Size": [1 << 70]},
    "a long key": {"!dict": [[1 << 80, 1]]},
    "a long key in a tuple": {"!dict": [[{"!tuple": [1 << 80]}, 1]]},
    "a long member": {"!set": [1 << 80]},
    "a tag of a megabyte": {"!" + "x" * 10**6: 1},
    "a number of a megabyte": {"!float": "x" * 10**6},
    "a name of a megabyte": {"!tensor": ["x" * 10**6, "float32", [1], 0]},
    "a dtype of a megabyte": {"!dtype": "x" * 10**6},
    "a module for a dtype": {"!dtype": "_dynamo"},
    "a device of a megabyte": {"!device": "x" * 10**6},
    "control characters": {"!float": "\x1b[2J\n"},
    "a shape without end": {"!tensor": ["t", "float32", [1] * 10**6, 0]},
    "a negative shape": {"!tensor": ["t", "float32", [-1], 0]},
    "a long checksum": {"!tensor": ["t", "float32", [1], 1 << 13000]},
    "metadata of numbers": {"!OrderedDict": [], "!metadata": 5},
    "two tags": {"!tuple": [], "!list": []},
    "nested": json.loads("[" * 900 + "]" * 900),
}


@pytest.mark.parametrize("name", HOSTILE_TREES)
def test_a_tree_of_any_size_is_a_value_or_one_short_sentence(tmp_path, name):
    """Ints, keys, names, shapes and nesting of any size, with sound checksums."""
    text = json.dumps({"a": HOSTILE_TREES[name]}) if name != "a long int" else '{"a": ' + HOSTILE_TREES[name] + "}"
    notes = {"rmsprop_checkpoint": "1", "rmsprop": "1", "tree": text, "crc32": str(zlib.crc32(text.encode()))}
    safetensors_torch.save_file({"t": torch.ones(1)}, tmp_path / "x", metadata=notes)
    loaded = set(sys.modules)
    try:
        checkpoint.load(tmp_path / "x")
        said = "is not a complete checkpoint"
    except ValueError as error:
        said = str(error)
    assert "is not a complete checkpoint" in said
    assert len(said) < 600
    assert said.isprintable()
    assert not {module for module in set(sys.modules) - loaded if module.startswith("torch")}


def test_a_tree_with_random_nodes_is_a_value_or_a_value_error():
    """A thousand trees of real ones with a node replaced, moved or doubled."""
    draw = random.Random(0)
    packed = packing.Packed(
        {"a": [1, 2.5, (3, {4}), torch.ones(2), {"k": b"b"}], "n": np.float32(1), "c": Counter("aab")}
    )
    odd = [
        None,
        -1,
        1 << 70,
        1e400,
        "x",
        "",
        [],
        {},
        {"!tuple": 5},
        {"!dict": [[[], 1]]},
        {"!Size": ["a"]},
        [[[]]],
        True,
    ]

    def nodes(value, found):
        if isinstance(value, list | dict):
            for key in range(len(value)) if isinstance(value, list) else list(value):
                found.append((value, key))
                nodes(value[key], found)
        return found

    for _ in range(1000):
        made = copy.deepcopy(packed.tree)
        places = nodes(made, [])
        for _ in range(draw.choice((1, 2, 3))):
            (where, key), (other, name) = draw.choice(places), draw.choice(places)
            where[key] = copy.deepcopy(draw.choice([*odd, other.get(name) if isinstance(other, dict) else 0]))
        said = ""
        try:
            packing.unpack(made, packed.tensors.__getitem__)
        except ValueError as error:
            said = str(error)
        assert len(said) < 300


def test_what_could_not_be_read_is_not_saved(tmp_path):
    """Ints that Python does not read, and keys that are refused."""
    for value in (1 << 20000, {1 << 80: 1}, {(1, 1 << 80): 1}, {1 << 80}, frozenset({1 << 80})):
        with pytest.raises(
            ValueError, match=r"part\.0 (is|has) .*; a (checkpoint holds ints up to 14000|key has at most 64) bits"
        ):
            checkpoint.save(tmp_path / "x", part=[value])
    for value in (1 << 13000, -(1 << 63), {1 << 63: 1, -(1 << 60): 2}):
        assert checkpoint.load(checkpoint.save(tmp_path / "x", part=value)) == {"part": value}


# --- saves that are interrupted ------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["save_file", "fsync", "replace", "fsync of the folder"])
def test_a_save_that_fails_leaves_the_file_before(tmp_path, monkeypatch, moment):
    """At every moment there is one whole file, and no other one is left."""
    path = checkpoint.save(tmp_path / "x", step=1)
    calls = []

    def fail(*args, **_):
        calls.append(args)
        if moment != "fsync of the folder" or len(calls) == 2:
            raise OSError("no space left on device")

    if moment == "save_file":
        monkeypatch.setattr("safetensors.torch.save_file", fail)
    else:
        monkeypatch.setattr(os, "replace" if moment == "replace" else "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(path, step=2)
    monkeypatch.undo()
    assert checkpoint.load(path) == {"step": 2 if moment == "fsync of the folder" else 1}
    assert os.listdir(tmp_path) == ["x"]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Written, synchronized, renamed, and then the folder is synchronized."""
    seen = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, name=name: (seen.append(name), real(*args))[1])
    checkpoint.save(tmp_path / "x", step=1)
    assert seen == ["fsync", "replace", "fsync"]


@pytest.mark.skipif(os.name != "posix", reason="processes are asked for by signal 0")
def test_what_killed_saves_left_goes_with_the_next(tmp_path):
    """Parts of processes that are gone are removed; those of living ones, of other machines and files stay."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    node = files.platform.node()
    names = {
        f".x.{node}.{dead.pid}.part": False,
        f".x.{node}.{os.getppid()}.part": True,
        f".x.{node}.{10**30}.part": False,
        f".x.other.{dead.pid}.part": True,
        f".y.{node}.{dead.pid}.part": True,
        f".x.{node}.x.part": True,
    }
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    checkpoint.save(tmp_path / "x", step=1)
    assert set(os.listdir(tmp_path)) == {"x", *(name for name, stays in names.items() if stays)}


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_a_link_to_a_checkpoint_stays_a_link(tmp_path):
    """`latest` points where it did, and the file there is the new one."""
    checkpoint.save(tmp_path / "x", step=1)
    (tmp_path / "latest").symlink_to("x")
    assert checkpoint.save(tmp_path / "latest", step=2) == tmp_path / "latest"
    assert (tmp_path / "latest").is_symlink()
    assert checkpoint.load(tmp_path / "x") == {"step": 2}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
@pytest.mark.parametrize(
    ("kills", "steps", "state_dtype"),
    [(1, 30, "float8"), *(pytest.param(6, 120, name, marks=pytest.mark.long) for name in STATE_DTYPES)],
)
def test_a_killed_run_ends_as_one_that_nobody_killed(kills, steps, state_dtype):
    """A few kills at random moments; `make kill-test` makes 200."""
    tool = TESTS / "tools" / "kill_and_resume.py"
    done = alone.run(tool, "--kills", kills, "--steps", steps, "--state-dtype", state_dtype)
    assert done.returncode == 0, done.stderr
    assert "every run ended as the undisturbed one, to the last bit" in done.stdout


def test_without_safetensors_the_sentence_says_what_to_install(monkeypatch):
    """Both directions."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (checkpoint.save, checkpoint.load):
        with pytest.raises(ImportError, match=r"pip install 'rmsprop\[checkpoint\]'$"):
            call("x")


def test_the_page_about_checkpoints_is_true(tmp_path, monkeypatch, capsys):
    """Its code runs as it stands, and prints what its comments say."""
    page = (DOCS / "checkpoints.md").read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S))
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(compile(program, "checkpoints.md", "exec"), {})
    promised = re.findall(r"^# (.*)$", program, re.M)
    assert capsys.readouterr().out.splitlines() == promised
