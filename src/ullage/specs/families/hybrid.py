"""Linear attention: most layers keep a state that does not grow. Gated delta nets (Qwen3-Next and
Qwen 3.5) and Kimi's delta attention."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

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
    attention,
    ends,
    gated_mlp,
    grown,
    linear,
    norms,
    state_bytes,
    vector,
)
from ullage.specs.families.latent import latent_attention, latent_heads, latent_width
from ullage.specs.families.mixtures import (
    block_sparse,
    experts_inner,
    later_layers,
    mixed_inner,
    mixture,
    others,
    qwen_mlps,
    step_layers,
)
from ullage.specs.model import LayerCache, ModelSpec, TensorSpec

_LAYER = "model.layers.{}"


class _Delta(NamedTuple):
    """A gated delta net: heads of keys and values, and the convolution."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    kernel: int

    @property
    def keys(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def columns(self) -> int:
        return 2 * self.keys + self.values


def _delta(config: Config) -> _Delta:
    return _Delta(
        config.size("linear_num_key_heads"),
        config.size("linear_key_head_dim"),
        config.size("linear_num_value_heads"),
        config.size("linear_value_head_dim"),
        config.size("linear_conv_kernel_dim"),
    )


def _is_full(spec: ModelSpec, config: Config) -> list[bool]:
    """Qwen: every `full_attention_interval`-th layer, unless `layer_types` says which."""
    types = config.names("layer_types", spec.num_layers, ("linear_attention", "full_attention"))
    if types is not None:
        return [kind == "full_attention" for kind in types]
    period = config.size("full_attention_interval")
    return [(layer + 1) % period == 0 for layer in range(spec.num_layers)]


def _delta_caches(spec: ModelSpec, config: Config) -> Caches:
    net = _delta(config)
    recurrent = net.value_heads * net.key_dim * net.value_dim
    linear_cache = LayerCache(0, None, state_bytes(spec, net.columns, net.kernel, recurrent))
    return tuple(grown(spec) if whole else linear_cache for whole in _is_full(spec, config))


def _delta_attention(spec: ModelSpec, config: Config, layers: Layers, fused: bool) -> Tensors:
    """Qwen3-Next fuses what goes in in two projections, Qwen 3.5 has four."""
    net, name, hidden = _delta(config), f"{_LAYER}.linear_attn", spec.hidden_size
    parts: dict[str, int] = {
        "in_proj_qkv": net.columns,
        "in_proj_z": net.values,
        "in_proj_b": net.value_heads,
        "in_proj_a": net.value_heads,
    }
    if fused:
        parts = {
            "in_proj_qkvz": net.columns + net.values,
            "in_proj_ba": 2 * net.value_heads,
        }
    for part, rows in parts.items():
        yield from linear(f"{name}.{part}", rows, hidden, layers)
    shape = (net.columns, 1, net.kernel)
    yield TensorSpec(f"{name}.conv1d.weight", shape, "other", layers)
    yield vector(f"{name}.dt_bias", net.value_heads, layers)
    yield vector(f"{name}.A_log", net.value_heads, layers)
    yield vector(f"{name}.norm.weight", net.value_dim, layers)
    yield from linear(f"{name}.out_proj", hidden, net.values, layers)


def _qwen(spec: ModelSpec, config: Config, fused: bool = False, experts: bool = True) -> Tensors:
    """Gated full attention in some layers, delta nets in the others."""
    layers, hidden = spec.all_layers, spec.hidden_size
    whole = tuple(layer for layer, full in enumerate(_is_full(spec, config)) if full)
    rest = tuple(layer for layer in layers if layer not in whole)
    bias = config.flag("attention_bias")
    yield from ends(spec)
    if whole:
        yield from attention(
            spec, whole, qkv_bias=bias, output_bias=bias, qk_norm=True, query_gate=True
        )
    if rest:
        yield from _delta_attention(spec, config, rest, fused)
    if experts:
        yield from qwen_mlps(spec, config, step_layers(spec, config))
    else:
        yield from gated_mlp(MLP, hidden, spec.intermediate_size, layers)
    yield from norms(_LAYER, TWO_NORMS, hidden, layers)
    yield vector("model.norm.weight", hidden)


def _kimi_is_full(spec: ModelSpec, config: Config) -> list[bool]:
    """`linear_attn_config` counts layers from 1 and goes before `layer_types`.

    Raises:
        ModelError: neither says it of every layer.
    """
    nested = Config(config.section("linear_attn_config"), {}, {})
    whole = set(nested.numbers("full_attn_layers", spec.num_layers))
    rest = set(nested.numbers("kda_layers", spec.num_layers))
    if whole or rest:
        if whole & rest or whole | rest != set(range(1, spec.num_layers + 1)):
            raise ModelError("The model's linear_attn_config does not place every layer once.")
        return [layer + 1 in whole for layer in range(spec.num_layers)]
    types = config.names("layer_types", spec.num_layers, ("linear_attention", "full_attention"))
    if types is None:
        raise ModelError("The model's config has no 'linear_attn_config': is it complete?")
    return [kind == "full_attention" for kind in types]


class _Kda(NamedTuple):
    """Kimi's delta attention."""

    heads: int
    dim: int
    kernel: int


def _kda(config: Config) -> _Kda:
    nested = Config(config.section("linear_attn_config"), {}, {})

    def size(key: str, flat: str) -> int:
        return nested.optional_size(key) or config.size(flat)

    return _Kda(
        size("num_heads", "linear_num_heads"),
        size("head_dim", "linear_head_dim"),
        size("short_conv_kernel_size", "linear_conv_kernel_dim"),
    )


def _kimi_caches(spec: ModelSpec, config: Config) -> Caches:
    net = _kda(config)
    held = state_bytes(spec, 3 * net.heads * net.dim, net.kernel, net.heads * net.dim * net.dim)
    latent, state = LayerCache(latent_width(config)), LayerCache(0, None, held)
    return tuple(latent if whole else state for whole in _kimi_is_full(spec, config))


def _kda_attention(spec: ModelSpec, config: Config, layers: Layers) -> Tensors:
    """The tensors of the published checkpoint; transformers fuses the three convolutions."""
    net, hidden = _kda(config), spec.hidden_size
    inner = net.heads * net.dim
    for name in ("q", "k", "v"):
        yield from linear(f"{ATTENTION}.{name}_proj", inner, hidden, layers)
        shape = (inner, 1, net.kernel)
        yield TensorSpec(f"{ATTENTION}.{name}_conv1d.weight", shape, "other", layers)
    for name in ("f", "g"):
        yield from linear(f"{ATTENTION}.{name}_a_proj", net.dim, hidden, layers)
        yield from linear(f"{ATTENTION}.{name}_b_proj", inner, net.dim, layers)
    yield from linear(f"{ATTENTION}.b_proj", net.heads, hidden, layers)
    yield TensorSpec(f"{ATTENTION}.A_log", (1, 1, net.heads, 1), "other", layers)
    yield vector(f"{ATTENTION}.dt_bias", inner, layers)
    yield vector(f"{ATTENTION}.o_norm.weight", net.dim, layers)
    yield from linear(f"{ATTENTION}.o_proj", hidden, inner, layers)


def _kimi(spec: ModelSpec, config: Config) -> Tensors:
    """Latent attention without positions in some layers, delta attention in the others."""
    layers, hidden, mix = spec.all_layers, spec.hidden_size, mixture(config)
    whole = tuple(layer for layer, full in enumerate(_kimi_is_full(spec, config)) if full)
    sparse, block = later_layers(spec, config), f"{_LAYER}.block_sparse_moe"
    yield from ends(spec)
    yield from latent_attention(spec, config, whole)
    rest = others(spec, whole)
    yield from _kda_attention(spec, config, rest)
    plain = others(spec, sparse)
    yield from gated_mlp(MLP, hidden, config.size("intermediate_size"), plain)
    if sparse:
        yield from block_sparse(spec, mix, sparse)
        yield vector(f"{block}.gate.e_score_correction_bias", mix.experts, sparse)
        if mix.shared:
            yield from gated_mlp(f"{block}.shared_experts", hidden, mix.shared, sparse)
    yield from norms(_LAYER, TWO_NORMS, hidden, layers)
    yield vector("model.norm.weight", hidden)


_DELTA = {
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
}
_DELTA_EXPERTS = {**_DELTA, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 512}

FAMILIES: Mapping[str, Family] = {
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        partial(_qwen, fused=True),
        _delta_caches,
        inner=mixed_inner,
        defaults=_DELTA_EXPERTS,
    ),
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM",
        partial(_qwen, experts=False),
        _delta_caches,
        rope=rope.multimodal,
        defaults={**_DELTA, "num_key_value_heads": 4},
    ),
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeForCausalLM",
        _qwen,
        _delta_caches,
        inner=experts_inner,
        rope=rope.multimodal,
        defaults=_DELTA_EXPERTS,
    ),
    "kimi_linear": Family(
        "KimiLinearForCausalLM",
        _kimi,
        _kimi_caches,
        heads=latent_heads,
        inner=mixed_inner,
        rope=rope.none,
        defaults={
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "linear_head_dim": 128,
            "linear_num_heads": 32,
            "linear_conv_kernel_dim": 4,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 1_048_576,
        },
        oddities=("mla_use_output_gate", "routed_expert_hidden_size"),
    ),
}
