"""What `ullage plan` refuses: exit code 2, one or two lines, no traceback, nothing written."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ullage.specs.calibration import Calibration

Typed = Callable[..., subprocess.CompletedProcess[str]]
PLAN = ["plan", "llama-3.1-8b", "--device", "h100", "--max-model-len", "4K"]
VLLM, SGLANG = [*PLAN, "--engine", "vllm"], [*PLAN, "--engine", "sglang"]
LLAMA_CPP, TRANSFORMERS = [*PLAN, "--engine", "llama.cpp"], [*PLAN, "--engine", "transformers"]
SEARCH = [*PLAN, "--goal", "latency"]


def assert_refused(done: subprocess.CompletedProcess[str], says: str) -> None:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    if lines[0].startswith("Usage:"):  # typer's own: usage, how to get help, and the error
        lines = [line for line in lines[2:] if line]
    assert 1 <= len(lines) <= 2
    assert max(map(len, lines)) < 500


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*VLLM, "--tp", "3"], "32 attention heads: --tp 3 does not divide them"),
        ([*SGLANG, "--tp", "3"], "--tp 3 does not divide them"),
        ([*VLLM, "--tp", "0"], "--tp"),
        ([*VLLM, "--tp", "9" * 30], "does not divide them"),
        ([*VLLM, "--pp", "33"], "32 layers, too few for --pp 33"),
        ([*PLAN, "--tp", "2"], "leave --tp and --pp out"),
        ([*LLAMA_CPP, "--pp", "2"], "leave --tp and --pp out"),
        ([*VLLM, "--kv-cache-dtype", "q8_0"], "'q8_0': vllm has fp32, bf16, fp16, fp8, int8"),
        ([*SGLANG, "--kv-cache-dtype", "int8"], "'int8': sglang has"),
        ([*TRANSFORMERS, "--kv-cache-dtype", "int8"], "'int8': transformers has fp32, bf16, fp16"),
        ([*PLAN, "--kv-cache-dtype", "q8_0"], "'q8_0': ullage has fp32, bf16, fp16, int8, fp8"),
        ([*PLAN, "--kv-cache-dtype", "fp8_e5m2"], "ullage's fp8 is fp8_e4m3"),
        ([*PLAN, "--kv-cache-dtype", "fp8", "--device", "m4-max"], "CUDA alone, not on m4-max"),
        ([*SEARCH, "--kv-cache-dtype", "fp8", "--device", "cpu-64gb"], "not on cpu-64gb"),
        ([*LLAMA_CPP, "--kv-cache-dtype", "fp8"], "'fp8': llama.cpp has"),
        ([*VLLM, "--kv-cache-dtype", "int8", "--engine-version", "0.19"], "0.20 has"),
        ([*VLLM, "--attention", "eager"], "--attention 'eager': vllm has flash"),
        ([*SGLANG, "--attention", "sdpa"], "--attention 'sdpa': sglang has flash"),
        ([*LLAMA_CPP, "--attention", "sdpa"], "llama.cpp has flash, eager"),
        ([*PLAN, "--attention", "flash"], "ullage has sdpa, eager"),
        ([*VLLM, "--weights", "q4_k_m"], "'q4_k_m': vllm has"),
        ([*LLAMA_CPP, "--weights", "nf4"], "'nf4': llama.cpp has"),
        ([*LLAMA_CPP, "--recipe", "hybrid"], "--recipe hybrid is ullage's own"),
        ([*TRANSFORMERS, "--recipe", "hybrid"], "--recipe hybrid is ullage's own"),
        ([*VLLM, "--gpu-memory-utilization", "0"], "--gpu-memory-utilization"),
        ([*VLLM, "--gpu-memory-utilization", "1.01"], "--gpu-memory-utilization"),
        ([*VLLM, "--gpu-memory-utilization", "nan"], "--gpu-memory-utilization"),
        ([*VLLM, "--engine-version", "banana"], "'banana' is no version of vllm"),
        ([*VLLM, "--engine-version", "99"], "vllm 99 has no figures here: known are 0.7 to 0.33"),
        ([*VLLM, "--engine-version", "0.6.6"], "known are 0.7 to 0.33"),
        ([*LLAMA_CPP, "--engine-version", "b99999"], "known are b5500 to b11434"),
        ([*SEARCH, "--engine-version", "99"], "known are 0.1 to 0.1.0"),
        ([*SGLANG, "--engine-version", "banana"], "'banana' is no version of sglang"),
        ([*PLAN, "--engine-version", "1" * 5000], "is no version of ullage"),
        ([*VLLM, "--prefill-chunk", "0"], "--prefill-chunk is 1 or more"),
        ([*SGLANG, "--prefill-chunk", "0"], "--prefill-chunk is 1 or more"),
        ([*SGLANG, "--prefill-chunk", "200000"], "more than the device has"),
        ([*VLLM, "--max-num-seqs", "100000"], "--prefill-chunk 8192 is less than 100000"),
        ([*SGLANG, "--max-num-seqs", "100000"], "--max-num-seqs makes it less"),
        ([*VLLM, "--max-num-seqs", "0"], "--max-num-seqs"),
        ([*VLLM, "--device", "cpu"], "plan --engine llama.cpp, transformers or ullage"),
        ([*VLLM, "--device", "m4-max"], "GPUs alone, not of m4-max"),
        ([*SGLANG, "--device", "cpu-64gb"], "plan --engine llama.cpp, transformers or ullage"),
        ([*SEARCH, "--device", "cpu", "--engine", "vllm"], "plan --engine llama.cpp"),
        ([*VLLM, "--technique", "dms"], "dms is a technique of ullage, not of vllm"),
        ([*VLLM, "--technique", "quantization"], "of ullage and transformers, not of vllm"),
        ([*LLAMA_CPP, "--technique", "quantization"], "not of llama.cpp"),
        ([*PLAN, "--technique", "dms:kept=nan"], "kept is above 0"),
        ([*PLAN, "--technique", "camelot:slots=-1"], "slots is a count"),
        ([*PLAN, "--technique", "dms", "--technique", "dms:kept=0.5"], "asked for twice"),
        ([*PLAN, "--max-model-len", "1"], "no room for a prompt"),
        ([*PLAN, "--memory", "20"], "'20' has no unit. Write 20GiB, or 20B for bytes."),
        ([*PLAN, "--device", "24"], "'24' has no unit. Write 24GiB"),
        ([*PLAN, "--memory", "120%"], "more than the whole"),
        ([*PLAN, "--goal", "happiness"], "'context', 'concurrency', 'latency'"),
        ([*SEARCH, "--also-device", "cray-1"], "--list-devices"),
        ([*SEARCH, "--engine", "vllm", "--engine-version", "x"], "is no version"),
        ([*SEARCH, "--engine", "vllm", "--tp", "5"], "does not divide"),
        ([*SEARCH, "--plot", "/no/such/dir/x.png"], "Cannot draw into /no/such/dir/x.png"),
        (["plan", "--device", "h100"], "Which model?"),
        (["plan", "--goal", "context"], "Which model?"),
        (["plan", "gpt2", "--no-such-option"], "No such option"),
    ],
    ids=lambda value: " ".join(value[5:])[:60] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_wrong_option_is_named(typed: Typed, words: list[str], says: str) -> None:
    assert_refused(typed(*words), says)


@pytest.mark.parametrize("name", ["x.txt", "x", "", "x.pdf", "x.svg.gz", "png"])
def test_a_picture_of_another_ending_is_not_drawn(
    typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(typed(*SEARCH, "--plot", name), ".svg or .png")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_needs_a_goal(typed: Typed) -> None:
    assert_refused(typed(*PLAN, "--plot", "x.svg"), "give both")


@pytest.mark.parametrize(
    "name",
    [
        "", " ", "a" * 5000, "../../etc/passwd", "\0", "gpt2\0", "two\nlines", "[/red]", "-",
        "/dev/null", "/dev/zero", "/proc/self/mem", "é", "http://x/y", "org/../..", "%s%n", "$(id)",
        "~/x", "x.gguf", "a/b", "a/b/c", "\x1b[31mred", "🦙" * 300,
    ],
)  # fmt: skip
def test_a_hostile_name_is_no_model(typed: Typed, name: str) -> None:
    assert_refused(typed("plan", name, "--device", "24GiB"), "model" if name != "a/b" else "a/b")


@pytest.mark.parametrize("other", ["device", "engine"])
def test_a_calibration_of_something_else(typed: Typed, tmp_path: Path, other: str) -> None:
    device = "h200" if other == "device" else "h100-80gb"
    file = tmp_path / "calibration.json"
    Calibration(device, "ullage", {"runtime_bytes": 1}, {}).write(file)
    plan = PLAN if other == "device" else VLLM
    for words in ([], ["--json"], ["--goal", "latency"]):
        assert_refused(typed(*plan, *words, "--calibration", str(file)), "The calibration is of")


CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}  # fmt: skip


@pytest.mark.parametrize("name", ["[red]x", "[bold]", "a [link=x]b", "100%", "{0}", "--help"])
def test_a_folders_odd_name_is_printed_as_it_is(typed: Typed, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for words in ([], ["--goal", "context"]):
        done = typed("plan", str(folder), "--device", "24GiB", *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(name)
