"""Foreign values and text, fit for a sentence: bounded in length and in work, and without control characters."""

import html
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from numbers import Number
from typing import Any
from unicodedata import category

MOST = 80  # characters of a foreign value in a message


def shown(value: object, most: int = MOST) -> str:
    """Return at most `most` printable characters of a value's repr, found without building the whole of it.

    Nothing is hashed, compared or sorted, and no more is read than is shown: a tuple that holds one tuple twice, and
    so on forty times, takes as long as any other. An array is shown by its kind and shape, an object of an unknown
    class by the name of the class.
    """
    text = ""
    for piece in _pieces(value, most):
        text += printable(piece)
        if len(text) > most:
            return text[: most - 3] + "..."
    return text


def printable(text: str) -> str:
    """Return text on one line, each character that a terminal would obey, or cannot show, as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or category(c) == "Zs" else repr(c)[1:-1] for c in text)


def with_article(noun: str) -> str:
    """Return a noun after "a" or "an", such as "an OrderedDict"."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def in_html(text: str) -> str:
    """Return text as it is written into a page: printable, and none of it markup."""
    return html.escape(printable(text))


def _pieces(value: Any, most: int) -> Iterator[str]:
    """The repr in pieces. Each level of nesting yields a bracket before it descends, so the caller ends it."""
    if isinstance(value, Enum):
        yield f"{type(value).__name__}.{value.name}"
    elif isinstance(value, str):
        yield repr(str.__getitem__(value, slice(most)))
    elif isinstance(value, bytes | bytearray):
        yield repr(bytes(value[:most]))
    elif isinstance(value, int) and value.bit_length() > 4 * most:
        yield f"<int of {value.bit_length()} bits>"
    elif value is None or isinstance(value, Number):
        yield repr(value)
    elif isinstance(value, type):
        yield value.__qualname__[:most]
    elif isinstance(value, list):
        yield from _row("[", value, "]", most)
    elif isinstance(value, tuple):
        yield from _row("(", value, ",)" if len(value) == 1 else ")", most)
    elif isinstance(value, set | frozenset):
        yield from _row("{", value, "}", most) if value else (f"{type(value).__name__}()",)
    elif isinstance(value, Mapping):
        yield "{"
        for i, (key, item) in enumerate(value.items()):
            yield ", " if i else ""
            yield from _pieces(key, most)
            yield ": "
            yield from _pieces(item, most)
        yield "}"
    elif hasattr(value, "shape") and hasattr(value, "dtype"):
        yield f"<{type(value).__name__} {str(value.dtype)[:most]} "
        yield from _row("(", value.shape, ")", most)
        yield ">"
    else:
        yield f"<{type(value).__qualname__[:most]}>"


def _row(begin: str, items: Iterable[Any], end: str, most: int) -> Iterator[str]:
    yield begin
    for i, item in enumerate(items):
        yield ", " if i else ""
        yield from _pieces(item, most)
    yield end
