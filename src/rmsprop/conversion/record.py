"""What a checkpoint of any framework says, before anything is converted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy.typing as npt

from rmsprop.conversion.owner import UNKNOWN, Owner
from rmsprop.dialects import Dialect
from rmsprop.printing import printable

Array = npt.NDArray[Any]


@dataclasses.dataclass
class ConversionReport:
    """What a conversion did, in sentences: exactly, nearly and by how much, not at all; and what it assumed."""

    exact: list[str] = dataclasses.field(default_factory=list)
    approximate: list[str] = dataclasses.field(default_factory=list)
    dropped: list[str] = dataclasses.field(default_factory=list)
    assumed: list[str] = dataclasses.field(default_factory=list)

    def merge(self, other: ConversionReport) -> None:
        """Add the sentences of another report that this one lacks."""
        for name, sentences in dataclasses.asdict(other).items():
            own = getattr(self, name)
            own += [sentence for sentence in sentences if sentence not in own]

    def __str__(self) -> str:
        parts = dataclasses.asdict(self).items()
        return "\n".join(f"{name}: {printable(sentence)}" for name, sentences in parts for sentence in sentences)


class Unreadable(ValueError):  # noqa: N818
    """A file that cannot be read, or not safely; the message is one clear sentence."""


@dataclasses.dataclass
class Checkpoint:
    """What a file holds, in the source framework's names, units, order and layouts.

    `owner` is the framework whose state it is, or this package; where the file cannot say, its row is None, and
    `ask` is then what it does say and what the user is to add. `params` are arrays by the file's names, in the
    file's order; empty if the file holds none. `slots` goes from a parameter's name to the framework's own slot
    names (the keys of the dialect row's `states`) to arrays. `step` counts the optimizer steps taken, where the
    file says. `hyper` holds the settings that the file holds, in the framework's own words. `kinds` says how an
    array lies, as turning.py has it. `turned` is of a file that was converted to torch's layout: the kind, or the
    axes, that each array has been turned by. `notes` are sentences for the report: what the reader dropped or
    assumed. Arrays are NumPy; bfloat16 is held as float32, with a note. `groups` are the parameter groups, each the
    names of its parameters and its settings, where there are several, or parameters without state; `hyper` is then
    the first's. `numbers` are the numbers of each group's parameters, as text, where the file does not name them
    and `slots` goes by number; `trained` are those of `params` that they may stand for. `tied` are the second names
    of parameters that have two, each with the first.
    """

    owner: Owner = UNKNOWN
    params: dict[str, Array] = dataclasses.field(default_factory=dict)
    slots: dict[str, dict[str, Array]] = dataclasses.field(default_factory=dict)
    step: int | None = None
    hyper: dict[str, Any] = dataclasses.field(default_factory=dict)
    kinds: dict[str, str] = dataclasses.field(default_factory=dict)
    turned: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    groups: list[tuple[list[str], dict[str, Any]]] = dataclasses.field(default_factory=list)
    numbers: list[list[str]] = dataclasses.field(default_factory=list)
    trained: list[str] = dataclasses.field(default_factory=list)
    tied: dict[str, str] = dataclasses.field(default_factory=dict)
    ask: str = ""

    @property
    def row(self) -> Dialect:
        """The owner's row, for a checkpoint whose owner is known."""
        assert self.owner.row is not None
        return self.owner.row


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file: how to know it, read it and, where it can be written, write it.

    `sniff(path)` looks at the first bytes (or members) and never raises on a strange file. `read` raises `Unreadable`
    with one clear sentence, checks every size and shape before it allocates, and never runs code from a file.
    `write` is None for what cannot be written; it is given a path that nobody else reads yet. Where `asks`, `read` is
    given the user's settings as well, for what the file does not tell. Where `template`, `write` takes `template=`, a
    file of the model to be written for. Where `chooses`, `read` takes the places of the `optimizer` and of the
    `parameters` wanted, for files that hold several.
    """

    name: str
    suffixes: tuple[str, ...]
    sniff: Callable[[Path], bool]
    read: Callable[..., Checkpoint]
    write: Callable[..., None] | None = None
    asks: bool = False
    template: bool = False
    chooses: bool = False
