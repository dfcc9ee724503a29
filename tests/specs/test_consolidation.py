"""What a bank and the exact entries beside it hold."""

from hypothesis import given
from hypothesis import strategies as st

from ullage.specs.consolidation import Consolidation

rules = st.builds(
    Consolidation,
    segment=st.integers(1, 70),
    recent=st.integers(0, 70),
    slots=st.integers(0, 300),
    sinks=st.integers(0, 5),
    threshold=st.just(0.9),
    positions=st.sampled_from(["constant", "compact"]),
)


@given(rules, st.integers(0, 3000), st.integers(0, 400))
def test_what_is_held_never_falls_and_ends_somewhere(
    rules: Consolidation, tokens: int, more: int
) -> None:
    assert rules.held(tokens) <= rules.held(tokens + more) <= rules.bank_at + rules.slots
    assert rules.held(tokens) >= min(tokens, rules.recent + 1)


@given(rules, st.integers(1, 3000))
def test_every_token_is_exact_first_or_in_the_bank(rules: Consolidation, tokens: int) -> None:
    """As long as the bank has room for all."""
    exact = tokens - rules.first_recent(tokens - 1)
    assert min(tokens, rules.recent + 1) <= exact <= rules.window
    first = min(rules.sinks, tokens - exact)
    assert rules.banked(tokens) == min(rules.slots, tokens - exact - first)


def test_a_text_of_three_segments() -> None:
    rules = Consolidation(segment=16, recent=8, slots=10, sinks=4, threshold=0.9)
    assert [rules.first_recent(position) for position in (0, 15, 16, 31, 32)] == [0, 0, 8, 8, 24]
    assert [rules.banked(tokens) for tokens in (16, 17, 32, 33)] == [0, 4, 4, 10]
    assert [rules.held(tokens) for tokens in (16, 17, 33)] == [16, 32, 38]
    assert rules.blocks(33) == 3


@given(rules, st.integers(0, 300))
def test_nothing_leaves_before_it_is_said_to(rules: Consolidation, position: int) -> None:
    stop = rules.stays_until(position)
    assert stop > position
    seen = {rules.first_recent(at) for at in range(position, stop)}
    assert seen == {rules.first_recent(position)}
    assert rules.first_recent(stop) not in seen
