"""Assigns a file's averages of variables to the parameters' slot `ema` and to the model's buffers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rmsprop.conversion.layout import Move, torch_name
from rmsprop.conversion.record import Checkpoint, ConversionReport, Unreadable
from rmsprop.printing import shown

SETTINGS = ("ema", "ema_warmup", "ema_start", "ema_interval")
_STATISTICS = ("running_mean", "running_var")


def attach(checkpoint: Checkpoint, path: Path, report: ConversionReport) -> None:
    """Move the averages of parameters with state to their slot `ema`. Those of the model's buffers stay.

    Of other frameworks' variables, the statistics of normalization layers count as buffers.

    Mutates: checkpoint, report.
    Raises: Unreadable for an average of another shape than its variable.
    """
    lost = []
    for name, value in list(checkpoint.averages.items()):
        param = checkpoint.params.get(name)
        if param is not None and param.shape != value.shape:
            raise Unreadable(
                f"{path.name}: the average of {shown(name)} has shape {value.shape[:8]}, and the variable "
                f"{param.shape[:8]}"
            )
        if name in checkpoint.slots:
            checkpoint.slots[name] = {**checkpoint.slots[name], "ema": checkpoint.averages.pop(name)}
        elif not checkpoint.owner.ours and torch_name(name).rpartition(".")[2] not in _STATISTICS:
            del checkpoint.averages[name]
            if param is None or not np.array_equal(param, value):
                lost.append(name)
    if lost:
        why = "the optimizer has no state of them"
        if checkpoint.numbers:
            why = "the optimizer numbers its parameters; name them in a map.toml's [rename], or add --match order"
        report.dropped.append(f"{_some(lost)}: {why}")


def kept(settings: Mapping[str, Any], ours: bool, keras: bool, report: ConversionReport) -> dict[str, Any]:
    """Return the settings of the average that the target holds.

    Args:
        ours, keras: whether the target is this package's optimizer, or a file of Keras 3.
    """
    given = {name: settings[name] for name in SETTINGS if name in settings}
    if ours or not keras or given.get("ema") is None:
        return given if ours else {}
    lost = [f"{name}={given[name]!r}" for name in SETTINGS[1:] if given.get(name) not in (None, 0, 1)]
    if lost:
        report.dropped.append(f"{', '.join(lost)}: the target's optimizer does not take it")
    return {"ema": given["ema"]}


def finish(
    checkpoint: Checkpoint, made: Checkpoint, moves: Mapping[str, Move], holds: bool, report: ConversionReport
) -> None:
    """Convert the averages of buffers, and report the averages that the target does not get.

    Args:
        made: the converted checkpoint.
        moves: the new name and layout by the file's names.
        holds: whether the target can hold averages of weights.
    Mutates: made, report.
    """
    averaged = [name for name, slots in checkpoint.slots.items() if "ema" in map(checkpoint.states.get, slots)]
    arrived = any("ema" in map(made.states.get, slots) for slots in made.slots.values())
    lost = [] if arrived else averaged
    if arrived and made.owner.ours:
        made.averages = {
            moves[name].target if name in moves else name: moves[name].turned(value) if name in moves else value
            for name, value in checkpoint.averages.items()
        }
    else:
        lost = [*lost, *checkpoint.averages]
    if lost:
        why = "the target holds none"
        if holds and not arrived:
            why = "add --set ema=..., such as ema=0.9999, with the decay that the run averaged with, to keep them"
        report.dropped.append(f"{_some(lost)}: {why}")


def _some(names: list[str]) -> str:
    """Return the first names of averages that are left out."""
    listed = ", ".join(map(shown, names[:4])) + (", ..." if len(names) > 4 else "")
    return f"the averages (ema) of {len(names)} tensors ({listed}) are left out"
