"""Gemma 1 to 4: explicit head sizes, windows, and in Gemma 4 layers that share KV, wider heads in
the layers that see everything, embeddings for each layer, and experts beside the MLP."""

from collections.abc import Mapping
from functools import partial

from ullage.errors import ModelError
from ullage.specs.config import Config
from ullage.specs.families import rope
from ullage.specs.families.base import (
    ATTENTION,
    FOUR_NORMS,
    MLP,
    Caches,
    Family,
    Layers,
    Tensors,
    ends,
    full,
    gated_mlp,
    linear,
    norms,
    periodic,
    vector,
)
from ullage.specs.families.dense import decoder
from ullage.specs.families.mixtures import Mixture, mixture, router, stacked
from ullage.specs.model import LayerCache, ModelSpec, RopeTable, TensorSpec

_LAYER = "model.layers.{}"


def _gemma(spec: ModelSpec, config: Config) -> Tensors:
    """Llama, usually with a tied head."""
    bias = config.flag("attention_bias")
    return decoder(spec, qkv_bias=bias, output_bias=bias)


def _gemma2(spec: ModelSpec, config: Config) -> Tensors:
    """Gemma with norms after attention and MLP too."""
    bias = config.flag("attention_bias")
    return decoder(spec, qkv_bias=bias, output_bias=bias, layer_norms=FOUR_NORMS)


def _gemma3(spec: ModelSpec, config: Config) -> Tensors:
    """Gemma 2 with a norm on each query and key head."""
    bias = config.flag("attention_bias")
    return decoder(spec, qkv_bias=bias, output_bias=bias, qk_norm=True, layer_norms=FOUR_NORMS)


def _gemma3_caches(spec: ModelSpec, config: Config) -> Caches:
    """Every `sliding_window_pattern`-th layer sees everything, the others slide."""
    return periodic(spec, config, config.size("sliding_window_pattern"))


def _sees_all(spec: ModelSpec, config: Config) -> list[bool]:
    """Gemma 4: which layers see everything: every sixth, and always the last."""
    types = config.names("layer_types", spec.num_layers, ("sliding_attention", "full_attention"))
    if types is None:
        whole = [(layer + 1) % 6 == 0 for layer in range(spec.num_layers)]
    else:
        whole = [kind == "full_attention" for kind in types]
    return [*whole[:-1], True]


def _global_heads(spec: ModelSpec, config: Config) -> tuple[int, int]:
    """KV heads and their size in the layers that see everything."""
    kv_heads = spec.num_kv_heads
    if config.flag("attention_k_eq_v"):
        kv_heads = config.optional_size("num_global_key_value_heads") or kv_heads
    return kv_heads, config.size("global_head_dim")


def _first_shared(spec: ModelSpec, config: Config) -> int:
    """The layers from here on read the KV of the last layer of their kind before it.

    Raises:
        ModelError: a kind that has no layer before it.
    """
    first = spec.num_layers - config.count("num_kv_shared_layers", spec.num_layers)
    whole = _sees_all(spec, config)
    if first and set(whole[:first]) != set(whole):
        raise ModelError("The model's config shares KV of a kind that no earlier layer has.")
    return first or spec.num_layers


def _gemma4_caches(spec: ModelSpec, config: Config) -> Caches:
    """K and V both, also where the values are the keys: transformers stores them twice."""
    first, window = _first_shared(spec, config), config.optional_size("sliding_window")
    kv_heads, dim = _global_heads(spec, config)
    slide = LayerCache(2 * spec.num_kv_heads * spec.head_dim, window, heads=spec.num_kv_heads)
    whole = LayerCache(2 * kv_heads * dim, heads=kv_heads)
    caches = [whole if sees else slide for sees in _sees_all(spec, config)]
    return (*caches[:first], *[LayerCache(0)] * (spec.num_layers - first))


def _gemma4(spec: ModelSpec, config: Config) -> Tensors:
    hidden, layers = spec.hidden_size, spec.all_layers
    whole = tuple(layer for layer, sees in enumerate(_sees_all(spec, config)) if sees)
    slide = tuple(layer for layer in layers if layer not in whole)
    kv_heads, dim = _global_heads(spec, config)
    yield from ends(spec)
    yield from _gemma4_attention(spec, config, slide, spec.num_kv_heads, spec.head_dim)
    value = not config.flag("attention_k_eq_v")
    yield from _gemma4_attention(spec, config, whole, kv_heads, dim, value)
    yield from _gemma4_mlps(spec, config)
    yield from norms(_LAYER, FOUR_NORMS, hidden, layers)
    yield vector(f"{_LAYER}.layer_scalar", 1, layers)
    if config.flag("enable_moe_block"):
        yield from _gemma4_experts(spec, mixture(config))
    yield from _per_layer_embeddings(spec, config)
    yield vector("model.norm.weight", hidden)


def _gemma4_attention(
    spec: ModelSpec,
    config: Config,
    layers: Layers,
    kv_heads: int,
    dim: int,
    value: bool = True,
) -> Tensors:
    """Layers of one kind; those that share KV have no key or value of their own."""
    hidden, bias = spec.hidden_size, config.flag("attention_bias")
    first = _first_shared(spec, config)
    own = tuple(layer for layer in layers if layer < first)
    queries, keys = spec.num_heads * dim, kv_heads * dim
    if layers:
        yield from linear(f"{ATTENTION}.q_proj", queries, hidden, layers, bias)
        yield vector(f"{ATTENTION}.q_norm.weight", dim, layers)
        yield from linear(f"{ATTENTION}.o_proj", hidden, queries, layers, bias)
    if own:
        yield from linear(f"{ATTENTION}.k_proj", keys, hidden, own, bias)
        yield vector(f"{ATTENTION}.k_norm.weight", dim, own)
        if value:
            yield from linear(f"{ATTENTION}.v_proj", keys, hidden, own, bias)


def _gemma4_mlps(spec: ModelSpec, config: Config) -> Tensors:
    """Perhaps twice as wide in the layers that share KV."""
    first = _first_shared(spec, config)
    inner, layers = config.size("intermediate_size"), spec.all_layers
    if not config.flag("use_double_wide_mlp") or first == spec.num_layers:
        yield from gated_mlp(MLP, spec.hidden_size, inner, layers)
        return
    yield from gated_mlp(MLP, spec.hidden_size, inner, layers[:first])
    yield from gated_mlp(MLP, spec.hidden_size, 2 * inner, layers[first:])


def _gemma4_experts(spec: ModelSpec, mix: Mixture) -> Tensors:
    """Experts beside the MLP, with norms and scales of their own."""
    hidden, layers = spec.hidden_size, spec.all_layers
    yield router(f"{_LAYER}.router.proj.weight", mix, hidden, layers)
    yield vector(f"{_LAYER}.router.scale", hidden, layers)
    yield vector(f"{_LAYER}.router.per_expert_scale", mix.experts, layers)
    yield stacked(f"{_LAYER}.experts.gate_up_proj", (2 * mix.inner, hidden), mix, layers)
    yield stacked(f"{_LAYER}.experts.down_proj", (hidden, mix.inner), mix, layers)
    extra = (
        "post_feedforward_layernorm_1",
        "post_feedforward_layernorm_2",
        "pre_feedforward_layernorm_2",
    )
    yield from norms(_LAYER, extra, hidden, layers)


def _per_layer_embeddings(spec: ModelSpec, config: Config) -> Tensors:
    """A second embedding, with a part for each layer."""
    part = config.count("hidden_size_per_layer_input")
    if not part:
        return
    hidden, layers, whole = spec.hidden_size, spec.all_layers, spec.num_layers * part
    rows = config.size("vocab_size_per_layer_input")
    yield TensorSpec("model.embed_tokens_per_layer.weight", (rows, whole), "embedding")
    yield from linear("model.per_layer_model_projection", whole, hidden, ())
    yield vector("model.per_layer_projection_norm.weight", part)
    yield from linear(f"{_LAYER}.per_layer_input_gate", part, hidden, layers)
    yield from linear(f"{_LAYER}.per_layer_projection", hidden, part, layers)
    yield vector(f"{_LAYER}.post_per_layer_input_norm.weight", hidden, layers)


def _gemma4_inner(config: Config) -> int:
    inner = config.size("intermediate_size")
    if config.flag("enable_moe_block"):
        return inner + mixture(config).width
    wide = config.flag("use_double_wide_mlp") and config.count("num_kv_shared_layers")
    return 2 * inner if wide else inner


def _gemma4_rope(spec: ModelSpec, config: Config) -> tuple[RopeTable, ...]:
    """One for each kind of layer, as wide as its heads: those that do not turn stand still."""
    rows = config.size("max_position_embeddings")
    return RopeTable(rows, spec.head_dim), RopeTable(rows, config.size("global_head_dim"))


_GEMMA2 = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
}

FAMILIES: Mapping[str, Family] = {
    "gemma": Family(
        "GemmaForCausalLM",
        _gemma,
        full,
        runs=True,
        defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _gemma2,
        partial(periodic, period=2),
        runs=True,
        defaults={**_GEMMA2, "attn_logit_softcapping": 50.0},
    ),
    # Published Gemma 3 configs leave out whatever is the config class's default, even the heads.
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _gemma3,
        _gemma3_caches,
        runs=True,
        rope=rope.two_kinds,
        defaults={
            **_GEMMA2,
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window_pattern": 6,
            "rope_local_base_freq": 10_000.0,
        },
    ),
    "gemma4_text": Family(
        "Gemma4ForCausalLM",
        _gemma4,
        _gemma4_caches,
        inner=_gemma4_inner,
        rope=_gemma4_rope,
        defaults={
            **_GEMMA2,
            "sliding_window": 512,
            "vocab_size": 262_144,
            "max_position_embeddings": 131_072,
            "global_head_dim": 512,
            "vocab_size_per_layer_input": 262_144,
            "hidden_size_per_layer_input": 256,
        },
    ),
}
