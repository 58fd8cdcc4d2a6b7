"""Record a Keras 3 model of layers whose arrays lie otherwise in torch, every kernel square, as .keras and .h5.

    KERAS_BACKEND=torch python make_layouts.py

layouts-keras3.npz holds the inputs and what the trained model answers. Written by keras 3.15.1 on 2026-11-29.
"""

from pathlib import Path

import keras
import numpy as np

HERE = Path(__file__).parent


def model():
    """One branch for each kind of layout."""
    layers, ends = keras.layers, []
    inputs = {name: keras.Input(shape, name=name) for name, shape in SHAPES.items()}
    ends.append(layers.SimpleRNN(4, name="rnn")(inputs["rnn_in"]))
    ends.append(layers.GRU(4, name="gru")(inputs["gru_in"]))
    ends.append(layers.LSTM(4, name="lstm")(inputs["lstm_in"]))
    words = layers.Flatten()(layers.Embedding(4, 4, name="table")(inputs["words_in"]))
    ends.append(layers.Dense(16, name="words")(words))
    image = layers.Conv2D(2, 2, padding="same", name="conv")(inputs["image_in"])
    image = layers.DepthwiseConv2D(2, padding="same", depth_multiplier=2, name="depth")(image)
    image = layers.BatchNormalization(name="norm")(layers.Flatten()(image))
    ends.append(layers.Dense(16, name="head")(layers.Dropout(0.1)(image)))
    line = layers.Conv1D(2, 2, padding="same", name="line")(inputs["line_in"])
    ends.append(layers.Dense(8, name="tail")(layers.Flatten()(line)))
    return keras.Model(inputs, layers.Concatenate(name="all")(ends))


SHAPES = {"rnn_in": (3, 4), "gru_in": (3, 12), "lstm_in": (3, 16), "words_in": (4,), "image_in": (2, 2, 2)}
SHAPES["line_in"] = (4, 2)

if __name__ == "__main__":
    draw = np.random.default_rng(0)
    made = model()
    x = {name: draw.normal(size=(4, *shape)).astype(np.float32) for name, shape in SHAPES.items()}
    x["words_in"] = draw.integers(0, 4, (4, 4)).astype(np.float32)
    y = draw.normal(size=made.predict(x, verbose=0).shape).astype(np.float32)
    made.compile(keras.optimizers.RMSprop(0.01, momentum=0.5), loss="mse")
    made.fit(x, y, epochs=3, verbose=0)
    made.save(HERE / "layouts-keras3.keras")
    made.save(HERE / "layouts-keras3.h5")
    np.savez(HERE / "layouts-keras3.npz", **x, answer=made.predict(x, verbose=0))
