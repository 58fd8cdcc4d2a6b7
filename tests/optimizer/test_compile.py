"""torch.compile(optimizer.step): the numbers of the step that is not compiled, no more graphs than torch's class."""

import pytest
import torch
from cases import mostly_long
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from rmsprop import RMSprop

STEPS = 7


def _run(cls, settings, moved, unfinite, amp, dtype, compiled):
    """Parameters, and the number of graphs after each step, of a net whose gradients are made anew each time."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    optimizer = cls(net.parameters(), **settings)
    counter = CompileCounter()
    step = torch.compile(optimizer.step, backend=counter) if compiled else optimizer.step
    graphs = []
    for t in range(STEPS):
        optimizer.zero_grad()
        net(torch.ones(2, 3, dtype=dtype)).sum().backward()
        if t in unfinite and not amp:
            net[0].weight.grad[0, 0] = torch.inf
        if amp:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(float(t in unfinite))
        for name in moved:
            optimizer.param_groups[0][name] = 0.5 / (t + 3)
        step()
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    return list(net.parameters()), graphs


CASES = {
    "skip": (dict(nonfinite="skip"), (), (), False),
    "skip, some skipped": (dict(nonfinite="skip"), ("lr",), (0, 3, 4), False),
    "raise": (dict(nonfinite="raise"), ("lr",), (), False),
    "skip and clip": (dict(nonfinite="skip", clip_global_norm=0.3, clip_weights=0.5), ("lr",), (3,), False),
    "amp": (dict(amp_in_step=True, capturable=True), ("lr",), (3,), True),
    "clips": (dict(clip_norm=0.3, clip_value=0.2, clip_after_decay=True, weight_decay=0.1), ("lr",), (), False),
    "cycled": (dict(momentum=0.9, nesterov=True, weight_decay=0.1), ("lr", "momentum", "weight_decay"), (), False),
    "max_update": (dict(max_update=1.0, centered=True, bias_correction=True), ("lr", "alpha"), (), False),
    "stochastic": (dict(rounding="stochastic", compensation=True), ("lr",), (), False),
    "two bytes": (dict(state_dtype="bfloat16", momentum=0.9), ("lr",), (), False),
    "one byte": (dict(state_dtype="float8", nonfinite="skip"), ("lr",), (3,), False),
    "one byte, amp": (dict(state_dtype="float8", amp_in_step=True, capturable=True), ("lr",), (3,), True),
    "keras3": (dict(dialect="keras3"), ("lr",), (), False),
}


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch's own parts
@pytest.mark.parametrize("case", mostly_long(CASES, lambda _, case: case == "skip, some skipped"))  # seconds each
def test_a_compiled_step_is_compiled_no_more_often_than_torchs(case):
    """Gradients made anew, numbers that move, skipped steps: no graph after the few that torch's class needs too."""
    settings, moved, unfinite, amp = CASES[case]
    dtype = torch.bfloat16 if case == "stochastic" else torch.float32
    params, graphs = _run(RMSprop, settings, moved, unfinite, amp, dtype, compiled=True)
    expected, _ = _run(RMSprop, settings, moved, unfinite, amp, dtype, compiled=False)
    assert_close(params, expected)
    first = next(i for i, count in enumerate(graphs) if count)
    settled = max([first, *unfinite]) + (2 if moved else 1)  # a float that moves is an input from the second graph on
    assert 1 <= graphs[-1] == graphs[settled] <= 4, graphs


@pytest.mark.filterwarnings("ignore")
def test_torchs_class_compiles_a_moving_lr_twice():
    """The yardstick: torch.optim.RMSprop makes one graph, and a second when lr first moves."""
    _, graphs = _run(torch.optim.RMSprop, {}, ("lr",), (), False, torch.float32, compiled=True)
    assert graphs == [1, *[2] * (STEPS - 1)]
