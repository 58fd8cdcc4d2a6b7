"""The whole benchmark of the CPU kernel, into bench/results/cpu.json: 9 minutes and 4 GB. Run it as a script."""

from pathlib import Path

from rmsprop.cli.bench import bench

if __name__ == "__main__":
    bench(
        cases="rl,a2c,nature,mobilenet,resnet50,500x16,500x1024,one",
        variants="plain,full",
        threads="1,all",
        busy=True,
        seconds=0.5,
        out=Path(__file__).parent / "results" / "cpu.json",
    )
