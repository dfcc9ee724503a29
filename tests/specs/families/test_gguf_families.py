"""What llama.cpp's converter writes of a model is read as its config.json is."""

from typing import Any

import pytest
from family_cases import CASES, case

from ullage.errors import UnknownArchitecture
from ullage.specs.families import spec_from_config
from ullage.specs.gguf import GGUFHeader, GGUFTensor
from ullage.specs.gguf_model import config_from_gguf

BASE = {
    "block_count": 7, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96,
    "attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": 100,
}  # fmt: skip
DIM = {"attention.key_length": 16}
EXPERTS = {"expert_count": 6, "expert_used_count": 2}
NARROW = {**EXPERTS, "expert_feed_forward_length": 20}
SHARED = {**NARROW, "expert_shared_feed_forward_length": 28}
LATENT = {
    **NARROW, "expert_shared_count": 2, "attention.kv_lora_rank": 24, "attention.q_lora_rank": 40,
    "rope.dimension_count": 8, "attention.head_count_kv": 4,
}  # fmt: skip
EXPANDED = {**LATENT, "attention.key_length": 20, "attention.value_length": 20}
ABSORBED = {
    **LATENT, "attention.head_count_kv": 1, "attention.key_length": 32,
    "attention.value_length": 24, "attention.key_length_mla": 20, "attention.value_length_mla": 20,
}  # fmt: skip
SSM = {
    **DIM, "ssm.group_count": 2, "ssm.state_size": 8, "ssm.time_step_rank": 4,
    "ssm.inner_size": 48, "ssm.conv_kernel": 4,
}  # fmt: skip
HEAD = ("output.weight",)
QKV = ("blk.0.attn_q.bias",)
NORM = ("blk.0.ffn_norm.weight",)
SHEXP = ("blk.0.ffn_gate_shexp.weight",)

# architecture, metadata, tensors that tell, and the config that it is
FILES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], dict[str, Any]]] = {
    "llama": ("llama", {}, HEAD, CASES["llama"] | {"num_key_value_heads": 2}),
    "mixtral": ("llama", EXPERTS, HEAD, CASES["mixtral"]),
    "ministral3": ("mistral3", DIM, HEAD, CASES["ministral3"]),
    "granite": ("granite", {}, (), CASES["granite"]),
    "smollm3": ("smollm3", {}, (), CASES["smollm3"]),
    "olmo2": ("olmo2", {}, HEAD, CASES["olmo2"]),
    "olmo3": ("olmo2", {"attention.sliding_window": 16}, HEAD, CASES["olmo3"]),
    "glm4": ("glm4", DIM, (*HEAD, *QKV), CASES["glm4"]),
    "cohere": ("command-r", {"attention.head_count_kv": 4}, (), CASES["cohere"]),
    "cohere norms": ("command-r", {}, ("blk.0.attn_q_norm.weight",), CASES["cohere-qk-norm"]),
    "cohere2": ("cohere2", {"attention.sliding_window": 16}, (), CASES["cohere2"]),
    "starcoder2": ("starcoder2", {}, (*QKV, *HEAD), CASES["starcoder2"] | {
        "tie_word_embeddings": False}),
    "stablelm": ("stablelm", {}, (*HEAD, *QKV, *NORM), CASES["stablelm"]),
    "stablelm parallel": (
        "stablelm", {}, (*HEAD, "blk.0.attn_q_norm.weight"), CASES["stablelm-parallel"]
    ),
    "falcon": ("falcon", {"attention.head_count_kv": 1, "feed_forward_length": 256}, (),
               CASES["falcon"]),
    "falcon grouped": ("falcon", {"feed_forward_length": 256}, ("blk.0.attn_norm_2.weight",),
                       CASES["falcon-grouped"]),
    "qwen2moe": ("qwen2moe", SHARED, (*HEAD, *SHEXP, *QKV), CASES["qwen2_moe"]),
    "qwen3moe": ("qwen3moe", {**NARROW, **DIM}, HEAD, CASES["qwen3_moe"]),
    "gpt-oss": ("gpt-oss", {**EXPERTS, "attention.key_length": 64, "attention.sliding_window": 128},
                (*HEAD, *QKV), CASES["gpt_oss"]),
    "granitemoe": ("granitemoe", EXPERTS, HEAD, CASES["granitemoe"]),
    "phimoe": ("phimoe", EXPERTS, (*HEAD, "output.bias"), CASES["phimoe"]),
    "minimax-m2": ("minimax-m2", {**EXPERTS, **DIM}, HEAD, CASES["minimax_m2"]),
    "glm4moe": ("glm4moe", {**NARROW, **DIM, "expert_shared_count": 2, "block_count": 8,
                            "leading_dense_block_count": 3, "nextn_predict_layers": 1},
                (*HEAD, *QKV, "blk.3.attn_q_norm.weight"), CASES["glm4_moe-norms"]),
    "deepseek2": ("deepseek2", {**EXPANDED, "leading_dense_block_count": 1}, HEAD,
                  CASES["deepseek_v2"]),
    "deepseek2, absorbed": ("deepseek2", {**ABSORBED, "leading_dense_block_count": 1}, HEAD,
                            CASES["deepseek_v2"]),
    "deepseek2 of v3": ("deepseek2", {**ABSORBED, "leading_dense_block_count": 3},
                        (*HEAD, "blk.3.exp_probs_b.bias"),
                        CASES["deepseek_v3"] | {"attention_bias": False}),
    "qwen3next": ("qwen3next", {**SSM, **SHARED}, (*HEAD, *SHEXP), CASES["qwen3_next"]),
    "qwen35": ("qwen35", SSM, HEAD, CASES["qwen3_5"]),
    "qwen35 ahead": ("qwen35", {**SSM, "full_attention_interval": 2, "block_count": 8,
                                "nextn_predict_layers": 1}, HEAD, CASES["qwen3_5-interval"]),
    "qwen35moe": ("qwen35moe", {**SSM, **SHARED}, (*HEAD, *SHEXP), CASES["qwen3_5_moe"]),
}  # fmt: skip


def header(arch: str, metadata: dict[str, Any], tensors: tuple[str, ...]) -> GGUFHeader:
    words = {f"{arch}.{key}": value for key, value in {**BASE, **metadata}.items()}
    found = tuple(GGUFTensor(name, (1,), "F32", 0, 4) for name in tensors)
    return GGUFHeader(3, {"general.architecture": arch, **words}, found)


@pytest.mark.parametrize("name", FILES)
def test_a_header_is_the_model_that_its_config_is(name: str) -> None:
    arch, metadata, tensors, config = FILES[name]
    found = spec_from_config(config_from_gguf(header(arch, metadata, tensors)))
    wanted = spec_from_config(config)
    assert sorted(map(str, found.tensors)) == sorted(map(str, wanted.tensors))
    assert found.caches == wanted.caches
    assert (found.family, found.num_heads, found.head_dim, found.intermediate_size) == (
        wanted.family, wanted.num_heads, wanted.head_dim, wanted.intermediate_size,
    )  # fmt: skip


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(UnknownArchitecture, match="rwkv7"):
        config_from_gguf(header("rwkv7", {}, ()))


def test_seed_oss() -> None:
    config = case("seed_oss", num_key_value_heads=2, head_dim=16)
    found = config_from_gguf(header("seed_oss", DIM, (*HEAD, *QKV)))
    assert spec_from_config(found).tensors == spec_from_config(config).tensors
