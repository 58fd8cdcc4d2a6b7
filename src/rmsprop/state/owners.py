"""Identifies the optimizer of torch, timm or bitsandbytes that saved a state dict, by the slots it keeps."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

CONVERT = "`rmsprop convert` turns what carries over into an RMSprop checkpoint"
_NOTHING = "nothing in it carries over to RMSprop: use a new optimizer"
# Each optimizer with the slots that it keeps, or, for BY_GROUP, a setting of it. The first match wins.
_BY_STATE: tuple[tuple[str, frozenset[str]], ...] = (
    ("torch.optim.Adamax", frozenset({"exp_avg", "exp_inf"})),
    ("torch.optim.Adagrad", frozenset({"sum"})),
    ("torch.optim.Rprop", frozenset({"prev", "step_size"})),
    ("torch.optim.ASGD", frozenset({"eta", "ax"})),
    ("torch.optim.LBFGS", frozenset({"n_iter", "old_dirs"})),
    ("torch.optim.Adafactor", frozenset({"row_var"})),
    ("torch.optim.Adafactor", frozenset({"variance"})),
    ("an Adafactor", frozenset({"exp_avg_sq_row"})),
    ("AdaBelief", frozenset({"exp_avg", "exp_avg_var"})),
    ("Lion", frozenset({"exp_avg"})),
    ("torch.optim.SGD", frozenset({"momentum_buffer"})),
)
_EXACTLY = ("Lion", "torch.optim.SGD")
BY_GROUP: tuple[tuple[str, str], ...] = (
    ("torch.optim.ASGD", "lambd"),
    ("torch.optim.LBFGS", "history_size"),
    ("torch.optim.Adafactor", "beta2_decay"),
    ("torch.optim.Muon", "ns_steps"),
    ("torch.optim.Adam", "betas"),
    ("torch.optim.SGD", "dampening"),
    ("torch.optim.Adadelta", "rho"),
    ("torch.optim.Adagrad", "lr_decay"),
    ("torch.optim.Rprop", "etas"),
)
_ADAM = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
# Settings of Adam variants, each with the value that leaves Adam's rule unchanged.
_ODD: Mapping[str, Any] = {
    **{"caution": False, "corrected_weight_decay": False, "clipping_threshold": None, "nesterov": False},
    **dict.fromkeys(("momentum_decay", "schedule_decay", "decoupled_decay", "decoupled", "delta", "wd_ratio")),
    **dict.fromkeys(("rectify", "grad_averaging", "clip_exp", "no_prox", "mars_type", "bias_correction", "final_lr")),
    **dict.fromkeys(("trust_clip", "use_muon", "d0", "beta3", "N_sma_threshhold", "correct_bias", "slow_step_size")),
}
_QUANTIZED = "__bnb_optimizer_quant_state__"
_TIMMS = ("caution", "max_lr_snapshot")


@dataclass(frozen=True)
class Owner:
    """The optimizer that a state belongs to.

    Attributes:
        name: the class.
        source: the source that `rmsprop convert` detects, or "" if it needs `options`.
        options: the options that `rmsprop convert` needs, or "" if nothing in the state carries over.
        why: what `rmsprop convert` takes over with these options.
    """

    name: str
    source: str = ""
    options: str = ""
    why: str = ""

    @property
    def advice(self) -> str:
        """The sentence on how to use such a state."""
        if self.source:
            return CONVERT
        return f"`rmsprop convert IN OUT {self.options}` {self.why}" if self.options else _NOTHING


def owner(slots: Set[str], group: Mapping[Any, Any]) -> Owner | None:
    """Return the owner of a state. None if it is an RMSprop or a variant.

    Args:
        slots: the names of the state's slots; empty before the first step.
        group: a parameter group with its settings.
    """
    if "acc_delta" in slots:
        why = "takes over its square_avg; choose RMSprop's learning rate and eps yourself"
        return Owner("torch.optim.Adadelta", "", "--from torch --set lr=0.001 --set eps=1e-8", why)
    if "square_avg" in slots:
        return None
    if "state1" in slots or _QUANTIZED in slots:
        return _bitsandbytes(slots, group)
    if {"exp_avg", "exp_avg_sq"} <= slots:
        return _adam(slots, group)
    if slots:
        name = next((name for name, kept in _BY_STATE if kept <= slots), "another optimizer")
        if name in _EXACTLY and len(slots - {"step"}) > 1:
            return Owner("another optimizer")
        return Owner("torch.optim.Muon" if name == "torch.optim.SGD" and "ns_steps" in group else name)
    if "alpha" in group and "lambd" not in group and "betas" not in group:
        return None
    name = next((name for name, word in BY_GROUP if word in group), "")
    return Owner(name, options="", why="") if name else None


def _adam(slots: Set[str], group: Mapping[Any, Any]) -> Owner:
    """Return the Adam variant that keeps these slots."""
    why = "takes over its exp_avg_sq as Adam's, and drops the rest"
    flag = group.get("decoupled_weight_decay")
    decoupled = _is(flag, True)
    both = "--from adamw" if decoupled else "--from adam"
    if "mu_product" in slots or "m_schedule" in slots:
        return Owner("torch.optim.NAdam", "", both, why)
    if "grad_averaging" in group and "trust_clip" not in group:
        return Owner("NovoGrad")  # one average for each tensor
    odd = [name for name, plain in _ODD.items() if name in group and not _is(group[name], plain)]
    if "weight_decay" not in group and not odd:
        return Owner("torch.optim.SparseAdam", "", "--from adam", why)
    if not odd and slots <= _ADAM and "amsgrad" in group:
        if any(name in group for name in _TIMMS):
            return Owner("timm's AdamW", "adamw")
        if flag is not None:
            return Owner(f"torch.optim.Adam{'W' if decoupled else ''}", "adamw" if decoupled else "adam")
        if _is(group.get("weight_decay"), 0):
            return Owner("torch.optim.Adam", "adam")
        either = "(or --from adamw) takes it over: its groups do not show which weight decay it used"
        return Owner("torch.optim.Adam or AdamW", "", "--from adam", either)
    radam = slots <= _ADAM and not odd and {"lr", "betas", "eps", "weight_decay"} <= group.keys()
    name = "torch.optim.RAdam" if radam else "an Adam variant"
    return Owner(name, "", both, why if flag is not None else f"(or --from adamw, if its decay is decoupled) {why}")


def _bitsandbytes(slots: Set[str], group: Mapping[Any, Any]) -> Owner:
    """Return the bitsandbytes optimizer; RMSprop, Adagrad, Lion and SGD keep the same slots."""
    betas = group.get("betas")
    first = betas[0] if isinstance(betas, list | tuple) and betas else None
    if "state2" in slots:
        return Owner("an optimizer of bitsandbytes with two states, such as Adam8bit")
    if _is(first, 0):
        return Owner("bitsandbytes' Adagrad")
    if _is(group.get("eps"), 0):
        return Owner("bitsandbytes' SGD or Lion")
    return Owner("bitsandbytes' RMSprop", "bitsandbytes")


def _is(value: Any, plain: Any) -> bool:
    """Return whether a setting equals a plain value; a file may hold anything."""
    return isinstance(value, int | float | bool | None) and value == plain


def possessive(name: str) -> str:
    """Return the possessive of a class name, such as torch.optim.Adam's."""
    return f"{name}'{'' if name.endswith('s') else 's'}"
