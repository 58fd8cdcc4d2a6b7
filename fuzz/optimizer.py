"""Fuzz RMSprop: random misuse must end in a correct step, or in a one-sentence error that changes nothing.

    python fuzz/optimizer.py --count 10000

Each input builds an optimizer from random valid and invalid parameters and settings. It then steps with random
gradients, edits groups, and loads state dicts (its own, torch's, damaged ones) and damaged checkpoint files. A
refusal must come from a `raise` of this package or of torch's Optimizer, consist of a sentence, and leave parameters,
gradients, state, and groups unchanged bit by bit. Steps with ordinary numbers are compared with the float64
reference, and others with the eager backend. Every input is determined by its number, so `--first N --count 1`
reproduces a failure. It runs in a child process, for at most 20 seconds.
"""

import argparse
import copy
import math
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections import OrderedDict, UserDict, UserList
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from convert import BATCH, LONGEST, fence, hurt, in_children
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent / "tests" / "tools"))
from cases import BUDGET, Case, as64, errors, state64

import rmsprop
from rmsprop import RMSprop, checkpoint, reference, settings, step_in_backward
from rmsprop.dialects import DIALECTS

SECONDS = 20
NAN, INF = math.nan, math.inf
HALF = (torch.float16, torch.bfloat16)
REAL = (torch.float32, torch.float64, *HALF)
OWNERS = (str(Path(rmsprop.__file__).parent), str(Path(torch.optim.__file__).parent / "optimizer.py"))
ODD: tuple[Any, ...] = (None, True, "0.1", "", b"x", [], {}, (0.1,), 1j, NAN, INF, -INF, -1, -0.5, 10**400, object)
ODD_TENSORS: tuple[Callable[[], Tensor], ...] = (
    lambda: torch.ones(2),
    lambda: torch.tensor(-1.0),
    lambda: torch.tensor(NAN),
    lambda: torch.tensor(1),
    lambda: torch.tensor(0.1, device="meta"),
    lambda: torch.tensor(0.1j),
    lambda: torch.ones(0),
    lambda: torch.eye(2).to_sparse(),
)
# Settings with valid values; the first is torch's.
GOOD: dict[str, tuple[Any, ...]] = {
    "lr": (0.01, 0, 1e-3, 1e-30, 5.0, 1e300, np.float32(0.1), torch.tensor(0.01), torch.tensor([0.02])),
    "alpha": (0.99, 0.9, 0, 0.3, 0.9999999, np.float64(0.5)),
    "eps": (1e-8, 0, 1e-3, 1, 1e-45, 1e-60, 1e30, 1e300),
    "weight_decay": (0, 0.01, 1.0, 1e10, 1e300),
    "momentum": (0, 0.9, 0.5, 0.999999),
    "centered": (False, True, 1, np.True_),
    "capturable": (False, True),
    "foreach": (None, None, None, True, False),
    "maximize": (False, True),
    "differentiable": (False, False, False, True),
    "eps_mode": ("outside", "inside", "both", "floor"),
    "square_avg_init": (0, 1, 1e-3, 1e30, 1e300),
    "lr_in_buffer": (False, True),
    "nesterov": (False, True),
    "bias_correction": (False, True),
    "weight_decay_mode": ("l2", "l1", "decoupled", "corrected"),
    "sparse": (None, "lazy", "dense"),
    "fused": (None, None, True, False),
    "clip_value": (None, 0.5, 0),
    "clip_norm": (None, 1.0),
    "clip_global_norm": (None, 1.0, 1e-30),
    "clip_weights": (None, 0.1),
    "clip_after_decay": (False, True),
    "reference_lr": (None, 1.0),
    "max_update": (None, 10.0, 1e-3),
    "ema": (None, 0.9, 0, 0.9999),
    "ema_warmup": (None, None, "tensorflow", "timm"),
    "ema_start": (0, 2),
    "ema_interval": (1, 3),
    "rounding": ("nearest", "stochastic"),
    "compensation": (False, True),
    "seed": (0, 7),
}
WHOLE = {  # settings of the whole optimizer
    "backend": ("auto", "auto", "auto", "eager", "cpu", "triton"),
    "amp_in_step": (False, False, True),
    "nonfinite": ("propagate", "skip", "raise"),
    "nonfinite_limit": (100, 1, None),
}


class FaultError(Exception):
    """A description of a failure."""


# --- arguments of an optimizer ---------------------------------------------------------------------


def numbers(draw: random.Random, shape: tuple[int, ...], wild: bool) -> Tensor:
    """Return ordinary numbers and exact zeros; if wild, also NaN, infinite, huge, and tiny ones."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * 10.0 ** torch.randint(-2, 2, shape, generator=generator)
    x[torch.rand(shape, generator=generator) < 0.1] = 0.0
    if wild and x.numel():
        for _ in range(draw.randint(1, 3)):
            value = draw.choice((NAN, INF, -INF, 1e30, -1e300, 1e-30, 1e-310, 6e4, 1e-7, 0.0))
            x.view(-1)[draw.randrange(x.numel())] = value
    return x


def dense(draw: random.Random, dtype: torch.dtype) -> Tensor:
    """Return a tensor that is contiguous, transposed, channels last, with gaps, or a view into another."""
    shape = draw.choice(((), (1,), (0,), (3,), (17,), (2, 3), (5, 4), (2, 3, 2, 2), (1, 3, 1), (0, 2), (300,)))
    x = numbers(draw, shape, wild=False).to(dtype)
    how = draw.randrange(8)
    if how == 0 and x.dim() == 2:
        return x.t()
    if how == 1 and x.dim() == 4:
        return x.to(memory_format=torch.channels_last)
    if how == 2 and x.dim() > 0:
        return torch.cat([x, x], dim=-1)[..., ::2]
    if how == 3 and x.dim() > 0:
        return torch.cat([x, x])[x.shape[0] :]
    return x


def odd_parameter(draw: random.Random) -> Any:
    """Return an item of a parameter list that is not a plain parameter."""
    makers: tuple[Callable[[], Any], ...] = (
        lambda: nn.Parameter(dense(draw, draw.choice((torch.complex64, torch.complex128)))),
        lambda: nn.Parameter(torch.zeros(2, 3, device="meta")),
        lambda: nn.Parameter(torch.eye(3).to_sparse()),
        lambda: nn.Parameter(torch.eye(3).to_sparse_csr()),
        lambda: torch.ones(1).expand(3).requires_grad_(),
        lambda: torch.ones(5).as_strided((3, 2), (1, 1)).requires_grad_(),
        lambda: torch.arange(3),
        lambda: torch.zeros(3, dtype=torch.bool),
        lambda: torch.zeros(3).to(torch.float8_e4m3fn),
        lambda: torch.zeros(3, dtype=torch.complex32),
        lambda: nn.Parameter(torch.ones(2)) * 2,
        lambda: nn.UninitializedParameter(),
        lambda: nn.Parameter(torch.ones(3), requires_grad=False),
        lambda: draw.choice((None, 1, "weight", [], {}, (), ("a",), ("a", 1), object())),
    )
    return draw.choice(makers)()


def parameters(draw: random.Random, odd: float) -> Any:
    """Return a list of parameters, named or not, with a given rate of unusual ones."""
    dtype = draw.choice(REAL)
    found: list[Any] = []
    for _ in range(draw.choice((1, 1, 2, 3, 6))):
        dtype = draw.choice(REAL) if draw.random() < 0.3 else dtype
        found.append(odd_parameter(draw) if draw.random() < odd else nn.Parameter(dense(draw, dtype)))
    if draw.random() < 0.1:  # two views of the same memory
        base = torch.ones(8)
        found += [nn.Parameter(base[:4]), nn.Parameter(base[4 - draw.choice((0, 1)) : 8])]
    if draw.random() < odd:
        found.append(draw.choice(found))
    if draw.random() < 0.3:
        names = [f"p{i}" if draw.random() < 0.97 else "p0" for i in range(len(found))]
        found = list(zip(names, found, strict=True))
        if draw.random() < odd:
            found[-1] = found[-1][1]
    if draw.random() < odd / 3:
        return draw.choice(([], None, torch.ones(2), {"a": 1}, 3, set(), nn.Parameter(torch.ones(1))))
    return found if draw.random() < 0.8 else iter(found)


def arguments(draw: random.Random, bad: float, few: int = 4) -> dict[str, Any]:
    """Return some settings, with a given rate of invalid ones."""
    given: dict[str, Any] = {}
    for name in draw.sample(sorted(GOOD), draw.randint(0, few)):
        given[name] = draw.choice(GOOD[name])
        if draw.random() < bad:
            given[name] = draw.choice(ODD) if draw.random() < 0.8 else draw.choice(ODD_TENSORS)()
    if draw.random() < 0.25:
        row = DIALECTS[draw.choice(sorted(DIALECTS))]
        given["dialect"] = row.name
        for word in draw.sample(sorted(row.arguments), draw.randint(0, min(2, len(row.arguments)))):
            given[word] = draw.choice((*GOOD.get(row.arguments[word], (0.1,)), *(ODD if draw.random() < bad else ())))
        if row.defaults()["lr"] is None and "lr" not in row.arguments.values():
            given["lr"] = 0.01
    if draw.random() < bad / 3:
        given[draw.choice(("rho", "lrr", "betas", "dialect", "seeds", "", "recipe"))] = draw.choice((0.9, *ODD))
    return given


def built(draw: random.Random) -> RMSprop:
    """Construct an optimizer. Raises: the errors of the constructor."""
    odd, bad = draw.choice(((0.0, 0.0), (0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.2, 0.2)))
    given = arguments(draw, bad)
    for name in draw.sample(sorted(WHOLE), draw.choice((0, 0, 1, 2))):
        given[name] = draw.choice(ODD) if draw.random() < bad else draw.choice(WHOLE[name])
    if draw.random() < 0.7:
        return RMSprop(parameters(draw, odd), **given)
    groups: list[Any] = []
    for _ in range(draw.randint(1, 3)):
        own = {k: v for k, v in arguments(draw, bad, 2).items() if k != "params"}
        groups.append({"params": parameters(draw, odd), **own, **({"note": [1]} if draw.random() < 0.2 else {})})
    if draw.random() < odd / 2:
        groups.append(draw.choice(({}, {"params": None}, {"params": []}, None, 3)))
    return RMSprop(groups, **given)


def gradient(draw: random.Random, p: Tensor, wild: bool) -> Tensor | None:
    """Return a gradient that torch accepts for the parameter."""
    if draw.random() < 0.12:
        return None
    if p.is_meta or p.dtype not in REAL or p.layout != torch.strided:
        return torch.ones_like(p) if p.layout == torch.strided and not p.is_complex() else p.detach().clone()
    g = numbers(draw, tuple(p.shape), wild).to(p.dtype)
    how = draw.randrange(14)
    if how == 0 and p.dim() > 0:
        return g.to_sparse(draw.randint(1, p.dim()))
    if how == 1 and p.dim() > 0 and p.numel():
        at = torch.tensor([[0, 0, p.shape[0] - 1]])
        return torch.sparse_coo_tensor(at, g[at[0]], p.shape, check_invariants=True)
    if how == 2 and p.dim() == 2:
        return g.to_sparse_csr()
    if how == 3 and p.dim() == 2:
        return g.t().contiguous().t()
    if how == 4:
        return torch.full((), draw.uniform(-1, 1), dtype=p.dtype).expand(p.shape)
    if how == 5:
        return p.detach()  # shares its memory
    if how == 6 and p.dim() > 0:
        return torch.cat([g, g], dim=-1)[..., ::2]
    if how == 7 and p.dtype in (torch.float32, torch.float64):
        return torch.complex(torch.zeros_like(g), -g).conj().imag  # negated lazily
    if how == 8:
        return torch.empty_like(p).copy_(g).requires_grad_()
    return torch.empty_like(p).copy_(g) if 0 not in p.stride() else g


# --- refusals --------------------------------------------------------------------------------------


def bits(x: Any) -> Any:
    """Return a representation of a value that compares equal if it has not changed, including NaN."""
    if isinstance(x, Tensor):
        kind = (
            type(x).__name__,
            str(x.dtype),
            tuple(x.shape) if not isinstance(x, nn.UninitializedParameter) else (),
        )
        if isinstance(x, nn.UninitializedParameter) or x.is_meta:
            return kind
        x = x.detach()
        if x.layout == torch.sparse_coo:
            return (*kind, bits(x._indices()), bits(x._values()))
        if x.layout != torch.strided:
            return (*kind, bits(x.crow_indices()), bits(x.col_indices()), bits(x.values()))
        whole = x.resolve_neg().resolve_conj().clone(memory_format=torch.contiguous_format).reshape(-1)
        strides = tuple(step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1 and x.numel())
        return (*kind, strides, bytes(whole.view(torch.uint8).numpy()) if x.numel() else b"")
    if isinstance(x, dict):
        return {str(key): bits(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [bits(value) for value in x]
    x = x.item() if isinstance(x, np.generic) else x  # a step converts such a setting to a Python number
    return (type(x).__name__, repr(x))


def everything(optimizer: RMSprop) -> Any:
    """Return everything that a refusal must not change."""
    groups = [
        {name: [id(p) for p in value] if name == "params" else bits(value) for name, value in group.items()}
        for group in optimizer.param_groups
    ]
    params = [(bits(p), bits(p.grad), id(p.grad)) for group in optimizer.param_groups for p in group["params"]]
    state = {
        id(p) if isinstance(p, Tensor) else repr(p): bits(entry)
        for p, entry in optimizer.state.items()
        if entry != {}
    }
    return {"groups": groups, "params": params, "state": state}


def refused(what: str, error: BaseException) -> None:
    """Raise a FaultError if the error is not a documented refusal."""
    frames = traceback.extract_tb(error.__traceback__)
    message = str(error)
    shown = "".join(traceback.format_exception(error))
    if not isinstance(error, ValueError | TypeError | RuntimeError):
        raise FaultError(f"{what}: a {type(error).__name__}\n{shown}")
    last = frames[-1]
    if not last.filename.startswith(OWNERS) or not (last.line or "").startswith("raise"):
        raise FaultError(f"{what}: not raised on purpose\n{shown}")
    if " " not in message or len(message) > 10 * LONGEST:
        raise FaultError(f"{what}: not a sentence\n{shown}")


def tried(what: str, optimizer: RMSprop, do: Callable[[], Any]) -> Any:
    """Call `do`, and check that a refusal has a message and changes nothing. Returns: its result, or None."""
    before = everything(optimizer)
    try:
        return do()
    except Exception as error:
        refused(what, error)
        after = everything(optimizer)
        if after != before:
            names = ", ".join(name for name in before if before[name] != after[name])
            raise FaultError(f"{what}: {names} changed\n{''.join(traceback.format_exception(error))}") from None
        return None


# --- steps -----------------------------------------------------------------------------------------


def tame(group: dict[str, Any], p: Tensor) -> bool:
    """Return whether the reference can judge this parameter's step to the last digits."""
    if (
        p.grad is None
        or p.grad.layout != torch.strided
        or p.layout != torch.strided
        or p.dtype not in REAL
        or p.is_meta
    ):
        return False
    if any(group[name] is not None for name in ("clip_value", "clip_norm", "clip_global_norm", "clip_weights")):
        return False
    if (
        group.get("max_update") is not None
        or group.get("rounding", "nearest") != "nearest"
        or group.get("compensation")
    ):
        return False
    ordinary = 1e-6 <= group["eps"] <= 10 and group["alpha"] <= 0.999 and group["weight_decay"] <= 1
    sizes = p.grad.detach().abs()[p.grad.detach() != 0].double()
    fits = sizes.numel() == 0 or bool((sizes >= 1e-3).all() and (sizes <= 1e3).all())
    finite = bool(torch.isfinite(p).all()) and bool((p.detach().abs() < 1e3).all())
    return (
        ordinary
        and fits
        and finite
        and float(group["lr"]) <= 1
        and group["square_avg_init"] <= 10
        and not _aliased(p)
    )


def _aliased(p: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(p.shape, p.stride(), strict=True))


def judged_step(optimizer: RMSprop) -> None:
    """Take one step, and compare it with the reference or the eager backend."""
    lazy = nn.UninitializedParameter
    pairs = [(group, p) for group in optimizer.param_groups for p in group["params"] if not isinstance(p, lazy)]
    held = [p for _, p in pairs if not p.is_meta and p.layout == torch.strided and p.numel()]
    apart = len({p.untyped_storage().data_ptr() for p in held}) == len(held)
    judged = []
    for group, p in pairs:
        known = optimizer.state.get(p)
        try:
            tensors = [x for x in (known or {}).values() if isinstance(x, Tensor)]
            kept = p.is_meta or all(x.layout == torch.strided and torch.isfinite(x).all() for x in tensors)
            usual = apart and kept and tame(group, p)
            rule, hyper = settings.read(group)
            before = (as64(p), state64(known) if known else reference.start(rule, as64(p))) if usual else None
        except Exception:  # settings that the step must refuse
            continue
        if usual:
            lacks = {"grad_avg": np.zeros(tuple(p.shape)), "momentum_buffer": np.zeros(tuple(p.shape))}
            judged.append((Case(rule, replace(hyper, lr=float(hyper.lr))), (before[0], {**lacks, **before[1]}), p))
    grads = [None if p.grad is None else bits(p.grad) for _, p in pairs]
    twin = _twin(optimizer) if apart else None
    whole = tried("step", optimizer, lambda: (optimizer.step(), True)[1])
    if not whole:
        return
    skipped = getattr(getattr(optimizer, "skipped", None), "in_a_row", 0) > 0
    for (_, p), grad in zip(pairs, grads, strict=True):
        own_memory = p.grad is None or p.is_meta or p.grad.is_sparse or p.grad.layout != torch.strided
        if (own_memory or p.grad.data_ptr() != p.data_ptr()) and grad != (None if p.grad is None else bits(p.grad)):
            raise FaultError("a step edited a gradient")
    if skipped or not _counted(optimizer, pairs):
        return  # a first step with lr 0 and zero gradients only creates state
    for case, before, p in judged:
        grad = as64(p.grad.resolve_neg()) if p.grad.data_ptr() != p.data_ptr() else before[0]
        state = {**{k: torch.from_numpy(v) for k, v in before[1].items() if k != "step"}, **optimizer.state[p]}
        try:
            found = errors(case, before, grad, (p, state))
        except AssertionError as error:
            raise FaultError(f"step of {p.dtype} {tuple(p.shape)}: {error}\n{optimizer!r}") from error
        beyond = {name: off for name, off in found.items() if not off <= 8 * BUDGET[name]}
        if beyond:
            raise FaultError(f"step of {p.dtype} {tuple(p.shape)}: {beyond} units from the reference\n{optimizer!r}")
        _judge_average(case, before, p, optimizer)
    if twin is not None and not judged:
        _compare(optimizer, twin)


def _judge_average(case: Case, before: Any, p: Tensor, optimizer: RMSprop) -> None:
    """Check [10] of a judged step."""
    if case.hyper.average is None:
        return
    state = optimizer.state[p]
    start = before[1].get("ema", before[0])
    wanted = reference.average(case.hyper.average.decay_at(int(state["step"])), as64(p), start)
    slack = 1e-2 if state["ema"].dtype in HALF else 1e-6
    if not np.allclose(as64(state["ema"]), wanted, rtol=slack, atol=slack * np.abs(start).max(initial=0)):
        raise FaultError(f"the average of {p.dtype} {tuple(p.shape)} is not the reference's\n{optimizer!r}")


def _counted(optimizer: RMSprop, pairs: list[Any]) -> bool:
    return all(float(optimizer.state[p]["step"]) > 0 for _, p in pairs if p.grad is not None and not p.is_meta)


def _twin(optimizer: RMSprop) -> RMSprop | None:
    """Return a copy that steps with torch's operators."""
    try:
        twin = copy.deepcopy(optimizer)
    except Exception:  # torch cannot copy it
        return None
    twin.backend = "eager"
    for group, own in zip(optimizer.param_groups, twin.param_groups, strict=True):
        own["fused"] = None
        for name in ("sparse", "clip_after_decay", "clip_value_last"):  # unused settings may be invalid
            if own[name] not in [x for x in (None, True, "lazy", "dense") if type(own[name]) is type(x)]:
                own[name] = settings.TORCH_GROUP[name]
        for p, q in zip(group["params"], own["params"], strict=True):
            if p.grad is not None and p.grad.layout == torch.strided and not p.is_meta:
                q.grad = q.detach() if p.grad.data_ptr() == p.data_ptr() else p.grad
            else:
                q.grad = p.grad
    return twin


def _compare(optimizer: RMSprop, twin: RMSprop) -> None:
    """Check that the copy reaches the same numbers, as far as extreme values allow."""
    try:
        twin.step()
    except Exception as error:
        raise FaultError(
            f"the eager backend refuses a step that was taken\n{''.join(traceback.format_exception(error))}"
        ) from None
    for group, other in zip(optimizer.param_groups, twin.param_groups, strict=True):
        if group["centered"] or group.get("rounding", "nearest") != "nearest":
            continue  # v − m² of extreme values is only rounding error
        for p, q in zip(group["params"], other["params"], strict=True):
            if p.is_meta or p.grad is None or p.layout != torch.strided or not p.is_floating_point():
                continue
            a, b = p.detach().double(), q.detach().double()
            slack = 0.05 if p.dtype in HALF else 1e-3
            lr = abs(float(group["lr"]))
            lr = lr if math.isfinite(lr) else 0.0
            if not torch.isfinite(lr * p.grad.detach().to_dense().double()).all():
                continue  # torch's addcdiv multiplies before it divides
            if not torch.allclose(a, b, rtol=slack, atol=slack * (1e-6 + lr), equal_nan=True):
                raise FaultError(
                    f"step of {p.dtype} {tuple(p.shape)}: {a.tolist()} and by eager {b.tolist()}\n{optimizer!r}"
                )


def stepped(draw: random.Random, optimizer: RMSprop) -> None:
    """Set new gradients, and step."""
    wild = draw.random() < 0.3
    for group in optimizer.param_groups:
        for p in group["params"]:
            if isinstance(p, nn.UninitializedParameter):
                continue
            try:
                p.grad = gradient(draw, p, wild)
            except (RuntimeError, TypeError):  # torch refuses such a gradient
                p.grad = None
    judged_step(optimizer)


def _tie(draw: random.Random, optimizer: RMSprop, params: list[Tensor]) -> None:
    """Move a parameter, a gradient, or a slot into memory that a step writes, perhaps shifted by an element."""
    a, b = draw.choice(params), draw.choice(params)
    owner = draw.choice((a, *optimizer.state.get(a, {}).values()))
    if not isinstance(owner, Tensor):
        return
    memory = owner.detach().reshape(-1)
    shift = draw.choice((0, 0, 1))
    if memory.numel() - shift < b.numel():
        return
    part = memory[shift : shift + b.numel()].view(b.shape)
    how = draw.randrange(3)
    if how == 0 and part.dtype == b.dtype:
        b.data = part
    elif how == 1 and part.dtype == b.dtype:
        b.grad = part
    elif optimizer.state.get(b):
        optimizer.state[b][draw.choice(sorted(optimizer.state[b]))] = part


def _disguise(draw: random.Random, optimizer: RMSprop, params: list[Tensor]) -> None:
    """Replace a gradient or a slot by the same numbers in another representation."""
    p = draw.choice(params)
    entry = optimizer.state.get(p) or {}
    name = draw.choice(("grad", *sorted(entry)))
    x = p.grad if name == "grad" else entry[name]
    if not isinstance(x, Tensor):
        return
    makers: tuple[Callable[[Tensor], Any], ...] = (
        lambda x: torch._neg_view(x.clone()),
        Stored,
        lambda x: x.clone().as_subclass(type("Marked", (Tensor,), {})),
        lambda x: x[None].expand(2, *x.shape)[0],
        lambda x: x.reshape(-1).clone().view(x.shape),
        lambda x: x.to_sparse() if x.dim() else x.long(),
        lambda x: x.double(),
        lambda x: x.clone().resize_(x.numel()),
        lambda x: nn.Parameter(x.clone()),
        lambda x: x.numpy(),
        lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    )
    other = draw.choice(makers)(x.detach())
    if name == "grad":
        p.grad = other
    else:
        entry[name] = other


def _rehouse(draw: random.Random, optimizer: RMSprop, params: list[Tensor]) -> None:
    """Replace a list, an entry, the state, or a setting by another kind of object."""
    group, p = draw.choice(optimizer.param_groups), draw.choice(params)
    entry = optimizer.state.get(p)
    how = draw.randrange(9)
    if how == 0:
        group["params"] = draw.choice((tuple, UserList, list))(group["params"])
    elif how == 1 and entry:
        optimizer.state[p] = draw.choice((UserDict, OrderedDict, dict))(entry)
    elif how == 2 and entry:
        optimizer.state[draw.choice(params)] = entry
    elif how == 3 and entry:
        entry["step"] = draw.choice((3, torch.tensor(3), torch.tensor(3.0), torch.ones(1), None, True))
    elif how == 4:
        group["params"].append(draw.choice((None, p, nn.Parameter(torch.ones(2)))))
    elif how == 5:
        group["params"].reverse()
    elif how == 6:
        optimizer.state = draw.choice((UserDict, dict))(optimizer.state)
    elif how == 7:
        name = draw.choice(("alpha", "lr", "eps", "momentum"))
        group[name] = draw.choice((True, "0.1", torch.tensor(1), torch.tensor(0.5)))
    elif entry:
        entry["compensation"] = torch.zeros_like(p)


class Stored(Tensor):
    """A subclass whose operators use twice the stored values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Stored":
        own: Stored = Tensor._make_subclass(cls, inner)
        own.inner = inner
        return own

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = torch.utils._pytree.tree_map(
            lambda x: x.inner * 2 if isinstance(x, Stored) else x, (args, kwargs or {})
        )
        return func(*given[0], **given[1])


def moved(draw: random.Random, optimizer: RMSprop) -> None:
    """Change something under a cached plan, and compare the next steps bit by bit with a copy that has no plan."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not all(
        type(p) is nn.Parameter
        and p.dtype in REAL
        and p.layout == torch.strided
        and p.is_cpu
        and p.numel()
        and p.is_contiguous()
        for p in params
    ):
        return
    if len({p.untyped_storage().data_ptr() for p in params}) < len(params):
        return  # a copy has them apart
    if optimizer._stepper.guard is not None or any(group["differentiable"] for group in optimizer.param_groups):
        return
    try:
        for _ in range(2):
            for p in params:
                p.grad = torch.full_like(p, 0.5)
            optimizer.step()
        other = copy.deepcopy(optimizer)
    except Exception:  # settings that every step refuses
        return
    if optimizer._stepper.plan is None:
        return
    seed = draw.randrange(2**31)
    ends = []
    for own in (optimizer, other):
        again = random.Random(seed)
        held = [p for group in own.param_groups for p in group["params"]]
        for p in held:
            p.grad = torch.linspace(-1, 1, p.numel()).to(p.dtype).view(p.shape)
        try:
            for _ in range(again.randint(1, 2)):
                again.choice((_tie, _disguise, _rehouse))(again, own, held)
        except (RuntimeError, TypeError, ValueError):  # torch refuses it
            pass
        end: list[Any] = []
        for _ in range(2):
            own._stepper.plan = own._stepper.plan if own is optimizer else None
            try:
                own.step()
                end.append("stepped")
            except Exception as error:
                refused("step", error)
                end.append(str(error))
            end += [bits(p.detach().resolve_neg()) for p in held]
            for p in held:
                p.grad = torch.full(p.shape, 0.25, dtype=p.dtype)
        ends.append(end)
    if ends[0] != ends[1]:
        at = [i for i, (a, b) in enumerate(zip(*ends, strict=True)) if a != b]
        raise FaultError(
            f"steps with and without a plan differ at {at} of {ends[0][:1]} and {ends[1][:1]}\n{optimizer!r}"
        )
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.update(params=[nn.Parameter(torch.ones(3))], lr=0.01, alpha=0.9, eps=1e-8, momentum=0.0)
        group["nesterov"] = False


def mutated(draw: random.Random, optimizer: RMSprop) -> None:
    """Edit a group as schedulers and users do, step, and restore it."""
    group = draw.choice(optimizer.param_groups)
    name = draw.choice(sorted(GOOD.keys() & group.keys()))
    kept = group[name]
    wrong = draw.random() < 0.3
    group[name] = draw.choice(ODD) if wrong else draw.choice(GOOD[name])
    if wrong and draw.random() < 0.3:
        group[name] = draw.choice(ODD_TENSORS)()
    stepped(draw, optimizer)
    group[name] = kept


def grown(draw: random.Random, optimizer: RMSprop) -> None:
    """Add a valid or an invalid group."""
    bad = draw.choice((0.0, 0.3))
    group = {"params": parameters(draw, bad), **arguments(draw, bad, 3)}
    if draw.random() < bad:
        group["params"] = [*optimizer.param_groups[0]["params"][:1]]
    tried("add_param_group", optimizer, lambda: optimizer.add_param_group(group))


# --- state dicts and checkpoints -------------------------------------------------------------------


def torchs(draw: random.Random, optimizer: RMSprop) -> dict[str, Any] | None:
    """Return the state dict of another optimizer over parameters of the same shapes."""
    cls = draw.choice(
        (torch.optim.RMSprop, torch.optim.RMSprop, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)
    )
    try:
        groups = [
            {"params": [nn.Parameter(torch.ones_like(p).detach()) for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        other = cls(groups, lr=0.01, **({"momentum": 0.9} if cls in (torch.optim.SGD, torch.optim.RMSprop) else {}))
        for group in groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        other.step()
        return other.state_dict()
    except Exception:  # torch's optimizers cannot step these parameters
        return None


def damaged(draw: random.Random, saved: dict[str, Any]) -> Any:
    """Return a state dict with one to three changes, invalid or valid."""
    saved = copy.deepcopy(saved)
    for _ in range(draw.randint(1, 3)):
        saved = _damage(draw, saved)
        if not isinstance(saved, dict) or not isinstance(saved.get("param_groups"), list):
            break
    return saved


def _damage(draw: random.Random, saved: Any) -> Any:
    groups, state = saved["param_groups"], saved.get("state")
    value = draw.choice((*ODD, -1, 3, "p0", torch.ones(3), torch.tensor(NAN), torch.tensor(2**40), [0], {"step": 1}))
    value = draw.choice(ODD_TENSORS)() if draw.random() < 0.2 else value
    how = draw.randrange(10)
    if how == 0:
        return draw.choice(
            (None, 3, [], {}, {"model": saved}, {**saved, "state": value}, {**saved, "param_groups": value})
        )
    if how == 1:
        del saved[draw.choice(sorted(saved, key=str))]
    elif how == 2 and groups:
        groups.append(draw.choice((groups[0], {}, value)))
    elif how == 3 and groups:
        del groups[draw.randrange(len(groups))]
    elif groups and isinstance(groups[0], dict) and how in (4, 5):
        group = draw.choice([g for g in groups if isinstance(g, dict)])
        name = draw.choice((*sorted(group, key=str), "param_names", "betas", "note"))
        group[name] = value
        if how == 5 and draw.random() < 0.5:
            del group[name]
    elif isinstance(state, dict) and state:
        key = draw.choice(list(state))
        entry = state[key]
        if how == 6 or not isinstance(entry, dict) or not entry:
            state[draw.choice((key, "p0", 99, None, -1))] = value
        elif how == 7:
            del entry[draw.choice(list(entry))]
        else:
            name = draw.choice((*entry, "grad_avg", "momentum_buffer", "exp_avg", 3))
            entry[name] = value
            if how == 9 and isinstance(entry.get("square_avg"), Tensor):
                square = entry["square_avg"]
                entry["square_avg"] = draw.choice(
                    (square.double(), square.bfloat16(), square.clone(), square[None], -square)
                )
    return saved


def loaded(draw: random.Random, optimizer: RMSprop) -> None:
    """Load an intact or a damaged state dict, and step."""
    try:
        saved: Any = (torchs(draw, optimizer) if draw.random() < 0.4 else None) or optimizer.state_dict()
        saved = damaged(draw, saved) if draw.random() < 0.8 else copy.deepcopy(saved)
    except NotImplementedError:  # torch cannot copy it
        return
    options: dict[str, Any] = {"strict": draw.random() < 0.6, "hparams": draw.choice((None, "load", "keep", "ask"))}
    if draw.random() < 0.1:
        options["rename"] = draw.choice(({"p0": "p1"}, {"p": "q"}, {"p.": ""}, {}, {1: 2}, None))
    given = bits(saved)
    report = tried("load_state_dict", optimizer, lambda: optimizer.load_state_dict(saved, **options))
    if bits(saved) != given:
        raise FaultError("load_state_dict edited its argument")
    if report is not None:
        str(report)
        stepped(draw, optimizer)


def reopened(draw: random.Random, optimizer: RMSprop, folder: Path) -> None:
    """Save a checkpoint, damage and load it, and check for the same state, or an error that changes nothing."""
    path = folder / "run.safetensors"
    try:
        checkpoint.save(path, optimizer=optimizer, step=3)
    except Exception as error:
        refused("checkpoint.save", error)
        return
    whole = path.read_bytes()
    if draw.random() < 0.9:
        path.write_bytes(hurt(draw, whole, whole[::-1]))
    before = everything(optimizer)
    if not all(isinstance(p, Tensor) for p in optimizer.state):
        return  # state without a parameter may now have a parameter's number, as in torch

    def load() -> bool:
        with nullcontext() if "LD_PRELOAD" in os.environ else fence(100 * len(whole)):  # a sanitizer maps terabytes
            checkpoint.load(path, optimizer=optimizer)
        return True

    if tried("checkpoint.load", optimizer, load):
        after = everything(optimizer)
        if after["params"] != before["params"] or after["state"] != before["state"]:
            raise FaultError("checkpoint.load of a damaged file changed the state")


# --- modes, counts, lazy views, guards, and exceptions ---------------------------------------------

MODES: tuple[Callable[[], Any], ...] = (
    lambda: torch.device("meta"),
    torch.inference_mode,
    torch.no_grad,
    lambda: torch.autocast("cpu", dtype=torch.bfloat16),
)
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"backend": "eager"},
    {"foreach": True, "momentum": 0.9},
    {"capturable": True, "centered": True},
    {"clip_norm": 0.5, "clip_weights": 2.0},
    {"clip_global_norm": 1e-3, "clip_value": 0.1},
    {"max_update": 1.0, "bias_correction": True},
    {"ema": 0.5, "ema_warmup": "tensorflow", "clip_weights": 2.0},
    {"ema": 0.9, "ema_interval": 2, "clip_global_norm": 1.0},
    {"sparse": "lazy", "momentum": 0.5},
    {"sparse": "dense"},
)


def _own(draw: random.Random, half: bool = False) -> tuple[list[nn.Parameter], dict[str, Any]]:
    """Return parameters and settings that every backend accepts."""
    dtypes = HALF if half else (torch.float32, torch.float64, torch.complex64)
    shapes = [draw.choice(((3,), (2, 3), (7,))) for _ in range(draw.randint(1, 4))]
    params = []
    for shape in shapes:
        dtype = draw.choice(dtypes)
        x = numbers(draw, shape, wild=False).to(dtype)
        params.append(nn.Parameter(torch.complex(x.real, x.real) if dtype.is_complex else x))
    return params, dict(draw.choice(WAYS)) if not half else {"rounding": "stochastic"}


def _given(draw: random.Random, p: Tensor) -> Tensor | None:
    """Return a dense gradient of ordinary numbers, perhaps lazily conjugated or negated, or None."""
    if draw.random() < 0.15:
        return None
    g = numbers(draw, tuple(p.shape), wild=False).to(p.dtype)
    if p.is_complex():
        g = torch.complex(g.real, g.real * 2)
        return draw.choice((g, g.conj(), torch._neg_view(g), torch._neg_view(g.conj())))
    return draw.choice((g, g, torch.complex(torch.zeros_like(g), -g).conj().imag))


def _ends(optimizer: RMSprop, params: list[nn.Parameter]) -> list[Any]:
    return [bits(p) for p in params] + [bits(x) for p in params for x in optimizer.state.get(p, {}).values()]


def circumstanced(draw: random.Random, _optimizer: RMSprop) -> None:
    """Check that global modes and lazy views do not change a step by a bit."""
    params, way = _own(draw)
    mode = draw.choice(MODES)
    rows = [[_given(draw, p) for p in params] for _ in range(3)]
    ends = []
    for context in (nullcontext, mode):
        own = [nn.Parameter(p.detach().clone()) for p in params]
        optimizer = RMSprop(own, lr=0.1, **way)
        for row in rows:
            for p, g in zip(own, row, strict=True):
                plain = context is nullcontext and g is not None
                p.grad = g.resolve_conj().resolve_neg().clone() if plain and g is not None else g
            with context():
                optimizer.step()
        ends.append(_ends(optimizer, own))
    if ends[0] != ends[1]:
        raise FaultError(f"{mode} or lazy views changed the step\n{way}")


def counted(draw: random.Random, _optimizer: RMSprop) -> None:
    """Check that any step count increments correctly, and that successive steps draw different random bits."""
    half = draw.random() < 0.5
    params, way = _own(draw, half)
    count = draw.choice((2**24 - 1, 2**24, 2**24 + 5, 2**31, 2**32 - 1)) + draw.randrange(3)
    optimizer = RMSprop(params, lr=2.0**-12, **{"backend": draw.choice(("auto", "eager")), **way})
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    narrow = draw.random() < 0.5  # torch stores the count in float32, which rounds it
    for p in params:
        optimizer.state[p]["step"] = torch.tensor(float(count), dtype=torch.float32 if narrow else torch.float64)
    start = int(optimizer.state[params[0]]["step"])
    seen = []
    for _ in range(3):
        for p in params:
            p.data.fill_(1.0)
        optimizer.step()
        seen.append([bits(p) for p in params])
    reached = {float(optimizer.state[p]["step"]) for p in params}
    if reached != {start + 3.0}:
        raise FaultError(f"three steps from {start} end at {reached}\n{optimizer!r}")
    if half and sum(p.numel() for p in params) > 12 and seen[0] == seen[1] == seen[2]:
        raise FaultError(f"after {start} the same random bits recur\n{optimizer!r}")


def guarded(draw: random.Random, _optimizer: RMSprop) -> None:
    """Check that all backends skip the same steps, count alike, and name the first nonfinite parameter."""
    groups: list[dict[str, Any]] = []
    for _ in range(draw.randint(1, 3)):
        params = [nn.Parameter(torch.ones(4, 2, dtype=draw.choice(REAL[:2]))) for _ in range(draw.randint(1, 3))]
        groups.append({"params": params, "frozen": draw.random() < 0.3})
    whole = [p for group in groups for p in group["params"]]
    names = [(f"p{i}", p) for i, p in enumerate(whole)]
    shared: list[Any] = []
    for backend in ("auto", "eager"):
        at, own = 0, []
        for group in groups:
            n = len(group["params"])
            copies = [(name, nn.Parameter(p.detach().clone())) for name, p in names[at : at + n]]
            at += n
            own.append({"params": copies})
        shared.append(RMSprop(own, lr=0.1, nonfinite="skip", nonfinite_limit=None, sparse="lazy", backend=backend))
    total = row = 0
    for _ in range(draw.randint(2, 8)):
        kinds = [draw.choice(("good", "good", "good", "none", "bad", "sparse", "sums", "large")) for _ in whole]
        frozen = [group["frozen"] for group in groups for _ in group["params"]]
        kinds = ["none" if still else kind for kind, still in zip(kinds, frozen, strict=True)]
        for optimizer in shared:
            for p, kind in zip((p for g in optimizer.param_groups for p in g["params"]), kinds, strict=True):
                p.grad = _kind_of_gradient(p, kind)
            optimizer.step()
        faults = [name for (name, _), kind in zip(names, kinds, strict=True) if kind in ("bad", "sums")]
        total, row = (total + 1, row + 1) if faults else (total, 0)
        for optimizer in shared:
            seen = optimizer.skipped
            if (seen.total, seen.in_a_row) != (total, row) or (faults and seen.parameter != repr(faults[0])):
                raise FaultError(f"{seen} for {total}, {row}, {faults} after {kinds} by {optimizer.backend}")
            if not all(torch.isfinite(p).all() for g in optimizer.param_groups for p in g["params"]):
                raise FaultError(f"a skipped step was taken: {kinds} by {optimizer.backend}")


def _kind_of_gradient(p: Tensor, kind: str) -> Tensor | None:
    if kind == "none":
        return None
    if kind in ("sparse", "sums"):
        value = torch.finfo(p.dtype).max if kind == "sums" else 1.0
        values = torch.tensor([[value, 1.0], [value, 1.0]], dtype=p.dtype)
        return torch.sparse_coo_tensor(torch.tensor([[2, 2]]), values, p.shape, check_invariants=True)
    g = torch.full_like(p, 1e18 if kind == "large" else 0.5)
    if kind == "bad":
        g[-1, -1] = NAN
    return g


def clipped(draw: random.Random, _optimizer: RMSprop) -> None:
    """Check that clipping a finite gradient of any size gives the norm of the bound."""
    dtype = draw.choice(REAL[:2])
    far = 37 if dtype == torch.float32 else 300
    size, bound = (10.0 ** draw.randint(-far, far) for _ in range(2))
    bound = min(max(bound, 1e-30), 1e30)
    how = draw.choice(("clip_norm", "clip_global_norm"))
    p = nn.Parameter(torch.zeros(2, dtype=dtype))
    eps = 1e6 * min(size, bound)  # so the step is lr·g/eps of the clipped g
    if not 1e-10 < eps < 1e22:  # otherwise the step itself overflows or vanishes
        return
    p.grad = torch.tensor([0.6 * size, -0.8 * size], dtype=dtype)
    RMSprop([p], lr=1.0, alpha=0.0, eps=eps, nonfinite="raise", **{how: bound}).step()
    wanted = torch.tensor([-0.6e-6, 0.8e-6], dtype=torch.float64)
    if not torch.allclose(p.detach().double(), wanted, rtol=1e-3, atol=0):
        raise FaultError(f"{how}={bound} of a gradient of {size} in {dtype} steps {p.tolist()}")


def failed(draw: random.Random, _optimizer: RMSprop) -> None:
    """Check that an exception in a step, a closure, or a backward pass does not affect the next step."""
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    backend = draw.choice(("auto", "eager"))
    ours = RMSprop([p], lr=0.1, amp_in_step=True, capturable=True, backend=backend)
    plain = RMSprop([q], lr=0.1, capturable=True, backend=backend)
    ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.ones(())
    p.grad = q.grad = torch.ones(3)

    def closure() -> float:
        raise ArithmeticError

    alpha = ours.param_groups[0]["alpha"]
    try:
        if draw.random() < 0.5:
            ours.step(closure)
        else:
            ours.param_groups[0]["alpha"] = 2.0
            ours.step()
        raise FaultError("a step that must raise did not")
    except (ArithmeticError, ValueError):
        ours.param_groups[0]["alpha"] = alpha
    ours.step()
    plain.step()
    if _ends(ours, [p]) != _ends(plain, [q]):
        raise FaultError("the scaler's values for a failed step remain at the next")
    _failed_backward(draw)


def _failed_backward(draw: random.Random) -> None:
    nets = [nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    inside, after = step_in_backward(nets[0], lr=0.1), RMSprop(nets[1].parameters(), lr=0.1)
    for _ in range(draw.randint(1, 4)):
        fails, clear = draw.random() < 0.5, draw.random() < 0.5
        for net, optimizer in zip(nets, (inside, after), strict=True):
            if fails:
                hidden = net[:2](torch.ones(1, 2))
                hidden.register_hook(lambda _: 1 / 0)
                try:
                    net[2](hidden).sum().backward()
                except ZeroDivisionError:
                    if clear:
                        optimizer.zero_grad()
            try:
                net(torch.ones(1, 2)).sum().backward()
            except RuntimeError as error:
                raise FaultError(f"a failed backward pass blocks the next: {error}") from error
            optimizer.step()
            optimizer.zero_grad()
        if not all(map(torch.equal, *(net.parameters() for net in nets))):
            raise FaultError("after a failed backward pass the step differs from the ordinary optimizer's")


def averaged(draw: random.Random, optimizer: RMSprop) -> None:
    """Check that averaged() gives the weights and the state back to the last bit, whatever happens inside."""
    before = everything(optimizer)
    try:
        with optimizer.averaged():
            refused_inside = 0
            for call in (optimizer.step, optimizer.state_dict, optimizer.average_into):
                try:
                    call()
                except RuntimeError:
                    refused_inside += 1
            if refused_inside != 3:
                raise FaultError("something trains or saves inside averaged()")
            if draw.random() < 0.5:
                raise ArithmeticError
    except (ArithmeticError, ValueError):
        pass
    if everything(optimizer) != before:
        raise FaultError(f"averaged() changed the weights or the state\n{optimizer!r}")


AROUND = (circumstanced, counted, guarded, clipped, failed, averaged)
ACTS = (stepped, stepped, stepped, mutated, loaded, grown, reopened, moved, *AROUND)


def judge(number: int, folder: Path) -> str | None:
    """Return the failure of that input, or None."""
    draw = random.Random(number)
    torch.manual_seed(number)
    done: list[str] = []
    try:
        try:
            optimizer = built(draw)
        except Exception as error:
            refused("RMSprop()", error)
            return None
        for show in (optimizer.explain, optimizer.lint, optimizer.__repr__):
            tried(show.__name__, optimizer, show)
        for _ in range(draw.randint(1, 6)):
            act = draw.choice(ACTS)
            done.append(act.__name__)
            if act is reopened:
                reopened(draw, optimizer, folder)
            else:
                act(draw, optimizer)
    except FaultError as fault:
        return f"after {', '.join(done)}: {fault}"
    except BaseException:
        return f"the driver failed after {', '.join(done)}\n{traceback.format_exc()}"
    return None


def attack(first: int, count: int, folder: Path) -> None:
    """Judge `count` inputs from `first` in a child process, which writes its progress and failures to the folder."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    own = folder / "case"
    own.mkdir(exist_ok=True)
    for number in range(first, first + count):
        (folder / "progress").write_text(f"{number} optimizer")
        signal.alarm(SECONDS)
        fault = judge(number, own)
        signal.alarm(0)
        if fault is not None:
            with (folder / "failures").open("a") as file:
                file.write(f"--- input {number}: {fault}\n")


def main() -> None:
    """Judge all inputs, print the failures, and exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads must not exist when this process forks
    RMSprop([nn.Parameter(torch.ones(1))])  # imports torch's compiler, which takes seconds
    begun = time.perf_counter()

    def say(done: int) -> None:
        if done % (4 * BATCH) == 0:
            print(f"{min(done, options.count)} inputs, {time.perf_counter() - begun:.0f} s", flush=True)

    failures = in_children(attack, options.first, options.count, options.jobs, say)
    print("".join(failures)[:40000])
    total = sum(text.count("--- input") for text in failures)
    print(f"{options.count} misused optimizers: {total} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
