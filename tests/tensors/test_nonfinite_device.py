"""nonfinite="skip" on a device, with CPU tensors in its place: what is decided, counted and read there, and when."""

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from cases import mostly_long
from cpu_parity import ALL_SWITCHES, BF16, F16, F32, F64, copied, rules, tensors
from interpreted import interpreter, kernel_module
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rmsprop import RMSprop
from rmsprop.kernels import eager
from rmsprop.spec import random_key
from rmsprop.step import Stepper
from rmsprop.tensors import nonfinite
from rmsprop.tensors.bucket import Bucket
from rmsprop.tensors.nonfinite import Guard


class _Device:
    """Events and captures of a device, as the guard asks for them."""

    def __init__(self) -> None:
        self.done, self.capturing, self.marks = True, False, 0

    def mark(self, _device: torch.device) -> "_Device":
        assert not self.capturing, "an event of a capture tells nothing"
        self.marks += 1
        return self

    def query(self) -> bool:
        assert not self.capturing, "asking for an event breaks a capture"
        return self.done


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> _Device:
    """The CPU is no host today."""
    own = _Device()
    monkeypatch.setattr(nonfinite, "_on_host", lambda _device: False)
    monkeypatch.setattr(nonfinite, "_mark", own.mark)
    monkeypatch.setattr(nonfinite, "_capturing", lambda _device: own.capturing)
    return own


@pytest.fixture
def triton() -> Iterator[None]:
    with interpreter(kernel_module()):
        yield


def made(count: int = 3) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4)) for _ in range(count)]


def give(params: list[nn.Parameter], bad: int | None = None, without: int | None = None) -> None:
    """Gradients; one of them with a NaN, one of them missing."""
    for i, p in enumerate(params):
        p.grad = None if i == without else torch.ones_like(p)
        if i == bad:
            p.grad[0] = float("nan")


def looked(own: Guard, params: list[nn.Parameter], bad: int | None = None, without: int | None = None) -> Tensor:
    give(params, bad, without)
    found = own.scan([{"params": params[:1]}, {"params": params[1:]}])
    assert isinstance(found, Tensor)
    return found


class _Deaf(TorchDispatchMode):
    """What waits for a value, to read it or to know how many elements a result has, is an error."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "where.default")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        assert not any(name == read or name.startswith(read + ".") for read in self.READS), f"{name} waits"
        return func(*args, **(kwargs or {}))


def test_it_counts_what_the_host_would_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Total, in a row, and the first parameter at fault in the order of the groups, with gradients missing or not."""
    there, here, params = Guard("skip", None), Guard("skip", None), made(5)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    script = [(None, None), (3, None), (1, 0), (4, 2), (None, 3), (0, 1), (None, None), (2, 4)]
    for bad, without in script:
        found = looked(there, params, bad, without)
        assert (found.dtype, found.shape, float(found)) == (F32, (), float(bad is not None))
        with monkeypatch.context() as patch:
            patch.setattr(nonfinite, "_on_host", lambda _device: True)
            assert here.scan(groups) is (bad is not None)
        assert there.skipped(groups) == here.skipped(groups)
    assert there.skipped(groups).total == 5


def test_the_first_of_several_is_named() -> None:
    """Of two gradients that are not finite the first in the order of the groups counts, whatever their dtypes."""
    own, params = Guard("skip", None), [nn.Parameter(torch.ones(2, dtype=d)) for d in (F32, F64, BF16, F64)]
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad[0] = params[2].grad[1] = params[3].grad[0] = float("inf")
    groups = [{"params": params, "param_names": ["a", "b", "c", "d"]}]
    own.scan(groups)
    assert own.skipped(groups).parameter == "'b'"


def test_nothing_is_read_back_between_steps(device: _Device) -> None:
    """Looking, deciding and counting read no value, while counts are on their way and when they have arrived."""
    own, params = Guard("skip", 100), made()
    looked(own, params)
    for done in (False, True):
        device.done = done
        with _Deaf():
            for bad, without in ((None, None), (1, None), (2, 0), (None, 1)):
                looked(own, params, bad, without)
    with pytest.raises(AssertionError, match="waits"), _Deaf():
        bool(torch.ones(1).any())


def test_one_copy_is_on_its_way_at_a_time(device: _Device) -> None:
    """The host's buffer is written again only after it was read: counts that are late are skipped, not mixed."""
    own, params = Guard("skip", None), made()
    device.done = False
    for _ in range(5):
        looked(own, params, bad=0)
    assert device.marks == 1
    assert own._row == 0
    device.done = True
    looked(own, params, bad=0)
    assert (device.marks, own._row) == (2, 1)
    looked(own, params)
    assert own._row == 6
    assert own.skipped([{"params": params}]).total == 6


def test_the_limit_raises_one_step_later_and_lets_go(device: _Device) -> None:
    """The error comes with the counts, before the next step is looked at, and a step that is finite ends it."""
    own, params = Guard("skip", 3), made()
    for _ in range(3):
        looked(own, params, bad=1)
    with pytest.raises(RuntimeError, match=r"3 steps in a row were skipped.*parameter 0 of group 1"):
        looked(own, params, bad=1)
    looked(own, params)  # nothing new has arrived
    looked(own, params)
    for _ in range(3):
        looked(own, params, bad=1)
    device.done = False
    looked(own, params, bad=1)  # the third is on its way still
    device.done = True
    with pytest.raises(RuntimeError, match="nonfinite_limit=3"):
        looked(own, params)


def test_a_capture_counts_in_place(device: _Device) -> None:
    """What a graph replays adds to the same three numbers; it neither sends nor asks for anything."""
    own, params = Guard("skip", 2), made()
    looked(own, params)
    there = own._counts._there
    device.capturing = True
    for _ in range(4):
        looked(own, params, bad=2)
    assert own._counts._there is there
    assert there.tolist() == [4, 4, 2]
    assert device.marks == 1
    device.capturing = False
    assert own.skipped([{"params": params}]).in_a_row == 4


def test_a_capture_without_a_step_before_it_says_so(device: _Device) -> None:
    """Counters that a graph made would begin anew at every replay."""
    device.capturing = True
    with pytest.raises(
        RuntimeError, match="nonfinite='skip' has nowhere to count yet: take an optimizer step before"
    ):
        looked(Guard("skip", None), made())


def test_counters_stay_where_they_are() -> None:
    """Gradients that come and go send nothing to the device, and nothing grows with them."""
    own, params = Guard("skip", None), made(6)
    looked(own, params)
    attributes = {name: value for name, value in vars(own._counts).items() if name != "_sent"}
    for i in range(6):
        looked(own, params, without=i)
    assert {name: value for name, value in vars(own._counts).items() if name != "_sent"} == attributes


def trained(steps: Callable[[int], int | None], **words: object) -> tuple[list[Tensor], RMSprop]:
    """A run on the interpreted GPU kernel. Args: steps: t -> the bad parameter of a step before step t, or None."""
    start = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=start).to(BF16)) for n in (5, 40, 1)]
    optimizer = RMSprop(params, lr=0.01, momentum=0.9, backend="triton", capturable=True, **words)
    draw = torch.Generator().manual_seed(1)
    for t in range(9):
        bad = steps(t)
        if bad is not None:
            give(params, bad)
            optimizer.step()
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw).to(BF16)
        optimizer.step()
    return [p.detach() for p in params] + [x for p in params for x in optimizer.state[p].values()], optimizer


@pytest.mark.parametrize(
    ("words", "planned"),
    mostly_long(
        product([{}, dict(rounding="stochastic", compensation=True)], [True, False]),
        lambda i, _: i in (1, 2),
        unpack=True,
    ),
    ids=str,
)
def test_skips_change_nothing_about_the_gpu_kernels_run(triton, words, planned, monkeypatch) -> None:  # noqa: ARG001
    """Bad batches between good ones: parameters, state, counters and random bits are the run's without them."""
    if not planned:
        monkeypatch.setattr(Stepper, "_make_plan", lambda *_: None)
    expected, _ = trained(lambda _t: None, **words)
    got, optimizer = trained(lambda t: t % 3 if t in (0, 2, 3, 7) else None, nonfinite="skip", **words)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert (optimizer._stepper.plan is not None) is planned
    assert (optimizer.skipped.total, optimizer.skipped.in_a_row) == (4, 0)
    assert optimizer.skipped.parameter == "parameter 1 of group 0"


def test_raise_keeps_the_gpu_kernels_plan(triton) -> None:  # noqa: ARG001
    """nonfinite="raise" waits, and so knows before the host counts a step: the plan stays, also when it raised."""
    params = [nn.Parameter(torch.ones(5))]
    optimizer = RMSprop(params, backend="triton", nonfinite="raise")
    give(params)
    optimizer.step()
    plan = optimizer._stepper.plan
    before = params[0].detach().clone()
    give(params, bad=0)
    with pytest.raises(RuntimeError, match="holds NaN or infinity"):
        optimizer.step()
    assert torch.equal(params[0], before)
    give(params)
    optimizer.step()
    assert optimizer._stepper.plan is plan
    assert float(optimizer.state[params[0]]["step"]) == 2


@pytest.mark.parametrize(
    "types", mostly_long([(F32, F32), (F64, F64), (BF16, F32), (F16, F16)], lambda i, _: i in (0, 3)), ids=str
)
def test_plain_torch_steps_or_does_not(types) -> None:
    """A step that the device decides on is, bit for bit, the ordinary one, or leaves all bits as they were."""
    for rule, hyper in [case for switches in ALL_SWITCHES[::3] for case in rules(*switches)][::17]:
        for half in (False, True) if types[0] in (BF16, F16) else (False,):
            bucket = tensors(rule, types, (0, 1, 33), seed=1)
            bucket.capturable = True
            bucket.grad[1][0] = float("nan")

            def other(bucket: Bucket = bucket, half: bool = half) -> Bucket:
                fresh = copied(bucket)
                fresh.capturable = True
                if half:
                    fresh.rounding, fresh.random_keys = "stochastic", [random_key(3, i) for i in range(3)]
                    fresh.slots["compensation"] = [p * 1e-3 for p in fresh.param]
                return fresh

            taken, skipped, ordinary, untouched = other(), other(), other(), other()
            eager.step(rule, hyper, ordinary)
            for own, found in ((taken, 0.0), (skipped, 2.0)):
                own.found_inf = torch.tensor(found)
                with _Deaf():
                    eager._advance_unless(rule, hyper, own)
            for own, expected in ((taken, ordinary), (skipped, untouched)):
                for a, b in zip(own.lists(), expected.lists(), strict=True):
                    assert all(torch.equal(x.nan_to_num(9), y.nan_to_num(9)) for x, y in zip(a, b, strict=True)), rule
            assert not torch.equal(ordinary.param[2], untouched.param[2])


@pytest.mark.parametrize(
    "words", [{}, dict(centered=True, momentum=0.9, bias_correction=True, max_update=3.0)], ids=["", "all"]
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_plain_torch_reads_nothing_from_a_gpu(words, dtype, device: _Device, monkeypatch) -> None:
    """Tensors of a GPU that have no values: a step with the guard on asks for none, the first and the later ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    half = dict(rounding="stochastic", compensation=True) if dtype == BF16 else {}
    device.done = False
    monkeypatch.setattr(nonfinite, "_buffer", lambda _device: torch.empty(3, dtype=torch.int64))
    with FakeTensorMode():
        params = [nn.Parameter(torch.ones(n, device="cuda", dtype=dtype)) for n in (5, 40)]
        optimizer = RMSprop(params, capturable=True, nonfinite="skip", **half, **words)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="cuda")
        for missing in (None, None, 0, 1):
            for i, p in enumerate(params):
                p.grad = None if i == missing else torch.ones_like(p)
            optimizer.step()
        with pytest.raises(Exception, match="_local_scalar_dense"):
            params[0].sum().item()
