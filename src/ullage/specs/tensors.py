"""Every tensor of a model, by family: names and shapes of the state_dict of transformers' causal-LM
class. ``{}`` stands for the layer's number; a linear weight is ``[out, in]``."""

from collections.abc import Iterator

from ullage.specs.config import Config
from ullage.specs.model import ModelSpec, TensorSpec

Tensors = Iterator[TensorSpec]

_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _linear(spec: ModelSpec, name: str, out: int, width: int, bias: bool = False) -> Tensors:
    """A projection that every layer has, ``[out, in]``, with its bias."""
    yield TensorSpec(f"{name}.weight", (out, width), "linear", spec.all_layers)
    if bias:
        yield TensorSpec(f"{name}.bias", (out,), "other", spec.all_layers)


def _norms(spec: ModelSpec, prefix: str, names: tuple[str, ...], width: int) -> Tensors:
    for name in names:
        yield TensorSpec(f"{prefix}.{name}.weight", (width,), "other", spec.all_layers)


def _layer_norm(name: str, width: int, layers: tuple[int, ...] = ()) -> Tensors:
    yield TensorSpec(f"{name}.weight", (width,), "other", layers)
    yield TensorSpec(f"{name}.bias", (width,), "other", layers)


def _ends(spec: ModelSpec, embedding: str) -> Tensors:
    """Token embedding, and the output head where it is a weight of its own."""
    shape = (spec.vocab_size, spec.hidden_size)
    yield TensorSpec(embedding, shape, "embedding")
    if not spec.tie_embeddings:
        yield TensorSpec("lm_head.weight", shape, "head")


def _decoder(
    spec: ModelSpec,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    norms: tuple[str, ...] = _TWO_NORMS,
) -> Tensors:
    """What Llama and its relatives share; they differ in biases and norms."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention, mlp = "model.layers.{}.self_attn", "model.layers.{}.mlp"
    yield from _ends(spec, "model.embed_tokens.weight")
    yield from _linear(spec, f"{attention}.q_proj", queries, hidden, qkv_bias)
    yield from _linear(spec, f"{attention}.k_proj", keys, hidden, qkv_bias)
    yield from _linear(spec, f"{attention}.v_proj", keys, hidden, qkv_bias)
    yield from _linear(spec, f"{attention}.o_proj", hidden, queries, output_bias)
    yield from _linear(spec, f"{mlp}.gate_proj", inner, hidden, mlp_bias)
    yield from _linear(spec, f"{mlp}.up_proj", inner, hidden, mlp_bias)
    yield from _linear(spec, f"{mlp}.down_proj", hidden, inner, mlp_bias)
    if qk_norm:
        yield from _norms(spec, attention, ("q_norm", "k_norm"), spec.head_dim)
    yield from _norms(spec, "model.layers.{}", norms, hidden)
    yield TensorSpec("model.norm.weight", (hidden,), "other")


def llama(spec: ModelSpec, config: Config) -> Tensors:
    """Llama 1 to 3 and all that copied it; biases are the config's choice."""
    bias = config.flag("attention_bias")
    return _decoder(spec, qkv_bias=bias, output_bias=bias, mlp_bias=config.flag("mlp_bias"))


def mistral(spec: ModelSpec, config: Config) -> Tensors:
    """Llama without the choice of biases."""
    return _decoder(spec)


def qwen2(spec: ModelSpec, config: Config) -> Tensors:
    """Llama with biases on q, k and v alone."""
    return _decoder(spec, qkv_bias=True)


def qwen3(spec: ModelSpec, config: Config) -> Tensors:
    """Llama with a norm on each query and key head."""
    bias = config.flag("attention_bias")
    return _decoder(spec, qkv_bias=bias, output_bias=bias, qk_norm=True)


def gemma(spec: ModelSpec, config: Config) -> Tensors:
    """Llama, usually with a tied head."""
    bias = config.flag("attention_bias")
    return _decoder(spec, qkv_bias=bias, output_bias=bias)


def gemma2(spec: ModelSpec, config: Config) -> Tensors:
    """Gemma with norms after attention and MLP too."""
    bias = config.flag("attention_bias")
    return _decoder(spec, qkv_bias=bias, output_bias=bias, norms=_FOUR_NORMS)


def gemma3(spec: ModelSpec, config: Config) -> Tensors:
    """Gemma 2 with a norm on each query and key head."""
    bias = config.flag("attention_bias")
    return _decoder(spec, qkv_bias=bias, output_bias=bias, qk_norm=True, norms=_FOUR_NORMS)


def phi3(spec: ModelSpec, config: Config) -> Tensors:
    """Llama with q, k, v in one weight and gate, up in another."""
    hidden, inner, queries = (
        spec.hidden_size,
        spec.intermediate_size,
        spec.num_heads * spec.head_dim,
    )
    attention, mlp = "model.layers.{}.self_attn", "model.layers.{}.mlp"
    yield from _ends(spec, "model.embed_tokens.weight")
    yield from _linear(spec, f"{attention}.qkv_proj", queries + spec.kv_width, hidden)
    yield from _linear(spec, f"{attention}.o_proj", hidden, queries)
    yield from _linear(spec, f"{mlp}.gate_up_proj", 2 * inner, hidden)
    yield from _linear(spec, f"{mlp}.down_proj", hidden, inner)
    yield from _norms(spec, "model.layers.{}", _TWO_NORMS, hidden)
    yield TensorSpec("model.norm.weight", (hidden,), "other")


def phi(spec: ModelSpec, config: Config) -> Tensors:
    """Biases everywhere, the output head's included; one norm serves attention and MLP."""
    hidden, inner, layer = spec.hidden_size, spec.intermediate_size, "model.layers.{}"
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = f"{layer}.self_attn"
    yield from _ends(spec, "model.embed_tokens.weight")
    yield TensorSpec("lm_head.bias", (spec.vocab_size,), "other")
    yield from _linear(spec, f"{attention}.q_proj", queries, hidden, bias=True)
    yield from _linear(spec, f"{attention}.k_proj", keys, hidden, bias=True)
    yield from _linear(spec, f"{attention}.v_proj", keys, hidden, bias=True)
    yield from _linear(spec, f"{attention}.dense", hidden, queries, bias=True)
    yield from _linear(spec, f"{layer}.mlp.fc1", inner, hidden, bias=True)
    yield from _linear(spec, f"{layer}.mlp.fc2", hidden, inner, bias=True)
    if config.flag("qk_layernorm"):
        yield from _layer_norm(f"{attention}.q_layernorm", spec.head_dim, spec.all_layers)
        yield from _layer_norm(f"{attention}.k_layernorm", spec.head_dim, spec.all_layers)
    yield from _layer_norm(f"{layer}.input_layernorm", hidden, spec.all_layers)
    yield from _layer_norm("model.final_layernorm", hidden)


def gpt2(spec: ModelSpec, config: Config) -> Tensors:
    """Its projections are Conv1D, ``[in, out]``, which no quantizer of nn.Linear converts."""
    hidden, inner, layer = spec.hidden_size, spec.intermediate_size, "transformer.h.{}"
    yield from _ends(spec, "transformer.wte.weight")
    yield TensorSpec("transformer.wpe.weight", (spec.max_context_tokens, hidden), "embedding")
    for name, width, out in (
        ("attn.c_attn", hidden, 3 * hidden),
        ("attn.c_proj", hidden, hidden),
        ("mlp.c_fc", hidden, inner),
        ("mlp.c_proj", inner, hidden),
    ):
        yield TensorSpec(f"{layer}.{name}.weight", (width, out), "other", spec.all_layers)
        yield TensorSpec(f"{layer}.{name}.bias", (out,), "other", spec.all_layers)
    for name in ("ln_1", "ln_2"):
        yield from _layer_norm(f"{layer}.{name}", hidden, spec.all_layers)
    yield from _layer_norm("transformer.ln_f", hidden)
