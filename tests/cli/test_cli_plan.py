"""ullage plan, as a shell sees it."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ullage.specs.calibration import Calibration
from ullage.units import MIB

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
    done = too_small.stdout
    assert too_small.returncode == 1
    assert "does not fit" in done
    change = re.search(r"Cheapest single change that fits: --prefill-chunk .*, no loss", done)
    assert change is not None
    assert re.search(r"Or 8,1\d\d tokens instead of 8,192\.", done)


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


def test_a_failing_plan_names_its_cheapest_change_in_json_too(planned: Planned) -> None:
    change = planned("--memory", "900MiB")["cheapest_change"]
    assert change["fits"]
    assert len(change["changes"]) == 1
    assert change["peak_bytes"] <= 900 * MIB
    nothing = planned("--memory", "100MiB")
    assert nothing["cheapest_change"] is None
    assert nothing["needed_bytes"] > 100 * MIB


def test_the_sum_is_explained_line_by_line(ullage: Ullage, planned: Planned) -> None:
    plan = planned("--explain", "--weights", "nf4")
    assert plan["explain"].pop("request") == []
    for phase, lines in plan["explain"].items():
        assert sum(line["nbytes"] for line in lines) == plan["phases"][phase]["total_bytes"]
        assert all(line["source"] and line["label"] for line in lines)
    text = ullage(*PLAN, "--explain").stdout
    assert "hidden states of" in text
    assert "assumed" in text


def test_latency_needs_a_device_that_is_known(ullage: Ullage, planned: Planned) -> None:
    assert planned()["latency"] is None
    done = ullage("plan", "llama-3.1-8b", "--device", "h100", "--json")
    latency = json.loads(done.stdout)["latency"]
    assert latency["ttft_s"] > 0 < latency["tokens_per_s"]
    text = ullage("plan", "llama-3.1-8b", "--device", "h100", "--max-model-len", "8K").stdout
    assert "Latency: first token of a prompt in about" in text


@pytest.mark.parametrize(
    "words",
    [
        ["--engine", "vllm", "--weights", "fp8", "--kv-cache-dtype", "fp8", "--tp", "2"],
        ["--engine", "llama.cpp", "--weights", "q4_k_m", "--kv-cache-dtype", "q8_0"],
        ["--engine", "sglang", "--kv-cache-dtype", "fp8"],
    ],
)
def test_servers_are_planned_explained_and_searched(ullage: Ullage, words: list[str]) -> None:
    plan = ["plan", "qwen3-8b", "--device", "rtx-4090", "--max-model-len", "8K", *words]
    explained = ullage(*plan, "--explain")
    assert explained.returncode == 0, explained.stderr
    assert "Latency: first token" in explained.stdout
    assert "One pass" not in explained.stdout
    assert ("prompt_logprobs" in explained.stdout) == ("vllm" in words)
    searched = ullage(*plan, "--goal", "concurrency")
    assert searched.returncode == 0, searched.stderr


@pytest.mark.parametrize(
    ("words", "attention"),
    [
        ([], "sdpa"),
        (["--attention", "eager"], "eager"),
        (["--engine", "transformers", "--attention", "flash"], "flash"),
        (["--engine", "vllm"], "flash"),
        (["--engine", "sglang"], "flash"),
        (["--engine", "llama.cpp"], "flash"),
        (["--engine", "llama.cpp", "--attention", "eager"], "eager"),
    ],
)
def test_the_header_names_the_attention_that_the_engine_runs(
    ullage: Ullage, words: list[str], attention: str
) -> None:
    header = ullage(*PLAN, *words).stdout.splitlines()[1]
    assert f", {attention} attention, " in header


def test_what_is_planned_only_says_so(ullage: Ullage) -> None:
    eager = ullage(*PLAN, "--attention", "eager")
    assert "eager is planned only: `ullage run` never builds the score matrix." in eager.stdout
    for words in (["--technique", "dms"], ["--engine", "transformers"]):
        assert "planned only" not in ullage(*PLAN, *words).stdout


def test_a_goal_ranks_what_fits(ullage: Ullage) -> None:
    words = ["plan", "llama-3.1-8b", "--device", "rtx-4090", "--goal", "context"]
    found = json.loads(ullage(*words, "--json").stdout)
    assert found["tried"] >= found["fitting"] >= len(found["ranked"]) > 1
    reaches = [row["reach"] for row in found["ranked"]]
    assert reaches == sorted(reaches, reverse=True)
    assert all(row["fits"] for row in found["ranked"])
    text = ullage(*words).stdout
    assert "Nothing beats these" in text
    others = ullage(*words, "--engine", "sglang", "--also-device", "h100").stdout
    assert "On rtx-4090 nothing beats these" in others
    best = others.split("The best on each other device")[1].splitlines()
    assert "h100-80gb" in best[2]
    assert "published; QLoRA" in text


def test_a_goal_that_nothing_reaches_fails(ullage: Ullage) -> None:
    done = ullage("plan", "llama-3.1-70b", "--device", "rtx-4060", "--goal", "latency")
    assert done.returncode == 1
    assert "the smallest budget that works is --memory" in done.stdout


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_a_search_is_drawn(ullage: Ullage, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"search.{ending}"
    done = ullage("plan", "llama-3.1-8b", "--device", "h100", "--goal", "latency", "--plot", file)
    assert done.returncode == 0, done.stderr
    assert file.stat().st_size > 5000


def test_the_catalogs_are_listed(ullage: Ullage) -> None:
    devices = json.loads(ullage("plan", "--list-devices", "--json").stdout)
    models = json.loads(ullage("plan", "--list-models", "--json").stdout)
    assert len(devices) >= 40
    assert {"name", "kind", "memory_bytes", "bandwidth_bytes_s", "source"} <= set(devices[0])
    assert {row["name"]: row["kv_bytes_per_token"] for row in models}["llama-3.1-8b"] == 131_072
    assert "mi355x" in ullage("plan", "--list-devices").stdout
    assert "qwen3-8b" in ullage("plan", "--list-models").stdout


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
        ["plan"],
        ["plan", "no-such-model"],
        [*PLAN, "--goal", "happiness"],
        [*PLAN, "--plot", "picture.svg"],
        [*PLAN, "--goal", "context", "--plot", "/no/such/folder/picture.svg"],
        [*PLAN, "--goal", "context", "--plot", "picture.exe"],
        [*PLAN, "--goal", "context", "--also-device", "cray-1"],
        [*PLAN, "--technique", "dms", "--technique", "camelot"],
        [*PLAN, "--technique", "dms", "--engine", "transformers"],
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
