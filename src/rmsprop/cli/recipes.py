"""`rmsprop recipes`: the settings of published results, from the rows."""

from dataclasses import replace
from typing import Annotated

import typer

from rmsprop.dialects import HYPERS, SWITCHES
from rmsprop.recipes import RECIPES, TEXTS, Recipe, call, complete, find_recipe
from rmsprop.spec import Hyper, Rule


def recipes(name: Annotated[str | None, typer.Argument(help="One recipe, in full. Default: all.")] = None) -> None:
    """List the published settings that `RMSprop.recipe(...)` takes by name, or show one in full.

    A star marks what nobody has looked up, or what the source does not state.

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

    table = Table("recipe", "whose", "dialect", "settings", title="RMSprop's recipes")
    for row in RECIPES.values():
        table.add_row(row.name, row.title, row.dialect, settings(row))
    show(table)


def settings(row: Recipe) -> str:
    """A recipe's settings in its words, with a star at those that nobody has looked up or the source lacks."""
    unsure = {*row.from_memory, *row.assumed}
    return ", ".join(f"{word}={value!r}{'*' if word in unsure else ''}" for word, value in row.settings.items())


def equation(row: Recipe) -> tuple[str, ...]:
    """The lines of the equation with the recipe's numbers."""
    full = complete(row)
    rule = replace(Rule(**{name: full[name] for name in SWITCHES}), momentum=full["momentum"] != 0)
    return rule.equation(Hyper(**{name: full[name] for name in HYPERS}))


def describe(row: Recipe) -> str:
    """A recipe in full: the call, the equation, what belongs to it, what is unsure, and its source."""
    lines = [f"{row.name}: {row.title}", "", f'    RMSprop.recipe("{row.name}", params)']
    lines += [f"    {call(row)}", "", *(f"    {line}" for line in equation(row)), ""]
    lines += [f"    {title}: {getattr(row, text)}" for text, title in TEXTS.items() if getattr(row, text)]
    lines.append(f"    Fixed: {row.fixes}")
    lines += [f"    {line}" for line in unsure(row)]
    lines.append(f"    Source: {row.source}")
    return "\n".join(lines)


def unsure(row: Recipe) -> list[str]:
    """What of a recipe nobody has looked up, and what its source does not state."""
    lines = (
        [f"From memory: {', '.join(TEXTS.get(name, name) for name in row.from_memory)}"] if row.from_memory else []
    )
    reasons = dict.fromkeys(row.assumed.values())
    for reason in reasons:
        words = ", ".join(word for word, why in row.assumed.items() if why == reason)
        lines.append(f"Assumed: {words}: {reason}")
    return lines
