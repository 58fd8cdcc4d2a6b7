"""Runs a few hundred of the damaged checkpoints of `make fuzz` through every reader."""

import subprocess
import sys

import pytest
from paths import ROOT

DRIVER = ROOT / "fuzz" / "convert.py"


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="the driver forks")
@pytest.mark.parametrize("count", [30, pytest.param(400, marks=pytest.mark.long)])
def test_damaged_checkpoints_are_one_sentence_each(count):
    """No crash, hang, traceback or large allocation occurs in the first inputs of `make fuzz`."""
    command = [sys.executable, "-W", "ignore", str(DRIVER), "--count", str(count), "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures" in done.stdout
