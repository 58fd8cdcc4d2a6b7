"""Rebuild the docs. `python docs/build.py` reruns every claim; `--pages` rewrites pages without running claims, and
`--check` lists stale ones.

choosing.md and learn.md are written by hand, except for the blocks between `<!-- claim: NAME -->` or `<!-- figure:
NAME -->` and `<!-- end -->`, which this script fills with the measurements of claims.py and learn_claims.py. The
sentences of learn.md must have the numbers that its claims measure. A block of training.md shows the record of
bench/release.py, and blocks of memory.md show that of bench/state_training.py. equation.md, dialects.md, the page of
each dialect and cli.md are generated from the code.
"""

import argparse
import hashlib
import html
import inspect
import io
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import state_page
import training_page
from claims import CLAIMS, Measured, measure
from distributed_page import distributed_page
from figures import FIGURES, MEASURED
from learn_claims import CLAIMS as LEARN_CLAIMS
from learn_claims import TABLES, missing
from learn_figures import LEARN_FIGURES, LIVE
from matplotlib.figure import Figure
from recipes_page import recipes_page
from trainers_page import trainers_page

from rmsprop import spec
from rmsprop.dialects import DIALECTS, Dialect
from rmsprop.dialects.describe import Part, describe, number, overview
from rmsprop.files import write_whole
from rmsprop.spec import EPS_MODES, WEIGHT_DECAY_MODES, Hyper, Rule

DOCS = Path(__file__).parent
MARKER = re.compile(r"<!-- (claim|figure): (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)
NOTE = "<!-- Written by docs/build.py from {}. Run `make docs` to renew it. -->\n\n"


# --- choosing.md and learn.md --------------------------------------------------------------------


def block(name: str, finding: Measured) -> str:
    """Return the generated lines of a claim: its table and its figure, if it has one."""
    lines = table(finding.header, finding.rows)
    if name in FIGURES:
        lines += f"\n![{FIGURES[name][1]}](figures/{name}.png)\n"
    return f"<!-- claim: {name} -->\n\n{lines}\n<!-- end -->"


def markers(page: str) -> list[str]:
    """Return the names of the claims on a page, in order.

    Raises: ValueError if a marker lacks its end or an end lacks its marker.
    """
    names = [str(name) for _, name, _ in MARKER.findall(page)]
    opened, closed = len(re.findall("<!-- (?:claim|figure): ", page)), page.count("<!-- end -->")
    if not opened == closed == len(names):
        raise ValueError(f"{opened} claim markers, {closed} ends and {len(names)} pairs; every marker needs one end")
    return names


def repeat_claims() -> None:
    """Run every claim and write its block and figure. Raises: AssertionError with the numbers if a claim fails."""
    findings = repeat(CLAIMS)
    for name, (draw, _) in FIGURES.items():
        draw_figure(name, draw(findings[name]))
    page = (DOCS / "choosing.md").read_text(encoding="utf-8")
    page = MARKER.sub(lambda found: block(found[2], findings[found[2]]), page)
    write_whole(DOCS / "choosing.md", partial(Path.write_text, data=page, encoding="utf-8"))


def repeat(claims: Mapping[str, Callable[[], Measured]]) -> dict[str, Measured]:
    """Return the result of every claim, and print how long each took."""
    findings = {}
    for name, claim in claims.items():
        begun = time.perf_counter()
        findings[name] = measure(claim)
        print(f"{name}: true, {time.perf_counter() - begun:.1f} s", flush=True)
    return findings


def repeat_chapter() -> None:
    """Run the claims of learn.md, and write its blocks and figures.

    Raises: AssertionError if a claim fails, or with the phrases that the chapter lacks.
    """
    findings = repeat(LEARN_CLAIMS)
    drawn = {name: draw(findings[claim]) for name, (claim, draw) in LEARN_FIGURES.items()}
    for name, svg in drawn.items():
        write_whole(DOCS / "figures" / f"{name}.svg", partial(Path.write_text, data=svg, encoding="utf-8"))
    page = (DOCS / "learn.md").read_text(encoding="utf-8")
    page = MARKER.sub(lambda found: chapter_block(found[1], found[2], findings, drawn), page)
    write_whole(DOCS / "learn.md", partial(Path.write_text, data=page, encoding="utf-8"))
    lacking = [quote for finding in findings.values() for quote in missing(page, finding.quotes)]
    assert not lacking, f"docs/learn.md must say: {lacking}"


def chapter_block(kind: str, name: str, findings: Mapping[str, Measured], drawn: Mapping[str, str]) -> str:
    """Return the generated lines of the chapter: a claim's table, or a figure with its place in the live page."""
    if kind == "figure":
        alt = html.unescape(re.findall("<title>(.*?)</title>", drawn[name])[0])
        lines = (
            f'![{alt}](figures/{name}.svg)\n\n<a href="live.html#{html.escape(LIVE[name])}">Move it yourself</a>\n'
        )
    else:
        lines = table(findings[name].header, findings[name].rows)
    return f"<!-- {kind}: {name} -->\n\n{lines}\n<!-- end -->"


# --- generated pages -----------------------------------------------------------------------------


def equation_page() -> str:
    """Return the page of the ten lines, the effect of each switch, the numbers and the units."""
    ten = "\n".join(line[4:] for line in (spec.__doc__ or "").splitlines() if line.startswith("    "))
    page = NOTE.format("rmsprop.spec") + "# The equation\n\n"
    page += "Every implementation in this package carries these numbers.\n\n"
    page += f"```\n{ten}\n```\n\n## Switches\n\n"
    page += "A switch cannot change during a run. The first value listed is torch's.\n\n"
    meanings = attributes(Rule)
    base = Rule(momentum=True)
    rows = []
    for name, values in switch_values().items():
        default = getattr(Rule(), name)
        others = [value for value in values if value != default]
        for i, value in enumerate([default, *others]):
            if name == "momentum":
                lines = set(Rule(momentum=value).equation()) - set(Rule(momentum=not value).equation())
            elif value == default:
                lines = {line for other in others for line in _differing(replace(base, **{name: other}), base)}
            else:
                lines = set(_differing(base, replace(base, **{name: value})))
            shown = "<br>".join(f"`{line}`" for line in sorted(lines)) or "no such line"
            rows.append([f"`{name}`" if i == 0 else "", f"`{value!r}`", shown, meanings[name] if i == 0 else ""])
    page += table(["switch", "value", "lines, with momentum on", "meaning"], rows)
    page += "\n## Numbers\n\nSchedules may move these at every step.\n\n"
    numbers = {
        "lr": ("the unit of the parameter", "learning rate: the length of a steady step"),
        "alpha": ("none", "decay of the averages, which span about 1/(1−alpha) steps"),
        "eps": ("of g outside the root, of g² inside it", "bounds the denominator from below"),
        "momentum": ("none", "share of the last step that is repeated"),
        "weight_decay": ("of g per p (l2), of g (l1), none (decoupled, corrected)", "pull toward zero"),
        "reference_lr": ("the unit of the parameter", "the schedule's highest lr, in corrected weight decay"),
        "max_update": ("of lr", "the longest step; also, v at most doubles in one step ([robust.md](robust.md))"),
        "clip_weights": ("the unit of the parameter", "bound of each element of p after [9]"),
        "average": ("none", "`ema=`, the decay of [10] ([training.md](training.md#averages-of-the-weights))"),
    }
    defaults, apart = (
        DIALECTS["torch"].hyper,
        {"reference_lr": "lr", **dict.fromkeys(("max_update", "clip_weights", "average"), "none")},
    )
    page += table(
        ["number", "torch's default", "unit", "meaning"],
        [
            [f"`{f.name}`", apart.get(f.name) or number(getattr(defaults, f.name)), *numbers[f.name]]
            for f in fields(Hyper)
        ],
    )
    page += "\n## State\n\n"
    kept = {
        "step": ("always", "none", "t", "number of steps taken"),
        "square_avg": ("always", "g²", "v", "decaying average of g²"),
        "grad_avg": ("`centered=True`", "g", "m", "decaying average of g"),
        "momentum_buffer": ("momentum > 0", "none; of p with `lr_in_buffer=True`", "b", "decaying sum of directions"),
        "compensation": ("`compensation=True`, half precision", "p", "none", "rounding error of p (Kahan summation)"),
        "ema": ("`ema=`", "p", "e", "average of the weights"),
    }
    slots = (*Rule(momentum=True, centered=True).slots(), "compensation", "ema")
    page += table(["state key", "kept", "unit", "symbol", "meaning"], [[f"`{slot}`", *kept[slot]] for slot in slots])
    page += "\n`square_avg`, `grad_avg` and `momentum_buffer` are float32 for half-precision parameters. "
    page += "`state_dtype=` keeps them in\ntwo bytes, or `square_avg` in one, between steps "
    page += "([robust.md](robust.md#averages-in-two-bytes-or-in-one)).\n"
    page += "\nTo choose settings, see [choosing.md](choosing.md). "
    return page + "For the rule of each framework, see [dialects.md](dialects.md).\n"


def switch_values() -> dict[str, Sequence[Any]]:
    """Return the values to show for each switch of the Rule; for square_avg_init, the two in use."""
    choices: Mapping[str, Sequence[Any]] = {
        "eps_mode": EPS_MODES,
        "weight_decay_mode": WEIGHT_DECAY_MODES,
        "square_avg_init": (0.0, 1.0),
    }
    return {f.name: choices.get(f.name, (False, True)) for f in fields(Rule)}


def _differing(before: Rule, after: Rule) -> Iterator[str]:
    """Return the lines of `after` that are not in `before`."""
    known = before.equation()
    return (line for line in after.equation() if line not in known)


def attributes(documented: type) -> dict[str, str]:
    """Return the entries of a class's "Attributes:" section."""
    section = inspect.cleandoc(documented.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", words) for name, words in found}


def dialects_page() -> str:
    """Return the overview of the dialects, with a link to the page of each."""
    page = NOTE.format("rmsprop.dialects") + "# Dialects\n\n"
    page += (
        "RMSprop is not one algorithm. `RMSprop(params, dialect=NAME)` computes what the named framework computes, "
        "with its argument names and its defaults. Every setting can still be overridden. Each dialect's page has "
        "its equation, arguments, state and traps; `rmsprop dialects NAME` prints the same in a terminal.\n"
    )
    links = {f"`{name}`": f"[`{name}`](dialects/{name}.md)" for name in DIALECTS}
    return page + markdown(overview(), links) + "\nFor the symbols, see [equation.md](equation.md).\n"


def dialect_page(row: Dialect) -> str:
    """Return the page of a dialect."""
    page = NOTE.format("rmsprop.dialects") + f"# {row.name}\n\n{row.title}.\n" + markdown(describe(row))
    return page + "\nSee also: [all dialects](../dialects.md), [the equation and its symbols](../equation.md).\n"


def markdown(parts: Iterable[Part], links: Mapping[str, str] | None = None) -> str:
    """Return the parts of a page as Markdown; cells that are keys of `links` become links."""
    page = ""
    for part in parts:
        page += f"\n## {part.heading}\n" if part.heading else ""
        page += f"\n{part.text}\n" if part.text else ""
        if part.code:
            page += f"\n```{'python' if part.python else ''}\n" + "\n".join(part.code) + "\n```\n"
        if part.rows:
            rows = [[(links or {}).get(cell, cell).replace("\n", "<br>") for cell in row] for row in part.rows]
            page += "\n" + table([cell.replace("\n", " ") for cell in part.header], rows)
        if part.items:
            page += "\n" + "".join(f"- {item}\n" for item in part.items)
    return page


def commands() -> dict[str, Callable[..., Any]]:
    """Return the functions of the registered commands, by name."""
    from rmsprop.cli import app

    found = {}
    for command in app.registered_commands:
        if command.callback is not None:
            found[command.name or command.callback.__name__.replace("_", "-")] = command.callback
    return found


def cli_page() -> str:
    """Return the page of all commands, with options, defaults and examples, from the sources of `--help`."""
    page = NOTE.format("rmsprop.cli") + "# Commands\n\n"
    page += (
        "In a clone, `pip install '.[cli]'` installs them; where the optimizer is installed, "
        "`pip install 'rmsprop[cli]'` adds what they need. `rmsprop COMMAND --help` prints the same in a terminal.\n"
    )
    for name, function in commands().items():
        text, _, examples = inspect.cleandoc(function.__doc__ or "").partition("\n\nExamples:\n\n")
        page += f"\n## rmsprop {name}\n\n{text}\n\n"
        rows = [option_row(parameter, hint) for parameter, hint in annotated(function)]
        if rows:
            page += table(["argument", "default", "meaning"], rows)
        if examples:
            lines = [line.strip() for line in examples.splitlines() if line.strip()]
            page += "\n```sh\n" + "\n".join(lines) + "\n```\n"
    return page


def annotated(function: Callable[..., Any]) -> Iterator[tuple[inspect.Parameter, Any]]:
    """Yield the parameters of a command, each with typer's record of it."""
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        for record in get_args(hints[parameter.name])[1:]:
            if hasattr(record, "param_decls"):
                yield parameter, record


def option_row(parameter: inspect.Parameter, record: Any) -> list[str]:
    """Return a parameter of a command as its name or flags, its default and its help."""
    from typer.models import OptionInfo

    if not isinstance(record, OptionInfo):
        shown = f"`{(record.metavar or parameter.name).upper()}`"
    else:
        # Inside Annotated, typer takes the first flag for its "default" argument.
        flags = [flag for flag in (record.default, *(record.param_decls or ())) if isinstance(flag, str)]
        flags = flags or [f"--{parameter.name.replace('_', '-')}"]
        shown = ", ".join(f"`{flag}{f' {record.metavar}' if record.metavar else ''}`" for flag in flags)
    empty = parameter.default is None or parameter.default is False
    needed = parameter.default is inspect.Parameter.empty
    described = getattr(record, "show_default", None)  # a phrase, if None stands for a default
    if isinstance(described, str) and not needed:
        default = f"`{described}`"
    else:
        default = "required" if needed else "" if empty else f"`{parameter.default}`"
    return [shown, default, record.help or ""]


def training() -> str:
    """Return training.md with the block of its benchmark."""
    return training_page.page((DOCS / "training.md").read_text(encoding="utf-8"))


def memory() -> str:
    """Return memory.md with the blocks of its trainings."""
    return state_page.page((DOCS / "memory.md").read_text(encoding="utf-8"))


PAGES: Mapping[str, Callable[[], str]] = {
    "equation.md": equation_page,
    "dialects.md": dialects_page,
    **{f"dialects/{row.name}.md": partial(dialect_page, row) for row in DIALECTS.values()},
    "recipes.md": recipes_page,
    "trainers.md": trainers_page,
    "training.md": training,
    "memory.md": memory,
    "cli.md": cli_page,
    "distributed.md": distributed_page,
}


# --- all of it -----------------------------------------------------------------------------------


def write_pages() -> None:
    """Write every generated page, without running a claim."""
    for name, write in PAGES.items():
        write_whole(DOCS / name, partial(Path.write_text, data=write(), encoding="utf-8"))
    for name, (draw, source) in MEASURED.items():
        draw_figure(name, draw(), Source=digest(source))


def draw_figure(name: str, figure: Figure, **metadata: str) -> None:
    """Write a figure as a small PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor="white", metadata={"Software": None, **metadata})
    write_whole(DOCS / "figures" / f"{name}.png", partial(Path.write_bytes, data=buffer.getvalue()))


def digest(source: Path) -> str:
    """Return the hash of the record behind a figure, which the figure's metadata holds."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, with bars inside cells escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def slug(heading: str) -> str:
    """Return GitHub's anchor for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def check() -> list[str]:
    """Return a sentence for everything that is stale or missing, without running a claim."""
    problems = []
    for name, write in PAGES.items():
        path = DOCS / name
        if not path.exists() or path.read_text(encoding="utf-8") != write():
            problems.append(f"docs/{name} is stale")
    for path in sorted((DOCS / "dialects").glob("*.md")):
        if path.stem not in DIALECTS:
            problems.append(f"docs/dialects/{path.name} is left over; that dialect does not exist")
    try:
        names = markers((DOCS / "choosing.md").read_text(encoding="utf-8"))
        chapter = (DOCS / "learn.md").read_text(encoding="utf-8")
        markers(chapter)
    except ValueError as error:
        return [*problems, f"docs/choosing.md or docs/learn.md: {error}"]
    for kind, wanted, source in (("figure", LEARN_FIGURES, "learn_figures"), ("claim", TABLES, "learn_claims")):
        if sorted(name for each, name, _ in MARKER.findall(chapter) if each == kind) != sorted(wanted):
            needed = ", ".join(wanted)
            problems.append(
                f"docs/learn.md needs one {kind} block each for {needed} of docs/{source}.py, and no other"
            )
    problems += [f"docs/choosing.md has no block for the claim {name!r}" for name in CLAIMS if name not in names]
    problems += [
        f"docs/choosing.md quotes {name!r}, absent from docs/claims.py" for name in names if name not in CLAIMS
    ]
    repeated = sorted({name for name in names if names.count(name) > 1})
    problems += [f"docs/choosing.md quotes {name!r} twice" for name in repeated]
    for name in FIGURES:
        if not (DOCS / "figures" / f"{name}.png").exists():
            problems.append(f"docs/figures/{name}.png is missing")
    for name in LEARN_FIGURES:
        if not (DOCS / "figures" / f"{name}.svg").exists():
            problems.append(f"docs/figures/{name}.svg is missing")
    for name, (_, source) in MEASURED.items():
        path = DOCS / "figures" / f"{name}.png"
        if not path.exists() or digest(source).encode() not in path.read_bytes():
            problems.append(f"docs/figures/{name}.png is not drawn from the current {source.name}")
    return problems


def main() -> None:
    """Rebuild the docs, or list stale pages with --check. Raises: SystemExit(1) if anything is stale."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; list what is stale and exit with 1")
    parser.add_argument("--chapter", action="store_true", help="write learn.md and its figures only")
    parser.add_argument("--pages", action="store_true", help="write the generated pages only; run no claim")
    options = parser.parse_args()
    if not options.check and not options.chapter:
        write_pages()
    if not options.check and not options.pages:
        repeat_chapter()
    if not options.check and not options.pages and not options.chapter:
        repeat_claims()
    problems = check()
    if problems:
        sys.exit("\n".join([*problems, "Run `make docs`."]))


if __name__ == "__main__":
    main()
