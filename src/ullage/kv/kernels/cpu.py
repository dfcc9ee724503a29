"""Attention on CPU: torch's flash kernel over each piece where it lies, joined by log-sum-exp.

The operator is the one that scaled_dot_product_attention takes on CPU; called directly it returns
the log-sum-exp too, and it takes grouped query heads without copies of K and V.
"""

from dataclasses import replace
from itertools import groupby
from operator import attrgetter

import torch

from ullage.kv.kernels import Joined, Piece, reference
from ullage.specs.tiles import TILE_TOKENS


def attend(
    query: torch.Tensor, pieces: list[Piece], scale: float, softcap: float | None = None
) -> torch.Tensor:
    """See `ullage.kv.kernels.Kernel`."""
    if softcap is not None:  # the flash kernel has no cap
        return reference.attend(query, pieces, scale, softcap)
    tiles = [tile for piece in pieces for tile in _tiles(query, piece)]
    apart = [(heads, list(own)) for heads, own in groupby(tiles, attrgetter("heads"))]
    if _side_by_side([heads for heads, _ in apart], query.shape[0]):
        return torch.cat([_joined(query[heads], own, scale) for heads, own in apart])
    joined = Joined(query)
    for tile in tiles:
        seeing = query if tile.heads is None else query[tile.heads]
        joined.add(tile.heads, *_flash(seeing, tile, scale))
    return joined.output


def _side_by_side(spans: list[slice | None], heads: int) -> bool:
    """Whether `spans` are all of `heads` query heads, each once and in order."""
    end = 0
    for span in spans:
        if span is None or span.start != end:
            return False
        end = span.stop
    return end == heads


def _joined(query: torch.Tensor, tiles: list[Piece], scale: float) -> torch.Tensor:
    """Attention of `query`, all of whose heads see all of `tiles`."""
    joined = Joined(query)
    for tile in tiles:
        joined.add(None, *_flash(query, tile, scale))
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
    return [replace(Piece.of(part), heads=piece.heads) for part in parts]
