"""Benchmark of an optimizer step on an NVIDIA GPU, beside torch's optimizers and the device's copy rate.

Only one optimizer exists at a time, so that none keeps another's memory. All times are taken before the first trace,
because a profiler that has run may slow down later steps.
"""

import gc
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmsprop.bench import cpu
from rmsprop.bench.cpu import OURS, TRAFFIC, Shapes
from rmsprop.optimizer import RMSprop

Step = Callable[[], Any]
Make = Callable[[list[Tensor]], Step]

DEVICE = "cuda"
OURS_GRAPH = f"{OURS} graph"
# With state in fewer bytes. The last steps bfloat16 parameters, rounded stochastically, beside one byte of state.
OURS_BFLOAT16, OURS_FLOAT8, OURS_3_BYTES = f"{OURS} bfloat16", f"{OURS} float8", f"{OURS} 3 bytes"

CASES: dict[str, Callable[[], Shapes]] = {**cpu.CASES, "256M": lambda: [(1 << 28,)]}
DEFAULT = ("mobilenet", "resnet50", "vit", "256M", "rl")

# The measured quantities, with the heading and format of a table. gb_s counts the bytes that a plain step must move,
# however many a contestant moves. Launches, copies, and waits (calls that block the host) are per step.
COLUMNS = {
    "wall_ms": ("wall ms", ".4f"),
    "stream_ms": ("stream ms", ".4f"),
    "gb_s": ("GB/s", ",.0f"),
    "of_copy": ("of copy", ".1%"),
    "launches": ("launches", ",g"),
    "kernels": ("kernels", ",g"),
    "copies": ("copies", ",g"),
    "waits": ("waits", ",g"),
    "extra_bytes_per_parameter": ("extra B/param", ".2f"),
}

# Calls of CUDA's runtime and driver, as torch's profiler names them. Freeing memory blocks the host, too.
LAUNCH = re.compile(r"cu(da)?(Launch(Cooperative)?Kernel|GraphLaunch)")
WAIT = re.compile(r"cu(da)?((Stream|Device|Event|Ctx)Synchronize|Memcpy(?!\w*Async)|Free(?!Async))")
# Events on the device that are not work: the kernels that open each trace, and marks of synchronization.
NOT_WORK = re.compile(r".*\bspin_kernel\b|(Event|Stream|Context) (Sync|Wait)")


@dataclass(frozen=True)
class Result:
    """One contestant on one case: the figures of COLUMNS and the spread of wall time, or the reason it failed."""

    case: str
    contestant: str
    tensors: int
    elements: int
    figures: dict[str, float]
    failed: str | None = None


def missing() -> str | None:
    """Return the reason that nothing can be measured here, or None."""
    if torch.version.hip is not None:
        return "this torch is built for AMD's ROCm, which is not tested; --device cuda measures NVIDIA GPUs"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU here, or its driver is older than this torch needs"
    return None


# --- contestants -------------------------------------------------------------------------------


class Replay:
    """An optimizer's step as the replay of a CUDA graph, and the bytes that its capture reserved for temporaries."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        self.held = _peak(lambda: self._capture(optimizer))
        self.optimizer = optimizer  # keeps alive the state that the graph writes

    def _capture(self, optimizer: torch.optim.Optimizer) -> None:
        with torch.cuda.graph(self.graph):
            optimizer.step()

    def __call__(self) -> None:
        """Replay the graph."""
        self.graph.replay()


def contestants(brief: bool = False) -> dict[str, Make]:
    """Return a function for each contestant that makes its step when its turn comes.

    Args:
        brief: leave out state in fewer bytes and the slow ones: the for-loop, foreach captured and compiled, and
            bitsandbytes.
    """
    torchs = torch.optim.RMSprop

    def _on_device() -> dict[str, Any]:
        """Return the arguments that graphs and torch.compile need."""
        return {"lr": torch.tensor(1e-6, device=DEVICE), "capturable": True}

    made: dict[str, Make] = {
        OURS: lambda ps: RMSprop(ps, lr=1e-6, backend="triton").step,
        OURS_GRAPH: lambda ps: Replay(RMSprop(ps, **_on_device(), backend="triton")),
        "torch foreach": lambda ps: torchs(ps, lr=1e-6, foreach=True).step,
        "Adam fused": lambda ps: torch.optim.Adam(ps, lr=1e-6, fused=True).step,
        "SGD fused": lambda ps: torch.optim.SGD(ps, lr=1e-6, fused=True).step,
    }
    if brief:
        return made
    made[OURS_BFLOAT16] = lambda ps: RMSprop(ps, lr=1e-6, state_dtype="bfloat16", backend="triton").step
    made[OURS_FLOAT8] = lambda ps: RMSprop(ps, lr=1e-6, state_dtype="float8", backend="triton").step
    made[OURS_3_BYTES] = lambda ps: (
        RMSprop(_in_bfloat16(ps), lr=1e-6, state_dtype="float8", rounding="stochastic", backend="triton").step
    )
    made["torch loop"] = lambda ps: torchs(ps, lr=1e-6, foreach=False).step
    made["foreach graph"] = lambda ps: Replay(torchs(ps, **_on_device(), foreach=True))
    made["foreach compiled"] = lambda ps: torch.compile(torchs(ps, **_on_device(), foreach=True).step)
    if _version("bitsandbytes") is not None:
        made["bitsandbytes"] = lambda ps: import_module("bitsandbytes.optim").RMSprop32bit(ps, lr=1e-6).step
    return made


def _in_bfloat16(params: list[Tensor]) -> list[Tensor]:
    """Return the list, with parameters and gradients replaced by ones in bfloat16, one at a time."""
    for i, p in enumerate(params):
        assert p.grad is not None
        params[i] = torch.nn.Parameter(p.detach().bfloat16())
        params[i].grad = p.grad.bfloat16()
    return params


def _version(package: str) -> str | None:
    """Return the installed version of a package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# --- measurements ------------------------------------------------------------------------------


def wall(step: Step, seconds: float) -> cpu.Times:
    """Time one step with its synchronization, in microseconds."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 10 or (time.perf_counter() < end and len(times) < 2000):
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e6)
    return cpu.summary(times)


def stream(step: Step, repeat: int = 20) -> float:
    """Time one step on the device alone, in milliseconds, with steps queued behind a spinning kernel.

    The queue keeps Python out of the measurement. It takes about a thousand launches, so a for-loop over many
    tensors is limited by Python anyway.
    """
    times: list[float] = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call, unused-ignore]
        _spin(60_000_000)
        begin.record()
        for _ in range(repeat):
            step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / repeat)
    return min(times)


def _spin(cycles: int) -> None:
    """Keep the device busy for a number of cycles."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call, unused-ignore]


def copy_rate() -> float:
    """Measure the bytes per second, read and written, of a copy of a gigabyte on the device."""
    a, b = (torch.zeros(1 << 28, device=DEVICE) for _ in range(2))
    return 2 * a.nbytes / (stream(lambda: b.copy_(a)) * 1e-3)


def extra(step: Step) -> int:
    """Return the bytes that a step allocates at its peak; for a graph, including its capture."""
    return _peak(step) + (step.held if isinstance(step, Replay) else 0)


def _peak(call: Step) -> int:
    """Return the peak of the bytes that a call allocates."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def timed(step: Step, elements: int, seconds: float, rate: float) -> dict[str, float]:
    """Measure the figures that need no profiler.

    Args:
        rate: the device's copy rate, in bytes per second.
    """
    on_device, times = stream(step), wall(step, seconds)
    moved = elements * TRAFFIC["plain"] / (on_device * 1e-3)
    return {
        "wall_ms": round(times.median / 1e3, 5),
        "wall_p10_ms": round(times.p10 / 1e3, 5),
        "wall_p90_ms": round(times.p90 / 1e3, 5),
        "stream_ms": round(on_device, 5),
        "gb_s": round(moved / 1e9, 1),
        "of_copy": round(moved / rate, 3),
        "extra_bytes_per_parameter": round(extra(step) / elements, 4),
    }


def traced(step: Step, steps: int = 5) -> dict[str, float]:
    """Count the launches, kernels, copies, and waits of one step with torch's profiler.

    The counts of a trace without steps are subtracted, since opening and closing a trace launches and waits, too.
    """
    idle, busy = tally(_trace(step, 0)), tally(_trace(step, steps))
    return {name: round((busy[name] - idle[name]) / steps, 2) for name in busy}


def _trace(step: Step, steps: int) -> Iterable[Any]:
    """Return the profiler's events of some steps.

    Spinning kernels run first, because CUPTI loses as many records at the head of a trace as there were traces before
    it (pytorch issue 192021).
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(256):
            _spin(1)
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return profile.events() or ()


def tally(events: Iterable[Any]) -> dict[str, int]:
    """Count the events of a trace by kind.

    Args:
        events: objects with `name` and `device_type`; those of the CPU are calls of CUDA's runtime and driver.
    """
    events = list(events)
    calls = [e.name for e in events if e.device_type.name == "CPU"]
    ran = [e.name for e in events if e.device_type.name == "CUDA" and not NOT_WORK.match(e.name)]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in ran)
    return {
        "launches": sum(LAUNCH.match(name) is not None for name in calls),
        "kernels": len(ran) - copies,
        "copies": copies,
        "waits": sum(WAIT.match(name) is not None for name in calls),
    }


# --- all cases ---------------------------------------------------------------------------------


def run(cases: Sequence[str], seconds: float, rate: float, brief: Collection[str] = ()) -> Iterator[Result]:
    """Measure every contestant on each case, one after the other.

    Args:
        seconds: time for each contestant's wall time.
        rate: the device's copy rate, in bytes per second.
        brief: cases on which only some contestants are measured.
    Yields: each contestant's times and memory; in a second round, the same with the counts of a trace.
    """
    results: list[tuple[Result, Make]] = []
    for case in cases:
        shapes = CASES[case]()
        elements = sum(map(math.prod, shapes))
        for name, make in contestants(case in brief).items():
            measured = _measured(shapes, make, partial(timed, elements=elements, seconds=seconds, rate=rate))
            figures, failed = ({}, measured) if isinstance(measured, str) else (measured, None)
            result = Result(case, name, len(shapes), elements, figures, failed)
            results.append((result, make))
            yield result
    for result, make in results:
        if result.failed is None:
            measured = _measured(CASES[result.case](), make, traced)
            if isinstance(measured, str):
                yield replace(result, failed=measured)
            else:
                yield replace(result, figures=result.figures | measured)


def _measured(shapes: Shapes, make: Make, measure: Callable[[Step], dict[str, float]]) -> dict[str, float] | str:
    """Return the figures of a warmed-up contestant, or its error as text, so that the others still run."""
    try:
        return measure(_warmed_up(shapes, make))
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()


def _warmed_up(shapes: Shapes, make: Make) -> Step:
    """Return a step whose state, plan, and kernels exist."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    params: list[Tensor] = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.randn(shape, device=DEVICE, generator=generator))
        p.grad = torch.randn(shape, device=DEVICE, generator=generator) * 1e-3
        params.append(p)
    step = make(params)
    for _ in range(3):
        step()
    return step


# --- report --------------------------------------------------------------------------------------


def machine(rate: float) -> dict[str, Any]:
    """Return the machine and the versions that the figures hold for."""
    return cpu.machine() | {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "copy_gb_s": round(rate / 1e9, 1),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "bitsandbytes": _version("bitsandbytes"),
    }


def headline(about: dict[str, Any]) -> str:
    """Return the machine in one line."""
    versions = " · ".join(f"{name} {about[name] or 'missing'}" for name in ("torch", "triton", "rmsprop"))
    return f"{about['gpu']}, copies {about['copy_gb_s']:,} GB/s · {versions}"


def cells(result: Result) -> list[str]:
    """Return a result as cells under COLUMNS, which are empty where nothing was measured."""
    if result.failed is not None:
        return ["failed", *[""] * (len(COLUMNS) - 1)]
    known = result.figures
    return [f"{known[name]:{form}}" if name in known else "" for name, (_, form) in COLUMNS.items()]


def failures(results: Iterable[Result]) -> list[str]:
    """Return a line for each contestant that failed, with the reason."""
    return [f"{r.case}, {r.contestant} failed: {r.failed}" for r in results if r.failed is not None]


def write(results: Iterable[Result], about: dict[str, Any], path: Path, **more: Any) -> None:
    """Write the results as JSON, with the machine that they hold for and any further entries."""
    rows = []
    for r in results:
        row = {"case": r.case, "contestant": r.contestant, "tensors": r.tensors, "elements": r.elements, **r.figures}
        rows.append(row if r.failed is None else row | {"failed": r.failed})
    cpu.save({"machine": about, **more, "results": rows}, path)
