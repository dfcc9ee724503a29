"""SparseRow: every KV head keeps its own choice of the entries.

The newest `window` entries of all heads lie in a ring. What leaves the ring, exactly `window`
tokens after it was written, goes to its head's survivors or is gone. Who survives is decided for
some tokens at a time, at places that hang on the position alone, so that the same entries are kept
however a prompt is cut into chunks.
"""

from copy import deepcopy
from typing import Protocol, Self

import torch

from ullage.errors import BudgetExceeded
from ullage.kv.kernels import Piece
from ullage.kv.pool import Blocks, KVPool, Reservation
from ullage.kv.rows import Attend, NewTokens, SlidingRow, Slots, side_by_side
from ullage.specs.blocks import BLOCK_TOKENS
from ullage.specs.survivors import SPAN_TOKENS, Survival

_GROWTH_TOKENS = 8 * BLOCK_TOKENS  # the least by which a head's room grows


class Scorer(Protocol):
    """Says how much each entry of one sequence in one layer is worth."""

    def see(self, new: NewTokens) -> None:
        """The tokens that come next; never across a place of decision."""

    def scores(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Worth, [Hkv, R] in fp32, of the R newest entries seen, keys and values [Hkv, R, D]: the
        larger the sooner kept, comparable across heads."""


class Survivors:
    """The entries that one KV head keeps, in the order of their positions."""

    def __init__(self, source: Blocks) -> None:
        self.slots, self.length = Slots(source, 1), 0

    def grow(self, tokens: int, share: int) -> None:
        """Room for `tokens` more: for `share` entries at once, the head's fair part of all, and
        beyond them for half as much again as there is. So there are few segments, and each is read
        by a call of its own."""
        needed = self.length + tokens
        if needed > self.slots.capacity:
            ahead = max(self.length + _GROWTH_TOKENS, self.length * 3 // 2)
            self.slots.reserve(share if needed <= share else max(needed, ahead))

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store [1, N, D] each; there must be room."""
        self.slots.write(self.length, keys, values)
        self.length += keys.shape[1]

    def copy(self, source: Blocks) -> "Survivors":
        """The same entries, in blocks from `source`."""
        twin = Survivors(source)
        twin.slots, twin.length = self.slots.copy(source, self.length), self.length
        return twin

    def read(self, heads: slice) -> list[Piece]:
        """All entries, for the query heads `heads`."""
        return [
            Piece(piece.keys, piece.values, heads=heads)
            for piece in self.slots.read(0, self.length)
        ]


class SparseRow(SlidingRow):
    """One sequence in one layer; who survives the window is by the scores of `scorer`."""

    def __init__(self, pool: Blocks, num_kv_heads: int, survival: Survival, scorer: Scorer) -> None:
        super().__init__(pool, num_kv_heads, survival.window)
        self.pool, self.survival, self.scorer = pool, survival, scorer
        self.reservation: Reservation | None = None
        self.share = 0  # of the survivors that there will be, a head's
        self.survivors = [Survivors(pool) for _ in range(num_kv_heads)]
        # Of the ring's slots. On the host: who leaves is known long before it does.
        self.stays = torch.ones(num_kv_heads, survival.window, dtype=torch.bool)

    @property
    def heads(self) -> int:
        """KV heads."""
        return len(self.survivors)

    def reserve(self, tokens: int) -> None:
        if self.reservation is not None:
            raise RuntimeError("a sparse row is reserved once")
        super().reserve(tokens)
        window = self.heads * -(-min(tokens, self.window) // BLOCK_TOKENS)
        blocks = self.survival.blocks(tokens, self.heads) - window
        if isinstance(self.pool, KVPool) and blocks:
            self.reservation = self.pool.promise(blocks)
            self.survivors = [Survivors(self.reservation) for _ in range(self.heads)]
            self.share = blocks // self.heads * BLOCK_TOKENS

    def copy(self) -> Self:
        twin = super().copy()
        twin.survivors, twin.reservation = [], None
        try:
            if self.reservation is not None:
                twin.reservation = self.reservation.another()
            for survivors in self.survivors:
                twin.survivors.append(survivors.copy(twin.reservation or self.pool))
        except BudgetExceeded:
            twin.release()
            raise
        twin.stays, twin.scorer = self.stays.clone(), deepcopy(self.scorer)
        return twin

    def release(self) -> None:
        super().release()
        for survivors in self.survivors:
            survivors.slots.release()
        if self.reservation is not None:
            self.reservation.release()
        self.reservation, self.share = None, 0
        self.survivors = [Survivors(self.pool) for _ in range(self.heads)]

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> list[Piece]:
        """Never: who survives hangs on the queries too."""
        raise RuntimeError("a sparse row attends by itself")

    def attend(self, new: NewTokens, attention: Attend) -> torch.Tensor:
        """A span at a time, so that the mask does not grow with the prompt."""
        if len(new) == 1:
            return self._attend_one(new, attention)
        starts = range(0, len(new), SPAN_TOKENS)
        parts = [self._attend_span(new.part(at, at + SPAN_TOKENS), attention) for at in starts]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _attend_one(self, new: NewTokens, attention: Attend) -> torch.Tensor:
        """The new entry takes the slot of the one that leaves."""
        if self.length >= self.window:
            slot = self.length % self.window
            leaving = self.slots.read(slot, slot + 1)[0]
            for head in self.stays[:, slot].nonzero()[:, 0].tolist():
                here = slice(head, head + 1)
                self._make_room(head, 1)
                self.survivors[head].append(leaving.keys[here], leaving.values[here])
        self._write(new.keys, new.values)
        self._mark(torch.ones(self.heads, 1, dtype=torch.bool))
        self.scorer.see(new)
        if self.length % self.survival.every == 0:
            recent = self._in_order()
            keys = torch.cat([piece.keys for piece in recent], dim=1)
            values = torch.cat([piece.values for piece in recent], dim=1)
            self._mark(self._decide(self.length, keys, values))
        ring = self.slots.read(0, self.used)
        return attention(new.query, [*ring, *self._pieces(new.query.shape[0])])

    def _attend_span(self, new: NewTokens, attention: Attend) -> torch.Tensor:
        """The window and the new entries side by side, [Hkv, past + N, D], under each head's
        mask."""
        past, stored = self._in_order(), self.slots.pool.dtype
        keys = side_by_side([piece.keys for piece in past], new.keys, stored)
        values = side_by_side([piece.values for piece in past], new.values, stored)
        first = self.length + len(new) - keys.shape[1]  # position of the span's first entry
        stays = self._span_flags(new, first, keys, values)
        pieces = self._pieces(new.query.shape[0])
        group = new.query.shape[0] // self.heads
        visible = _visible(stays.to(keys.device), len(new), self.window)  # [Hkv, N, past + N]
        pieces += [
            Piece(
                keys[head : head + 1],
                values[head : head + 1],
                mask=visible[head],
                heads=slice(head * group, (head + 1) * group),
            )
            for head in range(self.heads)
        ]
        output = attention(new.query, pieces)
        gone = max(0, keys.shape[1] - self.window)
        self._settle(keys[:, :gone], values[:, :gone], stays[:, :gone])
        self._write(new.keys, new.values)
        self._mark(stays[:, gone:])
        return output

    def _span_flags(
        self, new: NewTokens, first: int, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Bool [Hkv, past + N]: who stays, of what is in the span; what is undecided does."""
        at, stop = self.length, self.length + len(new)
        flags = torch.ones(self.heads, keys.shape[1], dtype=torch.bool)
        flags[:, : at - first] = self._marks(first, at)
        while at < stop:
            end = min(stop, (at // self.survival.every + 1) * self.survival.every)
            self.scorer.see(new.part(at - self.length, end - self.length))
            if end % self.survival.every == 0:
                until = slice(0, end - first)
                decided = self._decide(end, keys[:, until], values[:, until])
                flags[:, end - first - decided.shape[1] : end - first] = decided
            at = end
        return flags

    def _decide(self, end: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Bool [Hkv, R] for the R entries before position `end`, the last of `keys`."""
        every, survival = self.survival.every, self.survival
        scores = self.scorer.scores(keys[:, -every:], values[:, -every:])  # [Hkv, R]
        start = end - every
        scores[:, : max(0, survival.sinks - start)] = float("inf")
        count = survival.entries(end, self.heads) - survival.entries(start, self.heads)
        flags = torch.zeros(scores.numel(), dtype=torch.bool)
        flags[scores.flatten().topk(count).indices.cpu()] = True
        return flags.view(self.heads, every)

    def _settle(self, keys: torch.Tensor, values: torch.Tensor, stays: torch.Tensor) -> None:
        """Entries leave the window, [Hkv, N, D] each: those that stay join the survivors."""
        chosen = [flags.nonzero()[:, 0] for flags in stays]
        for head, index in enumerate(chosen):
            if len(index):
                self._make_room(head, len(index))
                here, place = slice(head, head + 1), index.to(keys.device)
                self.survivors[head].append(keys[here, place], values[here, place])

    def _make_room(self, head: int, tokens: int) -> None:
        """Room for `tokens` more; where little is left, what other heads took ahead goes back."""
        try:
            self.survivors[head].grow(tokens, self.share)
        except BudgetExceeded:
            for survivors in self.survivors:
                survivors.slots.trim(survivors.length)
            self.survivors[head].slots.reserve(self.survivors[head].length + tokens)

    def _pieces(self, query_heads: int) -> list[Piece]:
        group = query_heads // self.heads
        return [
            piece
            for head, survivors in enumerate(self.survivors)
            for piece in survivors.read(slice(head * group, (head + 1) * group))
        ]

    def _marks(self, start: int, stop: int) -> torch.Tensor:
        """The ring's flags for the positions from `start` up to `stop`."""
        return self.stays[:, torch.arange(start, stop) % self.window]

    def _mark(self, stays: torch.Tensor) -> None:
        """Keep the flags of the newest entries, [Hkv, N]."""
        positions = torch.arange(self.length - stays.shape[1], self.length)
        self.stays[:, positions % self.window] = stays


def _visible(stays: torch.Tensor, queries: int, window: int) -> torch.Tensor:
    """Bool [Hkv, queries, T]: each query, of the newest of T entries, sees the `window` newest up
    to its own, and those before that stay."""
    tokens = stays.shape[1]
    query = torch.arange(tokens - queries, tokens, device=stays.device)[:, None]
    entry = torch.arange(tokens, device=stays.device)[None, :]
    recent = entry > query - window  # [N, T]
    return (recent | stays[:, None, :]) & (entry <= query)
