"""Attention under a soft mask, for training: an entry that leaves its head's window is seen as far
as the head wants to keep it (arXiv 2506.05345, section 3.2).

Neither scores nor masks are ever there for more than some queries at a time: both ways they are
computed anew, from states and the log-sum-exp of each query.
"""

from collections.abc import Iterator
from typing import Any

import torch

ROWS = 128  # queries at once


class SoftAttention(torch.autograd.Function):
    """Causal attention [Hq, T, D] of `query` [Hq, T, D] over `keys` and `values`, [Hkv, T, D].

    `keep`: [Hkv, T], at most 0, is added to the scaled score of an entry that is `windows` [Hkv]
    tokens old or older: the logarithm of the share of it that is left.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        keep: torch.Tensor,
        windows: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        output = torch.empty_like(query)
        lse = query.new_empty(query.shape[:2])
        for at, scores, _ in _tiles(query, keys, keep, windows, scale):
            summed = scores.logsumexp(-1)  # [Hkv, G * N]
            weights = scores.sub_(summed[..., None]).exp_()
            _of(lse, at, keys).copy_(summed.view(keys.shape[0], -1, len(at)))
            mixed = weights @ values[:, : scores.shape[-1]]
            _of(output, at, keys).copy_(mixed.view(keys.shape[0], -1, len(at), mixed.shape[-1]))
        ctx.save_for_backward(query, keys, values, keep, windows, output, lse)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, keys, values, keep, windows, output, lse = ctx.saved_tensors
        to_query, to_keys = torch.empty_like(query), torch.zeros_like(keys)
        to_values, to_keep = torch.zeros_like(values), torch.zeros_like(keep)
        heads, _, width = keys.shape
        delta = (gradient * output).sum(-1)  # [Hq, T]
        for at, scores, far in _tiles(query, keys, keep, windows, ctx.scale):
            seen = scores.shape[-1]
            rows = (heads, -1)
            weights = scores.sub_(_of(lse, at, keys).reshape(*rows, 1)).exp_()
            pulled = _of(gradient, at, keys).reshape(*rows, width)
            to_values[:, :seen] += weights.transpose(1, 2) @ pulled
            change = pulled @ values[:, :seen].transpose(1, 2)
            change.sub_(_of(delta, at, keys).reshape(*rows, 1)).mul_(weights)
            moved = (change @ keys[:, :seen]).mul_(ctx.scale)
            _of(to_query, at, keys).copy_(moved.view(heads, -1, len(at), width))
            asked = _of(query, at, keys).reshape(*rows, width)
            to_keys[:, :seen] += (change.transpose(1, 2) @ asked).mul_(ctx.scale)
            by_query = change.view(heads, -1, len(at), seen).sum(1)
            to_keep[:, :seen] += by_query.mul_(far).sum(1)
        return to_query, to_keys, to_values, to_keep, None, None


def _of(states: torch.Tensor, at: range, keys: torch.Tensor) -> torch.Tensor:
    """The queries `at` of [Hq, T, ...] as a view [Hkv, G, N, ...]."""
    grouped = states.view(keys.shape[0], -1, *states.shape[1:])
    return grouped[:, :, at.start : at.stop]


def _tiles(
    query: torch.Tensor,
    keys: torch.Tensor,
    keep: torch.Tensor,
    windows: torch.Tensor,
    scale: float,
) -> Iterator[tuple[range, torch.Tensor, torch.Tensor]]:
    """For some queries at a time, N: which; their masked scores over the S entries up to the last
    of them, [Hkv, G * N, S]; and which entries are beyond the window, bool [Hkv, N, S]."""
    heads, tokens, width = keys.shape
    for start in range(0, tokens, ROWS):
        at = range(start, min(start + ROWS, tokens))
        asked = _of(query, at, keys).reshape(heads, -1, width)
        scores = (asked @ keys[:, : at.stop].transpose(1, 2)).mul_(scale)
        entry = torch.arange(at.stop, device=keys.device)
        age = torch.arange(at.start, at.stop, device=keys.device)[:, None] - entry  # [N, S]
        far = age >= windows[:, None, None]  # [Hkv, N, S]
        by_query = scores.view(heads, -1, len(at), at.stop)
        by_query += (far * keep[:, None, : at.stop])[:, None]
        by_query.masked_fill_(age < 0, float("-inf"))
        yield at, scores, far
