"""State dicts that are not an RMSprop's: whose they are, and what turns them into one."""

from collections.abc import Mapping, Sequence
from typing import Any

from rmsprop.dialects import find

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
        advice = f"its entry {inside[0]!r} is one: load that"
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
    return all(isinstance(own, list | tuple) and all(isinstance(key, int | str) for key in own) for own in keys)


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
                f"loaded state dict is not an RMSprop's: the state of parameter {key} is a {type(entry).__name__}"
            )
        owner = next((name for name, signs in _BY_STATE if signs <= entry.keys()), None)
        if entry and ("square_avg" not in entry or "acc_delta" in entry):
            lacks = "" if "square_avg" in entry else " and lacks square_avg"
            whose = f", as {owner} does" if owner else ""
            raise ValueError(
                f"loaded state dict is not an RMSprop's: the state of parameter {key} holds "
                f"{', '.join(map(str, entry))}{lacks}{whose}; {_CONVERT}"
            )
    known = {word for group in groups for word in find(group["dialect"]).words}
    for i, group in enumerate(saved):
        for owner, word in _BY_GROUP:
            if word in group and word not in known and "alpha" not in group:
                raise ValueError(
                    f"loaded state dict is not an RMSprop's: its group {i} holds {word}, as {owner} does, and no "
                    f"alpha; {_CONVERT}"
                )
