"""ullage export: a plan as another engine's command or YAML."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ullage import exporters
from ullage.cli.written import write_text
from ullage.specs.plan import read_plan

Target = StrEnum("Target", {name: name for name in exporters.names()})  # type: ignore[misc]
STDIN = Path("/dev/stdin")


def export(
    plan: Annotated[
        Path,
        typer.Argument(
            metavar="PLAN",
            help="A file that `ullage plan --json` wrote; - reads it from stdin.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Target, typer.Option("--to", help="The engine to write for.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to. Default: stdout.")
    ] = None,
) -> None:
    """Write a plan as another engine's command, code or YAML, with a comment why each thing is set.

    Exit code 0: fits, 1: does not fit, 2: wrong usage or input.
    """
    made = read_plan(STDIN if plan == Path("-") else plan)
    written = exporters.export(made, to.value)
    if out is None:
        typer.echo(written, nl=False)
    else:
        write_text(out, written)
    raise typer.Exit(0 if made.fits else 1)
