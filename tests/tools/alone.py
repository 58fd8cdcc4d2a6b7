"""Scripts that run as in a new process.

To import torch and build a first optimizer takes a process seconds, so one process does that for all: it has run
nothing, has no threads, and forks the others. Where there is no fork, they are new ones.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from multiprocessing.context import BaseContext
from pathlib import Path

IMPORTED = ["torch._dynamo", "rmsprop.optimizer", "rmsprop.checkpoint"]  # every optimizer of torch imports the first


def context() -> BaseContext:
    """Return what starts processes; what it sends to them is pickled, as for any new process."""
    found = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    found.set_forkserver_preload(IMPORTED)
    return found


def run(script: Path | str, *words: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a script, and return its exit code, or the signal that killed it, negated; and what it printed.

    Args:
        script: a file, or the text of one.
        words: its arguments.
        timeout: in seconds; a script that takes longer is killed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if isinstance(script, str):
            (folder / "script.py").write_text(script, encoding="utf-8")
            script = folder / "script.py"
        argv = [str(script), *map(str, words)]
        process = context().Process(target=_run, args=(argv, folder))
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        said = [(folder / stream).read_text(encoding="utf-8", errors="replace") for stream in ("stdout", "stderr")]
        return subprocess.CompletedProcess(argv, process.exitcode, *said)


def _run(argv: list[str], folder: Path) -> None:
    """Be the process of a script."""
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_CREAT), number)
    warnings.simplefilter("ignore")
    sys.argv, sys.path[:0] = argv, [str(Path(argv[0]).parent)]
    runpy.run_path(argv[0], run_name="__main__")
