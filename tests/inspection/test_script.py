"""`rmsprop check SCRIPT`: the script runs as Python would run it, and its RMSprop is asked what looks wrong."""

import json
import os
import sys
import threading
from pathlib import Path

import alone
import pytest
import torch
from typer.testing import CliRunner

import rmsprop
from rmsprop.cli import app
from rmsprop.inspection.script import check

TRAIN = """
import sys
import torch
{imports}

def main():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = {make}(net.parameters(), {words})
    for step in range({steps}):
        optimizer.zero_grad()
        net(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    print("loss", net(torch.ones(1, 16)).sum().item())

if __name__ == "__main__":
    main()
"""


def script(folder, text=TRAIN, **words):
    """A training script in a file of its own."""
    given = {"imports": "", "make": "torch.optim.RMSprop", "words": "lr=0.01, momentum=0.937", "steps": 12, **words}
    path = Path(folder) / "train.py"
    path.write_text(text.format(**given) if text is TRAIN else text, encoding="utf-8")
    return path


def names(report):
    return [seen.finding.name for one in report.optimizers for seen in one.found()]


@pytest.mark.parametrize(
    ("imports", "make"),
    [
        ("from torch.optim import RMSprop", "RMSprop"),
        ("import torch.optim as optim", "optim.RMSprop"),
        ("from torch.optim.rmsprop import RMSprop", "RMSprop"),
        ("", 'getattr(torch.optim, "RMSprop")'),
        ("import rmsprop", "rmsprop.RMSprop"),
        ("class Own(torch.optim.RMSprop): pass", "Own"),
    ],
    ids=lambda words: words or "-",
)
def test_every_way_to_the_class_is_watched(tmp_path, capsys, imports, make):
    """torch's class by any name, this package's, and subclasses; afterwards torch's is back."""
    before = torch.optim.RMSprop, rmsprop.RMSprop.__init__, list(sys.path), sys.argv
    report = check(script(tmp_path, imports=imports, make=make))
    assert (torch.optim.RMSprop, rmsprop.RMSprop.__init__, sys.path, sys.argv) == before
    assert torch.optim.RMSprop is not rmsprop.RMSprop
    (one,) = report.optimizers
    assert (one.made, one.dialect, one.steps, one.linted) == ("train.py:9", "torch", 12, [0, 1, 10, 12])
    assert names(report)[0] == "momentum"
    assert report.exit == 0
    assert capsys.readouterr().out.startswith("loss ")


def test_the_run_is_the_scripts_own(tmp_path, capsys):
    """It prints to the last digit what it prints with this package's class and nobody watching."""
    check(script(tmp_path))
    watched = capsys.readouterr().out
    path = script(tmp_path, imports="from rmsprop import RMSprop", make="RMSprop")
    exec(compile(path.read_text(encoding="utf-8"), "train.py", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == watched


def test_the_script_is_main_with_its_arguments_and_its_neighbours(tmp_path, capsys):
    """__name__, __file__, sys.argv, sys.path[0], and pickling of what __main__ defines."""
    (tmp_path / "neighbour.py").write_text("x = 5", encoding="utf-8")
    path = script(
        tmp_path,
        "import pickle, sys, neighbour\nclass A: pass\n"
        "print(__name__, sys.argv[1:], neighbour.x, __file__ == sys.argv[0])\n"
        "print(type(pickle.loads(pickle.dumps(A()))) is A)",
    )
    report = check(path, ["--lr", "1", "-h"])
    assert capsys.readouterr().out == "__main__ ['--lr', '1', '-h'] 5 True\nTrue\n"
    assert "It created no RMSprop" in str(report)
    sys.modules.pop("neighbour")


@pytest.mark.parametrize(
    ("ending", "code", "ended", "stderr"),
    [
        ("", 0, "ran to its end", ""),
        ("import sys; sys.exit()", 0, "exited with 0", ""),
        ("import sys; sys.exit(3)", 3, "exited with 3", ""),
        ("import sys; sys.exit('no data')", 1, "exited with 1", "no data\n"),
        ("def f(): 1 / 0\nf()", 1, "raised ZeroDivisionError", "ZeroDivisionError: division by zero\n"),
        ("f(", 1, "raised SyntaxError", "SyntaxError: '(' was never closed\n"),
        ("raise KeyboardInterrupt", 130, "was interrupted", ""),
    ],
    ids=str,
)
def test_the_exit_code_is_kept(tmp_path, capsys, ending, code, ended, stderr):
    """And a traceback begins in the script, as Python's own does."""
    report = check(script(tmp_path, ending))
    assert (report.exit, report.ended) == (code, ended)
    printed = capsys.readouterr().err
    assert printed.endswith(stderr)
    if "raised" in ended:
        head = "" if "SyntaxError" in ended else "Traceback (most recent call last):\n"
        assert printed.startswith(head + '  File "' + str(tmp_path / "train.py"))
        assert "runpy" not in printed


def test_it_stops_after_the_steps_that_were_asked_for(tmp_path, capsys):
    """Even inside `except Exception`; the run's length is then not held against alpha."""
    text = TRAIN.format(imports="", make="torch.optim.RMSprop", words="", steps=1000)
    text = text.replace("    main()\n", "    try:\n        main()\n    except Exception:\n        print('caught')\n")
    report = check(script(tmp_path, text), limit=5)
    assert (report.exit, report.ended) == (0, "was stopped after 5 steps, as requested")
    assert report.optimizers[0].linted == [0, 1, 5]
    assert "alpha_long" not in names(report)
    assert capsys.readouterr().out == ""


def test_a_run_shorter_than_alphas_memory_is_noted(tmp_path):
    """Of a run that came to its end the length is known."""
    assert "alpha_long" in names(check(script(tmp_path)))


def test_an_optimizer_that_never_stepped_is_asked_all_the_same(tmp_path):
    """By its numbers alone."""
    report = check(script(tmp_path, steps=0))
    (one,) = report.optimizers
    assert (one.steps, one.linted) == (0, [0])
    assert "momentum" in names(report)


def test_of_many_optimizers_the_last_are_held(tmp_path, monkeypatch):
    """Each is reported; all but the last few may be freed, once they were asked."""
    monkeypatch.setattr("rmsprop.inspection.script.KEPT", 2)
    text = """
import gc, weakref, torch
freed = []
for i in range(5):
    p = torch.nn.Parameter(torch.full((3, 3), 0.1))
    optimizer = torch.optim.RMSprop([p], lr=1.0)
    weakref.finalize(optimizer, freed.append, i)
    p.grad = torch.ones(3, 3)
    optimizer.step()
del optimizer
gc.collect()
print(freed)
"""
    report = check(script(tmp_path, text))
    assert [one.steps for one in report.optimizers] == [1] * 5
    assert all("first_step" in [seen.finding.name for seen in one.found()] for one in report.optimizers)


def test_other_optimizers_and_other_threads_are_let_be(tmp_path, capsys):
    """SGD steps without being asked; an RMSprop that steps in a thread is watched."""
    text = """
import threading, torch
p, q = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
p.grad, q.grad = torch.ones(3, 3), torch.ones(3, 3)
torch.optim.SGD([q], lr=0.1).step()
optimizer = torch.optim.RMSprop([p], lr=1e-3)
thread = threading.Thread(target=optimizer.step)
thread.start()
thread.join()
print(optimizer.state[p]["step"].item())
"""
    before = threading.active_count()
    report = check(script(tmp_path, text))
    assert [one.steps for one in report.optimizers] == [1]
    assert capsys.readouterr().out == "1.0\n"
    assert threading.active_count() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")  # of JAX, if it was imported
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12
def test_a_forked_child_is_let_be(tmp_path, capfd):
    """It trains with the same class, and reports nothing."""
    text = """
import os, torch
p = torch.nn.Parameter(torch.ones(3, 3))
optimizer = torch.optim.RMSprop([p], lr=1e-3)
p.grad = torch.ones(3, 3)
child = os.fork()
if child == 0:
    optimizer.step()
    torch.optim.RMSprop([p]).step()
    os.write(1, b"child stepped")
    os._exit(0)
os.waitpid(child, 0)
"""
    report = check(script(tmp_path, text))
    assert [(one.steps, one.linted) for one in report.optimizers] == [(0, [0])]
    assert capfd.readouterr().out == "child stepped"


def test_the_sightings_say_when(tmp_path):
    """Before the first step, and after which."""
    report = check(script(tmp_path, words="lr=0.1"))
    found = {seen.finding.name: seen.steps for seen in report.optimizers[0].found()}
    assert found["first_step"] == [0]
    assert "warning first_step, group 0, after step 0\n    seen: " in str(report)


@pytest.mark.parametrize(
    ("make", "words", "named"),
    [
        ("torch.optim.RMSprop", "lr=0.1", "bias_correction="),
        ("torch.optim.RMSprop", "lr=0.01, eps=1e-3, alpha=0.999", "bias_correction="),
        ("torch.optim.RMSprop", "lr=1e-5, eps=0, alpha=0.5", None),
        ("rmsprop.RMSprop", 'dialect="keras3", learning_rate=0.1', None),
    ],
)
def test_advice_that_torchs_rmsprop_cannot_take_names_the_class_that_can(tmp_path, make, words, named):
    """The last line says so, where an advised argument is not one of torch's class and the dialect is torch's."""
    report = check(script(tmp_path, imports="import rmsprop", make=make, words=words))
    *_, last = str(report).splitlines()
    line = f"torch.optim.RMSprop does not take {named}. rmsprop's does, and replaces it: from rmsprop import RMSprop."
    assert (last == line) == (named is not None)
    assert named is not None or "torch.optim.RMSprop does not take" not in str(report)
    assert names(report)


COMMAND = "from rmsprop.__main__ import main\nmain()"


def test_the_command_keeps_stdout_and_the_exit_code_apart_from_the_findings(tmp_path):
    """In a process of its own: text on stderr; with --json one last line on stdout. Options after SCRIPT are its."""
    path = script(
        tmp_path,
        TRAIN.format(imports="", make="torch.optim.RMSprop", words="lr=0.1", steps=2) + "\n    sys.exit(7)\n",
    )
    plain = alone.run(COMMAND, "check", path, "--steps", 1)
    assert plain.returncode == 7, plain.stderr
    assert plain.stdout.count("\n") == 1
    assert plain.stdout.startswith("loss ")
    assert plain.stderr.startswith(
        f"rmsprop check: {path} exited with 7\ntrain.py:9: RMSprop, dialect torch, 2 steps"
    )
    stopped = alone.run(COMMAND, "check", "--json", "--steps", 1, path)
    assert (stopped.returncode, stopped.stderr) == (0, "")
    record = json.loads(stopped.stdout)
    assert record["optimizers"][0]["steps"] == 1
    assert {"name", "severity", "group", "seen", "change", "steps"} == set(record["optimizers"][0]["findings"][0])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere.py"], "there is no file 'nowhere.py'"),
        (["--json"], "go with a script"),
        (["--strict"], "--json, --strict and --steps go with a script"),
        (["--steps", "0"], "Invalid value for"),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_sentence(words, says):
    """Exit code 2, and nothing runs."""
    result = CliRunner().invoke(app, ["check", *words], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.parametrize(
    ("words", "ending", "code"),
    [
        ("lr=0.1", "", 1),  # the warning first_step
        ("lr=1e-4", "", 0),
        ("lr=1e-4", "raise SystemExit(3)", 3),
    ],
)
def test_strict_turns_findings_into_an_exit_code(tmp_path, words, ending, code):
    """A warning exits with 1, none with 0, and a script that fails keeps its own code."""
    train = TRAIN.format(imports="", make="torch.optim.RMSprop", words=words, steps=2)
    path = script(tmp_path, f"{train}\n{ending}\n")
    result = CliRunner().invoke(app, ["check", "--strict", str(path)])
    assert result.exit_code == code, result.output
    assert "finding" in result.stderr


def test_strict_wants_an_optimizer(tmp_path):
    """A script that creates no RMSprop was not checked, so it does not pass."""
    path = script(tmp_path, "print('hello')")
    assert CliRunner().invoke(app, ["check", str(path)]).exit_code == 0
    assert CliRunner().invoke(app, ["check", "--strict", str(path)]).exit_code == 1


def test_the_command_in_this_process(tmp_path):
    """The script's output and the report, and the script's code."""
    path = script(tmp_path, "import torch\nprint('hello')\nraise SystemExit(4)")
    result = CliRunner().invoke(app, ["check", "--json", str(path)])
    assert result.exit_code == 4
    hello, record = result.stdout.splitlines()
    assert hello == "hello"
    assert json.loads(record) == {"script": str(path), "exit": 4, "ended": "exited with 4", "optimizers": []}


LOOP = """
import torch
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
other = torch.nn.Linear(16, 1)
def backward(model=net):
    model(torch.randn(8, 16)).square().mean().backward()
optimizer = torch.optim.RMSprop(net.parameters(), lr=1e-3)
for step in range({steps}):
    {body}
"""
ZERO = "for p in net.parameters():\n        if p.grad is not None: p.grad.data.zero_()\n    "


def found_in(tmp_path, body, steps=30):
    """The findings of a loop, but for the note on its length."""
    report = check(script(tmp_path, LOOP.format(body=body, steps=steps)))
    assert report.exit == 0
    return [name for name in names(report) if name != "alpha_long"]


@pytest.mark.parametrize(
    "body",
    [
        "backward(); optimizer.step()",
        "backward(); backward(); optimizer.step()",
        "other.zero_grad(); backward(); optimizer.step()",
        "backward(); torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0); optimizer.step()",
        "optimizer.step(lambda: backward())",
    ],
    ids=["plain", "twice", "another's", "clipped", "closure"],
)
def test_a_forgotten_zero_grad_is_found(tmp_path, body):
    """The gradient that a step used is still there when the next backward pass adds to it."""
    assert found_in(tmp_path, body) == ["zero_grad"]


@pytest.mark.parametrize(
    "body",
    [
        "optimizer.zero_grad(); backward(); optimizer.step()",
        "backward(); optimizer.step(); optimizer.zero_grad(set_to_none=False)",
        "net.zero_grad(); [backward() for _ in range(4)]; optimizer.step()",
        "backward()\n    if step % 4 == 3: optimizer.step(); optimizer.zero_grad()",
        ZERO + "backward(); backward(); optimizer.step()",
        "optimizer.zero_grad(); optimizer.step(lambda: backward())",
        "backward(); optimizer.step(); [p.grad.mul_(0.9) for p in net.parameters()]",
        "optimizer.zero_grad(); backward(); optimizer.step(); optimizer.step()",
        # an adversary's pass leaves gradients here, which are reset before this optimizer's own
        "optimizer.zero_grad(); backward(); optimizer.step(); backward()",
        "gs = torch.autograd.grad(net(torch.ones(1, 16)).sum(), list(net.parameters()))\n"
        "    for p, g in zip(net.parameters(), gs): p.grad = p.grad.copy_(g) if p.grad is not None else g\n"
        "    optimizer.step()",
    ],
    ids=["before", "after", "accumulated", "every 4th", "data", "closure", "decayed", "two steps", "gan", "grad"],
)
def test_accumulation_that_is_meant_is_no_finding(tmp_path, body):
    """A gradient that is reset in any way and at any time between two steps, or that no backward pass adds to."""
    assert found_in(tmp_path, body) == []


@pytest.mark.parametrize(
    "body",
    ["backward(other); optimizer.step()", "net(torch.ones(1, 16)); optimizer.step()"],
    ids=["another model", "no backward"],
)
def test_an_optimizer_that_never_met_a_gradient_is_an_error(tmp_path, body):
    """Fifty steps, none of which moved anything."""
    report = check(script(tmp_path, LOOP.format(body=body, steps=50)))
    worst = report.optimizers[0].found()[0]
    assert (worst.finding.name, worst.finding.severity, worst.steps) == ("no_gradient", "error", [10, 50])
    assert "in the last 50 steps" in worst.finding.seen or "in the last 10 steps" in worst.finding.seen


def test_momentum_that_a_schedule_turns_on_is_found_when_it_does(tmp_path):
    """Between the steps at which every optimizer is asked, too, and if it is turned off again."""
    body = (
        "optimizer.zero_grad(); backward(); optimizer.step()\n"
        "    optimizer.param_groups[0]['momentum'] = 0.9 if 15 <= step < 20 else 0.0"
    )
    report = check(script(tmp_path, LOOP.format(body=body, steps=30)))
    seen = {(s.finding.name, s.finding.severity): s.steps for s in report.optimizers[0].found()}
    assert seen["momentum_switched", "warning"] == [16]
    assert 21 in seen["momentum_switched", "note"]


def test_watching_gradients_leaves_the_model_as_it_was(tmp_path, capsys):
    """No hook stays, and none stands in the way of saving or copying the model in mid-run."""
    text = LOOP.format(body="backward(); optimizer.step(); copy.deepcopy(net); pickle.dumps(net)", steps=3)
    text = "import copy, pickle, warnings\nwarnings.simplefilter('error')\n" + text
    text += (
        "\noptimizer.step(); print([p._backward_hooks or p._post_accumulate_grad_hooks for p in net.parameters()])"
    )
    assert check(script(tmp_path, text)).exit == 0
    assert "Hook" not in capsys.readouterr().out
