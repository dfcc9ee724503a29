"""Write docs/cli.md from the command line's own help; ``--check`` only says whether it is stale."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

CLI_PAGE = Path(__file__).with_name("cli.md")
# Help is laid out for the terminal at hand; a fixed one gives the same page on every machine.
TERMINAL = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
FORCES_COLOR = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")
INTRO = "Written by `make docs` from `--help`; do not edit."


def render(app: typer.Typer, name: str = "ullage") -> str:
    """The page in Markdown: the program's own help, then that of each of its commands."""
    sections = [f"# Command line\n\n{INTRO}\n"]
    for words in _commands(typer.main.get_command(app)):
        title = " ".join((name, *words))
        sections.append(f"## {title}\n\n```\n{_help(app, name, words)}\n```\n")
    return "\n".join(sections)


def main(argv: Sequence[str] | None = None) -> int:
    """Write docs/cli.md, or with ``--check`` return 1 when it is not what would be written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when stale")
    check = parser.parse_args(argv).check
    _fix_terminal()  # before the import: typer reads the environment then
    from ullage.cli import app

    page = render(app)
    if check:
        return _check(page)
    CLI_PAGE.write_text(page, encoding="utf-8")
    return 0


def _fix_terminal() -> None:
    for name in FORCES_COLOR:
        os.environ.pop(name, None)
    os.environ.update(TERMINAL)


def _check(page: str) -> int:
    if CLI_PAGE.exists() and CLI_PAGE.read_text(encoding="utf-8") == page:
        return 0
    print(f"docs/{CLI_PAGE.name} is stale: run make docs", file=sys.stderr)
    return 1


def _commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, the program itself first, groups before what they hold."""
    yield words
    if not hasattr(command, "list_commands"):
        return
    context = typer.Context(command)
    for name in command.list_commands(context):
        yield from _commands(command.get_command(context, name), (*words, name))


def _help(app: typer.Typer, name: str, words: tuple[str, ...]) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], prog_name=name, env=TERMINAL)
    if result.exit_code != 0:
        raise SystemExit(f"`{' '.join((name, *words))} --help` failed:\n{result.output}")
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


if __name__ == "__main__":
    sys.exit(main())
