"""Conversion of a checkpoint's settings: from the framework's arguments to ours, and on to another dialect's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rmsprop import dialects
from rmsprop.analysis import matched_eps, smallest_d, worst
from rmsprop.conversion import averages
from rmsprop.conversion.record import Array, Checkpoint, ConversionReport
from rmsprop.dialects import HYPERS, SWITCHES, UNCLIPPED, Dialect
from rmsprop.spec import CLIPS, check_number

Settings = dict[str, Any]

_EPS_PLACES = {
    "outside": "outside the root",
    "inside": "inside the root",
    "both": "both inside and outside the root",
    "floor": "as a floor under the root",
}

_OURS = (*HYPERS, *SWITCHES, *UNCLIPPED, "maximize", "ema")


def resolve_settings(
    checkpoint: Checkpoint, given: Mapping[str, Any], report: ConversionReport
) -> list[tuple[list[str], Settings]]:
    """Return the parameter groups with all their settings under our names.

    Args:
        given: settings under the framework's or torch's names, which override those of the file in every group.
    Raises: ValueError, in one sentence, for settings that neither the file nor `given` holds; TypeError or ValueError
        for arguments that the framework does not take.
    """
    apart = averages.SETTINGS[1:]  # no dialect has arguments for them
    rest = {name: value for name, value in given.items() if name not in apart}
    groups = []
    for names, hyper in checkpoint.all_groups:
        own = {name: value for name, value in hyper.items() if name not in apart}
        settings = _group(checkpoint, names, own, rest, report)
        averaging = {name: value for name, value in {**hyper, **given}.items() if name in apart}
        if settings.get("ema") is not None:
            settings |= {"ema": check_number("ema", settings["ema"]), **averaging}
        elif averaging.keys() & given.keys():
            option = next(name for name in averaging if name in given)
            raise ValueError(f"--set {option}={given[option]} needs the average's decay: add --set ema=0.9999 too")
        groups.append((names, settings))
    return groups


def _group(
    checkpoint: Checkpoint,
    names: list[str],
    hyper: Settings,
    given: Mapping[str, Any],
    report: ConversionReport,
) -> Settings:
    """Return one group's settings under our names."""
    row = checkpoint.row
    if checkpoint.owner.ours:
        saved = {name: value for name, value in hyper.items() if name in _OURS}
        return {**row.complete(saved | dialects.read_arguments(row, given), {*saved, *given}), "dialect": row.name}
    if "square_avg" in row.states:  # a group of torch, where schedulers, trainers and wrappers add keys
        unknown = [name for name in hyper if name not in (*row.arguments, *row.refused, *row.limits, *_OURS)]
        hyper = {name: value for name, value in hyper.items() if name not in unknown}
        if unknown:
            report.dropped.append(f"{', '.join(unknown)} in the group: not a setting of {row.title}")
    hyper, given = _decayed(checkpoint, row, hyper, given, report)
    overridden = {_ours(row, name) for name in given}
    arguments = {name: value for name, value in hyper.items() if _ours(row, name) not in overridden} | dict(given)
    known = {_ours(row, name) for name in arguments}
    states = [checkpoint.state(name) for name in names]
    if "centered" not in known:
        arguments["centered"] = any("grad_avg" in state for state in states)
    missing = [
        name for name in ("lr", "alpha", "eps") if name not in known or arguments.get(row.argument(name), 0) is None
    ]
    if "momentum" not in known and has_momentum(states):
        missing.append("momentum")
    if missing:
        example = {"lr": "0.001", "alpha": "0.9", "eps": "1e-7", "momentum": "0.9"}
        options = " ".join(f"--set {row.argument(name)}={example[name]}" for name in missing)
        raise ValueError(
            f"the file does not hold {', '.join(row.argument(name) for name in missing)}, which {row.name} trained "
            f"with: add {options} with the run's own values"
        )
    if "momentum" not in known and any("momentum_buffer" in state for state in states):
        report.assumed.append(f"{row.argument('momentum')} is 0, since every momentum buffer in the file is 0")
        if "momentum" not in row.limits and row.argument("momentum") not in row.limits:
            arguments["momentum"] = 0.0
    read = dialects.read_arguments(row, arguments)
    if "weight_decay" not in read and row.hyper.weight_decay == 0 and "weight_decay" not in row.limits:
        report.assumed.append(f"{row.argument('weight_decay')} is 0, since the file does not hold it")
    settings = row.complete(read, read)
    if "alpha" not in {_ours(row, name) for name in hyper}:  # a file that holds no settings
        defaults = {
            name: settings[name]
            for name in SWITCHES
            if name not in read and name not in ("square_avg_init", "centered")
        }
        listed = ", ".join(f"{name}={value!r}" for name, value in dialects.write_arguments(row, defaults).items())
        report.assumed.append(
            f"other settings are {row.name}'s defaults, since the file does not hold them: {listed}"
        )
    settings["dialect"] = row.name if row.name in dialects.DIALECTS else "torch"
    return settings


def has_momentum(states: Iterable[Mapping[str, Array]]) -> bool:
    """Return whether any momentum buffer is not 0, in states under our slot names."""
    return any(bool((state["momentum_buffer"] != 0).any()) for state in states if "momentum_buffer" in state)


def _ours(row: Dialect, name: str) -> str:
    """Return our name for an argument of the dialect or of torch."""
    return row.arguments.get(name, name)


def _decayed(
    checkpoint: Checkpoint, row: Dialect, hyper: Settings, given: Mapping[str, Any], report: ConversionReport
) -> tuple[Settings, Mapping[str, Any]]:
    """Apply the `decay` of older Keras to the learning rate: after t steps it is lr/(1 + decay·t).

    Returns: `hyper` and `given` without `decay`.
    """
    decay = given.get("decay", hyper.get("decay"))
    if "decay" not in row.limits or not isinstance(decay, (int, float)) or isinstance(decay, bool) or not decay:
        return hyper, given
    hyper = {name: value for name, value in hyper.items() if name != "decay"}
    rest = {name: value for name, value in given.items() if name != "decay"}
    given_lr = [name for name in rest if _ours(row, name) == "lr"]
    if given_lr:
        report.assumed.append(f"{given_lr[0]} is that of the next step, so decay={decay:g} is not applied to it")
        return hyper, rest
    count, argument = checkpoint.step, row.argument("lr")
    lr = next((value for name, value in hyper.items() if _ours(row, name) == "lr" and value), None)
    if not isinstance(lr, (int, float)) or not 0 <= decay < math.inf:
        return hyper, rest
    if count is None:
        raise ValueError(
            f"{row.name} trained with decay={decay:g}, which divides {argument} by 1 + decay·t, and the file does "
            f"not count the steps t: add --set {argument}=... with the rate that the run had reached, "
            f"{lr:g}/(1 + {decay:g}·t)"
        )
    reached = lr / (1 + decay * count)
    start = f"{1 + decay * count:.9g}"
    report.approximate.append(
        f"{argument} is {reached:.9g}, the value that {lr:g}/(1 + {decay:g}·{count}) had reached, and stays constant "
        f"where decay={decay:g} went on; torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: "
        f"{start} / ({start} + {decay:g} * t)) continues the decay"
    )
    hyper = {name: reached if _ours(row, name) == "lr" else value for name, value in hyper.items()}
    return hyper, rest


def target_settings(settings: Settings, target: str, report: ConversionReport) -> Settings:
    """Return the settings for another dialect: its switches with these numbers. Changes are reported."""
    row = dialects.find_dialect(target)
    numbers = {name: settings[name] for name in HYPERS}
    given = {**numbers, "centered": settings["centered"]}
    for name in CLIPS:
        if settings[name] is not None and row.argument(name) != name:
            given[name] = settings[name]
        elif settings[name] is not None:
            report.dropped.append(f"{name}={settings[name]:g}: the target's optimizer does not take it")
    if target == "timm":
        given |= {name: settings[name] for name in ("lr_in_buffer", "weight_decay_mode", "reference_lr")}
        if given["weight_decay_mode"] not in ("l2", "decoupled", "corrected"):
            del given["weight_decay_mode"]
    new = row.complete(given, given)
    if settings["eps_mode"] != new["eps_mode"] and settings["eps"] != 0:
        new["eps"] = _eps(settings, new, report)
    if settings["weight_decay"] != 0 and settings["weight_decay_mode"] != new["weight_decay_mode"]:
        report.approximate.append(
            f"weight_decay={settings['weight_decay']:g} is {settings['weight_decay_mode']} in the source and "
            f"{new['weight_decay_mode']} in the target: there is no exact equivalent, so the number is kept"
        )
    if settings["nesterov"] and not new["nesterov"] and settings["momentum"] != 0:
        report.dropped.append("nesterov: the target has plain momentum")
    new["dialect"] = row.name
    return new


def _eps(settings: Settings, new: Settings, report: ConversionReport) -> float:
    """Return the ε at the target's place that caps the step alike where gradients vanish."""
    was, now, eps = settings["eps_mode"], new["eps_mode"], float(settings["eps"])
    matched = matched_eps(was, eps, now)
    place = smallest_d(was, eps)  # the √v below which ε matters
    ratio, root = worst(settings, {**new, "eps": matched})
    report.approximate.append(
        f"eps={eps:g} is {_EPS_PLACES[was]} in the source and {_EPS_PLACES[now]} in the target: {matched:g} gives "
        f"the same largest step where gradients vanish; steps differ by up to {ratio - 1:+.0%}, where √v is about "
        f"{root:.2g}, and agree where √v is far from {place:.2g}"
    )
    return matched


def target_arguments(settings: Settings, target: str) -> Settings:
    """Return settings under the target's own argument names, as a file of that framework holds them."""
    row = dialects.find_dialect(target)
    kept = {name: settings[name] for name in (*HYPERS, "centered") if row.argument(name) not in row.limits}
    kept |= {
        name: settings[name] for name in SWITCHES if name in row.arguments.values() and name != "square_avg_init"
    }
    kept |= {"ema": settings["ema"]} if settings.get("ema") is not None and "ema" in row.arguments.values() else {}
    kept |= {name: settings[name] for name in CLIPS if settings[name] is not None and name in row.arguments.values()}
    if settings["reference_lr"] is not None:
        kept["reference_lr"] = settings["reference_lr"]
    return dialects.write_arguments(row, kept)
