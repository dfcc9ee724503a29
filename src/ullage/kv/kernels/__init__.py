"""Attention over pieces of stored KV entries. One signature, one home a device:

    attend(query, pieces, scale, softcap) -> output

reference.py is the definition that the tests hold the others to. Every kernel attends to a tile of
entries at a time and joins what it gets, so that its scratch is bounded however many there are;
planner/engines/attention.py plans that scratch.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Piece:
    """Entries that a query attends to: K and V, [Hkv, T, D] each, in the pool's format.

    `causal`: the entries are the queries' own, T = N, and a query sees those up to itself. `mask`:
    bool [N, T], True where a query sees an entry. Neither: every query sees every entry.
    """

    keys: torch.Tensor
    values: torch.Tensor
    causal: bool = False
    mask: torch.Tensor | None = None


class Kernel(Protocol):
    """Softmax attention of `query` [Hq, N, D] over all `pieces` together, [Hq, N, D]. Scores are
    multiplied by `scale`, then capped to softcap * tanh(score / softcap) if that is given."""

    def __call__(
        self, query: torch.Tensor, pieces: list[Piece], scale: float, softcap: float | None
    ) -> torch.Tensor: ...


def merge(
    output: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of entries from attention over each: outputs [Hq, N, D] and their
    log-sum-exps [Hq, N]. Overwrites `output` and `other`."""
    total = torch.logaddexp(lse, other_lse)
    output *= (lse - total).exp_()[..., None]
    other *= (other_lse - total).exp_()[..., None]
    return output.add_(other), total
