"""Text Generation Inference: its warm-up, and what comes after."""

from collections.abc import Callable

from ullage.doctor import Diagnosis
from ullage.units import GIB, MIB

Diagnosed = Callable[[str], Diagnosis]

# github.com/huggingface/text-generation-inference issue 1354
ARGS = (
    "2023-12-15T17:31:38.168114Z  INFO text_generation_launcher: Args { model_id: "
    '"tiiuae/falcon-7b-instruct", revision: None, validation_workers: 2, sharded: None, '
    "num_shard: Some(4), quantize: None, speculate: None, dtype: None, trust_remote_code: false, "
    "max_input_length: 1024, max_total_tokens: 2048, waiting_served_ratio: 1.2, "
    "max_batch_prefill_tokens: 4096, max_batch_total_tokens: None, cuda_memory_fraction: 1.0 }\n"
)
# issue 1067
WARMUP = """\
2023-09-26T21:48:00.969072Z ERROR text_generation_launcher: Method Warmup encountered an error.
Traceback (most recent call last):
  File "/opt/conda/lib/python3.9/site-packages/text_generation_server/models/flash_causal_lm.py", line 755, in warmup
    raise RuntimeError(
RuntimeError: Not enough memory to handle 4096 prefill tokens. You need to decrease `--max-batch-prefill-tokens`
"""
# issue 710
TOTAL = (
    'Error: Warmup(Generation("Not enough memory to handle 16000 total tokens with 2 prefill '
    'tokens. You need to decrease `--max-batch-total-tokens` or `--max-batch-prefill-tokens`"))\n'
)
# a start of 2.0, meta-llama/Meta-Llama-3-8B-Instruct
READY = (
    "2024-05-07T12:39:21.278450Z  INFO text_generation_router: router/src/main.rs:317: Warming up "
    "model\n2024-05-07T12:39:22.141566Z  INFO text_generation_router: router/src/main.rs:354: "
    "Setting max batch total tokens to 801568\n"
)
# issue 1374
SERVING = (
    "2023-12-22T00:21:35.318928Z ERROR batch{batch_size=1}:prefill:prefill{id=1 size=1}:prefill{id=1 "
    "size=1}: text_generation_client: router/client/src/lib.rs:33: Server error: CUDA out of memory. "
    "Tried to allocate 222.00 MiB. GPU 0 has a total capacty of 39.39 GiB of which 217.94 MiB is "
    "free. Process 862944 has 39.17 GiB memory in use. Of the allocated memory 37.10 GiB is "
    "allocated by PyTorch, and 1.57 GiB is reserved by PyTorch but unallocated.\n"
)


def test_a_warm_up_without_room_wants_fewer_prompt_tokens(diagnosed: Diagnosed) -> None:
    found = diagnosed(ARGS + WARMUP)
    assert found.failed
    assert (found.engine, found.phase) == ("text-generation-inference", "profile")
    assert found.culprit == "activation"
    assert found.run.model == "tiiuae/falcon-7b-instruct"
    assert (found.run.max_model_len, found.run.tensor_parallel) == (2048, 4)
    assert [change.flags for change in found.changes] == [
        "--max-batch-prefill-tokens 2048",
        "--quantize fp8",
        "--num-shard 8",
    ]


def test_a_pool_that_was_asked_for_wants_fewer_tokens(diagnosed: Diagnosed) -> None:
    found = diagnosed(TOTAL)
    assert found.culprit == "kv"
    assert found.changes[0].flags == "--max-batch-total-tokens 8000"


def test_a_pool_smaller_than_one_request(diagnosed: Diagnosed) -> None:
    """router/src/main.rs of 2.0."""
    found = diagnosed(
        'text_generation_router: ArgumentValidation("`max_total_tokens` must be <= '
        '`max_batch_total_tokens`. Given: 8192 and 5104")\n'
    )
    assert (found.phase, found.culprit) == ("profile", "kv")
    assert found.changes[0].flags == "--max-total-tokens 5104"


def test_memory_that_ends_in_the_warm_up(diagnosed: Diagnosed) -> None:
    """issue 563, with the wording of torch before 2."""
    found = diagnosed(
        "thread 'main' panicked at 'Unable to warmup model: Generation(\"Allocation on device 0 "
        'would exceed allowed memory. (out of memory)\\nCurrently allocated     : 16.08 GiB"\n'
        "2023-07-07T17:55:43.805488Z ERROR text_generation_launcher: Webserver Crashed\n"
    )
    assert found.failed
    assert found.phase == "profile"
    assert found.changes[0].flags.startswith("--max-batch-prefill-tokens ")


def test_memory_that_ends_while_a_prompt_is_read(diagnosed: Diagnosed) -> None:
    found = diagnosed(ARGS + READY + SERVING)
    assert found.phase == "prefill"
    assert found.cold_start_spike is True
    assert (found.wanted_bytes, found.total_bytes) == (222 * MIB, round(39.39 * GIB))
    flags = [change.flags for change in found.changes]
    assert flags.index("--max-batch-prefill-tokens 2048") < flags.index(
        "--max-batch-total-tokens 721411"
    )


def test_a_start_says_how_many_tokens_fit(diagnosed: Diagnosed) -> None:
    found = diagnosed(ARGS + READY)
    assert not found.failed
    assert "801,568 tokens together, 391.39 times the longest" in found.happened
