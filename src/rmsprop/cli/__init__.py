"""The command line: one module per command, none of which imports torch or a plotting library before it runs."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rmsprop.cli.bench import bench
from rmsprop.cli.check import check
from rmsprop.cli.convert import convert
from rmsprop.cli.demo import demo
from rmsprop.cli.dialects import dialects
from rmsprop.cli.inspect import inspect
from rmsprop.cli.race import race
from rmsprop.cli.recipes import recipes
from rmsprop.cli.translate import translate
from rmsprop.printing import printable, version


class _Commands(TyperGroup):
    """Commands whose errors are one printable sentence, whatever text of a file is in them."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command. Raises: typer.BadParameter for files and packages that are missing, but the script's own."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if isinstance(getattr(error, "message", None), str):  # of the option parser, or a command's own
                error.message = printable(error.message)  # type: ignore[attr-defined]
                raise
            said = _sentence(error)
            if said is None or ctx.invoked_subcommand == "check":
                raise
            raise typer.BadParameter(printable(said)) from error


def _sentence(error: Exception) -> str | None:
    """What is wrong with the machine, if it is that."""
    if isinstance(error, BrokenPipeError):
        return None  # whoever read the output has left
    if isinstance(error, OSError):
        return f"{error.filename} cannot be read or written: {error.strerror}" if error.filename else str(error)
    if isinstance(error, ModuleNotFoundError) and error.name is not None and not error.name.startswith("rmsprop"):
        return f"this command needs {error.name.partition('.')[0]}: pip install 'rmsprop[cli]'"
    return None


app = typer.Typer(
    name="rmsprop",
    cls=_Commands,
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
        typer.echo(f"rmsprop {version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version)] = False,
) -> None:
    del version  # its callback has done the work
