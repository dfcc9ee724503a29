"""The command line: one file a command, imported when chosen. Data on stdout, the rest on stderr.

Exit codes: 0 done or fits, 1 does not fit, 2 wrong usage or input, 130 interrupted.
"""

import importlib
import pkgutil
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from ullage.errors import UllageError

_NOT_COMMANDS = {"options", "show"}


class _Commands(TyperGroup):
    """The files of this folder as commands; a file is imported when its command is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        files = (module.name for module in pkgutil.iter_modules(__path__))
        return sorted(name for name in files if name not in _NOT_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{__name__}.{cmd_name}")
        command = typer.Typer(add_completion=False, rich_markup_mode=None)
        command.command(name=cmd_name)(getattr(module, cmd_name))
        return typer.main.get_command(command)


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def _describe() -> None:
    """Plan, shrink, run and measure the memory of large language models."""


def main() -> None:
    """Run the command line; our own errors become one or two lines on stderr and an exit code."""
    try:
        app()
    except UllageError as error:
        print(f"ullage: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
