"""The table of docs/memory.md: each row is what the optimizer in it takes."""

import re

import pytest
import torch
from paths import DOCS
from torch import nn

from rmsprop import RMSprop, step_in_backward

PAGE = DOCS / "memory.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in re.search(r"<!-- table -->(.*?)<!-- end -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)[
        1
    ].splitlines()
    if "(" in line
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:2]))
def test_a_row_is_what_the_optimizer_holds(row) -> None:
    """Bytes of weight, gradient and state per weight after a step, their sum, and the sum in backward."""
    dtype, call, *sizes = row
    weight = nn.Parameter(torch.ones(1000, dtype=getattr(torch, dtype)))
    weight.grad = torch.ones_like(weight)
    name, given = re.fullmatch(r"`([\w.]+)\((.*)\)`", call).groups()
    settings = eval(f"dict({given})")
    make = RMSprop if name == "RMSprop" else getattr(torch.optim, name.rpartition(".")[2])
    optimizer = make([weight], **settings)
    optimizer.step()
    state = sum(x.nbytes for x in optimizer.state[weight].values() if x is not None and x.ndim)
    held = [weight.nbytes, weight.grad.nbytes, state]
    assert sizes[:4] == [f"{size / 1000:g}" for size in (*held, sum(held))]
    if make is RMSprop:
        model = nn.ParameterList([weight])
        step_in_backward(model, **settings)  # none of them is refused there
        assert sizes[4] == f"{(sum(held) - weight.grad.nbytes) / 1000:g}"


def test_the_code_of_the_page_prints_what_its_comments_say(capsys: pytest.CaptureFixture[str]) -> None:
    """Every block, in order; each comment of a line of its own is a line of output."""
    program = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    exec(compile(program, "memory.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^# (.*)", program, re.MULTILINE)
