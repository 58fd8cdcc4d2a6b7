"""Defines a backend: a name, its reasons to refuse, and one step."""

from collections.abc import Callable
from dataclasses import dataclass

from rmsprop.spec import Hyper, Rule
from rmsprop.tensors.bucket import Bucket


@dataclass(frozen=True)
class Backend:
    """One way to compute the nine lines.

    Attributes:
        name: value of `backend=` that selects it.
        refuse: (rule, bucket) -> the reason why it cannot step them, or None if it can.
        step: advances every tensor in the bucket by one RMSprop step, in place. Mutates bucket.param and the
            slots, never bucket.grad.
    """

    name: str
    refuse: Callable[[Rule, Bucket], str | None]
    step: Callable[[Rule, Hyper, Bucket], None]
