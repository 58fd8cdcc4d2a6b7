"""Adam as a source: RMSprop with bias correction is Adam without its first moment.

Adam's denominator √v̂ + ε is RMSprop's with `bias_correction=True`, alpha = beta2 and the same v and step: exact at
every step. What RMSprop lacks is the average of gradients, `exp_avg`. It is dropped, unless the target has momentum:
then b = exp_avg / ((1 − beta1)·(√v̂ + ε)), the sum that momentum would hold if every gradient had been divided by
today's root, and the learning rate that goes with it is (1 − beta1)·lr.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rmsprop.conversion.record import ConversionReport


def moments(
    held: Mapping[str, Any],
    start: Mapping[str, Any],
    end: Mapping[str, Any],
    count: int | None,
    lr: float | None,
    report: ConversionReport,
) -> dict[str, Any]:
    """Adam's state without `exp_avg`; with `momentum_buffer` in its place if the target has momentum.

    Args:
        held: step, square_avg and exp_avg.
        start, end: settings under our names; `momentum` of the target stands for Adam's beta1.
        count: the number of steps taken.
    """
    rest = {name: value for name, value in held.items() if name != "exp_avg"}
    beta1 = float(end["momentum"])
    if beta1 == 0:
        report.dropped.append(
            "exp_avg: RMSprop averages no gradients, so the run goes on as Adam with beta1=0 would; momentum=0.9 "
            "makes a momentum buffer of it"
        )
        return rest
    if not count:
        raise ValueError("the state of Adam lacks 'step', which its averages are corrected by; give step=...")
    alpha = float(start["alpha"])
    v, m = (np.asarray(_numpy(held[name]), dtype=np.float64) for name in ("square_avg", "exp_avg"))
    root = np.sqrt(v / (1 - alpha**count)) + float(start["eps"])
    buffer = np.divide(m, (1 - beta1) * root, out=np.zeros_like(m), where=root != 0)
    report.approximate.append(
        "momentum: exp_avg over (1 − beta1)·(√v̂ + ε), as if every gradient had been divided by today's root; "
        "take (1 − beta1) of Adam's learning rate with it"
    )
    if start["lr_in_buffer"]:
        buffer = buffer * (lr or 0.0)
    return {**rest, "momentum_buffer": _like(buffer, held["exp_avg"])}


def _numpy(value: Any) -> Any:
    return value.detach().cpu().double().numpy() if hasattr(value, "detach") else value


def _like(array: Any, model: Any) -> Any:
    """The array as the model is: NumPy or torch, and of its dtype."""
    if not hasattr(model, "detach"):
        return array.astype(np.asarray(model).dtype)
    import torch

    return torch.from_numpy(array).to(model.device, model.dtype)
