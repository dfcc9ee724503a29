"""Whatever a log holds: a diagnosis, or an error of ours."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ullage.doctor import Diagnosis, diagnose
from ullage.errors import InputError, UllageError

Diagnosed = Callable[[str], Diagnosis]

PIECES = (
    "Tried to allocate {} GiB. GPU 0 has a total capacity of {} GiB of which {} bytes is free",
    "Of the allocated memory {} MiB is allocated by PyTorch", "{} is reserved by PyTorch but unallocated",
    "CUDA out of memory occurred when warming up sampler with {} dummy requests",
    "Available KV cache memory: {} GiB", "GPU KV cache size: {} tokens",
    "Maximum concurrency for {} tokens per request: {}x", "gpu_memory_utilization={}",
    "max_num_seqs={}", "max_num_batched_tokens={}", "No available memory for the cache blocks",
    "max seq len ({}), ({} GiB KV cache is needed, which is larger than the available KV cache "
    "memory ({} GiB)", "Free memory on device cuda:0 ({}/{} GiB) on startup is less than desired "
    "GPU memory utilization (0.{}, {} GiB)", "EngineDeadError", "tensor_parallel_size={}",
    "Load weight begin. avail mem={} GB", "Load weight end. avail mem={} GB, mem usage={} GB",
    "Not enough memory. Please try to increase --mem-fraction-static", "mem_fraction_static={}",
    "KV Cache is allocated. #tokens: {}, K size: {} GB, V size: {} GB",
    "load_tensors: CUDA0 model buffer size = {} MiB", "llama_kv_cache: CUDA0 KV buffer size = {} MiB",
    "allocating {} MiB on device 0: cudaMalloc failed: out of memory",
    "failed to allocate CUDA0 buffer of size {}", "offloaded {}/{} layers to GPU", "n_ctx = {}",
    "({} MiB, {} MiB free)", "model requires more system memory ({} GiB) than is available ({} GiB)",
    "Out of memory: Killed process {} (python3) total-vm:{}kB, anon-rss:{}kB, file-rss:{}kB",
    "memory: usage {}kB, limit {}kB", "exit code 137", "you tried to allocate {} bytes",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate {} bytes",
    "MPS backend out of memory (MPS allocated: {} GB, other allocations: {} MB, max allowed: {} "
    "GB). Tried to allocate {} GB on private pool", "Invalid buffer size: {} GB",
    "Not enough memory to handle {} prefill tokens", "Setting max batch total tokens to {}",
    "text_generation_launcher: Args {{ model_id: \"x\", max_total_tokens: Some({}), num_shard: {} }}",
    "max_total_tokens must be <= max_batch_total_tokens. Given: {} and {}",
    "[TensorRT-LLM][INFO] Allocated {} GiB for max tokens in paged KV cache ({})",
    "component could not be created: KV cache", "before/after creation (GiB): Model: {} / {}",
    "maxTokensInPagedKvCache ({}) must be large enough to process at least",
    "CUDA runtime error in x: out of memory", 'File "x", line {}, in load_model', "Initializing a V1 LLM engine (v{}) with config: model='{}'",
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.floats(allow_nan=True).map(str),
    st.sampled_from(["0", "0.0", "", "1", "1,024", "9" * 400, "-0.5", "0.9", "qwen3-8b", "/etc"]),
)


@st.composite
def logs(draw: st.DrawFn) -> bytes:
    lines = []
    for piece in draw(st.lists(st.sampled_from(PIECES), max_size=12)):
        numbers = [draw(NUMBERS) for _ in range(piece.count("{}"))]
        lines.append(piece.format(*numbers).encode())
    return draw(st.sampled_from([b"\n", b"\r\n", b" ", b"\x1b[0m\n"])).join(lines)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.one_of(logs(), st.binary(max_size=400)))
def test_nothing_but_our_own_errors(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "engine.log"
    path.write_bytes(raw)
    try:
        found = diagnose(path)
    except UllageError:
        return
    json.dumps(found.to_json(), allow_nan=False)
    assert found.happened
    assert all(change.flags and change.why for change in found.changes)
    assert all(term.nbytes >= 0 for term in found.parts)
    assert not found.failed or found.evidence


def test_binary_junk_is_not_understood(tmp_path: Path) -> None:
    path = tmp_path / "junk"
    path.write_bytes(random.Random(0).randbytes(3_000_000))
    with pytest.raises(InputError, match="neither a start nor a memory failure"):
        diagnose(path)


@pytest.mark.parametrize(
    "text", ["", "\n", "hello\n", "Traceback (most recent call last):\nKeyError: 'memory'\n",
             "vLLM is a fast engine\nollama run llama3\n", "Epoch 137: loss 3.2 (12.5 GiB)\n"],
)  # fmt: skip
def test_a_log_of_something_else_is_never_guessed_at(diagnosed: Diagnosed, text: str) -> None:
    with pytest.raises(InputError, match=r"vLLM, SGLang, TGI, TensorRT-LLM, llama\.cpp and Ollama"):
        diagnosed(text)


def test_a_failure_goes_before_a_healthy_start(diagnosed: Diagnosed) -> None:
    found = diagnosed(
        "load_tensors: CUDA0 model buffer size = 18508.35 MiB\n"
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.\n"
    )
    assert (found.failed, found.wanted_bytes) == (True, 4096)


def test_the_doctor_needs_no_torch() -> None:
    script = (
        "import sys; import ullage.doctor, ullage.cli.doctor\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
