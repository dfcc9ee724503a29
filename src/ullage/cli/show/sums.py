"""The lines of the sum behind a plan, each with how far it can be trusted."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from ullage.planner.engines import ENGINES
from ullage.planner.memory import explain
from ullage.planner.search import describe
from ullage.specs.calibration import Calibration
from ullage.specs.footprint import Term
from ullage.specs.plan import Plan
from ullage.specs.workload import PHASES
from ullage.units import format_bytes


def sums(plan: Plan, calibration: Calibration | None) -> dict[str, list[dict[str, Any]]]:
    """Every line by phase; under ``request`` what a single request can take beside them."""
    lines: dict[str, list[Term]] = {
        phase: explain(plan.recipe, phase, calibration) for phase in PHASES
    }
    engine = ENGINES[plan.recipe.execution.engine]
    lines["request"] = engine.worst_request_terms(plan.recipe)
    return {name: [asdict(term) for term in terms] for name, terms in lines.items()}


def show_best(console: Console, plan: Plan, calibration: Calibration | None) -> None:
    """Print the sums of the best of a search."""
    work = plan.recipe.workload
    size = f"{work.sequences:,} x {work.context_tokens:,} tokens"
    console.print(f"\nThe first, at {size}: {describe(plan.recipe)}")
    console.print(sums_table(plan, calibration))


def sums_table(plan: Plan, calibration: Calibration | None) -> Table:
    """`sums` for people: a phase after the other, its total last."""
    table = Table("phase", "part", "what", box=None, pad_edge=False)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("label")
    table.add_column("source")
    for phase in PHASES:
        for term in explain(plan.recipe, phase, calibration):
            size = format_bytes(term.nbytes)
            table.add_row(phase, term.part, term.what, size, term.label, term.source)
        total = format_bytes(plan.phases[phase].total_bytes)
        table.add_row(phase, "", "total", total, end_section=True)
    return table
