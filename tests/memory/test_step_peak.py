"""What a step allocates at its peak: the estimate beside the CPU allocator's."""

import pytest
import torch
from allocated import peak
from cases import mostly_long
from torch import nn

from rmsprop import RMSprop, estimate, step_in_backward

SIZES = [(1200, 400), (400,), (700, 500), (700,), (300, 300), (50, 20, 10), (100_000,), (64,)]


def parameters(dtype=torch.float32, sizes=SIZES):
    return [nn.Parameter(torch.ones(size, dtype=dtype)) for size in sizes]


def measured(params, make):
    """The allocator's peak in the third step."""
    optimizer = make(params)
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    optimizer.step()
    return peak(optimizer.step)


CASES = {
    "native": {},
    "native, everything": {
        "momentum": 0.9,
        "centered": True,
        "ema": 0.99,
        "weight_decay": 0.1,
        "clip_global_norm": 1.0,
    },
    "eager": {"backend": "eager"},
    "one by one": {"foreach": False},
    "all at once": {"foreach": True},
    "decay": {"foreach": True, "weight_decay": 0.1, "momentum": 0.9},
    "centered": {"foreach": True, "centered": True, "momentum": 0.9, "nesterov": True},
    "inside": {"foreach": False, "eps_mode": "inside"},
    "bias": {"foreach": True, "bias_correction": True, "centered": True},
    "capped": {"backend": "eager", "max_update": 3.0, "centered": True},
    "l1": {"weight_decay": 0.1, "weight_decay_mode": "l1"},
    "averaged": {"foreach": True, "ema": 0.99, "ema_interval": 3},
    "clipped": {"foreach": True, "clip_global_norm": 1.0},
    "clipped twice": {"foreach": False, "clip_value": 0.1, "clip_norm": 1.0},
    "float8": {"foreach": False, "state_dtype": "float8", "momentum": 0.9},
    "float8 at once": {"foreach": True, "state_dtype": "float8"},
    "bfloat16": {"backend": "eager", "state_dtype": "bfloat16", "centered": True},
}
HALF = {
    "nearest": {"foreach": True},
    "stochastic": {"foreach": True, "rounding": "stochastic"},
    "remainders": {"foreach": False, "compensation": True},
    "smallest": {"backend": "eager", "rounding": "stochastic", "state_dtype": "float8", "ema": 0.9},
    "clipped": {"clip_global_norm": 1.0, "foreach": True},
    "averaged": {"foreach": True, "ema": 0.9, "ema_interval": 3},
}


OTHERS = {
    "float64": (torch.float64, {}),
    "complex": (torch.complex64, {"centered": True}),
    "float16": (torch.float16, {"foreach": True, "compensation": True}),
}
ALL = {
    **{name: (torch.float32, own) for name, own in CASES.items()},
    **{f"half, {name}": (torch.bfloat16, own) for name, own in HALF.items()},
    **OTHERS,
}
SHORT = ("native, everything", "eager", "clipped", "half, smallest")


@pytest.mark.parametrize("name", mostly_long(ALL, lambda _, name: name in SHORT))
def test_the_peak_of_a_step_is_the_allocators(name) -> None:
    """Of each backend, rule and dtype, to 1 % of what the training holds in all."""
    dtype, settings = ALL[name]
    params = parameters(dtype)
    found = estimate(params, **settings)
    actual = measured(params, lambda own: RMSprop(own, **settings))
    assert found.total.step == pytest.approx(actual, abs=0.01 * found.total.total), found
    if found.backends == ("eager",):
        assert actual > 0  # a peak of 0 would need no estimate


@pytest.mark.long
@pytest.mark.parametrize("count", [30, 90])
def test_more_tensors_than_a_miniature_has(count) -> None:
    """The peak of many tensors follows from that of fewer: all at once, and stochastically rounded one by one."""
    params = parameters(torch.bfloat16, [(20_000 + 10 * i,) for i in range(count)])
    settings = {"foreach": True, "rounding": "stochastic", "state_dtype": "float8", "momentum": 0.9}
    found = estimate(params, **settings)
    actual = measured(params, lambda own: RMSprop(own, **settings))
    assert found.total.step == pytest.approx(actual, rel=0.02)


def test_random_bits_are_drawn_for_one_tensor_at_a_time() -> None:
    """A step of all tensors at once adds the eight bytes per element of the largest one's draw, not of all."""
    params = parameters(torch.bfloat16, [(10_000,)] * 100)

    def step(**settings):
        return measured(params, lambda own: RMSprop(own, foreach=True, **settings))

    assert step(rounding="stochastic") - step() < 3_000_000  # 8,000,000 if all were drawn at once


def test_groups_of_different_kinds_step_one_after_the_other() -> None:
    """The peak in all is the larger of the groups', and above it, clipped gradients stay until the end."""
    small, large = parameters(torch.bfloat16, [(300, 300)]), parameters(torch.float32, [(500, 800), (3, 3)])
    groups = [{"params": small, "momentum": 0.9}, {"params": large, "foreach": True, "clip_value": 1.0}]
    found = estimate(groups, backend="eager")
    actual = measured([*small, *large], lambda _: RMSprop([dict(group) for group in groups], backend="eager"))
    assert found.total.step == pytest.approx(actual, rel=0.01)
    assert [group.step for group in found.groups] != [0, 0]
    assert max(group.step for group in found.groups) <= found.total.step


@pytest.mark.parametrize(
    "settings",
    mostly_long([{}, {"state_dtype": "bfloat16", "backend": "eager"}], lambda i, _: i == 0),
    ids=["native", "eager"],
)
def test_a_step_in_backward_holds_the_largest_gradient(settings) -> None:
    """The peak of a backward pass of a stack of layers without activations is the gradient and the step's."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(700, 700, bias=False) for _ in range(6)), nn.Linear(700, 900, bias=False))
    x = torch.ones(1, 700)
    optimizer = step_in_backward(model, **settings)

    def iterate():
        model(x).sum().backward()
        optimizer.step()

    iterate()
    iterate()
    actual = peak(iterate)
    (other,) = (a for a in estimate(model, **settings).alternatives if a.name == "in backward")
    assert other.usage.gradients == 700 * 900 * 4
    own = other.usage.gradients + other.usage.step
    held = sum(p.nbytes for p in model.parameters()) + other.usage.state
    assert own == pytest.approx(actual, rel=0.02)  # activations, and their gradients: 7 x 2.8 kB
    assert own == pytest.approx(actual, abs=0.01 * (held + own))


@pytest.mark.parametrize("dtype", mostly_long([torch.float32, torch.bfloat16], lambda i, _: i == 0), ids=str)
def test_adam_is_torchs(dtype) -> None:
    """Its state in bytes, and its step's peak, as torch runs it on a CPU."""
    params = parameters(dtype)
    (adam,) = (a.usage for a in estimate(params).alternatives if a.name == "torch.optim.Adam")
    optimizer = torch.optim.Adam(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert adam.state == sum(x.nbytes for entry in optimizer.state.values() for x in entry.values())
    assert adam.step == pytest.approx(peak(optimizer.step), rel=0.01)


def test_a_gap_in_a_layout_costs_that_parameter_alone() -> None:
    """torch's operators step it, and the kernel the others."""
    gapped = nn.Parameter(torch.zeros(300, 400)[:, :200])
    params = [gapped, *parameters()]
    found = estimate(params)
    assert set(found.backends) == {"cpu", "eager"}
    assert found.total.step == pytest.approx(measured(params, RMSprop), rel=0.01)


def test_a_gpu_steps_by_foreach_without_a_gpu_here() -> None:
    """device="cuda" counts the temporaries of all tensors at once, which foreach=True allocates on a CPU."""
    params = parameters()
    there, here = estimate(params, device="cuda", momentum=0.9), estimate(params, foreach=True, momentum=0.9)
    assert there.total == here.total
    assert there.device == "cuda"
    assert estimate(params, device="cuda", fused=True).total.step == 0
    assert estimate(params, device="cuda", fused=True).backends == ("triton",)
