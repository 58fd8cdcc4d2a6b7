"""SECURITY.md: its promises name tests that are there, and what is printed obeys no name that came from a file."""

import copy
import re

import pytest
import torch
from paths import ROOT
from torch import nn

from rmsprop import RMSprop
from rmsprop.inspection.script import ScriptReport, Watched
from rmsprop.state.loading import complete

HOSTILE = "a\x1b[2J\n\x07\u202e<script>"


def test_every_promise_names_tests_that_exist():
    """In each row of the table; an input that may not be hostile may have none."""
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 7
    for _, hostile, _, tests in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)`", tests)
        assert named or hostile == "no"
        for name in named:
            assert "def test_" in (ROOT / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("page", ["README.md", "docs/checkpoints.md"])
def test_the_page_is_linked(page):
    """Where checkpoints are introduced."""
    assert "SECURITY.md" in (ROOT / page).read_text(encoding="utf-8")


def optimizer_of(names):
    """An optimizer that loaded another's names, with a gradient whose layout is worth a remark."""
    saved = RMSprop([(name, nn.Parameter(torch.ones(4, 4))) for name in names], lr=1e-3)
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.full((4, 4), torch.nan).t()[:, :]
    kept = copy.deepcopy(saved.state_dict())
    optimizer = RMSprop([p], lr=1.0, clip_norm=None)
    optimizer.load_state_dict(kept, hparams="keep")
    optimizer.param_groups[0]["param_names"] = list(names)
    return optimizer


def test_findings_print_no_control_characters_of_names():
    """What lint and check print is one printable line for each thing, whatever parameters are called."""
    optimizer = optimizer_of([HOSTILE])
    findings = optimizer.lint()
    assert {"nonfinite", "slow_path"} <= {finding.name for finding in findings}
    for finding in findings:
        assert str(finding).isprintable()
    watched = Watched("train.py:1", "torch")
    watched.run_lint(optimizer)
    report = ScriptReport("train.py", optimizers=[watched])
    assert all(line.isprintable() for line in str(report).splitlines())


def test_an_optimizer_in_words_prints_no_control_characters():
    """repr() and explain(), of a group that carries what a file said."""
    optimizer = optimizer_of(["w"])
    for name in ("recipe", "note", HOSTILE):
        optimizer.param_groups[0][name] = HOSTILE
    for text in (optimizer.explain(), repr(optimizer)):
        assert all(line.isprintable() for line in text.split("\n")), text


def test_entries_of_no_parameter_may_be_anything():
    """The fuzzer by coverage found it: a tensor of several values, beside the entries of parameters, has no truth."""
    state = {"tensor": torch.ones(3), "list": [1], "nothing": None}
    before = dict(state)
    complete([], state)
    assert state.keys() == before.keys()
    assert all(state[key] is before[key] for key in state)
