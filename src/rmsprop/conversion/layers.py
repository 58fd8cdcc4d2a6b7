"""Finds the layouts of Keras variables from the layers' classes and the graph in a file's configuration.

Keras flattens an image as (height, width, channel) and torch as (channel, height, width), so the rows of a Dense
layer after a Flatten are reordered too. Only the graph shows which layers follow a Flatten.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rmsprop.conversion.turning import fits

CONV = {
    *("conv1d", "conv2d", "conv3d", "conv1dtranspose", "conv2dtranspose", "conv3dtranspose", "deconvolution2d"),
    *("convolution1d", "convolution2d", "convolution3d", "atrousconvolution1d", "atrousconvolution2d"),
    *("separableconv1d", "separableconv2d", "separableconvolution2d", "convlstm1d", "convlstm2d", "convlstm3d"),
}
DEPTHWISE = {"depthwiseconv1d", "depthwiseconv2d"}
GRU = {"gru", "cudnngru"}
RECURRENT = {"simplernn", "lstm", "cudnnlstm"}
TABLES = {"embedding", "reversibleembedding"}
_IMAGES = ("pooling", "padding", "cropping", "upsampling", "random", "rescaling", "resizing", "center")
_SAME = (
    *("dropout", "activation", "normalization", "relu", "elu", "noise", "softmax", "regularization", "masking"),
    *("add", "subtract", "multiply", "average", "maximum", "minimum"),
)
_SEQUENCES = {*TABLES, *GRU, *RECURRENT, "rnn", "multiheadattention", "attention"}
_MODELS = {"functional", "sequential", "model"}
_KERNELS = ("kernel", "weights", "w", "recurrent_kernel", "pointwise_kernel", "pointwise_weights")
_DEPTHWISE = ("depthwise_kernel", "depthwise_weights")
_MAX_LAYERS = 100_000
_MAX_DEPTH = 50
# The number of channels, 0 for a sequence; whether they are the first axis; whether the image is the model's input.
_Image = tuple[int, bool, bool]
_T = TypeVar("_T")


@dataclass
class Layer:
    """One layer of a model.

    Attributes:
        kind: its class, as `kind_name` returns it.
        config: its settings.
        before: the names of the layers that it reads from.
        ends: for a model inside the model, the names of its output layers.
        rows: the result of `Layers.rows` for a layer that is not in the graph.
    """

    kind: str
    config: Mapping[str, Any]
    before: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    rows: int | None = None


def kind_name(name: object) -> str:
    """Return a normalized class name: simplernn for SimpleRNNCell, simple_rnn_3 and mine>SimpleRNN."""
    plain = str(name).rpartition(">")[2]
    stem, _, number = plain.rpartition("_")
    plain = stem if stem and number.isdecimal() else plain
    return plain.replace("_", "").lower().removesuffix("cell").removesuffix("v2")


def leaf_of(path: str) -> str:
    """Return the last part of a variable's name: kernel for conv/kernel:0 and for conv.kernel."""
    return re.sub(r":\d+$", "", path).replace(".", "/").rpartition("/")[2]


def by_name(path: str, shape: Sequence[int]) -> str:
    """Return the layout of a TensorFlow, Keras or Flax variable, by its last part and its layer's default name."""
    parts = re.sub(r":\d+$", "", path).replace(".", "/").split("/")
    leaf, kind = parts[-1], kind_name(parts[-2]) if len(parts) > 1 else ""
    lower = leaf.lower()
    if kind.startswith(("convolution", "atrous", "deconvolution")) and len(shape) > 2:
        return "keep"  # a layer of Keras 1, whose dim_ordering is not in the name
    by_layer = hint(kind, lower, shape, {}) if known(kind) else None
    if by_layer is not None:
        return by_layer
    if lower in _DEPTHWISE and len(shape) >= 3:
        return "depthwise"
    if lower not in _KERNELS or (lower != "kernel" and "embedding" in path.lower()):
        return "keep"
    if len(shape) in (4, 5) or (len(shape) == 3 and "conv" in path.lower()):
        return "conv"
    return "dense" if len(shape) == 2 else "keep"


def known(kind: str) -> bool:
    """Return whether the layouts of the class are known here."""
    return kind in CONV | DEPTHWISE | GRU | RECURRENT | TABLES | {"dense", "einsumdense", "timedistributeddense"}


class Layers:
    """The layers of a configuration, including those of nested models; empty if the file holds no configuration."""

    def __init__(self, config: Any) -> None:
        self.found: dict[str, Layer] = {}
        self._rows: dict[str, int | None] = {}
        self._images: dict[str, _Image | None] = {}
        pending: list[tuple[Any, list[str], str]] = [(config, [], "")]
        while pending and len(self.found) < _MAX_LAYERS:
            pending += self._model(*pending.pop())

    def _model(self, entry: Any, before: list[str], outer: str) -> list[tuple[Any, list[str], str]]:
        """Add the layers of one model. Returns: the models inside it."""
        inside = entry["config"] if isinstance(entry, dict) and "layers" not in entry and "config" in entry else entry
        listed = inside.get("layers") if isinstance(inside, dict) else inside
        if not isinstance(listed, list):
            return []
        nested: list[tuple[Any, list[str], str]] = []
        last = before
        for one in listed:
            config = one.get("config") if isinstance(one, dict) else None
            if isinstance(config, list):  # a Sequential before Keras 2.2
                config = {"layers": config, "name": one.get("name", "")}
            if not isinstance(config, dict):
                continue
            name = str(config.get("name", one.get("name", "")))
            kind = kind_name(one.get("class_name", ""))
            reads = _named(one["inbound_nodes"]) if "inbound_nodes" in one else last
            while kind in ("bidirectional", "timedistributed", "rnn") and isinstance(
                config.get("layer", config.get("cell")), dict
            ):
                inner: dict[str, Any] = config.get("layer") or config["cell"]
                kind, config = kind_name(inner.get("class_name", "")), inner.get("config") or {}
            layer = Layer(kind, config, reads or (before if kind == "inputlayer" else []))
            if kind in _MODELS:
                nested.append(({"config": config}, layer.before, name))
            if name in self.found and self.found[name].kind != kind:
                layer = Layer("", {})  # an ambiguous name
            self.found[name] = layer
            last = [name]
        ends = _named(inside["output_layers"]) if isinstance(inside, dict) and "output_layers" in inside else last
        if outer in self.found:
            self.found[outer].ends = ends
        return nested

    def of(self, path: str) -> str | None:
        """Return the innermost layer in a variable's path."""
        return next((part for part in reversed(path.split("/")[:-1]) if part in self.found), None)

    def hint(self, path: str, shape: Sequence[int], owner: str = "") -> str | None:
        """Return the layout of a variable, a kind of `turning.turn`; None if the configuration does not decide it.

        "dense:64" is a dense kernel that reads a flattened image with 64 channels, "dense:1" one that does not, and
        "dense" one for which this is unknown.

        Args:
            owner: the layer, or the model, that holds the variable.
        """
        name = owner if owner in self.found and self.found[owner].kind not in _MODELS else self.of(path)
        if name is None:
            return None
        layer = self.found[name]
        return hint(layer.kind, leaf_of(path), shape, layer.config, self.rows(name))

    def rows(self, name: str) -> int | None:
        """Return the channels of the image whose flattening a layer reads; 1 if it reads none, None if unknown."""
        return self._follow(self.found[name].before, self._rows, self._before)

    def _follow(
        self,
        here: list[str],
        cache: dict[str, _T | None],
        step: Callable[[Layer], tuple[list[str], _T | None]],
    ) -> _T | None:
        """Follow single inputs back through the graph to the first layer that decides the answer.

        Args:
            cache: the answers of layers that were passed before. A cycle is cached as unknown.
            step: returns the layers to go on with, or the answer.
        """
        passed: list[str] = []
        answer: _T | None = None
        while len(here) == 1 and here[0] in self.found:
            name = here[0]
            if name in cache:
                answer = cache[name]
                break
            cache[name] = None
            passed.append(name)
            here, answer = step(self.found[name])
        cache |= dict.fromkeys(passed, answer)
        return answer

    def _before(self, layer: Layer) -> tuple[list[str], int | None]:
        """Return the layer with the same `rows` as this layer's output, or the answer itself."""
        kind = layer.kind
        if kind in _MODELS and layer.ends:
            return layer.ends, None
        if kind == "flatten" or (kind == "reshape" and len(layer.config.get("target_shape") or ()) == 1):
            return [], self._flattened(layer)
        if kind in {"dense"} | _SEQUENCES | CONV | DEPTHWISE or kind.startswith("global"):
            return [], 1
        if kind == "inputlayer":
            return layer.before[:1], None if layer.before else 1
        return (layer.before[:1] if any(word in kind for word in (*_SAME, *_IMAGES)) else []), None

    def _flattened(self, layer: Layer) -> int | None:
        """Return `rows` for a layer that reads the output of this Flatten."""
        image = self._channels(layer.before[:1], 0)
        if image is None or image[0] <= 1:
            return None if image is None else 1
        channels, first, is_input = image
        if is_input:
            return None  # the layout of the model's input is up to its user in torch
        as_last = layer.config.get("data_format") == "channels_first"  # Flatten then flattens as channels_last
        if first:
            return channels if as_last else 1
        return None if as_last else channels

    def _channels(self, here: list[str], depth: int) -> _Image | None:
        """Return the image that a layer outputs."""
        return self._follow(here, self._images, lambda layer: self._image(layer, depth))

    def _image(self, layer: Layer, depth: int) -> tuple[list[str], _Image | None]:
        """Return the layer with the same image as this layer's output, or the image itself."""
        kind, config = layer.kind, layer.config
        first = config.get("data_format") == "channels_first" or config.get("dim_ordering") == "th"
        if kind in CONV:
            filters = config.get("filters", config.get("nb_filter"))
            return [], (filters, first, False) if isinstance(filters, int) else None
        if kind in DEPTHWISE and depth < _MAX_DEPTH:
            inner = self._channels(layer.before[:1], depth + 1)
            many = config.get("depth_multiplier", 1)
            return [], (inner[0] * many, first, False) if inner and isinstance(many, int) else None
        if kind == "concatenate" and depth < _MAX_DEPTH:
            parts = [self._channels([name], depth + 1) for name in layer.before]
            known = [part for part in parts if part]
            if len(known) < len(parts) or len({part[1:] for part in known}) != 1:
                return [], None
            channels = config.get("axis", -1) in ((1, -3) if known[0][1] else (-1, 3, 4))
            return [], (sum(part[0] for part in known), *known[0][1:]) if channels else None
        if kind in _SEQUENCES or kind.startswith("global"):
            return [], (0, False, False)
        if kind == "inputlayer" and not layer.before:
            shape: Any = config.get("batch_shape") or config.get("batch_input_shape") or ()
            size = shape[1 if first else -1] if len(shape) > 3 else 0
            return [], (size, first, True) if isinstance(size, int) else None
        if kind in _MODELS:
            return layer.ends[:1], None
        same = kind == "inputlayer" or any(word in kind for word in (*_SAME, *_IMAGES))
        return (layer.before[:1] if same else []), None


def hint(
    kind: str, leaf: str, shape: Sequence[int], config: Mapping[str, Any], rows: int | None = None
) -> str | None:
    """Return the layout of a variable by its layer's class; None if the class does not decide it."""
    found = _hint(kind, leaf, shape, config, rows)
    if found is None or fits(tuple(shape), found):
        return found
    return "dense" if len(shape) == 2 else None


def _hint(kind: str, leaf: str, shape: Sequence[int], config: Mapping[str, Any], rows: int | None) -> str | None:
    rank = len(shape)
    bias = leaf.endswith("bias") or leaf.endswith("_b")
    flat = "" if rows is None else f":{rows}"
    if leaf.startswith("depthwise") or kind in DEPTHWISE:
        return "depthwise" if rank >= 3 else "keep"
    if kind in TABLES:
        return "keep"
    if kind in CONV:
        return "keep" if rank < 3 or config.get("dim_ordering") == "th" else "conv"
    if kind in GRU and leaf in ("kernel", "recurrent_kernel", "bias") and shape and shape[-1] % 3 == 0:
        return "gru" if not bias else "gates:2" if kind == "cudnngru" else "gates"
    if kind in RECURRENT | GRU and rank == 2 and not bias:
        return f"dense{flat}" if leaf == "kernel" else "dense:1"
    if kind in ("dense", "timedistributeddense") and rank == 2:
        return f"dense{flat}"
    if kind == "einsumdense" and rank >= 2 and not bias:
        inputs, _, rest = str(config.get("equation", "")).partition(",")
        kernel, _, outputs = rest.partition("->")
        matrix = rank == 2 and len(kernel) == 2 and kernel[0] in inputs and kernel[1] in outputs
        return "dense:1" if matrix and kernel[1] not in inputs else "keep"
    if rank == 1 and rows is not None and rows > 1 and not known(kind) and not bias:
        return f"dense{flat}"  # an average or a scale between Flatten and Dense
    return None


def _named(nodes: Any) -> list[str]:
    """Return the layers in inbound_nodes or output_layers, in the form of Keras 3 or of earlier versions."""
    found: list[str] = []
    pending = [nodes]
    for _ in range(_MAX_LAYERS):
        if not pending:
            break
        here = pending.pop()
        if isinstance(here, dict):
            pending.extend(reversed(list(here.values())))
        elif isinstance(here, list):
            if len(here) >= 3 and isinstance(here[0], str) and all(isinstance(part, int) for part in here[1:3]):
                found.append(here[0])
            else:
                pending.extend(reversed(here))
    return list(dict.fromkeys(found))
