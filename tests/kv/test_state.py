"""What a row holds as tensors: the row that is made of them goes on as the other does, to the
bit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ullage.errors import InputError, TechniqueError
from ullage.kv.banked import BankRow
from ullage.kv.kernels import Piece, cpu
from ullage.kv.pool import HeapBlocks, KVPool
from ullage.kv.rotation import rotated
from ullage.kv.rows import FullRow, NewTokens, Row, SlidingRow
from ullage.specs.consolidation import Consolidation

HEADS, GROUP, DIM, SCALE = 2, 3, 8, 0.7
TOKENS = 90
PLAIN = Consolidation(segment=8, recent=0, slots=12, sinks=4, threshold=0.8, positions="constant")
RULES = [
    PLAIN,
    replace(PLAIN, segment=1, slots=3),
    replace(PLAIN, segment=64, slots=20),
    replace(PLAIN, recent=5, segment=3),
    replace(PLAIN, sinks=0, positions="compact"),
    replace(PLAIN, positions="compact", top_k=3, count_bias=True),
    replace(PLAIN, centred=True, threshold=0.6, top_k=2, recent=3, count_cap=2),
]
DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]


def text(seed: int) -> NewTokens:
    random = torch.Generator().manual_seed(seed)
    kinds = torch.randn(HEADS, 6, DIM, generator=random)
    chosen = torch.randint(6, (TOKENS,), generator=random)
    keys = kinds[:, chosen] + 0.3 * torch.randn(HEADS, TOKENS, DIM, generator=random)
    query = torch.randn(HEADS * GROUP, TOKENS, DIM, generator=random)
    values = torch.randn(HEADS, TOKENS, DIM, generator=random)
    angle = torch.arange(TOKENS)[:, None] * torch.tensor([1.0, 0.3, 0.1]).repeat(2)
    cos, sin = angle.cos(), angle.sin()
    return NewTokens(rotated(query, cos, sin), rotated(keys, cos, sin), values, SCALE, cos, sin)


def attend(query: torch.Tensor, pieces: list[Piece]) -> torch.Tensor:
    return cpu.attend(query, pieces, SCALE)


def read(row: Row, new: NewTokens, size: int) -> torch.Tensor:
    starts = range(0, len(new), size)
    return torch.cat([row.attend(new.part(at, at + size), attend) for at in starts], 1)


def rows_like(make: type[Row], *rules: object, dtype: torch.dtype) -> tuple[Row, Row]:
    """Two in pools of their own, with room for the text."""
    made = [make(KVPool(2 * HEADS * 16, DIM, dtype), HEADS, *rules) for _ in range(2)]
    for row in made:
        row.reserve(TOKENS)
    return made[0], made[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", RULES, ids=str)
@given(st.integers(1, TOKENS - 1), st.integers(1, 30))
@hypothesis_settings(max_examples=12)
def test_a_bank_goes_on_as_if_it_had_never_been_away(
    rules: Consolidation, dtype: torch.dtype, stop: int, size: int
) -> None:
    new = text(stop)
    row, twin = rows_like(BankRow, rules, dtype=dtype)
    read(row, new.part(0, stop), size)
    twin.restore(row.state(), stop)
    assert (twin.length, twin.live_tokens) == (row.length, row.live_tokens)
    rest = new.part(stop, TOKENS)
    assert torch.equal(read(twin, rest, size), read(row, rest, size))
    assert twin.beside_bytes == row.beside_bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stop", [1, 5, 6, 7, 40])
def test_a_sliding_window_goes_on_too(dtype: torch.dtype, stop: int) -> None:
    new = text(stop)
    row, twin = rows_like(SlidingRow, 6, dtype=dtype)
    read(row, new.part(0, stop), 4)
    twin.restore(row.state(), stop)
    rest = new.part(stop, TOKENS)
    assert torch.equal(read(twin, rest, 4), read(row, rest, 4))


def test_a_row_in_pieces_is_restored_whole() -> None:
    """Its entries in several runs; nobody sized the row in advance."""
    new, rules = text(1), replace(PLAIN, slots=40)
    pool = KVPool(400, DIM, torch.int8)
    row = BankRow(pool, HEADS, rules)
    for at in range(0, 75, 5):
        read(row, new.part(at, at + 5), 5)
        pool.take(3)
    assert len(row.slots.segments) > 2
    twin = BankRow(HeapBlocks(DIM, torch.int8, "cpu"), HEADS, rules)
    twin.restore(row.state(), 75)
    rest = new.part(75, TOKENS)
    torch.testing.assert_close(read(twin, rest, 5), read(row, rest, 5), atol=1e-5, rtol=1e-5)


def test_angles_that_were_known_are_known_again() -> None:
    """Past the last token that they are measured by, and at every stop before."""
    rules = replace(PLAIN, segment=100, positions="compact", threshold=2.0)
    angle = torch.arange(600)[:, None] * torch.tensor([1.0, 0.3, 0.1]).repeat(2)
    states = torch.randn(HEADS, 600, DIM, generator=torch.Generator().manual_seed(1))
    new = NewTokens(
        states.repeat_interleave(GROUP, 0), states, states, SCALE, angle.cos(), angle.sin()
    )
    row = BankRow(HeapBlocks(DIM, torch.float32, "cpu"), HEADS, rules)
    row.reserve(600)
    for at in (1, 255, 1, 254, 1, 1, 1):  # the tokens before each stop
        read(row, new.part(row.length, row.length + at), at)
        twin = BankRow(HeapBlocks(DIM, torch.float32, "cpu"), HEADS, rules)
        twin.reserve(600)
        twin.restore(row.state(), row.length)
        following = new.part(row.length, row.length + 80)
        assert torch.equal(read(twin, following, 9), read(row.copy(), following, 9))


def test_a_row_of_something_else_is_refused() -> None:
    new = text(1)
    row, _ = rows_like(BankRow, PLAIN, dtype=torch.float32)
    read(row, new.part(0, 50), 10)
    state = row.state()
    for other, dtype, tokens in (
        (PLAIN, torch.int8, 50),
        (PLAIN, torch.float32, 5),
        (replace(PLAIN, slots=11), torch.float32, 50),
        (replace(PLAIN, segment=9), torch.float32, 50),
        (replace(PLAIN, top_k=1), torch.float32, 50),
    ):
        twin, _ = rows_like(BankRow, other, dtype=dtype)
        with pytest.raises(InputError, match="it has no "):
            twin.restore(state, tokens)
    for name in state:
        twin, _ = rows_like(BankRow, PLAIN, dtype=torch.float32)
        rest = {key: tensor for key, tensor in state.items() if key != name}
        with pytest.raises(InputError, match=name):
            twin.restore(rest, 50)


def test_what_keeps_every_entry_is_not_saved() -> None:
    with pytest.raises(TechniqueError, match="camelot"):
        FullRow(HeapBlocks(DIM, torch.float32, "cpu"), HEADS).state()
