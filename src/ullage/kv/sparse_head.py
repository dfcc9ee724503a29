"""SparseHead: the entries of one KV head of which some are kept.

The newest `window` lie in a ring. What leaves it, exactly `window` tokens after it was written,
goes to the survivors, which lie behind the ring, or is gone: a token reads one stretch.
"""

from copy import copy
from dataclasses import replace
from typing import Self

import numpy as np
import torch

from ullage.kv.entries import Entries
from ullage.kv.kernels import Piece
from ullage.kv.pool import Blocks
from ullage.kv.rows import Taken, seen_by
from ullage.kv.slots import Ring, Slots
from ullage.specs.survivors import Survival

Flags = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
Places = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class Survivors:
    """The entries that a head keeps beyond its window, in the order of their positions, from slot
    `first` on."""

    def __init__(self, slots: Slots, first: int, length: int = 0) -> None:
        self.slots, self.first, self.length = slots, first, length

    def append(self, entries: Entries) -> None:
        """Store more."""
        length = self.length + len(entries)
        self.slots.grow(self.first + length, self.first + length + length // 4)
        self.slots.write(self.first + self.length, entries)
        self.length = length

    def read(self) -> list[Piece]:
        """All entries, where they lie."""
        return self.slots.read(self.first, self.first + self.length)


class SparseHead:
    """The entries of one KV head: a ring of the newest, and, once it is full, survivors behind."""

    def __init__(self, pool: Blocks, survival: Survival) -> None:
        self.survival = survival
        self.slots = Slots(pool, 1)
        self.ring = Ring(self.slots, survival.window)
        self.survivors = Survivors(self.slots, survival.window)
        # Who stays of what is decided and not yet beyond the window, from position `_since` on. On
        # the host: who leaves is known long before it does.
        self._stays, self._since = np.ones(0, dtype=np.bool_), 0
        # As last read: how many entries, the query heads that saw them, and all entries
        self._read: tuple[int, slice, list[Piece]] | None = None

    @property
    def held(self) -> int:
        """Entries in all, which lie in the first slots."""
        return self.ring.used + self.survivors.length

    def reserve(self, tokens: int) -> None:
        """Room for a sequence of `tokens`; raises what `Slots.reserve` does."""
        self.slots.reserve(self.survival.slots(tokens))

    def grow(self, tokens: int) -> None:
        """Room for a sequence of `tokens` that nobody sized in advance, in one stretch if it can
        be; raises what `Slots.grow` does."""
        slots = self.survival.slots(tokens)
        self.slots.grow(slots, slots + self.survival.survivors(tokens) // 4)

    def copy(self) -> Self:
        """The same entries in blocks of their own; raises what `Slots.copy` does."""
        twin, ring = copy(self), self.ring
        twin.slots = self.slots.copy(self.held)
        twin.ring = Ring(twin.slots, ring.window, ring.length)
        twin.survivors = Survivors(twin.slots, ring.window, self.survivors.length)
        twin._read = None
        return twin

    def release(self) -> None:
        """Give all blocks back; the head is empty."""
        self.ring.release()
        self.survivors.length = 0
        self._stays, self._since, self._read = self._stays[:0], 0, None

    def newest(self, tokens: int) -> list[Piece]:
        """The newest entries, oldest first; `tokens` is at most the window."""
        return self.ring.between(self.ring.length - tokens, self.ring.length)

    def staying(self, start: int, end: int) -> int:
        """How many entries stay from position `start` up to `end`, between which all is decided."""
        return self.survival.entries(end) - self.survival.entries(start)

    def decide(self, start: int, end: int, worthiest: Places) -> None:
        """Of the entries from position `start` up to `end`, which follow those that were decided
        last, stay those at `worthiest`, counted from `start`."""
        first = self.ring.first
        stays = np.zeros(end - start, dtype=np.bool_)
        stays[worthiest] = True
        self._stays = np.concatenate([self._stays[first - self._since :], stays])
        self._since = first

    def take(self, heads: slice) -> Taken:
        """Room for one entry in the slot of the one that leaves; `heads` are the query heads that
        attend."""
        ring = self.ring
        leaving = ring.length - ring.window
        if leaving >= 0 and self._stays[leaving - self._since]:
            self.survivors.append(ring.between(leaving, leaving + 1)[0])
        places = ring.take()
        held, known = self.held, self._read
        if known is None or known[:2] != (held, heads):
            known = self._read = held, heads, seen_by(heads, self.slots.read(0, held))
        return Taken(places, known[2])

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

    def replace_first(self, entries: Entries) -> None:
        """See `Row.replace_first`. Where there are sinks it is the first survivor; where there are
        none it is taken to be gone."""
        if not self.ring.first:
            self.slots.write(0, entries)
        elif self.survival.sinks:
            self.slots.write(self.survivors.first, entries)

    def _leaving(self, tokens: int) -> int:
        """Entries that leave the window while `tokens` come."""
        return max(0, self.ring.used + tokens - self.ring.window)

    def _settle(self, at: int, leaving: Entries) -> int:
        """The entries from position `at` on leave the window; the position behind them."""
        stop = at + len(leaving)
        place = torch.from_numpy(self._staying(at, stop).nonzero()[0]).to(leaving.keys.device)
        if len(place):
            self.survivors.append(leaving.at(place))
        return stop

    def _staying(self, start: int, stop: int) -> Flags:
        """[stop - start]: who stays from one position up to another; what is undecided does."""
        stays = np.ones(stop - start, dtype=np.bool_)
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
        staying = torch.from_numpy(self._staying(start, stop)).to(device)
        return (recent | staying) & (entry <= query)
