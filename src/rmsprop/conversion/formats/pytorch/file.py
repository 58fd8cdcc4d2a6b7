"""`.pt` and `.pth`: state dicts of torch, timm, Stable-Baselines3, bitsandbytes and Adam, with a model or not."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rmsprop import dialects
from rmsprop.conversion import pairing
from rmsprop.conversion.formats import archives
from rmsprop.conversion.formats.pytorch import legacy, sb3, states
from rmsprop.conversion.formats.pytorch.bnb import dequantize
from rmsprop.conversion.formats.pytorch.load import Arrays, load, refuse_code
from rmsprop.conversion.owner import UNKNOWN, Owner, find_owner, this_package
from rmsprop.conversion.record import Checkpoint, Unreadable
from rmsprop.conversion.turning import recorded
from rmsprop.printing import shown
from rmsprop.state import owners
from rmsprop.state.matching import bare, is_named, rekeyed

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".zip", ".tar")
_KNOWN = (
    *("step", "square_avg", "momentum_buffer", "grad_avg", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "compensation"),
)
_SHAPED = ("square_avg", "exp_avg_sq", "momentum_buffer", "grad_avg")
_QUANTIZED = "__bnb_optimizer_quant_state__"
_UNIVERSAL = (
    "its zero_to_fp32.py puts the parameters together, and its checkpoint.ds_to_universal the state of each as well"
)
# Settings of a group that say how a step runs, or belong to a scheduler.
_ASIDE = ("params", "param_names", "capturable", "foreach", "fused", "differentiable", "initial_lr", "dialect")
# Settings of this package beside every dialect's, with the values that say nothing: settings.CARE, without torch.
_OWN_CARE = {"rounding": "nearest", "compensation": False, "seed": 0, "max_update": None}


def sniff(path: Path) -> bool:
    """Whether it is a file of torch.save, an archive or from before torch 1.6, or one of Stable-Baselines3."""
    try:
        if not path.is_file():
            return False
        if archives.is_archive(path):
            with zipfile.ZipFile(path) as held:
                names = {name.rsplit("/", 1)[-1] for name in held.namelist()}
            return bool(names & {"data.pkl", "policy.pth", "policy.optimizer.pth"})
        return legacy.is_legacy(path)
    except (*archives.BROKEN, MemoryError):
        return False


def read(path: Path, optimizer: str | None = None, parameters: str | None = None) -> Checkpoint:
    """A checkpoint of torch.save, or of Stable-Baselines3's `model.save`.

    Args:
        optimizer, parameters: the places of the optimizer and of the model wanted, where the file holds several.
    Raises: Unreadable with one sentence; ValueError for a place that is not in the file.
    """
    try:
        with zipfile.ZipFile(path) as held:
            names = held.namelist()
    except archives.BROKEN:
        names = []
    if "policy.pth" in names:
        return understand(_read_sb3(path), path, optimizer, parameters, trained_by=sb3.optimizer_class(path))
    return understand(load(path), path, optimizer, parameters)


def _read_sb3(path: Path) -> dict[str, Any]:
    """Stable-Baselines3's zip: files of torch.save inside it, of the policy, its optimizers and other variables."""
    with archives.opened(path) as held, tempfile.TemporaryDirectory() as folder:
        archives.intact(held, path)
        found = {}
        for member in held.infolist():
            name = member.filename
            if name.endswith(".pth") and "/" not in name:
                part = Path(folder) / f"{path.name}.{name}"
                part.write_bytes(archives.content(held, member, path))
                found[name.removesuffix(".pth")] = load(part)
        return found


def understand(
    whole: Any,
    path: Path,
    optimizer: str | None = None,
    parameters: str | None = None,
    *,
    size: int = 0,
    ordered: bool = True,
    trained_by: str = "",
) -> Checkpoint:
    """Return what nested mappings and lists of state dicts hold.

    Args:
        trained_by: the optimizer's class, if the file names it.
    """
    found = states.survey(whole)
    arrays = Arrays(path)
    arrays.left += 4 * size
    one = states.optimizer(found, path, optimizer)
    if found.partition is not None:
        said = f"{shown(found.partition)} is one process's partition of DeepSpeed's ZeRO"
        if one is None:
            raise Unreadable(f"{path.name} holds no state of whole parameters: {said}; {_UNIVERSAL}")
        arrays._note(f"{said}: its state is flat, of all parameters together; {_UNIVERSAL}")
    if one is None:
        made_by_code = states.opaque(whole)
        for key in (key for key in made_by_code if "opt" in key):
            refuse_code(made_by_code[key], path)
        model, _ = states.model(found, path, parameters, None, (), ())
        if not model:
            for value in made_by_code.values():
                refuse_code(value, path)
            named = isinstance(whole, Mapping)
            kind = shown(list(whole)[:8], 160) if named else f"a {type(whole).__name__}"
            raise Unreadable(
                f"{path.name} holds neither a model's nor an optimizer's state dict, but {kind}; save "
                "{'model': model.state_dict(), 'optimizer': optimizer.state_dict()}"
            )
        return Checkpoint(params=_arrays(model, arrays), notes=arrays.notes)
    place, state_dict = one
    groups, state = _parts(state_dict, path)
    order = [key for group in groups for key in group["params"]]
    model, trained = states.model(found, path, parameters, place, _given_names(groups, order), _sizes(order, state))
    params = _arrays(model, arrays)
    shapes = {name: params[name].shape for name in trained}
    if not ordered and _given_names(groups, order) is order:
        shapes = _in_order(_sizes(order, state), shapes, arrays)
    names, numbers = _names(groups, state, shapes, path)
    owner, ask = _owner(groups, state, path, trained_by)
    turned = recorded(whole.get("turned")) if isinstance(whole, Mapping) else {}
    made = Checkpoint(owner=owner, ask=ask, params=params, notes=arrays.notes, turned=turned, tied=states.tied(model))
    made.numbers, made.trained = numbers, list(shapes) if numbers else []
    made.notes += [
        f"{shown(key)} is left out: only code can make it ({shown(value.name)})"
        for key, value in states.opaque(whole).items()
        if not params and key in states.MODELS
    ]
    counts = {key: {"step": group["step"]} for group in groups if "step" in group for key in group["params"]}
    for key in order:
        if state.get(key):
            entry = {**counts.get(key, {}), **state[key]}
            made.slots[names[key]] = _slots(owner.name, entry, names[key], arrays, path)
    made.groups = [
        ([names[key] for key in group["params"]], _hyper(owner.name, group, made, path)) for group in groups
    ]
    made.hyper = dict(made.groups[0][1])
    steps = {int(slots["step"]) for slots in made.slots.values() if "step" in slots}
    made.step = max(steps, default=None)
    if ask:
        made.owner = UNKNOWN
    if any("initial_lr" in group for group in groups):
        made.notes.append("initial_lr, a scheduler's note in the groups, is dropped: build the scheduler anew")
    if len(groups) == 1 and len(made.slots) == len(order):
        made.groups = []
        made.slots = {name: made.slots[name] for name in names.values() if name in made.slots}
    return made


def _arrays(model: Mapping[str, Any], arrays: Arrays) -> dict[str, Any]:
    """A model's tensors, without what a module keeps beside them."""
    kept = {name: value for name, value in model.items() if hasattr(value, "untyped_storage")}
    return {name: arrays.array(value, name) for name, value in kept.items()}


def _given_names(groups: list[dict[str, Any]], order: list[Any]) -> list[Any]:
    """What the groups call their parameters: names, or keys."""
    named = [group.get("param_names") for group in groups]
    flat = [name for names in named if isinstance(names, list) for name in names]
    return flat if len(flat) == len(order) else order


def _in_order(sizes: list[tuple[int, ...] | None], shapes: pairing.Shapes, arrays: Arrays) -> dict[str, Any]:
    """A model's parameters in the optimizer's order, where their shapes leave one way; {} where they do not."""
    names = {shape: name for name, shape in shapes.items()}
    if len(names) == len(shapes) and sorted(names) == sorted(size or () for size in sizes):
        return {names[size or ()]: size or () for size in sizes}
    if shapes:
        arrays._note(
            "the optimizer numbers its parameters and a safetensors file sorts its names, so which is which is not "
            "known: numbers are kept; --model with a state dict of the model gives the order"
        )
    return {}


def _sizes(order: list[Any], state: Mapping[Any, Any]) -> list[tuple[int, ...] | None]:
    """The shape of each parameter that has state."""
    kept = ([getattr(state.get(key, {}).get(slot), "shape", None) for slot in _SHAPED] for key in order)
    return [next((tuple(shape) for shape in shapes if shape is not None), None) for shapes in kept]


def _text(name: Any, path: Path) -> str:
    if not isinstance(name, str):
        raise Unreadable(f"{path.name} names a parameter {shown(name)}, which is no text")
    return name


def _parts(optimizer: Mapping[Any, Any], path: Path) -> tuple[list[dict[str, Any]], Mapping[Any, Any]]:
    """The groups and the state, each of the type that a state dict has."""
    groups, state = optimizer.get("param_groups"), optimizer.get("state")
    sound = isinstance(groups, (list, tuple)) and groups and isinstance(state, Mapping)
    for group in groups if sound and isinstance(groups, (list, tuple)) else ():
        sound = sound and isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple))
        sound = sound and all(isinstance(key, (int, str)) for key in group["params"])
    sound = sound and all(isinstance(entry, Mapping) for entry in (state or {}).values())
    if not sound or groups is None or state is None:
        raise Unreadable(
            f"{path.name} holds no sound optimizer state dict: it wants a list param_groups and a dict state"
        )
    try:
        state, lost = rekeyed(groups, state)
    except ValueError as error:
        raise Unreadable(f"{path.name}: {error}") from None
    if lost:
        raise Unreadable(
            f"{path.name} holds state under the key {shown(lost[0])}, which belongs to no parameter of its groups"
        )
    return [dict(group) for group in groups], state


def _names(
    groups: list[dict[str, Any]], state: Mapping[Any, Any], model: pairing.Shapes, path: Path
) -> tuple[dict[Any, str], list[list[str]]]:
    """Each parameter's name: what its group says, or the model's where there is one way, or its number.

    Args:
        model: the names and shapes of what may be trained.
    Returns: the names by key, and the numbers by group where these are the names.
    """
    order = [key for group in groups for key in group["params"]]
    named = [group.get("param_names") for group in groups]
    if all(
        isinstance(names, list) and len(names) == len(g["params"]) for names, g in zip(named, groups, strict=True)
    ):
        flat = [_text(name, path) for names in named if names is not None for name in names]
        if len(set(flat)) == len(flat):
            return dict(zip(order, flat, strict=True)), []
    if is_named(order, model):
        wrapped = {bare(name): name for name in model}
        found = {key: key if key in model else wrapped.get(bare(key), key) for key in order}
        return (found if len(set(found.values())) == len(found) else {key: key for key in order}), []
    numbers = [list(group["params"]) for group in groups]
    kept = {key: size for key, size in zip(order, _sizes(order, state), strict=True) if size is not None}
    several = pairing.ways(numbers, kept, model)
    if len(several) == 1:
        return {key: several[0][key] for key in order}, []
    return {key: str(key) for key in order}, [[str(key) for key in own] for own in numbers]


def _owner(groups: list[dict[str, Any]], state: Mapping[Any, Any], path: Path, trained_by: str) -> tuple[Owner, str]:
    """Whose state dict it is, by the names in it.

    Args:
        trained_by: the optimizer's class, if the file names it.
    Returns: what it is read as, and what the user is to say first, "" if nothing.
    Raises: Unreadable for an optimizer of whose state nothing carries over.
    """
    group, slots = groups[0], {str(name) for entry in state.values() for name in entry}
    if "dialect" in group:
        if not isinstance(group["dialect"], str) or group["dialect"] not in dialects.DIALECTS:
            raise Unreadable(f"{path.name} is of the dialect {shown(group['dialect'])}, which nobody knows")
        return this_package(dialects.find_dialect(group["dialect"])), ""
    other = owners.owner(slots, group)
    told = sb3.source(trained_by)
    if other is None:
        if trained_by and not told:
            ask = f"was trained by {shown(trained_by)}: add --from torch, or sb3 or timm if it is theirs"
            return find_owner("torch"), ask
        timm = {"lr_in_momentum", "decoupled_decay"} & set(group)
        return find_owner(told or ("timm" if timm else "torch")), ""
    if other.source or not slots:
        return find_owner(told if told in ("adam", "adamw") else other.source or "torch"), ""
    if told in ("adam", "adamw") and other.name.startswith("torch.optim.Adam or"):
        return find_owner(told), ""
    if other.options:
        return find_owner(other.options.split()[1]), f"holds the state of {other.name}: {other.advice}"
    kept = ", ".join(sorted(shown(name) for name in slots)[:6])
    name = "" if other.name.startswith("another") else f", {other.name}"
    raise Unreadable(
        f"{path.name} holds the state of another optimizer{name}, which keeps {kept}, where RMSprop keeps "
        f"square_avg: {other.advice}"
    )


def _slots(source: str, entry: Mapping[Any, Any], name: str, arrays: Arrays, path: Path) -> dict[str, Any]:
    """The state of one parameter under the framework's names."""
    if source == "bitsandbytes":
        inner = entry.get(_QUANTIZED, {})
        if not isinstance(inner, Mapping):
            raise Unreadable(f"{path.name}: the quantized state of {shown(name)} is no dict")
        entry = {**entry, **inner}
    found: dict[str, Any] = {}
    if "step" in entry:
        found["step"] = np.asarray(_count(entry["step"], name, arrays, path), dtype=np.int64)
    if source == "bitsandbytes":
        average = dequantize(entry, name, arrays, path)
        if (average < 0).any():
            raise Unreadable(f"{path.name}: state1 of {shown(name)} has negative elements: it is a momentum's")
        return {**found, "state1": average}
    if source in ("adam", "adamw") and "step" not in entry:
        raise Unreadable(
            f"{path.name}: the state of {shown(name)} counts no steps, by which Adam's averages are corrected"
        )
    lost = sorted(shown(name) for name in entry if name not in _KNOWN)
    if lost:
        arrays._note(f"{', '.join(lost[:6])} is dropped: RMSprop keeps nothing of the kind")
    if "max_exp_avg_sq" in entry:
        arrays._note("max_exp_avg_sq, AMSGrad's maximum, is dropped: RMSprop divides by the average itself")
    if "compensation" in entry:
        arrays._note(
            "compensation, what the rounding of half-precision parameters left over, is dropped: less than a unit in "
            "the last place of each"
        )
    for slot in ("square_avg", "momentum_buffer", "grad_avg", "exp_avg", "exp_avg_sq"):
        if entry.get(slot) is not None:
            found[slot] = arrays.array(entry[slot], f"{slot} of {name}")
    shapes = {value.shape for slot, value in found.items() if slot != "step"}
    if len(shapes) > 1:
        raise Unreadable(f"{path.name}: the state of {shown(name)} has several shapes, {sorted(shapes)[:3]}")
    return found


def _count(value: Any, name: str, arrays: Arrays, path: Path) -> int:
    if not isinstance(value, (int, float)):
        array = arrays.array(value, f"step of {name}")
        value = array.reshape(-1)[0].item() if array.size == 1 else None
    if not isinstance(value, (int, float)) or not 0 <= value < 2**53 or value != int(value):
        raise Unreadable(f"{path.name}: the step of {shown(name)} is no count: {shown(value)}")
    return int(value)


def _hyper(source: str, group: Mapping[str, Any], made: Checkpoint, path: Path) -> dict[str, Any]:
    """A group's settings in the framework's words, as plain numbers, switches and text."""
    kept = {str(name): _plain(value) for name, value in group.items() if name not in _ASIDE}
    odd = next((name for name, value in kept.items() if not _is_setting(value)), None)
    if odd is not None:
        raise Unreadable(
            f"{path.name}: the setting {shown(odd)} is {shown(kept[odd])}, and no number, switch, text or few numbers"
        )
    if "rho" in kept and "alpha" not in kept:  # Adadelta's, whose learning rate and eps stand elsewhere in its step
        return {"alpha": kept["rho"], "weight_decay": kept.get("weight_decay", 0), "momentum": 0, "centered": False}
    if source in ("adam", "adamw", "bitsandbytes"):
        betas = kept.get("betas")
        if not isinstance(betas, tuple) or len(betas) < 2 or not all(isinstance(b, (int, float)) for b in betas):
            raise Unreadable(f"{path.name}: betas is {shown(betas)}, and no pair of numbers")
        kept["alpha"] = betas[0] if source == "bitsandbytes" else betas[1]
        if source == "bitsandbytes" and betas[1]:
            made.notes.append(f"momentum={betas[1]:g} is dropped: bitsandbytes takes it and never reads it")
        wanted = {"lr", "alpha", "eps", "weight_decay", "maximize"}
        return {name: value for name, value in kept.items() if name in wanted}
    lost = [f"{name}={kept[name]!r}" for name, plain in _OWN_CARE.items() if kept.get(name, plain) != plain]
    if lost:
        made.notes.append(f"{', '.join(lost)} is dropped: give it to the optimizer that goes on")
    return kept


def _is_setting(value: Any) -> bool:
    """Whether a value is small and plain, so that it can be hashed, compared and printed."""
    if isinstance(value, tuple):
        return len(value) <= 8 and all(isinstance(item, float) or type(item) is int for item in value)
    if isinstance(value, str):
        return len(value) <= 1000
    return value is None or isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 1024)


def _plain(value: Any) -> Any:
    """A tensor of one element as a number, a list as a tuple."""
    if hasattr(value, "numel") and value.numel() == 1 and value.layout is not None and value.device.type == "cpu":
        return value.item()
    return tuple(value) if isinstance(value, list) else value
