"""SGLang's start and its two failures."""

from collections.abc import Callable

from ullage.doctor import Diagnosis
from ullage.units import GIB, MIB

Diagnosed = Callable[[str], Diagnosis]

# github.com/sgl-project/sglang pulls 4826 (0.4), 11716 and 11830
HEALTHY = """\
[2025-03-27 21:33:20 TP0] server_args=ServerArgs(model_path='google/gemma-3-4b-it', tp_size=1, \
mem_fraction_static=0.88, chunked_prefill_size=8192, kv_cache_dtype='auto')
[2025-03-27 21:33:21 TP0] Load weight begin. avail mem=139.21 GB
[2025-03-27 21:33:30 TP0] Load weight end. type=Gemma3ForConditionalGeneration, \
dtype=torch.bfloat16, avail mem=131.08 GB, mem usage=8.13 GB.
[2025-03-27 21:33:31 TP0] KV Cache is allocated. #tokens: 834615, K size: 54.12 GB, V size: 54.12 GB
[2025-03-27 21:33:31 TP0] Memory pool end. avail mem=14.61 GB
[2025-03-27 21:33:31 TP0] Capture cuda graph begin. This can take up to several minutes. avail mem=13.95 GB
[2025-03-27 21:33:42 TP0] Capture cuda graph end. Time elapsed: 5.92 s. mem usage=1.44 GB. avail mem=12.51 GB.
[2025-03-27 21:33:43 TP0] max_total_num_tokens=834615, chunked_prefill_size=8192, \
max_prefill_tokens=16384, max_running_requests=4096, context_len=131072, available_gpu_mem=12.51 GB
"""
# 0.5.23: srt/model_executor/model_runner_components/cuda_graph_setup.py, mem_cache/memory_pool.py
NEWER = """\
[2026-07-15 13:14:53] Load weight end. elapsed=19.09 s, type=Qwen3MoeForCausalLM, avail mem=230.20 GB, mem usage=56.98 GB.
[2026-07-15 13:14:54] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 1669816, K size: 76.44 GB, V size: 76.44 GB
[2026-07-15 13:15:00] Capture target decode CUDA graph end. bs=[1, 2, 4, 8], elapsed=5.92 s, mem usage=1.00 GB, avail mem=11.17 GB.
"""
# github.com/sgl-project/sglang issue 4895
LITTLE = """\
[2025-03-29 18:18:20 TP0] Load weight begin. avail mem=23.18 GB
[2025-03-29 18:18:33 TP0] Load weight end. type=Gemma3ForConditionalGeneration, avail mem=5.01 GB, mem usage=18.17 GB.
[2025-03-29 18:18:34 TP0] Scheduler hit an exception: Traceback (most recent call last):
RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.
"""
# github.com/sgl-project/sglang issue 5285, with the end of torch's message
GRAPHS = """\
  File "/sgl-workspace/sglang/python/sglang/srt/model_executor/cuda_graph_runner.py", line 269, in __init__
Exception: Capture cuda graph failed: CUDA out of memory. Tried to allocate 448.00 MiB. GPU 7 has \
a total capacity of 95.00 GiB of which 301.31 MiB is free. Process 1 has 94.69 GiB memory in use. \
Of the allocated memory 90.10 GiB is allocated by PyTorch, and 100.00 MiB is reserved by PyTorch \
but unallocated.
Possible solutions:
1. set --mem-fraction-static to a smaller value (e.g., 0.8 or 0.7)
"""


def test_a_healthy_start_has_its_parts(diagnosed: Diagnosed) -> None:
    found = diagnosed(HEALTHY)
    assert not found.failed
    assert found.engine == "sglang"
    assert found.run.model == "google/gemma-3-4b-it"
    assert found.run.utilization == 0.88
    sizes = {term.what: term.nbytes for term in found.parts}
    assert sizes["weights"] == round(8.13 * GIB)
    assert sizes["KV pool"] == 2 * round(54.12 * GIB)
    assert sizes["CUDA graphs"] == round(1.44 * GIB)
    assert "834,615 tokens, 6.37 times the longest request" in found.happened


def test_the_wording_of_0_5_is_read(diagnosed: Diagnosed) -> None:
    sizes = {term.what: term.nbytes for term in diagnosed(NEWER).parts}
    assert sizes == {
        "weights": round(56.98 * GIB),
        "KV pool": 2 * round(76.44 * GIB),
        "CUDA graphs": GIB,
    }


def test_at_the_start_the_static_share_must_grow(diagnosed: Diagnosed) -> None:
    found = diagnosed(LITTLE)
    assert (found.phase, found.culprit) == ("profile", "weights")
    # the weights take 1 - 5.01 / 23.18 = 0.784 of what was free
    assert found.changes[0].flags == "--mem-fraction-static 0.82"


def test_while_capturing_graphs_it_must_shrink(diagnosed: Diagnosed) -> None:
    found = diagnosed(GRAPHS)
    assert (found.phase, found.culprit) == ("profile", "graphs")
    assert found.wanted_bytes == 448 * MIB
    assert found.fragmentation is False
    assert "--mem-fraction-static 0.83" in [change.flags for change in found.changes]


def test_while_serving_a_smaller_chunk_comes_first(diagnosed: Diagnosed) -> None:
    # sglang/srt/managers/scheduler.py; the first long prompt
    found = diagnosed(
        HEALTHY
        + '  File "/sglang/srt/model_executor/model_runner.py", line 1, in forward_extend\n'
        + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a "
        "total capacity of 139.81 GiB of which 1.10 GiB is free. Including non-PyTorch memory, "
        "this process has 138.70 GiB memory in use. Of the allocated memory 130.00 GiB is "
        "allocated by PyTorch, and 200.00 MiB is reserved by PyTorch but unallocated.\n"
    )
    assert (found.phase, found.cold_start_spike) == ("prefill", True)
    assert found.changes[0].flags == "--chunked-prefill-size 4096"


def test_a_scheduler_that_stopped_otherwise_is_not_called_healthy(diagnosed: Diagnosed) -> None:
    found = diagnosed(HEALTHY + "[2025-03-27 21:34:00 TP0] Scheduler hit an exception: KeyError\n")
    assert found.failed
    assert "no out-of-memory error" in found.happened
