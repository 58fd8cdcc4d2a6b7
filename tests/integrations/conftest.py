"""Fixtures of the tests of trainers: nothing is downloaded, and only this package's warnings are errors."""

from collections.abc import Iterator

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignore the trainers' own warnings; those of RMSprop about recipes and loads remain errors."""
    for item in items:
        if "integrations" in item.path.parts:
            for own in ("error:.*loaded state dict", "error:recipe", "ignore"):  # the first match applies
                item.add_marker(pytest.mark.filterwarnings(own), append=False)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forbid requests to model hubs, and reset Accelerate before each test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    try:
        from accelerate.state import AcceleratorState, GradientState, PartialState
    except ImportError:
        return
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
