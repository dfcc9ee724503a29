"""What a family is, and the tensors and caches that families share.

Tensor names are those of the published checkpoints: where transformers 5 fuses the experts of a
layer in one tensor and the files hold one module each, the spec has the files' names; the numbers
are the same. ``{}`` stands for the layer's number; a linear weight is ``[out, in]``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ullage.errors import ModelError
from ullage.specs.config import Config
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.families import rope
from ullage.specs.model import LayerCache, ModelSpec, Role, RopeTable, TensorSpec

Tensors = Iterator[TensorSpec]
Caches = tuple[LayerCache, ...]
Layers = tuple[int, ...]

# `caches` has an entry a layer, so a config that lies about its depth must not fill the memory.
MOST_LAYERS = 4096
STATE_BYTES = 4  # of a number in a recurrent state: fp32, whatever the model's dtype
ATTENTION, MLP = "model.layers.{}.self_attn", "model.layers.{}.mlp"
TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = (*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


class Heads(NamedTuple):
    """Query heads, KV heads, and numbers in one."""

    queries: int
    keys: int
    dim: int


def plain_heads(config: Config) -> Heads:
    """Heads as Llama counts them.

    Raises:
        ModelError: KV heads or the width do not divide.
    """
    heads = config.size("num_attention_heads")
    kv_heads = config.optional_size("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ModelError(
            f"The model's config has {heads} heads for {kv_heads} KV heads: no multiple."
        )
    dim = config.optional_size("head_dim") or split_evenly(config.size("hidden_size"), heads)
    return Heads(heads, kv_heads, dim)


def split_evenly(hidden: int, heads: int) -> int:
    """Numbers in a head where the hidden size is shared out.

    Raises:
        ModelError: a remainder.
    """
    if hidden % heads:
        raise ModelError(f"The model's config has a hidden size of {hidden} for {heads} heads.")
    return hidden // heads


def plain_inner(config: Config) -> int:
    """Width of the MLP."""
    return config.size("intermediate_size")


def plain_depth(config: Config) -> int:
    """Number of layers."""
    return config.size("num_hidden_layers", MOST_LAYERS)


@dataclass(frozen=True)
class Family:
    """A model_type: its causal-LM class, tensors, caches and rotary tables, its config class's
    defaults for keys that published configs leave out, and whether ullage's runtime has it.
    `oddities` are keys that change the arithmetic and must not be set."""

    native_class: str
    tensors: Callable[[ModelSpec, Config], Tensors]
    caches: Callable[[ModelSpec, Config], Caches]
    gated_mlp: bool = True
    runs: bool = False
    heads: Callable[[Config], Heads] = plain_heads
    inner: Callable[[Config], int] = plain_inner
    depth: Callable[[Config], int] = plain_depth
    rope: Callable[[ModelSpec, Config], tuple[RopeTable, ...]] = rope.plain
    defaults: Mapping[str, Any] = field(default_factory=dict)
    spelling: Mapping[str, str] = field(default_factory=dict)
    oddities: tuple[str, ...] = ()


def kv_caches(spec: ModelSpec, windows: tuple[int | None, ...]) -> Caches:
    """K and V of every KV head, in layers that see the `windows`."""
    width = 2 * spec.num_kv_heads * spec.head_dim
    return tuple(LayerCache(width, window, heads=spec.num_kv_heads) for window in windows)


def full(spec: ModelSpec, config: Config) -> Caches:
    """Every layer sees everything."""
    return kv_caches(spec, _no_layer_types(config, (None,) * spec.num_layers))


def all_slide(spec: ModelSpec, config: Config) -> Caches:
    """Every layer slides where the config has a window."""
    window = config.optional_size("sliding_window")
    return kv_caches(spec, _no_layer_types(config, (window,) * spec.num_layers))


def slide_if_used(spec: ModelSpec, config: Config) -> Caches:
    """Every layer slides, if sliding is switched on."""
    return all_slide(spec, config) if config.flag("use_sliding_window") else full(spec, config)


def _no_layer_types(config: Config, windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    types = config.names("layer_types", len(windows), ("full_attention", "sliding_attention"))
    wanted = ["full_attention" if window is None else "sliding_attention" for window in windows]
    if types is not None and types != wanted:
        raise ModelError("The model's config has 'layer_types', which its family does not use.")
    return windows


def by_type(spec: ModelSpec, config: Config, slides: list[bool], window: int | None) -> Caches:
    """Some layers slide; an explicit `layer_types` goes before the family's rule."""
    types = config.names("layer_types", spec.num_layers, ("sliding_attention", "full_attention"))
    if types is not None:
        slides = [kind == "sliding_attention" for kind in types]
    return kv_caches(spec, tuple(window if slide else None for slide in slides))


def periodic(spec: ModelSpec, config: Config, period: int) -> Caches:
    """Every `period`-th layer sees everything, the others slide."""
    slides = [bool((layer + 1) % period) for layer in range(spec.num_layers)]
    return by_type(spec, config, slides, config.optional_size("sliding_window"))


def state_bytes(spec: ModelSpec, columns: int, kernel: int, recurrent: int) -> int:
    """Bytes of a convolution over `columns` and of a recurrent state of that many numbers, as
    transformers 5.23 keeps them: `kernel` columns in the model's dtype (vLLM one less)."""
    return columns * kernel * DTYPE_BYTES[spec.dtype] + recurrent * STATE_BYTES


def grown(spec: ModelSpec) -> LayerCache:
    """The cache of a layer with K and V."""
    return LayerCache(2 * spec.num_kv_heads * spec.head_dim, heads=spec.num_kv_heads)


def linear(
    name: str, out: int, width: int, layers: Layers, bias: bool = False, role: Role = "linear"
) -> Tensors:
    """A projection ``[out, in]`` of `layers`, with its bias."""
    yield TensorSpec(f"{name}.weight", (out, width), role, layers)
    if bias:
        yield TensorSpec(f"{name}.bias", (out,), "other", layers)


def vector(name: str, width: int, layers: Layers = ()) -> TensorSpec:
    """Some numbers that no quantizer touches."""
    return TensorSpec(name, (width,), "other", layers)


def norms(prefix: str, names: tuple[str, ...], width: int, layers: Layers) -> Tensors:
    """RMS norms of one width."""
    for name in names:
        yield vector(f"{prefix}.{name}.weight", width, layers)


def layer_norm(name: str, width: int, layers: Layers = ()) -> Tensors:
    """A norm with weight and bias."""
    yield vector(f"{name}.weight", width, layers)
    yield vector(f"{name}.bias", width, layers)


def ends(spec: ModelSpec, embedding: str = "model.embed_tokens.weight") -> Tensors:
    """Token embedding, and the output head where it is a weight of its own."""
    shape = (spec.vocab_size, spec.hidden_size)
    yield TensorSpec(embedding, shape, "embedding")
    if not spec.tie_embeddings:
        yield TensorSpec("lm_head.weight", shape, "head")


def attention(
    spec: ModelSpec,
    layers: Layers,
    prefix: str = ATTENTION,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: bool = False,
    query_gate: bool = False,
) -> Tensors:
    """Query, key, value and output projections; `qk_norm` is one for each head's numbers, and
    with `query_gate` the query projection makes a gate of the output too."""
    hidden, queries = spec.hidden_size, spec.num_heads * spec.head_dim
    keys = spec.num_kv_heads * spec.head_dim
    gated = 2 * queries if query_gate else queries
    yield from linear(f"{prefix}.q_proj", gated, hidden, layers, qkv_bias)
    yield from linear(f"{prefix}.k_proj", keys, hidden, layers, qkv_bias)
    yield from linear(f"{prefix}.v_proj", keys, hidden, layers, qkv_bias)
    yield from linear(f"{prefix}.o_proj", hidden, queries, layers, output_bias)
    if qk_norm:
        yield from norms(prefix, ("q_norm", "k_norm"), spec.head_dim, layers)


def gated_mlp(prefix: str, hidden: int, inner: int, layers: Layers, bias: bool = False) -> Tensors:
    """Gate, up and down projections."""
    yield from linear(f"{prefix}.gate_proj", inner, hidden, layers, bias)
    yield from linear(f"{prefix}.up_proj", inner, hidden, layers, bias)
    yield from linear(f"{prefix}.down_proj", hidden, inner, layers, bias)
