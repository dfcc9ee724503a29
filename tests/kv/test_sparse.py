"""A sparse row against attention under a mask that is written out by hand."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ullage.errors import BudgetExceeded
from ullage.kv.before import Attend
from ullage.kv.entries import stored
from ullage.kv.kernels import Piece, reference
from ullage.kv.pool import HeapBlocks, KVPool
from ullage.kv.rows import NewTokens
from ullage.kv.sparse import SparseRow
from ullage.specs.survivors import SPAN_TOKENS, Survival

HEADS, GROUP, DIM = 2, 3, 4
LONG = 300  # tokens
ALIKE = [
    [Survival(kept, window, min(every, window), sinks)] * HEADS
    for window, every in ((16, 8), (16, 16), (7, 5), (128, 64), (1, 1))
    for kept, sinks in ((1.0, 4), (0.5, 0), (0.125, 4), (0.0, 2))
]
UNLIKE = [
    [Survival(0.25, 16, 8, 4), Survival(0.0, 100, 8, 4)],
    [Survival(0.0, 8192, 8, 4), Survival(0.5, 9, 8, 0)],
]
SURVIVALS = [*ALIKE, *UNLIKE]
chunk_sizes = st.lists(st.integers(1, 90), min_size=1, max_size=12)


class Table:
    """A scorer that knows every entry's worth, [HEADS, T], beforehand."""

    def __init__(self, worth: torch.Tensor) -> None:
        self.worth, self.seen, self.asked = worth, 0, 0
        self.lags: set[int] = set()  # how many tokens had come behind those that were asked about

    def see(self, new: NewTokens) -> None:
        self.seen += len(new)

    def scores(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        assert keys.is_floating_point()
        torch.testing.assert_close(keys[:, :, 0], values[:, :, 0], atol=0.05, rtol=1 / 8)
        start, self.asked = self.asked, self.asked + keys.shape[1]
        self.lags.add(self.seen - self.asked)
        return self.worth[:, start : self.asked].clone()


def tokens_of(count: int, seed: int = 1) -> NewTokens:
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(HEADS * GROUP, count, DIM, generator=random)
    keys = torch.randn(HEADS, count, DIM, generator=random)
    values = torch.randn(HEADS, count, DIM, generator=random)
    values[:, :, 0] = keys[:, :, 0]
    return NewTokens(query, keys, values, scale=0.7)


def worth_of(count: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(HEADS, count, generator=torch.Generator().manual_seed(seed))


def staying(worth: torch.Tensor, survivals: list[Survival]) -> torch.Tensor:
    """Bool [HEADS, T] by the definition: of each `every` tokens each head keeps the worthiest,
    until it holds the share that it keeps of all tokens so far."""
    flags = torch.ones_like(worth, dtype=torch.bool)
    for head, survival in enumerate(survivals):
        held = 0
        for end in range(survival.every, worth.shape[1] + 1, survival.every):
            span = list(range(end - survival.every, end))
            span.sort(key=lambda at: (at >= survival.sinks, -float(worth[head, at])))
            stay = survival.entries(end) - held
            held += stay
            flags[head, span] = False
            flags[head, span[:stay]] = True
    return flags


def by_hand(new: NewTokens, worth: torch.Tensor, survivals: list[Survival]) -> torch.Tensor:
    """[HEADS * GROUP, T, DIM] under a mask over the whole square."""
    count, stays = len(new), staying(worth, survivals)
    query, entry = torch.arange(count)[:, None], torch.arange(count)[None, :]
    output = torch.empty_like(new.query)
    for head in range(HEADS * GROUP):
        kept = stays[head // GROUP][None, :]
        window = survivals[head // GROUP].window
        visible = (entry <= query) & (kept | (query - entry < window))
        scores = new.query[head] @ new.keys[head // GROUP].T * new.scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        output[head] = weights @ new.values[head // GROUP]
    return output


def attend(query: torch.Tensor, pieces: list[Piece]) -> torch.Tensor:
    return reference.attend(query, pieces, 0.7)


def fed(
    row: SparseRow, new: NewTokens, sizes: list[int], attention: Attend = attend
) -> torch.Tensor:
    """The outputs of all tokens, fed in chunks of `sizes`, the last again and again."""
    parts: list[torch.Tensor] = []
    at = 0
    while at < len(new):
        size = sizes[min(len(parts), len(sizes) - 1)]
        parts.append(row.attend(new.part(at, at + size), attention))
        at += size
    return torch.cat(parts, dim=1)


def heap_row(survivals: list[Survival], worth: torch.Tensor) -> SparseRow:
    return SparseRow(HeapBlocks(DIM, torch.float32, "cpu"), survivals, Table(worth))


@pytest.mark.parametrize("survivals", SURVIVALS, ids=str)
@pytest.mark.parametrize("sizes", [[1], [LONG], [64], [100, 1], [13], [1, 150, 1]], ids=str)
def test_it_attends_to_the_window_and_the_survivors(
    survivals: list[Survival], sizes: list[int]
) -> None:
    new, worth = tokens_of(LONG), worth_of(LONG)
    expected = by_hand(new, worth, survivals)
    output = fed(heap_row(survivals, worth), new, sizes)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lag", [1, 7, 24])
@pytest.mark.parametrize("sizes", [[1], [LONG], [40, 1, 13]], ids=str)
def test_a_decision_waits_for_the_lag(lag: int, sizes: list[int]) -> None:
    """And who stays is the same: nobody leaves the window before."""
    survivals, new, worth = [Survival(0.25, 32, 8, 4)] * HEADS, tokens_of(LONG), worth_of(LONG)
    scorer = Table(worth)
    row = SparseRow(HeapBlocks(DIM, torch.float32, "cpu"), survivals, scorer, lag)
    output = fed(row, new, sizes)
    torch.testing.assert_close(output, by_hand(new, worth, survivals), atol=1e-5, rtol=1e-5)
    assert scorer.lags == {lag}


@given(chunk_sizes)
@hypothesis_settings(max_examples=30)
def test_the_same_entries_stay_however_the_prompt_is_cut(sizes: list[int]) -> None:
    survivals, new, worth = [Survival(0.3, 32, 20, 4)] * HEADS, tokens_of(LONG), worth_of(LONG)
    whole, cut = heap_row(survivals, worth), heap_row(survivals, worth)
    fed(whole, new, [1])
    fed(cut, new, sizes)
    for one, other in zip(whole.heads, cut.heads, strict=True):
        kept = [
            torch.cat([piece.keys for piece in head.survivors.read()], dim=1)
            for head in (one, other)
        ]
        assert torch.equal(*kept)


@pytest.mark.parametrize("survivals", [ALIKE[1], ALIKE[10], UNLIKE[1]], ids=str)
@pytest.mark.parametrize("sizes", [[1], [LONG], [40, 1, 13]], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_entries_with_scales_survive_to_the_bit(
    survivals: list[Survival], sizes: list[int], dtype: torch.dtype
) -> None:
    """On whichever way from the window: as the whole, rounded once."""
    new, worth = tokens_of(LONG), worth_of(LONG)
    rounded = stored(new.keys, new.values, dtype)
    real = replace(
        new, keys=rounded.keys_in(torch.float32), values=rounded.values_in(torch.float32)
    )
    row = SparseRow(HeapBlocks(DIM, dtype, "cpu"), survivals, Table(worth))
    output = fed(row, new, sizes)
    expected = by_hand(real, worth, survivals)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_in_one_piece_is_read_in_spans() -> None:
    """Longer than a span: the mask does not grow with the prompt."""
    survivals, count = [Survival(0.25, 64, 64, 4)] * HEADS, 2 * SPAN_TOKENS + 100
    new, worth = tokens_of(count), worth_of(count)
    row, widest = heap_row(survivals, worth), 0

    def watched(query: torch.Tensor, pieces: list[Piece]) -> torch.Tensor:
        nonlocal widest
        masks = [piece.mask for piece in pieces if piece.mask is not None]
        widest = max([widest, *(mask.shape[1] for mask in masks)])
        return attend(query, pieces)

    output = row.attend(new, watched)
    assert widest == SPAN_TOKENS
    expected = by_hand(new, worth, survivals)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_an_entry_leaves_exactly_window_tokens_after_it_was_written() -> None:
    row = heap_row([Survival(0.0, 10, 5, 0)] * HEADS, worth_of(LONG))
    new, seen = tokens_of(LONG), []

    def watched(query: torch.Tensor, pieces: list[Piece]) -> torch.Tensor:
        keys = torch.cat([piece.keys[0] for piece in pieces])
        positions = (keys[:, None] == new.keys[0][None]).all(-1).nonzero()[:, 1]
        seen.append(sorted(positions.tolist()))
        return attend(query, pieces)

    for at in range(30):
        row.attend(new.part(at, at + 1), watched)
    assert seen == [list(range(max(0, at - 9), at + 1)) for at in range(30)]


@given(st.integers(1, 400), st.sampled_from(SURVIVALS), chunk_sizes)
@hypothesis_settings(max_examples=60)
def test_what_was_reserved_is_what_is_needed(
    count: int, survivals: list[Survival], sizes: list[int]
) -> None:
    """No block more, whoever stays."""
    blocks = sum(survival.blocks(count) for survival in survivals)
    pool = KVPool(blocks, DIM, torch.float32)
    row = SparseRow(pool, survivals, Table(worth_of(count)))
    row.reserve(count)
    fed(row, tokens_of(count), sizes)
    assert pool.free_blocks == 0
    row.release()
    pool.check_integrity(all_free=True)


@pytest.mark.parametrize("sizes", [[200, 1], [1], [1, 150, 1]], ids=str)
@pytest.mark.parametrize("survivals", [ALIKE[1], UNLIKE[1]], ids=str)
def test_a_token_reads_one_stretch_a_head(survivals: list[Survival], sizes: list[int]) -> None:
    """Window and survivors lie side by side, and nothing else is among them."""
    pool = KVPool(sum(survival.blocks(LONG) for survival in survivals), DIM, torch.float32)
    row, new = SparseRow(pool, survivals, Table(worth_of(LONG))), tokens_of(LONG)
    row.reserve(LONG)

    def watched(query: torch.Tensor, pieces: list[Piece]) -> torch.Tensor:
        if query.shape[1] == 1:
            assert [piece.heads for piece in pieces] == [slice(0, GROUP), slice(GROUP, 2 * GROUP)]
            assert [len(piece) for piece in pieces] == [head.held for head in row.heads]
        return attend(query, pieces)

    fed(row, new, sizes, watched)


def test_a_pool_that_is_too_small_refuses_at_the_door() -> None:
    survivals = [Survival(0.5, 16, 16, 4)] * HEADS
    pool = KVPool(HEADS * survivals[0].blocks(200) - 1, DIM, torch.float32)
    with pytest.raises(BudgetExceeded):
        SparseRow(pool, survivals, Table(worth_of(200))).reserve(200)
    pool.check_integrity(all_free=True)


def test_blocks_come_back_as_they_are_given() -> None:
    """Without a reservation, as under plain `generate`."""
    source, survival = HeapBlocks(DIM, torch.float32, "cpu"), Survival(0.5, 16, 16, 4)
    row = SparseRow(source, [survival] * HEADS, Table(worth_of(LONG)))
    fed(row, tokens_of(LONG), [50, 50, 1])
    held = sum(head.slots.capacity for head in row.heads)
    assert source.taken_bytes == held * 2 * DIM * 4
    assert HEADS * survival.slots(LONG) <= held <= HEADS * (survival.slots(LONG) * 5 // 4 + 16)
    row.release()
    assert source.taken_bytes == 0


def test_a_copy_goes_its_own_way_and_fails_whole() -> None:
    survivals = [Survival(0.25, 16, 8, 4)] * HEADS
    new, worth = tokens_of(LONG), worth_of(LONG)
    pool = KVPool(2 * HEADS * survivals[0].blocks(LONG), DIM, torch.float32)
    row = SparseRow(pool, survivals, Table(worth))
    row.reserve(LONG)
    fed(row, new.part(0, 150), [50])
    twin = row.copy()
    with pytest.raises(BudgetExceeded):
        twin.copy()
    fed(row, new.part(150, LONG), [1])
    output = fed(twin, new.part(150, LONG), [50])
    expected = by_hand(new, worth, survivals)[:, 150:]
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    row.release()
    twin.release()
    pool.check_integrity(all_free=True)
