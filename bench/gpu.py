"""Parity and the table of issue 4 on a GPU, in under five minutes: python bench/gpu.py (on a machine with one GPU).

Prints whether the GPU tests pass (parity of rules, dtypes, random bits, remainders and bounds; graphs, streams, the
guard; no waiting), then each case's figures beside torch's optimizers and the device's copy rate, and writes them to
bench/results/gpu.json. `rmsprop bench --device cuda` measures the same without the tests.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rmsprop.bench import cuda

HERE = Path(__file__).parent
BRIEF = ("resnet50", "vit")  # compiling foreach for these too would take longer than five minutes
TESTS = ("tests/test_triton_gpu.py", "tests/test_bench_cuda.py")


def parity() -> dict[str, Any]:
    """The GPU tests of the package, in a process of their own."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *TESTS]
    ran = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    tail = ran.stdout.strip().splitlines()[-15:] or ran.stderr.strip().splitlines()[-15:]
    return {"passed": ran.returncode == 0, "seconds": round(time.perf_counter() - begin, 1), "said": tail}


def line(case: str, contestant: str, cells: list[str]) -> str:
    """One line of the table."""
    heads = [head for head, _ in cuda.COLUMNS.values()]
    return f"{case:<11}{contestant:<18}" + "".join(
        f"{cell:>{max(11, len(head) + 2)}}" for cell, head in zip(cells, heads, strict=True)
    )


def main() -> None:
    """Check, measure, print, write. Raises: SystemExit where there is no GPU, or if a test fails."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--cases", default=",".join(cuda.DEFAULT), help=f"comma list from {', '.join(cuda.CASES)}")
    words.add_argument("--seconds", type=float, default=0.5, help="for each contestant's wall time")
    words.add_argument("--no-tests", action="store_true", help="measure only")
    words.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    asked = words.parse_args()
    cases = asked.cases.split(",")
    unknown = [case for case in cases if case not in cuda.CASES]
    if unknown:
        words.error(f"--cases: unknown {', '.join(unknown)}; choose from {', '.join(cuda.CASES)}")
    reason = cuda.missing()
    if reason is not None:
        raise SystemExit(f"nothing was measured: {reason}")
    begin = time.perf_counter()
    tested = None if asked.no_tests else parity()
    if tested is not None:
        print(f"GPU tests {'pass' if tested['passed'] else 'FAIL'} in {tested['seconds']} s")
        print("\n".join(tested["said"]), flush=True)
    rate = cuda.copy_rate()
    about = cuda.machine(rate)
    print(f"\n{cuda.headline(about)}\n")
    heads = line("case", "who", [head for head, _ in cuda.COLUMNS.values()])
    print(f"{heads}\n(as it goes; the whole table follows)")
    found = {}
    for result in cuda.run(cases, asked.seconds, rate, BRIEF):
        found[result.case, result.contestant] = result
        print(line(result.case, result.contestant, cuda.cells(result)), flush=True)
    print(f"\n{heads}")
    for result in found.values():
        print(line(result.case, result.contestant, cuda.cells(result)))
    print("\n".join(["", *cuda.remarks(found.values())]))
    took = round(time.perf_counter() - begin, 1)
    cuda.write(found.values(), about, asked.out, seconds=took, parity=tested)
    print(f"wrote {asked.out} after {took} s")
    if tested is not None and not tested["passed"]:
        raise SystemExit("the GPU tests fail")


if __name__ == "__main__":
    main()
