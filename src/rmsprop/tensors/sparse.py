"""Sparse gradients, such as an embedding's: the rows that have one, as dense tensors that any kernel steps.

"lazy" (TensorFlow 1): rows without a gradient are left alone, their averages and momentum too; the cost follows the
rows that have one. "dense" (Keras): a row without a gradient has the gradient 0: its averages decay, and its momentum
moves it. Duplicate indices are summed first in both.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rmsprop.printing import shown
from rmsprop.spec import SLOTS
from rmsprop.tensors.bucket import Bucket
from rmsprop.tensors.params import names

WRITTEN = ("param", *(slot for slot in SLOTS if slot != "step"))


def called(group: Mapping[str, Any], i: int) -> str:
    """The name of the group's parameter i, or its place."""
    known = names(group)
    return shown(known[i]) if known else f"{i} of its group"


def refused(group: Mapping[str, Any], i: int, layout: torch.layout) -> str:
    """The sentence for a sparse gradient of the group's parameter i where it takes none."""
    name = called(group, i)
    if layout != torch.sparse_coo:
        return (
            f"RMSprop does not support gradients of layout {layout}: parameter {name} has one; turn it into a "
            "dense or "
            "a sparse COO one, which torch.nn.Embedding(sparse=True) makes"
        )
    return (
        f"RMSprop does not support sparse gradients: parameter {name} has one, and nothing says what it means; give "
        "sparse='lazy' (only rows with a gradient step) or sparse='dense' (averages decay everywhere), or build its "
        "layer with sparse=False"
    )


def parts(group: Mapping[str, Any], bucket: Bucket) -> list[tuple[Bucket, Callable[[], None] | None]]:
    """The bucket with dense gradients only, as the group's `sparse` means it.

    Returns: buckets, each with what writes its results back to where they belong, or None where they are there. Under
        "lazy" the rows of sparse gradients are a bucket of their own.
    """
    sparse = [i for i, g in enumerate(bucket.grad) if g.is_sparse]
    if not sparse:
        return [(bucket, None)]
    if group["sparse"] == "dense":
        bucket.grad = [g.to_dense() if g.is_sparse else g for g in bucket.grad]
        return [(bucket, None)]
    dense = [i for i, g in enumerate(bucket.grad) if not g.is_sparse]
    whole, rest = chosen(bucket, sparse), chosen(bucket, dense)
    places = []
    rows = chosen(bucket, [])
    for i, sparse_grad in enumerate(whole.grad):
        grad = sparse_grad if sparse_grad.is_coalesced() else sparse_grad.coalesce()  # duplicates are summed
        where = tuple(grad.indices())
        places.append(where)
        rows.grad.append(grad.values())
        for name in WRITTEN:
            values = getattr(whole, name)
            if values:
                getattr(rows, name).append(_read(values[i], where))
    rows.step, rows.random_keys = list(whole.step), list(whole.random_keys)
    rows.differentiable = bool(group["differentiable"])

    def _write_back() -> None:
        for name in WRITTEN:
            kept = getattr(whole, name)
            for into, where, values in zip(kept, places, getattr(rows, name), strict=False):
                _write(into, where, values)

    return [*([(rest, None)] if dense else []), (rows, _write_back)]


def _read(whole: Tensor, where: tuple[Tensor, ...]) -> Tensor:
    """A copy of the rows. index_select stays on one core for a few rows; advanced indexing waits for all cores."""
    return whole.index_select(0, where[0]) if len(where) == 1 else whole[where].contiguous()


def _write(whole: Tensor, where: tuple[Tensor, ...], rows: Tensor) -> None:
    """The rows, back where they were read. Mutates: whole."""
    if len(where) == 1:
        whole.index_copy_(0, where[0], rows)
    else:
        whole.index_put_(where, rows)


def chosen(bucket: Bucket, indices: list[int]) -> Bucket:
    """The tensors at those places, as a bucket of their own."""
    chosen = bucket.part(0, 0)
    for into, values in zip(chosen.lists(), bucket.lists(), strict=True):
        into.extend(values[i] for i in indices if values)
    chosen.random_keys = [bucket.random_keys[i] for i in indices if bucket.random_keys]
    return chosen
