"""Writes a `.pt` file with the keys "model" and "optimizer", which torch.load reads with weights_only=True.

A file that was converted from another layout also has the key "turned": the kind (turning.py) or the axes by name.

The optimizer is a state dict of `rmsprop.RMSprop` (source "rmsprop"), `torch.optim.RMSprop`, timm's `RMSpropTF`,
Stable-Baselines3's `RMSpropTFLike` or bitsandbytes' 32-bit `RMSprop`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rmsprop.conversion.record import Checkpoint

WRITTEN = ("rmsprop", "torch", "timm", "sb3", "bitsandbytes")
_QUANTIZED = "__bnb_optimizer_quant_state__"


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write the parameters by name, and the optimizer's state dict in their order.

    Raises: ValueError for a source that a `.pt` file cannot hold.
    """
    import torch

    source = "rmsprop" if checkpoint.owner.ours else checkpoint.owner.name
    if source not in WRITTEN:
        raise ValueError(f"a .pt holds the state of {', '.join(WRITTEN)}; got {source!r}")
    groups = checkpoint.groups or [(list(checkpoint.slots), checkpoint.hyper)]
    state: dict[int, Any] = {}
    packed: list[dict[str, Any]] = []
    at = 0
    for names, hyper in groups:
        named = {} if checkpoint.numbers else {"param_names": names}
        packed.append({**_settings(source, hyper), "params": list(range(at, at + len(names))), **named})
        for name in names:
            if name in checkpoint.slots:
                state[at] = _state(source, checkpoint.slots[name], checkpoint.step)
            at += 1
    model = {name: _tensor(value) for name, value in checkpoint.params.items()}
    turned = {"turned": checkpoint.turned} if checkpoint.turned else {}
    averages = {name: _tensor(value) for name, value in checkpoint.averages.items()}
    optimizer = {"state": state, "param_groups": packed, **({"ema_buffers": averages} if averages else {})}
    whole = {"model": model, "optimizer": optimizer, **turned}
    with path.open("wb") as file:  # given a path, torch hides the cause of an error, such as a full disk
        torch.save(whole, file)


def _state(source: str, slots: dict[str, Any], step: int | None) -> dict[str, Any]:
    """Return the state of one parameter, with its step count in the framework's type."""
    import torch

    count = float(slots["step"]) if "step" in slots else float(step or 0)
    rest = {name: _tensor(value) for name, value in slots.items() if name != "step"}
    if source == "bitsandbytes":
        return {"step": int(count), _QUANTIZED: {"state1": rest["state1"].float()}}
    # float32, which torch uses, cannot represent every count above 2²⁴
    dtype = torch.float64 if count > 2**24 else torch.float32
    return {"step": int(count) if source == "sb3" else torch.tensor(count, dtype=dtype, device="cpu"), **rest}


def _settings(source: str, hyper: dict[str, Any]) -> dict[str, Any]:
    """Return a group's settings under the framework's names. `hyper` has them under ours."""
    if source == "rmsprop":
        return dict(hyper)
    names = ("lr", "momentum", "alpha", "eps", "centered", "weight_decay")
    kept = {name: hyper[name] for name in names}
    if source == "bitsandbytes":
        return {**{name: hyper[name] for name in ("lr", "eps", "weight_decay")}, "betas": (hyper["alpha"], 0)}
    if source == "torch":
        running = {"capturable": False, "foreach": None, "differentiable": False}
        return {**kept, "maximize": bool(hyper.get("maximize", False)), **running}
    if source == "timm":
        mode = hyper["weight_decay_mode"]
        return {
            **kept,
            "decoupled_decay": mode in ("decoupled", "corrected"),
            "corrected_weight_decay": mode == "corrected",
            "max_lr_snapshot": hyper["lr"] if hyper.get("reference_lr") is None else hyper["reference_lr"],
            "lr_in_momentum": hyper["lr_in_buffer"],
            "caution": False,
            "foreach": None,
        }
    return kept


def _tensor(value: Any) -> Any:
    import torch

    array = np.asarray(value)
    if array.dtype.byteorder not in ("=", "|", "<"):
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.array(array, order="C"))
