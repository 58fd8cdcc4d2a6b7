"""`rmsprop` and `python -m rmsprop`: run the command line, or report which package it needs."""

import io
import sys


def main() -> None:
    """Run the command line.

    Raises: SystemExit(1) with a message if the packages of the `cli` extra are missing.
    """
    try:
        from rmsprop.cli import app
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("rmsprop"):
            raise
        sys.exit(f"The command line needs {missing.name}: pip install 'rmsprop[cli]'")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not be able to print every name
    app()


if __name__ == "__main__":
    main()
