"""One layer's KV entries of one sequence, over the pool.

Keys arrive with their rotary position already in them, so the order in which entries lie does not
matter to attention; a sliding layer overwrites its oldest entry in place.
"""

from abc import ABC, abstractmethod

import torch

from ullage.errors import BudgetExceeded
from ullage.kv.kernels import Piece
from ullage.kv.pool import KVPool, Run
from ullage.specs.blocks import BLOCK_TOKENS


class Segment:
    """A run of the pool seen as one stretch of slots for all KV heads."""

    def __init__(self, pool: KVPool, run: Run, num_kv_heads: int) -> None:
        self.run = run
        self.slots = run.count // num_kv_heads * BLOCK_TOKENS
        blocks = slice(run.start, run.start + run.count)
        shape = (num_kv_heads, self.slots, pool.keys.shape[-1])
        self.keys = pool.keys[blocks].view(shape)  # [Hkv, slots, D]
        self.values = pool.values[blocks].view(shape)


class Slots:
    """The blocks of one row, as slots numbered from 0; a slot holds one token for all KV heads."""

    def __init__(self, pool: KVPool, num_kv_heads: int) -> None:
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

    def __init__(self, pool: KVPool, num_kv_heads: int) -> None:
        self.slots = Slots(pool, num_kv_heads)
        self.length = 0

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Take the blocks that a sequence of `tokens` needs here.

        Raises:
            BudgetExceeded: the pool has too few; nothing is taken.
        """

    @abstractmethod
    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> list[Piece]:
        """Store new entries, [Hkv, N, D] each, and return what their queries attend to."""

    def release(self) -> None:
        """Give all blocks back."""
        self.slots.release()
        self.length = 0


class FullRow(Row):
    """Full attention: all entries are kept; entry p lies in slot p."""

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
        stored = self.slots.pool.keys.dtype
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

    def __init__(self, pool: KVPool, num_kv_heads: int, window: int) -> None:
        super().__init__(pool, num_kv_heads)
        self.window = window

    def reserve(self, tokens: int) -> None:
        self.slots.reserve(min(tokens, self.window))

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> list[Piece]:
        if keys.shape[1] == 1:
            self._write(keys, values)
            return self.slots.read(0, min(self.length, self.window))
        past, stored = self._in_order(), self.slots.pool.keys.dtype
        span_keys = _side_by_side([piece.keys for piece in past], keys, stored)
        span_values = _side_by_side([piece.values for piece in past], values, stored)
        self._write(keys, values)
        mask = _band(keys.shape[1], span_keys.shape[1], self.window, keys.device)
        return [Piece(span_keys, span_values, mask=mask)]  # [Hkv, past + N, D]

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Overwrite the oldest slots with the newest of `keys` and `values`."""
        self.reserve(self.length + keys.shape[1])
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


def _side_by_side(past: list[torch.Tensor], new: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
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
