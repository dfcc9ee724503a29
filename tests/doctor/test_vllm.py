"""vLLM's starts, of 0.6 to 0.33, and its failures."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from ullage.doctor import Diagnosis
from ullage.units import GIB, MIB

Diagnosed = Callable[[str], Diagnosis]

# github.com/llm-d-incubation/llm-d-planner, accuracy/results/v0.19.0 (Apache-2.0): codellama-7b
CONFIG = """\
(APIServer pid=1) INFO 04-22 15:12:00 [entrypoints/utils.py:299]  ▄▄ ▄█ █     █     █ ▀▄▀ █  version 0.19.0
(APIServer pid=1) INFO 04-22 15:12:00 [entrypoints/utils.py:233] non-default args: {'model_tag': \
'%(model)s', 'model': '%(model)s', 'max_model_len': 8192, 'gpu_memory_utilization': 0.95}
(APIServer pid=1) DEBUG 04-22 15:12:11 [engine/arg_utils.py:2232] Defaulting max_num_batched_tokens to 8192 for OPENAI_API_SERVER usage context.
(APIServer pid=1) DEBUG 04-22 15:12:11 [engine/arg_utils.py:2242] Defaulting max_num_seqs to 1024 for OPENAI_API_SERVER usage context.
(EngineCore pid=283) INFO 04-22 15:12:23 [v1/engine/core.py:105] Initializing a V1 LLM engine \
(v0.19.0) with config: model='%(model)s', dtype=torch.bfloat16, max_seq_len=8192, \
tensor_parallel_size=1, pipeline_parallel_size=1, quantization=None, enforce_eager=False, \
kv_cache_dtype=auto, device_config=cuda, seed=0
"""
V19 = (
    CONFIG % {"model": "codellama/CodeLlama-7b-hf"}
    + """\
(EngineCore pid=283) INFO 04-22 15:13:03 [v1/worker/gpu_model_runner.py:4820] Model loading took 12.56 GiB memory and 38.074301 seconds
(EngineCore pid=283) DEBUG 04-22 15:13:12 [v1/worker/gpu_worker.py:284] Initial free memory: 78.68 GiB; Requested memory: 0.95 (util), 75.23 GiB
(EngineCore pid=283) DEBUG 04-22 15:13:12 [v1/worker/gpu_worker.py:297] Memory profiling takes 9.4 seconds. Total non KV cache memory: 13.58GiB; torch peak memory increase: 0.77GiB; non-torch forward increase memory: 0.25GiB; weights memory: 12.56GiB.
(EngineCore pid=283) INFO 04-22 15:13:12 [v1/worker/gpu_worker.py:298] Available KV cache memory: 61.65 GiB
(EngineCore pid=283) INFO 04-22 15:13:12 [v1/core/kv_cache_utils.py:1314] GPU KV cache size: 126,256 tokens
(EngineCore pid=283) INFO 04-22 15:13:12 [v1/core/kv_cache_utils.py:1319] Maximum concurrency for 8,192 tokens per request: 15.41x
(EngineCore pid=283) INFO 04-22 15:13:30 [v1/worker/gpu_model_runner.py:5100] Graph capturing finished in 17 secs, took 0.86 GiB
"""
)
# github.com/vllm-project/vllm pull 12126 (0.6.6 to 0.7)
V6 = """\
INFO 01-16 09:39:30 llm_engine.py:234] Initializing an LLM engine (v0.6.6) with config: model='meta-llama/Llama-3.2-11B-Vision', dtype=torch.bfloat16, max_seq_len=65536
INFO 01-16 09:40:00 worker.py:238] the current vLLM instance can use total_gpu_memory (79.22GiB) x gpu_memory_utilization (0.90) = 71.29GiB
INFO 01-16 09:40:00 worker.py:238] model weights take 19.86GiB; non_torch_memory takes 0.16GiB; PyTorch activation peak memory takes 36.63GiB; the rest of the memory reserved for KV Cache is 14.65GiB.
INFO 01-16 09:40:00 executor_base.py:95] # CUDA blocks: 6001, # CPU blocks: 1638
"""
# github.com/vllm-project/vllm pull 10511 (0.6.5)
V65 = """\
INFO 12-13 19:54:18 worker.py:243] Memory profiling results:
INFO 12-13 19:54:18 worker.py:243] total_gpu_memory     79.22GiB
INFO 12-13 19:54:18 worker.py:243] gpu_memory_utilization       0.90
INFO 12-13 19:54:18 worker.py:243] the current vLLM instance can use    71.29GiB
INFO 12-13 19:54:18 worker.py:243] model weights take   14.96GiB
INFO 12-13 19:54:18 worker.py:243] non_torch_memory     1.79GiB
INFO 12-13 19:54:18 worker.py:243] PyTorch activation peak memory       1.26GiB
INFO 12-13 19:54:18 worker.py:243] available_kv_cache_memory    53.29GiB
"""
# vllm/v1/worker/gpu_worker.py and kv_cache_utils.py of 0.32, with the figures of a published run
V32 = """\
(EngineCore pid=326) INFO 10-06 17:00:11 [model_runner.py:407] Model loading took 15.0 GiB memory and 5.420225 seconds
(EngineCore pid=326) INFO 10-06 17:00:33 [gpu_worker.py:692] Available KV cache memory: 56.21 GiB
(EngineCore pid=326) INFO 10-06 17:00:33 [kv_cache_utils.py:2464] GPU KV cache size: 460,496 tokens, Maximum concurrency for 131,072 tokens per request: 3.51x
(EngineCore pid=326) INFO 10-06 17:00:41 [gpu_worker.py:955] Free memory on device (78.84/79.25 GiB) on startup. Desired GPU memory utilization is (0.92, 72.91 GiB). Actual usage is 15.26 GiB for consumed memory (weights + non-torch), 1.44 GiB for peak activation, and 0.23 GiB for CUDAGraph memory.
"""


def sizes(found: Diagnosis) -> dict[str, float]:
    return {term.what: round(term.nbytes / GIB, 2) for term in found.parts}


def test_0_19_has_its_parts_and_its_flags(diagnosed: Diagnosed) -> None:
    found = diagnosed(V19)
    assert not found.failed
    assert (found.engine, found.engine_version) == ("vllm", "0.19.0")
    assert sizes(found) == {
        "weights": 12.56, "peak of the profiling pass": 0.77, "context and libraries": 0.25,
        "CUDA graphs": 0.86, "KV pool": 61.65,
    }  # fmt: skip
    run = found.run
    assert (run.max_model_len, run.max_num_seqs, run.prefill_chunk) == (8192, 1024, 8192)
    assert (run.utilization, run.quantization, run.kv_dtype) == (0.95, "", "")
    assert "126,256 tokens: 15.41 requests of 8,192 tokens" in found.happened


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (V6, {"weights": 19.86, "peak of the profiling pass": 36.63,
              "context and libraries": 0.16, "KV pool": 14.65}),
        (V65, {"weights": 14.96, "peak of the profiling pass": 1.26,
               "context and libraries": 1.79, "KV pool": 53.29}),
        (V32, {"weights": 15.0, "peak of the profiling pass": 1.44,
               "context and libraries": 0.26, "CUDA graphs": 0.23, "KV pool": 56.21}),
    ],
)  # fmt: skip
def test_other_versions_have_the_same_parts(
    diagnosed: Diagnosed, log: str, expected: dict[str, float]
) -> None:
    found = diagnosed(log)
    assert not found.failed
    assert sizes(found) == expected
    assert found.total_bytes == pytest.approx(79.22 * GIB, abs=0.04 * GIB)


def test_blocks_are_counted_in_tokens(diagnosed: Diagnosed) -> None:
    assert f"{6001 * 16:,} tokens" in diagnosed(V6).happened


# llm-d-planner, v0.19.0: openai-gpt-oss-20b--h100-80gb--tp1pp1dp1--8192.FAILED.log
SAMPLER = """\
(EngineCore pid=248) INFO 04-22 00:59:40 [v1/worker/gpu_worker.py:298] Available KV cache memory: 57.24 GiB
(EngineCore pid=248)   File "/usr/local/lib/python3.12/dist-packages/vllm/v1/worker/gpu_model_runner.py", line 5596, in _dummy_sampler_run
(EngineCore pid=248) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 786.00 MiB. GPU 0 has a total capacity of 79.19 GiB of which 552.50 MiB is free. Including non-PyTorch memory, this process has 78.64 GiB memory in use. Of the allocated memory 74.91 GiB is allocated by PyTorch, with 626.00 MiB allocated in private pools (e.g., CUDA Graphs), and 1.78 GiB is reserved by PyTorch but unallocated.
(EngineCore pid=248) RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine.
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_sampler_rows_are_as_many_as_fit(diagnosed: Diagnosed) -> None:
    found = diagnosed(CONFIG % {"model": "openai/gpt-oss-20b"} + SAMPLER)
    assert (found.phase, found.culprit) == ("profile", "logits")
    assert (found.wanted_bytes, found.free_bytes) == (786 * MIB, round(552.5 * MIB))
    assert found.fragmentation is False  # 2.3 % of what was reserved: the card was full
    flags = [change.flags for change in found.changes]
    # 1,024 rows wanted 786 MiB: 719 fit into 552.5, and 512 is the power of two below
    assert flags == [
        "PYTORCH_ALLOC_CONF=expandable_segments:True",
        "--max-num-seqs 512",
        "--gpu-memory-utilization 0.93",
    ]
    assert found.changes[1].frees_bytes == 393 * MIB
    assert found.changes[1].frees_bytes >= found.wanted_bytes - found.free_bytes


def test_the_sampler_without_figures_gets_a_quarter(diagnosed: Diagnosed) -> None:
    # github.com/vllm-project/vllm issue 17939 (0.8)
    found = diagnosed(
        "(VllmWorker rank=1 pid=2445156) ERROR 05-10 16:00:15 [multiproc_executor.py:470] "
        "RuntimeError: CUDA out of memory occurred when warming up sampler with 256 dummy "
        "requests. Please try lowering `max_num_seqs` or `gpu_memory_utilization` when "
        "initializing the engine.\n"
    )
    assert found.changes[0].flags == "--max-num-seqs 64"


def test_no_memory_for_the_cache_blocks(diagnosed: Diagnosed) -> None:
    # llm-d-benchmark, empirical-vllm-memory-results.md: Llama-3.3-70B-FP8 on one H100 of 79.18 GiB
    found = diagnosed(
        "(EngineCore_DP0 pid=9) INFO [gpu_worker.py:284] Model loading took 67.72 GiB and 9 seconds\n"
        "(EngineCore_DP0 pid=9) DEBUG [gpu_worker.py:284] total_memory=79.18GiB\n"
        "(EngineCore_DP0 pid=9) INFO [gpu_worker.py:298] Available KV cache memory: -1.44 GiB\n"
        "INFO gpu_memory_utilization=0.9, max_num_seqs=1024\n"
        "(EngineCore_DP0 pid=9) ValueError: No available memory for the cache blocks. Try "
        "increasing `gpu_memory_utilization` when initializing the engine.\n"
    )
    assert (found.phase, found.culprit) == ("profile", "weights")
    assert found.wanted_bytes == round(1.44 * GIB)
    assert found.changes[0].flags == "--gpu-memory-utilization 0.93"
    assert found.changes[0].frees_bytes is not None
    assert found.changes[0].frees_bytes >= found.wanted_bytes
    assert "--max-num-seqs 128" in [change.flags for change in found.changes]


def test_no_share_is_advised_that_would_not_be_enough(diagnosed: Diagnosed) -> None:
    found = diagnosed(
        "INFO worker.py:238] total_gpu_memory (24.00GiB) x gpu_memory_utilization (0.90)\n"
        "INFO [gpu_worker.py:298] Available KV cache memory: -5.00 GiB\n"
        "ValueError: No available memory for the cache blocks.\n"
    )
    assert not any("utilization" in change.flags for change in found.changes)


@pytest.mark.parametrize("pool", ["", "(0.60) = 14.18GiB\nAvailable KV cache memory: -1.54 GiB\n"])
def test_a_share_that_is_clearly_small_is_raised_first(diagnosed: Diagnosed, pool: str) -> None:
    # vllm/worker/worker.py; without its lines nobody knows how much is missing
    total = "the current vLLM instance can use total_gpu_memory (23.64GiB) x " if pool else ""
    found = diagnosed(
        f"INFO gpu_memory_utilization: 0.6\n{total}{pool}"
        "ValueError: No available memory for the cache blocks.\n"
    )
    assert found.changes[0].flags == "--gpu-memory-utilization 0.9"
    assert found.changes[0].frees_bytes == (round(0.3 * round(23.64 * GIB)) if pool else None)
    assert found.changes[1].flags == "--max-num-seqs 128"


@pytest.mark.parametrize(
    ("text", "wanted", "context"),
    [
        # github.com/vllm-project/vllm issue 34076 (0.15)
        ("ValueError: To serve at least one request with the models's max seq len (262144), (24.0 "
         "GiB KV cache is needed, which is larger than the available KV cache memory (3.18 GiB). "
         "Based on the available memory, the estimated maximum model length is 34736.", 24.0, 34736),
        # github.com/SergiioB/intel-arc-pro-b70-inference-cookbook issue 4, wrapped
        ("(EngineCore pid=316) ValueError: To serve at least one request with the model's max seq "
         "len (100000), (4.26 GiB KV cach\ne is needed, which is larger than the available KV cache "
         "memory (4.25 GiB). Based on the avai\nlable memory, the estimated maximum model length is "
         "99840.", 4.26, 99840),
        # github.com/vllm-project/vllm issue 16118 (0.8), without an estimate: 2^20 x 9.97 / 24
        ("ERROR 04-05 01:12:55 [core.py:390] ValueError: To serve at least one request with the "
         "models's max seq len (1048576), (24.00 GiB KV cache is needed, which is larger than the "
         "available KV cache memory (9.97 GiB).", 24.0, 435595),
    ],
)  # fmt: skip
def test_a_pool_that_is_too_small_for_one_request(
    diagnosed: Diagnosed, text: str, wanted: float, context: int
) -> None:
    found = diagnosed(text)
    assert (found.failed, found.culprit) == (True, "kv")
    assert found.wanted_bytes == round(wanted * GIB)
    assert f"--max-model-len {context}" in [change.flags for change in found.changes]
    fp8 = next(change for change in found.changes if change.flags == "--kv-cache-dtype fp8")
    assert fp8.frees_bytes == round(wanted * GIB) // 2


def test_the_older_message_counts_tokens(diagnosed: Diagnosed) -> None:
    # github.com/vllm-project/vllm issue 10517 (0.6.4)
    found = diagnosed(
        "Loading model weights took 14.9888 GB\n"
        "Memory profiling results: total_gpu_memory=23.58GiB initial_memory_usage=15.34GiB "
        "peak_torch_memory=17.98GiB memory_usage_post_profile=15.35GiB non_torch_memory=0.35GiB "
        "kv_cache_size=2.89GiB gpu_memory_utilization=0.90\n"
        "# GPU blocks: 1478, # CPU blocks: 2048\n"
        "The model's max seq len (29000) is larger than the maximum number of tokens that can be "
        "stored in KV cache (23648). Try increasing `gpu_memory_utilization`\n"
    )
    assert (found.failed, found.culprit) == (True, "kv")
    assert found.free_bytes == round(2.89 * GIB)
    assert [change.flags for change in found.changes[:2]] == [
        "--gpu-memory-utilization 0.94", "--max-model-len 23648",
    ]  # fmt: skip


def test_a_device_that_others_hold(diagnosed: Diagnosed) -> None:
    # github.com/pytorch/pytorch issue 175666 (0.16)
    found = diagnosed(
        "(EngineCore_DP0 pid=6940) ValueError: Free memory on device cuda:0 (14.24/23.56 GiB) on "
        "startup is less than desired GPU memory utilization (0.9, 21.2 GiB). Decrease GPU memory "
        "utilization or reduce GPU memory used by other processes.\n"
    )
    assert (found.phase, found.culprit) == ("load", "other process")
    assert found.wanted_bytes == round(21.2 * GIB)
    assert found.changes[-1].flags == "--gpu-memory-utilization 0.60"


def oom(**changes: Any) -> str:
    figures = {"wanted": "50.00 MiB", "total": "23.56 GiB", "free": "56.88 MiB",
               "own": "23.49 GiB", "allocated": "22.47 GiB", "spare": "20.00 MiB"} | changes  # fmt: skip
    return (
        "(EngineCore pid=104) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate "
        "{wanted}. GPU 0 has a total capacity of {total} of which {free} is free. Including "
        "non-PyTorch memory, this process has {own} memory in use. Of the allocated memory "
        "{allocated} is allocated by PyTorch, and {spare} is reserved by PyTorch but unallocated.\n"
    ).format(**figures)


# github.com/noonghunna/club-3090 issue 58
DEATH = """\
(EngineCore pid=104) ERROR 05-05 12:36:59 [core.py:1138] EngineCore encountered a fatal error.
(EngineCore pid=104)   File "/usr/local/lib/python3.12/dist-packages/vllm/v1/worker/gpu_worker.py", line 640, in execute_model
"""
AFTER = """\
(APIServer pid=1) ERROR 05-05 12:36:59 [serving.py:1173] vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.
(APIServer pid=1) INFO:     172.17.0.1:53044 - "POST /v1/chat/completions HTTP/1.1" 500 Internal Server Error
"""


def test_one_request_may_kill_the_engine(diagnosed: Diagnosed) -> None:
    found = diagnosed(V19 + DEATH + oom(wanted="512.00 MiB") + AFTER)
    assert (found.phase, found.culprit) == ("prefill", "activation")
    assert found.cold_start_spike is True
    assert "every request after it" in found.happened
    # 8,192 tokens wanted 512 MiB and 56.88 were free: 910, and 512 is the power of two below
    assert "--max-num-batched-tokens 512" in [change.flags for change in found.changes]
    assert {term.what for term in found.parts} >= {"weights", "KV pool"}


def test_prompt_logprobs_are_named(diagnosed: Diagnosed) -> None:
    # github.com/vllm-project/vllm issue 34643 (0.15)
    found = diagnosed(
        DEATH
        + '  File "/usr/local/lib/python3.12/dist-packages/vllm/v1/worker/gpu_model_runner.py", '
        "line 4308, in _get_prompt_logprobs_dict\n" + oom(wanted="3.82 GiB") + AFTER
    )
    assert (found.phase, found.culprit) == ("prefill", "logits")
    assert any("prompt_logprobs" in cause for cause in found.causes)
    assert "--max-logprobs 0" in [change.flags for change in found.changes]


@pytest.mark.parametrize(
    ("function", "phase", "culprit", "flag"),
    [
        ("load_model", "load", "weights", "--quantization fp8"),
        ("profile_run", "profile", "activation", "--max-num-batched-tokens 2048"),
        ("capture_model", "profile", "graphs", "--gpu-memory-utilization 0.85"),
        ("initialize_kv_cache", "profile", "kv", "--max-num-batched-tokens 2048"),
    ],
)
def test_the_traceback_tells_the_stage(
    diagnosed: Diagnosed, function: str, phase: str, culprit: str, flag: str
) -> None:
    # llm-d-planner, v0.19.0, and github.com/vllm-project/vllm issue 19186
    found = diagnosed(
        f'(Worker_TP0 pid=7)   File "/x/vllm/v1/worker/gpu_worker.py", line 9, in {function}\n'
        + oom()
    )
    assert (found.phase, found.culprit) == (phase, culprit)
    assert flag in [change.flags for change in found.changes]


def test_an_engine_that_died_of_something_else_is_not_called_out_of_memory(
    diagnosed: Diagnosed,
) -> None:
    # github.com/LMCache/LMCache issue 2306
    found = diagnosed(AFTER)
    assert found.failed
    assert found.culprit is None
    assert "no out-of-memory error" in found.happened


def test_a_start_that_failed_otherwise_is_not_called_healthy(diagnosed: Diagnosed) -> None:
    # llm-d-planner, v0.19.0: qwen-qwen3-14b--h100-80gb--tp5pp1dp1--8192.FAILED.log
    found = diagnosed(
        V19 + "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert found.failed
    assert "did not start" in found.happened


def test_of_several_workers_the_fullest_counts(diagnosed: Diagnosed) -> None:
    # github.com/vllm-project/vllm pull 14447, with one worker's figures changed
    line = (
        "(VllmWorkerProcess pid={pid}) INFO 04-12 08:21:19 [worker.py:267] model weights take "
        "{weights}GiB; non_torch_memory takes 0.20GiB; PyTorch activation peak memory takes "
        "0.37GiB; the rest of the memory reserved for KV Cache is {pool}GiB.\n"
    )
    found = diagnosed(
        line.format(pid=521, weights=21.21, pool=1.57)
        + line.format(pid=507, weights=21.61, pool=1.17)
    )
    assert sizes(found)["weights"] == 21.61
    assert sizes(found)["KV pool"] == 1.17


def test_a_line_that_says_the_same_over_and_over_is_read_at_once(diagnosed: Diagnosed) -> None:
    """100 lines took a minute each as long as every place looked to the line's end."""
    for words in ("LLM engine ", "non-default args: "):
        noise = (words * (16_000 // len(words)) + "\n") * 40
        begun = time.process_time()
        found = diagnosed(V19 + noise)
        assert time.process_time() - begun < 10
        assert not found.failed
