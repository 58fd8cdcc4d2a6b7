"""Random misuse of the optimizer: some of the inputs of `make fuzz`."""

import alone
import pytest
from paths import ROOT

DRIVER = ROOT / "fuzz" / "optimizer.py"


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="the driver forks")
@pytest.mark.parametrize("count", [20, pytest.param(300, marks=pytest.mark.long)])
def test_misuse_ends_in_a_correct_step_or_a_message(count):
    """No crash, hang, wrong step, or change by a refusal among the first inputs; `make fuzz` runs more."""
    done = alone.run(DRIVER, "--count", count, "--jobs", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} misused optimizers: 0 failures" in done.stdout
