"""What is written to a memory, against a slow one that takes a token after the other."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from ullage.kv.memory import GRID, Memory

HEADS, DIM = 2, 4


@dataclass
class Slot:
    """One slot of one head; `like` is the key that tokens of a write are compared with."""

    key: torch.Tensor
    value: torch.Tensor
    count: int
    stamp: int
    like: torch.Tensor


@dataclass
class Slow:
    """One head's memory by the definition."""

    size: int
    threshold: float
    cap: int
    centred: bool = False
    slots: list[Slot | None] = field(init=False)

    def __post_init__(self) -> None:
        self.slots = [None] * self.size

    def write(self, keys: torch.Tensor, values: torch.Tensor, first: int) -> None:
        tokens = list(zip(keys, values, range(first, first + len(keys)), strict=True))
        if not any(self.slots):
            self._place([tokens.pop(0)])
        for slot in filter(None, self.slots):
            slot.like = slot.key
        self._place([token for token in tokens if not self._merge(*token)])
        for slot in filter(None, self.slots):
            slot.count = min(slot.count, self.cap or slot.count)

    def _merge(self, key: torch.Tensor, value: torch.Tensor, stamp: int) -> bool:
        filled = [slot for slot in self.slots if slot is not None]
        middle = sum(slot.like for slot in filled) / len(filled) if self.centred else 0
        cosines = [cosine_similarity(key - middle, slot.like - middle, dim=0) for slot in filled]
        alike = [round(float(cosine) / GRID) * GRID for cosine in cosines]
        best = max(range(len(filled)), key=alike.__getitem__)
        if alike[best] < self.threshold:
            return False
        slot = filled[best]
        slot.key = (slot.key * slot.count + key) / (slot.count + 1)
        slot.value = (slot.value * slot.count + value) / (slot.count + 1)
        slot.count, slot.stamp = slot.count + 1, stamp
        return True

    def _place(self, tokens: list[tuple[torch.Tensor, torch.Tensor, int]]) -> None:
        """Over the stalest, round and round."""
        stamps = [-1 if slot is None else slot.stamp for slot in self.slots]
        order = sorted(range(self.size), key=stamps.__getitem__)
        for at, (key, value, stamp) in enumerate(tokens):
            self.slots[order[at % self.size]] = Slot(key, value, 1, stamp, key)


def empty(size: int, centred: bool = False) -> Memory:
    stamps = torch.arange(size, dtype=torch.int32).expand(HEADS, -1) - (1 << 30)
    zeros = torch.zeros(HEADS, size, DIM)
    return Memory(zeros, zeros, torch.zeros_like(stamps), stamps, centred)


def randn(seed: int, tokens: int) -> torch.Tensor:
    """Keys that are like each other by and by, as those of a text are."""
    random = torch.Generator().manual_seed(seed)
    kinds = torch.randn(HEADS, 5, DIM, generator=random)
    chosen = torch.randint(5, (tokens,), generator=random)
    return kinds[:, chosen] + 0.4 * torch.randn(HEADS, tokens, DIM, generator=random)


def written(
    size: int,
    sizes: list[int],
    threshold: float,
    cap: int = 0,
    seed: int = 1,
    centred: bool = False,
) -> Memory:
    memory, at = empty(size, centred), 0
    keys, values = randn(seed, sum(sizes)), randn(seed + 1, sum(sizes))
    for tokens in sizes:
        span = slice(at, at + tokens)
        stamps = torch.arange(at, at + tokens, dtype=torch.int32)
        memory = memory.written(keys[:, span], values[:, span], stamps, threshold, at == 0)
        memory = memory.capped(cap)
        at += tokens
    return memory


@given(
    st.integers(1, 12),
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    st.sampled_from([-1.0, 0.0, 0.7, 0.9, 0.97, 1.5]),
    st.sampled_from([0, 1, 3]),
    st.integers(0, 1000),
    st.booleans(),
)
def test_a_segment_at_once_is_its_tokens_likened_one_by_one_to_the_slots_before_it(
    size: int, sizes: list[int], threshold: float, cap: int, seed: int, centred: bool
) -> None:
    memory = written(size, sizes, threshold, cap, seed, centred)
    keys, values = randn(seed, sum(sizes)), randn(seed + 1, sum(sizes))
    for head in range(HEADS):
        slow, at = Slow(size, threshold, cap, centred), 0
        for tokens in sizes:
            span = slice(at, at + tokens)
            slow.write(keys[head, span], values[head, span], at)
            at += tokens
        for place, slot in enumerate(slow.slots):
            if slot is None:
                assert memory.stamps[head, place] < 0
                continue
            assert memory.stamps[head, place] == slot.stamp
            assert memory.counts[head, place] == slot.count
            torch.testing.assert_close(memory.keys[head, place], slot.key)
            torch.testing.assert_close(memory.values[head, place], slot.value)


@pytest.mark.parametrize("sizes", [[4] * 9, [3, 5, 1, 40], [1] * 13, [25]])
def test_where_nothing_is_alike_the_newest_are_there(sizes: list[int]) -> None:
    size, tokens = 10, sum(sizes)
    memory = written(size, sizes, threshold=1.5)
    keys = randn(1, tokens)
    for head in range(HEADS):
        order = memory.stamps[head].argsort()
        assert memory.stamps[head, order].tolist() == list(range(tokens - size, tokens))
        assert torch.equal(memory.keys[head, order], keys[head, -size:])
        assert memory.counts.eq(1).all()


def test_where_all_is_alike_there_is_one_slot() -> None:
    memory = written(6, [7, 1, 12], threshold=-1)
    assert (memory.stamps >= 0).sum(1).tolist() == [1, 1]
    assert memory.counts[:, 0].tolist() == [20, 20]
    torch.testing.assert_close(memory.keys[:, 0], randn(1, 20).mean(1))
    torch.testing.assert_close(memory.values[:, 0], randn(2, 20).mean(1))


def test_an_empty_slot_is_like_nothing() -> None:
    memory = written(8, [3], threshold=1.5)
    likeness = memory.directions().likeness(torch.zeros(HEADS, 2, DIM)) * GRID
    assert likeness[:, :, 3:].eq(-2).all()
    assert likeness[:, :, :3].eq(0).all()


def test_of_slots_equally_like_a_token_the_first_is_taken() -> None:
    """However the model rounded their keys."""
    key = torch.randn(HEADS, 1, DIM, generator=torch.Generator().manual_seed(1))
    for noise in (1e-6, -1e-6):
        memory = empty(6)
        twins = torch.cat([-key, key * (1 + noise), key, key], 1)
        memory = memory.written(twins, twins, torch.arange(4, dtype=torch.int32), 2.0, True)
        assert memory.directions().nearest(key, 2)[0, 0].nonzero().flatten().tolist() == [1, 2]
        after = memory.written(key, key, torch.tensor([9], dtype=torch.int32), 0.9, False)
        assert after.counts[0].tolist() == [1, 2, 1, 1, 0, 0]


def test_a_write_changes_nothing_in_place() -> None:
    before = written(4, [9, 2], threshold=0.9)
    parts = (before.keys, before.values, before.counts, before.stamps)
    copies = [part.clone() for part in parts]
    stamps = torch.arange(11, 17, dtype=torch.int32)
    before.written(randn(5, 6), randn(6, 6), stamps, 0.9, False)
    assert all(map(torch.equal, parts, copies))
