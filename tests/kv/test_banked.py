"""A row with a bank against attention that is written out by hand, a token after the other."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ullage.errors import BudgetExceeded, TechniqueError
from ullage.kv.banked import BankRow
from ullage.kv.kernels import Piece, cpu, reference
from ullage.kv.memory import Memory
from ullage.kv.pool import HeapBlocks, KVPool
from ullage.kv.rotation import rotated
from ullage.kv.rows import NewTokens
from ullage.specs.consolidation import Consolidation

HEADS, GROUP, DIM, SCALE = 2, 3, 8, 0.7
STEP = torch.tensor([1.0, 0.3, 0.1])  # two numbers of a head are not turned
PLAIN = Consolidation(segment=8, recent=0, slots=12, sinks=4, threshold=0.8, positions="constant")
RULES = [
    PLAIN,
    replace(PLAIN, segment=1, slots=3),
    replace(PLAIN, segment=3, slots=9),
    replace(PLAIN, segment=64, slots=20),
    replace(PLAIN, recent=5, segment=3),
    replace(PLAIN, recent=16, slots=500),
    replace(PLAIN, sinks=0),
    replace(PLAIN, threshold=-1.0),
    replace(PLAIN, threshold=2.0, slots=5),
    replace(PLAIN, top_k=1),
    replace(PLAIN, top_k=2, recent=3, slots=40, count_bias=True),
    replace(PLAIN, positions="compact", recent=4),
    replace(PLAIN, positions="compact", top_k=3, count_bias=True),
    replace(PLAIN, count_bias=True, count_cap=2, slots=5),
    replace(PLAIN, centred=True, threshold=0.6, top_k=2),
]
chunk_sizes = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def turn(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angle = (positions[..., None] * STEP).repeat(*(1,) * positions.dim(), 2)
    return angle.cos(), angle.sin()


class Text:
    """T tokens before and after their rotation."""

    def __init__(self, tokens: int, seed: int = 1, turned: bool = True) -> None:
        random = torch.Generator().manual_seed(seed)
        kinds = torch.randn(HEADS, 6, DIM, generator=random)
        chosen = torch.randint(6, (tokens,), generator=random)
        noise = torch.randn(HEADS, tokens, DIM, generator=random)
        self.keys = kinds[:, chosen] + 0.3 * noise
        self.query = torch.randn(HEADS * GROUP, tokens, DIM, generator=random)
        values = torch.randn(HEADS, tokens, DIM, generator=random)
        self.turned = turned
        cos, sin = turn(torch.arange(tokens) * turned)
        states = (rotated(part, cos, sin) for part in (self.query, self.keys))
        self.new = NewTokens(*states, values, SCALE, cos, sin)

    def turn(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return rotated(states, *turn(positions)) if self.turned else states


def by_hand(text: Text, rules: Consolidation) -> torch.Tensor:
    """[Hq, T, D], in fp32."""
    tokens, outputs = len(text.new), []
    memory, banked = None, rules.sinks
    visible = torch.zeros(HEADS, rules.slots, dtype=torch.bool)
    for position in range(tokens):
        start = position // rules.segment * rules.segment
        first = max(0, start - rules.recent)
        if position == start:
            visible[:] = False
            if first > banked:
                memory = write(memory, text, banked, first, rules)
                banked = first
        exact = [*range(min(rules.sinks, first)), *range(first, position + 1)]
        values = [text.new.values[:, exact]]
        scores = [dots(text.new.query[:, position], text.new.keys[:, exact])]
        if memory is not None:
            query = text.query[:, position : position + 1]
            away = rules.recent if rules.positions == "compact" else rules.window
            compact = rules.positions == "compact"
            before = away + rules.sinks + (rules.banked(position + 1) if compact else 0)
            far = text.turn(query, torch.tensor([position - start + before]))[:, 0]
            scores[0][:, : rules.sinks] = dots(far, text.new.keys[:, : rules.sinks])
            query = text.turn(query, torch.tensor([position - start + away]))[:, 0]
            slots = memory.keys
            if rules.positions == "compact":
                rank = memory.stamps.argsort(1, descending=True).argsort(1)
                slots = text.turn(slots, -1 - rank)
            score = dots(query, slots)
            if rules.count_bias:
                score += memory.counts.float().log().repeat_interleave(GROUP, 0)
            if rules.top_k:
                key = text.keys[:, position : position + 1]
                visible |= memory.directions().nearest(key, rules.top_k)[:, 0]
            sees = (memory.stamps >= 0) & (visible if rules.top_k else True)
            score[~sees.repeat_interleave(GROUP, 0)] = float("-inf")
            scores.append(score)
            values.append(memory.values)
        weights = torch.cat(scores, 1).softmax(1)
        value = torch.cat(values, 1).repeat_interleave(GROUP, 0)
        outputs.append((weights[:, None] @ value)[:, 0])
    return torch.stack(outputs, 1)


def dots(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (keys.repeat_interleave(GROUP, 0) @ query[:, :, None])[..., 0] * SCALE


def write(memory: Memory | None, text: Text, start: int, stop: int, rules: Consolidation) -> Memory:
    if memory is None:
        zeros = torch.zeros(HEADS, rules.slots, DIM)
        stamps = torch.arange(rules.slots, dtype=torch.int32).expand(HEADS, -1) - (1 << 30)
        memory = Memory(zeros, zeros, torch.zeros_like(stamps), stamps, rules.centred)
    stamps = torch.arange(start, stop, dtype=torch.int32)
    empty = bool((memory.stamps < 0).all())
    keys, values = text.keys[:, start:stop], text.new.values[:, start:stop]
    return memory.written(keys, values, stamps, rules.threshold, empty).capped(rules.count_cap)


def attend(query: torch.Tensor, pieces: list[Piece]) -> torch.Tensor:
    return cpu.attend(query, pieces, SCALE)


def as_reference(query: torch.Tensor, pieces: list[Piece]) -> torch.Tensor:
    return reference.attend(query, pieces, SCALE)


def chunks(new: NewTokens, sizes: list[int]) -> Iterator[NewTokens]:
    at, turn = 0, 0
    while at < len(new):
        size = sizes[turn % len(sizes)]
        yield new.part(at, at + size)
        at, turn = at + size, turn + 1


def read(row: BankRow, new: NewTokens, sizes: list[int]) -> torch.Tensor:
    return torch.cat([row.attend(chunk, attend) for chunk in chunks(new, sizes)], 1)


def row_of(rules: Consolidation, dtype: torch.dtype = torch.float32) -> BankRow:
    return BankRow(HeapBlocks(DIM, dtype, "cpu"), HEADS, rules)


@pytest.mark.parametrize("rules", RULES, ids=str)
@given(chunk_sizes, st.integers(0, 50))
@hypothesis_settings(max_examples=6)
def test_it_is_what_is_written_out_by_hand(
    rules: Consolidation, sizes: list[int], seed: int
) -> None:
    """However a text is cut into chunks."""
    text = Text(90, seed)
    found = read(row_of(rules), text.new, sizes)
    torch.testing.assert_close(found, by_hand(text, rules), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kernel", [attend, as_reference])
def test_any_kernel_reads_it(kernel: object) -> None:
    text, rules = Text(50), replace(PLAIN, count_bias=True, top_k=2)
    row = row_of(rules)
    found = torch.cat([row.attend(chunk, kernel) for chunk in chunks(text.new, [7, 1])], 1)
    torch.testing.assert_close(found, by_hand(text, rules), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("recent", [0, 6])
def test_where_nothing_merges_it_is_a_cache_of_the_newest(recent: int) -> None:
    """The first four, the newest `slots` before the exact ones, and these."""
    rules = replace(PLAIN, threshold=2.0, slots=10, recent=recent)
    text = Text(70, turned=False)
    found = read(row_of(rules), text.new, [13])
    for position in range(70):
        first = max(0, position // 8 * 8 - recent)
        seen = [*range(min(4, max(0, first - 10))), *range(max(0, first - 10), position + 1)]
        weights = dots(text.query[:, position], text.keys[:, seen]).softmax(1)
        values = text.new.values[:, seen].repeat_interleave(GROUP, 0)
        torch.testing.assert_close(
            found[:, position], (weights[:, None] @ values)[:, 0], atol=1e-4, rtol=1e-4
        )


def test_tokens_that_do_not_say_how_they_are_turned_are_refused() -> None:
    """As of a model that CAMELoT was detached from. The row goes on as if they had not come."""
    text, rules = Text(40), replace(PLAIN, positions="compact")
    row, twin = row_of(rules), row_of(rules)
    read(row, text.new.part(0, 30), [7])
    rest = text.new.part(30, 40)
    bare = NewTokens(rest.query, rest.keys, rest.values, SCALE)
    with pytest.raises(TechniqueError, match="while CAMELoT is attached"):
        row.attend(bare, attend)
    with pytest.raises(TechniqueError, match="while CAMELoT is attached"):
        row.take(bare.part(0, 1))
    found = row.attend(rest, attend)
    read(twin, text.new.part(0, 30), [7])
    assert torch.equal(found, twin.attend(rest, attend))


def test_compact_positions_of_all_tokens_are_their_own() -> None:
    text = Text(120)
    rules = replace(PLAIN, threshold=2.0, slots=500, positions="compact")
    row = row_of(rules)
    found = read(row, text.new, [120])
    whole = as_reference(text.new.query, [Piece.of(text.new.stored(torch.float32), causal=True)])
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
    assert row.live_tokens == 120


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_a_copy_goes_its_own_way(rules: Consolidation) -> None:
    text, other = Text(60), Text(60, seed=9)
    row = row_of(rules)
    read(row, text.new.part(0, 33), [10])
    twin = row.copy()
    assert (twin.length, twin.live_tokens) == (row.length, row.live_tokens)
    rest = text.new.part(33, 60)
    read(twin, other.new.part(33, 60), [1])
    expected = by_hand(text, rules)[:, 33:]
    torch.testing.assert_close(read(row, rest, [4]), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_blocks_are_those_of_the_arithmetic_and_go_back(rules: Consolidation) -> None:
    pool = KVPool(HEADS * rules.blocks(90), DIM, torch.float32)
    for tokens in (1, 11, 90):
        row = BankRow(pool, HEADS, rules)
        row.reserve(tokens)
        taken_bytes = pool.taken_bytes
        assert taken_bytes == HEADS * rules.blocks(tokens) * pool.block_bytes
        read(row, Text(tokens).new, [7, 1])
        assert pool.taken_bytes == taken_bytes
        assert row.length == tokens
        row.release()
        assert (row.length, row.live_tokens) == (0, 0)
        pool.check_integrity(all_free=True)


def test_a_row_that_was_released_begins_anew() -> None:
    text, row = Text(40), row_of(PLAIN)
    read(row, Text(50, seed=5).new, [50])
    row.release()
    found = read(row, text.new, [9])
    torch.testing.assert_close(found, by_hand(text, PLAIN), atol=2e-4, rtol=2e-4)


def test_a_pool_in_pieces_is_read_all_the_same() -> None:
    """The bank in several runs, its bias with it."""
    text, rules = Text(90), replace(PLAIN, slots=40, top_k=3)
    pool = KVPool(400, DIM, torch.float32)
    row = BankRow(pool, HEADS, rules)
    outputs = []
    for chunk in chunks(text.new, [6]):
        outputs.append(row.attend(chunk, attend))
        pool.take(3)
    assert len(row.slots.segments) > 2
    expected = by_hand(text, rules)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=2e-4, rtol=2e-4)


def test_a_pool_that_is_full_takes_nothing() -> None:
    pool = KVPool(4, DIM, torch.float32)
    row = BankRow(pool, HEADS, replace(PLAIN, slots=500))
    with pytest.raises(BudgetExceeded):
        row.reserve(2000)
    assert pool.taken_bytes == 0


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.bfloat16, 0.05), (torch.int8, 0.05), (torch.float8_e4m3fn, 0.2)]
)
def test_rounding_does_not_add_up(dtype: torch.dtype, error: float) -> None:
    """Slots that hundreds of tokens are merged into, in a format of few bits."""
    rules = replace(PLAIN, slots=8, threshold=0.5, count_cap=32)
    text = Text(900)
    found = read(row_of(rules, dtype), text.new, [100])
    exact = read(row_of(rules), text.new, [100])
    apart = (found - exact).abs().mean(dim=(0, 2))
    assert apart[-100:].max() < 4 * max(float(apart[:300].max()), error)
    assert apart.mean() < error


def test_what_nobody_wrote_is_not_read() -> None:
    """Memory that is handed out may hold anything."""
    pool = KVPool(64, DIM, torch.float32)
    for tensor in pool.blocks.tensors:
        tensor.fill_(float("nan"))
    row = BankRow(pool, HEADS, replace(PLAIN, slots=100, threshold=0.5))
    row.reserve(200)
    assert read(row, Text(60).new, [5, 1]).isfinite().all()


def test_keys_are_turned_by_the_best_that_is_known_of_angles() -> None:
    """Also where more becomes known within a segment: what a row sees hangs on what it holds."""
    text, row = Text(400), row_of(replace(PLAIN, segment=100, positions="compact"))
    read(row, text.new.part(0, 256), [1])
    before = row.bank.turned
    read(row, text.new.part(256, 257), [1])
    assert before is not None
    assert row.bank.turned is not None
    assert not torch.equal(row.bank.turned.keys, before.keys)
    assert torch.equal(row.bank.turned.keys, row.bank._turned(row.angles).keys)
