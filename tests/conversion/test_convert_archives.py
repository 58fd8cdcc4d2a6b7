"""Zip archives with wrong declared sizes or unusual members are refused in one sentence without using memory."""

import functools
import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from paths import CHECKPOINTS as HERE
from saved import MODEL, STATE

from rmsprop.conversion import Unreadable
from rmsprop.conversion.file import read_checkpoint

BIG = 24 << 20


def zipped(members, method=zipfile.ZIP_DEFLATED):
    """Return the bytes of a zip archive with these members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def npz(method=zipfile.ZIP_DEFLATED, size=BIG):
    """Return an .npz of zeros."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
    return zipped({"opt_state/0/nu/w.npy": header.getvalue() + bytes(size)}, method)


def keras():
    """Return a .keras with zeros as weights."""
    with zipfile.ZipFile(HERE / "keras3-momentum.keras") as old:
        return zipped({name: bytes(BIG) if name.endswith(".h5") else old.read(name) for name in old.namelist()})


def sb3():
    """Return a Stable-Baselines3 zip with zeros as policy."""
    return zipped({"policy.pth": bytes(BIG), "policy.optimizer.pth": b""})


def pt():
    """Return a torch.save archive with zeros as pickle."""
    return zipped({"archive/data.pkl": bytes(BIG), "archive/version": b"3\n"})


def declaring(data, size, where=("central", "local")):
    """Return the archive with another size in the headers of its largest member, and the same stored bytes."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    member = max(archive.infolist(), key=lambda own: own.file_size)
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
    """Return the peak number of bytes that reading allocates, and the message of its error."""
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
def test_no_more_than_the_declared_size_is_unpacked(name, where, size, tmp_path):
    """An archive of 24 KB that unpacks to 24 MB but declares less allocates the declared size, and is refused."""
    path = tmp_path / name
    path.write_bytes(declaring(KINDS[name](), size, where))
    took, said = peak(read_checkpoint, path)
    assert took < 10 * path.stat().st_size + (8 << 20)
    assert said.startswith(name)
    assert len(said) < 400


@pytest.mark.parametrize("name", KINDS)
def test_an_honest_bomb_is_refused_before_it_is_unpacked(name, tmp_path):
    """The limit is ten times the file's size, as documented."""
    path = tmp_path / name
    path.write_bytes(KINDS[name]())
    took, said = peak(read_checkpoint, path)
    assert "ten times its size" in said
    assert took < 10 * path.stat().st_size + (8 << 20)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["bzip2", "lzma"])
def test_other_compression_is_refused_by_its_number(method, tmp_path):
    """zipfile unpacks these methods without a limit: four kilobytes of bzip2 can become gigabytes."""
    path = tmp_path / "x.npz"
    path.write_bytes(declaring(npz(method), 1000))
    took, said = peak(read_checkpoint, path)
    assert f"by zip method {method}; rewrite it stored or deflated" in said
    assert took < 8 << 20


def test_members_with_the_same_name_are_refused(tmp_path):
    """Programs differ in which of the two they read."""
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


def test_overlapping_members_are_refused(tmp_path):
    """A thousand names for the same bytes would unpack them a thousand times."""
    path, data = tmp_path / "x.npz", npz(size=1000)
    at, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry, count = data[at:end], 5
    entries = b"".join(entry.replace(b"nu/w", b"nu/%c" % (97 + i)) for i in range(count))
    tail = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, len(entries), at, 0)
    path.write_bytes(data[:at] + entries + tail)
    with pytest.raises(Unreadable, match="overlap"):
        read_checkpoint(path)


def test_a_wrong_64_bit_size_is_refused(tmp_path):
    """An extra field that declares 2⁶² bytes allocates nothing."""
    path, file, real = tmp_path / "x.npz", io.BytesIO(), npz(zipfile.ZIP_STORED, 100)
    with zipfile.ZipFile(io.BytesIO(real)) as old, zipfile.ZipFile(file, "w") as made:
        with made.open("nu.npy", "w", force_zip64=True) as member:
            member.write(old.read(old.namelist()[0]))
        made.filelist[0].file_size = made.filelist[0].compress_size = 1 << 62
    path.write_bytes(file.getvalue())
    took, _ = peak(read_checkpoint, path)
    assert took < 8 << 20


def test_a_nested_archive_has_its_own_limit(tmp_path):
    """A policy.pth that unpacks to more than ten times its size is refused, as the outer zip would be."""
    path = tmp_path / "x.zip"
    path.write_bytes(zipped({"policy.pth": zipped({"archive/data.pkl": bytes(1 << 20)})}))
    took, said = peak(read_checkpoint, path)
    assert "compressed members" in said or "ten times" in said
    assert took < 8 << 20


def test_a_small_well_compressed_archive_is_read(tmp_path):
    """A state of zeros written by np.savez_compressed is within the limit."""
    path = tmp_path / "x.npz"
    np.savez_compressed(
        path, **{"params/w": np.zeros(5000, np.float32), "opt_state/0/nu/w": np.zeros(5000, np.float32)}
    )
    assert read_checkpoint(path, "optax").slots["w"]["nu"].shape == (5000,)
