"""The optimizer treated badly: some of the inputs of `make fuzz`."""

import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).parent.parent / "fuzz" / "optimizer.py"


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="the driver forks")
def test_what_is_treated_badly_steps_right_or_refuses_in_words():
    """No crash, hang, wrong step, or change by a refusal among 300 inputs; `make fuzz` goes on from there."""
    words = [sys.executable, "-W", "ignore", str(DRIVER), "--count", "300", "--jobs", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300 optimizers treated badly: 0 failures" in done.stdout
