"""Run the GPU tests and the GPU benchmark in under five minutes, on a machine with one GPU: python bench/gpu.py

Prints whether the GPU tests pass (parity of rules, dtypes, random bits, remainders, and bounds; graphs, streams, the
guard; no waiting), then each case's figures beside torch's optimizers and the device's copy rate. Writes them to
bench/results/gpu.json with the verdicts of pass_marks.py. `rmsprop bench --device cuda` measures the same without the
tests and the verdicts.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pass_marks import judge

from rmsprop.bench import cuda

HERE = Path(__file__).parent
BRIEF = ("resnet50", "vit")  # compiling foreach for these, too, would take longer than five minutes
TESTS = ("tests/kernels/test_triton_gpu.py", "tests/kernels/test_triton_state_gpu.py", "tests/bench/test_cuda.py")


def parity() -> dict[str, Any]:
    """Run the GPU tests of the package in a separate process."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *TESTS]
    ran = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    tail = ran.stdout.strip().splitlines()[-15:] or ran.stderr.strip().splitlines()[-15:]
    return {"passed": ran.returncode == 0, "seconds": round(time.perf_counter() - begin, 1), "said": tail}


def line(case: str, contestant: str, cells: list[str]) -> str:
    """Return one line of the table."""
    heads = [head for head, _ in cuda.COLUMNS.values()]
    return f"{case:<11}{contestant:<18}" + "".join(
        f"{cell:>{max(11, len(head) + 2)}}" for cell, head in zip(cells, heads, strict=True)
    )


def main() -> None:
    """Test, measure, print, and write. Raises: SystemExit if there is no GPU or a test fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(cuda.DEFAULT), help=f"comma list from {', '.join(cuda.CASES)}")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each contestant's wall time")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    arguments = parser.parse_args()
    cases = arguments.cases.split(",")
    unknown = [case for case in cases if case not in cuda.CASES]
    if unknown:
        parser.error(f"--cases: unknown {', '.join(unknown)}; choose from {', '.join(cuda.CASES)}")
    reason = cuda.missing()
    if reason is not None:
        raise SystemExit(f"nothing was measured: {reason}")
    begin = time.perf_counter()
    tested = None if arguments.no_tests else parity()
    if tested is not None:
        print(f"GPU tests {'pass' if tested['passed'] else 'FAIL'} in {tested['seconds']} s")
        print("\n".join(tested["said"]), flush=True)
    rate = cuda.copy_rate()
    about = cuda.machine(rate)
    print(f"\n{cuda.headline(about)}\n")
    heads = line("case", "optimizer", [head for head, _ in cuda.COLUMNS.values()])
    print(f"{heads}\n(in progress; the whole table follows)")
    results = {}
    for result in cuda.run(cases, arguments.seconds, rate, BRIEF):
        results[result.case, result.contestant] = result
        print(line(result.case, result.contestant, cuda.cells(result)), flush=True)
    print(f"\n{heads}")
    for result in results.values():
        print(line(result.case, result.contestant, cuda.cells(result)))
    print("\n".join(["", *cuda.failures(results.values())]))
    took = round(time.perf_counter() - begin, 1)
    cuda.write(results.values(), about, arguments.out, seconds=took, parity=tested)
    print("\n".join(judge(arguments.out)))
    print(f"wrote {arguments.out} after {took} s")
    if tested is not None and not tested["passed"]:
        raise SystemExit("the GPU tests fail")


if __name__ == "__main__":
    main()
