"""Sorts the keys of a given group into settings and notes; the group carries notes along unchanged.

Schedulers, trainers and wrappers keep their own numbers in groups, and a whole group may come from another optimizer.
In a group written by the user, a dialect's own argument is a setting. In a group from another optimizer, only torch's
and our names are settings, and the names that the constructor was given.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from rmsprop import dialects
from rmsprop.dialects import Dialect
from rmsprop.printing import shown

# Arguments of the whole optimizer, and why a group cannot have its own.
WHOLE = {
    **dict.fromkeys(("nonfinite", "nonfinite_limit"), "a gradient that is not finite stops the step of all groups"),
    "backend": "all groups share one backend",
    "amp_in_step": "torch.amp.GradScaler reads it from the optimizer",
}

# Keys of other optimizers' groups (Adam and its variants, SGD, Muon), and keys of every torch optimizer's groups.
_OPTIMIZERS = ("amsgrad", "betas", "dampening", "ns_steps")
_TORCHS = ("foreach", "maximize", "differentiable")

# Our settings that have another meaning in such groups, and that torch.optim.RMSprop does not have.
_THEIRS = ("nesterov", "bias_correction", "fused", "clip_value", "clip_norm")

# Keys of trainers and schedulers that resemble a setting.
_NOTES = ("base_momentum", "initial_lr", "lr_scale", "max_lr", "max_momentum", "min_lr", "swa_lr")


def is_own(given: Mapping[str, Any]) -> bool:
    """Return whether a group was made by this package."""
    return "dialect" in given and all(name in given for name in dialects.SWITCHES)


def is_anothers(row: Dialect, given: Mapping[str, Any]) -> bool:
    """Return whether a group was made by another optimizer, such as torch's Adam or SGD."""
    if is_own(given):
        return False
    return any(key in given and key not in row.arguments for key in _OPTIMIZERS) or all(
        key in given for key in _TORCHS
    )


def is_wrappers(given: Mapping[str, Any], given_names: Collection[str]) -> bool:
    """Return whether a group comes from a wrapper such as SAM.

    SAM's groups hold `adaptive`, other keys of the wrapper, and all arguments of the constructor.

    Args:
        given_names: the arguments that the constructor was given.
    """
    return "adaptive" in given or (
        "dialect" in given_names and len(given_names) > 1 and all(name in given for name in given_names)
    )


def is_noted(given: Mapping[str, Any]) -> bool:
    """Return whether a group holds keys that another optimizer or a wrapper uses."""
    return any(key in given for key in ("adaptive", *_OPTIMIZERS) if key != "betas")


@dataclass(frozen=True)
class Split:
    """The keys of a given group.

    Attributes:
        plain: settings under our names.
        arguments: settings under the dialect's names or ours.
        carried: notes, which stay in the group as they are.
        left: another optimizer's values of our settings, which are ignored.
    """

    plain: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, Any] = field(default_factory=dict)
    left: dict[str, Any] = field(default_factory=dict)


def split(row: Dialect, given: Mapping[str, Any], ours: Collection[str], given_names: Collection[str]) -> Split:
    """Sort the keys of a group.

    Args:
        row: the group's dialect.
        ours: the names of all settings.
        given_names: the arguments that the constructor was given.
    """
    plain: set[str] = set()
    others = is_anothers(row, given)
    if is_own(given):
        plain = read = set(ours)
    elif others or is_wrappers(given, given_names):
        under_ours = {row.arguments.get(word, word) for word in given_names if word in given}
        read = {*given_names, *(name for name in ours if name not in under_ours)} - set(
            _THEIRS if others else ()
        ).difference(given_names)
        other_meaning = (*row.refused, *(name for name, limit in row.limits.items() if limit.unless))
        plain = {name for name in other_meaning if name in ours}  # with torch's meaning, not the dialect's
    else:
        read = {*row.arguments, *row.refused, *row.limits, *ours} - {"name"}
    found = Split()
    for key, value in given.items():
        if key in read:
            (found.plain if key in plain else found.arguments)[key] = value
        else:
            (found.left if key in ours else found.carried)[key] = value
    return found


def refuse_whole(given: Mapping[str, Any], whole: Mapping[str, Any], backends: Collection[str]) -> None:
    """Refuse arguments of the whole optimizer in a group, unless they equal the optimizer's, as in wrappers' groups.

    Args:
        whole: the optimizer's arguments, by name.
        backends: the names of all backends. Any other value of `backend`, as in Muon's groups, is carried along.
    Raises: TypeError.
    """
    for name, own in whole.items():
        value = given.get(name, own)
        if value is own or (type(value) is type(own) and value == own):
            continue
        if name == "backend" and not (isinstance(value, str) and value in ("auto", *backends)):
            continue
        raise TypeError(
            f"{name}={shown(value)} in a parameter group: {WHOLE[name]}, so give {name} to RMSprop, as an argument "
            "next to params"
        )


def resembling(group: Mapping[str, Any], ours: Collection[str]) -> dict[str, str]:
    """Return the carried keys that resemble a setting, each with that setting's name.

    Args:
        group: a group of this package's optimizers.
        ours: the names of all settings.
    """
    row = dialects.find_dialect(group["dialect"])
    found = {}
    for key in group.keys() - set(ours) - {"params", "param_names", "recipe", "name", *_NOTES}:
        near = (
            difflib.get_close_matches(key, [*ours, *row.arguments], n=1, cutoff=0.85) if isinstance(key, str) else []
        )
        meant = row.arguments.get(key) or dialects.FOREIGN.get(key) or next(iter(near), None)
        if meant is not None:
            found[key] = row.arguments.get(meant, meant)
    return found
