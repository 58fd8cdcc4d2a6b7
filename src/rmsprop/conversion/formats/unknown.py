"""Explains why a file or folder is not a readable checkpoint, and what would work instead."""

from __future__ import annotations

import shlex
from pathlib import Path

from rmsprop.conversion.formats import archives
from rmsprop.conversion.formats.archives import is_archive
from rmsprop.printing import shown

_PACKED = {
    b"\x1f\x8b": ("gzip", "gzip -dc"),
    b"BZh": ("bzip2", "bzip2 -dc"),
    b"\xfd7zXZ\x00": ("xz", "xz -dc"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc"),
    b"7z\xbc\xaf\x27\x1c": ("7-Zip", "7z e -so"),
    b"Rar!": ("RAR", "unrar p -inul"),
}
_OTHERS = {
    b"\x93NUMPY": "a single NumPy array; save named arrays with np.savez",
    b"GGUF": "a GGUF model for inference, which holds no optimizer; pass the training checkpoint",
    b"\x89PNG": "a PNG image",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program",
    b"SQLite format 3": "an SQLite database",
}
_LFS = b"version https://git-lfs.github.com/spec/"
_SAVE = "torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, 'plain.pt')"


def explain(path: Path) -> str:
    """Return one sentence about a path that matches no format: what it is, and what would work."""
    if path.is_dir():
        return _folder(path)
    size = path.stat().st_size if path.exists() else 0
    if not size:
        return f"{path.name} is empty: the save that wrote it did not finish, or the disk was full"
    with path.open("rb") as file:
        head = file.read(4096)
    for start, (name, command) in _PACKED.items():
        if head.startswith(start):
            return f"{path.name} is compressed by {name}; unpack it with: {command} {_quoted(path.name)} > unpacked"
    if head[257:262] == b"ustar":
        command = f"tar -xvf {_quoted(path.name)}"
        return f"{path.name} is a tar archive; unpack it with: {command}, and pass the checkpoint in it"
    if head[4:8] == b"TFL3":
        return f"{path.name} is a TensorFlow Lite model for inference, which holds no optimizer"
    for start, what in _OTHERS.items():
        if head.startswith(start):
            return f"{path.name} is {what}"
    if head.startswith(b"PK"):
        return _zip(path, head)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return pickled(path)
    return _text(path, head) or _damaged(path, head, size)


def _quoted(name: str) -> str:
    """Quote a file's name for a shell. A long or unprintable name becomes FILE."""
    return shlex.quote(name) if name.isprintable() and len(name) < 80 else "FILE"


def pickled(path: Path) -> str:
    """Return the advice for a plain pickle."""
    return (
        f"{path.name} is a pickle of Python objects, which can run code when it is loaded; load it where it was "
        f"created and save plain state dicts: {_SAVE}"
    )


def _zip(path: Path, head: bytes) -> str:
    if not is_archive(path):
        kind = "an archive of torch.save" if b"data.pkl" in head else "a zip archive"
        return f"{path.name} begins as {kind} but its end is missing: it is cut short; copy or download it again"
    names = archives.names(path)
    return (
        f"{path.name} is a zip archive, but not a checkpoint: it holds {shown(', '.join(names[:6]), 160)}; if one of "
        "these is the checkpoint, unpack it with unzip and pass that file"
    )


def _text(path: Path, head: bytes) -> str | None:
    """Return a sentence about a text file, or None if the file is not text."""
    if head.startswith(_LFS):
        return (
            f"{path.name} is a git-lfs pointer of {path.stat().st_size} bytes, not the file; fetch the file with: "
            f"git lfs pull --include {_quoted(path.name)}"
        )
    begin = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:200].lower()
    if begin.startswith((b"<!doctype html", b"<html", b"<head")) or b"<html" in begin:
        return f"{path.name} is an HTML page, such as a download's error or login page; download the file itself"
    if begin.startswith(b"<?xml"):
        return f"{path.name} is an XML document, such as a storage service's error; download the file itself"
    if b"model_checkpoint_path:" in head:
        return (
            f"{path.name} lists a TensorFlow run's checkpoints; pass one of them, by the name in this file or by its "
            ".index file"
        )
    try:
        text = head.decode("utf-8") if len(head) < 4096 else head[:-4].decode("utf-8", "ignore")
    except UnicodeDecodeError:
        return None
    if not all(c.isprintable() or c in "\t\r\n\f" for c in text):
        return None
    if b'"weight_map"' in head:
        return f"{path.name} is the index of a sharded model; pass the folder that contains it"
    what = "JSON" if begin[:1] in (b"{", b"[") else "text"
    return f"{path.name} is a {what} file that begins with {shown(text[:60])}, not a checkpoint"


def _damaged(path: Path, head: bytes, size: int) -> str:
    """Return a sentence about a damaged file of a supported format, or "" for an unknown file."""
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length >= size:
        return (
            f"{path.name} begins as a safetensors file with a header of {length} bytes, but has only {size}: it is "
            "cut short; copy or download it again"
        )
    if ".data-" in path.name:
        return f"{path.name} lacks the .index file of its TensorFlow checkpoint, which must be in the same folder"
    if path.name.endswith(".index"):
        return f"{path.name} lacks the last bytes of a TensorFlow checkpoint's index: it is cut short, or damaged"
    if not head.strip(b"\0"):
        return f"{path.name} begins with {len(head)} zero bytes: the disk or the download lost its content"
    return ""


def _folder(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return f"{path.name} is an empty folder"
    if "saved_model.pb" in names:
        return (
            f"{path.name} is a TensorFlow SavedModel; pass {path.name}/variables/variables.index, which contains the "
            "optimizer's state if the model was saved with it"
        )
    if any(name.endswith(".index") for name in names):
        first = next(name for name in names if name.endswith(".index"))
        return (
            f"{path.name} is a folder; pass one TensorFlow checkpoint in it, such as {shown(f'{path.name}/{first}')}"
        )
    inner = [name for name in names if name.startswith(("global_step", "checkpoint-", "step_", "epoch_"))]
    if inner:
        last = max(inner, key=lambda name: (len(name), name))
        return f"{path.name} is a folder of checkpoints; pass one of them, such as {shown(f'{path.name}/{last}')}"
    return (
        f"{path.name} is a folder that contains {shown(', '.join(names[:8]), 200)}; pass the checkpoint file itself"
    )
