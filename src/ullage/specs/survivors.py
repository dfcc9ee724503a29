"""Which KV entries survive, and in how many blocks: one arithmetic for planner and cache."""

from dataclasses import dataclass
from math import floor

from ullage.specs.blocks import BLOCK_TOKENS

SINKS = 4  # first tokens, which attention falls back on: StreamingLLM (arXiv 2309.17453)
SPAN_TOKENS = 512  # of a prompt, attended to at once, so that masks do not grow with it


@dataclass(frozen=True)
class Survival:
    """One KV head's: all entries of the newest `window` tokens are held. Of those that leave it the
    share `kept` survives, and the first `sinks` tokens in any case. That is decided for `every`
    tokens at a time, at most `window`."""

    kept: float
    window: int
    every: int
    sinks: int

    def entries(self, tokens: int) -> int:
        """Entries kept of the first `tokens`, of which all is decided."""
        return max(floor(self.kept * tokens), min(self.sinks, tokens))

    def survivors(self, tokens: int) -> int:
        """Entries beyond the window, at most, of a sequence of `tokens`."""
        left = max(0, tokens - self.window)
        return min(self.entries(-(-left // self.every) * self.every), left)

    def slots(self, tokens: int) -> int:
        """Entries held of a sequence of `tokens`, at most: the window's and the survivors'."""
        return min(tokens, self.window) + self.survivors(tokens)

    def blocks(self, tokens: int) -> int:
        """Blocks that hold them, one behind the other."""
        return -(-self.slots(tokens) // BLOCK_TOKENS)
