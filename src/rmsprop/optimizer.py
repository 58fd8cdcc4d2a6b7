"""`RMSprop`, a drop-in for `torch.optim.RMSprop`: its signature, and torch's contract with optimizers."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, ParamsT, _use_grad_for_differentiable

from rmsprop import kernels, recipes, settings, spec
from rmsprop.diagnose import explain, lint
from rmsprop.settings import group_keys, is_unset, unset
from rmsprop.state import averages, loading, placing, shared_memory, slots
from rmsprop.step import CAPTURE_CHECK, Stepper, drop_scaling, profile_only_if_needed, scaling
from rmsprop.tensors import shards
from rmsprop.tensors.bucket import Bucket, bucket_for
from rmsprop.tensors.nonfinite import Skipped, make_guard
from rmsprop.tensors.params import check_groups, not_empty

# Arguments of RMSprop: numbers with torch's defaults, settings whose default is the dialect's, and the others.
_NUMBERS = ("lr", "alpha", "eps", "weight_decay", "momentum")
_RULE = (*settings.RULE, "recipe")
_FLAGS = ("maximize", *settings.EXECUTION, *spec.CARE)


class RMSprop(Optimizer):
    """Implements RMSprop: divides each element's step by the root of a decaying average of its squared gradient.

    The positional arguments are those of torch.optim.RMSprop, with its order and defaults.

    Args:
        params: parameters, named parameters, or dicts that define parameter groups with their own settings.
        lr: learning rate, a float or a tensor with one element. Of several groups that share one tensor, the first
            keeps it and the others get copies, since schedulers fill the tensor of each group.
        alpha: decay of the averages, 0 <= alpha < 1.
        eps: ε, in units of the gradient ("outside", "floor") or of its square ("inside").
        weight_decay: weight decay, see `weight_decay_mode`.
        momentum: momentum, 0 <= momentum < 1.
        centered: subtract the squared mean gradient from the variance. None: as in the dialect.
        capturable: keep lr and step on the device, so that a graph can be captured.
        foreach: True: step all tensors of a kind at once. False: one by one, with the least memory. None: chosen.
        maximize: ascend instead of descend.
        differentiable: let autograd record the step.

    Which rule (keyword-only; None: as in the dialect):
        dialect: whose rule, defaults and argument names to use. `rmsprop dialects` lists them.
        eps_mode: "outside" √v + ε, "inside" √(v + ε), "both" √(v + ε) + ε, "floor" max(√v, ε).
        square_avg_init: initial value of `square_avg`.
        lr_in_buffer: multiply by lr before the momentum buffer (TensorFlow) instead of after it (torch).
        nesterov: Nesterov momentum. Needs momentum > 0.
        bias_correction: divide the averages by 1 − alphaᵗ, as Adam does.
        weight_decay_mode: "l2" adds weight_decay·p to the gradient, "l1" weight_decay·sign(p). "decoupled" shrinks p
            by lr·weight_decay, "corrected" by lr²/reference_lr·weight_decay.
        reference_lr: highest learning rate of the run, for "corrected". None: lr at construction.
        sparse: sparse gradients: "lazy" steps only rows that have one (TensorFlow 1), "dense" decays averages
            everywhere (Keras). None under torch's rule: refuse them.
        recipe: name of the published result that these settings follow. `RMSprop.recipe` also sets its average (ema).
        dialect_arguments: arguments under the dialect's own names, such as learning_rate and beta of "textbook".

    Gradient and weight clipping (None: off):
        clip_value: bound of each element of a gradient.
        clip_norm: bound of the norm of each parameter's gradient.
        clip_global_norm: bound of the norm of all gradients together.
        clip_weights: bound of each element of a parameter after the step.
        clip_after_decay: clip the gradient after weight decay has been added.
        max_update: bound of each element's step, in units of lr. A gradient spike then at most doubles its v.

    Average of the weights (spec.py [10]; see `averaged`, `average_into`):
        ema: decay of an exponential moving average of the weights, which each step also advances. None: no average.
        ema_warmup: None: the first update copies the weights. "tensorflow": the decay of update k is at most
            (1+k)/(10+k). "timm": at most 1 − k^(−2/3).
        ema_start: number of steps that the average only follows the weights.
        ema_interval: number of steps from one update to the next.

    Half precision:
        rounding: rounding of bfloat16 and float16 parameters, "nearest" or "stochastic". Stochastic rounding lets
            steps below half a unit in the last place add up.
        compensation: Kahan summation: keep what rounding drops in the state `compensation`, and add it to the next
            step. With stochastic rounding, the remainder is rounded stochastically and the parameter to nearest.
        seed: seed of the random bits, which depend on it, the parameter's index, its step and the element alone.
        state_dtype: precision of the averages between steps, for float32 and half-precision parameters. "bfloat16":
            two bytes each. "float8": one byte for `square_avg`, two for the others. Both round stochastically.

    Robustness and execution:
        nonfinite: on a NaN or infinity in a gradient: "propagate" it, "skip" the whole step, or "raise".
        nonfinite_limit: raise RuntimeError after this many skipped steps in a row. None: no limit.
        amp_in_step: let `step` unscale gradients and skip overflows in place of torch.amp.GradScaler, without waiting
            for the device. Needs capturable=True. Lightning's clipping and Accelerate's skip detection need False.
        backend: "auto", or the name of the backend that computes the step ("cpu", "eager", "triton").
        fused: True: require a native kernel. False: use none. None: chosen.

    Equation: spec.py, lines [1]-[10].
    State:    per parameter `step` (a float64 count) and `square_avg`, with momentum `momentum_buffer`, if centered
              `grad_avg`, with ema `ema`, each of the parameter's shape, in float32 for half-precision parameters and
              else in the parameter's dtype, unless state_dtype narrows it. With compensation, `compensation` in the
              dtype of half-precision parameters.
    Raises:   ValueError or TypeError, before anything changes, naming what was given and what would work.
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
        eps_mode: spec.EpsMode | None = None,
        square_avg_init: float | None = None,
        lr_in_buffer: bool | None = None,
        nesterov: bool | None = None,
        bias_correction: bool | None = None,
        weight_decay_mode: spec.WeightDecayMode | None = None,
        reference_lr: float | None = None,
        sparse: spec.SparseMode | None = None,
        recipe: str | None = None,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        clip_global_norm: float | None = None,
        clip_weights: float | None = None,
        clip_after_decay: bool | None = None,
        max_update: float | None = None,
        ema: float | None = None,
        ema_warmup: spec.EmaWarmup | None = None,
        ema_start: int = 0,
        ema_interval: int = 1,
        rounding: spec.Rounding = "nearest",
        compensation: bool = False,
        seed: int = 0,
        state_dtype: spec.StateDtype = "float32",
        nonfinite: spec.Nonfinite = "propagate",
        nonfinite_limit: int | None = 100,
        amp_in_step: bool = False,
        backend: spec.BackendName = "auto",
        fused: bool | None = None,
        **dialect_arguments: Any,
    ) -> None:
        arguments = dict(locals())
        given: dict[str, Any] = {name: arguments[name] for name in _NUMBERS if not is_unset(arguments[name])}
        given |= {name: arguments[name] for name in _RULE if arguments[name] is not None}
        flags: dict[str, Any] = {name: arguments[name] for name in _FLAGS}
        self.backend = kernels.check_backend(backend)
        self._step_supports_amp_scaling = spec.check_flag("amp_in_step", amp_in_step)
        self._stepper = Stepper(RMSprop._init_group, make_guard(nonfinite, nonfinite_limit))
        self._whole_optimizer = dict(
            zip(group_keys.WHOLE, (nonfinite, nonfinite_limit, backend, amp_in_step), strict=True)
        )
        # per group, for lint: momentum, and whether others had stepped
        self._initial_momentum: list[tuple[float, bool]] = []
        defaults, self._explicit = settings.resolve_settings(dialect, given | flags | dialect_arguments)
        chosen = {name for name, value in flags.items() if value is not settings.TORCH_GROUP[name]}
        named = ["dialect"] if dialect != "torch" else []
        self._given_names = frozenset({*given, *dialect_arguments, *chosen, *named})
        super().__init__(not_empty(params), defaults)
        settings.check_effect(self.param_groups)
        recipes.warn(defaults, self.param_groups)

    @classmethod
    def recipe(cls, name: str, params: ParamsT, **changes: Any) -> "RMSprop":
        """Return the optimizer of a published result; `rmsprop recipes` lists them.

        Args:
            changes: numbers to change, and how a step runs: rmsprop/recipes.
        """
        return cls(params, **recipes.recipe(name, **changes))

    profile_hook_step = staticmethod(profile_only_if_needed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its own settings under the dialect's or torch's names.

        The given dict is not changed.

        Raises: ValueError or TypeError for invalid settings or parameters, such as duplicates. RuntimeError if a
            backend that was requested (backend=, fused=True) refuses the parameters.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group_keys.refuse_whole(param_group, self._whole_optimizer, [backend.name for backend in kernels.BACKENDS])
        group = settings.own_group(param_group, self.defaults, self._explicit, self._given_names)
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
        self._initial_momentum.append((group["momentum"], bool(self.state)))

    def _check_group(self, group: dict[str, Any], tensors: list[Any]) -> None:
        """Refuse a group that the optimizer's backend, guard or amp_in_step cannot step, before the first step.

        Parameters without storage (lazy ones, and those on the meta device) are checked at the first step.
        """
        if self._step_supports_amp_scaling and not group["capturable"]:
            raise ValueError(
                "amp_in_step=True counts steps on the device, where found_inf is: give capturable=True too"
            )
        if self._stepper.guard is not None:
            self._stepper.guard.check(group, tensors)
        if self.backend == "auto" and not group["fused"]:
            return
        rule, _ = settings.read(group)
        ready = [p for p in tensors if isinstance(p, Tensor) and not is_lazy(p) and not p.is_meta]
        for bucket in shards.localized(bucket_for(group, ready)).split():
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
        Equation: spec.py, lines [1]-[10].
        Mutates: parameters and state. Never gradients.
        Raises: RuntimeError, before any parameter moves, for gradients that the rule does not take.
        """
        try:
            if closure is None and self._stepper.again(self):
                return None
            return self._step(closure)
        except BaseException:
            drop_scaling(self)
            raise

    @_use_grad_for_differentiable
    def _step(self, closure: Callable[[], float] | None, due: list[Tensor] | None = None) -> float | None:
        """Take the full step, used when there is no valid cached plan.

        Args:
            due: the parameters that step, of those that have a gradient. None: all.
        """
        getattr(self, CAPTURE_CHECK)()
        stepper, loss, bad = self._stepper, None, None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if stepper.again(self, due):
                return loss
        if torch.compiler.is_compiling() and stepper.guard is not None and scaling(self) is None:
            bad = stepper.guard.scan(self.param_groups)  # here, since a compiler can resume this frame
        stepper.take(self, due, bad)
        return loss

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
        emas: list[Tensor] | None = None,
        random_keys: list[int] | None = None,
        first: int = 0,
    ) -> bool:
        """Fill the lists, and make missing slots. torch.compile depends on the name and the order of arguments."""
        kept = {
            "square_avg": square_avgs,
            "grad_avg": grad_avgs,
            "momentum_buffer": momentum_buffer_list,
            "step": state_steps,
            "compensation": [] if compensations is None else compensations,
            "ema": [] if emas is None else emas,
        }
        keys = [] if random_keys is None else random_keys
        lists = Bucket(params_with_grad, grads, kept, random_keys=keys)
        made = [] if torch.compiler.is_compiling() else self._stepper.made  # a compiler would guard on the list
        return slots.fill(group, self.state, lists, first, made)

    def state_dict(self, *, full_precision: bool = False) -> dict[str, Any]:
        """Return the state under torch's keys, and the groups as plain numbers, strings and tensors.

        torch.optim.RMSprop loads it, and `torch.load(weights_only=True)` reads it back from a file. As in torch,
        later steps write its tensors. Loads do not: lr tensors, and state that capturable=True or shared memory keeps
        in place, are copies.

        Args:
            full_precision: return narrowed averages in float32, as copies. torch's optimizer and other tools need it:
                to them the codes of "float8" are numbers from 0 to 255.
        Raises: ValueError if a parameter with state is in no group any more.
        """
        averages.refuse_swapped(self, "state_dict()")
        check_groups(self.param_groups)
        loading.check_listed(self.param_groups, self.state)
        packed = placing.exported(super().state_dict(), spec.check_flag("full_precision", full_precision))
        return {**packed, **averages.saved_buffers(self)}

    @_disable_dynamo
    def load_state_dict(  # type: ignore[override]  # torch's returns nothing
        self,
        state_dict: dict[str, Any],
        *,
        strict: bool = True,
        rename: Mapping[str, str] | None = None,
        hparams: Literal["load", "keep"] | None = None,
        match: Literal["order", "name"] | None = None,
    ) -> loading.LoadReport:
        """Load a state dict of this package's or torch's RMSprop, of any version.

        Parameters are matched by name if both sides have names, such as from `model.named_parameters()`, in any order
        and grouping; otherwise by order. State is copied, and written in place if capturable=True or shared memory
        needs the same tensors. The averages are converted to this optimizer's state_dtype, whatever the saved one: by
        default they stay float32 for half-precision parameters. Rounding them, to nearest, warns.

        Args:
            strict: raise if anything does not fit. False: load what fits, and leave the rest as it is.
            rename: saved name -> name here. A saved name that ends with a dot is a prefix.
            hparams: "load": take the saved numbers, as torch does. "keep": keep this optimizer's. None: "load", with
                a warning if that replaces arguments of the constructor.
            match: "order": pair by position, as torch does. "name": require names. None: pair by name where both
                sides have names, and refuse names on one side if the order is ambiguous.
        Returns: a report of what was loaded and which settings differ.
        Raises: ValueError or TypeError, before anything changes, if the state dict is not an RMSprop's or does not
            fit.
        """
        return loading.load(self, state_dict, strict, rename, hparams, match)

    def __getstate__(self) -> dict[str, Any]:
        names = ("backend", "_step_supports_amp_scaling", "_explicit", "_given_names", "_whole_optimizer")
        own = {name: getattr(self, name) for name in names}
        averages.refuse_swapped(self, "a copy")
        buffers = averages.saved_buffers(self).get(averages.KEY)
        return {**super().__getstate__(), **own, "_shared": self._stepper.shared, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        stepper: Stepper | None = self.__dict__.get("_stepper")
        before = self.state if stepper is not None and stepper.shared else {}
        super().__setstate__(state)
        if before:
            shared_memory.keep(self, before)
        missing: dict[str, Any] = {"backend": "auto", "_given_names": frozenset(), "_whole_optimizer": {}}
        self.__dict__ = {"_explicit": frozenset(settings.TORCH_GROUP), **missing, **self.__dict__}
        was_shared = self.__dict__.pop("_shared", stepper is not None and stepper.shared)
        if stepper is None:
            guard = make_guard(
                self._whole_optimizer.get("nonfinite", "propagate"), self._whole_optimizer.get("nonfinite_limit")
            )
            stepper = Stepper(RMSprop._init_group, guard)
        self._stepper = stepper
        averages.load_buffers(self, self.__dict__.pop("_buffers", None))
        stepper.forget()
        loading.complete(self.param_groups, self.state)
        self._initial_momentum = [(group["momentum"], False) for group in self.param_groups]
        stepper.shared = was_shared and shared_memory.shared(self)  # a deep copy is not in shared memory

    def share_memory(self) -> "RMSprop":
        """Make all state and move it into shared memory, so that processes step the same averages without locks.

        Call it after `model.share_memory()`, and before starting processes, by fork or spawn, that use the model and
        the optimizer. Each process has its own settings, but a tensor lr is shared.

        Returns: the optimizer.
        Raises: ValueError, before anything changes, for parameters that are not in shared memory.
        """
        shared_memory.share(self)
        self._stepper.shared, self._stepper.plan = True, None
        return self

    def averaged(self) -> AbstractContextManager[None]:
        """Let the parameters hold the averages of the weights (`ema`) inside a `with` block, as for an evaluation.

        The weights return at the end of the block, whatever happens in it. They are held in copies until then.
        Inside, `step`, `state_dict` and another `averaged` raise RuntimeError. The averages of buffers that
        `average_buffers` has registered are swapped too.

        Raises: ValueError, before anything changes, if no group has an average, or the parameters are shared.
        """
        return averages.averaged(self)

    def average_into(self, model: nn.Module | None = None) -> None:
        """Write the averages of the weights (`ema`) into a model for good, with those of registered buffers.

        Args:
            model: the trained model, or a copy of it, whose parameters are matched by name if the optimizer has names
                (`model.named_parameters()`, or after `average_buffers`), else by order. None: the optimizer's own
                parameters.
        Raises: ValueError or TypeError, before anything changes, for a model with other parameters, or without ema.
        """
        averages.average_into(self, model)

    def average_buffers(self, model: nn.Module) -> None:
        """Average the buffers of a model too, such as BatchNorm's running statistics, at each step from now on.

        The decay is that of the first group with an average. Integer buffers are copied. `state_dict` holds the
        averages under "ema_buffers", which a load restores before or after this call. A copy of the optimizer holds
        them too, and averages on once it is called there.

        Raises: ValueError, before anything changes, if no group has an average, or loaded averages do not fit.
        """
        averages.average_buffers(self, model)

    def explain(self) -> str:
        """Describe each group: its rule, the meaning of its numbers, and which backends step it or why not."""
        return explain.explain(self._plain_groups(), self.backend, self.state, self._stepper.guard)

    def _plain_groups(self) -> list[dict[str, Any]]:
        """Return copies of the groups with Python numbers. Raises: as `step`, for edited groups that are invalid."""
        check_groups(self.param_groups)
        groups = [dict(group) for group in self.param_groups]
        for group in groups:
            settings.check_edited(group, {})
        return groups

    @property
    def skipped(self) -> Skipped:
        """The steps that nonfinite="skip" skipped: `total`, `in_a_row`, `last`, and the `parameter` at fault."""
        return Skipped() if self._stepper.guard is None else self._stepper.guard.skipped(self.param_groups)

    @property
    def grad_norm(self) -> Tensor | float | None:
        """The norm that clip_global_norm bounded in the last step, before it did; on a GPU, a tensor there."""
        return self._stepper.grad_norm

    def lint(self, steps: int | None = None) -> list[lint.Finding]:
        """Return likely mistakes in the settings and the state, the worst first. Nothing is changed.

        Args:
            steps: number of steps of the whole run, if known.
        """
        return lint.lint(self._plain_groups(), self.state, steps, lint.history(self))

    def __repr__(self) -> str:
        return explain.show(type(self).__name__, self.param_groups, self.backend, self._stepper.guard)
