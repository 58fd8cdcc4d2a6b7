"""The data types of a conversion: a checkpoint in its framework's terms, a file format, and a report."""

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
    """The result of a conversion, in sentences.

    Attributes:
        exact: what converts exactly.
        approximate: what converts approximately, with the size of the error.
        dropped: what the target cannot hold.
        assumed: what neither the file nor the user states.
    """

    exact: list[str] = dataclasses.field(default_factory=list)
    approximate: list[str] = dataclasses.field(default_factory=list)
    dropped: list[str] = dataclasses.field(default_factory=list)
    assumed: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        parts = dataclasses.asdict(self).items()
        return "\n".join(f"{name}: {printable(sentence)}" for name, sentences in parts for sentence in sentences)


class Unreadable(ValueError):  # noqa: N818
    """A file cannot be read, or cannot be read safely; the message is one clear sentence."""


@dataclasses.dataclass
class Checkpoint:
    """The content of a file, in the source framework's names, units, order and layouts.

    Arrays are NumPy arrays; bfloat16 is held as float32, with a note.

    Attributes:
        owner: the framework whose state the file holds, or this package; UNKNOWN if the file does not identify it.
        params: arrays by the file's names, in the file's order; empty if the file holds none.
        slots: parameter name -> the framework's slot name (a key of `states`) -> array.
        step: the number of optimizer steps taken; None if the file does not count them.
        hyper: the settings in the file, under the framework's names; the first group's if there are several.
        kinds: the layout of each array, as in turning.py.
        turned: for a file that was converted to torch's layout, the kind or the axes that converted each array.
        notes: sentences for the report: what the reader dropped or assumed.
        groups: the names of each parameter group's parameters, and its settings; empty if there is one group and
            all its parameters have state.
        numbers: the numbers of each group's parameters, as text, where the file does not name them; they are then
            the keys of `slots`.
        trained: the names of `params` that `numbers` may stand for.
        tied: second name -> first name, for parameters with two names.
        ask: for an unknown owner, what the file holds and what the user has to add.
        averages: averages of weights and buffers that are not slots, by the names of `params`.
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
    averages: dict[str, Array] = dataclasses.field(default_factory=dict)

    @property
    def row(self) -> Dialect:
        """The row of the owner, which must be known."""
        assert self.owner.row is not None
        return self.owner.row

    @property
    def all_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        """The parameter groups, also where there is only one."""
        return self.groups or [(list(self.slots), self.hyper)]

    @property
    def states(self) -> dict[str, str]:
        """The owner's slot names -> ours. Any file may hold the slot `ema`."""
        return {**self.row.states, "ema": "ema"}

    def state(self, name: str) -> dict[str, Array]:
        """Return a parameter's state under our slot names; empty if it has none."""
        return {self.states[slot]: value for slot, value in self.slots.get(name, {}).items()}


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        sniff: returns whether a path is of the format, from its first bytes or members; never raises.
        read: returns the checkpoint. It raises `Unreadable` with one clear sentence, checks every size and shape
            before it allocates, and never runs code from a file.
        write: writes a checkpoint to a temporary path; None if the format is only read.
        asks: whether `read` also takes the user's settings, for what the file does not hold.
        template: whether `write` takes `template=`, a file of the model to write for.
        chooses: whether `read` takes the paths of the `optimizer` and the `parameters` to read.
        outline: returns the nested mappings and lists of a file, with tensors whose numbers have not been read; None
            if the format is read as a whole.
    """

    name: str
    suffixes: tuple[str, ...]
    sniff: Callable[[Path], bool]
    read: Callable[..., Checkpoint]
    write: Callable[..., None] | None = None
    asks: bool = False
    template: bool = False
    chooses: bool = False
    outline: Callable[[Path], Any] | None = None
