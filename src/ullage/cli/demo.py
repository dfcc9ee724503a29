"""ullage demo: the same text, the same cap, with and without ullage."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ullage.specs.device import find_device
from ullage.specs.sources import resolve
from ullage.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from ullage.measure.demo import Capped

_MODEL = "smollm2-135m"


def demo(
    cap: Annotated[
        str, typer.Option(metavar="SIZE", help="The hard cap that both runs get.")
    ] = "1152MiB",
) -> None:
    """Kill plain transformers with a long prompt, then read a longer one with ullage under the same
    hard memory cap.

    SmolLM2-135M-Instruct on CPU and Python's own documentation; takes minutes.
    """
    from ullage.measure import demo as runs
    from ullage.runtime.checkpoint import weights_folder

    console = Console(highlight=False, soft_wrap=True)
    cap_bytes = parse_bytes(cap)
    # in bf16, as this model is published; both read it into fp32
    folder = weights_folder(resolve(_MODEL), gguf_dtype="bfloat16")
    model, device = replace(resolve(str(folder)), name=_MODEL), find_device("cpu-16gb")
    ours = runs.ullage_plan(model, device, cap_bytes)
    text = runs.read_text(folder, model)
    theirs = runs.plain_plan(model, device, cap_bytes, text.prompt_tokens)
    console.print(
        f"Text: Python's documentation topics, {len(text.ids):,} tokens; {model.name} reads "
        f"{model.max_context_tokens:,} of them.\n"
        f"Cap: {format_bytes(cap_bytes)}, the same hard limit for both runs.\n"
        f"Planned: plain transformers needs {format_bytes(theirs.peak_bytes)} for that and dies "
        f"after {theirs.cliff.max_model_len or 0:,} tokens; ullage needs "
        f"{format_bytes(ours.peak_bytes)}."
    )
    with console.status("plain transformers reads ever longer prompts ...") as status:
        plain = runs.run_plain(
            theirs, folder, text, lambda read: status.update(f"plain transformers: {read:,} tokens")
        )
    console.print(_verdict(plain, theirs.recipe.workload.prompt_tokens, runs.STEP_TOKENS))
    console.print("ullage, under the same cap:")
    run = runs.run_ullage(ours, folder, text, cap)
    console.print(f"[bold]Answer:[/] ... explains that {escape(run.answer)}")
    console.print(_table(plain, run))
    raise typer.Exit(0 if run.exit_code == 0 else 1)


def _verdict(plain: "Capped", wanted_tokens: int, step_tokens: int) -> str:
    planned = plain.plan.cliff.max_model_len or 0  # a DynamicCache always has a limit
    if plain.exit_code == 0:
        return (
            f"[yellow]Plain transformers survived all {plain.read_tokens:,} tokens here[/], "
            f"against the plan, which said {planned:,}."
        )
    if not plain.out_of_memory:
        return (
            f"[yellow]Plain transformers failed, and not for memory[/] (exit code "
            f"{plain.exit_code}) after {plain.read_tokens:,} tokens: {escape(plain.error)}"
        )
    first_failed = min(plain.read_tokens + step_tokens, wanted_tokens)
    return (
        f"[red]Plain transformers died[/] ({plain.report.mechanism}, exit code "
        f"{plain.exit_code}): it read {plain.read_tokens:,} tokens and not {first_failed:,}; "
        f"planned limit {planned:,}."
    )


def _table(plain: "Capped", ours: "Capped") -> Table:
    table = Table("", "plain transformers", "ullage", box=None)
    rows: dict[str, Callable[[Capped], str]] = {
        "hard cap": lambda run: format_bytes(run.report.limit_bytes),
        "held by": lambda run: run.report.mechanism,
        "planned peak": lambda run: format_bytes(run.plan.peak_bytes),
        "peak the kernel saw": lambda run: (
            "not counted" if run.report.peak_bytes is None else format_bytes(run.report.peak_bytes)
        ),
        "prompt tokens read": lambda run: f"{run.read_tokens:,}",
        "outcome": _outcome,
    }
    for name, cell in rows.items():
        table.add_row(name, cell(plain), cell(ours))
    return table


def _outcome(run: "Capped") -> str:
    if run.exit_code == 0:
        return "[green]finished[/]"
    return "[red]out of memory[/]" if run.out_of_memory else "[yellow]failed[/]"
