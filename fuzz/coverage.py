"""Fuzz the readers and `load_state_dict` by coverage: mutate further the inputs that reach new branches.

    python fuzz/coverage.py --seconds 60

Atheris (`pip install atheris`) counts the branches of this package's bytecode. Two targets, half of the time each:

- readers: a recorded checkpoint with one mutated file, judged as in fuzz/convert.py;
- state: a sequence of loads, edits, and steps of an optimizer, chosen by the input's bytes and judged as in
  fuzz/optimizer.py.

Both start from the recorded checkpoints and from fuzz/corpus, the inputs of earlier runs that reach further lines.
`--keep` adds the smallest inputs of this run that reach new lines.
"""

import argparse
import hashlib
import importlib.util
import random
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
LONGEST = 64 << 10  # bytes of an input
LIMIT = 80_000  # bytes of the corpus of each target
SECONDS = 60  # time limit of one input

sys.path.append(str(HERE))


class Choices(random.Random):
    """Random choices from the bytes of an input, followed by the same ones for every input."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._at = data, 0

    def getrandbits(self, k: int, /) -> int:
        """Return the next k bits, from whole bytes."""
        if self._at >= len(self._data):  # endless zeros would keep `sample` from ending
            return super().getrandbits(k)
        count = (k + 7) // 8
        taken = self._data[self._at : self._at + count]
        self._at += count
        return int.from_bytes(taken.ljust(count, b"\0"), "little") & ((1 << k) - 1)

    def random(self) -> float:
        """Return one of 65,536 numbers below 1."""
        return self.getrandbits(16) / 65536


# --- readers ---------------------------------------------------------------------------------------


def packed(name: str, victim: int, content: bytes) -> bytes:
    """Return an input: a recorded checkpoint's name, the index of the replaced file, and its new content."""
    return name.encode() + bytes((0, victim)) + content


def unpacked(data: bytes) -> tuple[str, int, bytes] | None:
    """Return the parts of an input, or None."""
    name, zero, rest = data.partition(b"\0")
    return (name.decode("latin1"), rest[0], rest[1:]) if zero and rest else None


def read_one(data: bytes, found: dict[str, tuple[str, dict[str, bytes]]], folder: Path) -> str | None:
    """Return the failure in reading an input, or None."""
    import convert

    parts = unpacked(data)
    if parts is None or parts[0] not in found:
        return None
    name, place, content = parts
    kind, files = found[name]
    case = folder / "case"
    shutil.rmtree(case, ignore_errors=True)
    victim = sorted(files)[place % len(files)]
    for part, whole in files.items():
        (case / part).parent.mkdir(parents=True, exist_ok=True)
        (case / part).write_bytes(content if part == victim else whole)
    with convert.fence(10 * (len(content) + sum(map(len, files.values())))):
        return convert.judge(case / name, kind)


def readers(folder: Path, seeds: Path) -> tuple[Callable[[bytes], str | None], Callable[..., bytes]]:
    """Return the judge and the mutator of checkpoints, and write the recorded ones as seeds."""
    import atheris
    import convert

    found = {name: (kind, files) for name, kind, files in convert.fixtures()}
    pieces = [data for _, files in found.values() for data in files.values()]
    for name, (_, files) in found.items():
        for place, part in enumerate(sorted(files)):
            if len(files[part]) < LONGEST // 2:
                write(seeds, packed(name, place, files[part]))

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        draw = random.Random(seed)
        parts = unpacked(data)
        if parts is None:
            return data
        name, place, content = parts
        if draw.random() < 0.5 and content:
            content = convert.hurt(draw, content, draw.choice(pieces))
        else:
            content = atheris.Mutate(content, longest // 2)
        return packed(name, place, content)[:longest]

    return lambda data: read_one(data, found, folder), mutate


# --- state -----------------------------------------------------------------------------------------


def state_one(data: bytes) -> str | None:
    """Return the failure in the sequence of loads, edits, and steps that the input selects, or None."""
    import optimizer as driver
    import torch

    draw = Choices(data)
    torch.manual_seed(0)
    done: list[str] = []
    try:
        try:
            made = driver.built(draw)
        except Exception as error:
            driver.refused("RMSprop()", error)
            return None
        for _ in range(draw.randint(1, 4)):
            act = draw.choice((driver.loaded, driver.loaded, driver.loaded, driver.stepped, driver.mutated))
            done.append(act.__name__)
            act(draw, made)
    except driver.FaultError as fault:
        return f"after {', '.join(done)}: {fault}"
    except BaseException:
        return f"the driver failed after {', '.join(done)}\n{traceback.format_exc()}"
    return None


def states(seeds: Path) -> tuple[Callable[[bytes], str | None], None]:
    """Return the judge of sequences, and write seeds."""
    for n in range(64):
        write(seeds, random.Random(n).randbytes(400))
    return state_one, None


# --- the run ---------------------------------------------------------------------------------------


def write(folder: Path, data: bytes) -> None:
    """Write an input under its hash, as libFuzzer does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)


def child(target: str, folder: Path, arguments: list[str]) -> None:
    """Run libFuzzer in this process; write one fault for each place in the code to the folder, and continue."""
    import atheris

    with atheris.instrument_imports(include=["rmsprop"], enable_loader_override=False):
        import rmsprop.checkpoint
        import rmsprop.conversion.file
        import rmsprop.conversion.formats
        import rmsprop.in_backward  # noqa: F401
    import torch
    import torch._dynamo  # the first optimizer imports it, which takes longer than the time limit of an input

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    judge, mutate = readers(folder, folder / "seeds") if target == "readers" else states(folder / "seeds")
    known: set[str] = set()

    def one(data: bytes) -> None:
        fault = judge(data)
        if fault is None:
            return
        place = re.sub(
            r"0x\w+|\d{4,}", "", " ".join(re.findall(r'File "[^"]*", line \d+', fault)[-2:]) or fault[:200]
        )
        if place not in known:
            known.add(place)
            write(folder / "faults", data)
            (folder / "faults" / "report").open("a").write(f"--- {hashlib.sha1(data).hexdigest()}\n{fault}\n")

    atheris.Setup([sys.argv[0], *arguments], one, **({"custom_mutator": mutate} if mutate is not None else {}))
    atheris.Fuzz()


def run(target: str, seconds: int, keep: bool) -> str | None:
    """Fuzz one target in a child process. Returns: the failures, or None."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    own = CORPUS / target
    own.mkdir(parents=True, exist_ok=True)
    for name in ("seeds", "grown"):
        (folder / name).mkdir()
    call = [sys.executable, str(Path(__file__).resolve()), "--child", target, "--folder", str(folder)]
    limits = [
        f"-max_len={LONGEST}",
        f"-timeout={SECONDS}",
        f"-report_slow_units={SECONDS}",
        "-len_control=0",
        "-rss_limit_mb=3000",
        f"-artifact_prefix={folder}/",
    ]
    try:
        begun = subprocess.run([*call, *limits, "-runs=0", str(folder / "seeds")], capture_output=True, text=True)
        before = covered_in(begun.stderr)
        places = [str(folder / name) for name in ("grown", "seeds")]
        ran = subprocess.run(
            [*call, *limits, f"-max_total_time={seconds}", *places, str(own)],
            capture_output=True,
            text=True,
            check=False,
        )
        first, after = covered_in(ran.stderr.partition("INITED")[2].partition("\n")[0]), covered_in(ran.stderr)
        runs = re.findall(r"stat::number_of_executed_units:\s*(\d+)|Done (\d+) runs", ran.stderr)
        count = runs[-1][0] or runs[-1][1] if runs else "no"
        print(
            f"{target}: {count} inputs; edges covered: {before} by the recorded checkpoints, {first} with the "
            f"corpus, {after} now"
        )
        if keep:
            merge(target, folder, own)
        report = folder / "faults" / "report"
        found = report.read_text() if report.exists() else ""
        for crashed in folder.glob("*-*"):
            found += f"--- {crashed.name}\n{crashed.read_bytes()[:300]!r}\n{ran.stderr[-3000:]}\n"
        if not after and not found:
            found = f"--- no edge is covered, so the package is not instrumented\n{ran.stderr[-3000:]}"
        if ran.returncode and not found:
            found = f"--- the fuzzer ended with {ran.returncode}\n{ran.stderr[-3000:]}"
        if found:
            kept = HERE / "found" / target
            shutil.copytree(folder / "faults", kept, dirs_exist_ok=True) if report.exists() else None
            for crashed in folder.glob("*-*"):
                kept.mkdir(parents=True, exist_ok=True)
                shutil.copy(crashed, kept)
        return found or None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def merge(target: str, folder: Path, own: Path) -> None:
    """Keep in the corpus, up to the limit, the smallest inputs that reach lines beyond the recorded checkpoints."""
    judge, _ = readers(folder, folder / "seeds") if target == "readers" else states(folder / "seeds")
    reached = set().union(*(lines(judge, path.read_bytes()) for path in (folder / "seeds").iterdir()))
    before, total, kept = len(reached), 0, []
    for path in sorted([*own.iterdir(), *(folder / "grown").iterdir()], key=lambda path: path.stat().st_size):
        data = path.read_bytes()
        new = lines(judge, data) - reached
        if new and total + len(data) <= LIMIT:
            reached |= new
            total += len(data)
            kept.append(data)
    shutil.rmtree(own)
    for data in kept:
        write(own, data)
    print(f"{target}: {len(kept)} inputs in the corpus, lines reached {before} -> {len(reached)}")


def lines(judge: Callable[[bytes], str | None], data: bytes) -> set[tuple[str, int]]:
    """Return the lines of this package that an input reaches."""
    reached: set[tuple[str, int]] = set()

    def trace(frame: FrameType, _event: str, _argument: object) -> Callable[..., object] | None:
        if "rmsprop" not in Path(frame.f_code.co_filename).parts:
            return None
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        judge(data)
    finally:
        sys.settrace(None)
    return reached


def covered_in(output: str) -> int:
    """Return the number of covered edges in libFuzzer's output."""
    return max((int(edges) for edges in re.findall(r"\bcov: (\d+)", output)), default=0)


def main() -> None:
    """Fuzz, print the coverage and the failures, and exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="total time of both targets")
    parser.add_argument("--target", choices=("readers", "state"), help="fuzz only this target")
    parser.add_argument("--keep", action="store_true", help="add inputs that reach new lines to fuzz/corpus")
    parser.add_argument("--replay", type=Path, help="judge one input of the target, and print its failure")
    parser.add_argument("--child", choices=("readers", "state"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if importlib.util.find_spec("atheris") is None:
        print("fuzz/coverage.py: skipped, atheris is not installed here (pip install atheris)")
        return
    if options.child:
        child(options.child, options.folder, rest)
        return
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if options.replay:
        folder = Path(tempfile.mkdtemp())
        judge, _ = readers(folder, folder / "seeds") if options.target == "readers" else states(folder / "seeds")
        print(judge(options.replay.read_bytes()) or "no failure")
        return
    targets = (options.target,) if options.target else ("readers", "state")
    failures = [run(target, options.seconds // len(targets), options.keep) for target in targets]
    print("".join(fault for fault in failures if fault)[:20000], end="")
    sys.exit(any(failures))


if __name__ == "__main__":
    main()
