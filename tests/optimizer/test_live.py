"""Side by side with the real classes of timm, Stable-Baselines3 and optax, where they are installed."""

import warnings
from itertools import product
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from cases import covering, mostly_long
from torch import nn

from rmsprop import RMSprop

RTOL = {torch.float64: 1e-11, torch.float32: 1e-5}
LRS = (0.001, 0.004, 0.01, 0.01, 0.005, 0.0, 0.02, 0.02)
CLASSES = {"timm": oracles.timm(), "sb3": oracles.sb3()}
SHAPES = ((7, 5), (33,), (), (2, 3, 4))

COMMON = [
    dict(momentum=momentum, centered=centered, weight_decay=decay, eps=eps)
    for momentum, centered, decay, eps in product((0.0, 0.9), (False, True), (0.0, 0.05), (1e-8, 1e-2))
]
SETTINGS = [("sb3", words) for words in COMMON]
SETTINGS += [
    ("timm", {**words, **switches})
    for words in COMMON
    for switches in (
        {},
        {"lr_in_momentum": False},
        {"decoupled_decay": True},
        {"decoupled_decay": True, "corrected_weight_decay": True},
    )
]


def start(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def feed(params: list[nn.Parameter], t: int) -> None:
    """Gradients of many sizes, some exactly 0, one of 1e-12 and one of 1e3."""
    generator = torch.Generator().manual_seed(100 + t)
    for p in params:
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        g = g * 10.0 ** torch.randint(-3, 2, p.shape, generator=generator)
        g[torch.rand(p.shape, generator=generator) < 0.1] = 0.0
        if p.numel() > 2:
            g.view(-1)[0], g.view(-1)[1] = 1e-12 * torch.randn((), generator=generator), 1e3 * (-1) ** (t // 2)
        p.grad = g.to(p.dtype)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def off(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> float:
    """The largest relative difference, over elements no smaller than 0.1."""
    return max(
        float(((a - b).abs() / b.abs().clamp(min=0.1)).detach().max())
        for a, b in zip(ours, theirs, strict=True)
        if a.numel()
    )


@pytest.mark.parametrize(
    ("dialect", "words", "dtype"),
    mostly_long([(*row, dtype) for row in SETTINGS for dtype in RTOL], lambda i, _: i % 7 == 0, unpack=True),
    ids=str,
)
def test_the_run_is_the_real_classes(dialect: str, words: dict[str, Any], dtype: torch.dtype) -> None:
    """Every step of a run whose learning rate moves; and each goes on from the other's state dict."""
    theirs_class = CLASSES[dialect]
    if theirs_class is None:
        pytest.skip(f"{dialect} is not installed")
    ours, theirs = start(dtype), start(dtype)
    mine = RMSprop(ours, lr=0.02, dialect=dialect, **words)
    other = theirs_class(theirs, lr=0.02, **words)
    for t, lr in enumerate(LRS):
        for optimizer, params in ((mine, ours), (other, theirs)):
            set_lr(optimizer, lr)
            feed(params, t)
            optimizer.step()
        assert off(ours, theirs) <= RTOL[dtype], t
        if t == 3:  # swap: each reads what the other saved
            saved, kept = mine.state_dict(), other.state_dict()
            mine, other = RMSprop(ours, lr=0.02, dialect=dialect, **words), theirs_class(theirs, lr=0.02, **words)
            with warnings.catch_warnings():
                # SB3's state dict names none of our switches, which is said and right
                warnings.filterwarnings("ignore", "the loaded state dict lacks")
                mine.load_state_dict(kept, hparams="load")
            # timm reads its own words only, so it is given the state in its own groups
            other.load_state_dict({**saved, "param_groups": kept["param_groups"]})


def test_timms_state_dict_brings_its_switches():
    """Words of timm in a saved group are understood: no warning, and lr_in_momentum=False stays."""
    if CLASSES["timm"] is None:
        pytest.skip("timm is not installed")
    params = start(torch.float32)
    words = dict(momentum=0.9, lr_in_momentum=False, decoupled_decay=True, corrected_weight_decay=True)
    other = CLASSES["timm"](params, lr=0.02, weight_decay=0.1, **words)
    feed(params, 0)
    other.step()
    mine = RMSprop(params, dialect="timm", lr=1.0, momentum=0.9)
    mine.load_state_dict(other.state_dict(), hparams="load")
    group = mine.param_groups[0]
    assert (group["lr_in_buffer"], group["weight_decay_mode"], group["reference_lr"]) == (False, "corrected", 0.02)
    with pytest.raises(ValueError, match=r"of timm's RMSpropTF.*build it with dialect='timm', or .*rmsprop convert"):
        RMSprop(params, momentum=0.9).load_state_dict(other.state_dict())


OPTAX = [
    dict(decay=0.9, eps=eps, centered=centered, momentum=momentum, nesterov=nesterov, **switches)
    for eps, centered, (momentum, nesterov), switches in covering(
        (1e-8, 1e-2),
        (False, True),
        ((None, False), (0.9, False), (0.9, True)),
        ({}, {"initial_scale": 1.0}, {"eps_in_sqrt": False}, {"bias_correction": True, "initial_scale": 0.5}),
    )
]


@pytest.mark.parametrize("words", mostly_long(OPTAX, lambda i, _: i == 7), ids=str)  # optax compiles each
def test_the_run_is_optaxs(words: dict[str, Any]) -> None:
    """float64, every step of a run whose learning rate moves."""
    optax = pytest.importorskip("optax")
    import jax

    with jax.enable_x64(True):
        params = start(torch.float64)
        mine = RMSprop(params, dialect="optax", learning_rate=0.02, **words)
        held = [jax.numpy.asarray(p.detach().numpy()) for p in params]
        rate = optax.inject_hyperparams(optax.rmsprop, static_args=tuple(words))(learning_rate=0.02, **words)
        state = rate.init(held)
        for t, lr in enumerate(LRS):
            set_lr(mine, lr)
            feed(params, t)
            mine.step()
            state.hyperparams["learning_rate"] = jax.numpy.asarray(lr, dtype="float64")
            updates, state = rate.update([jax.numpy.asarray(p.grad.numpy()) for p in params], state, held)
            held = optax.apply_updates(held, updates)
            theirs = [nn.Parameter(torch.tensor(np.asarray(h))) for h in held]
            # v̂ − m̂² of a gradient of 1e3 is 4.5 at the first step: five digits cancel, in either order of operations
            cancels = words["centered"] and words.get("bias_correction")
            assert off(params, theirs) <= (1e-9 if cancels else 1e-11), t
