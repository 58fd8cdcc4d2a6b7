"""The golden vectors: runs of the real frameworks, as tests/golden/make_*.py recorded them."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from paths import GOLDEN

from rmsprop import RMSprop

# under a name of its own: tests/checkpoints has an inputs.py too
_spec = importlib.util.spec_from_file_location("golden_inputs", GOLDEN / "inputs.py")
assert _spec is not None
assert _spec.loader is not None
_inputs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_inputs)
LRS, SHAPES, gradients, parameters = _inputs.LRS, _inputs.SHAPES, _inputs.gradients, _inputs.parameters

__all__ = ["Recorded", "difference", "frameworks", "ours", "parameters", "provenance", "recorded", "refused"]

# Relative to the larger of |p| now and |p| at the start, at every element of every step.
RTOL = {"float32": 1e-5, "float64": 1e-11}


@dataclass(frozen=True)
class Recorded:
    """One run of a framework: its settings in its own words, and the parameters after each step."""

    framework: str
    key: str
    dialect: str
    dtype: str
    words: dict[str, Any]
    lr_word: str
    note: str
    rtol: float
    lrs: tuple[float, ...]

    def __str__(self) -> str:
        words = ",".join(f"{k}={v}" for k, v in self.words.items())
        return f"{self.framework}-{self.key}-{self.dialect}-{self.dtype}-{words}"

    def run(self) -> dict[str, np.ndarray]:
        """The parameters after each step, stacked."""
        with np.load(GOLDEN / f"{self.framework}.npz") as file:
            return {name: file[f"{self.key}/{name}"] for name in SHAPES}


@cache
def provenance(framework: str) -> dict[str, Any]:
    """Which version was run, when, and by what command."""
    return _described(framework)["provenance"]


def _described(framework: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"{framework}.npz") as file:
        return json.loads(str(file["description"]))


def frameworks() -> list[str]:
    """The names of the recorded frameworks."""
    return sorted(path.stem for path in GOLDEN.glob("*.npz") if path.stem != "sparse")


def recorded() -> Iterator[Recorded]:
    """All recorded runs."""
    for framework in frameworks():
        for case in _described(framework)["cases"]:
            yield Recorded(
                framework,
                case["key"],
                case["dialect"],
                case["dtype"],
                case["words"],
                case["lr_word"],
                case["note"],
                case.get("rtol", RTOL[case["dtype"]]),
                tuple(case.get("lrs", LRS)),
            )


def refused(case: Recorded) -> list[str]:
    """The words of a run that the framework ignores, or that move elsewhere: here they are refused in words."""
    words, found = case.words, []
    if case.dialect == "bitsandbytes" and words.get("momentum"):
        found.append("momentum")  # never read there
    if case.dialect == "mxnet1" and not words.get("centered") and words.get("gamma2", 0.9) != 0.9:
        found.append("gamma2")  # not read without centered
    if words.get("rescale_grad", 1.0) != 1.0:
        found.append("rescale_grad")  # the loss is divided instead
    if case.dialect == "optax" and words.get("nesterov") and not words.get("momentum"):
        found.append("nesterov")  # without momentum there is no trace
    if words.get("corrected_weight_decay") and not words.get("decoupled_decay"):
        found.append("corrected_weight_decay")  # not read there
    return found


def ours(case: Recorded, **options: Any) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The same run here: the parameters after each step."""
    dtype = getattr(torch, case.dtype)
    params = {name: torch.nn.Parameter(torch.tensor(p, dtype=dtype)) for name, p in parameters().items()}
    words, factor = dict(case.words), case.words.get("rescale_grad", 1.0)
    for word in refused(case):
        del words[word]
    words |= {case.lr_word: case.lrs[0], **options}
    optimizer = RMSprop(params.values(), dialect=case.dialect, **words)
    for t, (lr, grads) in enumerate(zip(case.lrs, gradients(), strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, p in params.items():
            p.grad = torch.tensor(grads[name] * factor, dtype=dtype)
        optimizer.step()
        yield t, {name: p.detach().numpy().copy() for name, p in params.items()}


def difference(actual: np.ndarray, expected: np.ndarray, start: np.ndarray) -> float:
    """The largest difference, relative to the larger of |expected| and |start|."""
    expected = expected.astype(np.float64)
    return float(np.max(np.abs(actual.astype(np.float64) - expected) / np.maximum(np.abs(expected), np.abs(start))))
