"""ullage export, as a shell sees it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ullage import exporters

Ullage = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def plan_file(ullage: Ullage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of Llama 2 7B in 60 GiB of an H100."""
    done = ullage("plan", "llama-2-7b", "--device", "h100", "--memory", "60GiB", "--json")
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    file.write_text(done.stdout)
    return file


@pytest.mark.parametrize("target", exporters.names())
def test_every_target_is_written(ullage: Ullage, plan_file: Path, target: str) -> None:
    done = ullage("export", str(plan_file), "--to", target)
    assert (done.returncode, done.stderr) == (0, "")
    assert "llama-2-7b" in done.stdout.lower()


def test_the_best_of_a_search_is_written(ullage: Ullage) -> None:
    words = ["plan", "llama-3.1-8b", "--device", "h100", "--engine", "vllm", "--weights", "bf16"]
    found = ullage(*words, "--goal", "context", "--json").stdout
    done = ullage("export", "-", "--to", "vllm", stdin=found)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"--max-model-len {json.loads(found)['ranked'][0]['reach']}" in done.stdout


def test_a_file_and_stdin_give_the_same(ullage: Ullage, plan_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "serve.sh"
    words = ("--to", "vllm", "--out", str(out))
    assert ullage("export", "-", *words, stdin=plan_file.read_text()).stdout == ""
    assert out.read_text() == ullage("export", str(plan_file), "--to", "vllm").stdout


def test_a_plan_that_does_not_fit_is_written_and_says_so(ullage: Ullage, plan_file: Path) -> None:
    plan = json.loads(plan_file.read_text())
    plan["budget_bytes"] = 1
    done = ullage("export", "-", "--to", "vllm", stdin=json.dumps(plan))
    assert done.returncode == 1
    assert "WARNING: this plan does not fit" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["/no/such/plan", "--to", "vllm"],
        ["-", "--to", "vllm"],
        ["PLAN", "--to", "tgi"],
        ["PLAN"],
        ["PLAN", "--to", "vllm", "--out", "/no/such/folder/x"],
    ],
)
def test_bad_input_is_two_lines_and_exit_code_2(
    ullage: Ullage, plan_file: Path, words: list[str]
) -> None:
    words = [str(plan_file) if word == "PLAN" else word for word in words]
    done = ullage("export", *words, stdin="{}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    ours = done.stderr.startswith("ullage: ") and len(done.stderr.splitlines()) <= 2
    assert ours or done.stderr.startswith("Usage:")


def test_exporting_needs_no_torch(plan_file: Path) -> None:
    words = ["export", str(plan_file), "--to", "transformers"]
    script = (
        "import sys; from ullage.cli import app\n"
        f"app({words!r}, standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'yaml'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"
