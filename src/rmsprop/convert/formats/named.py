"""States that are named after their variables, as every Keras does it; in three ways over the years."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_LONGEST, _DEEPEST = 4096, 100  # of a name: its characters, and the scopes that it may stand below
NEWER = ("velocity", "momentum", "average_gradient")
LEGACY = ("rms", "momentum", "mg")


class Owners:
    """The variables that states may belong to.

    RMSprop/velocity/conv/kernel (tf_keras), rm_sprop/conv_kernel_velocity (Keras 3), RMSprop/conv/kernel/rms (legacy,
    below whatever scopes).
    """

    def __init__(self, variables: Iterable[str]) -> None:
        listed = list(variables)
        self.variables = set(listed)
        self.twice = {name for name, times in Counter(listed).items() if times > 1}
        self.flat: dict[str, str] = {}
        for name in listed:
            flat = name.replace("/", "_")
            if flat in self.flat and self.flat[flat] != name:
                self.twice |= {name, self.flat[flat]}
            self.flat[flat] = name

    def of(self, state: str) -> tuple[str, str] | None:
        """The slot and the variable of a state; None if its name tells no variable, or not one alone."""
        if len(state) > _LONGEST:
            return None
        found = self._newer(state) or self._keras3(state) or self._legacy(state)
        return found if found and found[1] not in self.twice else None

    def _newer(self, state: str) -> tuple[str, str] | None:
        for match in re.finditer(r"(?:^|/)(velocity|momentum|average_gradient)/", state):
            if state[match.end() :] in self.variables:
                return match[1], state[match.end() :]
        return None

    def _keras3(self, state: str) -> tuple[str, str] | None:
        name = state.rpartition("/")[2]
        for slot in NEWER:
            flat = name.removesuffix(f"_{slot}")
            if flat != name and flat in self.flat:
                return slot, self.flat[flat]
        return None

    def _legacy(self, state: str) -> tuple[str, str] | None:
        name, _, slot = state.rpartition("/")
        if slot not in LEGACY:
            return None
        for _ in range(_DEEPEST):
            if not name or name in self.variables:
                break
            name = name.partition("/")[2]
        else:
            return None
        return (slot, name) if name else None
