"""Attention on CPU: torch's flash kernel over each piece where it lies, joined by log-sum-exp.

The operator is the one that scaled_dot_product_attention takes on CPU; called directly it returns
the log-sum-exp too, and it takes grouped query heads without copies of K and V.
"""

from functools import lru_cache
from itertools import groupby
from operator import attrgetter

import torch

from ullage.kv.kernels import Joined, Piece, reference, threads
from ullage.specs.tiles import LEAST_TILE_TOKENS, TILE_TOKENS

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
# Entries, each KV head's counted: for fewer, threads of ours cost more than they bring
SHARED_TOKENS = 4096
UNSHARED_NUMBERS = 32768  # torch's own grain


def attend(
    query: torch.Tensor, pieces: list[Piece], scale: float, softcap: float | None = None
) -> torch.Tensor:
    """See `ullage.kv.kernels.Kernel`."""
    if softcap is not None:  # the flash kernel has no cap
        return reference.attend(query, pieces, scale, softcap)
    apart = [(heads, list(own)) for heads, own in groupby(pieces, attrgetter("heads"))]
    if _cover_all([heads for heads, _ in apart], query.shape[0]):
        return torch.cat(_each(query, apart, scale))
    joined = Joined(query)
    for piece in pieces:
        for tile in _tiles(query, piece, TILE_TOKENS):
            joined.add(piece.heads, *_part(tile.asked(query), tile, scale))
    return joined.output


def _each(
    query: torch.Tensor, apart: list[tuple[slice, list[Piece]]], scale: float
) -> list[torch.Tensor]:
    """Of each group of query heads over its own pieces; on threads where that pays, as a single
    token's attention is too little to be shared out within a group."""
    sizes = [sum(piece.keys.shape[0] * len(piece) for piece in own) for _, own in apart]
    among = threads.count(len(apart)) if query.shape[1] == 1 and sum(sizes) >= SHARED_TOKENS else 1
    tile_tokens = max(LEAST_TILE_TOKENS, TILE_TOKENS // among)  # so that all have a tile's scratch

    def attended(index: int) -> torch.Tensor:
        heads, own = apart[index]
        return _attend_all(query[heads], own, scale, tile_tokens)

    if among > 1:
        return threads.on_threads(attended, sizes, among)
    return [attended(index) for index in range(len(apart))]


def _cover_all(spans: list[slice | None], heads: int) -> bool:
    """Whether `spans` are all of `heads` query heads, each once and in order."""
    end = 0
    for span in spans:
        if span is None or span.start != end:
            return False
        end = span.stop
    return end == heads


def _attend_all(
    query: torch.Tensor, pieces: list[Piece], scale: float, tile_tokens: int
) -> torch.Tensor:
    """Attention of `query`, all of whose heads see all of `pieces`."""
    tiles = [tile for piece in pieces for tile in _tiles(query, piece, tile_tokens)]
    if len(tiles) == 1:
        return _flash(_own(query, tiles[0]), tiles[0], scale)[0]
    if len(tiles) == 2 and _is_small(query, tiles[0]):
        few, rest = tiles
        return _beside_few(query, few, scale, *_part(_own(query, rest), rest, scale))
    joined = Joined(query)
    for tile in tiles:
        joined.add(None, *_part(_own(query, tile), tile, scale))
    return joined.output


def _is_small(query: torch.Tensor, tile: Piece) -> bool:
    """Whether it is a token's attention to so little that torch shares none of its sums out among
    threads, which would have to be woken for it."""
    alone = query.shape[1] == 1 and tile.mask is None and tile.query is None
    return alone and query.shape[0] * len(tile) * query.shape[2] < UNSHARED_NUMBERS


def _beside_few(
    query: torch.Tensor, few: Piece, scale: float, output: torch.Tensor, lse: torch.Tensor
) -> torch.Tensor:
    """A token's attention to `few` entries and to others, of which `_part` gave output and
    log-sum-exp. The few of all KV heads are asked as those of one head, each hidden from other
    heads' queries: torch shares a call out among threads by its heads, and would wake them."""
    kv_heads, tokens, head_dim = few.keys.shape
    if kv_heads == 1:
        seen = _bias(few, query.dtype)
    else:
        seen = _own_head(kv_heads, query.shape[0] // kv_heads, tokens, few.bias, query.dtype)
    read, read_lse = _ATTENTION(
        query.view(1, 1, -1, head_dim),
        few.keys_in(query.dtype).reshape(1, 1, -1, head_dim),
        few.values_in(query.dtype).reshape(1, 1, -1, head_dim),
        attn_mask=seen,
        scale=scale,
    )
    share = (read_lse.view_as(lse) - lse).sigmoid_().unsqueeze(-1)
    return output.lerp_(read.view(output.shape).float(), share).to(query.dtype)


@lru_cache(maxsize=16)  # by the bias itself, not by its numbers: layers and steps share it
def _own_head(
    kv_heads: int, group: int, tokens: int, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """What is added to the scores of queries with the entries of all KV heads, [Hkv * G, Hkv * T]:
    the bias, [Hkv, 1, T], of their own; elsewhere what hides entries, as in `_bias`."""
    least = torch.finfo(dtype).min / 2
    seen = torch.full((kv_heads, group, kv_heads, tokens), least, dtype=dtype)
    for head in range(kv_heads):
        seen[head, :, head] = 0 if bias is None else bias[head].clamp(min=least)
    return seen.view(kv_heads * group, -1)


def _own(query: torch.Tensor, tile: Piece) -> torch.Tensor:
    """`query`, of the heads that see the tile, or what they ask it in its place."""
    return query if tile.query is None else tile.query


def _part(query: torch.Tensor, tile: Piece, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`_flash`, to be joined: in fp32."""
    output, lse = _flash(query, tile, scale)
    return output.float(), lse


def _flash(query: torch.Tensor, tile: Piece, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [Hq, N, D] and log-sum-exp [Hq, N] over one tile, read in the query's format."""
    bias = _bias(tile, query.dtype)
    packed = query.unsqueeze(0)
    if query.shape[1] == 1 and tile.mask is None:
        # a group's heads as queries of one head: their K and V are read once, in bf16 seven times
        # as fast
        packed = query.view(1, tile.keys.shape[0], -1, query.shape[2])  # [1, Hkv, G, D]
    elif bias is not None and bias.dim() == 4:
        bias = bias.repeat_interleave(query.shape[0] // bias.shape[1], dim=1)  # [1, Hq, N or 1, T]
    output, lse = _ATTENTION(
        packed,
        tile.keys_in(query.dtype).unsqueeze(0),
        tile.values_in(query.dtype).unsqueeze(0),
        is_causal=tile.causal and query.shape[1] > 1,
        attn_mask=bias,
        scale=scale,
    )
    return output.view(query.shape), lse.reshape(query.shape[:2])


def _bias(tile: Piece, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to a score: the piece's bias, [1, Hkv, N or 1, T]; or of its mask, [N, T],
    log 1 = 0 where a query sees an entry; elsewhere far below any score, and yet a number, because
    a query may see none of a tile."""
    least = torch.finfo(dtype).min / 2
    if tile.bias is not None:
        return tile.bias.clamp(min=least).to(dtype).unsqueeze(0)
    return None if tile.mask is None else tile.mask.to(dtype).log_().clamp_(min=least)


def _tiles(query: torch.Tensor, piece: Piece, most: int) -> list[Piece]:
    """The piece as views: whole where it is in the query's format, else `most` entries, which are
    converted at once. What has a mask is no longer than a chunk and its window."""
    if piece.keys.dtype == query.dtype or piece.causal or piece.mask is not None:
        return [piece]
    return [piece.tile(slice(at, at + most)) for at in range(0, len(piece), most)]
