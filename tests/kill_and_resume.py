"""Kill a training process at random moments, resume it from its checkpoint, and compare the end with a run that
nobody killed: `python tests/kill_and_resume.py --kills 200`.

Each life is a process of its own that reads the checkpoint if there is one, trains, and saves every few steps; it is
ended by SIGKILL, wherever it is: in a step, in a save, in a load. A run that reaches its end must have the weights,
and the optimizer's state, of the undisturbed run to the last bit; then the next run begins.
"""

import argparse
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from rmsprop import RMSprop, checkpoint

STEPS, EVERY = 120, 3
LONGEST = 0.3  # seconds of a life, on average half of it
PHASES = ("start", "load", "step", "save")


def train(path: Path, end: Path, saves: bool, phase: mmap.mmap) -> None:
    """Train to the end from where the checkpoint is, on data, dropout and noise from the random generators."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 96), nn.BatchNorm1d(96), nn.Tanh(), nn.Dropout(0.2), nn.Linear(96, 200))
    named = list(model.named_parameters())
    groups = [{"params": named[:1], "lr": 0.002}, {"params": named[1:], "weight_decay": 0.01}]
    optimizer = RMSprop(groups, lr=0.001, momentum=0.9, centered=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.01, 0.005], total_steps=STEPS + 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
    run = dict(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
    step = 0
    if path.exists():
        phase[0] = PHASES.index("load")
        step = checkpoint.load(path, rng=True, **run)["step"]
    for now in range(step, STEPS):
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


def live(path: Path, end: Path, saves: bool = True, seconds: float | None = None) -> str | None:
    """One life in a process of its own. Returns: the phase in which it was killed; None if it came to its end.

    Raises: RuntimeError if it died of something else.
    """
    phase = mmap.mmap(-1, 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(path, end, saves, phase)
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and seconds is not None:
        return PHASES[phase[0]]
    if status != 0:
        raise RuntimeError(f"a life ended with status {status}")
    return None


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
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    draw = random.Random(asked.seed)
    begun, killed, runs, longest = time.perf_counter(), Counter[str](), 0, LONGEST
    warm_up()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        undisturbed = folder / "undisturbed"
        live(folder / "none", undisturbed, saves=False)
        while killed.total() < asked.kills:
            path, end = folder / f"run{runs}", folder / f"end{runs}"
            while True:
                limit = draw.uniform(0, longest) if killed.total() < asked.kills else None
                phase = live(path, end, seconds=limit)
                if phase is None:
                    break
                killed[phase] += 1
            if not same(end, undisturbed):
                raise RuntimeError(f"run {runs} ended with other weights than the undisturbed one")
            runs += 1
            left = [own.name for own in folder.iterdir() if own.name.endswith(".part")]
            if left:
                raise RuntimeError(f"a finished run left {', '.join(left)}")
    where = ", ".join(f"{killed[phase]} in {phase}" for phase in PHASES)
    print(
        f"{killed.total()} kills ({where}) over {runs} runs of {STEPS} steps in {time.perf_counter() - begun:.0f} s: "
        "every run ended as the undisturbed one, to the last bit"
    )


if __name__ == "__main__":
    main()
