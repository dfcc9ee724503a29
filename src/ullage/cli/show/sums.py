"""The lines of the sum behind a plan, each with how far it can be trusted."""

from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ullage.cli.show import is_wide
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
    console.print(sums_table(plan, calibration, is_wide(console)))


def sums_table(plan: Plan, calibration: Calibration | None, wide: bool) -> Table:
    """`sums` for people: a phase after the other, its total last. Without much room sources stand
    under what they are of."""
    table = Table("phase", "part", box=None, pad_edge=False)
    table.add_column("what", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("label", no_wrap=True)
    if wide:
        table.add_column("source")
    for phase in PHASES:
        for term in explain(plan.recipe, phase, calibration):
            size = format_bytes(term.nbytes)
            source = Text(term.source, overflow="fold")
            what = term.what if wide else Group(term.what, Padding(source, (0, 0, 0, 2)))
            apart = [source] if wide else []
            table.add_row(phase, term.part, what, size, term.label, *apart)
        total = format_bytes(plan.phases[phase].total_bytes)
        table.add_row(phase, "", "total", total, end_section=True)
    return table
