"""What a search found: the ranking, the front, and the change that makes a request fit."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ullage.cli.show import is_wide
from ullage.planner.candidates import Candidate
from ullage.planner.engines import ENGINES
from ullage.planner.explore import Exploration
from ullage.specs.plan import Cliff, Recipe
from ullage.techniques import most_tokens
from ullage.units import format_bytes

TOP = 10
# How a table says a change in few letters.
_SHORT = {
    "--weights": "{} weights",
    "--kv-cache-dtype": "{} KV",
    "--technique": "{}",
    "--prefill-chunk": "chunk {}",
    "--max-num-seqs": "{} seqs",
    "--attention": "{}",
    "--tp": "{} devices",
    "--device": "{}",
}
_REACH = {"context": "context", "concurrency": "sequences", "latency": ""}
_NARROW = {"sequences": "seqs"}


def candidate_json(found: Candidate) -> dict[str, Any]:
    """One combination as JSON types."""
    return {
        "changes": list(found.changes),
        "fits": found.fits,
        "reach": found.reach,
        "peak_bytes": found.peak_bytes,
        "budget_bytes": found.budget_bytes,
        "device": found.recipe.device.name,
        "latency": found.latency and asdict(found.latency),
        "cost_percent": found.cost_percent,
        "known_percent": found.known_percent,
        "figures": [cost.figure and asdict(cost.figure) for cost in found.costs],
        "tails": [cost.tail and asdict(cost.tail) for cost in found.costs],
        "runs": found.runs,
        "hardware": found.hardware,
    }


def exploration_json(explored: Exploration) -> dict[str, Any]:
    """The ranking's top, and the front, as JSON types."""
    return {
        "goal": explored.goal,
        "tried": len(explored.every),
        "fitting": len(explored.ranked),
        "asked": candidate_json(explored.every[0]),
        "ranked": [candidate_json(found) for found in explored.best(TOP)],
        "front": [candidate_json(found) for found in explored.front],
    }


def show_exploration(console: Console, explored: Exploration) -> None:
    """Print the ranking's top, the front and the figures that both rest on."""
    asked = explored.every[0].recipe
    work = asked.workload
    console.print(
        f"{escape(asked.model.name)}, {work.sequences} x {work.context_tokens:,} tokens, for "
        f"{explored.goal}: {len(explored.ranked):,} of {len(explored.every):,} combinations fit."
    )
    tables = _tables(explored)
    for title, (rows, reach) in tables.items():
        console.print(title, end="")
        console.print(_table(rows, reach, is_wide(console)))
    shown = [found for rows, _ in tables.values() for found in rows]
    if not all(found.runs for found in shown):
        console.print("* planned only: `ullage run` does not do it yet.")
    if any(found.cost_percent is None for found in shown):
        console.print("? no figure that can be compared: ranked after a known small loss.")
    for line in (*unmade_lines(asked), *_figures(shown)):
        console.print(line)


def _tables(explored: Exploration) -> dict[str, tuple[list[Candidate], str]]:
    """Rows by the title above them, with what their goal counts: those that there are."""
    top, reach = explored.best(TOP), _REACH[explored.goal]
    elsewhere = [found for found in explored.elsewhere() if found not in top]
    others = "The best on each other device, which ranks after all that fits as asked:"
    nothing = "Nothing"
    if explored.front_is_of_asked_hardware:
        nothing = f"On {_hardware(explored.every[0].recipe)} nothing"
    front = f"{nothing} beats these in memory, quality and latency at once:"
    tables = {
        "": (top, reach),
        f"\n{others}\n": (elsewhere, reach),
        f"\n{front}\n": (explored.shown_front(TOP), ""),
    }
    return {title: rows for title, rows in tables.items() if rows[0]}


def unmade_lines(recipe: Recipe) -> list[str]:
    """The formats of weights that no search offers, for the checkpoint would have to be in them."""
    execution, engine = recipe.execution, ENGINES[recipe.execution.engine]
    made = engine.makes(recipe.device)
    others = [weights for weights in engine.weights if weights not in made]
    if recipe.model.prequantized or not others:
        return []
    return [
        f"Left out: {', '.join(others)} weights, which {execution.engine} makes of no plain "
        "checkpoint: plan one that has them."
    ]


def _hardware(recipe: Recipe) -> str:
    devices = recipe.execution.tensor_parallel * recipe.execution.pipeline_parallel
    return ("" if devices == 1 else f"{devices} x ") + escape(recipe.device.name)


def _table(rows: Iterable[Candidate], reach: str, wide: bool) -> Table:
    table = Table("", box=None, pad_edge=False)
    figures = ("first token", "tokens/s", "loss, added up") if wide else ("TTFT", "tok/s", "loss")
    if not wide:
        reach = _NARROW.get(reach, reach)
    for column in (reach, "memory", *figures):
        if column:
            table.add_column(column, justify="right", no_wrap=True)
    table.add_column("with", overflow="fold")
    for number, found in enumerate(rows, 1):
        reached = [f"{found.reach:,}"] if reach else []
        table.add_row(
            str(number),
            *reached,
            format_bytes(found.peak_bytes),
            *_speed(found),
            _loss(found),
            _with(found),
        )
    return table


def _speed(found: Candidate) -> tuple[str, str]:
    if found.latency is None:
        return "", ""
    return f"{found.latency.ttft_s:,.2f} s", f"{found.latency.tokens_per_s:,.0f}"


def _loss(found: Candidate) -> str:
    known = _percent(found.known_percent)
    if found.cost_percent is not None:
        return known
    return f"{known} + ?" if found.known_percent else "?"


def _percent(loss: float) -> str:
    return f"{loss:.2g}%" if loss < 100 else f"{loss:,.0f}%"


def _with(found: Candidate) -> str:
    words = (change.split(" ") for change in found.changes)
    changes = ", ".join(_SHORT[option].format(value) for option, value in words)
    return (changes or "as asked") + ("" if found.runs else "*")


def _figures(rows: Iterable[Candidate]) -> list[str]:
    """Each figure once, with its source, those of the tail too."""
    costs = {cost for found in rows for cost in found.costs}
    figures = [figure for cost in costs for figure in (cost.figure, cost.tail)]
    found = {f"{row.technique} {row.setting}: {row}; {row.source}." for row in figures if row}
    return ["", "Losses are added up, and rest on:", *sorted(found)] if found else []


def change_line(change: Candidate) -> str:
    """What makes a failing request fit, and what it costs."""
    single = len(change.changes) == 1
    what = "Cheapest single change that fits" if single else "No single change is enough; these are"
    costs = ", ".join(str(cost) for cost in change.change_costs)
    planned_only = "" if change.runs else " Planned only."
    changes = " ".join(change.changes)
    return f"{what}: {changes}: {format_bytes(change.peak_bytes)}, {costs}.{planned_only}"


def size_line(cliff: Cliff, recipe: Recipe) -> str | None:
    """The size that fits without any other change, no longer than can be read; None where none
    does."""
    work = recipe.workload
    longest_tokens = min(cliff.max_model_len or 0, most_tokens(recipe))
    if longest_tokens > work.output_tokens:
        return f"Or {longest_tokens:,} tokens instead of {work.context_tokens:,}."
    if cliff.max_num_seqs:
        return f"Or {cliff.max_num_seqs:,} at a time instead of {work.sequences:,}."
    return None
