"""How long a step takes on an NVIDIA GPU: ours beside torch's optimizers, with the device's copy rate as the limit.

One contestant lives at a time, so that none holds another's memory. All times are taken before the first trace: a
profiler that ran once may slow what comes after it.
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

CASES: dict[str, Callable[[], Shapes]] = {**cpu.CASES, "256M": lambda: [(1 << 28,)]}
DEFAULT = ("mobilenet", "resnet50", "vit", "256M", "rl")

# What is measured, as a table's head and format. gb_s counts the bytes that a plain step must move, whatever a
# contestant moves; launches, copies and waits (calls that make the host wait for the device) are those of one step.
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

# What the project set itself: (case, who, what, bound). The milliseconds are for an H100.
BARS = (
    ("mobilenet", OURS, "wall_ms", 0.12),
    ("resnet50", OURS, "wall_ms", 0.28),
    ("vit", OURS, "of_copy", 0.95),
    ("256M", OURS, "of_copy", 0.97),
    ("rl", OURS, "wall_ms", 0.06),
    ("rl", OURS_GRAPH, "wall_ms", 0.02),
    ("mobilenet", OURS, "launches", 1.0),
    ("mobilenet", OURS, "waits", 0.0),
    ("256M", OURS, "extra_bytes_per_parameter", 0.0),
)
AT_LEAST = ("of_copy",)  # a bar on anything else is the most that it may be

# Calls of CUDA's runtime and driver as torch's profiler names them. Freeing memory waits for the device too.
LAUNCH = re.compile(r"cu(da)?(Launch(Cooperative)?Kernel|GraphLaunch)")
WAIT = re.compile(r"cu(da)?((Stream|Device|Event|Ctx)Synchronize|Memcpy(?!\w*Async)|Free(?!Async))")
# On the device, but nobody's work: the kernels that open each trace, and marks of waiting.
NOT_WORK = re.compile(r".*\bspin_kernel\b|(Event|Stream|Context) (Sync|Wait)")


@dataclass(frozen=True)
class Result:
    """One contestant on one case: the figures named in COLUMNS and the spread of wall time, or why it failed."""

    case: str
    contestant: str
    tensors: int
    elements: int
    figures: dict[str, float]
    failed: str | None = None


def missing() -> str | None:
    """Why nothing can be measured here, in words; None where it can."""
    if torch.version.hip is not None:
        return "this torch is built for AMD's ROCm, where nothing is tested; --device cuda measures NVIDIA GPUs"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU here, or its driver is older than this torch needs"
    return None


# --- who is measured -----------------------------------------------------------------------------


class Replay:
    """An optimizer's step as a graph's replay, and the bytes that its capture set aside for temporaries."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        self.held = _peak(lambda: self._capture(optimizer))
        self.optimizer = optimizer  # its state is what the graph writes

    def _capture(self, optimizer: torch.optim.Optimizer) -> None:
        with torch.cuda.graph(self.graph):
            optimizer.step()

    def __call__(self) -> None:
        """Replay."""
        self.graph.replay()


def contestants(brief: bool = False) -> dict[str, Make]:
    """Everyone's step, made when it is its turn.

    Args:
        brief: without those that take long, or to be made: the for-loop, foreach captured and compiled, bitsandbytes.
    """
    torchs = torch.optim.RMSprop

    def _on_device() -> dict[str, Any]:
        """lr as its manual wants it for graphs and torch.compile."""
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
    made["torch loop"] = lambda ps: torchs(ps, lr=1e-6, foreach=False).step
    made["foreach graph"] = lambda ps: Replay(torchs(ps, **_on_device(), foreach=True))
    made["foreach compiled"] = lambda ps: torch.compile(torchs(ps, **_on_device(), foreach=True).step)
    if _version("bitsandbytes") is not None:
        made["bitsandbytes"] = lambda ps: import_module("bitsandbytes.optim").RMSprop32bit(ps, lr=1e-6).step
    return made


def _version(package: str) -> str | None:
    """What is installed, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# --- what is measured ----------------------------------------------------------------------------


def wall(step: Step, seconds: float) -> cpu.Times:
    """Times of one step with its synchronisation, in microseconds."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 10 or (time.perf_counter() < end and len(times) < 2000):
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e6)
    return cpu.summary(times)


def stream(step: Step, repeat: int = 20) -> float:
    """Time of one step on the device alone, in ms: steps are queued up behind a wait, so that Python is not in it.

    The queue holds about a thousand launches: a loop over many tensors waits for Python all the same.
    """
    found: list[float] = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call, unused-ignore]
        _spin(60_000_000)
        begin.record()
        for _ in range(repeat):
            step()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / repeat)
    return min(found)


def _spin(cycles: int) -> None:
    """Keep the device busy for a while."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call, unused-ignore]


def copy_rate() -> float:
    """Bytes per second that copying a gigabyte on the device moves, read and written."""
    a, b = (torch.zeros(1 << 28, device=DEVICE) for _ in range(2))
    return 2 * a.nbytes / (stream(lambda: b.copy_(a)) * 1e-3)


def extra(step: Step) -> int:
    """Bytes that a step holds beyond what was there before it; for a graph, from its capture on."""
    return _peak(step) + (step.held if isinstance(step, Replay) else 0)


def _peak(call: Step) -> int:
    """Bytes that a call holds at its worst, beyond what was there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def timed(step: Step, elements: int, seconds: float, rate: float) -> dict[str, float]:
    """The figures that no profiler is needed for.

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
    """Launches, kernels, copies and waits of one step, from torch's profiler.

    A trace without steps is taken off, since opening and closing one launches and waits too.
    """
    idle, busy = tally(_trace(step, 0)), tally(_trace(step, steps))
    return {name: round((busy[name] - idle[name]) / steps, 2) for name in busy}


def _trace(step: Step, steps: int) -> Iterable[Any]:
    """What the profiler saw of some steps.

    Spinning kernels go first: CUPTI loses as many records at the head of a trace as there were traces before it
    (pytorch issue 192021), and theirs are not missed.
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
    """Count a trace's events by what they are.

    Args:
        events: with `name` and `device_type`; on the CPU's side they are calls of CUDA's runtime and driver.
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


# --- everyone, on every case ---------------------------------------------------------------------


def run(cases: Sequence[str], seconds: float, rate: float, brief: Collection[str] = ()) -> Iterator[Result]:
    """Measure everyone on each case, one after the other.

    Args:
        seconds: for each contestant's wall time.
        rate: the device's copy rate, in bytes per second.
        brief: the cases on which only some contestants are measured.
    Yields: each contestant's times and memory; then, in a second round, the same with what a trace shows.
    """
    found: list[tuple[Result, Make]] = []
    for case in cases:
        shapes = CASES[case]()
        elements = sum(map(math.prod, shapes))
        for name, make in contestants(case in brief).items():
            seen = _looked(shapes, make, partial(timed, elements=elements, seconds=seconds, rate=rate))
            figures, failed = ({}, seen) if isinstance(seen, str) else (seen, None)
            result = Result(case, name, len(shapes), elements, figures, failed)
            found.append((result, make))
            yield result
    for result, make in found:
        if result.failed is None:
            seen = _looked(CASES[result.case](), make, traced)
            if isinstance(seen, str):
                yield replace(result, failed=seen)
            else:
                yield replace(result, figures=result.figures | seen)


def _looked(shapes: Shapes, make: Make, look: Callable[[Step], dict[str, float]]) -> dict[str, float] | str:
    """What a look at a contestant in its stride finds; or what it failed of, no reason to lose the others."""
    try:
        return look(_in_its_stride(shapes, make))
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()


def _in_its_stride(shapes: Shapes, make: Make) -> Step:
    """A step whose state, plan and kernels exist."""
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


# --- what is told --------------------------------------------------------------------------------


def machine(rate: float) -> dict[str, Any]:
    """What was measured on, and with what."""
    return cpu.machine() | {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "copy_gb_s": round(rate / 1e9, 1),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "bitsandbytes": _version("bitsandbytes"),
    }


def headline(about: dict[str, Any]) -> str:
    """The machine in one line."""
    versions = " · ".join(f"{name} {about[name] or 'missing'}" for name in ("torch", "triton", "rmsprop"))
    return f"{about['gpu']}, copies {about['copy_gb_s']:,} GB/s · {versions}"


def cells(result: Result) -> list[str]:
    """A result as the cells of a table under COLUMNS; empty where nothing is known."""
    if result.failed is not None:
        return ["failed", *[""] * (len(COLUMNS) - 1)]
    known = result.figures
    return [f"{known[name]:{form}}" if name in known else "" for name, (_, form) in COLUMNS.items()]


def verdicts(results: Iterable[Result]) -> list[tuple[str, float, float, bool]]:
    """The bars that the results can answer: what, reached, needed, met."""
    known = {(r.case, r.contestant): r.figures for r in results}
    found = []
    for case, contestant, what, bound in BARS:
        reached = known.get((case, contestant), {}).get(what)
        if reached is not None:
            met = reached >= bound if what in AT_LEAST else reached <= bound
            found.append((f"{case}, {contestant}: {COLUMNS[what][0]}", reached, bound, met))
    return found


def remarks(results: Iterable[Result]) -> list[str]:
    """Who failed and of what, then each bar, in sentences."""
    results = list(results)
    failed = [f"{r.case}, {r.contestant} failed: {r.failed}" for r in results if r.failed is not None]
    bars = [
        f"{'met   ' if met else 'missed'} {what} {reached:g}, bar {bound:g}"
        for what, reached, bound, met in verdicts(results)
    ]
    return [*failed, *bars]


def write(results: Iterable[Result], about: dict[str, Any], path: Path, **more: Any) -> None:
    """The results as JSON, with the machine they hold for and whatever more there is to keep."""
    results = list(results)
    rows = []
    for r in results:
        row = {"case": r.case, "contestant": r.contestant, "tensors": r.tensors, "elements": r.elements, **r.figures}
        rows.append(row if r.failed is None else row | {"failed": r.failed})
    cpu.save({"machine": about, **more, "bars": cpu.judged(verdicts(results)), "results": rows}, path)
