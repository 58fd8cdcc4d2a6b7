"""Compares the step of two checkouts, each in a process of its own, in turns and in either order.

    python bench/checkouts.py OLD NEW [threads]

OLD and NEW are folders with `src/rmsprop`, its kernel built in place. For each case it prints the median over the
rounds of NEW's median time over OLD's.
"""

import statistics
import subprocess
import sys
from pathlib import Path

ROUNDS = 15
CASES = {  # shapes, and steps of a round
    "RL net": ([(64, 4), (64,), (64, 64), (64,), (2, 64), (2,)], 2000),
    "A2C": ([(64, 4), (64,), (64, 64), (64,)] * 2 + [(2, 64), (2,), (1, 64), (1,)], 2000),
    "500 tensors of 16": ([(16,)] * 500, 300),
    "100 tensors of 1024": ([(1024,)] * 100, 600),
    "one tensor of 16 M": ([(1 << 24,)], 6),
}
CHILD = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
import rmsprop
assert rmsprop.__file__.startswith(sys.argv[1]), rmsprop.__file__
torch.set_num_threads(int(sys.argv[2]))
optimizers = {}
for line in sys.stdin:
    shapes, count = eval(line)
    if str(shapes) not in optimizers:
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizers[str(shapes)] = rmsprop.RMSprop(params, lr=1e-4)
    step, times = optimizers[str(shapes)].step, []
    for _ in range(3 + count):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    print(sorted(times[3:])[count // 2], flush=True)
"""


def main(old: str, new: str, threads: str = "1") -> None:
    """Print a line per case."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(Path(folder).resolve() / "src"), threads],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for folder in (old, new)
    ]
    for name, case in CASES.items():
        times: list[list[float]] = [[], []]
        for i in range(ROUNDS):
            for which in (0, 1) if i % 2 else (1, 0):
                child = children[which]
                child.stdin.write(f"{case!r}\n")
                child.stdin.flush()
                times[which].append(float(child.stdout.readline()))
        ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
        before, after = (1e6 * statistics.median(own) for own in times)
        print(f"{name:20} {ratio:.3f}   {before:9.2f} µs before, {after:9.2f} µs after", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
