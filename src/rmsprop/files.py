"""Write files atomically: completely or not at all."""

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

RUN_KEY = "rmsprop_checkpoint"
"""The key in the metadata of a safetensors file that rmsprop.checkpoint wrote."""

# The errors of a full or broken disk, which libraries may wrap.
_DISK = (errno.ENOSPC, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC))
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def write_whole(path: str | bytes | os.PathLike[str], save: Callable[[Path], object], *, sync: bool = False) -> Path:
    """Write a file in a temporary folder beside the path, then rename it, so that no partial file appears.

    If the path is a link, the file that it points to is replaced. The new file has the mode of the old one, or else
    the umask's default. Temporary files that killed processes of this machine left for the same path are removed.

    Args:
        save: a function that writes the file at the path given to it.
        sync: whether to wait until the file and its name are on the disk, so that a power failure leaves the old file
            or the new one.
    Returns: the path. Its directory is created if it is missing.
    Raises: OSError that names the path, even if a library wraps the error of a full disk; any other error of `save`.
        In both cases the old file is unchanged.
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
    """Return the path with links resolved. Raises: OSError if something other than a regular file is there."""
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
    """Create a folder beside the target and remove it at the end, even if a signal ends the process.

    Raises: OSError that names the path, for an error of the disk.
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
    """Return the OSError that an exception is or wraps, or None."""
    if isinstance(error, OSError):
        return error
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in _DISK:
            return link
        link = link.__cause__ or link.__context__
    code = re.search(r"os error (\d+)\b|Os \{ code: (\d+)", str(error))  # safetensors quotes Rust's errors
    number = int(code[1] or code[2]) if code else 0
    return OSError(number, os.strerror(number)) if number in _DISK else None


def _is_inside(name: object, folder: Path) -> bool:
    """Return whether an error is about the file being written."""
    return name is None or (isinstance(name, str) and Path(name).is_relative_to(folder))


class _EndedError(BaseException):
    """A signal requests that the process end."""


@contextmanager
def _ending_after(clean: Callable[[], object]) -> Iterator[None]:
    """Clean up at the end, and before a signal with the default action ends the process."""
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
        clean()  # the signal may have interrupted the first call
    finally:
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        if caught:
            os.kill(os.getpid(), caught[0])


def _set_mode(part: Path, target: Path) -> None:
    """Set the mode of a new file to the old file's, or to 0666 masked by the umask."""
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
    """Wait until the content of a file or directory is on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    """Wait until a folder's entries are on the disk, if its file system supports it."""
    try:
        _sync(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno is None:
            raise
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise OSError(error.errno, error.strerror, str(folder)) from error


def _sweep(folder: Path, prefix: str) -> None:
    """Remove temporary folders whose process no longer exists."""
    if os.name != "posix":
        return  # on other systems, signal 0 ends the process instead of testing for it
    with suppress(OSError):  # the file is already written, so errors of the cleanup do not matter
        for leftover in folder.iterdir():
            pid = leftover.name[len(prefix) : -len(".part")].partition(".")[0]
            if not (leftover.name.startswith(prefix) and leftover.suffix == ".part" and pid.isdecimal()):
                continue
            with suppress(PermissionError):  # the process exists and belongs to another user
                try:
                    os.kill(int(pid), 0)
                except (ProcessLookupError, OverflowError):
                    shutil.rmtree(leftover, ignore_errors=True)
                    leftover.unlink(missing_ok=True)
