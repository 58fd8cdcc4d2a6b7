"""Refuses state dicts that are not an RMSprop's, naming the optimizer and the command that converts its state."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from rmsprop.dialects import find_dialect
from rmsprop.printing import MOST, shown, with_article
from rmsprop.settings import TORCH_GROUP
from rmsprop.spec import plain
from rmsprop.state.owners import BY_GROUP, CONVERT, owner, possessive
from rmsprop.state.values import excess


def check_shape(state_dict: Any) -> None:
    """Refuse a value that is not the state dict of a torch optimizer.

    Raises: ValueError, which names the entry to load if one of the value's entries is such a state dict.
    """
    if _is_one(state_dict):
        return
    inside = [name for name, value in state_dict.items() if _is_one(value)] if isinstance(state_dict, Mapping) else []
    if inside:
        advice = f"its entry {shown(inside[0])} is one: load that"
    else:
        advice = f"give what optimizer.state_dict() returned; for another framework's checkpoint, {CONVERT}"
    raise ValueError(
        "loaded state dict is not an optimizer's state dict: it needs a dict `state` and a list `param_groups`; "
        + advice
    )


def _is_one(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups = value.get("param_groups")
    if not isinstance(groups, list | tuple):
        return False
    keys = [g.get("params") if isinstance(g, Mapping) else None for g in groups]
    return all(isinstance(own, list | tuple) and all(map(_is_key, own)) for own in keys)


def _is_key(key: Any) -> bool:
    return isinstance(key, str) or (isinstance(key, int) and key.bit_length() < 64)


def check_values(saved: Sequence[Mapping[str, Any]]) -> None:
    """Refuse settings of the wrong kind, and notes that are too large, before they are used or copied.

    Raises: ValueError.
    """
    for i, group in enumerate(saved):
        for name, value in group.items():
            if name in ("params", "param_names"):
                continue
            if name in TORCH_GROUP and not _is_setting(value):
                raise ValueError(
                    f"loaded state dict's group {i} holds {name}={shown(value)}; it takes a number, a bool, a short "
                    "string, None or a tensor"
                )
            more = excess(value)
            if more is not None:
                raise ValueError(
                    f"loaded state dict's group {i} holds {more} in {shown(name)}, too large for a group's note"
                )


def _is_setting(value: Any) -> bool:
    value = plain(value)
    if isinstance(value, str):
        return len(value) <= MOST
    if isinstance(value, int):
        return value.bit_length() <= 1024
    return value is None or isinstance(value, Real | Tensor)


def check_owner(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]
) -> None:
    """Refuse the state of another optimizer.

    Args:
        groups: the optimizer's groups. Arguments of their dialects do not identify another optimizer.
        saved: the saved groups.
        state: the saved state.
    Raises: ValueError, which names the optimizer if it is known, and how to use its state.
    """
    for key, own in [(key, group) for group in saved for key in group["params"]]:
        entry = state.get(key)
        if entry is None:
            continue
        if type(entry) is not dict and not isinstance(entry, Mapping):
            raise ValueError(
                f"loaded state dict is not an RMSprop's: the state of parameter {_called(key)} is "
                f"{with_article(type(entry).__name__)}"
            )
        found = owner({name for name in entry if isinstance(name, str)}, own) if entry else None
        if found is not None:
            lacks = "" if "square_avg" in entry else " and lacks square_avg"
            like = "" if found.name.startswith("another") else f", as {possessive(found.name)} does"
            raise ValueError(
                f"loaded state dict is not an RMSprop's: the state of parameter {_called(key)} holds "
                f"{', '.join(_called(name) for name in list(entry)[:12])}{lacks}{like}; {found.advice}"
            )
    known = {argument for group in groups for argument in find_dialect(group["dialect"]).arguments}
    for i, group in enumerate(saved):
        for name, key in BY_GROUP:
            if key in group and key not in known and ("alpha" not in group or key == "lambd"):
                raise ValueError(
                    f"loaded state dict is not an RMSprop's: its group {i} holds {key}, as {possessive(name)} "
                    "does; it has no state, so a new optimizer loses nothing"
                )


def _called(key: Any) -> str:
    """Return a key as messages show it, without quotes."""
    return shown(key, 60).strip("'")
