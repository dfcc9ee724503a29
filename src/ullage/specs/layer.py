"""How many numbers a token takes in a forward pass of transformers' modules, at the widest place of
a layer: one arithmetic for the planner and for techniques that run the model."""

from functools import lru_cache

from ullage.specs.model import ModelSpec


@lru_cache  # a search would count the cache kinds each time
def always_width(model: ModelSpec) -> int:
    """Those that live through all layers: the embedded tokens, and their embedded positions or the
    rotary cosines and sines, of which sliding and full layers may have their own."""
    if _learns_positions(model):
        return 2 * model.hidden_size
    tables = len({cache.window is None for cache, _ in model.cache_kinds})
    return model.hidden_size + 2 * model.head_dim * max(1, tables)


def attention_width(model: ModelSpec) -> int:
    """In attention: the layer's input and its normed copy; then q, q cos, rotated q and their sum
    beside k and v."""
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return always_width(model) + 2 * model.hidden_size + 4 * heads + 2 * kv_heads


def mlp_width(model: ModelSpec) -> int:
    """In the MLP: the layer's input, residual and its normed copy; GPT-2's block keeps the
    attention's output too."""
    kept = 4 if _learns_positions(model) else 3
    inner = _mlp_copies(model) * model.intermediate_size
    return always_width(model) + kept * model.hidden_size + inner


def layer_width(model: ModelSpec) -> int:
    """The larger of the two."""
    return max(attention_width(model), mlp_width(model))


@lru_cache  # a search would go through the names of all tensors each time
def _learns_positions(model: ModelSpec) -> bool:
    return any(tensor.name.endswith("wpe.weight") for tensor in model.tensors)


@lru_cache
def _mlp_copies(model: ModelSpec) -> int:
    """How many of the MLP's widths live together: gated, act(gate), up and their product, and the
    gate itself where one projection makes gate and up; plain, the terms of gelu_new's
    polynomial."""
    fused = any("gate_up_proj" in tensor.name for tensor in model.tensors)
    return 3 if model.gated_mlp and not fused else 4
