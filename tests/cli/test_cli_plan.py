"""ullage plan, as a shell sees it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ullage.specs.calibration import Calibration

Ullage = Callable[..., subprocess.CompletedProcess[str]]
Planned = Callable[..., dict[str, Any]]
PLAN = ["plan", "smollm2-135m", "--device", "24GiB"]


@pytest.fixture
def planned(ullage: Ullage) -> Callable[..., dict[str, Any]]:
    """`planned(*words)`: the plan as JSON."""

    def run(*words: str) -> dict[str, Any]:
        done = ullage(*PLAN, *words, "--json")
        assert done.returncode in (0, 1), done.stderr
        plan: dict[str, Any] = json.loads(done.stdout)
        return plan

    return run


def test_the_json_has_the_documented_figures(planned: Planned) -> None:
    plan = planned()
    parts = {"weights_bytes", "kv_bytes", "activation_bytes", "logits_bytes", "overhead_bytes"}
    assert set(plan["phases"]) == {"load", "prefill", "decode"}
    for phase in plan["phases"].values():
        assert set(phase) == {*parts, "total_bytes"}
        assert phase["total_bytes"] == sum(phase[part] for part in parts)
    assert plan["fits"] is True
    assert plan["peak_bytes"] == max(part["total_bytes"] for part in plan["phases"].values())
    assert plan["kv_bytes_per_token"] == 23_040
    assert {"model", "device", "techniques"} <= set(plan)


def test_the_cliff_is_the_last_length_that_fits(planned: Planned) -> None:
    last = planned()["cliff"]["max_model_len"]
    assert planned("--max-model-len", str(last))["fits"]
    assert not planned("--max-model-len", str(last + 1))["fits"]


def test_the_exit_code_says_whether_it_fits(ullage: Ullage, planned: Planned) -> None:
    peak_bytes = planned()["peak_bytes"]
    assert ullage(*PLAN, "--memory", str(peak_bytes)).returncode == 0
    too_small = ullage(*PLAN, "--memory", str(peak_bytes - 1))
    assert too_small.returncode == 1
    assert "does not fit" in too_small.stdout
    assert "in ullage it would fit" in too_small.stdout.lower()


def test_a_calibration_counts_for_its_own_engine_alone(ullage: Ullage, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    Calibration("24GiB", "ullage", {"runtime_bytes": 7 << 30}, {}).write(file)
    plain, calibrated = (ullage(*PLAN, *words).stdout for words in ([], ["--calibration", file]))
    assert "7.00 GiB" in calibrated
    assert "7.00 GiB" not in plain
    # what transformers would do is planned as before: nobody measured it
    assert calibrated.split("One pass")[1] == plain.split("One pass")[1]
    other = ullage(*PLAN, "--engine", "transformers", "--calibration", file)
    assert other.returncode == 2
    assert "of ullage on 24GiB" in other.stderr


def test_a_weight_format_is_short_for_its_technique(planned: Planned) -> None:
    assert planned("--weights", "nf4") == planned("--technique", "quantization:scheme=nf4")


def test_planning_needs_no_torch() -> None:
    script = (
        "import sys; from ullage.cli import app\n"
        f"app({[*PLAN, '--json']!r}, standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "no-such-model"],
        ["plan", "/no/such/folder"],
        ["plan", "smollm2-135m", "--device", "12parsecs"],
        ["plan", "smollm2-135m", "--device", "-1GiB"],
        ["plan", "smollm2-135m", "--device", "cray-1"],
        [*PLAN, "--memory", "-1GiB"],
        [*PLAN, "--memory", "25GiB"],
        [*PLAN, "--max-model-len", "0"],
        [*PLAN, "--max-num-seqs", "1" + "0" * 400],
        [*PLAN, "--prefill-chunk", "1" + "0" * 400],
        [*PLAN, "--output-len", "9000"],
        [*PLAN, "--weights", "int3"],
        [*PLAN, "--kv-cache-dtype", "fp4"],
        [*PLAN, "--attention", "psychic"],
        [*PLAN, "--technique", "quantisation"],
        [*PLAN, "--technique", "quantization:scheme=int3"],
        [*PLAN, "--weights", "int8", "--technique", "quantization"],
        [*PLAN, "--calibration", "/no/such/file"],
        ["plan", "gpt2", "--device", "24GiB", "--weights", "int8"],
    ],
)
def test_bad_input_is_two_lines_and_exit_code_2(ullage: Ullage, words: list[str]) -> None:
    done = ullage(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    ours = done.stderr.startswith("ullage: ") and len(done.stderr.splitlines()) <= 2
    assert ours or done.stderr.startswith("Usage:")
