"""Turns this package's docstrings into reStructuredText, for the site's reference.

A docstring has paragraphs, sections of `name: meaning` lines under a heading that ends in a colon, single lines such
as `Raises: ValueError if ...`, and doctests.
"""

import re
from collections.abc import Iterator
from typing import Any

ENTRY = re.compile(r"(\*{0,2}\w[\w, ]*): (.*)")
LINE = re.compile(r"([A-Z]\w+): +(\S.*)")
# Headings of sections; others are found by the indented entries that follow.
GROUP = re.compile(r"\S.*:$")


def process(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Rewrite the lines of a docstring in place, as Sphinx asks for it."""
    lines[:] = list(rest(lines))


def rest(lines: list[str]) -> Iterator[str]:
    """Yield a docstring as reStructuredText."""
    i = 0
    while i < len(lines):
        line = lines[i]
        body = _indented(lines, i + 1)
        if line.startswith(">>>"):
            stop = next((j for j in range(i, len(lines)) if not lines[j].strip()), len(lines))
            yield from ["", *lines[i:stop], ""]
            i = stop
        elif line and not line.startswith(" ") and GROUP.match(line) and body and ENTRY.match(body[0].strip()):
            yield from ["", f".. rubric:: {_inline(line[:-1])}", "", *_entries(body), ""]
            i += 1 + len(body)
        elif LINE.match(line) and not line.startswith(" "):
            name, text = LINE.match(line).groups()  # type: ignore[union-attr]
            more = _paragraph(lines, i + 1)
            words = " ".join([text, *(part.strip() for part in more)])
            yield from ["", f":{name}: {_inline(words)}"]
            i += 1 + len(more)
        elif line.startswith("    ") and (i == 0 or not lines[i - 1].strip()):
            code = [line, *_indented(lines, i + 1)]
            yield from ["", ".. code-block:: python", "", *code, ""]
            i += len(code)
        else:
            yield _inline(line)
            i += 1


def _indented(lines: list[str], start: int) -> list[str]:
    """Return the indented lines from there on, up to a blank line or one at the margin."""
    stop = start
    while stop < len(lines) and lines[stop].startswith(" "):
        stop += 1
    return lines[start:stop]


def _paragraph(lines: list[str], start: int) -> list[str]:
    """Return the lines from there on, up to a blank one or the next section."""
    stop = start
    while stop < len(lines) and lines[stop].strip() and not LINE.match(lines[stop]):
        stop += 1
    return lines[start:stop]


def _entries(lines: list[str]) -> Iterator[str]:
    """Yield a list of definitions for lines of `name: meaning`, whose continuation is indented further."""
    margin = len(lines[0]) - len(lines[0].lstrip())
    texts: list[str] = []
    for line in lines:
        if len(line) - len(line.lstrip()) == margin and ENTRY.match(line.strip()):
            texts.append(line.strip())
        elif texts:
            texts[-1] += " " + line.strip()
    for text in texts:
        names, meaning = ENTRY.match(text).groups()  # type: ignore[union-attr]
        yield from [", ".join(f"``{name.strip()}``" for name in names.split(",")), f"    {_inline(meaning)}"]


def _inline(text: str) -> str:
    """Return a line with literals in double backticks, and other marks escaped."""
    parts = re.split(r"(`+[^`]+`+)", text)
    return "".join(
        f"``{part.strip('`')}``" if part.startswith("`") else re.sub(r"([*|\\]|_(?!\w))", r"\\\1", part)
        for part in parts
    )
