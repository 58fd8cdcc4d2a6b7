"""Record `.pt` checkpoints of torch, timm, stable-baselines3 and bitsandbytes optimizers, on CPU.

Run it with torch, and with timm, stable-baselines3 and bitsandbytes (which needs packaging) installed `--no-deps`: of
timm and stable-baselines3 only the optimizer's own module is loaded.

    python tests/checkpoints/make_torch.py

The model is conv.weight, conv.bias, fc.weight, fc.bias, float32, in this order (and table.weight at the end for
bitsandbytes): parameters 0, 1, 2, 3 (4) of one group. All files are torch.save's zip, and torch.load reads all with
weights_only=True. What is in them:

torch_rmsprop.pt           {"model", "optimizer"}; momentum, weight decay. state[i]: "step" () float32 20.0,
                           "square_avg", "momentum_buffer" float32 of the parameter's shape. Group: "lr", "momentum",
                           "alpha", "eps", "centered", "weight_decay", "capturable", "foreach", "maximize",
                           "differentiable", "params".
torch_rmsprop_centered.pt  {"model", "optimizer"}; centered, momentum: state[i] also has "grad_avg".
torch_rmsprop_bare.pt      optimizer.state_dict() itself: {"state", "param_groups"}; no momentum, no names, no model.
torch_rmsprop_named.pt     {"model", "optimizer"} with the optimizer made from model.named_parameters(): its groups
                           hold "param_names" as well; centered.
torch_adam.pt, torch_adamw.pt
                           {"model", "optimizer"} of Adam and AdamW. state[i]: "step" () float32, "exp_avg",
                           "exp_avg_sq". The dialect of their records is "adam" and "adamw"; final is saved.
timm_rmsproptf.pt          what timm's CheckpointSaver writes: {"epoch", "arch", "optimizer", "version", "state_dict",
                           "saver"}; lr_in_momentum, coupled decay. state[i] has torch's names; the group also has
                           "decoupled_decay", "corrected_weight_decay", "max_lr_snapshot", "lr_in_momentum" and
                           "caution".
timm_rmsproptfc.pt         the same, decoupled and corrected decay, centered, constructed with lr=LR.
sb3_rmsproptflike.pt       what BaseAlgorithm.get_parameters() returns: {"policy", "policy.optimizer"}. "step" in
                           state[i] is the int 20; "square_avg", "momentum_buffer"; the group has "lr", "momentum",
                           "alpha", "eps", "centered", "weight_decay", "params".
bnb_rmsprop32.pt           {"model", "optimizer"}, with the table. state[i]: "step" int 20 and
                           "__bnb_optimizer_quant_state__": {"state1": float32 of the parameter's shape}. Group: "lr",
                           "betas" (alpha, momentum), "eps", "weight_decay", "params".
bnb_rmsprop8.pt            the same; state[4], the table's: "state1" uint8 (80, 64), "qmap1" float32 (256,),
                           "absmax1" float32 (20,), one for 256 elements. The smaller parameters' states are float32.
bnb_rmsprop8.states.npz    what bitsandbytes makes of that state: "square_avg/<parameter>", float32.
"""

import importlib
import sys
import types
from collections.abc import Callable, Mapping
from importlib.metadata import distribution, version
from typing import Any

import inputs
import numpy as np
import torch
from torch import nn

COMMAND = "python tests/checkpoints/make_torch.py"
Make = Callable[..., torch.optim.Optimizer]
Whole = Callable[[nn.Module, torch.optim.Optimizer], Any]


class Net(nn.Module):
    """The small net of inputs.py."""

    def __init__(self, table: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.fc = nn.Linear(6, 5)
        if table:
            self.table = nn.Embedding(80, 64)
        self.load_state_dict({name: torch.from_numpy(value) for name, value in inputs.parameters(table).items()})


def load(package: str, folder: str, module: str) -> types.ModuleType:
    """A module of an installed package, without running that package's __init__, which imports a great deal."""
    parent = types.ModuleType(f"{package}_alone")
    parent.__path__ = [str(distribution(package).locate_file(folder))]
    sys.modules[parent.__name__] = parent
    return importlib.import_module(f"{parent.__name__}.{module}")


def pair(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What most training scripts save."""
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict()}


def bare(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:  # noqa: ARG001
    """The optimizer alone."""
    return optimizer.state_dict()


def timm_whole(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What timm.utils.CheckpointSaver saves without args, scaler and averaged model."""
    return {
        "epoch": 0,
        "arch": type(net).__name__.lower(),
        "optimizer": optimizer.state_dict(),
        "version": 2,
        "state_dict": net.state_dict(),
        "saver": {"checkpoint_files": [], "best_epoch": None, "best_metric": None, "pending": (0, None)},
    }


def sb3_whole(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What stable_baselines3's BaseAlgorithm.get_parameters() returns."""
    return {"policy": net.state_dict(), "policy.optimizer": optimizer.state_dict()}


def arrays(net: nn.Module) -> dict[str, np.ndarray]:
    """The parameters now."""
    return {name: param.detach().numpy().copy() for name, param in net.named_parameters()}


def make(
    name: str,
    dialect: str,
    optimizer: Make,
    words: Mapping[str, Any],
    *,
    whole: Whole = pair,
    package: str = "",
    table: bool = False,
    named: bool = False,
    go_on: bool = True,
    note: str = "",
) -> dict[str, Any]:
    """Step, save, go on, record. Returns: the checkpoint, read back."""
    net = Net(table)
    stepped = optimizer(list(net.named_parameters() if named else net.parameters()), lr=inputs.LR, **words)
    gradients = inputs.gradients(table)

    def step(at: int) -> None:
        for group in stepped.param_groups:
            group["lr"] = inputs.LRS[at]
        for param_name, param in net.named_parameters():
            param.grad = torch.from_numpy(gradients[at][param_name].copy())
        stepped.step()

    for at in range(inputs.SAVED_AT):
        step(at)
    saved = arrays(net)
    path = inputs.HERE / f"{name}.pt"
    torch.save(whole(net, stepped), path)
    reread = torch.load(path, weights_only=True)
    assert isinstance(reread, dict)
    if go_on:
        for at in range(inputs.SAVED_AT, inputs.STEPS):
            step(at)
    versions = {"torch": torch.__version__} | ({package: version(package)} if package else {})
    all_words = {"lr": inputs.LR, **words}
    inputs.record(name, path.name, dialect, all_words, saved, arrays(net), versions, COMMAND, note)
    print(f"{path.name}: {path.stat().st_size} bytes")
    return reread


def make_torch() -> None:
    """torch.optim's RMSprop, Adam and AdamW."""
    words = {"alpha": 0.99, "eps": 1e-8, "weight_decay": 0.01, "momentum": 0.9, "centered": False}
    plain = {**words, "momentum": 0, "weight_decay": 0}
    make("torch_rmsprop", "torch", torch.optim.RMSprop, words)
    make("torch_rmsprop_centered", "torch", torch.optim.RMSprop, {**words, "alpha": 0.9, "centered": True})
    make("torch_rmsprop_bare", "torch", torch.optim.RMSprop, plain, whole=bare, note="optimizer.state_dict() only")
    named = {**plain, "centered": True}
    make("torch_rmsprop_named", "torch", torch.optim.RMSprop, named, named=True, note="groups have param_names")
    adam = {"betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.0}
    note = "20 steps of {}: a start for RMSprop, so final is saved"
    make("torch_adam", "adam", torch.optim.Adam, adam, go_on=False, note=note.format("Adam"))
    decay = {**adam, "weight_decay": 0.01}
    make("torch_adamw", "adamw", torch.optim.AdamW, decay, go_on=False, note=note.format("AdamW"))


def make_timm() -> None:
    """timm.optim.RMSpropTF."""
    optimizer = load("timm", "timm/optim", "rmsprop_tf").RMSpropTF
    words = {"alpha": 0.9, "eps": 0.001, "weight_decay": 1e-5, "momentum": 0.9, "centered": False}
    words |= {"decoupled_decay": False, "corrected_weight_decay": False, "lr_in_momentum": True}
    make("timm_rmsproptf", "timm", optimizer, words, whole=timm_whole, package="timm")
    words |= {"decoupled_decay": True, "corrected_weight_decay": True, "centered": True, "weight_decay": 0.05}
    note = "max_lr_snapshot is the constructor's lr"
    make("timm_rmsproptfc", "timm", optimizer, words, whole=timm_whole, package="timm", note=note)


def make_sb3() -> None:
    """stable_baselines3's RMSpropTFLike."""
    optimizer = load("stable-baselines3", "stable_baselines3/common/sb2_compat", "rmsprop_tf_like").RMSpropTFLike
    words = {"alpha": 0.99, "eps": 1e-5, "weight_decay": 0, "momentum": 0.9, "centered": False}
    make("sb3_rmsproptflike", "sb3", optimizer, words, whole=sb3_whole, package="stable-baselines3")


def make_bitsandbytes() -> None:
    """bitsandbytes' RMSprop with 32-bit and with 8-bit states."""
    from bitsandbytes import functional
    from bitsandbytes.optim import RMSprop, RMSprop8bit

    words = {"alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False}
    make("bnb_rmsprop32", "bitsandbytes", RMSprop, words, package="bitsandbytes", table=True)
    note = "table.weight's state is 8-bit: after the save bitsandbytes goes on rounding it to 8 bits, others do not"
    saved = make("bnb_rmsprop8", "bitsandbytes", RMSprop8bit, words, package="bitsandbytes", table=True, note=note)
    states = {}
    for index, name in enumerate(inputs.shapes(table=True)):
        state = saved["optimizer"]["state"][index]["__bnb_optimizer_quant_state__"]
        full = state["state1"]
        if full.dtype == torch.uint8:
            full = functional.dequantize_blockwise(full, absmax=state["absmax1"], code=state["qmap1"], blocksize=256)
        states[f"square_avg/{name}"] = full.numpy()
    np.savez_compressed(inputs.HERE / "bnb_rmsprop8.states.npz", **states)


if __name__ == "__main__":
    make_torch()
    make_timm()
    make_sb3()
    make_bitsandbytes()
