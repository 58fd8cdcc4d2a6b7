"""Zip archives whose declared sizes lie, or that hold what no checkpoint does, cost no memory and one sentence."""

import functools
import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from test_convert_files import HERE
from test_convert_places import MODEL, STATE

from rmsprop.conversion import Unreadable
from rmsprop.conversion.file import read_checkpoint

BIG = 24 << 20


def npz(method=zipfile.ZIP_DEFLATED, size=BIG):
    """An .npz of zeros."""
    file, header = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
    with zipfile.ZipFile(file, "w", method) as made:
        made.writestr("opt_state/0/nu/w.npy", header.getvalue() + bytes(size))
    return file.getvalue()


def keras():
    """A .keras whose weights are zeros."""
    file = io.BytesIO()
    with zipfile.ZipFile(HERE / "keras3-momentum.keras") as old, zipfile.ZipFile(file, "w") as made:
        for name in old.namelist():
            raw = bytes(BIG) if name.endswith(".h5") else old.read(name)
            made.writestr(name, raw, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def sb3():
    """A zip of Stable-Baselines3 whose policy is zeros."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("policy.pth", bytes(BIG))
        made.writestr("policy.optimizer.pth", b"")
    return file.getvalue()


def pt():
    """A file of torch.save whose pickle is zeros."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", bytes(BIG))
        made.writestr("archive/version", b"3\n")
    return file.getvalue()


def declaring(data, size, where=("central", "local")):
    """The archive with another size in the headers of its largest member; its stored bytes stay."""
    held = zipfile.ZipFile(io.BytesIO(data))
    member = max(held.infolist(), key=lambda own: own.file_size)
    made, name = bytearray(data), member.filename.encode()
    if "local" in where:
        made[member.header_offset + 22 : member.header_offset + 26] = struct.pack("<I", size)
    at = data.index(b"PK\x01\x02")
    while data[at + 46 : at + 46 + len(name)] != name:
        at = data.index(b"PK\x01\x02", at + 1)
    if "central" in where:
        made[at + 24 : at + 28] = struct.pack("<I", size)
    return bytes(made)


KINDS = {
    name: functools.cache(make) for name, make in (("x.npz", npz), ("x.keras", keras), ("x.zip", sb3), ("x.pt", pt))
}


def peak(read, path):
    """Bytes of Python's and NumPy's that reading takes at once, and the sentence that it ends with."""
    tracemalloc.start()
    try:
        with pytest.raises(Unreadable) as caught:
            read(path)
        return tracemalloc.get_traced_memory()[1], str(caught.value)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [0, 1, 1000, 500_000])
@pytest.mark.parametrize("where", [("central",), ("central", "local")], ids=["central", "both"])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_declared_is_the_most_that_is_unpacked(name, where, size, tmp_path):
    """24 megabytes in 24 kilobytes that declare a few bytes take what they declare, and a sentence."""
    path = tmp_path / name
    path.write_bytes(declaring(KINDS[name](), size, where))
    took, said = peak(read_checkpoint, path)
    assert took < 10 * path.stat().st_size + (8 << 20)
    assert said.startswith(name)
    assert len(said) < 400


@pytest.mark.parametrize("name", KINDS)
def test_an_honest_bomb_is_refused_before_it_is_unpacked(name, tmp_path):
    """Ten times the file is the limit, as the docs say."""
    path = tmp_path / name
    path.write_bytes(KINDS[name]())
    took, said = peak(read_checkpoint, path)
    assert "ten times its size" in said
    assert took < 10 * path.stat().st_size + (8 << 20)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["bzip2", "lzma"])
def test_other_compression_is_refused_by_its_number(method, tmp_path):
    """zipfile unpacks these without a limit: four kilobytes of bzip2 are gigabytes."""
    path = tmp_path / "x.npz"
    path.write_bytes(declaring(npz(method), 1000))
    took, said = peak(read_checkpoint, path)
    assert f"by zip method {method}; rewrite it stored or deflated" in said
    assert took < 8 << 20


def test_members_of_one_name_are_refused(tmp_path):
    """Readers differ in which of the two they take."""
    for name in ("x.npz", "x.pt", "x.keras", "x.zip"):
        path = tmp_path / name
        source = {"x.keras": HERE / "keras3-momentum.keras", "x.zip": HERE / "sb3_rmsproptflike.zip"}.get(name)
        if name == "x.npz":
            path.write_bytes(npz(size=10))
        elif name == "x.pt":
            torch.save({"model": MODEL, "optimizer": STATE}, path)
        else:
            path.write_bytes(source.read_bytes())
        with zipfile.ZipFile(path, "a") as made, pytest.warns(UserWarning, match="Duplicate"):
            made.writestr(made.namelist()[-1], b"other")
        with pytest.raises(Unreadable, match="two members with the same name"):
            read_checkpoint(path)


def test_members_that_lie_over_each_other_are_refused(tmp_path):
    """A thousand names for the same bytes would unpack a thousand times."""
    path, data = tmp_path / "x.npz", npz(size=1000)
    at, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry, count = data[at:end], 5
    entries = b"".join(entry.replace(b"nu/w", b"nu/%c" % (97 + i)) for i in range(count))
    tail = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, len(entries), at, 0)
    path.write_bytes(data[:at] + entries + tail)
    with pytest.raises(Unreadable, match="overlap"):
        read_checkpoint(path)


def test_sizes_of_64_bits_that_lie_are_refused(tmp_path):
    """An extra field that declares 2 to the 62 bytes allocates none."""
    path, file, real = tmp_path / "x.npz", io.BytesIO(), npz(zipfile.ZIP_STORED, 100)
    with zipfile.ZipFile(io.BytesIO(real)) as old, zipfile.ZipFile(file, "w") as made:
        with made.open("nu.npy", "w", force_zip64=True) as member:
            member.write(old.read(old.namelist()[0]))
        made.filelist[0].file_size = made.filelist[0].compress_size = 1 << 62
    path.write_bytes(file.getvalue())
    took, _ = peak(read_checkpoint, path)
    assert took < 8 << 20


def test_an_archive_in_an_archive_has_the_limit_of_its_own(tmp_path):
    """A policy.pth that unpacks to ten times itself inside a zip of ten times itself is refused at the inner one."""
    path, inner = tmp_path / "x.zip", io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", bytes(1 << 20))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("policy.pth", inner.getvalue())
    took, said = peak(read_checkpoint, path)
    assert "compressed members" in said or "ten times" in said
    assert took < 8 << 20


def test_what_compresses_well_and_is_small_is_read(tmp_path):
    """np.savez_compressed of a state of zeros within the limit."""
    path = tmp_path / "x.npz"
    np.savez_compressed(
        path, **{"params/w": np.zeros(5000, np.float32), "opt_state/0/nu/w": np.zeros(5000, np.float32)}
    )
    assert read_checkpoint(path, "optax").slots["w"]["nu"].shape == (5000,)
