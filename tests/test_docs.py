"""The docs are true and fresh: every claim is run, every generated page compared, every link followed."""

import re
import sys
from pathlib import Path

import pytest

from rmsprop.dialects import DIALECTS

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

import build  # noqa: E402
import claims  # noqa: E402

PAGES = sorted(DOCS.glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_a_claim_of_the_docs_is_true(name: str) -> None:
    """The run behind the claim ends as the page says, and its table is rectangular."""
    finding = claims.measure(name)
    assert finding.rows
    assert {len(finding.header)} == {len(row) for row in finding.rows}


def test_the_docs_are_fresh() -> None:
    """Every generated page is what the code says today, and markers and claims match one to one."""
    assert build.check() == []


def test_a_stale_page_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--check names a page that was edited, a marker without a claim, a claim without a marker, a lost figure."""
    for path in PAGES:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    choosing = (tmp_path / "choosing.md").read_text(encoding="utf-8")
    (tmp_path / "choosing.md").write_text(choosing.replace("claim: scale ", "claim: scales "), encoding="utf-8")
    (tmp_path / "equation.md").write_text("v = g\n", encoding="utf-8")
    monkeypatch.setattr(build, "DOCS", tmp_path)
    found = "\n".join(build.check())
    for sentence in (
        "docs/equation.md is stale",
        "no block for the claim 'scale'",
        "quotes 'scales', which",
        "figures/ravine.png is missing",
    ):
        assert sentence in found
    monkeypatch.setattr(sys, "argv", ["build.py", "--check"])
    with pytest.raises(SystemExit, match="make docs"):
        build.main()


def test_a_marker_without_an_end_is_refused() -> None:
    """A block that is opened and not closed would swallow the page."""
    with pytest.raises(ValueError, match="needs its partner"):
        build.markers("<!-- claim: scale -->\n\n<!-- claim: eps -->\n<!-- end -->")


def test_every_block_is_filled() -> None:
    """No marker stands empty: each holds its table, and its figure where there is one."""
    blocks = dict(build.MARKER.findall((DOCS / "choosing.md").read_text(encoding="utf-8")))
    for name, text in blocks.items():
        assert "| --- |" in text, name
        assert (f"figures/{name}.png" in text) == (name in build.FIGURES), name


def test_figures_are_small() -> None:
    """A reader on a slow line loads every figure: each stays under 100 KB, and none is left over."""
    found = {path.stem: path.stat().st_size for path in (DOCS / "figures").glob("*.png")}
    assert set(found) == set(build.FIGURES)
    assert max(found.values()) < 100_000


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file that exists and, after #, a heading in it."""
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [build.slug(heading) for heading in headings], target


def test_every_command_is_documented() -> None:
    """docs/cli.md has a section for every command that is registered, and names every option of it."""
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert build.commands()
    for name, function in build.commands().items():
        assert f"\n## rmsprop {name}\n" in page
        section = page.split(f"\n## rmsprop {name}\n")[1].split("\n## ")[0]
        assert section.count("\n| `") == len(list(build.annotated(function)))


def test_every_dialect_is_documented() -> None:
    """docs/dialects.md has a row and a section for every dialect, with its words and its source."""
    page = (DOCS / "dialects.md").read_text(encoding="utf-8")
    for name, row in DIALECTS.items():
        assert f"| [`{name}`](#" in page
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert row.source in section
        assert all(f"`{word}`" in section for word in (*row.words, *row.refused))


def test_the_first_lines_run() -> None:
    """The Python on the first page runs as it stands."""
    page = (DOCS / "index.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    for source in blocks:
        exec(compile(source, "index.md", "exec"), {})
