"""What a backend is: a name, its reasons to refuse, and one step."""

from collections.abc import Callable
from dataclasses import dataclass

from rmsprop.spec import Hyper, Rule
from rmsprop.tensors.bucket import Bucket


@dataclass(frozen=True)
class Backend:
    """One way to compute the nine lines.

    Attributes:
        name: what `backend=` takes.
        refuse: (rule, bucket) -> why it cannot take them, in words, or None when it can.
        step: advance every tensor in the bucket by one RMSprop step, in place. Mutates bucket.param and the
            slots, never bucket.grad.
    """

    name: str
    refuse: Callable[[Rule, Bucket], str | None]
    step: Callable[[Rule, Hyper, Bucket], None]
