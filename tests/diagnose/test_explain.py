"""What explain() says is what a step does: the first step, the steady one, the longest, and the bytes."""

import contextlib
import inspect
import io
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import DOCS
from torch import nn
from torch.testing import assert_close
from typer.testing import CliRunner

from rmsprop import DIALECTS, Hyper, RMSprop, Rule, analysis, reference
from rmsprop.cli import app
from rmsprop.diagnose.checks import CHECKS
from rmsprop.diagnose.explain import meaning
from rmsprop.diagnose.lint import SEVERITIES
from rmsprop.spec import EPS_MODES


def walked(rule, hyper, steps, gradient=1.0):
    """The lengths of the steps of the reference, in units of lr, under a gradient that never changes."""
    p, g = np.array([0.0]), np.array([gradient])
    state, found = reference.start(rule, p), []
    for _ in range(steps):
        new, state = reference.step(rule, hyper, p, g, state)
        found.append(abs(float(new[0] - p[0])) / hyper.lr)
        p = new
    return found


RULES = [
    Rule(momentum=mu > 0, nesterov=nesterov and mu > 0, lr_in_buffer=inside, bias_correction=bias, centered=centered)
    for mu, nesterov, inside, bias, centered in itertools.product((0, 1), *[(False, True)] * 4)
]


@pytest.mark.parametrize("rule", dict.fromkeys(RULES), ids=str)
def test_the_first_step_is_as_long_as_it_says(rule):
    """In units of lr, against the reference; infinite where the variance is 0."""
    hyper = Hyper(lr=0.01, alpha=0.9, eps=1e-12, momentum=0.8 * rule.momentum)
    said = analysis.first_step(rule, hyper)
    if math.isinf(said):
        assert rule.centered
        assert rule.bias_correction
        assert walked(rule, hyper, 1)[0] > 1e6
    else:
        assert said == pytest.approx(walked(rule, hyper, 1)[0], rel=1e-9)


@pytest.mark.parametrize("rule", [rule for rule in dict.fromkeys(RULES) if not rule.centered], ids=str)
def test_the_longest_and_the_steady_step_are_as_long_as_it_says(rule):
    """Of a run with a constant gradient, against the reference, with the step at which it comes."""
    hyper = Hyper(lr=0.01, alpha=0.9, eps=1e-12, momentum=0.8 * rule.momentum)
    run = walked(rule, hyper, 300)
    longest, at = analysis.longest_step(rule, hyper)
    assert longest == pytest.approx(max(run), rel=1e-6)
    if not rule.bias_correction:  # its steps only grow
        assert run.index(max(run)) + 1 == at
    assert analysis.steady_step(rule, hyper) == pytest.approx(run[-1], rel=1e-6)


def test_yolos_momentum():
    """.937 makes 16 of lr, and the first steps add up to 39."""
    rule, hyper = Rule(momentum=True), Hyper(lr=0.01, alpha=0.99, eps=1e-8, momentum=0.937)
    assert round(analysis.steady_step(rule, hyper), 1) == 15.9
    assert round(analysis.first_step(rule, hyper), 6) == 10
    longest, at = analysis.longest_step(rule, hyper)
    assert (round(longest, 1), at) == (38.9, 18)


@pytest.mark.parametrize("mode", ["outside", "inside", "both", "floor"])
def test_no_gradient_is_multiplied_by_more_than_it_says(mode):
    """The bound is met where the gradient vanishes."""
    rule, hyper = Rule(eps_mode=mode), Hyper(lr=1.0, alpha=0.9, eps=1e-4)
    tiny = 1e-12
    assert analysis.most(rule, hyper) == pytest.approx(walked(rule, hyper, 1, tiny)[0] / tiny, rel=1e-6)


def test_the_warm_up_ends_where_it_says():
    """αᵗ·v₀ falls below g² at that step."""
    rule, hyper = Rule(square_avg_init=1.0), Hyper(lr=1.0, alpha=0.9, eps=0.0)
    steps = analysis.warm_up(rule, hyper, 0.01)
    assert 0.9 ** math.ceil(steps) < 1e-4 <= 0.9 ** math.floor(steps)
    assert analysis.warm_up(rule, hyper, 2.0) == 0
    assert math.isinf(analysis.warm_up(rule, hyper, 0.0))
    assert 0.9 ** (analysis.steps_stuck(0.9, 50.0) / 2) == pytest.approx(1 / 50)


def text(**words):
    """What is said of two float32 elements."""
    return RMSprop([nn.Parameter(torch.ones(2))], **words).explain()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            {},
            [
                "ε = 1e-08 is added to the root, in units of g;",
                "at most 1/ε = 1e+08, so no element's lr exceeds 1e+06",
            ],
        ),
        ({}, ["the first step is 10·lr = 0.1 long (1/√(1−alpha)), whatever the gradient"]),
        ({"eps_mode": "inside", "eps": 1e-4}, ["added under the root, in units of g²;", "at most 1/√ε = 100"]),
        (
            {"eps_mode": "both", "eps": 1e-4},
            ["at most 1/(√ε + ε) = 99", "changed from the dialect: eps_mode='both', not 'outside'"],
        ),
        ({"eps_mode": "floor"}, ["the least value of the root, in units of g;"]),
        ({"eps": 0}, ["ε is 0, so nothing bounds the factor on a small gradient"]),
        ({"bias_correction": True}, ["the first step is 1·lr = 0.01 long (bias-corrected)"]),
        ({"centered": True}, ["the first step is 10.0504·lr = 0.100504 long (1/√(alpha·(1−alpha)), centered)"]),
        (
            {"centered": True, "bias_correction": True},
            ["the first variance is 0, so only ε bounds the first step: it is 1e+06 times"],
        ),
        (
            {"momentum": 0.9},
            ["steps are 1/(1−momentum) = 10·lr = 0.1 long", "before that, step 11 is 29.8779·lr = 0.298779"],
        ),
        (
            {"momentum": 0.9, "nesterov": True},
            ["the first step is 19·lr = 0.19 long (1/√(1−alpha), times 1 + momentum)"],
        ),
        (
            {"square_avg_init": 1.0},
            ["v starts at v₀ = 1, a warm-up: steps are about lr·|g|/√(alphaᵗ·v₀)", "917 steps for |g| = 0.01"],
        ),
        ({"lr_in_buffer": True, "momentum": 0.9}, ["the old rate fades over about 1/(1−momentum) = 10 steps"]),
        ({"lr": torch.tensor(0.5)}, ["the first step is 10·lr = 5 long"]),
        ({"dialect": "keras3"}, [DIALECTS["keras3"].source, DIALECTS["keras3"].title]),
    ],
    ids=str,
)
def test_the_numbers_are_explained(words, parts):
    """One sentence explains each surprising number."""
    found = text(**words)
    for part in parts:
        assert part in found


PLACES = {
    "outside": (
        "ε = 0.01 is added to the root, in units of g; it matters for gradients below about 0.01",
        "1/ε = 100,",
    ),
    "inside": (
        "ε = 0.01 is added under the root, in units of g²; it matters for gradients below about 0.1",
        "1/√ε = 10,",
    ),
    "both": (
        "ε = 0.01 is added under the root, in units of g², and to the root, in units of g; it matters for gradients",
        "1/(√ε + ε) = 9.09091,",
    ),
    "floor": ("ε = 0.01 is the least value of the root, in units of g; it matters for gradients", "1/ε = 100,"),
}


@pytest.mark.parametrize("mode", EPS_MODES)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("square_avg_init", [0.0, 1.0])
@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
@pytest.mark.parametrize("max_update", [None, 0.5])
def test_every_sentence_is_whole_for_every_part(
    mode, centered, bias_correction, square_avg_init, momentum, max_update
):
    """Each line joins its parts correctly, and claims no formula that max_update overrides."""
    rule = Rule(
        eps_mode=mode,
        centered=centered,
        bias_correction=bias_correction,
        square_avg_init=square_avg_init,
        momentum=bool(momentum),
        nesterov="nesterov" in momentum,
    )
    hyper = Hyper(lr=0.1, alpha=0.99, eps=0.01, momentum=momentum.get("momentum", 0.0), max_update=max_update)
    place, largest, *lines = meaning(rule, hyper)
    assert place.startswith(PLACES[mode][0])
    assert f"a gradient is multiplied by at most {PLACES[mode][1]} so no element's lr exceeds" in largest
    for line in (place, largest, *lines):
        assert not re.search(r"  |,,|, ;|\(\)|\b1 steps|None|\.$", line), line
        assert line.count(": ") <= 1, line
    first = lines[0]
    if max_update:
        assert "the first step is 0.5·lr = 0.05 long (bounded by max_update), " in first
        assert any("under a steady gradient, steps are 0.5·lr" in line for line in lines) is bool(momentum)
    elif centered and bias_correction:
        assert first.startswith("the first variance is 0, so only ε bounds the first step: it is ")
    else:
        why = (
            "1/√(alpha·(1−alpha)), centered" if centered else "bias-corrected" if bias_correction else "1/√(1−alpha)"
        )
        ahead = ", times 1 + momentum" if "nesterov" in momentum else ""
        which = "for gradients far above √v₀ = 1" if square_avg_init else "whatever the gradient"
        assert first.endswith(f" long ({why}{ahead}), {which}")
    assert any(line.startswith("v starts at v₀ = 1, a warm-up: ") for line in lines) is bool(square_avg_init)


@pytest.mark.parametrize("name", DIALECTS)
def test_a_dialect_as_it_is_differs_in_nothing(name):
    """Only switches that were changed are listed as changed from the dialect."""
    row = DIALECTS[name]
    found = text(dialect=name, **({row.argument("lr"): 1e-3} if row.hyper.lr is None else {}))
    assert row.title in found
    assert row.source in found
    assert "changed from the dialect" not in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("words", [{}, {"momentum": 0.9}, {"momentum": 0.9, "centered": True}], ids=str)
def test_the_bytes_are_what_the_state_takes(dtype, words):
    """Before there is state, and when there is; and nothing is made by asking."""
    p = nn.Parameter(torch.ones(3, 5, dtype=dtype))
    optimizer = RMSprop([p], **words)
    said = optimizer.explain()
    assert len(optimizer.state) == 0
    p.grad = torch.ones_like(p)
    optimizer.step()
    slots = [x for name, x in optimizer.state[p].items() if name != "step"]
    each, total = sum(x.element_size() for x in slots), sum(x.nbytes for x in slots)
    line = f"{each} bytes per element, {total} for 15 elements, and a step count per tensor"
    assert f"{line}; 0 of 1 tensor has state so far" in said
    assert line + "\n" in optimizer.explain()


def test_a_state_of_another_dtype_is_counted_as_it_is():
    """A float32 state beside a float64 parameter takes 4 bytes."""
    p = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = RMSprop([p, nn.Parameter(torch.ones(4))])
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert "8 or 4 bytes" not in optimizer.explain()
    assert "4 or 8 bytes per element, 48 for 8 elements" in optimizer.explain()
    assert_close(optimizer.state[p]["square_avg"].nbytes, 32)


PAGE = DOCS / "explain.md"


def test_the_page_of_explain_runs(tmp_path, monkeypatch):
    """docs/explain.md: its Python prints what stands beneath it, and its commands end with 0 and say what it says."""
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w+)( file=\S+)?\n(.*?)```", page, re.DOTALL)
    assert [kind for kind, *_ in blocks] == ["python", "text", "python", "text", "python", "console", "console"]
    monkeypatch.chdir(tmp_path)
    for name, copy in (("torch_rmsprop.pt", "checkpoint.pt"), ("keras3-centered.keras", "model.keras")):
        Path(copy).write_bytes((PAGE.parents[1] / "tests" / "checkpoints" / name).read_bytes())
    Path("state.msgpack").write_bytes((PAGE.parents[1] / "tests/checkpoints/optax_rmsprop.msgpack").read_bytes())
    space, printed = {}, ""
    for kind, file, text in blocks:
        if file:
            Path(file.removeprefix(" file=")).write_text(text, encoding="utf-8")
        elif kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, "explain.md", "exec"), space)
            printed = out.getvalue()
        elif kind == "text":
            assert printed == text
        else:
            for command, _, shown in (part.partition("\n") for part in text.split("$ rmsprop ")[1:]):
                result = CliRunner().invoke(app, command.split())
                assert result.exit_code == 0, result.output
                assert shown in result.output


def test_every_finding_is_documented():
    """With its severities, in the table of docs/explain.md."""
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == list(CHECKS)
    for name, severities in rows:
        source = inspect.getsource(CHECKS[name])
        assert {word for word in SEVERITIES if f'"{word}"' in source} == set(severities.split(", "))


def test_a_layout_that_keeps_the_group_from_the_kernel_is_reported():
    """The answer is about today's gradients, as lint's slow_path is, not about the parameters alone."""
    p = torch.nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last))
    optimizer = RMSprop([p], lr=1e-4)
    assert "as it is now" not in optimizer.explain()
    p.grad = torch.ones(2, 3, 4, 4)
    assert "as it is now, every step copies the gradient of parameter 0 into the layout" in optimizer.explain()
    p.grad = None
    optimizer.param_groups[0]["params"][0].data = torch.ones(2, 3, 4, 8)[..., ::2]
    p.grad = torch.ones(2, 3, 4, 4)
    assert "as it is now, torch operations step parameter 0 instead of the compiled kernel" in optimizer.explain()
    p.data, p.grad = torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert "as it is now" not in optimizer.explain()


def test_a_tensor_that_the_kernel_does_not_take_is_shown_by_itself():
    """The others keep the kernel, as they do in a step."""
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 6)[:, ::2]), nn.Parameter(torch.ones(5))]
    lines = [line.strip() for line in RMSprop(params).explain().splitlines()]
    at = lines.index("2 float32 tensors on cpu")
    assert lines[at + 1] == "cpu: steps them"
    at = lines.index("1 float32 tensor on cpu")
    assert lines[at + 1].startswith("cpu: refuses, parameter 0 of the bucket has gaps")
    assert lines[at + 2] == "eager: steps them"
