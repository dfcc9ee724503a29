"""Attention on CPU: torch's flash kernel over each piece where it lies, joined by log-sum-exp.

The operator is the one that scaled_dot_product_attention takes on CPU; called directly it returns
the log-sum-exp too, and it takes grouped query heads without copies of K and V.
"""

from collections.abc import Iterator

import torch

from ullage.kv.kernels import TILE_TOKENS, Piece, merge, reference


def attend(
    query: torch.Tensor, pieces: list[Piece], scale: float, softcap: float | None = None
) -> torch.Tensor:
    """See `ullage.kv.kernels.Kernel`."""
    if softcap is not None:  # the flash kernel has no cap
        return reference.attend(query, pieces, scale, softcap)
    parts = (_flash(query, tile, scale) for piece in pieces for tile in _tiles(query, piece))
    output, lse = next(parts)
    for other, other_lse in parts:
        output, lse = merge(output, lse, other, other_lse)
    return output.to(query.dtype)


def _flash(query: torch.Tensor, piece: Piece, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [Hq, N, D] in fp32 and log-sum-exp [Hq, N] over one piece."""
    mask = piece.mask
    if mask is not None:
        zeros = torch.zeros(mask.shape, dtype=query.dtype)
        mask = zeros.masked_fill_(~mask, float("-inf"))
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None],
        piece.keys[None],
        piece.values[None],
        is_causal=piece.causal,
        attn_mask=mask,
        scale=scale,
    )
    return output[0].float(), lse[0]


def _tiles(query: torch.Tensor, piece: Piece) -> Iterator[Piece]:
    """The piece in the query's format: as it is, or converted a tile at a time."""
    if piece.keys.dtype == query.dtype:
        yield piece
    elif piece.causal or piece.mask is not None:  # no longer than a chunk and its window
        yield Piece(
            piece.keys.to(query.dtype), piece.values.to(query.dtype), piece.causal, piece.mask
        )
    else:
        for start in range(0, piece.keys.shape[1], TILE_TOKENS):
            span = slice(start, start + TILE_TOKENS)
            yield Piece(piece.keys[:, span].to(query.dtype), piece.values[:, span].to(query.dtype))
