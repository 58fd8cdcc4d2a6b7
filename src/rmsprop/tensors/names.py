"""Names parameters in messages."""

from collections.abc import Mapping
from typing import Any

from rmsprop.printing import shown


def names(group: Mapping[str, Any]) -> list[str] | None:
    """Return the names of a group's parameters. None if they have none, or not one each after an edit."""
    held = group.get("param_names")
    if not isinstance(held, list | tuple) or len(held) != len(group["params"]):
        return None
    return list(held) if all(isinstance(name, str) for name in held) else None


def parameter_name(group: Mapping[str, Any], index: int, number: int | None = None) -> str:
    """Return the name of a group's parameter, or its index, such as "3 of group 0".

    Args:
        number: the index of the group, if known.
    """
    known = names(group)
    if known:
        return shown(known[index])
    return f"{index} of its group" if number is None else f"{index} of group {number}"
