"""Names and layouts: which parameter becomes which, and how its axes turn.

TensorFlow, Keras and Flax keep kernels of convolutions as HWIO and of dense layers as (in, out); torch keeps OIHW and
(out, in). A momentum buffer or an average turns as its parameter does.
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
        if not listed and not is_kind(axes):
            raise Unreadable(
                f'{path.name}: [transpose] "{name}" takes a permutation such as [3, 2, 0, 1], or one of {KINDS}, or '
                f'"dense:64" for the rows of a flattened image of 64 channels; not {axes!r}'
            )
    return made


def kind_of(checkpoint: Checkpoint, name: str, shape: Shape) -> str:
    """How a parameter lies: what the reader said, else what its name says."""
    if name in checkpoint.turned:
        return "keep"
    if name in checkpoint.kinds:
        return checkpoint.kinds[name]
    if checkpoint.owner.ours or checkpoint.owner.name in _AS_TORCH:
        return "keep"
    return by_name(name, shape)


def torch_name(name: str) -> str:
    """A name as torch would write it: conv/kernel:0 is conv.weight."""
    parts = re.sub(r":\d+$", "", name).replace("/", ".").split(".")
    return ".".join([*parts[:-1], _LEAVES.get(parts[-1], parts[-1])])


def plan(
    checkpoint: Checkpoint,
    layout: str = "torch",
    chart: Map | None = None,
    model: Mapping[str, tuple[int, ...]] | None = None,
    kinds: Mapping[str, str] | None = None,
    match: str | None = None,
) -> list[Move]:
    """Where every parameter of a checkpoint goes, in the order of the model if there is one, else of the file.

    Args:
        layout: "torch" turns kernels and names to torch's, "keep" leaves both.
        chart: a map.toml, which stands over what names and kinds say.
        model: the target's names and shapes: matched by name, or if not all names match, by order.
        kinds: how the model's arrays lie, for those that turn back to TensorFlow's layout.
        match: "order" where the file's order is the model's although it looks sorted as text.
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
        moves = _to_model(moves, model, match)
    if layout == "tensorflow":
        moves = [
            move
            if move.source in chart.transpose
            else _laid_back(checkpoint, move, (kinds or {}).get(move.target), (model or {}).get(move.target))
            for move in moves
        ]
    if model is not None:
        _check_shapes(moves, model)
    names = [move.target for move in moves]
    doubled = {name for name, times in Counter(names).items() if times > 1}
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


def record(held: Checkpoint, moves: list[Move]) -> dict[str, Any]:
    """What each parameter of a converted checkpoint has been turned by, for the way back."""
    if any(move.back for move in moves):
        return {}
    if held.owner.name not in AS_TENSORFLOW and not held.turned:
        return {}
    found: dict[str, Any] = {}
    for move in moves:
        if move.source in held.turned and move.kind == "keep" and move.axes is None:
            found[move.target] = held.turned[move.source]
        elif move.axes is not None:
            found[move.target] = list(move.axes)
        else:
            many = held.params[move.source].shape[-1:] if move.source in held.params else ()
            found[move.target] = (
                f"depthwise:{many[0]}" if move.kind == "depthwise" and many and many[0] else move.kind
            )
    return found


def doubts(held: Checkpoint, moves: list[Move], layout: str) -> list[str]:
    """Sentences on what was turned beyond the axes, and on what may lie otherwise and is not known to."""
    if layout == "keep" or (layout == "torch" and (held.turned or held.owner.name not in AS_TENSORFLOW)):
        return []
    flat = [m for m in moves if m.axes is None and split(m.kind)[0] == "dense" and split(m.kind)[1] > 1]
    said = [
        f"the rows of {_few([m.source for m in flat if split(m.kind)[1] == channels])} are of a flattened image "
        f"of {channels} channels: (height, width, channel) there, (channel, height, width) in torch; they are turned"
        for channels in dict.fromkeys(split(m.kind)[1] for m in flat)
    ]
    gates = [m.source for m in moves if m.axes is None and split(m.kind)[0] in ("gru", "gates")]
    if gates:
        said.append(f"the gates of {_few(gates)} are in the order z, r, h there, r, z, n in torch; they are turned")
    before = [m.source for m in moves if m.kind == "gates" and len(m.shape) == 1]
    if before:
        said.append(
            f"{_few(before)} is one bias of a GRU, which applies its reset gate before the recurrent matrix "
            "(reset_after=False): torch's GRU has two and applies it after, so it does not compute the same"
        )
    if layout == "tensorflow":
        guessed = [m.source for m in moves if m.why.endswith("by its name") and len(m.shape) > 1]
        if guessed:
            said.append(
                f"the axes of {_few(guessed)} are turned as the name suggests, since neither the file nor a --model "
                "says how they lie there; give [transpose] in a map.toml where that is wrong"
            )
        return said
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
        said.append(
            f"{_few(left)} lie as in the file, since how they turn is not known; where torch keeps them otherwise, "
            "give [transpose] in a map.toml"
        )
    return said + _flattened(moves)


def _flattened(moves: list[Move]) -> list[str]:
    """A sentence for a dense kernel behind a convolution, where no graph says what lies between them."""
    channels = 0
    for move in moves:
        base, number = split(move.kind)
        if base in ("conv", "depthwise") and move.axes is None:
            channels = move.shape[0]
        elif base == "dense" and len(move.shape) == 2 and channels:
            if number == 0 and channels > 1 and move.shape[1] != channels and move.shape[1] % channels == 0:
                return [
                    f"{move.source} has {move.shape[1]} rows, after a convolution of {channels} channels: if they "
                    "are a flattened image, they are in the order (height, width, channel), where torch's Flatten "
                    f'gives (channel, height, width); then give [transpose] "{move.source}" = "dense:{channels}" '
                    "in a map.toml"
                ]
            return []
    return []


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"


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
        kind = "keep" if back else kind_of(checkpoint, name, shape)  # back: once the model is known
    if not fits(turned_shape(shape, kind, None, True) if back else shape, kind):
        raise ValueError(f"{name} of shape {shape} cannot turn as {kind!r} does; say how its axes turn in a map.toml")
    renamed = layout == "torch" and not (checkpoint.owner.ours or checkpoint.owner.name in _NAMED_AS_TORCH)
    target = chart.rename.get(name) or (torch_name(name) if renamed else name)
    why = "by map" if name in chart.rename or name in chart.transpose else "by rule"
    return Move(name, target, kind, axes, turned_shape(shape, kind, axes, back), why, back)


def _kind_back(name: str, ndim: int) -> str:
    """How a parameter of torch's lies in TensorFlow, by its name alone."""
    leaf, lower = name.rsplit(".", 1)[-1], name.lower()
    if leaf not in ("weight", "W") or ndim < 2 or "emb" in lower or "table" in lower:
        return "keep"
    return "dense" if ndim == 2 else "depthwise" if "depthwise" in lower else "conv"


def _laid_back(checkpoint: Checkpoint, move: Move, kind: str | None, shape: Shape | None) -> Move:
    """A move to TensorFlow's layout: by what the file's record says, else by the model, else by the name.

    Args:
        kind, shape: what the model says of the target.
    """
    size = (checkpoint.params[move.source] if move.source in checkpoint.params else _array(checkpoint, move)).shape
    was = checkpoint.turned.get(move.source, kind)
    why = move.why if was is not None else f"{move.why}, its layout by its name"
    axes = tuple(np.argsort(was).tolist()) if isinstance(was, list) else None
    kind = "keep" if axes else was if isinstance(was, str) else _kind_back(move.source, len(size))
    if axes is not None and len(axes) != len(size):
        raise ValueError(f"the file says that {move.source} was turned by {len(axes)} axes; its shape is {size}")
    if kind == "depthwise" and shape is not None and len(shape) == len(size):
        kind = f"depthwise:{shape[-1]}" if shape[-1] else kind
    made = turned_shape(size, kind, axes, True)
    if not fits(made, kind) or (kind.startswith("depthwise") and np.prod(made) != np.prod(size)):
        raise ValueError(f"{move.source} of shape {size} does not turn to {move.target} as {kind!r} does")
    return replace(move, kind=kind, axes=axes, shape=made, why=why)


def _array(checkpoint: Checkpoint, move: Move) -> Array:
    return next((a for a in checkpoint.slots[move.source].values() if a.ndim), np.empty(()))


def _to_model(moves: list[Move], model: Mapping[str, tuple[int, ...]], match: str | None = None) -> list[Move]:
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
    """Raises: ValueError for a parameter whose shape is not the model's."""
    for move in moves:
        if tuple(model[move.target]) != move.shape:
            raise ValueError(
                f"{move.source} would become {move.target} with shape {move.shape}, and the model's has "
                f"{tuple(model[move.target])}; say in a map.toml what it is ([rename]) or how its axes turn "
                "([transpose])"
            )
