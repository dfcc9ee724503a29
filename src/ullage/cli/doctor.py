"""ullage doctor: what ate the memory, and what to change."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ullage.doctor import Diagnosis, diagnose, learn
from ullage.doctor.diagnosis import Change
from ullage.errors import InputError
from ullage.units import format_bytes

LogArgument = Annotated[
    str,
    typer.Argument(metavar="LOG", help="A log file, or - for standard input.", show_default=False),
]


def doctor(
    log: LogArgument,
    learn_into: Annotated[
        Path | None,
        typer.Option(
            "--learn",
            metavar="FILE",
            help="Take a healthy start into a calibration file for `plan --calibration`.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="NAME|SIZE",
            help="With --learn: what the log ran on, as `plan` gets it. Default: the card that the "
            "log names.",
        ),
    ] = None,
    as_json: bool = typer.Option(False, "--json", help="The diagnosis as JSON."),
) -> None:
    """Read an engine's log: what ate the memory, at which phase, and the cheapest change.

    Reads logs of vLLM, SGLang, TGI, TensorRT-LLM, llama.cpp, Ollama, PyTorch and the kernel. Exit
    code 0: a healthy start, 1: a failure is explained, 2: wrong usage, or the log is not
    understood.
    """
    if device is not None and learn_into is None:
        raise InputError("--device goes with --learn: without it the log's own figures count.")
    diagnosis = diagnose(None if log == "-" else Path(log))
    if learn_into is not None:
        learn(diagnosis, device).write(learn_into)
    if as_json:
        typer.echo(json.dumps(diagnosis.to_json(), indent=2))
    else:
        _show(diagnosis)
    raise typer.Exit(1 if diagnosis.failed else 0)


def _show(diagnosis: Diagnosis) -> None:
    console = Console(highlight=False, soft_wrap=True)
    color = "red" if diagnosis.failed else "green"
    console.print(f"[{color}]{escape(diagnosis.happened)}[/]")
    console.print(escape(_where(diagnosis)))
    if diagnosis.parts:
        console.print(_parts_table(diagnosis))
    for cause in diagnosis.causes:
        console.print(escape(cause))
    for line in diagnosis.evidence:
        console.print(f"[dim]line {line.line:,}:[/] {escape(line.text)}")
    for number, change in enumerate(diagnosis.changes):
        console.print(_advice(change, cheapest=number == 0))
    if diagnosis.planned:
        console.print(escape(diagnosis.planned))


def _where(diagnosis: Diagnosis) -> str:
    """Engine, phase, part and the figures of the request, in one line."""
    said = [f"{diagnosis.engine} {diagnosis.engine_version}".strip()]
    if diagnosis.phase:
        said.append(f"phase: {diagnosis.phase}")
    if diagnosis.culprit:
        said.append(f"part: {diagnosis.culprit}")
    for name in ("wanted", "free", "total"):
        size = getattr(diagnosis, f"{name}_bytes")
        if size is not None:
            said.append(f"{name} {format_bytes(size)}")
    return ", ".join(said)


def _parts_table(diagnosis: Diagnosis) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("part", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("from", no_wrap=True)
    for term in diagnosis.parts:
        size = format_bytes(term.nbytes)
        table.add_row(escape(term.what), size, f"{term.label}, {term.source}")
    return table


def _advice(change: Change, cheapest: bool) -> str:
    frees = f" (frees {format_bytes(change.frees_bytes)})" if change.frees_bytes else ""
    lead = "Cheapest change:" if cheapest else "             or:"
    return f"{lead} [bold]{escape(change.flags)}[/]: {escape(change.why)}{frees}."
