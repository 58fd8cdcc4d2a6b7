"""An optimizer in words: what it computes, with its numbers, and who steps its parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

from rmsprop import clipping, kernels, settings
from rmsprop.bucket import kind, wanted

Groups = Sequence[Mapping[str, Any]]


def explain(groups: Groups, backend: str) -> str:
    """For each group the rule with its numbers, and who steps its parameters or why they cannot."""
    lines = []
    for i, group in enumerate(groups):
        rule, _ = settings.read(group)
        lines.append(f"Parameter group {i}, dialect {group['dialect']}, backend {backend!r}")
        lines += [f"    recipe {group['recipe']}"] if "recipe" in group else []
        lines += [f"    {line}" for line in equation(group)]
        for bucket in wanted(group, group["params"]).split():
            device, dtype, _ = kind(bucket.param[0])
            lines.append(f"    {len(bucket.param)} {str(dtype).removeprefix('torch.')} tensors on {device}")
            lines += [f"        {line}" for line in kernels.describe(backend, rule, bucket)]
    return "\n".join(lines)


def show(name: str, groups: Groups, backend: str) -> str:
    """The optimizer as repr() shows it: all settings, and the equation."""
    lines = [f"{name} (backend: {backend}"]
    for i, group in enumerate(groups):
        lines.append(f"Parameter Group {i}")
        lines += [f"    {name}: {group[name]}" for name in sorted(group) if name != "params"]
        lines += [f"    {line}" for line in equation(group)]
    return "\n".join(lines) + "\n)"


def equation(group: Mapping[str, Any]) -> list[str]:
    """The lines of the equation with the group's numbers, and what it does beside them."""
    rule, hyper = settings.read(group)
    return [*rule.equation(hyper), *clipping.describe(group)]
