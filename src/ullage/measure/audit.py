"""Plan against measurement over a ladder of prompt lengths, and what the allocator keeps."""

from collections.abc import Callable
from ctypes.util import find_library
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from ullage import techniques
from ullage.measure.peak import measure_peak
from ullage.planner import build_plan
from ullage.specs.calibration import Calibration
from ullage.specs.footprint import Footprint
from ullage.specs.measurement import PeakMeasurement
from ullage.specs.plan import Plan, Recipe
from ullage.specs.workload import PHASES, Step, Workload

FILL = 0.92  # of the planned maximum: "boots" is not "fills"
_SHORTEST_TOKENS = 2


@dataclass(frozen=True)
class AuditPoint:
    """One length, planned and measured."""

    plan: Plan
    measured: PeakMeasurement

    @property
    def error(self) -> float:
        """Measured over planned peak, less one."""
        return self.measured.peak_bytes / self.plan.peak_bytes - 1


@dataclass(frozen=True)
class Audit:
    """All points, shortest and so coldest first; `allocators` holds the longest one again under
    other allocators."""

    points: list[AuditPoint]
    allocators: dict[str, PeakMeasurement]

    @property
    def kv_growth_bytes(self) -> float:
        """Measured bytes that each token more added to the decode peak, from first to last
        point."""
        first, last = self.points[0].measured, self.points[-1].measured
        grown = last.phase_peak_bytes["decode"] - first.phase_peak_bytes["decode"]
        return grown / max(1, last.prompt_tokens - first.prompt_tokens)


def fill_ladder(largest_tokens: int, points: int) -> list[int]:
    """Lengths in tokens that double up to `FILL` of `largest_tokens`, shortest first; none has
    less than a token to read and one to write."""
    top = max(_SHORTEST_TOKENS, int(FILL * largest_tokens))
    return sorted({max(_SHORTEST_TOKENS, top >> step) for step in range(points)})


def run_audit(
    recipe: Recipe,
    budget_bytes: int,
    folder: Path,
    lengths: list[int],
    calibration: Calibration | None = None,
    on_run: Callable[[str], None] = lambda what: None,
) -> Audit:
    """Measure `recipe` at prompt and output `lengths` together, each in a fresh process.

    Raises:
        UllageError: a measured process failed.
    """
    points = []
    for length in lengths:
        output = min(recipe.workload.output_tokens, max(1, length // 2))
        work = Workload(length - output, output)
        plan = build_plan(replace(recipe, workload=work), budget_bytes, calibration)
        on_run(f"{length:,} tokens")
        points.append(AuditPoint(plan, measure_peak(plan, folder)))
    return Audit(points, _other_allocators(points[-1].plan, folder, on_run))


def calibrated(audit: Audit) -> Calibration:
    """What the process takes beside weights, KV entries and activations at most.

    A plan is a hard limit: this is the most of all points, and as much again as they differ, for
    no two runs take the same and nobody measured the lengths in between.
    """
    beside = [
        point.measured.peak_bytes - _planned_beside_runtime(point.plan) for point in audit.points
    ]
    return Calibration(
        device=audit.points[0].plan.recipe.device.name,
        engine="ullage",
        constants={"runtime_bytes": 2 * max(beside) - min(beside)},
        versions={name: version(name) for name in ("torch", "transformers")},
    )


def _planned_beside_runtime(plan: Plan) -> int:
    """The peak phase's bytes but for the interpreter and libraries; those that a technique brings
    stay in."""
    peak = max(plan.phases.values(), key=lambda part: part.total_bytes)
    return peak.total_bytes - peak.overhead_bytes + _technique_overhead_bytes(plan.recipe)


def _technique_overhead_bytes(recipe: Recipe) -> int:
    """What the techniques themselves add to the runtime."""
    step = Step(PHASES[-1], 1, 1, 1, recipe.execution)
    # large enough that nothing taken away from it falls below zero
    footprint = before = Footprint(*(1 << 50 for _ in range(5)))
    for choice in recipe.techniques:
        footprint = techniques.create(choice).footprint(footprint, recipe.model, step)
    return footprint.overhead_bytes - before.overhead_bytes


def _other_allocators(
    plan: Plan, folder: Path, on_run: Callable[[str], None]
) -> dict[str, PeakMeasurement]:
    """The same run with glibc as it comes, and with jemalloc where it is installed. CPU only."""
    if plan.recipe.device.kind != "cpu":
        return {}
    on_run("glibc's defaults")
    measured = {"glibc defaults": measure_peak(plan, folder, steady_allocator=False)}
    jemalloc = find_library("jemalloc")
    if jemalloc is not None:
        on_run("jemalloc")
        measured["jemalloc"] = measure_peak(plan, folder, steady_allocator=False, preload=jemalloc)
    return measured
