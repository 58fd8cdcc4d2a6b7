"""A checkpoint file from one framework to another: read, planned, converted, written beside and renamed."""

from __future__ import annotations

import functools
import glob
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmsprop import dialects
from rmsprop.conversion import layout as layouts
from rmsprop.conversion import pairing
from rmsprop.conversion.formats import FORMATS
from rmsprop.conversion.formats.pytorch.write import WRITTEN
from rmsprop.conversion.formats.unknown import explain
from rmsprop.conversion.layout import Map, Move
from rmsprop.conversion.owner import Owner, find_owner, this_package
from rmsprop.conversion.record import Checkpoint, ConversionReport, Format, Unreadable
from rmsprop.conversion.settings import resolve_settings, target_arguments, target_settings
from rmsprop.conversion.state import Side, between
from rmsprop.files import write_whole
from rmsprop.printing import shown

# The formats that hold this package's own state as well as a framework's.
_KEEPS_OURS = ("torch", "safetensors")
# The formats that count the steps beside the state, whether or not the framework's rule needs the count.
_COUNTS = ("keras", "keras weights", "keras hdf5")


@dataclass
class Conversion:
    """A conversion that is ready to be written: nothing has been written yet."""

    source: str
    target: str
    moves: list[Move]
    checkpoint: Checkpoint
    report: ConversionReport = field(default_factory=ConversionReport)
    template: Path | None = None


def recognise(path: Path) -> Format:
    """The format of a file. Raises: Unreadable if there is no file, or of no known format."""
    if not path.exists() and not list(path.parent.glob(f"{glob.escape(path.name)}.*")):
        raise Unreadable(f"there is no file {str(path)!r}")
    for row in FORMATS:
        if row.sniff(path):
            return row
    known = ", ".join(f"{row.name} ({' '.join(row.suffixes)})" for row in FORMATS if row.suffixes)
    raise Unreadable(
        explain(path)
        or f"{path.name} is of no format that is read here, or its beginning is damaged; there are {known}"
    )


def read_checkpoint(
    path: Path,
    source: str | None = None,
    given: Mapping[str, Any] | None = None,
    *,
    optimizer: str | None = None,
    parameters: str | None = None,
) -> Checkpoint:
    """A checkpoint of any format, with `source` in place of what the file says of its framework.

    Args:
        given: settings in the source's words, which tell some formats what their states are.
        optimizer: the place of the optimizer wanted in a file that holds several, such as "optimizers[0]".
        parameters: the place of the model that goes with it.
    Raises: Unreadable in one sentence; ValueError for a source that does not fit the state.
    """
    row = recognise(path)
    chosen = {"optimizer": optimizer, "parameters": parameters}
    if not row.chooses and any(place is not None for place in chosen.values()):
        said = " ".join(f"--{word} {shown(place)}" for word, place in chosen.items() if place is not None)
        raise ValueError(
            f"{said} chooses among what a file of torch.save holds; {path.name} is {row.name}, and has one"
        )
    checkpoint = row.read(path, given) if row.asks else row.read(path, **chosen) if row.chooses else row.read(path)
    if source is not None and source != checkpoint.owner.name:
        said, checkpoint.owner = checkpoint.owner.name, find_owner(source)
        kept = checkpoint.row.states
        odd = [slot for slots in checkpoint.slots.values() for slot in slots if slot not in kept]
        if said and odd:
            raise ValueError(
                f"--from {source} does not fit {path.name}: it keeps {', '.join(kept)}, and the file holds "
                f"{', '.join(dict.fromkeys(odd))}, as {said} does"
            )
    if checkpoint.slots and checkpoint.owner.row is None:
        ask = checkpoint.ask or "does not say whose state it holds; say it with --from, such as --from optax"
        raise ValueError(f"{path.name} {ask}")
    if checkpoint.slots:
        _check(checkpoint, path)
    return checkpoint


def _check(checkpoint: Checkpoint, path: Path) -> None:
    """Slots that the framework has, of their parameters' shapes, and numbers that are ones. Raises: Unreadable."""
    row = checkpoint.row
    settings = [item for _, hyper in [*checkpoint.groups, ([], checkpoint.hyper)] for item in hyper.items()]
    for word, value in settings:
        if isinstance(value, int) and value.bit_length() > 1023:
            raise Unreadable(f"{path.name}: {shown(word)} is an integer of {value.bit_length()} bits, beyond a float")
    if checkpoint.step is not None and not 0 <= checkpoint.step < 2**53:
        raise Unreadable(f"{path.name} counts {shown(checkpoint.step)} steps, which no run takes")
    for name, slots in checkpoint.slots.items():
        unknown = next((slot for slot in slots if slot not in row.states), None)
        if unknown is not None:
            raise Unreadable(
                f"{path.name}: the state of {shown(name)} holds {shown(unknown)}; {row.name} keeps "
                f"{', '.join(row.states)}"
            )
        if "square_avg" not in {row.states[slot] for slot in slots}:
            raise Unreadable(
                f"{path.name}: the state of {shown(name)} holds {', '.join(slots)} and no average of squares"
            )
        shapes = {value.shape for slot, value in slots.items() if row.states[slot] != "step"}
        shapes |= {checkpoint.params[name].shape} if name in checkpoint.params else set()
        if len(shapes) > 1:
            raise Unreadable(
                f"{path.name}: {shown(name)} and its state have several shapes, {shown(sorted(shapes)[:3], 100)}"
            )


def refuse_stateless(checkpoint: Checkpoint, path: Path, what: str) -> None:
    """Refuse a checkpoint without state, by what it holds in its place. Raises: Unreadable."""
    if checkpoint.slots:
        return
    kept = "parameters and no optimizer state"
    if checkpoint.groups or checkpoint.hyper:
        kept = "an optimizer that has not taken a step, so it has no state"
    raise Unreadable(f"{path.name} holds {kept}; there is nothing to {what}")


def prepare(
    path: Path,
    target: str = "rmsprop",
    *,
    source: str | None = None,
    given: Mapping[str, Any] | None = None,
    model: Path | None = None,
    mapping: Map | None = None,
    layout: str = "torch",
    out: Format | None = None,
    optimizer: str | None = None,
    parameters: str | None = None,
    match: str | None = None,
) -> Conversion:
    """Read a checkpoint and convert it, without writing anything.

    Args:
        target: "rmsprop" for this package's RMSprop in the source's dialect, or a dialect's name.
        given: settings in the source's words that stand over the file's.
        model: a file with the target's names and shapes.
        mapping: renames and transposes by hand.
        out: the format to write; None stands for `.pt`.
        optimizer, parameters: which optimizer and which model of a file that holds several, by their places.
        match: "order" where parameters that cannot be told apart follow the model's order, "number" to keep numbers.
    Raises: Unreadable, ValueError or TypeError, in one sentence.
    """
    checkpoint = read_checkpoint(path, source, given, optimizer=optimizer, parameters=parameters)
    refuse_stateless(checkpoint, path, "convert")
    report = ConversionReport(assumed=list(checkpoint.notes))
    if target != "rmsprop":
        dialects.find_dialect(target)
    shapes = None
    if model is not None:
        row = recognise(model)
        told = {word: checkpoint.hyper[word] for word in ("momentum", "centered") if word in checkpoint.hyper}
        other = row.read(model, told) if row.asks else row.read(model)
        shapes = {name: tuple(value.shape) for name, value in other.params.items()}
        if not shapes:
            raise Unreadable(f"{model.name} holds no parameters; --model wants a model's state dict")
        if not checkpoint.params and layout == "torch":
            report.assumed.append(f"the model's values are those of {model.name}, since {path.name} holds none")
    if checkpoint.numbers:
        mapping = mapping or Map()
        own = pairing.without_buffers(shapes or {name: checkpoint.params[name].shape for name in checkpoint.trained})
        checkpoint, rename = pairing.with_names(
            checkpoint, own, mapping.rename, match, report, required=shapes is not None
        )
        mapping = Map(dict(rename), mapping.transpose)
    groups = resolve_settings(checkpoint, given or {}, report)
    if target == "rmsprop" and out is not None and out.name not in _KEEPS_OURS:
        target = groups[0][1]["dialect"]
    way = _layout(layout, checkpoint, target, out)
    shapes = None if checkpoint.numbers else shapes
    moves = layouts.plan(checkpoint, way, mapping, shapes, other.kinds if model is not None else None, match)
    report.assumed += layouts.doubts(checkpoint, moves, way)
    made = _convert(checkpoint, groups, moves, target, out, given or {}, report)
    if model is not None and not checkpoint.params:
        made.params = dict(other.params)
    template = model if out is not None and out.template and model is not None else None
    return Conversion(checkpoint.owner.name, target, moves, made, report, template)


def _layout(asked: str, checkpoint: Checkpoint, target: str, out: Format | None) -> str:
    """Which way kernels turn: to torch's layout, to TensorFlow's, or neither."""
    turned = out is not None and out.name not in _KEEPS_OURS and target in layouts.AS_TENSORFLOW
    if asked == "keep" or not turned:
        return asked
    return "keep" if checkpoint.owner.name in layouts.AS_TENSORFLOW and not checkpoint.turned else "tensorflow"


def _convert(
    checkpoint: Checkpoint,
    groups: list[tuple[list[str], dict[str, Any]]],
    moves: list[Move],
    target: str,
    out: Format | None,
    given: Mapping[str, Any],
    report: ConversionReport,
) -> Checkpoint:
    """The checkpoint in the target's names, units and layouts."""
    start_row = checkpoint.row
    by_torch = out is None or out.name == "torch"
    ours = target == "rmsprop" or (by_torch and target not in WRITTEN)
    dialect = groups[0][1]["dialect"] if target == "rmsprop" else target
    row = dialects.find_dialect(dialect)
    made = Checkpoint(this_package(row) if ours else Owner(row), step=checkpoint.step, numbers=checkpoint.numbers)
    place = {move.source: move for move in moves}
    for i, (names, own) in enumerate(groups):
        settings = _rate(own, checkpoint.owner.name, given, report)
        end_settings = settings if target == "rmsprop" else target_settings(settings, target, report)
        start = Side(start_row, settings, frozenset(("alpha",)))
        for name in names:
            if name in checkpoint.slots:
                slots = {start_row.states[slot]: value for slot, value in checkpoint.slots[name].items()}
                move = place[name]
                turned = {slot: move.turned(value) if value.ndim else value for slot, value in slots.items()}
                made.slots[move.target] = between(
                    turned, start, Side(made.row, end_settings), own["lr"], checkpoint.step, report
                )
        kept = _group(end_settings) if ours or by_torch else target_arguments(end_settings, row.name)
        own_names = set(names)
        order = (
            checkpoint.numbers[i]
            if checkpoint.numbers
            else [move.target for move in moves if move.source in own_names]
        )
        if len(order) < len(names):  # without state or value: there is nothing to move
            order = [place[name].target if name in place else name for name in names]
        made.groups.append((order, kept))
    if out is not None and out.name in _COUNTS and made.step is not None:
        report.dropped = [sentence for sentence in report.dropped if not sentence.startswith("step: ")]
    made.hyper = dict(made.groups[0][1])
    order = [move.target for move in moves if move.target in made.slots]
    made.slots = {name: made.slots[name] for name in order}
    made.params = {m.target: m.turned(checkpoint.params[m.source]) for m in moves if m.source in checkpoint.params}
    made.kinds = {m.target: m.kind for m in moves if m.back}
    made.kinds |= {
        m.target: checkpoint.kinds[m.source] for m in moves if m.kind == "keep" and m.source in checkpoint.kinds
    }
    made.turned = layouts.record(checkpoint, moves)
    _say_idle(checkpoint, report)
    return made


def _say_idle(checkpoint: Checkpoint, report: ConversionReport) -> None:
    """ConversionReport which of the model's tensors have no state, and why, as far as the file says."""
    listed = [name for names, _ in checkpoint.groups for name in names] or list(checkpoint.slots)
    fresh = [name for name in listed if name not in checkpoint.slots]
    outside = [name for name in checkpoint.params if name not in set(listed) and name not in checkpoint.tied]
    if fresh:
        report.assumed.append(f"{_named(fresh, 'parameter')} in the optimizer without state, as if new")
    if checkpoint.numbers:  # pairing has said what that means
        return
    strange = [name for name in listed if name not in checkpoint.params]
    if checkpoint.params and strange:
        report.assumed.append(f"{_named(strange, 'name')} the state's, and not the model's")
    elif outside:
        report.assumed.append(
            f"{_named(outside, 'tensor')} not in the optimizer: frozen, buffers, or trained by another one"
        )
    for second, first in checkpoint.tied.items():
        if first not in listed:
            continue
        report.assumed.append(f"{shown(second)} is {shown(first)} under another name, whose state is both's")


def _named(names: list[str], what: str) -> str:
    """A count with the first names: 3 parameters (a, b, c) are."""
    one = len(names) == 1
    listed = ", ".join(shown(name) for name in names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} {what}{'' if one else 's'} ({listed}) {'is' if one else 'are'}"


def _rate(own: dict[str, Any], source: str, given: Mapping[str, Any], report: ConversionReport) -> dict[str, Any]:
    """The settings, with the learning rate that goes with a momentum made of Adam's first moment."""
    if source not in ("adam", "adamw") or own["momentum"] == 0 or "lr" in given:
        return own
    report.approximate.append(f"lr is {1 - own['momentum']:g} of Adam's {own['lr']:g}, which momentum adds up again")
    return {**own, "lr": own["lr"] * (1 - own["momentum"])}


def _group(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group of rmsprop.RMSprop: all its settings, and how a step runs by default."""
    from rmsprop.settings import TORCH_GROUP, check

    return check({**TORCH_GROUP, **settings})


def write(plan: Conversion, out: Path, *, force: bool = False, also_not: Path | None = None) -> Path:
    """Write a plan's checkpoint beside `out`, then rename.

    Args:
        also_not: the input, which is never written to.
    Raises: ValueError if `out` is the input, exists and is not forced, or is of a format that is not written.
    """
    row = writer(out)
    inputs = [] if also_not is None else [also_not, *_siblings(also_not)]
    if out.exists() and any(file.exists() and out.samefile(file) for file in inputs):
        raise ValueError(f"{out} is the input, which is never changed; name another file")
    if out.exists() and not force:
        raise ValueError(f"{out} exists; name another file, or add --force to replace it")
    save = row.write
    assert save is not None
    if row.template and plan.template is not None:
        save = functools.partial(save, template=plan.template)
    try:
        return write_whole(out, lambda part: save(part, plan.checkpoint))
    except UnicodeEncodeError as error:
        raise ValueError(f"{shown(error.object)} is not text that a {row.name} file can hold; write a .pt") from error


def _siblings(path: Path) -> list[Path]:
    """The files of a folder, or of a TensorFlow checkpoint that is given by its beginning or by its index."""
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    start = path.with_name(path.name.removesuffix(".index"))
    return [start.with_name(f"{start.name}.index"), *start.parent.glob(f"{glob.escape(start.name)}.data-*")]


def writer(out: Path) -> Format:
    """Return the format of a file's name. Raises: ValueError if that format is not written, or there is none."""
    named = [row for row in FORMATS if any(out.name.endswith(suffix) for suffix in row.suffixes)]
    for row in named:
        if row.write is not None:
            return row
    fault = f"{named[0].name} files are read and not written" if named else "no format with that name is written here"
    known = ", ".join(suffix for row in FORMATS if row.write is not None for suffix in row.suffixes)
    raise ValueError(f"{out.name}: {fault}; there are {known}")
