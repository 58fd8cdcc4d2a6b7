"""Runs that are saved, and resumed in another process: `python tests/tools/resumed.py FOLDER BACKEND`."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from rmsprop import RMSprop, checkpoint

BEFORE, AFTER = 3, 3


@dataclass(frozen=True)
class Case:
    """A training run.

    Attributes:
        settings: of the optimizer, and `head`, of the last layer's own group, where it has one.
        schedule: makes the scheduler.
        scaled: through a GradScaler, some of whose steps overflow.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] | None = None
    schedule: Callable[[Any], Any] = lambda o: lr_scheduler.ExponentialLR(o, 0.8)
    dtype: torch.dtype = torch.float32
    scaled: bool = False


FULL = dict(momentum=0.9, centered=True, weight_decay=0.01)
CASES: dict[str, Case] = {
    "plain": Case(),
    "groups": Case({**FULL, "nesterov": True}, {"lr": 0.002, "alpha": 0.9}),
    "onecycle": Case(FULL, {"eps": 1e-3}, lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=20)),
    "multistep": Case({"dialect": "textbook"}, None, lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5])),
    "tensorflow": Case({"dialect": "tensorflow1", "lr": 0.01, "momentum": 0.9}, {"weight_decay": 0.1}),
    "bias-correction": Case({"bias_correction": True, "maximize": True, "weight_decay_mode": "decoupled", **FULL}),
    "tensor-lr": Case({"lr": "tensor", **FULL}),
    "capturable": Case({"lr": "tensor", "capturable": True, "bias_correction": True, **FULL}, {"eps": 1e-3}),
    "float64": Case(FULL, dtype=torch.float64),
    "bfloat16": Case({**FULL, "eps_mode": "both"}, {"momentum": 0.5}, dtype=torch.bfloat16),
    "rounded": Case({**FULL, "rounding": "stochastic", "seed": 3}, {"lr": 1e-4}, dtype=torch.bfloat16),
    "remainders": Case(
        {**FULL, "rounding": "stochastic", "compensation": True, "max_update": 2.0, "nonfinite": "skip"},
        dtype=torch.float16,
    ),
    "rounded-and-scaled": Case({**FULL, "rounding": "stochastic"}, dtype=torch.bfloat16, scaled=True),
    "scaled": Case(FULL, {"lr": 0.1}, scaled=True),
    "scaled-in-step": Case({**FULL, "capturable": True, "amp_in_step": True}, scaled=True),
    "two-bytes": Case({**FULL, "state_dtype": "bfloat16", "seed": 5}, {"lr": 0.002, "state_dtype": "float32"}),
    "one-byte": Case({"state_dtype": "float8", "momentum": 0.9}, {"state_dtype": "bfloat16"}, scaled=True),
    "one-byte-rounded": Case(
        {"state_dtype": "float8", "rounding": "stochastic", "compensation": True, "capturable": True},
        dtype=torch.bfloat16,
    ),
    "sequential": Case(
        FULL,
        None,
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 9)], [3]
        ),
    ),
}


def cases(backend: str) -> dict[str, Case]:
    """Those that the backend runs: Triton's interpreter is slow, and schedules are the same for all."""
    schedules = {"plain", "onecycle", "multistep", "sequential"} if backend == "triton" else set()
    return {name: case for name, case in CASES.items() if name not in schedules}


def begin(case: Case, backend: str) -> dict[str, Any]:
    """The parts of the run before its first step."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(18, 3)
    model = nn.Sequential(*layers).to(case.dtype).to(memory_format=torch.channels_last)
    settings = {**case.settings, "backend": backend}
    if settings.get("lr") == "tensor":
        settings["lr"] = torch.tensor(0.01)
    named = list(model.named_parameters())
    groups = (
        [{"params": named}] if case.head is None else [{"params": named[:-2]}, {"params": named[-2:], **case.head}]
    )
    optimizer = RMSprop(groups, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) if case.scaled else None
    parts = dict(model=model, optimizer=optimizer, scheduler=case.schedule(optimizer), scaler=scaler)
    return {name: part for name, part in parts.items() if part is not None}


def train(parts: dict[str, Any], steps: int) -> None:
    """Steps on random data, with dropout; every third overflows where a scaler may skip it."""
    model, optimizer, scaler = parts["model"], parts["optimizer"], parts.get("scaler")
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(torch.randn(4, 2, 4, 4).to(dtype)) - torch.randn(4, 3).to(dtype)).square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            if torch.rand(()) < 0.3:
                next(model.parameters()).grad[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        parts["scheduler"].step()


def stepping(backend: str) -> AbstractContextManager[object]:
    """Where the backend takes CPU tensors: the Triton kernel under its interpreter."""
    if backend != "triton":
        return nullcontext()
    import interpreted

    return interpreted.interpreter(interpreted.kernel_module())


def end(parts: dict[str, Any]) -> dict[str, Any]:
    """What the run has come to."""
    return {name: part.state_dict() for name, part in parts.items()}


def main(folder: Path, backend: str) -> None:
    """Resume every case from its file, and save its end."""
    torch.set_num_threads(1)
    with stepping(backend):
        for name, case in cases(backend).items():
            parts = begin(case, backend)
            torch.rand(7)  # the generators are elsewhere, until they are loaded
            checkpoint.load(folder / name, rng=True, **parts)
            train(parts, AFTER)
            checkpoint.save(folder / f"{name}.end", **end(parts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
