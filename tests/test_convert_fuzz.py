"""Readers of checkpoints against damage: a few hundred of the inputs of `make fuzz`."""

import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).parent.parent / "fuzz" / "convert.py"


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="the driver forks")
def test_damaged_checkpoints_are_one_sentence_each():
    """No crash, hang, traceback or large allocation among 400 inputs; `make fuzz` goes on from there."""
    words = [sys.executable, "-W", "ignore", str(DRIVER), "--count", "400", "--jobs", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures" in done.stdout
