"""Each example runs, prints the settings that arrived, and trains."""

import re
import runpy
from pathlib import Path

import pytest
from judge import EXAMPLES, needs

# The name of an example, a part of its explain(), a pattern for its resulting number, and the range of that number.
RUNS = [
    pytest.param(
        "sb3_a2c", "recipe a2c-sb2", r"mean return (\d+) ", (30, 500), marks=needs("gymnasium", "stable_baselines3")
    ),
    pytest.param("cleanrl_loop", "√w + 1e-05", r"20 episodes: (\d+) of", (60, 500), marks=needs("gymnasium")),
    pytest.param(
        "torchrl_dqn", "recipe dqn-nature", r"one episode (\d+) of", (60, 500), marks=needs("gymnasium", "torchrl")
    ),
    pytest.param(
        "lightning_digits", "b ← 0.5·b + u", r"accuracy (.+)%", (80, 100), marks=needs("lightning", "sklearn")
    ),
    pytest.param("hf_trainer", "max(v − m², 0)", r"-> (.+)", (0, 3), marks=needs("accelerate", "transformers")),
    pytest.param("trl_dpo", "recipe dpo", r"mean loss (.+),", (0, 0.69), marks=needs("accelerate", "transformers")),
    pytest.param(
        "accelerate_loop", "dialect keras3", r"accuracy (.+)%", (70, 100), marks=needs("accelerate", "sklearn")
    ),
    pytest.param(
        "timm_registry", "g ← g + 1e-05·p", r"-> (.+)", (0, 1.5), marks=needs("timm", "torchvision", "sklearn")
    ),
    pytest.param("skorch_digits", "g ← g + 0.0001·p", r"accuracy (.+)%", (80, 100), marks=needs("skorch", "sklearn")),
    pytest.param("torchtitan_container", "b ← 0.9·b + u", r"tensor\(\[(.+?),", (0, 1)),
    pytest.param("ultralytics_trainer", "error momentum", r"a steady step is (.+?)·lr", (15, 16)),
]


@pytest.mark.parametrize(("name", "arrived", "result", "bounds"), RUNS)
def test_an_example_runs_as_it_stands(
    name: str,
    arrived: str,
    result: str,
    bounds: tuple[float, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`python examples/NAME.py` shows the settings in explain(), and its result is in the range."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "Parameter group 0" in printed
    assert arrived in printed
    found = re.findall(result, printed)
    assert found, printed
    assert bounds[0] <= float(found[-1]) <= bounds[1]
