"""Bounds of foreign values: what nests or repeats without end is found before it is hashed, compared or copied."""

from collections.abc import Mapping
from typing import Any

MOST_VALUES = 100_000
_DEEPEST = 50
_NESTS = (list, tuple, set, frozenset)


def excess(value: Any) -> str | None:
    """The words for a value that is too large or too deep to be carried along, or None.

    A part that occurs twice counts twice, as in a comparison or a repr of the whole: forty tuples that each hold the
    one before twice are a million million values.
    """
    if not isinstance(value, (*_NESTS, Mapping)):
        return None
    left, waiting = MOST_VALUES, [(value, 0)]
    while waiting:
        own, depth = waiting.pop()
        if depth > _DEEPEST:
            return f"more than {_DEEPEST} levels of lists, tuples or dicts"
        left -= len(own)
        if left < 0:
            return f"more than {MOST_VALUES} values"
        parts = (*own.keys(), *own.values()) if isinstance(own, Mapping) else own
        waiting += [(part, depth + 1) for part in parts if isinstance(part, (*_NESTS, Mapping))]
    return None
