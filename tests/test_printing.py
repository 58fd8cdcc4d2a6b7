"""What is printed of values and text that others made."""

import enum
import subprocess
import sys
from collections import Counter, OrderedDict
from decimal import Decimal

import numpy as np
import pytest
import torch
from torch import nn

from rmsprop.printing import MOST, printable, shown

PLAIN = [
    None,
    True,
    0,
    -7,
    1e-3,
    float("nan"),
    2j,
    "alpha",
    "it's",
    'say "a"',
    "größe 重み",
    b"ab\x00",
    [],
    [1, "a"],
    (),
    (1,),
    (1, 2.5),
    {},
    {"a": [1], 2: (3,)},
    set(),
    {1},
    np.float32(0.5),
    np.int64(3),
    Decimal("0.1"),
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_a_short_plain_value_is_shown_as_its_repr(value):
    """Numbers, text and containers of them."""
    assert shown(value) == repr(value)


class Colour(enum.Enum):
    """A member with a long value."""

    RED = "x" * 1000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a" * 1000, "'" + "a" * 76 + "..."),
        (b"a" * 1000, "b'" + "a" * 75 + "..."),
        (10**400, "<int of 1329 bits>"),
        (-(10**10000), "<int of 33220 bits>"),
        (Colour.RED, "Colour.RED"),
        (OrderedDict(a=1), "{'a': 1}"),
        (Counter("aab"), "{'a': 2, 'b': 1}"),
        (frozenset(), "frozenset()"),
        (torch.zeros(2, 3), "<Tensor torch.float32 (2, 3)>"),
        (np.zeros(5), "<ndarray float64 (5)>"),
        (nn.Linear(2, 3), "<Linear>"),
        (nn.Linear, "Linear"),
        (torch.zeros([1] * 64), "<Tensor torch.float32 (" + "1, " * 18 + "..."),
    ],
    ids=range(13),
)
def test_a_large_or_strange_value_is_shown_by_its_beginning_or_its_kind(value, text):
    """Never a model's repr, an array's elements, or more than 80 characters."""
    assert shown(value) == text
    assert len(text) <= MOST


def test_text_that_a_terminal_would_obey_is_escaped():
    """Escapes, newlines, bells, C1 controls, marks that turn the direction, and lone surrogates."""
    text = "a\x1b[2J\n\x07\x9b\u202e\u2028\udc80\x7f\0é"
    assert printable(text) == r"a\x1b[2J\n\x07\x9b\u202e\u2028\udc80\x7f\x00é"
    for value in (text, [text], {text: 1}, (b"\x1b",), type("a\x1b\n", (), {})()):
        assert shown(value).isprintable()
    assert printable("a name, größe 重み") == "a name, größe 重み"


HOSTILE = {
    "shared": "value = ()\nfor _ in range(60): value = (value, value, 1)",
    "shared lists": "value = []\nfor _ in range(60): value = [value, [value]]",
    "deep": "value = ()\nfor _ in range(10**6): value = (value,)",
    "deep dict": "value = 1\nfor _ in range(10**6): value = {0: value}",
    "itself": "value = []\nvalue.append(value)",
    "long": "value = [[0] * 10**6] * 10**6",
    "wide": "value = (['a' * 10**7] * 10**6,)",
    "number": "value = 1 << 10**8",
    "text": "value = 'a' * 10**8",
    "bytes": "value = b'a' * 10**8",
    "mapping": "value = {i: [0] * 1000 for i in range(1000)}",
    "set": "value = frozenset(range(10**5))",
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_value_is_shown_at_once_and_in_no_memory(make):
    """Whatever is nested, shared, deep or long: 80 characters, 100 kB and no crash of the interpreter."""
    code = (
        f"{make}\nimport os, tracemalloc\nfrom rmsprop.printing import shown\ntracemalloc.start()\n"
        "text = shown(value)\nprint(len(text) <= 80, tracemalloc.get_traced_memory()[1] < 100_000, flush=True)\n"
        "os._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["True", "True"], done.stdout
