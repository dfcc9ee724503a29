"""Families whose layers differ in what they keep: MiMo's heads by kind of layer, MiniMax M3's keys
for a sparse index, and DeepSeek V4's compressed windows."""

from collections.abc import Mapping

from ullage.errors import ModelError
from ullage.specs.config import Config
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.families.base import (
    ATTENTION,
    MLP,
    TWO_NORMS,
    Caches,
    Family,
    Heads,
    Layers,
    Tensors,
    attention,
    ends,
    gated_mlp,
    linear,
    norms,
    vector,
)
from ullage.specs.families.mixtures import (
    block_sparse,
    chosen_layers,
    deepseek_mlps,
    expert_weights,
    experts_inner,
    later_layers,
    mixed_inner,
    mixture,
    others,
    router,
)
from ullage.specs.model import LayerCache, ModelSpec, RopeTable, TensorSpec

_LAYER = "model.layers.{}"


def _mimo_slides(spec: ModelSpec, config: Config) -> Layers:
    types = config.names("layer_types", spec.num_layers, ("full_attention", "sliding_attention"))
    if types is not None:
        return tuple(layer for layer, kind in enumerate(types) if kind == "sliding_attention")
    return chosen_layers(spec, config.numbers("hybrid_layer_pattern", spec.num_layers))


def _mimo_kv(spec: ModelSpec, config: Config, slides: bool) -> tuple[int, int, int]:
    """KV heads of a kind of layer, and the sizes of a key and of a value."""
    values = config.optional_size("v_head_dim") or spec.head_dim
    if not slides:
        return spec.num_kv_heads, spec.head_dim, values
    return (
        config.optional_size("swa_num_key_value_heads") or spec.num_kv_heads,
        config.optional_size("swa_head_dim") or spec.head_dim,
        config.optional_size("swa_v_head_dim") or values,
    )


def _mimo_caches(spec: ModelSpec, config: Config) -> Caches:
    slides = set(_mimo_slides(spec, config))
    # the published window does not count the query itself, and transformers' does
    stated = config.optional_size("sliding_window_size")
    window = config.size("sliding_window") if stated is None else stated + 1

    def cache(slide: bool) -> LayerCache:
        heads, key, value = _mimo_kv(spec, config, slide)
        return LayerCache(heads * (key + value), window if slide else None, heads=heads)

    return tuple(cache(layer in slides) for layer in spec.all_layers)


def _mimo(spec: ModelSpec, config: Config) -> Tensors:
    """Keys and values of other sizes, more KV heads where a layer slides, and a sink there."""
    hidden, layers = spec.hidden_size, spec.all_layers
    slides = _mimo_slides(spec, config)
    yield from ends(spec)
    for some, slide in ((slides, True), (others(spec, slides), False)):
        heads, key, value = _mimo_kv(spec, config, slide)
        queries = spec.num_heads
        if slide:
            queries = config.optional_size("swa_num_attention_heads") or queries
        yield from linear(f"{ATTENTION}.q_proj", queries * key, hidden, some)
        yield from linear(f"{ATTENTION}.k_proj", heads * key, hidden, some)
        yield from linear(f"{ATTENTION}.v_proj", heads * value, hidden, some)
        yield from linear(f"{ATTENTION}.o_proj", hidden, queries * value, some)
        if slide:
            yield vector(f"{ATTENTION}.attention_sink_bias", queries, some)
    yield from deepseek_mlps(spec, config)
    yield from norms(_LAYER, TWO_NORMS, hidden, layers)
    yield vector("model.norm.weight", hidden)


def _m3_sparse(spec: ModelSpec, config: Config) -> Layers:
    kinds = ("full_attention", "minimax_m3_sparse")
    types = config.names("layer_types", spec.num_layers, kinds)
    if types is not None:
        return tuple(layer for layer, kind in enumerate(types) if kind == kinds[1])
    nested = Config(config.section("sparse_attention_config"), {}, {})
    return chosen_layers(spec, nested.numbers("sparse_attention_freq", spec.num_layers))


def _m3_index(config: Config) -> tuple[int, int]:
    """Heads of the sparse index, and the size of one."""
    nested = Config(config.section("sparse_attention_config"), {}, {})
    heads = nested.optional_size("sparse_num_index_heads") or config.size("index_n_heads")
    return heads, nested.optional_size("sparse_index_dim") or config.size("index_head_dim")


def _m3_caches(spec: ModelSpec, config: Config) -> Caches:
    """K and V, and one key for the index beside them."""
    sparse, width = set(_m3_sparse(spec, config)), 2 * spec.num_kv_heads * spec.head_dim
    _, key = _m3_index(config)
    whole = LayerCache(width, heads=spec.num_kv_heads)
    indexed = LayerCache(width + key, heads=spec.num_kv_heads, unsplit=key)
    return tuple(indexed if layer in sparse else whole for layer in spec.all_layers)


def _m3(spec: ModelSpec, config: Config) -> Tensors:
    hidden, mix, layers = spec.hidden_size, mixture(config), spec.all_layers
    moe, block = later_layers(spec, config), f"{_LAYER}.block_sparse_moe"
    heads, key = _m3_index(config)
    sparse = _m3_sparse(spec, config)
    yield from ends(spec)
    yield from attention(spec, layers, qk_norm=True)
    for name, out in (("q", heads * key), ("k", key)):
        yield from linear(f"{ATTENTION}.index_{name}_proj", out, hidden, sparse)
        yield vector(f"{ATTENTION}.index_{name}_norm.weight", key, sparse)
    yield from gated_mlp(MLP, hidden, config.size("dense_intermediate_size"), others(spec, moe))
    yield from block_sparse(spec, mix, moe)
    yield vector(f"{block}.e_score_correction_bias", mix.experts, moe)
    shared = config.size("shared_intermediate_size")
    yield from gated_mlp(f"{block}.shared_experts", hidden, shared, moe)
    yield from norms(_LAYER, TWO_NORMS, hidden, layers)
    yield vector("model.norm.weight", hidden)


def _m3_inner(config: Config) -> int:
    mix = mixture(config)
    shared = config.size("shared_intermediate_size")
    return max(mix.active * mix.inner + shared, config.size("dense_intermediate_size"))


def _v4_ratios(spec: ModelSpec, config: Config) -> list[int]:
    """How many tokens each layer makes one entry of: 0 (a window alone), 4 or 128. Files list the
    layer that predicts ahead too.

    Raises:
        ModelError: a layer without a ratio, or another one.
    """
    ratios = config.numbers("compress_ratios", spec.num_layers + 64)[: spec.num_layers]
    if len(ratios) != spec.num_layers or not set(ratios) <= {0, 4, 128}:
        raise ModelError(
            "The model's config has no compress_ratios of 0, 4 and 128 for each layer."
        )
    return ratios


def _v4_caches(spec: ModelSpec, config: Config) -> Caches:
    """A window, which stands in `state_bytes` where a layer also keeps entries of 4 or 128 tokens
    (its keys are its values then, in one tensor); and what is gathered for the next entry, at its
    most."""
    dim, index, window = spec.head_dim, config.size("index_head_dim"), config.size("sliding_window")
    number_bytes = DTYPE_BYTES[spec.dtype]
    slide = (window - 1) * dim
    both = dim + index
    kinds = {
        0: LayerCache(2 * dim, window),
        # 3 tokens of doubled keys and gates, and 4 that overlap the next entry's
        4: LayerCache(-(-both // 4), None, (slide + 3 * 4 * both + 2 * 4 * both) * number_bytes),
        128: LayerCache(-(-dim // 128), None, (slide + 2 * 127 * dim) * number_bytes),
    }
    return tuple(kinds[ratio] for ratio in _v4_ratios(spec, config))


def _v4(spec: ModelSpec, config: Config) -> Tensors:
    """One key for all heads that is also the value, outputs in groups, and streams that are mixed
    before and after each block; by the names that transformers saves."""
    hidden, layers, streams = spec.hidden_size, spec.all_layers, config.size("hc_mult")
    shape, rows = (spec.vocab_size, hidden), (2 + streams) * streams
    yield TensorSpec("model.embed_tokens.weight", shape, "embedding")
    yield TensorSpec("head.weight", shape, "head")
    yield vector("model.norm.weight", hidden)
    yield vector("model.hc_head.hc_base", streams)
    yield TensorSpec("model.hc_head.hc_fn", (streams, streams * hidden), "other")
    yield vector("model.hc_head.hc_scale", 1)
    for part in ("attn", "ffn"):
        yield vector(f"{_LAYER}.hc_{part}_base", rows, layers)
        yield TensorSpec(f"{_LAYER}.hc_{part}_fn", (rows, streams * hidden), "other", layers)
        yield vector(f"{_LAYER}.hc_{part}_scale", 3, layers)
        yield vector(f"{_LAYER}.{part}_norm.weight", hidden, layers)
    yield from _v4_attention(spec, config)
    ratios = _v4_ratios(spec, config)
    for ratio in (4, 128):
        some = tuple(layer for layer, found in enumerate(ratios) if found == ratio)
        yield from _v4_compressor(spec, config, ratio, some)
    yield from _v4_experts(spec, config)


def _v4_attention(spec: ModelSpec, config: Config) -> Tensors:
    name, layers, hidden = f"{_LAYER}.attn", spec.all_layers, spec.hidden_size
    queries, rank = spec.num_heads * spec.head_dim, config.size("q_lora_rank")
    groups, narrow = config.size("o_groups"), config.size("o_lora_rank")
    yield from linear(f"{name}.wq_a", rank, hidden, layers)
    yield vector(f"{name}.q_norm.weight", rank, layers)
    yield from linear(f"{name}.wq_b", queries, rank, layers)
    yield from linear(f"{name}.wkv", spec.head_dim, hidden, layers)
    yield vector(f"{name}.norm.weight", spec.head_dim, layers)
    yield from linear(f"{name}.wo_a", groups * narrow, queries // groups, layers)
    yield from linear(f"{name}.wo_b", hidden, groups * narrow, layers)
    yield vector(f"{name}.attn_sink", spec.num_heads, layers)


def _v4_compressor(spec: ModelSpec, config: Config, ratio: int, layers: Layers) -> Tensors:
    """Ratio 4 overlaps its entries, so that keys are twice as wide, and has an indexer."""
    name, hidden, dim = f"{_LAYER}.attn", spec.hidden_size, spec.head_dim
    parts = [(f"{name}.compressor", dim)]
    if ratio == 4:
        index, heads = config.size("index_head_dim"), config.size("index_n_heads")
        parts.append((f"{name}.indexer.compressor", index))
        queries = config.size("q_lora_rank")
        yield from linear(f"{name}.indexer.wq_b", heads * index, queries, layers)
        yield from linear(f"{name}.indexer.weights_proj", heads, hidden, layers)
    for part, size in parts:
        wide = 2 * size if ratio == 4 else size
        yield from linear(f"{part}.wkv", wide, hidden, layers)
        yield from linear(f"{part}.wgate", wide, hidden, layers)
        yield TensorSpec(f"{part}.ape", (ratio, wide), "other", layers)
        yield vector(f"{part}.norm.weight", size, layers)


def _v4_experts(spec: ModelSpec, config: Config) -> Tensors:
    """Experts on every layer; the first layers choose them by a table of tokens."""
    mix, layers, hidden, name = mixture(config), spec.all_layers, spec.hidden_size, f"{_LAYER}.ffn"
    hashed = layers[: config.count("num_hash_layers", spec.num_layers)]
    yield router(f"{name}.gate.weight", mix, hidden, layers)
    table = (spec.vocab_size, mix.active)
    yield TensorSpec(f"{name}.gate.tid2eid", table, "other", hashed)
    yield vector(f"{name}.gate.bias", mix.experts, others(spec, hashed))
    yield from expert_weights(name, mix, hidden, layers, ("w1", "w3", "w2"))
    for part in ("w1", "w3"):
        yield from linear(f"{name}.shared_experts.{part}", mix.shared, hidden, layers)
    yield from linear(f"{name}.shared_experts.w2", hidden, mix.shared, layers)


def _v4_heads(config: Config) -> Heads:
    return Heads(config.size("num_attention_heads"), 1, config.size("head_dim"))


def _v4_rope(spec: ModelSpec, config: Config) -> tuple[RopeTable, ...]:
    """One for windows and one for compressed entries."""
    width = config.size("qk_rope_head_dim")
    return (RopeTable(config.size("max_position_embeddings"), width),) * 2


_M3 = Family(
    "MiniMaxM3SparseForConditionalGeneration",
    _m3,
    _m3_caches,
    inner=_m3_inner,
    defaults={"head_dim": 128, "partial_rotary_factor": 0.5},
    oddities=("attention_output_gate",),
)

FAMILIES: Mapping[str, Family] = {
    "mimo_v2_flash": Family(
        "MiMoV2FlashForCausalLM",
        _mimo,
        _mimo_caches,
        inner=mixed_inner,
        defaults={"num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128},
        oddities=("attention_bias", "add_full_attention_sink_bias"),
    ),
    "minimax_m3_vl_text": _M3,
    "deepseek_v4": Family(
        "DeepseekV4ForCausalLM",
        _v4,
        _v4_caches,
        heads=_v4_heads,
        inner=experts_inner,
        rope=_v4_rope,
        defaults={"hc_mult": 4, "sliding_window": 128, "index_head_dim": 128, "index_n_heads": 64},
    ),
}
