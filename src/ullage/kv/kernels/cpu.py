"""Attention on CPU: torch's flash kernel over each piece where it lies, joined by log-sum-exp.

The operator is the one that scaled_dot_product_attention takes on CPU; called directly it returns
the log-sum-exp too, and it takes grouped query heads without copies of K and V.
"""

import torch

from ullage.kv.kernels import Joined, Piece, reference
from ullage.specs.tiles import TILE_TOKENS


def attend(
    query: torch.Tensor, pieces: list[Piece], scale: float, softcap: float | None = None
) -> torch.Tensor:
    """See `ullage.kv.kernels.Kernel`."""
    if softcap is not None:  # the flash kernel has no cap
        return reference.attend(query, pieces, scale, softcap)
    joined = Joined(query)
    for piece in pieces:
        seeing = query if piece.heads is None else query[piece.heads]
        for tile in _tiles(query, piece):
            joined.add(piece.heads, *_flash(seeing, tile, scale))
    return joined.output


def _flash(query: torch.Tensor, tile: Piece, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [Hq, N, D] in fp32 and log-sum-exp [Hq, N] over one tile, read in the query's
    format."""
    bias = None if tile.mask is None else _bias(tile.mask, query.dtype)
    packed = query
    if query.shape[1] == 1 and bias is None:
        # a group's heads as queries of one head: their K and V are read once, in bf16 seven times
        # as fast
        packed = query.reshape(tile.keys.shape[0], -1, query.shape[2])  # [Hkv, G, D]
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        packed[None],
        tile.keys_in(query.dtype)[None],
        tile.values_in(query.dtype)[None],
        is_causal=tile.causal and query.shape[1] > 1,
        attn_mask=bias,
        scale=scale,
    )
    return output[0].float().view(query.shape), lse[0].reshape(query.shape[:2])


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to a score, [N, T]: log 1 = 0 where a query sees an entry; elsewhere far below
    any score, and yet a number, because a query may see none of a tile."""
    return mask.to(dtype).log_().clamp_(min=torch.finfo(dtype).min / 2)


def _tiles(query: torch.Tensor, piece: Piece) -> list[Piece]:
    """The piece as views: whole where it is in the query's format, else as much as may be converted
    at once. What has a mask is no longer than a chunk and its window."""
    if piece.keys.dtype == query.dtype or piece.causal or piece.mask is not None:
        return [piece]
    starts = range(0, len(piece), TILE_TOKENS)
    parts = [piece.part(slice(start, start + TILE_TOKENS)) for start in starts]
    return [Piece.of(part) for part in parts]
