"""Several processes that run one list of cases together: a process costs seconds to start, a case milliseconds.

    python tests/tools/processes.py MODULE WORLD FOLDER NAME...

starts them, on Linux by fork, once everything is imported. Each runs the named cases of MODULE.CASES[WORLD] in
order, and notes for each what went wrong, if anything. A process that fails stops, since the others would wait for it
in vain; the cases after it are noted as not run.
"""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

LIMIT = 240.0  # seconds for all cases, on a busy machine
NOT_RUN = "not run: a case before it failed"


@dataclass(frozen=True)
class Here:
    """Which of how many processes this is, and a folder that all of them share."""

    rank: int
    world: int
    folder: Path


def outcomes(module: str, world: int, folder: Path, names: Sequence[str]) -> dict[str, str]:
    """What went wrong in each of the named cases: an empty string where nothing did."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    command = [sys.executable, __file__, module, str(world), str(folder), *names]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        process.wait()
    return {name: _outcome(name, world, folder) for name in names}


def _outcome(name: str, world: int, folder: Path) -> str:
    notes = [folder / f"{name}.{rank}" for rank in range(world)]
    said = [path.read_text(encoding="utf-8") if path.exists() else NOT_RUN for path in notes]
    if set(said) == {NOT_RUN}:
        return f"{NOT_RUN}\n{(folder / 'output').read_text(errors='replace')[-4000:]}"
    return "\n".join(f"process {rank}: {text}" for rank, text in enumerate(said) if text)


def main(module: str, world: int, folder: Path, names: Sequence[str]) -> None:
    """Start the processes, and wait for them."""
    importlib.import_module(module)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    started = [context.Process(target=run, args=(module, rank, world, folder, names)) for rank in range(world)]
    for process in started:
        process.start()
    for process in started:
        process.join()


def run(module: str, rank: int, world: int, folder: Path, names: Sequence[str]) -> None:
    """Be one of the processes."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=(folder / "meet").as_uri(), rank=rank, world_size=world, timeout=timedelta(seconds=20)
    )
    here = Here(rank, world, folder)
    for name in names:
        case = importlib.import_module(module).CASES[world][name]
        torch.manual_seed(0)
        said = ""
        try:
            case(here)
        except BaseException:
            said = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(said, encoding="utf-8")
        if said:
            os._exit(1)  # no farewell: it would wait for the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
