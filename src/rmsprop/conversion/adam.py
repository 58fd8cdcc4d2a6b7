"""Conversion from Adam: RMSprop with bias correction is Adam without the first moment.

Adam's denominator √v̂ + ε is exactly that of RMSprop with `bias_correction=True`, alpha = beta2, and the same v and
step. RMSprop does not keep Adam's average of gradients, `exp_avg`, which is dropped unless the target has momentum.
Then b = exp_avg / ((1 − beta1)·(√v̂ + ε)), the momentum as if the current root had divided every gradient, and the
learning rate becomes (1 − beta1)·lr.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rmsprop.conversion.record import ConversionReport


def moments(
    state: Mapping[str, Any],
    start: Mapping[str, Any],
    end: Mapping[str, Any],
    count: int | None,
    lr: float | None,
    report: ConversionReport,
) -> dict[str, Any]:
    """Return Adam's state without `exp_avg`, and with `momentum_buffer` instead if the target has momentum.

    Args:
        state: step, square_avg and exp_avg.
        start, end: the settings of source and target under our names; the target's `momentum` serves as beta1.
        count: the number of steps taken.
    """
    rest = {name: value for name, value in state.items() if name != "exp_avg"}
    beta1 = float(end["momentum"])
    if beta1 == 0:
        report.dropped.append(
            "exp_avg: RMSprop does not average gradients, so the run continues like Adam with beta1=0; momentum=0.9 "
            "converts it to a momentum buffer"
        )
        return rest
    if not count:
        raise ValueError("the state of Adam lacks 'step', which its bias correction needs; give step=...")
    alpha = float(start["alpha"])
    v, m = (np.asarray(_numpy(state[name]), dtype=np.float64) for name in ("square_avg", "exp_avg"))
    root = np.sqrt(v / (1 - alpha**count)) + float(start["eps"])
    buffer = np.divide(m, (1 - beta1) * root, out=np.zeros_like(m), where=root != 0)
    report.approximate.append(
        "momentum: exp_avg over (1 − beta1)·(√v̂ + ε), as if the current root had divided every gradient; use it "
        "with (1 − beta1) of Adam's learning rate"
    )
    if start["lr_in_buffer"]:
        buffer = buffer * (lr or 0.0)
    return {**rest, "momentum_buffer": _like(buffer, state["exp_avg"])}


def _numpy(value: Any) -> Any:
    return value.detach().cpu().double().numpy() if hasattr(value, "detach") else value


def _like(array: Any, model: Any) -> Any:
    """Return the array with the type and the dtype of the model, which is NumPy's or torch's."""
    if not hasattr(model, "detach"):
        return array.astype(np.asarray(model).dtype)
    import torch

    return torch.from_numpy(array).to(model.device, model.dtype)
