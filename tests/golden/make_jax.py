"""Record optax.npz (optax.rmsprop) and jax.npz (jax.example_libraries.optimizers), eagerly, on CPU.

    python tests/golden/make_jax.py [optax jax]

The learning rate is a schedule: a function of the step's number, 0 at the first step.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import inputs
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.example_libraries import optimizers

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")
COMMAND = "python tests/golden/make_jax.py"
DTYPES = ("float32", "float64")
EXACT = {"decay": 0.875, "eps": 2.0**-20, "momentum": 0.75}
USUAL = {"decay": 0.9, "eps": 1e-8, "momentum": 0.9}


def schedule(count: Any) -> float:
    """The learning rate of a step."""
    return inputs.LRS[int(count)]


def arrays(values: dict[str, np.ndarray], dtype: str) -> dict[str, jax.Array]:
    """Parameters or gradients as JAX's arrays."""
    return {name: jnp.asarray(value, dtype=dtype) for name, value in values.items()}


def run_optax(dtype: str, words: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """Step optax.rmsprop 25 times. Returns: the parameters after each step."""
    solver = optax.rmsprop(schedule, **words)
    params = arrays(inputs.parameters(), dtype)
    state = solver.init(params)
    after = []
    for gradients in inputs.gradients():
        updates, state = solver.update(arrays(gradients, dtype), state, params)
        params = optax.apply_updates(params, updates)
        assert all(param.dtype == dtype for param in params.values())
        after.append({name: np.array(param) for name, param in params.items()})
    return after


def run_jax(make: Callable[..., Any], dtype: str, words: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """Step one of JAX's example optimizers 25 times. Returns: the parameters after each step."""
    init, update, get_params = make(schedule, **words)
    state = init(arrays(inputs.parameters(), dtype))
    after = []
    for step, gradients in enumerate(inputs.gradients()):
        state = update(step, arrays(gradients, dtype), state)
        params = get_params(state)
        assert all(param.dtype == dtype for param in params.values())
        after.append({name: np.array(param) for name, param in params.items()})
    return after


def optax_cases() -> Iterator[tuple[str, dict[str, Any], str]]:
    """The dtype, the settings and the note of every run of optax."""
    default = {"initial_scale": 0.0, "eps_in_sqrt": True, "centered": False, "momentum": None, "nesterov": False}
    default |= {"bias_correction": False}
    zero = "momentum=0.0, not None, keeps a trace"
    for dtype, numbers in (("float32", EXACT), ("float32", USUAL), ("float64", EXACT)):
        base = {**default, "decay": numbers["decay"], "eps": numbers["eps"]}
        mu = numbers["momentum"]
        for inside, centered in itertools.product((True, False), (False, True)):
            plain = {**base, "eps_in_sqrt": inside, "centered": centered}
            yield dtype, plain, ""
            yield dtype, {**plain, "momentum": mu}, ""
            yield dtype, {**plain, "momentum": mu, "nesterov": True}, ""
        yield dtype, {**base, "momentum": 0.0}, zero
        yield dtype, {**base, "nesterov": True}, "nesterov without momentum does nothing"
        for inside, momentum in itertools.product((True, False), (None, mu)):
            yield dtype, {**base, "eps_in_sqrt": inside, "momentum": momentum, "initial_scale": 1.0}, ""
            yield dtype, {**base, "eps_in_sqrt": inside, "momentum": momentum, "bias_correction": True}, ""
        yield dtype, {**base, "centered": True, "momentum": mu, "initial_scale": 1.0}, ""
        if dtype == "float64":  # in float32 little is left of v - m**2 at the first step
            both = "both moments corrected; with initial_scale=0.0 the variance of the first step would be 0"
            yield dtype, {**base, "centered": True, "initial_scale": 1.0, "bias_correction": True}, both


def make_optax() -> None:
    """optax.rmsprop."""
    out = inputs.Recording("optax", {"optax": optax.__version__, "jax": jax.__version__}, COMMAND)
    for dtype, words, note in optax_cases():
        out.add("optax", dtype, words, run_optax(dtype, words), lr_word="learning_rate", note=note)
    out.write()


def make_jax() -> None:
    """jax.example_libraries.optimizers.rmsprop, and rmsprop_momentum: where momentum is among the settings."""
    out = inputs.Recording("jax", {"jax": jax.__version__}, COMMAND)
    for dtype, numbers in (("float32", EXACT), ("float32", USUAL), ("float64", EXACT)):
        words = {"gamma": numbers["decay"], "eps": numbers["eps"]}
        ran = run_jax(optimizers.rmsprop, dtype, words)
        out.add("jax", dtype, words, ran, lr_word="step_size", note="the function is rmsprop")
        for mu in (0.0, numbers["momentum"]):
            with_momentum = {**words, "momentum": mu}
            ran = run_jax(optimizers.rmsprop_momentum, dtype, with_momentum)
            out.add("jax", dtype, with_momentum, ran, lr_word="step_size", note="the function is rmsprop_momentum")
    out.write()


if __name__ == "__main__":
    for chosen in sys.argv[1:] or ("optax", "jax"):
        globals()[f"make_{chosen}"]()
