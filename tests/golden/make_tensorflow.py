"""Record what TensorFlow 1, Keras and Sonnet compute: dense runs of every rule, and sparse runs of an embedding.

    pip install tensorflow-cpu==2.21.0 tf_keras==2.21.0 keras==3.15.1 dm-sonnet==2.0.2
    python tests/golden/make_tensorflow.py

It writes, beside itself:

* tensorflow1.npz: tf.compat.v1.train.RMSPropOptimizer in a graph and a session, on reference variables.
* keras2.npz: tf_keras.optimizers.legacy.RMSprop, which is the tf.keras.optimizers.RMSprop of TensorFlow 2.0 to 2.10.
* keras3.npz: keras.optimizers.RMSprop on the TensorFlow backend, and tf_keras.optimizers.RMSprop, which is that of
  tf.keras 2.11 to 2.15; each run's note says which.
* sonnet2.npz: sonnet.optimizers.RMSProp.
* sparse.npz: the same five optimizers on a table with sparse gradients.

sparse.npz has a format of its own. `start` (6, 3) is the table before the first step. A sequence of sparse gradients
("distinct": no row twice in a step; "repeated": some rows twice or three times) has, for step t of 10,
`<sequence>/<t>/indices` (n,) and `<sequence>/<t>/values` (n, 3): row indices[i] gets values[i]. A run has
`<key>/w` (10, 6, 3), the table after each step. `description` is JSON: "provenance", "shape", "lrs" (one learning
rate a step), and "cases", each with "key", "dialect", "dtype", "words", "lr_word", "sequence", "note", and "rows":

* "lazy": rows that a step does not touch keep their values and all their state; repeated rows are summed first.
* "decayed": every row's averages decay at every step, and only touched rows move; repeated rows are summed first.
* "dense": as if the gradient were a dense one, with 0 in the rows that it does not touch; repeated rows are summed.
* "dense, squares summed": as "dense", but v's update takes the sum of the squares of repeated rows, not the square of
  their sum.

Every run is compared, before it is written, with the rule in NumPy's float64 (`expected`). TensorFlow 1 and Sonnet
round their settings to float32 even where the parameters are float64, legacy Keras all but epsilon, and the newer
ones the learning rate alone: the float64 runs have settings that float32 holds exactly, or that are not rounded.
"""

import itertools
import json
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["KERAS_BACKEND"] = "tensorflow"

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import inputs
import keras
import numpy as np
import sonnet
import tensorflow as tf
import tf_keras

PACKAGES = ("tensorflow-cpu", "tf_keras", "keras", "dm-sonnet", "numpy")
VERSIONS = {name: importlib.metadata.version(name) for name in PACKAGES}
COMMAND = "python tests/golden/make_tensorflow.py"
KERAS3 = f"keras {VERSIONS['keras']}, TensorFlow backend"
TF_KERAS = f"tf_keras {VERSIONS['tf_keras']} (tf.keras 2.11 to 2.15)"

Arrays = dict[str, np.ndarray]
Rows = tuple[np.ndarray, np.ndarray]  # of a sparse gradient: indices, values
Gradients = Mapping[str, np.ndarray | Rows]
Runner = Callable[[str, Mapping[str, Any], Arrays, Sequence[Gradients], Sequence[float]], list[Arrays]]


def tensor(gradient: np.ndarray | Rows, dtype: str) -> Any:
    """A gradient as TensorFlow takes it."""
    if isinstance(gradient, tuple):
        return tf.IndexedSlices(tf.constant(gradient[1], dtype), tf.constant(gradient[0]), tf.constant([6, 3]))
    return tf.constant(gradient, dtype)


def tensorflow1(
    dtype: str, words: Mapping[str, Any], start: Arrays, steps: Sequence[Gradients], lrs: Sequence[float]
) -> list[Arrays]:
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        variables = {
            name: v1.get_variable(name, initializer=value.astype(dtype), use_resource=False)
            for name, value in start.items()
        }
        lr = v1.placeholder(dtype, ())
        fed = {}
        pairs = []
        for name, variable in variables.items():
            if isinstance(steps[0][name], tuple):
                fed[name] = v1.placeholder(tf.int64, (None,)), v1.placeholder(dtype, (None, 3))
                pairs.append((tf.IndexedSlices(fed[name][1], fed[name][0], tf.constant([6, 3])), variable))
            else:
                fed[name] = v1.placeholder(dtype, start[name].shape)
                pairs.append((fed[name], variable))
        update = v1.train.RMSPropOptimizer(lr, **words).apply_gradients(pairs)
        session.run(v1.global_variables_initializer())
        made = []
        for step, rate in zip(steps, lrs, strict=True):
            session.run(update, {lr: rate} | {fed[name]: step[name] for name in fed})
            made.append(session.run(variables))
    return made


def legacy(
    dtype: str, words: Mapping[str, Any], start: Arrays, steps: Sequence[Gradients], lrs: Sequence[float]
) -> list[Arrays]:
    return eager(tf_keras.optimizers.legacy.RMSprop(**words), tf.Variable, dtype, start, steps, lrs)


def newer(
    dtype: str, words: Mapping[str, Any], start: Arrays, steps: Sequence[Gradients], lrs: Sequence[float]
) -> list[Arrays]:
    return eager(tf_keras.optimizers.RMSprop(**words), tf.Variable, dtype, start, steps, lrs)


def keras3(
    dtype: str, words: Mapping[str, Any], start: Arrays, steps: Sequence[Gradients], lrs: Sequence[float]
) -> list[Arrays]:
    return eager(keras.optimizers.RMSprop(**words), keras.Variable, dtype, start, steps, lrs)


def eager(
    optimizer: Any,
    variable: Callable[..., Any],
    dtype: str,
    start: Arrays,
    steps: Sequence[Gradients],
    lrs: Sequence[float],
) -> list[Arrays]:
    """A run of any of the Keras optimizers."""
    variables = {name: variable(value, dtype=dtype, name=name) for name, value in start.items()}
    made = []
    for step, rate in zip(steps, lrs, strict=True):
        optimizer.learning_rate = rate
        optimizer.apply_gradients([(tensor(step[name], dtype), variables[name]) for name in variables])
        made.append({name: value.numpy().copy() for name, value in variables.items()})
    return made


def sonnet2(
    dtype: str, words: Mapping[str, Any], start: Arrays, steps: Sequence[Gradients], lrs: Sequence[float]
) -> list[Arrays]:
    variables = {name: tf.Variable(value, dtype=dtype, name=name) for name, value in start.items()}
    lr = tf.Variable(0.0)
    optimizer = sonnet.optimizers.RMSProp(lr, **words)
    made = []
    for step, rate in zip(steps, lrs, strict=True):
        lr.assign(rate)
        optimizer.apply([tensor(step[name], dtype) for name in variables], list(variables.values()))
        made.append({name: value.numpy().copy() for name, value in variables.items()})
    return made


def clipped(
    gradients: Arrays,
    clipvalue: float | None = None,
    clipnorm: float | None = None,
    global_clipnorm: float | None = None,
) -> Arrays:
    """The gradients, clipped in the order that legacy Keras clips in, where more than one is given."""
    made = dict(gradients)
    if clipvalue is not None:
        made = {name: np.clip(g, -clipvalue, clipvalue) for name, g in made.items()}
    if clipnorm is not None:
        made = {name: g * clipnorm / max(clipnorm, np.sqrt((g * g).sum())) for name, g in made.items()}
    if global_clipnorm is not None:
        norm = np.sqrt(sum((g * g).sum() for g in made.values()))
        made = {name: g * global_clipnorm / max(global_clipnorm, norm) for name, g in made.items()}
    return made


def expected(
    start: Arrays,
    steps: Sequence[Gradients],
    lrs: Sequence[float],
    *,
    rho: float,
    eps: float,
    inside: bool,
    v: float,
    momentum: float = 0.0,
    centered: bool = False,
    weight_decay: float = 0.0,
    rows: str = "dense",
    **clip: float,
) -> list[Arrays]:
    """The rule in float64. Args: eps: inside the root or outside; v: what the second moment starts at."""
    p = {name: value.copy() for name, value in start.items()}
    second = {name: np.full_like(value, v) for name, value in start.items()}
    first, velocity = ({name: np.zeros_like(value) for name, value in start.items()} for _ in range(2))
    made = []
    for step, lr in zip(steps, lrs, strict=True):
        touched, dense, square = {}, {}, {}
        for name, g in step.items():
            if isinstance(g, tuple):
                touched[name] = np.isin(np.arange(len(p[name])), g[0])[:, None]
                dense[name], square[name] = np.zeros_like(p[name]), np.zeros_like(p[name])
                np.add.at(dense[name], g[0], g[1])
                np.add.at(square[name], g[0], g[1] ** 2)
            else:
                touched[name], dense[name] = np.True_, g
        dense = clipped(dense, **clip)
        for name, g in dense.items():
            g2 = square[name] if rows == "dense, squares summed" else g * g
            averaged = touched[name] if rows == "lazy" else np.True_
            moved = touched[name] if rows in ("lazy", "decayed") else np.True_
            p[name] = p[name] - p[name] * weight_decay * lr
            second[name] = np.where(averaged, rho * second[name] + (1 - rho) * g2, second[name])
            first[name] = np.where(averaged, rho * first[name] + (1 - rho) * g, first[name])
            variance = second[name] - first[name] ** 2 if centered else second[name]
            root = np.sqrt(variance + eps) if inside else np.sqrt(variance) + eps
            velocity[name] = np.where(moved, momentum * velocity[name] + lr * g / root, velocity[name])
            p[name] = np.where(moved, p[name] - velocity[name], p[name])
        made.append(dict(p))
    return made


def rule(dialect: str, words: Mapping[str, Any]) -> dict[str, Any]:
    """A framework's words as arguments of `expected`."""
    said = dict(words)
    given = {
        "rho": said.pop("rho", said.pop("decay", 0.9)),
        "eps": said.pop("epsilon", 1e-7 if dialect.startswith("keras") else 1e-10),
        "inside": True,
        "v": 1.0 if dialect == "tensorflow1" else 0.0,
    } | said
    if dialect == "keras2":
        given["inside"] = said.get("momentum", 0.0) > 0
        given["eps"] = given["eps"] or 1e-7
    return given


def check(dtype: str, what: str, start: Arrays, made: Sequence[Arrays], wanted: Sequence[Arrays]) -> None:
    """Compare a run with the rule, and say how far it is from it."""
    far = {}
    for name, value in start.items():
        got = np.stack([step[name] for step in made]).astype(np.float64)
        want = np.stack([step[name] for step in wanted])
        off = np.abs(got - want) / np.maximum(np.abs(want), np.abs(value))
        far[name] = float(off.max()), [int(i) for i in np.unravel_index(off.argmax(), off.shape)]
    worst = max(far, key=lambda name: far[name][0])
    size, at = far[worst]
    print(f"{size:8.1e} {dtype} {what} {worst}[step {at[0]}, element {at[1:]}]{' <-' if size > 5e-6 else ''}")
    assert size <= (1e-12 if dtype == "float64" else 1e-5), what


def record(
    recording: inputs.Recording,
    runner: Runner,
    dialect: str,
    dtype: str,
    words: Mapping[str, Any],
    lr_word: str,
    note: str = "",
) -> None:
    """Run one case, compare it with the rule, and add it."""
    start, steps = inputs.parameters(), inputs.gradients()
    made = runner(dtype, words, start, steps, inputs.LRS)
    wanted = expected(start, steps, inputs.LRS, **rule(dialect, words))
    check(dtype, f"{dialect} {words} {note}", start, made, wanted)
    recording.add(dialect, dtype, words, made, lr_word=lr_word, note=note)


def switches(momentum: float) -> list[dict[str, Any]]:
    """Every choice of momentum and centering: the words that are not the default."""
    return [
        ({"momentum": mu} if mu else {}) | ({"centered": True} if centered else {})
        for mu, centered in itertools.product((0.0, momentum), (False, True))
    ]


def make_tensorflow1() -> None:
    recording = inputs.Recording("tensorflow1", VERSIONS, COMMAND)
    record_without_clipping(recording, tensorflow1, "tensorflow1")
    recording.write()


def make_sonnet2() -> None:
    recording = inputs.Recording("sonnet2", VERSIONS, COMMAND)
    record_without_clipping(recording, sonnet2, "sonnet2")
    recording.write()


def record_without_clipping(recording: inputs.Recording, runner: Runner, dialect: str) -> None:
    """The runs of TensorFlow 1 and of Sonnet, whose words are the same."""
    record(recording, runner, dialect, "float32", {}, "learning_rate", "its defaults")
    for epsilon in (1e-10, 2.0**-10, 1.0):
        for more in switches(0.9):
            record(recording, runner, dialect, "float32", {"decay": 0.9, "epsilon": epsilon} | more, "learning_rate")
    for epsilon in (2.0**-30, 2.0**-10):
        for more in switches(0.75):
            words = {"decay": 0.875, "epsilon": epsilon} | more
            record(recording, runner, dialect, "float64", words, "learning_rate")


# Of 25 steps, 13 have a "w" and 15 a "b" with a norm above 800, 12 a global norm above 1400, and nine elements are
# above 1 at some: the first three clip at some steps, the other two at all, and hard.
CLIPS: tuple[dict[str, float], ...] = (
    {"clipnorm": 800.0},
    {"clipvalue": 1.0},
    {"global_clipnorm": 1400.0},
    {"clipnorm": 0.125},
    {"global_clipnorm": 0.125},
)


def make_keras2() -> None:
    recording = inputs.Recording("keras2", VERSIONS, COMMAND)

    def add(dtype: str, words: Mapping[str, Any], note: str = "") -> None:
        record(recording, legacy, "keras2", dtype, words, "learning_rate", note)

    add("float32", {}, "its defaults")
    for epsilon in (1e-7, 2.0**-10):
        for more in switches(0.9):
            add("float32", {"rho": 0.9, "epsilon": epsilon} | more)
    for more in switches(0.9):
        add("float32", {"rho": 0.9, "epsilon": 0.0} | more, "epsilon=0 becomes 1e-7")
    for epsilon in (2.0**-20, 2.0**-10):
        for more in switches(0.75):
            add("float64", {"rho": 0.875, "epsilon": epsilon} | more)
    add("float64", {"rho": 0.875, "epsilon": 0.0, "momentum": 0.75}, "epsilon=0 becomes 1e-7")
    both = {"clipvalue": 1.0, "clipnorm": 2.25}, {"clipvalue": 1.0, "global_clipnorm": 2.75}
    for clip in CLIPS + both:
        note = "clips by value, then by norm" if len(clip) > 1 else ""
        for more in ({}, {"momentum": 0.9, "centered": True}):
            add("float32", {"rho": 0.9, "epsilon": 1e-7} | clip | more, note)
        for more in ({}, {"momentum": 0.75}):
            add("float64", {"rho": 0.875, "epsilon": 2.0**-20} | clip | more, note)
    recording.write()


def make_keras3() -> None:
    recording = inputs.Recording("keras3", VERSIONS, COMMAND)
    decayed = {"weight_decay": 0.0625}
    for runner, note, clips in ((keras3, KERAS3, CLIPS), (newer, TF_KERAS, CLIPS[:3])):
        cases: list[tuple[str, dict[str, Any]]] = [("float32", {})]
        for epsilon in (1e-7, 2.0**-10):
            cases += [("float32", {"rho": 0.9, "epsilon": epsilon} | more) for more in switches(0.9)]
        for rho, epsilon, momentum in ((0.875, 2.0**-20, 0.75), (0.9, 1e-7, 0.9)):
            cases += [("float64", {"rho": rho, "epsilon": epsilon} | more) for more in switches(momentum)]
        usual, exact = {"rho": 0.9, "epsilon": 1e-7}, {"rho": 0.875, "epsilon": 2.0**-20}
        cases += [("float32", usual | decayed | more) for more in ({}, {"momentum": 0.9, "centered": True})]
        cases += [("float64", exact | decayed | more) for more in ({}, {"momentum": 0.75})]
        for clip in clips:
            cases += [
                ("float32", usual | clip | more) for more in ({}, decayed | {"momentum": 0.9, "centered": True})
            ]
            cases += [("float64", exact | clip | more) for more in ({"momentum": 0.75}, decayed)]
        for dtype, words in cases:
            words_note = note if words else f"its defaults; {note}"
            record(recording, runner, "keras3", dtype, words, "learning_rate", words_note)
    recording.write()


def make_sparse() -> None:
    shape, lrs = (6, 3), [2.0**-6 * factor for factor in (0.5, 1, 1, 0.5, 2, 1, 0.25, 1, 0.5, 1)]
    draw = np.random.default_rng(11)
    start = draw.uniform(1.0, 2.0, shape) * draw.choice((-1.0, 1.0), shape)
    start = start.astype(np.float32).astype(np.float64)
    touched = {  # row 5 never, row 0 always, row 4 only at the first step
        "distinct": [(0, 4), (2, 0, 1), (0,), (3, 0), (0, 1, 2), (0, 3), (1, 0), (0,), (0, 2, 3, 1), (0, 1)],
        "repeated": [
            (0, 4, 0),
            (2, 0, 2, 1),
            (0, 0, 0),
            (3, 0),
            (0, 1, 1, 2),
            (3, 0, 3),
            (1, 0),
            (0,),
            (0, 2, 0),
            (1, 1),
        ],
    }
    arrays = {"start": start}
    sequences: dict[str, list[Rows]] = {}
    for sequence, indices in touched.items():
        sequences[sequence] = []
        for step, rows in enumerate(indices):
            values = (draw.standard_normal((len(rows), 3)) * 10.0 ** draw.uniform(-2, 1, (1, 3))).astype(np.float32)
            sequences[sequence].append((np.array(rows, np.int64), values.astype(np.float64)))
            arrays[f"{sequence}/{step}/indices"], arrays[f"{sequence}/{step}/values"] = sequences[sequence][-1]
    cases = []
    for dtype, sequence, (runner, dialect, note) in itertools.product(
        ("float32", "float64"),
        touched,
        (
            (tensorflow1, "tensorflow1", ""),
            (legacy, "keras2", ""),
            (keras3, "keras3", KERAS3),
            (newer, "keras3", TF_KERAS),
            (sonnet2, "sonnet2", ""),
        ),
    ):
        for more in switches(0.9 if dtype == "float32" else 0.75):
            usual = 1e-7 if dialect.startswith("keras") else 1e-10
            words = {
                "rho" if dialect.startswith("keras") else "decay": 0.9 if dtype == "float32" else 0.875,
                "epsilon": usual if dtype == "float32" else 2.0**-20,
            } | more
            rows = "lazy"
            if dialect == "keras3":
                rows = "dense, squares summed" if runner is keras3 else "dense"
            elif dialect == "keras2" and "momentum" not in more:
                rows = "decayed"
            steps = [{"w": gradient} for gradient in sequences[sequence]]
            made = runner(dtype, words, {"w": start}, steps, lrs)
            wanted = expected({"w": start}, steps, lrs, **rule(dialect, words), rows=rows)
            check(dtype, f"sparse {sequence} {rows} {dialect} {words} {note}", {"w": start}, made, wanted)
            key = f"{len(cases):03d}"
            arrays[f"{key}/w"] = np.stack([np.asarray(step["w"], dtype) for step in made])
            case = {"key": key, "dialect": dialect, "dtype": dtype, "words": words, "lr_word": "learning_rate"}
            cases.append(case | {"sequence": sequence, "rows": rows, "note": note})
    provenance = inputs.Recording("sparse", VERSIONS, COMMAND).provenance
    described = {"provenance": provenance, "shape": shape, "lrs": lrs, "cases": cases}
    path = inputs.HERE / "sparse.npz"
    np.savez_compressed(path, description=np.array(json.dumps(described, indent=1)), **arrays)
    print(f"{path.name}: {len(cases)} runs, {path.stat().st_size} bytes")


if __name__ == "__main__":
    make_tensorflow1()
    make_keras2()
    make_keras3()
    make_sonnet2()
    make_sparse()
