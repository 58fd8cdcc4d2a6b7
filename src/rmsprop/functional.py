"""RMSprop as a function of explicit state: the name and order of torch.optim.functional.rmsprop (torch 2.15)."""

from itertools import chain

import torch
from torch import Tensor

from rmsprop import kernels, settings
from rmsprop.spec import NARROWED, EpsMode, StateDtype, WeightDecayMode, random_key
from rmsprop.tensors import shards
from rmsprop.tensors.bucket import Bucket, is_random, keeps, resolved, slot_dtype
from rmsprop.tensors.forked import serial_after_fork


@serial_after_fork
def rmsprop(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    grad_avgs: list[Tensor],
    momentum_buffer_list: list[Tensor],
    state_steps: list[Tensor],
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
    capturable: bool = False,
    has_complex: bool = False,  # noqa: ARG001
    *,
    lr: float | Tensor,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    centered: bool,
    eps_mode: EpsMode = "outside",
    lr_in_buffer: bool = False,
    nesterov: bool = False,
    bias_correction: bool = False,
    weight_decay_mode: WeightDecayMode = "l2",
    reference_lr: float | None = None,
    max_update: float | None = None,
    state_dtype: StateDtype = "float32",
    seed: int = 0,
    backend: str = "auto",
) -> None:
    """Advance the parameters by one step, in place, given their gradients and state.

    Equation: spec.py, lines [1]-[9].
    Shapes:   params[i], grads[i], square_avgs[i] and, where the rule keeps them, grad_avgs[i] (centered) and
              momentum_buffer_list[i] (momentum > 0) share one shape; state_steps[i] has no dimensions.
    State:    square_avgs, grad_avgs and momentum_buffer_list in the dtypes of state_dtype: bfloat16, or for "float8"
              square_avgs in uint8. `seed` and the index in the lists determine how they are rounded.
    Mutates:  params, square_avgs, grad_avgs, momentum_buffer_list, state_steps. Never grads.
    Raises:   ValueError or TypeError, before any change: a setting is out of range, the lists have unequal lengths,
              or an entry of state_steps is not a tensor or, with bias_correction, is float32 and has reached 2²⁴,
              where it stops counting. RuntimeError inside torch.func.grad, vmap and similar transforms without
              differentiable=True, which supports them.

    `has_complex` is ignored, since complex tensors are detected; torch has this argument.
    """
    tensors = (params, grads, square_avgs, grad_avgs, momentum_buffer_list, state_steps)
    if not differentiable and any(map(_in_transform, (lr, *chain.from_iterable(tensors)))):
        raise RuntimeError(
            "a tensor is inside a transform of torch.func (grad, vmap, jvp, ...), which requires a step that "
            "autograd records: give differentiable=True"
        )
    group = settings.check(
        {
            **settings.TORCH_GROUP,
            "lr": 0.0 if _in_transform(lr) else lr,  # inside a transform, lr has no value to validate
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "maximize": maximize,
            "eps_mode": eps_mode,
            "lr_in_buffer": lr_in_buffer,
            "nesterov": nesterov,
            "bias_correction": bias_correction,
            "weight_decay_mode": weight_decay_mode,
            "reference_lr": reference_lr,
            "max_update": max_update,
            "state_dtype": state_dtype,
            "seed": seed,
            "foreach": foreach,
            "differentiable": differentiable,
            "capturable": capturable,
        }
    )
    rule, hyper = settings.read({**group, "lr": lr})
    lists: dict[str, list[Tensor]] = {
        "grads": grads,
        "square_avgs": square_avgs,
        "state_steps": state_steps,
        **({"grad_avgs": grad_avgs} if rule.centered else {}),
        **({"momentum_buffer_list": momentum_buffer_list} if rule.momentum else {}),
    }
    for name, values in lists.items():
        if len(values) != len(params):
            raise ValueError(f"{name} has {len(values)} tensors for {len(params)} params; give one for each")
    if not all(isinstance(t, Tensor) for t in state_steps):
        raise TypeError(
            "state_steps must hold one tensor with one element for each parameter, such as torch.tensor(0.)"
        )
    if rule.bias_correction and not differentiable and not torch.compiler.is_compiling():
        _refuse_stopped(state_steps)
    for name, values in {"params": params, **lists}.items():
        lazy = next((i for i, x in enumerate(values) if x.is_conj() and name != "grads"), None)
        if lazy is not None:
            raise ValueError(
                f"{name}[{lazy}] is conjugated lazily, so a step cannot write it as pairs of reals; give its "
                "resolve_conj()"
            )
    for slot, values in zip(NARROWED, (square_avgs, grad_avgs, momentum_buffer_list), strict=True):
        if slot in rule.slots():
            _refuse_precision(slot, values, params, group["state_dtype"])
    whole = Bucket(
        list(params),
        list(map(resolved, grads)),
        {
            "square_avg": list(square_avgs),
            "grad_avg": list(grad_avgs) if rule.centered else [],
            "momentum_buffer": list(momentum_buffer_list) if rule.momentum else [],
            "step": list(state_steps),
        },
        foreach=foreach,
        capturable=capturable,
        differentiable=differentiable,
        state_dtype=group["state_dtype"],
        random_keys=[random_key(group["seed"], i) for i in range(len(params))] if is_random(group) else [],
    )
    work = [
        (kernels.pick(kernels.check_backend(backend), rule, part), part) for part in shards.localized(whole).split()
    ]
    for chosen, part in work:
        chosen.step(rule, hyper, part)
        shards.written(part)


def _refuse_precision(slot: str, values: list[Tensor], params: list[Tensor], state_dtype: StateDtype) -> None:
    """Raise for an average whose dtype is not that of state_dtype: codes would pass for numbers, or the reverse."""
    for i, (x, p) in enumerate(zip(values, params, strict=True)):
        if not keeps(slot, x.dtype, p.dtype, state_dtype):
            raise ValueError(
                f"the {slot} of params[{i}] is {x.dtype}, but state_dtype={state_dtype!r} keeps it in "
                f"{slot_dtype(slot, p.dtype, state_dtype)}; give state of that dtype, or the state_dtype that it was "
                "made with"
            )


def _refuse_stopped(steps: list[Tensor]) -> None:
    """Raise for a step counter on the CPU that can no longer count; a step cannot replace the caller's tensor."""
    for i, t in enumerate(steps):
        if t.dtype == torch.float32 and t.is_cpu and t.numel() == 1 and t.item() >= 2**24:
            raise ValueError(
                f"state_steps[{i}] is float32 and has reached {t.item():.0f}, where adding 1 has no effect, so "
                "bias_correction would use a wrong count; give it as torch.float64"
            )


def _in_transform(value: object) -> bool:
    """Return whether a value is a tensor inside a transform of torch.func."""
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)
