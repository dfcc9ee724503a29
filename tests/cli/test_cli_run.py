"""ullage run, as a shell sees it, on a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SIZED = ["--device", "cpu-16gb"]


@pytest.fixture
def tiny_folder(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")


def ullage(*words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ullage", *words],
        capture_output=True,
        text=True,
        check=False,
        input=stdin,
    )


def test_the_text_is_on_stdout_and_the_peak_on_stderr(tiny_folder: Path) -> None:
    words = ["run", str(tiny_folder), "--max-new-tokens", "5", *SIZED]
    named = ullage(*words, "--prompt", "w6 w7 w8")
    piped = ullage(*words, "-", stdin="w6 w7 w8")
    assert named.returncode == 0, named.stderr
    assert 0 < len(named.stdout.split()) <= 5  # special tokens are not shown
    assert piped.stdout == named.stdout
    assert "planned peak" in named.stderr
    assert "measured" in named.stderr


def test_a_plan_file_is_run_as_it_says(tiny_folder: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    made = ullage("plan", str(tiny_folder), *SIZED, "--prefill-chunk", "7", "--json")
    plan.write_text(made.stdout)
    done = ullage(
        "run", str(tiny_folder), "--plan", str(plan), "--prompt", "w6", "--max-new-tokens", "1"
    )
    assert done.returncode == 0, done.stderr
    assert "chunks of 7" in done.stderr


def test_a_budget_that_cannot_work_names_one_that_does(tiny_folder: Path) -> None:
    words = ["run", str(tiny_folder), "--prompt", "w6", "--max-new-tokens", "1", *SIZED]
    refused = ullage(*words, "--memory", "10MiB")
    assert refused.returncode == 1
    smallest = refused.stderr.split("--memory ")[1].split(".")[0]
    assert ullage(*words, "--memory", smallest).returncode == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt", ""], "empty"),
        (["--prompt", "w6 " * 300], "300 tokens"),
        ([], "Give one prompt"),
        (["--prompt-file", "/no/such/file"], "Cannot read the prompt"),
        (["--prompt", "w6", "--memory", "-1GiB"], "size"),
        (["--prompt", "w6", "--attention", "eager"], "never builds"),
    ],
)
def test_bad_input_is_two_lines_and_exit_code_2(
    tiny_folder: Path, words: list[str], says: str
) -> None:
    done = ullage("run", str(tiny_folder), *SIZED, *words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert says in done.stderr
    assert done.stdout == ""


def test_a_pickle_checkpoint_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    done = ullage("run", str(tmp_path), "--prompt", "w6")
    assert done.returncode == 2
    assert "pickle" in done.stderr


def test_a_truncated_checkpoint_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = ullage("run", str(tmp_path), "--prompt", "w6")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_an_unwritable_cache_folder_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ULLAGE_CACHE", str(tmp_path / "file" / "cache"))
    done = ullage("run", "smollm2-135m", "--prompt", "x", *SIZED)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_ends_with_130_and_no_traceback(tiny_folder: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config["max_position_embeddings"] = 100_000
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("w6 " * 60_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "ullage", "run", str(tmp_path), "--prompt-file", str(prompt),
         "--prefill-chunk", "4", *SIZED],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    first_line = process.stderr.readline()  # the choice: weights are about to be read
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "planned peak" in first_line
    assert process.returncode == 130
    assert "Traceback" not in errors
