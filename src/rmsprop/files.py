"""Files written whole or not at all."""

import errno
import os
import platform
import re
import secrets
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What a full or broken disk raises, whatever a library makes of it.
_DISK = (errno.ENOSPC, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC))
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def write_whole(path: str | bytes | os.PathLike[str], save: Callable[[Path], object], *, sync: bool = False) -> Path:
    """Save in a folder of its own beside the path, then rename, so that nobody meets half a file.

    A link stays a link: the file that it points to is replaced. The new file has the mode of the old one; where there
    is none, the umask's. What a killed process of this machine left of its own writes to the path is removed.

    Args:
        save: writes the file at the path that it is given.
        sync: wait until the file, and its name, are on the disk: then a power failure leaves the old file or the new
            one too.
    Returns: the path. Its directory is made if need be.
    Raises: OSError that names the path, also where a full disk makes a library raise something else; what else `save`
        raises. Then the file that was at the path is as it was.
    """
    path = Path(os.fsdecode(path))
    target = _target(path)
    with _folder(target, path) as folder:
        part = folder / target.name
        save(part)
        if sync:
            _sync(part, os.O_RDWR)
        _set_mode(part, target)
        os.replace(part, target)
    if sync and os.name == "posix":
        _sync_names(target.parent)
    return path


def _target(path: Path) -> Path:
    """Where the file is to be, with links followed. Raises: OSError for what is there and is no file."""
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return target


@contextmanager
def _folder(target: Path, path: Path) -> Iterator[Path]:
    """A folder beside the target, gone at the end, also where the process is told to end meanwhile.

    Raises: OSError that names the path for what is wrong with the disk.
    """
    prefix = f".{target.name[:24]}.{platform.node()}."
    folder = target.with_name(f"{prefix}{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with _ending_after(lambda: shutil.rmtree(folder, ignore_errors=True)):
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)
            yield folder
    except Exception as error:
        fault = _of_the_disk(error)
        if fault is None or fault.errno is None or not _is_inside(fault.filename, folder):
            raise
        raise OSError(fault.errno, fault.strerror, str(path)) from error
    _sweep(target.parent, prefix)


def _of_the_disk(error: Exception) -> OSError | None:
    """The OSError that an exception is, or that a library turned into it."""
    if isinstance(error, OSError):
        return error
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in _DISK:
            return link
        link = link.__cause__ or link.__context__
    found = re.search(r"os error (\d+)\b|Os \{ code: (\d+)", str(error))  # safetensors', in Rust's words
    number = int(found[1] or found[2]) if found else 0
    return OSError(number, os.strerror(number)) if number in _DISK else None


def _is_inside(name: object, folder: Path) -> bool:
    """Whether an error is about what was being written."""
    return name is None or (isinstance(name, str) and Path(name).is_relative_to(folder))


class _EndedError(BaseException):
    """The process is told to end."""


@contextmanager
def _ending_after(clean: Callable[[], object]) -> Iterator[None]:
    """Clean up at the end, and before a signal whose default is to end the process ends it."""
    caught: list[int] = []
    before: dict[int, object] = {}

    def _end(number: int, _: object) -> None:
        caught.append(number)
        if len(caught) == 1:
            raise _EndedError

    try:
        try:
            if threading.current_thread() is threading.main_thread():
                for number in _ENDING:
                    if signal.getsignal(number) == signal.SIG_DFL:
                        before[number] = signal.signal(number, _end)
            yield
        finally:
            clean()
    except _EndedError:
        clean()  # the signal may have come in the middle of the first time
    finally:
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        if caught:
            os.kill(os.getpid(), caught[0])


def _set_mode(part: Path, target: Path) -> None:
    """Give a new file the old one's mode, or what the umask leaves of 0666."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        probe = part.with_name(f"{part.name[:24]}.mode")
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = probe.stat().st_mode
        probe.unlink()
    if stat.S_IMODE(part.stat().st_mode) != mode & 0o777:
        part.chmod(mode & 0o777)


def _sync(path: Path, flags: int) -> None:
    """Wait until what was written to a file, or to a directory's list of names, is on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    """Wait until a folder's names are on the disk, if its file system can do that."""
    try:
        _sync(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno is None:
            raise
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise OSError(error.errno, error.strerror, str(folder)) from error


def _sweep(folder: Path, prefix: str) -> None:
    """Remove the parts whose process is gone."""
    if os.name != "posix":
        return  # signal 0, which asks whether a process lives, ends it elsewhere
    with suppress(OSError):  # the file is written; a folder that cannot be listed keeps what is in it
        for left in folder.iterdir():
            pid = left.name[len(prefix) : -len(".part")].partition(".")[0]
            if not (left.name.startswith(prefix) and left.suffix == ".part" and pid.isdecimal()):
                continue
            with suppress(PermissionError):  # another user's, and alive
                try:
                    os.kill(int(pid), 0)
                except (ProcessLookupError, OverflowError):
                    shutil.rmtree(left, ignore_errors=True)
                    left.unlink(missing_ok=True)
