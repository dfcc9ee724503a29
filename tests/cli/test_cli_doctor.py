"""ullage doctor, as a shell sees it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Ullage = Callable[..., subprocess.CompletedProcess[str]]

# vLLM 0.19: accuracy/results/v0.19.0 of llm-d-planner (Apache-2.0)
HEALTHY = """\
INFO 04-22 15:12:23 [v1/engine/core.py:105] Initializing a V1 LLM engine (v0.19.0) with config: \
model='codellama/CodeLlama-7b-hf', dtype=torch.bfloat16, max_seq_len=8192, tensor_parallel_size=1
INFO 04-22 15:13:03 [gpu_model_runner.py:4820] Model loading took 12.56 GiB memory and 38.07 seconds
DEBUG 04-22 15:13:12 [gpu_worker.py:297] Memory profiling takes 9.4 seconds. Total non KV cache \
memory: 13.58GiB; torch peak memory increase: 0.77GiB; non-torch forward increase memory: 0.25GiB; \
weights memory: 12.56GiB.
INFO 04-22 15:13:12 [gpu_worker.py:298] Available KV cache memory: 61.65 GiB
INFO 04-22 15:13:12 [kv_cache_utils.py:1314] GPU KV cache size: 126,256 tokens
"""
FAILED = "ValueError: No available memory for the cache blocks. Try increasing\n"


@pytest.fixture
def healthy(tmp_path: Path) -> str:
    path = tmp_path / "vllm.log"
    path.write_text(HEALTHY)
    return str(path)


@pytest.fixture
def failed(tmp_path: Path) -> str:
    path = tmp_path / "failed.log"
    path.write_text(HEALTHY + FAILED)
    return str(path)


def test_a_healthy_log_is_exit_code_0(ullage: Ullage, healthy: str) -> None:
    done = ullage("doctor", healthy)
    assert done.returncode == 0, done.stderr
    assert "126,256 tokens" in done.stdout
    assert "12.56 GiB" in done.stdout
    assert "line 2:" in done.stdout


def test_a_failure_is_exit_code_1_and_its_cheapest_change(ullage: Ullage, failed: str) -> None:
    done = ullage("doctor", failed)
    assert done.returncode == 1, done.stderr
    assert "Cheapest change: --max-num-seqs" in done.stdout
    assert f"line {len((HEALTHY + FAILED).splitlines())}: ValueError" in done.stdout


def test_the_json_has_every_figure_in_bytes(ullage: Ullage, failed: str) -> None:
    done = ullage("doctor", failed, "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["culprit"] == "weights"
    assert found["parts"][0]["nbytes"] == round(12.56 * 2**30)
    assert found["changes"][0]["flags"]


def test_standard_input_is_read(healthy: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ullage", "doctor", "-"],
        input=Path(healthy).read_text(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_healthy_log_becomes_a_calibration(ullage: Ullage, healthy: str, tmp_path: Path) -> None:
    into = tmp_path / "calibration.json"
    done = ullage("doctor", healthy, "--learn", str(into), "--device", "h100")
    assert done.returncode == 0, done.stderr
    assert json.loads(into.read_text())["constants"]["non_torch_bytes"] == 2**28


INFO = """\
INFO 04-22 15:12:00 [utils.py:233] non-default args: {'model': 'codellama/CodeLlama-7b-hf', \
'max_model_len': 8192, 'gpu_memory_utilization': 0.95}
""" + "".join(line for line in HEALTHY.splitlines(True) if not line.startswith("DEBUG"))
RTX = """\
ggml_cuda_init: found 1 CUDA devices:
  Device 0: NVIDIA GeForce RTX 4090, compute capability 8.9, VMM: yes
load_tensors:        CUDA0 model buffer size = 13169.00 MiB
main: server is listening on http://127.0.0.1:8080
common_memory_breakdown_print: | memory breakdown [MiB] | total free self model context compute \
unaccounted |
common_memory_breakdown_print: |   - CUDA0 (RTX 4090) | 24080 = 9436 + (14193 = 13169 +      38 + \
    985) +         451 |
"""


@pytest.mark.parametrize(
    ("log", "learn", "plan"),
    [
        (HEALTHY, ["--device", "h100"], ["--engine", "vllm", "--device", "h100-80gb"]),
        (INFO, ["--device", "h100"], ["--engine", "vllm", "--device", "h100"]),
        (HEALTHY, ["--device", "79.19GiB"], ["--engine", "vllm", "--device", "79.19GiB"]),
        (RTX, [], ["--engine", "llama.cpp", "--device", "4090"]),
    ],
)
def test_what_is_learned_is_what_plan_takes(
    ullage: Ullage, tmp_path: Path, log: str, learn: list[str], plan: list[str]
) -> None:
    path, into = tmp_path / "engine.log", tmp_path / "calibration.json"
    path.write_text(log)
    done = ullage("doctor", str(path), "--learn", str(into), *learn)
    assert done.returncode == 0, done.stderr
    constants = json.loads(into.read_text())["constants"]
    size = constants.get("non_torch_bytes") or constants["runtime_bytes"]
    done = ullage("plan", "codellama-7b", *plan, "--calibration", str(into), "--json",
                  "--max-model-len", "2048")  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    assert json.loads(done.stdout)["non_torch_bytes"] == size


def test_a_log_that_names_no_device_asks_for_one(
    ullage: Ullage, healthy: str, tmp_path: Path
) -> None:
    into = tmp_path / "calibration.json"
    done = ullage("doctor", healthy, "--learn", str(into))
    assert done.returncode == 2
    assert "--device" in done.stderr
    assert not into.exists()
    assert ullage("doctor", healthy, "--device", "h100").returncode == 2


def test_nothing_is_learned_of_a_failure(ullage: Ullage, failed: str, tmp_path: Path) -> None:
    into = tmp_path / "calibration.json"
    done = ullage("doctor", failed, "--learn", str(into))
    assert done.returncode == 2
    assert done.stdout == ""
    assert not into.exists()


@pytest.mark.parametrize("name", ["missing", "", "."])
def test_bad_input_is_a_line_and_exit_code_2(ullage: Ullage, tmp_path: Path, name: str) -> None:
    done = ullage("doctor", str(tmp_path / name))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("ullage: ")
    assert len(done.stderr.splitlines()) <= 2


def test_markup_in_a_log_is_printed_as_it_is(ullage: Ullage, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("[/red][bold]EngineDeadError: [link=x]EngineCore\n")
    done = ullage("doctor", str(path))
    assert done.returncode == 1, done.stderr
    assert "[/red][bold]EngineDeadError: [link=x]" in done.stdout
