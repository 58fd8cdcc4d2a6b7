"""Reads state dicts of torch, timm, Stable-Baselines3, bitsandbytes and Adam from `.pt` and `.pth` files."""

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
from rmsprop.spec import AVERAGING, CARE
from rmsprop.state import owners
from rmsprop.state.matching import bare, is_named, rekeyed

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".zip", ".tar")
_KNOWN = (
    *("step", "square_avg", "momentum_buffer", "grad_avg", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "compensation"),
    "ema",
)
_TIMM_AVERAGES = "state_dict_ema"
_SHAPED = ("square_avg", "exp_avg_sq", "momentum_buffer", "grad_avg")
_QUANTIZED = "__bnb_optimizer_quant_state__"
_UNIVERSAL = (
    "DeepSpeed's zero_to_fp32.py assembles the parameters, and its checkpoint.ds_to_universal also each one's state"
)
# Group keys that select how a step runs, or belong to a scheduler.
_ASIDE = ("params", "param_names", "capturable", "foreach", "fused", "differentiable", "initial_lr", "dialect")
# Settings that only this package has, each with the value that has no effect. An average of the weights is converted.
_OWN_CARE = {name: plain for name, plain in CARE.items() if name not in AVERAGING}


def sniff(path: Path) -> bool:
    """Return whether the file was written by torch.save, in either of its two formats, or by Stable-Baselines3."""
    try:
        if not path.is_file():
            return False
        if archives.is_archive(path):
            with zipfile.ZipFile(path) as archive:
                names = {name.rsplit("/", 1)[-1] for name in archive.namelist()}
            return bool(names & {"data.pkl", "policy.pth", "policy.optimizer.pth"})
        return legacy.is_legacy(path)
    except (*archives.BROKEN, MemoryError):
        return False


def read(path: Path, optimizer: str | None = None, parameters: str | None = None) -> Checkpoint:
    """Read a checkpoint of torch.save, or of Stable-Baselines3's `model.save`.

    Args:
        optimizer, parameters: the paths of the optimizer and of the model to read, if the file holds several.
    Raises: Unreadable with one sentence; ValueError if the file does not contain the given path.
    """
    if _is_sb3(path):
        return understand(_read_sb3(path), path, optimizer, parameters, trained_by=sb3.optimizer_class(path))
    return understand(load(path), path, optimizer, parameters)


def outline(path: Path) -> Any:
    """Return the saved value, with tensors whose numbers have not been read. Raises: Unreadable."""
    return _read_sb3(path) if _is_sb3(path) else load(path, checksums=False)


def _is_sb3(path: Path) -> bool:
    """Return whether a file is an archive of Stable-Baselines3's `model.save`."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "policy.pth" in archive.namelist()
    except archives.BROKEN:
        return False


def _read_sb3(path: Path) -> dict[str, Any]:
    """Load the torch.save files in a Stable-Baselines3 zip: the policy, its optimizers and other variables."""
    with archives.opened(path) as archive, tempfile.TemporaryDirectory() as folder:
        archives.intact(archive, path)
        parts = {}
        for member in archive.infolist():
            name = member.filename
            if name.endswith(".pth") and "/" not in name:
                part = Path(folder) / f"{path.name}.{name}"
                part.write_bytes(archives.content(archive, member, path))
                parts[name.removesuffix(".pth")] = load(part)
        return parts


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
    """Build a Checkpoint from nested mappings and lists that contain state dicts.

    Args:
        size: the total size of the files in bytes, if `path` is a folder.
        ordered: whether the model's parameters are stored in the model's order.
        trained_by: the optimizer's class, if the file names it.
    """
    found = states.survey(whole)
    arrays = Arrays(path)
    arrays.left += 4 * size
    one = states.optimizer(found, path, optimizer)
    if found.partition is not None:
        partition = f"{shown(found.partition)} is one process's partition of DeepSpeed's ZeRO"
        if one is None:
            raise Unreadable(f"{path.name} holds no state of whole parameters: {partition}; {_UNIVERSAL}")
        arrays._note(f"{partition}: its state is one flat array for all parameters; {_UNIVERSAL}")
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
        f"{shown(key)} is skipped: loading it would run code ({shown(value.name)})"
        for key, value in states.opaque(whole).items()
        if not params and key in states.MODELS
    ]
    counts = {key: {"step": group["step"]} for group in groups if "step" in group for key in group["params"]}
    precisions = {key: group.get("state_dtype", "float32") for group in groups for key in group["params"]}
    for key in order:
        if state.get(key):
            entry = {**counts.get(key, {}), **state[key]}
            slots = _slots(owner.name, entry, names[key], arrays, path)
            if "square_avg" in slots:
                slots["square_avg"] = _decoded(slots["square_avg"], precisions[key], names[key], arrays, path)
            made.slots[names[key]] = slots
    decay: dict[str, float | str] = {}
    if parameters != _TIMM_AVERAGES:
        made.averages, decay = _timm_averages(whole, params, arrays)
    buffers = state_dict.get("ema_buffers")
    if isinstance(buffers, Mapping):
        made.averages = _arrays({name: x for name, x in buffers.items() if isinstance(name, str)}, arrays)
    made.groups = [
        ([names[key] for key in group["params"]], {**_hyper(owner.name, group, made, path), **decay})
        for group in groups
    ]
    made.hyper = dict(made.groups[0][1])
    steps = {int(slots["step"]) for slots in made.slots.values() if "step" in slots}
    made.step = max(steps, default=None)
    if ask:
        made.owner = UNKNOWN
    if any("initial_lr" in group for group in groups):
        made.notes.append(
            "initial_lr, which a scheduler stores in the groups, is dropped: create the scheduler again"
        )
    if len(groups) == 1 and len(made.slots) == len(order):
        made.groups = []
        made.slots = {name: made.slots[name] for name in names.values() if name in made.slots}
    return made


def _timm_averages(
    whole: Any, params: Mapping[str, Any], arrays: Arrays
) -> tuple[dict[str, Any], dict[str, float | str]]:
    """Return the averages in timm's state_dict_ema by the names of the parameters, and the settings of its run."""
    found = whole.get(_TIMM_AVERAGES) if isinstance(whole, Mapping) else None
    if not isinstance(found, Mapping) or not params:
        return {}, {}
    names = {bare(name): name for name, value in params.items() if value.dtype.kind in "fc"}
    known = {
        names[bare(name)]: value for name, value in found.items() if isinstance(name, str) and bare(name) in names
    }
    arguments = getattr(whole.get("args"), "arguments", whole.get("args"))
    arguments = arguments if isinstance(arguments, Mapping) else {}
    settings: dict[str, float | str] = {}
    decay = arguments.get("model_ema_decay")
    if isinstance(decay, float) and 0 <= decay < 1:
        settings["ema"] = decay
        if arguments.get("model_ema_warmup") is True:
            settings["ema_warmup"] = "timm"
    return _arrays(known, arrays), settings


def _arrays(model: Mapping[str, Any], arrays: Arrays) -> dict[str, Any]:
    """Return a model's tensors as arrays, without a module's extra state."""
    tensors = {name: value for name, value in model.items() if hasattr(value, "untyped_storage")}
    return {name: arrays.array(value, name) for name, value in tensors.items()}


def _given_names(groups: list[dict[str, Any]], order: list[Any]) -> list[Any]:
    """Return the parameter names in the groups, or the keys if the groups have no names."""
    named = [group.get("param_names") for group in groups]
    flat = [name for names in named if isinstance(names, list) for name in names]
    return flat if len(flat) == len(order) else order


def _in_order(sizes: list[tuple[int, ...] | None], shapes: pairing.Shapes, arrays: Arrays) -> dict[str, Any]:
    """Return a model's parameters in the optimizer's order, or {} if their shapes do not determine that order."""
    names = {shape: name for name, shape in shapes.items()}
    if len(names) == len(shapes) and sorted(names) == sorted(size or () for size in sizes):
        return {names[size or ()]: size or () for size in sizes}
    if shapes:
        arrays._note(
            "the optimizer numbers its parameters and a safetensors file sorts its names, so the state cannot be "
            "matched by order: numbers are kept; pass a state dict of the model with --model to give the order"
        )
    return {}


def _sizes(order: list[Any], state: Mapping[Any, Any]) -> list[tuple[int, ...] | None]:
    """Return each parameter's shape as its state shows it, or None for a parameter without state."""
    kept = ([getattr(state.get(key, {}).get(slot), "shape", None) for slot in _SHAPED] for key in order)
    return [next((tuple(shape) for shape in shapes if shape is not None), None) for shapes in kept]


def _text(name: Any, path: Path) -> str:
    if not isinstance(name, str):
        raise Unreadable(f"{path.name} names a parameter {shown(name)}, which is not a string")
    return name


def _parts(optimizer: Mapping[Any, Any], path: Path) -> tuple[list[dict[str, Any]], Mapping[Any, Any]]:
    """Validate an optimizer's state dict and return its groups and its state."""
    groups, state = optimizer.get("param_groups"), optimizer.get("state")
    sound = isinstance(groups, (list, tuple)) and groups and isinstance(state, Mapping)
    for group in groups if sound and isinstance(groups, (list, tuple)) else ():
        sound = sound and isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple))
        sound = sound and all(isinstance(key, (int, str)) for key in group["params"])
    sound = sound and all(isinstance(entry, Mapping) for entry in (state or {}).values())
    if not sound or groups is None or state is None:
        raise Unreadable(
            f"{path.name} holds no valid optimizer state dict: param_groups must be a list and state a dict"
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
    """Return each parameter's name: from its group, else from the only matching in the model, else its number.

    Args:
        model: the names and shapes of the parameters that may be trained.
    Returns: the names by key, and the numbers by group if the numbers are the names.
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
    """Identify the optimizer that wrote a state dict, by the names in it.

    Args:
        trained_by: the optimizer's class, if the file names it.
    Returns: the source to read it as, and what the user must specify first, or "".
    Raises: Unreadable for an optimizer whose state cannot be converted.
    """
    group, slots = groups[0], {str(name) for entry in state.values() for name in entry}
    if "dialect" in group:
        if not isinstance(group["dialect"], str) or group["dialect"] not in dialects.DIALECTS:
            raise Unreadable(f"{path.name} names the dialect {shown(group['dialect'])}, which does not exist")
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
    """Return the state of one parameter under the framework's names."""
    if source == "bitsandbytes":
        inner = entry.get(_QUANTIZED, {})
        if not isinstance(inner, Mapping):
            raise Unreadable(f"{path.name}: the quantized state of {shown(name)} is not a dict")
        entry = {**entry, **inner}
    found: dict[str, Any] = {}
    if "step" in entry:
        found["step"] = np.asarray(_count(entry["step"], name, arrays, path), dtype=np.int64)
    if source == "bitsandbytes":
        average = dequantize(entry, name, arrays, path)
        if (average < 0).any():
            raise Unreadable(f"{path.name}: state1 of {shown(name)} has negative elements: it is a momentum buffer")
        return {**found, "state1": average}
    if source in ("adam", "adamw") and "step" not in entry:
        raise Unreadable(f"{path.name}: the state of {shown(name)} has no step, which Adam's bias correction needs")
    lost = sorted(shown(name) for name in entry if name not in _KNOWN)
    if lost:
        arrays._note(f"{', '.join(lost[:6])} is dropped: RMSprop has no such state")
    if "max_exp_avg_sq" in entry:
        arrays._note("max_exp_avg_sq, AMSGrad's maximum, is dropped: RMSprop divides by the average itself")
    if "compensation" in entry:
        arrays._note(
            "compensation, the rounding error of half-precision parameters, is dropped: it is less than one unit in "
            "the last place of each element"
        )
    for slot in ("square_avg", "momentum_buffer", "grad_avg", "exp_avg", "exp_avg_sq", "ema"):
        if entry.get(slot) is not None:
            found[slot] = arrays.array(entry[slot], f"{slot} of {name}")
    shapes = {value.shape for slot, value in found.items() if slot != "step"}
    if len(shapes) > 1:
        raise Unreadable(f"{path.name}: the state of {shown(name)} has several shapes, {sorted(shapes)[:3]}")
    return found


def _decoded(value: Any, state_dtype: Any, name: str, arrays: Arrays, path: Path) -> Any:
    """Return the numbers of a `square_avg`, which this package keeps as codes under state_dtype="float8".

    Raises: Unreadable if its dtype is not that of the group's state_dtype.
    """
    coded, is_float8 = value.dtype == np.uint8, isinstance(state_dtype, str) and state_dtype == "float8"
    if coded != is_float8 and (coded or value.dtype in (np.float32, np.float16)):
        kept = "uint8, the codes of state_dtype='float8'" if coded else f"{value.dtype} and not uint8"
        raise Unreadable(
            f"{path.name}: square_avg of {shown(name)} is {kept}, but its group has state_dtype={shown(state_dtype)}"
        )
    if not coded:
        return value
    from rmsprop.state.precision import decoded

    arrays.left -= 4 * value.size
    arrays._note("square_avg of state_dtype='float8' is widened from one byte to float32")
    return decoded(value)


def _count(value: Any, name: str, arrays: Arrays, path: Path) -> int:
    if not isinstance(value, (int, float)):
        array = arrays.array(value, f"step of {name}")
        value = array.reshape(-1)[0].item() if array.size == 1 else None
    if not isinstance(value, (int, float)) or not 0 <= value < 2**53 or value != int(value):
        raise Unreadable(f"{path.name}: the step of {shown(name)} is not a count: {shown(value)}")
    return int(value)


def _hyper(source: str, group: Mapping[str, Any], made: Checkpoint, path: Path) -> dict[str, Any]:
    """Return a group's settings under the framework's names, as plain numbers, booleans and strings."""
    kept = {str(name): _plain(value) for name, value in group.items() if name not in _ASIDE}
    odd = next((name for name, value in kept.items() if not _is_setting(value)), None)
    if odd is not None:
        raise Unreadable(
            f"{path.name}: the setting {shown(odd)} is {shown(kept[odd])}, not a number, bool, string or short tuple"
        )
    if "rho" in kept and "alpha" not in kept:  # Adadelta, which uses lr and eps differently
        return {"alpha": kept["rho"], "weight_decay": kept.get("weight_decay", 0), "momentum": 0, "centered": False}
    if source in ("adam", "adamw", "bitsandbytes"):
        betas = kept.get("betas")
        if not isinstance(betas, tuple) or len(betas) < 2 or not all(isinstance(b, (int, float)) for b in betas):
            raise Unreadable(f"{path.name}: betas is {shown(betas)}, not a pair of numbers")
        kept["alpha"] = betas[0] if source == "bitsandbytes" else betas[1]
        if source == "bitsandbytes" and betas[1]:
            made.notes.append(f"momentum={betas[1]:g} is dropped: bitsandbytes accepts it and never uses it")
        wanted = {"lr", "alpha", "eps", "weight_decay", "maximize"}
        return {name: value for name, value in kept.items() if name in wanted}
    lost = [f"{name}={kept[name]!r}" for name, plain in _OWN_CARE.items() if kept.get(name, plain) != plain]
    if lost:
        made.notes.append(f"{', '.join(lost)} is dropped: pass it to the optimizer that continues")
    return kept


def _is_setting(value: Any) -> bool:
    """Return whether a value is small and plain, so that it can be hashed, compared and printed."""
    if isinstance(value, tuple):
        return len(value) <= 8 and all(isinstance(item, float) or type(item) is int for item in value)
    if isinstance(value, str):
        return len(value) <= 1000
    return value is None or isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 1024)


def _plain(value: Any) -> Any:
    """Convert a tensor of one element to a number, and a list to a tuple."""
    if hasattr(value, "numel") and value.numel() == 1 and value.layout is not None and value.device.type == "cpu":
        return value.item()
    return tuple(value) if isinstance(value, list) else value
