"""Latency worked by hand: what bounds a pass, on which device, and the band around it."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ullage import ModelSpec, Recipe, Workload, build_plan, default_execution, find_device, resolve
from ullage.planner.engines import ENGINES
from ullage.planner.reach import MOST_SEQUENCES, longest_context, most_sequences
from ullage.specs.device import Device, catalog
from ullage.specs.latency import Latency
from ullage.specs.plan import Plan, TechniqueChoice
from ullage.specs.workload import Engine
from ullage.units import GIB

LLAMA, SMOL = resolve("llama-3.1-8b"), resolve("smollm2-135m")
LLAMA_PARAMETERS, SMOL_PARAMETERS = 8_030_261_248, 134_515_008
H100, CPU = find_device("h100"), find_device("cpu-16gb")


def plan(
    model: ModelSpec, device: Device, work: Workload, engine: Engine = "ullage", **told: Any
) -> Plan:
    execution = replace(default_execution(device, engine), **told)
    return build_plan(Recipe(model, device, work, execution))


def latency(*asked: Any, **told: Any) -> Latency:
    found = plan(*asked, **told).latency
    assert found is not None
    return found


@pytest.mark.parametrize("engine", ["ullage", "transformers"])
def test_a_fast_card_waits_for_python(engine: Engine) -> None:
    """32 layers x 0.6 ms = 19.2 ms a token; 16 GB at 61% of 3.35 TB/s would take 7.9 ms. A slow
    host takes 1 ms a layer, a fast one 0.3."""
    found = latency(LLAMA, H100, Workload(1000, 24), engine)
    assert found.sequence_tokens_per_s == pytest.approx(1 / 0.0192)
    assert found.tokens_per_s_band.low == pytest.approx(1 / 0.032)
    assert found.tokens_per_s_band.high == pytest.approx(1 / 0.0096)


def test_a_cpu_waits_for_its_memory() -> None:
    """Weights in fp32 and the KV entries of 1,024 tokens, 46,080 B each, at 61% of 40 GB/s."""
    found = latency(SMOL, CPU, Workload(1000, 24))
    moved = SMOL_PARAMETERS * 4 + 1024 * 46_080
    assert found.sequence_tokens_per_s == pytest.approx(40e9 * 0.61 / moved)
    assert found.tokens_per_s_band.low == pytest.approx(40e9 * 0.25 / moved)
    assert found.tokens_per_s_band.high == pytest.approx(40e9 * 0.8 / moved)


def test_a_long_prompt_waits_for_arithmetic() -> None:
    """Two operations a parameter and token; four for each of 4,096 query numbers, 32 layers and
    pairs of tokens, T^2 / 2 of them; 40% of 989 Tflop/s, 25% to 55%."""
    tokens = 8000
    operations = 2 * LLAMA_PARAMETERS * tokens + 4 * 4096 * 32 * tokens**2 / 2
    found = latency(LLAMA, H100, Workload(tokens, 24), "vllm")
    assert found.ttft_s == pytest.approx(operations / (0.4 * 989e12), rel=1e-6)
    assert found.ttft_band_s.high == pytest.approx(operations / (0.25 * 989e12), rel=1e-6)
    assert found.ttft_band_s.low == pytest.approx(operations / (0.55 * 989e12), rel=1e-6)


def test_bf16_is_slow_on_a_cpu() -> None:
    """18% of the fp32 rate of 400 Gflop/s, of which 40% are reached."""
    operations = 2 * SMOL_PARAMETERS * 1000 + 4 * 9 * 64 * 30 * 1000**2 / 2
    work = Workload(1000, 24)
    wide, narrow = (latency(SMOL, CPU, work, dtype=x, kv_dtype=x) for x in ("fp32", "bf16"))
    assert wide.ttft_s == pytest.approx(operations / (0.4 * 400e9), rel=1e-3)
    assert narrow.ttft_s == pytest.approx(wide.ttft_s / 0.18, rel=1e-3)


def test_small_chunks_read_the_weights_again() -> None:
    """63 chunks of 16 tokens launch 63 times 32 layers."""
    found = latency(LLAMA, H100, Workload(1000, 24), prefill_chunk=16)
    assert found.ttft_s == pytest.approx(63 * 32 * 0.0006)


def test_every_chunk_reads_the_weights_and_half_of_one_sequences_entries() -> None:
    """Four chunks of 250 tokens where memory is slow and arithmetic is not: on average half of the
    prompt's entries are there."""
    slow = Device("slow", "cuda", 80 * GIB, bandwidth_bytes_s=10**9, bf16_flops=10**17)
    made = plan(LLAMA, slow, Workload(1000, 24, 2), "vllm", prefill_chunk=250)
    held = made.phases["prefill"]
    assert made.latency is not None
    moved = 4 * (held.weights_bytes + held.kv_bytes / 2 / 2)
    assert made.latency.ttft_s == pytest.approx(moved / 0.61e9)


def test_more_devices_share_a_layer_but_not_a_tokens_way() -> None:
    work = Workload(4000, 96)
    one, two, staged = (
        latency(LLAMA, H100, work, "vllm", **told)
        for told in ({}, {"tensor_parallel": 2}, {"pipeline_parallel": 2})
    )
    assert two.sequence_tokens_per_s == pytest.approx(2 * one.sequence_tokens_per_s, rel=0.02)
    assert two.ttft_s == pytest.approx(one.ttft_s / 2, rel=0.02)
    assert staged.sequence_tokens_per_s <= 1.05 * one.sequence_tokens_per_s
    assert staged.ttft_s == pytest.approx(one.ttft_s, rel=0.05)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=15)
@given(
    st.sampled_from(["smollm2-135m", "qwen3-30b-a3b", "deepseek-v2-lite", "gemma-2-9b"]),
    st.sampled_from(sorted(catalog())),
    st.builds(Workload, st.integers(1, 50_000), st.integers(1, 2000), st.integers(1, 64)),
)
def test_the_band_holds_the_estimate(
    engine: Engine, model: str, device: str, work: Workload
) -> None:
    place = replace(find_device(device), memory_bytes=200 * GIB)
    assume(place.kind in ENGINES[engine].kinds)
    found = plan(resolve(model), place, work, engine).latency
    if place.bandwidth_bytes_s is None or place.bf16_flops is None:
        assert found is None
        return
    assert found is not None
    assert 0 < found.ttft_band_s.low <= found.ttft_s <= found.ttft_band_s.high
    band = found.tokens_per_s_band
    assert 0 < band.low <= found.tokens_per_s <= band.high
    assert found.tokens_per_s == pytest.approx(work.sequences * found.sequence_tokens_per_s)


def test_the_models_own_context_ends_what_is_searched_for() -> None:
    """1 B a token: memory would hold far more than the 8,192 of the model."""
    asked = plan(SMOL, H100, Workload(1000, 24)).recipe
    assert longest_context(asked, 1, 10**9, lambda made: made.workload.prompt_tokens) == 8192
    longer = replace(asked, workload=Workload(20_000, 24))  # asked for, so that it is not less
    assert longest_context(longer, 1, 10**9, lambda made: made.workload.prompt_tokens) == 20_024


def test_a_bank_reads_on_beyond_the_models_own_context() -> None:
    """To the end of the memory; 600 slots of a text's past, but no 9,000, are trained distances."""
    asked = plan(SMOL, H100, Workload(1000, 24)).recipe
    for slots, reached in ((600, 10**6 + 24), (9000, 8192)):
        bank = TechniqueChoice("camelot", {"slots": slots})
        recipe = replace(asked, techniques=(bank,))
        assert (
            longest_context(recipe, 1, 10**6, lambda made: made.workload.prompt_tokens) == reached
        )


@pytest.mark.parametrize(
    ("limit", "budget", "reached"),
    [(None, 10**9, MOST_SEQUENCES), (64, 10**9, 64), (64, 300, 30), (None, 19, 1)],
)
def test_the_servers_limit_ends_what_is_searched_for(
    limit: int | None, budget: int, reached: int
) -> None:
    """10 B a sequence."""
    asked = plan(SMOL, H100, Workload(1000, 24), max_num_seqs=limit).recipe
    assert most_sequences(asked, 10, budget, lambda made: 10 * made.workload.sequences) == reached
