"""One layer's KV entries of one sequence, over the pool.

Keys arrive with their rotary position already in them, so the order in which entries lie does not
matter to attention; a sliding layer overwrites its oldest entry in place.
"""

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch

from ullage.errors import TechniqueError
from ullage.kv.before import Attend, Before
from ullage.kv.entries import Entries, side_by_side, stored
from ullage.kv.kernels import Piece
from ullage.kv.pool import Blocks, Place
from ullage.kv.slots import Ring, Slots
from ullage.kv.state import State


@dataclass(frozen=True)
class NewTokens:
    """What N tokens of one sequence bring to one layer. `cos` and `sin` of their positions and what
    the layer's attention is computed from, `hidden`, are there where a technique asks for them."""

    query: torch.Tensor  # [Hq, N, D]
    keys: torch.Tensor  # [Hkv, N, D]
    values: torch.Tensor  # [Hkv, N, D]
    scale: float  # of a query's product with a key
    cos: torch.Tensor | None = None  # [N, D], or narrower where not all of a head is rotated
    sin: torch.Tensor | None = None  # [N, D], likewise
    hidden: torch.Tensor | None = None  # [N, E]

    def __len__(self) -> int:
        return self.keys.shape[1]

    def stored(self, dtype: torch.dtype) -> Entries:
        """Their entries, rounded as a pool of `dtype` stores them: what their own queries are shown
        too, so that results do not hang on the chunk size."""
        return stored(self.keys, self.values, dtype)

    def heads(self, first: int) -> slice:
        """As many query heads as there are, from `first` on."""
        return slice(first, first + self.query.shape[0])

    def part(self, start: int, stop: int) -> "NewTokens":
        """The tokens from `start` up to `stop`, as views."""
        return self.at(slice(start, stop))

    def at(self, tokens: slice | torch.Tensor) -> "NewTokens":
        """Some of the tokens: views of a slice, copies of those at indices."""
        return NewTokens(
            self.query[:, tokens],
            self.keys[:, tokens],
            self.values[:, tokens],
            self.scale,
            *(None if part is None else part[tokens] for part in (self.cos, self.sin, self.hidden)),
        )


class Taken(NamedTuple):
    """Room for one token: where the entry of each KV head is to go, and what the query attends to
    once it is there, until the next token."""

    places: list[Place]
    pieces: list[Piece]


class Row(ABC):
    """One sequence in one layer, its blocks from `pool`."""

    pool: Blocks
    before: Before | None = None

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens seen."""

    @property
    @abstractmethod
    def live_tokens(self) -> float:
        """Entries that a KV head holds, the mean over the heads."""

    @property
    def beside_bytes(self) -> int:
        """What it keeps beside its blocks, where that is as large as entries are."""
        return 0

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Take the blocks that a sequence of `tokens` needs here.

        Raises:
            BudgetExceeded: the pool has too few; nothing is taken.
        """

    @abstractmethod
    def take(self, new: NewTokens, first_head: int = 0) -> Taken:
        """Make room for the entries of one token. Its query's heads are those from `first_head` on
        of all that are asked about at once."""

    @abstractmethod
    def attend_chunk(self, new: NewTokens, attention: Attend) -> torch.Tensor:
        """Store the entries of several tokens and let their queries attend: [Hq, N, D]."""

    def attend(self, new: NewTokens, attention: Attend) -> torch.Tensor:
        """Either, by how many `new` are."""
        seeing = attention if self.before is None else self.before.behind(attention)
        if len(new) > 1:
            return self.attend_chunk(new, seeing)
        taken = self.take(new)
        self.pool.store(taken.places, new.stored(self.pool.dtype))
        return seeing(new.query, taken.pieces)

    def pieces(self, taken: Taken, heads: slice) -> list[Piece]:
        """What the query heads `heads`, for which room was `taken`, see in all."""
        if self.before is None:
            return taken.pieces
        return self.before.joined(taken.pieces, heads)

    @abstractmethod
    def replace_first(self, entries: Entries) -> None:
        """Hold `entries`, [Hkv, 1, D] in the pool's format, as those of the first token, unless
        these are gone."""

    @abstractmethod
    def copy(self) -> Self:
        """A row with blocks of its own that holds the same and goes its own way from here.

        Raises:
            BudgetExceeded: the pool has too few; nothing is taken.
        """

    @abstractmethod
    def release(self) -> None:
        """Give all blocks back; the row is empty, and sees nothing beside itself."""
        self.before = None

    def state(self) -> State:
        """All that it holds, as it lies: good until the row goes on.

        Raises:
            TechniqueError: rows of this kind are not saved.
        """
        raise TechniqueError("Only what is read with camelot can be saved.")

    def restore(self, state: State, tokens: int) -> None:
        """Hold what `state` gave of a row like this after `tokens` tokens, one at least; the row is
        empty before.

        Raises:
            InputError: `state` is of a row that is not like this.
            BudgetExceeded: the pool has too few blocks.
            TechniqueError: rows of this kind are not saved.
        """
        raise TechniqueError("Only what is read with camelot can be saved.")


class FullRow(Row):
    """Full attention: all entries are kept; entry p lies in slot p."""

    def __init__(self, pool: Blocks, num_kv_heads: int) -> None:
        self.pool, self.slots, self._length = pool, Slots(pool, num_kv_heads), 0

    @property
    def length(self) -> int:
        return self._length

    @property
    def live_tokens(self) -> float:
        return self._length

    def reserve(self, tokens: int) -> None:
        self.slots.reserve(tokens)

    def attend_chunk(self, new: NewTokens, attention: Attend) -> torch.Tensor:
        past, own = self._grow(len(new)), new.stored(self.pool.dtype)
        self.slots.write(past, own)
        return attention(new.query, [*self.slots.read(0, past), Piece.of(own, causal=True)])

    def take(self, new: NewTokens, first_head: int = 0) -> Taken:
        slot = self._grow(1)
        pieces = self.slots.read(0, self._length)
        return Taken(self.slots.places(slot), seen_by(new.heads(first_head), pieces))

    def _grow(self, tokens: int) -> int:
        """Room for more: the first slot."""
        past = self._length
        self.slots.grow(past + tokens)
        self._length += tokens
        return past

    def replace_first(self, entries: Entries) -> None:
        self.slots.write(0, entries)

    def copy(self) -> Self:
        twin = copy(self)
        twin.slots = self.slots.copy(self._length)
        return twin

    def release(self) -> None:
        super().release()
        self.slots.release()
        self._length = 0


class SlidingRow(Row):
    """A query sees the `window` newest entries up to its own."""

    def __init__(self, pool: Blocks, num_kv_heads: int, window: int) -> None:
        self.pool, self.ring = pool, Ring(Slots(pool, num_kv_heads), window)

    @property
    def length(self) -> int:
        return self.ring.length

    @property
    def live_tokens(self) -> float:
        return self.ring.used

    def reserve(self, tokens: int) -> None:
        self.ring.reserve(tokens)

    def take(self, new: NewTokens, first_head: int = 0) -> Taken:
        places = self.ring.take()
        return Taken(places, seen_by(new.heads(first_head), self.ring.read()))

    def attend_chunk(self, new: NewTokens, attention: Attend) -> torch.Tensor:
        keys, values = self._laid_out(new)
        mask = _band(len(new), keys.shape[1], self.ring.window, keys.device)
        return attention(new.query, [Piece(keys, values, mask=mask)])

    def _laid_out(self, new: NewTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the entries of `new`: K and V, [Hkv, past + N, D] each, of the window before them
        and of them."""
        past = self.ring.between(self.ring.first, self.length)
        own = new.stored(self.pool.dtype)
        laid_out = side_by_side([*past, own], new.keys.dtype)
        self.ring.write(own)
        return laid_out

    def replace_first(self, entries: Entries) -> None:
        if not self.ring.first:
            self.ring.slots.write(0, entries)

    def copy(self) -> Self:
        twin = copy(self)
        twin.ring = self.ring.copy()
        return twin

    def release(self) -> None:
        super().release()
        self.ring.release()

    def state(self) -> State:
        return self.ring.state()

    def restore(self, state: State, tokens: int) -> None:
        self.ring.restore(state, tokens)


def seen_by(heads: slice, pieces: list[Piece]) -> list[Piece]:
    """`pieces` that the query heads `heads` see."""
    return [replace(piece, heads=heads) for piece in pieces]


def _band(queries: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """Bool [queries, keys] for queries that are the newest of the keys: each sees the `window`
    newest keys up to its own."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    band = key <= query
    return band.logical_and_(key > query - window)
