"""Bounds the size and depth of foreign values before they are hashed, compared or copied."""

from collections.abc import Mapping
from typing import Any

MOST_VALUES = 100_000
_DEEPEST = 50
_NESTS = (list, tuple, set, frozenset)


def excess(value: Any) -> str | None:
    """Return what a value has too much of, such as "more than 100000 values". None if it is small enough to keep.

    A part that occurs twice counts twice, as in a comparison or a repr: 40 nested tuples, each holding the next one
    twice, count as 10¹² values.
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
