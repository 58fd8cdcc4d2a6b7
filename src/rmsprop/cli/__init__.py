"""The command line, with one module per command. Importing it imports neither torch nor a plotting library."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rmsprop.cli.bench import bench
from rmsprop.cli.check import check
from rmsprop.cli.convert import convert
from rmsprop.cli.demo import demo
from rmsprop.cli.dialects import dialects
from rmsprop.cli.estimate import estimate
from rmsprop.cli.inspect import inspect
from rmsprop.cli.race import race
from rmsprop.cli.recipes import recipes
from rmsprop.cli.translate import translate
from rmsprop.printing import printable, version


class _Commands(TyperGroup):
    """A group of commands with whole summaries, whose errors are one printable sentence, whatever they quote."""

    def format_commands(self, _: Any, formatter: Any) -> None:
        """Write each command with its whole summary, which the option parser would cut to one line."""
        rows = [(name, command.get_short_help_str(limit=1 << 16)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: Any) -> Any:
        """Run a command.

        Raises: typer.BadParameter for missing files and packages, except for those of a script under `check`.
        """
        try:
            return super().invoke(ctx)
        except Exception as error:
            if isinstance(getattr(error, "message", None), str):  # an error of the option parser or of a command
                error.message = printable(error.message)  # type: ignore[attr-defined]
                raise
            message = _message(error)
            if message is None or ctx.invoked_subcommand == "check":
                raise
            raise typer.BadParameter(printable(message)) from error


def _message(error: Exception) -> str | None:
    """Return a message for a missing file or package, or None for any other error."""
    if isinstance(error, BrokenPipeError):
        return None  # the reader of the output has closed it
    if isinstance(error, OSError):
        return f"{error.filename} cannot be read or written: {error.strerror}" if error.filename else str(error)
    if isinstance(error, ModuleNotFoundError) and error.name is not None and not error.name.startswith("rmsprop"):
        return f"this command needs {error.name.partition('.')[0]}: pip install 'rmsprop[cli]'"
    return None


app = typer.Typer(
    name="rmsprop",
    cls=_Commands,
    help="Train with RMSprop, see why it works, and convert settings and checkpoints between frameworks.",
    no_args_is_help=True,
    rich_markup_mode=None,  # the plain formatter wraps paragraphs and cuts no default
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, race, dialects, recipes, translate, convert, inspect, estimate, bench):
    app.command()(command)
app.command(context_settings={"allow_interspersed_args": False})(check)  # arguments after the script belong to it


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"rmsprop {version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version)] = False,
) -> None:
    del version  # handled by its callback
