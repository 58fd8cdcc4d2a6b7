"""The GPU benchmark's counts, output, and refusals, with a CPU in place of the GPU; on a GPU, its correctness."""

import importlib
import importlib.util
import json
import math
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from paths import ROOT

from rmsprop import RMSprop
from rmsprop.bench import cpu, cuda
from rmsprop.bench.cuda import COLUMNS, OURS, OURS_3_BYTES, OURS_BFLOAT16, OURS_FLOAT8, OURS_GRAPH, Result

GOOD = {
    "wall_ms": 0.073,
    "wall_p10_ms": 0.07,
    "wall_p90_ms": 0.08,
    "stream_ms": 0.04,
    "gb_s": 2742.3,
    "of_copy": 0.914,
    "launches": 1.0,
    "kernels": 1.0,
    "copies": 0.0,
    "waits": 0.0,
    "extra_bytes_per_parameter": 0.0,
}
RESULTS = [
    Result("mobilenet", OURS, 174, 5_483_032, GOOD),
    Result("mobilenet", "torch foreach", 174, 5_483_032, GOOD | {"wall_ms": 1.99, "launches": 42.5}),
    Result("vit", OURS, 152, 86_567_656, GOOD),
    Result("vit", "bitsandbytes", 152, 86_567_656, {}, "RuntimeError: no [library] here"),
]


def invoke(*words: str) -> tuple[int, str]:
    """Return the command's exit code and output. The import is local, because bench/gpu.py does not need the CLI."""
    import commands

    return commands.invoke(*words)


def event(name: str, device: str = "CPU") -> SimpleNamespace:
    """Return an event of a trace."""
    return SimpleNamespace(name=name, device_type=getattr(torch.autograd.DeviceType, device))


def memory(peaks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a device whose memory peaks as listed, call after call, above 1000 bytes that remain."""
    left = iter(peaks)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000 + next(left))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Simulate a GPU that gives RESULTS, and return the recorded arguments of the run."""
    recorded: dict = {}

    def run(cases, seconds, rate, brief=()):
        recorded.update(cases=list(cases), seconds=seconds, rate=rate, brief=brief)
        yield from RESULTS

    about = {"gpu": "A GPU", "copy_gb_s": 3000.0, "torch": "2.15", "triton": "3.9", "rmsprop": "0.1"}
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "copy_rate", lambda: 3e12)
    monkeypatch.setattr(cuda, "machine", lambda rate: about | {"copy_gb_s": rate / 1e9})
    monkeypatch.setattr(cuda, "run", run)
    return recorded


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a CPU in place of the GPU: a step takes 2 ms, runs 5 kernels, and allocates nothing."""
    memory([0] * 100, monkeypatch)
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cuda, "stream", lambda _: 2.0)

    def trace(step, steps):
        for _ in range(steps):
            step()
        calls = [event("cudaLaunchKernel")] * (3 + 5 * steps)
        return [*calls, *[event("work", "CUDA")] * (5 * steps), event("cudaDeviceSynchronize")]

    monkeypatch.setattr(cuda, "_trace", trace)


@pytest.mark.parametrize(
    ("hip", "toolkit", "says"),
    [
        ("7.0", None, "ROCm, which is not tested"),
        (None, None, "built without CUDA"),
        (None, "13.2", "no NVIDIA GPU"),
    ],
)
def test_reason_that_nothing_can_be_measured(hip, toolkit, says, monkeypatch):
    """ROCm, a build without CUDA, and a missing device are distinguished; with a device, the reason is None."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", toolkit)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert says in cuda.missing()
    if toolkit:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert cuda.missing() is None


def test_the_shapes_are_the_networks(pass_marks):
    """As many tensors and elements as torchvision's."""
    found = {name: shapes() for name, shapes in cuda.CASES.items()}
    counts = {name: (len(shapes), sum(map(math.prod, shapes))) for name, shapes in found.items()}
    assert counts["mobilenet"] == (174, 5_483_032)
    assert counts["resnet50"] == (161, 25_557_032)
    assert counts["vit"] == (152, 86_567_656)
    assert counts["256M"] == (1, 1 << 28)
    assert set(cuda.DEFAULT) <= set(found)
    assert {case for case, *_ in pass_marks.GPU} <= set(cuda.DEFAULT)
    assert {contestant for _, contestant, *_ in pass_marks.GPU} <= set(cuda.contestants())


def test_a_trace_is_counted_by_what_its_events_are():
    """Launches and waits are calls of the host, kernels and copies work of the device; other events do not count."""
    launches = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaFree")
    others = (
        "cudaMemcpyAsync",
        "cuMemcpyHtoDAsync_v2",
        "cudaStreamWaitEvent",
        "cudaStreamIsCapturing",
        "cudaFreeAsync",
    )
    ran = ("advance", "void at::native::multi_tensor_apply_kernel<>")
    copies = ("Memcpy HtoD (Pinned -> Device)", "Memset (Device)")
    nobodys = ("at::cuda::(anonymous namespace)::spin_kernel(long)", "Context Sync", "Stream Wait Event")
    events = [event(name) for name in (*launches, *waits, *others)]
    events += [event(name, "CUDA") for name in (*ran, *copies, *nobodys)]
    expected = {"launches": len(launches), "kernels": len(ran), "copies": len(copies), "waits": len(waits)}
    assert cuda.tally(iter(events)) == expected
    assert cuda.tally([]) == dict.fromkeys(expected, 0)


@pytest.mark.usefixtures("on_cpu")
def test_the_cost_of_opening_a_trace_is_subtracted():
    """The launches and waits of a trace without steps do not count; the others are divided by the steps."""
    calls = []
    assert cuda.traced(lambda: calls.append(1)) == {"launches": 5, "kernels": 5, "copies": 0, "waits": 0}
    assert len(calls) == 5


def test_a_graph_counts_the_memory_of_its_capture(monkeypatch):
    """A replay allocates nothing, so the memory that the capture keeps counts as the step's."""
    memory([64, 512], monkeypatch)
    assert cuda.extra(lambda: None) == 64
    replay = cuda.Replay.__new__(cuda.Replay)
    replay.graph, replay.held = SimpleNamespace(replay=lambda: None), 4096
    assert cuda.extra(replay) == 512 + 4096


def test_a_capture_follows_three_steps_and_its_memory_is_kept(monkeypatch):
    """State and tables exist before the captured step; only the capture's memory counts."""
    memory([4096, 0], monkeypatch)
    done = []
    graph = SimpleNamespace(replay=lambda: done.append("replay"))
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)

    @contextmanager
    def capture(captured):
        assert captured is graph
        done.append("begin")
        yield
        done.append("end")

    monkeypatch.setattr(torch.cuda, "graph", capture)
    replay = cuda.Replay(SimpleNamespace(step=lambda: done.append("step")))
    assert cuda.extra(replay) == 4096
    assert done == ["step", "step", "step", "begin", "step", "end", "replay"]


def test_stream_time_is_the_best_of_three_per_step(monkeypatch):
    """Each queue of steps waits behind a spinning kernel; a copy moves each byte twice."""
    took, done = iter([60.0, 40.0, 80.0, 60.0, 40.0, 80.0]), []
    moment = SimpleNamespace(record=lambda: done.append("moment"), elapsed_time=lambda _: next(took))
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: moment)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: done.append("spin"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    assert cuda.stream(lambda: done.append("step")) == 2.0
    assert done == ["spin", "moment", *["step"] * 20, "moment", "wait"] * 3
    small = torch.zeros(1000)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: small)
    assert cuda.copy_rate() == 2 * 4000 / 2e-3


def test_a_trace_opens_with_kernels_that_may_be_lost(monkeypatch):
    """A trace has spinning kernels, the steps, and a wait, and returns the profiler's events."""
    done = []
    profile = MagicMock()
    profile.__enter__.return_value.events.return_value = ["seen"]
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: profile)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: done.append("spin"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    assert cuda._trace(lambda: done.append("step"), 2) == ["seen"]
    assert done == ["wait", *["spin"] * 256, "step", "step", "wait"]


def test_the_machine_is_recorded_with_its_versions(monkeypatch):
    """The record has the GPU, its copy rate, and optional packages, beside the entries of the CPU's benchmark."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "_version", {"triton": "3.9"}.get)
    about = cuda.machine(3.02e12)
    assert (about["gpu"], about["compute_capability"], about["copy_gb_s"]) == ("A GPU", "9.0", 3020.0)
    assert (about["triton"], about["bitsandbytes"], about["torch"]) == ("3.9", None, torch.__version__)
    assert cuda.headline(about).startswith("A GPU, copies 3,020.0 GB/s · torch ")
    assert "triton missing" in cuda.headline(about | {"triton": None})


def test_all_contestants_exist(monkeypatch):
    """bitsandbytes takes part if installed; the slow contestants do not if few are requested."""
    monkeypatch.setattr(cuda, "_version", lambda _: None)
    few, most = cuda.contestants(brief=True), cuda.contestants()
    assert list(few) == [OURS, OURS_GRAPH, "torch foreach", "Adam fused", "SGD fused"]
    slow = {"torch loop", "foreach graph", "foreach compiled"}
    assert set(most) - set(few) == {OURS_BFLOAT16, OURS_FLOAT8, OURS_3_BYTES, *slow}
    monkeypatch.setattr(cuda, "_version", lambda _: "0.50")
    assert set(cuda.contestants()) - set(most) == {"bitsandbytes"}
    assert OURS == cpu.OURS


@pytest.mark.usefixtures("on_cpu")
def test_all_times_are_taken_before_the_first_trace(monkeypatch):
    """There are two rounds; a failure in either is recorded with its reason, and the others continue."""

    def failing(_):
        raise ValueError("no such kernel")

    def failing_later(_, calls=iter(range(1000))):
        if next(calls):
            raise ValueError("no such trace")
        return lambda: None

    makes = {
        OURS: lambda ps: RMSprop(ps, backend="cpu").step,
        "broken": failing,
        "torch foreach": lambda ps: torch.optim.RMSprop(ps, foreach=True).step,
        "late": failing_later,
    }
    monkeypatch.setattr(cuda, "contestants", lambda brief: dict(list(makes.items())[: 1 if brief else 9]))
    found = list(cuda.run(["rl", "a2c"], 0.01, 1e9, brief=["a2c"]))
    first, second = found[:5], found[5:]
    assert [(r.case, r.contestant) for r in first] == [*(("rl", name) for name in makes), ("a2c", OURS)]
    assert [r.contestant for r in second] == [OURS, "torch foreach", "late", OURS]
    assert [r.failed for r in first] == [None, "ValueError: no such kernel", None, None, None]
    assert [r.failed for r in second] == [None, None, "ValueError: no such trace", None]
    assert "launches" not in first[0].figures
    assert set(second[0].figures) == set(GOOD)
    assert second[0].figures["launches"] == second[0].figures["kernels"] == 5
    assert second[0].figures["gb_s"] == round(second[0].elements * 20 / 2e-3 / 1e9, 1)
    assert second[0].figures["of_copy"] == round(second[0].elements * 20 / 2e-3 / 1e9, 3)
    assert 0 < second[0].figures["wall_p10_ms"] <= second[0].figures["wall_ms"] <= second[0].figures["wall_p90_ms"]


@pytest.mark.usefixtures("on_cpu")
def test_a_kernel_that_refuses_is_a_finding():
    """If the Triton kernel refuses, its reason is recorded, and torch's optimizers are still measured."""
    found = {r.contestant: r for r in cuda.run(["rl"], 0.01, 1e9, brief=["rl"])}
    assert "the parameters are on cpu" in found[OURS].failed
    assert found["torch foreach"].failed is None
    assert found["SGD fused"].figures["launches"] == 5


@pytest.mark.parametrize(
    ("contestant", "param", "square_avg"),
    [
        (OURS_BFLOAT16, torch.float32, torch.bfloat16),
        (OURS_FLOAT8, torch.float32, torch.uint8),
        (OURS_3_BYTES, torch.bfloat16, torch.uint8),
    ],
)
@pytest.mark.usefixtures("on_cpu")
def test_state_of_fewer_bytes_takes_part(contestant, param, square_avg, monkeypatch):
    """A contestant steps parameters and state of the dtypes that its name says, on the parameters' gradients."""
    made = []
    monkeypatch.setattr(
        cuda, "RMSprop", lambda ps, **words: made.append(RMSprop(ps, **words | {"backend": "eager"})) or made[-1]
    )
    cuda._warmed_up([(3, 5), (7,)], cuda.contestants()[contestant])()
    params = made[0].param_groups[0]["params"]
    assert [tuple(p.shape) for p in params] == [(3, 5), (7,)]
    assert {p.dtype for p in params} == {p.grad.dtype for p in params} == {param}
    assert {made[0].state[p]["square_avg"].dtype for p in params} == {square_avg}
    assert {float(made[0].state[p]["step"]) for p in params} == {4.0}


def test_figures_become_cells_in_the_order_of_the_columns():
    """Cells are formatted, empty for missing figures, and "failed" for a failure."""
    assert cuda.cells(RESULTS[0]) == ["0.0730", "0.0400", "2,742", "91.4%", "1", "1", "0", "0", "0.00"]
    assert cuda.cells(Result("rl", OURS, 6, 4610, {"wall_ms": 0.05})) == ["0.0500", *[""] * 8]
    assert cuda.cells(RESULTS[3]) == ["failed", *[""] * 8]
    assert set(COLUMNS) == set(GOOD) - {"wall_p10_ms", "wall_p90_ms"}


def test_bars_are_judged_from_the_right_side(pass_marks):
    """A time, a count, and memory may be at most the bar; a share of the copy rate must be at least the bar."""
    rows = [{"case": r.case, "contestant": r.contestant, **r.figures} for r in RESULTS]
    found = {what: (reached, met) for what, reached, _, met in pass_marks.on_gpu(rows)}
    assert found == {
        f"mobilenet, {OURS}: wall ms": (0.073, True),
        f"mobilenet, {OURS}: launches": (1.0, True),
        f"mobilenet, {OURS}: waits": (0.0, True),
        f"vit, {OURS}: of copy": (0.914, False),
    }
    worse = rows[0] | {"wall_ms": 0.13, "waits": 1.0, "launches": 2.0}
    assert [met for *_, met in pass_marks.on_gpu([worse])] == [False, False, False]
    assert pass_marks.on_gpu([rows[3]]) == []


def test_recorded_results_get_their_recorded_verdicts(pass_marks):
    """Judging bench/results/cpu.json gives its recorded verdicts; a slower step misses the marks."""
    record = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())
    assert pass_marks.rows(pass_marks.on_cpu(record["results"])) == record["bars"]
    assert {row["bar"].partition(":")[0] for row in record["bars"]} >= set(pass_marks.RATIOS)
    for row in record["results"]:
        row["times"][OURS] = {name: 100 * value for name, value in row["times"][OURS].items()}
    met = {what: met for what, _, _, met in pass_marks.on_cpu(record["results"])}
    assert not any(met[f"{case}: torch's best over ours"] for case in pass_marks.RATIOS)


def test_a_record_keeps_its_verdicts(pass_marks, tmp_path):
    """Judging adds the verdicts before the results, and returns one line for each."""
    path = tmp_path / "gpu.json"
    cuda.write(iter(RESULTS), {"gpu": "A GPU"}, path)
    lines = pass_marks.judge(path)
    assert f"met    mobilenet, {OURS}: wall ms 0.073, bar 0.12" in lines
    assert f"missed vit, {OURS}: of copy 0.914, bar 0.95" in lines
    saved = json.loads(path.read_text())
    assert list(saved) == ["machine", "bars", "results"]
    assert saved["bars"][0] == {"bar": f"mobilenet, {OURS}: wall ms", "reached": 0.073, "needed": 0.12, "met": True}
    assert pass_marks.judge(path) == lines


def test_the_json_has_every_figure(tmp_path):
    """It has the machine, the added entries, and a row for each contestant, failed or not."""
    path = tmp_path / "made" / "gpu.json"
    cuda.write(iter(RESULTS), {"gpu": "A GPU"}, path, parity={"passed": True})
    saved = json.loads(path.read_text())
    assert list(saved) == ["machine", "parity", "results"]
    first = {"case": "mobilenet", "contestant": OURS, "tensors": 174, "elements": 5_483_032}
    assert saved["results"][0] == first | GOOD
    assert saved["results"][3]["failed"] == RESULTS[3].failed


def test_the_command_prints_a_table_and_writes_json(measured, tmp_path):
    """The table has all contestants and columns, failures have their reasons, and the file has no verdicts."""
    out = tmp_path / "gpu.json"
    code, text = invoke("bench", "--device", "cuda", "--seconds", "0.2", "--out", str(out))
    assert code == 0, text
    assert measured == {"cases": list(cuda.DEFAULT), "seconds": 0.2, "rate": 3e12, "brief": ()}
    assert "A GPU, copies 3,000.0 GB/s · torch 2.15 · triton 3.9 · rmsprop 0.1" in text
    for part in (*(head for head, _ in COLUMNS.values()), "torch foreach", "1.9900", "42.5", "91.4%"):
        assert part in text
    assert "vit, bitsandbytes failed: RuntimeError: no [library] here" in text
    assert "bars" not in json.loads(out.read_text())
    assert len(json.loads(out.read_text())["results"]) == len(RESULTS)


def test_the_command_takes_cases(measured):
    """--cases accepts the cases of the CPU and the large one."""
    assert invoke("bench", "--device", "cuda", "--cases", "rl,256M")[0] == 0
    assert measured["cases"] == ["rl", "256M"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--device", "tpu"), "--device takes cpu or cuda; got 'tpu'"),
        (
            ("--device", "cuda", "--threads", "1,all"),
            "--threads needs --device cpu; --device cuda takes --cases, --seconds",
        ),
        (("--device", "cuda", "--variants", "plain"), "--variants needs --device cpu"),
        (("--device", "cuda", "--busy"), "--busy needs --device cpu"),
        (("--device", "cuda", "--cases", "gpt5"), "'gpt5' is unknown; choose from rl"),
        (("--device", "cpu", "--cases", "256M"), "'256m' is unknown; choose from rl"),
        (("--cases", ""), "'' names nothing; choose from rl"),
    ],
    ids=" ".join,
)
def test_the_command_refuses_what_it_would_ignore(words, says, measured):
    """One sentence and exit code 2, even where the value is the default; nothing is measured."""
    code, text = invoke("bench", *words)
    assert code == 2
    assert says in text
    assert not measured


def test_without_a_gpu_the_command_says_so(monkeypatch):
    """One sentence and exit code 2."""
    monkeypatch.setattr(cuda, "missing", lambda: "there is no NVIDIA GPU here")
    code, text = invoke("bench", "--device", "cuda")
    assert code == 2
    assert "--device cuda: there is no NVIDIA GPU here" in text
    assert "Traceback" not in text


@pytest.fixture
def pass_marks(monkeypatch):
    """bench/pass_marks.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("pass_marks")


@pytest.fixture
def script(monkeypatch):
    """bench/gpu.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("passed", [True, False])
def test_the_script_checks_measures_and_writes(passed, script, measured, monkeypatch, tmp_path, capsys):
    """The script prints the test result, the table, and the bars, and writes the file; failing tests fail it last."""
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(script, "parity", lambda: {"passed": passed, "seconds": 1.5, "said": ["12 passed"]})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out)])
    if passed:
        script.main()
    else:
        with pytest.raises(SystemExit, match="the GPU tests fail"):
            script.main()
    assert set(script.BRIEF) == set(measured["brief"]) <= set(measured["cases"])
    text = capsys.readouterr().out
    assert f"GPU tests {'pass' if passed else 'FAIL'} in 1.5 s\n12 passed\n" in text
    table = [line for line in text.splitlines() if line.startswith(("case ", "mobilenet  ", "vit  "))][-5:]
    assert len({len(line) for line in table}) == 1
    assert f"missed vit, {OURS}: of copy 0.914, bar 0.95" in text
    saved = json.loads(out.read_text())
    assert saved["parity"]["passed"] is passed
    assert saved["seconds"] >= 0
    assert len(saved["results"]) == len(RESULTS)


def test_the_script_needs_a_gpu_and_cases_it_knows(script, monkeypatch, capsys):
    """One sentence for each."""
    monkeypatch.setattr(cuda, "missing", lambda: "there is no NVIDIA GPU here")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="nothing was measured: there is no NVIDIA GPU here"):
        script.main()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--cases", "rl,gpt5"])
    with pytest.raises(SystemExit):
        script.main()
    assert "--cases: unknown gpt5; choose from rl" in capsys.readouterr().err


def test_the_script_runs_tests_that_exist(script):
    """TESTS names files with tests for a GPU."""
    for name in script.TESTS:
        assert "pytest.mark.gpu" in (ROOT / name).read_text(encoding="utf-8")


needs_gpu = pytest.mark.skipif(cuda.missing() is not None, reason=f"not measured: {cuda.missing()}")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("default")  # of drivers and compilers that are not ours
def test_on_a_gpu_ours_is_one_launch_without_waiting():
    """Our step is one launch without copies, waits, or memory; torch's figures show that the counts work."""
    rate = cuda.copy_rate()
    found = {r.contestant: r for r in cuda.run(["500x1024"], 0.02, rate, brief=["500x1024"])}
    assert {r.failed for r in found.values()} == {None}
    ours, graph, foreach = (found[name].figures for name in (OURS, OURS_GRAPH, "torch foreach"))
    expected = {"launches": 1, "kernels": 1, "copies": 0, "waits": 0}
    assert {name: ours[name] for name in expected} == expected
    assert (graph["launches"], graph["kernels"], graph["waits"]) == (1, 1, 0)  # a graph may copy its table again
    assert ours["extra_bytes_per_parameter"] == 0
    assert foreach["launches"] > 1
    assert foreach["extra_bytes_per_parameter"] > 3.9
    assert ours["of_copy"] > 0


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("default")
def test_on_a_gpu_a_wait_is_seen():
    """Reading a number from the device waits and copies."""
    x = torch.ones(1000, device="cuda")
    assert cuda.traced(x.sum().item)["waits"] >= 1
    assert cuda.traced(lambda: (x.sum().item(), x.sum().item()))["waits"] >= 2
