"""Rows hand attention the entries that each query may see, however the tokens come in."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ullage.errors import BudgetExceeded
from ullage.kv.banked import BankRow
from ullage.kv.entries import side_by_side, stored
from ullage.kv.kernels import Piece, reference
from ullage.kv.pool import KVPool
from ullage.kv.rows import FullRow, NewTokens, Row, SlidingRow
from ullage.kv.slots import Slots
from ullage.kv.sparse import SparseRow
from ullage.specs.consolidation import Consolidation
from ullage.specs.survivors import Survival

HEADS, DIM = 2, 4
chunk_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def pool_of(blocks: int, dtype: torch.dtype = torch.float32) -> KVPool:
    return KVPool(blocks, DIM, dtype)


def fragmented_pool() -> KVPool:
    """Only every second pair of blocks is free, so every row lies in many segments."""
    pool = pool_of(128)
    pairs = [pool.take(HEADS, HEADS) for _ in range(128 // HEADS)]
    for pair in pairs[::2]:
        pool.give_back(pair)
    return pool


def entries(first: int, count: int) -> torch.Tensor:
    """Keys [HEADS, count, DIM] that say which position and head they are of."""
    position = torch.arange(first, first + count, dtype=torch.float32)
    return (position[None, :, None] + 1000 * torch.arange(HEADS)[:, None, None]).expand(
        HEADS, count, DIM
    )


def seen(pieces: list[Piece], query: int, queries: int) -> list[int]:
    """Positions that query number `query` of `queries` sees, in order; keys and values must
    agree, and heads too."""
    positions: list[int] = []
    for piece in pieces:
        visible = torch.ones(piece.keys.shape[1], dtype=torch.bool)
        if piece.causal:
            assert piece.keys.shape[1] == queries
            visible[query + 1 :] = False
        if piece.mask is not None:
            visible &= piece.mask[query]
        keys, values = piece.keys[:, visible], piece.values[:, visible]
        assert torch.equal(values, -keys)
        assert torch.equal(keys[1] - keys[0], torch.full_like(keys[0], 1000))
        positions += [int(key) for key in keys[0, :, 0]]
    return sorted(positions)


def extend(row: Row, keys: torch.Tensor, values: torch.Tensor) -> list[Piece]:
    """What the queries of new entries are shown."""
    shown: list[Piece] = []

    def attention(query: torch.Tensor, pieces: list[Piece]) -> torch.Tensor:
        shown.extend(pieces)
        return query

    row.attend(NewTokens(keys, keys, values, scale=1.0), attention)
    return shown


def feed(row: Row, sizes: list[int], window: int | None) -> None:
    """Extend `row` by chunks of `sizes` and hold each query to the definition."""
    length = 0
    for size in sizes:
        keys = entries(length, size)
        pieces = extend(row, keys, -keys)
        for query in range(size):
            own = length + query
            first = 0 if window is None else max(0, own - window + 1)
            assert seen(pieces, query, size) == list(range(first, own + 1))
        length += size
        assert row.length == length


@given(chunk_sizes)
def test_full_row_sees_all_up_to_itself(sizes: list[int]) -> None:
    feed(FullRow(pool_of(128), HEADS), sizes, None)


@given(chunk_sizes, st.booleans())
def test_full_row_lies_across_segments(sizes: list[int], sized_in_advance: bool) -> None:
    row = FullRow(fragmented_pool(), HEADS)
    if sized_in_advance:
        row.reserve(sum(sizes))
    feed(row, sizes, None)
    assert len(row.slots.segments) >= sum(sizes) // 16


@given(st.integers(1, 40), chunk_sizes, st.booleans(), st.booleans())
def test_sliding_row_sees_the_last_window(
    window: int, sizes: list[int], fragmented: bool, sized_in_advance: bool
) -> None:
    pool = fragmented_pool() if fragmented else pool_of(128)
    row = SlidingRow(pool, HEADS, window)
    if sized_in_advance:
        row.reserve(sum(sizes))
    feed(row, sizes, window)


@given(st.integers(1, 40), chunk_sizes)
def test_sliding_row_takes_no_more_than_its_window(window: int, sizes: list[int]) -> None:
    pool = pool_of(128)
    row = SlidingRow(pool, HEADS, window)
    feed(row, sizes, window)
    assert pool.num_blocks - pool.free_blocks <= HEADS * -(-window // 16)


def outputs(row: Row, new: NewTokens, sizes: list[int]) -> torch.Tensor:
    """Of all tokens, fed in chunks of `sizes`, the last again and again: [HEADS, T, DIM]."""
    parts, at = [], 0
    while at < len(new):
        size = sizes[min(len(parts), len(sizes) - 1)]
        attention = partial(reference.attend, scale=new.scale)
        parts.append(row.attend(new.part(at, at + size), attention))
        at += size
    return torch.cat(parts, dim=1)


def pieces_of(row: Row) -> list[Piece]:
    """All that it holds."""
    if isinstance(row, FullRow):
        return row.slots.read(0, row.length)
    assert isinstance(row, SlidingRow)
    return row.ring.read()


def random_tokens(count: int) -> NewTokens:
    shape, random = (HEADS, count, DIM), torch.Generator().manual_seed(3)
    return NewTokens(*(torch.randn(shape, generator=random) for _ in range(3)), scale=0.5)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@given(sizes=chunk_sizes)
@hypothesis_settings(max_examples=10)
def test_in_every_format_a_chunk_is_its_tokens_one_by_one(
    kind: int, dtype: torch.dtype, sizes: list[int]
) -> None:
    """The same entries stored, to the bit, and the same seen."""
    new, one, other = random_tokens(90), *(rows(pool_of(64, dtype))[kind] for _ in range(2))
    torch.testing.assert_close(outputs(one, new, [1]), outputs(other, new, sizes))
    held = [side_by_side(pieces_of(row), torch.float32) for row in (one, other)]
    assert all(map(torch.equal, *held))


@pytest.mark.parametrize("kind", [0, 1])
def test_int8_is_close_to_what_it_stands_for(kind: int) -> None:
    new = random_tokens(90)
    exact, rounded = (
        outputs(rows(pool_of(64, dtype))[kind], new, [30]) for dtype in (torch.float32, torch.int8)
    )
    assert 0 < (rounded - exact).abs().max() < 0.03


def test_entries_of_another_format_are_not_written() -> None:
    """A number that is cut to int8 without its scale would be no error, and nonsense."""
    slots = Slots(pool_of(HEADS, torch.int8), HEADS)
    slots.reserve(16)
    with pytest.raises(ValueError, match="shorter"):
        slots.write(0, random_tokens(4).stored(torch.float32))


@pytest.mark.parametrize("kind", [0, 1])
def test_a_copy_in_int8_is_the_same_to_the_bit(kind: int) -> None:
    new = random_tokens(60)
    row = rows(pool_of(64, torch.int8))[kind]
    outputs(row, new.part(0, 50), [20, 1])
    twin = row.copy()
    outputs(row, new.part(50, 60), [1])
    outputs(twin, new.part(50, 60), [10])
    held = [[part.tensors for part in pieces_of(one)] for one in (row, twin)]
    whole = [[torch.cat(parts, dim=1) for parts in zip(*tensors, strict=True)] for tensors in held]
    assert all(map(torch.equal, *whole))


def rows(pool: KVPool) -> list[Row]:
    return [FullRow(pool, HEADS), SlidingRow(pool, HEADS, 20)]


@pytest.mark.parametrize("kind", [0, 1])
def test_release_gives_all_back_and_the_row_can_start_again(kind: int) -> None:
    pool = pool_of(32)
    row = rows(pool)[kind]
    feed(row, [30, 1, 7], [None, 20][kind])
    row.release()
    assert pool.free_blocks == 32
    feed(row, [5, 1], [None, 20][kind])


@pytest.mark.parametrize("kind", [0, 1])
def test_a_reservation_that_fails_takes_nothing(kind: int) -> None:
    pool = pool_of(HEADS)  # room for 16 tokens
    row = rows(pool)[kind]
    with pytest.raises(BudgetExceeded):
        row.reserve(17)
    assert pool.free_blocks == HEADS
    row.reserve(16)
    assert pool.free_blocks == 0


@pytest.mark.parametrize("kind", [0, 1])
def test_a_row_reserved_in_advance_never_takes_more(kind: int) -> None:
    pool = pool_of(64)
    row = rows(pool)[kind]
    row.reserve(100)
    free = pool.free_blocks
    feed(row, [60, 1, 30, 9], [None, 20][kind])
    assert pool.free_blocks == free


def test_rows_of_one_pool_do_not_touch_each_other() -> None:
    pool = pool_of(64)
    one, other = FullRow(pool, HEADS), FullRow(pool, HEADS)
    for first in range(0, 60, 3):
        keys = entries(first, 3)
        extend(one, keys, -keys)
        extend(other, keys + 500, -keys - 500)
    last = entries(60, 1)
    assert seen(extend(one, last, -last), 0, 1) == list(range(61))
    assert seen(extend(other, last + 500, -last - 500), 0, 1) == list(range(500, 561))


@pytest.mark.parametrize("kind", [0, 1])
def test_new_entries_are_rounded_as_stored_ones_are(kind: int) -> None:
    """Else what a query sees would depend on the chunk that its keys came in."""
    row = rows(pool_of(64, torch.bfloat16))[kind]
    keys = torch.full((HEADS, 5, DIM), 1.0001)
    pieces: list[Any] = extend(row, keys, keys)
    assert all((piece.keys == 1).all() and (piece.values == 1).all() for piece in pieces)


def test_a_row_that_grows_fills_the_pool_to_its_last_block() -> None:
    """It grows by a quarter where there is room, by what it needs where there is not."""
    row = FullRow(pool_of(4 * HEADS), HEADS)  # 64 tokens
    feed(row, [40, 16, 8], None)
    assert (row.length, row.slots.pool.free_blocks) == (64, 0)


@pytest.mark.parametrize("kind", [None, 24])
def test_a_row_that_cannot_grow_is_as_it_was(kind: int | None) -> None:
    pool = pool_of(HEADS)  # 16 tokens
    row = FullRow(pool, HEADS) if kind is None else SlidingRow(pool, HEADS, kind)
    feed(row, [10], kind)
    with pytest.raises(BudgetExceeded):
        extend(row, entries(10, 7), -entries(10, 7))
    assert row.length == 10


class Newest:
    """A scorer to which the newest are worth the most."""

    def see(self, new: NewTokens) -> None:
        pass

    def scores(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.arange(keys.shape[1]).expand(keys.shape[:2]).float()


BANKED = Consolidation(segment=8, recent=0, slots=12, sinks=4, threshold=0.8, positions="constant")
KINDS: dict[str, Callable[[KVPool], Row]] = {
    "full": lambda pool: FullRow(pool, HEADS),
    "sliding": lambda pool: SlidingRow(pool, HEADS, 8),
    "sparse": lambda pool: SparseRow(pool, [Survival(0.5, 8, 4, 2)] * HEADS, Newest()),
    "sparse without sinks": lambda pool: SparseRow(
        pool, [Survival(0.5, 8, 4, 0)] * HEADS, Newest()
    ),
    "banked": lambda pool: BankRow(pool, HEADS, BANKED),
    "banked late": lambda pool: BankRow(pool, HEADS, replace(BANKED, recent=6)),
    "banked without sinks": lambda pool: BankRow(pool, HEADS, replace(BANKED, sinks=0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("tokens", [3, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_is_replaced_wherever_it_lies(
    kind: str, tokens: int, dtype: torch.dtype
) -> None:
    """By all that is held of it: what comes next sees what it would had it been so from the
    beginning; where it is gone, all stays as it is."""
    random = torch.Generator().manual_seed(1)
    keys, values, other = (torch.randn(HEADS, 40, DIM, generator=random) for _ in range(3))
    told = keys.clone(), values.clone()
    for part in told:
        part[:, 0] = other[:, 0]
    pool = pool_of(160, dtype)
    row, so_from_the_beginning, before = (KINDS[kind](pool) for _ in range(3))

    def read(one: Row, parts: tuple[torch.Tensor, ...], start: int, stop: int) -> torch.Tensor:
        cos = torch.ones(stop - start, DIM)  # a bank asks what turned them: nothing
        own = (keys[:, start:stop], *(part[:, start:stop] for part in parts))
        new = NewTokens(*own, 1.0, cos, torch.zeros_like(cos))
        return one.attend(new, partial(reference.attend, scale=1.0))

    for one, parts in (
        (row, (keys, values)),
        (so_from_the_beginning, told),
        (before, (keys, values)),
    ):
        read(one, parts, 0, tokens)
    twin = row.copy()
    row.replace_first(stored(told[0][:, :1], told[1][:, :1], dtype))
    found, whole, old, of_twin = (
        read(one, (keys, values), tokens, tokens + 1)
        for one in (row, so_from_the_beginning, before, twin)
    )
    torch.testing.assert_close(of_twin, old)
    gone = tokens == 30 and (kind == "sliding" or kind.endswith("without sinks"))
    assert torch.equal(found, old if gone else whole)
    assert gone or not torch.equal(found, old)
