"""The Triton kernel on a GPU: parity, CUDA graphs, streams, no synchronisation, one launch, no memory of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from cases import bucket_of
from cpu_parity import ALL_SWITCHES, BF16, BOUND, F16, F32, TYPES, copied, rules, tensors, worst
from halves import check_written, rounded_as, twin
from torch import Tensor, nn

from rmsprop import RMSprop, kernels
from rmsprop.kernels import cpu, native, triton
from rmsprop.spec import Hyper, Rule
from rmsprop.step import Stepper
from rmsprop.tensors.bucket import Bucket

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
    pytest.mark.filterwarnings("default"),  # of drivers and compilers that are not ours
]

SIZES = (0, 1, 1000, triton.BLOCK, 2 * triton.BLOCK + 5)
EVERY = tuple(case for switches in ALL_SWITCHES for case in rules(*switches))
FULL = Rule(centered=True, momentum=True, nesterov=True, bias_correction=True)
FULL_HYPER = Hyper(lr=0.03, alpha=0.9, eps=1e-3, momentum=0.8, weight_decay=0.05)


def moved(bucket: Bucket, device: str, steps: bool = False) -> Bucket:
    """The bucket on another device; its step counters too, if asked."""
    *lists, rests, averages = ([x.to(device, copy=True) for x in values] for values in bucket.tensors())
    counters = [t.to(device if steps else "cpu", copy=True) for t in bucket.slots["step"]]
    words = dict(capturable=steps, rounding=bucket.rounding, random_keys=list(bucket.random_keys))
    return bucket_of(*lists, counters, rests, averages, **words)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("types", TYPES, ids=lambda t: f"{t[0]}-{t[1]}".replace("torch.", ""))
def test_one_step_is_the_references_and_the_cpu_kernels(types: tuple, capturable: bool) -> None:
    """Rules dealt out over the dtypes: within the CPU kernel's bound, and its bits where the host does the numbers.

    Each costs a compilation of a third of a second; the interpreter runs them all.
    """
    for rule, hyper in EVERY[TYPES.index(types) :: 61]:
        before = tensors(rule, types, SIZES, seed=1)
        there = moved(before, "cuda", capturable)
        assert kernels.pick("triton", rule, there).name == "triton"
        triton.step(rule, hyper, there)
        here = moved(there, "cpu")
        assert worst(rule, hyper, before, here) <= BOUND[types], (rule, hyper)
        if native.missing() is None and not (capturable and rule.bias_correction):
            other = copied(before)
            cpu.step(rule, hyper, other)
            pairs = zip((x for v in here.lists() for x in v), (x for v in other.lists() for x in v), strict=True)
            assert all(torch.equal(x, y) for x, y in pairs), (rule, hyper)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("how", [(True, False), (False, True), (True, True)], ids=["stochastic", "rest", "both"])
@pytest.mark.parametrize("types", [(BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)], ids=str)
def test_half_precision_is_rounded_with_the_references_bits(types: tuple, how: tuple, capturable: bool) -> None:
    """Of the kernel's own float32 step, spikes bounded; the CPU kernel's bits where the host does the numbers."""
    draw = torch.Generator().manual_seed(1)
    for rule, hyper in EVERY[7 * TYPES.index(types) :: 331]:
        hyper = replace(hyper, max_update=1.5)
        before = tensors(rule, types, SIZES, seed=1)
        for g in before.grad:
            g[::3] *= 40
        before = rounded_as(before, stochastic=how[0], compensated=how[1], generator=draw)
        there, wide = moved(before, "cuda", capturable), moved(twin(before), "cuda", capturable)
        triton.step(rule, hyper, there)
        triton.step(rule, hyper, wide)
        here = moved(there, "cpu")
        check_written(here, moved(wide, "cpu"), before)
        if native.missing() is None and not (capturable and rule.bias_correction):
            other = moved(before, "cpu")
            cpu.step(rule, hyper, other)
            pairs = zip((x for v in here.lists() for x in v), (x for v in other.lists() for x in v), strict=True)
            assert all(torch.equal(x, y) for x, y in pairs), (rule, hyper)


@pytest.mark.parametrize("types", TYPES[:4], ids=str)
def test_a_bounded_step_is_the_references(types: tuple) -> None:
    """max_update with spikes and averages that have not begun: within the frozen bound."""
    for rule, hyper in EVERY[TYPES.index(types) :: 211]:
        before = tensors(rule, types, SIZES, seed=2)
        for g, v in zip(before.grad, before.slots["square_avg"], strict=True):
            g[::3] *= 40
            v[::7] = 0
        for m in before.slots["grad_avg"]:
            m[::7] = 0
        there = moved(before, "cuda")
        triton.step(rule, replace(hyper, max_update=1.5), there)
        assert worst(rule, replace(hyper, max_update=1.5), before, moved(there, "cpu")) <= BOUND[types], rule


@pytest.mark.parametrize("capturable", [False, True])
def test_a_run_that_clips_and_averages_is_the_cpu_kernels(capturable: bool) -> None:
    """To the rounding of a norm's sum and of a device's exponential."""
    bounds = dict(clip_value=0.9, clip_norm=20.0, clip_global_norm=25.0, clip_weights=2.0, clip_after_decay=True)
    runs = []
    for device, backend in (("cuda", "triton"), ("cpu", "cpu")):
        draw = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(n, generator=draw).to(device)) for n in SIZES]
        words = dict(momentum=0.9, weight_decay=0.1, ema=0.9, ema_warmup="timm", capturable=capturable)
        optimizer = RMSprop(params, lr=0.01, backend=backend, **words, **bounds)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=draw).to(device)
            optimizer.step()
        kept = [x for p in params for x in (p.detach(), *optimizer.state[p].values())]
        runs.append([x.cpu() for x in (*kept, torch.as_tensor(optimizer.grad_norm, dtype=torch.float64))])
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(*runs, strict=True))


def test_alignment_does_not_matter() -> None:
    """Parameters that begin between two addresses divisible by 16 step to the same bits."""
    size = 3 * triton.BLOCK + 1
    results = []
    for begin in range(5):
        memory = torch.linspace(-1, 1, size + 4, device="cuda")
        p = memory[begin : begin + size].clone() if begin == 4 else memory[begin : begin + size]
        p.copy_(torch.linspace(-1, 1, size, device="cuda"))
        one = torch.ones_like(p)
        triton.step(Rule(), Hyper(0.1, 0.9, 1e-8), bucket_of([p], [p * 2], [one], [], [], [torch.tensor(0.0)]))
        results.append(p)
    assert all(torch.equal(results[0], other) for other in results[1:])


class Network(nn.Module):
    """A function of its parameters whose gradients are the same bits from every stream, graph and order."""

    def __init__(self) -> None:
        super().__init__()
        start = torch.Generator().manual_seed(0)
        shapes = ((33, 16), (33,), (3, 33), (3,), (5000,), (4096,))
        self.weights = nn.ParameterList([torch.randn(shape, generator=start).cuda() for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(p * x).sin().square().sum() for p in self.weights]).sum()


INPUT = 0.7


def train(optimizer_of, steps: int = 6, set_to_none: bool = True) -> list[Tensor]:
    """A run whose lr moves at every step, through its tensor where it is one."""
    model, x = Network(), torch.tensor(INPUT, device="cuda")
    optimizer = optimizer_of(model.parameters())
    for t in range(steps):
        set_lr(optimizer, 0.01 / (t + 1))
        optimizer.zero_grad(set_to_none=set_to_none)
        model(x).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def set_lr(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_run_is_torchs() -> None:
    """Gradients that move after zero_grad: torch.optim.RMSprop's run to rounding; in place, the same bits."""
    ours = train(lambda params: RMSprop(params, lr=0.01, momentum=0.9, backend="triton"))
    assert same(ours, train(lambda params: RMSprop(params, momentum=0.9, backend="triton"), set_to_none=False))
    for mine, other in zip(ours, train(lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True], ids=["step", "training-step"])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_a_replayed_graph_is_the_eager_run(bias_correction: bool, whole: bool) -> None:
    """Capture the step, or forward, backward and step; replay with lr moved through its tensor: the same bits."""
    settings = dict(momentum=0.9, centered=True, bias_correction=bias_correction, capturable=True)

    def made(params) -> RMSprop:
        return RMSprop(params, lr=torch.tensor(0.01, device="cuda"), backend="triton", **settings)

    eager = train(made, set_to_none=False)
    model, x = Network(), torch.tensor(INPUT, device="cuda")
    optimizer = made(model.parameters())
    start = [p.detach().clone() for p in model.parameters()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(x).backward()
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    if whole:
        optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if whole:
            model(x).backward()
        optimizer.step()
    with torch.no_grad():  # back to the beginning: a capture runs nothing, the step before it did
        for p, value in zip(model.parameters(), start, strict=True):
            p.copy_(value)
            for slot in optimizer.state[p].values():
                slot.zero_()
    for t in range(6):
        set_lr(optimizer, 0.01 / (t + 1))
        if whole:
            graph.replay()
        else:
            for p in model.parameters():
                p.grad.zero_()
            model(x).backward()
            graph.replay()
    assert same([p.detach() for p in model.parameters()], eager)
    assert all(float(optimizer.state[p]["step"]) == 6 for p in model.parameters())


CAREFUL = dict(rounding="stochastic", compensation=True, max_update=2.0, capturable=True, nonfinite="skip")


def bfloat16(backend: str, **words) -> tuple[list[nn.Parameter], RMSprop]:
    """Parameters of which one is NaN's turn at step 2, and their optimizer."""
    start = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=start).to("cuda", BF16)) for n in (5, 9000, 1)]
    return params, RMSprop(params, lr=0.01, momentum=0.9, backend=backend, **words)


def give(params: list[nn.Parameter], t: int) -> None:
    """Gradients in place, the same for every backend; NaN in one of them at step 2."""
    draw = torch.Generator().manual_seed(100 + t)
    for p in params:
        g = torch.randn(p.shape, generator=draw).to("cuda", BF16)
        p.grad = g if p.grad is None else p.grad.copy_(g)
    if t == 2:
        params[1].grad[7] = float("nan")


def held(params: list[nn.Parameter], optimizer: RMSprop) -> list[Tensor]:
    return [p.detach().clone() for p in params] + [x.clone() for p in params for x in optimizer.state[p].values()]


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_the_guard_decides_on_the_device(backend: str) -> None:
    """A step with a NaN writes nothing, is counted, and waits for nothing; a replayed graph does the same."""
    runs = []
    for captured in (False, True):
        params, optimizer = bfloat16(backend, **CAREFUL)
        give(params, 0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for t in range(1, 6):
            give(params, t)
            before = held(params, optimizer)
            if captured:
                graph.replay()
            else:
                with no_synchronisation():
                    optimizer.step()
            assert same(before, held(params, optimizer)) is (t == 2)
        found = optimizer.skipped
        assert (found.total, found.in_a_row, found.parameter) == (1, 0, "parameter 1 of group 0")
        assert all(float(optimizer.state[p]["step"]) == 5 for p in params)
        runs.append(held(params, optimizer))
    assert same(*runs)


def test_too_many_skips_raise_once_they_are_known() -> None:
    """The limit's error comes a step or so late, and says whose gradient it was."""
    params, optimizer = bfloat16("triton", capturable=True, nonfinite="skip", nonfinite_limit=3)
    give(params, 2)
    for _ in range(3):
        optimizer.step()
        torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=r"3 steps in a row were skipped.*parameter 1 of group 0"):
        optimizer.step()


def test_a_graph_reads_the_table_that_is_there() -> None:
    """Captured after one step with gradients in place, a replay is the kernels alone: no copy."""
    params = [nn.Parameter(torch.ones(n, device="cuda")) for n in (5, 9000)]
    optimizer = RMSprop(params, lr=0.01, capturable=True, backend="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    ran = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert ran == ["advance"] * 3


def test_a_capture_without_a_step_before_it_says_so() -> None:
    """The first table cannot be made while a graph is captured, and counting on the host would not be replayed."""
    p = nn.Parameter(torch.ones(5, device="cuda"))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        RMSprop([p], lr=0.01, backend="triton").step()
    torch.cuda.synchronize()


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Waiting for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"capturable": True},
        {"bias_correction": True, "centered": True},
        {"capturable": True, "nonfinite": "skip"},
        {"clip_norm": 1.0, "clip_global_norm": 1.0, "ema": 0.9},
    ],
)
@pytest.mark.parametrize("planned", [True, False])
def test_no_step_waits_for_the_device(settings: dict, planned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with a plan nor without, for any lr, even when every gradient moves."""
    if not planned:
        monkeypatch.setattr(Stepper, "_make_plan", lambda *_: None)
    for lr in (0.01, torch.tensor(0.01), torch.tensor(0.01, device="cuda")):
        params = [nn.Parameter(torch.ones(n, device="cuda")) for n in (5, 9000)]
        optimizer = RMSprop(params, lr=lr, backend="triton", **settings)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()  # compiles
        with no_synchronisation():
            for _ in range(3):
                for p in params:
                    p.grad = p.grad.clone()
                optimizer.step()


def test_one_kernel_and_no_copy_a_step() -> None:
    """The profiler sees one kernel in a step, and no copy while nothing moves."""
    params = [nn.Parameter(torch.ones(n, device="cuda")) for n in (5, 9000, 1, 70000)]
    optimizer = RMSprop(params, lr=0.01, momentum=0.9, backend="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            optimizer.step()
        torch.cuda.synchronize()
    ran = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert ran == ["advance"] * 5


@pytest.mark.parametrize(
    "settings", [{}, {"momentum": 0.9, "centered": True}, {"capturable": True}, {"clip_norm": 1.0, "ema": 0.9}]
)
def test_a_step_needs_no_memory(settings: dict) -> None:
    """The peak during a step is what was there before it, but for a table of some words per tensor and block."""
    p = nn.Parameter(torch.ones(1 << 22, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = RMSprop([p], backend="triton", **settings)
    optimizer.step()
    for again in (True, False):
        if not again:
            p.grad = p.grad.clone()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        assert torch.cuda.max_memory_allocated() - before <= (0 if again else 1 << 16)


def test_another_stream() -> None:
    """Steps on streams of their own, that wait for each other, are the steps of one stream."""

    def run(streams: list[torch.cuda.Stream]) -> Tensor:
        p = nn.Parameter(torch.linspace(-1, 1, 100_000, device="cuda"))
        optimizer = RMSprop([p], backend="triton")
        torch.cuda.synchronize()
        for t in range(20):
            stream = streams[t % len(streams)]
            stream.wait_stream(streams[(t - 1) % len(streams)])
            with torch.cuda.stream(stream):
                p.grad = p.detach() * (t + 1)
                p.grad.record_stream(streams[(t + 1) % len(streams)])
                optimizer.step()
        torch.cuda.synchronize()
        return p.detach()

    one = run([torch.cuda.current_stream()])
    assert torch.equal(one, run([torch.cuda.Stream() for _ in range(3)]))


def test_two_devices() -> None:
    """One optimizer for parameters of several GPUs steps each where it is, whichever is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    params = [nn.Parameter(torch.ones(5000, device=f"cuda:{i}")) for i in (0, 1)]
    optimizer = RMSprop(params, lr=torch.tensor(0.1, device="cuda:0"), capturable=True, backend="triton")
    for _ in range(4):
        for p in params:
            p.grad = p.detach().clone()
        optimizer.step()
    torch.cuda.synchronize()
    assert torch.equal(params[0].cpu(), params[1].cpu())


def test_torch_compile_outside_and_inside() -> None:
    """A compiled model with our step beside it, and a compiled step, train as the eager ones do."""
    expected = train(lambda params: RMSprop(params, lr=0.01, backend="triton"))
    model, x = Network(), torch.tensor(INPUT, device="cuda")
    compiled, optimizer = torch.compile(model), RMSprop(model.parameters(), lr=0.01, backend="triton")
    inner = Network()
    other = RMSprop(inner.parameters(), lr=torch.tensor(0.01, device="cuda"), capturable=True)
    step = torch.compile(other.step)
    for t in range(6):
        set_lr(optimizer, 0.01 / (t + 1))
        set_lr(other, 0.01 / (t + 1))
        for net, run, advance in ((model, compiled, optimizer.step), (inner, inner, step)):
            net.zero_grad()
            run(x).backward()
            advance()
    for net in (model, inner):
        for p, value in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("amp_in_step", [False, True])
def test_grad_scaler(amp_in_step: bool) -> None:
    """float16 under autocast: scaled gradients step as unscaled ones, and an overflow skips parameters and count."""
    p = nn.Parameter(torch.linspace(-1, 1, 9000, device="cuda"))
    settings = dict(capturable=True, amp_in_step=True) if amp_in_step else {}
    optimizer = RMSprop([p], lr=0.01, backend="triton", **settings)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    q = nn.Parameter(p.detach().clone())
    plain = RMSprop([q], lr=0.01, backend="triton")
    for t in range(5):
        optimizer.zero_grad()
        scaler.scale((p * p).sum() * (float("inf") if t == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if t != 2:
            plain.zero_grad()
            (q * q).sum().backward()
            plain.step()
    assert torch.equal(p, q)
    assert float(optimizer.state[p]["step"]) == 4


def test_half_precision_keeps_float32_state() -> None:
    """A float16 parameter's averages are float32, and its step is the reference's (g² underflows in float16)."""
    p = nn.Parameter(torch.ones(10, device="cuda", dtype=F16))
    p.grad = torch.full_like(p, 1e-5)
    optimizer = RMSprop([p], lr=0.1, backend="triton")
    optimizer.step()
    assert optimizer.state[p]["square_avg"].dtype == F32
    assert (p < 0.1).all()
