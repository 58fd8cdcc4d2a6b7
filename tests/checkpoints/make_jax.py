"""Record checkpoints of optax.rmsprop as .npz, as flax's msgpack, and (one) as Orbax writes it, on CPU.

Run it with jax, optax, flax and orbax-checkpoint installed.

    python tests/checkpoints/make_jax.py

Parameters lie as flax has them: {"conv": {"bias" (4,), "kernel" (3, 3, 2, 4) HWIO}, "fc": {"bias" (5,), "kernel"
(6, 5) in, out}}, float32; dictionaries flatten in alphabetic order. The saved tree is {"params", "opt_state"}.
In opt_state of optax.rmsprop: [0] is ScaleByRmsState(nu), or ScaleByRStdDevState(mu, nu) when centered, or with
bias_correction ScaleByRmsWithCountState(count, nu) | ScaleByRStdDevWithCountState(count, mu, nu); [1] is EmptyState()
for a constant rate, ScaleByScheduleState(count) for a schedule; [2] is TraceState(trace), or EmptyState() without
momentum. Counts are int32 scalars, 20 here. The trace is minus the velocity, with the learning rate inside.

optax_rmsprop.state.npz    keys by keystr(path, simple=True, separator="/"): params/conv/bias, params/conv/kernel,
                           params/fc/bias, params/fc/kernel, opt_state/0/nu/conv/bias, ...,
                           opt_state/2/trace/conv/bias, ...; momentum, constant rate. EmptyState leaves no key.
optax_schedule.state.npz   keys by keystr(path) as it is: ['params']['conv']['kernel'], ['opt_state'][0].mu['conv']
                           ['kernel'], ['opt_state'][0].nu..., ['opt_state'][1].count () int32,
                           ['opt_state'][2].trace...; centered, momentum, a schedule.
optax_rmsprop.msgpack      flax.serialization.to_bytes of the tree: nested maps with string keys; a tuple is a map of
                           "0", "1", "2", a named tuple a map of its fields, EmptyState an empty map. An array is
                           msgpack's extension type 1, whose bytes are msgpack of [shape, dtype's name, raw bytes].
                           Centered, momentum, Nesterov, a schedule: "opt_state" {"0": {"mu", "nu"}, "1": {"count"},
                           "2": {"trace"}}.
optax_train_state.msgpack  to_bytes of flax.training.train_state.TrainState: {"step": 20, "params", "opt_state"};
                           bias-corrected, without momentum: "opt_state" {"0": {"count", "nu"}, "1": {}, "2": {}}.
                           "step" is an int of msgpack.
optax_orbax/               StandardCheckpointer's folder of the tree of optax_rmsprop.state.npz: zarr arrays in OCDBT,
                           named opt_state.0.nu.conv.bias, ..., opt_state.2.trace.fc.kernel, params.conv.bias, ....
"""

import shutil
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.serialization
import inputs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from flax.training import train_state

jax.config.update("jax_platforms", "cpu")
COMMAND = "python tests/checkpoints/make_jax.py"
VERSIONS = {"optax": optax.__version__, "jax": jax.__version__}
FLAX = {**VERSIONS, "flax": flax.__version__}
LEAVES = {"weight": "kernel", "bias": "bias"}
Params = dict[str, dict[str, jax.Array]]


def schedule(count: Any) -> float:
    """The learning rate of a step."""
    return inputs.LRS[int(count)]


def to_flax(values: Mapping[str, np.ndarray]) -> Params:
    """Parameters or gradients under flax's names and in its layouts."""
    tree: Params = {"conv": {}, "fc": {}}
    for name, value in values.items():
        layer, leaf = name.split(".")
        tree[layer][LEAVES[leaf]] = jnp.asarray(inputs.to_tensorflow(name, value))
    return tree


def from_flax(tree: Params) -> dict[str, np.ndarray]:
    """The same, back."""
    return {
        f"{layer}.{leaf}": inputs.to_torch(f"{layer}.{leaf}", np.asarray(tree[layer][LEAVES[leaf]]))
        for layer, leaf in (name.split(".") for name in inputs.SHAPES)
    }


def make(
    name: str,
    checkpoint: str,
    words: Mapping[str, Any],
    save: Callable[[Params, Any], None],
    *,
    scheduled: bool,
    versions: Mapping[str, str] = VERSIONS,
    note: str = "",
) -> None:
    """Step, save, go on, record."""
    params = to_flax(inputs.parameters())
    state = optax.rmsprop(schedule if scheduled else inputs.LR, **words).init(params)
    saved = {}
    for at, gradients in enumerate(inputs.gradients()):
        solver = optax.rmsprop(schedule if scheduled else inputs.LRS[at], **words)
        updates, state = solver.update(to_flax(gradients), state, params)
        params = optax.apply_updates(params, updates)
        if at + 1 == inputs.SAVED_AT:
            saved = from_flax(params)
            save(params, state)
    all_words = {"learning_rate": inputs.LR, **words}
    inputs.record(name, checkpoint, "optax", all_words, saved, from_flax(params), versions, COMMAND, note)
    path = inputs.HERE / checkpoint
    print(f"{checkpoint}: {sum(f.stat().st_size for f in [path, *path.rglob('*')] if f.is_file())} bytes")


def save_npz(checkpoint: str, **how: Any) -> Callable[[Params, Any], None]:
    """A save of the flattened tree."""

    def save(params: Params, state: Any) -> None:
        leaves, _ = jax.tree_util.tree_flatten_with_path({"params": params, "opt_state": state})
        np.savez(inputs.HERE / checkpoint, **{jax.tree_util.keystr(path, **how): np.array(x) for path, x in leaves})

    return save


def save_msgpack(params: Params, state: Any) -> None:
    """flax.serialization.to_bytes of a dict."""
    written = flax.serialization.to_bytes({"params": params, "opt_state": state})
    (inputs.HERE / "optax_rmsprop.msgpack").write_bytes(written)


def main() -> None:
    """Write all of them."""
    plain = {"decay": 0.9, "eps": 1e-8, "initial_scale": 0.0, "eps_in_sqrt": True, "centered": False}
    plain |= {"momentum": 0.9, "nesterov": False, "bias_correction": False}
    centered = {**plain, "decay": 0.95, "eps": 1e-4, "centered": True}

    note = "keys by keystr(path, simple=True, separator='/')"
    file = "optax_rmsprop.state.npz"
    make("optax_rmsprop", file, plain, save_npz(file, simple=True, separator="/"), scheduled=False, note=note)
    file = "optax_schedule.state.npz"
    make("optax_schedule", file, centered, save_npz(file), scheduled=True, note="keys by keystr(path)")

    nesterov = {**centered, "nesterov": True}
    note = "flax.serialization.to_bytes({'params', 'opt_state'})"
    file = "optax_rmsprop.msgpack"
    make("optax_msgpack", file, nesterov, save_msgpack, scheduled=True, versions=FLAX, note=note)

    corrected = {**plain, "momentum": None, "eps_in_sqrt": False, "bias_correction": True}

    def save_train_state(params: Params, state: Any) -> None:
        made = train_state.TrainState(
            step=inputs.SAVED_AT, apply_fn=None, params=params, tx=optax.rmsprop(inputs.LR), opt_state=state
        )
        (inputs.HERE / "optax_train_state.msgpack").write_bytes(flax.serialization.to_bytes(made))

    file = "optax_train_state.msgpack"
    note = "flax.serialization.to_bytes(TrainState)"
    make("optax_train_state", file, corrected, save_train_state, scheduled=False, versions=FLAX, note=note)

    def save_orbax(params: Params, state: Any) -> None:
        folder = inputs.HERE / "optax_orbax"
        shutil.rmtree(folder, ignore_errors=True)
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.resolve(), {"params": params, "opt_state": state})
        told = folder / "commit_success.txt"  # it names the folder from the root on
        told.write_text(told.read_text().replace(str(folder.resolve()), folder.name))

    versions = {**VERSIONS, "orbax-checkpoint": orbax.checkpoint.__version__}
    note = "orbax.checkpoint.StandardCheckpointer, a folder"
    make("optax_orbax_standard", "optax_orbax", plain, save_orbax, scheduled=False, versions=versions, note=note)


if __name__ == "__main__":
    main()
