"""Conversion of a checkpoint file: reads it, plans names and layouts, converts the state, and writes the result."""

from __future__ import annotations

import functools
import glob
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rmsprop import dialects
from rmsprop.conversion import averages, pairing
from rmsprop.conversion import layout as layouts
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
# The formats that store the number of steps even if the framework's rule does not need it.
_COUNTS = ("keras", "keras weights", "keras hdf5")


@dataclass
class Conversion:
    """The result of a conversion, before it is written.

    Attributes:
        source: the name of the source's owner.
        target: "rmsprop" or the name of a dialect.
        moves: the new name and layout of each parameter.
        checkpoint: the converted checkpoint.
        template: a file of the model to write for.
    """

    source: str
    target: str
    moves: list[Move]
    checkpoint: Checkpoint
    report: ConversionReport = field(default_factory=ConversionReport)
    template: Path | None = None


def recognize(path: Path) -> Format:
    """Return the format of a file. Raises: Unreadable if the file does not exist or its format is unknown."""
    if not path.exists() and not list(path.parent.glob(f"{glob.escape(path.name)}.*")):
        raise Unreadable(f"there is no file {str(path)!r}")
    for row in FORMATS:
        if row.sniff(path):
            return row
    known = ", ".join(f"{row.name} ({' '.join(row.suffixes)})" for row in FORMATS if row.suffixes)
    raise Unreadable(
        explain(path)
        or f"{path.name} is not a format that this package reads, or its beginning is damaged; it reads {known}"
    )


def read_checkpoint(
    path: Path,
    source: str | None = None,
    given: Mapping[str, Any] | None = None,
    *,
    optimizer: str | None = None,
    parameters: str | None = None,
) -> Checkpoint:
    """Read a checkpoint of any format.

    Args:
        source: the name of the owner; it overrides the owner that the file identifies.
        given: settings under the source's names, from which some formats infer their slots.
        optimizer: the path of the optimizer in a file that holds several, such as "optimizers[0]".
        parameters: the path of its model in a file that holds several.
    Raises: Unreadable in one sentence; ValueError for a source that does not fit the state.
    """
    row = recognize(path)
    chosen = {"optimizer": optimizer, "parameters": parameters}
    if not row.chooses and any(place is not None for place in chosen.values()):
        options = " ".join(f"--{name} {shown(place)}" for name, place in chosen.items() if place is not None)
        raise ValueError(
            f"{options} chooses among the contents of a torch.save file; {path.name}, in the format {row.name}, has "
            "only one"
        )
    checkpoint = row.read(path, given) if row.asks else row.read(path, **chosen) if row.chooses else row.read(path)
    if source is not None and source != checkpoint.owner.name:
        identified, checkpoint.owner = checkpoint.owner.name, find_owner(source)
        expected = checkpoint.states
        unknown = [slot for slots in checkpoint.slots.values() for slot in slots if slot not in expected]
        if identified and unknown:
            raise ValueError(
                f"--from {source} does not fit {path.name}: its slots are {', '.join(expected)}, and the file holds "
                f"{', '.join(dict.fromkeys(unknown))}, a state of {identified}"
            )
    if checkpoint.slots and checkpoint.owner.row is None:
        ask = checkpoint.ask or "does not identify its framework; name it with --from, such as --from optax"
        raise ValueError(f"{path.name} {ask}")
    if checkpoint.slots:
        _check(checkpoint, path)
    return checkpoint


def _check(checkpoint: Checkpoint, path: Path) -> None:
    """Validate slot names, shapes and numbers. Raises: Unreadable for the first that is not valid."""
    row, states = checkpoint.row, checkpoint.states
    settings = [item for _, hyper in [*checkpoint.groups, ([], checkpoint.hyper)] for item in hyper.items()]
    for name, value in settings:
        if isinstance(value, int) and value.bit_length() > 1023:
            raise Unreadable(f"{path.name}: {shown(name)} is an integer of {value.bit_length()} bits, beyond a float")
    if checkpoint.step is not None and not 0 <= checkpoint.step < 2**53:
        raise Unreadable(f"{path.name} has a step count of {shown(checkpoint.step)}, which is not possible")
    for name, slots in checkpoint.slots.items():
        unknown = next((slot for slot in slots if slot not in states), None)
        if unknown is not None:
            raise Unreadable(
                f"{path.name}: the state of {shown(name)} holds {shown(unknown)}; the slots of {row.name} are "
                f"{', '.join(row.states)}"
            )
        if "square_avg" not in {states[slot] for slot in slots}:
            raise Unreadable(
                f"{path.name}: the state of {shown(name)} holds {', '.join(slots)} and no average of squares"
            )
        own = {slot: value for slot, value in slots.items() if states[slot] != "step"}
        coded = next((slot for slot, value in own.items() if value.dtype == np.uint8), None)
        if coded is not None:
            raise Unreadable(
                f"{path.name}: {coded} of {shown(name)} is uint8, codes whose numbers the file does not show"
            )
        shapes = {value.shape for value in own.values()}
        shapes |= {checkpoint.params[name].shape} if name in checkpoint.params else set()
        if len(shapes) > 1:
            raise Unreadable(
                f"{path.name}: {shown(name)} and its state have different shapes, {shown(sorted(shapes)[:3], 100)}"
            )


def refuse_stateless(checkpoint: Checkpoint, path: Path, what: str) -> None:
    """Refuse a checkpoint without optimizer state. Raises: Unreadable with what the file holds instead."""
    if checkpoint.slots:
        return
    content = "parameters and no optimizer state"
    if checkpoint.groups or checkpoint.hyper:
        content = "an optimizer that has not taken a step, so it has no state"
    raise Unreadable(f"{path.name} holds {content}; there is nothing to {what}")


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
        source: the name of the owner, as in `read_checkpoint`.
        given: settings under the source's names, which override the file's.
        model: a file with the target's names and shapes.
        mapping: the user's renames and transposes.
        layout: "torch" for torch's kernels and names, "keep" for the file's.
        out: the format to write; None means `.pt`.
        optimizer, parameters: paths of the optimizer and the model in a file that holds several.
        match: "order" if parameters that names and shapes do not distinguish follow the model's order, "number" to
            keep their numbers.
    Raises: Unreadable, ValueError or TypeError, in one sentence.
    """
    checkpoint = read_checkpoint(path, source, given, optimizer=optimizer, parameters=parameters)
    refuse_stateless(checkpoint, path, "convert")
    report = ConversionReport(assumed=list(checkpoint.notes))
    if target != "rmsprop":
        dialects.find_dialect(target)
    shapes = None
    if model is not None:
        row = recognize(model)
        known = {name: checkpoint.hyper[name] for name in ("momentum", "centered", "ema") if name in checkpoint.hyper}
        other = row.read(model, known) if row.asks else row.read(model)
        shapes = {name: tuple(value.shape) for name, value in other.params.items()}
        if not shapes:
            raise Unreadable(f"{model.name} holds no parameters; --model takes a model's state dict")
        if not checkpoint.params and layout == "torch":
            report.assumed.append(f"the parameters are those of {model.name}, since {path.name} holds none")
    if checkpoint.numbers:
        mapping = mapping or Map()
        trained = pairing.without_buffers(
            shapes or {name: checkpoint.params[name].shape for name in checkpoint.trained}
        )
        checkpoint, renames = pairing.with_names(
            checkpoint, trained, mapping.rename, match, report, required=shapes is not None
        )
        mapping = Map(dict(renames), mapping.transpose)
    averages.attach(checkpoint, path, report)
    groups = resolve_settings(checkpoint, given or {}, report)
    if target == "rmsprop" and out is not None and out.name not in _KEEPS_OURS:
        target = groups[0][1]["dialect"]
    layout = _layout(layout, checkpoint, target, out)
    shapes = None if checkpoint.numbers else shapes
    moves = layouts.plan(checkpoint, layout, mapping, shapes, other.kinds if model is not None else None, match)
    report.assumed += layouts.doubts(checkpoint, moves, layout)
    made = _convert(checkpoint, groups, moves, target, out, given or {}, report)
    if model is not None and not checkpoint.params:
        made.params = dict(other.params)
    template = model if out is not None and out.template and model is not None else None
    return Conversion(checkpoint.owner.name, target, moves, made, report, template)


def _layout(layout: str, checkpoint: Checkpoint, target: str, out: Format | None) -> str:
    """Return the layout to convert kernels to: "torch", "tensorflow", or "keep" for no conversion."""
    to_tensorflow = out is not None and out.name not in _KEEPS_OURS and target in layouts.AS_TENSORFLOW
    if layout == "keep" or not to_tensorflow:
        return layout
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
    """Return the checkpoint in the target's names, units and layouts."""
    to_torch_file = out is None or out.name == "torch"
    ours = target == "rmsprop" or (to_torch_file and target not in WRITTEN)
    row = dialects.find_dialect(groups[0][1]["dialect"] if target == "rmsprop" else target)
    keras = out is not None and out.name in _COUNTS and row.name == "keras3"
    made = Checkpoint(this_package(row) if ours else Owner(row), step=checkpoint.step, numbers=checkpoint.numbers)
    by_name = {move.source: move for move in moves}
    for i, (names, group) in enumerate(groups):
        settings = _rate(group, checkpoint.owner.name, given, report)
        end_settings = settings if target == "rmsprop" else target_settings(settings, target, report)
        end_settings = {**end_settings, "ema": None, **averages.kept(settings, ours, keras, report)}
        start, end = Side(checkpoint.row, settings, frozenset(("alpha",))), Side(made.row, end_settings)
        for name in names:
            if name in checkpoint.slots:
                move, state = by_name[name], checkpoint.state(name)
                turned = {slot: move.turned(value) if value.ndim else value for slot, value in state.items()}
                made.slots[move.target] = between(turned, start, end, group["lr"], checkpoint.step, report)
        kept = _group(end_settings) if ours or to_torch_file else target_arguments(end_settings, row.name)
        members = set(names)
        order = [move.target for move in moves if move.source in members]
        if checkpoint.numbers:
            order = checkpoint.numbers[i]
        elif len(order) < len(names):  # parameters with neither state nor value have no move
            order = [by_name[name].target if name in by_name else name for name in names]
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
    averages.finish(checkpoint, made, by_name, ours or keras, report)
    _report_stateless(checkpoint, report)
    return made


def _report_stateless(checkpoint: Checkpoint, report: ConversionReport) -> None:
    """Report the model's tensors without state, and the reason as far as the file shows it."""
    listed = [name for names, _ in checkpoint.groups for name in names] or list(checkpoint.slots)
    fresh = [name for name in listed if name not in checkpoint.slots]
    outside = [name for name in checkpoint.params if name not in set(listed) and name not in checkpoint.tied]
    if fresh:
        report.assumed.append(f"{_named(fresh, 'parameter')} in the optimizer without state, as if new")
    if checkpoint.numbers:  # pairing has reported what they mean
        return
    strange = [name for name in listed if name not in checkpoint.params]
    if checkpoint.params and strange:
        report.assumed.append(f"{_named(strange, 'name')} in the state and not in the model")
    elif outside:
        report.assumed.append(
            f"{_named(outside, 'tensor')} not in the optimizer: frozen, buffers, or trained by another one"
        )
    for second, first in checkpoint.tied.items():
        if first not in listed:
            continue
        report.assumed.append(f"{shown(second)} is {shown(first)} under another name, and shares its state")


def _named(names: list[str], what: str) -> str:
    """Return a count with the first names, and the verb: 3 parameters (a, b, c) are."""
    one = len(names) == 1
    listed = ", ".join(shown(name) for name in names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} {what}{'' if one else 's'} ({listed}) {'is' if one else 'are'}"


def _rate(
    settings: dict[str, Any], source: str, given: Mapping[str, Any], report: ConversionReport
) -> dict[str, Any]:
    """Return the settings with the learning rate for a momentum buffer that was made of Adam's first moment."""
    if source not in ("adam", "adamw") or settings["momentum"] == 0 or "lr" in given:
        return settings
    share, lr = 1 - settings["momentum"], settings["lr"]
    report.approximate.append(f"lr is {share:g} of Adam's {lr:g}, since momentum sums its directions")
    return {**settings, "lr": lr * share}


def _group(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter group of rmsprop.RMSprop with all its settings."""
    from rmsprop.settings import TORCH_GROUP, check

    return check({**TORCH_GROUP, **settings})


def write(conversion: Conversion, out: Path, *, force: bool = False, also_not: Path | None = None) -> Path:
    """Write the converted checkpoint to a temporary file and rename it to `out`.

    Args:
        force: replace `out` if it exists.
        also_not: the input, which is never written to.
    Raises: ValueError if `out` is the input, exists without `force`, or has a format that is not written.
    """
    row = writer(out)
    inputs = [] if also_not is None else [also_not, *_siblings(also_not)]
    if out.exists() and any(file.exists() and out.samefile(file) for file in inputs):
        raise ValueError(f"{out} is the input, which is never changed; name another file")
    if out.exists() and not force:
        raise ValueError(f"{out} exists; name another file, or add --force to replace it")
    save = row.write
    assert save is not None
    if row.template and conversion.template is not None:
        save = functools.partial(save, template=conversion.template)
    try:
        return write_whole(out, lambda part: save(part, conversion.checkpoint))
    except UnicodeEncodeError as error:
        raise ValueError(f"{shown(error.object)} is not text that a {row.name} file can hold; write a .pt") from error


def _siblings(path: Path) -> list[Path]:
    """Return the files of a folder, or of a TensorFlow checkpoint that is given by its prefix or its index."""
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
