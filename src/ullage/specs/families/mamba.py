"""Mamba 2 beside attention: Nemotron's blocks, and Falcon H1's layers of both."""

from collections.abc import Mapping
from typing import NamedTuple

from ullage.errors import ModelError
from ullage.specs.config import Config
from ullage.specs.families import rope
from ullage.specs.families.base import (
    MOST_LAYERS,
    Caches,
    Family,
    Heads,
    Layers,
    Tensors,
    attention,
    ends,
    gated_mlp,
    grown,
    linear,
    norms,
    plain_heads,
    state_bytes,
    vector,
)
from ullage.specs.families.mixtures import expert_weights, mixture, router
from ullage.specs.model import LayerCache, ModelSpec, TensorSpec

_LAYER = "model.layers.{}"


class _Mamba(NamedTuple):
    """A Mamba 2 mixer."""

    heads: int
    inner: int
    groups: int
    state: int
    kernel: int

    @property
    def columns(self) -> int:
        return self.inner + 2 * self.groups * self.state


def _mamba_cache(spec: ModelSpec, net: _Mamba) -> int:
    return state_bytes(spec, net.columns, net.kernel, net.inner * net.state)


def _mamba_tensors(
    name: str, net: _Mamba, hidden: int, layers: Layers, *, bias: bool, conv_bias: bool, norm: bool
) -> Tensors:
    rows = 2 * net.inner + 2 * net.groups * net.state + net.heads
    yield from linear(f"{name}.in_proj", rows, hidden, layers, bias)
    yield TensorSpec(f"{name}.conv1d.weight", (net.columns, 1, net.kernel), "other", layers)
    if conv_bias:
        yield vector(f"{name}.conv1d.bias", net.columns, layers)
    for part in ("dt_bias", "A_log", "D"):
        yield vector(f"{name}.{part}", net.heads, layers)
    if norm:
        yield vector(f"{name}.norm.weight", net.inner, layers)
    yield from linear(f"{name}.out_proj", hidden, net.inner, layers, bias)


_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_WORDS = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}


def _blocks(config: Config) -> list[str]:
    """Nemotron: what each layer is, by letters or by words.

    Raises:
        ModelError: neither is there, or something else stands in it.
    """
    pattern = config.get("hybrid_override_pattern")
    listed = config.get(config.either("layers_block_type", "layer_types"))
    found: list[str | None] = []
    if isinstance(pattern, str) and len(pattern) <= MOST_LAYERS:
        found = [_LETTERS.get(letter) for letter in pattern]
    elif isinstance(listed, list) and len(listed) <= MOST_LAYERS:
        found = [_WORDS.get(word) if isinstance(word, str) else None for word in listed]
    blocks = [block for block in found if block is not None]
    if not blocks or len(blocks) != len(found):
        raise ModelError(
            "The model's config has no hybrid_override_pattern of M, E, * and -, "
            "and no layers_block_type."
        )
    return blocks


def _nemotron_heads(config: Config) -> Heads:
    """The first configs call the size of a head otherwise."""
    heads = plain_heads(config)
    return heads._replace(dim=config.optional_size("attention_head_dim") or heads.dim)


def _nemotron_depth(config: Config) -> int:
    blocks = _blocks(config)
    stated = config.optional_size("num_hidden_layers", MOST_LAYERS)
    if stated is not None and stated != len(blocks):
        raise ModelError(f"The model's config has {len(blocks)} blocks for {stated} layers.")
    return len(blocks)


def _nemotron_mamba(config: Config) -> _Mamba:
    heads = config.size("mamba_num_heads")
    inner = heads * config.size("mamba_head_dim")
    state, kernel = config.size("ssm_state_size"), config.size("conv_kernel")
    return _Mamba(heads, inner, config.size("n_groups"), state, kernel)


def _nemotron_caches(spec: ModelSpec, config: Config) -> Caches:
    net = _nemotron_mamba(config)
    kinds = {
        "mamba": LayerCache(0, None, _mamba_cache(spec, net)),
        "attention": grown(spec),
        "mlp": LayerCache(0),
        "moe": LayerCache(0),
    }
    return tuple(kinds[block] for block in _blocks(config))


def _nemotron(spec: ModelSpec, config: Config) -> Tensors:
    """One mixer and one norm a layer."""
    hidden, mixer = spec.hidden_size, "backbone.layers.{}.mixer"
    at: dict[str, Layers] = {
        kind: tuple(layer for layer, block in enumerate(_blocks(config)) if block == kind)
        for kind in ("mamba", "attention", "mlp", "moe")
    }
    yield from ends(spec, "backbone.embeddings.weight")
    if at["mamba"]:
        yield from _mamba_tensors(
            mixer,
            _nemotron_mamba(config),
            hidden,
            at["mamba"],
            bias=config.flag("use_bias"),
            conv_bias=config.flag("use_conv_bias"),
            norm=True,
        )
    if at["attention"]:
        bias = config.flag("attention_bias")
        yield from attention(spec, at["attention"], mixer, qkv_bias=bias, output_bias=bias)
    if at["mlp"]:
        inner, bias = config.size("intermediate_size"), config.flag("mlp_bias")
        yield from linear(f"{mixer}.up_proj", inner, hidden, at["mlp"], bias)
        yield from linear(f"{mixer}.down_proj", hidden, inner, at["mlp"], bias)
    if at["moe"]:
        yield from _nemotron_experts(spec, config, mixer, at["moe"])
    yield vector("backbone.layers.{}.norm.weight", hidden, spec.all_layers)
    yield vector("backbone.norm_f.weight", hidden)


def _nemotron_experts(spec: ModelSpec, config: Config, mixer: str, layers: Layers) -> Tensors:
    """Experts without gates, perhaps in a narrower latent space, beside a shared one."""
    mix, hidden = mixture(config), spec.hidden_size
    latent = config.optional_size("moe_latent_size")
    shared = config.size("moe_shared_expert_intermediate_size")
    yield router(f"{mixer}.gate.weight", mix, hidden, layers)
    yield vector(f"{mixer}.gate.e_score_correction_bias", mix.experts, layers)
    yield from expert_weights(mixer, mix, latent or hidden, layers, ("up_proj", "down_proj"))
    yield from linear(f"{mixer}.shared_experts.up_proj", shared, hidden, layers)
    yield from linear(f"{mixer}.shared_experts.down_proj", hidden, shared, layers)
    if latent:
        yield from linear(f"{mixer}.fc1_latent_proj", latent, hidden, layers)
        yield from linear(f"{mixer}.fc2_latent_proj", hidden, latent, layers)


def _nemotron_inner(config: Config) -> int:
    widths = [1]
    blocks = _blocks(config)
    if "mlp" in blocks:
        widths.append(config.size("intermediate_size"))
    if "moe" in blocks:
        mix = mixture(config)
        shared = config.size("moe_shared_expert_intermediate_size")
        widths.append(mix.active * mix.inner + shared)
    return max(widths)


def _falcon_h1_mamba(config: Config) -> _Mamba:
    heads = config.size("mamba_n_heads")
    inner = config.optional_size("mamba_d_ssm")
    if inner is None:
        inner = config.size("mamba_expand") * config.size("hidden_size")
    state, kernel = config.size("mamba_d_state"), config.size("mamba_d_conv")
    return _Mamba(heads, inner, config.size("mamba_n_groups"), state, kernel)


def _falcon_h1_caches(spec: ModelSpec, config: Config) -> Caches:
    """Every layer has both K and V and a state."""
    cache = grown(spec)
    held = _mamba_cache(spec, _falcon_h1_mamba(config))
    return (LayerCache(cache.width, None, held, cache.heads),) * spec.num_layers


def _falcon_h1(spec: ModelSpec, config: Config) -> Tensors:
    layers, hidden = spec.all_layers, spec.hidden_size
    bias = config.flag("attention_bias")
    block = f"{_LAYER}.feed_forward"
    yield from ends(spec)
    yield from attention(spec, layers, qkv_bias=bias, output_bias=bias)
    yield from _mamba_tensors(
        f"{_LAYER}.mamba",
        _falcon_h1_mamba(config),
        hidden,
        layers,
        bias=config.flag("mamba_proj_bias"),
        conv_bias=config.flag("mamba_conv_bias"),
        norm=config.flag("mamba_rms_norm"),
    )
    inner = spec.intermediate_size
    yield from gated_mlp(block, hidden, inner, layers, config.flag("mlp_bias"))
    yield from norms(_LAYER, ("input_layernorm", "pre_ff_layernorm"), hidden, layers)
    yield vector("model.final_layernorm.weight", hidden)


FAMILIES: Mapping[str, Family] = {
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        _nemotron,
        _nemotron_caches,
        gated_mlp=False,
        heads=_nemotron_heads,
        inner=_nemotron_inner,
        depth=_nemotron_depth,
        rope=rope.none,
        defaults={
            "num_key_value_heads": 8,
            "ssm_state_size": 128,
            "conv_kernel": 4,
            "n_groups": 8,
            "mamba_head_dim": 64,
            "use_conv_bias": True,
        },
    ),
    "falcon_h1": Family(
        "FalconH1ForCausalLM",
        _falcon_h1,
        _falcon_h1_caches,
        defaults={
            "num_key_value_heads": 8,
            "mamba_d_state": 256,
            "mamba_d_conv": 4,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "mamba_conv_bias": True,
        },
    ),
}
