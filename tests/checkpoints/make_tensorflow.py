"""Record checkpoints of Keras 3, TensorFlow 1 and tf_keras (which is the tf.keras of TensorFlow 2).

    pip install tensorflow-cpu==2.21.0 tf_keras==2.21.0 keras==3.15.1
    python tests/checkpoints/make_tensorflow.py           # writes the files beside itself
    python tests/checkpoints/make_tensorflow.py --show    # prints every name in them

Two runs of Keras 3 and of TensorFlow 1 ("momentum": 0.9, not centered; "centered": also momentum 0.9), three of each
of tf_keras's two optimizers ("plain": no momentum, not centered). Kernels are HWIO and (in, out). What is in the
files:

keras3-*.keras: a zip, nothing compressed, of metadata.json ({"keras_version", "date_saved"}), config.json and
  model.weights.h5. In config.json, "compile_config"/"optimizer" has "class_name" "RMSprop" and "config" with
  learning_rate, rho, momentum, epsilon, centered, weight_decay, clipnorm, clipvalue, global_clipnorm, use_ema ...;
  learning_rate is what it was at the save.
keras3-*.weights.h5 (and model.weights.h5): a layer's group is named after its *class*, with _1, _2 ... from the
  second of a class on; its own name is the attribute "name" of the group's "vars".
    layers/conv2d/vars (name "conv"): 0 kernel, 1 bias; layers/dense/vars (name "fc"): 0 kernel, 1 bias
    layers/input_layer/vars, layers/input_layer_1/vars, vars: empty, with a "name" each ("image", "vector", "net")
    optimizer/vars (name "rm_sprop", "rm_sprop_1" for the second one made by a process):
      0 iteration (int64), 1 learning_rate (float32), 2 to 5 the velocity (= v) of conv/kernel, conv/bias, fc/kernel,
      fc/bias (the order of model.trainable_variables), 6 to 9 their momentum, 10 to 13 their average_gradient (= m).
      Kinds that are off are not there: a centered one without momentum has average_gradient from 6 on.
      HDF5 lists the names as text: 0, 1, 10, 11 ... 2, 3.
  The .weights.h5 file has no settings but the learning rate.

tensorflow1-*.ckpt-20.index and .data-00000-of-00001: a tensor bundle, without its .meta and without the folder's
  "checkpoint" file. No settings in it, not even the learning rate. Names, for each of conv/kernel, conv/bias,
  fc/kernel, fc/bias, here <v>:
    not centered: <v>, <v>/RMSProp (= v), <v>/RMSProp_1 (= velocity; there also where the momentum is 0)
    centered: <v>, <v>/RMSProp (= v), <v>/RMSProp_1 (= m), <v>/RMSProp_2 (= velocity)
    global_step (int64)

tfkeras-<kind>-*.h5: HDF5 of a whole model; attributes "model_config" and "training_config" (JSON) of the file.
    model_weights: attribute "layer_names"; model_weights/conv: attribute "weight_names" ["conv/kernel:0",
      "conv/bias:0"], hence the datasets model_weights/conv/conv/kernel:0 and model_weights/conv/conv/bias:0; likewise
      "fc". The layers without weights ("image", "vector") and "top_level_model_weights" have empty groups.
    optimizer_weights: attribute "weight_names", which alone has the order; each name is the path of a dataset in it.
      legacy: RMSprop/iter:0 (int64), RMSprop/<v>/rms:0 of every variable (the order of model.trainable_variables),
        then RMSprop/<v>/momentum:0 of every one (momentum > 0), then RMSprop/<v>/mg:0 of every one (centered).
      newer: iteration:0 (int64), RMSprop/velocity/<v>:0 of every variable, RMSprop/momentum/<v>:0 (momentum > 0),
        RMSprop/average_gradient/<v>:0 (centered).
    training_config, "optimizer_config": of the legacy one {"class_name": "RMSprop", "config": {"learning_rate",
      "decay", "rho", "momentum", "epsilon", "centered"}}, where rho and momentum have been through float32
      (0.8999999761581421); of the newer one {"class_name": "Custom>RMSprop", "config": {..., "is_legacy_optimizer":
      false, "weight_decay", "clipnorm", ...}}. The learning rate is in here, as it was at the save, and nowhere else.

tf2-<kind>-*.index and .data-00000-of-00001: tf.train.Checkpoint(model=model, optimizer=optimizer).write(...), a
  tensor bundle; every name ends in /.ATTRIBUTES/VARIABLE_VALUE, left out here.
    model/layer_with_weights-0/kernel, .../bias: conv; model/layer_with_weights-1/kernel, .../bias: fc. The layers'
      own names are not in these.
    legacy: model/layer_with_weights-0/kernel/.OPTIMIZER_SLOT/optimizer/rms, .../momentum (momentum > 0), .../mg
      (centered); optimizer/iter (int64), optimizer/learning_rate, optimizer/rho, optimizer/momentum, optimizer/decay:
      float32 scalars, and there in every run. epsilon and centered are nowhere.
    newer: optimizer/_iterations (int64), optimizer/_learning_rate (float32), and optimizer/_variables/1 to 4
      (velocity of conv/kernel, conv/bias, fc/kernel, fc/bias), 5 to 8 (momentum), 9 to 12 (average_gradient);
      _variables/0 is _iterations and is not written twice. rho, momentum, epsilon and centered are nowhere.
    _CHECKPOINTABLE_OBJECT_GRAPH: a string scalar, the serialized TrackableObjectGraph, in every one. Its nodes'
      attributes pair each checkpoint_key with a full_name: "conv/kernel", "fc/bias" ... for the model; of the legacy
      optimizer "RMSprop/conv/kernel/rms" and the like; of the newer one "iteration", "learning_rate",
      "RMSprop/velocity/conv/kernel", "RMSprop/momentum/conv/kernel", "RMSprop/average_gradient/conv/kernel".
"""

import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["KERAS_BACKEND"] = "tensorflow"

import inputs
import keras
import numpy as np
import tensorflow as tf
import tf_keras

Arrays = dict[str, np.ndarray]
VERSIONS = {
    name: importlib.metadata.version(name) for name in ("tensorflow-cpu", "tf_keras", "keras", "h5py", "numpy")
}
COMMAND = "python tests/checkpoints/make_tensorflow.py"
NAMES = {"conv.weight": "conv/kernel", "conv.bias": "conv/bias", "fc.weight": "fc/kernel", "fc.bias": "fc/bias"}
assert list(NAMES) == list(inputs.SHAPES)
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered": {"momentum": 0.9, "centered": True},
}


def expected(words: Mapping[str, Any], *, inside: bool, v: float) -> list[Arrays]:
    """The rule in float64, after every step."""
    p = {name: value.astype(np.float64) for name, value in inputs.parameters().items()}
    second = {name: np.full_like(value, v) for name, value in p.items()}
    first, velocity = ({name: np.zeros_like(value) for name, value in p.items()} for _ in range(2))
    rho, eps = words.get("rho", words.get("decay")), words["epsilon"]
    made = []
    for step, lr in zip(inputs.gradients(), inputs.LRS, strict=True):
        for name in p:
            g = step[name].astype(np.float64)
            second[name] = rho * second[name] + (1 - rho) * g * g
            first[name] = rho * first[name] + (1 - rho) * g
            variance = second[name] - first[name] ** 2 if words.get("centered") else second[name]
            root = np.sqrt(variance + eps) if inside else np.sqrt(variance) + eps
            velocity[name] = words.get("momentum", 0.0) * velocity[name] + lr * g / root
            p[name] = p[name] - velocity[name]
        made.append(dict(p))
    return made


def record(
    checkpoints: list[str], dialect: str, words: Mapping[str, Any], saved: Arrays, final: Arrays, note: str
) -> None:
    """Compare a run with the rule, and describe each of the checkpoints that were made of it."""
    inside = dialect != "keras2" or "momentum" in words
    wanted = expected(words, inside=inside, v=1.0 if dialect == "tensorflow1" else 0.0)
    far = 0.0
    for got, want in ((saved, wanted[inputs.SAVED_AT - 1]), (final, wanted[inputs.STEPS - 1])):
        for name, start in inputs.parameters().items():
            assert got[name].shape == start.shape
            assert got[name].dtype == np.float32
            far = max(far, float((np.abs(got[name] - want[name]) / np.maximum(abs(want[name]), abs(start))).max()))
    assert far <= 1e-5
    for checkpoint in checkpoints:
        path = inputs.record(
            checkpoint.replace(".", "-"), checkpoint, dialect, words, saved, final, VERSIONS, COMMAND, note
        )
        files = [file for file in path.parent.glob(f"{checkpoint}*") if file.suffix != ".npz"]
        assert files
        print(f"{far:.1e}", *(f"{file.name} ({file.stat().st_size} bytes)" for file in files))


def model_of(framework: Any) -> Any:
    """A model of the layers "conv" and "fc", each with an input of its own. Args: framework: keras or tf_keras."""
    image, vector = framework.Input((3, 3, 2), name="image"), framework.Input((6,), name="vector")
    conv, fc = framework.layers.Conv2D(4, 3, name="conv"), framework.layers.Dense(5, name="fc")
    return framework.Model([image, vector], [conv(image), fc(vector)], name="net")


def run_eager(model: Any, optimizer: Any, save: Callable[[], None]) -> tuple[Arrays, Arrays]:
    """Steps, saves, and steps on. Returns: the parameters at the save and at the end, in torch's layouts."""
    variables = dict(zip(NAMES, model.trainable_variables, strict=True))
    paths = [getattr(variable, "path", variable.name.removesuffix(":0")) for variable in variables.values()]
    assert paths == list(NAMES.values()), paths
    for name, value in inputs.parameters().items():
        variables[name].assign(inputs.to_tensorflow(name, value))
    stood = {}
    for done, (step, lr) in enumerate(zip(inputs.gradients(), inputs.LRS, strict=True), 1):
        optimizer.learning_rate = lr
        optimizer.apply_gradients(
            [(tf.constant(inputs.to_tensorflow(name, step[name])), variables[name]) for name in NAMES]
        )
        if done in (inputs.SAVED_AT, inputs.STEPS):
            stood[done] = {name: inputs.to_torch(name, p.numpy()).copy() for name, p in variables.items()}
        if done == inputs.SAVED_AT:
            save()
    return stood[inputs.SAVED_AT], stood[inputs.STEPS]


def make_keras3() -> None:
    for which in ("momentum", "centered"):
        words = {"learning_rate": inputs.LR, "rho": 0.9, "epsilon": 1e-7} | SWITCHES[which]
        model = model_of(keras)
        model.compile(optimizer=keras.optimizers.RMSprop(**words), loss="mse")
        files = [f"keras3-{which}.keras", f"keras3-{which}.weights.h5"]

        def save(model: Any = model, files: list[str] = files) -> None:
            model.save(inputs.HERE / files[0])
            model.save_weights(inputs.HERE / files[1])

        saved, final = run_eager(model, model.optimizer, save)
        record(files, "keras3", words, saved, final, f"keras {VERSIONS['keras']}, TensorFlow backend")


def make_tf_keras() -> None:
    for kind, dialect, make in (
        ("legacy", "keras2", tf_keras.optimizers.legacy.RMSprop),
        ("newer", "keras3", tf_keras.optimizers.RMSprop),
    ):
        for which in SWITCHES:
            words = {"learning_rate": inputs.LR, "rho": 0.9, "epsilon": 1e-7} | SWITCHES[which]
            tf_keras.backend.clear_session()
            model = model_of(tf_keras)
            model.compile(optimizer=make(**words), loss="mse")
            files = [f"tfkeras-{kind}-{which}.h5", f"tf2-{kind}-{which}"]

            def save(model: Any = model, files: list[str] = files) -> None:
                model.save(inputs.HERE / files[0], save_format="h5")
                tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(inputs.HERE / files[1]))

            saved, final = run_eager(model, model.optimizer, save)
            note = f"tf_keras {VERSIONS['tf_keras']}, tf_keras.optimizers{'.legacy' * (kind == 'legacy')}.RMSprop"
            record(files, dialect, words, saved, final, note)


def make_tensorflow1() -> None:
    v1 = tf.compat.v1
    for which in ("momentum", "centered"):
        words = {"learning_rate": inputs.LR, "decay": 0.9, "epsilon": 1e-10} | SWITCHES[which]
        with tf.Graph().as_default(), v1.Session() as session:
            variables, fed = {}, {}
            for name, value in inputs.parameters().items():
                layer, attribute = NAMES[name].split("/")
                with v1.variable_scope(layer, reuse=v1.AUTO_REUSE):
                    initial = inputs.to_tensorflow(name, value)
                    variables[name] = v1.get_variable(attribute, initializer=initial, use_resource=False)
                    fed[name] = v1.placeholder(tf.float32, initial.shape)
            assert [variable.op.name for variable in variables.values()] == list(NAMES.values())
            rate, count = v1.placeholder(tf.float32, ()), v1.train.get_or_create_global_step()
            optimizer = v1.train.RMSPropOptimizer(**(words | {"learning_rate": rate}))
            update = optimizer.apply_gradients([(fed[name], variables[name]) for name in NAMES], count)
            saver = v1.train.Saver()
            session.run(v1.global_variables_initializer())
            stood = {}
            for done, (step, lr) in enumerate(zip(inputs.gradients(), inputs.LRS, strict=True), 1):
                session.run(update, {rate: lr} | {fed[n]: inputs.to_tensorflow(n, g) for n, g in step.items()})
                if done in (inputs.SAVED_AT, inputs.STEPS):
                    stood[done] = {n: inputs.to_torch(n, p) for n, p in session.run(variables).items()}
                if done == inputs.SAVED_AT:
                    prefix = saver.save(
                        session,
                        str(inputs.HERE / f"tensorflow1-{which}.ckpt"),
                        global_step=count,
                        write_meta_graph=False,
                        write_state=False,
                    )
        note = "tf.compat.v1.train.Saver, in a graph with reference variables"
        record([Path(prefix).name], "tensorflow1", words, stood[inputs.SAVED_AT], stood[inputs.STEPS], note)


def show() -> None:
    """Print every name in every file."""
    import h5py

    for path in sorted(inputs.HERE.glob("*.index")):
        print(path.stem)
        for name, shape in tf.train.list_variables(str(path.with_suffix(""))):
            print("   ", name, shape)
    for path in sorted([*inputs.HERE.glob("*.h5"), *inputs.HERE.glob("*.keras")]):
        print(path.name)
        if path.suffix == ".keras":
            import io
            import zipfile

            with zipfile.ZipFile(path) as archive:
                print("   ", archive.namelist(), archive.read("config.json")[-700:])
                stored: Any = io.BytesIO(archive.read("model.weights.h5"))
        else:
            stored = path
        with h5py.File(stored) as file:

            def visit(name: str, item: Any) -> None:
                what = f"{item.dtype} {item.shape}" if isinstance(item, h5py.Dataset) else "/"
                print("   ", name, what, dict(item.attrs))

            print("   ", dict(file.attrs))
            file.visititems(visit)


if __name__ == "__main__":
    if sys.argv[1:] == ["--show"]:
        show()
    else:
        make_keras3()
        make_tensorflow1()
        make_tf_keras()
