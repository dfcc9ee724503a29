"""KVPool: fixed-size blocks with one owner of their bytes.

A block holds K and V of `BLOCK_TOKENS` tokens for one KV head, int8 and fp8 with scales. Blocks are
handed out as runs, as few and as long as the free space allows, so that attention reads them as
plain views and nothing is ever gathered.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple, Protocol

import torch

from ullage.errors import BudgetExceeded
from ullage.kv.entries import Entries, bits, room_for
from ullage.kv.host import sent
from ullage.specs.blocks import BLOCK_TOKENS


@dataclass(frozen=True, order=True)
class Run:
    """`count` blocks that lie side by side, from number `start`."""

    start: int
    count: int


class Place(NamedTuple):
    """Of one entry: slot number `slot`, from 0, of the blocks of `run`, one behind the other."""

    run: Run
    slot: int


class Blocks(Protocol):
    """Where a row has its blocks from."""

    @property
    def dtype(self) -> torch.dtype:
        """Of an entry's numbers."""

    @property
    def taken_bytes(self) -> int:
        """Bytes of the blocks that somebody has."""

    def take(self, count: int, multiple: int = 1) -> list[Run]:
        """`count` blocks in few runs, each a multiple of `multiple`.

        Raises:
            BudgetExceeded: there are fewer; nothing is taken.
        """

    def give_back(self, runs: list[Run]) -> None:
        """Return `runs`; their contents are gone."""

    def entries(self, run: Run) -> Entries:
        """K and V of a run, [count, BLOCK_TOKENS, D] each, where they lie."""

    def store(self, places: Sequence[Place], entries: Entries) -> None:
        """Copy `entries`, K and V [places, 1, D] in the format of the blocks, to `places`."""


class KVPool:
    """`num_blocks` blocks on one device, in one format.

    On CPU the operating system backs a page when it is first written, so free blocks that were
    never used cost nothing.
    """

    def __init__(
        self,
        num_blocks: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.blocks = room_for(num_blocks, head_dim, dtype, device)
        self.num_blocks = num_blocks
        self._free = [Run(0, num_blocks)] if num_blocks else []  # sorted, never adjacent

    @property
    def dtype(self) -> torch.dtype:
        """Of an entry's numbers."""
        return self.blocks.keys.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, K and V, scales included."""
        return sum(tensor.shape[1:].numel() * tensor.itemsize for tensor in self.blocks.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_blocks * self.block_bytes

    @property
    def taken_bytes(self) -> int:
        """Bytes of the blocks that somebody has."""
        return (self.num_blocks - self.free_blocks) * self.block_bytes

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody has."""
        return sum(run.count for run in self._free)

    def entries(self, run: Run) -> Entries:
        """See `Blocks`."""
        return self.blocks.each(lambda tensor: tensor[run.start : run.start + run.count])

    def store(self, places: Sequence[Place], entries: Entries) -> None:
        """See `Blocks`; one copy of each of K and V, however many places there are."""
        _store(self.blocks, [run.start * BLOCK_TOKENS + slot for run, slot in places], entries)

    def take(self, count: int, multiple: int = 1) -> list[Run]:
        """`count` blocks in as few runs as the free space allows, each a multiple of `multiple`.

        Raises:
            BudgetExceeded: fewer than `count` are free; nothing is taken.
        """
        self._refuse_more_than_free(count)
        runs = self._whole(count) or self._pieces(count, multiple)
        for run in runs:
            self._remove(run)
        return runs

    def give_back(self, runs: list[Run]) -> None:
        """Return `runs` to the free space; their contents are gone."""
        for run in runs:
            self._insert(run)

    def check_integrity(self, all_free: bool = False) -> None:
        """Look for a bug, never a user's doing; costs a look at each free run.

        Raises:
            RuntimeError: a block is free twice, runs are out of order, or, where `all_free`, a
                block is taken.
        """
        end = -1
        for run in self._free:
            if run.start <= end or run.count < 1 or run.start + run.count > self.num_blocks:
                raise RuntimeError(f"the free runs of the pool are damaged: {self._free}")
            end = run.start + run.count
        if all_free and self.free_blocks < self.num_blocks:
            raise RuntimeError(f"{self.num_blocks - self.free_blocks} blocks were not given back")

    def _refuse_more_than_free(self, count: int) -> None:
        if count > self.free_blocks:
            raise BudgetExceeded(
                f"The KV pool has {self.free_blocks} of {self.num_blocks} blocks free; "
                f"{count} are needed."
            )

    def _whole(self, count: int) -> list[Run]:
        """The smallest free run that holds `count`, so that long runs stay for long sequences."""
        holding = [run for run in self._free if run.count >= count]
        if not holding:
            return []
        best = min(holding, key=lambda run: run.count)
        return [Run(best.start, count)]

    def _pieces(self, count: int, multiple: int) -> list[Run]:
        """`count` blocks from several runs, the longest first."""
        pieces: list[Run] = []
        missing = count
        for run in sorted(self._free, key=lambda run: run.count, reverse=True):
            usable = min(run.count // multiple * multiple, missing)
            if usable:
                pieces.append(Run(run.start, usable))
                missing -= usable
        if missing:
            raise BudgetExceeded(
                f"The KV pool has {self.free_blocks} of {self.num_blocks} blocks free, in pieces "
                f"too small: {count} are needed, {multiple} side by side at least."
            )
        return pieces

    def _remove(self, run: Run) -> None:
        """Take `run`, the head of a free run, out of the free space."""
        at = bisect_left(self._free, run.start, key=lambda free: free.start)
        rest = self._free[at].count - run.count
        self._free[at : at + 1] = [Run(run.start + run.count, rest)] if rest else []

    def _insert(self, run: Run) -> None:
        """Put `run` into the free space and join it with its neighbours."""
        at = bisect_left(self._free, run.start, key=lambda free: free.start)
        overlaps_next = at < len(self._free) and self._free[at].start < run.start + run.count
        overlaps_last = at and self._free[at - 1].start + self._free[at - 1].count > run.start
        if overlaps_next or overlaps_last:
            raise RuntimeError(f"{run} was given back twice")
        start, count, first, last = run.start, run.count, at, at
        if at and self._free[at - 1].start + self._free[at - 1].count == start:
            start, count, first = self._free[at - 1].start, self._free[at - 1].count + count, at - 1
        if at < len(self._free) and run.start + run.count == self._free[at].start:
            count, last = count + self._free[at].count, at + 1
        self._free[first:last] = [Run(start, count)]


class HeapBlocks:
    """Blocks straight from torch's allocator, as many as there is memory for: where nobody set a
    budget. They are freed when they are given back."""

    def __init__(self, head_dim: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.head_dim, self.dtype, self.device = head_dim, dtype, device
        self._runs: dict[Run, Entries] = {}
        self._next = 0

    @property
    def taken_bytes(self) -> int:
        """See `Blocks`."""
        return sum(tensor.nbytes for held in self._runs.values() for tensor in held.tensors)

    def take(self, count: int, multiple: int = 1) -> list[Run]:
        """See `Blocks`; never refused by us."""
        run = Run(self._next, count)
        self._runs[run] = room_for(count, self.head_dim, self.dtype, self.device)
        self._next += count
        return [run]

    def give_back(self, runs: list[Run]) -> None:
        """See `Blocks`."""
        for run in runs:
            del self._runs[run]

    def entries(self, run: Run) -> Entries:
        """See `Blocks`."""
        return self._runs[run]

    def store(self, places: Sequence[Place], entries: Entries) -> None:
        """See `Blocks`; a copy for each run."""
        at = 0
        for run, several in groupby(places, attrgetter("run")):
            slots = [place.slot for place in several]
            span = slice(at, at + len(slots))
            _store(self._runs[run], slots, entries.part(slice(None), heads=span))
            at = span.stop


def _store(blocks: Entries, slots: list[int], entries: Entries) -> None:
    """`entries`, [slots, 1, D], into those slots of `blocks`, [count, BLOCK_TOKENS, D]."""
    at = sent(torch.tensor(slots), blocks.keys.device)
    for mine, new in zip(blocks.tensors, entries.tensors, strict=True):
        bits(mine).flatten(0, 1).index_copy_(0, at, bits(new).squeeze(1))
