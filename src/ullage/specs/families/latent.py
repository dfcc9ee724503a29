"""Multi-head latent attention (DeepSeek V2 and V3 and those that follow them): the cache holds one
compressed latent and one rotary key a token for all heads."""

from collections.abc import Mapping
from functools import partial

from ullage.errors import UnknownArchitecture
from ullage.specs.config import Config
from ullage.specs.families import rope
from ullage.specs.families.base import (
    ATTENTION,
    TWO_NORMS,
    Caches,
    Family,
    Heads,
    Layers,
    Tensors,
    ends,
    layer_norm,
    linear,
    norms,
    vector,
)
from ullage.specs.families.mixtures import deepseek_mlps, mixed_inner
from ullage.specs.model import LayerCache, ModelSpec

_LAYER = "model.layers.{}"


def latent_heads(config: Config) -> Heads:
    """Every query head has a key of its own once the latent is expanded."""
    heads = config.size("num_attention_heads")
    dim = config.size("qk_nope_head_dim") + config.count("qk_rope_head_dim")
    return Heads(heads, heads, dim)


def latent_width(config: Config) -> int:
    """Numbers that a token adds: the latent and the rotary key."""
    return config.size("kv_lora_rank") + config.count("qk_rope_head_dim")


def latent_attention(spec: ModelSpec, config: Config, layers: Layers) -> Tensors:
    """Queries perhaps through a low rank; keys and values through the latent."""
    hidden, heads, latent = spec.hidden_size, spec.num_heads, config.size("kv_lora_rank")
    bias, values = config.flag("attention_bias"), config.size("v_head_dim")
    expanded = heads * (config.size("qk_nope_head_dim") + values)
    rank = config.optional_size("q_lora_rank")
    if rank is None:
        yield from linear(f"{ATTENTION}.q_proj", heads * spec.head_dim, hidden, layers)
    else:
        yield from linear(f"{ATTENTION}.q_a_proj", rank, hidden, layers, bias)
        yield vector(f"{ATTENTION}.q_a_layernorm.weight", rank, layers)
        yield from linear(f"{ATTENTION}.q_b_proj", heads * spec.head_dim, rank, layers)
    width = latent_width(config)
    yield from linear(f"{ATTENTION}.kv_a_proj_with_mqa", width, hidden, layers, bias)
    yield vector(f"{ATTENTION}.kv_a_layernorm.weight", latent, layers)
    yield from linear(f"{ATTENTION}.kv_b_proj", expanded, latent, layers)
    yield from linear(f"{ATTENTION}.o_proj", hidden, heads * values, layers, bias)


def _deepseek(
    spec: ModelSpec, config: Config, balance: bool = True, stack: bool = False
) -> Tensors:
    layers, hidden = spec.all_layers, spec.hidden_size
    yield from ends(spec)
    yield from latent_attention(spec, config, layers)
    yield from norms(_LAYER, TWO_NORMS, hidden, layers)
    yield vector("model.norm.weight", hidden)
    yield from deepseek_mlps(spec, config, balance, stack)


def _indexed(spec: ModelSpec, config: Config) -> Tensors:
    """DeepSeek V3 with an indexer that chooses which tokens a query sees."""
    layers, name = _indexed_layers(spec, config), f"{ATTENTION}.indexer"
    dim, heads = config.size("index_head_dim"), config.size("index_n_heads")
    yield from _deepseek(spec, config)
    yield from linear(f"{name}.wq_b", heads * dim, config.size("q_lora_rank"), layers)
    yield from linear(f"{name}.wk", dim, spec.hidden_size, layers)
    yield from linear(f"{name}.weights_proj", heads, spec.hidden_size, layers)
    yield from layer_norm(f"{name}.k_norm", dim, layers)


def _indexed_layers(spec: ModelSpec, config: Config) -> Layers:
    """A "shared" layer goes by the indexer of the one before it.

    Raises:
        UnknownArchitecture: a pattern without the list that it stands for.
    """
    types = config.names("indexer_types", spec.num_layers, ("full", "shared"))
    if types is not None:
        return tuple(layer for layer, kind in enumerate(types) if kind == "full")
    if config.get("index_topk_pattern") is not None:
        raise UnknownArchitecture("There is no arithmetic for index_topk_pattern.")
    period = config.optional_size("index_topk_freq") or 1
    first = config.optional_size("index_skip_topk_offset") or 2
    return tuple(layer for layer in spec.all_layers if max(layer - first + 1, 0) % period == 0)


def _latent_caches(spec: ModelSpec, config: Config) -> Caches:
    return (LayerCache(latent_width(config)),) * spec.num_layers


def _indexed_caches(spec: ModelSpec, config: Config) -> Caches:
    """Beside the latent, a key for the indexer."""
    indexed, width = set(_indexed_layers(spec, config)), latent_width(config)
    key = config.size("index_head_dim")
    return tuple(
        LayerCache(width + key if layer in indexed else width) for layer in spec.all_layers
    )


_V3 = Family(
    "DeepseekV3ForCausalLM",
    _deepseek,
    _latent_caches,
    heads=latent_heads,
    inner=mixed_inner,
    rope=rope.latent,
    defaults={
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
)
_SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 192, "v_head_dim": 256}
_GLM = {"n_shared_experts": 1, **_SIZES}

FAMILIES: Mapping[str, Family] = {
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        partial(_deepseek, balance=False),
        _latent_caches,
        heads=latent_heads,
        inner=mixed_inner,
        rope=rope.latent,
        defaults={
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
        },
    ),
    "deepseek_v3": _V3,
    "kimi_k2": _V3,  # DeepSeek V3 under another name
    "deepseek_v32": Family(
        "DeepseekV32ForCausalLM",
        _indexed,
        _indexed_caches,
        heads=latent_heads,
        inner=mixed_inner,
        rope=rope.latent,
        defaults={**_V3.defaults, "index_head_dim": 128, "index_n_heads": 64},
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM",
        _deepseek,
        _latent_caches,
        heads=latent_heads,
        inner=mixed_inner,
        rope=rope.latent,
        defaults={**_GLM, "q_lora_rank": 768, "first_k_dense_replace": 1},
    ),
    "glm_moe_dsa": Family(
        "GlmMoeDsaForCausalLM",
        _indexed,
        _indexed_caches,
        heads=latent_heads,
        inner=mixed_inner,
        rope=rope.latent,
        defaults={
            **_GLM,
            "q_lora_rank": 2048,
            "first_k_dense_replace": 3,
            "index_head_dim": 128,
            "index_n_heads": 32,
        },
    ),
    "mistral4": Family(
        "Mistral4ForCausalLM",
        partial(_deepseek, balance=False, stack=True),
        _latent_caches,
        heads=latent_heads,
        inner=mixed_inner,
        rope=rope.latent,
        defaults={
            "n_shared_experts": 1,
            "kv_lora_rank": 256,
            "q_lora_rank": 1024,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 64,
            "v_head_dim": 128,
        },
    ),
}
