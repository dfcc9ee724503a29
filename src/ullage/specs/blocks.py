"""How many blocks of KV entries a sequence takes: one arithmetic for the planner and the pool."""

from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.model import ModelSpec

# Small enough that a sequence wastes under 1% of a thousand tokens, large enough that a block's
# bookkeeping is nothing beside its bytes.
BLOCK_TOKENS = 16


def layer_blocks(model: ModelSpec, layer: int, tokens: int) -> int:
    """Blocks that one sequence of `tokens` takes in one layer, over all of its KV heads. A sliding
    layer keeps its window and no more."""
    window = model.windows[layer]
    kept_tokens = tokens if window is None else min(tokens, window)
    return model.num_kv_heads * -(-kept_tokens // BLOCK_TOKENS)


def sequence_blocks(model: ModelSpec, tokens: int) -> int:
    """Blocks that one sequence of `tokens` takes in all layers."""
    return sum(layer_blocks(model, layer, tokens) for layer in range(model.num_layers))


def block_bytes(model: ModelSpec, kv_dtype: str) -> int:
    """Bytes of one block: K and V of `BLOCK_TOKENS` tokens for one KV head."""
    return 2 * BLOCK_TOKENS * model.head_dim * DTYPE_BYTES[kv_dtype]
