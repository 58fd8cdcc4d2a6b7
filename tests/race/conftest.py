"""A headless Chromium, for the tests of what the live page computes and draws."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a network. Tests that need it are skipped and counted where it is missing."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium or Chrome here to run the page in")
    api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
    # the sandbox needs privileges that a container lacks; the pages are ours and fetch nothing
    options = {"executable_path": path, "args": ["--no-sandbox"]}
    with api.sync_playwright() as playwright, playwright.chromium.launch(**options) as chromium:
        yield chromium
