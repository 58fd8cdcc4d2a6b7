"""State dicts that are not an RMSprop's: whose they are, and what turns them into one."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from rmsprop.dialects import find
from rmsprop.printing import MOST, shown
from rmsprop.settings import TORCH_GROUP
from rmsprop.spec import plain
from rmsprop.values import excess

# Whose state holds all of these names, or whose group does, if there is no state yet; the first that fits.
_BY_STATE: tuple[tuple[str, frozenset[str]], ...] = (
    ("torch.optim.NAdam's", frozenset({"exp_avg", "exp_avg_sq", "mu_product"})),
    ("torch.optim.Adam's", frozenset({"exp_avg", "exp_avg_sq"})),
    ("torch.optim.Adamax's", frozenset({"exp_avg", "exp_inf"})),
    ("torch.optim.Adadelta's", frozenset({"square_avg", "acc_delta"})),
    ("torch.optim.Adagrad's", frozenset({"sum"})),
    ("torch.optim.Rprop's", frozenset({"prev", "step_size"})),
    ("torch.optim.ASGD's", frozenset({"eta", "ax"})),
    ("heavyball's", frozenset({"exp_avg_sq"})),
    ("bitsandbytes'", frozenset({"state1"})),
    ("torch.optim.SGD's", frozenset({"momentum_buffer"})),
)
_BY_GROUP: tuple[tuple[str, str], ...] = (
    ("torch.optim.Adam's", "betas"),
    ("torch.optim.SGD's", "dampening"),
    ("torch.optim.Adadelta's", "rho"),
    ("torch.optim.Adagrad's", "lr_decay"),
    ("torch.optim.Rprop's", "etas"),
    ("torch.optim.ASGD's", "lambd"),
    ("torch.optim.LBFGS's", "history_size"),
)
_CONVERT = "`rmsprop convert` turns what carries over into an RMSprop's checkpoint"


def check_shape(state_dict: Any) -> None:
    """Refuse what is no state dict of any optimizer of torch.

    Raises: ValueError that says what it is instead, where that can be told.
    """
    if _is_one(state_dict):
        return
    inside = [name for name, value in state_dict.items() if _is_one(value)] if isinstance(state_dict, Mapping) else []
    if inside:
        advice = f"its entry {shown(inside[0])} is one: load that"
    else:
        advice = f"give what optimizer.state_dict() returned; of another framework's checkpoint {_CONVERT}"
    raise ValueError(
        "loaded state dict is no state dict of an optimizer: it has no list of param_groups and no state; " + advice
    )


def _is_one(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups = value.get("param_groups")
    if not isinstance(groups, list | tuple):
        return False
    keys = [g.get("params") if isinstance(g, Mapping) else None for g in groups]
    return all(isinstance(own, list | tuple) and all(map(_is_key, own)) for own in keys)


def _is_key(key: Any) -> bool:
    return isinstance(key, str) or (isinstance(key, int) and key.bit_length() < 64)


def check_values(saved: Sequence[Mapping[str, Any]]) -> None:
    """Refuse settings of no kind that a setting has, and notes without bound, before they are used or copied.

    Raises: ValueError.
    """
    for i, group in enumerate(saved):
        for name, value in group.items():
            if name in ("params", "param_names"):
                continue
            if name in TORCH_GROUP and not _is_setting(value):
                raise ValueError(
                    f"loaded state dict's group {i} holds {name}={shown(value)}; it takes a number, a switch, a "
                    "word, None or a tensor"
                )
            more = excess(value)
            if more is not None:
                raise ValueError(
                    f"loaded state dict's group {i} holds {more} in {shown(name)}; a group's note is small"
                )


def _is_setting(value: Any) -> bool:
    value = plain(value)
    if isinstance(value, str):
        return len(value) <= MOST
    if isinstance(value, int):
        return value.bit_length() <= 1024
    return value is None or isinstance(value, Real | Tensor)


def check_owner(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]
) -> None:
    """Refuse the state of another optimizer.

    Args:
        groups: the present groups, whose dialects' words are no foreign ones.
        saved: the saved groups, and `state` the saved state.
    Raises: ValueError that names the optimizer, where it is known, and the converter.
    """
    for key in (key for group in saved for key in group["params"]):
        entry = state.get(key)
        if entry is None:
            continue
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"loaded state dict is not an RMSprop's: the state of parameter {_called(key)} is a "
                f"{type(entry).__name__}"
            )
        if entry and ("square_avg" not in entry or "acc_delta" in entry):
            owner = next((name for name, signs in _BY_STATE if signs <= entry.keys()), None)
            lacks = "" if "square_avg" in entry else " and lacks square_avg"
            whose = f", as {owner} does" if owner else ""
            raise ValueError(
                f"loaded state dict is not an RMSprop's: the state of parameter {_called(key)} holds "
                f"{', '.join(_called(name) for name in list(entry)[:12])}{lacks}{whose}; {_CONVERT}"
            )
    known = {word for group in groups for word in find(group["dialect"]).words}
    for i, group in enumerate(saved):
        for owner, word in _BY_GROUP:
            if word in group and word not in known and "alpha" not in group:
                raise ValueError(
                    f"loaded state dict is not an RMSprop's: its group {i} holds {word}, as {owner} does, and no "
                    f"alpha; {_CONVERT}"
                )


def _called(key: Any) -> str:
    """A key as a sentence calls it: a name without its quotes."""
    return shown(key, 60).strip("'")
