"""ullage audit: what really happened, against the plan."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ullage.cli.asked import PlanOptions, workload_of
from ullage.cli.machine import device_to_run
from ullage.cli.options import (
    CalibrationOption,
    ChunkOption,
    DeviceOption,
    KvOption,
    MaxModelLenOption,
    MemoryOption,
    ModelArgument,
    TechniqueOption,
    WeightsOption,
)
from ullage.cli.written import refuse_undrawable, refuse_unwritable
from ullage.errors import DoesNotFit
from ullage.planner import build_plan
from ullage.planner.search import describe
from ullage.runtime.checkpoint import refuse_planned_only, weights_folder
from ullage.specs.calibration import Calibration
from ullage.specs.plan import Recipe
from ullage.specs.sources import resolve
from ullage.specs.workload import PHASES
from ullage.units import format_bytes, parse_tokens

if TYPE_CHECKING:
    from ullage.measure.audit import Audit

_OUTPUT_TOKENS = "16"


def audit(
    model: ModelArgument,
    device: DeviceOption = None,
    memory: MemoryOption = None,
    max_model_len: MaxModelLenOption = None,
    weights: WeightsOption = None,
    kv_cache_dtype: KvOption = None,
    prefill_chunk: ChunkOption = None,
    technique: TechniqueOption = None,
    calibration: CalibrationOption = None,
    output_len: Annotated[
        str, typer.Option(metavar="TOKENS", help="Tokens written at each length.")
    ] = _OUTPUT_TOKENS,
    points: Annotated[int, typer.Option(min=2, max=12, help="Lengths on the ladder.")] = 5,
    plot: Annotated[Path, typer.Option(help="The picture of the curve; .svg or .png.")] = Path(
        "ullage-audit.svg"
    ),
    write: Annotated[
        Path, typer.Option(help="The calibration file for `plan --calibration`.")
    ] = Path("ullage-calibration.json"),
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON.")] = False,
) -> None:
    """Run a ladder of lengths up to 0.92 of what is planned to fit, each in a fresh process, and
    hold what was measured against the plan.

    Takes minutes. Writes a picture and a calibration file.
    """
    options = PlanOptions(
        device, memory, weights, kv_cache_dtype, None, prefill_chunk, tuple(technique or ()),
        calibration=calibration,
    )  # fmt: skip
    refuse_undrawable(plot)
    refuse_unwritable(write)
    spec = resolve(model)
    refuse_planned_only(spec)
    place = device_to_run(device)
    recipe = options.recipe(spec, place, workload_of(spec, max_model_len, output_len, 1))
    budget_bytes, known = options.budget_bytes(place), options.read_calibration()
    largest = _largest_tokens(recipe, budget_bytes, known, max_model_len)
    done = _run(recipe, budget_bytes, known, largest, points)
    from ullage.measure.audit import calibrated
    from ullage.measure.picture import draw_audit

    found = calibrated(done)
    draw_audit(done, plot)
    found.write(write)
    if as_json:
        typer.echo(json.dumps(_as_json(done, found), indent=2))
    else:
        _show(done, found)
    Console(stderr=True, highlight=False).print(
        escape(f"Picture in {plot}; use the calibration by `plan --calibration {write}`.")
    )


def _largest_tokens(
    recipe: Recipe, budget_bytes: int, calibration: Calibration | None, asked: str | None
) -> int:
    """The planned maximum: the cliff, the model's context, or what was asked, whichever is
    least."""
    plan = build_plan(recipe, budget_bytes, calibration)
    if plan.cliff.max_model_len in (0, 1):
        raise DoesNotFit(
            f"Nothing fits in {format_bytes(budget_bytes)}: not even two tokens.", plan.peak_bytes
        )
    limits = [recipe.model.max_context_tokens]
    if plan.cliff.max_model_len is not None:
        limits.append(plan.cliff.max_model_len)
    return min([*limits, parse_tokens(asked)] if asked else limits)


def _run(
    recipe: Recipe, budget_bytes: int, calibration: Calibration | None, largest: int, points: int
) -> "Audit":
    from ullage.measure.audit import fill_ladder, run_audit

    folder = weights_folder(recipe.model)
    lengths = fill_ladder(largest, points)
    console = Console(stderr=True, highlight=False)
    console.print(escape(f"{recipe.model.name}: {describe(recipe)}; lengths {lengths}"))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def on_run(what: str) -> None:
            progress.update(task, description=what, advance=1)

        return run_audit(recipe, budget_bytes, folder, lengths, calibration, on_run)


def _show(audit: "Audit", found: Calibration) -> None:
    console = Console(highlight=False)
    table = Table("tokens", "phase", box=None, pad_edge=False)
    for column in ("planned", "measured", "difference"):
        table.add_column(column, justify="right")
    for point in audit.points:
        for phase in PHASES:
            planned = point.plan.phases[phase].total_bytes
            measured = point.measured.phase_peak_bytes[phase]
            table.add_row(
                f"{point.plan.recipe.workload.context_tokens:,}" if phase == "load" else "",
                phase,
                format_bytes(planned),
                format_bytes(measured),
                f"{measured / planned - 1:+.1%}",
            )
    console.print(table)
    cold, last = audit.points[0].measured, audit.points[-1]
    console.print(
        f"Cold start: weights read in {cold.load_s:.1f} s, first token {cold.first_token_s:.1f} s "
        f"after the process began, load peak {format_bytes(cold.phase_peak_bytes['load'])}."
    )
    console.print(
        f"KV growth: {audit.kv_growth_bytes:,.0f} bytes a token measured, "
        f"{last.plan.kv_bytes_per_token:,} planned."
    )
    for name, run in {"as ullage runs": last.measured, **audit.allocators}.items():
        console.print(
            f"Allocator, {name}: {format_bytes(run.slack_bytes)} held beyond live bytes, "
            f"peak {format_bytes(run.peak_bytes)}."
        )
    worst = max(audit.points, key=lambda point: abs(point.error))
    console.print(
        f"Largest difference of a run's peak: {worst.error:+.1%}. Runtime measured as "
        f"{format_bytes(found.constants['runtime_bytes'])}."
    )


def _as_json(audit: "Audit", found: Calibration) -> dict[str, object]:
    return {
        "points": [
            {
                "planned": {name: asdict(part) | {"total_bytes": part.total_bytes}
                            for name, part in point.plan.phases.items()},
                "measured": asdict(point.measured),
                "peak_difference": point.error,
            }
            for point in audit.points
        ],
        "kv_growth_bytes": audit.kv_growth_bytes,
        "kv_bytes_per_token": audit.points[-1].plan.kv_bytes_per_token,
        "allocators": {name: asdict(measured) for name, measured in audit.allocators.items()},
        "calibration": asdict(found),
    }  # fmt: skip
