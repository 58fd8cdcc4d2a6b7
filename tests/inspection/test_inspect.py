"""What `rmsprop inspect` says of a checkpoint: numbers worked by hand, and those of the live optimizer."""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import CHECKPOINTS
from torch import nn
from typer.testing import CliRunner

from rmsprop import RMSprop
from rmsprop.cli import app
from rmsprop.conversion import Checkpoint
from rmsprop.conversion.formats import FORMATS
from rmsprop.conversion.owner import find_owner
from rmsprop.diagnose.effective_lr import LayerRecord, Recorder
from rmsprop.inspection import checkpoint
from rmsprop.inspection.checkpoint import Inspection, Row, inspect
from rmsprop.inspection.page import HEADINGS, page, sentences


def invoke(*words):
    """The command's exit code, stdout and everything it printed, on a wide terminal."""
    result = CliRunner().invoke(app, ["inspect", *map(str, words)], env={"COLUMNS": "250", "TERM": "dumb"})
    return result.exit_code, result.stdout, result.output


def saved(folder, v, name="state.pt", **group):
    """A checkpoint of one parameter with these averages, as torch saves it."""
    v = torch.as_tensor(v)
    settings = {"lr": 0.1, "alpha": 0.9, "eps": 1e-8, "momentum": 0, "centered": False, **group}
    state = {0: {"step": torch.tensor(3.0), "square_avg": v}}
    path = Path(folder) / name
    torch.save({"state": state, "param_groups": [{**settings, "params": [0], "param_names": ["w"]}]}, path)
    return path


def test_a_small_state_worked_by_hand(tmp_path):
    """Rates, shares, age and bytes of nine averages: 0, 1e-20, 1, 1, 1, 1, 2500, 1e6, NaN."""
    path = saved(tmp_path, [0.0, 1e-20, 1.0, 1.0, 1.0, 1.0, 2500.0, 1e6, math.nan])
    found = inspect(path)
    (row,) = found.rows
    assert (row.name, row.shape, row.elements, row.group) == ("w", (9,), 9, 0)
    assert (row.step, row.fresh) == (3, pytest.approx(0.729))
    assert (row.slots, row.dtype, row.bytes) == (("square_avg",), "float32", 36)
    assert row.untouched == 1 / 9
    assert row.below_eps == 1 / 8  # √1e-20 is below 1e-8
    assert row.stuck == 1 / 8  # √1e6 is 1000 times the median root, √2500 is 50 times
    assert row.steps_stuck == pytest.approx(2 * math.log(10) / -math.log(0.9))  # until √v has fallen from 1000 to 100
    assert (row.nonfinite, row.nonfinite_params) == (1, 0)
    assert row.lr_median == pytest.approx(0.1, rel=1e-6)
    ordered = sorted([1e-4, 0.002, 0.1, 0.1, 0.1, 0.1, 0.1 / (1e-10 + 1e-8), 0.1 / 1e-8])
    assert row.lr_low == pytest.approx(ordered[0] + 0.7 * (ordered[1] - ordered[0]), rel=1e-6)
    assert row.lr_high == pytest.approx(ordered[6] + 0.3 * (ordered[7] - ordered[6]), rel=1e-6)
    assert found.assumed == []
    assert found.totals()["stuck"] == pytest.approx(1 / 8)


def test_an_average_that_is_kept_corrected_is_not_corrected_again(monkeypatch):
    """HeavyBall's own state is v/(1−αᵗ); Adam's is v."""
    slots = {"w": {"exp_avg_sq": np.full(3, 0.25, dtype=np.float32)}}
    rates = {}
    for source in ("heavyball", "adam"):
        held = Checkpoint(
            find_owner(source), slots=slots, step=1, hyper={"lr": 1.0, "betas": (0.9, 0.75), "eps": 0.0}
        )
        monkeypatch.setattr(checkpoint, "read_checkpoint", lambda *_, held=held, **__: held)
        rates[source] = inspect(Path("state")).rows[0].lr_median
    assert rates == {"heavyball": 2.0, "adam": 1.0}


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"eps_mode": "inside", "eps": 1e-4},
        {"eps_mode": "both", "eps": 1e-4},
        {"eps_mode": "floor", "eps": 1e-2},
        {"centered": True, "momentum": 0.9},
        {"bias_correction": True},
        {"dialect": "tensorflow1", "learning_rate": 1e-3, "momentum": 0.9},
        {"dialect": "keras3"},
        {"dialect": "heavyball"},
    ],
    ids=str,
)
def test_the_rates_are_those_of_the_live_optimizer(tmp_path, words):
    """As `observe` reads them before the state is saved, under every denominator."""
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    optimizer = RMSprop(net.named_parameters(), **words)
    for _ in range(7):
        optimizer.zero_grad()
        net(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    recorder = Recorder(optimizer)
    recorder.record()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    found = inspect(tmp_path / "run.pt")
    assert found.assumed == []
    for record, row in zip(recorder.rows, found.rows, strict=True):
        assert record == LayerRecord(
            row.step,
            row.name,
            pytest.approx(row.lr_median, rel=1e-4),
            pytest.approx(row.lr_low, rel=1e-4),
            pytest.approx(row.lr_high, rel=1e-4),
            row.elements,
        )
    live = sum(x.nbytes for own in optimizer.state.values() for name, x in own.items() if name != "step")
    assert found.totals()["bytes"] == live
    assert found.settings[0]["eps_mode"] == optimizer.param_groups[0]["eps_mode"]


# Of the .npz only these are checkpoints, the others hold what their readers should find; and one is a folder.
NPZ = (
    "chainer_graves.snapshot.npz",
    "chainer_rmsprop.snapshot.npz",
    "optax_rmsprop.state.npz",
    "optax_schedule.state.npz",
)
FILES = [
    path
    for path in sorted(CHECKPOINTS.iterdir())
    if path.is_file() and (path.suffix != ".npz" or path.name in NPZ) and not path.match("mxnet_*.[ps]*")
    if any(row.sniff(path) for row in FORMATS)
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_recorded_checkpoint_is_inspected_and_not_changed(path):
    """All parameters with state, with finite rates, whatever framework wrote them."""
    before = {
        other.name: hashlib.sha256(other.read_bytes()).digest() for other in CHECKPOINTS.iterdir() if other.is_file()
    }
    found = inspect(path, "optax" if path.name in NPZ[2:] else None)
    assert len(found.rows) >= 4
    for row in found.rows:
        assert 0 < row.lr_low <= row.lr_median <= row.lr_high < math.inf
        assert (row.nonfinite, row.nonfinite_params) == (0, 0)
        assert row.bytes >= 4 * row.elements
    assert found.equations[0][-1].startswith("[6] d ← ")
    assert found.title in page(found).replace("&#x27;", "'")
    after = {
        other.name: hashlib.sha256(other.read_bytes()).digest() for other in CHECKPOINTS.iterdir() if other.is_file()
    }
    assert after == before


def test_settings_that_the_file_lacks_are_named_and_can_be_said():
    """optax keeps none: rates are in units of lr until it is given, in optax's words."""
    path = CHECKPOINTS / "optax_rmsprop.msgpack"
    found = inspect(path)
    assert [sentence.split()[0] for sentence in found.assumed] == ["learning_rate", "decay=0.9,", "eps=1e-08,"]
    assert (found.settings[0]["lr"], found.settings[0]["momentum"]) == (1.0, None)
    plain = inspect(CHECKPOINTS / "chainer_rmsprop.snapshot.npz")  # no buffer, no momentum
    assert plain.settings[0]["momentum"] == 0.0
    given = inspect(path, given={"learning_rate": 0.5, "decay": 0.99, "eps": 1e-6, "momentum": 0.9})
    assert given.assumed == []
    assert given.settings[0]["alpha"] == 0.99
    assert given.rows[0].fresh == pytest.approx(0.99**20)
    assert given.rows[0].lr_median == pytest.approx(0.5 * found.rows[0].lr_median, rel=0.2)


def test_groups_keep_their_own_settings(tmp_path):
    """A rate of its own for each group, and the group's number in its rows."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = RMSprop([{"params": [p]}, {"params": [q], "lr": 1.0, "alpha": 0.5}], lr=0.1)
    p.grad = q.grad = torch.ones(3)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "run.pt")
    found = inspect(tmp_path / "run.pt")
    assert [(row.group, round(row.lr_median, 3), row.fresh) for row in found.rows] == [
        (0, 1.0, 0.99),
        (1, 1.414, 0.5),
    ]


@pytest.mark.parametrize(
    ("v", "words", "field", "expected"),
    [
        ([0.0] * 4, {}, "untouched", 1.0),
        ([0.0] * 4, {"eps": 0.0}, "lr_median", math.inf),
        ([1e-6] * 4, {"eps": 1e-2}, "below_eps", 1.0),
        ([math.inf, 1.0, 1.0, 1.0], {}, "nonfinite", 1),
        ([math.nan] * 4, {}, "lr_median", math.nan),
        ([], {}, "lr_median", math.nan),
        ([1e12] * 4, {}, "stuck", 0.0),  # a spike that met all alike
        ([4.0 + 0.0j] * 2, {}, "elements", 4),
        ([1.0] * 4, {"alpha": 0.0}, "steps_stuck", 0.0),
    ],
    ids=str,
)
def test_edges(tmp_path, v, words, field, expected):
    """Nothing touched, no ε, all NaN, no elements, complex numbers."""
    (row,) = inspect(saved(tmp_path, v, **words)).rows
    assert getattr(row, field) == pytest.approx(expected, nan_ok=True)


def test_what_is_left_of_the_start_is_not_touched(tmp_path):
    """Under v₀ = 1 an average of αᵗ has met no gradient, even where float32 has rounded it to nothing."""
    path = saved(tmp_path, [0.729, 0.73, 5.0], dialect="tensorflow1")
    (row,) = inspect(path).rows
    assert row.untouched == pytest.approx(1 / 3)


def test_the_command_prints_a_table():
    """Headings, a line for each parameter, totals and what was assumed."""
    code, text, _ = invoke(CHECKPOINTS / "torch_rmsprop.pt")
    assert code == 0
    for part in (*HEADINGS, "conv.weight", "4×2×3×3", "888 bytes of state", "after 20 steps", "lr=0.0078125"):
        assert part in text
    code, text, _ = invoke(CHECKPOINTS / "optax_rmsprop.msgpack")
    assert (
        "assumed: decay=0.9, the default of optax, since the file has no value; override it with --set decay=..."
        in text
    )


def test_the_command_prints_json(tmp_path):
    """One line, without NaN or Infinity, which JSON does not have."""
    code, text, _ = invoke(saved(tmp_path, [0.0, math.nan], eps=0.0), "--json", "--set", "lr=0.5")
    assert code == 0
    record = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert record["rows"][0]["lr_median"] is None
    assert record["totals"]["nonfinite"] == 1
    assert record["settings"][0]["lr"] == 0.5
    assert record["assumed"] == []


def test_the_page_is_whole_and_escapes_names(tmp_path):
    """No script, no address, nothing that a browser would fetch; a parameter's name is text."""
    p = nn.Parameter(torch.ones(3))
    optimizer = RMSprop([("<script>alert(1)</script>", p)], lr=0.1)
    p.grad = torch.tensor([1.0, math.inf, 1e-12])
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "run.pt")
    code, text, output = invoke(tmp_path / "run.pt", "--html", tmp_path / "out" / "page.html")
    assert code == 0, output
    html = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert "wrote" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert not re.search(r"<script|https?:|src=|href=|url\(|@import|<link", html)
    assert html.count("<svg") == 1
    assert 'class="loud"' in html


@pytest.mark.parametrize(
    ("make", "words", "says"),
    [
        (lambda folder: folder / "none.pt", [], "there is no file"),
        (lambda folder: _file(folder, b"hello"), [], "is a text file"),
        (lambda folder: _model(folder), [], "there is nothing to inspect"),
        (lambda folder: saved(folder, [1.0]), ["--set", "lr"], "is not a setting; write it as NAME=VALUE"),
        (lambda folder: saved(folder, [1.0]), ["--set", "rho=0.9"], "takes no rho=0.9 under dialect='torch'"),
        (lambda folder: saved(folder, [1.0]), ["--set", "alpha=2"], "Invalid alpha value: 2; alpha takes"),
        (lambda folder: saved(folder, [1.0]), ["--from", "keras9"], "Unknown dialect"),
        (lambda folder: saved(folder, [1.0]), ["--html", "{folder}/state.pt/page.html"], "cannot be"),
    ],
    ids=["missing", "strange", "model", "no value", "foreign word", "range", "dialect", "page"],
)
def test_the_command_refuses_in_one_sentence(tmp_path, make, words, says):
    """Exit code 2 and no traceback."""
    code, _, output = invoke(make(tmp_path), *(word.format(folder=tmp_path) for word in words))
    assert code == 2, output
    assert says in " ".join(re.sub(r"[│╭╮╰╯─]", " ", output).split())
    assert "Traceback" not in output


def test_a_sam_wrapper_without_averages_is_refused(tmp_path):
    """A wrapper's own state dict holds old parameters, and the averages are in the inner optimizer's."""
    groups = [{"lr": 0.1, "alpha": 0.9, "eps": 1e-8, "rho": 0.05, "adaptive": False, "params": [0]}]
    for state in ({0: {"old_p": torch.ones(3)}}, {0: {"old_p": torch.ones(3), "step": torch.tensor(2.0)}}):
        torch.save({"state": state, "param_groups": groups}, tmp_path / "sam.pt")
        code, _, output = invoke(tmp_path / "sam.pt")
        assert code == 2
        assert "holds the state of another optimizer, which keeps" in output
        assert "Traceback" not in output


@pytest.mark.parametrize("step", [None, 0, 1, 20])
@pytest.mark.parametrize("count", [1, 2])
def test_every_sentence_of_an_inspection_is_whole(step, count):
    """Singular and plural, an unknown step count, and unknown settings."""
    row = Row("w", 0, (1,), 1, step, None, 1.0, 1.0, 1.0, None, 0.0, 0.0, 0.0, 0, 0, ("square_avg",), "float32", 4)
    made = Inspection("f", "torch", "T", [{"lr": 1.0, "momentum": None}], [], ["a sentence"], [row] * count)
    first, settings, totals, assumed = sentences(made)
    steps = {None: "an unknown number of steps", 1: "1 step"}.get(step, f"{step} steps")
    assert first == f"f: T, after {steps}"
    assert settings == "group 0: lr=1, momentum=unknown"
    assert totals.startswith("1 parameter, 1 element, " if count == 1 else "2 parameters, 2 elements, ")
    assert "untouched ?, 0 NaN or infinite" in totals
    assert assumed == "assumed: a sentence"


def _file(folder, content):
    (folder / "strange.bin").write_bytes(content)
    return folder / "strange.bin"


def _model(folder):
    torch.save(nn.Linear(2, 2).state_dict(), folder / "model.pt")
    return folder / "model.pt"
