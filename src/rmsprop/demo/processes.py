"""Training of many runs at once, in several processes; short trainings stay in this one."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from queue import Empty
from typing import Any

from rmsprop.demo.data import Dataset
from rmsprop.demo.training import BATCH, Progress, Run, Settings, one_thread, train

SHORT = 2000
"""Steps of all runs together below which processes, which take seconds to start, are not worth it."""


Report = tuple[int, Progress]
"""The index of a run, and its progress at the end of an epoch."""


def train_all(runs: Sequence[Run], dataset: Dataset, settings: Settings, processes: int = 1) -> Iterator[Report]:
    """Train every run, and yield one report per run and epoch, as they come.

    Each run uses one thread, so that its numbers do not depend on `processes`, the most that run at once on a CPU.

    Mutates: runs.
    """
    count = min(processes, len(runs)) if settings.device == "cpu" else 1
    if count == 1 or len(runs) * settings.epochs * math.ceil(len(dataset.y_train) / BATCH) < SHORT:
        with one_thread():
            for i, run in enumerate(runs):
                yield from _train(i, run, dataset, settings)
        return
    context = get_context("spawn")  # a forked process would inherit torch's threads in an unknown state
    reports: Any = context.Queue()
    with ProcessPoolExecutor(count, context, _connect, (reports, dataset)) as pool:
        try:
            waiting = [pool.submit(_work, i, run, settings) for i, run in enumerate(runs)]
            arrived = 0
            while not all(future.done() for future in waiting):
                with suppress(Empty):
                    yield reports.get(timeout=0.2)
                    arrived += 1
            for run, future in zip(runs, waiting, strict=True):
                vars(run).update(vars(future.result()))
            # a process sends its reports in a thread of their own, so the last ones may come after its result
            for _ in range(sum(len(run.test_accuracies) for run in runs) - arrived):
                yield reports.get(timeout=10)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _train(i: int, run: Run, dataset: Dataset, settings: Settings) -> Iterator[Report]:
    for at in train(run, dataset, settings):
        if at.epoch_done:
            yield i, at


# --- in a process of its own ------------------------------------------------------------------------

_report: Callable[[Report], None]
"""Sends a report to the parent; set by `_connect`, as is the data set."""
_dataset: Dataset


def _connect(reports: Any, dataset: Dataset) -> None:
    global _report, _dataset
    _report, _dataset = reports.put, dataset


def _work(i: int, run: Run, settings: Settings) -> Run:
    with one_thread():
        for report in _train(i, run, _dataset, settings):
            _report(report)
    return run
