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
tokens = st.integers(0, 20_000)


@pytest.mark.parametrize(
    ("kept", "sinks", "of", "entries"),
    # an eighth of 1,024 tokens; the first 4 in any case; never more than all
    [(0.125, 4, 1024, 128), (0.0, 4, 1024, 4), (0.001, 4, 64, 4), (1.0, 4, 64, 64),
     (0.5, 4, 2, 2), (0.5, 0, 0, 0)],
)  # fmt: skip
def test_entries_by_hand(kept: float, sinks: int, of: int, entries: int) -> None:
    assert Survival(kept, 256, 64, sinks).entries(of) == entries


def test_blocks_by_hand() -> None:
    """256 tokens of window; of the 1,000 before it 1,024 are decided."""
    survival = Survival(0.125, 256, 64, 4)
    assert survival.blocks(256) == 16
    assert survival.blocks(1256) == 16 + 128 // 16
    assert survival.blocks(257) == 16 + 1  # one token that left takes a block


@given(survivals, tokens, st.integers(0, 3000))
def test_neither_falls_as_tokens_grow(survival: Survival, tokens: int, more: int) -> None:
    assert survival.entries(tokens) <= survival.entries(tokens + more)
    assert survival.blocks(tokens) <= survival.blocks(tokens + more)


@given(survivals, tokens)
def test_no_more_is_held_than_by_keeping_all(survival: Survival, tokens: int) -> None:
    assert 0 <= survival.entries(tokens) <= tokens
    dense = -(-tokens // BLOCK_TOKENS)
    assert survival.blocks(tokens) <= dense + 1  # window and survivors end in a block each


@given(survivals, st.integers(1, 300))
def test_what_each_place_of_decision_adds_can_be_kept(survival: Survival, places: int) -> None:
    """Between no entry and all of them."""
    end = places * survival.every
    added = survival.entries(end) - survival.entries(end - survival.every)
    assert 0 <= added <= survival.every
