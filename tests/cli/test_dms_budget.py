"""A budget of DMS through each command that takes techniques: settled for its length."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Typed = Callable[..., subprocess.CompletedProcess[str]]
BUDGET = ["--technique", "dms:window=16,budget=16KiB", "--device", "cpu-16gb"]


@pytest.fixture
def folder(model_folder: Callable[[str], Path]) -> str:
    return str(model_folder("llama"))


def settings_of(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.returncode == 0, done.stderr
    (choice,) = json.loads(done.stdout)["techniques"]
    settings: dict[str, object] = choice["settings"]
    return settings


def test_a_plan_says_what_is_kept(typed: Typed, folder: str) -> None:
    """A block is 1 KiB: each of 4 heads has one for the window and three for 48 survivors, of 84
    that leave the window and are decided on in sixteens, as if there were 96."""
    settings = settings_of(typed("plan", folder, *BUDGET, "--max-model-len", "100", "--json"))
    assert settings["budget"] == ""
    assert settings["kept"] == 0.5104  # below 49 / 96
    assert "kept=0.5104" in typed("plan", folder, *BUDGET, "--max-model-len", "100").stdout


def test_a_run_and_the_plan_of_another_length(typed: Typed, folder: str, tmp_path: Path) -> None:
    words = ["--prompt", "w6 w7 w8 " * 30, "--max-new-tokens", "8"]
    ran = typed("run", folder, *BUDGET, *words)
    assert ran.returncode == 0, ran.stderr
    assert "budget=" not in ran.stderr
    assert "nothing had to shrink" in ran.stderr
    planned = typed("plan", folder, *BUDGET, "--max-model-len", "200", "--json")
    file = tmp_path / "plan.json"
    file.write_text(planned.stdout)
    again = typed("run", folder, "--plan", str(file), *words)
    assert again.returncode == 0, again.stderr
    assert f"kept={settings_of(planned)['kept']}," in again.stderr


def test_an_evaluation_says_what_was_kept(typed: Typed, folder: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w6 w7 w8 " * 60)
    words = ["--suite", "perplexity", "--data", str(tmp_path), "--tokens", "100", "--beyond", "20"]
    done = typed("eval", folder, *BUDGET, *words, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    planned = settings_of(typed("plan", folder, *BUDGET, "--max-model-len", "100", "--json"))
    assert f"dms:kept={planned['kept']},window=16" in found["techniques"][0]
    assert all(0 < line["compressed_bytes"] <= 16 << 10 for line in found["comparisons"])
    typed_kept = typed("eval", folder, "--technique", "dms:window=16", *words, "--json")
    assert json.loads(typed_kept.stdout)["techniques"] == ["dms:window=16"]
