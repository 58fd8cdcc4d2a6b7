"""Checks of the precision of the state between steps: its rounding and its range."""

import math

import torch

from rmsprop.diagnose.facts import Facts
from rmsprop.diagnose.usage import Found, names
from rmsprop.tensors.float8 import LARGEST, SMALLEST_NORMAL

FEW = 0.01  # of the elements whose square_avg is kept in float8


def state_rounding(f: Facts) -> Found:
    """Find averages in half precision that are rounded to nearest, and hardly change at this alpha."""
    if f.group.get("state_dtype", "float32") != "float32":
        return
    for dtype in (torch.bfloat16, torch.float16):
        held = [x for x in f.tensors if x.state_dtype == dtype]
        share, spacing = 1 - f.hyper.alpha, torch.finfo(dtype).eps
        if held and share < spacing:
            name = str(dtype).removeprefix("torch.")
            yield (
                "warning",
                f"square_avg is {name} in {names(held)} and rounded to nearest, while a step changes it by a share "
                f"of about 1 − alpha = {share:.2g}, below {name}'s spacing of {spacing:.2g}: it stops following the "
                "gradients",
                "Use state_dtype='bfloat16', which rounds stochastically, or delete the state to start it in float32",
            )


def state_range(f: Facts) -> Found:
    """Find averages at the top of float8's range."""
    share = f.share("at_top", "coded")
    if share > FEW:
        yield (
            "warning",
            f"square_avg is at float8's largest number, {LARGEST:g}, in {share:.0%} of the elements, worst in "
            f"{f.worst('at_top', 'coded')}: gradients beyond {math.sqrt(LARGEST):.0f} take steps that are too long",
            "Use state_dtype='bfloat16', or scale the loss down",
        )


def state_start(f: Facts) -> Found:
    """Find averages in float8 that only decay from where they started, so that the rounding of a byte adds up."""
    memory = 1 / (1 - f.hyper.alpha)
    held = [x for x in f.tensors if x.state_dtype == torch.uint8 and x.steps >= 2 * memory]
    moved = sum(x.sums["with_grad"] for x in held)
    decaying = moved - sum(x.sums["touched_with_grad"] for x in held)
    if f.rule.square_avg_init and decaying > FEW * moved:
        yield (
            "warning",
            f"square_avg is float8, started at {f.rule.square_avg_init:g} and has only decayed since, for "
            f"{max(x.steps for x in held)} steps, in {decaying / moved:.0%} of the elements with a gradient: the "
            "rounding of a byte adds up until gradients hold the average, and steps become too long or too short",
            "Use state_dtype='bfloat16'",
        )


def state_eps(f: Facts) -> Found:
    """Find averages at the bottom of float8's range, where ε is too small to bound the step."""
    share, inside = f.share("at_bottom", "coded"), f.rule.eps_mode in ("inside", "both")
    enough = SMALLEST_NORMAL if inside else math.sqrt(SMALLEST_NORMAL)
    if share <= FEW or f.hyper.eps >= enough:
        return
    larger = f"eps={1.2 * enough:.0e} or larger, or " if share < 0.4 else ""  # else it would exceed most roots
    yield (
        "warning",
        f"square_avg is at float8's smallest numbers, below {SMALLEST_NORMAL:.2g}, in {share:.0%} of the elements, "
        f"worst in {f.worst('at_bottom', 'coded')}, so that their steps vary, up to "
        f"{1 / math.sqrt(1 - f.hyper.alpha):.3g}·lr, and eps={f.hyper.eps:g} is below {enough:.2g}, where it would "
        "bound them",
        f"Use {larger}state_dtype='bfloat16'",
    )
