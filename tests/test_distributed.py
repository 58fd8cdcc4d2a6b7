"""Training on several processes is training on one."""

from pathlib import Path

import distributed_state
import pytest
import processes

pytestmark = pytest.mark.xdist_group("distributed")  # the processes of one world at a time

NAMES = [(world, name) for world, cases in distributed_state.CASES.items() for name in cases]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory):
    """What went wrong on 2 and on 4 processes, started when first asked for."""
    known: dict[int, dict[str, str]] = {}

    def of(world: int) -> dict[str, str]:
        if world not in known:
            folder: Path = tmp_path_factory.mktemp(f"world{world}")
            known[world] = processes.outcomes("distributed_state", world, folder)
        return known[world]

    return of


@pytest.mark.parametrize(("world", "name"), NAMES, ids=[f"{name}-{world}" for world, name in NAMES])
def test_on_several_processes(world, name, outcomes):
    """Each case of distributed_cases.py and distributed_state.py, in its words."""
    assert outcomes(world)[name] == ""
