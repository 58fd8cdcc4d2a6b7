"""Record chainer.npz (chainer.optimizers.RMSprop) and chainer_graves.npz (RMSpropGraves) from Chainer on CPU.

    python tests/golden/make_chainer.py

Weight decay and clipping are hooks in Chainer, called in the order in which they were added. Here they are settings:
`weight_decay` is WeightDecay(rate), `clip_global_norm` GradientClipping(threshold), which takes one L2 norm over all
parameters, `clip_value` GradientHardClipping(-value, value); `clip_after_decay` says that the clipping hook was added
after WeightDecay.
"""

import itertools
import warnings
from typing import Any

import inputs
import numpy as np

warnings.filterwarnings("ignore")
import chainer  # noqa: E402
from chainer import optimizer_hooks, optimizers  # noqa: E402

COMMAND = "python tests/golden/make_chainer.py"
HOOKS = ("weight_decay", "clip_global_norm", "clip_value", "clip_after_decay")
EXACT = {"alpha": 0.875, "eps": 2.0**-20, "momentum": 0.75}
USUAL = {
    "chainer": {"alpha": 0.99, "eps": 1e-8},
    "chainer_graves": {"alpha": 0.95, "eps": 1e-4, "momentum": 0.9},
}
WD = 0.0625


def hooks(words: dict[str, Any]) -> list[Any]:
    """The hooks that the settings stand for, in order."""
    decay = [optimizer_hooks.WeightDecay(words["weight_decay"])] if "weight_decay" in words else []
    clip: list[Any] = []
    if "clip_global_norm" in words:
        clip.append(optimizer_hooks.GradientClipping(words["clip_global_norm"]))
    if "clip_value" in words:
        clip.append(optimizer_hooks.GradientHardClipping(-words["clip_value"], words["clip_value"]))
    return decay + clip if words.get("clip_after_decay") else clip + decay


def run(dialect: str, dtype: str, words: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """Step 25 times. Returns: the parameters after each step."""
    make = {"chainer": optimizers.RMSprop, "chainer_graves": optimizers.RMSpropGraves}[dialect]
    link = chainer.Link()
    with link.init_scope():
        for name, value in inputs.parameters().items():
            setattr(link, name, chainer.Parameter(value.astype(dtype)))
    optimizer = make(lr=inputs.LRS[0], **{name: value for name, value in words.items() if name not in HOOKS})
    optimizer.setup(link)
    for hook in hooks(words):
        optimizer.add_hook(hook)
    after = []
    for lr, gradients in zip(inputs.LRS, inputs.gradients()):  # noqa: B905 - strict
        optimizer.lr = lr
        for name in inputs.SHAPES:
            getattr(link, name).grad = gradients[name].astype(dtype)
        optimizer.update()
        after.append({name: getattr(link, name).array.copy() for name in inputs.SHAPES})
    assert after[0]["w"].dtype == dtype
    return after


def record(out: inputs.Recording, dialect: str, dtype: str, words: dict[str, Any]) -> None:
    """Record a setting alone, with weight decay, and with either clipping before and after it."""

    def add(note: str, **hooked: Any) -> None:
        full = {**words, **hooked}
        out.add(dialect, dtype, full, run(dialect, dtype, full), lr_word="lr", note=note)

    add("")
    add("WeightDecay(rate) is hooked", weight_decay=WD)
    for clip, hook in (
        ({"clip_global_norm": 8.0}, "GradientClipping(8), over the global norm,"),
        ({"clip_value": 0.25}, "GradientHardClipping(-0.25, 0.25)"),
    ):
        add(f"{hook} is hooked", **clip)
        add(f"{hook} is hooked before WeightDecay", weight_decay=WD, clip_after_decay=False, **clip)
        add(f"{hook} is hooked after WeightDecay", weight_decay=WD, clip_after_decay=True, **clip)


def main() -> None:
    """Write both files."""
    versions = {"chainer": chainer.__version__, "numpy": np.__version__}
    out = inputs.Recording("chainer", versions, COMMAND)
    for (dtype, real), inside in itertools.product(
        (("float32", False), ("float32", True), ("float64", False)), (False, True)
    ):
        numbers = USUAL["chainer"] if real else EXACT
        words = {"alpha": numbers["alpha"], "eps": numbers["eps"], "eps_inside_sqrt": inside}
        record(out, "chainer", dtype, words)
    out.write()

    out = inputs.Recording("chainer_graves", versions, COMMAND)
    for dtype, real in (("float32", False), ("float32", True), ("float64", False)):
        numbers = USUAL["chainer_graves"] if real else EXACT
        record(out, "chainer_graves", dtype, dict(numbers))
        words = {**numbers, "momentum": 0.0}
        ran = run("chainer_graves", dtype, words)
        out.add("chainer_graves", dtype, words, ran, lr_word="lr")
    out.write()


if __name__ == "__main__":
    main()
