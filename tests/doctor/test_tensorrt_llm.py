"""TensorRT-LLM: a start with its buffers, and a pool that could not be made."""

from collections.abc import Callable

import pytest

from ullage.doctor import Diagnosis
from ullage.units import GIB, MIB

Diagnosed = Callable[[str], Diagnosis]

# docs/source/reference/memory.md of TensorRT-LLM, and the pool's line as 0.12 prints it
START = """\
[TensorRT-LLM][INFO] TRTGptModel maxSequenceLen: 4098
[TensorRT-LLM][INFO] TRTGptModel maxNumTokens: 8192
[TensorRT-LLM][INFO] Loaded engine size: 6695 MiB
[TensorRT-LLM][INFO] [MemUsageChange] Allocated 1134.01 MiB for execution context memory.
[TensorRT-LLM][INFO] [MemUsageChange] Allocated 43.29 MB GPU memory for runtime buffers.
[TensorRT-LLM][INFO] [MemUsageChange] Allocated 180.30 MB GPU memory for decoder.
[TensorRT-LLM][INFO] Memory usage when calculating max tokens in paged kv cache: total: 79.10 GiB, available: 63.62 GiB
[TensorRT-LLM][INFO] Number of tokens per block: 64.
"""
POOL = (
    "[TensorRT-LLM][INFO] [MemUsageChange] Allocated 62.99 GiB for max tokens in paged KV cache "
    "(294848).\n"
)
# github.com/NVIDIA/TensorRT-LLM issue 5872
UNMADE = """\
[07/08/2025-19:47:15] [TRT-LLM] [RANK 1] [E] Failed to initialize executor on rank 1: Executor creation failed due to insufficient GPU memory.

The following component could not be created: {component}
Total GPU memory (GiB): 140.06
Free GPU memory before component creation attempt (GiB): 108.86

Previously created components and free GPU memory before/after creation (GiB):
Model: 139.55 / 110.70
Sampler: 110.70 / 110.70
"""


def test_a_start_has_its_buffers(diagnosed: Diagnosed) -> None:
    found = diagnosed(START + POOL)
    assert not found.failed
    assert found.engine == "tensorrt-llm"
    assert {term.what: term.nbytes for term in found.parts} == {
        "engine": 6695 * MIB,
        "execution context": round(1134.01 * MIB),
        "runtime buffers": round(43.29 * MIB),
        "decoder": round(180.30 * MIB),
        "KV pool": round(62.99 * GIB),
    }
    assert "294,848 tokens, 71.95 times the longest request" in found.happened


@pytest.mark.parametrize(
    ("component", "culprit", "flags"),
    [
        ("KV cache", "kv", "--kv_cache_free_gpu_memory_fraction 0.80"),
        ("Model", "weights", "--tp_size 2"),
        ("Sampler", "logits", "--max_batch_size 128"),
        ("Initial KV cache (temporary for KV cache size estimation)", "activation",
         "--max_num_tokens 4096"),
        ("_no_capture_kv_cache", "activation", "--max_num_tokens 4096"),
        ("Draft model for speculative decoding", "weights", "--tp_size 2"),
    ],
)  # fmt: skip
def test_the_component_that_was_not_made(
    diagnosed: Diagnosed, component: str, culprit: str, flags: str
) -> None:
    found = diagnosed(UNMADE.format(component=component))
    assert found.failed
    assert found.culprit == culprit
    assert found.total_bytes == round(140.06 * GIB)
    assert found.free_bytes == round(108.86 * GIB)
    assert [(term.what, term.nbytes) for term in found.parts] == [
        ("model", pytest.approx(28.85 * GIB, abs=MIB))
    ]
    assert found.changes[0].flags == flags


def test_a_pool_too_small_for_one_request(diagnosed: Diagnosed) -> None:
    # github.com/janhq/cortex.cpp issue 981
    found = diagnosed(
        "[TensorRT-LLM][INFO] Max tokens in paged KV cache: 128. Allocating 16777216 bytes.\n"
        "[TensorRT-LLM][INFO] Max KV cache pages per sequence: 16\n"
        "[TensorRT-LLM][ERROR] Assertion failed: maxTokensInPagedKvCache (128) must be large enough "
        "to process at least 1 sequence to completion\n"
    )
    assert (found.phase, found.culprit) == ("profile", "kv")
    assert "128 tokens" in found.happened
    assert {"--kv_cache_free_gpu_memory_fraction 0.95", "--max_seq_len 128"} == {
        change.flags for change in found.changes
    }


OUT = (
    "[TensorRT-LLM][ERROR] CUDA runtime error in ::cudaMallocAsync(ptr, n, mCudaStream->get()): out "
    "of memory (/code/tensorrt_llm/cpp/tensorrt_llm/runtime/tllmBuffers.h:112)\n"
)


@pytest.mark.parametrize(
    ("before", "phase", "culprit"),
    [
        ("", "load", "weights"),
        (START, "profile", "kv"),
        (START + POOL, "serve", "activation"),
        # github.com/triton-inference-server/tensorrtllm_backend issue 456
        ("[TensorRT-LLM][INFO] Max tokens in paged KV cache: 117760. Allocating 54022635520 "
         "bytes.\n", "profile", "kv"),
    ],
)  # fmt: skip
def test_what_was_printed_last_says_where_memory_ended(
    diagnosed: Diagnosed, before: str, phase: str, culprit: str
) -> None:
    # github.com/NVIDIA/TensorRT-LLM issue 401
    found = diagnosed(before + OUT)
    assert found.failed
    assert (found.phase, found.culprit) == (phase, culprit)


def test_the_gpus_own_figures_come_along(diagnosed: Diagnosed) -> None:
    # github.com/NVIDIA/TensorRT-LLM issue 7818
    found = diagnosed(
        "[09/17/2025-21:24:19] [TRT-LLM] [RANK 2] [E] Error executing load_single_module with args "
        "('model.layers.9.mlp.gate_up_proj', Linear()): CUDA out of memory. Tried to allocate 40.00 "
        "MiB. GPU 0 has a total capacity of 22.07 GiB of which 20.62 MiB is free. Including "
        "non-PyTorch memory, this process has 1.12 GiB memory in use. Of the allocated memory "
        "880.00 MiB is allocated by PyTorch, and 20.00 MiB is reserved by PyTorch but unallocated.\n"
    )
    assert (found.phase, found.wanted_bytes) == ("load", 40 * MIB)
    assert found.changes[0].flags.startswith(("PYTORCH", "nvidia-smi"))
