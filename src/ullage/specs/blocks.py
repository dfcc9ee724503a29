"""How many blocks of KV entries a sequence takes: one arithmetic for the planner and the pool."""

from ullage.specs.dtypes import DTYPE_BYTES, SCALE_BYTES, SCALED
from ullage.specs.model import LayerCache, ModelSpec

# Small enough that a sequence wastes under 1% of a thousand tokens, large enough that a block's
# bookkeeping is nothing beside its bytes.
BLOCK_TOKENS = 16


def layer_blocks(model: ModelSpec, layer: int, tokens: int) -> int:
    """Blocks that one sequence of `tokens` takes in one layer, over all of its KV heads. A sliding
    layer keeps its window and no more."""
    cache = model.caches[layer]
    heads = -(-cache.width // (2 * model.head_dim))
    return heads * -(-cache.kept_tokens(tokens) // BLOCK_TOKENS)


def sequence_blocks(model: ModelSpec, tokens: int) -> int:
    """Blocks that one sequence of `tokens` takes in all layers."""
    return sum(layer_blocks(model, layer, tokens) for layer in range(model.num_layers))


def block_bytes(model: ModelSpec, kv_dtype: str) -> int:
    """Bytes of one block: K and V of `BLOCK_TOKENS` tokens for one KV head."""
    return BLOCK_TOKENS * entry_bytes(model, 2 * model.head_dim, kv_dtype)


def entry_bytes(model: ModelSpec, width: int, kv_dtype: str) -> int:
    """Bytes of the `width` numbers that a layer keeps of one token; in int8 and fp8 every K and
    V of a KV head has a scale."""
    if kv_dtype in SCALED:
        return width + -(-width // model.head_dim) * SCALE_BYTES
    return width * DTYPE_BYTES[kv_dtype]


def full_layer_numbers(model: ModelSpec) -> list[int]:
    """The layers that keep K and V of every token, head by head: what techniques for KV entries act
    on. Sliding layers keep few, latent attention has no heads in its cache."""
    return [layer for layer, cache in enumerate(model.caches) if _is_full(model, cache)]


def full_layers(model: ModelSpec) -> int:
    """How many such layers there are."""
    return sum(count for cache, count in model.cache_kinds if _is_full(model, cache))


def _is_full(model: ModelSpec, cache: LayerCache) -> bool:
    return cache.window is None and cache.width == 2 * model.num_kv_heads * model.head_dim


def dense_layer_bytes(model: ModelSpec, tokens: int, kv_dtype: str) -> int:
    """Bytes that `tokens` of one sequence take in one such layer."""
    return model.num_kv_heads * -(-tokens // BLOCK_TOKENS) * block_bytes(model, kv_dtype)


def sequence_bytes(model: ModelSpec, tokens: int, kv_dtype: str) -> int:
    """Bytes of one sequence of `tokens`, in whole blocks, and of its state that does not grow."""
    grown_bytes = sum(
        entry_bytes(model, cache.width, kv_dtype)
        * -(-cache.kept_tokens(tokens) // BLOCK_TOKENS)
        * BLOCK_TOKENS
        for cache in model.caches
    )
    return grown_bytes + model.state_bytes
