"""N + M steps equal N steps, a save, a new process, a load, and M steps, to the last bit, on every backend."""

import alone
import pytest
from cases import mostly_long
from paths import TESTS

from rmsprop.kernels import native

pytest.importorskip("safetensors", reason="safetensors is not installed, and checkpoints need it")

from nested import same
from resumed import AFTER, BEFORE, begin, cases, end, stepping, train

from rmsprop import checkpoint


@pytest.mark.parametrize("backend", mostly_long(["cpu", "eager", "triton"], lambda _, backend: backend == "cpu"))
def test_a_resumed_run_is_the_run(backend, tmp_path):
    """Weights, state, schedule and scale end as if nothing had happened."""
    if backend == "cpu" and isinstance(native.load(), str):
        pytest.skip(native.load())
    whole = {}
    with stepping(backend):
        for name, case in cases(backend).items():
            parts = begin(case, backend)
            train(parts, BEFORE)
            checkpoint.save(tmp_path / name, rng=True, **parts)
            train(parts, AFTER)
            whole[name] = end(parts)
    alone.run(TESTS / "tools" / "resumed.py", tmp_path, backend).check_returncode()
    for name, expected in whole.items():
        resumed = checkpoint.load(tmp_path / f"{name}.end")
        assert expected["optimizer"]["state"]
        for part, state in expected.items():
            assert same(state, resumed[part]), (name, part)
