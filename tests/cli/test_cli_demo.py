"""ullage demo: it says what happened, also when that is not what it is there to show."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ullage import Device, resolve
from ullage.cli.demo import _table, _verdict
from ullage.errors import UllageError
from ullage.measure import demo
from ullage.measure.cage import CageReport, Mechanism
from ullage.measure.demo import Capped, DemoText, plain_plan, run_plain, run_ullage, ullage_plan
from ullage.units import MIB

CAP_BYTES = 1152 * MIB
CPU = Device("a machine", "cpu", 16 << 30)
MODEL = resolve("smollm2-135m")


def capped(
    exit_code: int,
    tokens: int,
    *,
    killed: bool = True,
    mechanism: Mechanism = "memory cgroup v1",
    error: str = "",
) -> Capped:
    plan = plain_plan(MODEL, CPU, CAP_BYTES, 8128)
    report = CageReport(mechanism, CAP_BYTES, None, killed and exit_code != 0)
    return Capped(plan, report, exit_code, tokens, error=error)


def test_the_cap_separates_the_two_plans() -> None:
    theirs, ours = plain_plan(MODEL, CPU, CAP_BYTES, 8128), ullage_plan(MODEL, CPU, CAP_BYTES)
    assert not theirs.fits
    assert ours.fits
    assert ours.recipe.workload.context_tokens == MODEL.max_context_tokens
    assert 0 < theirs.cliff.max_model_len < 8128


def test_a_death_names_the_lengths_between_which_it_came() -> None:
    said = _verdict(capped(-9, 3072), 8128, 512)
    assert "3,072" in said
    assert "3,584" in said


@pytest.mark.parametrize(
    "failed",
    [
        capped(1, 0, killed=False, error="OSError: [/x] is no folder"),
        capped(-9, 0, killed=False, error="OSError: [/x] is no folder"),
        capped(1, 0, mechanism="RLIMIT_DATA", error="OSError: [/x] is no folder"),
    ],
)
def test_only_a_kill_for_memory_is_called_that(failed: Capped) -> None:
    said = _verdict(failed, 8128, 512)
    assert "not for memory" in said
    assert "[/x] is no folder" in shown(said)
    assert "failed" in shown(_table(failed, capped(0, 8128)))


@pytest.mark.parametrize(
    "error", ["MemoryError", "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried"]
)
def test_a_refused_allocation_is_out_of_memory(error: str) -> None:
    failed = capped(1, 512, mechanism="RLIMIT_DATA", error=error)
    assert "died" in _verdict(failed, 8128, 512)
    assert "out of memory" in shown(_table(failed, capped(0, 8128)))


def shown(what: Any) -> str:
    """As a terminal shows it."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(what)
    return console.export_text()


def test_a_survival_is_said() -> None:
    said = _verdict(capped(0, 8128), 8128, 512)
    assert "survived" in said
    assert "8,128" in said


def test_a_peak_that_nobody_counted_is_not_made_up() -> None:
    cells = list(_table(capped(-9, 3072), capped(0, 8128)).columns[1].cells)
    assert "not counted" in cells


def test_plain_is_followed_length_by_length_until_it_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in for plain transformers that dies after its second length."""
    script = tmp_path / "plain.py"
    script.write_text(
        "import json\n"
        "for tokens in (0, 512, 1024):\n"
        "    print(json.dumps({'tokens': tokens, 'seconds': 0.0}), flush=True)\n"
        "import sys\n"
        "print('note', file=sys.stderr)\n"
        "print('ValueError: odd', file=sys.stderr)\n"
        "raise SystemExit(9)\n"
    )
    shell = tmp_path / "python"
    shell.write_text(f'#!/bin/sh\nexec "{demo.sys.executable}" "{script}"\n')
    shell.chmod(0o755)
    monkeypatch.setattr(demo.sys, "executable", str(shell))
    seen: list[int] = []
    plan = plain_plan(MODEL, CPU, CAP_BYTES, 2048)
    done = run_plain(plan, tmp_path, DemoText(list(range(4096)), "", 0), seen.append)
    assert seen == [0, 512, 1024]
    assert (done.read_tokens, done.exit_code, done.error) == (1024, 9, "ValueError: odd")
    assert done.plan == plan


def test_ullages_own_failure_is_no_kill(tmp_path: Path) -> None:
    plan = ullage_plan(MODEL, CPU, CAP_BYTES)
    with pytest.raises(UllageError, match="exit code 2"):
        run_ullage(plan, tmp_path / "none", DemoText([], "text", 1), "1152MiB")
