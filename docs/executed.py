"""Runs the Python blocks of a page, in order and in one namespace, and shows what each prints and draws below it."""

import io
import re
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FIGURES = "drawn"  # beside the page, ignored by git


def run(text: str, page: Path) -> str:
    """Return the page's Markdown with the output of each block.

    Mutates: files `drawn/PAGE-N.png` beside the page, one for each figure that a block leaves open.
    Raises: RuntimeError with the page, the line and the traceback if a block fails.
    """
    scope: dict[str, Any] = {"__name__": "__main__"}
    for old in (page.parent / FIGURES).glob(f"{page.stem}-*.png"):
        old.unlink()

    def _run(block: re.Match[str]) -> str:
        line = text.count("\n", 0, block.start(1))
        printed = io.StringIO()
        try:
            with redirect_stdout(printed):
                exec(compile("\n" * line + block[1], str(page), "exec"), scope)
        except Exception as error:
            raise RuntimeError(f"{page.name}, the block at line {line}:\n{traceback.format_exc()}") from error
        shown = block[0]
        if printed.getvalue():
            shown += f"\n\n```{{code-block}} text\n:class: output\n\n{printed.getvalue().rstrip()}\n```"
        return shown + "".join(f"\n\n![{title}]({path})" for title, path in _figures(page))

    return BLOCK.sub(_run, text)


def _figures(page: Path) -> list[tuple[str, str]]:
    """Save and close the open figures. Returns: the title and the path of each, relative to the page."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    import matplotlib.pyplot as plt

    found = []
    for number in plt.get_fignums():
        figure = plt.figure(number)
        folder = page.parent / FIGURES
        folder.mkdir(exist_ok=True)
        count = len(list(folder.glob(f"{page.stem}-*.png")))
        path = folder / f"{page.stem}-{count + 1}.png"
        figure.savefig(path, dpi=120, facecolor="white", bbox_inches="tight", metadata={"Software": None})
        found.append((figure.axes[0].get_title(), f"{FIGURES}/{path.name}"))
        plt.close(figure)
    return found
