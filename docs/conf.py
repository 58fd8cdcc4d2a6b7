"""Sphinx's configuration: `make site` builds the site into docs/_site, with warnings as errors and no network."""

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from docutils import nodes

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import docstrings  # noqa: E402
import executed  # noqa: E402

# The sections of the site, in order, and their pages. A page that does not exist is left out.
SECTIONS = {
    "Learn": ["learn", "choosing"],
    "Start": ["install", "tutorials/first_steps", "faster"],
    "Guides": [
        "differences",
        *["tutorials/efficientnet", "coming", "translate", "convert", "memory", "tutorials/memory", "tutorials/a2c"],
        *["distributed", "checkpoints", "robust", "training", "trainers", "explain"],
    ],
    "Reference": ["api", "equation", "dialects", "recipes", "cli"],
    "Project": ["testing", "numbers", "changelog", "contributing", "security", "releasing", "conduct"],
}
# Pages whose text is a file of the repository's root, for GitHub and for the site.
MIRRORS = {
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "security": "SECURITY.md",
    "conduct": "CODE_OF_CONDUCT.md",
}

project = "rmsprop"
author = "The rmsprop authors"
copyright = author
version = release = metadata.version("rmsprop")
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_site", "figures", "_static"]
highlight_language = "text"

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88

html_theme = "furo"
html_title = "rmsprop"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_search_scorer = str(DOCS / "scorer.js")
html_show_sourcelink = html_copy_source = False
html_show_sphinx = False
html_theme_options: dict[str, Any] = {"top_of_page_buttons": []}

# A number such as 1e-8 in a cell of a table, which a browser would break after its hyphen.
_NUMBER = re.compile(r"(?<=\de)-(?=\d)")
# From this many characters on, a cell of a table is a sentence.
SENTENCE = 32
_LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)\s]+)\)")


def toctree(title: str, pages: list[str]) -> str:
    """Return a hidden table of contents of the pages that exist."""
    found = [page for page in pages if (DOCS / f"{page}.md").exists()]
    caption = f":caption: {title}\n" if title else ""
    return "\n```{toctree}\n:hidden:\n" + caption + "\n" + "\n".join(found) + "\n```\n"


def local_link(link: re.Match[str], page: str) -> str:
    """Return a link as the site has it: files of the root by their page, other files of the repository by name."""
    mark, text, target = link.groups()
    path, hash, anchor = target.partition("#")
    if "://" in target or target.startswith(("#", "mailto:")) or not path:
        return link[0]
    base = DOCS.parent if page in MIRRORS else (DOCS / page).parent
    wanted = (base / path).resolve()
    for name, file in MIRRORS.items():
        if wanted == DOCS.parent / file:
            return f"{mark}[{text}](/{name}.md{hash}{anchor})"
    if wanted.is_relative_to(DOCS):
        return f"{mark}[{text}](/{wanted.relative_to(DOCS).as_posix()}{hash}{anchor})"
    return text if text.startswith("`") else f"{text} (`{wanted.relative_to(DOCS.parent).as_posix()}`)"


def prepare(_: Any, page: str, source: list[str]) -> None:
    """Mirror files of the root, make links local, run the code of tutorials, and add tables of contents."""
    text = (DOCS.parent / MIRRORS[page]).read_text(encoding="utf-8") if page in MIRRORS else source[0]
    text = _LINK.sub(lambda link: local_link(link, page), text)
    if page.startswith("tutorials/"):
        text = executed.run(text, DOCS / f"{page}.md")
    lines = (_NUMBER.sub("-\u2060", line) if line.startswith("|") else line for line in text.split("\n"))
    text = "\n".join(lines)
    if page == "index":
        text += "".join(toctree(title, pages) for title, pages in SECTIONS.items())
    if page == "dialects":
        text += toctree("", sorted(f"dialects/{path.stem}" for path in (DOCS / "dialects").glob("*.md")))
    source[0] = text


def mark_prose(_: Any, document: nodes.document) -> None:
    """Mark the columns of tables that hold sentences, to which site.css gives the width for them."""
    for body in document.findall(nodes.tbody):
        for column in zip(*(row.children for row in body.findall(nodes.row)), strict=False):
            if max(len(cell.astext()) for cell in column) >= SENTENCE:
                for cell in column:
                    cell["classes"].append("prose")


def setup(app: Any) -> None:
    """Connect the steps that rewrite text and tables, and the one that writes the live page beside the chapter."""
    app.connect("source-read", prepare)
    app.connect("doctree-read", mark_prose)
    app.connect("autodoc-process-docstring", docstrings.process)
    app.connect("build-finished", write_live)


def write_live(app: Any, error: Exception | None) -> None:
    """Write the page that the chapter's figures link to."""
    from rmsprop.files import write_whole
    from rmsprop.race.page import live

    if error is None and app.builder.format == "html":
        write_whole(Path(app.outdir) / "live.html", lambda part: part.write_text(live(), encoding="utf-8"))
