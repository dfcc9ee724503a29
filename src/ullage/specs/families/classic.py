"""Families that are built otherwise: Phi, GPT-2, Falcon and StarCoder2."""

from collections.abc import Mapping

from ullage.specs.config import Config
from ullage.specs.families import rope
from ullage.specs.families.base import (
    ATTENTION,
    MLP,
    TWO_NORMS,
    Family,
    Heads,
    Tensors,
    all_slide,
    attention,
    ends,
    full,
    layer_norm,
    linear,
    norms,
    split_evenly,
    vector,
)
from ullage.specs.model import ModelSpec, RopeTable, TensorSpec


def _phi3(spec: ModelSpec, config: Config) -> Tensors:
    """Llama with q, k, v in one weight and gate, up in another."""
    layers, hidden, inner = spec.all_layers, spec.hidden_size, spec.intermediate_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    yield from ends(spec)
    yield from linear(f"{ATTENTION}.qkv_proj", queries + 2 * keys, hidden, layers)
    yield from linear(f"{ATTENTION}.o_proj", hidden, queries, layers)
    yield from linear(f"{MLP}.gate_up_proj", 2 * inner, hidden, layers)
    yield from linear(f"{MLP}.down_proj", hidden, inner, layers)
    yield from norms("model.layers.{}", TWO_NORMS, hidden, layers)
    yield vector("model.norm.weight", hidden)


def _phi(spec: ModelSpec, config: Config) -> Tensors:
    """Biases everywhere, the output head's included; one norm serves attention and MLP."""
    layers, hidden, inner = spec.all_layers, spec.hidden_size, spec.intermediate_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    yield from ends(spec)
    yield vector("lm_head.bias", spec.vocab_size)
    for name, out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield from linear(f"{ATTENTION}.{name}", out, hidden, layers, bias=True)
    yield from linear(f"{ATTENTION}.dense", hidden, queries, layers, bias=True)
    yield from linear(f"{MLP}.fc1", inner, hidden, layers, bias=True)
    yield from linear(f"{MLP}.fc2", hidden, inner, layers, bias=True)
    if config.flag("qk_layernorm"):
        yield from layer_norm(f"{ATTENTION}.q_layernorm", spec.head_dim, layers)
        yield from layer_norm(f"{ATTENTION}.k_layernorm", spec.head_dim, layers)
    yield from layer_norm("model.layers.{}.input_layernorm", hidden, layers)
    yield from layer_norm("model.final_layernorm", hidden)


def _gpt2(spec: ModelSpec, config: Config) -> Tensors:
    """Its projections are Conv1D, ``[in, out]``, which no quantizer of nn.Linear converts."""
    hidden, inner, layer = spec.hidden_size, spec.intermediate_size, "transformer.h.{}"
    yield from ends(spec, "transformer.wte.weight")
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
        yield from layer_norm(f"{layer}.{name}", hidden, spec.all_layers)
    yield from layer_norm("transformer.ln_f", hidden)


def _gpt2_inner(config: Config) -> int:
    """null means four times the width."""
    return config.optional_size("intermediate_size") or 4 * config.size("hidden_size")


def _falcon(spec: ModelSpec, config: Config) -> Tensors:
    """q, k, v in one weight; one, two or three norms by how attention and MLP stand."""
    layers, hidden, inner = spec.all_layers, spec.hidden_size, spec.intermediate_size
    bias, layer = config.flag("bias"), "transformer.h.{}"
    rows = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    yield from ends(spec, "transformer.word_embeddings.weight")
    yield from linear(f"{layer}.self_attention.query_key_value", rows, hidden, layers, bias)
    yield from linear(f"{layer}.self_attention.dense", hidden, hidden, layers, bias)
    yield from linear(f"{layer}.mlp.dense_h_to_4h", inner, hidden, layers, bias)
    yield from linear(f"{layer}.mlp.dense_4h_to_h", hidden, inner, layers, bias)
    for name in _falcon_norms(config):
        yield from layer_norm(f"{layer}.{name}", hidden, layers)
    yield from layer_norm("transformer.ln_f", hidden)


def _falcon_norms(config: Config) -> tuple[str, ...]:
    new = config.flag("new_decoder_architecture")
    if new and (config.optional_size("num_ln_in_parallel_attn") or 2) == 2:
        return ("ln_attn", "ln_mlp")
    if new or config.flag("parallel_attn"):
        return ("input_layernorm",)
    return ("input_layernorm", "post_attention_layernorm")


def _falcon_heads(config: Config) -> Heads:
    """Grouped in the new architecture; before it one KV head, or as many as of queries."""
    heads = config.size("num_attention_heads")
    dim = split_evenly(config.size("hidden_size"), heads)
    if config.flag("new_decoder_architecture"):
        return Heads(heads, config.optional_size("num_kv_heads") or heads, dim)
    return Heads(heads, 1 if config.flag("multi_query") else heads, dim)


def _falcon_inner(config: Config) -> int:
    return config.optional_size("ffn_hidden_size") or 4 * config.size("hidden_size")


def _falcon_rope(spec: ModelSpec, config: Config) -> tuple[RopeTable, ...]:
    return () if config.flag("alibi") else rope.plain(spec, config)


def _starcoder2(spec: ModelSpec, config: Config) -> Tensors:
    """A plain MLP, and biases and layer norms everywhere."""
    layers, hidden, inner = spec.all_layers, spec.hidden_size, spec.intermediate_size
    bias = config.flag("use_bias")
    yield from ends(spec)
    yield from attention(spec, layers, qkv_bias=bias, output_bias=bias)
    yield from linear(f"{MLP}.c_fc", inner, hidden, layers, bias)
    yield from linear(f"{MLP}.c_proj", hidden, inner, layers, bias)
    for name in TWO_NORMS:
        yield from layer_norm(f"model.layers.{{}}.{name}", hidden, layers)
    yield from layer_norm("model.norm", hidden)


_GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}

FAMILIES: Mapping[str, Family] = {
    "phi": Family(
        "PhiForCausalLM",
        _phi,
        full,
        gated_mlp=False,
        runs=True,
        defaults={"partial_rotary_factor": 0.5},
    ),
    "phi3": Family("Phi3ForCausalLM", _phi3, all_slide, runs=True),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _gpt2,
        full,
        gated_mlp=False,
        runs=True,
        inner=_gpt2_inner,
        rope=rope.none,
        defaults={"tie_word_embeddings": True},
        spelling=_GPT2_KEYS,
    ),
    "falcon": Family(
        "FalconForCausalLM",
        _falcon,
        full,
        gated_mlp=False,
        heads=_falcon_heads,
        inner=_falcon_inner,
        rope=_falcon_rope,
        defaults={
            "multi_query": True,
            "parallel_attn": True,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    ),
    "starcoder2": Family(
        "Starcoder2ForCausalLM",
        _starcoder2,
        all_slide,
        gated_mlp=False,
        defaults={"num_key_value_heads": 2, "use_bias": True, "tie_word_embeddings": True},
    ),
}
