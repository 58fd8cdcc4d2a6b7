"""The command line as a whole; each command's behavior has its own file."""

import json
import runpy
import sys

import pytest
import torch
import typer
from cases import mostly_long
from commands import invoke
from paths import CHECKPOINTS, DOCS
from typer.testing import CliRunner

import rmsprop
from rmsprop.cli import app
from rmsprop.cli.dialects import show
from rmsprop.dialects import DIALECTS, UNFIT
from rmsprop.dialects.describe import describe


def test_every_command_has_help_with_examples():
    """--help lists the commands, and each shows examples that begin with its name."""
    code, text = invoke("--help")
    assert code == 0
    for command in app.registered_commands:
        name = command.callback.__name__
        assert name in text
        code, own = invoke(name, "--help")
        assert code == 0
        assert f"rmsprop {name}" in own


COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_whole_at_80_columns(name):
    """It has every word of the docstring, the options and their defaults, and each example on one line."""
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"})
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= 80
    shown = " ".join(done.output.split())
    text = COMMANDS[name].callback.__doc__
    assert " ".join(text.split()) in shown
    for param in COMMANDS[name].params:
        assert " ".join((param.help or "").split()) in shown
        if isinstance(param.show_default, str):
            assert f"({param.show_default})" in shown
    for example in text.partition("Examples:\n\n")[2].split("\n\n"):
        assert f"  {example.strip()}" in lines


def test_the_list_of_commands_is_whole_at_80_columns():
    """Each command has its summary, not cut at the end of a line."""
    done = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"})
    assert max(map(len, done.output.splitlines())) <= 80
    shown = " ".join(done.output.split())
    for name, command in COMMANDS.items():
        summary = command.callback.__doc__.partition("\n\n")[0]
        assert f" {name} {' '.join(summary.split())}" in shown


def test_a_dialect_is_named_in_any_case(tmp_path):
    """The commands take Keras3 for keras3, and quote an unknown name as it was given."""
    assert invoke("dialects", "TensorFlow1") == invoke("dialects", "tensorflow1")
    translated = invoke("translate", "--from", "TensorFlow1", "--to", "Torch", "lr=.1")
    assert translated == invoke("translate", "--from", "tensorflow1", "--to", "torch", "lr=.1")
    assert translated[0] == 0
    given = str(CHECKPOINTS / "torch_rmsprop.pt")
    for command in (["inspect", given], ["convert", given, str(tmp_path / "x.pt"), "--to", "Timm", "--dry-run"]):
        code, text = invoke(*command, "--from", "TORCH")
        assert code == 0, text
    assert "Unknown dialect: 'Torch9'" in invoke("dialects", "Torch9")[1]


def test_the_version_is_the_packages():
    """--version prints it and stops."""
    assert invoke("--version") == (0, f"rmsprop {rmsprop.__version__}\n")


def said(text):
    """Return a text without spaces and backticks, so that line breaks do not matter."""
    return "".join(text.replace("`", "").split())


def test_dialects_are_listed():
    """The list has two lines per dialect and the rules that do not fit, within 100 columns."""
    code, text = invoke("dialects")
    assert code == 0
    assert max(map(len, text.splitlines())) <= 100
    lines = [line.split()[0] for line in text.splitlines() if line]
    for row in DIALECTS.values():
        assert lines.count(row.name) == 2
    for name, reason in UNFIT.items():
        assert said(f"- {name}: {reason}.") in said(text)


@pytest.mark.parametrize("name", mostly_long(DIALECTS, lambda i, _: i % 3 == 0))
def test_a_dialect_is_shown_in_full(name):
    """It has its equation, arguments, states, limits, refusals, traps, and source, within 100 columns."""
    row = DIALECTS[name]
    code, text = invoke("dialects", name)
    assert code == 0
    assert max(map(len, text.splitlines())) <= 100
    limits = (part for word, limit in row.limits.items() for part in (word, limit.reason))
    parts = (row.title, row.source, row.call, row.example, *row.arguments, *row.states, *row.refused, *row.traps)
    for part in (*parts, *row.refused.values(), *limits):
        assert said(part) in said(text)
    given = {"lr": 3.0} if row.hyper.lr is None else {}
    optimizer = rmsprop.RMSprop([torch.zeros(1, requires_grad=True)], dialect=name, **given)
    equation = [line for line in optimizer.explain().splitlines() if line.startswith("    [")]
    assert "\n".join(equation).replace("3·u", "lr·u") in text
    assert text == show(f"{row.name}: {row.title}", describe(row)) + "\n"


def test_a_rule_that_does_not_fit_is_refused_by_name():
    """Exit code 2 and the reason, whatever the case of the name."""
    code, text = invoke("dialects", "CNTK")
    assert code == 2
    assert "dialect='CNTK' is not offered: CNTK's rmsprop adapts a step size per element" in text


def test_an_unknown_dialect_is_one_sentence():
    """Exit code 2, the names that exist, and no traceback."""
    code, text = invoke("dialects", "tensorflow9")
    assert code == 2
    assert "Unknown dialect: 'tensorflow9' (did you mean 'tensorflow1'?); choose one of 'torch'" in text
    assert "Traceback" not in text


def test_python_dash_m_runs_it(monkeypatch, capsys):
    """`python -m rmsprop --version` is the same program."""
    monkeypatch.setattr(sys, "argv", ["rmsprop", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("rmsprop", run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"rmsprop {rmsprop.__version__}\n"


def test_a_missing_extra_is_one_sentence_and_a_broken_module_is_not_hidden(monkeypatch):
    """Only missing packages of the extra are reported as such."""
    from rmsprop.__main__ import main

    monkeypatch.setitem(sys.modules, "rmsprop.cli", None)
    with pytest.raises(ModuleNotFoundError, match="rmsprop"):
        main()
    monkeypatch.delitem(sys.modules, "rmsprop.cli")
    for name in [name for name in sys.modules if name.startswith("rmsprop.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == "The command line needs typer: pip install 'rmsprop[cli]'"


def test_the_page_about_installation_shows_what_check_prints():
    """The lines about float32 tensors, which depend on neither versions nor processors."""
    page = (DOCS / "install.md").read_text(encoding="utf-8")
    shown = page[page.index("cpu, float32\n") :].partition("```")[0]
    assert shown in invoke("check")[1]


def test_check_reports_the_backends_of_each_kind_of_tensor():
    """It prints versions, and a line per backend for each dtype."""
    code, text = invoke("check")
    assert code == 0
    assert f"rmsprop {rmsprop.__version__}, torch " in text
    for part in ("cpu, float32", "cpu, bfloat16", "cpu, complex64", "eager: steps them", "cpu: "):
        assert part in text


def test_the_benchmark_prints_a_table_and_writes_json(tmp_path):
    """A short run of the smallest case writes the times of all optimizers and the machine, without verdicts."""
    out = tmp_path / "times.json"
    code, text = invoke("bench", "--cases", "rl", "--threads", "1", "--seconds", "0.02", "--out", str(out))
    assert code == 0, text
    saved = json.loads(out.read_text())
    assert saved["machine"]["torch"]
    assert list(saved) == ["machine", "unit", "results"]
    assert {"rmsprop", "torch loop", "torch foreach", "SGD fused", "Adam fused"} <= set(saved["results"][0]["times"])


def test_the_benchmark_prints_json_alone(tmp_path, monkeypatch):
    """With --json, stdout is one JSON object: the same record that --out writes."""
    from rmsprop.bench import cpu

    monkeypatch.setattr(cpu, "turn_about", lambda steps, _: dict.fromkeys(steps, cpu.summary([1.0])))
    out = tmp_path / "times.json"
    words = ["bench", "--cases", "rl", "--threads", "1", "--json", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(out.read_text())
    assert done.stderr == f"wrote {out}\n"


def test_the_benchmark_takes_no_more_threads_than_cores(monkeypatch):
    """More would measure the scheduler: one sentence with the number of cores, before anything is timed."""
    from rmsprop.bench import cpu

    monkeypatch.setattr(cpu, "cores", lambda: 2)
    code, text = invoke("bench", "--cases", "rl", "--threads", "1,3")
    assert code == 2
    assert "--threads 1,3: this process has 2 cores; give at most 2, or all" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--cases", "gpt5"), "'gpt5' is unknown; choose from rl"),
        (("--threads", "0"), "--threads takes numbers from 1"),
        (("--variants", "half"), "'half' is unknown; choose from plain, full"),
    ],
    ids=str,
)
def test_the_benchmark_refuses_unknown_choices(words, says):
    """One sentence and exit code 2."""
    code, text = invoke("bench", *words)
    assert code == 2
    assert says in text


@pytest.mark.parametrize(
    "words",
    [
        "inspect folder",
        "inspect file",
        "inspect IN --html folder",
        "inspect IN --html file/x.html",
        "convert folder x.pt",
        "convert IN folder --force",
        "convert IN file/x.pt",
        "convert IN x.pt --report folder",
        "convert IN x.pt --report file/x.json",
        "convert IN x.pt --map folder",
        "convert IN x.pt --model folder",
        "race ravine --out file",
        "demo --out file",
        "demo --data folder",
        pytest.param("translate --from torch --to timm lr=.1 --plot folder", marks=pytest.mark.long),
        pytest.param("translate --from torch --to timm lr=.1 --plot file/x.png", marks=pytest.mark.long),
        "bench --cases rl --seconds 0.01 --threads 1 --out folder",
        "check folder",
    ],
)
def test_a_file_that_cannot_be_read_or_written_is_one_sentence(words, tmp_path, monkeypatch):
    """A folder in place of a file, or a file in place of a folder, is named with exit code 2 and no traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    given = str(CHECKPOINTS / "torch_rmsprop.pt")
    done = CliRunner().invoke(app, words.replace("IN", given).split(), env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    named = "folder" if "folder" in words else "file"
    sentence = " ".join(done.output.rpartition("Error")[2].replace("│", " ").split())
    assert named in sentence
    assert sorted(path.name for path in tmp_path.iterdir()) in (["file", "folder"], ["file", "folder", "x.pt"])


@pytest.mark.parametrize(
    ("words", "package"),
    [
        ("race ravine --format png", "matplotlib"),
        ("demo --epochs 1", "sklearn"),
        ("translate --from torch --to timm lr=.1 --plot x.png", "matplotlib"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_extra(words, package, tmp_path, monkeypatch):
    """The message names the package and the extra, without a traceback."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == package or name in USERS]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    done = CliRunner().invoke(app, words.split(), env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 2
    assert f"needs {package}: pip install 'rmsprop[cli]'" in done.output


USERS = (
    "rmsprop.demo.figures",
    "rmsprop.translation.figure",
    "rmsprop.race.figures",
    "rmsprop.race.page",
    "rmsprop.demo.page",
    "rmsprop.demo.data",
)
