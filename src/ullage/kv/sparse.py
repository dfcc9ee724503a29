"""SparseRow: every KV head keeps its own choice of the entries.

The newest `window` entries of a head, which may be another number than its neighbour's, lie in a
ring. What leaves the ring, exactly `window` tokens after it was written, goes to the head's
survivors or is gone. Who survives is decided for some tokens at a time, at places that hang on the
position alone, so that the same entries are kept however a prompt is cut into chunks.
"""

from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import replace
from typing import Protocol, Self

import torch

from ullage.kv.entries import Entries, side_by_side
from ullage.kv.kernels import Piece
from ullage.kv.pool import Blocks
from ullage.kv.rows import Attend, NewTokens, Ring, Row, Slots
from ullage.specs.survivors import SPAN_TOKENS, Survival


class Scorer(Protocol):
    """Says how much each entry of one sequence in one layer is worth."""

    def see(self, new: NewTokens) -> None:
        """The tokens that come next; never across a place of decision."""

    def scores(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Worth, [Hkv, R] in fp32, of the R newest entries seen, keys and values [Hkv, R, D]: the
        larger the sooner kept by its head."""


class Survivors:
    """The entries that a head keeps beyond its window, in the order of their positions."""

    def __init__(self, slots: Slots, length: int = 0) -> None:
        self.slots, self.length = slots, length

    def copy(self) -> "Survivors":
        """The same entries in blocks of their own."""
        return Survivors(self.slots.copy(self.length), self.length)

    def append(self, entries: Entries) -> None:
        """Store more."""
        length = self.length + len(entries)
        self.slots.grow(length)
        self.slots.write(self.length, entries)
        self.length = length

    def release(self) -> None:
        """Give all blocks back; none is left."""
        self.slots.release()
        self.length = 0

    def read(self) -> list[Piece]:
        """All entries, where they lie."""
        return self.slots.read(0, self.length)


class SparseHead:
    """The entries of one KV head: a ring of the newest, and its survivors."""

    def __init__(self, pool: Blocks, survival: Survival) -> None:
        self.survival = survival
        self.ring = Ring(Slots(pool, 1), survival.window)
        self.survivors = Survivors(Slots(pool, 1))
        # Who stays of what is decided and not yet beyond the window, from position `_since` on. On
        # the host: who leaves is known long before it does.
        self._stays, self._since = torch.ones(0, dtype=torch.bool), 0

    def reserve(self, tokens: int) -> None:
        """Room for a sequence of `tokens`; raises what `Slots.reserve` does."""
        self.ring.reserve(tokens)
        self.survivors.slots.reserve(self.survival.survivors(tokens))

    def copy(self) -> Self:
        """The same entries in blocks of their own; raises what `Slots.copy` does."""
        twin = copy(self)
        twin.ring = self.ring.copy()
        try:
            twin.survivors = self.survivors.copy()
        except BaseException:
            twin.ring.release()
            raise
        return twin

    def release(self) -> None:
        """Give all blocks back; the head is empty."""
        self.ring.release()
        self.survivors.release()
        self._stays, self._since = self._stays[:0], 0

    def newest(self, tokens: int) -> list[Piece]:
        """The newest entries, oldest first; `tokens` is at most the window."""
        return self.ring.between(self.ring.length - tokens, self.ring.length)

    def decide(self, end: int, scores: torch.Tensor) -> None:
        """Who stays of the entries before position `end`, by their worth, [R]; they follow those
        that were decided last."""
        start, first = end - len(scores), self.ring.first
        scores[: max(0, self.survival.sinks - start)] = float("inf")
        count = self.survival.entries(end) - self.survival.entries(start)
        stays = torch.zeros(len(scores), dtype=torch.bool)
        stays[scores.topk(count).indices.cpu()] = True
        self._stays = torch.cat([self._stays[first - self._since :], stays])
        self._since = first

    def take(self, own: Entries) -> list[Piece]:
        """Store one entry in the slot of the one that leaves, and return what its query attends
        to."""
        ring = self.ring
        if ring.used == ring.window and self._stays[ring.first - self._since]:
            self.survivors.append(ring.between(ring.first, ring.first + 1)[0])
        ring.write(own)
        return [*ring.read(), *self.survivors.read()]

    def pieces(self, own: Entries) -> list[Piece]:
        """What the queries of new entries attend to before those are stored: survivors and window
        where they lie, under a mask what leaves the window on the way."""
        ring, tokens = self.ring, len(own)
        stop = ring.first + min(ring.used, self._leaving(tokens))
        masked, at = [], ring.first
        for piece in ring.between(at, stop):
            masked.append(replace(piece, mask=self._visible(at, piece, tokens)))
            at += len(piece)
        new = Piece.of(own, causal=True)
        if tokens > ring.window:
            new = Piece.of(own, mask=self._visible(ring.length, own, tokens))
        return [*self.survivors.read(), *masked, *ring.between(stop, ring.length), new]

    def store(self, own: Entries) -> None:
        """Take new entries in; what leaves the window survives or is gone."""
        ring, gone = self.ring, self._leaving(len(own))
        at = ring.first
        for piece in ring.between(at, at + min(ring.used, gone)):
            at = self._settle(at, piece)
        passing = max(0, gone - ring.used)  # new entries that leave at once
        self._settle(at, own.part(slice(passing)))
        ring.write(own)

    def _leaving(self, tokens: int) -> int:
        """Entries that leave the window while `tokens` come."""
        return max(0, self.ring.used + tokens - self.ring.window)

    def _settle(self, at: int, leaving: Entries) -> int:
        """The entries from position `at` on leave the window; the position behind them."""
        stop = at + len(leaving)
        place = self._staying(at, stop).nonzero()[:, 0].to(leaving.keys.device)
        if len(place):
            self.survivors.append(leaving.each(lambda tensor: tensor[:, place]))
        return stop

    def _staying(self, start: int, stop: int) -> torch.Tensor:
        """Bool [stop - start]: who stays from one position up to another; what is undecided
        does."""
        stays = torch.ones(stop - start, dtype=torch.bool)
        known = self._stays[start - self._since : stop - self._since]
        stays[: len(known)] = known
        return stays

    def _visible(self, start: int, entries: Entries, queries: int) -> torch.Tensor:
        """Bool [N, T]: each of the `queries` next queries sees, of `entries`, which are those from
        position `start` on, the `window` newest up to its own, and before them those that stay."""
        device, stop, length = entries.keys.device, start + len(entries), self.ring.length
        query = torch.arange(length, length + queries, device=device)[:, None]
        entry = torch.arange(start, stop, device=device)[None, :]
        recent = entry > query - self.ring.window
        return (recent | self._staying(start, stop).to(device)) & (entry <= query)


class SparseRow(Row):
    """One sequence in one layer: a head each for its `survivals`, in which the scores of `scorer`
    choose."""

    def __init__(self, pool: Blocks, survivals: Sequence[Survival], scorer: Scorer) -> None:
        self.heads = [SparseHead(pool, survival) for survival in survivals]
        self.every = survivals[0].every
        self.scorer = scorer

    @property
    def length(self) -> int:
        return self.heads[0].ring.length

    def reserve(self, tokens: int) -> None:
        try:
            for head in self.heads:
                head.reserve(tokens)
        except BaseException:
            self.release()
            raise

    def copy(self) -> Self:
        twin = copy(self)
        twin.heads = []
        try:
            for head in self.heads:
                twin.heads.append(head.copy())
        except BaseException:
            twin.release()
            raise
        twin.scorer = deepcopy(self.scorer)
        return twin

    def release(self) -> None:
        for head in self.heads:
            head.release()

    def attend(self, new: NewTokens, attention: Attend) -> torch.Tensor:
        """A span at a time, so that masks do not grow with the prompt."""
        if len(new) == 1:
            return self._attend_one(new, attention)
        starts = range(0, len(new), SPAN_TOKENS)
        parts = [self._attend_span(new.part(at, at + SPAN_TOKENS), attention) for at in starts]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _attend_one(self, new: NewTokens, attention: Attend) -> torch.Tensor:
        own = self._by_head(new)
        self._decide(new, own)
        pieces = [head.take(entries) for head, entries in zip(self.heads, own, strict=True)]
        return attention(new.query, self._for_queries(new, pieces))

    def _attend_span(self, new: NewTokens, attention: Attend) -> torch.Tensor:
        own = self._by_head(new)
        self._decide(new, own)
        pieces = [head.pieces(entries) for head, entries in zip(self.heads, own, strict=True)]
        output = attention(new.query, self._for_queries(new, pieces))
        for head, entries in zip(self.heads, own, strict=True):
            head.store(entries)
        return output

    def _decide(self, new: NewTokens, own: list[Entries]) -> None:
        """At each place of decision that `new` reaches, whoever is undecided before it."""
        waiting, every = self.length % self.every, self.every
        ends = range(every, waiting + len(new) + 1, every)
        seen = 0
        if ends:
            keys, values = self._undecided(waiting, own, new.keys.dtype)
            for end in ends:
                self.scorer.see(new.part(seen, end - waiting))
                seen = end - waiting
                span = slice(end - every, end)
                scores = self.scorer.scores(keys[:, span], values[:, span])
                for head, worth in zip(self.heads, scores, strict=True):
                    head.decide(self.length - waiting + end, worth)
        if seen < len(new):
            self.scorer.see(new.part(seen, len(new)))

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

    def _by_head(self, new: NewTokens) -> list[Entries]:
        """The entries that are new to each head."""
        own = new.stored(self.heads[0].ring.slots.pool.dtype)
        return [own.part(slice(None), slice(at, at + 1)) for at in range(len(self.heads))]

    def _for_queries(self, new: NewTokens, pieces: list[list[Piece]]) -> list[Piece]:
        """The pieces of each KV head, for the query heads that it serves."""
        group = new.query.shape[0] // len(self.heads)
        return [
            replace(piece, heads=slice(index * group, (index + 1) * group))
            for index, of_head in enumerate(pieces)
            for piece in of_head
        ]
