"""Latency by roofline: near what was published, and slower wherever more is moved or computed."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage import ModelSpec, Recipe, TechniqueChoice, build_plan, find_device, resolve
from ullage.planner.latency import _read_share
from ullage.specs.device import Device
from ullage.specs.latency import Latency
from ullage.specs.model import TensorSpec
from ullage.specs.quantized import as_checkpoint
from ullage.specs.workload import Execution, Workload
from ullage.units import GIB

LLAMA = resolve("llama-3.1-8b")
SHORT = Workload(1000, 100)
A100, H100 = find_device("a100-80gb"), find_device("h100")


def latency(
    model: ModelSpec = LLAMA,
    device: Device = H100,
    work: Workload = SHORT,
    techniques: tuple[TechniqueChoice, ...] = (),
    **execution: Any,
) -> Latency:
    found = build_plan(Recipe(model, device, work, Execution(**execution), techniques)).latency
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("device", "sequences", "published"),
    [(A100, 1, 79.3), (H100, 1, 125.1), (A100, 32, 1894), (H100, 32, 2936)],
)
def test_published_rates_are_inside_the_band(
    device: Device, sequences: int, published: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured with an engine that captures graphs."""
    monkeypatch.setattr("ullage.planner.latency._EAGER_ENGINES", ())
    found = latency(device=device, work=Workload(896, 128, sequences))
    assert found.tokens_per_s_band.low < published < found.tokens_per_s_band.high
    assert found.tokens_per_s == pytest.approx(published, rel=0.12)


def test_a_band_holds_its_middle() -> None:
    found = latency(work=Workload(4000, 100, 8))
    assert found.ttft_band_s.low < found.ttft_s < found.ttft_band_s.high
    assert found.tokens_per_s_band.low < found.tokens_per_s < found.tokens_per_s_band.high
    assert found.tokens_per_s == pytest.approx(8 * found.sequence_tokens_per_s)


def test_a_prefill_computes_and_a_decode_reads() -> None:
    """8B x 2 x 8,000 tokens in 40% of 989 Tflop/s."""
    found = latency(work=Workload(8000, 100), prefill_chunk=0)
    assert found.ttft_s == pytest.approx(2 * 8.03e9 * 8000 / (0.4 * 989e12), rel=0.2)


def test_a_device_without_figures_has_no_latency() -> None:
    unknown = Device("gpu", "cuda", 80 * GIB)
    recipe = Recipe(LLAMA, unknown, Workload(100, 10), Execution())
    assert build_plan(recipe).latency is None


@given(st.integers(1, 50_000), st.integers(1, 20_000), st.integers(1, 64))
def test_longer_prompts_take_longer(tokens: int, more: int, sequences: int) -> None:
    short, long = (latency(work=Workload(n, 100, sequences)) for n in (tokens, tokens + more))
    assert long.ttft_s >= short.ttft_s
    assert long.tokens_per_s <= short.tokens_per_s


@given(st.integers(1, 200))
def test_a_batch_is_faster_together_and_slower_each(sequences: int) -> None:
    some, more = (latency(work=Workload(2000, 100, n)) for n in (sequences, sequences + 1))
    assert more.tokens_per_s > some.tokens_per_s
    assert more.sequence_tokens_per_s <= some.sequence_tokens_per_s


def quantized(scheme: str, device: Device, sequences: int = 1) -> float:
    dtype = "fp32" if device.kind == "cpu" else "bf16"
    work = Workload(100, 100, sequences)
    choice = TechniqueChoice("quantization", {"scheme": scheme})
    return latency(LLAMA, device, work, (choice,), dtype=dtype, kv_dtype=dtype).tokens_per_s


def test_quantized_weights_are_no_faster_where_they_are_widened_first() -> None:
    cpu, gpu = find_device("cpu-64gb"), find_device("rtx-4090")
    assert quantized("nf4", cpu) < quantized("none", cpu)
    assert quantized("int8", gpu) < quantized("none", gpu)
    assert quantized("nf4", gpu) > 1.3 * quantized("none", gpu)
    assert quantized("nf4", gpu, 8) < quantized("none", gpu, 8)


def test_sparse_kv_is_faster_where_kv_is_what_is_read() -> None:
    chosen = (TechniqueChoice("dms", {"kept": 0.125}),)
    work = Workload(16_000, 100, 24)
    assert (
        latency(work=work, techniques=chosen).tokens_per_s > 1.6 * latency(work=work).tokens_per_s
    )


def test_servers_multiply_fp8_at_its_own_rate() -> None:
    fp8 = as_checkpoint(LLAMA, "fp8")
    work = Workload(8000, 100)
    wide, narrow = (latency(model, H100, work, engine="vllm") for model in (LLAMA, fp8))
    assert narrow.ttft_s == pytest.approx(wide.ttft_s / 2, rel=0.05)
    assert latency(fp8, H100, work).ttft_s == latency(LLAMA, H100, work).ttft_s


def test_fp32_is_far_slower_on_a_gpu() -> None:
    slow, fast = (latency(dtype=name, kv_dtype=name) for name in ("fp32", "bf16"))
    assert slow.ttft_s > 8 * fast.ttft_s


@given(st.integers(1, 8), st.integers(1, 300))
def test_a_batch_reads_the_experts_that_it_is_sent_to(active: int, tokens: int) -> None:
    experts = TensorSpec("experts.{}.{}", (64, 64), "expert", (0, 1), 8, active)
    model = replace(LLAMA, tensors=(experts,))
    share = _read_share(model, "bf16", tokens)
    assert share == pytest.approx(1 - (1 - active / 8) ** tokens)
    assert share >= active / 8 - 1e-9


def test_dense_weights_are_all_read() -> None:
    assert _read_share(LLAMA, "bf16", 1) == 1.0
