"""SparseRow: every KV head keeps its own choice of the entries.

The window of a head, all of whose entries are there, may be another than its neighbour's. Who
survives beyond it is decided for some tokens at a time, at places that hang on the position alone,
so that the same entries are kept however a prompt is cut into chunks.
"""

from collections.abc import Sequence
from copy import copy
from itertools import chain
from statistics import mean
from typing import Protocol, Self

import torch

from ullage.kv.before import Attend
from ullage.kv.entries import Entries, side_by_side
from ullage.kv.pool import Blocks
from ullage.kv.rows import NewTokens, Row, Taken, seen_by
from ullage.kv.sparse_head import SparseHead
from ullage.specs.survivors import SPAN_TOKENS, Survival


class Scorer(Protocol):
    """Says how much each entry of one sequence in one layer is worth. Its state is replaced, never
    changed in place: a shallow copy goes its own way."""

    def see(self, new: NewTokens) -> None:
        """The tokens that come next; never across a place of decision."""

    def scores(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Worth, [Hkv, R] in fp32, of the R entries that follow those asked about last, keys and
        values [Hkv, R, D]: the larger the sooner kept by its head."""


class SparseRow(Row):
    """One sequence in one layer: a head each for its `survivals`, in which the scores of `scorer`
    choose once `lag` tokens have come behind those that are decided on."""

    def __init__(
        self, pool: Blocks, survivals: Sequence[Survival], scorer: Scorer, lag: int = 0
    ) -> None:
        self.pool, self.heads = pool, [SparseHead(pool, survival) for survival in survivals]
        self.every, self.lag = survivals[0].every, lag
        self.scorer = scorer

    @property
    def length(self) -> int:
        return self.heads[0].ring.length

    @property
    def live_tokens(self) -> float:
        return mean(head.held for head in self.heads)

    def reserve(self, tokens: int) -> None:
        try:
            for head in self.heads:
                head.reserve(tokens)
        except BaseException:
            self.release()
            raise

    def replace_first(self, entries: Entries) -> None:
        for head, own in zip(self.heads, self._by_head(entries), strict=True):
            head.replace_first(own)

    def copy(self) -> Self:
        twin = copy(self)
        twin.heads = []
        try:
            for head in self.heads:
                twin.heads.append(head.copy())
        except BaseException:
            twin.release()
            raise
        twin.scorer = copy(self.scorer)
        return twin

    def release(self) -> None:
        super().release()
        for head in self.heads:
            head.release()

    def attend_chunk(self, new: NewTokens, attention: Attend) -> torch.Tensor:
        """A span at a time, so that masks do not grow with the prompt."""
        for head in self.heads:
            head.grow(self.length + len(new))
        starts = range(0, len(new), SPAN_TOKENS)
        parts = [self._attend_span(new.part(at, at + SPAN_TOKENS), attention) for at in starts]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def take(self, new: NewTokens, first_head: int = 0) -> Taken:
        self._decide(new)
        seeing = self._seeing(new.heads(first_head))
        taken = [head.take(heads) for head, heads in zip(self.heads, seeing, strict=True)]
        places, pieces = zip(*taken, strict=True)
        return Taken(list(chain(*places)), list(chain(*pieces)))

    def _attend_span(self, new: NewTokens, attention: Attend) -> torch.Tensor:
        own = self._by_head(new.stored(self.pool.dtype))
        self._decide(new, own)
        seeing = self._seeing(new.heads(0))
        pieces = [
            piece
            for head, entries, heads in zip(self.heads, own, seeing, strict=True)
            for piece in seen_by(heads, head.pieces(entries))
        ]
        output = attention(new.query, pieces)
        for head, entries in zip(self.heads, own, strict=True):
            head.store(entries)
        return output

    def _decide(self, new: NewTokens, own: list[Entries] | None = None) -> None:
        """At each place of decision that `new` reaches, whoever is undecided before it. `own` are
        the entries that are new to each head, where they are made already."""
        every, lag = self.every, self.lag
        decided = max(0, self.length - lag) // every * every
        waiting = self.length - decided
        ends = range(every, waiting + len(new) - lag + 1, every)
        if not ends:
            self.scorer.see(new)
            return
        own = own or self._by_head(new.stored(self.pool.dtype))
        keys, values = self._undecided(waiting, own, new.keys.dtype)
        seen = 0
        for end in ends:
            self.scorer.see(new.part(seen, end + lag - waiting))
            seen = end + lag - waiting
            span = slice(end - every, end)
            self._choose(decided + end, self.scorer.scores(keys[:, span], values[:, span]))
        if seen < len(new):
            self.scorer.see(new.part(seen, len(new)))

    def _choose(self, end: int, scores: torch.Tensor) -> None:
        """Each head's worthiest of the entries before position `end`, by their worth, [Hkv, R]."""
        start = end - scores.shape[1]
        for head, worth in zip(self.heads, scores, strict=True):
            worth[: max(0, head.survival.sinks - start)] = float("inf")
        counts = [head.staying(start, end) for head in self.heads]
        worthiest = scores.topk(max(counts)).indices.cpu().numpy()  # the device is awaited once
        for head, places, count in zip(self.heads, worthiest, counts, strict=True):
            head.decide(start, end, places[:count])

    def _undecided(
        self, waiting: int, own: list[Entries], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [Hkv, waiting + N, D] each, of the entries that wait for a decision and
        of the new ones."""
        laid_out = [
            side_by_side([*head.newest(waiting), entries], dtype)
            for head, entries in zip(self.heads, own, strict=True)
        ]
        keys, values = zip(*laid_out, strict=True)
        return torch.cat(keys), torch.cat(values)

    def _by_head(self, entries: Entries) -> list[Entries]:
        """Those of each head."""
        apart = (tensor.chunk(len(self.heads)) for tensor in entries.tensors)
        return [Entries(*tensors) for tensors in zip(*apart, strict=True)]

    def _seeing(self, heads: slice) -> list[slice]:
        """Which of the query heads `heads` each KV head serves."""
        group = (heads.stop - heads.start) // len(self.heads)
        return [slice(at, at + group) for at in range(heads.start, heads.stop, group)]
