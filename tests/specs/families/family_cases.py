"""A small config of every family, with the turns that its arithmetic takes."""

from typing import Any

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
GQA = {"num_key_value_heads": 2}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 100}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
    "n_shared_experts": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
MLA = {
    "kv_lora_rank": 24, "q_lora_rank": 40, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 20, **ROUTED,
}  # fmt: skip
INDEX = {"index_head_dim": 10, "index_n_heads": 3}
DELTA = {
    "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4,
}  # fmt: skip
SHARED = {"shared_expert_intermediate_size": 28}
KIMI = {
    **{key: value for key, value in MLA.items() if key[:2] in ("kv", "qk", "v_", "mo")},
    "num_experts": 6, "num_experts_per_token": 2, "num_shared_experts": 1,
    "linear_attn_config": {
        "num_heads": 3, "head_dim": 10, "short_conv_kernel_size": 4,
        "full_attn_layers": [4, 7], "kda_layers": [1, 2, 3, 5, 6],
    },
}  # fmt: skip
NEMOTRON = {
    "head_dim": 16, "ssm_state_size": 6, "mamba_num_heads": 4, "mamba_head_dim": 10, "n_groups": 2,
    "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28,
}  # fmt: skip
BLOCKS = ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe", "mlp"]
GEMMA4_TYPES = ["sliding_attention", "full_attention"] * 3 + ["full_attention"]


def case(family: str, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A config of `family` in the sizes above, changed by `parts`."""
    config: dict[str, Any] = {"model_type": family, **SIZES}
    for part in parts:
        config |= part
    return config | more


CASES: dict[str, dict[str, Any]] = {
    "llama": case("llama"),
    "llama-gqa-tied": case("llama", GQA, tie_word_embeddings=True),
    "llama-biases": case("llama", GQA, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": case("llama", GQA, head_dim=32),
    "mistral": case("mistral", GQA),
    "mistral-no-window": case("mistral", GQA, sliding_window=None),
    "mistral-default-kv-heads": case("mistral", num_attention_heads=8),
    "ministral3": case("ministral3", GQA, head_dim=16),
    "qwen2": case("qwen2", GQA, tie_word_embeddings=True),
    "qwen2-window": case(
        "qwen2", GQA, use_sliding_window=True, sliding_window=16, max_window_layers=3
    ),
    "qwen2-window-off": case("qwen2", GQA, sliding_window=16),
    "qwen3": case("qwen3", GQA),
    "qwen3-bias-window": case(
        "qwen3", GQA, attention_bias=True, head_dim=8,
        use_sliding_window=True, sliding_window=8, max_window_layers=0,
    ),
    "granite": case("granite", GQA, tie_word_embeddings=True),
    "smollm3": case("smollm3", GQA),
    "seed_oss": case("seed_oss", GQA),
    "seed_oss-biases": case("seed_oss", GQA, attention_out_bias=True, mlp_bias=True, head_dim=8),
    "olmo2": case("olmo2", GQA),
    "olmo3": case("olmo3", GQA, sliding_window=16),
    "glm": case("glm", GQA),
    "glm4": case("glm4", GQA, head_dim=16),
    "cohere": case("cohere"),
    "cohere-qk-norm": case("cohere", GQA, use_qk_norm=True),
    "cohere2": case("cohere2", GQA, sliding_window=16),
    "stablelm": case("stablelm", GQA, use_qkv_bias=True),
    "stablelm-parallel": case("stablelm", GQA, qk_layernorm=True, use_parallel_residual=True),
    "gemma": case("gemma", num_key_value_heads=1),
    "gemma-untied": case("gemma", GQA, tie_word_embeddings=False),
    "gemma2": case("gemma2"),
    "gemma2-types": case(
        "gemma2", GQA, sliding_window=16,
        layer_types=["full_attention"] * 3 + ["sliding_attention"] * 4,
    ),
    "gemma3": case("gemma3_text", GQA, head_dim=16),
    "gemma3-defaults": {
        "model_type": "gemma3_text",
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7,
    },
    "gemma3-pattern": case("gemma3_text", sliding_window_pattern=3),
    "gemma4": case("gemma4_text", GQA, head_dim=16, global_head_dim=32),
    "gemma4-no-layer-embeddings": case("gemma4_text", GQA, hidden_size_per_layer_input=0),
    "gemma4-shared-kv": case(
        "gemma4_text", GQA, head_dim=16, global_head_dim=32, hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=90, num_kv_shared_layers=3, use_double_wide_mlp=True,
        layer_types=GEMMA4_TYPES,
    ),
    "gemma4-experts": case(
        "gemma4_text", GQA, head_dim=16, global_head_dim=32, hidden_size_per_layer_input=0,
        enable_moe_block=True, num_experts=6, top_k_experts=2, moe_intermediate_size=20,
        attention_k_eq_v=True, num_global_key_value_heads=1,
    ),
    "phi": case("phi"),
    "phi-qk-norm": case("phi", GQA, qk_layernorm=True),
    "phi3": case("phi3", GQA),
    "phi3-window": case("phi3", GQA, sliding_window=16),
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2-inner": {"model_type": "gpt2", **GPT2, "n_inner": 80, "tie_word_embeddings": False},
    "falcon": case("falcon"),
    "falcon-grouped": case("falcon", new_decoder_architecture=True, num_kv_heads=2),
    "falcon-one-norm": case(
        "falcon", new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "falcon-alibi": case(
        "falcon", multi_query=False, bias=True, parallel_attn=False, alibi=True, ffn_hidden_size=80
    ),
    "starcoder2": case("starcoder2", GQA),
    "starcoder2-window": case("starcoder2", GQA, sliding_window=16, use_bias=False),
    "mixtral": case("mixtral", GQA, LOCAL),
    "mixtral-window": case("mixtral", GQA, LOCAL, sliding_window=16),
    "phimoe": case("phimoe", GQA, LOCAL, attention_bias=True, lm_head_bias=True),
    "minimax_m2": case("minimax_m2", GQA, LOCAL, head_dim=16),
    "granitemoe": case("granitemoe", GQA, LOCAL),
    "qwen2_moe": case("qwen2_moe", GQA, MOE, SHARED),
    "qwen2_moe-steps": case(
        "qwen2_moe", GQA, MOE, SHARED, decoder_sparse_step=2, mlp_only_layers=[1]
    ),
    "qwen3_moe": case("qwen3_moe", GQA, MOE, head_dim=16),
    "qwen3_moe-window": case(
        "qwen3_moe", GQA, MOE, attention_bias=True, use_sliding_window=True, sliding_window=16
    ),
    "gpt_oss": case("gpt_oss", GQA, LOCAL),
    "llama4": case("llama4_text", GQA, LOCAL, head_dim=16, intermediate_size_mlp=120),
    "llama4-steps": case(
        "llama4_text", GQA, LOCAL, head_dim=16, intermediate_size_mlp=120,
        interleave_moe_layer_step=2, attention_chunk_size=32,
    ),
    "glm4_moe": case("glm4_moe", GQA, ROUTED, head_dim=16),
    "glm4_moe-norms": case(
        "glm4_moe", GQA, ROUTED, head_dim=16, use_qk_norm=True, attention_bias=True,
        first_k_dense_replace=3,
    ),
    "deepseek_v2": case("deepseek_v2", MLA, first_k_dense_replace=1),
    "deepseek_v2-lite": case("deepseek_v2", MLA, q_lora_rank=None, first_k_dense_replace=1),
    "deepseek_v3": case("deepseek_v3", MLA, attention_bias=True),
    "deepseek_v32": case("deepseek_v32", MLA, INDEX),
    "glm4_moe_lite": case("glm4_moe_lite", MLA),
    "glm_moe_dsa": case("glm_moe_dsa", MLA, INDEX),
    "glm_moe_dsa-shared": case(
        "glm_moe_dsa", MLA, INDEX,
        indexer_types=["full", "shared", "full", "shared", "full", "shared", "full"],
    ),
    "glm_moe_dsa-period": case(
        "glm_moe_dsa", MLA, INDEX, index_topk_freq=2, index_skip_topk_offset=3
    ),
    "mistral4": case("mistral4", MLA),
    "qwen3_next": case("qwen3_next", GQA, DELTA, MOE, SHARED),
    "qwen3_5": case("qwen3_5_text", GQA, DELTA),
    "qwen3_5-interval": case("qwen3_5_text", GQA, DELTA, full_attention_interval=2),
    "qwen3_5_moe": case("qwen3_5_moe_text", GQA, DELTA, MOE, SHARED),
    "nemotron_h": case("nemotron_h", GQA, NEMOTRON, layers_block_type=BLOCKS),
    "nemotron_h-latent": case(
        "nemotron_h", GQA, NEMOTRON, hybrid_override_pattern="MEM*-ME", moe_latent_size=12
    ),
    "kimi_linear": case("kimi_linear", KIMI),
    "falcon_h1": case(
        "falcon_h1", GQA, mamba_d_ssm=40, mamba_n_heads=4, mamba_d_head=10, mamba_d_state=6,
        mamba_n_groups=2, mamba_rms_norm=True,
    ),
    "mimo_v2_flash": case(
        "mimo_v2_flash", GQA, {k: v for k, v in ROUTED.items() if k != "n_shared_experts"},
        head_dim=16, v_head_dim=12, swa_num_key_value_heads=4, swa_head_dim=16, swa_v_head_dim=12,
        swa_num_attention_heads=4, hybrid_layer_pattern=[0, 1, 1, 1, 1, 0, 1],
        sliding_window_size=16, moe_layer_freq=[0, 1, 1, 1, 1, 1, 1],
    ),
    "deepseek_v4": case(
        "deepseek_v4", ROUTED, INDEX, num_hidden_layers=4, head_dim=16, qk_rope_head_dim=8,
        q_lora_rank=40, o_lora_rank=12, o_groups=2, compress_ratios=[0, 4, 128, 4],
        num_hash_layers=1, hc_mult=4, n_shared_experts=1, intermediate_size=20,
    ),
}  # fmt: skip
# Families of transformers that only a wrapper holds, and names that transformers does not have.
ELSEWHERE = {
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
    "qwen2_5_vl_text",
    "kimi_k2",
    "minimax_m3_vl_text",
}
