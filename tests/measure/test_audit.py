"""The audit: a ladder of lengths, plan against measurement, a picture and a calibration file."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage import Device, InputError, Recipe, Workload, build_plan, default_execution, resolve
from ullage.measure.audit import FILL, Audit, AuditPoint, calibrated, fill_ladder, run_audit
from ullage.measure.picture import draw_audit
from ullage.specs.calibration import read_calibration
from ullage.specs.measurement import PeakMeasurement
from ullage.specs.plan import Plan

DEVICE = Device("a machine", "cpu", 16 << 30)


def recipe_of(folder: Path) -> Recipe:
    return Recipe(resolve(str(folder)), DEVICE, Workload(64, 4), default_execution(DEVICE))


def measured_with(plan: Plan, runtime_bytes: int) -> PeakMeasurement:
    """A measurement that agrees with the plan but for the runtime."""
    peaks = {
        name: part.total_bytes - part.overhead_bytes + runtime_bytes
        for name, part in plan.phases.items()
    }
    work = plan.recipe.workload
    return PeakMeasurement(
        work.prompt_tokens, work.output_tokens, runtime_bytes, peaks, 0, 0, 1.0, 1.0, 1.0
    )


@given(st.integers(1, 1 << 30), st.integers(1, 12))
def test_the_ladder_climbs_to_its_share_of_the_largest(largest: int, points: int) -> None:
    ladder = fill_ladder(largest, points)
    assert ladder == sorted(set(ladder))
    assert ladder[-1] == max(2, int(FILL * largest))
    assert ladder[0] >= 2  # one token to read, one to write
    assert 1 <= len(ladder) <= points


def test_a_calibration_gives_back_the_measured_runtime(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe, runtime_bytes = recipe_of(model_folder("llama")), 123_456_789
    plans = [build_plan(replace(recipe, workload=Workload(n, 4))) for n in (16, 64, 128)]
    audit = Audit([AuditPoint(plan, measured_with(plan, runtime_bytes)) for plan in plans], {})
    calibrated(audit).write(tmp_path / "calibration.json")
    found = read_calibration(tmp_path / "calibration.json")
    assert found.constants["runtime_bytes"] == runtime_bytes
    again = build_plan(plans[0].recipe, calibration=found)
    assert again.peak_bytes == audit.points[0].measured.peak_bytes


def test_no_audited_run_takes_more_than_its_calibrated_plan(
    model_folder: Callable[[str], Path],
) -> None:
    recipe, taken = recipe_of(model_folder("llama")), [300 << 20, 310 << 20, 302 << 20]
    plans = [build_plan(replace(recipe, workload=Workload(n, 4))) for n in (16, 64, 128)]
    points = [
        AuditPoint(plan, measured_with(plan, size)) for plan, size in zip(plans, taken, strict=True)
    ]
    found = calibrated(Audit(points, {}))
    for point in points:
        again = build_plan(point.plan.recipe, calibration=found)
        assert again.peak_bytes >= point.measured.peak_bytes
    assert found.constants["runtime_bytes"] == 320 << 20  # and as much again as they differ


def test_a_calibration_that_cannot_be_written_leaves_nothing(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = build_plan(recipe_of(model_folder("llama")))
    found = calibrated(Audit([AuditPoint(plan, measured_with(plan, 1 << 28))], {}))
    with pytest.raises(InputError, match="Cannot write"):
        found.write(tmp_path / "none" / "calibration.json")
    assert not list(tmp_path.iterdir())


def test_fresh_processes_measure_every_phase_and_the_picture_shows_them(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, runs = model_folder("llama"), []
    audit = run_audit(recipe_of(folder), 1 << 30, folder, [16, 128], on_run=runs.append)
    assert runs[:2] == ["16 tokens", "128 tokens"]
    for point in audit.points:
        assert point.measured.peak_bytes >= point.measured.runtime_bytes > 0
        assert point.measured.live_bytes > 0
    assert "glibc defaults" in audit.allocators
    for name in ("curve.svg", "curve.png"):
        draw_audit(audit, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(InputError, match="Cannot draw"):
        draw_audit(audit, tmp_path / "curve.doc")
