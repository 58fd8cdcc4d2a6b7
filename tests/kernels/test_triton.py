"""The Triton kernel computes the reference's step: its source on CPU tensors, under Triton's interpreter."""

from itertools import product
from types import ModuleType, SimpleNamespace

import pytest
import torch
from cases import bucket_of, change, mostly_long
from cpu_parity import BF16, BOUND, COVERING, EVERY, F16, F32, F64, TYPES, copied, rules, tensors, worst
from interpreted import BLOCK, interpreted_fixtures, interpreter, kernel_module, mistake_tests
from torch import Tensor

from rmsprop import RMSprop, kernels
from rmsprop.kernels import cpu, native, triton
from rmsprop.kernels.triton_plan import DevicePlan
from rmsprop.spec import Hyper, Rule
from rmsprop.step import Stepper
from rmsprop.tensors.bucket import Bucket

# No element; a whole block and part of a piece. Every size up to that: test_the_bits_are_the_cpu_kernels.
SIZES = (0, BLOCK + 3)
AS_SHIPPED = kernels.BACKENDS
PLAIN, FULL = Rule(), Rule(centered=True, momentum=True, nesterov=True, bias_correction=True)
HYPER = Hyper(lr=0.03, alpha=0.9, eps=1e-3)
FULL_HYPER = Hyper(lr=0.03, alpha=0.9, eps=1e-3, momentum=0.8, weight_decay=0.05)
BOTH = pytest.mark.parametrize(("rule", "hyper"), [(PLAIN, HYPER), (FULL, FULL_HYPER)], ids=["plain", "full"])


def some_types(*kept: int) -> pytest.MarkDecorator:
    """Parametrize by all types, whose numbers in TYPES are not `kept` only in `make test-long`."""
    ids = [f"{p}-{s}".replace("torch.", "") for p, s in TYPES]
    return pytest.mark.parametrize("types", mostly_long(TYPES, lambda i, _: i in kept), ids=ids)


NEEDS_NATIVE = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


module, _in_place = interpreted_fixtures()


def stepped(rule: Rule, hyper: Hyper, bucket: Bucket) -> float:
    """Step the bucket with the Triton kernel; its worst error against the reference, in ULPs."""
    before = copied(bucket)
    assert kernels.BACKENDS[0].refuse(rule, bucket) is None
    triton.step(rule, hyper, bucket)
    for mine, kept in zip(bucket.grad, before.grad, strict=True):
        assert torch.equal(mine.nan_to_num(), kept.nan_to_num()), "the step edited a gradient"
    return worst(rule, hyper, before, bucket)


def same(a: Bucket, b: Bucket) -> bool:
    """Whether two buckets hold the same numbers, NaN equal to NaN."""
    pairs = zip((x for v in a.lists() for x in v), (x for v in b.lists() for x in v), strict=True)
    return all(torch.equal(x, y) or torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in pairs)


@pytest.mark.parametrize("k", range(len(TYPES)), ids=[f"{p}-{s}".replace("torch.", "") for p, s in TYPES])
def test_one_step_is_the_references(k: int) -> None:
    """Rules dealt out over the dtypes: every element is within the CPU kernel's frozen bound."""
    for rule, hyper in COVERING[k % 3 :: 3]:
        assert stepped(rule, hyper, tensors(rule, TYPES[k], SIZES, seed=1)) <= BOUND[TYPES[k]], (rule, hyper)


@pytest.mark.long
@pytest.mark.parametrize("k", range(len(TYPES)), ids=[f"{p}-{s}".replace("torch.", "") for p, s in TYPES])
def test_one_step_of_each_rule_is_the_references(k: int) -> None:
    """Each rule of the spec, dealt out over the dtypes."""
    for rule, hyper in EVERY[k :: len(TYPES)]:
        assert stepped(rule, hyper, tensors(rule, TYPES[k], SIZES, seed=1)) <= BOUND[TYPES[k]], (rule, hyper)


@NEEDS_NATIVE
@some_types(0, 9)
@BOTH
def test_the_bits_are_the_cpu_kernels(rule: Rule, hyper: Hyper, types: tuple) -> None:
    """With fused multiply-adds at the same places, and IEEE root and division, both kernels round alike."""
    here = tensors(rule, types, (*range(1, BLOCK + 2, 3), 3 * BLOCK + 5), seed=2)
    there = copied(here)
    triton.step(rule, hyper, here)
    cpu.step(rule, hyper, there)
    assert same(here, there)


@pytest.mark.parametrize("which", range(5), ids=["param", "grad", "square_avg", "grad_avg", "momentum_buffer"])
def test_alignment_does_not_matter(which: int) -> None:
    """A tensor that begins between two addresses divisible by 16 steps to the same bits, by the masked way."""
    aligned = tensors(FULL, (F32, F32), (2 * BLOCK + 3,), seed=3)
    moved = copied(aligned)
    memory = torch.empty(2 * BLOCK + 4)
    shifted = memory[1:] if memory.data_ptr() % 16 == 0 else memory[:-1]
    assert shifted.data_ptr() % 16 != 0
    moved.lists()[which][0] = shifted.copy_(moved.lists()[which][0])
    triton.step(FULL, FULL_HYPER, aligned)
    triton.step(FULL, FULL_HYPER, moved)
    assert same(aligned, moved)


@pytest.mark.parametrize("clock", [F32, F64])
@pytest.mark.parametrize("types", [(F32, F32), (F64, F64), (BF16, F32)], ids=["float32", "float64", "bfloat16"])
def test_counted_on_the_device_with_a_learning_rate_there(types: tuple, clock: torch.dtype) -> None:
    """capturable=True: counters and lr are read and written where they are, and the step is the reference's."""
    for rule, hyper in (*COVERING[1::7], (Rule(bias_correction=True), HYPER)):
        bucket = tensors(rule, types, SIZES, seed=4)
        bucket.capturable = True
        bucket.slots["step"][:] = [t.to(clock) for t in bucket.slots["step"]]
        before = copied(bucket)
        lr = torch.tensor(0.03, dtype=torch.float64)
        triton.step(rule, Hyper(lr, hyper.alpha, hyper.eps, hyper.momentum, hyper.weight_decay), bucket)
        assert worst(rule, hyper, before, bucket) <= BOUND[types], rule


def test_bias_on_the_device_is_exact_from_the_first_step() -> None:
    """[4] 1 − αᵗ from a counter on the device agrees to 2 ULP of float64, for α near 0 and 1 and any t."""
    for alpha, t in product((0.0, 0.1, 0.9, 0.999, 1 - 1e-9), (0.0, 1.0, 99.0, 1e6)):
        p, v = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
        bucket = bucket_of([p], [torch.zeros(1, dtype=F64)], [v], [], [], [torch.tensor(t)], capturable=True)
        bucket.grad[0].fill_(1.0)
        triton.step(Rule(bias_correction=True, eps_mode="inside"), Hyper(1.0, alpha, 0.0), bucket)
        corrected = float(p**-2)  # v̂ = v/(1 − αᵗ), v = 1, p = −1/√v̂
        log = torch.log(torch.tensor(alpha, dtype=F64))
        expected = float(1 / -torch.expm1((t + 1) * log))
        assert corrected == pytest.approx(expected, rel=1e-14), (alpha, t)


@some_types(0, 4, 9)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_propagates(types: tuple, value: float) -> None:
    """A NaN or infinite gradient comes out where the reference has it, and nowhere else."""
    for switches in (("outside", False, (0, 0, 0)), ("floor", True, (1, 1, 1)), ("inside", True, (1, 0, 0))):
        for rule, hyper in list(rules(*switches))[5 * TYPES.index(types) % 12 :: 12]:
            bucket = tensors(rule, types, (40,), seed=9)
            bucket.grad[0][[0, 17, 39]] = value
            assert stepped(rule, hyper, bucket) <= BOUND[types]


@some_types(0, 3, 4, 9)
@pytest.mark.parametrize("eps_mode", ["outside", "inside", "both", "floor"])
def test_nothing_over_nothing_is_nothing(types: tuple, eps_mode: str) -> None:
    """[7] With ε = 0 and a gradient that was always 0 the step is 0."""
    rule = Rule(eps_mode=eps_mode)
    bucket = tensors(rule, types, (9,), seed=10)
    bucket.slots["square_avg"][0].zero_()
    bucket.grad[0].zero_()
    kept = bucket.param[0].clone()
    triton.step(rule, Hyper(lr=0.1, alpha=0.9, eps=0.0), bucket)
    assert torch.equal(bucket.param[0], kept)


def test_a_variance_rounded_below_zero_is_zero() -> None:
    """[5] v − m² by cancellation below zero counts as zero, and NaN stays NaN."""
    grad = 1000 + torch.rand(64, generator=torch.Generator().manual_seed(0)) * 1e-3
    grad[3] = float("nan")
    bucket = bucket_of([torch.zeros(64)], [grad], [torch.zeros(64)], [torch.zeros(64)], [], [torch.tensor(0.0)])
    for _ in range(20):
        triton.step(Rule(centered=True), Hyper(lr=1e-6, alpha=0.9, eps=1e-8), bucket)
    assert bucket.param[0].isfinite().logical_not().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_half_number_is_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    """Each finite pattern, and its halfway neighbours, keep their value: the interpreter's own conversions do not."""
    with interpreter(kernel_module(), block=1 << 18):
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        middle = every.float().view(torch.int32) + (0x8000 if dtype == BF16 else 0x1000)
        wide = torch.cat([every.float(), middle.view(F32), (middle + 1).view(F32), (middle - 1).view(F32)])
        wide = wide[wide.isfinite()]
        p = torch.zeros(len(wide), dtype=dtype)
        # g = 0 leaves u = 0: the parameter becomes −lr·b, rounded from any float32
        zero = torch.zeros_like(p)
        bucket = bucket_of([p], [zero], [torch.ones_like(wide)], [], [wide.clone()], [torch.tensor(0.0)])
        triton.step(Rule(momentum=True), Hyper(lr=-1.0, alpha=0.5, eps=1.0, momentum=1.0), bucket)
        assert torch.equal(p, wide.to(dtype))


MISTAKES = [
    ("eps forgotten", "d = _sqrt(w) + e", "d = _sqrt(w)"),
    ("eps in the root forgotten", "_sqrt(w + e) + e", "_sqrt(w) + e"),
    ("floor adds", "d = tl.where(d < e, e, d)", "d = d + e"),
    ("alpha for 1 − alpha", "_fused(tl.cast(beta, arithmetic) * g, g", "_fused(tl.cast(alpha, arithmetic) * g, g"),
    ("lr on both sides", "p - u if momentum and lr_in_buffer else", "p - tl.cast(lr, arithmetic) * u if False else"),
    ("nesterov ignored", "if nesterov else b", "if False else b"),
    ("momentum not applied", "b = _fused(tl.cast(mu, arithmetic), b, u)", "b = b + u"),
    ("ascent as descent", "-1.0 if maximize else 1.0", "1.0"),
    ("decoupled without lr", "1 - lr * wd", "1 - wd"),
    ("l2 for decoupled", "    if decoupled:", "    if False:"),
    ("mean of the wrong weight", "-alpha, beta), arithmetic)", "-alpha, alpha), arithmetic)"),
    ("bias of the mean forgotten", "m = m * unbias if bias_correction else m", "m = m"),
    ("not centered", "w = _fused(-m, m, w)", "w = w"),
    ("gradient edited", "    # [2] second moment", "    _store(g_at, offset, at, mask, vector, param, g + g)"),
    ("0/0 is NaN", "tl.where((g == 0) & (d == 0), 1.0, d)", "d"),
    ("NaN swallowed", "w = tl.where(w < 0, 0.0, w)", "w = tl.where(w > 0, w, 0.0)"),
    ("the tail forgotten", "tl.minimum(left, block)", "tl.minimum(left // piece * piece, block)"),
    (
        "the last element twice",
        "mask = None if vector > 1 else at < left",
        "mask = None if vector > 1 else at <= left",
    ),
    ("every second block", "offset = number * block", "offset = number // 2 * block"),
    ("the step not counted", "tl.store(t, tl.load(t) + 1)", "tl.store(t, tl.load(t))"),
    ("rounded by truncation", "(u + 0x7FFF + ((u >> 16) & 1)) >> 16", "u >> 16"),
]


def _padded(bucket: Bucket) -> list[Tensor]:
    """Put every tensor at the start of a larger one, so that writing beyond its end harms, and shows, here."""
    memory = []
    for values in bucket.lists()[:5]:
        for i, x in enumerate(values):
            memory.append(x.new_full((x.numel() + 64,), 7.0))
            values[i] = memory[-1][: x.numel()].copy_(x)
    return memory


def _check() -> None:
    """Assert that a handful of rules, a zero step and a counted one, are right."""
    test_nothing_over_nothing_is_nothing((F32, F32), "outside")
    bucket = tensors(PLAIN, (F32, F32), (9,), seed=7)
    bucket.capturable = True
    triton.step(PLAIN, HYPER, bucket)
    assert float(bucket.slots["step"][0]) == 10
    for i, (rule, hyper) in enumerate(COVERING):
        types = ((F32, F32), (BF16, BF16))[i % 2]
        bucket = tensors(rule, types, (9, 2 * BLOCK), seed=6)
        bucket.grad[1][5] = bucket.slots["square_avg"][1][6] = float("nan")
        memory = _padded(bucket)
        assert stepped(rule, hyper, bucket) <= BOUND[types]
        assert all((x[-64:] == 7).all() for x in memory)


test_the_kernel_as_it_stands_is_not_caught, test_each_mistake_is_caught = mistake_tests(
    MISTAKES, _check, quick=lambda i, _: i % 5 == 0
)


def trained(backend: str, steps: int = 4, **settings: object) -> list[Tensor]:
    """The parameters of a small run, whose gradients move in memory and are missing once."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (5, BLOCK + 1, 0, 1)]
    optimizer = RMSprop(params, backend=backend, **settings)
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (t + 1)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        if t == 2:
            params[1].grad = None
        optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [steps, steps - (steps > 2), steps, steps]
    return [p.detach() for p in params]


@NEEDS_NATIVE
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("planned", [True, False])
def test_a_run_is_the_cpu_kernels(capturable: bool, bias_correction: bool, planned: bool, monkeypatch) -> None:
    """With and without a plan, counting here or there: the same run, while lr moves and a gradient is missing."""
    if not planned:
        monkeypatch.setattr(Stepper, "_make_plan", lambda *_: None)
    settings = dict(capturable=capturable, bias_correction=bias_correction, momentum=0.9, centered=True)
    for mine, other in zip(trained("triton", **settings), trained("cpu", **settings), strict=True):
        assert torch.allclose(mine, other, rtol=3e-7 if capturable and bias_correction else 0, atol=0)


@NEEDS_NATIVE
@pytest.mark.parametrize("planned", [True, False])
def test_a_run_with_corrected_decay_is_the_cpu_kernels(planned: bool, monkeypatch) -> None:
    """[1] p − lr²/reference_lr·wd·p, while lr moves; with capturable=True the kernel refuses, lr not being read."""
    if not planned:
        monkeypatch.setattr(Stepper, "_make_plan", lambda *_: None)
    settings = dict(weight_decay=0.3, weight_decay_mode="corrected", lr=0.05)
    other = trained("eager", **settings)
    for mine, same, near in zip(trained("triton", **settings), trained("cpu", **settings), other, strict=True):
        assert torch.equal(mine, same)
        torch.testing.assert_close(mine, near)
    bucket = bucket_of(
        [torch.ones(1)], [torch.ones(1)], [torch.ones(1)], [], [], [torch.tensor(0.0)], capturable=True
    )
    reason = triton.refuse_reading(Rule(weight_decay_mode="corrected"), bucket)
    assert "reads the learning rate on the host, which capturable=True forbids" in str(reason)


def planned() -> tuple[list[torch.nn.Parameter], RMSprop, triton.Table]:
    """An optimizer that stepped once and has a plan, with its table."""
    params = [torch.nn.Parameter(torch.ones(n)) for n in (5, 40)]
    optimizer = RMSprop(params, backend="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert isinstance(optimizer._stepper.plan, DevicePlan)
    return params, optimizer, optimizer._stepper.plan._lists_held[0].table


@NEEDS_NATIVE
def test_the_table_is_sent_only_when_something_moved() -> None:
    """Steps in place send nothing; a gradient elsewhere sends one table, and the old one stays as it was."""
    params, optimizer, table = planned()
    for _ in range(3):
        optimizer.step()
    assert table.sendings == 1
    sent, kept = table._there[0], table._there[0].clone()
    held = params[0].grad
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    optimizer.step()
    assert table.sendings == 2
    assert torch.equal(sent, kept)
    assert held is not None
    params[0].grad = None
    optimizer.step()
    assert table.sendings == 3
    assert table.columns[triton.SIZE].tolist() == [-1, 40]


@NEEDS_NATIVE
def test_a_plan_follows_gradients_and_slots_and_nothing_else() -> None:
    """A slot that was replaced is stepped where it is; another group drops the plan, which does not know it."""
    params, optimizer, _ = planned()
    plan = optimizer._stepper.plan
    optimizer.step()
    assert optimizer._stepper.plan is plan
    before = optimizer.state[params[0]]["square_avg"]
    slot = optimizer.state[params[0]]["square_avg"] = before.clone()
    optimizer.step()
    assert optimizer._stepper.plan is plan
    assert (slot > before).all()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    optimizer.param_groups[1]["params"][0].grad = torch.ones(3)
    optimizer.step()
    assert optimizer._stepper.plan is not plan


def test_without_a_plan_a_table_is_kept_too() -> None:
    """The long way finds the table of its first parameter again, and drops it with the parameter."""
    bucket = tensors(PLAIN, (F32, F32), (5, 40), seed=8)
    for _ in range(3):
        triton.step(PLAIN, HYPER, bucket)
    (table,) = triton._tables.values()
    assert table.sendings == 1
    del table, bucket
    assert not list(triton._tables.values())


class _Gpu:
    """A GPU's streams and captures, as a table asks for them; its memory is the CPU's."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing, self.pinned = 1, False, 0
        self.empty = torch.empty
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _index: self.stream, raising=False)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        patch.setattr(torch, "empty", self.made)
        patch.setattr(triton, "_REPLAYED", {})

    def made(self, *size: int, dtype: torch.dtype, device: object = None, pin_memory: bool = False) -> Tensor:
        assert pin_memory == (device == "cpu")
        assert not (pin_memory and self.capturing), "pinned memory cannot be had during a capture"
        self.pinned += pin_memory
        return self.empty(*size, dtype=dtype)


class TestTableOnAGpu:
    """When a table is sent, from where, and what is kept for a graph."""

    @pytest.fixture
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> _Gpu:
        return _Gpu(monkeypatch)

    @pytest.fixture
    def table(self, gpu: _Gpu) -> triton.Table:
        gpu.capturing = False
        table = triton.Table((5, 40), torch.device("cuda", 0))
        table.columns[:5] = 64
        return table

    def test_it_is_sent_again_for_another_address_or_stream(self, gpu: _Gpu, table: triton.Table) -> None:
        """Never over the one that a kernel may be reading; the staging buffer lives as long as the table."""
        first = table.on_device(capturable=False)
        assert table.on_device(capturable=False) is first
        assert torch.equal(first, torch.from_numpy(table.host))
        table.columns[1, 0] = 128
        second = table.on_device(capturable=False)
        assert second is not first
        assert first[2] == 64
        assert second[2] == 128
        gpu.stream = 2
        assert table.on_device(capturable=False) is not second
        assert (table.sendings, gpu.pinned) == (3, 3)
        assert table._there[0].data_ptr() != table._there[1].data_ptr()

    def test_a_capture_reads_the_table_of_the_step_before_it(self, gpu: _Gpu, table: triton.Table) -> None:
        """On whatever stream: where nothing moved nothing is sent, and the table stays for ever."""
        there = table.on_device(capturable=True)
        gpu.capturing = True
        for gpu.stream in (1, 3):
            assert table.on_device(capturable=True) is there
        assert table.sendings == 1
        assert any(kept is there for kept in triton._REPLAYED.values())

    def test_a_capture_after_something_moved_brings_its_own_table(self, gpu: _Gpu, table: triton.Table) -> None:
        """A graph copies it at every replay from pinned memory of its own, and nobody else reads what it copies."""
        before = table.on_device(capturable=True)
        gpu.capturing, gpu.stream = True, 3
        table.columns[1, 0] = 128
        captured = [table.on_device(capturable=True) for _ in range(2)]  # it may be of two graphs
        gpu.capturing = False
        later = table.on_device(capturable=True)
        assert len({id(x) for x in (before, *captured, later)}) == 4
        assert before[2] == 64
        table.columns[1, 0] = 192
        table.on_device(capturable=True)
        assert len(triton._REPLAYED) == 4
        assert all(kept[2] == 128 for kept in triton._REPLAYED.values())

    def test_so_many_steps_may_be_captured_between_two_others(self, gpu: _Gpu, table: triton.Table) -> None:
        """Pinned memory cannot be had in a capture: the steps before set it aside, and it runs out with a word."""
        for _ in range(2):
            gpu.capturing = False
            table.on_device(capturable=True)
            gpu.capturing = True
            for _ in range(triton._SPARES):
                table.columns[1, 0] += 64
                table.on_device(capturable=True)
            table.columns[1, 0] += 64
            with pytest.raises(RuntimeError, match="take an optimizer step before the capture"):
                table.on_device(capturable=True)

    def test_a_capture_without_a_step_before_it_says_so(self, gpu: _Gpu, table: triton.Table) -> None:
        """There is no pinned memory to send the first table from."""
        gpu.capturing = True
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
            table.on_device(capturable=True)


@pytest.mark.parametrize("rule", [PLAIN, FULL, Rule(centered=True)], ids=["plain", "full", "centered"])
def test_one_launch_for_all_tensors(rule: Rule, module: ModuleType) -> None:
    """However many tensors: one launch, and a second that counts where [4] asks a device for the step."""
    for capturable in (False, True):
        bucket = tensors(rule, (F32, F32), (1, 40, 7, 0, 99), seed=8)
        bucket.capturable = capturable
        module.advance.grids.clear()
        module.count_steps.grids.clear()
        triton.step(rule, HYPER, bucket)
        assert module.advance.grids == [(1 + 2 + 1 + 1 + 4,)]
        assert len(module.count_steps.grids) == (capturable and rule.bias_correction)


def plain_bucket(**asked: object) -> Bucket:
    one = torch.ones(3)
    return bucket_of([one], [one.clone()], [one.clone()], [], [], [torch.tensor(0.0)], **asked)


class TestRefusals:
    """Reasons in words; here of the interpreter's backend, which differs in the device alone."""

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (dict(fused=False), "excludes native kernels"),
            (dict(foreach=True), "foreach=True"),
            (dict(foreach=False), "foreach=False"),
            (dict(differentiable=True), "autograd"),
            (dict(param=[torch.ones(3, dtype=torch.complex64)]), "complex64"),
            (dict(param=[torch.ones(3, dtype=torch.float8_e5m2)]), "float8_e5m2"),
            (dict(grad=[torch.ones(3).to_sparse()]), "torch.sparse_coo"),
            (dict(grad=[torch.ones(3, dtype=F64)]), "some gradients are not torch.float32"),
            (dict(param=[torch.ones(6)[::2]]), "gaps"),
            (dict(square_avg=[torch.ones(3, dtype=F16)]), "the state is torch.float16"),
            (dict(grad=[torch.ones(3, device="meta")]), "plain tensors on cpu"),
            (dict(found_inf=torch.tensor(0.0)), "give capturable=True"),
            (dict(step=[torch.zeros((), device="meta")]), "a step counter is on meta"),
        ],
    )
    def test_what_it_does_not_take(self, changes: dict, words: str) -> None:
        """Each with the reason."""
        bucket = plain_bucket()
        for name, value in changes.items():
            change(bucket, name, value)
        assert words in str(kernels.BACKENDS[0].refuse(PLAIN, bucket))

    def test_a_subclass_is_refused(self) -> None:
        """A subclass's memory may mean something else."""

        class Other(Tensor):
            pass

        bucket = plain_bucket()
        bucket.param = [torch.ones(3).as_subclass(Other)]
        assert "Other, a subclass" in str(kernels.BACKENDS[0].refuse(PLAIN, bucket))

    @pytest.mark.parametrize(
        ("device", "words"),
        [("cpu", "on cpu, and it computes on NVIDIA"), ("xpu:0", "untested"), ("mps:0", "untested")],
    )
    def test_other_devices(self, device: str, words: str) -> None:
        """The real backend takes CUDA alone, and says where it is untested."""
        assert words in str(triton._refuse_device(fake(device)))

    def test_rocm_and_old_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """AMD's torch calls its devices cuda too; Triton needs compute capability 8.0."""
        monkeypatch.setattr(triton, "_capability", lambda _index: (7, 5))
        monkeypatch.setattr(torch.version, "hip", None)
        assert "capability 7.5, and Triton needs 8.0" in str(triton._refuse_device(fake("cuda:0")))
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert "ROCm, where it is untested" in str(triton._refuse_device(fake("cuda:0")))

    def test_the_reason_reaches_the_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Asked for by name on the CPU it raises its reason, and auto never takes it there."""
        monkeypatch.setattr(kernels, "BACKENDS", AS_SHIPPED)
        with pytest.raises(RuntimeError, match="triton refuses: the parameters are on cpu"):
            RMSprop([torch.ones(3)], backend="triton")
        assert kernels.pick("auto", PLAIN, plain_bucket()).name != "triton"

    def test_it_stands_last_until_a_gpu_has_verified_it(self) -> None:
        """auto prefers eager, also on a GPU; whoever asks for it by name, or for fused=True, gets it."""
        assert [own.name for own in AS_SHIPPED] == ["cpu", "eager", "triton"]


def fake(device: str) -> Bucket:
    """A bucket whose parameter is on a device that this machine may lack."""
    return Bucket([SimpleNamespace(device=torch.device(device))])  # type: ignore[list-item]
