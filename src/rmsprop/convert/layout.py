"""Names and layouts: which parameter becomes which, and how its axes turn.

TensorFlow, Keras and Flax keep kernels of convolutions as HWIO and of dense layers as (in, out); torch keeps OIHW and
(out, in). A momentum buffer or an average turns as its parameter does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rmsprop.convert.record import OWN, Array, Checkpoint, Unreadable

AS_TENSORFLOW = ("tensorflow1", "keras1", "keras2", "keras3", "sonnet2", "optax", "jax")
KINDS = ("conv", "depthwise", "dense", "keep")
# Frameworks that keep their kernels as torch does: a name proves nothing there.
_NAMED_AS_TORCH = ("torch", "timm", "sb3", "bitsandbytes", "heavyball", "adam", "adamw")
_AS_TORCH = (
    *_NAMED_AS_TORCH,
    *("torch7", "mxnet1", "mxnet2", "chainer", "chainer_graves", "caffe", "caffe2", "mindspore"),
)
_LEAVES = {
    **dict.fromkeys(("kernel", "depthwise_kernel", "weights", "w", "W", "gamma", "scale", "embeddings"), "weight"),
    **dict.fromkeys(("embedding", "embedding_table", "depthwise_weights", "weight"), "weight"),
    **dict.fromkeys(("biases", "b", "beta", "bias"), "bias"),
    **dict.fromkeys(("moving_mean", "mean"), "running_mean"),
    **dict.fromkeys(("moving_variance", "var"), "running_var"),
}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class Map:
    """What a map.toml says: `[rename]` names by the file's, `[transpose]` axes (or a kind) by the file's names."""

    rename: dict[str, str] = field(default_factory=dict)
    transpose: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Move:
    """Where one parameter goes: its name there, how its axes turn, and its shape there."""

    source: str
    target: str
    kind: str
    axes: tuple[int, ...] | None
    shape: tuple[int, ...]
    why: str
    back: bool = False

    def turned(self, value: Array) -> Array:
        """An array of this parameter in the target's layout."""
        if self.axes is not None or not self.back:
            return turn(value, self.kind, self.axes)
        return turn_back(value, self.kind)

    def __str__(self) -> str:
        turned = f"axes {', '.join(map(str, self.axes))}" if self.axes else self.kind
        return f"{self.source} -> {self.target}  {tuple(self.shape)}  {turned}, {self.why}"


def read_map(path: Path) -> Map:
    """Read a map.toml. Raises: Unreadable in one sentence for what is no such file."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ModuleNotFoundError:
            raise Unreadable("map.toml needs tomli on Python 3.10: pip install 'rmsprop[convert]'") from None
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise Unreadable(f"{path.name} cannot be read as TOML: {error}") from error
    unknown = set(tables) - {"rename", "transpose"}
    if unknown or not all(isinstance(table, dict) for table in tables.values()):
        raise Unreadable(
            f"{path.name} holds {', '.join(sorted(tables))}; a map has the tables [rename] and [transpose]"
        )
    made = Map(tables.get("rename", {}), tables.get("transpose", {}))
    for name, new in made.rename.items():
        if not isinstance(new, str):
            raise Unreadable(f'{path.name}: [rename] "{name}" takes a name in quotes, not {new!r}')
    for name, axes in made.transpose.items():
        listed = isinstance(axes, list) and sorted(map(str, axes)) == sorted(map(str, range(len(axes))))
        if not listed and axes not in KINDS:
            raise Unreadable(
                f'{path.name}: [transpose] "{name}" takes a permutation such as [3, 2, 0, 1], or one of {KINDS}; '
                f"not {axes!r}"
            )
    return made


def kind_of(checkpoint: Checkpoint, name: str, ndim: int) -> str:
    """How a parameter lies: what the reader said, else what its name says."""
    if name in checkpoint.kinds:
        return checkpoint.kinds[name]
    if checkpoint.source in _AS_TORCH or checkpoint.source.startswith(OWN):
        return "keep"
    leaf = re.sub(r":\d+$", "", name).replace(".", "/").rsplit("/", 1)[-1]
    if leaf.startswith("depthwise") and ndim == 4:
        return "depthwise"
    if leaf in ("kernel", "weights", "pointwise_kernel", "recurrent_kernel") and ndim >= 2:
        return "dense" if ndim == 2 else "conv"
    return "keep"


def turn(value: Array, kind: str, axes: Sequence[int] | None = None) -> Array:
    """An array from the source's layout to torch's; `axes` stand over the kind."""
    if axes is not None:
        return np.ascontiguousarray(value.transpose(axes))
    if kind == "dense" and value.ndim == 2:
        return np.ascontiguousarray(value.T)
    if kind == "conv" and value.ndim >= 3:
        return np.ascontiguousarray(value.transpose(value.ndim - 1, value.ndim - 2, *range(value.ndim - 2)))
    if kind == "depthwise" and value.ndim == 4:
        height, width, channels, multiplier = value.shape
        return np.ascontiguousarray(value.transpose(2, 3, 0, 1)).reshape(channels * multiplier, 1, height, width)
    return value


def turn_back(value: Array, kind: str, channels: int = 0) -> Array:
    """The inverse of `turn`: from torch's layout to TensorFlow's. `channels`: a depthwise kernel's inputs."""
    if kind == "dense" and value.ndim == 2:
        return np.ascontiguousarray(value.T)
    if kind == "conv" and value.ndim >= 3:
        return np.ascontiguousarray(value.transpose(*range(2, value.ndim), 1, 0))
    if kind == "depthwise" and value.ndim == 4:
        filters, _, height, width = value.shape
        channels = channels or filters
        return np.ascontiguousarray(value.reshape(channels, filters // channels, height, width).transpose(2, 3, 0, 1))
    return value


def torch_name(name: str) -> str:
    """A name as torch would write it: conv/kernel:0 is conv.weight."""
    parts = re.sub(r":\d+$", "", name).replace("/", ".").split(".")
    return ".".join([*parts[:-1], _LEAVES.get(parts[-1], parts[-1])])


def plan(
    checkpoint: Checkpoint,
    layout: str = "torch",
    chart: Map | None = None,
    model: Mapping[str, tuple[int, ...]] | None = None,
) -> list[Move]:
    """Where every parameter of a checkpoint goes, in the order of the model if there is one, else of the file.

    Args:
        layout: "torch" turns kernels and names to torch's, "keep" leaves both.
        chart: a map.toml, which stands over what names and kinds say.
        model: the target's names and shapes: matched by name, or if not all names match, by order.
    Raises: ValueError, in one sentence, for what does not fit.
    """
    chart = chart or Map()
    shapes = {name: value.shape for name, value in checkpoint.params.items()}
    for name, slots in checkpoint.slots.items():
        shapes.setdefault(name, next((a.shape for a in slots.values() if a.ndim), ()))
    for table, entries in (("rename", chart.rename), ("transpose", chart.transpose)):
        for name in entries:
            if name not in shapes:
                raise ValueError(
                    f'the map\'s [{table}] names "{name}", which the file does not hold: it has '
                    f"{', '.join(list(shapes)[:8])}{', ...' if len(shapes) > 8 else ''}"
                )
    given = list(chart.rename.values())
    if len(set(given)) < len(given):
        twice = next(name for name in given if given.count(name) > 1)
        raise ValueError(f"two parameters would both be named {twice!r} by the map's [rename]; name them apart")
    moves = [_move(checkpoint, name, shape, layout, chart) for name, shape in shapes.items()]
    if model is not None:
        moves = _to_model(moves, model, chart)
    names = [move.target for move in moves]
    doubled = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if doubled:
        keep = [
            m if m.target not in doubled else _named(m, m.source, "name kept, since two would be one") for m in moves
        ]
        moves = keep if model is None else moves
        if len({m.target for m in moves}) < len(moves):
            raise ValueError(
                f"two parameters would both be named {min(doubled)!r}; name them apart in the map's [rename]"
            )
    return moves


def _named(move: Move, target: str, why: str) -> Move:
    return replace(move, target=target, why=why)


def _move(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], layout: str, chart: Map) -> Move:
    """Where a parameter goes before a model is looked at."""
    said, back = chart.transpose.get(name), layout == "tensorflow"
    axes = tuple(said) if isinstance(said, list) else None
    if axes is not None and len(axes) != len(shape):
        raise ValueError(
            f'the map\'s [transpose] "{name}" lists {len(axes)} axes; it has {len(shape)}, shape {shape}'
        )
    kind = "keep"
    if isinstance(said, str):
        kind = said
    elif layout != "keep" and axes is None:
        kind = (_kind_back if back else kind_of)(checkpoint, name, len(shape))
    renamed = layout == "torch" and checkpoint.source not in _NAMED_AS_TORCH and not checkpoint.source.startswith(OWN)
    target = chart.rename.get(name) or (torch_name(name) if renamed else name)
    why = "by map" if name in chart.rename or name in chart.transpose else "by rule"
    return Move(name, target, kind, axes, _turned_shape(shape, kind, axes, back), why, back)


def _kind_back(checkpoint: Checkpoint, name: str, ndim: int) -> str:
    """How a parameter of torch's lies in TensorFlow: what the reader said, else what its name says."""
    if name in checkpoint.kinds:
        return checkpoint.kinds[name]
    leaf, lower = name.rsplit(".", 1)[-1], name.lower()
    if leaf not in ("weight", "W") or ndim < 2 or "emb" in lower or "table" in lower:
        return "keep"
    return "dense" if ndim == 2 else "depthwise" if "depthwise" in lower else "conv"


def _turned_shape(
    shape: tuple[int, ...], kind: str, axes: Sequence[int] | None, back: bool = False
) -> tuple[int, ...]:
    """The shape that `turn` or `turn_back` gives, without turning anything."""
    if axes is not None:
        return tuple(shape[axis] for axis in axes)
    if back and kind == "conv" and len(shape) >= 3:
        return (*shape[2:], shape[1], shape[0])
    if back and kind == "depthwise" and len(shape) == 4:
        return (shape[2], shape[3], shape[0], 1)
    if kind == "dense" and len(shape) == 2:
        return shape[::-1]
    if kind == "conv" and len(shape) >= 3:
        return (shape[-1], shape[-2], *shape[:-2])
    if kind == "depthwise" and len(shape) == 4:
        return (shape[2] * shape[3], 1, shape[0], shape[1])
    return tuple(shape)


def _to_model(moves: list[Move], model: Mapping[str, tuple[int, ...]], chart: Map) -> list[Move]:
    """The moves under the model's names, in its order."""
    by_name = {move.target: move for move in moves}
    if set(by_name) <= set(model) and len(by_name) == len(moves):
        found = [_named(by_name[name], name, by_name[name].why) for name in model if name in by_name]
    else:
        places = [name for name in model if name.rsplit(".", 1)[-1] not in BUFFERS]
        places = places if len(places) == len(moves) else list(model)
        if len(places) != len(moves):
            lost = [move.target for move in moves if move.target not in model]
            raise ValueError(
                f"the file has {len(moves)} parameters and the model {len(places)}, and {len(lost)} names do not "
                f"match ({', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}); rename them in a map.toml"
            )
        fixed = {
            chart.rename[m.source]: m for m in moves if m.source in chart.rename and chart.rename[m.source] in model
        }
        rest = iter([m for m in moves if m not in fixed.values()])
        found = [
            _named(m, name, "by map") if (m := fixed.get(name)) else _named(next(rest), name, "by order")
            for name in places
        ]
    for move in found:
        if tuple(model[move.target]) != move.shape:
            raise ValueError(
                f"{move.source} would become {move.target} with shape {move.shape}, and the model's has "
                f"{tuple(model[move.target])}; say in a map.toml what it is ([rename]) or how its axes turn "
                "([transpose])"
            )
    return found
