"""`rmsprop demo` is a fair and reproducible comparison with complete files."""

import csv
import json
import math
import queue
import re
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import rmsprop
from rmsprop.cli.demo import demo as command
from rmsprop.demo.data import load_digits, load_file
from rmsprop.demo.processes import train_all
from rmsprop.demo.training import (
    BATCH,
    OPTIMIZERS,
    Run,
    Settings,
    available_devices,
    cells,
    check_device,
    evaluate,
    make_network,
    make_optimizer,
    one_thread,
    results,
    summary,
    train,
)

app = typer.Typer()
app.command()(command)


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread, since two threads on busy cores mostly wait for each other."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def digits():
    """Return the digits, split for seed 0."""
    return load_digits(0)


@pytest.fixture
def small(tmp_path):
    """Write a table of 40 rows, 3 features, and 2 classes, which is one batch."""
    x = np.random.default_rng(0).normal(size=(40, 3))
    np.savez(tmp_path / "small.npz", X=x, y=(x[:, 0] > 0).astype(int))
    return tmp_path / "small.npz"


def trained(name, dataset, lr=None, epochs=1, seed=0):
    """Return a finished run."""
    run = Run(name, OPTIMIZERS[name].lr if lr is None else lr, seed)
    for _ in train(run, dataset, Settings(epochs, seed)):
        pass
    return run


def invoke(*words):
    """Return the command's result and its error text on one line."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result, re.sub(r"[│╭╮╰╯─\s]+", " ", result.stderr)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_the_digits(digits, name):
    """With its default learning rate each optimizer gets 85 % of the test digits right after 4 epochs."""
    run = trained(name, digits, epochs=4)
    assert run.test_accuracies[-1] > 0.85
    assert run.train_loss < run.losses[0]
    assert run.diverged_at is None
    assert run.seconds > 0
    assert run.step_us > 0


def test_same_start_for_all(digits):
    """All optimizers start from the same weights on the same batch: their first losses are equal."""
    firsts = set()
    for name in OPTIMIZERS:
        run = Run(name, OPTIMIZERS[name].lr)
        next(train(run, digits, Settings()))
        firsts.add(run.losses[0])
    assert len(firsts) == 1


def test_same_batches_for_all(digits):
    """With negligible learning rates, all optimizers have the same losses, since the batches are the same."""
    curves = [trained(name, digits, lr=1e-12).losses for name in OPTIMIZERS]
    for losses in curves[1:]:
        np.testing.assert_allclose(losses, curves[0], rtol=1e-5)


def test_same_seed_same_run(digits):
    """One seed gives one run, to the last bit; another seed another."""
    first, same, other = (trained("rmsprop", digits, seed=seed) for seed in (5, 5, 6))
    assert first.losses == same.losses
    assert first.test_losses == same.test_losses
    assert first.layers == same.layers
    assert first.losses != other.losses


def test_each_row_once_an_epoch(digits):
    """Every epoch passes over each training row once, in batches of even size."""
    from rmsprop.demo.training import _batches

    batches = list(_batches(len(digits.y_train), 2, 0))
    half = len(batches) // 2
    for epoch in (batches[:half], batches[half:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(len(digits.y_train)))
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= BATCH
    assert max(sizes) - min(sizes) <= 1
    assert not torch.equal(batches[0], batches[half])


def test_it_is_our_rmsprop():
    """The optimizer under test is this package's, and the others are torch's."""
    param = torch.nn.Parameter(torch.ones(1))
    made = {name: make_optimizer(name, [("p", param)], 0.1) for name in OPTIMIZERS}
    assert type(made["rmsprop"]) is rmsprop.RMSprop
    assert type(made["adam"]) is torch.optim.Adam
    assert made["momentum"].param_groups[0]["momentum"] == 0.9
    assert made["sgd"].param_groups[0]["momentum"] == 0
    with pytest.raises(ValueError, match="There is no optimizer 'lion'; choose from sgd, momentum, rmsprop, adam"):
        make_optimizer("lion", [param], 0.1)


def test_networks(digits, small):
    """Images get convolutions and tables a perceptron; the seed alone determines the weights."""
    before = torch.get_rng_state()
    first, same, other = (make_network(digits, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.conv1.weight, same.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    table = make_network(load_file(small, None, 0), 0)
    assert [type(layer).__name__ for layer in table] == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]


@pytest.mark.parametrize("shape", [(3, 5, 9), (4, 4), (1, 2, 2)])
def test_pictures_of_any_size(tmp_path, shape):
    """Images of any size and number of channels can be trained on."""
    x = np.random.default_rng(0).normal(size=(20, *shape))
    np.savez(tmp_path / "p.npz", X=x, y=np.arange(20) % 2)
    assert trained("rmsprop", load_file(tmp_path / "p.npz", None, 0)).train_loss > 0


def test_progress(digits):
    """There is one record of progress per step, and the accuracy is known from the end of the first epoch on."""
    run = Run("sgd", 0.1)
    seen = list(train(run, digits, Settings(epochs=2)))
    assert [at.step for at in seen] == list(range(1, seen[0].steps + 1))
    assert [at.epoch for at in seen if at.epoch_done] == [1, 2]
    assert seen[0].accuracy is None
    assert seen[-1].accuracy == run.test_accuracies[-1]
    assert [at.loss for at in seen] == run.losses


def test_evaluate_in_pieces():
    """Loss and accuracy are means over all rows, however many pieces they are computed in."""
    torch.manual_seed(0)
    x, y = torch.randn(2500, 3), torch.randint(3, (2500,))
    loss, accuracy = evaluate(torch.nn.Identity(), x, y)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(x, y).item(), rel=1e-5)
    assert accuracy == pytest.approx((x.argmax(1) == y).double().mean().item())


def test_rates_are_recorded_for_rmsprop(digits):
    """RMSprop's effective learning rates are recorded by layer name; the other optimizers have none."""
    run = trained("rmsprop", digits)
    assert {row.name for row in run.layers} == {
        f"{layer}.{kind}" for layer in ("conv1", "conv2", "out") for kind in ("weight", "bias")
    }
    assert all(0 < row.low <= row.median <= row.high for row in run.layers)
    assert trained("adam", digits).layers == []


def test_records_are_few_in_a_long_run(small):
    """A long run keeps about 150 records a layer, not one per step."""
    run = trained("rmsprop", load_file(small, None, 0), epochs=450)
    assert len([row for row in run.layers if row.name == "out.bias"]) == 150


def a_run(accuracy, seed=0, diverged_at=None):
    """Return a finished run of SGD with this test accuracy."""
    made = Run("sgd", 0.5, seed, train_loss=0.1, seconds=1.0, step_us=10.0, diverged_at=diverged_at)
    made.test_losses, made.test_accuracies = [1 - accuracy], [accuracy]
    return made


def test_a_row_is_the_median_and_the_range():
    """A row has the median of the seeds and their range, and one seed has no range."""
    runs = [a_run(0.9, 0), a_run(0.95, 1), a_run(0.8, 2)]
    row = summary(runs)
    assert (row["test_accuracy"], row["test_accuracy_low"], row["test_accuracy_high"]) == (0.9, 0.8, 0.95)
    assert (row["seeds"], row["diverged"]) == (3, 0)
    assert cells(runs)[2:4] == ["0.1000 (0.0500–0.2000)", "90.0 % (80.0–95.0)"]
    assert cells(runs[:1])[2:4] == ["0.1000", "90.0 %"]


def test_a_row_counts_the_runs_that_diverged():
    """A seed that diverged is no result and is not left out in silence."""
    runs = [a_run(0.9, 0), a_run(0.1, 1, diverged_at=7), a_run(0.8, 2)]
    assert summary(runs)["diverged"] == 1
    assert cells(runs)[3] == "85.0 % (80.0–90.0), 1 of 3 diverged at step 7"
    assert cells([*runs[:2], a_run(0.2, 2, diverged_at=5)])[3] == "90.0 %, 2 of 3 diverged from step 5"


def test_seeds_share_the_split_and_not_the_weights(small):
    """Every seed tests on the same rows, starts from weights of its own, and only the first one records rates."""
    dataset, settings = load_file(small, None, 3), Settings(epochs=1, seed=3, seeds=2)
    runs = [Run("rmsprop", 0.003, seed) for seed in settings.all_seeds]
    reports = list(train_all(runs, dataset, settings))
    assert [(i, at.epoch) for i, at in reports] == [(0, 1), (1, 1)]
    assert runs[0].losses != runs[1].losses
    assert [bool(run.layers) for run in runs] == [True, False]
    assert runs[1].losses == trained("rmsprop", dataset, seed=4).losses


@pytest.mark.long
def test_processes_change_no_number(monkeypatch, digits):
    """Runs in processes of their own have the numbers of runs in this one, and report every epoch."""
    settings = Settings(epochs=2, seeds=2)
    numbers = []
    for short in (10**9, 0):
        monkeypatch.setattr("rmsprop.demo.processes.SHORT", short)
        runs = [Run("rmsprop", 0.003, seed) for seed in settings.all_seeds]
        reports = list(train_all(runs, digits, settings, 2))
        assert sorted((i, at.epoch) for i, at in reports) == [(i, epoch) for i in (0, 1) for epoch in (1, 2)]
        numbers.append([(run.losses, run.test_losses, run.layers, run.train_loss) for run in runs])
    assert numbers[0] == numbers[1]


class Late(queue.Queue):
    """A queue whose reports take a second to arrive."""

    def get(self, timeout):
        if timeout < 1:
            raise queue.Empty
        return super().get(timeout=timeout)


class Done:
    """A pool of processes that has done its work at once, in this process."""

    def __init__(self, _count, _context, initialize, arguments):
        initialize(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, work, *arguments):
        future = Future()
        future.set_result(work(*arguments))
        return future

    def shutdown(self, **_):
        pass


def test_reports_that_arrive_after_the_result_are_not_lost(monkeypatch, small):
    """Every epoch is reported, even if a process ends before its reports have arrived."""
    for name, value in (("SHORT", 0), ("ProcessPoolExecutor", Done)):
        monkeypatch.setattr(f"rmsprop.demo.processes.{name}", value)
    monkeypatch.setattr("rmsprop.demo.processes.get_context", lambda _: SimpleNamespace(Queue=Late))
    settings = Settings(epochs=3, seeds=2)
    runs = [Run("sgd", lr, seed) for seed, lr in zip(settings.all_seeds, (0.1, 1e38), strict=True)]
    reports = list(train_all(runs, load_file(small, None, 0), settings, 2))
    assert [(i, at.epoch) for i, at in reports] == [(0, epoch) for epoch in (1, 2, 3)]
    assert runs[1].diverged_at == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_divergence_is_reported(digits, name):
    """A loss that is not finite ends the run, and the table says at which step instead of a number."""
    run = trained(name, digits, lr=1e30)
    assert run.diverged_at is not None
    assert all(math.isfinite(loss) for loss in run.losses)
    row = summary([run])
    assert row["test_accuracy"] is None
    assert row["diverged"] == 1
    assert cells([run])[2:4] == ["–", f"diverged at step {run.diverged_at}"]
    json.dumps(results([run], digits, Settings()), allow_nan=False)


def test_divergence_at_the_very_last_step(small):
    """The test loss detects weights that overflow in the last step."""
    run = trained("sgd", load_file(small, None, 0), lr=1e38)
    assert len(run.losses) == 1
    assert run.test_losses == []
    assert run.diverged_at == 1


def test_threads_are_given_back():
    """The number of threads is one inside the block and restored after it, even after an error."""
    torch.set_num_threads(2)
    inside = []

    def fail():
        with one_thread():
            inside.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [1]
    assert torch.get_num_threads() == 2


def test_devices(monkeypatch):
    """A missing device is refused with the available ones; "cuda" means the first one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_device("cpu") == "cpu"
    available = ", ".join(available_devices())
    for device in ("cuda", "cuda:0", "meta", "gpu"):
        with pytest.raises(ValueError, match=f"The device '{device}' is not available here; available: {available}."):
            check_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda") == "cuda"
    assert check_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="'cuda:2' is not available here; available: cpu, cuda:0, cuda:1"):
        check_device("cuda:2")


def test_command_leaves_its_files(tmp_path):
    """Outside a terminal, the command prints plain lines and a table, and writes five complete files."""
    out = tmp_path / "new" / "out"
    result, _ = invoke("--epochs", 1, "--seeds", 2, "--optimizers", "rmsprop,adam", "--out", out)
    assert result.exit_code == 0, result.output
    names = {"results.json", "results.csv", "curves.svg", "effective_lr.svg", "index.html"}
    assert {path.name for path in out.iterdir()} == names
    for name in names:
        assert f"wrote {out / name}" in result.output
    assert "\x1b" not in result.output
    assert re.search(
        r"^Adam: seed 1, epoch 1/1, loss \d\.\d{4}, test accuracy \d+\.\d %$", result.output, re.MULTILINE
    )
    assert re.search(
        r"^RMSprop +0\.003 +\d\.\d{4} \(\d\.\d{4}–\d\.\d{4}\) +\d+\.\d % \(\d+\.\d–\d+\.\d\) +\d+\.\d\d +\d+ µs",
        result.output,
        re.MULTILINE,
    )
    assert "Medians of 2 seeds, with ranges." in result.output
    assert result.stderr == ""
    assert (out / "index.html").stat().st_size < 500_000


def test_files_agree(tmp_path):
    """results.csv and the table in results.json hold the same rows; the curves and settings are in results.json."""
    invoke(
        "--epochs", 2, "--seed", 4, "--seeds", 1, "--optimizers", "rmsprop,sgd", "--lr", "sgd=0.25", "--out", tmp_path
    )
    found = json.loads((tmp_path / "results.json").read_text())
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["optimizer"] for row in rows] == ["RMSprop", "SGD"]
    for row, same in zip(rows, found["table"], strict=True):
        assert {key: "" if value is None else str(value) for key, value in same.items()} == row
    assert rows[1]["lr"] == "0.25"
    assert found["settings"]["seed"] == 4
    assert len(found["curves"][0]["test_accuracies"]) == 2
    assert found["curves"][0]["layers"][0]["name"] == "conv1.weight"
    assert found["data"]["classes"] == list("0123456789")


def test_same_seed_same_files(tmp_path, small):
    """Two runs with one seed give the same numbers, except for times."""
    for name in ("a", "b"):
        invoke("--data", small, "--epochs", 1, "--seed", 1, "--optimizers", "rmsprop", "--out", tmp_path / name)
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("a", "b"))
    for found in (first, second):
        for row in (*found["table"], *found["curves"]):
            for timed in ("seconds", "optimizer_step_us", "step_us"):
                row.pop(timed, None)
    assert first == second


def test_no_stale_picture(tmp_path, small):
    """A run without RMSprop removes an earlier run's figure of rates."""
    (tmp_path / "effective_lr.svg").write_bytes(b"old")
    result, _ = invoke("--data", small, "--epochs", 1, "--optimizers", "adam", "--out", tmp_path)
    assert result.exit_code == 0
    assert not (tmp_path / "effective_lr.svg").exists()
    assert "effective_lr.svg" not in result.output


def test_own_table(tmp_path):
    """--data and --target select the user's own table, and its names reach the report."""
    lines = ["petal;sepal;kind", *(f"{i % 7};{i * 3 % 11};{('rose', 'lily')[i % 2]}" for i in range(30))]
    path = tmp_path / "flowers.csv"
    path.write_text("\n".join(lines))
    out = tmp_path / "out"
    result, _ = invoke("--data", path, "--target", "kind", "--epochs", 2, "--optimizers", "rmsprop", "--out", out)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "results.json").read_text())["data"]
    assert found["classes"] == ["lily", "rose"]
    assert found["features"] == ["petal", "sepal"]
    assert found["source"] == "flowers.csv"
    assert "lily" in (out / "index.html").read_text()


def test_divergence_in_the_command(tmp_path, small):
    """A run that diverges is a row of the table like any other, and the command succeeds."""
    result, _ = invoke(
        "--data", small, "--epochs", 3, "--optimizers", "sgd,adam", "--lr", "sgd=1e6", "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"^SGD +1e\+06 +– +3 of 3 diverged from step \d", result.output, re.MULTILINE)
    assert re.search(r"^SGD: seed 2 diverged at step \d", result.output, re.MULTILINE)
    said = (tmp_path / "index.html").read_text()
    assert re.search(r"SGD, lr 10⁶, 3 of 3 diverged from step \d: the loss was no longer a finite number", said)
    result, _ = invoke("--data", small, "--epochs", 3, "--optimizers", "sgd", "--lr", "1e6", "--out", tmp_path)
    assert result.exit_code == 0, result.output


def test_live_display(tmp_path, small, monkeypatch):
    """On a terminal, each optimizer has a progress bar instead of plain lines."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    result, _ = invoke("--data", small, "--epochs", 2, "--optimizers", "sgd,rmsprop", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "━" in result.output
    assert "epoch 2/2, loss" in result.output
    assert "RMSprop: epoch" not in result.output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--optimizers", "rmspro"),
            "'rmspro' is unknown; choose from sgd, momentum, rmsprop, adam. Did you mean 'rmsprop'?",
        ),
        (("--optimizers", ","), "--optimizers ',' names nothing; choose from sgd, momentum, rmsprop, adam."),
        (("--optimizers", "sgd,SGD"), "--optimizers 'sgd,SGD' names one twice; name each once."),
        (("--lr", "fast"), "--lr: 'fast' is not a number; write it like 0.001."),
        (("--lr", "0"), "--lr: 0 is not a positive number"),
        (("--lr", "1e7"), "--lr: 1e+07 is not a positive number up to 1e6"),
        (("--lr", "nan"), "--lr: nan is not a positive number"),
        (("--lr", "sgd=-1"), "--lr: -1 is not a positive number"),
        (("--lr", "sgd=0.1,0.2"), "give one number for all, or name=number for each, not a mixture."),
        (("--lr", "lion=0.1"), "--lr: 'lion' is not among the optimizers of this run: sgd, momentum, rmsprop, adam."),
        (("--optimizers", "sgd", "--lr", "adam=0.1"), "'adam' is not among the optimizers of this run: sgd."),
        (("--device", "meta"), "The device 'meta' is not available here; available: cpu"),
        (("--epochs", "0"), "Invalid value for '--epochs': "),
        (("--seed", "-1"), "Invalid value for '--seed': "),
        (("--seeds", "0"), "Invalid value for '--seeds': "),
        (("--target", "y"), "--target names a column of --data FILE; give both or neither."),
        (("--data", "nowhere.csv"), "There is no file nowhere.csv."),
        (("--data", "nowhere.npz", "--target", "y"), "There is no file nowhere.npz."),
    ],
)
def test_invalid_arguments(tmp_path, words, sentence):
    """An invalid argument gives one sentence and exit status 2, and nothing is written."""
    out = tmp_path / "out"
    result, error = invoke(*words, "--out", out)
    assert result.exit_code == 2
    assert sentence in error
    assert "Traceback" not in error
    assert not out.exists()


def test_unwritable_directory(tmp_path, small):
    """A directory that cannot be written is refused before training."""
    (tmp_path / "file").write_text("")
    result, error = invoke("--data", small, "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "cannot be written" in error
    assert "epoch" not in result.output


def test_one_rate_for_all(tmp_path, small):
    """A single number is every optimizer's learning rate."""
    invoke("--data", small, "--epochs", 1, "--optimizers", "sgd,adam", "--lr", "0.01", "--out", tmp_path)
    assert {row["lr"] for row in json.loads((tmp_path / "results.json").read_text())["table"]} == {0.01}


def test_help():
    """The help shows every option and examples."""
    result, _ = invoke("--help")
    assert result.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    for word in (
        "--epochs",
        "--seed",
        "--seeds",
        "--device",
        "--out",
        "--optimizers",
        "--lr",
        "--data",
        "--target",
        "Examples:",
    ):
        assert word in text
