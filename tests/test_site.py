"""The site that `make site` builds: its links, its search, its reference, and the tutorials that the build runs."""

import html
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, unquote

import pytest
from filelock import FileLock
from paths import DOCS, ROOT

import rmsprop
from rmsprop.race.page import SETTINGS

sys.path.insert(0, str(DOCS))

import conf
import docstrings
import executed

PAGES = sorted(path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make site` builds it: with warnings as errors, and with no proxy that leads anywhere."""
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"  # one for all workers
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    with FileLock(out.with_suffix(".lock")):
        if not (out / "built").exists():
            done = subprocess.run(
                [*command, "-d", str(out / ".doctrees"), str(DOCS), str(out)],
                env={**os.environ, **nowhere},
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            (out / "built").touch()
    return out


@pytest.mark.long
def test_every_page_is_built_and_every_internal_link_leads_somewhere(site: Path) -> None:
    """Files, pictures, anchors and settings of the live page exist; only the text's own links lead outside."""
    found = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert {path.relative_to(site).with_suffix("").as_posix() for path in found} >= set(PAGES)
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in found.items()}
    count = 0
    for path, text in found.items():
        for kind, target in re.findall(r'\b(href|src)="([^"]*)"', text):
            name, _, anchor = html.unescape(target).partition("#")
            if "://" in name or name.startswith("mailto:"):
                assert kind == "href", f"{path.name} loads {target}"
                continue
            to = (path.parent / unquote(name.partition("?")[0])).resolve() if name else path
            assert to.exists(), f"{path.name}: {target}"
            if anchor and to == site / "live.html":
                given = parse_qs(anchor, strict_parsing=True)
                assert set(given) <= {"figure", "controls", *SETTINGS}, f"{path.name}: {target}"
            elif anchor and to.suffix == ".html":
                assert unquote(anchor) in anchors[to], f"{path.name}: {target}"
            count += 1
    assert count > 1000


@pytest.mark.long
def test_sentences_in_tables_have_a_readable_width(site: Path) -> None:
    """Each cell that holds one has the class to which the style sheet gives the width; columns of numbers do not."""
    style = (site / "_static" / "site.css").read_text(encoding="utf-8")
    assert re.search(r"td\.prose \{ min-width: \d+rem", style)
    pages = [site / f"{page}.html" for page in PAGES]
    cells = [cell for path in pages for cell in CELL.findall(path.read_text(encoding="utf-8"))]
    long = [marks for marks, text in cells if len(html.unescape(re.sub("<[^>]*>", "", text)).strip()) >= 40]
    short = [marks for marks, text in cells if re.fullmatch(r"<p>[\d.]+</p>", text.strip())]
    assert len(long) > 100
    assert all("prose" in marks for marks in long)
    assert sum("prose" in marks for marks in short) < len(short) / 10


CELL = re.compile(r"<td([^>]*)>(.*?)</td>", re.DOTALL)

QUERIES = {
    "cartpole": "tutorials/a2c",
    "efficientnet": "tutorials/efficientnet",
    "tensorflow": "coming",
    "stochastic": "robust",
    "bfloat16": "tutorials/memory",
    "ravine": "choosing",
    "checkpoints": "checkpoints",
    "musl": "install",
    "clip_global_norm": "api",
    "deprecated": "releasing",
    "keras2": "dialects/keras2",
    "race": "cli",
    "hyperparameters": "recipes",
    "fuzzers": "testing",
}


@pytest.mark.long
def test_the_search_finds_the_pages(site: Path) -> None:
    """The index that the search box loads has each word under the page that answers it."""
    stem = pytest.importorskip("snowballstemmer").stemmer("english").stemWord
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    assert set(index["docnames"]) == set(PAGES)
    for word, page in QUERIES.items():
        hits = [index[where].get(stem(word), []) for where in ("terms", "titleterms")]
        numbers = {number for hit in hits for number in (hit if isinstance(hit, list) else [hit])}
        assert page in {index["docnames"][number] for number in numbers}, word


@pytest.mark.long
def test_the_order_of_search_results_is_the_sites(site: Path) -> None:
    """The pages that search loads hold docs/scorer.js, which names pages that exist and Sphinx's own weights."""
    scorer = (DOCS / "scorer.js").read_text(encoding="utf-8")
    assert any(scorer.strip() in path.read_text(encoding="utf-8") for path in (site / "_static").glob("*.js"))
    own = (site / "_static" / "searchtools.js").read_text(encoding="utf-8")
    for weight, value in re.findall(r"(\w+): (-?\d+),", scorer):
        assert re.search(rf"\b{weight}: {value},", own), weight
    for names in re.findall(r"/\^(.*?)/\.test", scorer):
        for name in names.strip("()").replace("\\/", "/").split("|"):
            assert name == "genindex" or any(page.startswith(name) for page in PAGES), name


PUBLIC = set(rmsprop.__all__) - {"checkpoint", "functional", "__version__"}


def test_the_reference_has_a_directive_for_every_public_name() -> None:
    """Each name of __all__ that is not a module has one directive in api.md."""
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    found = re.findall(r"^\.\. (?:autoclass|autofunction|py:data):: rmsprop\.(\w+)$", text, re.MULTILINE)
    assert sorted(found) == sorted(PUBLIC)


@pytest.mark.long
def test_the_reference_has_every_public_name_and_argument(site: Path) -> None:
    """Each name of __all__, each argument of RMSprop under its group's heading, and each method."""
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in PUBLIC:
        assert f'id="rmsprop.{name}"' in text, name
    for name in ("rmsprop.functional.rmsprop", "rmsprop.checkpoint.save", "rmsprop.checkpoint.load"):
        assert f'id="{name}"' in text, name
    terms = set(re.findall(r"<dt><code[^>]*><span class=\"pre\">\**(\w+)</span>", text))
    assert set(inspect.signature(rmsprop.RMSprop).parameters) <= terms
    headings = re.findall(r'<p class="rubric">(.*?)</p>', text)
    assert {"Half precision", "Robustness and execution", "Gradient and weight clipping (None: off)"} <= set(headings)
    own = {name for name, value in vars(rmsprop.RMSprop).items() if name[0] != "_" and hasattr(value, "__doc__")}
    found = set(re.findall(r'id="rmsprop\.RMSprop\.(\w+)"', text))
    assert own - {"backend", "profile_hook_step"} == found  # an annotation, and torch's hook for its profiler


@pytest.mark.long
def test_the_tutorials_have_run(site: Path) -> None:
    """Each shows what it printed; those that draw show the picture."""
    for page in (name for name in PAGES if name.startswith("tutorials/")):
        text = (site / f"{page}.html").read_text(encoding="utf-8")
        blocks = (DOCS / f"{page}.md").read_text(encoding="utf-8")
        assert text.count('class="output') >= blocks.count("\n```python") // 2
        assert ("<img " in text.partition("<article")[2]) == ("plt.subplots" in blocks)


def test_the_first_page_links_every_page_of_the_sections() -> None:
    """The first page names all pages in its text, for who reads it on its own."""
    linked = re.findall(r"\]\((\S+)\.md\)", (DOCS / "index.md").read_text(encoding="utf-8"))
    listed = {page for pages in conf.SECTIONS.values() for page in pages if (DOCS / f"{page}.md").exists()}
    assert set(linked) == listed


def test_every_page_has_a_place_in_a_section() -> None:
    """Those of the sections, the first page, and the dialects under theirs."""
    listed = [page for pages in conf.SECTIONS.values() for page in pages if (DOCS / f"{page}.md").exists()]
    assert len(listed) == len(set(listed))
    assert {page for page in PAGES if not page.startswith("dialects/")} == {*listed, "index"}
    assert list(conf.SECTIONS) == ["Learn", "Start", "Guides", "Reference", "Project"]
    assert len([page for page in PAGES if page.startswith("tutorials/")]) >= 4


def test_a_block_shows_its_output_and_its_error(tmp_path: Path) -> None:
    """Blocks share their names; output follows its block; a failing block ends the build with its page and line."""
    page = tmp_path / "page.md"
    text = "# A\n\n```python\nx = 1\nprint(x)\n```\n\nword\n\n```python\ny = x + 1\n```\n\n```python\nprint(y)\n```\n"
    found = executed.run(text, page)
    assert re.findall(r"```{code-block} text\n:class: output\n\n(.*?)\n```", found, re.DOTALL) == ["1", "2"]
    assert re.sub(r"\n\n```{code-block} text\n:class: output\n\n.*?\n```", "", found) == text
    with pytest.raises(RuntimeError, match=r"page.md, the block at line 3:(?s:.*)line 4, in <module>(?s:.*)ZeroDiv"):
        executed.run("# A\n\n```python\n1 / 0\n```\n", page)


def test_docstrings_become_lists_and_literals() -> None:
    """A heading with entries is a list of definitions; marks outside literals are escaped; a doctest stays."""
    text = inspect.cleandoc("""Return `x` and *y*.

    Args:
        one: first line
            that goes on.
        two, three: others.
    Raises: ValueError for a_
        reason.

    >>> 1 + 1
    2
    """)
    assert [line for line in docstrings.rest(text.split("\n")) if line] == [
        "Return ``x`` and \\*y\\*.",
        ".. rubric:: Args",
        "``one``",
        "    first line that goes on.",
        "``two``, ``three``",
        "    others.",
        ":Raises: ValueError for a\\_ reason.",
        ">>> 1 + 1",
        "2",
    ]


@pytest.mark.parametrize(
    ("link", "page", "expected"),
    [
        ("[a](b.md#c)", "index", "[a](/b.md#c)"),
        ("[a](../b.md)", "dialects/keras2", "[a](/b.md)"),
        ("[a](../CONTRIBUTING.md)", "index", "[a](/contributing.md)"),
        ("[a](docs/robust.md)", "security", "[a](/robust.md)"),
        ("[a](../bench/results)", "index", "a (`bench/results`)"),
        ("[`x.py`](../examples/x.py)", "trainers", "`x.py`"),
        ("[a](#b)", "index", "[a](#b)"),
        ("[a](https://example.org/b.md)", "index", "[a](https://example.org/b.md)"),
        ("![a](figures/eps.png)", "choosing", "![a](/figures/eps.png)"),
    ],
)
def test_links_are_those_of_the_site(link: str, page: str, expected: str) -> None:
    """Pages by their page, files of the root by theirs, and other files of the repository by name."""
    assert conf._LINK.sub(lambda found: conf.local_link(found, page), link) == expected
