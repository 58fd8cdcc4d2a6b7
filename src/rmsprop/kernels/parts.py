"""Collects the parameters that a plan steps, as buckets of one kind with their indices."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from rmsprop.kernels.cpu import laid_out
from rmsprop.spec import Rule, random_key
from rmsprop.tensors.bucket import Bucket, bucket_for, is_half, is_random, state_names

Stepped = Sequence[tuple[Mapping[str, Any], Bucket]]  # group and bucket of each work of a step
# the group's index, its rule, the bucket, and the parameters' indices among all parameters
Part = tuple[int, Rule, Bucket, list[int]]


def whole_groups(groups: list[tuple[dict[str, Any], Rule]], stepped: Stepped) -> list[Part]:
    """Return the buckets of the last step in the form of `parts_of`, if each is a whole group of plain tensors.

    Returns: an empty list if they are not, such as after a step in which a parameter had no gradient.
    """
    parts: list[Part] = []
    index, todo = 0, list(stepped)
    for i, (group, rule) in enumerate(groups):
        count = len(group["params"])
        if count:
            owner, bucket = todo.pop(0) if todo else (None, Bucket())
            if owner is not group or len(bucket.param) != count or bucket.whole:
                return []
            parts.append((i, rule, bucket, list(range(index, index + count))))
        index += count
    return parts if not todo else []


def parts_of(groups: list[tuple[dict[str, Any], Rule]], state: Any, left: set[int]) -> Iterator[Part]:
    """Yield the parameters that have state, with or without a gradient, as buckets of one kind.

    Args:
        left: the ids of parameters that are left out.

    Yields: the group's index, its rule, the bucket, and the parameters' indices among all parameters.
    """
    index = 0
    for i, (group, rule) in enumerate(groups):
        found: dict[Any, tuple[Bucket, list[int]]] = {}
        names = {half: state_names(rule, group, half) for half in (False, True)}
        for p in group["params"]:
            entry = state.get(p)
            if type(entry) is dict and id(p) not in left:
                slots: list[Any] = [entry.get(name) for name in names[is_half(p.dtype)]]
                if all(isinstance(x, Tensor) for x in slots):
                    key = (p.device, *(x.dtype for x in (p, entry["square_avg"], entry["step"])))
                    if key not in found:
                        found[key] = bucket_for(group, []), []
                    bucket, indices = found[key]
                    bucket.param.append(p)
                    # a parameter may stand for its own gradient
                    bucket.grad.append(p if p.grad is None else laid_out(p, p.grad))
                    for name, x in zip(names[is_half(p.dtype)], slots, strict=True):
                        bucket.slots[name].append(x)
                    if is_random(group):
                        bucket.random_keys.append(random_key(group["seed"], index))
                    indices.append(index)
            index += 1
        for bucket, indices in found.values():
            yield i, rule, bucket.of_its_width(), indices
