"""The command line, run in this process."""

from typer.testing import CliRunner

from rmsprop.cli import app


def invoke(*arguments: str) -> tuple[int, str]:
    """Return the command's exit code and output, on a wide terminal."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.output
