"""SGLang's static share: its own rule, and pools that were logged."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ullage import ModelSpec, Plan, Workload, build_plan, resolve
from ullage.errors import InputError
from ullage.planner.engines import ENGINES
from ullage.planner.engines.sglang import Sglang
from ullage.planner.memory import explain, peak_bytes
from ullage.specs.device import Device, find_device
from ullage.specs.families import spec_from_config
from ullage.specs.plan import Recipe
from ullage.units import GIB

SGLANG = Sglang()
H100 = find_device("h100-80gb")

QWEN3_30B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "max_position_embeddings": 40960, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_235B_FP8 = {
    **QWEN3_30B, "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "num_hidden_layers": 94, "num_attention_heads": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip


def recipe_of(
    model: ModelSpec, device: Device = H100, tokens: int = 8192, **changed: Any
) -> Recipe:
    execution = replace(SGLANG.defaults(device), **changed)
    return Recipe(model, device, Workload(tokens - 1, 1), execution)


def plan_of(model: ModelSpec, device: Device = H100, **changed: Any) -> Plan:
    return build_plan(recipe_of(model, device, **changed))


def test_a_logged_pool_on_four_devices() -> None:
    # vllm-project/vllm#21348: 16.46 GiB and 367,404 tokens with --mem-fraction-static 0.93
    model = spec_from_config(QWEN3_235B_FP8, name="qwen3-235b-a22b-fp8")
    share = plan_of(model, tensor_parallel=4, utilization=0.93).share

    assert share.kv_pool_bytes / GIB == pytest.approx(16.46, abs=0.2)
    assert share.kv_pool_tokens == pytest.approx(367_404, rel=0.02)


def test_a_logged_pool_on_one_device() -> None:
    # sgl-project/sglang#18263: 152.88 GiB beside a workspace of 51.75 GiB that the plan of its
    # attention kernels does not have; 56.98 GiB of weights, 230.2 GiB left after them
    model = spec_from_config(QWEN3_30B, name="qwen3-30b-a3b")
    device = Device("288 GB", "rocm", int((56.98 + 230.2 + 0.6) * GIB))
    share = plan_of(model, device, utilization=0.911).share

    assert share.weights_bytes / GIB == pytest.approx(56.98, rel=0.01)
    assert share.kv_pool_bytes / GIB == pytest.approx(152.88 + 51.75, abs=0.5)


def test_the_default_fraction_leaves_the_reserve() -> None:
    # 512 + 1.5 x 8192 + 128 + 2 x 256 MiB, and 8 MiB for each of 58 sizes of prefill graphs
    recipe = SGLANG.settle(recipe_of(resolve("llama-3.1-8b")))
    memory_mib = H100.memory_bytes / 2**20
    reserved_mib = (1 - (recipe.execution.utilization or 0)) * memory_mib

    assert reserved_mib == pytest.approx(512 + 12288 + 128 + 512 + 8 * 58, abs=60)


def test_a_large_device_keeps_ten_gib() -> None:
    recipe = SGLANG.settle(recipe_of(resolve("llama-3.1-8b"), prefill_chunk=2048, max_num_seqs=1))
    reserved = (1 - (recipe.execution.utilization or 0)) * H100.memory_bytes

    assert reserved / GIB == pytest.approx(10, abs=0.05)


def test_the_share_names_what_lies_outside() -> None:
    plan = plan_of(resolve("llama-3.1-8b"))
    share = plan.share

    assert share.activation_bytes + share.graph_bytes + plan.budget_bytes == H100.memory_bytes
    assert sum(line.nbytes for line in explain(plan.recipe, "decode")) == plan.peak_bytes


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"tensor_parallel": 5}, "--tp 5 does not divide"),
        ({"prefill_chunk": 0}, "--prefill-chunk is 1 or more"),
        ({"prefill_chunk": 1 << 20}, "more than the device has"),
        ({"kv_dtype": "int8"}, "no int8 KV cache"),
        ({"utilization": 0.0}, "above 0"),
    ],
)
def test_what_sglang_does_not_have_is_refused(told: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(resolve("llama-3.1-8b"), **told)


@settings(max_examples=30)
@given(
    st.sampled_from(["llama-3.1-8b", "gemma-3-12b"]),
    st.builds(Workload, st.integers(1, 50_000), st.integers(1, 2000), st.integers(1, 64)),
    st.tuples(*[st.integers(0, 500)] * 3),
)
def test_bytes_never_fall_as_the_work_grows(
    name: str, work: Workload, more: tuple[int, int, int]
) -> None:
    recipe = SGLANG.settle(recipe_of(resolve(name)))
    larger = Workload(
        work.prompt_tokens + more[0], work.output_tokens + more[1], work.sequences + more[2]
    )

    assert peak_bytes(replace(recipe, workload=work)) <= peak_bytes(
        replace(recipe, workload=larger)
    )


def test_the_engine_is_registered() -> None:
    assert isinstance(ENGINES["sglang"], Sglang)
