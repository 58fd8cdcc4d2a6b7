"""Clipping that is an argument of a framework's optimizer: the formula, its order, and what it leaves alone."""

import pytest
import torch
from torch import nn

from rmsprop import RMSprop

START = {"a": (1.0, -2.0, 3.0), "b": (0.5, 4.0)}
GRADS = {"a": (3.0, -4.0, 0.0), "b": (12.0, 0.1)}


def params(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(values, dtype=dtype)) for values in START.values()]


def set_grads(tensors: list[nn.Parameter], factor: float = 1.0) -> None:
    for p, values in zip(tensors, GRADS.values(), strict=True):
        p.grad = torch.tensor(values, dtype=p.dtype) * factor


def by_hand(tensors: list[nn.Parameter], how: str, bound: float) -> list[torch.Tensor]:
    """Clipped gradients, in plain torch."""
    gradients = [p.grad.clone() for p in tensors]
    if how == "clip_value":
        return [g.clamp(-bound, bound) for g in gradients]
    norms = [g.norm() for g in gradients]
    if how == "clip_global_norm":
        norms = [torch.stack(norms).norm()] * len(gradients)
    return [g * min(1.0, bound / float(norm)) for g, norm in zip(gradients, norms, strict=True)]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("bound", [0.7, 5.5, 1e3])
@pytest.mark.parametrize("how", ["clip_value", "clip_norm", "clip_global_norm"])
def test_the_step_is_that_of_clipped_gradients(how: str, bound: float, momentum: float, backend: str):
    """And the gradients that were given stay as they are."""
    ours, plain = params(), params()
    clipped = RMSprop(ours, lr=0.1, momentum=momentum, backend=backend, **{how: bound})
    optimizer = RMSprop(plain, lr=0.1, momentum=momentum, backend=backend)
    for factor in (1.0, 0.1, 3.0):
        set_grads(ours, factor)
        set_grads(plain, factor)
        kept = [p.grad.clone() for p in ours]
        for p, g in zip(plain, by_hand(plain, how, bound), strict=True):
            p.grad = g
        clipped.step()
        optimizer.step()
        for a, b, g in zip(ours, plain, kept, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=0)
            assert torch.equal(a.grad, g)


def test_clip_weights_bounds_the_parameters_after_the_step():
    """WGAN's clamp, as in MXNet; None leaves them."""
    tensors = params()
    optimizer = RMSprop(tensors, lr=1.0, clip_weights=0.75)
    set_grads(tensors)
    optimizer.step()
    assert max(float(p.detach().abs().max()) for p in tensors) == 0.75


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("mode", ["l2", "l1"])
def test_clipping_after_decay_bounds_the_sum(mode: str, maximize: bool):
    """MXNet 1: clip(g + wd·p), with maximize clip(−g + wd·p)."""
    ours, plain = params(), params()
    settings = dict(lr=0.1, clip_value=2.0)
    first = RMSprop(
        ours, weight_decay=0.9, weight_decay_mode=mode, maximize=maximize, clip_after_decay=True, **settings
    )
    second = RMSprop(plain, **settings)
    for _ in range(3):
        set_grads(ours)
        set_grads(plain)
        for p in plain:
            pull = p.detach() if mode == "l2" else p.detach().sign()
            p.grad = (-p.grad if maximize else p.grad) + 0.9 * pull
        first.step()
        second.step()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


def test_clipping_before_decay_is_the_default():
    """clip(g) + wd·p."""
    ours, plain = params(), params()
    first = RMSprop(ours, lr=0.1, weight_decay=0.9, clip_value=2.0)
    second = RMSprop(plain, lr=0.1, weight_decay=0.9)
    set_grads(ours)
    set_grads(plain)
    for p in plain:
        p.grad.clamp_(-2.0, 2.0)
    first.step()
    second.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_the_global_norm_is_over_all_groups_that_ask_for_it():
    """A group that asks for nothing is neither counted nor clipped."""
    a, b = params()
    c = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = RMSprop(
        [{"params": [a]}, {"params": [b]}, {"params": [c], "clip_global_norm": None}], lr=0.1, clip_global_norm=6.5
    )
    set_grads([a, b])
    c.grad = torch.tensor([1000.0], dtype=torch.float64)
    optimizer.step()
    factor = 6.5 / torch.cat([a.grad, b.grad]).norm()
    torch.testing.assert_close(optimizer.state[a]["square_avg"], 0.01 * (factor * a.grad) ** 2)
    torch.testing.assert_close(optimizer.state[b]["square_avg"], 0.01 * (factor * b.grad) ** 2)
    torch.testing.assert_close(optimizer.state[c]["square_avg"], 0.01 * c.grad**2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_dtypes(dtype: torch.dtype):
    """Norms of half-precision gradients are taken in float32; a complex gradient's norm is over both parts."""
    p = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = RMSprop([p], lr=0.1, clip_norm=1.0)
    p.grad = torch.tensor([300.0, 400.0], dtype=torch.float32).to(dtype)
    optimizer.step()
    v = optimizer.state[p]["square_avg"]
    real = torch.view_as_real(v)[..., 0] if v.is_complex() else v
    torch.testing.assert_close(real, torch.tensor([0.0036, 0.0064]), rtol=1e-3, atol=0)


def test_nan_and_inf_propagate():
    """A NaN is the user's fact; an infinite norm makes NaN of the infinite element and 0 of the others."""
    tensors = params()
    optimizer = RMSprop(tensors, lr=0.1, clip_global_norm=1.0)
    set_grads(tensors)
    tensors[0].grad[0] = torch.nan
    optimizer.step()
    assert all(p.detach().isnan().all() for p in tensors)


def test_a_scaler_in_the_step_is_unscaled_first():
    """amp_in_step: clipping sees the gradients without the loss scale, and a skipped step clips no weight."""
    tensors = params(torch.float32)
    options = dict(lr=torch.tensor(0.1), capturable=True, amp_in_step=True, clip_norm=1.0, clip_weights=0.1)
    optimizer = RMSprop(tensors, **options)
    set_grads(tensors, 8.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    optimizer.step()
    assert [p.tolist() for p in tensors] == [list(values) for values in START.values()]
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    plain = params(torch.float32)
    alone = RMSprop(plain, lr=0.1, clip_norm=1.0, clip_weights=0.1)
    set_grads(plain)
    alone.step()
    for a, b in zip(tensors, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"clip_value": -1.0}, "Invalid clip_value: -1.0"),
        ({"clip_norm": "1"}, "Invalid clip_norm: '1' is a str"),
        ({"clip_global_norm": float("nan")}, "Invalid clip_global_norm"),
        ({"clip_after_decay": "yes"}, "clip_after_decay is a switch"),
        ({"clipnorm": 1.0}, "write clip_global_norm=... or clip_norm=... here"),
        (
            {"dialect": "keras3", "clipnorm": 1.0, "clipvalue": 1.0},
            "takes one of clipnorm, clipvalue, global_clipnorm",
        ),
        ({"dialect": "paddle", "lr": 0.1, "grad_clip": 3.0}, "ClipGradByValue"),
    ],
    ids=str,
)
def test_bad_bounds_are_refused(settings: dict, sentence: str):
    """One sentence, with what would work."""
    with pytest.raises((TypeError, ValueError), match=sentence):
        RMSprop(params(), **settings)


def test_paddles_own_objects_are_read_by_their_class():
    """Without importing Paddle."""

    class ClipGradByGlobalNorm:
        def __init__(self, clip_norm: float) -> None:
            self.clip_norm = clip_norm

    optimizer = RMSprop(params(), dialect="paddle", learning_rate=0.1, grad_clip=ClipGradByGlobalNorm(2.0))
    assert optimizer.param_groups[0]["clip_global_norm"] == 2.0
    assert "g ← g·2/max(‖g‖, 2)" in optimizer.explain()


@pytest.mark.parametrize("how", ["clip_norm", "clip_global_norm"])
@pytest.mark.parametrize(
    ("dtype", "size", "bound"),
    [
        (torch.float32, 1e20, 1.0),
        (torch.float32, 3e38, 1e-3),
        (torch.float32, 1e20, 1e-30),
        (torch.float32, 1e-30, 1e-35),
        (torch.complex64, 1e20, 1.0),
        (torch.bfloat16, 1e38, 2.0),
        (torch.float64, 1e200, 1.0),
        (torch.float64, 1e-250, 1e-260),
        (torch.float64, 1e300, 1e-30),
    ],
    ids=str,
)
def test_norms_hold_whatever_a_gradient_holds(dtype: torch.dtype, size: float, bound: float, how: str):
    """Gradients whose squares overflow or vanish in their dtype are clipped to the bound."""
    direction = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
    p = nn.Parameter(torch.zeros(3, dtype=dtype))
    # alpha = 0 and a large eps: the step is lr·g/(|g| + eps), which is g/eps of a clipped g far below it
    eps = 1e4 * bound
    optimizer = RMSprop([p], lr=eps, alpha=0.0, eps=eps, **{how: bound})
    p.grad = (direction * (size / 5)).to(dtype)
    optimizer.step()
    wanted = direction / 5 * bound
    found = -p.detach().to(torch.complex128).real
    torch.testing.assert_close(found, wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-3, atol=0)


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
def test_a_large_finite_gradient_is_no_zero_step(nonfinite: str):
    """1e20 in float32 is finite, and so its clipped step moves the parameter, under each guard."""
    p = nn.Parameter(torch.ones(4))
    optimizer = RMSprop([p], lr=0.1, clip_global_norm=1.0, nonfinite=nonfinite)
    p.grad = torch.full((4,), 1e20)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.zeros(4), rtol=0, atol=1e-5)  # 10·lr
    assert optimizer.skipped.total == 0


@pytest.mark.parametrize("word", ["clip_value", "clip_norm", "clip_global_norm", "clip_weights"])
def test_a_bound_of_0_is_refused(word: str) -> None:
    """It would freeze training silently; where a framework means no bound by it, the dialect does too."""
    message = rf"Invalid {word}: 0; {word} takes a finite number > 0, .*, or None: 0 would make every step"
    with pytest.raises(ValueError, match=message):
        RMSprop(params(), **{word: 0})
    optimizer = RMSprop(params(), **{word: 1.0})
    optimizer.param_groups[0][word] = 0.0
    set_grads(optimizer.param_groups[0]["params"])
    kept = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(ValueError, match=message.replace("0;", "0.0;", 1)):
        optimizer.step()
    assert all(map(torch.equal, optimizer.param_groups[0]["params"], kept))


@pytest.mark.parametrize(
    ("dialect", "words"),
    [("mxnet2", {"clip_gradient": 0, "clip_weights": 0}), ("keras1", {"clipnorm": 0}), ("keras3", {"clipnorm": 0.0})],
)
def test_0_is_off_where_the_framework_means_off(dialect: str, words: dict[str, float]) -> None:
    group = RMSprop(params(), dialect=dialect, **words).param_groups[0]
    assert all(group[name] is None for name in ("clip_value", "clip_norm", "clip_global_norm", "clip_weights"))
