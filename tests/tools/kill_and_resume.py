"""Kill a training process at random moments, resume it from its checkpoint, and compare the end with a run that
nobody killed: `python tests/tools/kill_and_resume.py --kills 200`.

Each life is a process of its own that reads the checkpoint if there is one, trains, and saves every few steps; it is
ended by SIGKILL, wherever it is: in a step, in a save, in a load. Two lives at a time train one run and save to one
path, and two readers load from it without end: every load must be whole, of one save. A life that reaches its end
must have the weights, and the optimizer's state, of the undisturbed run to the last bit; then the next run begins.
With `--state-dtype float8` the state is one byte, rounded by random bits that a resumed run must draw again.
"""

import argparse
import math
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from rmsprop import RMSprop, checkpoint
from rmsprop.spec import STATE_DTYPES

EVERY = 3  # steps from a save to the next
WRITERS, READERS = 2, 2
LONGEST = 0.3  # seconds of a life on a quiet machine, on average half of it
LAST = 600.0  # of the last ones, which are not to be killed
PHASES = ("start", "load", "step", "save")


def train(path: Path, end: Path, steps: int, saves: bool, phase: mmap.mmap, state_dtype: str) -> None:
    """Train to the end from where the checkpoint is, on data, dropout and noise from the random generators."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 96), nn.BatchNorm1d(96), nn.Tanh(), nn.Dropout(0.2), nn.Linear(96, 200))
    named = list(model.named_parameters())
    groups = [{"params": named[:1], "lr": 0.002}, {"params": named[1:], "weight_decay": 0.01}]
    settings = dict(momentum=0.9, centered=True, clip_global_norm=0.5, ema=0.95, ema_warmup="tensorflow")
    optimizer = RMSprop(groups, lr=0.001, state_dtype=state_dtype, **settings)
    optimizer.average_buffers(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.01, 0.005], total_steps=steps + 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
    run = dict(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
    step = 0
    if path.exists():
        phase[0] = PHASES.index("load")
        step = checkpoint.load(path, rng=True, **run)["step"]
    for now in range(step, steps):
        phase[0] = PHASES.index("step")
        optimizer.zero_grad()
        loss = (model(torch.randn(32, 16)) - torch.randn(32, 200)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        if saves and now % EVERY == 0:
            phase[0] = PHASES.index("save")
            checkpoint.save(path, rng=True, step=now + 1, **run)
    checkpoint.save(end, model=model, optimizer=optimizer)


def warm_up() -> None:
    """Import what torch leaves to the first call, so that lives are not spent on it; autograd forbids forks later."""
    torch.set_num_threads(1)
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizer = RMSprop([weight])
    optimizer.step()
    optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as name:
        checkpoint.load(checkpoint.save(Path(name) / "first", optimizer=optimizer), optimizer=optimizer)


def fork(work: Callable[[], object]) -> int:
    """Do some work in a process of its own. Returns: its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


class Life:
    """A life in a process of its own, until `seconds` are over, or its end.

    Attributes:
        killed: the phase in which it was killed, once it has ended; None if it came to its end.
    """

    def __init__(
        self,
        path: Path,
        end: Path,
        steps: int,
        saves: bool = True,
        seconds: float = math.inf,
        state_dtype: str = "float32",
    ) -> None:
        self.phase = mmap.mmap(-1, 1)
        self.ends = time.perf_counter() + seconds
        self.child = fork(lambda: train(path, end, steps, saves, self.phase, state_dtype))
        self.killed: str | None = None

    def ended(self) -> bool:
        """Whether it has ended; its time is up if it is. Raises: RuntimeError if it died of something else."""
        late = time.perf_counter() > self.ends
        if late:
            os.kill(self.child, signal.SIGKILL)
        child, status = os.waitpid(self.child, 0 if late or self.ends == math.inf else os.WNOHANG)
        if child == 0:
            return False
        if late and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            self.killed = PHASES[self.phase[0]]
        elif status != 0:
            raise RuntimeError(f"a life ended with status {status}")
        return True


class Reader:
    """A process that loads the current run's checkpoint without end, beside those that write it."""

    def __init__(self, folder: Path) -> None:
        self.shared = mmap.mmap(-1, 16)  # the run's number, and how often it was loaded
        self.child = fork(lambda: self._read(folder))

    def _read(self, folder: Path) -> None:
        while True:
            number, loads = struct.unpack("qq", self.shared[:])
            try:
                parts = checkpoint.load(folder / f"run{number}")
            except FileNotFoundError:
                continue
            steps = parts["step"], parts["scheduler"]["last_epoch"], parts["model"]["1.num_batches_tracked"]
            if len(set(map(int, steps))) != 1:
                raise RuntimeError(f"a load is of several saves: {steps}")
            self.shared[8:] = struct.pack("q", loads + 1)

    def turn_to(self, number: int) -> None:
        """Go on with another run. Raises: RuntimeError if a load failed."""
        if os.waitpid(self.child, os.WNOHANG)[0]:
            raise RuntimeError("a load failed while others saved")
        self.shared[:8] = struct.pack("q", number)

    def stop(self) -> int:
        """End it. Returns: how often it loaded."""
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        return int(struct.unpack("qq", self.shared[:])[1])


def same(one: Path, other: Path) -> bool:
    """Whether two files hold the same parts, to the last bit."""
    return _bits(checkpoint.load(one)) == _bits(checkpoint.load(other))


def _bits(value: object) -> object:
    """Nested values with tensors as their bytes."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: _bits(item) for key, item in value.items()}
    return [_bits(item) for item in value] if isinstance(value, list | tuple) else value


def main(argv: list[str] | None = None) -> None:
    """Kill, resume and compare; raise if one run ends otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=120, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state-dtype", choices=STATE_DTYPES, default="float32")
    asked = parser.parse_args(argv)
    draw = random.Random(asked.seed)
    killed, runs = Counter[str](), 0
    warm_up()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        undisturbed = folder / "undisturbed"
        Life(folder / "none", undisturbed, asked.steps, saves=False, state_dtype=asked.state_dtype).ended()
        longest = max(LONGEST, (time.perf_counter() - begun) / 2)  # on a busy machine a life takes longer
        readers = [Reader(folder) for _ in range(READERS)]
        try:
            while killed.total() < asked.kills:
                for reader in readers:
                    reader.turn_to(runs)
                path, ends = folder / f"run{runs}", [folder / f"end{runs}.{i}" for i in range(WRITERS)]
                lives: dict[Path, Life] = {}
                waiting = set(ends)
                while waiting:
                    for end in list(waiting):
                        if end in lives and not lives[end].ended():
                            continue
                        if end in lives and lives[end].killed is None:
                            waiting.remove(end)
                            continue
                        if end in lives:
                            killed[str(lives[end].killed)] += 1
                        limit = draw.uniform(0, longest) if killed.total() < asked.kills else LAST
                        lives[end] = Life(path, end, asked.steps, seconds=limit, state_dtype=asked.state_dtype)
                    time.sleep(0.001)
                for end in ends:
                    if not same(end, undisturbed):
                        raise RuntimeError(f"run {runs} ended with other weights than the undisturbed one")
                runs += 1
                checkpoint.save(path, **checkpoint.load(path))
                left = [own.name for own in folder.iterdir() if own.name.startswith(".run")]
                if left:
                    raise RuntimeError(f"a finished run left {', '.join(left)}")
        finally:
            loads = sum(reader.stop() for reader in readers)
    where = ", ".join(f"{killed[phase]} in {phase}" for phase in PHASES)
    print(
        f"{killed.total()} kills ({where}) over {runs} runs of {asked.steps} steps by {WRITERS} writers of one path "
        f"in {time.perf_counter() - begun:.0f} s, {loads} loads by {READERS} readers: 0 failures, "
        "every run ended as the undisturbed one, to the last bit"
    )


if __name__ == "__main__":
    main()
