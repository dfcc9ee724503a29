"""A peak is measured in a process of its own, a phase at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ullage import Device, Plan, Recipe, Workload, build_plan, default_execution, resolve
from ullage.errors import UllageError
from ullage.measure.peak import measure_peak
from ullage.specs.measurement import PeakMeasurement
from ullage.units import GIB, MIB

CPU = Device("a machine", "cpu", 16 * GIB)


def plan_of(folder: Path, work: Workload, budget_bytes: int | None = None) -> Plan:
    recipe = Recipe(resolve(str(folder)), CPU, work, default_execution(CPU))
    return build_plan(recipe, budget_bytes)


@pytest.fixture(scope="module")
def measured(model_folder: Callable[[str], Path]) -> tuple[Plan, PeakMeasurement]:
    folder = model_folder("llama")
    plan = plan_of(folder, Workload(200, 8))
    return plan, measure_peak(plan, folder)


def test_live_bytes_are_the_planned_weights_and_kv(
    measured: tuple[Plan, PeakMeasurement],
) -> None:
    plan, found = measured
    decode = plan.phases["decode"]
    assert found.live_bytes == decode.weights_bytes + decode.kv_bytes


def test_every_phase_has_its_peak_above_the_runtime(
    measured: tuple[Plan, PeakMeasurement],
) -> None:
    _, found = measured
    assert set(found.phase_peak_bytes) == {"load", "prefill", "decode"}
    assert found.peak_bytes == max(found.phase_peak_bytes.values())
    assert min(found.phase_peak_bytes.values()) >= found.runtime_bytes > 100 * MIB
    assert found.slack_bytes == found.held_bytes - found.runtime_bytes - found.live_bytes


def test_the_workload_and_its_times_are_kept(measured: tuple[Plan, PeakMeasurement]) -> None:
    _, found = measured
    assert (found.prompt_tokens, found.output_tokens) == (200, 8)
    assert 0 < found.load_s < found.first_token_s < 300
    assert found.decode_tokens_per_second > 0


def test_a_process_that_fails_says_why(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = model_folder("llama")
    with pytest.raises(UllageError, match="more than its budget"):
        measure_peak(plan_of(folder, Workload(20, 8), 10 * MIB), folder)
    with pytest.raises(UllageError, match="tokenizer"):
        measure_peak(plan_of(folder, Workload(20, 8)), tmp_path)
