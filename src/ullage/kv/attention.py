"""The attention function and the mask function that transformers calls under the name "ullage"."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from ullage.kv.kernels import Kernel, Piece, cpu, reference
from ullage.kv.rows import NewTokens

if TYPE_CHECKING:
    from ullage.kv.cache import PagedLayer

NAME = "ullage"


def tag(keys: torch.Tensor, layer: "PagedLayer") -> torch.Tensor:
    """Mark new keys with the cache layer that holds their past: transformers hands attention the
    tensor that `Cache.update` returned, and nothing else of the cache."""
    keys.ullage_layer = layer  # type: ignore[attr-defined]
    return keys


@torch.no_grad()
def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of new tokens over a PagedCache. Without gradients: it is for inference.

    Args:
        query: [B, Hq, N, D]; key and value: [B, Hkv, N, D], new tokens only.
        attention_mask: None, or bool [B, >= N] of which the last N columns are False at padding.

    Returns:
        [B, N, Hq, D], and None for the attention weights, which are never built.

    Raises:
        RuntimeError: no PagedCache holds the past, or one of another number of sequences.
        BudgetExceeded: a sequence for which no room was reserved finds none in the pool.
    """
    layer: PagedLayer | None = getattr(key, "ullage_layer", None)
    if layer is None:
        raise RuntimeError("attention 'ullage' reads a PagedCache: pass one with cache_argument")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = query.new_zeros((query.shape[0], query.shape[2], query.shape[1], query.shape[3]))
    kernel = kernel_for(query.device)

    def attend(queries: torch.Tensor, pieces: list[Piece]) -> torch.Tensor:
        return kernel(queries, pieces, scale, softcap)

    new_tokens = query.shape[2]
    real = None if attention_mask is None else attention_mask[:, -new_tokens:]
    if real is not None and bool(real.all()):
        real = None  # as when tokens are written
    beside = layer.take_beside()
    for index, row in enumerate(layer.rows_of_step(query.shape[0], new_tokens)):
        told = (None if part is None else part[min(index, len(part) - 1)] for part in beside)
        new = NewTokens(query[index], key[index], value[index], scale, *told)
        if real is None:
            output[index] = row.attend(new, attend).transpose(0, 1)
            continue
        tokens = real[index].nonzero()[:, 0]
        if len(tokens):
            output[index, tokens] = row.attend(new.at(tokens), attend).transpose(0, 1)
    return output, None


def kernel_for(device: torch.device) -> Kernel:
    """The fastest kernel that there is for `device`. Triton comes with torch for CUDA, but not on
    Windows; for a CPU it is never imported, as it takes 80 MiB."""
    if device.type == "cpu":
        return cpu.attend
    if device.type == "cuda":
        with suppress(ImportError):
            from ullage.kv.kernels import triton

            return triton.attend
    return reference.attend


def register() -> None:
    """Make attention and mask known to transformers. Both: without the mask function padding would
    silently be attended to."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
