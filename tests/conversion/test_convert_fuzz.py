"""Runs a few hundred of the damaged checkpoints of `make fuzz` through every reader."""

import alone
import pytest
from paths import ROOT

DRIVER = ROOT / "fuzz" / "convert.py"


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="the driver forks")
@pytest.mark.parametrize("count", [10, pytest.param(400, marks=pytest.mark.long)])
def test_damaged_checkpoints_are_one_sentence_each(count):
    """No crash, hang, traceback or large allocation occurs in the first inputs of `make fuzz`."""
    done = alone.run(DRIVER, "--count", count, "--jobs", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures" in done.stdout
