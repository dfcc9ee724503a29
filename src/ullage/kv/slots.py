"""The blocks of one layer of one sequence, or of one head of it, as slots that are numbered from 0,
and a ring of them that holds the newest tokens."""

import torch

from ullage.errors import BudgetExceeded
from ullage.kv.entries import Entries, bits
from ullage.kv.kernels import Piece
from ullage.kv.pool import Blocks, Place, Run
from ullage.kv.state import State, packed, unpacked
from ullage.specs.blocks import BLOCK_TOKENS


class Segment:
    """A run of the pool seen as one stretch of slots for all KV heads."""

    def __init__(self, pool: Blocks, run: Run, num_kv_heads: int) -> None:
        self.run = run
        self.slots = run.count // num_kv_heads * BLOCK_TOKENS
        shape = (num_kv_heads, self.slots)
        self.entries = pool.entries(run).each(lambda part: part.view(*shape, *part.shape[2:]))


class Slots:
    """The blocks of one row, as slots numbered from 0; a slot holds one token for all KV heads."""

    def __init__(self, pool: Blocks, num_kv_heads: int) -> None:
        self.pool, self.num_kv_heads = pool, num_kv_heads
        self.segments: list[Segment] = []
        self.capacity = 0  # slots in the blocks taken so far

    def reserve(self, slots: int) -> None:
        """Take blocks until there are `slots`.

        Raises:
            BudgetExceeded: the pool has too few; nothing is taken.
        """
        missing = slots - self.capacity
        if missing > 0:
            blocks = self.num_kv_heads * -(-missing // BLOCK_TOKENS)
            runs = self.pool.take(blocks, multiple=self.num_kv_heads)
            more = [Segment(self.pool, run, self.num_kv_heads) for run in runs]
            self.segments += more
            self.capacity += sum(segment.slots for segment in more)

    def grow(self, slots: int, most: int | None = None) -> None:
        """Room for `slots` and a quarter more, `most` at most, so that a sequence nobody sized in
        advance has few segments; for no more than `slots` when the pool is nearly full.

        Raises:
            BudgetExceeded: the pool has too few; nothing is taken.
        """
        if slots <= self.capacity:
            return
        ahead = slots + slots // 4
        try:
            self.reserve(ahead if most is None else min(ahead, most))
        except BudgetExceeded:
            self.reserve(slots)

    def copy(self, used: int) -> "Slots":
        """As many slots in other blocks, the first `used` with the same entries.

        Raises:
            BudgetExceeded: the pool has too few; nothing is taken.
        """
        twin, at = Slots(self.pool, self.num_kv_heads), 0
        twin.reserve(self.capacity)
        for piece in self.read(0, used):
            twin.write(at, piece)
            at += len(piece)
        return twin

    def release(self) -> None:
        """Give all blocks back."""
        self.pool.give_back([segment.run for segment in self.segments])
        self.segments, self.capacity = [], 0

    def write(self, slot: int, entries: Entries) -> None:
        """Copy `entries`, in the pool's format, to as many slots from `slot` on."""
        first, written = 0, 0  # the segment's first slot, tokens stored
        for segment in self.segments:
            at = slot + written - first
            count = min(segment.slots - at, len(entries) - written)
            if count > 0:
                whole = count == len(entries)
                part = entries if whole else entries.part(slice(written, written + count))
                for mine, new in zip(segment.entries.tensors, part.tensors, strict=True):
                    mine[:, at : at + count] = new
                written += count
            first += segment.slots

    def put(self, heads: torch.Tensor, slots: torch.Tensor, entries: Entries) -> None:
        """Copy `entries`, K and V [n, 1, D] in the pool's format, to one slot of one KV head each,
        by `heads` and `slots`, [n]."""
        first = 0  # the segment's first slot
        for segment in self.segments:
            inside = (slots >= first) & (slots < first + segment.slots)
            at = heads[inside], slots[inside] - first
            for mine, new in zip(segment.entries.tensors, entries.tensors, strict=True):
                bits(mine).index_put_(at, bits(new)[inside].squeeze(1))
            first += segment.slots

    def restore(self, slot: int, state: State, name: str, count: int) -> None:
        """`count` entries that were packed as `name`, to the slots from `slot` on, which are there;
        raises what `unpacked` does."""
        if count:
            like = self.segments[0].entries
            self.write(slot, unpacked(state, name, count, like))

    def places(self, slot: int) -> list[Place]:
        """Where the entries of one slot lie, one for each KV head."""
        first = 0  # the segment's first slot
        for segment in self.segments:
            if slot < first + segment.slots:
                return [
                    Place(segment.run, at)
                    for at in range(slot - first, segment.slots * self.num_kv_heads, segment.slots)
                ]
            first += segment.slots
        raise IndexError(f"slot {slot} of {first}")

    def read(self, start: int, stop: int) -> list[Piece]:
        """The slots from `start` up to `stop`, as views."""
        pieces, first = [], 0  # the segment's first slot
        for segment in self.segments:
            span = slice(max(0, start - first), max(0, min(segment.slots, stop - first)))
            if span.start < span.stop:
                pieces.append(Piece.of(segment.entries.part(span)))
            first += segment.slots
        return pieces


class Ring:
    """The newest `window` entries of a sequence; entry p lies in slot p mod window."""

    def __init__(self, slots: Slots, window: int, length: int = 0) -> None:
        self.slots, self.window, self.length = slots, window, length

    @property
    def used(self) -> int:
        """Entries that are held."""
        return min(self.length, self.window)

    @property
    def first(self) -> int:
        """Position of the oldest of them."""
        return self.length - self.used

    def reserve(self, tokens: int) -> None:
        """Room for a sequence of `tokens`; raises what `Slots.reserve` does."""
        self.slots.reserve(min(tokens, self.window))

    def state(self) -> State:
        """All entries, in the order in which they lie."""
        return packed("ring", self.read())

    def restore(self, state: State, tokens: int) -> None:
        """What `state` gave after `tokens` tokens, where nothing is yet; raises what `Slots.grow`
        and `Slots.restore` do."""
        used = min(tokens, self.window)
        self.slots.grow(used, self.window)
        self.slots.restore(0, state, "ring", used)
        self.length = tokens

    def copy(self) -> "Ring":
        """The same entries in blocks of their own; raises what `Slots.copy` does."""
        return Ring(self.slots.copy(self.used), self.window, self.length)

    def release(self) -> None:
        """Give all blocks back; the ring is empty."""
        self.slots.release()
        self.length = 0

    def take(self) -> list[Place]:
        """Room for one more, over the oldest: where it goes."""
        self.slots.grow(min(self.length + 1, self.window), self.window)
        self.length += 1
        return self.slots.places((self.length - 1) % self.window)

    def write(self, entries: Entries) -> None:
        """Store new entries over the oldest."""
        new = len(entries)
        self.slots.grow(min(self.length + new, self.window), self.window)
        self.length += new
        kept = entries if new <= self.window else entries.part(slice(new - self.window, new))
        slot = (self.length - len(kept)) % self.window
        first = self.window - slot
        if len(kept) <= first:
            self.slots.write(slot, kept)
            return
        self.slots.write(slot, kept.part(slice(first)))
        self.slots.write(0, kept.part(slice(first, None)))

    def read(self) -> list[Piece]:
        """All entries, in the order in which they lie."""
        return self.slots.read(0, self.used)

    def between(self, start: int, stop: int) -> list[Piece]:
        """The entries from position `start` up to `stop`, oldest first; all must be held."""
        if start >= stop:
            return []
        slot, end = start % self.window, (stop - 1) % self.window + 1
        if slot < end:
            return self.slots.read(slot, end)
        return [*self.slots.read(slot, self.window), *self.slots.read(0, end)]
