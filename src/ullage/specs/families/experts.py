"""Mixtures of experts over plain attention: Mixtral, Qwen, GLM, gpt-oss, Llama 4 and relatives."""

from collections.abc import Mapping

from ullage.errors import ModelError
from ullage.specs.config import Config
from ullage.specs.families import rope
from ullage.specs.families.base import (
    ATTENTION,
    MLP,
    TWO_NORMS,
    Caches,
    Family,
    Layers,
    Tensors,
    all_slide,
    attention,
    by_type,
    ends,
    full,
    gated_mlp,
    kv_caches,
    layer_norm,
    norms,
    slide_if_used,
    vector,
)
from ullage.specs.families.dense import last_slide
from ullage.specs.families.mixtures import (
    block_sparse,
    deepseek_mlps,
    experts_inner,
    mixed_inner,
    mixture,
    others,
    qwen_mlps,
    router,
    stacked,
    step_layers,
)
from ullage.specs.model import ModelSpec

_LAYER = "model.layers.{}"


def _plain_part(spec: ModelSpec, config: Config, qk_norm: bool = False) -> Tensors:
    """Ends, attention with the config's biases, and two RMS norms."""
    bias = config.flag("attention_bias")
    layers = spec.all_layers
    yield from ends(spec)
    yield from attention(spec, layers, qkv_bias=bias, output_bias=bias, qk_norm=qk_norm)
    yield from norms(_LAYER, TWO_NORMS, spec.hidden_size, layers)
    yield vector("model.norm.weight", spec.hidden_size)


def _mixtral(spec: ModelSpec, config: Config) -> Tensors:
    """A router and experts whose projections are called w1, w3 and w2."""
    yield from _plain_part(spec, config)
    yield from block_sparse(spec, mixture(config))


def _minimax_m2(spec: ModelSpec, config: Config) -> Tensors:
    """Mixtral with a norm over the whole of queries and keys, and a bias that balances experts."""
    mix, layers = mixture(config), spec.all_layers
    yield from _mixtral(spec, config)
    yield vector(f"{_LAYER}.block_sparse_moe.e_score_correction_bias", mix.experts, layers)
    yield vector(f"{ATTENTION}.q_norm.weight", spec.num_heads * spec.head_dim, layers)
    yield vector(f"{ATTENTION}.k_norm.weight", spec.num_kv_heads * spec.head_dim, layers)


def _phimoe(spec: ModelSpec, config: Config) -> Tensors:
    """Mixtral with layer norms and biases, the head's included."""
    layers, hidden = spec.all_layers, spec.hidden_size
    bias = config.flag("attention_bias")
    yield from ends(spec)
    if config.flag("lm_head_bias"):
        yield vector("lm_head.bias", spec.vocab_size)
    yield from attention(spec, layers, qkv_bias=bias, output_bias=bias)
    yield from block_sparse(spec, mixture(config))
    for name in TWO_NORMS:
        yield from layer_norm(f"{_LAYER}.{name}", hidden, layers)
    yield from layer_norm("model.norm", hidden)


def _granitemoe(spec: ModelSpec, config: Config) -> Tensors:
    """Experts stacked in two weights."""
    mix, layers, hidden = mixture(config), spec.all_layers, spec.hidden_size
    block = f"{_LAYER}.block_sparse_moe"
    yield from _plain_part(spec, config)
    yield router(f"{block}.router.layer.weight", mix, hidden, layers)
    yield stacked(f"{block}.input_linear.weight", (2 * mix.inner, hidden), mix, layers)
    yield stacked(f"{block}.output_linear.weight", (hidden, mix.inner), mix, layers)


def _qwen2_moe(spec: ModelSpec, config: Config) -> Tensors:
    layers, hidden = spec.all_layers, spec.hidden_size
    yield from ends(spec)
    yield from attention(spec, layers, qkv_bias=config.get("qkv_bias") is not False)
    yield from norms(_LAYER, TWO_NORMS, hidden, layers)
    yield vector("model.norm.weight", hidden)
    yield from qwen_mlps(spec, config, step_layers(spec, config))


def _qwen3_moe(spec: ModelSpec, config: Config) -> Tensors:
    yield from _plain_part(spec, config, qk_norm=True)
    yield from qwen_mlps(spec, config, step_layers(spec, config))


def _qwen3_vl_moe(spec: ModelSpec, config: Config) -> Tensors:
    """Qwen3 MoE whose published files stack the experts, ``[in, out]``."""
    mix, layers, hidden = mixture(config), step_layers(spec, config), spec.hidden_size
    yield from _plain_part(spec, config, qk_norm=True)
    plain = others(spec, layers)
    yield from gated_mlp(MLP, hidden, config.size("intermediate_size"), plain)
    yield router(f"{MLP}.gate.weight", mix, hidden, layers)
    yield stacked(f"{MLP}.experts.gate_up_proj", (hidden, 2 * mix.inner), mix, layers)
    yield stacked(f"{MLP}.experts.down_proj", (mix.inner, hidden), mix, layers)


def _glm4_moe(spec: ModelSpec, config: Config) -> Tensors:
    """Grouped-query attention with biases on q, k and v, and DeepSeek's experts."""
    layers, hidden = spec.all_layers, spec.hidden_size
    bias, qk_norm = config.flag("attention_bias"), config.flag("use_qk_norm")
    yield from ends(spec)
    yield from attention(spec, layers, qkv_bias=bias, qk_norm=qk_norm)
    yield from norms(_LAYER, TWO_NORMS, hidden, layers)
    yield vector("model.norm.weight", hidden)
    yield from deepseek_mlps(spec, config)


def _gpt_oss(spec: ModelSpec, config: Config) -> Tensors:
    """Stacked experts, ``[in, out]`` with biases, and a sink for each query head."""
    mix, layers, hidden = mixture(config), spec.all_layers, spec.hidden_size
    yield from _plain_part(spec, config)
    yield vector(f"{ATTENTION}.sinks", spec.num_heads, layers)
    yield router(f"{MLP}.router.weight", mix, hidden, layers)
    yield vector(f"{MLP}.router.bias", mix.experts, layers)
    yield stacked(f"{MLP}.experts.gate_up_proj", (hidden, 2 * mix.inner), mix, layers)
    yield stacked(f"{MLP}.experts.gate_up_proj_bias", (2 * mix.inner,), mix, layers)
    yield stacked(f"{MLP}.experts.down_proj", (mix.inner, hidden), mix, layers)
    yield stacked(f"{MLP}.experts.down_proj_bias", (hidden,), mix, layers)


def _gpt_oss_caches(spec: ModelSpec, config: Config) -> Caches:
    """Every second layer sees everything."""
    slides = [layer % 2 == 0 for layer in range(spec.num_layers)]
    return by_type(spec, config, slides, config.optional_size("sliding_window"))


def _llama4(spec: ModelSpec, config: Config) -> Tensors:
    """Stacked experts beside a shared one, in every layer or every second."""
    mix, hidden, block = mixture(config), spec.hidden_size, f"{_LAYER}.feed_forward"
    layers = _llama4_sparse(spec, config)
    yield from _plain_part(spec, config)
    plain = others(spec, layers)
    yield from gated_mlp(block, hidden, config.size("intermediate_size_mlp"), plain)
    yield router(f"{block}.router.weight", mix, hidden, layers)
    yield stacked(f"{block}.experts.gate_up_proj", (hidden, 2 * mix.inner), mix, layers)
    yield stacked(f"{block}.experts.down_proj", (mix.inner, hidden), mix, layers)
    yield from gated_mlp(f"{block}.shared_expert", hidden, mix.inner, layers)


def _llama4_sparse(spec: ModelSpec, config: Config) -> Layers:
    chosen = config.numbers("moe_layers", spec.num_layers)
    if chosen:
        if len(set(chosen)) != len(chosen) or max(chosen) >= spec.num_layers:
            raise ModelError("The model's config has moe_layers that it does not have.")
        return tuple(sorted(chosen))
    step = config.size("interleave_moe_layer_step")
    return spec.all_layers[step - 1 :: step]


def _llama4_inner(config: Config) -> int:
    mix = mixture(config)
    return max(mix.width + mix.inner, config.size("intermediate_size_mlp"))


def _llama4_caches(spec: ModelSpec, config: Config) -> Caches:
    """Every fourth layer, without positions, sees everything; the others see their chunk. The
    cache of a chunk is that of a window."""
    chunk = config.size("attention_chunk_size")
    types = config.names("layer_types", spec.num_layers, ("chunked_attention", "full_attention"))
    if types is None:
        period = config.optional_size("no_rope_layer_interval") or 4
        turns = config.numbers("no_rope_layers", spec.num_layers)
        if turns and len(turns) != spec.num_layers:
            raise ModelError(
                f"The model's config has {len(turns)} no_rope_layers for {spec.num_layers} layers."
            )
        turns = turns or [(layer + 1) % period for layer in range(spec.num_layers)]
        types = ["chunked_attention" if turn else "full_attention" for turn in turns]
    return kv_caches(spec, tuple(chunk if kind == "chunked_attention" else None for kind in types))


_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096}
_QWEN3_MOE = {"num_key_value_heads": 4, "decoder_sparse_step": 1, **_QWEN_WINDOWS}

FAMILIES: Mapping[str, Family] = {
    "mixtral": Family(
        "MixtralForCausalLM",
        _mixtral,
        all_slide,
        inner=experts_inner,
        defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "phimoe": Family(
        "PhimoeForCausalLM",
        _phimoe,
        all_slide,
        inner=experts_inner,
        defaults={"num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 2},
    ),
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM",
        _minimax_m2,
        full,
        inner=experts_inner,
        defaults={"num_key_value_heads": 8, "head_dim": 128, "num_experts_per_tok": 8},
    ),
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        _granitemoe,
        full,
        inner=experts_inner,
        defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        _qwen2_moe,
        last_slide,
        inner=mixed_inner,
        defaults={
            "num_key_value_heads": 16,
            "decoder_sparse_step": 1,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "max_window_layers": 28,
            **_QWEN_WINDOWS,
        },
        oddities=("use_sliding_window",),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", _qwen3_moe, slide_if_used, inner=mixed_inner, defaults=_QWEN3_MOE
    ),
    "qwen3_vl_moe_text": Family(
        "Qwen3VLMoeForConditionalGeneration",
        _qwen3_vl_moe,
        full,
        inner=mixed_inner,
        rope=rope.multimodal,
        defaults={"decoder_sparse_step": 1, "head_dim": 128, "tie_word_embeddings": True},
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        _glm4_moe,
        full,
        inner=mixed_inner,
        defaults={
            "num_key_value_heads": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "partial_rotary_factor": 0.5,
        },
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        _gpt_oss,
        _gpt_oss_caches,
        inner=experts_inner,
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "attention_bias": True,
            "num_experts_per_tok": 4,
            "max_position_embeddings": 131_072,
        },
    ),
    "llama4_text": Family(
        "Llama4ForCausalLM",
        _llama4,
        _llama4_caches,
        inner=_llama4_inner,
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 16_384,
            "attention_chunk_size": 8192,
        },
    ),
}
