"""Which share of the KV entries survives, and in how many blocks: one arithmetic for the planner
and the cache."""

from dataclasses import dataclass
from math import floor

from ullage.specs.blocks import BLOCK_TOKENS

SPAN_TOKENS = 512  # of a prompt, laid out beside the window, under a mask, at once


@dataclass(frozen=True)
class Survival:
    """All entries of the newest `window` tokens are held. Of those that leave it the share `kept`,
    over all heads together, survives, and the first `sinks` tokens in any case. That is decided for
    `every` tokens at a time, at most `window`."""

    kept: float
    window: int
    every: int
    sinks: int

    def entries(self, tokens: int, heads: int) -> int:
        """Entries that `heads` heads together keep of the first `tokens`, of which all is
        decided."""
        wanted = floor(self.kept * tokens * heads)
        return min(tokens * heads, max(wanted, self.sinks * heads))

    def blocks(self, tokens: int, heads: int) -> int:
        """Blocks that hold a sequence of `tokens` at most, over all heads: the window's, then the
        survivors', of which each head may leave the last all but empty."""
        left = max(0, tokens - self.window)
        decided = -(-left // self.every) * self.every
        entries = min(self.entries(decided, heads), left * heads)
        ragged = (entries + heads * (BLOCK_TOKENS - 1)) // BLOCK_TOKENS if entries else 0
        survivors = min(ragged, heads * -(-left // BLOCK_TOKENS))
        return heads * -(-min(tokens, self.window) // BLOCK_TOKENS) + survivors
