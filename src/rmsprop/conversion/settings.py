"""A checkpoint's settings: from the framework's words to ours, missing ones asked for, and on to another rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rmsprop import dialects
from rmsprop.analysis import cap, matched_eps, worst
from rmsprop.conversion.record import Checkpoint, ConversionReport
from rmsprop.dialects import CLIPS, HYPERS, SWITCHES, UNCLIPPED, Dialect

Settings = dict[str, Any]

_PLACES = {
    "outside": "outside the root",
    "inside": "inside the root",
    "both": "both inside and outside the root",
    "floor": "as a floor under the root",
}

_OURS = (*HYPERS, *SWITCHES, *UNCLIPPED, "maximize")


def resolve_settings(
    checkpoint: Checkpoint, given: Mapping[str, Any], report: ConversionReport
) -> list[tuple[list[str], Settings]]:
    """The parameter groups with all their settings under our names.

    Args:
        given: settings in the framework's or torch's words that stand over what the file holds, in every group.
    Raises: ValueError, in one sentence, for settings that neither the file nor `given` holds; TypeError or ValueError
        for words that the framework does not know.
    """
    groups = checkpoint.groups or [(list(checkpoint.slots), checkpoint.hyper)]
    return [(names, _group(checkpoint, names, {**hyper}, given, report)) for names, hyper in groups]


def _group(
    checkpoint: Checkpoint,
    names: list[str],
    hyper: Settings,
    given: Mapping[str, Any],
    report: ConversionReport,
) -> Settings:
    """One group's settings."""
    row = checkpoint.row
    if checkpoint.owner.ours:
        own = {name: value for name, value in hyper.items() if name in _OURS}
        return {**row.complete(own | dialects.read_arguments(row, given), {*own, *given}), "dialect": row.name}
    if "square_avg" in row.states:  # a group of torch, which carries the keys of schedulers, trainers and wrappers
        carried = [word for word in hyper if word not in (*row.arguments, *row.refused, *row.limits, *_OURS)]
        hyper = {word: value for word, value in hyper.items() if word not in carried}
        if carried:
            report.dropped.append(f"{', '.join(carried)} in the group: no setting of {row.title}")
    hyper, given = _decayed(checkpoint, row, hyper, given, report)
    meant = {row.arguments.get(word, word) for word in given}
    words = {word: value for word, value in hyper.items() if row.arguments.get(word, word) not in meant} | dict(given)
    ours = {row.arguments.get(word, word) for word in words}
    slots = [checkpoint.slots[name] for name in names if name in checkpoint.slots]
    buffers = _slot(row, slots, "momentum_buffer")
    moving = any(bool((b != 0).any()) for b in buffers)
    if "centered" not in ours:
        words["centered"] = bool(_slot(row, slots, "grad_avg"))
    missing = [
        name for name in ("lr", "alpha", "eps") if name not in ours or words.get(row.argument(name), 0) is None
    ]
    if moving and "momentum" not in ours:
        missing.append("momentum")
    if missing:
        example = {"lr": "0.001", "alpha": "0.9", "eps": "1e-7", "momentum": "0.9"}
        asked = " ".join(f"--set {row.argument(name)}={example[name]}" for name in missing)
        raise ValueError(
            f"the file does not hold {', '.join(row.argument(name) for name in missing)}, which {row.name} trained "
            f"with: add {asked} with the run's own values"
        )
    if buffers and not moving and "momentum" not in ours:
        report.assumed.append(f"{row.argument('momentum')} is 0, since the momentum of every parameter is")
        words["momentum"] = 0.0
        if "momentum" in row.limits or row.argument("momentum") in row.limits:
            del words["momentum"]
    read = dialects.read_arguments(row, words)
    if "weight_decay" not in read and row.hyper.weight_decay == 0 and "weight_decay" not in row.limits:
        report.assumed.append(f"{row.argument('weight_decay')} is 0, which the file does not say")
    settings = row.complete(read, read)
    if "alpha" not in {row.arguments.get(word, word) for word in hyper}:  # a file that holds no settings
        open_ = {
            name: settings[name]
            for name in SWITCHES
            if name not in read and name not in ("square_avg_init", "centered")
        }
        shown = ", ".join(f"{word}={value!r}" for word, value in dialects.write_arguments(row, open_).items())
        report.assumed.append(f"the rest is {row.name}'s default, which the file does not say: {shown}")
    settings["dialect"] = row.name if row.name in dialects.DIALECTS else "torch"
    return settings


def _decayed(
    checkpoint: Checkpoint, row: Dialect, hyper: Settings, given: Mapping[str, Any], report: ConversionReport
) -> tuple[Settings, Mapping[str, Any]]:
    """Settings with the learning rate that Keras' older `decay` has reached: lr/(1 + decay·t) after t steps."""
    decay = given.get("decay", hyper.get("decay"))
    if "decay" not in row.limits or not isinstance(decay, (int, float)) or isinstance(decay, bool) or not decay:
        return hyper, given
    hyper = {word: value for word, value in hyper.items() if word != "decay"}
    rest = {word: value for word, value in given.items() if word != "decay"}
    given_lr = [word for word in rest if row.arguments.get(word, word) == "lr"]
    if given_lr:
        report.assumed.append(f"{given_lr[0]} is that of the next step, so decay={decay:g} is not applied to it")
        return hyper, rest
    count, word = checkpoint.step, row.argument("lr")
    held = next((value for name, value in hyper.items() if row.arguments.get(name, name) == "lr" and value), None)
    if not isinstance(held, (int, float)) or not 0 <= decay < math.inf:
        return hyper, rest
    if count is None:
        raise ValueError(
            f"{row.name} trained with decay={decay:g}, which divides {word} by 1 + decay·t, and the file does not "
            f"count the steps t: add --set {word}=... with the rate that the run had reached, "
            f"{held:g}/(1 + {decay:g}·t)"
        )
    reached = held / (1 + decay * count)
    report.approximate.append(
        f"{word} is {reached:.9g}, what {held:g}/(1 + {decay:g}·{count}) had reached; it stays there, where "
        f"decay={decay:g} went on: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: "
        f"{1 + decay * count:.9g} / ({1 + decay * count:.9g} + {decay:g} * t)) goes on as well"
    )
    hyper = {name: reached if row.arguments.get(name, name) == "lr" else value for name, value in hyper.items()}
    return hyper, rest


def _slot(row: Dialect, slots: list[dict[str, Any]], ours: str) -> list[Any]:
    return [value for kept in slots for name, value in kept.items() if row.states.get(name) == ours]


def target_settings(settings: Settings, target: str, report: ConversionReport) -> Settings:
    """The settings under another dialect's rule: its switches, and these numbers, with what that changes reported."""
    row = dialects.find_dialect(target)
    numbers = {name: settings[name] for name in HYPERS}
    given = {**numbers, "centered": settings["centered"]}
    for name in CLIPS:
        if settings[name] is not None and row.argument(name) != name:
            given[name] = settings[name]
        elif settings[name] is not None:
            report.dropped.append(f"{name}={settings[name]:g}: the target's optimizer has no such argument")
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
            f"{new['weight_decay_mode']} in the target: there is no exact equal; it is left as it was"
        )
    if settings["nesterov"] and not new["nesterov"] and settings["momentum"] != 0:
        report.dropped.append("nesterov: the target has plain momentum, so its steps look no step ahead")
    new["dialect"] = row.name
    return new


def _eps(settings: Settings, new: Settings, report: ConversionReport) -> float:
    """ε for another place in the denominator: what caps a step alike where the gradient vanishes."""
    was, now, eps = settings["eps_mode"], new["eps_mode"], float(settings["eps"])
    matched = matched_eps(was, eps, now)
    place = cap(was, eps)  # the √v where ε begins to count; a square is taken there, and 0 only where ε is
    found, root = worst(settings, {**new, "eps": matched})
    report.approximate.append(
        f"eps={eps:g} stands {_PLACES[was]} in the source and {_PLACES[now]} in the target: {matched:g} gives the "
        f"same largest step where gradients vanish; steps differ by up to {found - 1:+.0%}, where √v is about "
        f"{root:.2g}, and agree where √v is far from {place:.2g}"
    )
    return matched


def target_arguments(settings: Settings, target: str) -> Settings:
    """Settings in the target's own words: what a file of that framework holds."""
    row = dialects.find_dialect(target)
    kept = {name: settings[name] for name in (*HYPERS, "centered") if row.argument(name) not in row.limits}
    kept |= {
        name: settings[name] for name in SWITCHES if name in row.arguments.values() and name != "square_avg_init"
    }
    kept |= {name: settings[name] for name in CLIPS if settings[name] is not None and name in row.arguments.values()}
    if settings["reference_lr"] is not None:
        kept["reference_lr"] = settings["reference_lr"]
    return dialects.write_arguments(row, kept)
