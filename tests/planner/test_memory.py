"""The arithmetic of memory: what it adds up to, how it grows, and that caches take what it says."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ullage import ModelSpec, resolve
from ullage.kv import attention
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.pool import KVPool
from ullage.planner.memory import explain, kv_bytes_per_token, peak_bytes, phase_footprints
from ullage.runtime.load import TORCH_DTYPES
from ullage.specs.blocks import sequence_blocks
from ullage.specs.calibration import Calibration
from ullage.specs.device import Device
from ullage.specs.families import RUNNING
from ullage.specs.model import LayerCache
from ullage.specs.plan import Recipe, TechniqueChoice
from ullage.specs.workload import PHASES, Execution, Workload
from ullage.units import GIB

TinySpec = Callable[..., ModelSpec]
CPU = Device("cpu", "cpu", 64 * GIB)
sizes = st.integers(1, 5000)


def executions() -> st.SearchStrategy[Execution]:
    return st.builds(
        Execution,
        engine=st.sampled_from(["ullage", "transformers"]),
        dtype=st.sampled_from(["fp32", "bf16"]),
        kv_dtype=st.sampled_from(["fp32", "bf16"]),
        attention=st.sampled_from(["eager", "sdpa"]),
        prefill_chunk=st.sampled_from([0, 1, 32, 512]),
    )


def quantizations() -> st.SearchStrategy[tuple[TechniqueChoice, ...]]:
    schemes = st.sampled_from(["none", "int8", "nf4"])
    return schemes.map(lambda scheme: (TechniqueChoice("quantization", {"scheme": scheme}),))


def recipe(spec: ModelSpec, prompt: int = 100, output: int = 10, **execution: Any) -> Recipe:
    settings = {"dtype": "fp32", "kv_dtype": "fp32", **execution}
    return Recipe(spec, CPU, Workload(prompt, output), Execution(**settings))


@pytest.mark.parametrize("family", RUNNING)
@given(
    st.builds(Workload, sizes, sizes, st.integers(1, 40)),
    st.builds(Workload, st.integers(0, 600), st.integers(0, 600), st.integers(0, 5)),
    executions(),
    st.data(),
)
def test_peaks_never_fall_as_the_work_grows(
    tiny_spec: TinySpec,
    family: str,
    work: Workload,
    more: Workload,
    execution: Execution,
    data: st.DataObject,
) -> None:
    techniques = () if family == "gpt2" else data.draw(quantizations())
    small = Recipe(tiny_spec(family), CPU, work, execution, techniques)
    larger = Workload(
        work.prompt_tokens + more.prompt_tokens,
        work.output_tokens + more.output_tokens,
        work.sequences + more.sequences,
    )
    before = phase_footprints(small)
    after = phase_footprints(replace(small, workload=larger))
    for phase in PHASES:
        assert after[phase].total_bytes >= before[phase].total_bytes


def growth_of_growth(spec: ModelSpec, tokens: int, **execution: Any) -> int:
    """Second difference of the prefill's activations around `tokens`: 0 for what is linear."""
    one, two, three = (
        phase_footprints(recipe(spec, size, **execution))["prefill"].activation_bytes
        for size in (tokens - 1, tokens, tokens + 1)
    )
    return three - 2 * two + one


@pytest.mark.parametrize(("dtype", "bytes_a_score"), [("fp32", 8), ("bf16", 10)])
def test_eager_scores_are_quadratic(tiny_spec: TinySpec, dtype: str, bytes_a_score: int) -> None:
    execution = {"engine": "transformers", "attention": "eager", "prefill_chunk": 0}
    grown = growth_of_growth(tiny_spec("llama"), 2000, dtype=dtype, **execution)
    mask_bytes = 4 if dtype == "fp32" else 2
    assert grown == 2 * (4 * bytes_a_score + mask_bytes)  # of 4 heads; d2(T^2) = 2


@pytest.mark.parametrize("engine", ["ullage", "transformers"])
@pytest.mark.parametrize("chunk", [0, 512])
def test_nothing_else_is_quadratic(tiny_spec: TinySpec, engine: str, chunk: int) -> None:
    assert growth_of_growth(tiny_spec("llama"), 2000, engine=engine, prefill_chunk=chunk) == 0


def test_the_chunk_bounds_the_activations(tiny_spec: TinySpec) -> None:
    def activations(prompt: int, chunk: int) -> int:
        made = recipe(tiny_spec("qwen3"), prompt, prefill_chunk=chunk)
        return phase_footprints(made)["prefill"].activation_bytes

    assert activations(4000, 32) == activations(400, 32) < activations(4000, 0) / 50


@pytest.mark.parametrize("family", RUNNING)
@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8"])
def test_planned_kv_is_what_the_paged_cache_takes(
    tiny_spec: TinySpec, family: str, kv_dtype: str
) -> None:
    spec = tiny_spec(family)
    made = replace(recipe(spec, 45, 6, kv_dtype=kv_dtype), workload=Workload(45, 6, 3))
    pool = KVPool(3 * sequence_blocks(spec, 51), spec.head_dim, TORCH_DTYPES[kv_dtype])
    cache = PagedCache(spec, pool)
    for _ in range(3):
        cache.open(51)
    assert cache.pool.free_blocks == 0
    assert phase_footprints(made)["decode"].kv_bytes == cache.nbytes()


@pytest.mark.parametrize("family", RUNNING)
def test_planned_kv_is_what_transformers_holds(
    tiny_model: Callable[..., tuple[Any, ModelSpec]], family: str
) -> None:
    model, spec = tiny_model(family)
    ids = torch.ones(2, 20, dtype=torch.long)
    held = model.generate(
        ids, attention_mask=ids, max_new_tokens=5, pad_token_id=0, return_dict_in_generate=True
    ).past_key_values
    live_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers)
    made = replace(recipe(spec, 20, 5, engine="transformers"), workload=Workload(20, 5, 2))
    assert phase_footprints(made)["decode"].kv_bytes == live_bytes


@pytest.mark.parametrize("family", RUNNING)
def test_planned_weights_are_the_models_parameters(
    tiny_model: Callable[..., tuple[Any, ModelSpec]], family: str
) -> None:
    model, spec = tiny_model(family)
    held_bytes = sum(weight.nbytes for weight in model.parameters())
    for footprint in phase_footprints(recipe(spec)).values():
        assert footprint.weights_bytes == held_bytes


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_the_cache_writes_no_more_than_the_pool_that_was_planned(
    tiny_model: Callable[..., tuple[Any, ModelSpec]], family: str
) -> None:
    """A whole run inside a pool that is exactly the planned KV bytes."""
    model, spec = tiny_model(family)
    planned = phase_footprints(recipe(spec, 20, 12))["decode"].kv_bytes
    cache = PagedCache(spec, KVPool(sequence_blocks(spec, 32), spec.head_dim, torch.float32))
    assert cache.pool.nbytes == planned
    attention.register()
    model.set_attn_implementation(attention.NAME)
    cache.activate([cache.open(32)])
    ids = torch.arange(6, 26)[None]
    for _ in range(12):
        logits = model(ids, **cache_argument(model, cache)).logits
        ids = logits[:, -1:].argmax(-1)
    assert cache.nbytes() <= planned


def test_a_calibration_goes_before_the_built_in_figures(tiny_spec: TinySpec) -> None:
    made, measured = (
        recipe(tiny_spec("llama")),
        Calibration("cpu", "ullage", {"runtime_bytes": 123_456}, {}),
    )
    built_in = phase_footprints(made)["load"].overhead_bytes
    assert all(part.overhead_bytes == 123_456 for part in phase_footprints(made, measured).values())
    assert peak_bytes(made) - peak_bytes(made, measured) == built_in - 123_456


def test_logits_are_of_the_last_token_alone(tiny_spec: TinySpec) -> None:
    short, long = (
        phase_footprints(recipe(tiny_spec("llama"), size))["prefill"].logits_bytes
        for size in (2, 2000)
    )
    assert short == long == 64 * (4 + 4)


def test_loading_another_format_needs_a_staging_copy(tiny_spec: TinySpec) -> None:
    """Read in bf16 and kept in fp32, against read and kept in fp32."""
    spec = tiny_spec("llama", tie_word_embeddings=True)
    converted = replace(spec, dtype="bf16")
    assert phase_footprints(recipe(spec))["load"].activation_bytes == 0
    largest = max(tensor.elements for tensor in spec.tensors)
    assert 0 <= phase_footprints(recipe(converted))["load"].activation_bytes <= 2 * largest


@pytest.mark.parametrize(
    ("name", "expected"), [("smollm2-135m", 23_040), ("llama-3.1-8b", 131_072)]
)
def test_kv_bytes_per_token_of_known_models(name: str, expected: int) -> None:
    assert kv_bytes_per_token(recipe(resolve(name), kv_dtype="bf16")) == expected
    assert kv_bytes_per_token(recipe(resolve(name), kv_dtype="fp32")) == 2 * expected


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_kv_bytes_per_token_of_ours_count_the_scales(kv_dtype: str) -> None:
    """Of 3 heads in 30 layers, 64 numbers and a scale of 2 bytes in K, as many in V."""
    smol, llama = resolve("smollm2-135m"), resolve("llama-3.1-8b")
    assert kv_bytes_per_token(recipe(smol, kv_dtype=kv_dtype)) == 30 * 3 * 2 * (64 + 2)
    assert kv_bytes_per_token(recipe(llama, kv_dtype=kv_dtype, engine="vllm")) == 131_072 // 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_kv_bytes_per_token_is_the_slope_of_the_plan(tiny_spec: TinySpec, family: str) -> None:
    spec = tiny_spec(family)
    short, long = (
        phase_footprints(recipe(spec, size))["decode"].kv_bytes for size in (16_000, 32_000)
    )
    assert (long - short) / 16_000 == kv_bytes_per_token(recipe(spec))


@pytest.mark.parametrize(
    ("model", "grows"),
    [
        ("llama-3.1-8b", 131_072), ("qwen3-30b-a3b", 98_304), ("deepseek-v3", 70_272),
        ("gpt-oss-20b", 24_576), ("qwen3.5-27b", 65_536), ("nemotron-3-nano-30b-a3b", 6_144),
        ("mistral-7b-v0.1", 131_072), ("gemma-4-26b-a4b", 20_480),
    ],
)  # fmt: skip
def test_kv_bytes_of_a_token(model: str, grows: int) -> None:
    made = recipe(resolve(model), engine="transformers", dtype="bf16", kv_dtype="bf16")
    assert kv_bytes_per_token(made) == grows


@pytest.mark.parametrize("engine", ["ullage", "transformers"])
@pytest.mark.parametrize("model", ["qwen3.5-27b", "nemotron-3-nano-30b-a3b"])
def test_state_counts_with_every_sequence(model: str, engine: str) -> None:
    spec = resolve(model)
    settings = Execution(dtype="bf16", kv_dtype="bf16", engine=engine)
    kv = {
        sequences: phase_footprints(Recipe(spec, CPU, Workload(64, 17, sequences), settings))
        for sequences in (1, 5)
    }
    assert kv[1]["load"].kv_bytes == 0
    for phase, tokens in (("prefill", 64), ("decode", 80)):
        tokens = 96 if engine == "ullage" else tokens  # whole blocks, reserved at the door
        grown = tokens * kv_bytes_per_token(Recipe(spec, CPU, Workload(64, 17), settings))
        assert kv[1][phase].kv_bytes == grown + spec.state_bytes
        assert kv[5][phase].kv_bytes == 5 * kv[1][phase].kv_bytes


def test_layers_of_other_widths_and_none(tiny_spec: TinySpec) -> None:
    spec = tiny_spec("llama")
    caches = (LayerCache(10), LayerCache(0), LayerCache(6, 8), LayerCache(0, None, 100))
    mixed = replace(spec, num_layers=4, caches=caches)
    made = recipe(mixed, 20, 5, engine="transformers")
    assert kv_bytes_per_token(made) == 40
    assert phase_footprints(made)["decode"].kv_bytes == 4 * (10 * 24 + 6 * 7) + 100


@pytest.mark.parametrize(("kind", "margin_bytes"), [("cpu", 0), ("cuda", 64 << 20)])
def test_every_phase_leaves_the_allocator_its_margin(
    tiny_spec: TinySpec, kind: Any, margin_bytes: int
) -> None:
    made = replace(recipe(tiny_spec("llama")), device=Device("one", kind, 64 * GIB))
    for phase in PHASES:
        margins = [term.nbytes for term in explain(made, phase) if "margin" in term.what]
        assert sum(margins) == margin_bytes
