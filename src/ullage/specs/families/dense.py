"""Llama and the dense families that differ from it in biases and norms."""

from collections.abc import Mapping
from functools import partial

from ullage.errors import ModelError
from ullage.specs.config import Config
from ullage.specs.families import rope
from ullage.specs.families.base import (
    ATTENTION,
    MLP,
    TWO_NORMS,
    Caches,
    Family,
    Tensors,
    all_slide,
    attention,
    by_type,
    ends,
    full,
    gated_mlp,
    layer_norm,
    linear,
    norms,
    periodic,
    vector,
)
from ullage.specs.model import ModelSpec, TensorSpec

_LAYER = "model.layers.{}"


def decoder(
    spec: ModelSpec,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    layer_norms: tuple[str, ...] = TWO_NORMS,
) -> Tensors:
    """What Llama and its relatives share; they differ in biases and norms."""
    layers, hidden = spec.all_layers, spec.hidden_size
    yield from ends(spec)
    yield from attention(spec, layers, qkv_bias=qkv_bias, output_bias=output_bias, qk_norm=qk_norm)
    yield from gated_mlp(MLP, hidden, spec.intermediate_size, layers, mlp_bias)
    yield from norms(_LAYER, layer_norms, hidden, layers)
    yield vector("model.norm.weight", hidden)


def llama(spec: ModelSpec, config: Config) -> Tensors:
    """Llama 1 to 3 and all that copied it; biases are the config's choice."""
    bias = config.flag("attention_bias")
    return decoder(spec, qkv_bias=bias, output_bias=bias, mlp_bias=config.flag("mlp_bias"))


def mistral(spec: ModelSpec, config: Config) -> Tensors:
    """Llama without the choice of biases."""
    return decoder(spec)


def qwen2(spec: ModelSpec, config: Config) -> Tensors:
    """Llama with biases on q, k and v alone."""
    return decoder(spec, qkv_bias=True)


def qwen3(spec: ModelSpec, config: Config) -> Tensors:
    """Llama with a norm on each query and key head."""
    bias = config.flag("attention_bias")
    return decoder(spec, qkv_bias=bias, output_bias=bias, qk_norm=True)


def _seed_oss(spec: ModelSpec, config: Config) -> Tensors:
    """Llama with the choice of biases apart for q, k, v and the output."""
    return decoder(
        spec,
        qkv_bias=config.flag("attention_bias"),
        output_bias=config.flag("attention_out_bias"),
        mlp_bias=config.flag("mlp_bias"),
    )


def _olmo2(spec: ModelSpec, config: Config) -> Tensors:
    """Norms after attention and MLP, none before, and one over the whole of queries and keys."""
    bias, layers = config.flag("attention_bias"), spec.all_layers
    after = ("post_attention_layernorm", "post_feedforward_layernorm")
    yield from decoder(spec, qkv_bias=bias, output_bias=bias, layer_norms=after)
    yield vector(f"{ATTENTION}.q_norm.weight", spec.num_heads * spec.head_dim, layers)
    yield vector(f"{ATTENTION}.k_norm.weight", spec.num_kv_heads * spec.head_dim, layers)


def _glm(spec: ModelSpec, config: Config, layer_norms: tuple[str, ...] = TWO_NORMS) -> Tensors:
    """Biases on q, k and v; gate and up in one weight."""
    layers, hidden, inner = spec.all_layers, spec.hidden_size, spec.intermediate_size
    yield from ends(spec)
    yield from attention(spec, layers, qkv_bias=config.flag("attention_bias"))
    yield from linear(f"{MLP}.gate_up_proj", 2 * inner, hidden, layers)
    yield from linear(f"{MLP}.down_proj", hidden, inner, layers)
    yield from norms(_LAYER, layer_norms, hidden, layers)
    yield vector("model.norm.weight", hidden)


def _cohere(spec: ModelSpec, config: Config) -> Tensors:
    """One norm serves attention and MLP; that on queries and keys has numbers for each head."""
    bias, layers = config.flag("attention_bias"), spec.all_layers
    yield from decoder(spec, qkv_bias=bias, output_bias=bias, layer_norms=("input_layernorm",))
    if config.flag("use_qk_norm"):
        for name, heads in (("q_norm", spec.num_heads), ("k_norm", spec.num_kv_heads)):
            shape = (heads, spec.head_dim)
            yield TensorSpec(f"{ATTENTION}.{name}.weight", shape, "other", layers)


def _stablelm(spec: ModelSpec, config: Config) -> Tensors:
    """Layer norms with biases, perhaps one for each head, and the second left out in parallel."""
    layers, hidden = spec.all_layers, spec.hidden_size
    yield from ends(spec)
    yield from attention(spec, layers, qkv_bias=config.flag("use_qkv_bias"))
    yield from gated_mlp(MLP, hidden, spec.intermediate_size, layers)
    if config.flag("qk_layernorm"):
        for name, heads in (("q_layernorm", spec.num_heads), ("k_layernorm", spec.num_kv_heads)):
            for head in range(heads):
                norm = f"{ATTENTION}.{name}.norms.{head}.weight"
                yield vector(norm, spec.head_dim, layers)
    yield from layer_norm(f"{_LAYER}.input_layernorm", hidden, layers)
    if not config.flag("use_parallel_residual"):
        yield from layer_norm(f"{_LAYER}.post_attention_layernorm", hidden, layers)
    yield from layer_norm("model.norm", hidden)


def last_slide(spec: ModelSpec, config: Config) -> Caches:
    """Qwen: layers from `max_window_layers` on slide, if sliding is switched on.

    Raises:
        ModelError: a place that is none.
    """
    first = config.get("max_window_layers")
    if type(first) is not int or first < 0:
        raise ModelError(f"The model's config says max_window_layers = {repr(first)[:60]}.")
    window = config.optional_size("sliding_window") if config.flag("use_sliding_window") else None
    return by_type(spec, config, [layer >= first for layer in range(spec.num_layers)], window)


def _by_flag(spec: ModelSpec, config: Config) -> Caches:
    """SmolLM3: only where `layer_types` say so, if sliding is switched on."""
    window = config.optional_size("sliding_window") if config.flag("use_sliding_window") else None
    return by_type(spec, config, [window is not None] * spec.num_layers, window)


_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_QWEN2 = {"num_key_value_heads": 32, **_WINDOWS}
_QWEN3 = {"num_key_value_heads": 32, "head_dim": 128, **_WINDOWS}
_GLM = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}
_GLM4_NORMS = (*TWO_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm")

FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", llama, full, runs=True),
    "mistral": Family(
        "MistralForCausalLM",
        mistral,
        all_slide,
        runs=True,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family("Qwen2ForCausalLM", qwen2, last_slide, runs=True, defaults=_QWEN2),
    "qwen3": Family("Qwen3ForCausalLM", qwen3, last_slide, runs=True, defaults=_QWEN3),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        mistral,
        all_slide,
        defaults={"num_key_value_heads": 8, "head_dim": 128},
    ),
    "granite": Family("GraniteForCausalLM", llama, full),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        llama,
        _by_flag,
        defaults={"num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        _seed_oss,
        full,
        defaults={"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
    ),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, full),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        _olmo2,
        partial(periodic, period=4),
        rope=rope.two_kinds,
        defaults={"sliding_window": 4096},
    ),
    "glm": Family("GlmForCausalLM", _glm, full, defaults=_GLM),
    "glm4": Family("Glm4ForCausalLM", partial(_glm, layer_norms=_GLM4_NORMS), full, defaults=_GLM),
    "cohere": Family("CohereForCausalLM", _cohere, full, defaults={"tie_word_embeddings": True}),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        _cohere,
        partial(periodic, period=4),
        defaults={"tie_word_embeddings": True, "sliding_window": 4096},
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        _stablelm,
        full,
        defaults={"num_key_value_heads": 32, "partial_rotary_factor": 0.25},
    ),
}
