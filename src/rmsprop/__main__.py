"""`rmsprop` and `python -m rmsprop`: the command line, or the sentence that says what it needs."""

import io
import sys


def main() -> None:
    """Run the command line.

    Raises: SystemExit(1) with one sentence when the packages of the `cli` extra are missing.
    """
    try:
        from rmsprop.cli import app
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("rmsprop"):
            raise
        sys.exit(f"The command line needs {missing.name}: pip install 'rmsprop[cli]'")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # no name is a traceback on a terminal that lacks it
    app()


if __name__ == "__main__":
    main()
