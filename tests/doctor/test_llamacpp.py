"""llama.cpp's buffers."""

from collections.abc import Callable

import pytest

from ullage.doctor import Diagnosis, learn
from ullage.units import MIB

Diagnosed = Callable[[str], Diagnosis]

# build 11434: src/llama-model.cpp, src/llama-kv-cache.cpp, src/llama-context.cpp, Qwen3-1.7B at
# 40,960 tokens
HEALTHY = """\
0.00.228.419 I   - CUDA0   : NVIDIA GeForce RTX 3090 (24123 MiB, 23755 MiB free)
load_tensors: offloaded 29/29 layers to GPU
load_tensors:   CPU_Mapped model buffer size =   593.50 MiB
load_tensors:        CUDA0 model buffer size =  3281.35 MiB
llama_context: n_seq_max             = 1
llama_context: n_ctx                 = 40960
llama_context: n_ubatch              = 512
llama_kv_cache:      CUDA0 KV buffer size =  4480.00 MiB
llama_kv_cache: size = 4480.00 MiB ( 40960 cells,  28 layers,  1/1 seqs), K (f16): 2240.00 MiB, V (f16): 2240.00 MiB
llama_context:  CUDA_Host  output buffer size =     0.58 MiB
sched_reserve:      CUDA0 compute buffer size =   300.75 MiB
sched_reserve:  CUDA_Host compute buffer size =    88.01 MiB
main: server is listening on http://127.0.0.1:8080
"""
# github.com/ggml-org/llama.cpp pull 6122, of early 2024
OLD = """\
llm_load_tensors: offloaded 41/41 layers to GPU
llm_load_tensors:        CPU buffer size =  1640.62 MiB
llm_load_tensors:      CUDA0 buffer size =  5434.38 MiB
llm_load_tensors:      CUDA1 buffer size = 13989.53 MiB
llama_new_context_with_model: n_ctx      = 4096
llama_kv_cache_init:      CUDA0 KV buffer size =  1536.00 MiB
llama_kv_cache_init:      CUDA1 KV buffer size =  3584.00 MiB
llama_new_context_with_model:      CUDA0 compute buffer size =   672.01 MiB
"""
# github.com/ikawrakow/ik_llama.cpp issue 749
COMPUTE = """\
llama_kv_cache_init:      CUDA0 KV buffer size =   379.23 MiB
llama_new_context_with_model: pipeline parallelism enabled (n_copies=4)
ggml_backend_cuda_buffer_type_alloc_buffer: allocating 279356.51 MiB on device 0: cudaMalloc failed: out of memory
ggml_gallocr_reserve_n: failed to allocate CUDA0 buffer of size 292926534144
llama_new_context_with_model: failed to allocate compute buffers
"""
# github.com/ggml-org/llama.cpp issue 20431, with the device's line of the same build
WEIGHTS = """\
0.00.228.419 I   - CUDA0   : NVIDIA GeForce RTX 3090 (24123 MiB, 23755 MiB free)
load_tensors: offloaded 95/95 layers to GPU
ggml_backend_cuda_buffer_type_alloc_buffer: allocating 144817.04 MiB on device 0: cudaMalloc failed: out of memory
alloc_tensor_range: failed to allocate CUDA0 buffer of size 151851674624
llama_model_load: error loading model: unable to allocate CUDA0 buffer
"""
# src/llama-kv-cache.cpp, build 11434
CACHE = """\
llama_context: n_ctx                 = 131072
ggml_backend_cuda_buffer_type_alloc_buffer: allocating 16384.00 MiB on device 0: cudaMalloc failed: out of memory
alloc_tensor_range: failed to allocate CUDA0 buffer of size 17179869184
llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache
"""
# github.com/ggml-org/llama.cpp pull 26297
RETRIED = """\
1.06.520.077 E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 51748.72 MiB on device 1: cudaMalloc failed: out of memory
1.06.520.084 E ggml_gallocr_reserve_n_impl: failed to allocate CUDA1 buffer of size 54262464512
1.06.520.107 W sched_reserve: compute buffer allocation failed, retrying without pipeline parallelism
1.07.200.000 I sched_reserve:      CUDA1 compute buffer size =  3200.00 MiB
1.07.304.130 I srv    load_model: initializing, n_slots = 1, n_ctx_slot = 50176, kv_unified = 'false'
1.07.400.000 I main: model loaded
"""
# github.com/ggml-org/llama.cpp pulls 15860 and 22673
TABLE = """\
common_memory_breakdown_print: | memory breakdown [MiB]                         | total   free     self   model   context   compute    unaccounted |
common_memory_breakdown_print: |   - CUDA0 (RTX 2000 Ada Generation Laptop GPU) |  7807 = 7627 + ( 5658 =  2542 +    2622 +     493) +       -5478 |
common_memory_breakdown_print: |   - Host                                       |                 19891 = 19627 +       0 +     264                |
"""
# github.com/ggml-org/llama.cpp issue 13085
SERVING = """\
load_tensors:        CUDA0 model buffer size = 18508.35 MiB
llama_kv_cache:      CUDA0 KV buffer size =  4480.00 MiB
main: server is listening on http://127.0.0.1:9109
slot launch_slot_: id  0 | task 0 | processing task
CUDA error: out of memory
  current device: 1, in function alloc at ggml-cuda.cu:496
"""


def test_a_healthy_start_tells_device_from_host(diagnosed: Diagnosed) -> None:
    found = diagnosed(HEALTHY)
    assert not found.failed
    assert found.engine == "llama.cpp"
    assert {term.what: term.nbytes for term in found.parts} == {
        "weights": round(3281.35 * MIB),
        "weights in host memory": round(593.5 * MIB),
        "KV cache": 4480 * MIB,
        "compute buffer": round(300.75 * MIB),
        "compute buffer in host memory": round(88.01 * MIB),
        "output buffer in host memory": round(0.58 * MIB),
    }
    assert found.run.max_model_len == 40960
    assert found.free_bytes == 23755 * MIB


@pytest.mark.parametrize(
    ("name", "short"), [("Q4_K - Medium", "q4_k_m"), ("Q8_0", "q8_0"), ("F16", "f16")]
)
def test_a_file_type_is_called_as_llama_quantize_does(
    diagnosed: Diagnosed, name: str, short: str
) -> None:
    # src/llama-model-loader.cpp
    names = f"print_info: file type   = {name}\nprint_info: general.name          = Qwen3 1.7B\n"
    run = diagnosed(HEALTHY + names).run
    assert (run.quantization, run.model) == (short, "Qwen3 1.7B")
    partly = HEALTHY.replace("offloaded 29/29", "offloaded 20/29")
    assert diagnosed(partly + names).run.model == ""  # no plan knows such a split


def test_the_wording_of_2024_sums_its_devices(diagnosed: Diagnosed) -> None:
    sizes = {term.what: term.nbytes for term in diagnosed(OLD).parts}
    assert sizes["weights"] == round(5434.38 * MIB) + round(13989.53 * MIB)
    assert sizes["KV cache"] == 5120 * MIB


def test_a_compute_buffer_wants_a_smaller_micro_batch(diagnosed: Diagnosed) -> None:
    found = diagnosed(COMPUTE)
    assert (found.phase, found.culprit) == ("profile", "activation")
    assert found.wanted_bytes == round(279356.51 * MIB)
    assert found.changes[0].flags == "-ub 256"


def test_weights_want_fewer_layers_as_many_as_fit(diagnosed: Diagnosed) -> None:
    found = diagnosed(WEIGHTS)
    assert (found.phase, found.culprit) == ("load", "weights")
    layers = next(change for change in found.changes if change.flags.startswith("-ngl"))
    assert layers.flags == "-ngl 14"  # 95 x 23755 x 0.9 / 144817


def test_a_cache_wants_smaller_entries(diagnosed: Diagnosed) -> None:
    found = diagnosed(CACHE)
    assert found.culprit == "kv"
    assert found.changes[0].flags.startswith("-ctk q8_0 -ctv q8_0")
    assert found.changes[0].frees_bytes == 16384 * MIB * 15 // 32
    assert found.changes[1].flags == "-c 65536"


# the same refusal on a card of 8 GiB, with the lines of a Llama 3.1 8B before it
SMALL_CARD = """\
using device CUDA0 (NVIDIA GeForce RTX 4060) (0000:01:00.0) - 7500 MiB free
llama_model_loader: - kv   2: general.name str = Meta Llama 3.1 8B Instruct
print_info: file type   = Q4_K - Medium
load_tensors: offloaded 33/33 layers to GPU
load_tensors:        CUDA0 model buffer size =  4403.49 MiB
"""


def test_only_what_fits_beside_the_weights_is_advised(diagnosed: Diagnosed) -> None:
    unnamed = SMALL_CARD.replace("general.name", "general.type")
    longest, smaller = diagnosed(unnamed + CACHE).changes
    # 131,072 x 0.9 x (7,500 - 4,403.49) / 16,384, in steps of 256
    assert longest.flags == "-c 22272"
    assert smaller.flags.startswith("-ctk q8_0")
    assert smaller.why.endswith("not enough alone")


def test_no_longer_context_is_advised_than_the_plan_has(diagnosed: Diagnosed) -> None:
    found = diagnosed(SMALL_CARD.replace("7500 MiB", "8100 MiB") + CACHE)
    tokens = int(found.changes[0].flags.removeprefix("-c "))
    assert f"the longest that fits has {tokens:,} tokens" in found.planned


def test_a_failure_that_was_retried_is_a_healthy_start(diagnosed: Diagnosed) -> None:
    found = diagnosed(RETRIED)
    assert not found.failed
    assert found.parts[0].nbytes == 3200 * MIB


def test_the_table_is_read(diagnosed: Diagnosed) -> None:
    found = diagnosed(TABLE)
    assert not found.failed
    assert [term.nbytes // MIB for term in found.parts] == [2542, 2622, 493]


def test_the_table_at_the_end_has_what_is_not_accounted_for(diagnosed: Diagnosed) -> None:
    # github.com/ggml-org/llama.cpp pull 15860
    found = diagnosed(
        "llama_print_memory_breakdown: memory breakdown:      total   free     self   model   context   compute    unaccounted\n"
        "common_memory_breakdown_print: |   - CUDA0 (RTX 4090) | 24080 = 9436 + (14193 = 13169 +      38 +     985) +         451 |\n"
    )
    assert found.parts[-1].nbytes == 451 * MIB
    assert learn(found).constants == {"runtime_bytes": 451 * MIB}


def test_a_start_that_fits_may_still_run_out(diagnosed: Diagnosed) -> None:
    found = diagnosed(SERVING)
    assert found.failed
    assert (found.phase, found.cold_start_spike) == ("serve", True)
    assert any("filled" in cause for cause in found.causes)


def test_a_full_context_is_not_called_out_of_memory(diagnosed: Diagnosed) -> None:
    # tools/server/server-context.cpp
    found = diagnosed(
        HEALTHY + "srv send_error: task id = 0, error: Context size has been exceeded.\n"
    )
    assert found.failed
    assert "no memory was missing" in found.happened
