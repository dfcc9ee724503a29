"""ullage audit, as a shell sees it, on a tiny model."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ullage import Device, Execution, ModelSpec, Recipe, Workload
from ullage.cli.audit import _run
from ullage.units import GIB

Ullage = Callable[..., subprocess.CompletedProcess[str]]
SIZED = ["--device", "cpu-16gb", "--points", "2", "--output-len", "4"]


@pytest.fixture(scope="module")
def audited(
    ullage: Ullage, model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder with what an audit wrote, and the audit."""
    out = tmp_path_factory.mktemp("audit")
    words = ["--plot", str(out / "curve.svg"), "--write", str(out / "calibration.json"), "--json"]
    return out, ullage("audit", str(model_folder("llama")), *SIZED, *words)


Audited = tuple[Path, subprocess.CompletedProcess[str]]


def figures(audited: Audited) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(audited[1].stdout)
    return figures


def test_the_ladder_ends_at_its_share_of_the_context(audited: Audited) -> None:
    assert audited[1].returncode == 0, audited[1].stderr
    points = [point["measured"] for point in figures(audited)["points"]]
    lengths = [point["prompt_tokens"] + point["output_tokens"] for point in points]
    assert lengths == [117, 235]  # 0.92 of 256, and half of it


def test_plan_and_measurement_stand_side_by_side(audited: Audited) -> None:
    for point in figures(audited)["points"]:
        planned = max(part["total_bytes"] for part in point["planned"].values())
        measured = max(point["measured"]["phase_peak_bytes"].values())
        assert point["peak_difference"] == pytest.approx(measured / planned - 1)
    assert "glibc defaults" in figures(audited)["allocators"]


def test_a_picture_and_a_calibration_are_written(audited: Audited) -> None:
    assert (audited[0] / "curve.svg").read_text().lstrip().startswith("<?xml")
    assert (
        json.loads((audited[0] / "calibration.json").read_text())["constants"]["runtime_bytes"] > 0
    )


def test_the_calibrated_plan_is_what_was_measured(
    ullage: Ullage, audited: Audited, model_folder: Callable[[str], Path]
) -> None:
    words = ["plan", str(model_folder("llama")), "--device", "cpu-16gb", "--json"]
    words += ["--max-model-len", "235", "--output-len", "4"]
    calibrated = ullage(*words, "--calibration", str(audited[0] / "calibration.json"))
    planned = json.loads(calibrated.stdout)["peak_bytes"]
    measured = max(figures(audited)["points"][-1]["measured"]["phase_peak_bytes"].values())
    assert planned == pytest.approx(measured, rel=0.02)
    assert planned != json.loads(ullage(*words).stdout)["peak_bytes"]


def test_a_budget_in_which_nothing_fits_is_refused(
    ullage: Ullage, model_folder: Callable[[str], Path]
) -> None:
    done = ullage("audit", str(model_folder("llama")), "--memory", "1MiB", *SIZED)
    assert done.returncode == 1
    assert "not even two tokens" in done.stderr


def test_a_picture_where_nobody_may_write_is_refused_before_the_work(
    ullage: Ullage, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    for words in (
        ["--plot", "/no/such/folder/a.svg"],
        ["--plot", "a.docx"],
        ["--write", "/no/such/folder/a.json"],
        ["--write", str(tmp_path)],
    ):
        done = ullage("audit", str(model_folder("llama")), *SIZED, *words)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "lengths" not in done.stderr  # the ladder was not begun


def test_a_models_name_is_printed_as_it_is(
    tiny_spec: Callable[..., ModelSpec],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ullage.measure.audit.run_audit", lambda *_: None)
    monkeypatch.setattr("ullage.cli.audit.weights_folder", lambda _: Path())
    model = replace(tiny_spec("llama"), name="[red]llama[/]")
    recipe = Recipe(model, Device("cpu", "cpu", GIB), Workload(10, 10), Execution())
    _run(recipe, GIB, None, largest=100, points=2)
    assert "[red]llama[/]: bf16 weights" in capsys.readouterr().err
