"""What heads hold: entries shared out among them with the least loss."""

from itertools import product

import numpy
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ullage.errors import TechniqueError
from ullage.techniques.dms.adapter import DECIDED_TOKENS, Adapter
from ullage.techniques.dms.sharing import KEPT, Share, shared_out

WINDOWS = (2, 4, 8)
CONTEXT = 16
curves = st.lists(st.integers(0, 50), min_size=3, max_size=3).map(
    lambda drops: [sum(drops[at:]) for at in range(3)]
)


def adapter_of(loss: list[list[list[float]]], power: float = 1.0) -> Adapter:
    """Survivors catch as much as chance has it, or with a smaller power more."""
    numbers = numpy.array(loss, numpy.float32)
    caught = (numpy.arange(1, DECIDED_TOKENS + 1) / DECIDED_TOKENS) ** power
    captured = numpy.broadcast_to(caught, (*numbers.shape[:2], DECIDED_TOKENS))
    return Adapter(WINDOWS, numbers, captured, 16, "print", {})


def windows(shares: tuple[tuple[Share, ...], ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(share.window for share in layer) for layer in shares)


def held(share: Share) -> float:
    return share.window + share.kept * (CONTEXT - share.window)


def lost(adapter: Adapter, head: int, share: Share) -> float:
    if share.window == CONTEXT:
        return 0.0
    kept = round(share.kept * DECIDED_TOKENS)
    caught = float(adapter.captured[0, head, kept - 1]) if kept else 0.0
    size = max(place for place, window in enumerate(WINDOWS) if window <= share.window)
    return float(adapter.loss[0, head, size]) * (1 - caught)


@given(st.lists(curves, min_size=2, max_size=2), st.integers(2, CONTEXT), st.booleans())
@hypothesis_settings(max_examples=50, deadline=None)
def test_the_least_is_lost(loss: list[list[float]], average: int, survivors: bool) -> None:
    """Against every choice that is smaller by the largest step: the last may not have fitted."""
    adapter = adapter_of([loss], power=0.3)
    (shares,) = shared_out(adapter, average, CONTEXT, survivors)
    assert sum(map(held, shares)) <= average * 2 + 1e-9
    assert survivors or not any(share.kept for share in shares)
    found = sum(lost(adapter, head, share) for head, share in enumerate(shares))
    kept = [step / DECIDED_TOKENS for step in (KEPT if survivors else (0,))]
    options = [*(Share(*pair) for pair in product(WINDOWS, kept)), Share(CONTEXT, 0.0)]
    for choice in product(options, repeat=2):
        if sum(map(held, choice)) <= average * 2 - (CONTEXT - WINDOWS[0]):
            least = sum(lost(adapter, head, share) for head, share in enumerate(choice))
            assert found <= least + 1e-4


@given(st.lists(curves, min_size=3, max_size=3), st.integers(20, 150))
@hypothesis_settings(max_examples=50, deadline=None)
def test_more_entries_are_never_fewer(loss: list[list[float]], tenths: int) -> None:
    """Nor are many left over while any head would lose less by them."""
    adapter = adapter_of([loss], power=0.3)
    fewer, more = (
        sum(map(held, shared_out(adapter, average, CONTEXT)[0]))
        for average in (tenths / 10, tenths / 10 + 1)
    )
    assert fewer <= more + 1e-9
    needed = sum(map(held, shared_out(adapter, CONTEXT, CONTEXT)[0]))
    assert fewer >= min(needed, 3 * tenths / 10) - 2


def test_windows_by_hand() -> None:
    """The second head gains most a token by far, also by its next step, of which a part is left;
    the first gains nothing but by seeing all."""
    adapter = adapter_of([[[1, 1, 1], [90, 60, 20]], [[5, 4, 4], [8, 6, 0]]])

    def shared(average: int) -> tuple[tuple[int, ...], ...]:
        return windows(shared_out(adapter, average, CONTEXT, False))

    assert shared(2) == ((2, 2), (2, 2))
    assert shared(4) == ((2, 10), (2, 2))
    assert shared(CONTEXT) == ((16, 16), (16, 8))


def test_survivors_take_the_place_of_a_window_where_they_catch_more() -> None:
    """Of the same loss: where the first few of 64 are nearly all that is missed, and where they are
    no better than any."""
    loss = [[[9.0, 8.0, 7.0]]]
    ((good,),) = shared_out(adapter_of(loss, power=0.1), 4, CONTEXT)
    assert good.window == 2
    assert good.kept >= 1 / DECIDED_TOKENS
    ((bad,),) = shared_out(adapter_of([[[9.0, 1.0, 0.5]]]), 4, CONTEXT)
    assert bad == Share(4, 0.0)


def test_a_context_below_some_windows_needs_none_of_them() -> None:
    adapter = adapter_of([[[9, 5, 5]]])
    assert windows(shared_out(adapter, 6, 6)) == ((6,),)


def test_fewer_entries_than_the_least_window_are_our_error() -> None:
    with pytest.raises(TechniqueError, match="1 entries a head on average are below"):
        shared_out(adapter_of([[[1, 1, 1]]]), 1, CONTEXT)
