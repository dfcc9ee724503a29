"""Attention as it is defined, in plain torch and fp32, on any device. Clear before fast.

Scores are built for a tile of entries at a time and overwritten in place: the whole matrix,
[Hq, N, T], would grow with the context.
"""

import torch

from ullage.kv.entries import Entries
from ullage.kv.kernels import Joined, Piece
from ullage.specs.tiles import tile_tokens

_FP32 = torch.finfo(torch.float32)


def attend(
    query: torch.Tensor, pieces: list[Piece], scale: float, softcap: float | None = None
) -> torch.Tensor:
    """See `ullage.kv.kernels.Kernel`."""
    size = tile_tokens(query.shape[0] * query.shape[1])
    joined = Joined(query)
    for piece in pieces:
        seeing = piece.asked(query)
        for start in range(0, piece.keys.shape[1], size):
            tile = slice(start, start + size)
            joined.add(piece.heads, *_attend_tile(seeing, piece, tile, scale, softcap))
    return joined.output


def _attend_tile(
    query: torch.Tensor, piece: Piece, span: slice, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [Hq, N, D] and log-sum-exp [Hq, N] over the entries in `span`; zeros and a number near
    fp32's lowest for a query that sees none of them."""
    tile = piece.part(span)
    scores = _scores(query, tile, scale, softcap)  # [Hkv, G N, T]
    if piece.bias is not None:
        bias = piece.bias[:, None, :, span]  # [Hkv, 1, N or 1, T]
        scores.view(len(bias), -1, query.shape[1], scores.shape[-1]).add_(bias)
    hidden = _hidden(piece, span)
    if hidden is not None:
        scores.view(*query.shape[:2], -1).masked_fill_(hidden, float("-inf"))
    highest = scores.amax(dim=-1, keepdim=True).clamp_(min=_FP32.min)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(dim=-1, keepdim=True).clamp_(min=_FP32.tiny)
    output = (weights @ tile.values_in(torch.float32)).div_(total)
    return output.view(query.shape), highest.add_(total.log_()).view(query.shape[:2])


def _scores(
    query: torch.Tensor, tile: Entries, scale: float, softcap: float | None
) -> torch.Tensor:
    """Each KV head's scores with the group of query heads that it serves, [Hkv, G N, T]."""
    heads, _, head_dim = tile.keys.shape
    grouped = query.to(torch.float32, memory_format=torch.contiguous_format)
    keys = tile.keys_in(torch.float32)
    scores = grouped.reshape(heads, -1, head_dim) @ keys.transpose(1, 2)
    scores.mul_(scale)
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _hidden(piece: Piece, span: slice) -> torch.Tensor | None:
    """Bool [N, T], True where a query does not see an entry; None when all see all."""
    if piece.mask is not None:
        return ~piece.mask[:, span]
    if not piece.causal:
        return None
    positions = torch.arange(piece.keys.shape[1], device=piece.keys.device)
    return positions[span][None, :] > positions[:, None]
