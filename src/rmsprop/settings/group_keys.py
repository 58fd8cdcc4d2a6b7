"""Pairs the keys of a given group with settings; all other keys are notes that the group carries along.

A scheduler, a trainer or a wrapper keeps numbers of its own in the groups, and a group may come whole from another
optimizer. In a group of the user's own, a dialect's own word is a setting. In a group that another optimizer hands
over, only torch's and our names are settings, and the words that the constructor was given too.
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
    **dict.fromkeys(("nonfinite", "nonfinite_limit"), "one gradient that is not finite stops the step of all groups"),
    "backend": "one choice holds for all groups",
    "amp_in_step": "torch.amp.GradScaler looks at the optimizer",
}

# Keys that only another optimizer's own groups have (Adam and its kin, SGD, Muon), and of every optimizer of torch.
_OPTIMIZERS = ("amsgrad", "betas", "dampening", "ns_steps")
_TORCHS = ("foreach", "maximize", "differentiable")

# Settings of ours that such groups have for another rule, and that torch.optim.RMSprop does not have.
_THEIRS = ("nesterov", "bias_correction", "fused", "clip_value", "clip_norm")

# Keys of trainers and schedulers that resemble a setting.
_NOTES = ("base_momentum", "initial_lr", "lr_scale", "max_lr", "max_momentum", "min_lr", "swa_lr")


def is_own(given: Mapping[str, Any]) -> bool:
    """Whether a group is one of this package's optimizers'."""
    return "dialect" in given and all(name in given for name in dialects.SWITCHES)


def is_anothers(row: Dialect, given: Mapping[str, Any]) -> bool:
    """Whether a group was completed by an optimizer of another class, such as torch's Adam or SGD."""
    if is_own(given):
        return False
    return any(key in given and key not in row.arguments for key in _OPTIMIZERS) or all(
        key in given for key in _TORCHS
    )


def is_wrappers(given: Mapping[str, Any], given_names: Collection[str]) -> bool:
    """Whether a wrapper such as SAM hands a group over.

    SAM's groups say `adaptive`, and hold, beside keys of the wrapper's own, all that the constructor was given.

    Args:
        given_names: the names that the constructor was given.
    """
    return "adaptive" in given or (
        "dialect" in given_names and len(given_names) > 1 and all(name in given for name in given_names)
    )


def is_noted(given: Mapping[str, Any]) -> bool:
    """Whether a group holds keys of another optimizer's or a wrapper's, which have a purpose there."""
    return any(key in given for key in ("adaptive", *_OPTIMIZERS) if key != "betas")


@dataclass(frozen=True)
class Split:
    """The keys of a given group.

    Attributes:
        plain: settings under our names.
        arguments: settings in the dialect's words or ours.
        carried: notes that stay in the group as they are.
        left: another optimizer's values of settings of ours, which are not taken over.
    """

    plain: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, Any] = field(default_factory=dict)
    left: dict[str, Any] = field(default_factory=dict)


def split(row: Dialect, given: Mapping[str, Any], ours: Collection[str], given_names: Collection[str]) -> Split:
    """Return the keys of a group by what they are.

    Args:
        row: the group's dialect.
        ours: the names of all settings.
        given_names: the names that the constructor was given.
    """
    plain: set[str] = set()
    others = is_anothers(row, given)
    if is_own(given):
        plain = read = set(ours)
    elif others or is_wrappers(given, given_names):
        said = {row.arguments.get(word, word) for word in given_names if word in given}
        read = {*given_names, *(name for name in ours if name not in said)} - set(
            _THEIRS if others else ()
        ).difference(given_names)
        other_meaning = (*row.refused, *(name for name, limit in row.limits.items() if limit.unless))
        plain = {name for name in other_meaning if name in ours}  # torch's meaning, whatever it is in the dialect
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
    """Refuse arguments of the whole optimizer in a group, unless they repeat its own, as a wrapper's groups do.

    Args:
        whole: the optimizer's own, by name.
        backends: the names of all backends. Another value of that key, as Muon's groups have, is carried along.
    Raises: TypeError.
    """
    for name, own in whole.items():
        value = given.get(name, own)
        if value is own or (type(value) is type(own) and value == own):
            continue
        if name == "backend" and not (isinstance(value, str) and value in ("auto", *backends)):
            continue
        raise TypeError(
            f"{name}={shown(value)} in a parameter group: {WHOLE[name]}, so {name} is an argument of RMSprop, beside "
            "params"
        )


def resembling(group: Mapping[str, Any], ours: Collection[str]) -> dict[str, str]:
    """Return the carried keys that look like a setting, with the setting that each would be here.

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
