"""What commands say and how they end, and how they hand over to a module's own command line."""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import NoReturn, TypeVar

import typer

TRAINER_COMMAND = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],  # the module's own parser answers --help
}
Result = TypeVar("Result")


def start(module: str, arguments: list[str]) -> None:
    """Let a module's own command line read the arguments."""
    import_module(f".{module}", __package__).main(arguments)


def run(action: Callable[[], Result]) -> Result:
    """Call `action`; what a user can mend becomes a message instead of a traceback."""
    try:
        return action()
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))


def say(text: str) -> None:
    """Write a line for the user."""
    typer.echo(text)


def say_once(text: str) -> None:
    """Say it if this is the first of the processes that a launcher started."""
    if os.environ.get("RANK", "0") == "0":
        say(text)


def fail(message: str) -> NoReturn:
    """Write why it does not go on, and exit with 1."""
    typer.echo(f"error: {message}", err=True)
    sys.exit(1)
