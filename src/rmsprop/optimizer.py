"""`RMSprop`, a drop-in for `torch.optim.RMSprop`: the loop, and torch's contract with optimizers."""

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, ParamsT, _use_grad_for_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from rmsprop import dialects, hooks, kernels, settings, step
from rmsprop.diagnose import explain, lint
from rmsprop.kernels.plan import Plan, Stepped
from rmsprop.kernels.triton_plan import build
from rmsprop.recipes import recipe, warn
from rmsprop.settings import group_keys, is_unset, unset
from rmsprop.spec import Hyper, Rule, check_flag
from rmsprop.state import loading, placing, shared_memory, slots
from rmsprop.tensors import shards
from rmsprop.tensors.bucket import Bucket, wanted
from rmsprop.tensors.nonfinite import Skipped, make_guard, renew_guard
from rmsprop.tensors.params import check_groups, not_empty

# torch 2.13 renamed it; the old name still works there, with a warning.
_CAPTURE_CHECK = next(
    name
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    if hasattr(Optimizer, name)
)

# What of a group must stay as it is for a plan to hold: all settings but the numbers, which are read at every step.
_SETTINGS = itemgetter(*(name for name in settings.TORCH_GROUP if name not in dialects.HYPERS))


class RMSprop(Optimizer):
    """RMSprop: each element's step is divided by the root of a decaying average of its squared gradient.

    Arguments are torch.optim.RMSprop's, in its order and with its defaults, then keyword-only switches.

    Args:
        params: parameters, named parameters, or dicts that define groups with their own settings.
        lr: learning rate, in units of the parameter: a float or a tensor with one element. Of several groups, the
            first keeps that tensor and each other gets a copy, as a scheduler fills each group's.
        alpha: decay of the averages, 0 <= alpha < 1.
        eps: ε, in units of the gradient ("outside", "floor") or of its square ("inside").
        weight_decay: weight decay, see `weight_decay_mode`.
        momentum: momentum, 0 <= momentum < 1.
        centered: subtract the squared mean gradient: divide by the standard deviation. None: the dialect's.
        capturable: keep lr and step on the device, so that a graph can be captured. Works on every device.
        foreach: True: all tensors of a kind at once; False: one by one, with the least memory; None: chosen.
        maximize: ascend instead of descend.
        differentiable: let autograd record the step.
        dialect: whose rule, defaults and argument names: see `rmsprop dialects`. Each keyword below overrides
            one of its switches; None leaves it.
        eps_mode: "outside" √v + ε, "inside" √(v + ε), "both" √(v + ε) + ε, "floor" max(√v, ε).
        square_avg_init: what `square_avg` starts at.
        lr_in_buffer: multiply by lr on the way into the momentum buffer (TensorFlow), not on the way out.
        nesterov: look one momentum step ahead; needs momentum > 0.
        bias_correction: divide the averages by 1 − alphaᵗ, as Adam does.
        weight_decay_mode: "l2" adds weight_decay·p to the gradient, "l1" weight_decay·sign(p); "decoupled" shrinks p
            by lr·weight_decay, "corrected" by lr²/reference_lr·weight_decay; reference_lr is lr at construction.
        sparse: what sparse gradients mean: "lazy", only rows that have one step (TensorFlow 1); "dense", averages
            decay everywhere (Keras). None: as in the dialect; torch's refuses them.
        backend: who computes the step: "auto" or a name that `rmsprop.kernels.BACKENDS` lists.
        fused: torch's name for asking for a native kernel. None: chosen.
        amp_in_step: torch.amp.GradScaler leaves unscaling, and skipping on overflow, to `step`, which waits for no
            device. Needs capturable=True. Lightning's clipping and Accelerate's skip detection need it False.
        rounding: how bfloat16 and float16 parameters are rounded: "nearest", or "stochastic", up with the probability
            of what is dropped, so that steps below half a unit in the last place add up.
        compensation: keep what that rounding drops, in the slot `compensation` of the parameter's dtype, and add it
            back in the next step. With both, the parameter is rounded to nearest and the remainder stochastically.
        seed: of the random bits; they follow from it, the parameter's place, its step and the element alone.
        max_update: no element's step is longer than max_update·lr, and a spike at most doubles its v. None: off.
        nonfinite: what a NaN or infinity in a gradient does: "propagate"; "skip" the step whole, before anything is
            written; "raise". `skipped` counts.
        nonfinite_limit: that many skips in a row raise a RuntimeError; None: no number does.
        words: settings in the dialect's own names, such as learning_rate= and beta= under "textbook"; and in every
            dialect `clip_value`, `clip_norm` (of each tensor), `clip_global_norm`, `clip_weights` and
            `clip_after_decay`: rmsprop/tensors/clipping.py. `recipe`: see `RMSprop.recipe`.

    Equation: spec.py, lines [1]-[9].
    State:    per parameter `step` (a count, in float64) and `square_avg`, with momentum `momentum_buffer`, if
              centered `grad_avg`, each of the parameter's shape. float32 for half-precision parameters, else
              the parameter's dtype. With compensation, `compensation` in the dtype of half-precision parameters.
    Raises:   ValueError or TypeError, before anything is changed, with what was given and what would work.
    Source:   torch/optim/rmsprop.py; Tieleman and Hinton, lecture 6e, 2012; Graves, arXiv:1308.0850 (centered).

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.tensor([2.0, -2.0]))
    >>> optimizer = RMSprop([weight], lr=0.1)
    >>> weight.grad = torch.tensor([3.0, 0.5])
    >>> optimizer.step()
    >>> weight.data  # the first step is lr/√(1−alpha) = 10·lr long, whatever the gradient's size
    tensor([ 1.0000, -3.0000])
    """

    backend: str
    _due: list[Tensor] | None = None  # the parameters that step, of those that have a gradient; None: all
    _idle = 0  # for lint: how many of the last steps had no gradient at all
    _step_supports_amp_scaling = False  # torch.amp.GradScaler's name of amp_in_step

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = unset(1e-2),
        alpha: float = unset(0.99),
        eps: float = unset(1e-8),
        weight_decay: float = unset(0),
        momentum: float = unset(0),
        centered: bool | None = None,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        dialect: str = "torch",
        eps_mode: str | None = None,
        square_avg_init: float | None = None,
        lr_in_buffer: bool | None = None,
        nesterov: bool | None = None,
        bias_correction: bool | None = None,
        weight_decay_mode: str | None = None,
        sparse: str | None = None,
        backend: str = "auto",
        fused: bool | None = None,
        amp_in_step: bool = False,
        rounding: str = "nearest",
        compensation: bool = False,
        seed: int = 0,
        max_update: float | None = None,
        nonfinite: str = "propagate",
        nonfinite_limit: int | None = 100,
        **words: Any,
    ) -> None:
        numbers = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        switches = {
            "centered": centered,
            "eps_mode": eps_mode,
            "square_avg_init": square_avg_init,
            "lr_in_buffer": lr_in_buffer,
        }
        switches |= {"nesterov": nesterov, "bias_correction": bias_correction}
        switches |= {"weight_decay_mode": weight_decay_mode, "sparse": sparse}
        given: dict[str, Any] = {name: value for name, value in numbers.items() if not is_unset(value)}
        given |= {name: value for name, value in switches.items() if value is not None}
        flags: dict[str, Any] = {"maximize": maximize, "capturable": capturable, "foreach": foreach, "fused": fused}
        flags |= {"differentiable": differentiable, "rounding": rounding, "compensation": compensation}
        flags |= {"seed": seed, "max_update": max_update}
        self.backend = kernels.check_backend(backend)
        self._step_supports_amp_scaling = check_flag("amp_in_step", amp_in_step)
        self._guard = make_guard(nonfinite, nonfinite_limit)
        self._whole = dict(zip(group_keys.WHOLE, (nonfinite, nonfinite_limit, backend, amp_in_step), strict=True))
        self._rules: step.Rules = WeakIdKeyDictionary()
        self._checked: dict[int, tuple[Any, ...]] = {}
        self._made: slots.Made = []
        self._plan: Plan | None = None
        self._shared = False
        self._begun: list[tuple[float, bool]] = []  # per group, for lint: momentum, whether others had stepped
        defaults, self._asked = settings.resolve_settings(dialect, given | flags | words)
        chosen = {name for name, value in flags.items() if value is not settings.TORCH_GROUP[name]}
        self._typed = frozenset({*given, *words, *chosen, *(["dialect"] if dialect != "torch" else [])})
        super().__init__(not_empty(params), defaults)
        settings.check_half(self.param_groups)
        warn(defaults, self.param_groups)

    @classmethod
    def recipe(cls, name: str, params: ParamsT, **changes: Any) -> "RMSprop":
        """The optimizer of a published result, see `rmsprop recipes`; numbers may be changed: rmsprop/recipe."""
        return cls(params, **recipe(name, **changes))

    profile_hook_step = staticmethod(hooks.watch)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with settings of its own in the dialect's or torch's words.

        The dict that is given stays as it is.

        Raises: ValueError or TypeError for settings or parameters that do not work, duplicates among them;
            RuntimeError where a backend that was asked for (backend=, fused=True) refuses the parameters.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group_keys.refuse_whole(param_group, self._whole, [backend.name for backend in kernels.BACKENDS])
        group = settings.own_group(param_group, self.defaults, self._asked, self._typed)
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        tensors = [p[1] if isinstance(p, tuple) else p for p in params]
        if len({id(p) for p in tensors}) != len(tensors):
            raise ValueError(
                "optimizer contains a parameter group with duplicate parameters: group "
                f"{len(self.param_groups)} lists a tensor twice; list each once"
            )
        self._check_group(group, tensors)
        lr = group["lr"]  # a scheduler fills every group's tensor, and one in two groups would hold the last's rate
        if isinstance(lr, Tensor) and not lr.requires_grad and any(other["lr"] is lr for other in self.param_groups):
            group["lr"] = lr.clone()
        super().add_param_group(group)
        self._begun.append((group["momentum"], bool(self.state)))

    def _check_group(self, group: dict[str, Any], tensors: list[Any]) -> None:
        """Raise now, and not at the first step, if what was asked for the whole optimizer cannot take a group.

        Parameters that have no storage yet are left to the first step: lazy ones, and those of the device meta.
        """
        if self._step_supports_amp_scaling and not group["capturable"]:
            raise ValueError(
                "amp_in_step=True counts steps where found_inf is, on the device: give capturable=True too"
            )
        if self._guard is not None:
            self._guard.check(group, tensors)
        if self.backend == "auto" and not group["fused"]:
            return
        rule, _ = settings.read(group)
        ready = [p for p in tensors if isinstance(p, Tensor) and not is_lazy(p) and not p.is_meta]
        for bucket in shards.localized(wanted(group, ready)).split():
            kernels.pick(self.backend, rule, bucket)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Advance every parameter that has a gradient by one step, in place.

        Args:
            closure: reevaluates the model and returns the loss; gradients are on inside it.
        Returns: the closure's loss, or None.
        Equation: spec.py, lines [1]-[9].
        Mutates: parameters and state. Never gradients.
        Raises: RuntimeError, before any parameter moves, for gradients that the rule does not take.
        """
        try:
            return None if closure is None and self._again() else self._step(closure)
        except BaseException:
            step.drop_scaling(self)
            raise

    def _again(self) -> bool:
        """Whether the plan still holds, and has stepped."""
        if torch.compiler.is_compiling() or self._plan is None:
            return False
        if self._guard is not None and self._plan.spread:
            return False  # processes decide together, the long way: a plan may hold here and not there
        return self._plan.again(
            self.backend, self.param_groups, self.state, step.scaling(self), self._guard, self._due
        )

    @_use_grad_for_differentiable
    def _step(self, closure: Callable[[], float] | None) -> float | None:
        """`step` where there is no plan, or it does not hold any more."""
        getattr(self, _CAPTURE_CHECK)()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if self._again():
                return loss
        bad = None
        if torch.compiler.is_compiling() and self._guard is not None and step.scaling(self) is None:
            bad = self._guard.look(self.param_groups)  # in this frame, which a compiler can go on with after it
        step.take(self, bad)
        return loss

    def _make_plan(self, backends: list[kernels.Backend], stepped: Stepped) -> Plan | None:
        """What the next step may rely on, if one native kernel took this one, of these groups and buckets, whole."""
        if type(self)._init_group is not RMSprop._init_group or len({backend.name for backend in backends}) != 1:
            return None
        groups = [(group, self._read(group)[0]) for group in self.param_groups]
        return build(backends[0].name, self.backend, groups, self.state, _SETTINGS, stepped)

    def _read(self, group: dict[str, Any]) -> tuple[Rule, Hyper]:
        """The group's rule and numbers; the rule must be the one that the run began with."""
        return step.read(self._rules, self._checked, group)

    def _init_group(
        self,
        group: dict[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        square_avgs: list[Tensor],
        momentum_buffer_list: list[Tensor],
        grad_avgs: list[Tensor],
        state_steps: list[Tensor],
        compensations: list[Tensor] | None = None,
        random_keys: list[int] | None = None,
        first: int = 0,
    ) -> bool:
        """Fill the lists, and make the slots that are missing; torch.compile calls this by its name and order."""
        lists = Bucket(params_with_grad, grads, square_avgs, grad_avgs, momentum_buffer_list, state_steps)
        lists.compensation = [] if compensations is None else compensations
        lists.random_keys = [] if random_keys is None else random_keys
        made = [] if torch.compiler.is_compiling() else self._made  # a compiler would watch the list
        return slots.fill(group, self.state, lists, first, made)

    def state_dict(self) -> dict[str, Any]:
        """The state under torch's keys, and the groups as plain numbers, strings and tensors.

        torch.optim.RMSprop loads it; `torch.load(weights_only=True)` reads it back from a file. Steps go on in its
        tensors, as in torch, and no load changes them: lr tensors, and state that capturable=True or shared memory
        fixes to its place, are copies.

        Raises: ValueError where a parameter that has state is in no group any more.
        """
        check_groups(self.param_groups)
        loading.check_listed(self.param_groups, self.state)
        return placing.handed_out(super().state_dict())

    @_disable_dynamo
    def load_state_dict(  # type: ignore[override]  # torch's returns nothing
        self,
        state_dict: dict[str, Any],
        *,
        strict: bool = True,
        rename: Mapping[str, str] | None = None,
        hparams: str | None = None,
        match: str | None = None,
    ) -> loading.LoadReport:
        """Go on from a saved state: RMSprop's of this package or of torch, of any version.

        Parameters are matched by name where both sides have names, as of `model.named_parameters()`, whatever their
        order and grouping; else by order. State is copied, into the present tensors where capturable=True or shared
        memory fixes them to their place; state of half-precision parameters stays float32.

        Args:
            strict: refuse what does not fit whole. False loads what fits, and leaves the rest as it is.
            rename: saved name -> name here; a saved name that ends with a dot stands for all that begin with it.
            hparams: "load" takes the saved numbers, as torch does; "keep" goes on with this optimizer's. None is
                "load" with a warning where that replaces what the optimizer was built with.
            match: "order" pairs by position, as torch does, whatever the names; "name" requires names. None pairs by
                name where both sides have names, and refuses names on one side that the order cannot stand for.
        Returns: what was loaded, and which settings differ; `print` shows it.
        Raises: ValueError or TypeError, before anything is changed, when it is not an RMSprop's or does not fit.
        """
        return loading.load(self, state_dict, strict, rename, hparams, match)

    def __getstate__(self) -> dict[str, Any]:
        names = ("backend", "_step_supports_amp_scaling", "_asked", "_typed", "_whole", "_shared")
        own = {name: getattr(self, name) for name in names}
        return {**super().__getstate__(), **own, "_guard": renew_guard(self._guard)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.state if self.__dict__.get("_shared") else {}
        super().__setstate__(state)
        if before:
            shared_memory.keep(self, before)
        missing: dict[str, Any] = {"backend": "auto", "_guard": None, "_typed": frozenset(), "_whole": {}}
        self.__dict__ |= {"_asked": frozenset(settings.TORCH_GROUP), **missing} | self.__dict__
        self._rules, self._checked, self._made, self._plan = WeakIdKeyDictionary(), {}, [], None
        loading.complete(self.param_groups, self.state)
        self._begun = [(group["momentum"], False) for group in self.param_groups]
        self._shared = self.__dict__.get("_shared", False) and shared_memory.shared(
            self
        )  # a copy of shared memory is not

    def share_memory(self) -> "RMSprop":
        """Make all state now, and move it into shared memory: processes then step the same averages, without locks.

        To be called after `model.share_memory()`, and before processes start, by fork or by spawn, that get the model
        and the optimizer. Settings are each process's own, but an lr that is a tensor is shared too.

        Returns: the optimizer.
        Raises: ValueError, before anything is changed, for parameters that are not in shared memory.
        """
        shared_memory.share(self)
        self._shared, self._plan = True, None
        return self

    def explain(self) -> str:
        """In words, for each group: the rule, what its numbers mean, and who steps its parameters or why not."""
        return explain.explain(self._plain_groups(), self.backend, self.state, self._guard)

    def _plain_groups(self) -> list[dict[str, Any]]:
        """Copies of the groups with Python's numbers. Raises: as a step does for edited groups that do not work."""
        check_groups(self.param_groups)
        groups = [dict(group) for group in self.param_groups]
        for group in groups:
            settings.check_edited(group, {})
        return groups

    @property
    def skipped(self) -> Skipped:
        """The steps that nonfinite="skip" left out: `total`, `in_a_row`, `last`, and whose gradient: `parameter`."""
        return Skipped() if self._guard is None else self._guard.skipped(self.param_groups)

    def lint(self, steps: int | None = None) -> list[lint.Finding]:
        """What looks wrong, the worst first. `steps`: how many the whole run has, if known. Nothing is changed."""
        return lint.lint(self._plain_groups(), self.state, steps, lint.history(self))

    def __repr__(self) -> str:
        return explain.show(type(self).__name__, self.param_groups, self.backend, self._guard)
