"""How many entries survive, and the blocks that hold them at most."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.specs.blocks import BLOCK_TOKENS
from ullage.specs.survivors import Survival

survivals = st.builds(
    lambda kept, window, every, sinks: Survival(kept, window, min(every, window), sinks),
    st.floats(0, 1), st.integers(1, 600), st.integers(1, 64), st.integers(0, 8),
)  # fmt: skip
tokens, heads = st.integers(0, 20_000), st.integers(1, 16)


@pytest.mark.parametrize(
    ("kept", "sinks", "of", "entries"),
    # an eighth of 1,024 tokens of 8 heads; the first 4 of each in any case; never more than all
    [(0.125, 4, 1024, 1024), (0.0, 4, 1024, 32), (0.001, 4, 64, 32), (1.0, 4, 64, 512),
     (0.5, 4, 2, 16), (0.5, 0, 0, 0)],
)  # fmt: skip
def test_entries_by_hand(kept: float, sinks: int, of: int, entries: int) -> None:
    assert Survival(kept, 256, 64, sinks).entries(of, 8) == entries


def test_blocks_by_hand() -> None:
    """256 tokens of window; of the 1,000 before it 1,024 are decided."""
    survival = Survival(0.125, 256, 64, 4)
    assert survival.blocks(256, 8) == 8 * 16
    assert survival.blocks(1256, 8) == 8 * 16 + (1024 + 8 * 15) // 16
    assert survival.blocks(257, 8) == 8 * 16 + 8  # one token that left takes a block a head


@given(survivals, tokens, st.integers(0, 3000), heads)
def test_neither_falls_as_tokens_grow(
    survival: Survival, tokens: int, more: int, heads: int
) -> None:
    assert survival.entries(tokens, heads) <= survival.entries(tokens + more, heads)
    assert survival.blocks(tokens, heads) <= survival.blocks(tokens + more, heads)


@given(survivals, tokens, heads)
def test_no_more_is_held_than_by_keeping_all(survival: Survival, tokens: int, heads: int) -> None:
    assert 0 <= survival.entries(tokens, heads) <= tokens * heads
    dense = heads * -(-tokens // BLOCK_TOKENS)
    assert (
        survival.blocks(tokens, heads) <= dense + heads
    )  # window and survivors end in a block each


@given(survivals, st.integers(1, 300), heads)
def test_what_each_place_of_decision_adds_can_be_kept(
    survival: Survival, places: int, heads: int
) -> None:
    """Between no entry and all of them."""
    end = places * survival.every
    added = survival.entries(end, heads) - survival.entries(end - survival.every, heads)
    assert 0 <= added <= survival.every * heads
