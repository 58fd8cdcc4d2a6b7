"""The command line: one module per command, none of which imports torch or a plotting library before it runs."""

from typing import Annotated

import typer

from rmsprop import __version__
from rmsprop.cli.bench import bench
from rmsprop.cli.check import check
from rmsprop.cli.convert import convert
from rmsprop.cli.demo import demo
from rmsprop.cli.dialects import dialects
from rmsprop.cli.inspect import inspect
from rmsprop.cli.race import race
from rmsprop.cli.recipes import recipes
from rmsprop.cli.translate import translate

app = typer.Typer(
    name="rmsprop",
    help="RMSprop: see it train, see why it works, and look up what each framework means by it.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, race, dialects, recipes, translate, convert, inspect, bench):
    app.command()(command)
app.command(context_settings={"allow_interspersed_args": False})(check)  # what follows the script is the script's own


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rmsprop {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version)] = False,
) -> None:
    del version  # its callback has done the work
