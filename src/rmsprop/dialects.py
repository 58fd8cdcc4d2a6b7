"""RMSprop as each framework computes it: one row per dialect, in the framework's own words.

A row is the whole definition: the constructor, the command line and the docs read it, nothing else knows a
framework's name. To add a dialect, add one row (and its golden vectors).
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from rmsprop.spec import Hyper, Rule

HYPERS = tuple(f.name for f in fields(Hyper))
SWITCHES = tuple(f.name for f in fields(Rule) if f.name not in ("momentum", "maximize"))


@dataclass(frozen=True)
class Dialect:
    """One framework version's RMSprop.

    Attributes:
        name: what `dialect=` takes.
        title: the framework, in words.
        rule: its switches. `momentum` in it is ignored: the number decides.
        hyper: its default numbers.
        source: where the formula and the defaults were read.
        words: its argument names -> ours, where they differ from torch's.
        refused: names that cannot be taken under this dialect -> the reason and what to write instead.
        states: its state names -> ours.
    """

    name: str
    title: str
    rule: Rule
    hyper: Hyper
    source: str
    words: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)

    def defaults(self) -> dict[str, Any]:
        """Every number and switch of the dialect, under our names."""
        return {name: getattr(self.hyper, name) for name in HYPERS} | {
            name: getattr(self.rule, name) for name in SWITCHES
        }


_ROWS = (
    Dialect(
        name="torch",
        title="PyTorch, torch.optim.RMSprop",
        rule=Rule(eps_mode="outside"),
        hyper=Hyper(lr=1e-2, alpha=0.99, eps=1e-8),
        source="torch 2.15.0, torch/optim/rmsprop.py (the same formula since 1.2)",
    ),
    Dialect(
        name="textbook",
        title="The textbook: w ← w − α·g/√(S + ε), S ← β·S + (1−β)·g²",
        rule=Rule(eps_mode="inside"),
        hyper=Hyper(lr=1e-3, alpha=0.99, eps=1e-8),
        source="the rule as lecture notes state it, after Tieleman and Hinton, lecture 6e, 2012, with ε in the root",
        words={"learning_rate": "lr", "beta": "alpha", "epsilon": "eps"},
        refused={
            "alpha": "alpha is the learning rate in the textbook's rule and the decay of the average in torch's; "
            "write learning_rate=... or beta=... to say which"
        },
        states={"S": "square_avg"},
    ),
)

DIALECTS: Mapping[str, Dialect] = {row.name: row for row in _ROWS}

# Argument names of other frameworks' RMSprop, and what they are called here: for messages only.
FOREIGN = {
    "rho": "alpha",
    "decay": "alpha",
    "decay_rate": "alpha",
    "rms_decay": "alpha",
    "rmsDecay": "alpha",
    "gamma": "alpha",
    "gamma1": "alpha",
    "beta": "alpha",
    "beta2": "alpha",
    "betas": "alpha",
    "smoothing": "alpha",
    "gamma2": "momentum",
    "mu": "momentum",
    "learning_rate": "lr",
    "learningRate": "lr",
    "step_size": "lr",
    "base_lr": "lr",
    "eta": "lr",
    "epsilon": "eps",
    "delta": "eps",
    "eps_in_sqrt": "eps_mode",
    "eps_inside_sqrt": "eps_mode",
    "initial_scale": "v_init",
    "initial_accumulator": "v_init",
    "initial_accumulator_value": "v_init",
    "initialMean": "v_init",
    "centred": "centered",
    "lr_in_momentum": "lr_in_buffer",
    "decoupled_decay": "weight_decay_mode",
    "decoupled_weight_decay": "weight_decay_mode",
    "weightDecay": "weight_decay",
    "wd": "weight_decay",
}


def find(name: Any) -> Dialect:
    """The row of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if isinstance(name, str) and name in DIALECTS:
        return DIALECTS[name]
    near = difflib.get_close_matches(name, DIALECTS, n=1) if isinstance(name, str) else []
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"Unknown dialect: {name!r}{hint}; choose one of {', '.join(map(repr, DIALECTS))}")


def read_words(dialect: Dialect, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under our names, from settings in the dialect's or in torch's words.

    Raises:
        TypeError: a name that means something else in this dialect, that belongs to another framework, that
            nobody knows, or two names for one thing; the message names the right word.
    """
    read: dict[str, Any] = {}
    typed: dict[str, str] = {}
    for word, value in given.items():
        if word in dialect.refused:
            raise TypeError(f"{word}={value!r} is ambiguous under dialect={dialect.name!r}: {dialect.refused[word]}")
        ours = dialect.words.get(word, word)
        if ours not in HYPERS and ours not in SWITCHES and ours != "maximize":
            raise TypeError(unknown_word(dialect, word, value))
        if ours in read:
            raise TypeError(
                f"{typed[ours]}={read[ours]!r} and {word}={value!r} both set {ours} under "
                f"dialect={dialect.name!r}; give one of them"
            )
        read[ours], typed[ours] = value, word
    return read


def unknown_word(dialect: Dialect, word: str, value: Any) -> str:
    """The sentence for a setting that this dialect does not know: whose word it is, and the right one."""
    own = {ours: theirs for theirs, ours in dialect.words.items()}
    ours = FOREIGN.get(word)
    shown = f"{word}={value!r}"
    if ours is None:
        known = [*dialect.words, *(h for h in HYPERS if h not in dialect.refused), *SWITCHES, "maximize"]
        near = difflib.get_close_matches(word, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
        return f"RMSprop got an unexpected setting {shown} under dialect={dialect.name!r}; {hint}"
    speakers = [row.name for row in DIALECTS.values() if word in row.words and row is not dialect]
    whose = f"dialect={speakers[0]!r} has that name" if speakers else "another framework's RMSprop has that name"
    return f"RMSprop takes no {shown} under dialect={dialect.name!r}: {whose}; write {own.get(ours, ours)}=... here"
