"""Measures what a call allocates on the CPU, as torch's profiler reports its allocator."""

from collections.abc import Callable
from typing import Any

import torch


def peak(call: Callable[[], Any]) -> int:
    """Return the most bytes that a call holds at one time beyond those before it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    records = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for record in sorted(records, key=lambda e: e.start_ns()):
        held += record.nbytes()
        most = max(most, held)
    return most
