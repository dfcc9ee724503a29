"""Which KV entries a bank takes in, and in how many blocks: one arithmetic for planner and
cache."""

from dataclasses import dataclass
from typing import Literal

from ullage.specs.blocks import BLOCK_TOKENS

Positions = Literal["constant", "compact"]


@dataclass(frozen=True)
class Consolidation:
    """Tokens come in segments of `segment`. A token sees those of its own segment and the `recent`
    before it as they are, the first `sinks` of all, and a bank of `slots` slots a KV head, in which
    the others lie: what is at least `threshold` like a slot is merged into it.

    `top_k` slots are read for each token, 0: all. `positions`: a slot stands at one and the same
    distance from a segment, or its rank by age is its distance. `count_bias`: a slot weighs as much
    as the entries that were merged into it, which `count_cap` says it has at most, 0: no end.
    `centred`: keys are likened by what sets them apart from the slots' mean.
    """

    segment: int
    recent: int
    slots: int
    sinks: int
    threshold: float
    top_k: int = 0
    positions: Positions = "compact"
    count_bias: bool = False
    count_cap: int = 0
    centred: bool = False

    @property
    def window(self) -> int:
        """Entries that are held as they are, at most, the sinks not counted."""
        return self.segment + self.recent

    @property
    def bank_at(self) -> int:
        """The bank's first slot, behind those of the window and of the sinks."""
        return self.window + self.sinks

    @property
    def reach(self) -> int:
        """The longest distance at which a token sees anything, however long the text: that of the
        first sink, which stands behind the bank."""
        bank = self.recent + self.slots if self.positions == "compact" else self.window
        return self.segment - 1 + bank + self.sinks

    def first_recent(self, position: int) -> int:
        """The first of the entries that the token at `position` sees as they are."""
        return max(0, position // self.segment * self.segment - self.recent)

    def stays_until(self, position: int) -> int:
        """The position before which nothing more leaves the exact entries."""
        segments = max(position, self.recent) // self.segment + 1
        return segments * self.segment

    def banked(self, tokens: int) -> int:
        """Slots of the bank that a head has used of a sequence of `tokens`, at most."""
        return min(self.slots, max(0, self._gone(tokens) - self.sinks))

    def held(self, tokens: int) -> int:
        """Slots in all that a sequence of `tokens` takes."""
        gone = self._gone(tokens)
        if not gone:
            return min(tokens, self.window)
        return self.window + min(self.sinks, gone) + self.banked(tokens)

    def blocks(self, tokens: int) -> int:
        """Blocks of one KV head that hold them, one behind the other."""
        return -(-self.held(tokens) // BLOCK_TOKENS)

    def _gone(self, tokens: int) -> int:
        """Tokens that are not held as they are, once `tokens` have come."""
        return self.first_recent(max(0, tokens - 1))
