"""Tables of the command line are never truncated, whatever the width."""

import io
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from rmsprop.cli.bench import _short, _time
from rmsprop.cli.table import show

WORD = st.text("abcXYZ0123456789.,()×µ√", min_size=1, max_size=14)
TEXT = st.lists(WORD, max_size=4).map(" ".join)


def printed(table: Table, width: int, terminal: bool = True) -> list[str]:
    """Return the lines that show prints."""
    console = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, legacy_windows=False
    )
    show(table, console)
    return console.file.getvalue().splitlines()


def made(heads: list[str], rows: list[list[str]], **words) -> Table:
    table = Table(**words)
    for head in heads:
        table.add_column(head)
    for row in rows:
        table.add_row(*row)
    return table


def check_words(data: st.DataObject, width: int) -> None:
    """Assert that no word is missing."""
    heads = data.draw(st.lists(WORD, min_size=1, max_size=6))
    rows = data.draw(st.lists(st.lists(TEXT, min_size=len(heads), max_size=len(heads)), min_size=1, max_size=4))
    lines = printed(made(heads, rows), width)
    assert all(len(line) <= width for line in lines)
    shown = sorted(word for line in lines for word in re.split(r"[\s│┃┏┓┗┛┡┩└┘━─┳┻╇┴:]+", line) if word)
    wanted = [*heads, *(word for row in rows for text in row for word in text.split())]
    standing = len(heads) > 1 and any(line.startswith("  ") and ": " in line for line in lines)
    times = len(rows) if standing else 1
    wanted += [head for head in heads[1:] for _ in range(times - 1)]
    if standing:
        wanted.remove(heads[0])
    assert shown == sorted(wanted)


@pytest.mark.parametrize("count", [30, pytest.param(100, marks=pytest.mark.long)])
def test_every_word_is_there_whole(count: int) -> None:
    """Cells are side by side or on lines; only a word that is wider than the terminal is broken."""
    unhurried = settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    unhurried(given(st.data(), st.integers(20, 120))(check_words))()


def test_a_file_has_no_width_to_wrap_at() -> None:
    """Outside a terminal, a row is one line."""
    row = ["a word " * 40, "b " * 100]
    lines = printed(made(["one", "two"], [row]), 80, terminal=False)
    assert sum(("a word " * 40).strip() in line and ("b " * 100).strip() in line for line in lines) == 1


def test_what_fits_keeps_its_lines() -> None:
    """A table that fits the terminal is printed as rich prints it."""
    assert printed(made(["one"], [["1"]]), 80)[0].startswith("┏")


def test_what_is_left_goes_to_those_that_miss_most() -> None:
    """A long text gets the width that short columns leave."""
    lines = printed(made(["n", "text"], [["1", "word " * 30]]), 60)
    assert max(map(len, lines)) > 50
    assert len(lines) == 4


def test_names_may_be_broken() -> None:
    """A folding column has at least ten cells, and its words are complete, in pieces."""
    table = made(["name", "a", "b"], [["x" * 40, "1" * 12, "2" * 12]])
    table.columns[0].overflow = "fold"
    lines = printed(table, 36)
    assert sum(line.count("x") for line in lines) == 40
    assert len(lines) == 1 + 4


def test_what_does_not_fit_at_all_becomes_lines() -> None:
    """Each row is its first cell, then the others after their headings; title and caption remain."""
    table = made(["name", "first", "second"], [["w" * 9, "1" * 9, "2" * 9]], title="title", caption="caption")
    assert printed(table, 20) == ["title", "w" * 9, "  first: " + "1" * 9, "  second: " + "2" * 9, "caption"]


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (7.84, "7.84µs"),
        (999.4, "999µs"),
        (999.6, "1ms"),
        (12_345.0, "12.3ms"),
        (99_949, "99.9ms"),
        (1.2e6, "1,200ms"),
    ],
)
def test_times_are_one_word(us: float, text: str) -> None:
    """Three digits, then whole milliseconds."""
    assert _time(us) == text


@pytest.mark.parametrize(("count", "text"), [(6, "6"), (4610, "4.61k"), (67_108_864, "67.1M")])
def test_counts_are_short(count: int, text: str) -> None:
    """Three digits."""
    assert _short(count) == text
