"""`rmsprop recipes`: list the settings of published results."""

from dataclasses import replace
from typing import Annotated

import typer

from rmsprop.dialects import HYPERS, SWITCHES
from rmsprop.recipes import RECIPES, TEXTS, Recipe, call, complete, find_recipe
from rmsprop.spec import AVERAGING, Averaging, Hyper, Rule


def recipes(
    name: Annotated[str | None, typer.Argument(help="The recipe to show in full. Default: list all.")] = None,
) -> None:
    """List the published settings that `RMSprop.recipe(...)` takes by name, or show one in full.

    A star marks a number that has not been verified or that the source does not state.

    Examples:

    rmsprop recipes

    rmsprop recipes efficientnet
    """
    if name is None:
        _table()
        return
    try:
        row = find_recipe(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(describe(row))


def _table() -> None:
    from rich.table import Table

    from rmsprop.cli.table import show

    table = Table("recipe", "result", "dialect", "settings", title="RMSprop's recipes")
    for row in RECIPES.values():
        table.add_row(row.name, row.title, row.dialect, settings(row))
    show(table)


def settings(row: Recipe) -> str:
    """Return a recipe's settings under its dialect's names, with a star at unverified and assumed ones."""
    starred = {*row.from_memory, *row.assumed}
    given = {**row.settings, **row.averaging}
    return ", ".join(f"{word}={value!r}{'*' if word in starred else ''}" for word, value in given.items())


def equation(row: Recipe) -> tuple[str, ...]:
    """Return the lines of the equation with the recipe's numbers."""
    full = complete(row)
    rule = replace(Rule(**{name: full[name] for name in SWITCHES}), momentum=full["momentum"] != 0)
    average = Averaging.of({**AVERAGING, **row.averaging})
    return rule.equation(Hyper(**{name: full[name] for name in HYPERS}, average=average))


def describe(row: Recipe) -> str:
    """Return a recipe in full: call, equation, circumstances, unverified parts and source."""
    lines = [f"{row.name}: {row.title}", "", f'    RMSprop.recipe("{row.name}", params)']
    lines += [f"    {call(row)}", "", *(f"    {line}" for line in equation(row)), ""]
    lines += [f"    {title}: {getattr(row, text)}" for text, title in TEXTS.items() if getattr(row, text)]
    lines.append(f"    Fixed: {row.fixes}")
    lines += [f"    {line}" for line in unsure(row)]
    lines.append(f"    Source: {row.source}")
    return "\n".join(lines)


def unsure(row: Recipe) -> list[str]:
    """Return lines on the unverified parts of a recipe and on the settings that its source does not state."""
    lines = (
        [f"From memory: {', '.join(TEXTS.get(name, name) for name in row.from_memory)}"] if row.from_memory else []
    )
    reasons = dict.fromkeys(row.assumed.values())
    for reason in reasons:
        names = ", ".join(name for name, why in row.assumed.items() if why == reason)
        lines.append(f"Assumed: {names}: {reason}")
    return lines
