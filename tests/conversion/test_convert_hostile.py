"""Checkpoints with wrong sizes, external links, code or damage are each refused in one clear sentence."""

import io
import zipfile

import h5py
import numpy as np
import pytest
import torch
from bundles import field, write_table
from paths import CHECKPOINTS

from rmsprop import RMSprop
from rmsprop.conversion.file import prepare, write
from rmsprop.conversion.formats import FORMATS, mxnet, npz, optax
from rmsprop.conversion.formats.keras import h5, keras3
from rmsprop.conversion.formats.tensorflow import checkpoint, sstable
from rmsprop.conversion.record import Unreadable
from rmsprop.inspection.checkpoint import inspect

HERE = CHECKPOINTS


def refuses(read, path, match):
    """Assert that reading raises one clear sentence."""
    with pytest.raises(Unreadable, match=match) as caught:
        read(path)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 500
    assert path.name.split(".")[0] in said


def test_objects_in_an_npz_are_refused(tmp_path):
    """Reading objects would unpickle them."""
    np.savez(tmp_path / "x.npz", **{"opt_state/0/nu/w": np.array([{}], dtype=object)})
    refuses(npz.read, tmp_path / "x.npz", "Python objects")


def test_a_decompression_bomb_is_refused(tmp_path):
    """The archive is refused before it is unpacked."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("nu.npy", bytes(1 << 26))
    refuses(npz.read, tmp_path / "x.npz", "ten times its size")


def test_a_declared_shape_must_match_the_data(tmp_path):
    """A header that declares terabytes allocates nothing."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("nu.npy", header.getvalue() + bytes(16))
    refuses(npz.read, tmp_path / "x.npz", "holds 16 bytes")


def test_pickles_of_mxnet_are_refused():
    """The message says how to save the arrays instead."""
    refuses(mxnet.read, HERE / "mxnet_rmsprop.states", "can run code.*nd.save")
    refuses(mxnet.read, HERE / "mxnet_rmsprop.trainer.states", "can run code.*nd.save")


def test_orbax_is_refused():
    """The message says how to save the tree instead."""
    assert optax.sniff(HERE / "optax_orbax")
    refuses(optax.read, HERE / "optax_orbax", "to_bytes")


def test_adam_is_not_taken_for_rmsprop(tmp_path):
    """count, mu and nu of optax.adam have the names of a centered, bias-corrected RMSprop."""
    state = {"opt_state/0/count": np.array(3, np.int32), "params/w": np.ones(2, np.float32)}
    state |= {"opt_state/0/mu/w": np.array([1.0, 2.0], np.float32), "opt_state/0/nu/w": np.ones(2, np.float32)}
    np.savez(tmp_path / "x.npz", **state)
    refuses(npz.read, tmp_path / "x.npz", "state of Adam")


def test_other_optimizers_are_named(tmp_path):
    """The message contains the optimizer's name from the Keras file."""
    with zipfile.ZipFile(HERE / "keras3-momentum.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["config.json"] = members["config.json"].replace(b'"class_name": "RMSprop"', b'"class_name": "Adam"')
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    refuses(keras3.read, tmp_path / "x.keras", "optimizer 'Adam', not of RMSprop")


def _linked(file):
    file["layers/dense/vars/0"] = h5py.SoftLink("/elsewhere")


def _outside(file):
    file["layers/dense/vars/0"] = h5py.ExternalLink("/etc/passwd", "x")


def _chunked(file):
    file.create_dataset("layers/dense/vars/0", data=np.zeros((4, 4)), chunks=(2, 2), compression="gzip")


def _stored_elsewhere(file):
    file.create_dataset("layers/dense/vars/0", (4,), "f4", external=[("/etc/passwd", 0, 16)])


def _virtual(file):
    made = h5py.VirtualLayout((4,), "f4")
    made[:] = h5py.VirtualSource("other.h5", "x", (4,))
    file.create_virtual_dataset("layers/dense/vars/0", made)


def _twice(file):
    file["layers/dense/vars/0"] = np.zeros(4)
    file["layers/dense/vars/1"] = file["layers/dense/vars/0"]


def _strings(file):
    file["layers/dense/vars/0"] = ["a", "b"]


@pytest.mark.parametrize("make", [_linked, _outside, _chunked, _stored_elsewhere, _virtual, _twice, _strings])
def test_hdf5_beyond_plain_arrays_is_refused(make, tmp_path):
    """Links, chunks and external files are refused by name, with the command that creates a plain file."""
    with h5py.File(tmp_path / "x.weights.h5", "w") as file:
        make(file)
    refuses(keras3.read, tmp_path / "x.weights.h5", "h5repack|save it again with model.save")


def test_a_newer_hdf5_version_is_refused(tmp_path):
    """The message contains the command that rewrites the file in an older version."""
    with h5py.File(tmp_path / "x.weights.h5", "w", libver="latest") as file:
        file["layers/dense/vars/0"] = np.zeros(4)
    refuses(keras3.read, tmp_path / "x.weights.h5", "superblock of version 3.*h5repack --low=0")


def _damaged(tmp_path, change):
    """Return a copy of a bundle with a changed index or data file."""
    name = "tensorflow1-momentum.ckpt-20"
    index, data = ((HERE / f"{name}{end}").read_bytes() for end in (".index", ".data-00000-of-00001"))
    index, data = change(bytearray(index), bytearray(data))
    (tmp_path / f"{name}.index").write_bytes(index)
    if data:
        (tmp_path / f"{name}.data-00000-of-00001").write_bytes(data)
    return tmp_path / name


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda index, data: (index, data[:100] + b"\x01" + data[101:]), "checksum"),
        (lambda index, data: (index[:50] + b"\xee" + index[51:], data), "checksum"),
        (lambda index, data: (index, data[:500]), "cut short"),
        (lambda index, data: (index[:400], data), "is cut"),
        (lambda index, _: (index, b""), "is missing"),
    ],
)
def test_damaged_bundles_are_refused(change, match, tmp_path):
    """The checksums of LevelDB's blocks and of every tensor detect the damage."""
    refuses(checkpoint.read, _damaged(tmp_path, change), match)


def _with_entry(tmp_path, change):
    """Return a bundle with a changed table entry and valid checksums."""
    name = "tensorflow1-momentum.ckpt-20"
    table = sstable.read(HERE / f"{name}.index")
    change(table)
    write_table(tmp_path / f"{name}.index", table)
    data = (HERE / f"{name}.data-00000-of-00001").read_bytes()
    (tmp_path / f"{name}.data-00000-of-00001").write_bytes(data)
    return tmp_path / name


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        (b"fc/bias", field(1, 1) + field(7, b""), "in parts"),
        (b"fc/bias", field(1, 1) + field(5, 1 << 40), "more bytes|declares"),
        (b"fc/bias", field(1, 1) + field(2, field(2, field(1, 1 << 62))), "declares"),
        (b"fc/bias", field(1, 20), "not numeric"),
        (b"fc/bias", field(1, 1) + field(3, 7), "file 7 of 1"),
        (b"", field(1, 1 << 40), "data files"),
        (b"", field(1, 1) + field(2, 1), "big-endian"),
        (b"fc/bias/RMSProp", None, "1 slots"),
    ],
)
def test_bundles_with_wrong_entries_are_refused(key, value, match, tmp_path):
    """Sizes, types and shapes are validated before anything is allocated."""

    def change(table):
        if value is None:
            del table[key]
        else:
            table[key] = value

    refuses(checkpoint.read, _with_entry(tmp_path, change), match)


def test_hdf5_of_other_programs_is_refused(tmp_path):
    """A checkpoint has Keras' lists of layers."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["measurements/0"] = np.zeros(4)
    assert h5.sniff(tmp_path / "x.h5")
    refuses(h5.read, tmp_path / "x.h5", "but not from Keras")


def said_by(read):
    """Return the message of a ValueError or TypeError, or "" if none is raised."""
    try:
        read()
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), 2**1024, float("nan"), float("inf"), "x" * 100_000, True, None]
)
@pytest.mark.parametrize(
    "word", ["lr", "alpha", "weight_decay", "clip_value", "max_update", "seed", "eps_mode", "step"]
)
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_values_of_any_size_in_our_own_format_are_read_or_refused_in_a_sentence(name, word, value, tmp_path):
    """The only errors are a ValueError or TypeError with a short message."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = RMSprop([("w", parameter)], lr=0.1)
    parameter.grad = torch.ones(2)
    optimizer.step()
    whole = {"model": {"w": parameter.detach()}, "optimizer": optimizer.state_dict()}
    if name.endswith(".pt"):
        whole["optimizer"]["param_groups"][0][word] = value
        if word == "step":
            whole["optimizer"]["state"][0]["step"] = value
        torch.save(whole, tmp_path / name)
    else:
        torch.save(whole, tmp_path / "a.pt")
        made = prepare(tmp_path / "a.pt").checkpoint
        made.hyper[word] = made.groups[0][1][word] = value
        if word == "step":
            made.step = value
        next(row for row in FORMATS if row.name == "safetensors").write(tmp_path / name, made)
    for read in (lambda: write(prepare(tmp_path / name), tmp_path / "out.pt"), lambda: inspect(tmp_path / name)):
        assert len(said_by(read)) < 600


def test_our_own_state_without_its_average_is_a_sentence(tmp_path):
    """inspect and convert give the same sentence."""
    group = RMSprop([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9).state_dict()["param_groups"]
    state = {0: {"step": torch.tensor(1.0), "square_avg": None, "momentum_buffer": torch.ones(2)}}
    torch.save({"optimizer": {"state": state, "param_groups": group}}, tmp_path / "x.pt")
    for read in (prepare, inspect):
        with pytest.raises(Unreadable, match="no average of squares"):
            read(tmp_path / "x.pt")
