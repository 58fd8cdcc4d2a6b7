"""What the tests of trainers share: nothing is downloaded, and only warnings of ours are errors."""

from collections.abc import Iterator

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Trainers warn of much that is no matter of ours; what RMSprop says of recipes and loads stays an error."""
    for item in items:
        if "integrations" in item.path.parts:
            for own in ("error:.*loaded state dict", "error:recipe", "ignore"):  # the first is looked at first
                item.add_marker(pytest.mark.filterwarnings(own), append=False)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No hub is asked for anything, and Accelerate starts anew in each test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    try:
        from accelerate.state import AcceleratorState, GradientState, PartialState
    except ImportError:
        return
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
