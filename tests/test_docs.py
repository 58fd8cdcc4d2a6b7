"""The docs are true and fresh: every claim is run, every generated page compared, every link followed."""

import ast
import html
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl
from xml.etree import ElementTree

import pytest
import torch
from cases import mostly_long
from paths import DOCS, ROOT

from rmsprop.dialects import DIALECTS, UNFIT
from rmsprop.race import page as live

sys.path.insert(0, str(DOCS))

import build
import claims
import learn_claims
import learn_figures
import trainers_page

PAGES = sorted(DOCS.rglob("*.md"))
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


LONG = {
    "majority",
    "spike",
    "eps",
    "hover",
    "smooth",
    "digits",
    "unscaled",
    "turned",
    "ravine",
    "drift",
    "scale",
}  # whole trainings


@pytest.mark.parametrize("name", mostly_long(claims.CLAIMS, lambda _, name: name not in LONG))
def test_a_claim_of_the_docs_is_true(name: str) -> None:
    """The run behind the claim ends as the page says, and its table is rectangular."""
    finding = claims.measure(claims.CLAIMS[name])
    assert finding.rows
    assert {len(finding.header)} == {len(row) for row in finding.rows}


LEARN = DOCS / "learn.md"


@cache
def measured(name: str) -> claims.Measured:
    """Return the result of a claim of the chapter."""
    return claims.measure(learn_claims.CLAIMS[name])


WHOLE_TRAININGS = {"angles", "to_adam", "one_rate"}


@pytest.mark.parametrize("name", mostly_long(learn_claims.CLAIMS, lambda _, name: name not in WHOLE_TRAININGS))
def test_the_chapter_says_what_is_measured(name: str) -> None:
    """Every number of a claim stands in a sentence of the chapter, or in a table that is the measured one."""
    finding, page = measured(name), LEARN.read_text(encoding="utf-8")
    assert finding.rows or finding.quotes
    assert bool(finding.rows) == (name in learn_claims.TABLES)
    assert learn_claims.missing(page, finding.quotes) == []
    if finding.rows:
        assert f"<!-- claim: {name} -->\n\n{build.table(finding.header, finding.rows)}\n<!-- end -->" in page


@pytest.mark.long
def test_every_number_of_the_chapter_is_measured_or_given() -> None:
    """Outside its code and tables, the chapter has no number that is neither in a claim's phrase nor a setting."""
    page = LEARN.read_text(encoding="utf-8")
    page = re.sub(
        r"```.*?```|<!-- claim.*?<!-- end -->|<!-- figure.*?<!-- end -->|`[^`]*`", "", page, flags=re.DOTALL
    )
    text = " ".join(re.sub(r"\]\([^)]*\)|\*\*\d+\.\*\*|^\|.*$", "", page, flags=re.MULTILINE).split())
    for name in learn_claims.CLAIMS:
        for quote in measured(name).quotes:
            text = text.replace(quote, "")
    loose = set(re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", text)) - learn_claims.GIVEN
    assert loose == set()


@pytest.mark.parametrize(
    "name",
    mostly_long(
        learn_figures.LEARN_FIGURES, lambda _, name: learn_figures.LEARN_FIGURES[name][0] not in WHOLE_TRAININGS
    ),
)
def test_a_figure_of_the_chapter_is_small_and_fresh(name: str) -> None:
    """A figure is SVG of under 20 KB with words for who cannot see it, differs from the file in places alone, and
    its setting of the live page is linked."""
    claim, draw = learn_figures.LEARN_FIGURES[name]
    svg, kept = draw(measured(claim)), (DOCS / "figures" / f"{name}.svg").read_text(encoding="utf-8")
    title = ElementTree.fromstring(svg)[0].text
    assert title
    assert "nan" not in svg
    assert len(svg.encode()) < 20_000
    places = r"-?\d+\.?\d*"
    assert re.sub(places, "#", svg) == re.sub(places, "#", kept)
    assert re.findall(r">([^<]+)<", svg) == re.findall(r">([^<]+)<", kept)
    page = LEARN.read_text(encoding="utf-8")
    link = f'<a href="live.html#{html.escape(learn_figures.LIVE[name])}">Move it yourself</a>'
    assert f"![{title}](figures/{name}.svg)\n\n{link}\n" in page


def test_the_links_into_the_live_page_fit_it() -> None:
    """A link names panels, controls and settings that the live page has."""
    for name, fragment in learn_figures.LIVE.items():
        given = dict(parse_qsl(fragment, strict_parsing=True))
        assert set(given.pop("figure", "land").split(",")) <= set(live.PANELS), name
        assert set(given.pop("controls", "lr").split(",")) <= set(live.CONTROLS), name
        assert set(given) <= set(live.SETTINGS), name


def test_a_phrase_that_the_chapter_lacks_is_named() -> None:
    """A phrase is found across line ends, and one with another number is not."""
    assert learn_claims.missing("is 9.5 lr\nlong", ["9.5 lr long", "9.4 lr long"]) == ["9.4 lr long"]


def test_every_benchmark_has_a_row_among_the_numbers() -> None:
    """numbers.md names each file of bench/ that can be run, and no other."""
    rows = re.findall(r"^\| .*?bench/(\w+)\.py", (DOCS / "numbers.md").read_text(encoding="utf-8"), re.MULTILINE)
    runs = [path.stem for path in (ROOT / "bench").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert sorted(rows) == sorted(runs)


def test_the_docs_are_fresh() -> None:
    """Every generated page is what the code says today, and markers and claims match one to one."""
    assert build.check() == []


def test_a_stale_page_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--check names a page that was edited, lost or left over, a marker without its claim, a lost figure."""
    for folder in ("dialects", "tutorials"):
        (tmp_path / folder).mkdir()
    for path in PAGES:
        (tmp_path / path.relative_to(DOCS)).write_bytes(path.read_bytes())
    (tmp_path / "dialects" / "keras2.md").unlink()
    (tmp_path / "dialects" / "keras9.md").write_text("# keras9\n", encoding="utf-8")
    choosing = (tmp_path / "choosing.md").read_text(encoding="utf-8")
    (tmp_path / "choosing.md").write_text(choosing.replace("claim: scale ", "claim: scales "), encoding="utf-8")
    learn = (tmp_path / "learn.md").read_text(encoding="utf-8")
    (tmp_path / "learn.md").write_text(
        re.sub("(figure: angles|claim: same_numbers) ", r"\1x ", learn), encoding="utf-8"
    )
    (tmp_path / "equation.md").write_text("v = g\n", encoding="utf-8")
    memory = (tmp_path / "memory.md").read_text(encoding="utf-8")
    (tmp_path / "memory.md").write_text(memory.replace(" ± ", " about ", 1), encoding="utf-8")
    monkeypatch.setattr(build, "DOCS", tmp_path)
    found = "\n".join(build.check())
    for sentence in (
        "docs/equation.md is stale",
        "docs/dialects/keras2.md is stale",
        "docs/memory.md is stale",
        "docs/dialects/keras9.md is left over",
        "no block for the claim 'scale'",
        "quotes 'scales', absent from docs/claims.py",
        "figures/ravine.png is missing",
        "figures/angles.svg is missing",
        "docs/learn.md needs one figure block each for point, rates",
        "docs/learn.md needs one claim block each for by_hand, same_numbers",
        "figures/distributed.png is not drawn from the current distributed.json",
        "figures/release.png is not drawn from the current release.json",
        "figures/state_training.png is not drawn from the current state_training.json",
    ):
        assert sentence in found
    monkeypatch.setattr(sys, "argv", ["build.py", "--check"])
    with pytest.raises(SystemExit, match="make docs"):
        build.main()


def test_writing_the_pages_makes_them_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--pages writes what is generated from the code, and runs no claim."""
    for page in ("choosing.md", "training.md", "learn.md", "memory.md"):
        (tmp_path / page).write_bytes((DOCS / page).read_bytes())
    monkeypatch.setattr(build, "DOCS", tmp_path)
    monkeypatch.setattr(build, "FIGURES", {})
    (tmp_path / "figures").mkdir()
    for name in build.LEARN_FIGURES:
        (tmp_path / "figures" / f"{name}.svg").write_text("")
    monkeypatch.setattr(sys, "argv", ["build.py", "--pages"])
    build.main()
    assert build.check() == []


def test_a_marker_without_an_end_is_refused() -> None:
    """A block that is opened and not closed would swallow the page."""
    with pytest.raises(ValueError, match="every marker needs one end"):
        build.markers("<!-- claim: scale -->\n\n<!-- claim: eps -->\n<!-- end -->")


def test_every_block_is_filled() -> None:
    """No marker stands empty: each holds its table, and its figure where there is one."""
    for _, name, text in build.MARKER.findall((DOCS / "choosing.md").read_text(encoding="utf-8")):
        assert "| --- |" in text, name
        assert (f"figures/{name}.png" in text) == (name in build.FIGURES), name


def test_figures_are_small() -> None:
    """A reader on a slow line loads every figure: each stays under 100 KB, and none is left over."""
    found = {path.stem: path.stat().st_size for path in (DOCS / "figures").glob("*.png")}
    assert set(found) == {*build.FIGURES, *build.MEASURED}
    assert max(found.values()) < 100_000
    assert {path.stem for path in (DOCS / "figures").glob("*.svg")} == set(build.LEARN_FIGURES)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
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


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_is_documented(name: str) -> None:
    """A row in both tables, and a page with its words, states, limits, traps, source and every form of its rule."""
    row = DIALECTS[name]
    tables = (DOCS / "dialects.md").read_text(encoding="utf-8")
    assert tables.count(f"| [`{name}`](dialects/{name}.md) |") == 2
    page = (DOCS / "dialects" / f"{name}.md").read_text(encoding="utf-8").replace("\\|", "|")
    assert page.split("\n")[2] == f"# {name}"
    for word in (*row.arguments, *row.refused, *row.limits, *row.exclusive, *row.requires, *row.states):
        assert f"`{word}" in page, word
    limits = [limit.reason for limit in row.limits.values()]
    for sentence in (row.title, row.source, row.complex, *row.traps, *row.refused.values(), *limits):
        assert sentence in page, sentence
    for condition in row.when:
        assert f"With `{row.argument(condition.setting)}=" in page
    for given in ({}, *({condition.setting: 0.9} for condition in row.when)):
        denominator = {"outside": "d ← √w + ", "inside": "d ← √(w + ", "both": "d ← √(w + ", "floor": "d ← max(√w, "}
        assert f"[6] {denominator[row.complete(given, given)['eps_mode']]}" in page


def test_the_tables_say_what_does_not_fit() -> None:
    """What has the name and another rule is named with the reason, and no dialect carries its name."""
    page = (DOCS / "dialects.md").read_text(encoding="utf-8")
    for name, reason in UNFIT.items():
        assert f"- `{name}`: {reason}." in page
        assert name not in DIALECTS


@pytest.mark.parametrize("name", DIALECTS)
def test_coming_from_another_framework_runs(name: str) -> None:
    """A page's two calls build optimizers of one rule, with the same settings, and both step alike."""
    theirs, ours = PYTHON.findall((DOCS / "dialects" / f"{name}.md").read_text(encoding="utf-8"))
    row = DIALECTS[name]
    assert row.call in theirs
    assert theirs.count(row.example) == 2
    weights = [torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    scope: dict[str, Any] = {"params": [weights[0]]}
    exec(compile(theirs, f"{name}.md", "exec"), scope)
    again = eval(ours.strip(), {**scope, "params": [weights[1]]})
    settled = [{**each.param_groups[0], "params": None, "dialect": None} for each in (scope["optimizer"], again)]
    assert settled[0] == settled[1]
    for _ in range(3):
        for weight, optimizer in zip(weights, (scope["optimizer"], again), strict=True):
            weight.grad = torch.tensor([0.5, -3.0])
            optimizer.step()
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], torch.tensor([1.0, -2.0]))


@pytest.mark.parametrize("page", ["index.md", "learn.md"])
def test_the_python_of_a_page_runs(page: str) -> None:
    """The blocks of the first page and of the chapter run as they stand, one after the other."""
    blocks = PYTHON.findall((DOCS / page).read_text(encoding="utf-8"))
    assert blocks
    scope: dict[str, Any] = {}
    for source in blocks:
        exec(compile(source, page, "exec"), scope)


@pytest.mark.parametrize("row", trainers_page.TRAINERS, ids=lambda row: row.example)
def test_an_example_of_a_trainer_is_short_enough_to_copy(row: trainers_page.Trainer) -> None:
    """40 lines: a sentence, how to run it, and nothing that an import would start; it shows what arrived."""
    lines = (trainers_page.EXAMPLES / f"{row.example}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith('"""')
    assert lines[0].endswith(".")
    assert lines[2].startswith("Run: pip install .")
    assert f"examples/{row.example}.py" in lines[2]
    main = lines.index('if __name__ == "__main__":')
    assert any(".explain()" in line for line in lines[main:])
    tree = ast.parse("\n".join(lines[:main]))
    calls = [node for node in tree.body[1:] if isinstance(node, ast.Expr)]
    assert [ast.unparse(call)[:26] for call in calls] in ([], ["default_registry.register("])
    assert all(trap and not trap.endswith(".") for trap in row.traps)
