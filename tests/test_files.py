"""Files that are written whole or not at all: full disks, signals, modes, links, two writers of one path."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from paths import CHECKPOINTS
from typer.testing import CliRunner

from rmsprop import checkpoint, files
from rmsprop.cli import app
from rmsprop.conversion.file import prepare, recognize, write, writer
from rmsprop.files import write_whole

HERE = CHECKPOINTS
pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits, modes and signals of POSIX")


@contextmanager
def full_disk(size=100):
    """No file may grow beyond `size` bytes; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- full disks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("torch_rmsprop.pt", "x.pt"),
        ("torch_rmsprop.pt", "x.safetensors"),
        ("optax_rmsprop.state.npz", "x.npz"),
        ("optax_rmsprop.msgpack", "x.msgpack"),
        ("keras3-momentum.keras", "x.keras"),
        ("keras3-momentum.weights.h5", "x.weights.h5"),
        ("tfkeras-legacy-momentum.h5", "x.h5"),
    ],
)
def test_a_full_disk_is_one_sentence_whatever_is_converted(tmp_path, source, out):
    """An OSError that names the file and not the part of it, and nothing is left."""
    held, row = recognize(HERE / source).read(HERE / source), writer(Path(out))
    words = {"template": HERE / source} if row.template else {}
    with full_disk(), pytest.raises(OSError, match=out) as caught:
        write_whole(tmp_path / out, lambda part: row.write(part, held, **words))
    assert str(caught.value) == f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: {str(tmp_path / out)!r}"
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_one_sentence_for_a_checkpoint(tmp_path):
    """The file before it stays, and can be loaded."""
    path = checkpoint.save(tmp_path / "x", step=1)
    with full_disk(1000), pytest.raises(OSError, match="x") as caught:
        checkpoint.save(path, weight=torch.ones(1000))
    assert str(caught.value) == f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: {str(path)!r}"
    assert checkpoint.load(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_what_a_library_makes_of_a_full_disk_is_an_oserror_again(tmp_path, number):
    """A RuntimeError in the midst of an OSError, as torch's; a text with the number, as safetensors'."""

    def hidden(part):
        try:
            raise OSError(number, os.strerror(number), str(part))
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598\n" * 109)

    def worded(_):
        raise ValueError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    for save in (hidden, worded):
        with pytest.raises(OSError, match="x") as caught:
            write_whole(tmp_path / "x", save)
        assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "x"))
    assert not os.listdir(tmp_path)


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    """What `save` cannot read is not said of what it writes."""
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(tmp_path / "x", lambda _: (tmp_path / "template").read_bytes())
    assert caught.value.filename == str(tmp_path / "template")


def test_a_full_disk_for_the_report_does_not_blame_out(tmp_path):
    """OUT is there, and the sentence is about the report."""
    words = ["convert", str(HERE / "torch_rmsprop.pt"), str(tmp_path / "x.pt"), "--report", "/dev/full"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "/dev/full" in done.output
    assert "x.pt cannot" not in done.output
    (tmp_path / "full").mkdir()
    words[-1] = str(tmp_path / "full" / "report.json")
    sound = files.os.replace

    def fail(part, target):
        if str(target).endswith(".json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part), None, str(target))
        sound(part, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "replace", fail)
        done = CliRunner().invoke(app, [*words, "--force"])
    assert done.exit_code == 2
    said = "".join(done.output.replace("│", " ").split())
    assert "full/report.jsoncannotbereadorwritten:Nospaceleftondevice" in said
    assert not os.listdir(tmp_path / "full")


# --- signals --------------------------------------------------------------------------------------

SLOW = """
import signal, sys, time
from pathlib import Path
from rmsprop.files import write_whole

# nohup and background jobs start their children with signals ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

def save(part):
    part.write_bytes(bytes(100000))
    print("writing", flush=True)
    time.sleep(60)

write_whole(Path(sys.argv[1]), save, sync=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_process_that_is_told_to_end_leaves_no_part(tmp_path, number):
    """The file before stays, and the process ends by the signal, as it would have."""
    (tmp_path / "x").write_text("before")
    words = [sys.executable, "-W", "ignore", "-c", SLOW, str(tmp_path / "x")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        assert running.stdout.readline() == b"writing\n"
        running.send_signal(number)
        assert running.wait(30) == -number
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "before"


def test_handlers_of_others_are_left_alone(tmp_path):
    """Who handles SIGTERM goes on to handle it; who ignores SIGHUP goes on to ignore it; nothing stays installed."""
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1)), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        write_whole(tmp_path / "x", lambda part: (part.write_text("a"), os.kill(os.getpid(), signal.SIGTERM)))
        os.kill(os.getpid(), signal.SIGHUP)
        assert seen == [1]
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        write_whole(tmp_path / "x", lambda part: part.write_text("b"))
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])


@pytest.mark.parametrize("sync", [False, True])
def test_what_killed_writers_left_goes_with_the_next(tmp_path, sync):
    """Folders too, and what libraries put into them under names of their own; living writers' stay."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    node = files.platform.node()
    names = [f".x.{node}.{pid}.0badcafe.part" for pid in (dead.pid, os.getppid())]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmpXyZ123").write_bytes(b"half")
    write_whole(tmp_path / "x", lambda part: part.write_text("a"), sync=sync)
    assert sorted(os.listdir(tmp_path)) == [names[1], "x"]


# --- modes, links, folders ------------------------------------------------------------------------


def mode(path):
    """The permissions of a file."""
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_a_new_file_follows_the_umask_and_a_replaced_one_the_old_file(tmp_path, umask):
    """Of every writer, whichever library makes the file."""
    plan = prepare(HERE / "torch_rmsprop.pt")
    before = os.umask(umask)
    try:
        writers = {
            "a.safetensors": lambda path: checkpoint.save(path, step=1),
            "b.pt": lambda path: write(plan, path, force=True),
            "c.safetensors": lambda path: write(plan, path, force=True),
            "d.txt": lambda path: write_whole(path, lambda part: part.write_text("a")),
        }
        for name, save in writers.items():
            path = tmp_path / name
            save(path)
            assert mode(path) == 0o666 & ~umask, name
            for kept in (0o664, 0o600, 0o640, 0o444, 0o755):
                path.chmod(kept)
                save(path)
                assert mode(path) == kept, name
    finally:
        os.umask(before)


def test_links_stay_links(tmp_path):
    """To a file, to one that is not there yet, to a folder, of links to links: the file that they mean is new."""
    (tmp_path / "real").mkdir()
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "latest").symlink_to("folder/x")
    (tmp_path / "newest").symlink_to("latest")
    for i, name in enumerate(["newest", "latest", "folder/x", "newest"]):
        assert write_whole(tmp_path / name, lambda part, i=i: part.write_text(str(i))) == tmp_path / name
        assert (tmp_path / "real" / "x").read_text() == str(i)
    assert (tmp_path / "newest").is_symlink()
    assert (tmp_path / "latest").is_symlink()
    assert os.listdir(tmp_path / "real") == ["x"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    """A folder, a pipe and a device are refused before anything is written."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    never = []
    for path, kind in [
        (tmp_path / "pipe", OSError),
        (tmp_path / "folder", IsADirectoryError),
        (tmp_path / "link", IsADirectoryError),
        (Path("/dev/null"), OSError),
    ]:
        with pytest.raises(kind, match=str(path)):
            write_whole(path, never.append)
    assert not never
    with pytest.raises(OSError, match="x"):
        write_whole(tmp_path / "pipe" / "x", never.append)


def test_paths_are_text_bytes_or_paths(tmp_path):
    """Also names that are not text, and those as long as a name may be."""
    for path in (
        str(tmp_path / "x"),
        os.fsencode(tmp_path / "y"),
        tmp_path / "z",
        tmp_path / os.fsdecode(b"\xff"),
        tmp_path / ("w" * 255),
    ):
        assert checkpoint.load(checkpoint.save(path, step=1)) == {"step": 1}
    assert len(os.listdir(tmp_path)) == 5
    with pytest.raises(TypeError, match=r"expected str, bytes or os\.PathLike object, not int"):
        checkpoint.save(3, step=1)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_named(tmp_path):
    """PermissionError with the file's path."""
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=str(tmp_path / "x")):
        write_whole(tmp_path / "x", lambda part: part.write_text("a"))
    tmp_path.chmod(0o700)


def test_a_file_system_that_cannot_synchronize_folders_is_no_failure(tmp_path, monkeypatch):
    """EINVAL for the folder alone: the file itself has to be on the disk."""
    real, calls = os.fsync, []

    def refuse(descriptor):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    checkpoint.save(tmp_path / "x", step=1)
    assert len(calls) == 2
    calls[:] = [1]
    with pytest.raises(OSError, match="Invalid argument"):
        checkpoint.save(tmp_path / "x", step=2)
    assert checkpoint.load(tmp_path / "x") == {"step": 1}


# --- two at one path ------------------------------------------------------------------------------


def test_threads_save_to_one_path(tmp_path):
    """Every save succeeds, and the file is always one of them, whole."""
    path, faults = tmp_path / "x", []
    checkpoint.save(path, number=0, weight=torch.zeros(1000))

    def save(number):
        try:
            for _ in range(20):
                checkpoint.save(path, number=number, weight=torch.full((1000,), float(number)))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=save, args=(i,)) for i in range(1, 4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found = checkpoint.load(path)
        assert (found["weight"] == found["number"]).all()
    assert not faults
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_is_opened_once(tmp_path, monkeypatch):
    """A path that gets another file between two looks at it is read as the first."""
    import safetensors

    path, other = tmp_path / "x", tmp_path / "y"
    checkpoint.save(path, number=1, weight=torch.full((100,), 1.0))
    checkpoint.save(other, number=2, weight=torch.full((300,), 2.0), more=torch.ones(7))
    real = safetensors.safe_open

    class Opened:
        """safe_open, with the file replaced at each of its moments."""

        def __init__(self, *words, **named):
            shutil.copy(other, tmp_path / "z")
            os.replace(tmp_path / "z", path)
            self.file = real(*words, **named)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *words):
            return self.file.__exit__(*words)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(safetensors, "safe_open", Opened)
    found = checkpoint.load(path)
    assert found.keys() == {"number", "weight"}
    assert found["number"] == 1
    assert (found["weight"] == 1).all()
