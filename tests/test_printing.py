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
from typer.testing import CliRunner

from rmsprop import checkpoint
from rmsprop.cli import app
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


EVIL = "a\x1b[2J\x1b]0;title\x07\n\r\x9b31m\u202e<script>[bold]\udc80"


@pytest.fixture
def evil_file(tmp_path):
    """A checkpoint whose parameter has a name that does things to terminals and pages."""
    weights = {EVIL: nn.Parameter(torch.ones(3)), "b": nn.Parameter(torch.ones(2))}
    optimizer = torch.optim.RMSprop(list(weights.items()), lr=0.1)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    whole = {"model": {name: weight.data for name, weight in weights.items()}, "optimizer": optimizer.state_dict()}
    torch.save(whole, tmp_path / "in.pt")
    return tmp_path / "in.pt"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["convert", "IN", "OUT.pt", "--report", "OUT.json"], 0),
        (["convert", "IN", "--dry-run"], 0),
        (["convert", "IN", "OUT.safetensors"], 2),
        (["convert", "IN", "OUT.npz", "--to", "optax"], 2),
        (["convert", "IN", "OUT.pt", "--set", EVIL.replace("=", "") + "=1"], 2),
        (["convert", "IN", "OUT" + EVIL.replace("/", "") + ".pt"], 0),
        (["convert", EVIL, "OUT.pt"], 2),
        (["inspect", "IN", "--html", "OUT.html"], 0),
        (["inspect", "IN", "--json"], 0),
        (["inspect", "IN", "--from", EVIL], 2),
        (["translate", "--from", EVIL, "--to", "torch"], 2),
        (["dialects", EVIL], 2),
        (["recipes", EVIL], 2),
        (["race", EVIL], 2),
        (["demo", "--optimizers", EVIL], 2),
        (["demo", "--data", EVIL], 2),
        (["bench", "--cases", EVIL], 2),
        (["check", EVIL], 2),
        ([EVIL], 2),
        (["inspect", "--" + EVIL.replace("=", "")], 2),
    ],
    ids=range(20),
)
def test_no_control_character_reaches_a_terminal_a_page_or_a_report(evil_file, words, code):
    """In tables, lists, sentences and file names of every command: escapes, and one line for each."""
    folder = evil_file.parent
    words = [word.replace("IN", str(evil_file)).replace("OUT", str(folder / "out")) for word in words]
    done = CliRunner().invoke(app, words)
    written = [path.read_text("utf-8") for path in folder.iterdir() if path.suffix in (".html", ".json")]
    assert done.exit_code == code, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    for text in (done.output, *written):
        assert all(c.isprintable() or c in "\n\xa0\u202f" for c in text)
        assert "title" not in text or "<script>" not in text or "\n\r" not in text
    if written and words[0] == "inspect":
        assert "<script>" not in written[0]


def test_a_checkpoint_holds_any_name(tmp_path):
    """Text that is not UTF-8 comes back, as key, value and parameter's name."""
    weight = {EVIL: torch.ones(2), "\udc80": torch.zeros(1), EVIL + "2": EVIL}
    found = checkpoint.load(checkpoint.save(tmp_path / "x", **{EVIL: weight}))[EVIL]
    assert found.keys() == weight.keys()
    assert torch.equal(found[EVIL], weight[EVIL])
    assert found[EVIL + "2"] == EVIL


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
