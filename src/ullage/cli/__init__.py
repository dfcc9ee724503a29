"""The command line: one file a command, imported when chosen. Data on stdout, the rest on stderr.

Exit codes: 0 done or fits, 1 does not fit, or nobody reads the output any more, 2 wrong usage or
input, 3 a bug in ullage, 130 interrupted.
"""

import errno
import importlib
import os
import pkgutil
import signal
import sys
from io import TextIOWrapper
from typing import Any

import typer
from typer.core import TyperGroup

from ullage.cli.machine import NEEDS_RUN
from ullage.errors import UllageError

_NOT_COMMANDS = {"asked", "given", "machine", "options", "session", "show", "written"}
_OF_RUN = {"accelerate", "gguf", "matplotlib", "torch", "transformers"}  # the extra's modules


class _Commands(TyperGroup):
    """The files of this folder as commands; a file is imported when its command is asked for. What
    has its file's name in it is the command, a function or a group."""

    def list_commands(self, ctx: Any) -> list[str]:
        files = (module.name for module in pkgutil.iter_modules(__path__))
        return sorted(name for name in files if name not in _NOT_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        found = getattr(importlib.import_module(f"{__name__}.{cmd_name}"), cmd_name)
        if isinstance(found, typer.Typer):  # commands of its own
            return typer.main.get_command(found)
        command = typer.Typer(add_completion=False, rich_markup_mode=None)
        command.command(name=cmd_name)(found)
        return typer.main.get_command(command)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            # what the library that checks choices puts before each of its messages
            error.message = error.message.removeprefix("Value error, ")
            raise


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _describe() -> None:
    """Plan, shrink, run and measure the memory of large language models."""


def main() -> None:
    """Run the command line; errors become one or two lines on stderr and an exit code.

    With ULLAGE_DEBUG set, those that are not our own keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a sign shows "?"
    interrupts = _note_interrupts()
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if interrupts:
            sys.exit(130)
        if os.environ.get("ULLAGE_DEBUG") and not isinstance(error, UllageError):
            raise
        message, exit_code = _explained(error)
        print(f"ullage: {message}", file=sys.stderr)
        sys.exit(exit_code)


def _note_interrupts() -> list[int]:
    """The interrupts that come, as they come. Importing torch swallows one that comes meanwhile,
    and fails afterwards in its own way."""
    seen: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    return seen


def _explained(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, UllageError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name in _OF_RUN:
        return f"{error.name} {NEEDS_RUN}", 2
    if isinstance(error, OSError):  # a full disk, a file that went away
        full = error.errno == errno.ENOSPC and error.filename is None  # as of stdout, or stderr
        return (f"Cannot write the output: {error.strerror}." if full else str(error)), 2
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{what[:200]}\nThis is a bug: ULLAGE_DEBUG=1 shows where; please report it.", 3
