"""Converts averages from one precision of the state to another, and records what is lost."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rmsprop.spec import NARROWED
from rmsprop.tensors import shards
from rmsprop.tensors.float8 import LARGEST, SMALLEST, converted, widened

_PIECE = 1 << 16  # codes at a time
# The largest relative error of rounding to nearest within the range: half a unit, from the smallest fraction on.
_ERROR = {torch.uint8: "11 % (the root by 5 %)", torch.bfloat16: "0.4 %"}


@dataclass
class Losses:
    """The averages that a load rounds, by the state_dtype of their group.

    Attributes:
        dtypes: the dtype that each slot with a loss is rounded to.
        outside: the number of elements of `square_avg` beyond the range of float8.
    """

    dtypes: dict[str, dict[str, torch.dtype]] = field(default_factory=dict)
    outside: int = 0

    def notes(self) -> list[str]:
        """Return a warning for each state_dtype with a loss."""
        found = []
        for state_dtype, dtypes in self.dtypes.items():
            rounded = ", ".join(f"{name} by up to {_ERROR[dtype]}" for name, dtype in dtypes.items())
            beyond = (
                f"; {self.outside} elements of square_avg are outside its range, {SMALLEST:.2g} to {LARGEST:g}, and "
                "become 0 or its end"
            )
            found.append(
                f"the loaded state is rounded to state_dtype={state_dtype!r} of this optimizer: {rounded}"
                f"{beyond if self.outside and state_dtype == 'float8' else ''}; build it with state_dtype='float32' "
                "to keep the state as it was saved"
            )
        return found


@dataclass(frozen=True)
class Conversion:
    """The conversion of a loaded slot to the dtype that the optimizer keeps it in: exact, or rounded to nearest.

    Attributes:
        losses: records a rounding. Mutated by each call.
    """

    name: str
    dtype: torch.dtype
    state_dtype: str
    losses: Losses

    def __call__(self, value: Tensor) -> Tensor:
        """Return the value in the dtype; the value itself if it has it."""
        if value.dtype == self.dtype or value.is_complex():
            return value.to(self.dtype)
        kept = converted(value, self.dtype)
        narrows = self.name in NARROWED and self.dtype in _ERROR
        if narrows and value.numel():
            wide, back = widened(value, torch.float32), widened(kept, torch.float32)
            if bool(((back != wide) & ~(wide.isnan() & back.isnan())).any()):
                self.losses.dtypes.setdefault(self.state_dtype, {})[self.name] = self.dtype
                if self.dtype == torch.uint8:
                    outside = ((wide > 0) & (wide < SMALLEST / 2)) | ((wide > LARGEST) & wide.isfinite())
                    self.losses.outside += int(torch.count_nonzero(outside))
        return kept


def by_table(table: NDArray[np.float32], codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the entries of a table, 256 numbers, that codes stand for; NumPy's indices take 8 bytes a code."""
    found, flat = np.empty(codes.shape, np.float32), codes.reshape(-1)
    for begin in range(0, flat.size, _PIECE):
        found.reshape(-1)[begin : begin + _PIECE] = table[flat[begin : begin + _PIECE]]
    return found


def decoded(codes: Any) -> Any:
    """Return the numbers of a NumPy array of float8 codes, in float32."""
    return by_table(widened(torch.arange(256, dtype=torch.uint8), torch.float32).numpy(), codes)


def to_full_precision(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's state with averages of fewer bytes in float32, in new tensors."""
    return {name: _wide(x) if _is_narrow(name, x) else x for name, x in entry.items()}


def _is_narrow(name: str, x: Any) -> bool:
    if name not in NARROWED or not isinstance(x, Tensor):
        return False
    return x.dtype in (torch.bfloat16, torch.float16) or (name == "square_avg" and x.dtype == torch.uint8)


def _wide(x: Tensor) -> Tensor:
    """Return the numbers of a slot in float32, on the same device; of a DTensor, with its placements."""
    if not shards.is_dtensor(x):
        return widened(x.detach(), torch.float32)
    made = torch.zeros_like(x, dtype=torch.float32)
    shards.shard(made).copy_(widened(shards.shard(x), torch.float32))
    return made.detach()
