"""Readers of the commands' arguments: NAME=VALUE settings, comma lists, and learning rates."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

CONSTANTS = {"true": True, "false": False, "none": None}


def read_settings(arguments: Sequence[str], option: str = "") -> dict[str, Any]:
    """Read NAME=VALUE arguments.

    Args:
        option: the option that the arguments follow, for the message.
    Raises: ValueError for an argument of another form, and for a name that is given twice.
    """
    settings: dict[str, Any] = {}
    where = f"{option} " if option else ""
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or not name.isidentifier() or not text:
            raise ValueError(f"{where}{argument!r} is not a setting; write it as NAME=VALUE, such as lr=0.01.")
        if name in settings:
            raise ValueError(f"{where}{name} is given twice; give it once.")
        settings[name] = read_value(text)
    return settings


def read_dialect(name: str) -> str:
    """Return the name of a dialect, adam or adamw in lower case, and any other text as it is, for the message."""
    from rmsprop.dialects import DIALECTS

    return name.lower() if name.lower() in {*DIALECTS, "rmsprop", "adam", "adamw"} else name


def read_value(text: str) -> Any:
    """Read a Python literal, a number, or true, false or none in any case. Anything else is returned as text."""
    from ast import literal_eval

    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    for read in (literal_eval, int, float):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return text


def read_list(option: str, text: str) -> list[str]:
    """Split a comma list. Raises: ValueError if it is empty."""
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise ValueError(f"{option} {text!r} names nothing; give a comma list.")
    return items


def read_names(option: str, text: str, choices: Collection[str]) -> list[str]:
    """Read a comma list of names, in any case. Raises: ValueError if it is empty or a name is not a choice."""
    from difflib import get_close_matches

    known = {choice.lower(): choice for choice in choices}
    expected = f"choose from {', '.join(choices)}."
    items = [item.strip().lower() for item in text.split(",") if item.strip()]
    if not items:
        raise ValueError(f"{option} {text!r} names nothing; {expected}")
    for item in items:
        if item not in known:
            close = get_close_matches(item, known, n=1)
            hint = f" Did you mean {known[close[0]]!r}?" if close else ""
            raise ValueError(f"{option}: {item!r} is unknown; {expected}{hint}")
    return [known[item] for item in items]


def read_number(option: str, text: str) -> float:
    """Read a number. Raises: ValueError if it is not one."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is not a number; write it like 0.001.") from None


def read_rates(option: str, text: str) -> float | dict[str, float]:
    """Read one learning rate for all, or a comma list of name=rate. Raises: ValueError if it is neither."""
    if "=" not in text:
        return read_number(option, text)
    rates = {}
    for item in read_list(option, text):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"{option} {text!r}: give one number for all, or name=number for each, not a mixture.")
        rates[name] = read_number(option, value)
    return rates
