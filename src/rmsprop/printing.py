"""Format untrusted values and text for messages: bounded in length and time, without control characters."""

import html
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from importlib import metadata
from numbers import Number
from typing import Any
from unicodedata import category

MOST = 80  # characters of an untrusted value in a message


def shown(value: object, most: int = MOST) -> str:
    """Return at most `most` printable characters of a value's repr, without building the full repr.

    This function does not hash, compare or sort, and reads no more than it shows; a tuple that holds the same tuple
    twice, nested forty levels deep, takes no longer than others. It shows an array by its kind and shape, and an
    object of an unknown class by the class's name.
    """
    text = ""
    for piece in _pieces(value, most):
        text += printable(piece)
        if len(text) > most:
            return text[: most - 3] + "..."
    return text


def printable(text: str) -> str:
    """Return text on one line, with control and unprintable characters as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or category(c) == "Zs" else repr(c)[1:-1] for c in text)


def with_article(noun: str) -> str:
    """Return a noun after "a" or "an", such as "an OrderedDict"."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def in_html(text: str) -> str:
    """Return printable text with HTML escaped."""
    return html.escape(printable(text))


def _pieces(value: Any, most: int) -> Iterator[str]:
    """Yield the repr in pieces. Each level yields a bracket before it descends, so the caller can stop in time."""
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


def version() -> str:
    """Return the package's version from its metadata, or "0" in a source tree that is not installed."""
    try:
        return metadata.version("rmsprop")
    except metadata.PackageNotFoundError:
        return "0"
