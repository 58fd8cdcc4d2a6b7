"""Puts an estimate into lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rmsprop.memory import Estimate


def lines(found: Estimate) -> Iterator[str]:
    """Yield the text of an estimate."""
    frozen = f", and {found.frozen:,} frozen" if found.frozen else ""
    many = f"{found.tensors} tensor{'s' * (found.tensors != 1)}"
    yield f"{found.call} on {found.device}: {found.elements:,} weights to train, in {many}{frozen}"
    yield ""
    yield f"{'':30}{'in all':>12}{'per weight':>14}"
    total, backends = found.total, " and ".join(found.backends)
    rows = {
        "weights": total.weights,
        "gradients": total.gradients,
        **total.slots,
        "average (ema)": total.average,
        "remainders (compensation)": total.remainders,
        "buffers": total.buffers,
    }
    for name, size in rows.items():
        if size or name in ("weights", "gradients"):
            yield _row(name, size, found.elements)
    yield _row(f"step's peak ({backends})" if backends else "step's peak", total.step, found.elements)
    yield _row("in all", total.total, found.elements)
    if len(found.groups) > 1:
        yield ""
        yield f"{'':12}" + "".join(f"{head:>12}" for head in ("weights", "gradients", "state", "step", "in all"))
        for i, own in enumerate(found.groups):
            sizes = (own.weights, own.gradients, own.state, own.step, own.total)
            yield f"{f'group {i}':12}" + "".join(f"{_size(size):>12}" for size in sizes)
    yield ""
    yield from _table(found)
    yield ""
    refused = [f"{other.name}: {other.reason}" for other in found.alternatives if other.usage is None]
    for note in (*found.notes, *refused):
        yield f"- {note}"


def _row(name: str, size: int, elements: int) -> str:
    each = f"{size / elements:.2f} bytes" if elements and size >= 0.005 * elements else ""
    return f"{name:30}{_size(size):>12}{each:>14}".rstrip()


def _table(found: Estimate) -> Iterator[str]:
    """Yield the table of the alternatives, with a verdict on each if the memory is known."""
    heads = ("gradients", "state", "step", "in all")
    limit = "" if found.memory is None else f"   in {_size(found.memory)}"
    yield f"{'':38}" + "".join(f"{head:>10}" for head in heads) + limit
    others = ((other.name, other.usage) for other in found.alternatives)
    for name, own in (("as given", found.total), *others):
        if own is None:
            yield f"{name:38}   not with these settings, see below"
            continue
        sizes = "".join(f"{_size(size):>10}" for size in (own.gradients, own.state, own.step, own.total))
        yield f"{name:38}{sizes}{_verdict(own.total, found.memory)}"


def _verdict(total: int, memory: int | None) -> str:
    if memory is None:
        return ""
    left = memory - total
    return f"   fits, {_size(left)} left" if left >= 0 else f"   no, {_size(-left)} short"


def _size(size: float) -> str:
    """Return bytes in decimal units, with three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:#.3g} {unit}"
        size /= 1000
    raise AssertionError
