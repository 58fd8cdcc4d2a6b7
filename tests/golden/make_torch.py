"""Record torch.npz, timm.npz, sb3.npz, bitsandbytes.npz and heavyball.npz from the optimizers themselves, on CPU.

Run it with torch, and with timm, stable-baselines3, bitsandbytes (which needs packaging) and heavyball installed,
`--no-deps` being enough: of the first two only the optimizer's own module is loaded.

    python tests/golden/make_torch.py [torch timm sb3 bitsandbytes heavyball]

Every optimizer is constructed with lr=LRS[0]; each step then sets the group's lr.
"""

import importlib
import itertools
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import distribution, version
from typing import Any

import inputs
import numpy as np
import torch

COMMAND = "python tests/golden/make_torch.py"
DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Exact in float32, so that no framework rounds them; and the numbers that people use.
EXACT = {"alpha": 0.875, "eps": 2.0**-20, "momentum": 0.75, "weight_decay": 0.0625}
USUAL = {
    "torch": {"alpha": 0.99, "eps": 1e-8, "momentum": 0.9, "weight_decay": 0.01},
    "timm": {"alpha": 0.9, "eps": 1e-10, "momentum": 0.9, "weight_decay": 0.01},
}
NUMBERS = (("float32", False), ("float32", True), ("float64", False))


def load(package: str, folder: str, module: str) -> types.ModuleType:
    """A module of an installed package, without running that package's __init__, which imports a great deal."""
    parent = types.ModuleType(f"{package}_alone")
    parent.__path__ = [str(distribution(package).locate_file(folder))]
    sys.modules[parent.__name__] = parent
    return importlib.import_module(f"{parent.__name__}.{module}")


def run(
    make: Callable[..., torch.optim.Optimizer],
    dtype: str,
    words: Mapping[str, Any],
    lrs: tuple[float, ...] = inputs.LRS,
) -> list[dict[str, np.ndarray]]:
    """Step an optimizer 25 times. Returns: the parameters after each step."""
    params = {
        name: torch.nn.Parameter(torch.tensor(value, dtype=DTYPES[dtype]))
        for name, value in inputs.parameters().items()
    }
    optimizer = make(list(params.values()), lr=lrs[0], **words)
    after = []
    for lr, gradients in zip(lrs, inputs.gradients(), strict=True):
        optimizer.param_groups[0]["lr"] = lr
        for name, param in params.items():
            param.grad = torch.tensor(gradients[name], dtype=DTYPES[dtype])
        optimizer.step()
        after.append({name: param.detach().numpy().copy() for name, param in params.items()})
    return after


def grid(usual: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Centered or not, with momentum or without, with weight decay or without, in each dtype."""
    for (dtype, real), centered, mu, wd in itertools.product(NUMBERS, (False, True), (0, 1), (0, 1)):
        numbers = USUAL[usual] if real else EXACT
        yield (
            dtype,
            {
                "alpha": numbers["alpha"],
                "eps": numbers["eps"],
                "weight_decay": wd * numbers["weight_decay"],
                "momentum": mu * numbers["momentum"],
                "centered": centered,
            },
        )


def make_torch() -> None:
    """torch.optim.RMSprop."""
    out = inputs.Recording("torch", {"torch": torch.__version__}, COMMAND)
    for dtype, words in grid("torch"):
        out.add("torch", dtype, words, run(torch.optim.RMSprop, dtype, words), lr_word="lr")
    for dtype, centered, mu, wd in itertools.product(DTYPES, (False, True), (0, 1), (0, 1)):
        words = {**EXACT, "momentum": mu * EXACT["momentum"], "weight_decay": wd * EXACT["weight_decay"]}
        words |= {"centered": centered, "maximize": True}
        note = "maximize turns the gradient round before weight decay is added: decay still shrinks" if wd else ""
        out.add("torch", dtype, words, run(torch.optim.RMSprop, dtype, words), lr_word="lr", note=note)
    words = {**EXACT, "alpha": 0.25, "momentum": 0.0, "weight_decay": 0.0, "centered": True}
    for dtype in DTYPES:
        note = "alpha below one half, where torch's lerp takes its other formula"
        out.add("torch", dtype, words, run(torch.optim.RMSprop, dtype, words), lr_word="lr", note=note)
    out.write()


def make_timm() -> None:
    """timm.optim.RMSpropTF."""
    optimizer = load("timm", "timm/optim", "rmsprop_tf").RMSpropTF
    out = inputs.Recording("timm", {"timm": version("timm"), "torch": torch.__version__}, COMMAND)

    def record(dtype: str, words: dict[str, Any], note: str = "", **more: Any) -> None:
        ran = run(optimizer, dtype, words, more.get("lrs", inputs.LRS))
        out.add("timm", dtype, words, ran, lr_word="lr", note=note, **more)

    for dtype, words in grid("timm"):
        for inside in (True, False) if words["momentum"] else (True,):
            record(dtype, {**words, "lr_in_momentum": inside})
    # The correction's max_lr is the constructor's lr, whichever rates follow: LRS[0], below the rates of LRS, or the
    # peak, where the rates fall from it.
    falling = tuple(inputs.BASE_LR * factor for factor in (1.0,) * 9 + (0.5,) * 8 + (0.25,) * 8)
    for dtype, corrected, mu, centered in itertools.product(DTYPES, (False, True), (0, 1), (False, True)):
        words = {**EXACT, "momentum": mu * EXACT["momentum"], "centered": centered}
        words |= {"decoupled_decay": True, "corrected_weight_decay": corrected, "lr_in_momentum": True}
        if corrected:
            note = "constructed with lr=lrs[0], which is its max_lr for good; later rates exceed it"
            record(dtype, words, note)
            record(dtype, words, "constructed with lr=lrs[0], its max_lr; the rates fall from it", lrs=falling)
        else:
            record(dtype, words)
    words = {**EXACT, "centered": False, "decoupled_decay": False, "corrected_weight_decay": True}
    record("float64", words, "corrected_weight_decay does nothing without decoupled_decay: the decay is coupled")
    out.write()


def make_sb3() -> None:
    """stable_baselines3.common.sb2_compat.rmsprop_tf_like.RMSpropTFLike."""
    optimizer = load("stable-baselines3", "stable_baselines3/common/sb2_compat", "rmsprop_tf_like").RMSpropTFLike
    versions = {"stable-baselines3": version("stable-baselines3"), "torch": torch.__version__}
    out = inputs.Recording("sb3", versions, COMMAND)
    for dtype, words in grid("torch"):
        out.add("sb3", dtype, words, run(optimizer, dtype, words), lr_word="lr")
    out.write()


def make_bitsandbytes() -> None:
    """bitsandbytes.optim.RMSprop with 32-bit states, as its CPU kernels compute it: in float32 only."""
    from bitsandbytes.optim import RMSprop

    versions = {"bitsandbytes": version("bitsandbytes"), "torch": torch.__version__}
    out = inputs.Recording("bitsandbytes", versions, COMMAND)
    for numbers, wd, mu in itertools.product((EXACT, USUAL["torch"]), (0, 1), (0, 1)):
        words = {
            "alpha": numbers["alpha"],
            "eps": numbers["eps"],
            "weight_decay": wd * numbers["weight_decay"],
            "momentum": mu * numbers["momentum"],
            "centered": False,
            "optim_bits": 32,
        }
        note = "bitsandbytes takes momentum and ignores it: the run is bit for bit that of momentum 0" if mu else ""
        ran = run(RMSprop, "float32", words)
        if mu:
            plain = run(RMSprop, "float32", {**words, "momentum": 0})
            assert all((a[name] == b[name]).all() for a, b in zip(ran, plain, strict=True) for name in a)
        out.add("bitsandbytes", "float32", words, ran, lr_word="lr", note=note)
    out.write()


def make_heavyball() -> None:
    """heavyball.RMSprop, without torch.compile: the average's weight is 1 - (1 - beta2) / (1 - beta2 ** t)."""
    import heavyball

    warnings.filterwarnings("ignore", message="Learning rate changed")
    heavyball.utils.compile_mode = None
    out = inputs.Recording("heavyball", {"heavyball": version("heavyball"), "torch": torch.__version__}, COMMAND)
    rounded = (
        "storage_dtype is float64; beta2 ** step is computed in float32 also for float64 parameters: step is an "
        "integer tensor there"
    )
    for beta2, eps, wd in itertools.product((0.875, 0.99), (2.0**-20, 1e-6, 0.125), (0, 0.0625)):
        words = {"betas": [0.9, beta2], "eps": eps, "weight_decay": wd}
        note = "decay is decoupled: w * (1 - lr * weight_decay)" if wd else ""
        floor = "eps is a floor under the root, above some of the roots here" if eps == 0.125 else ""
        said = "; ".join(part for part in ("betas[0] is not read", note, floor) if part)
        out.add("heavyball", "float32", words, run(heavyball.RMSprop, "float32", words), lr_word="lr", note=said)
        if beta2 == 0.875:
            ran = run(heavyball.RMSprop, "float64", {**words, "storage_dtype": "float64"})
            out.add("heavyball", "float64", words, ran, lr_word="lr", note=f"{said}; {rounded}", rtol=1e-8)
    out.write()


if __name__ == "__main__":
    for chosen in sys.argv[1:] or ("torch", "timm", "sb3", "bitsandbytes", "heavyball"):
        globals()[f"make_{chosen}"]()
