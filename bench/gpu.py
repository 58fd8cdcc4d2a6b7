"""Parity and the table of issue 4 on a GPU, in under five minutes: python bench/gpu.py (on a machine with one GPU).

Prints whether the GPU tests pass, then each case's times beside torch's optimizers and the device's copy rate, and
writes them to bench/results/gpu.json. One contestant lives at a time, so that none holds another's memory.
"""

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import rmsprop
from rmsprop.bench import CASES, Shapes

HERE = Path(__file__).parent
BYTES = 20  # that a plain float32 step must move for each element: p and v both ways, g once
OURS = "rmsprop"


def vit() -> Shapes:
    """ViT-B/16 as in torchvision, 152 tensors."""
    norm: Shapes = [(768,), (768,)]
    attention: Shapes = [(2304, 768), (2304,), (768, 768), (768,)]
    block: Shapes = [*norm, *attention, *norm, (3072, 768), (3072,), (768, 3072), (768,)]
    return [(1, 1, 768), (768, 3, 16, 16), (768,), (1, 197, 768), *block * 12, *norm, (1000, 768), (1000,)]


SHAPES: dict[str, Callable[[], Shapes]] = {
    "mobilenet": CASES["mobilenet"],
    "resnet50": CASES["resnet50"],
    "vit": vit,
    "256M": lambda: [(1 << 28,)],
    "rl": CASES["rl"],
}

# The bars of issue 4, for an H100: (case, what, bound, whether more is better).
BARS = (
    ("mobilenet", "wall_ms", 0.12, False),
    ("resnet50", "wall_ms", 0.28, False),
    ("vit", "of_copy", 0.95, True),
    ("256M", "of_copy", 0.97, True),
    ("rl", "wall_ms", 0.06, False),
    ("rl", "graph_wall_ms", 0.02, False),
)


def captured(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """The optimizer's step as a graph's replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def compiled(params: list[torch.Tensor]) -> Callable[[], Any]:
    """torch's foreach step through torch.compile, as its manual says: lr a tensor, capturable."""
    lr = torch.tensor(1e-6, device="cuda")
    optimizer = torch.optim.RMSprop(params, lr=lr, foreach=True, capturable=True)
    return torch.compile(optimizer.step, fullgraph=False)


def contestants(full: bool) -> dict[str, Callable[[list[torch.Tensor]], Callable[[], Any]]]:
    """Everyone's step, made when it is its turn."""
    tensor_lr: dict[str, Any] = dict(capturable=True)
    made: dict[str, Callable[[list[torch.Tensor]], Callable[[], Any]]] = {
        OURS: lambda ps: rmsprop.RMSprop(ps, lr=1e-6, backend="triton").step,
        "rmsprop graph": lambda ps: captured(
            rmsprop.RMSprop(ps, lr=torch.tensor(1e-6, device="cuda"), backend="triton", **tensor_lr)
        ),
        "torch foreach": lambda ps: torch.optim.RMSprop(ps, lr=1e-6, foreach=True).step,
        "Adam fused": lambda ps: torch.optim.Adam(ps, lr=1e-6, fused=True).step,
        "SGD fused": lambda ps: torch.optim.SGD(ps, lr=1e-6, fused=True).step,
    }
    if full:
        made["torch loop"] = lambda ps: torch.optim.RMSprop(ps, lr=1e-6, foreach=False).step
        made["foreach graph"] = lambda ps: captured(
            torch.optim.RMSprop(ps, lr=torch.tensor(1e-6, device="cuda"), foreach=True, **tensor_lr)
        )
        made["foreach compiled"] = compiled
        try:
            import bitsandbytes  # type: ignore[import-not-found]

            made["bitsandbytes"] = lambda ps: bitsandbytes.optim.RMSprop32bit(ps, lr=1e-6).step
        except ImportError:
            pass
    return made


def wall(step: Callable[[], Any], seconds: float) -> float:
    """Median time of one step with its synchronisation, in ms."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 10 or (time.perf_counter() < end and len(times) < 2000):
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def stream(step: Callable[[], Any], repeat: int = 20) -> float:
    """Time of one step on the device alone, in ms: steps are queued up behind a wait, so that Python is not in it.

    The queue holds about a thousand launches: a loop over many tensors waits for Python all the same.
    """
    found = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(60_000_000)
        begin.record()
        for _ in range(repeat):
            step()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / repeat)
    return min(found)


def kernels_of(step: Callable[[], Any]) -> tuple[int, int]:
    """Kernels, and copies, of one step, as torch's profiler sees them."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    ran = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in ran)
    return len(ran) - copies, copies


def transient(step: Callable[[], Any]) -> int:
    """Bytes that a step holds beyond what was there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_rate() -> float:
    """Bytes per second that copying a gigabyte on the device moves, read and written."""
    a, b = (torch.zeros(1 << 28, device="cuda") for _ in range(2))
    return 2 * a.nbytes / (stream(lambda: b.copy_(a)) * 1e-3)


def measure(case: str, seconds: float, full: bool, rate: float) -> dict[str, dict[str, Any]]:
    """Everyone on one case, one after the other."""
    shapes = SHAPES[case]()
    elements = sum(map(math.prod, shapes))
    rows: dict[str, dict[str, Any]] = {}
    for name, make in contestants(full).items():
        torch.manual_seed(0)
        params: list[torch.Tensor] = [torch.nn.Parameter(torch.randn(s, device="cuda")) for s in shapes]
        for p in params:
            p.grad = torch.randn_like(p) * 1e-3
        try:
            step = make(params)
            for _ in range(3):
                step()
            moved = elements * BYTES / (stream(step) * 1e-3)
            kernels, copies = kernels_of(step)
            rows[name] = {
                "wall_ms": round(wall(step, seconds), 4),
                "stream_ms": round(elements * BYTES / moved * 1e3, 4),
                "gb_s": round(moved / 1e9, 1),  # at 20 bytes for each element, whatever the contestant moves
                "of_copy": round(moved / rate, 3),
                "kernels": kernels,
                "copies": copies,
                "extra_bytes_per_parameter": round(transient(step) / elements, 4),
            }
        except Exception as error:  # a contestant that fails here is a finding, and no reason to lose the others
            rows[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        step = None  # type: ignore[assignment]
        del params
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return rows


def small_parity() -> dict[str, Any]:
    """The GPU tests of the package, in a process of their own."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_triton_gpu.py"]
    ran = subprocess.run(command, cwd=HERE.parent / "tests", capture_output=True, text=True)
    tail = ran.stdout.strip().splitlines()[-15:] or ran.stderr.strip().splitlines()[-15:]
    return {"passed": ran.returncode == 0, "seconds": round(time.perf_counter() - begin, 1), "said": tail}


def main() -> None:
    """Check, measure, print, write."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--cases", default=",".join(SHAPES), help=f"comma list from {', '.join(SHAPES)}")
    words.add_argument("--seconds", type=float, default=0.5, help="for each contestant's wall time")
    words.add_argument("--no-tests", action="store_true", help="measure only")
    words.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    asked = words.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no NVIDIA GPU here, or torch is built without CUDA: nothing was measured")
    parity = None if asked.no_tests else small_parity()
    if parity is not None:
        print(f"GPU tests {'pass' if parity['passed'] else 'FAIL'} in {parity['seconds']} s")
        print("\n".join(parity["said"]))
    rate = copy_rate()
    about = {
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "copy_gb_s": round(rate / 1e9, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__,
        "rmsprop": rmsprop.__version__,
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    print(f"\n{about['gpu']}, copies {about['copy_gb_s']} GB/s, torch {about['torch']}, triton {about['triton']}")
    columns = ("wall_ms", "stream_ms", "gb_s", "of_copy", "kernels", "copies", "extra_bytes_per_parameter")
    print(f"{'case':<11}{'who':<18}" + "".join(f"{name:>{max(11, len(name) + 2)}}" for name in columns))
    results: dict[str, Any] = {}
    for case in asked.cases.split(","):
        results[case] = measure(case, asked.seconds, full=case in ("mobilenet", "256M", "rl"), rate=rate)
        for name, row in results[case].items():
            cells = "".join(f"{row[c]:>{max(11, len(c) + 2)}}" for c in columns if c in row)
            print(f"{case:<11}{name:<18}{cells or row['failed']}", flush=True)
    bars = []
    for case, what, bound, more in BARS:
        row = results.get(case, {}).get("rmsprop graph" if what.startswith("graph") else OURS, {})
        reached = row.get(what.removeprefix("graph_"))
        if reached is not None:
            met = reached >= bound if more else reached <= bound
            bars.append({"case": case, "what": what, "reached": reached, "needed": bound, "met": met})
            print(f"{'met   ' if met else 'missed'} {case}: {what} {reached}, bar {bound}")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    everything = {"machine": about, "parity": parity, "bars": bars, "results": results}
    asked.out.write_text(json.dumps(everything, indent=1))
    print(f"wrote {asked.out}")


if __name__ == "__main__":
    main()
