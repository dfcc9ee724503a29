"""BankRow: exact entries of the newest tokens and of the first few, and a bank for all between.

A sequence is cut into segments, whose bounds hang on positions alone, so that nothing hangs on how
a prompt is cut into chunks. As a segment begins, what left the exact entries is written to the
bank, which then stays as it is until the next one. All entries lie in one stretch of slots: a ring
of the exact ones, the first few tokens behind it once they left that, then the bank.

A query that reads the bank is turned to where it stands if the slots are at position 0, or, by
their age, just before the exact ones, and so it is for the first few tokens, as if these stood
before the bank: no distance grows with the text, beyond what the model was trained on.
"""

from copy import copy
from dataclasses import replace
from typing import Self

import torch

from ullage.errors import TechniqueError
from ullage.kv.bank import HIDDEN, Bank
from ullage.kv.before import Attend
from ullage.kv.entries import Entries, side_by_side
from ullage.kv.kernels import Piece
from ullage.kv.pool import Blocks
from ullage.kv.rotation import Angles, Turn, after, normed, rotated
from ullage.kv.rows import NewTokens, Row, Taken, seen_by
from ullage.kv.slots import Ring, Slots
from ullage.kv.sparse_head import Survivors
from ullage.kv.state import State, held, packed
from ullage.specs.consolidation import Consolidation


class BankRow(Row):
    """One sequence in one layer, consolidated by `rules`."""

    def __init__(self, pool: Blocks, num_kv_heads: int, rules: Consolidation) -> None:
        self.pool, self.rules = pool, rules
        self.slots = Slots(pool, num_kv_heads)
        self.ring = Ring(self.slots, rules.window)
        self.sinks = Survivors(self.slots, rules.window)
        self.bank = Bank(self.slots, rules.bank_at, rules)
        self.angles = Angles()
        self._turn: tuple[tuple[int, int], Turn] | None = None  # of queries, and for how long
        self._visible: torch.Tensor | None = None  # [Hkv, 1, size], retrieved in this segment

    @property
    def length(self) -> int:
        return self.ring.length

    @property
    def live_tokens(self) -> float:
        exact = self.length - self.rules.first_recent(max(0, self.length - 1))
        return exact + self.sinks.length + self.bank.used

    @property
    def beside_bytes(self) -> int:
        beside = [self._visible, *(self._turn[1] if self._turn else ())]
        nbytes: int = sum(tensor.nbytes for tensor in beside if tensor is not None)
        return self.bank.beside_bytes + self.angles.nbytes + nbytes

    def reserve(self, tokens: int) -> None:
        self.slots.reserve(self.rules.held(tokens))

    def take(self, new: NewTokens, first_head: int = 0) -> Taken:
        self._begin(new)
        position = self.length
        places = self.ring.take()
        exact = self.ring.between(self.rules.first_recent(position), self.length)
        pieces = [*self._far(new, position), *exact]
        return Taken(places, seen_by(new.heads(first_head), pieces))

    def attend_chunk(self, new: NewTokens, attention: Attend) -> torch.Tensor:
        """A segment at a time, once anything leaves the exact entries."""
        parts, at = [], 0
        while at < len(new):
            rest = self.rules.stays_until(self.length) - self.length
            parts.append(self._attend_span(new.part(at, at + rest), attention))
            at += rest
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _attend_span(self, new: NewTokens, attention: Attend) -> torch.Tensor:
        """Tokens that see the same past."""
        self._begin(new)
        own, position = new.stored(self.pool.dtype), self.length
        exact = self.ring.between(self.rules.first_recent(position), position)
        pieces = [*self._far(new, position), *exact, Piece.of(own, causal=True)]
        output = attention(new.query, pieces)
        self.ring.write(own)
        return output

    def _begin(self, new: NewTokens) -> None:
        """Before the next tokens, which see the same past: where they are the first of a segment,
        what they see no longer as it was goes to the bank."""
        position = self.length
        known_better = self.angles.see(position, *_turn_of(new))
        if known_better:
            self.bank.turned = None
        if position % self.rules.segment:
            return
        self._visible = None
        gone = self.rules.first_recent(position)
        seen = self.rules.first_recent(position - 1) if position else 0
        if gone > seen:
            self.slots.grow(self.rules.held(position + 1), self.rules.bank_at + self.rules.slots)
            self._let_go(seen, gone, new)

    def _let_go(self, start: int, stop: int, new: NewTokens) -> None:
        """The exact entries from position `start` up to `stop` become sinks, or the bank's; `new`
        are the tokens that come now."""
        sinks = min(stop, max(start, self.rules.sinks))
        for piece in self.ring.between(start, sinks):
            self.sinks.append(piece)
        if sinks == stop or not self.rules.slots:
            return
        keys, values = side_by_side(self.ring.between(sinks, stop), torch.float32)
        positions = torch.arange(sinks, stop, dtype=torch.int32, device=keys.device)
        first = normed(*_turn_of(new, 1))
        cos, sin = after(first, self.angles.turn(positions - self.length))
        keys = rotated(keys, cos, -sin)
        self.bank.write(keys, values, positions, self.rules.banked(self.length + 1))

    def _far(self, new: NewTokens, position: int) -> list[Piece]:
        """Sinks and bank, as the tokens from `position` on see them."""
        if not self.bank.size:
            return self.sinks.read()
        bias = self._retrieved(new) if self.rules.top_k else None
        queries = new.query.float().expand(2, *new.query.shape)
        turn = self._query_turn(position, _turn_of(new, 1))
        query, other = rotated(queries, *turn).to(new.query.dtype)
        sinks = [replace(piece, query=other) for piece in self.sinks.read()]
        return [*sinks, *self.bank.pieces(query, self.angles, bias)]

    def _query_turn(self, position: int, first: Turn) -> Turn:
        """What turns queries to where they stand if the bank is at position 0, and if the sinks
        are, before it: [2, 1, 1, rot] each. One and the same for all of a segment, as both stand
        still meanwhile. Found by a token of it, the `first` that asks, at `position`: what `angles`
        know is not exact enough for distances as long as a text."""
        rules = self.rules
        known = position // rules.segment, self.angles.exactness
        if self._turn is None or self._turn[0] != known:
            compact = rules.positions == "compact"
            away = position % rules.segment + (rules.recent if compact else rules.window)
            before = rules.sinks + (self.bank.size if compact else 0)
            at = torch.tensor([away, away + before], device=first[0].device)
            turn = self.angles.turn(at[:, None, None], behind_first=(False, True))
            self._turn = known, after(_opposite(normed(*first)), turn)
        return self._turn[1]

    def _retrieved(self, new: NewTokens) -> torch.Tensor:
        """The bias, [Hkv, N, filled], under which a token sees what was retrieved for the tokens of
        its segment up to itself."""
        keys = rotated(new.keys.float(), *_opposite(normed(*_turn_of(new))))
        visible = self.bank.nearest(keys)
        if self._visible is not None:
            visible = torch.cat([self._visible, visible], dim=1)
        visible = visible.cumsum(1) > 0
        self._visible = visible[:, -1:].clone()
        visible = visible[:, -len(new) :, : self.bank.filled]
        return torch.where(visible, 0.0 if self.bank.bias is None else self.bank.bias, HIDDEN)

    def replace_first(self, entries: Entries) -> None:
        if self.sinks.length:
            self.slots.write(self.sinks.first, entries)
        elif not self.ring.first:
            self.slots.write(0, entries)

    def copy(self) -> Self:
        twin = copy(self)
        rules, bank = self.rules, self.bank
        far = bool(self.sinks.length) * rules.window + self.sinks.length
        far = rules.bank_at + bank.size if bank.size else far
        twin.slots = self.slots.copy(max(self.ring.used, far))
        twin.ring = Ring(twin.slots, rules.window, self.ring.length)
        twin.sinks = Survivors(twin.slots, rules.window, self.sinks.length)
        twin.bank = bank.copy(twin.slots)
        twin.angles = copy(self.angles)
        return twin

    def state(self) -> State:
        state = self.ring.state() | packed("sinks", self.sinks.read())
        state |= self.bank.state() | self.angles.state()
        if self._turn is not None:
            state["turn"] = torch.stack(self._turn[1])
        if self._visible is not None:
            state["visible"] = self._visible
        return state

    def restore(self, state: State, tokens: int) -> None:
        rules = self.rules
        size = rules.banked(tokens)
        self.slots.grow(rules.held(tokens), rules.bank_at + rules.slots)
        self.ring.restore(state, tokens)
        self.sinks.length = min(rules.sinks, rules.first_recent(tokens - 1))
        self.slots.restore(rules.window, state, "sinks", self.sinks.length)
        self.bank.restore(state, size)
        device = self.slots.segments[0].entries.keys.device
        self.angles.restore(state, tokens, device)
        if size:
            rotated_width = 2 * len(state["angles.first"])
            turn = held(state, "turn", torch.float32, (2, 2, 1, 1, rotated_width))
            cos, sin = turn.to(device)
            self._turn = ((tokens - 1) // rules.segment, self.angles.exactness), (cos, sin)
        if rules.top_k and size:
            shape = (self.slots.num_kv_heads, 1, size)
            self._visible = held(state, "visible", torch.bool, shape).to(device)

    def release(self) -> None:
        super().release()
        self.ring.release()
        self.sinks.length = 0
        self.bank = Bank(self.slots, self.rules.bank_at, self.rules)
        self.angles, self._turn, self._visible = Angles(), None, None


def _turn_of(new: NewTokens, tokens: int | None = None) -> Turn:
    """What turned the first `tokens`, or all, [N, rot] each: without it no key can be turned back.

    Raises:
        TechniqueError: the layer that they come from has no technique attached that says.
    """
    if new.cos is None or new.sin is None:
        raise TechniqueError(
            "A bank is gone on from while CAMELoT is attached to the model: enter that `with` "
            "again, or give an empty cache."
        )
    return new.cos[:tokens], new.sin[:tokens]


def _opposite(turn: Turn) -> Turn:
    return turn[0], -turn[1]
