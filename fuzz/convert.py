"""Fuzz the checkpoint readers: damaged checkpoints must be read, or refused with a one-sentence error.

    python fuzz/convert.py --count 100000

Every input is determined by its number, so `--first N --count 1` reproduces a failure. Inputs run in child processes,
each for at most 5 seconds, and may allocate 64 MB plus ten times their size. A crash, a hang, a MemoryError, a
traceback, and a file written elsewhere are failures. Checkpoints that can be read are also converted.
"""

import argparse
import functools
import io
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FIXTURES = Path(__file__).parent.parent / "tests" / "checkpoints"
BATCH = 500
SECONDS = 5
HEADROOM = 64 << 20
LONGEST = 600  # characters of a message
Files = dict[str, bytes]
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**63 - 1, 2**64 - 1)


def fixtures() -> list[tuple[str, str, Files]]:
    """Return the recorded checkpoints: the path for the reader, the name of the format, and the files."""
    from rmsprop.conversion.formats import FORMATS

    found = []
    names = {path.name for path in FIXTURES.iterdir()}
    names |= {path.name.removesuffix(".index") for path in FIXTURES.glob("*.index")}
    for name in sorted(names):
        path = FIXTURES / name
        kind = next((row.name for row in FORMATS if row.sniff(path)), None)
        if kind is None or name.endswith((".py", ".index")):
            continue
        parts = [part for part in sorted(FIXTURES.rglob(f"{name}*")) if part.is_file() and part.name.startswith(name)]
        parts = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else parts
        found.append((name, kind, {p.relative_to(FIXTURES).as_posix(): p.read_bytes() for p in parts}))
    return found + rewritten()


def rewritten() -> list[tuple[str, str, Files]]:
    """Return a recorded checkpoint in the other formats that torch and its trainers write."""
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file

    from rmsprop.conversion.file import recognize

    whole = torch.load(FIXTURES / "torch_rmsprop.pt", weights_only=True)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(folder)
        torch.save(whole, root / "legacy.pt", _use_new_zipfile_serialization=False)
        dcp.save(whole, checkpoint_id=root / "distributed", no_dist=True)
        (root / "trainer").mkdir()
        save_file(whole["model"], root / "trainer" / "model.safetensors")
        torch.save(whole["optimizer"], root / "trainer" / "optimizer.pt")
        with zipfile.ZipFile(root / "several.zip", "w") as made:
            for name, part in {
                "policy": "model",
                "actor.optimizer": "optimizer",
                "critic.optimizer": "optimizer",
            }.items():
                with made.open(f"{name}.pth", "w") as file:
                    torch.save(whole[part], file)
        return [
            (path.name, recognize(path).name, {p.relative_to(root).as_posix(): p.read_bytes() for p in _files(path)})
            for path in sorted(root.iterdir())
        ]


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(inner for inner in path.rglob("*") if inner.is_file())


# --- damage ---------------------------------------------------------------------------------------


def flip(draw: random.Random, data: bytes, _: bytes) -> bytes:
    """Flip up to 16 bits."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(draw: random.Random, data: bytes, _: bytes) -> bytes:
    """Keep the beginning."""
    return data[: draw.randrange(len(data))]


def remove(draw: random.Random, data: bytes, _: bytes) -> bytes:
    """Remove some bytes."""
    at = draw.randrange(len(data))
    return data[:at] + data[at + draw.choice((1, 2, 4, 8, 64, 512)) :]


def splice(draw: random.Random, data: bytes, other: bytes) -> bytes:
    """Insert, or overwrite with, a piece of another file or of this one."""
    source = draw.choice((data, other)) or data
    at, start = draw.randrange(len(data)), draw.randrange(len(source))
    piece = source[start : start + draw.choice((1, 4, 16, 256, 4096))]
    return data[:at] + piece + data[at + draw.choice((0, len(piece))) :]


def number(draw: random.Random, data: bytes, _: bytes) -> bytes:
    """Write an extreme integer."""
    width, at = draw.choice((1, 2, 4, 8)), draw.randrange(len(data))
    order = draw.choice(("little", "big"))
    piece = (draw.choice(NUMBERS) % 256**width).to_bytes(width, order)
    return data[:at] + piece + data[at + width :]


def digits(draw: random.Random, data: bytes, _: bytes) -> bytes:
    """Change a number or a name in text."""
    places = [i for i, byte in enumerate(data[:20000]) if 48 <= byte < 58] or [0]
    at = draw.choice(places)
    return (
        data[:at]
        + draw.choice((b"9999999999", b"-1", b"1e999", b"null", b"[]", b"{}", b'"', b"\xff"))
        + data[at + 1 :]
    )


def nest(draw: random.Random, data: bytes, _: bytes) -> bytes:
    """Insert many opening brackets and markers."""
    at = draw.randrange(len(data))
    return (
        data[:at]
        + draw.choice((b"[", b"(", b"{", b"\x91", b"]", b"\x81\xa1a")) * draw.choice((50, 3000, 100000))
        + data[at:]
    )


BLUNT: tuple[Callable[[random.Random, bytes, bytes], bytes], ...] = (flip, cut, remove, splice, number, digits, nest)


def members(draw: random.Random, data: bytes, other: bytes) -> bytes:
    """Rewrite an archive with valid checksums and one member damaged, renamed, duplicated, dropped, or inflated."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as held:
            parts = [(info.filename, held.read(info), info.compress_type) for info in held.infolist()]
    except Exception:  # already damaged
        parts = []
    if not parts:
        return flip(draw, data, other)
    at = draw.randrange(len(parts))
    if draw.random() < 0.4:  # prefers small members, pickles and descriptions
        at = min(
            range(len(parts)), key=lambda i: (not parts[i][0].endswith((".pkl", ".json", ".pth")), draw.random())
        )
    name, content, method = parts[at]
    what = draw.randrange(9)
    if what < 4 and content:
        parts[at] = (name, hurt(draw, content, other), method)
    elif what == 4:
        parts[at] = (draw.choice(("../" + name, "/" + name, name + "x", "\\" + name, "", "é" * 40)), content, method)
    elif what == 5:
        parts.append(parts[at])
    elif what == 6:
        del parts[at]
    elif what == 7:
        return lie(draw, parts, name)
    else:
        parts[at] = (name, b"\0" * (1 << 22), zipfile.ZIP_DEFLATED)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as held:
        for name, content, method in parts:
            held.writestr(zipfile.ZipInfo(name), content, method)
    return made.getvalue()


@functools.cache
def bomb() -> bytes:
    """Return 256 MB of zeros, deflated."""
    made = zlib.compressobj(wbits=-15)
    return b"".join(made.compress(bytes(1 << 20)) for _ in range(256)) + made.flush()


def lie(draw: random.Random, parts: list[tuple[str, bytes, int]], name: str) -> bytes:
    """Return an archive with a member that unpacks to far more than one or both of its headers declare."""
    made, at = io.BytesIO(), {}
    with zipfile.ZipFile(made, "w") as held:
        for own, content, method in parts:
            held.writestr(zipfile.ZipInfo(own), bomb() if own == name else content, None if own == name else method)
            at[own] = held.getinfo(own).header_offset
    data, size = bytearray(made.getvalue()), struct.pack("<I", draw.choice((0, 1, 100, 5000, 1 << 20)))
    central = data.rindex(b"PK\x01\x02")
    while data[central + 42 : central + 46] != struct.pack("<I", at[name]):
        central = data.rindex(b"PK\x01\x02", 0, central)
    for start, method, declared in ((at[name], 8, 22), (central, 10, 24)):
        data[start + method] = zipfile.ZIP_DEFLATED
        if start == central or draw.random() < 0.7:
            data[start + declared : start + declared + 4] = size
    return bytes(data)


def hurt(draw: random.Random, data: bytes, other: bytes) -> bytes:
    """Apply one or more kinds of damage, for an archive also inside its members."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not data:
            return data
        archived = data[:2] == b"PK" and draw.random() < 0.6
        data = (members if archived else draw.choice(BLUNT))(draw, data, other)
    return data


# --- judgment -------------------------------------------------------------------------------------


def judge(path: Path, kind: str) -> str | None:
    """Return the failure in reading and converting a file, or None."""
    from rmsprop.conversion.file import prepare
    from rmsprop.conversion.formats import FORMATS

    for row in FORMATS:
        row.sniff(path)
    row = next(row for row in FORMATS if row.name == kind)
    arguments = {"lr": 0.01, "alpha": 0.9, "eps": 1e-7, "momentum": 0.9}
    for run in (lambda: row.read(path), lambda: prepare(path), lambda: prepare(path, "torch", given=arguments)):
        try:
            run()
        except (ValueError, TypeError) as error:
            message = str(error)
            if (
                isinstance(error, TypeError)
                and "RMSprop" not in message
                and "dialect" not in message
                and "Invalid" not in message
            ):
                return traceback.format_exc()
            if (
                not message
                or "\n" in message
                or len(message) > LONGEST
                or " " not in message
                or "allocate" in message
            ):
                return f"not a sentence: {message[:2000]!r}\n{traceback.format_exc()}"
        except BaseException:
            return traceback.format_exc()
    return None


def attack(first: int, count: int, folder: Path, found: list[tuple[str, str, Files]]) -> None:
    """Judge `count` inputs from `first` in a child process, which writes to the folder."""
    progress, failures, case = folder / "progress", folder / "failures", folder / "case"
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    for n in range(first, first + count):
        draw = random.Random(n)
        name, kind, files = draw.choice(found)
        other = draw.choice(list(draw.choice(found)[2].values()))
        shutil.rmtree(case, ignore_errors=True)
        victim = draw.choice(sorted(files))
        for part, data in files.items():
            (case / part).parent.mkdir(parents=True, exist_ok=True)
            (case / part).write_bytes(hurt(draw, data, other) if part == victim else data)
        progress.write_text(f"{n} {name}")
        signal.alarm(SECONDS)
        with fence(10 * sum(path.stat().st_size for path in case.rglob("*") if path.is_file())):
            fault = judge(case / name, kind)
        signal.alarm(0)
        outside = [
            path.name for path in folder.iterdir() if path not in (progress, failures, case, folder / "stderr")
        ]
        if outside:
            fault = f"written outside: {outside}"
        if fault is not None:
            with failures.open("a") as file:
                file.write(f"--- input {n}, {name}\n{fault}\n")


@contextmanager
def fence(size: int) -> Iterator[None]:
    """Limit the memory that the body may allocate to `size` bytes and the headroom."""
    if sys.platform != "linux":
        yield
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def run(first: int, count: int, jobs: int, say: Callable[[int], None]) -> list[str]:
    """Judge the undamaged checkpoints in this process, and all inputs in forked children.

    Returns: the failures as text.
    """
    found = fixtures()
    failures = []
    for name, kind, files in found:
        with tempfile.TemporaryDirectory() as folder:
            for part, data in files.items():
                (Path(folder) / part).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / part).write_bytes(data)
            fault = judge(Path(folder) / name, kind)
        failures += [f"--- undamaged {name}\n{fault}\n"] if fault is not None else []
    return failures + in_children(lambda at, size, folder: attack(at, size, folder, found), first, count, jobs, say)


def in_children(
    attack: Callable[[int, int, Path], None], first: int, count: int, jobs: int, say: Callable[[int], None]
) -> list[str]:
    """Judge `count` inputs from `first` in batches, each in a forked child.

    Args:
        attack: judges (first, count) inputs in its own folder. It writes the number of each input to the file
            "progress" before it runs, and appends failures to "failures".
    Returns: the failures as text. A child that crashed or hung is a failure, and the next child continues after it.
    """
    failures = []
    waiting = [(at, min(BATCH, first + count - at)) for at in range(first, first + count, BATCH)][::-1]
    running: dict[int, tuple[int, Path]] = {}  # process -> end of its batch, its folder
    done = 0
    while waiting or running:
        while waiting and len(running) < jobs:
            at, size = waiting.pop()
            folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
            process = os.fork()
            if process == 0:
                os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
                try:
                    attack(at, size, folder)
                    os._exit(0)
                except BaseException:  # an error of this driver
                    traceback.print_exc()
                finally:
                    os._exit(1)
            running[process] = (at + size, folder)
        process, status = os.wait()
        end, folder = running.pop(process)
        if (folder / "failures").exists():
            failures.append((folder / "failures").read_text())
        if status != 0:
            text = (folder / "progress").read_text() if (folder / "progress").exists() else f"{end} (start)"
            fate = "hung" if os.waitstatus_to_exitcode(status) == -signal.SIGALRM else "crashed"
            stderr = (folder / "stderr").read_text(errors="replace")[-2000:]
            failures.append(f"--- input {text}\nthe reader {fate}, {os.waitstatus_to_exitcode(status)}\n{stderr}\n")
            after = int(text.split()[0]) + 1
            if after < end:
                waiting.append((after, end - after))
        shutil.rmtree(folder, ignore_errors=True)
        done += BATCH
        say(done)
    return failures


def main() -> None:
    """Judge all inputs, print the failures, and exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # threads must not exist when this process forks
    begun = time.perf_counter()

    def say(done: int) -> None:
        if done % (10 * BATCH) == 0:
            print(f"{min(done, options.count)} inputs, {time.perf_counter() - begun:.0f} s", flush=True)

    failures = run(options.first, options.count, options.jobs, say)
    print("".join(failures)[:20000])
    kinds = sorted({kind for _, kind, _ in fixtures()})
    total = sum(text.count("--- ") for text in failures)
    print(f"{options.count} damaged checkpoints of {', '.join(kinds)}: {total} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
