"""Attention as it is defined, in plain torch, on any device. Clear before fast."""

import torch

from ullage.kv.kernels import Piece


def attend(
    query: torch.Tensor, pieces: list[Piece], scale: float, softcap: float | None = None
) -> torch.Tensor:
    """See `ullage.kv.kernels.Kernel`. Builds the whole score matrix, [Hq, N, T] in fp32."""
    scores = torch.cat([_scores(query, piece, scale, softcap) for piece in pieces], dim=-1)
    weights = scores.softmax(dim=-1)
    values = torch.cat([_to_query_heads(piece.values, query) for piece in pieces], dim=1)
    return (weights @ values).to(query.dtype)  # [Hq, N, D]


def _scores(query: torch.Tensor, piece: Piece, scale: float, softcap: float | None) -> torch.Tensor:
    keys = _to_query_heads(piece.keys, query)  # [Hq, T, D]
    scores = (query.float() @ keys.transpose(1, 2)) * scale  # [Hq, N, T]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = piece.mask
    if piece.causal:
        mask = torch.ones(scores.shape[1:], dtype=torch.bool, device=query.device).tril()
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def _to_query_heads(entries: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Each KV head serves a group of consecutive query heads."""
    return entries.float().repeat_interleave(query.shape[0] // entries.shape[0], dim=0)
