"""vLLM's arithmetic: against start-up logs that were published, and how it grows."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ullage import ModelSpec, Plan, Workload, build_plan, resolve, techniques
from ullage.errors import InputError, ModelError, UnknownArchitecture
from ullage.planner.constants import Constants
from ullage.planner.engines import ENGINES
from ullage.planner.engines.paging import Running, paging
from ullage.planner.engines.shards import stages
from ullage.planner.engines.vllm import Vllm, stage_terms
from ullage.planner.memory import explain, peak_bytes
from ullage.specs.device import Device, find_device
from ullage.specs.families import spec_from_config
from ullage.specs.footprint import Footprint
from ullage.specs.model import LayerCache
from ullage.specs.plan import Recipe
from ullage.units import GIB

H100 = find_device("h100-80gb")
VLLM = Vllm()

MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 32768, "num_local_experts": 8, "num_experts_per_tok": 2,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "sliding_window": None,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 131072, "num_local_experts": 32, "num_experts_per_tok": 4,
    "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "attention_bias": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
    "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip


def model_of(name: str) -> ModelSpec:
    configs = {"mixtral": MIXTRAL, "gpt-oss-20b": GPT_OSS}
    return spec_from_config(configs[name], name=name) if name in configs else resolve(name)


def recipe_of(
    model: ModelSpec,
    *,
    weights: str = "",
    tokens: int = 8192,
    device: Device = H100,
    **changed: Any,
) -> Recipe:
    """One sequence of `tokens`, on 0.19.0 with the sweep's utilization unless told otherwise."""
    told = {"engine_version": "0.19.0", "utilization": 0.95, **changed}
    execution = replace(VLLM.defaults(device), **told)
    recipe = Recipe(model, device, Workload(tokens - 1, 1), execution)
    return VLLM.with_weights(recipe, weights) if weights else recipe


def plan_of(name: str, **told: Any) -> Plan:
    return build_plan(recipe_of(model_of(name), **told))


# Start-up logs of vLLM 0.19.0 on H100 80 GB (llm-d-planner's accuracy sweep, Apache-2.0) and of its
# version sweep: GiB of weights, of peak activation and of the KV pool, and the log's KV tokens.
LOGS = [
    ("llama-3.1-8b", {}, 14.99, 1.89, 58.11, 476_016),
    ("llama-3.1-8b", {"kv_dtype": "fp8"}, 14.99, 1.89, 58.11, 952_032),
    ("llama-3.1-8b", {"weights": "fp8"}, 8.49, 1.89, 64.61, 529_248),
    ("llama-3.1-8b", {"weights": "int8"}, 8.49, 1.89, 64.60, 529_200),
    ("llama-3.1-8b", {"weights": "fp32"}, 29.98, 2.21, 42.80, 175_296),
    ("llama-3.1-8b", {"tensor_parallel": 2}, 7.51, 1.89, 63.76, 1_044_688),
    ("llama-3.1-8b", {"tensor_parallel": 4}, 3.77, 1.89, 67.44, 2_209_792),
    ("qwen2.5-7b", {"tokens": 32768}, 14.25, 2.21, 58.53, 1_096_000),
    ("gemma-2-9b", {}, 17.22, 3.65, 54.12, 168_880),
    ("phi-2", {"weights": "fp16", "tokens": 2048}, 5.19, 0.79, 69.00, 226_112),
    ("mixtral", {"tensor_parallel": 2}, 43.51, 1.21, 28.44, 465_936),
    ("gpt-oss-20b", {"tensor_parallel": 2, "utilization": 0.9}, 7.01, 2.87, 59.32, 2_591_776),
    ("qwen3-14b", {"engine_version": "0.16.0"}, 27.52, 5.64, 41.94, 274_848),
    ("qwen3-14b", {"engine_version": "0.17.0"}, 27.52, 2.23, 45.34, 297_152),
    ("qwen3-14b", {"engine_version": "0.18.0"}, 27.52, 2.23, 45.23, 296_400),
]


@pytest.mark.parametrize(("name", "told", "weights", "activation", "pool", "tokens"), LOGS)
def test_a_plan_says_what_the_log_said(
    name: str, told: dict[str, Any], weights: float, activation: float, pool: float, tokens: int
) -> None:
    share = plan_of(name, **told).share

    assert share.weights_bytes / GIB == pytest.approx(weights, rel=0.011)
    assert share.activation_bytes / GIB == pytest.approx(activation, abs=0.05)
    assert share.kv_pool_bytes / GIB == pytest.approx(pool, abs=0.1)
    assert share.kv_pool_tokens == pytest.approx(tokens, rel=0.005)


def test_the_last_rank_of_a_pipeline_has_the_sampler_and_so_the_fewest_blocks() -> None:
    # the same sweep: 1,075,312 tokens; rank 0 logged 66.54 GiB, which would be 1,090,191
    plan = plan_of("llama-3.1-8b", pipeline_parallel=2)
    first = stages(32, 2)[0]
    beside = Footprint.of(stage_terms(plan.recipe, first, Constants(plan.recipe)))

    assert plan.share.kv_pool_tokens == pytest.approx(1_075_312, rel=0.001)
    assert (plan.budget_bytes - beside.total_bytes) / GIB == pytest.approx(66.54, abs=0.1)


@pytest.mark.parametrize(("share", "layers"), [(0.15, "22 to 31"), (0.5, "0 to 10")])
def test_the_tightest_rank_is_that_of_the_budget(share: float, layers: str) -> None:
    """On three ranks the last has one layer less and the sampler: that weighs in a small budget."""
    recipe = recipe_of(model_of("llama-3.1-8b"), pipeline_parallel=3)
    plan = build_plan(recipe, int(share * H100.memory_bytes))

    assert plan.recipe.execution.utilization == pytest.approx(share)
    assert explain(plan.recipe, "decode")[0].source == f"layers {layers}"
    assert Footprint.of(explain(plan.recipe, "decode")) == plan.phases["decode"]
    assert build_plan(recipe).recipe.execution.utilization == 0.95


def test_sliding_and_full_layers_share_blocks() -> None:
    # gemma-3-27b: 10 full and 52 sliding layers become 7 groups of 10, 8 of them padding
    pages = paging(resolve("gemma-3-27b"), "bf16", 1, stages(62, 1)[0])

    assert [group.layers for group in pages.groups] == [10] * 7
    assert sum(group.window is None for group in pages.groups) == 1


def test_a_window_keeps_what_a_step_reads_beside_it() -> None:
    # gemma-4-26b-a4b on a DGX Spark: 25.41 sequences of 131,072 tokens in 54.14 GiB of fp8
    # (eugr/spark-vllm-docker#217); a full layer's page has twice the tokens of a sliding one's
    sliding, full = LayerCache(4096, 1024, heads=8), LayerCache(2048, heads=2)
    model = replace(resolve("llama-3.1-8b"), caches=((sliding,) * 5 + (full,)) * 5, num_layers=30)
    pages = paging(model, "fp8", 1, stages(30, 1)[0])
    blocks = pages.pool_blocks(int(54.14 * GIB))

    assert blocks / pages.request_blocks(131_072, Running(8192)) == pytest.approx(25.41, abs=0.01)


def test_an_attention_page_grows_until_a_state_fits_in() -> None:
    model = resolve("llama-3.1-8b")
    state = replace(model.caches[0], width=0, state_bytes=3_000_000)
    hybrid = replace(model, caches=(state,) * 24 + model.caches[:8])
    pages = paging(hybrid, "bf16", 1, stages(32, 1)[0])

    page_bytes = pages.block_bytes // 8
    assert page_bytes >= 3_000_000
    assert page_bytes == pages.groups[-1].block_tokens * 4096
    assert len(pages.groups) == 4
    assert pages.request_blocks(10, Running(8192, 2)) == 3 * 2 + 1


def test_a_latent_is_held_whole_on_every_device() -> None:
    config = {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "max_position_embeddings": 163840, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    model, stage = spec_from_config(config, name="deepseek-v2-lite"), stages(27, 1)[0]

    assert paging(model, "bf16", 1, stage).block_bytes == 27 * 576 * 2 * 16
    assert paging(model, "bf16", 8, stage) == paging(model, "bf16", 1, stage)


def test_layers_that_do_not_divide_go_where_vllm_puts_them() -> None:
    assert [len(stage.layers) for stage in stages(10, 4)] == [2, 3, 3, 2]
    assert [len(stage.layers) for stage in stages(11, 2)] == [6, 5]


def test_graphs_are_in_the_budget_since_0_20() -> None:
    before, after = (plan_of("llama-3.1-8b", engine_version=v).share for v in ("0.19.1", "0.20.0"))

    assert before.graph_bytes == after.graph_bytes > 0.5 * GIB
    assert before.kv_pool_bytes - after.kv_pool_bytes == after.graph_bytes
    assert before.non_torch_bytes == after.non_torch_bytes


def test_defaults_are_the_versions_and_the_devices() -> None:
    def settled(device: str, version: str) -> tuple[int, int | None, float | None, str]:
        found = find_device(device)
        recipe = Recipe(
            resolve("llama-3.1-8b"),
            found,
            Workload(100, 10),
            replace(VLLM.defaults(found), engine_version=version),
        )
        execution = VLLM.settle(recipe).execution
        return (
            execution.prefill_chunk,
            execution.max_num_seqs,
            execution.utilization,
            execution.engine_version,
        )

    assert settled("h100", "0.19.0") == (8192, 1024, 0.9, "0.19.0")
    assert settled("a100-80gb", "0.20.0") == (2048, 256, 0.92, "0.20.0")
    assert settled("b200", "")[:3] == (16384, 1024, 0.92)
    assert settled("b200", "")[3] >= "0.33"


def test_weights_of_a_checkpoint_keep_embedding_and_head() -> None:
    model = resolve("llama-3.1-8b")
    int4 = VLLM.with_weights(recipe_of(model), "int4").model
    kept = sum(t.stored_bytes("bf16") for t in int4.tensors if t.role in ("embedding", "head"))
    linear = sum(t.elements * t.count for t in model.tensors if t.role == "linear")

    # 4 bits and a 16-bit scale for 128 of them; the rest are norms
    assert int4.weights_bytes("bf16") - kept == pytest.approx(linear * (0.5 + 2 / 128), rel=1e-3)
    with pytest.raises(ModelError, match="quantized already"):
        VLLM.with_weights(recipe_of(int4), "fp8")


def test_every_format_of_weights_can_be_planned() -> None:
    model = resolve("llama-3.1-8b")
    sizes = {
        weights: build_plan(recipe_of(model, weights=weights)).share.weights_bytes
        for weights in VLLM.weights
    }

    assert sizes["fp32"] > sizes["bf16"] == sizes["fp16"] > sizes["fp8"] > sizes["nvfp4"]
    assert sizes["nvfp4"] > sizes["mxfp4"] > sizes["int4"]
    assert "nf4" not in sizes


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"tensor_parallel": 3}, "--tp 3 does not divide"),
        ({"tensor_parallel": 0}, "1 or more"),
        ({"engine_version": "newest"}, "no version of vllm"),
        ({"pipeline_parallel": 33}, "too few for --pp 33"),
        ({"prefill_chunk": 0}, "--prefill-chunk is 1 or more"),
        ({"prefill_chunk": 100, "max_num_seqs": 101}, "as many tokens in a step"),
        ({"kv_dtype": "q8_0"}, "no q8_0 KV cache"),
        ({"kv_dtype": "int8"}, "no int8 KV cache"),
        ({"utilization": 1.5}, "at most 1"),
    ],
)
def test_what_vllm_does_not_have_is_refused(told: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_of("llama-3.1-8b", **told)


def test_a_tower_that_is_not_known_is_no_guess() -> None:
    model = replace(resolve("llama-3.1-8b"), encoder_gap="no arithmetic for its tower")

    with pytest.raises(UnknownArchitecture, match="its tower"):
        build_plan(recipe_of(model))


def test_explain_adds_up_and_every_line_has_a_source() -> None:
    recipe = VLLM.settle(recipe_of(resolve("llama-3.1-8b"), engine_version="0.21.0"))
    lines = explain(recipe, "prefill")

    assert sum(line.nbytes for line in lines) == peak_bytes(recipe)
    assert all(line.source for line in lines)
    assert {"profile peak: sampler", "CUDA graphs"} <= {line.what for line in lines}


def test_one_request_can_take_more_than_the_profile_knows() -> None:
    (logprobs,) = VLLM.worst_request_terms(recipe_of(resolve("llama-3.1-8b")))

    assert logprobs.nbytes >= 8191 * 128_256 * 4
    assert logprobs.label == "assumed"


def test_no_technique_acts_on_vllm() -> None:
    """Whoever adds one that does has to say what its pool holds then."""
    assert not [name for name in techniques.names() if "vllm" in techniques.parse(name).engines]


names = st.sampled_from(["llama-3.1-8b", "gemma-3-12b", "qwen3-14b", "gpt-oss-20b", "mixtral"])
splits = st.sampled_from([1, 2, 4])
works = st.builds(Workload, st.integers(1, 50_000), st.integers(1, 2000), st.integers(1, 64))


@settings(max_examples=40)
@given(names, works, st.tuples(*[st.integers(0, 500)] * 3), splits)
def test_bytes_never_fall_as_the_work_grows(
    name: str, work: Workload, more: tuple[int, int, int], split: int
) -> None:
    recipe = VLLM.settle(recipe_of(model_of(name), tensor_parallel=split))
    larger = Workload(
        work.prompt_tokens + more[0], work.output_tokens + more[1], work.sequences + more[2]
    )

    assert peak_bytes(replace(recipe, workload=work)) <= peak_bytes(
        replace(recipe, workload=larger)
    )


@settings(max_examples=20)
@given(st.integers(1, 60), st.integers(1, 4))
def test_bytes_never_fall_as_layers_are_added(layers: int, split: int) -> None:
    def peak(count: int) -> int:
        model = spec_from_config({**MIXTRAL, "num_hidden_layers": count}, name="some")
        return peak_bytes(VLLM.settle(recipe_of(model, tensor_parallel=2 ** (split - 1))))

    assert peak(layers) < peak(layers + 1)


@settings(max_examples=30)
@given(names, st.integers(1, 2000), st.integers(0, 2000), st.sampled_from(["0.16.0", "0.19.0", ""]))
def test_the_pool_never_grows_with_the_number_of_sequences(
    name: str, few: int, more: int, version: str
) -> None:
    few_pool, more_pool = (
        plan_of(name, max_num_seqs=count, engine_version=version).share.kv_pool_bytes
        for count in (few, few + more)
    )

    assert few_pool >= more_pool


@settings(max_examples=30)
@given(names, splits, st.integers(1, 4))
def test_the_devices_together_hold_at_least_the_whole(name: str, split: int, depth: int) -> None:
    whole = model_of(name)
    held = 0
    for stage in stages(whole.num_layers, depth):
        recipe = VLLM.settle(recipe_of(whole, tensor_parallel=split, pipeline_parallel=depth))
        terms = stage_terms(recipe, stage, Constants(recipe))
        held += split * Footprint.of(terms).weights_bytes

    assert held >= whole.weights_bytes("bf16") + whole.rope_bytes("bf16")


def test_a_stage_without_caches_is_planned_too() -> None:
    model = resolve("llama-3.1-8b")
    bare = replace(model, caches=(LayerCache(0),) * 16 + model.caches[16:])

    assert build_plan(recipe_of(bare, pipeline_parallel=2)).share.kv_pool_tokens > 0


def test_the_engine_is_registered() -> None:
    assert isinstance(ENGINES["vllm"], Vllm)
