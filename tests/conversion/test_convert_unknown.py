"""A file that is not a readable checkpoint is refused with its kind and with advice that works."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import re
import shutil
import struct
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from cases import mostly_long
from commands import invoke
from saved import MODEL, STATE, trained

from rmsprop import RMSprop
from rmsprop.conversion import Unreadable
from rmsprop.conversion.file import prepare, read_checkpoint, write
from rmsprop.inspection.checkpoint import inspect


def archive():
    """Return a checkpoint's bytes."""
    file = io.BytesIO()
    torch.save({"model": MODEL, "optimizer": STATE}, file)
    return file.getvalue()


def tarred():
    """Return the bytes of a tar with a checkpoint."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        member = tarfile.TarInfo("model.pt")
        member.size = len(archive())
        made.addfile(member, io.BytesIO(archive()))
    return file.getvalue()


def zipped():
    """Return the bytes of a zip without a checkpoint."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("run/model.pt", b"x")
    return file.getvalue()


def safetensors():
    """Return the first bytes of a large safetensors file."""
    return struct.pack("<Q", 100_000) + b'{"weight":{"dtype":"F32"'


FILES = {
    "empty.pt": (b"", "is empty"),
    "empty.keras": (b"", "is empty"),
    "cut.pt": (archive()[:-200], "begins as an archive of torch.save but its end is missing: it is cut short"),
    "cut.zip": (zipped()[:-20], "begins as a zip archive but its end is missing: it is cut short"),
    "cut.safetensors": (safetensors(), "begins as a safetensors file.*cut short"),
    "zeros.pt": (bytes(9000), "begins with 4096 zero bytes"),
    "pointer.pt": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "git-lfs pointer.*git lfs pull",
    ),
    "page.pt": (b"\n<!DOCTYPE html><html><body>404</body></html>", "is an HTML page.*download the file itself"),
    "page.safetensors": (b"<html lang=en>" + bytes(range(32, 127)) * 60, "is an HTML page"),
    "denied.pt": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is an XML document"),
    "notes.pt": ("Größe: 3\n".encode(), "is a text file that begins with"),
    "config.json": (b'{"hidden_size": 64}', "is a JSON file that begins with"),
    "error.pt": (b'{"error": "not found"}', "is a JSON file that begins with"),
    "model.safetensors.index.json": (b'{"weight_map": {}}', "index of a sharded model; pass the folder"),
    "checkpoint": (b'model_checkpoint_path: "model.ckpt-20"\n', "lists a TensorFlow run's checkpoints"),
    "model.pt.gz": (gzip.compress(archive()), "is compressed by gzip; unpack it with: gzip -dc"),
    "gz.pt": (gzip.compress(archive()), "is compressed by gzip"),
    "model.pt.bz2": (bz2.compress(archive()), "is compressed by bzip2"),
    "model.pt.xz": (lzma.compress(archive()), "is compressed by xz"),
    "model.tar": (tarred(), "is a tar archive; unpack it with: tar -xvf"),
    "model.tar.gz": (gzip.compress(tarred()), "is compressed by gzip"),
    "other.zip": (zipped(), "is a zip archive, but not a checkpoint: it holds 'run/model.pt'"),
    "array.npy": (b"\x93NUMPY\x01\x00" + bytes(100), "is a single NumPy array"),
    "model.gguf": (b"GGUF\x03" + bytes(range(100)), "is a GGUF model"),
    "model.ckpt-1.data-00000-of-00001": (bytes(range(256)), "lacks the .index"),
    "noise.pt": (bytes(range(128, 256)) * 9, "is not a format that this package reads"),
    **{
        f"state{p}.pkl": (pickle.dumps({"w": np.ones(2)}, protocol=p), "is a pickle of Python objects.*torch.save")
        for p in (2, 3, 4, 5)
    },
    "pickle.pt": (pickle.dumps({"w": 1}), "is a pickle of Python objects"),
}


@pytest.mark.parametrize("name", mostly_long(FILES, lambda i, _: i % 3 == 0))
def test_a_file_that_is_not_a_checkpoint_is_identified(name, tmp_path):
    """convert and inspect give one sentence, and neither runs nor unpacks anything."""
    content, sentence = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    for read in (prepare, inspect):
        with pytest.raises(Unreadable, match=rf"(?s){sentence}") as caught:
            read(path)
        said = str(caught.value)
        assert said.startswith(name)
        assert said.isprintable()
        assert len(said) < 400
    code, text = invoke("inspect", str(path))
    assert code == 2
    assert "Traceback" not in text


@pytest.mark.parametrize("name", ["model.pt.gz", "gz.pt", "model.pt.bz2", "model.pt.xz", "model.tar", "model.tar.gz"])
def test_the_printed_command_unpacks_the_file(name, tmp_path):
    """The commands, run exactly as printed, produce the checkpoint, even if the file's name has a space."""
    given = tmp_path / f"my {name}"
    given.write_bytes(FILES[name][0])
    for _ in range(3):
        try:
            assert len(read_checkpoint(given).slots) == 4
            return
        except Unreadable as error:
            command = re.search(r"with: (.*?)(, and|$)", str(error))[1]
        if shutil.which(command.split()[0]) is None:
            pytest.skip(f"{command.split()[0]} is not installed")
        subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True, timeout=60)
        given = tmp_path / ("model.pt" if command.startswith("tar") else "unpacked")
        given = given.rename(tmp_path / f"next {given.name}")
    pytest.fail("three commands did not unpack it")


def deflated(path):
    """Write a checkpoint compressed by a zip program."""
    with zipfile.ZipFile(io.BytesIO(archive())) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def without_checksums(path):
    """Write a checkpoint under torch.serialization.set_crc32_options(False)."""
    torch.serialization.set_crc32_options(False)
    try:
        path.write_bytes(archive())
    finally:
        torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize("make", [deflated, without_checksums])
def test_the_printed_line_rewrites_the_file(make, tmp_path):
    """The printed Python line creates a readable file."""
    path = tmp_path / "in.pt"
    make(path)
    with pytest.raises(Unreadable, match=r"rewrite it.*with torch\.save\(") as caught:
        read_checkpoint(path)
    line = re.search(r"torch\.save\(torch\.load\(.*\), new\)", str(caught.value))[0]
    exec(line, {"torch": torch, "file": path, "new": tmp_path / "new.pt"})
    assert len(read_checkpoint(tmp_path / "new.pt").slots) == 4


def folder(path, files):
    """Create these files in a folder."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


FOLDERS = {
    "empty": ({}, "is an empty folder"),
    "saved_model": (
        {"saved_model.pb": b"x", "variables/variables.index": b"x"},
        "SavedModel; pass saved_model/variables/variables.index",
    ),
    "tf": ({"model.ckpt-20.index": b"x"}, "one TensorFlow checkpoint in it, such as 'tf/model.ckpt-20.index'"),
    "run": ({"checkpoint-500/x": b"", "checkpoint-1000/x": b""}, "pass one of them, such as 'run/checkpoint-1000'"),
    "mixed": ({"notes.txt": b"x", "last.pt": b"x"}, "is a folder that contains 'last.pt, notes.txt'"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_refused_with_a_path_to_pass(name, tmp_path):
    """The message is one sentence with a path in that folder, if one can be read."""
    files, sentence = FOLDERS[name]
    (tmp_path / name).mkdir()
    with pytest.raises(Unreadable, match=sentence):
        prepare(folder(tmp_path / name, files))


def hugging_face(path, shards=1, optimizer="optimizer.pt", weights="safetensors"):
    """Create a folder as Transformers' Trainer writes it."""
    from safetensors.torch import save_file

    path.mkdir()
    names = list(MODEL)
    parts = [names[at * 4 // shards : (at + 1) * 4 // shards] for at in range(shards)]
    stem, ending = ("model", "safetensors") if weights == "safetensors" else ("pytorch_model", "bin")
    index = {}
    for at, part in enumerate(parts):
        name = f"{stem}.{ending}" if shards == 1 else f"{stem}-{at + 1:05d}-of-{shards:05d}.{ending}"
        own = {key: MODEL[key].clone() for key in part}
        (save_file if weights == "safetensors" else torch.save)(own, str(path / name))
        index |= dict.fromkeys(part, name)
    if shards > 1:
        (path / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if optimizer:
        torch.save(STATE, path / optimizer)
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("shards", "optimizer", "weights"),
    [(1, "optimizer.pt", "safetensors"), (3, "optimizer.pt", "bin"), (2, "optimizer.bin", "safetensors")],
)
def test_folders_of_transformers_and_accelerate_are_read(shards, optimizer, weights, tmp_path):
    """All shards form the model, and each parameter gets its own state although the names are sorted."""
    held = read_checkpoint(hugging_face(tmp_path / "run", shards, optimizer, weights))
    assert sorted(held.params) == sorted(MODEL)
    for name, entry in zip(MODEL, STATE["state"].values(), strict=True):
        np.testing.assert_array_equal(held.params[name], MODEL[name].numpy())
        np.testing.assert_array_equal(held.slots[name]["square_avg"], entry["square_avg"].numpy())


FOLDERS_OF = {
    "PFRL": {"model.pt": MODEL, "target_model.pt": MODEL, "optimizer.pt": STATE},
    "skorch": {"params.pt": MODEL, "optimizer.pt": STATE, "criterion.pt": {}},
    "PyMARL": {
        "agent.th": {name: value for name, value in MODEL.items() if name[0] == "0"},
        "mixer.th": {name: value for name, value in MODEL.items() if name[0] == "1"},
        "opt.th": STATE,
    },
    "the optimizer alone": {"optimizer.pt": STATE},
}


@pytest.mark.parametrize("name", FOLDERS_OF)
def test_folders_with_a_separate_optimizer_file_are_read(name, tmp_path):
    """The state is assigned to the models in the folder, whatever their file names."""
    for file, content in FOLDERS_OF[name].items():
        torch.save(content, tmp_path / file)
    held = read_checkpoint(tmp_path)
    for at, entry in enumerate(STATE["state"].values()):
        own = list(held.slots)[at]
        np.testing.assert_array_equal(held.slots[own]["square_avg"], entry["square_avg"].numpy())
        if "alone" not in name:
            np.testing.assert_array_equal(held.params[own], list(MODEL.values())[at].numpy())


def test_sorted_names_of_equal_shapes_are_not_paired_by_their_order(tmp_path):
    """With twelve equal layers, 10 sorts before 2, so the state keeps its numbers and loads by order."""
    from safetensors.torch import save_file

    path, out = tmp_path / "run", tmp_path / "out.pt"
    path.mkdir()
    module = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(12)))
    optimizer = trained(module)
    save_file(module.state_dict(), path / "model.safetensors")
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    plan = prepare(path)
    assert any("cannot be matched by order" in sentence for sentence in plan.report.assumed)
    write(plan, out)
    ours = RMSprop(module.named_parameters(), lr=0.1)
    ours.load_state_dict(torch.load(out, weights_only=True)["optimizer"])
    for param in module.parameters():
        assert torch.equal(ours.state[param]["square_avg"], optimizer.state[param]["square_avg"])


def test_the_files_of_an_input_folder_are_never_overwritten(tmp_path):
    """--force does not change that."""
    path = hugging_face(tmp_path / "run")
    before = (path / "optimizer.pt").read_bytes()
    code, text = invoke("convert", str(path), str(path / "optimizer.pt"), "--force")
    assert code == 2
    assert "is the input, which is never changed" in " ".join(text.replace("│", " ").split())
    assert (path / "optimizer.pt").read_bytes() == before


def test_missing_shards_and_shards_outside_the_folder_are_refused(tmp_path):
    """A missing shard is named, and an index that points outside the folder is not followed."""
    path = hugging_face(tmp_path / "run", shards=2)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(Unreadable, match=r"1 of them cannot be found, such as 'model-00002-of-00002.safetensors'"):
        read_checkpoint(path)
    for name in ("../model.pt", "/etc/passwd", "a/b", 3):
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(Unreadable, match="is not the index of a sharded model"):
            read_checkpoint(path)
