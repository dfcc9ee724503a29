"""Attention over pieces of stored KV entries. One signature, one home a device:

    attend(query, pieces, scale, softcap) -> output

reference.py is the definition that the tests hold the others to: cpu.py, and triton.py for CUDA.
Every kernel attends to some of the entries at a time and joins what it gets, so that its scratch is
bounded however many there are; planner/engines/attention.py plans that scratch.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ullage.kv.entries import Entries


@dataclass(frozen=True)
class Piece(Entries):
    """Entries that a query attends to.

    `causal`: the entries are the queries' own, T = N, and a query sees those up to itself. `mask`:
    bool [N, T], True where a query sees an entry. Neither: every query sees every entry. `heads`:
    the query heads that see them, where not all do; K and V are then of those heads' KV heads
    alone. A KV head serves as many query heads in every piece.

    `bias`: [Hkv, N, T] in fp32, or [Hkv, 1, T] for all queries alike, is added to the scores; where
    it is half of fp32's lowest, an entry is as good as hidden. `query`: what those heads ask these
    entries, [H, N, D] in the query's format, where it is something else: the same queries seen from
    another distance.
    """

    causal: bool = False
    mask: torch.Tensor | None = None
    heads: slice | None = None
    bias: torch.Tensor | None = None
    query: torch.Tensor | None = None

    @classmethod
    def of(
        cls, entries: Entries, causal: bool = False, mask: torch.Tensor | None = None
    ) -> "Piece":
        """`entries`, seen so."""
        scales = (entries.key_scales, entries.value_scales)
        return cls(entries.keys, entries.values, *scales, causal=causal, mask=mask)

    def of_heads(self, heads: slice) -> "Piece":
        """What is in some of the KV heads, of a piece that all queries see, as views."""
        bias = None if self.bias is None else self.bias[heads]
        return replace(Piece.of(self.part(slice(None), heads)), bias=bias)

    def asked(self, query: torch.Tensor) -> torch.Tensor:
        """Of `query`, [Hq, N, D], what sees this piece, [H, N, D]."""
        if self.query is not None:
            return self.query
        return query if self.heads is None else query[self.heads]

    def tile(self, tokens: slice) -> "Piece":
        """Some of the entries of a piece that is neither causal nor masked, as views."""
        bias = None if self.bias is None else self.bias[..., tokens]
        return replace(Piece.of(self.part(tokens)), heads=self.heads, bias=bias, query=self.query)


class Kernel(Protocol):
    """Softmax attention of `query` [Hq, N, D] over all `pieces` together, [Hq, N, D]. Scores are
    multiplied by `scale`, then capped to softcap * tanh(score / softcap) if that is given; a bias
    comes last."""

    def __call__(
        self, query: torch.Tensor, pieces: list[Piece], scale: float, softcap: float | None
    ) -> torch.Tensor: ...


class Joined:
    """Attention over the tiles seen so far, by their log-sum-exps: `output` [Hq, N, D] in fp32."""

    def __init__(self, query: torch.Tensor) -> None:
        self._query = query
        self._output: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None  # [Hq, N]

    def add(self, heads: slice | None, output: torch.Tensor, lse: torch.Tensor) -> None:
        """Attention over one more tile, of the query heads `heads`, in fp32."""
        if self._output is None or self._lse is None:
            if heads is None:
                self._output, self._lse = output, lse
                return
            self._output = torch.zeros_like(self._query, dtype=torch.float32)
            self._lse = self._output.new_full(self._query.shape[:2], float("-inf"))
        here = slice(None) if heads is None else heads
        before_lse = self._lse[here]
        share = (lse - before_lse).sigmoid_()[..., None]  # of the new tile, by all that is seen
        self._output[here].lerp_(output, share)
        self._lse[here] = torch.logaddexp(before_lse, lse)

    @property
    def output(self) -> torch.Tensor:
        """In the query's format."""
        if self._output is None:
            raise ValueError("attention over no entries at all")
        return self._output.to(self._query.dtype)
