"""Folders of the repository that tests read."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
DOCS = ROOT / "docs"
CHECKPOINTS = TESTS / "checkpoints"
GOLDEN = TESTS / "golden"
