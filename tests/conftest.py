"""What all tests share."""

import gc
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch


def pytest_collection_finish() -> None:
    """Exempt the thousands of collected tests from garbage collection, which would visit them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from the same random numbers, in float32 and on one thread, and leaves settings as they were.

    One thread, since the tests themselves run in as many processes as there are cores, and torch's square root opens
    a parallel region even for small tensors.
    """
    torch.manual_seed(0)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, without a window. Tests that need it are skipped and counted where it is missing."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium or Chrome here to run the page in")
    api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
    # the sandbox needs privileges that a container lacks; the pages are ours and fetch nothing
    options = {"executable_path": path, "args": ["--no-sandbox"]}
    with api.sync_playwright() as playwright, playwright.chromium.launch(**options) as chromium:
        yield chromium
