"""Plans the target name and layout of every parameter.

TensorFlow, Keras and Flax store convolution kernels as HWIO and dense kernels as (in, out); torch stores OIHW and
(out, in). The averages and the momentum of a parameter are transposed like the parameter.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rmsprop.conversion.layers import by_name
from rmsprop.conversion.pairing import BUFFERS, check_order
from rmsprop.conversion.record import Array, Checkpoint, Unreadable
from rmsprop.conversion.turning import KINDS, Shape, fits, is_kind, split, turn, turn_back, turned_shape
from rmsprop.state.matching import bare

AS_TENSORFLOW = ("tensorflow1", "keras1", "keras2", "keras3", "sonnet2", "optax", "jax")
# Frameworks with torch's layouts and names, where no name is changed.
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


@dataclass
class Map:
    """The tables of a map.toml, by the file's names.

    Attributes:
        rename: the new name.
        transpose: the permutation of axes, or the kind of layout.
    """

    rename: dict[str, str] = field(default_factory=dict)
    transpose: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Move:
    """The conversion of one parameter.

    Attributes:
        source: the name in the file.
        target: the name in the target.
        kind: the kind of layout (turning.py) that the array is converted from, or to if `back`.
        axes: the permutation of axes, which overrides `kind`.
        shape: the shape in the target.
        why: the reason, for the user.
        back: whether the array is converted from torch's layout to TensorFlow's.
    """

    source: str
    target: str
    kind: str
    axes: tuple[int, ...] | None
    shape: tuple[int, ...]
    why: str
    back: bool = False

    def turned(self, value: Array) -> Array:
        """Return an array of this parameter in the target's layout."""
        if self.axes is not None or not self.back:
            return turn(value, self.kind, self.axes)
        return turn_back(value, self.kind)

    def __str__(self) -> str:
        turned = f"axes {', '.join(map(str, self.axes))}" if self.axes else self.kind
        return f"{self.source} -> {self.target}  {tuple(self.shape)}  {turned}, {self.why}"


def read_map(path: Path) -> Map:
    """Read a map.toml. Raises: Unreadable if the file is not a valid map."""
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
        if not listed and not is_kind(axes):
            raise Unreadable(
                f'{path.name}: [transpose] "{name}" takes a permutation such as [3, 2, 0, 1], or one of {KINDS}, or '
                f'"dense:64" for the rows of a flattened image with 64 channels; not {axes!r}'
            )
    return made


def kind_of(checkpoint: Checkpoint, name: str, shape: Shape) -> str:
    """Return the kind of a parameter's layout, from the reader or else from the name."""
    if name in checkpoint.turned:
        return "keep"
    if name in checkpoint.kinds:
        return checkpoint.kinds[name]
    if checkpoint.owner.ours or checkpoint.owner.name in _AS_TORCH:
        return "keep"
    return by_name(name, shape)


def torch_name(name: str) -> str:
    """Return torch's form of a name: conv.weight for conv/kernel:0."""
    parts = re.sub(r":\d+$", "", name).replace("/", ".").split(".")
    return ".".join([*parts[:-1], _LEAVES.get(parts[-1], parts[-1])])


def plan(
    checkpoint: Checkpoint,
    layout: str = "torch",
    mapping: Map | None = None,
    model: Mapping[str, tuple[int, ...]] | None = None,
    kinds: Mapping[str, str] | None = None,
    match: str | None = None,
) -> list[Move]:
    """Plan the conversion of every parameter, in the order of the model if given, else of the file.

    Args:
        layout: "torch" converts kernels and names to torch's, "tensorflow" converts kernels to TensorFlow's, "keep"
            converts neither.
        mapping: a map.toml, which overrides names and kinds.
        model: the target's names and shapes. They are matched by name or, if not all names match, by order.
        kinds: the layouts of the model's arrays, for "tensorflow".
        match: "order" if the file's order is the model's although it is sorted as text.
    Raises: ValueError, in one sentence, for a parameter that does not fit.
    """
    mapping = mapping or Map()
    shapes = {name: value.shape for name, value in checkpoint.params.items()}
    for name, slots in checkpoint.slots.items():
        shapes.setdefault(name, next((a.shape for a in slots.values() if a.ndim), ()))
    for table, entries in (("rename", mapping.rename), ("transpose", mapping.transpose)):
        for name in entries:
            if name not in shapes:
                raise ValueError(
                    f'the map\'s [{table}] names "{name}", which the file does not hold; it has '
                    f"{', '.join(list(shapes)[:8])}{', ...' if len(shapes) > 8 else ''}"
                )
    given = list(mapping.rename.values())
    if len(set(given)) < len(given):
        twice = next(name for name in given if given.count(name) > 1)
        raise ValueError(
            f"two parameters would both be named {twice!r} by the map's [rename]; give them different names"
        )
    moves = [_move(checkpoint, name, shape, layout, mapping) for name, shape in shapes.items()]
    if model is not None:
        moves = _to_model(moves, model, match)
    if layout == "tensorflow":
        moves = [
            move
            if move.source in mapping.transpose
            else _to_tensorflow(checkpoint, move, (kinds or {}).get(move.target), (model or {}).get(move.target))
            for move in moves
        ]
    if model is not None:
        _check_shapes(moves, model)
    names = [move.target for move in moves]
    doubled = {name for name, times in Counter(names).items() if times > 1}
    if doubled:
        keep = [
            m if m.target not in doubled else _named(m, m.source, "name kept, since two would be equal")
            for m in moves
        ]
        moves = keep if model is None else moves
        if len({m.target for m in moves}) < len(moves):
            raise ValueError(
                f"two parameters would both be named {min(doubled)!r}; give them different names in a map's [rename]"
            )
    return moves


def record(checkpoint: Checkpoint, moves: list[Move]) -> dict[str, Any]:
    """Return how each array was converted to torch's layout: a kind or a list of axes, for the conversion back."""
    if any(move.back for move in moves):
        return {}
    if checkpoint.owner.name not in AS_TENSORFLOW and not checkpoint.turned:
        return {}
    found: dict[str, Any] = {}
    for move in moves:
        if move.source in checkpoint.turned and move.kind == "keep" and move.axes is None:
            found[move.target] = checkpoint.turned[move.source]
        elif move.axes is not None:
            found[move.target] = list(move.axes)
        else:
            many = checkpoint.params[move.source].shape[-1:] if move.source in checkpoint.params else ()
            found[move.target] = (
                f"depthwise:{many[0]}" if move.kind == "depthwise" and many and many[0] else move.kind
            )
    return found


def doubts(checkpoint: Checkpoint, moves: list[Move], layout: str) -> list[str]:
    """Return sentences on arrays converted beyond a transpose, and on arrays whose layout is uncertain."""
    if layout == "keep" or (layout == "torch" and (checkpoint.turned or checkpoint.owner.name not in AS_TENSORFLOW)):
        return []
    flat = [m for m in moves if m.axes is None and split(m.kind)[0] == "dense" and split(m.kind)[1] > 1]
    sentences = [
        f"the rows of {_few([m.source for m in flat if split(m.kind)[1] == channels])} are of a flattened image "
        f"with {channels} channels; they are reordered between (height, width, channel) there and "
        "(channel, height, width) in torch"
        for channels in dict.fromkeys(split(m.kind)[1] for m in flat)
    ]
    gates = [m.source for m in moves if m.axes is None and split(m.kind)[0] in ("gru", "gates")]
    if gates:
        sentences.append(f"the gates of {_few(gates)} are reordered between z, r, h there and r, z, n in torch")
    before = [m.source for m in moves if m.kind == "gates" and len(m.shape) == 1]
    if before:
        sentences.append(
            f"{_few(before)} is the only bias of a GRU that applies its reset gate before the recurrent matrix "
            "(reset_after=False); torch's GRU has two biases and applies the gate after it, so results differ"
        )
    if layout == "tensorflow":
        guessed = [m.source for m in moves if m.why.endswith("by its name") and len(m.shape) > 1]
        if guessed:
            sentences.append(
                f"the axes of {_few(guessed)} are transposed by name, since neither the file nor a --model gives "
                "their layout; give [transpose] in a map.toml if that is wrong"
            )
        return sentences
    left = [
        m.source
        for m in moves
        if len(m.shape) > 1
        and m.kind == "keep"
        and m.axes is None
        and m.why != "by map"
        and "embedding" not in m.source.lower()
    ]
    if left:
        sentences.append(
            f"{_few(left)} keep the file's layout, since their layer is unknown; if torch's layout differs, give "
            "[transpose] in a map.toml"
        )
    return sentences + _flattened(moves)


def _flattened(moves: list[Move]) -> list[str]:
    """Return a sentence on a dense kernel after a convolution, where no graph shows the layers between them."""
    channels = 0
    for move in moves:
        base, number = split(move.kind)
        if base in ("conv", "depthwise") and move.axes is None:
            channels = move.shape[0]
        elif base == "dense" and len(move.shape) == 2 and channels:
            if number == 0 and channels > 1 and move.shape[1] != channels and move.shape[1] % channels == 0:
                return [
                    f"{move.source} has {move.shape[1]} rows, after a convolution with {channels} channels; if they "
                    "are those of a flattened image, in the order (height, width, channel), torch's Flatten needs "
                    f'(channel, height, width): give [transpose] "{move.source}" = "dense:{channels}" in a map.toml'
                ]
            return []
    return []


def _few(names: list[str]) -> str:
    """Return the first four names, and how many more there are."""
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"


def _named(move: Move, target: str, why: str) -> Move:
    return replace(move, target=target, why=why)


def _move(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], layout: str, mapping: Map) -> Move:
    """Plan the conversion of one parameter, without a model."""
    given, back = mapping.transpose.get(name), layout == "tensorflow"
    axes = tuple(given) if isinstance(given, list) else None
    if axes is not None and len(axes) != len(shape):
        raise ValueError(
            f'the map\'s [transpose] "{name}" lists {len(axes)} axes; it has {len(shape)}, shape {shape}'
        )
    kind = "keep"
    if isinstance(given, str):
        kind = given
    elif layout != "keep" and axes is None:
        kind = "keep" if back else kind_of(checkpoint, name, shape)  # _to_tensorflow decides after the model is known
    if not fits(turned_shape(shape, kind, None, True) if back else shape, kind):
        raise ValueError(
            f"{name} of shape {shape} cannot be converted as {kind!r}; give its axes in the [transpose] of a map.toml"
        )
    renamed = layout == "torch" and not (checkpoint.owner.ours or checkpoint.owner.name in _NAMED_AS_TORCH)
    target = mapping.rename.get(name) or (torch_name(name) if renamed else name)
    why = "by map" if name in mapping.rename or name in mapping.transpose else "by rule"
    return Move(name, target, kind, axes, turned_shape(shape, kind, axes, back), why, back)


def _kind_back(name: str, ndim: int) -> str:
    """Return the kind of a torch parameter's layout in TensorFlow, by its name."""
    leaf, lower = name.rsplit(".", 1)[-1], name.lower()
    if leaf not in ("weight", "W") or ndim < 2 or "emb" in lower or "table" in lower:
        return "keep"
    return "dense" if ndim == 2 else "depthwise" if "depthwise" in lower else "conv"


def _to_tensorflow(checkpoint: Checkpoint, move: Move, kind: str | None, shape: Shape | None) -> Move:
    """Return the move to TensorFlow's layout, by the file's record, or else the model, or else the name.

    Args:
        kind, shape: the layout and the shape of the target in the model.
    """
    size = (checkpoint.params[move.source] if move.source in checkpoint.params else _array(checkpoint, move)).shape
    was = checkpoint.turned.get(move.source, kind)
    why = move.why if was is not None else f"{move.why}, its layout by its name"
    axes = tuple(np.argsort(was).tolist()) if isinstance(was, list) else None
    kind = "keep" if axes else was if isinstance(was, str) else _kind_back(move.source, len(size))
    if axes is not None and len(axes) != len(size):
        raise ValueError(f"the file's record of {move.source} has {len(axes)} axes, and its shape is {size}")
    if kind == "depthwise" and shape is not None and len(shape) == len(size):
        kind = f"depthwise:{shape[-1]}" if shape[-1] else kind
    made = turned_shape(size, kind, axes, True)
    if not fits(made, kind) or (kind.startswith("depthwise") and np.prod(made) != np.prod(size)):
        raise ValueError(f"{move.source} of shape {size} cannot be converted to {move.target} as {kind!r}")
    return replace(move, kind=kind, axes=axes, shape=made, why=why)


def _array(checkpoint: Checkpoint, move: Move) -> Array:
    return next((a for a in checkpoint.slots[move.source].values() if a.ndim), np.empty(()))


def _to_model(moves: list[Move], model: Mapping[str, tuple[int, ...]], match: str | None = None) -> list[Move]:
    """Return the moves with the model's names, in the model's order."""
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
        unwrapped = {bare(name): name for name in places}
        owners = [m.target if m.target in model else unwrapped.get(bare(m.target), "") for m in moves]
        fixed = {name: m for name, m in zip(owners, moves, strict=True) if name in places}
        left = [m for name, m in zip(owners, moves, strict=True) if fixed.get(name) is not m]
        if match != "order":
            there = [tuple(model[name]) for name in places if name not in fixed]
            check_order([move.source for move in left], [tuple(move.shape) for move in left], there)
        rest = iter(left)
        found = [
            _named(m, name, m.why) if (m := fixed.get(name)) else _named(next(rest), name, "by order")
            for name in places
        ]
    return found


def _check_shapes(moves: list[Move], model: Mapping[str, Shape]) -> None:
    """Compare every shape with the model's. Raises: ValueError for the first that differs."""
    for move in moves:
        if tuple(model[move.target]) != move.shape:
            raise ValueError(
                f"{move.source} would become {move.target} with shape {move.shape}, and the model's has "
                f"{tuple(model[move.target])}; give its name ([rename]) or its axes ([transpose]) in a map.toml"
            )
