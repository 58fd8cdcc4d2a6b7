"""Run the whole benchmark of the CPU kernel into bench/results/cpu.json and judge it: 9 minutes and 4 GB.

python bench/bench_cpu.py
"""

from pathlib import Path

from pass_marks import judge

from rmsprop.cli.bench import bench

RECORD = Path(__file__).parent / "results" / "cpu.json"

if __name__ == "__main__":
    bench(
        cases="rl,a2c,nature,mobilenet,resnet50,500x16,500x1024,one",
        variants="plain,full",
        threads="1,all",
        busy=True,
        seconds=0.5,
        out=RECORD,
    )
    print("\n".join(judge(RECORD)))
