"""One layer's KV entries of one sequence, over the pool.

Keys arrive with their rotary position already in them, so the order in which entries lie does not
matter to attention; a sliding layer overwrites its oldest entry in place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Self

import torch

from ullage.errors import BudgetExceeded
from ullage.kv.kernels import Piece
from ullage.kv.pool import Blocks, Run
from ullage.specs.blocks import BLOCK_TOKENS

Attend = Callable[[torch.Tensor, list[Piece]], torch.Tensor]  # query and output [Hq, N, D]


@dataclass(frozen=True)
class NewTokens:
    """What N tokens of one sequence bring to one layer. `cos` and `sin` of their positions are
    there where a technique asks for them."""

    query: torch.Tensor  # [Hq, N, D]
    keys: torch.Tensor  # [Hkv, N, D]
    values: torch.Tensor  # [Hkv, N, D]
    scale: float  # of a query's product with a key
    cos: torch.Tensor | None = None  # [N, D], or narrower where not all of a head is rotated
    sin: torch.Tensor | None = None  # [N, D], likewise

    def __len__(self) -> int:
        return self.keys.shape[1]

    def part(self, start: int, stop: int) -> "NewTokens":
        """The tokens from `start` up to `stop`, as views."""
        span = slice(start, stop)
        return NewTokens(
            self.query[:, span],
            self.keys[:, span],
            self.values[:, span],
            self.scale,
            *(None if part is None else part[span] for part in (self.cos, self.sin)),
        )


class Segment:
    """A run of the pool seen as one stretch of slots for all KV heads."""

    def __init__(self, pool: Blocks, run: Run, num_kv_heads: int) -> None:
        self.run = run
        self.slots = run.count // num_kv_heads * BLOCK_TOKENS
        keys, values = pool.entries(run)
        shape = (num_kv_heads, self.slots, keys.shape[-1])
        self.keys = keys.view(shape)  # [Hkv, slots, D]
        self.values = values.view(shape)


class Slots:
    """The blocks of one row, as slots numbered from 0; a slot holds one token for all KV heads."""

    def __init__(self, pool: Blocks, num_kv_heads: int) -> None:
        self.pool, self.num_kv_heads = pool, num_kv_heads
        self.segments: list[Segment] = []

    @property
    def capacity(self) -> int:
        """Slots in the blocks taken so far."""
        return sum(segment.slots for segment in self.segments)

    def reserve(self, slots: int) -> None:
        """Take blocks until there are `slots`.

        Raises:
            BudgetExceeded: the pool has too few; nothing is taken.
        """
        missing = slots - self.capacity
        if missing > 0:
            blocks = self.num_kv_heads * -(-missing // BLOCK_TOKENS)
            runs = self.pool.take(blocks, multiple=self.num_kv_heads)
            self.segments += [Segment(self.pool, run, self.num_kv_heads) for run in runs]

    def trim(self, slots: int) -> None:
        """Give the blocks beyond the first `slots` slots back."""
        spare = (self.capacity - slots) // BLOCK_TOKENS  # blocks of each head
        while spare > 0:
            segment = self.segments.pop()
            blocks = segment.run.count // self.num_kv_heads
            if self.num_kv_heads > 1 and spare < blocks:
                self.segments.append(segment)  # heads lie one after the other: all or nothing
                return
            kept = Run(segment.run.start, max(0, blocks - spare))
            gone = Run(kept.start + kept.count, segment.run.count - kept.count)
            self.pool.give_back([gone])
            if kept.count:
                self.segments.append(Segment(self.pool, kept, self.num_kv_heads))
            spare -= blocks

    def copy(self, pool: Blocks, used: int) -> "Slots":
        """As many slots from `pool`, the first `used` with the same entries.

        Raises:
            BudgetExceeded: the pool has too few; nothing is taken.
        """
        twin, at = Slots(pool, self.num_kv_heads), 0
        twin.reserve(self.capacity)
        for piece in self.read(0, used):
            twin.write(at, piece.keys, piece.values)
            at += piece.keys.shape[1]
        return twin

    def release(self) -> None:
        """Give all blocks back."""
        self.pool.give_back([segment.run for segment in self.segments])
        self.segments = []

    def write(self, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store `keys` and `values`, [Hkv, N, D] each, in N slots from `slot` on."""
        first, written = 0, 0  # the segment's first slot, tokens stored
        for segment in self.segments:
            at = slot + written - first
            count = min(segment.slots - at, keys.shape[1] - written)
            if count > 0:
                segment.keys[:, at : at + count] = keys[:, written : written + count]
                segment.values[:, at : at + count] = values[:, written : written + count]
                written += count
            first += segment.slots

    def read(self, start: int, stop: int) -> list[Piece]:
        """The slots from `start` up to `stop`, as views."""
        pieces, first = [], 0  # the segment's first slot
        for segment in self.segments:
            span = slice(max(0, start - first), max(0, min(segment.slots, stop - first)))
            if span.start < span.stop:
                pieces.append(Piece(segment.keys[:, span], segment.values[:, span]))
            first += segment.slots
        return pieces


class Row(ABC):
    """One sequence in one layer. `length` counts the tokens seen."""

    def __init__(self, pool: Blocks, num_kv_heads: int) -> None:
        self.slots = Slots(pool, num_kv_heads)
        self.length = 0

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Take the blocks that a sequence of `tokens` needs here.

        Raises:
            BudgetExceeded: the pool has too few; nothing is taken.
        """

    def attend(self, new: NewTokens, attention: Attend) -> torch.Tensor:
        """Store the entries of `new` and let its queries attend: [Hq, N, D]."""
        return attention(new.query, self.extend(new.keys, new.values))

    @abstractmethod
    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> list[Piece]:
        """Store new entries, [Hkv, N, D] each, and return what their queries attend to."""

    @property
    @abstractmethod
    def used(self) -> int:
        """Slots that hold an entry."""

    def copy(self) -> Self:
        """A row with blocks of its own that holds the same and goes its own way from here.

        Raises:
            BudgetExceeded: the pool has too few; nothing is taken.
        """
        twin = copy(self)
        twin.slots = self.slots.copy(self.slots.pool, self.used)
        return twin

    def release(self) -> None:
        """Give all blocks back."""
        self.slots.release()
        self.length = 0


class FullRow(Row):
    """Full attention: all entries are kept; entry p lies in slot p."""

    @property
    def used(self) -> int:
        return self.length

    def reserve(self, tokens: int) -> None:
        self.slots.reserve(tokens)

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> list[Piece]:
        past, length = self.length, self.length + keys.shape[1]
        if length > self.slots.capacity:
            self._grow(length)
        self.length = length
        self.slots.write(past, keys, values)
        if keys.shape[1] == 1:
            return self.slots.read(0, length)
        # rounded as the pool rounds them, so that results do not hang on the chunk size
        stored = self.slots.pool.dtype
        new = Piece(keys.to(stored), values.to(stored), causal=True)
        return [*self.slots.read(0, past), new]

    def _grow(self, tokens: int) -> None:
        """Room for `tokens` and a quarter more, so that a sequence nobody sized in advance has few
        segments; for no more than `tokens` when the pool is nearly full."""
        try:
            self.slots.reserve(tokens + tokens // 4)
        except BudgetExceeded:
            self.slots.reserve(tokens)


class SlidingRow(Row):
    """A query sees the `window` newest entries up to its own; entry p lies in slot p mod window."""

    def __init__(self, pool: Blocks, num_kv_heads: int, window: int) -> None:
        super().__init__(pool, num_kv_heads)
        self.window = window

    @property
    def used(self) -> int:
        return min(self.length, self.window)

    def reserve(self, tokens: int) -> None:
        self.slots.reserve(min(tokens, self.window))

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> list[Piece]:
        if keys.shape[1] == 1:
            self._write(keys, values)
            return self.slots.read(0, self.used)
        past, stored = self._in_order(), self.slots.pool.dtype
        span_keys = side_by_side([piece.keys for piece in past], keys, stored)
        span_values = side_by_side([piece.values for piece in past], values, stored)
        self._write(keys, values)
        mask = _band(keys.shape[1], span_keys.shape[1], self.window, keys.device)
        return [Piece(span_keys, span_values, mask=mask)]  # [Hkv, past + N, D]

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Overwrite the oldest slots with the newest of `keys` and `values`."""
        self.slots.reserve(min(self.length + keys.shape[1], self.window))
        self.length += keys.shape[1]
        kept = min(keys.shape[1], self.window)
        keys, values = keys[:, -kept:], values[:, -kept:]
        slot = (self.length - kept) % self.window
        first = min(kept, self.window - slot)
        self.slots.write(slot, keys[:, :first], values[:, :first])
        if first < kept:
            self.slots.write(0, keys[:, first:], values[:, first:])

    def _in_order(self) -> list[Piece]:
        """The entries that new queries may see, oldest first: the slots up to where the next entry
        goes hold the newer ones."""
        if self.length <= self.window:
            return self.slots.read(0, self.length)
        turn = self.length % self.window
        return [*self.slots.read(turn, self.window), *self.slots.read(0, turn)]


def side_by_side(past: list[torch.Tensor], new: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Stored entries and new ones in one tensor, [Hkv, past + N, D] in the new ones' format, the
    new ones rounded as the pool rounds them, so that results do not hang on the chunk size."""
    parts = [*past, new.to(stored)]
    span = new.new_empty((new.shape[0], sum(part.shape[1] for part in parts), new.shape[2]))
    at = 0
    for part in parts:
        span[:, at : at + part.shape[1]] = part
        at += part.shape[1]
    return span


def _band(queries: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """Bool [queries, keys] for queries that are the newest of the keys: each sees the `window`
    newest keys up to its own."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    band = key <= query
    return band.logical_and_(key > query - window)
