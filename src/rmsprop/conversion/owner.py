"""The owner of a checkpoint's state: a dialect, Adam, or this package under one of its dialects."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from rmsprop import dialects
from rmsprop.dialects import Dialect
from rmsprop.dialects.row import Value
from rmsprop.spec import Hyper, Rule, WeightDecayMode

_OURS = "rmsprop:"  # begins the name of an owner whose state is this package's own


@dataclass(frozen=True)
class Owner:
    """The framework whose slots, units and settings a checkpoint holds.

    Attributes:
        row: the dialect's row, or Adam's; None if the file does not name its framework.
        ours: whether the slots, settings and layouts are this package's own; `row.states` are then torch's.
    """

    row: Dialect | None = None
    ours: bool = False

    @property
    def name(self) -> str:
        """The name in files and reports: "keras3", "adam", "rmsprop:keras3" for our own; "" if unknown."""
        if self.row is None:
            return ""
        return f"{_OURS}{self.row.name}" if self.ours else self.row.name


UNKNOWN = Owner()


def this_package(row: Dialect) -> Owner:
    """Return this package as the owner, under a dialect.

    It keeps torch's slots, a positive momentum buffer, and averages without bias correction.
    """
    states = dialects.DIALECTS["torch"].states
    return Owner(dataclasses.replace(row, states=states, buffer_sign=1, keeps_corrected=False), ours=True)


def find_owner(name: str) -> Owner:
    """Return the owner of that name: a dialect, "adam", "adamw", or "rmsprop:NAME" for our own state in a dialect.

    Raises: ValueError for a name that is not a dialect's.
    """
    if name.startswith(_OURS):
        return this_package(dialects.find_dialect(name.removeprefix(_OURS)))
    return Owner(_ADAM[name] if name in _ADAM else dialects.find_dialect(name))


def _adam(name: str, title: str, decay: WeightDecayMode, weight_decay: float) -> Dialect:
    return Dialect(
        name=name,
        title=title,
        rule=Rule(eps_mode="outside", bias_correction=True, weight_decay_mode=decay),
        hyper=Hyper(lr=1e-3, alpha=0.999, eps=1e-8, weight_decay=weight_decay),
        source="torch 2.15.0, torch/optim/adam.py",
        arguments={"betas": "alpha", "beta2": "alpha"},
        values={"betas": Value(lambda pair: float(tuple(pair)[1]))},
        states={"step": "step", "exp_avg": "exp_avg", "exp_avg_sq": "square_avg"},
        call=f"torch.optim.{title}",
    )


# Adam is converted from and never to; conversion/adam.py holds the rule of its state.
_ADAM = {"adam": _adam("adam", "Adam", "l2", 0.0), "adamw": _adam("adamw", "AdamW", "decoupled", 0.01)}
