"""Turns sparse gradients, such as an embedding's, into dense tensors that any kernel steps.

"lazy" (TensorFlow 1) leaves rows without a gradient alone, with their averages and momentum; the cost scales with the
rows that have one. "dense" (Keras) gives a row without a gradient the gradient 0, so that its averages decay and its
momentum moves it. Both sum duplicate indices first.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rmsprop.spec import Hyper
from rmsprop.tensors.averaging import average
from rmsprop.tensors.bucket import Bucket
from rmsprop.tensors.names import parameter_name


def refused(group: Mapping[str, Any], i: int, layout: torch.layout) -> str:
    """Return the message for a sparse gradient of parameter i in a group that accepts none."""
    name = parameter_name(group, i)
    if layout != torch.sparse_coo:
        return (
            f"RMSprop does not support gradients of layout {layout}: parameter {name} has one; convert it to a dense "
            "or a sparse COO tensor, such as torch.nn.Embedding(sparse=True) makes"
        )
    return (
        f"RMSprop does not support sparse gradients by default: parameter {name} has one; give sparse='lazy' (only "
        "rows with a gradient step) or sparse='dense' (averages decay everywhere), or build its layer with "
        "sparse=False"
    )


def parts(group: Mapping[str, Any], hyper: Hyper, bucket: Bucket) -> list[tuple[Bucket, Callable[[], None] | None]]:
    """Return the bucket as buckets with dense gradients only, under the group's `sparse`.

    Returns: buckets, each with a function that writes its results back, or None if the step writes in place. Under
        "lazy", the rows with a sparse gradient form a separate bucket. The average of the weights, [10], then moves
        in every row, since the rows that were not stepped keep weights of their own.
    """
    sparse = [i for i, g in enumerate(bucket.grad) if g.is_sparse]
    if not sparse:
        return [(bucket, None)]
    if group["sparse"] == "dense":
        bucket.grad = [g.to_dense() if g.is_sparse else g for g in bucket.grad]
        return [(bucket, None)]
    dense = [i for i, g in enumerate(bucket.grad) if not g.is_sparse]
    whole, rest = bucket.chosen(sparse), bucket.chosen(dense)
    averaged = replace(whole, slots=dict(whole.slots))
    whole.slots["ema"] = []
    indices = []
    rows = bucket.chosen([])
    for i, sparse_grad in enumerate(whole.grad):
        grad = sparse_grad if sparse_grad.is_coalesced() else sparse_grad.coalesce()  # duplicates are summed
        where = tuple(grad.indices())
        indices.append(where)
        rows.grad.append(grad.values())
        for values, own in zip(_written(whole), _written(rows), strict=True):
            if values:
                own.append(_read(values[i], where))
    rows.slots["step"], rows.random_keys = list(whole.slots["step"]), list(whole.random_keys)
    rows.differentiable = bool(group["differentiable"])

    def _write_back() -> None:
        for kept, stepped in zip(_written(whole), _written(rows), strict=True):
            for into, where, values in zip(kept, indices, stepped, strict=False):
                _write(into, where, values)
        average(hyper.average, averaged)

    return [*([(rest, None)] if dense else []), (rows, _write_back)]


def _written(bucket: Bucket) -> list[list[Tensor]]:
    """Return the lists that a step writes row by row."""
    return [bucket.param, *bucket.shaped().values()]


def _read(whole: Tensor, where: tuple[Tensor, ...]) -> Tensor:
    """Return a copy of the rows. index_select uses one core for few rows, where advanced indexing waits for all."""
    return whole.index_select(0, where[0]) if len(where) == 1 else whole[where].contiguous()


def _write(whole: Tensor, where: tuple[Tensor, ...], rows: Tensor) -> None:
    """Write the rows back. Mutates: whole."""
    if len(where) == 1:
        whole.index_copy_(0, where[0], rows)
    else:
        whole.index_put_(where, rows)
