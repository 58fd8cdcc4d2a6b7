"""Arrays are converted by their layer, never by their shape alone, and convert back unchanged."""

import json
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from paths import CHECKPOINTS
from torch.nn import functional as F

from rmsprop.conversion import Checkpoint
from rmsprop.conversion.file import prepare, read_checkpoint, write, writer
from rmsprop.conversion.layers import Layers, by_name
from rmsprop.conversion.layout import Map, doubts, plan
from rmsprop.conversion.owner import find_owner
from rmsprop.conversion.turning import is_kind, turn, turn_back, turned_shape

HERE = CHECKPOINTS
KERAS = ("layouts-keras3.h5", "layouts-keras3.keras")


def answer(params, x):
    """Compute the recorded model's output with torch's layers and converted arrays."""

    def recurrent(make, layer):
        made = make(x[f"{layer}_in"].shape[-1], 4, batch_first=True)
        bias = params[f"{layer}.{layer}_cell.bias"] if layer != "rnn" else params["rnn.simple_rnn_cell.bias"]
        cell = f"{layer}.{layer}_cell" if layer != "rnn" else "rnn.simple_rnn_cell"
        both = bias if bias.ndim == 2 else (bias, torch.zeros_like(bias))
        arrays = {"weight_ih_l0": params[f"{cell}.weight"], "weight_hh_l0": params[f"{cell}.recurrent_kernel"]}
        made.load_state_dict({**arrays, "bias_ih_l0": both[0], "bias_hh_l0": both[1]})
        return made(x[f"{layer}_in"])[0][:, -1]

    def dense(layer, value):
        return F.linear(value, params[f"{layer}.weight"], params[f"{layer}.bias"])

    ends = [recurrent(torch.nn.RNN, "rnn"), recurrent(torch.nn.GRU, "gru"), recurrent(torch.nn.LSTM, "lstm")]
    ends.append(dense("words", F.embedding(x["words_in"].long(), params["table.weight"]).flatten(1)))
    image = F.pad(x["image_in"].permute(0, 3, 1, 2), (0, 1, 0, 1))
    image = F.pad(F.conv2d(image, params["conv.weight"], params["conv.bias"]), (0, 1, 0, 1))
    image = F.conv2d(image, params["depth.weight"], params["depth.bias"], groups=2).flatten(1)
    norm = [params[f"norm.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    ends.append(dense("head", F.batch_norm(image, *norm, eps=1e-3)))
    line = F.conv1d(F.pad(x["line_in"].permute(0, 2, 1), (0, 1)), params["line.weight"], params["line.bias"])
    ends.append(dense("tail", line.flatten(1)))
    return torch.cat(ends, 1)


@pytest.mark.parametrize("name", KERAS)
def test_torchs_layers_answer_as_keras_does_from_converted_arrays(name):
    """Recurrent, depthwise and flattened kernels, gates and tables of equal dimensions have torch's layout."""
    made = prepare(HERE / name)
    params = {key: torch.from_numpy(value) for key, value in made.checkpoint.params.items()}
    with np.load(HERE / "layouts-keras3.npz") as held:
        x = {key: torch.from_numpy(held[key]) for key in held.files if key != "answer"}
        expected = held["answer"]
    with torch.no_grad():
        np.testing.assert_allclose(answer(params, x).numpy(), expected, rtol=1e-5, atol=1e-5)
    said = " ".join(made.report.assumed)
    assert "flattened image with 4 channels" in said
    assert "flattened image with 2 channels" in said
    assert "r, z, n in torch" in said


@pytest.mark.parametrize("name", KERAS)
@pytest.mark.parametrize(
    ("middle", "layout", "told"),
    [
        *[(middle, layout, True) for middle in ("middle.pt", "middle.safetensors") for layout in ("torch", "keep")],
        ("middle.pt", "torch", False),
    ],
)
def test_square_arrays_come_back_as_they_were(name, middle, layout, told, tmp_path):
    """Keras to here and back by the file's record, or by the template if a trainer saved it without a record."""
    first = read_checkpoint(HERE / name)
    between, back = tmp_path / middle, tmp_path / f"back{Path(name).suffix}"
    write(prepare(HERE / name, layout=layout, out=writer(between)), between)
    if not told:
        whole = torch.load(between, weights_only=True)
        assert whole.pop("turned")
        torch.save(whole, between)
    write(prepare(between, "keras3", model=HERE / name, out=writer(back)), back)
    last = read_checkpoint(back)
    assert list(last.params) == list(first.params)
    for key, value in first.params.items():
        np.testing.assert_array_equal(last.params[key], value, err_msg=key)
        for slot, state in first.slots.get(key, {}).items():
            np.testing.assert_array_equal(last.slots[key][slot], state, err_msg=f"{key} {slot}")


def test_a_file_of_another_framework_in_torchs_layout_is_turned_back(tmp_path):
    """A .safetensors for keras3 has torch's layouts, and records it."""
    between, back = tmp_path / "middle.safetensors", tmp_path / "back.h5"
    write(prepare(HERE / KERAS[0], "keras3", out=writer(between)), between)
    assert read_checkpoint(between).owner.name == "keras3"
    write(prepare(between, "keras3", model=HERE / KERAS[0], out=writer(back)), back)
    first, last = read_checkpoint(HERE / KERAS[0]), read_checkpoint(back)
    for key, value in first.params.items():
        np.testing.assert_array_equal(last.params[key], value, err_msg=key)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *[("conv", (2,) * n) for n in (3, 4, 5)],
        *[("depthwise:2", (3, 2, 2)), ("depthwise:2", (2, 2, 2, 2)), ("depthwise:1", (2, 2, 4, 1))],
        *[("dense", (4, 4)), ("dense:2", (8, 8)), ("dense:2", (8,)), ("dense:1", (3,)), ("gru", (12, 12))],
        *[("gates", (2, 12)), ("gates", (6,)), ("gates:2", (12,)), ("keep", (3, 3))],
    ],
)
def test_a_turn_has_an_inverse_and_a_shape(kind, shape):
    """turn_back undoes turn, and turned_shape returns both shapes."""
    value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    turned = turn(value, kind)
    assert turned.shape == turned_shape(shape, kind)
    assert turned_shape(turned.shape, kind, back=True) == shape
    np.testing.assert_array_equal(turn_back(turned, kind), value)


# --- what is known of a layer -----------------------------------------------------------------------


def sequential(*layers, **more):
    """Return a Sequential's configuration."""
    listed = [{"class_name": kind, "config": {"name": kind.lower(), **config}} for kind, config in layers]
    return {"class_name": "Sequential", "config": {"name": "net", "layers": listed, **more}}


IMAGE = ("InputLayer", {"batch_shape": [None, 4, 4, 3]})
CONV, FLAT, DENSE = ("Conv2D", {"filters": 6}), ("Flatten", {}), ("Dense", {})


@pytest.mark.parametrize(
    ("layers", "kind"),
    [
        ((CONV, FLAT, DENSE), "dense:6"),
        ((CONV, ("ELU", {}), ("MaxPooling2D", {}), ("Dropout", {}), FLAT, ("ReLU", {}), DENSE), "dense:6"),
        ((CONV, ("Reshape", {"target_shape": [-1]}), DENSE), "dense:6"),
        ((CONV, ("GlobalAveragePooling2D", {}), DENSE), "dense:1"),
        ((CONV, ("GlobalAveragePooling2D", {}), FLAT, DENSE), "dense:1"),
        ((CONV, FLAT, ("Dense", {"name": "between"}), DENSE), "dense:1"),
        ((IMAGE, ("DepthwiseConv2D", {"depth_multiplier": 2}), FLAT, DENSE), "dense:6"),
        ((("InputLayer", {"batch_shape": [None, 28, 28]}), FLAT, DENSE), "dense:1"),
        ((("InputLayer", {"batch_shape": [None, 28, 28, 1]}), FLAT, DENSE), "dense:1"),
        ((IMAGE, FLAT, DENSE), "dense"),
        ((("Embedding", {}), FLAT, DENSE), "dense:1"),
        ((("LSTM", {}), FLAT, DENSE), "dense:1"),
        ((CONV, ("Mine", {}), FLAT, DENSE), "dense"),
        ((("Conv2D", {"filters": 6, "data_format": "channels_first"}), FLAT, DENSE), "dense:1"),
        ((("Conv2D", {"filters": 6, "data_format": "channels_first"}),
          ("Flatten", {"data_format": "channels_first"}), DENSE), "dense:6"),
        ((CONV, ("Flatten", {"data_format": "channels_first"}), DENSE), "dense"),
        ((("Convolution2D", {"nb_filter": 6, "dim_ordering": "th"}), FLAT, DENSE), "dense:1"),
        ((("Convolution2D", {"nb_filter": 6, "dim_ordering": "tf"}), FLAT, DENSE), "dense:6"),
    ],
)  # fmt: skip
def test_rows_of_a_dense_layer_follow_the_graph(layers, kind):
    """Flattening an image reorders the rows; a sequence or a pooled image does not, and nothing is guessed."""
    assert Layers(sequential(*layers)).hint("dense/kernel", (36, 36)) == kind


def test_graphs_that_are_long_deep_or_go_in_circles_take_linear_time():
    """Ten thousand layers that all read one another, and concatenations of concatenations of one image."""
    conv = {"class_name": "Conv2D", "config": {"name": "c0", "filters": 1}, "inbound_nodes": []}
    joined = [
        {
            "class_name": "Concatenate",
            "config": {"name": f"c{i}", "axis": -1},
            "inbound_nodes": [[[f"c{i - 1}", 0, 0, {}], [f"c{i - 1}", 0, 0, {}]]],
        }
        for i in range(1, 40)
    ]
    chain = [
        {"class_name": "ReLU", "config": {"name": f"r{i}"}, "inbound_nodes": [[[f"r{(i + 1) % 9999}", 0, 0, {}]]]}
        for i in range(9999)
    ]
    begun = time.perf_counter()
    graph = Layers({"config": {"layers": [conv, *joined, *chain]}})
    assert [graph.rows(f"r{i}") for i in range(9999)] == [None] * 9999
    assert graph._channels(["c39"], 0) == (1, False, False)
    assert time.perf_counter() - begun < 5


def test_models_in_models_are_walked():
    """A base model's last convolution gives the channels of the flattened image."""
    base = sequential(CONV, ("MaxPooling2D", {}))
    outer = {
        "class_name": "Sequential",
        "config": {
            "layers": [base, *({"class_name": k, "config": {"name": k.lower(), **c}} for k, c in (FLAT, DENSE))]
        },
    }
    assert Layers(outer).hint("dense/kernel", (36, 36)) == "dense:6"
    assert Layers(outer).hint("net/conv2d/kernel", (2, 2, 2, 2), "net") == "conv"


@pytest.mark.parametrize(
    ("layer", "leaf", "shape", "kind"),
    [
        ("Dense", "kernel", (4, 4), "dense:1"),
        ("Dense", "bias", (4,), None),
        ("Embedding", "embeddings", (4, 4), "keep"),
        ("Embedding", "x_W", (4, 4), "keep"),
        ("Dense", "x_W", (4, 4), "dense:1"),
        ("LSTM", "x_U_f", (4, 4), "dense:1"),
        ("GRU", "x_U_r", (3, 3), "dense:1"),
        ("GRU", "kernel", (12, 12), "gru"),
        ("GRU", "bias", (2, 12), "gates"),
        ("CuDNNGRU", "bias", (24,), "gates:2"),
        ("SimpleRNN", "recurrent_kernel", (4, 4), "dense:1"),
        ("Conv2D", "kernel", (2, 2, 2, 2), "conv"),
        ("Conv2DTranspose", "kernel", (2, 2, 2, 2), "conv"),
        ("Conv1D", "kernel", (2, 2, 2), "conv"),
        ("Convolution2D", "x_W", (2, 2, 2, 2), "conv"),
        ("DepthwiseConv2D", "depthwise_kernel", (2, 2, 2, 2), "depthwise"),
        ("DepthwiseConv2D", "kernel", (2, 2, 2, 2), "depthwise"),
        ("DepthwiseConv1D", "kernel", (2, 2, 2), "depthwise"),
        ("SeparableConv2D", "pointwise_kernel", (1, 1, 2, 2), "conv"),
        ("SeparableConv2D", "depthwise_kernel", (2, 2, 2, 2), "depthwise"),
        ("ConvLSTM2D", "recurrent_kernel", (2, 2, 2, 8), "conv"),
        ("TimeDistributed", "kernel", (4, 4), "dense:1"),
        ("Bidirectional", "recurrent_kernel", (12, 12), "gru"),
    ],
)  # fmt: skip
def test_a_layers_class_says_how_its_arrays_lie(layer, leaf, shape, kind):
    """The class in the configuration decides, not the layer's name."""
    inner = {"TimeDistributed": "Dense", "Bidirectional": "GRU"}.get(layer)
    wrapped = {"layer": {"class_name": inner, "config": {"name": "inner"}}} if inner else {}
    told = sequential(("Embedding", {}), (layer, {"name": "mine", **wrapped}))
    assert Layers(told).hint(f"mine/{leaf}", shape) == kind


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("gru/gru_cell/kernel", (12, 12), "gru"),
        ("bidirectional/forward_gru_1/gru_cell_1/recurrent_kernel:0", (12, 12), "gru"),
        ("rnn/gru_cell/gates/kernel", (12, 12), "dense"),
        ("depthwise_conv2d_3/kernel", (2, 2, 2, 2), "depthwise"),
        ("embedding_projection/kernel", (4, 4), "dense"),
        ("embedding/w", (4, 4), "keep"),
        ("embedding_1/embedding_1_W", (4, 4), "keep"),
        ("dense_1/dense_1_W:0", (4, 4), "dense"),
        ("convolution2d_1/convolution2d_1_W", (2, 2, 2, 2), "keep"),
        ("attention/query/kernel", (4, 2, 2), "keep"),
    ],
)  # fmt: skip
def test_without_a_configuration_default_names_say_it(name, shape, kind):
    """A layer's default name is that of its class."""
    assert by_name(name, shape) == kind


def test_what_is_not_known_is_said_and_not_turned():
    """Rows after a convolution without a graph, kernels of three axes, and layouts guessed by name are reported."""

    def held(source, shapes):
        params = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
        return Checkpoint(find_owner(source), params, {name: {"rms": value} for name, value in params.items()})

    first = held("keras2", {"conv/kernel": (2, 2, 2, 4), "fc/kernel": (16, 16), "mha/query/kernel": (4, 2, 2)})
    said = " ".join(doubts(first, plan(first), "torch"))
    assert '"fc/kernel" = "dense:4"' in said
    assert "mha/query/kernel keep the file's layout" in said
    assert doubts(first, plan(first, "keep"), "keep") == []
    pooled = held("keras2", {"conv/kernel": (2, 2, 2, 4), "fc/kernel": (4, 4)})
    assert doubts(pooled, plan(pooled), "torch") == []
    last = held("torch", {"fc.weight": (4, 4)})
    assert "fc.weight are transposed by name" in " ".join(doubts(last, plan(last, "tensorflow"), "tensorflow"))


def test_the_map_of_the_sentence_turns_the_rows():
    """The report's advice for rows without a graph has the same result as the graph."""

    value = np.arange(48, dtype=np.float32).reshape(12, 4)
    held = Checkpoint(find_owner("keras2"), {"fc/kernel": value}, {"fc/kernel": {"rms": value}})
    (move,) = plan(held, "torch", Map(transpose={"fc/kernel": "dense:3"}))
    expected = value.reshape(2, 2, 3, 4).transpose(2, 0, 1, 3).reshape(12, 4).T
    np.testing.assert_array_equal(move.turned(value), expected)
    with pytest.raises(ValueError, match="cannot be converted as 'dense:5'"):
        plan(held, "torch", Map(transpose={"fc/kernel": "dense:5"}))


@pytest.mark.parametrize(
    "wrong", ["", "dense:0", "dense:-1", "dense:", "rows", "dense:1:1", "dense:9999999999", None, 3]
)
def test_what_is_not_a_kind_is_not_taken_for_one(wrong):
    """A record in a file may hold anything."""
    assert not is_kind(wrong)


def test_keras_1_kernels_turn(tmp_path):
    """Dense, recurrent and convolutional kernels with names such as dense_1_W are converted by their class."""
    path = tmp_path / "keras1.h5"
    layers = [
        {"class_name": "Convolution2D", "config": {"name": "c", "nb_filter": 2, "dim_ordering": "tf"}},
        {"class_name": "Flatten", "config": {"name": "f"}},
        {"class_name": "Dense", "config": {"name": "d"}},
    ]
    arrays = {
        "c": {"c_W": (2, 2, 2, 2), "c_b": (2,)},
        "f": {},
        "d": {"d_W": (8, 8), "d_b": (8,)},
    }
    draw = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": layers})
        file.attrs["training_config"] = json.dumps(
            {"optimizer_config": {"class_name": "RMSprop", "config": {"lr": 0.5, "rho": 0.75, "epsilon": 0.125}}}
        )
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [name.encode() for name in arrays]
        for layer, shapes in arrays.items():
            one = group.create_group(layer)
            one.attrs["weight_names"] = [name.encode() for name in shapes]
            for name, shape in shapes.items():
                one[name] = draw.normal(size=shape).astype(np.float32)
        states = file.create_group("optimizer_weights")
        flat = [shape for shapes in arrays.values() for shape in shapes.values()]
        names = [f"training/RMSprop/Variable{f'_{i}' if i else ''}:0" for i in range(len(flat))]
        states.attrs["weight_names"] = [name.encode() for name in names]
        for name, shape in zip(names, flat, strict=True):
            states[name] = np.ones(shape, np.float32)
    held = read_checkpoint(path)
    made = prepare(path).checkpoint
    by_shape = {value.shape: value for value in made.params.values()}
    np.testing.assert_array_equal(by_shape[2, 2, 2, 2], held.params["c/c_W"].transpose(3, 2, 0, 1))
    turned = held.params["d/d_W"].reshape(4, 2, 8).swapaxes(0, 1).reshape(8, 8).T
    np.testing.assert_array_equal(by_shape[8, 8], turned)
